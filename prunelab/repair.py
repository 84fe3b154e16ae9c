"""Repair: the surviving weights corrected in closed form from a sample of images, without training.

Removing channels takes inputs away from the layers that read them. Least squares chooses what is left of their weights
anew, so that their outputs come as near as they can to what they were. It goes from input to output, so that each
layer sees what the earlier ones have become.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from prunelab.errors import PruneLabError, unknown
from prunelab.plan import REPAIRS
from prunelab.profile.batches import inputs_of
from prunelab.program.ids import Dims
from prunelab.program.nodes import Node, Ref
from prunelab.program.program import Program
from prunelab.program.run import bind, kept_index, removed_labels
from prunelab.program.selection import Selection

# Equations per unknown: beyond this the answer no longer changes, only the time does.
_ROWS_PER_UNKNOWN = 40
_LEAST_ROWS = 50_000


def repair(program: Program, selection: Selection, how: str, images: Tensor | None) -> dict[str, Tensor]:
    """Corrected tensors of the cut network, by state name, in its own (cut) shapes; those not named stay.

    Args:
        how: one of :data:`prunelab.plan.REPAIRS`.
        images: the sample, shape ``(images, …)``; a few hundred do.

    Raises:
        PruneLabError: there is no such repair, or it needs images.
    """
    if how not in REPAIRS:
        raise unknown("repair", how, REPAIRS)
    if how == "none" or not selection.kept:
        return {}
    if images is None or not len(images):
        raise PruneLabError(f"The repair {how!r} needs images: pass a few hundred of the training set.")
    return _least_squares(program, selection, images)


def _least_squares(program: Program, selection: Selection, images: Tensor) -> dict[str, Tensor]:
    """Walk the uncut and the cut network side by side; solve where a layer has lost inputs.

    The uncut network is the whole one: where units are bypassed, the layers after them make up for that too.
    """
    program = program.under(selection)
    whole = program.base
    dense, cut = bind(whole), bind(program, selection)
    gone = removed_labels(program, selection)
    label = program.structure.label
    repaired: dict[str, Tensor] = {}
    before: dict[int, Any] = {}
    now: dict[int, Any] = {}
    once = _used_once(program)
    feeds = [iter(inputs_of(program, images.to(dense.device))) for _ in range(2)]
    with torch.no_grad():
        for node in program.nodes:
            before[node.index] = dense.value(whole.nodes[node.index], before, feeds[0])
            if _repairable(program, node, once):
                dims = program.structure.values[node.args["weight"].index]
                assert isinstance(dims, tuple)
                if kept_index(dims[1], label, gone) is not None:
                    wanted = _kept(before[node.index], program.structure.values[node.index], label, gone)
                    repaired.update(_solve(program, node, now, wanted, selection))
            now[node.index] = cut.value(node, now, feeds[1])
            for values, last_used in ((before, whole.last_used), (now, program.last_used)):
                for dead in last_used[node.index]:
                    del values[dead]
    return repaired


def _used_once(program: Program) -> set[str]:
    """Parameters that a single operator reads: only they can be chosen for that operator alone."""
    reads = Counter(program.nodes[i].target for node in program.nodes for i in node.inputs)
    return {target for target, count in reads.items() if target and count == 1}


def _repairable(program: Program, node: Node, once: set[str]) -> bool:
    """Convolutions of images without groups, and linear layers, whose weight is used only once."""
    weight = node.args.get("weight")
    if node.opname not in ("conv2d", "linear") or not isinstance(weight, Ref):
        return False
    plain = int(node.args.get("groups", 1)) == 1 and not isinstance(node.args.get("padding"), str)
    return plain and program.nodes[weight.index].target in once


def _kept(value: Tensor, dims: Any, label: Any, gone: Any) -> Tensor:
    """The part of an uncut value that the cut network still computes."""
    kept: Dims = dims
    for dim, ids in enumerate(kept):
        index = kept_index(ids, label, gone)
        if index is not None and ids is not None:
            # Where heads are folded into the batch, they stand there once for every image.
            starts = np.arange(0, value.shape[dim], len(ids))
            all_ = torch.from_numpy((starts[:, None] + index).reshape(-1))
            value = value.index_select(dim, all_.to(value.device))
    return value


def _solve(
    program: Program, node: Node, values: dict[int, Any], wanted: Tensor, selection: Selection
) -> dict[str, Tensor]:
    """New weight and bias of one layer, by state name; written into ``values`` too, so that later layers see them.

    Solved for the change, with a ridge, so that directions which the sample does not show stay as they were.
    """
    weight_at = node.args["weight"].index
    bias_at = node.args["bias"].index if isinstance(node.args.get("bias"), Ref) else None
    weight, value = values[weight_at], values[node.args["input"].index]
    unknowns = weight[0].numel() + (bias_at is not None)
    gram = torch.zeros(unknowns, unknowns, dtype=torch.float64, device=weight.device)
    right = torch.zeros(unknowns, weight.shape[0], dtype=torch.float64, device=weight.device)
    old = _columns(weight.flatten(1), values[bias_at] if bias_at is not None else None)
    rows = 0
    for inputs, outputs in zip(torch.split(value, 32), torch.split(wanted, 32), strict=True):
        known, target = _equations(node, inputs, outputs, weight, bias_at is not None)
        gram += (known.T @ known).double()
        right += (known.T @ (target - known @ old.T.to(known.dtype))).double()
        rows += len(known)
        if rows > max(_LEAST_ROWS, _ROWS_PER_UNKNOWN * unknowns):
            break
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(unknowns, dtype=torch.float64, device=gram.device)
    new = old.double() + torch.linalg.solve(gram + ridge, right).T
    found = {weight_at: new[:, : weight[0].numel()].reshape(weight.shape)}
    if bias_at is not None:
        found[bias_at] = new[:, -1]
    name = program.nodes[weight_at].target
    if name in selection.masks:
        found[weight_at] = found[weight_at] * (values[weight_at] != 0)
    for at, tensor in found.items():
        values[at] = tensor.to(values[at].dtype)
    return {program.nodes[at].target: values[at] for at in found}


def _columns(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Weight and bias as one matrix, shape ``(outputs, unknowns)``."""
    return weight if bias is None else torch.cat([weight, bias[:, None]], 1)


def _equations(node: Node, inputs: Tensor, outputs: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """What a layer reads and what it should give, one row per position: ``(rows, unknowns)``, ``(rows, outputs)``."""
    if node.opname == "linear":
        known, target = inputs.flatten(0, -2), outputs.flatten(0, -2)
    else:
        geometry = {k: node.args[k] for k in ("stride", "padding", "dilation")}
        unfolded = functional.unfold(inputs, weight.shape[2:], **geometry)
        known = unfolded.movedim(1, 2).flatten(0, 1)
        target = outputs.flatten(2).movedim(1, 2).flatten(0, 1)
    if bias:
        known = torch.cat([known, torch.ones_like(known[:, :1])], 1)
    return known, target
