"""What a channel hands on: the weights that read it, and its importance carried back from the network's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunelab.program.channels import Layer
from prunelab.program.ids import FIXED, Ids
from prunelab.program.nodes import Node, Ref
from prunelab.program.program import Program
from prunelab.program.weighted import Weighted, weight_value, weighted_nodes

Array = NDArray[np.float64]
Gain = Callable[[int, Ids, Ids], Array | float]
"""Takes a node with a weight, and the classes that it makes and reads; gives what |W| is multiplied by, of shape
``(made, read)`` or one that broadcasts to it."""


def next_weights(program: Program, layer: Layer) -> Array:
    """‖W[:, c]‖₂ over all weights that read a row's channels, shape ``(channels,)``; ones where none does."""
    squares = np.zeros(len(program.structure.label))
    for use in weighted_nodes(program):
        shape = program.nodes[use.weight].shape or ()
        for dim in range(len(shape)):
            ids = use.ids(program, dim)
            labels = None if ids is None or dim == use.dim else program.structure.label[ids]
            if labels is not None and np.isin(layer.labels, labels).any():
                weight = weight_value(program, use.weight).movedim(dim, 0).flatten(1)
                squares += np.bincount(labels, weight.square().sum(1).numpy(), len(squares))
    found = np.sqrt(squares[layer.labels])
    return found if found.any() else np.ones(layer.channels)


@dataclass(frozen=True)
class _Share:
    """Importance of every channel class at one value: ``values · exp(log)``, which no depth makes overflow."""

    values: Array
    log: float

    def plus(self, other: _Share) -> _Share:
        log = max(self.log, other.log)
        values = self.values * math.exp(self.log - log) + other.values * math.exp(other.log - log)
        return _Share(values, log)

    def scaled(self) -> _Share:
        largest = float(self.values.max(initial=0.0))
        return _Share(self.values / largest, self.log + math.log(largest)) if largest > 0 else self


# Weakly: a program takes what is known of it along.
_KNOWN: WeakKeyDictionary[Program, tuple[tuple[int, ...], Mapping[int, Array]]] = WeakKeyDictionary()


def importance(program: Program) -> Mapping[int, Array]:
    """What :func:`carried_back` gives, computed once as long as no weight is overwritten."""
    versions = program.versions()
    known = _KNOWN.get(program)
    if known is None or known[0] != versions:
        known = _KNOWN[program] = (versions, carried_back(program))
    return known[1]


def carried_back(program: Program, gain: Gain = lambda node, made, read: 1.0) -> Mapping[int, Array]:
    """Importance of every channel class at every site, s^l = |W^{l+1}|ᵀ s^{l+1} from ones at the network's outputs.

    Yu et al. 2018, 'NISP: pruning networks using neuron importance score propagation', arXiv 1711.05908, with ones in
    place of its feature ranking at the last layer (our reading). Carried back operator by operator: weights in absolute
    values, summed over the kernel, with batch norms folded in; branches add up; everything else passes it on. A layer
    that no output is known to depend on starts with ones too.

    Args:
        gain: what |W| is multiplied by, weight by weight: s_i = Σ_j |W_ji| · gain_ji · s_j. A grouped convolution whose
            groups go whole, as every channel of a depthwise one does, has none.

    Returns:
        by site, shape ``(classes,)``, indexed by channel class; the largest is 1.
    """
    sites = {site for layer in program.structure.layers for site in layer.sites}
    weighted = {use.node: use for use in weighted_nodes(program)}
    shares: dict[int, _Share] = {}
    found: dict[int, Array] = {}
    for output in program.outputs:
        if isinstance(output, Ref):
            _give(program, shares, output.index, _Share(_counts(program, output.index), 0.0))
    for node in reversed(program.nodes):
        share = shares.pop(node.index, None)
        if node.index in weighted and (share is None or not share.values.any()):
            share = _Share(_counts(program, node.index), 0.0)
        if share is None or node.kind != "op":
            continue
        if node.index in sites:
            found[node.index] = share.scaled().values
        back = _back(program, node, share, weighted.get(node.index), gain).scaled()
        for i in node.inputs:
            _give(program, shares, i, back)
    return {site: found.get(site, np.zeros(len(program.structure.label))) for site in sites}


def _give(program: Program, shares: dict[int, _Share], node: int, share: _Share) -> None:
    """Add a share to a value, of the classes that stand in it."""
    there = _counts(program, node) > 0
    own = _Share(np.where(there, share.values, 0.0), share.log)
    shares[node] = shares[node].plus(own) if node in shares else own


def _counts(program: Program, node: int) -> Array:
    """How often each channel class stands in a value."""
    value = program.structure.values[node]
    parts = value if isinstance(value, list) else [value or ()]
    all_ids = [ids[ids != FIXED] for dims in parts for ids in dims if ids is not None]
    labels = program.structure.label[np.concatenate(all_ids)] if all_ids else np.zeros(0, np.int64)
    return np.bincount(labels, minlength=len(program.structure.label)).astype(np.float64)


def _back(program: Program, node: Node, share: _Share, use: Weighted | None, gain: Gain) -> _Share:
    """A share of an operator's value as that of its inputs."""
    if use is not None:
        return _Share(_through(program, node, use, share.values, gain), share.log)
    if node.opname == "batch_norm":
        return _Share(share.values * _norm(program, node), share.log)
    return share


def _through(program: Program, node: Node, use: Weighted, share: Array, gain: Gain) -> Array:
    """(|W| · gain)ᵀ s; groups that go whole hand to each channel that they read what they make of it."""
    label = program.structure.label
    weight = weight_value(program, use.weight).abs()
    within = _within_groups(program, node, use, weight, share)
    if within is not None:
        return within
    made = use.ids(program, use.dim)
    if made is None:
        # A single output is no channel, and so has no share: it is all that there is.
        made, share = np.full(weight.shape[use.dim], FIXED), np.eye(1, len(label), FIXED)[0]
    each = _spread(share, label[made])
    found = np.zeros(len(share))
    for dim in range(weight.dim()):
        read = use.ids(program, dim)
        if dim != use.dim and read is not None:
            matrix = weight.movedim((use.dim, dim), (0, 1)).reshape(len(made), len(read), -1).sum(2)
            gained = matrix.numpy() * gain(node.index, label[made], label[read])
            found += np.bincount(label[read], each @ gained, len(share))
    return found


def _spread(share: Array, labels: Ids) -> Array:
    """Shares by place: those of a channel that stands in several places lie evenly over them."""
    return np.asarray((share / np.maximum(np.bincount(labels, minlength=len(share)), 1))[labels], np.float64)


def _within_groups(program: Program, node: Node, use: Weighted, weight: Tensor, share: Array) -> Array | None:
    """|W|ᵀ s of a grouped convolution whose groups go whole, so that it reads the channels that it makes.

    A depthwise convolution is one: each channel is a group. None where it is no such convolution.

    Args:
        weight: |W|, of shape ``(made, read of a group, …)``, and of a transposed one ``(read, made of a group, …)``.
    """
    groups = int(node.args.get("groups", 1))
    given, label = node.args.get("input"), program.structure.label
    if groups == 1 or not isinstance(given, Ref):
        return None
    places = [program.structure.values[i] for i in (node.index, given.index)]
    made, read = (dims[1 - weight.dim()] if isinstance(dims, tuple) else None for dims in places)
    if made is None or read is None or not np.isin(label[made], label[read]).all():
        return None
    matrices = weight.flatten(2).sum(2).unflatten(0, (groups, -1))
    matrices = matrices if use.dim == 0 else matrices.transpose(1, 2)
    each = torch.from_numpy(_spread(share, label[made])).view(groups, 1, -1)
    return np.asarray(np.bincount(label[read], (each @ matrices).flatten().numpy(), len(share)), np.float64)


def _norm(program: Program, node: Node) -> Array:
    """|γ| / σ by channel class; one where a norm's tensors are not parameters and buffers of its own."""
    scale = np.ones(len(program.structure.label))
    states = [
        program.nodes[ref.index] for name in ("weight", "running_var") if isinstance(ref := node.args.get(name), Ref)
    ]
    dims = program.structure.values[states[0].index] if len(states) == 2 else None
    if not isinstance(dims, tuple) or dims[0] is None or any(s.kind != "state" for s in states):
        return scale
    weight, variance = (program.state(s.target).double().cpu().numpy() for s in states)
    scale[program.structure.label[dims[0]]] = np.abs(weight) / np.sqrt(variance + float(node.args["eps"]))
    return scale
