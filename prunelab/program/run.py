"""The interpreter: runs the program on images, whole or with a selection's weights sliced.

The user's module is not called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunelab.errors import PruneLabError, unknown
from prunelab.program.compute import whole_groups
from prunelab.program.ids import FIXED, Ids
from prunelab.program.nodes import Node, map_refs
from prunelab.program.selection import DENSE, Selection

if TYPE_CHECKING:
    from prunelab.program.program import Program


@dataclass(frozen=True)
class Bound:
    """A program with a selection's weights sliced once, ready to run on many batches.

    Attributes:
        states: the tensor of every state node, by node index.
        args: arguments of the nodes whose literals change with the cut (shapes in a view, groups of a
            convolution).
    """

    program: Program
    states: Mapping[int, Tensor]
    args: Mapping[int, Mapping[str, Any]]

    @property
    def device(self) -> torch.device:
        """Where the weights are, and images must go."""
        return next((t.device for t in self.states.values()), torch.device("cpu"))

    def replaced(self, tensors: Mapping[str, Tensor]) -> Bound:
        """The same with some tensors exchanged, by state name, in the shapes of the cut network."""
        nodes = self.program.nodes
        return Bound(self.program, {i: tensors.get(nodes[i].target, t) for i, t in self.states.items()}, self.args)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The network's (first) output for a batch."""
        return next(o for o in self.run(inputs) if isinstance(o, Tensor))

    def run(
        self, inputs: tuple[Any, ...], watch: Mapping[int, Callable[[Tensor], None]] = MappingProxyType({})
    ) -> tuple[Any, ...]:
        """Run a batch.

        Args:
            inputs: the arguments of forward, flattened; the first has shape ``(images, …)``.
            watch: what to call with a node's value as soon as it is there, by node index.

        Returns:
            the outputs (leaves, in order).
        """
        program = self.program
        values: dict[int, Any] = {}
        feed = iter(inputs)
        with torch.no_grad():
            for node in program.nodes:
                values[node.index] = self.value(node, values, feed)
                if node.index in watch:
                    watch[node.index](values[node.index])
                for dead in program.last_used[node.index]:
                    del values[dead]
        return tuple(map_refs(o, values.__getitem__) for o in program.outputs)

    def value(self, node: Node, values: Mapping[int, Any], feed: Iterator[Any]) -> Any:
        """One node's value, from the values before it; ``feed`` gives the network's inputs in turn."""
        if node.kind == "dropped":
            return None
        if node.kind == "state":
            return self.states[node.index]
        if node.kind == "input":
            return next(feed)
        args = self.args.get(node.index, node.args)
        filled = {name: map_refs(a, values.__getitem__) for name, a in args.items()}
        assert node.op is not None
        if hasattr(node.op, "_schema"):
            return node.op(**filled)
        return node.op(*filled.values())


def removed_labels(program: Program, selection: Selection) -> NDArray[np.bool_]:
    """For every channel class, whether the selection removes it: shape ``(ids,)``, indexed by label.

    Raises:
        PruneLabError: the selection does not fit the network.
    """
    gone = np.zeros(len(program.structure.label), bool)
    for layer, kept in kept_layers(program, selection).items():
        labels = program.structure.layers[layer].labels
        gone[labels] = True
        gone[labels[list(kept)]] = False
    return gone


def kept_layers(program: Program, selection: Selection) -> dict[int, tuple[int, ...]]:
    """What a selection keeps, by place of the layer.

    Raises:
        PruneLabError: a layer that does not exist, is pinned or is named twice, or channels that are not some
            of the layer's own in ascending order.
    """
    found: dict[int, tuple[int, ...]] = {}
    for name, kept in selection.kept.items():
        at = program.position(name)
        layer = program.structure.layers[at]
        if at in found:
            raise PruneLabError(f"The selection names layer {layer.name!r} twice.")
        if len(kept) == layer.channels and kept == tuple(range(layer.channels)):
            continue
        if layer.pinned:
            raise PruneLabError(f"Layer {name!r} cannot be pruned: {layer.pinned}.")
        if not kept or kept[0] < 0 or kept[-1] >= layer.channels or list(kept) != sorted(set(kept)):
            raise PruneLabError(
                f"The selection must keep some of the channels 0 to {layer.channels - 1} of layer {name!r}, "
                "in ascending order."
            )
        found[at] = kept
    return found


def removes_anything(program: Program, selection: Selection) -> bool:
    """Whether the network with this selection is another one than without."""
    program = program.under(selection)
    cut = bool(program.bypassed or kept_layers(program, selection))
    return cut or not all(m.all() for m in checked_masks(program, selection).values())


def versions(program: Program) -> tuple[int, ...]:
    """How often each tensor of the whole network was overwritten: another one once it was trained."""
    tensors = (program.state(name) for name in program.base.state_nodes)
    return tuple(0 if t.is_inference() else t._version for t in tensors)


def checked_masks(program: Program, selection: Selection) -> Mapping[str, Tensor]:
    """A selection's masks, without those of parameters that a bypass removes.

    Raises:
        PruneLabError: a mask of no parameter, or not of the parameter's shape.
    """
    for name, mask in selection.masks.items():
        if name not in program.base.state_nodes:
            raise unknown("parameter", name, program.state_nodes)
        shape = tuple(program.state(name).shape)
        if tuple(mask.shape) != shape:
            raise PruneLabError(f"The mask of {name} has shape {tuple(mask.shape)}, not {shape}.")
    return {name: mask for name, mask in selection.masks.items() if name in program.state_nodes}


def kept_index(ids: Ids | None, label: Ids, gone: NDArray[np.bool_]) -> NDArray[np.int64] | None:
    """Positions along a dimension that stay, or None when all do."""
    if ids is None:
        return None
    lost = gone[label[ids]] & (ids != FIXED)
    return np.flatnonzero(~lost) if lost.any() else None


def slice_states(
    program: Program,
    selection: Selection,
    tensor: Callable[[str], Tensor],
    names: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Parameters and buffers of the program with the selection's channels cut out and its masks applied.

    Args:
        tensor: gives the uncut tensor of a state name.
        names: which ones; all unless given.
    """
    gone = removed_labels(program, selection)
    masks = checked_masks(program, selection)
    sliced: dict[str, Tensor] = {}
    for name in program.state_nodes if names is None else names:
        value = tensor(name)
        if name in masks:
            value = value * masks[name].to(value.device, value.dtype)
        dims = program.structure.values[program.state_nodes[name]]
        assert isinstance(dims, tuple)
        for dim, ids in enumerate(dims):
            index = kept_index(ids, program.structure.label, gone)
            if index is not None:
                value = value.index_select(dim, torch.from_numpy(index).to(value.device))
        sliced[name] = value
    return sliced


def bind(program: Program, selection: Selection = DENSE, tensor: Callable[[str], Tensor] | None = None) -> Bound:
    """Slice the weights for a selection and rewrite the literals that depend on it."""
    program = program.under(selection)
    with torch.no_grad():
        states = slice_states(program, selection, tensor or program.state)
    by_node = {n.index: states[n.target] for n in program.nodes if n.kind == "state"}
    return Bound(program, by_node, rebound_args(program, selection))


def rebound_args(program: Program, selection: Selection) -> dict[int, dict[str, Any]]:
    """New arguments for nodes with literals that depend on what is removed."""
    gone = removed_labels(program, selection)
    structure = program.structure

    def count(ids: Ids) -> int:
        return int((~(gone[structure.label[ids]] & (ids != FIXED))).sum())

    changed: dict[int, dict[str, Any]] = {}
    for index in program.literal_nodes if gone.any() else ():
        node = program.nodes[index]
        new = _REBIND[node.opname](program, node, count)
        if new:
            changed[index] = {**node.args, **new}
    return changed


def _dims(program: Program, index: int) -> tuple[Ids | None, ...]:
    value = program.structure.values[index]
    return value if isinstance(value, tuple) else ()


def _new_sizes(program: Program, node: Node, count: Callable[[Ids], int], name: str, skip: int) -> dict[str, Any]:
    """A shape literal: entries that stand for removable dimensions follow what is kept."""
    dims = _dims(program, node.index)[skip:]
    old = node.args[name]
    assert node.shape is not None
    counts = [count(ids) if ids is not None else n for ids, n in zip(dims, node.shape[skip:], strict=True)]
    # A size that grows with the batch is worked out by the operator, which can do that for one only.
    worked_out = [not isinstance(old[k], int) and n != node.shape[skip + k] for k, n in enumerate(counts[: len(old)])]
    new: list[Any] = []
    for k, size in enumerate(old):
        left_open = size == -1 and (node.batched[skip + k] or not any(worked_out))
        if worked_out[k]:
            new.append(-1)
        elif isinstance(size, int) and not left_open and (dims[k] is not None or size == -1):
            new.append(counts[k])
        else:
            new.append(size)
    return {name: new}


def _view(program: Program, node: Node, count: Callable[[Ids], int]) -> dict[str, Any]:
    name = "shape" if "shape" in node.args else "size"
    return _new_sizes(program, node, count, name, 0)


def _unflatten(program: Program, node: Node, count: Callable[[Ids], int]) -> dict[str, Any]:
    source = program.nodes[node.args["self"].index].shape
    assert source is not None
    return _new_sizes(program, node, count, "sizes", int(node.args["dim"]) % len(source))


def _slice(program: Program, node: Node, count: Callable[[Ids], int]) -> dict[str, Any]:
    dims = _dims(program, node.args["self"].index)
    ids = dims[int(node.args["dim"]) % len(dims)]
    if ids is None:
        return {}
    length = len(ids)
    start, end, step = slice(node.args["start"], node.args["end"], node.args["step"]).indices(length)
    return {"start": count(ids[:start]), "end": count(ids[:end]), "step": step}


def _narrow(program: Program, node: Node, count: Callable[[Ids], int]) -> dict[str, Any]:
    dims = _dims(program, node.args["self"].index)
    ids = dims[int(node.args["dim"]) % len(dims)]
    if ids is None:
        return {}
    start = int(node.args["start"]) % len(ids)
    return {"start": count(ids[:start]), "length": count(ids[start : start + node.args["length"]])}


def _split(program: Program, node: Node, count: Callable[[Ids], int]) -> dict[str, Any]:
    dims = _dims(program, node.args["self"].index)
    axis = int(node.args.get("dim", 0)) % len(dims)
    if dims[axis] is None:
        return {}
    parts = program.structure.values[node.index]
    assert isinstance(parts, list)
    sizes = [count(ids) for part in parts if (ids := part[axis]) is not None]
    name = "split_sizes" if "split_sizes" in node.args else "split_size"
    return {name: sizes if isinstance(node.args[name], list) else sizes[0]}


def _groups(program: Program, node: Node, count: Callable[[Ids], int]) -> dict[str, Any]:
    weight = node.args["weight"]
    shape = program.nodes[weight.index].shape
    ids = _dims(program, weight.index)[0]
    if shape is None or ids is None or not whole_groups(node, shape):
        return {}
    return {"groups": count(ids) * int(node.args["groups"]) // shape[0]}


def _num_groups(program: Program, node: Node, count: Callable[[Ids], int]) -> dict[str, Any]:
    ids = _dims(program, node.index)[1]
    return {"num_groups": count(ids)} if ids is not None and len(ids) == node.args["num_groups"] else {}


def _normalized_shape(program: Program, node: Node, count: Callable[[Ids], int]) -> dict[str, Any]:
    old = node.args["normalized_shape"]
    dims = _dims(program, node.args["input"].index)[-len(old) :]
    return {"normalized_shape": [n if ids is None else count(ids) for ids, n in zip(dims, old, strict=True)]}


_REBIND: dict[str, Callable[[Any, Node, Callable[[Ids], int]], dict[str, Any]]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand", "broadcast_to"), _view),
    "unflatten": _unflatten,
    "slice": _slice,
    "narrow": _narrow,
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _groups),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _groups),
    "group_norm": _num_groups,
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalized_shape),
}


def literal_nodes(nodes: tuple[Node, ...]) -> tuple[int, ...]:
    """Nodes with literals that a cut may have to rewrite."""
    return tuple(
        n.index
        for n in nodes
        if n.opname in _REBIND and (not n.opname.startswith("conv") or int(n.args.get("groups", 1)) > 1)
    )


def last_used(nodes: tuple[Node, ...], outputs: tuple[Any, ...]) -> tuple[tuple[int, ...], ...]:
    """For every node, the values that nobody reads after it."""
    last = {n.index: n.index for n in nodes}
    for node in nodes:
        for i in node.inputs:
            last[i] = node.index
    for output in outputs:
        map_refs(output, lambda i: last.update({i: len(nodes)}))
    dead: list[list[int]] = [[] for _ in nodes]
    for value, at in last.items():
        if at < len(nodes):
            dead[at].append(value)
    return tuple(tuple(d) for d in dead)
