"""A selection: exactly which units are bypassed, which channels stay and which single weights are zeroed.

It is what preview, cost and commit all read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Selection:
    """A plan resolved against a program and a profile.

    Attributes:
        kept: for every layer that loses channels, the channels that stay, ascending; the layers are those of the
            network with the units bypassed.
        masks: for every weight with single weights removed, a boolean tensor of the weight's own (uncut)
            shape, True where the weight stays.
        bypassed: names of the units that are bypassed, sorted.
    """

    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    bypassed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        kept = {name: tuple(int(c) for c in channels) for name, channels in self.kept.items()}
        object.__setattr__(self, "kept", MappingProxyType(kept))
        object.__setattr__(self, "masks", MappingProxyType(dict(self.masks)))
        object.__setattr__(self, "bypassed", tuple(sorted(set(self.bypassed))))

    @cached_property
    def digest(self) -> str:
        """A name for the content: equal selections have equal digests."""
        text = hashlib.blake2b(repr((sorted(self.kept.items()), self.bypassed)).encode(), digest_size=12)
        for name in sorted(self.masks):
            text.update(name.encode())
            text.update(self.masks[name].to(torch.uint8).cpu().numpy().tobytes())
        return text.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selection) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def with_masks(selection: Selection, masks: Mapping[str, Tensor]) -> Selection:
    """The selection with the weights that are held at zero already."""
    joined = {**masks, **selection.masks}
    for name in masks.keys() & selection.masks.keys():
        joined[name] = masks[name].cpu() & selection.masks[name].cpu()
    return replace(selection, masks=joined)


DENSE = Selection()
"""Nothing removed."""
