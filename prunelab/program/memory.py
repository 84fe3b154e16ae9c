"""Which values share memory once modules are identities, and what the user's in-place operators then overwrite.

An identity gives back the very tensor that it is given. An in-place operator after it, which overwrote the output of a
convolution before, now overwrites what the bypassed module was given; whoever reads that later reads the new values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from prunelab.errors import PruneLabError
from prunelab.program.nodes import Node, Ref, is_inplace, map_refs, may_give_back


def settled(
    nodes: tuple[Node, ...], outputs: tuple[Any, ...], sources: Mapping[int, int]
) -> tuple[tuple[Node, ...], tuple[Any, ...]]:
    """Nodes and outputs of a program with bypasses, reading what has been overwritten as it is by then.

    Args:
        sources: for the output node of every bypassed module, the node that it stands for.

    Raises:
        PruneLabError: part of a value is overwritten that is read later, or an input or a parameter would be.
    """
    roots, before = _roots(nodes, sources), _roots(nodes, dict.fromkeys(sources))
    same = list(range(len(nodes)))
    latest: dict[int, int] = {}
    written: dict[int, int] = {}
    found = []

    def now(index: int) -> int:
        """The value that stands in this value's memory at this point."""
        at = latest.get(same[index], index)
        writer = written.get(roots[at], at)
        if writer > at and nodes[at].shape is not None:
            raise PruneLabError(_said(nodes[writer]))
        return at

    for node in nodes:
        refs = {i: now(i) for i in node.inputs}
        found.append(_reading(node, refs) if any(i != at for i, at in refs.items()) else node)
        if node.index in sources:
            same[node.index] = same[sources[node.index]]
        elif node.overwrites is not None:
            root = roots[node.index]
            if nodes[root].kind != "op" and root != before[node.index]:
                raise PruneLabError(_said(node))
            if not is_inplace(node.op):
                same[node.index] = same[node.overwrites]
                latest[same[node.index]] = written[root] = node.index
    return tuple(found), tuple(map_refs(output, lambda i: Ref(now(i))) for output in outputs)


def _reading(node: Node, refs: Mapping[int, int]) -> Node:
    args = {name: map_refs(value, lambda i: Ref(refs[i])) for name, value in node.args.items()}
    return replace(node, args=args, inputs=tuple(dict.fromkeys(refs.values())))


def _said(node: Node) -> str:
    return f"your code overwrites its input in place ({node.source or node.name})"


def _roots(nodes: tuple[Node, ...], sources: Mapping[int, int | None]) -> list[int]:
    """For every value, the first value of the memory that it may lie in; ``sources`` None stands for new memory."""
    roots: list[int] = []
    for node in nodes:
        shared = sources[node.index] if node.index in sources else _shares(node)
        roots.append(node.index if shared is None else roots[shared])
    return roots


def _shares(node: Node) -> int | None:
    """The value whose memory a node's value may share."""
    if node.overwrites is not None:
        return node.overwrites
    first = next(iter(node.args.values()), None)
    return first.index if isinstance(first, Ref) and may_give_back(node.op) else None
