"""A lab's folder that is trained from: its functions by import path, and processes that are started on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import killed
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import prunelab as pl
from prunelab.train.recipe import Recipe

RECIPE = Recipe(epochs=4, lr=0.05, batch_size=16, precision="no", label_smoothing=0.1, keep="last")
"""Of 44 images: three steps in an epoch, the last of them of 12 images."""
TIME = 180


class Net(nn.Module):
    """Two convolutions and a classifier, without norms, whose statistics would be those of one process's images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 6, 3, padding=1)
        self.fc = nn.Linear(6 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape ``(images, 4)``."""
        return self.fc(torch.relu(self.conv2(torch.relu(self.conv1(x)))).flatten(1))


def network(width: int = 8) -> nn.Module:
    """The same every time."""
    torch.manual_seed(3)
    return Net(width).double()


def images(count: int, seed: int) -> TensorDataset:
    """In float64, so that one process and two differ by its rounding alone."""
    held = killed.images(count, seed)
    return TensorDataset(held.tensors[0].double(), held.tensors[1])


class Read(Dataset[tuple[Tensor, Tensor]]):
    """Images read one by one; where the folder named in ``DIES_IN`` is in its third epoch, the process is killed."""

    def __init__(self, held: TensorDataset) -> None:
        self.held = held

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        file = Path(os.environ.get("DIES_IN", "nowhere")) / "checkpoints" / "training.json"
        if file.exists() and json.loads(file.read_text())["at"]["epoch"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        image, label = self.held[index]
        return image, label


def train(kind: str = "held") -> Any:
    """44 images, ``held`` in memory or of a ``loader``."""
    held = images(44, 0)
    if kind == "held":
        return held
    return DataLoader(Read(held), 16, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(3))


def val() -> Any:
    """31 images: an odd one is left for two processes."""
    return images(31, 1)


def missing() -> Any:
    """A set that is not there."""
    raise FileNotFoundError("no folder /data/imagenet")


def small_images() -> Any:
    """Images that the network does not take."""
    return TensorDataset(torch.zeros(8, 3, 5, 5).double(), torch.zeros(8).long())


def saved(folder: Path, kind: str = "held", **functions: Any) -> pl.Lab:
    """A lab with a plan by activations and a repair, written to a folder that can be trained from."""
    lab = pl.Lab(network(), images(44, 0), val(), criterion="apoz")
    lab.set("conv1", ratio=0.5)
    lab.set("conv2", ratio=0.2, grain="weight")
    lab.repair("least-squares")
    named = {"make_model": ("running:network", {"width": 8}), "train": ("running:train", {"kind": kind})}
    lab.save(folder, **{**named, "val": "running:val", "recipe": RECIPE, **functions})
    return lab


def launcher(processes: int) -> list[str]:
    """``accelerate launch`` of processes on this machine's CPU, as notebooks/several-machines.md has it."""
    # With --cpu, accelerate leaves several processes to MPI.
    return [
        "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", str(processes),
        "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
    ]  # fmt: skip


def command(*arguments: str, processes: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m`` with these arguments in one process, or in several that meet on a free port of this machine."""
    line = [sys.executable, "-m", *([*launcher(processes), "-m"] if processes > 1 else []), *arguments]
    support = str(Path(__file__).parent)
    surroundings = {
        **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [support, os.environ.get("PYTHONPATH")])), **environment,
    }  # fmt: skip
    with subprocess.Popen(line, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=TIME)
        except subprocess.TimeoutExpired:
            # The launcher ends its processes when it is asked to, not when it is killed.
            process.terminate()
            out, err = process.communicate(timeout=60)
            raise AssertionError(f"still running after {TIME} s: {out}{err}") from None
    return subprocess.CompletedProcess(line, process.returncode, out, err)
