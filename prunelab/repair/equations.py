"""The equations of one layer: what it reads, row by row, and the change of its weights that fits best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from prunelab.program.nodes import Node

RIDGES = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""What is tried as ridge, in units of the mean of the Gram matrix's diagonal."""
FIXED_RIDGE = 1e-3
"""The ridge where trying several would take too long, or where there are too few rows to hold some out."""

_MOST_TRIED = 2048
_CHUNK = 8192


def sampled(count: int, limit: int, seed: int) -> Tensor:
    """Which of ``count`` rows to look at, ascending, shape ``(rows,)``: all, or about ``limit`` drawn by the seed."""
    if count <= limit:
        return torch.arange(count)
    return torch.randint(count, (limit,), generator=torch.Generator().manual_seed(seed)).sort().values


def outputs_at(value: Tensor, channel: int, rows: Tensor) -> Tensor:
    """A value at some of its positions, shape ``(rows, channels)``.

    Args:
        channel: the dimension that the channels lie along, 1 (of images) or −1.
        rows: numbers of positions, counted over all other dimensions in order.
    """
    rows = rows.to(value.device)
    if channel == -1:
        return value.flatten(0, -2)[rows]
    flat = value.flatten(2)
    return flat[rows // flat.shape[2], :, rows % flat.shape[2]]


def convolution_inputs(
    x: Tensor, kernel: tuple[int, ...], args: Mapping[str, Any], sizes: tuple[int, ...], rows: Tensor
) -> Tensor:
    """What a convolution reads at some positions of its output, shape ``(rows, groups, kernel · inputs)``.

    Args:
        x: its input, shape ``(images, channels, …)``, with one to three image dimensions.
        kernel: lengths of its kernel; ``sizes`` those of its output's image.
        args: its stride, padding (numbers, ``"same"`` or ``"valid"``), dilation and groups.
    """
    stride, dilation = (_each(args[name], len(kernel)) for name in ("stride", "dilation"))
    padding = _paddings(args["padding"], kernel, dilation)
    x = functional.pad(x, [n for pair in reversed(padding) for n in pair])
    n, *places = torch.unravel_index(rows.to(x.device), (len(x), *sizes))
    lengths = x.shape[2:]
    start = n
    for place, step, length in zip(places, stride, lengths, strict=True):
        start = start * length + place * step
    steps = [prod(lengths[k + 1 :]) * d for k, d in enumerate(dilation)]
    corners = product(*(range(length) for length in kernel))
    offsets = [sum(p * s for p, s in zip(corner, steps, strict=True)) for corner in corners]
    flat = x.movedim(1, -1).flatten(0, -2)
    patches = torch.stack([flat[start + offset] for offset in offsets], 1)
    grouped: Tensor = patches.unflatten(2, (int(args["groups"]), -1))
    return grouped.movedim(2, 1).flatten(2)


def inputs_at(node: Node, x: Tensor, kernel: tuple[int, ...], args: Mapping[str, Any], rows: Tensor) -> Tensor:
    """What a linear layer or a convolution reads at some positions of its output, shape ``(rows, groups, inputs)``.

    Args:
        x: its input; ``kernel`` the lengths of its kernel.
        args: the node's, as the cut leaves them.
    """
    if node.opname == "linear":
        return outputs_at(x, -1, rows)[:, None]
    assert node.shape is not None
    return convolution_inputs(x, kernel, args, node.shape[2:], rows)


def as_columns(weight: Tensor, groups: int) -> Tensor:
    """A weight ``(outputs, inputs, …)`` in the order of the equations, shape ``(groups, kernel · inputs, outputs)``."""
    rows = weight.movedim(1, -1).flatten(1)
    return rows.reshape(groups, -1, rows.shape[1]).mT


def as_weight(columns: Tensor, shape: torch.Size) -> Tensor:
    """:func:`as_columns` undone."""
    rows = columns.mT.reshape(shape[0], *shape[2:], shape[1])
    return rows.movedim(-1, 1)


def _each(value: Any, count: int) -> list[int]:
    """One number for every image dimension."""
    listed = list(value) if isinstance(value, list | tuple) else [value]
    return listed * count if len(listed) == 1 else listed


def _paddings(padding: Any, kernel: tuple[int, ...], dilation: list[int]) -> list[tuple[int, int]]:
    """Zeros before and after, for every image dimension."""
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(n // 2, n - n // 2) for n in total]
    return [(n, n) for n in _each(0 if padding == "valid" else padding, len(kernel))]


@dataclass(frozen=True)
class Sums:
    """Normal equations, every group's apart, in float64.

    Attributes:
        gram: inputs by inputs, shape ``(groups, inputs, inputs)``.
        right: inputs by outputs, shape ``(groups, inputs, outputs)``.
    """

    gram: Tensor
    right: Tensor

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.gram + other.gram, self.right + other.right)

    def solved(self, ridge: float) -> Tensor:
        """The weights for a ridge in units of the mean of the Gram matrix's diagonal, shape of ``right``."""
        found: Tensor = torch.linalg.solve(self._ridged(ridge), self.right)
        return found

    def solved_under(self, mask: Tensor, ridge: float) -> Tensor:
        """The same where only the weights under the mask, of the shape of ``right``, may be other than zero."""
        gram, found = self._ridged(ridge), torch.zeros_like(self.right)
        for group, output in product(range(mask.shape[0]), range(mask.shape[2])):
            at = mask[group, :, output].nonzero()[:, 0]
            found[group, at, output] = torch.linalg.solve(gram[group][at][:, at], self.right[group, at, output])
        return found

    def _ridged(self, ridge: float) -> Tensor:
        return self.gram + ridge * self._unit() * torch.eye(self.gram.shape[1], dtype=torch.float64).to(self.gram)

    def _unit(self) -> Tensor:
        """Mean of the diagonal, shape ``(groups, 1, 1)``; one where a group reads nothing but zeros."""
        mean = self.gram.diagonal(dim1=1, dim2=2).mean(1)
        return torch.where(mean > 0, mean, 1)[:, None, None]

    def for_every(self, ridges: tuple[float, ...]) -> list[Tensor]:
        """What :meth:`solved` gives for each ridge, from one eigendecomposition."""
        lengths, axes = torch.linalg.eigh(self.gram)
        turned = axes.mT @ self.right
        # Rounding may leave a length of a singular matrix a little below zero.
        return [axes @ (turned / (lengths.clamp(min=0)[:, :, None] + r * self._unit())) for r in ridges]

    def error(self, weights: Tensor) -> float:
        """Sum of squares that these weights leave on these equations, less what no weights leave."""
        return float((weights * (self.gram @ weights - 2 * self.right)).sum())


def sums(known: Tensor, wanted: Tensor) -> Sums:
    """Normal equations for ``known @ weights = wanted``.

    Products of a few thousand rows are taken in the rows' own precision, and added up in float64.

    Args:
        known: shape ``(rows, groups, inputs)``.
        wanted: shape ``(rows, groups, outputs)``.
    """
    groups, inputs, outputs = known.shape[1], known.shape[2], wanted.shape[2]
    gram = torch.zeros(groups, inputs, inputs, dtype=torch.float64, device=known.device)
    right = torch.zeros(groups, inputs, outputs, dtype=torch.float64, device=known.device)
    for a, b in zip(torch.split(known, _CHUNK), torch.split(wanted, _CHUNK), strict=True):
        a, b = a.movedim(0, 1), b.movedim(0, 1)
        gram += a.mT @ a
        right += a.mT @ b
    return Sums(gram, right)


def fitted(known: Tensor, wanted: Tensor, mask: Tensor | None = None) -> Tensor:
    """Ridge regression: ``(KᵀK + λI)⁻¹ KᵀT``, shape ``(groups, inputs, outputs)``, in float64.

    The ridge is the one of :data:`RIDGES` with which each half of the rows predicts the other best; where even that
    predicts worse than zeros do, the answer is zeros.

    Args:
        known: shape ``(rows, groups, inputs)``, in order of the images; ``wanted``: ``(rows, groups, outputs)``.
        mask: where weights may be other than zero, in the shape of the answer.
    """
    half = len(known) // 2
    first, second = sums(known[:half], wanted[:half]), sums(known[half:], wanted[half:])
    ridge: float | None = FIXED_RIDGE
    if half and known.shape[2] <= _MOST_TRIED:
        errors = [
            second.error(a) + first.error(b)
            for a, b in zip(first.for_every(RIDGES), second.for_every(RIDGES), strict=True)
        ]
        best = min(range(len(RIDGES)), key=errors.__getitem__)
        ridge = RIDGES[best] if errors[best] < 0 else None
    both = first + second
    if ridge is None:
        return torch.zeros_like(both.right)
    return both.solved(ridge) if mask is None else both.solved_under(mask, ridge)
