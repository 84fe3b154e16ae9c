"""A lab's folder: its current network as :mod:`prunelab.saving` writes it, with masks, the plan's cut, and a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunelab.program.record import selection_of
from prunelab.program.selection import Selection
from prunelab.saving import Record, described, read_folder, rebuilt, write_folder

_MASK, _CUT = "mask:", "cut:"


@dataclass(frozen=True)
class Kept:
    """What a lab's folder holds.

    Attributes:
        model: the network.
        masks: weights held at zero, by parameter name: True where a weight stays.
        cut: what the plan removes from the network. It stands beside the plan, so that whoever commits it needs neither
            the profile nor a criterion of the user's own, and cuts what was seen.
        record: the rest, as values that JSON can hold.
    """

    model: nn.Module
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    cut: Selection = field(default_factory=Selection)
    record: Mapping[str, Any] = field(default_factory=dict)


def write_lab(folder: Path, kept: Kept) -> None:
    """Write a network, its masks and the rest.

    Raises:
        PruneLabError: the folder cannot be written, or the network needs pickle.
    """
    tensors, network = described(kept.model)
    masks = {f"{_MASK}{name}": mask for name, mask in kept.masks.items()}
    cut_masks = {f"{_CUT}{name}": mask for name, mask in kept.cut.masks.items()}
    cut = {"kept": {layer: list(c) for layer, c in kept.cut.kept.items()}, "bypassed": list(kept.cut.bypassed)}
    write_folder(folder, "lab", {**tensors, **masks, **cut_masks}, {"network": network, "cut": cut, **kept.record})


def read_lab(folder: Path, maker: Callable[[Record], Callable[[], nn.Module]]) -> Kept:
    """The reverse of :func:`write_lab`.

    Args:
        maker: takes the record, gives the function that builds the uncut network.

    Raises:
        PruneLabError: the folder holds no lab, or its network is another one than the function gives.
    """
    tensors, record = read_folder(folder, "lab")
    masks = _taken(tensors, _MASK)
    cut = selection_of(record["cut"]) if "cut" in record else Selection()
    cut = Selection(cut.kept, _taken(tensors, _CUT), cut.bypassed)
    return Kept(rebuilt(maker(record), tensors, record["network"]), masks, cut, record)


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors whose names begin so, taken from among the others."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
