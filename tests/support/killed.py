"""A short training to be killed: everything random that a training can have, in a network of three layers."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import prunelab as pl
from prunelab.train.augment import Augment
from prunelab.train.setting import accelerated

EVERY = 5


class Small(nn.Module):
    """A convolution, a norm, dropout and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(8 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape ``(images, 4)``."""
        return self.fc(self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1))


def network() -> nn.Module:
    """The same every time."""
    torch.manual_seed(1)
    return Small()


def images(count: int, seed: int) -> TensorDataset:
    """Noise with a brighter quarter, which is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    found = torch.randn(count, 3, 8, 8, generator=generator)
    for k, label in enumerate(labels.tolist()):
        found[k, :, 4 * (label // 2) :, 4 * (label % 2) :] += 0.5
    return TensorDataset(found, labels)


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """A set whose images are random anew whenever they are read, as with a user's random transforms."""

    def __init__(self, held: TensorDataset) -> None:
        self.held = held

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.held[index]
        return image + 0.1 * torch.randn(image.shape), label


def data(kind: str) -> Any:
    """Training images: ``held`` in memory, or of a ``loader`` in the order that its generator gives."""
    held = images(600, 0)
    if kind == "held":
        return held
    return DataLoader(Noisy(held), 16, shuffle=True, generator=torch.Generator().manual_seed(3))


def train(kind: str, folder: str, log: str, out: str) -> None:
    """Train in this process, note every step in ``log``, and write the weights to ``out`` at the end."""
    torch.set_num_threads(1)
    model = network()
    notes = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(done: int, total: int | None, what: str) -> bool:
        os.write(notes, f"{what.split()[1]} {done}\n".encode())
        return True

    augment = Augment(flip=True, crop=1, cutout=2) if kind == "held" else None
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 16, "lr": 0.05, "augment": augment, "seed": 7}
    pl.finetune(model, data(kind), images(100, 1), folder=folder, every=EVERY, progress=note, **settings)
    unnamed = Path(out).with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, unnamed)
    unnamed.rename(out)


def serve() -> None:
    """For every line of train's arguments, a process of its own, at once: what takes seconds to import is there.

    Says the process's number when it begins, and how it ended.
    """
    # What the first training imports besides.
    with accelerated("no"):
        importlib.import_module("torch._dynamo")
        importlib.import_module("pandas")
    for line in sys.stdin:
        process = os.fork()
        if not process:
            train(*line.split())
            os._exit(0)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
