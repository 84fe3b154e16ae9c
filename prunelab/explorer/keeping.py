"""A lab's folder: its current network as :mod:`prunelab.saving` writes it, with the masks, plan and points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunelab.saving import described, read_folder, rebuilt, write_folder

_MASK = "mask:"


def write_lab(folder: Path, model: nn.Module, masks: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write a network and its masks, and a record of the rest that JSON can hold.

    Raises:
        PruneLabError: the folder cannot be written, or the network needs pickle.
    """
    tensors, network = described(model)
    held = {f"{_MASK}{name}": mask for name, mask in masks.items()}
    write_folder(folder, "lab", {**tensors, **held}, {"network": network, **record})


def read_lab(folder: Path, make_model: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """The reverse of :func:`write_lab`: network, masks and record.

    Raises:
        PruneLabError: the folder holds no lab, or its network is another one than ``make_model`` gives.
    """
    tensors, record = read_folder(folder, "lab")
    masks = {name.removeprefix(_MASK): tensors.pop(name) for name in list(tensors) if name.startswith(_MASK)}
    return rebuilt(make_model, tensors, record["network"]), masks, record
