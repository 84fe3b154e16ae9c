"""Units: layers and blocks that can be bypassed, with ``nn.Identity`` in their place.

A bypassed module gives back what it is given. That is possible where forward calls it once, with one tensor, for one
tensor of the same shape, and where no other value passes between its inside and its outside. Such modules are found
from the nodes, and each is proved on the user's own forward.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from prunelab.program.channels import ACTIVATIONS, NORMS, module_of
from prunelab.program.memory import settled
from prunelab.program.nodes import Node, Ref
from prunelab.program.proof import plainly_called, unprovable_bypasses
from prunelab.program.table import aligned
from prunelab.program.trace import aliases

if TYPE_CHECKING:
    import pandas as pd

    from prunelab.program.program import Program


@dataclass(frozen=True)
class Step:
    """One module to bypass: its path, the node whose value goes in, and the node whose value comes out."""

    module: str
    source: int
    output: int


@dataclass(frozen=True)
class Unit:
    """A part of the network that can be bypassed.

    Bypassing the module of a whole residual block leaves its shortcut alone: the block then gives back its input.

    Attributes:
        name: the module's path; for a run of layers, the first and the last layer's: ``"features.7 … features.12"``.
        grain: ``layer`` (one convolution or linear layer, with the norm and the activation after it where they are
            modules of its own) or ``block`` (a module with several of them, or a run of layers).
        steps: the modules that become ``nn.Identity``, in order; each reads what the one before it gives.
        first: index of the first node inside: the unit's place in the order of execution.
    """

    name: str
    grain: str
    steps: tuple[Step, ...]
    first: int

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules that become ``nn.Identity``."""
        return tuple(step.module for step in self.steps)

    @property
    def source(self) -> int:
        """Index of the node whose value goes in."""
        return self.steps[0].source

    @property
    def output(self) -> int:
        """Index of the node whose value is replaced by what goes in."""
        return self.steps[-1].output

    def holds(self, module: str) -> bool:
        """Whether the module with this path is, or lies in, one of the unit's."""
        return any(_within(module, own) for own in self.modules)


class Units(tuple[Unit, ...]):
    """The units in order of execution; prints as a table, and becomes a DataFrame."""

    shares: Mapping[str, tuple[float, float]]
    """By unit name: shares of the network's parameters and FLOPs, 0 to 1."""

    @classmethod
    def of(cls, units: Iterable[Unit], costs: Iterable[tuple[str, int, int]]) -> Units:
        """Units with their shares.

        Args:
            costs: module path, parameters and FLOPs of every part of the network.
        """
        table, rows = cls(units), list(costs)
        table.shares = {unit.name: _share(rows, unit) for unit in table}
        return table

    def rows(self) -> list[dict[str, Any]]:
        """One dict per unit: name, grain, modules bypassed, shares of parameters and FLOPs."""
        return [
            {
                "name": unit.name,
                "grain": unit.grain,
                "members": len(unit.steps),
                "params": self.shares[unit.name][0],
                "flops": self.shares[unit.name][1],
            }
            for unit in self
        ]

    def to_frame(self) -> pd.DataFrame:
        """The table as a DataFrame; ``params`` and ``flops`` are shares of the whole network, 0 to 1."""
        import pandas as pd

        return pd.DataFrame(self.rows(), columns=["name", "grain", "members", "params", "flops"]).set_index("name")

    def __repr__(self) -> str:
        body = [[r["name"], r["grain"], f"{r['members']}", f"{r['params']:.1%}", f"{r['flops']:.1%}"]
                for r in self.rows()]  # fmt: skip
        return aligned([["unit", "grain", "members", "params", "FLOPs"], *body])

    def _repr_html_(self) -> str:
        return str(self.to_frame().to_html(formatters={"params": "{:.1%}".format, "flops": "{:.1%}".format}))


def _share(rows: list[tuple[str, int, int]], unit: Unit) -> tuple[float, float]:
    own = [row for row in rows if unit.holds(row[0])]
    params, flops = sum(row[1] for row in own), sum(row[2] for row in own)
    return params / (sum(row[1] for row in rows) or 1), flops / (sum(row[2] for row in rows) or 1)


# Finding ---------------------------------------------


@dataclass(frozen=True)
class _Modules:
    """What the nodes say about modules, by path.

    Attributes:
        steps: those that forward calls once and that give one value of the shape of the one value they are given.
        first: index of the first node inside.
        inside: how many operators are inside.
        weighted: how many of them are convolutions and linear layers.
        kinds: names of the operators of the module's own forward.
    """

    steps: Mapping[str, Step]
    first: Mapping[str, int]
    inside: Mapping[str, int]
    weighted: Mapping[str, int]
    kinds: Mapping[str, set[str]]


def find_units(program: Program) -> tuple[Unit, ...]:
    """All units of a network in order of execution, larger ones before what they hold; each is proved."""
    modules = _modules(program)
    layers, blocks = _layers(program, modules), _blocks(modules)
    ends = {(unit.source, unit.output) for unit in blocks}
    runs = [run for run in _runs(program, layers) if (run.source, run.output) not in ends]
    found = sorted([*blocks, *runs, *layers], key=lambda unit: (unit.first, -unit.output))
    bad = unprovable_bypasses(program, _levels(found), lambda some: bypassed(program, some))
    return tuple(unit for unit in found if unit not in bad)


def _modules(program: Program) -> _Modules:
    nodes = program.nodes
    first: dict[str, int] = {}
    inside: Counter[str] = Counter()
    weighted: Counter[str] = Counter()
    kinds: dict[str, set[str]] = defaultdict(set)
    for node in nodes:
        for module in _paths(node.module) if node.kind == "op" else ():
            first.setdefault(module, node.index)
            inside[module] += 1
            weighted[module] += _is_weighted(node)
        kinds[node.module].add(node.opname)
    entering, leaving = _crossings(nodes, program.outputs)
    steps = {}
    for module in plainly_called(program) - _shared(program):
        given, made = entering[module], leaving[module]
        if len(given) == len(made) == 1:
            step = Step(module, *given, *made)
            before, after = nodes[step.source], nodes[step.output]
            if before.shape is not None and (before.shape, before.batched) == (after.shape, after.batched):
                steps[module] = step
    return _Modules(steps, first, inside, weighted, kinds)


def _crossings(nodes: tuple[Node, ...], outputs: Iterable[Any]) -> tuple[dict[str, set[int]], dict[str, set[int]]]:
    """Values that enter every module from outside, and values that leave it; states do not count."""
    entering: dict[str, set[int]] = defaultdict(set)
    leaving: dict[str, set[int]] = defaultdict(set)
    for node in nodes:
        here = set(_paths(node.module)) if node.kind == "op" else set()
        for i in node.inputs:
            value = nodes[i]
            there = set(_paths(value.module)) if value.kind == "op" else set()
            for module in here - there if value.kind != "state" and _is_tensor(value) else ():
                entering[module].add(i)
            for module in there - here if not is_size(nodes, i) else ():
                leaving[module].add(i)
    for output in outputs:
        for module in _paths(nodes[output.index].module) if isinstance(output, Ref) else ():
            leaving[module].add(output.index)
    return entering, leaving


def _is_tensor(node: Node) -> bool:
    return node.shape is not None or bool(node.shapes)


def is_size(nodes: tuple[Node, ...], index: int) -> bool:
    """Whether a value is arithmetic on the sizes of the network's inputs, which no bypass changes."""
    node = nodes[index]
    if node.kind != "op" or _is_tensor(node):
        return False
    return all(nodes[i].kind == "input" or is_size(nodes, i) for i in node.inputs)


def _shared(program: Program) -> set[str]:
    """Modules whose parameters or buffers something outside them holds or reads too."""
    around: dict[str, set[str]] = {}
    anywhere: set[str] = set()

    def seen(state: str, module: str) -> None:
        around[state] = around.get(state, set(_paths(module))) & set(_paths(module))

    for name, first in aliases(program.model).items():
        seen(first, name.rpartition(".")[0])
    for node in program.nodes:
        for i in node.inputs:
            if program.nodes[i].kind == "state":
                seen(program.nodes[i].target, node.module)
    for name, first in aliases(program.model).items():
        anywhere |= set(_paths(name.rpartition(".")[0])) - around[first]
    return anywhere


def _is_weighted(node: Node) -> bool:
    return node.opname == "linear" or (node.opname.startswith("conv") and "weight" in node.args)


def _layers(program: Program, modules: _Modules) -> list[Unit]:
    """Convolutions and linear layers of equal shape, each with the norm and then the activation that follow it."""
    readers = _readers(program)
    found = []
    for node in program.nodes:
        step = modules.steps.get(node.module) if _is_weighted(node) else None
        if step is None or modules.weighted[step.module] > 1:
            continue
        steps = [step]
        for kinds in (NORMS, ACTIVATIONS):
            following = readers[steps[-1].output]
            after = modules.steps.get(next(iter(following))) if len(following) == 1 else None
            if after is not None and modules.kinds[after.module] & kinds and not modules.weighted[after.module]:
                steps.append(after)
        found.append(Unit(step.module, "layer", tuple(steps), modules.first[step.module]))
    return found


def _readers(program: Program) -> dict[int, set[str]]:
    """Paths of the modules whose own forward reads each value; "" is the network itself, and what takes its output."""
    readers: dict[int, set[str]] = defaultdict(set)
    for node in program.nodes:
        for i in node.inputs:
            readers[i].add(node.module)
    for output in program.outputs:
        if isinstance(output, Ref):
            readers[output.index].add("")
    return readers


def _blocks(modules: _Modules) -> list[Unit]:
    """Modules with several weighted operators; of those that wrap each other and hold the same, the innermost."""
    found: dict[tuple[int, int, int], Unit] = {}
    for step in sorted(modules.steps.values(), key=lambda step: -step.module.count(".")):
        if modules.weighted[step.module] > 1:
            unit = Unit(step.module, "block", (step,), modules.first[step.module])
            found.setdefault((step.source, step.output, modules.inside[step.module]), unit)
    return list(found.values())


def _runs(program: Program, layers: list[Unit]) -> list[Unit]:
    """Longest chains of layers, each of which alone reads what the one before it gives."""
    readers = _readers(program)
    after = {unit.source: unit for unit in layers if readers[unit.source] == {unit.name}}
    continued = {after[unit.output].name for unit in layers if unit.output in after}
    found = []
    for unit in layers:
        if unit.name in continued:
            continue
        chain = [unit]
        while chain[-1].output in after:
            chain.append(after[chain[-1].output])
        if len(chain) > 1:
            steps = tuple(step for member in chain for step in member.steps)
            found.append(Unit(f"{unit.name} … {chain[-1].name}", "block", steps, unit.first))
    return found


def _levels(units: list[Unit]) -> list[list[Unit]]:
    """Units in groups that can be tried at once: none in a group holds another of it."""
    levels: dict[int, list[Unit]] = defaultdict(list)
    for unit in units:
        around = sum(all(other.holds(module) for module in unit.modules) for other in units)
        levels[around].append(unit)
    return list(levels.values())


def _paths(module: str) -> Iterator[str]:
    """A module's path and those of the modules around it, but not the network itself."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _within(module: str, around: str) -> bool:
    return module == around or module.startswith(f"{around}.")


# Bypassing ---------------------------------------------


def _outermost(units: Iterable[Unit]) -> dict[str, Step]:
    """The steps to take for some units, by module: a module within another bypassed one goes with it."""
    steps = {step.module: step for unit in units for step in unit.steps}
    return {m: step for m, step in steps.items() if not any(other in steps for other in list(_paths(m))[1:])}


def bypassed(program: Program, units: Iterable[Unit]) -> Program:
    """A program with some units bypassed, in nodes alone: what follows from them is still the old program's.

    Raises:
        PruneLabError: the user's code overwrites in place what only a bypass leads to it.
    """
    some = list(units)
    steps = _outermost(some)
    sources = {step.output: step.source for step in steps.values()}
    nodes, outputs = settled(_nodes_without(program, steps), program.outputs, sources)
    return replace(
        program,
        nodes=nodes,
        outputs=outputs,
        origin=program.base,
        bypassed=tuple(sorted(unit.name for unit in some)),
        identities=tuple(steps),
    )


def _nodes_without(program: Program, steps: Mapping[str, Step]) -> tuple[Node, ...]:
    """The nodes of a network with some modules bypassed; every node keeps its index.

    What is inside is dropped: it has no operator, no value and no cost, and its parameters are not the network's any
    more. A bypassed module's output node stands for its source instead.
    """
    source = {step.output: step.source for step in steps.values()}

    def without(node: Node) -> Node:
        held = module_of(node.target) if node.kind == "state" else node.module
        if node.index in source:
            at = source[node.index]
            return replace(node, op=torch.ops.aten.alias.default, args={"self": Ref(at)}, inputs=(at,), overwrites=None)
        if (
            node.kind == "input"
            or not any(path in steps for path in _paths(held))
            or is_size(program.nodes, node.index)
        ):
            return node
        return replace(
            node, kind="dropped", op=None, args={}, inputs=(), shape=None, batched=(), shapes=(), overwrites=None
        )

    return tuple(without(node) for node in program.nodes)
