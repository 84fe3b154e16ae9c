"""Closed-form cost: parameters, MACs and FLOPs as products of sizes that are linear in what each layer keeps.

A term is ``coefficient · Π sizes``; a size is ``constant + Σ times · kept[layer]``. The same terms go to the
browser, so that it can do the same arithmetic while a hand moves a slider.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from prunelab.program.channels import Structure
from prunelab.program.compute import einsum_letters
from prunelab.program.ids import FIXED, Ids
from prunelab.program.nodes import Node, map_refs

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Size:
    """A linear form: ``constant + Σ times[k] · kept[layer[k]]``."""

    constant: int
    layers: tuple[tuple[int, int], ...] = ()

    def __call__(self, kept: list[int]) -> int:
        """The size when every layer keeps so many channels."""
        value = self.constant
        for layer, times in self.layers:
            value += times * kept[layer]
        return value


@dataclass(frozen=True)
class Term:
    """``coefficient · Π sizes``, with the parameter (``state``) or the node (``module``) it stands for."""

    coefficient: int
    sizes: tuple[Size, ...]
    name: str
    dtype_bytes: int = 0

    def __call__(self, kept: list[int]) -> int:
        """The product when every layer keeps so many channels."""
        value = self.coefficient
        for size in self.sizes:
            value *= size(kept)
        return value


@dataclass(frozen=True)
class Terms:
    """All terms of a network: one per parameter (and buffer), one per multiply-accumulating operator."""

    params: tuple[Term, ...]
    buffers: tuple[Term, ...]
    macs: tuple[Term, ...]


@dataclass(frozen=True)
class Cost:
    """What a network weighs and costs for one image.

    Attributes:
        params: parameters.
        nonzero: parameters that no weight mask zeroes.
        macs: multiply-accumulates per image.
        bytes: size of parameters and buffers in their own precision.
    """

    params: int
    nonzero: int
    macs: int
    bytes: int
    rows: tuple[tuple[str, int, int], ...] = field(default=(), repr=False)

    @property
    def flops(self) -> int:
        """FLOPs per image, 2·MACs, as ``torch.utils.flop_counter`` counts them.

        Attention counts in full, fused or not. That counter sees nothing of the fused kernels that PyTorch runs
        on a CPU or without gradients; it agrees when they are switched off (``sdpa_kernel(SDPBackend.MATH)``,
        ``torch.backends.mha.set_fastpath_enabled(False)``).
        """
        return 2 * self.macs

    def to_frame(self) -> pd.DataFrame:
        """One line per module: parameters and FLOPs."""
        import pandas as pd

        frame = pd.DataFrame(self.rows, columns=["module", "params", "flops"])
        return frame.groupby("module", sort=False).sum()

    def __str__(self) -> str:
        return f"{self.params:,} parameters, {self.flops:,} FLOPs per image, {self.bytes:,} bytes"


def terms(
    nodes: tuple[Node, ...],
    structure: Structure,
    parameters: dict[str, int],
    buffers: dict[str, int],
    images: int = 1,
) -> Terms:
    """Terms of every parameter, buffer and operator.

    Args:
        parameters: bytes per element of every parameter, by name; ``buffers`` likewise.
        images: how many images the nodes' shapes are for.
    """
    size = _sizer(structure)
    found: dict[str, Term] = {}
    for node in nodes:
        if node.kind == "state" and node.target not in found and node.shape is not None:
            dims = structure.values[node.index]
            assert isinstance(dims, tuple)
            width = parameters.get(node.target, buffers.get(node.target, 0))
            sizes = [size(ids, n) for ids, n in zip(dims, node.shape, strict=True)]
            found[node.target] = _term(1, sizes, node.target, width)
    return Terms(
        params=tuple(found[n] for n in parameters if n in found),
        buffers=tuple(found[n] for n in buffers if n in found),
        macs=tuple(
            replace(t, coefficient=t.coefficient // images)
            for node in nodes
            for t in _macs(node, nodes, structure, size)
        ),
    )


def _sizer(structure: Structure) -> Callable[[Ids | None, int], Size]:
    widths = [layer.channels for layer in structure.layers]
    cache: dict[int, Size] = {}

    def size(ids: Ids | None, length: int) -> Size:
        if ids is None:
            return Size(length)
        if id(ids) not in cache:
            owners = structure.owner[structure.label[ids]]
            owners = np.where(ids == FIXED, -1, owners)
            counts: NDArray[np.int64] = np.bincount(owners + 1, minlength=len(widths) + 1)
            pairs = tuple((int(k), int(counts[k + 1]) // widths[k]) for k in np.flatnonzero(counts[1:]))
            cache[id(ids)] = Size(int(counts[0]), pairs)
        return cache[id(ids)]

    return size


def _term(coefficient: int, sizes: list[Size], name: str, width: int = 0) -> Term:
    """Constant sizes go into the coefficient."""
    constants = [s.constant for s in sizes if not s.layers]
    return Term(coefficient * math.prod(constants), tuple(s for s in sizes if s.layers), name, width)


def _macs(node: Node, nodes: tuple[Node, ...], structure: Structure, size: Any) -> list[Term]:
    """Multiply-accumulates of one operator per image; empty where the FLOP counter counts none."""

    def sizes(index: int) -> list[Size]:
        dims, shape = structure.values[index], nodes[index].shape
        assert isinstance(dims, tuple) and shape is not None
        return [size(ids, n) for ids, n in zip(dims, shape, strict=True)]

    def of(argument: str) -> list[Size]:
        return sizes(node.args[argument].index)

    name = node.opname
    if name.startswith("conv_transpose") or name in ("conv1d", "conv2d", "conv3d"):
        weight = of("weight")
        positions = of("input") if "transpose" in name else sizes(node.index)
        # All but the channels: images, unless there is a single one without a dimension of its own, and places.
        batch, places = positions[: len(positions) - len(weight) + 1], positions[2 - len(weight) :]
        return [_term(1, [*weight, *batch, *places], node.module)]
    if name == "linear":
        return [_term(1, [*of("input")[:-1], *of("weight")], node.module)]
    if name in ("matmul", "bmm", "mm") and all(len(nodes[i].shape or ()) > 1 for i in node.inputs):
        return [_term(1, [of(next(iter(node.args)))[-1], *sizes(node.index)], node.module)]
    if name == "addmm":
        return [_term(1, [of("mat1")[-1], *sizes(node.index)], node.module)]
    if name == "einsum" and len(node.args["tensors"]) == 2 and (found := einsum_letters(node)) is not None:
        return _einsum_macs(*found, [sizes(r.index) for r in node.args["tensors"]], node.module)
    if name == "scaled_dot_product_attention":
        q, k, v = of("query"), of("key"), of("value")
        return [_term(1, [*q, k[-2]], node.module), _term(1, [*q[:-1], k[-2], v[-1]], node.module)]
    if name in _COUNTED:
        return [Term(_count(node, nodes), (), node.module)]
    return []


def _einsum_macs(letters: list[str], result: str, sizes: list[list[Size]], module: str) -> list[Term]:
    """An einsum of two operands is one batched matrix product; without anything to sum over it only multiplies.

    Where a cut leaves a single channel to sum over, torch multiplies too, and its counter counts nothing: that is
    not followed.
    """
    left, right = (dict(zip(own, given, strict=True)) for own, given in zip(letters, sizes, strict=True))
    summed = [x for x in left if x in right and x not in result and left[x] != Size(1)]
    taken = {**right, **{x: left[x] for x in left if left[x] != Size(1) or x not in right}}
    # What only one operand has and the result does not is summed before.
    used = [size for x, size in taken.items() if x in result or (x in left and x in right)]
    return [_term(1, used, module)] if summed else []


# Operators that multiply, and whose channels are all pinned: their cost is a constant, counted once.
_COUNTED = {
    "matmul",
    "einsum",
    "baddbmm",
    "addbmm",
    "bilinear",
    "lstm",
    "gru",
    "rnn_tanh",
    "rnn_relu",
    "lstm_cell",
    "gru_cell",
    "rnn_tanh_cell",
    "rnn_relu_cell",
}


def _count(node: Node, nodes: tuple[Node, ...]) -> int:
    """Multiply-accumulates as ``torch.utils.flop_counter`` counts them, on tensors without data."""

    def empty(index: int) -> Tensor:
        shape = nodes[index].shape
        assert shape is not None
        return torch.empty(shape, device="meta")

    assert node.op is not None
    with FlopCounterMode(display=False) as counter:
        node.op(**{argument: map_refs(value, empty) for argument, value in node.args.items()})
    return int(counter.get_total_flops()) // 2
