"""Clusters of filters that are to become one: how channels are divided, for Centripetal SGD."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunelab.errors import PruneLabError, unknown
from prunelab.plan import Plan
from prunelab.program.channels import Layer
from prunelab.program.program import Program
from prunelab.program.selection import Selection
from prunelab.repair.merge import rows_of, unmergeable

_ROUNDS = 100
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Clusters:
    """Which channels are to become one.

    Attributes:
        of: by layer, the number of every channel's cluster, shape ``(channels,)``; each cluster is numbered by its
            first member.
        left: layers that stay as they are, with the reason.
    """

    of: Mapping[str, tuple[int, ...]]
    left: Mapping[str, str] = field(default_factory=dict)

    def selection(self) -> Selection:
        """What trimming keeps: the first member of every cluster."""
        return Selection({name: tuple(sorted(set(numbers))) for name, numbers in self.of.items()})

    def plan(self) -> Plan:
        """Trimming as a plan: each cluster's other members removed by hand, and merged into the first."""
        plan = Plan(repair="merge")
        for name, numbers in self.of.items():
            gone = tuple(k for k, first in enumerate(numbers) if k != first)
            plan = plan.set(name, remove=gone) if gone else plan
        return plan

    def to_json(self) -> str:
        """As text; :meth:`from_json` reads it."""
        return json.dumps({"of": {name: list(numbers) for name, numbers in self.of.items()}, "left": dict(self.left)})

    @staticmethod
    def from_json(text: str) -> Clusters:
        """The reverse of :meth:`to_json`.

        Raises:
            PruneLabError: the text is something else.
        """
        try:
            held = json.loads(text)
            return Clusters({str(k): tuple(int(n) for n in v) for k, v in held["of"].items()}, dict(held["left"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PruneLabError(f"These are no clusters ({error}).") from error


def clusters(
    program: Program, widths: float | Mapping[str, float | int], *, how: str = "kmeans", seed: int = 0
) -> Clusters:
    """Divide the channels of layers into as many clusters as are to be left.

    Where several weights make the same channels (a residual stream), the first of them, the pacesetter, decides for
    all (Ding et al. 2019, arXiv 1904.03837).

    Args:
        widths: the share of its channels that every layer is to keep, 0 to 1; or by layer a share, or a whole number of
            channels. Layers that are not named stay as they are.
        how: one of :data:`WAYS`.
        seed: of k-means.

    Raises:
        PruneLabError: no such layer or way, a width out of range, or a named layer that is pinned or whose equal
            channels cannot be merged.
    """
    if how not in WAYS:
        raise unknown("way to cluster", how, WAYS)
    refused = {layer.name: layer.pinned for layer in program.structure.layers if layer.pinned} | dict(
        unmergeable(program)
    )
    if isinstance(widths, Mapping):
        wanted = {program.layer(name).name: width for name, width in widths.items()}
        for name in wanted.keys() & refused.keys():
            raise PruneLabError(f"The channels of layer {name!r} cannot become one: {refused[name]}.")
    else:
        wanted = {layer.name: widths for layer in program.structure.layers if layer.name not in refused}
    found = {}
    for name, width in wanted.items():
        layer = program.layer(name)
        count = _count(layer, width)
        if count < layer.channels:
            numbers = WAYS[how](_filters(program, layer), count, seed)
            found[name] = tuple(int(np.flatnonzero(numbers == number)[0]) for number in numbers)
    return Clusters(found, {name: reason for name, reason in refused.items() if name not in found})


def _count(layer: Layer, width: float | int) -> int:
    """How many channels are to be left."""
    whole = isinstance(width, int) and not isinstance(width, bool)
    fits = 1 <= width <= layer.channels if whole else 0 < width <= 1
    if not fits:
        raise PruneLabError(
            f"Layer {layer.name!r} has {layer.channels} channels: keep a share of them above 0 and up to 1, or a whole "
            f"number from 1 to {layer.channels}, not {width!r}."
        )
    return int(width) if whole else max(1, round(width * layer.channels))


def _filters(program: Program, layer: Layer) -> Tensor:
    """The pacesetter's filters, flattened: shape ``(channels, values)``."""
    state, dim = layer.producers[0]
    slot = next(slot for slot in layer.slots if (slot.state, slot.dim) == (state, dim))
    return rows_of(program, slot).cpu()


def kmeans(rows: Tensor, count: int, seed: int) -> Numbers:
    """Lloyd's algorithm from k-means++ starts; no cluster is empty. Numbers of shape ``(rows,)``."""
    generator = torch.Generator().manual_seed(seed)
    centres = rows[torch.randint(len(rows), (1,), generator=generator)]
    while len(centres) < count:
        # Equal rows leave nothing to be drawn by distance.
        chance = torch.cdist(rows, centres).amin(1).square() + 1e-12
        centres = torch.cat([centres, rows[torch.multinomial(chance, 1, generator=generator)]])
    numbers = torch.full((len(rows),), -1)
    for _ in range(_ROUNDS):
        distances = torch.cdist(rows, centres)
        now = distances.argmin(1)
        for empty in sorted(set(range(count)) - set(now.tolist())):
            crowded = torch.bincount(now, minlength=count)[now] > 1
            now[(distances.gather(1, now[:, None])[:, 0].where(crowded, torch.tensor(-1.0))).argmax()] = empty
        if torch.equal(now, numbers):
            break
        numbers = now
        centres = torch.stack([rows[numbers == k].mean(0) for k in range(count)])
    return numbers.numpy()


def even(rows: Tensor, count: int, seed: int) -> Numbers:
    """Neighbours together, in clusters of equal size or one more."""
    return np.repeat(np.arange(count), [len(part) for part in np.array_split(np.arange(len(rows)), count)])


def imbalanced(rows: Tensor, count: int, seed: int) -> Numbers:
    """All that is too many in the first cluster, the others alone."""
    return np.maximum(np.arange(len(rows)) - (len(rows) - count), 0)


WAYS: Mapping[str, Callable[[Tensor, int, int], Numbers]] = MappingProxyType(
    {"kmeans": kmeans, "even": even, "imbalanced": imbalanced}
)
"""Ways to divide rows ``(rows, values)`` into so many clusters, by name, given a seed."""
