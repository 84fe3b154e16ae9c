"""What a rule sees of one node: its arguments' ids and shapes, and the ties to write into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prunelab.program.ids import Dims, Ids, Ties
from prunelab.program.nodes import Node, Ref

Value = Dims | list[Dims] | None


@dataclass
class Context:
    """One node while its channels are found.

    Attributes:
        node: the node; ``nodes`` all of them, and ``values`` the ids of those before it.
        ties: where rules write what goes together and what cannot go.
        axes: for reshapes that split a channel dimension, which part stays removable, by node index.
    """

    node: Node
    nodes: tuple[Node, ...]
    values: list[Value]
    ties: Ties
    axes: Mapping[int, int]

    def dims(self, name: str) -> Dims | None:
        """Ids of the tensor argument ``name``; None if it is absent or a number."""
        argument = self.node.args.get(name)
        value = self.values[argument.index] if isinstance(argument, Ref) else None
        return value if isinstance(value, tuple) else None

    def given(self, name: str) -> Dims:
        """Ids of the tensor argument ``name``, which the operator always has."""
        dims = self.dims(name)
        assert dims is not None
        return dims

    def first(self) -> Dims:
        """Ids of the first argument."""
        return self.given(next(iter(self.node.args)))

    def source(self, name: str = "self") -> Node:
        """The node whose value is the argument ``name``."""
        argument = self.node.args[name]
        assert isinstance(argument, Ref)
        return self.nodes[argument.index]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape (for a batch of one) of the tensor argument ``name``."""
        shape = self.source(name).shape
        assert shape is not None
        return shape

    @property
    def result(self) -> tuple[int, ...]:
        """Shape (for a batch of one) of the node's value."""
        assert self.node.shape is not None
        return self.node.shape

    @property
    def rank(self) -> int:
        """Number of dimensions of the node's value."""
        return len(self.result)

    def tie(self, a: Ids | None, b: Ids | None) -> None:
        """Tie, with a reason that names this operator."""
        self.ties.tie(a, b, f"{self.node.opname} joins it with channels that cannot be removed")

    def pin(self, dims: Dims | None, reason: str) -> None:
        """Pin every dimension of a value."""
        for ids in dims or ():
            self.ties.pin(ids, reason)

    def axis(self, name: str = "dim", of: str = "self") -> int:
        """A dimension argument counted from the front."""
        rank = len(self.shape(of))
        return int(self.node.args.get(name, 0)) % rank if rank else 0


Rule = Callable[[Context], Value]


def unknown(c: Context) -> Value:
    """Anything else pins what enters it, and gives back sizes that are fixed."""
    for i in c.node.inputs:
        value = c.values[i]
        for dims in value if isinstance(value, list) else [value]:
            c.pin(dims, f"the operator {c.node.opname} is not one whose channels can be followed")
    if c.node.shape is not None:
        return (None,) * len(c.node.shape)
    return [(None,) * len(shape) for shape in c.node.shapes]
