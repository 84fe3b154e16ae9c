"""Where a network has attention heads: found by following the parts of every reshape to a softmax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prunelab.program.context import Context, Value
from prunelab.program.hints import Place
from prunelab.program.ids import Ids, Ties
from prunelab.program.nodes import Node
from prunelab.program.rules import RULES, apply
from prunelab.program.shaping import regroup, reshape

_SOFTMAX = {"softmax", "_softmax"}


@dataclass(frozen=True)
class Attention:
    """One place where heads attend.

    Attributes:
        node: the softmax, or the fused attention.
        splits: the reshapes that make heads out of channels, and the dimension of the heads in their value.
    """

    node: int
    splits: Mapping[int, int]


def attentions(nodes: tuple[Node, ...]) -> tuple[Attention, ...]:
    """All places where heads attend, in order of execution.

    Every dimension that a reshape splits off gets marks of its own. Those that come to stand beside the positions
    of a softmax or of a fused attention are heads, and so are those that go together with them.
    """
    marks: dict[int, Place] = {}
    beside: dict[int, list[int]] = {}
    values: list[Value] = []
    ties = Ties()
    for node in nodes:
        if node.kind == "op":
            value = apply(Context(node, nodes, values, ties, {}))
            if RULES.get(node.opname) is reshape and isinstance(value, tuple):
                value = _marked(node, nodes, value, ties, marks)
            beside[node.index] = _beside_positions(node, values)
        else:
            value = None if node.shape is None else tuple(ties.fresh(n) if n > 1 else None for n in node.shape)
        values.append(value)
    label, _ = ties.labels()
    splits: dict[int, list[Place]] = {}
    for mark, place in marks.items():
        splits.setdefault(int(label[mark]), []).append(place)
    return tuple(
        Attention(at, dict(place for label_ in set(label[ids].tolist()) for place in splits.get(label_, ())))
        for at, ids in beside.items()
        if any(label_ in splits for label_ in label[ids].tolist())
    )


def _marked(
    node: Node, nodes: tuple[Node, ...], value: tuple[Ids | None, ...], ties: Ties, marks: dict[int, Place]
) -> tuple[Ids | None, ...]:
    """A reshape's value, with new marks along the dimensions that it splits one (or several) into."""
    source = nodes[node.inputs[0]]
    assert node.shape is not None
    out = list(value)
    for before, after in regroup(source, node) or ():
        long = [k for k in after if node.shape[k] > 1]
        if len(long) < 2 or (len(before) > 1 and not any(source.batched[k] for k in before)):
            continue
        for k in long:
            ids = out[k] = ties.fresh(node.shape[k])
            marks[int(ids[0])] = (node.index, k)
    return tuple(out)


def _beside_positions(node: Node, values: list[Value]) -> list[int]:
    """First marks of the dimensions along which a softmax or a fused attention does the same many times."""
    if node.opname == "scaled_dot_product_attention":
        read = [values[node.args[name].index] for name in ("query", "key", "value")]
        beside = [ids for dims in read if isinstance(dims, tuple) for ids in dims[:-2]]
    elif node.opname in _SOFTMAX and isinstance(dims := values[node.inputs[0]], tuple):
        along = int(node.args["dim"]) % len(dims)
        beside = [ids for k, ids in enumerate(dims) if k != along]
    else:
        return []
    return [int(ids[0]) for ids in beside if ids is not None]
