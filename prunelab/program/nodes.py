"""The traced network as plain data: nodes that call operators, and references between them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

INPLACE = re.compile(r"^(?!__)(.*[^_])_$")
"""Names of operators that overwrite their first argument."""


@dataclass(frozen=True, slots=True)
class Ref:
    """The value of another node, as an argument."""

    index: int


@dataclass(frozen=True, slots=True)
class Node:
    """One step of the program.

    Attributes:
        index: position in ``Program.nodes``; arguments always point to lower indices.
        kind: ``input`` (an argument of forward), ``state`` (a parameter or buffer), ``op``, ``dropped`` (inside a
            bypassed module: it has no value).
        name: the name that the exporter gave the value.
        op: what is called (``op`` nodes only): an ATen overload or a Python operator.
        args: arguments by name, for ATen overloads with every default filled in; Python operators have
            ``"0"``, ``"1"``, … Values of other nodes are :class:`Ref`.
        inputs: indices of the nodes that ``args`` refers to, in order of first use.
        shape: sizes for a batch of one image, or None when the value is not one tensor.
        batched: for every dimension, whether its size grows with the batch.
        shapes: shapes of the parts when the value is a list of tensors.
        module: dotted path of the module whose forward made the value ("" for the network itself).
        source: file and line of the user's code, for messages.
        overwrites: the value whose memory the user's in-place operator overwrites, or None; ``op`` is its pure twin
            wherever nobody can tell the difference.
        target: for ``state`` nodes, the name in ``state_dict`` style; aliases share the first name.
    """

    index: int
    kind: Literal["input", "state", "op", "dropped"]
    name: str
    op: Callable[..., Any] | None
    args: Mapping[str, Any]
    inputs: tuple[int, ...]
    shape: tuple[int, ...] | None
    batched: tuple[bool, ...]
    shapes: tuple[tuple[int, ...], ...]
    module: str
    source: str
    target: str = ""
    overwrites: int | None = None

    @property
    def opname(self) -> str:
        """Short operator name without overload, in-place or not: ``conv2d``, ``add``, ``getitem``."""
        if self.op is None:
            return self.kind
        packet = getattr(self.op, "overloadpacket", None)
        name = str(packet.__name__ if packet is not None else self.op.__name__)
        return INPLACE.sub(r"\1", name)


def is_inplace(op: Any) -> bool:
    """Whether an operator overwrites its first argument."""
    packet = getattr(op, "overloadpacket", None)
    return packet is not None and INPLACE.match(packet.__name__) is not None


def may_give_back(op: Any) -> bool:
    """Whether an operator's value may lie in the memory of its first argument."""
    schema = getattr(op, "_schema", None)
    if schema is None:
        return op is operator.getitem
    # In evaluation mode dropout gives back its input, whatever its schema says.
    return "dropout" in schema.name or any(r.alias_info is not None for r in schema.returns)


def map_refs(value: Any, fn: Callable[[int], Any]) -> Any:
    """Copy an argument, each :class:`Ref` in it (also inside lists) replaced by ``fn(index)``."""
    if isinstance(value, Ref):
        return fn(value.index)
    if isinstance(value, list | tuple):
        return type(value)(map_refs(v, fn) for v in value)
    return value
