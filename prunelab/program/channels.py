"""Channel classes and layers: what must be removed together, what a row of the desk is, and what is pinned."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from prunelab.program.ids import FIXED, Ids, Ties
from prunelab.program.nodes import Node, Ref
from prunelab.program.rules import Context, Value, apply

# Weights whose dimension (second) makes channels; everything else follows them.
_PRODUCERS = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear"), ("weight", 0)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), ("weight", 1)),
    "embedding": ("weight", 1),
}
OUTPUT = "its outputs are the network's outputs"


@dataclass(frozen=True)
class Slot:
    """Where a layer's channels lie in one dimension of one tensor.

    Attributes:
        state: name of the parameter or buffer.
        dim: its dimension.
        index: shape ``(channels, times)``: the positions of each channel (``times`` > 1 after a flatten of a map).
    """

    state: str
    dim: int
    index: NDArray[np.int64]


@dataclass(frozen=True)
class Layer:
    """A row of the desk: the channels that the same weights produce.

    Attributes:
        name: the producer's module path, or ``"<stage> stream"`` where several producers are tied.
        kind: ``conv``, ``linear``, ``depthwise``, ``stream``, …
        channels: how many channels, all independent of each other.
        producers: ``(state name, dimension)`` of the weights that make them, in order of execution.
        slots: every place the channels occupy.
        labels: shape ``(channels,)``: the channel class of each channel.
        pinned: why it cannot be removed, or "".
        stage: the part of the network it is in, for folding.
        sites: indices of the nodes at which its activation is observed.
    """

    name: str
    kind: str
    channels: int
    producers: tuple[tuple[str, int], ...]
    slots: tuple[Slot, ...]
    labels: Ids
    pinned: str
    stage: str
    sites: tuple[int, ...]

    @property
    def members(self) -> tuple[str, ...]:
        """Module paths of the producers."""
        return tuple(dict.fromkeys(module_of(state) for state, _ in self.producers))


@dataclass(frozen=True)
class Structure:
    """What was found: the ids of every value, their classes, and the layers.

    Attributes:
        values: ids of each node's value, by dimension.
        label: class of every id.
        owner: layer index of every class label, -1 for classes that no layer owns.
        layers: the rows.
    """

    values: tuple[Value, ...]
    label: Ids
    owner: NDArray[np.int32]
    layers: tuple[Layer, ...]


def module_of(state: str) -> str:
    """Path of the module that holds a parameter."""
    return state.rpartition(".")[0] or state


def find(nodes: tuple[Node, ...], outputs: tuple[object, ...], axes: Mapping[int, int], pins: Mapping[str, str]) -> Structure:
    """Carry ids through the program and group them.

    Args:
        axes: for reshapes that split a channel dimension, which part stays removable (by node index).
        pins: layers to pin beyond what the rules find, by producer ``state`` name, with the reason.
    """
    ties = Ties()
    values: list[Value] = []
    slots: dict[str, tuple[Ids | None, ...]] = {}
    for node in nodes:
        if node.kind == "op":
            context = Context(node, nodes, values, ties, dict(axes))
            values.append(apply(context))
        elif node.kind == "state" and node.shape is not None:
            if node.target not in slots:
                slots[node.target] = tuple(ties.fresh(n) if n > 1 else None for n in node.shape)
            values.append(slots[node.target])
        else:
            values.append((None,) * len(node.shape) if node.shape is not None else None)
    for output in outputs:
        value = values[output.index] if isinstance(output, Ref) else None
        for dims in value if isinstance(value, list) else [value]:
            for ids in dims or ():
                ties.pin(ids, OUTPUT)
    label, reasons = ties.labels()
    layers = _layers(nodes, values, slots, label, reasons, pins)
    owner = np.full(len(label), -1, np.int32)
    for k, layer in enumerate(layers):
        owner[layer.labels] = k
    return Structure(tuple(values), label, owner, tuple(layers))


def _layers(
    nodes: tuple[Node, ...],
    values: list[Value],
    slots: Mapping[str, tuple[Ids | None, ...]],
    label: Ids,
    reasons: Mapping[int, str],
    pins: Mapping[str, str],
) -> list[Layer]:
    """Group classes that occupy the same dimensions equally often and share the reason for a pin."""
    places = [(state, dim) for state, dims in slots.items() for dim, ids in enumerate(dims) if ids is not None]
    arrays = [ids for dims in slots.values() for ids in dims if ids is not None]
    producers = _producers(nodes)
    found: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for place, ids in enumerate(arrays):
        labels, first, times = np.unique(label[ids], return_index=True, return_counts=True)
        for root, at, count in zip(labels.tolist(), first.tolist(), times.tolist(), strict=True):
            found[root].append((place, count, at))
    extra = _uneven(values, label)
    groups: dict[tuple[object, ...], list[tuple[int, int]]] = defaultdict(list)
    for root, occurrences in found.items():
        makers = [o for o in occurrences if places[o[0]] in producers]
        if not makers:
            continue
        first = min(makers, key=lambda o: producers[places[o[0]]])
        signature = (tuple((p, n) for p, n, _ in occurrences), reasons.get(root, ""), extra.get(root, ()))
        groups[signature].append((first[2], root))
    layers = []
    for signature, members in groups.items():
        roots = np.array([root for _, root in sorted(members)], np.int64)
        occupied = [places[p] for p, _ in signature[0]]  # type: ignore[attr-defined]  # the tuple built above
        makers_ = sorted((p for p in occupied if p in producers), key=producers.__getitem__)
        reason = str(signature[1]) or next((pins[s] for s, _ in makers_ if s in pins), "")
        slot_list = tuple(_slot(state, dim, slots[state][dim], label, roots) for state, dim in occupied)
        layers.append((makers_, slot_list, roots, reason))
    layers.sort(key=lambda item: (producers[item[0][0]], item[2][0]))
    names = _names([item[0] for item in layers])
    return [
        Layer(
            name=name,
            kind=_kind(nodes, makers),
            channels=len(roots),
            producers=tuple(makers),
            slots=slot_list,
            labels=roots,
            pinned=reason,
            stage=_stage(makers),
            sites=_sites(nodes, values, makers, label, roots),
        )
        for name, (makers, slot_list, roots, reason) in zip(names, layers, strict=True)
    ]


def _slot(state: str, dim: int, ids: Ids | None, label: Ids, roots: Ids) -> Slot:
    assert ids is not None
    labels = label[ids]
    order = np.argsort(labels, kind="stable")
    at = np.searchsorted(labels[order], roots)
    times = int((labels == roots[0]).sum())
    return Slot(state, dim, order[at[:, None] + np.arange(times)])


def _producers(nodes: tuple[Node, ...]) -> dict[tuple[str, int], int]:
    """``(state, dimension)`` of every weight that makes channels, with its place in the order of execution."""
    found: dict[tuple[str, int], int] = {}
    for node in nodes:
        name, dim = _PRODUCERS.get(node.opname, ("", 0))
        weight = node.args.get(name)
        if isinstance(weight, Ref) and nodes[weight.index].kind == "state":
            found.setdefault((nodes[weight.index].target, dim), node.index)
    return found


def _uneven(values: list[Value], label: Ids) -> dict[int, tuple[tuple[int, int], ...]]:
    """How often a class stands in each value's dimension, where that is not once for all of them.

    Cost counts positions of values; within a layer every channel must count the same.
    """
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    seen: set[int] = set()
    serial = 0
    for value in values:
        for dims in value if isinstance(value, list) else [value]:
            for ids in dims or ():
                if ids is None or id(ids) in seen:
                    continue
                seen.add(id(ids))
                roots, times = np.unique(label[ids[ids != FIXED]], return_counts=True)
                serial += 1
                if times.size and times.min() != times.max():
                    for root, n in zip(roots.tolist(), times.tolist(), strict=True):
                        found[root].append((serial, n))
    return {root: tuple(pairs) for root, pairs in found.items()}


def _names(producers: list[list[tuple[str, int]]]) -> list[str]:
    """A name for every layer: its producer, or the stage whose stream several producers write to."""
    names = []
    for makers in producers:
        modules = list(dict.fromkeys(module_of(state) for state, _ in makers))
        names.append(modules[0] if len(modules) == 1 else f"{_stage(makers)} stream")
    counts = Counter(names)
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(f"{name} #{seen[name]}" if counts[name] > 1 else name)
    return unique


def _stage(makers: list[tuple[str, int]]) -> str:
    """The first part of the path that most producers share; the first one's path where they share nothing."""
    heads = Counter(module_of(state).split(".")[0] for state, _ in makers)
    head, _ = heads.most_common(1)[0]
    paths = [m.split(".") for m in (module_of(state) for state, _ in makers) if m.split(".")[0] == head]
    if len(paths) == 1:
        return head if len(paths[0]) > 1 else ""
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in same) or head


def _kind(nodes: tuple[Node, ...], makers: list[tuple[str, int]]) -> str:
    makes = {(nodes[r.index].target, n.opname) for n in nodes if isinstance(r := n.args.get("weight"), Ref)}
    kinds = ["conv" if op.startswith("conv") else op for state, _ in makers for name, op in makes if name == state]
    return kinds[0] if len(makers) == 1 and kinds else ("stream" if len(makers) > 1 else "weight")


_ACTIVATIONS = set(
    "relu relu6 hardtanh silu hardswish sigmoid tanh gelu elu selu celu leaky_relu softplus mish prelu hardsigmoid".split()
)
_NORMS = {"batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm"}
_CARRIERS = {"add", "cat", "dropout", "contiguous", "clone"}


def _sites(
    nodes: tuple[Node, ...], values: list[Value], makers: list[tuple[str, int]], label: Ids, roots: Ids
) -> tuple[int, ...]:
    """Where each producer's channels are observed: its value followed through norm, sum and concatenation to the
    first activation; per call, so a module used twice has two sites."""
    users: dict[int, list[int]] = defaultdict(list)
    for node in nodes:
        for i in node.inputs:
            users[i].append(node.index)
    states = {state for state, _ in makers}
    sites: dict[int, None] = {}
    for node in nodes:
        weight = node.args.get("weight")
        if node.opname not in _PRODUCERS or not isinstance(weight, Ref) or nodes[weight.index].target not in states:
            continue
        sites[_follow(node.index, nodes, users)] = None
    wanted = set(roots.tolist())
    return tuple(s for s in sites if channel_axis(values[s], label, wanted) is not None)


def _follow(at: int, nodes: tuple[Node, ...], users: Mapping[int, list[int]]) -> int:
    while nodes[at].opname not in _ACTIVATIONS:
        following = [u for u in users[at] if nodes[u].opname in _ACTIVATIONS | _NORMS]
        following += [u for u in users[at] if nodes[u].opname in _CARRIERS]
        if not following:
            break
        at = following[0]
    return at


def channel_axis(value: Value, label: Ids, wanted: set[int]) -> int | None:
    """The dimension of a value along which these classes lie, or None."""
    if not isinstance(value, tuple):
        return None
    for k, ids in enumerate(value):
        if ids is not None and wanted <= set(label[ids].tolist()):
            return k
    return None
