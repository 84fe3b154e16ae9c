"""Where a repair can act: which layers a cut changes, what of them is free to choose, and why not where it is not."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prunelab.program.channels import PRODUCERS, module_of
from prunelab.program.context import Value
from prunelab.program.ids import FIXED
from prunelab.program.nodes import INPLACE, Node, Ref, map_refs
from prunelab.program.program import Program, sliced_masks
from prunelab.program.run import removed_labels
from prunelab.program.selection import Selection

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
MOST_UNKNOWNS = 8192
"""Weights of one output beyond which the equations would not fit in memory."""

# Here what survives sees what is gone beside it, though the channels stay apart.
_MIXING = {"layer_norm", "group_norm", "rms_norm", "softmax", "log_softmax", "cumsum"}
# The dimension of a weight that its operator sums over.
SUMMED = {
    **dict.fromkeys((*CONVOLUTIONS, "linear"), 1),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), 0),
}
_TRANSPARENT = {"dropout", "feature_dropout", "contiguous", "clone", "alias"}
_MOST_MASKED = 1e12


@dataclass(frozen=True)
class Place:
    """A layer that can be repaired.

    Attributes:
        node: index of its convolution or linear node.
        weight: index of its weight's node; ``bias`` of its own bias's, if that is free to choose.
        norm: index of the batch norm that alone reads what it gives, if that norm's statistics are free to choose.
        shortcut: index of the value that is added to what it or its norm gives, if this layer is to make up for that
            value's error; ``target`` of the node that adds them, else of its own.
    """

    node: int
    weight: int
    bias: int | None
    norm: int | None
    shortcut: int | None
    target: int

    @property
    def shifts(self) -> bool:
        """Whether it can add a number to each of its outputs."""
        return self.bias is not None or self.norm is not None


@dataclass(frozen=True, eq=False)
class Cut:
    """A program under a selection, and what follows from that for every node.

    Attributes:
        program: with the selection's units bypassed.
    """

    program: Program
    selection: Selection

    @cached_property
    def gone(self) -> NDArray[np.bool_]:
        """For every channel class, whether it is removed."""
        return removed_labels(self.program, self.selection)

    @cached_property
    def masks(self) -> Mapping[str, Tensor]:
        """Weight masks in cut shapes, by parameter name."""
        return sliced_masks(self.program, self.selection)

    @cached_property
    def users(self) -> Mapping[int, list[Node]]:
        """The nodes that read each value."""
        found: dict[int, list[Node]] = defaultdict(list)
        for node in self.program.nodes:
            for i in node.inputs:
                found[i].append(node)
        return found

    @cached_property
    def shared(self) -> set[str]:
        """States that are read more than once: they cannot be chosen for one reader alone."""
        states = Counter(self.program.nodes[i].target for node in self.program.nodes for i in node.inputs)
        return {target for target, count in states.items() if target and count > 1}

    @cached_property
    def changed(self) -> frozenset[int]:
        """Nodes whose value is no longer just the kept part of what it was."""
        found: set[int] = set()
        for node in self.program.nodes:
            if node.kind == "op" and (self._loses(node) or any(i in found for i in node.inputs)):
                found.add(node.index)
        return frozenset(found)

    @cached_property
    def lost(self) -> frozenset[int]:
        """Nodes that read what the cut takes away, themselves or through nodes that are no layers."""
        found: set[int] = set()
        for node in self.program.nodes:
            near = (i for i in node.inputs if self.program.nodes[i].opname not in PRODUCERS)
            if node.kind == "op" and (self._loses(node) or any(i in found for i in near)):
                found.add(node.index)
        return frozenset(found)

    @cached_property
    def _followed(self) -> frozenset[int]:
        """Nodes with layers after them."""
        found: set[int] = set()
        for node in reversed(self.program.nodes):
            if node.opname in PRODUCERS or node.index in found:
                found.update(node.inputs)
        return frozenset(found)

    def asks_for(self, place: Place) -> bool:
        """Whether least squares has something to make up for at a layer.

        It does where the layer has lost inputs, where what it gives is added to a shortcut that has changed, and in the
        last layer, after which nothing else can. Between these, values have hardly changed.
        """
        makes_up = place.shortcut is not None and place.shortcut in self.changed
        return place.node in self.lost or makes_up or place.node not in self._followed

    def _loses(self, node: Node) -> bool:
        """Whether a node reads channels that are gone, a bypassed unit's input, or single weights put to zero."""
        if node.inputs != self.program.base.nodes[node.index].inputs:
            return True
        if any(self.program.nodes[i].target in self._zeroed for i in node.inputs):
            return True
        values = self.program.structure.values
        summed = SUMMED.get(node.opname)
        weight = self.state_of(node.args.get("weight"))
        if summed is not None and weight is not None and int(node.args.get("groups", 1)) == 1:
            # The outputs may be of the same classes as the inputs: they do not show that an input is gone.
            dims = values[weight.index]
            return isinstance(dims, tuple) and bool(self._gone_from((dims[summed],)))
        before = {label for i in node.inputs for label in self._gone_from(values[i])}
        return bool(before and node.opname in _MIXING) or not before <= self._gone_from(values[node.index])

    @cached_property
    def _zeroed(self) -> set[str]:
        """Weights of which the selection's masks remove something that was there."""
        found = set()
        for name, mask in self.selection.masks.items():
            if name in self.program.state_nodes:
                weight = self.program.state(name)
                if weight[~mask.to(weight.device)].any():
                    found.add(name)
        return found

    def _gone_from(self, value: Value) -> set[int]:
        parts = value if isinstance(value, list) else [value or ()]
        found: set[int] = set()
        for ids in (ids for dims in parts for ids in dims if ids is not None):
            labels = self.program.structure.label[ids[ids != FIXED]]
            found.update(labels[self.gone[labels]].tolist())
        return found

    def state_of(self, argument: Any) -> Node | None:
        """The parameter or buffer that an argument is, or None."""
        node = self.program.nodes[argument.index] if isinstance(argument, Ref) else None
        return node if node is not None and node.kind == "state" else None

    def name(self, node: Node) -> str:
        """What to call a node for the user: the module that holds its weights."""
        weight = next((s for a in node.args.values() if (s := self.state_of(a)) is not None), None)
        return module_of(weight.target) if weight is not None else node.module or node.name


def places(cut: Cut) -> tuple[list[Place], list[tuple[str, str]]]:
    """The layers that the cut changes and that can be repaired, and the others: their names, each with the reason."""
    found: list[Place] = []
    left: list[tuple[str, str]] = []
    for node in cut.program.nodes:
        held = [name for name, _ in PRODUCERS.get(node.opname, ()) if cut.state_of(node.args.get(name)) is not None]
        computed = node.opname in (*CONVOLUTIONS, "linear")
        if node.index not in cut.changed or not (held or computed):
            continue
        reason = _unsuitable(cut, node)
        if reason:
            left.append((cut.name(node), reason))
        else:
            found.append(_place(cut, node))
    return _with_shortcuts(cut, found), left


def _unsuitable(cut: Cut, node: Node) -> str:
    """Why the weights of a layer cannot be chosen, or ""."""
    if node.opname not in (*CONVOLUTIONS, "linear"):
        return f"repair knows convolutions and linear layers, not {node.opname}"
    weight = cut.state_of(node.args["weight"])
    if weight is None:
        return "its weight is computed in forward"
    if weight.target in cut.shared:
        return "its weight is used more than once"
    rank, shape = len(node.shape or ()), cut.program.state(weight.target).shape
    if rank < 2 or (node.opname != "linear" and rank != len(shape)):
        return "it reads images one by one"
    dims = cut.program.structure.values[node.index]
    channel = rank - 1 if node.opname == "linear" else 1
    if not isinstance(dims, tuple) or any(cut._gone_from((ids,)) for k, ids in enumerate(dims) if k != channel):
        return "it loses positions, not only channels"
    unknowns = prod(shape[1:]) + 1
    if unknowns > MOST_UNKNOWNS:
        return f"each of its outputs has {unknowns:,} weights to choose, more than {MOST_UNKNOWNS:,}"
    if weight.target in cut.masks and shape[0] * unknowns**3 > _MOST_MASKED:
        return "choosing single weights of so many would take too long"
    return ""


def _place(cut: Cut, node: Node) -> Place:
    weight, bias = cut.state_of(node.args["weight"]), cut.state_of(node.args.get("bias"))
    assert weight is not None and node.shape is not None
    own = bias.index if bias is not None and bias.target not in cut.shared and bias.target not in cut.masks else None
    norm, _ = sole_reader(cut, node.index)
    # After a linear layer over a sequence, a norm's channels are not the layer's outputs.
    follows = norm is not None and not adjustable(cut, norm) and (node.opname != "linear" or len(node.shape) == 2)
    after = norm.index if norm is not None and follows else None
    return Place(node.index, weight.index, own, after, None, node.index)


def sole_reader(cut: Cut, value: int) -> tuple[Node | None, int]:
    """The one node that reads a value, and which of its inputs that is: dropout and the like are looked through.

    None in place of the node where several read it, or it is an output of the network.
    """
    outputs: set[int] = set()
    map_refs(list(cut.program.outputs), outputs.add)
    users = cut.users.get(value, [])
    if len(users) != 1 or value in outputs:
        return None, value
    return sole_reader(cut, users[0].index) if users[0].opname in _TRANSPARENT else (users[0], value)


def adjustable(cut: Cut, norm: Node) -> str:
    """Why a node's running statistics cannot be chosen, or ""."""
    if norm.opname != "batch_norm" or norm.args.get("training"):
        return "it is not a batch norm with running statistics"
    states = [cut.state_of(norm.args.get(name)) for name in ("running_mean", "running_var")]
    if any(state is None for state in states):
        return "it has no running statistics"
    return "its statistics are used more than once" if any(s and s.target in cut.shared for s in states) else ""


def _with_shortcuts(cut: Cut, found: Iterable[Place]) -> list[Place]:
    """Where what a layer gives is added to another value, that value's error can be made up for by this layer.

    One layer of every addition does, the last that can: those before it are not done when the other is wanted.
    """
    waits: dict[int, int] = {}
    complete: list[Place] = []
    if overwrites(cut.program):
        return list(found)
    for place in reversed(list(found)):
        reader, value = sole_reader(cut, place.node if place.norm is None else place.norm)
        if reader is not None and _adds_alike(cut.program, reader):
            shortcut = next(i for i in reader.inputs if i != value)
            if place.node not in _upstream(cut.program, [shortcut], waits):
                waits[place.node] = shortcut
                place = replace(place, shortcut=shortcut, target=reader.index)
        complete.append(place)
    return complete[::-1]


def _adds_alike(program: Program, node: Node) -> bool:
    """Whether a node is the plain sum of two values of one shape."""
    plain = node.opname == "add" and node.args.get("alpha", 1) == 1 and len(node.inputs) == 2
    return plain and all(program.nodes[i].shape == node.shape for i in node.inputs)


def _upstream(program: Program, values: Collection[int], waits: Mapping[int, int]) -> set[int]:
    """The values, and all that they are computed from; ``waits`` says what a node waits for besides its inputs."""
    found: set[int] = set()
    open_ = list(values)
    while open_:
        i = open_.pop()
        if i not in found:
            found.add(i)
            open_ += [*program.nodes[i].inputs, *([waits[i]] if i in waits else [])]
    return found


def overwrites(program: Program) -> bool:
    """Whether a node overwrites the memory of another: then all of them must run, in the order of the user's code."""
    packets = (getattr(node.op, "overloadpacket", None) for node in program.nodes)
    return any(packet is not None and INPLACE.match(packet.__name__) for packet in packets)


def schedule(program: Program, found: Iterable[Place], wanted: Collection[int]) -> list[int]:
    """Nodes in an order in which each has its inputs, and a layer its shortcut too; those alone that are needed.

    Args:
        wanted: indices of the nodes whose values are asked for.
    """
    if overwrites(program):
        return list(range(max(wanted, default=-1) + 1))
    waits = {place.node: place.shortcut for place in found if place.shortcut is not None}
    needed = _upstream(program, wanted, waits)
    done: dict[int, None] = {}

    def add(i: int) -> None:
        if i not in done:
            for j in (*program.nodes[i].inputs, *([waits[i]] if i in waits else [])):
                add(j)
            done[i] = None

    # States before all else: a norm's are changed before the norm is reached.
    for i in sorted(needed, key=lambda i: (program.nodes[i].kind != "state", i)):
        add(i)
    return list(done)
