"""What a fast run changes in a network's nodes: norms go into the convolution before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prunelab.program.nodes import Node, Ref
from prunelab.program.program import Program

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


@dataclass(frozen=True)
class Fold:
    """A convolution or linear layer, and the batch norm that alone reads it, by node.

    Attributes:
        states: nodes of weight, bias, and the norm's weight, bias, mean and variance; None where there is none.
    """

    node: Node
    norm: Node
    states: tuple[int | None, ...]


def find_folds(program: Program) -> tuple[Fold, ...]:
    """The batch norms that a weighted operator's own weights can take over."""
    readers = Counter(i for node in program.nodes for i in node.inputs)
    readers.update(o.index for o in program.outputs if isinstance(o, Ref))
    found = []
    for norm in program.nodes:
        source = norm.args.get("input")
        if norm.opname != "batch_norm" or norm.args["training"] or not isinstance(source, Ref):
            continue
        node = program.nodes[source.index]
        linear = node.opname == "linear" and node.shape is not None and len(node.shape) == 2
        if readers[node.index] != 1 or not (linear or node.opname in _CONVOLUTIONS):
            continue
        given = [node.args["weight"], node.args.get("bias")]
        given += [norm.args[name] for name in ("weight", "bias", "running_mean", "running_var")]
        plain = all(a is None or (isinstance(a, Ref) and program.nodes[a.index].kind == "state") for a in given)
        if plain and given[4] is not None and given[5] is not None:
            found.append(Fold(node, norm, tuple(a.index if isinstance(a, Ref) else None for a in given)))
    return tuple(found)


def folded(fold: Fold, states: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution with its norm in them, in the shapes of the states given."""
    weight, bias, gamma, beta, mean, variance = (None if i is None else states[i] for i in fold.states)
    assert weight is not None and mean is not None and variance is not None
    scale = torch.rsqrt(variance + fold.norm.args["eps"])
    if gamma is not None:
        scale = scale * gamma
    shift = -mean if bias is None else bias - mean
    shift = shift * scale
    return weight * scale.reshape(-1, *[1] * (weight.dim() - 1)), shift if beta is None else shift + beta
