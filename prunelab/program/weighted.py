"""Operators that weigh their input: what their weights are worth, also where they are computed from others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunelab.program.channels import weights_of
from prunelab.program.ids import Ids
from prunelab.program.program import Program
from prunelab.program.run import Bound


@dataclass(frozen=True)
class Weighted:
    """An operator with a weight.

    Attributes:
        node: its index; ``weight`` that of the weight's value.
        dim: the weight's dimension that makes channels.
        states: names of the parameters that the weight is computed from; most often itself.
    """

    node: int
    weight: int
    dim: int
    states: frozenset[str]

    def ids(self, program: Program, dim: int) -> Ids | None:
        """Ids along a dimension of the weight."""
        dims = program.structure.values[self.weight]
        return dims[dim] if isinstance(dims, tuple) else None

    def channels_of(self, program: Program, state: str, dim: int) -> int | None:
        """The dimension of the operator's value along which all channels lie that a parameter makes, in order."""
        label = program.structure.label
        held = program.structure.values[program.state_nodes[state]]
        ids = held[dim] if isinstance(held, tuple) else None
        dims = program.structure.values[self.node]
        for axis, found in enumerate(dims if ids is not None and isinstance(dims, tuple) else ()):
            if found is not None and ids is not None and np.array_equal(label[found], label[ids]):
                return axis
        return None


def weighted_nodes(program: Program) -> list[Weighted]:
    """Every operator whose value is linear in a weight that no input has a part in."""
    origins: list[frozenset[str] | None] = []
    found = []
    for node in program.nodes:
        parts = [origins[i] for i in node.inputs]
        if node.kind == "state":
            origins.append(frozenset([node.target]))
        else:
            known = [part for part in parts if part is not None]
            constant = bool(parts) and len(known) == len(parts)
            origins.append(frozenset[str]().union(*known) if constant else None)
        for weight, dim in weights_of(node) if node.kind == "op" else ():
            states, shape = origins[weight], program.nodes[weight].shape
            if states is not None and shape is not None and len(shape) > 1:
                found.append(Weighted(node.index, weight, dim % len(shape), states))
    return found


def weight_value(program: Program, index: int) -> Tensor:
    """The value of a node that no input has a part in, in float64 on the processor."""
    bound = Bound(
        program,
        {n.index: program.state(n.target) for n in program.nodes if n.kind == "state" and n.shape is not None},
        {},
    )

    def value(at: int) -> Any:
        node = program.nodes[at]
        return bound.value(node, {i: value(i) for i in node.inputs}, iter(()))

    with torch.no_grad():
        found: Tensor = value(index)
    return found.detach().double().cpu()
