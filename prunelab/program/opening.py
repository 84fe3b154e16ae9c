"""Opening: cuts that only the user's forward stands in the way of, made possible by what it reads.

A forward reshapes to ``self.num_heads``, or to a width that it has read elsewhere. Where it does not follow a cut, a
few explanations are tried at that line of its code: that a number which the module keeps must follow, that heads are
as wide together as what the module is given, that a reshape splits otherwise. An explanation is taken when forward
then follows further; where none helps, the line's channels are pinned. The proof has the last word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice, product
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from prunelab.program.attention import Attention, attentions
from prunelab.program.hints import Hints, Place
from prunelab.program.nodes import Node
from prunelab.program.proof import Failure, Stand, attempt, first_failure, free_layers, unprovable
from prunelab.program.rules import RULES
from prunelab.program.shaping import reshape

if TYPE_CHECKING:
    from prunelab.program.program import Program

Build = Callable[[Hints], "Program"]
Tie = tuple[Place, Place]

_ROUNDS = 40
_NAMINGS = 4


def opened(build: Build, nodes: tuple[Node, ...]) -> Program:
    """The program with all that the user's forward can follow free, and all else pinned.

    Args:
        build: makes the program from hints.
    """
    heads = attentions(nodes)
    program = build(Hints(axes={node: axis for place in heads for node, axis in place.splits.items()}))
    return attempt(program, lambda stand: _opened(build, heads, stand)) or program


def _opened(build: Build, heads: tuple[Attention, ...], stand: Stand) -> Program | None:
    """The program opened, or None where there was nothing to do."""
    start, failure = stand, _failure(stand)
    for _ in range(_ROUNDS):
        if failure is None:
            return stand.program if stand is not start else None
        better = _further(_tried(build, heads, stand, failure), failure)
        if better is None:
            break
        stand, failure = better
    pins = unprovable(stand)
    return build(stand.program.hints.pinning(pins)) if pins else stand.program


def _failure(stand: Stand) -> Failure | None:
    """Where forward first leaves the program when all free layers are cut."""
    return first_failure(stand, free_layers(stand.program))


def _further(candidates: Iterable[Stand], failure: Failure) -> tuple[Stand, Failure | None] | None:
    """The first program that forward follows beyond where it failed before, and where it fails now."""
    for candidate in candidates:
        after = _failure(candidate)
        if after is None or (after.node is not None and failure.node is not None and after.node > failure.node):
            return candidate, after
    return None


def _tried(build: Build, heads: tuple[Attention, ...], stand: Stand, failure: Failure) -> Iterator[Stand]:
    """The program under every explanation, and at last with the channels of the failing line pinned."""
    if failure.node is None:
        return
    hints = stand.program.hints
    for explained in _explanations(stand.program, heads, failure.node):
        if explained != hints:
            yield stand.on(build(explained))
    yield stand.on(build(hints.pinning(_line_pins(stand.program, failure.node, failure.reason))))


def _line_pins(program: Program, at: int, reason: str) -> dict[int, str]:
    """Every class that stands in a value of a failing line, with the reason."""
    pins: dict[int, str] = {}
    for node in _same_line(program.nodes, at):
        value = program.structure.values[node.index]
        for ids in value if isinstance(value, tuple) else ():
            pins.update(dict.fromkeys(program.structure.label[ids].tolist() if ids is not None else (), reason))
    return pins


def _same_line(nodes: tuple[Node, ...], at: int) -> list[Node]:
    """A node, and the reshapes that the same line of the user's code makes, for example in every block."""
    here = nodes[at]
    alike = [n for n in nodes if n.source == here.source != "" and RULES.get(n.opname) is reshape]
    return alike if here in alike else [here, *alike]


def _explanations(program: Program, heads: tuple[Attention, ...], at: int) -> Iterator[Hints]:
    """What may be behind a forward that does not follow at a node, likelier ones first."""
    line = _same_line(program.nodes, at)
    namings = list(islice(_namings(program, line), _NAMINGS))
    widths = _widths(program, heads, line)
    for attributes in namings:
        yield program.hints.plus(attributes=attributes)
    for attributes in [*namings, {}] if widths else []:
        yield program.hints.plus(attributes=attributes, ties=widths)
    split = frozenset(n.index for n in line) & program.hints.axes.keys()
    if split:
        yield program.hints.plus(without_axes=frozenset(split))


def _namings(program: Program, line: list[Node]) -> Iterator[Mapping[tuple[str, str], Place]]:
    """Ways to name the sizes in a line's reshapes by numbers that the modules keep."""
    parts = dict(program.model.named_modules())
    sizes = [(node, k) for node in line if RULES.get(node.opname) is reshape for k in _removable(program, node)]
    names: dict[tuple[str, int], list[str]] = {}
    for node, k in sizes:
        assert node.shape is not None
        named = [name for _, name in _numbers(parts, node, node.shape[k])]
        if named:
            names.setdefault((node.opname, k), named)
    for choice in product(*names.values()) if names else ():
        chosen = dict(zip(names, choice, strict=True))
        found: dict[tuple[str, str], Place] = {}
        for node, k in sizes:
            assert node.shape is not None
            for path, name in _numbers(parts, node, node.shape[k]):
                if name == chosen.get((node.opname, k)):
                    found.setdefault((path, name), (node.index, k))
        yield found


def _removable(program: Program, node: Node) -> list[int]:
    """Dimensions of a value along which channels can go."""
    structure, value = program.structure, program.structure.values[node.index]
    free = np.array([*(not layer.pinned for layer in structure.layers), False])
    dims = value if isinstance(value, tuple) else ()
    return [k for k, ids in enumerate(dims) if ids is not None and free[structure.owner[structure.label[ids]]].any()]


def _numbers(parts: Mapping[str, nn.Module], node: Node, size: int) -> list[tuple[str, str]]:
    """Whole numbers equal to a size that the node's module keeps, or else the nearest module around it."""
    path = node.module
    while path in parts:
        if type(parts[path]).__module__.startswith("torch.nn.modules"):
            return []  # a cut sets the sizes of torch's own modules right by their class
        found = [(path, name) for name, value in vars(parts[path]).items() if type(value) is int and value == size]
        if found or not path:
            return found
        path = path.rpartition(".")[0]
    return []


def _widths(program: Program, heads: tuple[Attention, ...], line: list[Node]) -> tuple[Tie, ...]:
    """Heads side by side are as wide as what their module is given: for every attention of the line's modules."""
    modules = {node.module for node in line}
    ties = (_width(program, place) for place in heads if program.nodes[place.node].module in modules)
    return tuple(dict.fromkeys(tie for tie in ties if tie is not None))


def _width(program: Program, place: Attention) -> Tie | None:
    """The dimension in which heads lie side by side again, and the one of equal length that the module is given."""
    nodes, path = program.nodes, program.nodes[place.node].module
    around = f"{path}." if path else ""
    own = [n for n in nodes if n.kind == "op" and (n.module == path or n.module.startswith(around))]
    inside = {n.index for n in own}
    merged = next(((n, k) for n in own if n.index > place.node and (k := _merged(nodes, n)) is not None), None)
    if merged is None:
        return None
    node, k = merged
    assert node.shape is not None
    for i in (i for n in own for i in n.inputs if nodes[i].kind != "state" and i not in inside):
        given = nodes[i].shape
        if given and given[-1] == node.shape[k]:
            return (node.index, k), (i, len(given) - 1)
    return None


def _merged(nodes: tuple[Node, ...], node: Node) -> int | None:
    """The last dimension of a reshape that makes one of two there."""
    if RULES.get(node.opname) is not reshape:
        return None
    before = nodes[node.inputs[0]].shape
    if before is None or node.shape is None or len(before) < 2:
        return None
    return len(node.shape) - 1 if node.shape[-1] % before[-1] == 0 and node.shape[-1] > before[-1] else None
