"""A profile that several processes make together, of each kind of data that can be shared out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support import Network
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

import prunelab as pl
from prunelab import zoo
from prunelab.processes import Processes
from prunelab.profile.result import Profile
from prunelab.profile.store import packed
from prunelab.train.run_folder import joined_processes

NETWORK = Network(zoo.lenet, (1, 28, 28))
IMAGES = NETWORK.images(61)


class Broken(Dataset[Tensor]):
    """Its last image cannot be read: the share of the last process."""

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> Tensor:
        if index == len(IMAGES) - 1:
            raise pl.PruneLabError("This image cannot be read.")
        return IMAGES[index]


class Plain(Dataset[tuple[Tensor, int]]):
    """Read one by one."""

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return IMAGES[index], 0


DATA: dict[str, Callable[[], Any]] = {
    "tensor": lambda: IMAGES,
    "held": lambda: TensorDataset(IMAGES, torch.zeros(61).long()),
    "set": Plain,
    "loader": lambda: DataLoader(Plain(), 7, drop_last=True),
}


def made(kind: str, **settings: Any) -> Profile:
    """The profile of one kind of data; the first process alone has not as many images as are kept."""
    program = pl.trace(NETWORK.build(), IMAGES[:2], prove=False)
    return pl.profile(program, DATA[kind](), **{"sample": 45, "batch_size": 10, "progress": False, **settings})


def values(found: Profile) -> dict[str, Tensor]:
    """All of a profile, as tensors by name."""
    kept = {"activations": found.activations, "pooled": found.pooled}
    named = {f"{name}/{site}": value for name, by_site in kept.items() for site, value in by_site.items()}
    return {**packed(found.statistics), **named, "images": torch.tensor(found.images)}


def refused(work: Callable[[], Any]) -> str:
    """What somebody is told."""
    try:
        work()
    except (pl.PruneLabError, pl.Stopped) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(folder: Path) -> None:
    """Profile together; what each process got and was told is written to the folder."""
    with joined_processes() as (processes, _):
        for kind in DATA:
            save_file(values(made(kind, together=True, cache=False)), folder / f"{kind}-{processes.index}")
        # Each its own cache folder, as on machines that share none: the second time only the main one has it.
        for turn in ("kept", "found"):
            found = made("set", together=True, cache=folder / f"cache-{processes.index}")
            save_file({k: v.contiguous() for k, v in values(found).items()}, folder / f"{turn}-{processes.index}")
        (folder / f"said-{processes.index}").write_text(told(processes))


def told(processes: Processes) -> str:
    """What a process is told where one cannot go on, and where the main one stops."""
    program = pl.trace(NETWORK.build(), IMAGES[:2], prove=False)
    shuffled = DataLoader(Plain(), 7, shuffle=True)
    return os.linesep.join(
        refused(lambda data=data, progress=progress: pl.profile(program, data, together=True, cache=False,
                                                               progress=progress))
        for data, progress in ((Broken(), False), (Plain(), lambda *_: False), (shuffled, False),
                               (DataLoader(Plain(), 61), False))
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
