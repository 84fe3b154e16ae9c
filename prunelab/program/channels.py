"""Channel classes and layers: what must go together, what a row of the desk is, and what is pinned."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from prunelab.program.compute import RECURRENT, einsum_weights
from prunelab.program.context import Context, Value
from prunelab.program.hints import Hints
from prunelab.program.ids import FIXED, Dims, Ids, Ties
from prunelab.program.nodes import Node, Ref
from prunelab.program.rules import apply

# Arguments (first) whose dimension (second) makes channels where they are weights; everything else follows them.
PRODUCERS: Mapping[str, tuple[tuple[str, int], ...]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear", "bilinear"), (("weight", 0),)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), (("weight", 1),)),
    **dict.fromkeys(("embedding", "embedding_bag"), (("weight", 1),)),
    "matmul": (("self", -2), ("other", -1)),
    **dict.fromkeys(("mm", "bmm"), (("self", -2), ("mat2", -1))),
    "addmm": (("mat2", -1),),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), (("w_hh", 1),)),
}
OUTPUT = "its outputs are the network's outputs"


@dataclass(frozen=True)
class Slot:
    """Where a layer's channels lie in one dimension of one tensor.

    Attributes:
        state: name of the parameter or buffer.
        dim: its dimension.
        index: shape ``(channels, times)``: the positions of each channel (``times`` > 1 after a flatten of a
            map).
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
    slots: tuple[Slot, ...] = field(repr=False)
    labels: Ids = field(repr=False)
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
    """Path of the module that a parameter belongs to, also where a parametrization holds it."""
    path, held, _ = state.partition(".parametrizations.")
    return path if held else state.rpartition(".")[0] or state


def find(
    nodes: tuple[Node, ...],
    outputs: tuple[object, ...],
    constants: Collection[str],
    hints: Hints,
) -> Structure:
    """Carry ids through the program and group them.

    Args:
        constants: states that no commit can cut: tensors that are neither parameters nor buffers.
        hints: what is known of the user's forward beyond the operators.
    """
    ties = Ties()
    values: list[Value] = []
    slots: dict[str, tuple[Ids | None, ...]] = {}
    for node in nodes:
        if node.kind == "op":
            values.append(apply(Context(node, nodes, values, ties, hints.axes)))
        elif node.kind == "state" and node.shape is not None and node.target not in constants:
            if node.target not in slots:
                slots[node.target] = tuple(ties.fresh(n) if n > 1 else None for n in node.shape)
            values.append(slots[node.target])
        else:
            values.append((None,) * len(node.shape) if node.shape is not None else None)
    for output in outputs:
        for dims in _tensors(values[output.index]) if isinstance(output, Ref) else ():
            for ids in dims:
                ties.pin(ids, OUTPUT)
    for (a, i), (b, j) in hints.ties:
        ties.tie(_along(values[a], i), _along(values[b], j), "your forward takes its size from one that cannot change")
    label, reasons = ties.labels()
    layers = _layers(nodes, values, slots, label, {**hints.pins, **reasons})
    owner = np.full(len(label), -1, np.int32)
    for k, layer in enumerate(layers):
        owner[layer.labels] = k
    return Structure(tuple(values), label, owner, tuple(layers))


def _along(value: Value, dim: int) -> Ids | None:
    """Ids along one dimension of a tensor."""
    return value[dim] if isinstance(value, tuple) else None


def _tensors(value: Value) -> list[Dims]:
    """Ids of every tensor in a value."""
    return value if isinstance(value, list) else ([] if value is None else [value])


def _layers(
    nodes: tuple[Node, ...],
    values: list[Value],
    slots: Mapping[str, tuple[Ids | None, ...]],
    label: Ids,
    reasons: Mapping[int, str],
) -> list[Layer]:
    """One layer for all classes that are alike and share the reason for a pin."""
    places = {(s, dim): ids for s, dims in slots.items() for dim, ids in enumerate(dims) if ids is not None}
    calls = _calls(nodes, values, places)
    producers = {place: made[0] for place, made in calls.items()}
    first: dict[int, int] = {}
    for place in producers:
        made, at = np.unique(label[places[place]], return_index=True)
        first = dict(zip(made.tolist(), at.tolist(), strict=True)) | first
    alike = _alike(values, label)
    groups: dict[tuple[int, str], list[tuple[int, int]]] = defaultdict(list)
    for root, position in first.items():
        groups[int(alike[root]), reasons.get(root, "")].append((position, root))
    found = [(np.array([root for _, root in sorted(g)], np.int64), reason) for (_, reason), g in groups.items()]
    occupied = _occupied(places, label, {int(roots[0]) for roots, _ in found})
    filters = _depthwise(nodes, calls)
    rows = []
    for roots, reason in found:
        at_places = occupied[int(roots[0])]
        makers = sorted((p for p in at_places if p in producers), key=producers.__getitem__)
        # A depthwise convolution only filters the channels that another weight makes.
        makers = [p for p in makers if p[0] not in filters] or makers
        slot_list = tuple(_slot(state, dim, places[state, dim], label, roots) for state, dim in at_places)
        rows.append((makers, slot_list, roots, reason))
    rows.sort(key=lambda row: (producers[row[0][0]], row[2][0]))
    names = _names([makers for makers, *_ in rows])
    users = users_of(nodes)
    return [
        Layer(
            name=name,
            kind=_kind(nodes, [i for maker in makers[:2] for i in calls[maker][:1]]),
            channels=len(roots),
            producers=tuple(makers),
            slots=slot_list,
            labels=roots,
            pinned=reason,
            stage=_stage(makers),
            sites=_sites(nodes, values, [i for maker in makers for i in calls[maker]], users, label, roots),
        )
        for name, (makers, slot_list, roots, reason) in zip(names, rows, strict=True)
    ]


def _calls(
    nodes: tuple[Node, ...], values: list[Value], places: Mapping[tuple[str, int], Ids]
) -> dict[tuple[str, int], list[int]]:
    """``(state, dimension)`` of every weight that makes channels, and the nodes that make them, in order.

    A weight may be computed from others (a norm on weights, a transpose): its ids tell from which.
    """
    place_of = {int(i): place for place, ids in places.items() for i in ids[:1]}
    starts = np.array(sorted(place_of), np.int64)
    origins = _origins(nodes)
    found: dict[tuple[str, int], list[int]] = {}
    for node in nodes:
        for argument, dim in weights_of(node):
            dims, shape = values[argument], nodes[argument].shape
            if not origins[argument] or shape is None or len(shape) < 2 or not isinstance(dims, tuple):
                continue
            ids = dims[dim]
            if ids is not None:
                held = ids[ids != FIXED]
                made = [place_of[i] for i in np.unique(starts[np.searchsorted(starts, held, "right") - 1]).tolist()]
            else:
                # Computed in a way that is not followed: still a row, which then says so.
                alike = [nodes[i].target for i in sorted(origins[argument]) if nodes[i].shape == shape]
                made = [place for state in alike if (place := (state, dim % len(shape))) in places]
            for place in made:
                found.setdefault(place, []).append(node.index)
    return found


def weights_of(node: Node) -> list[tuple[int, int]]:
    """The arguments of an operator that make channels if they are weights, each with the dimension that does."""
    if node.opname in RECURRENT:
        # One row for each: the hidden units that its first layer's state has.
        return [(node.args["params"][1].index, 1)]
    if node.opname == "einsum":
        return einsum_weights(node)
    arguments = PRODUCERS.get(node.opname, ())
    return [(ref.index, dim) for name, dim in arguments if isinstance(ref := node.args.get(name), Ref)]


def _origins(nodes: tuple[Node, ...]) -> list[frozenset[int]]:
    """For every node, the weights that its value is computed from; empty where an input has a part in it."""
    found: list[frozenset[int]] = []
    for node in nodes:
        parts = [found[i] for i in node.inputs]
        joined = frozenset[int]().union(*parts) if all(parts) else frozenset[int]()
        found.append(frozenset([node.index]) if node.kind == "state" else joined)
    return found


def _depthwise(nodes: tuple[Node, ...], calls: Mapping[tuple[str, int], list[int]]) -> set[str]:
    """Weights of convolutions with one input channel in every group."""
    found = set()
    for (state, _), (first, *_) in calls.items():
        weight = nodes[first].args.get("weight")
        shape = nodes[weight.index].shape if isinstance(weight, Ref) else None
        if nodes[first].opname.startswith("conv") and int(nodes[first].args.get("groups", 1)) > 1:
            found |= {state} if shape is not None and shape[1] == 1 else set()
    return found


def _alike(values: list[Value], label: Ids) -> NDArray[np.int64]:
    """A number for every class, equal for classes that stand equally often in every dimension of every value.

    Only such classes make one layer: whichever of them go, every size is then a multiple of how many are
    left, and no part of the network can lose all its channels while the layer keeps one.
    """
    number = np.zeros(len(label), np.int64)
    highest = 0
    seen: set[int] = set()
    for ids in (ids for value in values for dims in _tensors(value) for ids in dims):
        if ids is None or id(ids) in seen:
            continue
        seen.add(id(ids))
        roots, times = np.unique(label[ids[ids != FIXED]], return_counts=True)
        kinds, kind = np.unique(number[roots] * (len(ids) + 1) + times, return_inverse=True)
        number[roots] = highest + 1 + kind
        highest += len(kinds)
    return number


def _occupied(
    places: Mapping[tuple[str, int], Ids], label: Ids, leads: Collection[int]
) -> dict[int, list[tuple[str, int]]]:
    """For one class of every layer, the places where it stands."""
    wanted = np.array(sorted(leads), np.int64)
    found: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for place, ids in places.items():
        for root in np.intersect1d(label[ids], wanted).tolist():
            found[root].append(place)
    return found


def _slot(state: str, dim: int, ids: Ids, label: Ids, roots: Ids) -> Slot:
    return Slot(state, dim, positions(ids, label, roots))


def positions(ids: Ids, label: Ids, roots: Ids) -> NDArray[np.int64]:
    """Where classes stand along a dimension, shape ``(classes, times)``; each stands there equally often."""
    labels = label[ids]
    order = np.argsort(labels, kind="stable")
    at = np.searchsorted(labels[order], roots)
    times = int((labels == roots[0]).sum())
    return np.asarray(order[at[:, None] + np.arange(times)], np.int64)


def _names(producers: list[list[tuple[str, int]]]) -> list[str]:
    """A name for every layer: its producer, or the stage whose stream several producers write to."""
    names = []
    for makers in producers:
        modules = list(dict.fromkeys(module_of(state) for state, _ in makers))
        names.append(modules[0] if len(modules) == 1 else f"{_stage(makers)} stream".strip())
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


def _kind(nodes: tuple[Node, ...], made: list[int]) -> str:
    """What the first operators of a layer's producers are called; several make a stream."""
    name = nodes[made[0]].opname
    return "stream" if len(made) > 1 else ("conv" if name.startswith("conv") else name)


ACTIVATIONS = {
    *("relu", "relu6", "hardtanh", "silu", "hardswish", "sigmoid", "tanh", "gelu", "elu", "selu", "celu"),
    *("leaky_relu", "softplus", "mish", "prelu", "hardsigmoid"),
}
NORMS = {"batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm"}
_CARRIERS = {"add", "cat", "dropout", "contiguous", "clone"}


def users_of(nodes: tuple[Node, ...]) -> dict[int, list[int]]:
    """The nodes that read each value."""
    found: dict[int, list[int]] = defaultdict(list)
    for node in nodes:
        for i in node.inputs:
            found[i].append(node.index)
    return found


def _sites(
    nodes: tuple[Node, ...],
    values: list[Value],
    calls: list[int],
    users: Mapping[int, list[int]],
    label: Ids,
    roots: Ids,
) -> tuple[int, ...]:
    """Where each producer's channels are observed.

    Its value is followed through norm, sum and concatenation to the first activation; per call, so a module
    used twice has two sites. Where the channels are no longer together there, they are observed as they are
    produced.
    """
    sites: dict[int, None] = {}
    for call in sorted(calls):
        site = _follow(call, nodes, users)
        sites[call if channel_axis(values[site], label, roots) is None else site] = None
    return tuple(site for site in sites if channel_axis(values[site], label, roots) is not None)


def _follow(at: int, nodes: tuple[Node, ...], users: Mapping[int, list[int]]) -> int:
    while nodes[at].opname not in ACTIVATIONS:
        following = [u for u in users[at] if nodes[u].opname in ACTIVATIONS | NORMS]
        following += [u for u in users[at] if nodes[u].opname in _CARRIERS]
        if not following:
            break
        at = following[0]
    return at


def channel_axis(value: Value, label: Ids, roots: Ids) -> int | None:
    """The dimension of a value along which these classes lie, or None."""
    if not isinstance(value, tuple):
        return None
    for k, ids in enumerate(value):
        if ids is not None and np.isin(roots, label[ids]).all():
            return k
    return None
