"""Channel ids: which positions of which tensors stand for the same channel.

Every position along every dimension of every parameter and buffer starts as an id of its own. Operators tie
ids together (a convolution ties its input's channels to dimension 1 of its weight) or pin them (an output
class cannot go). What is tied in the end is a *channel class*: the slots that must be removed together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
# One entry per dimension: the ids along it, or None where nothing can be removed (batch, positions, kernels).
Dims = tuple[Ids | None, ...]

FIXED = 0
"""The id of a position that belongs to nothing removable, for example a channel of the input image."""


@dataclass
class Ties:
    """Collects what operators say about ids; the only mutable thing while a network's channels are found."""

    count: int = 1
    left: list[Ids] = field(default_factory=list)
    right: list[Ids] = field(default_factory=list)
    pinned: list[tuple[Ids, str]] = field(default_factory=list)

    def fresh(self, size: int) -> Ids:
        """New ids, shape ``(size,)``."""
        ids = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        return ids

    def tie(self, a: Ids | None, b: Ids | None, reason: str) -> None:
        """Positions ``a[i]`` and ``b[i]`` go together; where one is fixed the other is pinned."""
        if a is None or b is None:
            self.pin(b if a is None else a, reason)
            return
        if a is b:
            return
        if a.shape != b.shape:
            # Broadcast or otherwise unlike: they do not meet one by one.
            self.pin(a, reason)
            self.pin(b, reason)
            return
        fixed = (a == FIXED) | (b == FIXED)
        if fixed.any():
            self.pin(a[fixed], reason)
            self.pin(b[fixed], reason)
            a, b = a[~fixed], b[~fixed]
        self.left.append(a)
        self.right.append(b)

    def pin(self, ids: Ids | None, reason: str) -> None:
        """These ids cannot be removed."""
        if ids is not None and ids.size:
            self.pinned.append((ids[ids != FIXED], reason))

    def labels(self) -> tuple[Ids, dict[int, str]]:
        """Connected components.

        Returns:
            label of every id, shape ``(count,)`` (the smallest id of its class), and the reason for every
            pinned label.
        """
        label = np.arange(self.count, dtype=np.int64)
        if self.left:
            a, b = np.concatenate(self.left), np.concatenate(self.right)
            while True:
                # Hook the larger root under the smaller, then shorten all paths: a few rounds, all in numpy.
                low, high = np.minimum(label[a], label[b]), np.maximum(label[a], label[b])
                open_ = low != high
                if not open_.any():
                    break
                np.minimum.at(label, high[open_], low[open_])
                while (label != label[label]).any():
                    label = label[label]
        reasons: dict[int, str] = {}
        for ids, reason in self.pinned:
            for root in np.unique(label[ids]).tolist():
                reasons.setdefault(root, reason)
        return label, reasons


def merge(parts: list[tuple[int, Ids | None]], ties: Ties, reason: str) -> Ids | None:
    """Ids of several dimensions flattened into one.

    Args:
        parts: size and ids of each dimension, outermost first.
    """
    tagged = [k for k, (_, ids) in enumerate(parts) if ids is not None and (ids != FIXED).any()]
    if not tagged:
        return None
    for k in tagged[1:]:
        # A position would go when either factor goes: not a set of channels any more.
        ties.pin(parts[k][1], reason)
    keep = tagged[0]
    outer = int(np.prod([n for n, _ in parts[:keep]], dtype=np.int64))
    inner = int(np.prod([n for n, _ in parts[keep + 1 :]], dtype=np.int64))
    ids = parts[keep][1]
    assert ids is not None
    return np.tile(np.repeat(ids, inner), outer)


def split(ids: Ids | None, sizes: list[int], axis: int | None, ties: Ties) -> list[Ids | None]:
    """Ids of one dimension unfolded into several.

    Where the ids already vary along one of the new dimensions only (a flatten undone), that dimension gets
    them. Else the part must stay a full grid, so the positions of each index along ``axis`` are tied across
    all other dimensions.

    Args:
        axis: which new dimension stays removable; None picks the last one longer than 1.
    """
    out: list[Ids | None] = [None] * len(sizes)
    if ids is None or not (ids != FIXED).any():
        return out
    if not sizes:
        ties.pin(ids, "its dimension is dropped")
        return out
    long = [k for k, n in enumerate(sizes) if n > 1] or [len(sizes) - 1]
    columns = [np.moveaxis(ids.reshape(sizes), k, 0).reshape(sizes[k], -1) for k in long]
    for k, column in zip(long, columns, strict=True):
        if (column == column[:, :1]).all():
            out[k] = column[:, 0]
            return out
    k = axis if axis in long else long[-1]
    column = columns[long.index(k)]
    for other in range(1, column.shape[1]):
        ties.tie(column[:, 0], column[:, other], "it is reshaped together with what cannot shrink")
    out[k] = column[:, 0]
    return out
