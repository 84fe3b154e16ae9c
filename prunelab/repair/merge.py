"""Merging: what a removed channel gave to the layers that read it goes to the channel that is most like it.

Where two filters are the same, with the same norm after them, so are their channels, and a reader's weights for one can
be added to those for the other: the network computes what it did before, without training (Ding et al. 2019,
Centripetal SGD, arXiv 1904.03837). Where filters differ it is an approximation that needs no data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from prunelab.program.channels import Layer, Slot
from prunelab.program.nodes import Ref
from prunelab.program.program import Program
from prunelab.program.run import bind, checked_masks, kept_layers, slice_states
from prunelab.program.selection import DENSE, Selection
from prunelab.repair.places import SUMMED

UNMERGEABLE = "the network treats two equal channels otherwise than one: they are normalised or mixed with the others"

_TOLERANCE = 1e-9
_COARSE_TOLERANCE = 1e-3

_refused: WeakKeyDictionary[Program, Mapping[str, str]] = WeakKeyDictionary()


def merged(program: Program, selection: Selection) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """The weights that read removed channels, summed, in the shapes of the cut network.

    Returns:
        tensors by state name, and the layers whose removed channels could not be merged, each with the reason.
    """
    program = program.under(selection)
    refused = unmergeable(program)
    joins, left = {}, []
    for at, kept in kept_layers(program, selection).items():
        layer = program.structure.layers[at]
        if layer.name in refused:
            left.append((layer.name, refused[layer.name]))
        else:
            joins[layer.name] = nearest(program, layer, kept)
    masks = checked_masks(program, selection)

    def masked(name: str) -> Tensor:
        tensor = program.state(name)
        return tensor * masks[name].to(tensor.device, tensor.dtype) if name in masks else tensor

    with torch.no_grad():
        joined = _joined(program, joins, masked)
        return slice_states(program, selection, joined.__getitem__, joined.keys()), left


def nearest(program: Program, layer: Layer, kept: Iterable[int]) -> NDArray[np.int64]:
    """For every channel of a layer, the kept one whose weights are nearest: shape ``(channels,)``.

    The distance is Euclidean, over all that makes a channel: filters, biases, and the weights of norms.
    """
    stay = np.array(sorted(kept), np.int64)
    features = torch.cat([rows_of(program, slot) for slot in made(program, layer)], 1)
    # Without the shortcut through matrix products, which rounds: the distance of equal filters is exactly zero.
    distances = torch.cdist(features, features[torch.from_numpy(stay)], compute_mode="donot_use_mm_for_euclid_dist")
    found: NDArray[np.int64] = stay[distances.argmin(1).cpu().numpy()]
    found[stay] = stay
    return found


def made(program: Program, layer: Layer) -> list[Slot]:
    """The parts of a layer's slots that make its channels what they are: filters, biases, weights of norms."""
    buffers = _buffers(program)
    return [slot for slot in layer.slots if slot.state not in buffers and not is_summed(program, slot)]


def is_summed(program: Program, slot: Slot) -> bool:
    """Whether a slot is where a convolution or linear layer reads the channels, and adds them up."""
    state = program.state_nodes[slot.state]
    readers = [node for node in program.nodes if state in node.inputs]
    return bool(readers) and all(
        SUMMED.get(node.opname) == slot.dim and node.args.get("weight") == Ref(state) for node in readers
    )


def _buffers(program: Program) -> set[str]:
    parameters = {name for name, _ in program.model.named_parameters(remove_duplicate=False)}
    return set(program.state_nodes) - parameters


def rows_of(program: Program, slot: Slot) -> Tensor:
    """What a slot holds of every channel, shape ``(channels, values)``."""
    tensor = program.state(slot.state).movedim(slot.dim, 0).double()
    return tensor[torch.from_numpy(slot.index)].flatten(1)


def _joined(
    program: Program, joins: Mapping[str, NDArray[np.int64]], tensor: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """The summed weights in whole shapes, by name; ``joins`` says where each channel of a layer goes."""
    found: dict[str, Tensor] = {}
    for name, to in joins.items():
        gone = np.flatnonzero(to != np.arange(len(to)))
        for slot in program.layer(name).slots:
            if len(gone) and is_summed(program, slot):
                before = found.get(slot.state, tensor(slot.state))
                source, target = (torch.from_numpy(slot.index[at].reshape(-1)) for at in (gone, to[gone]))
                part = before.index_select(slot.dim, source.to(before.device))
                found[slot.state] = before.index_add(slot.dim, target.to(before.device), part)
    return found


# Which layers can be merged ---------------------------------------------


def unmergeable(program: Program) -> Mapping[str, str]:
    """Free layers of which equal channels cannot be merged, by name, with the reason.

    Found by trial: with a third of the channels made equal to another, the network must give the same whole and merged,
    in float64 on random inputs.
    """
    if program not in _refused:
        _refused[program] = dict.fromkeys(_found_unmergeable(program), UNMERGEABLE)
    return _refused[program]


def _found_unmergeable(program: Program) -> list[str]:
    free = [layer for layer in program.structure.layers if not layer.pinned and layer.channels > 1]
    trial = _Trial(program)
    if trial.holds(free):
        return []
    refused = [layer.name for layer in free if not trial.holds([layer])]
    together = trial.holds([layer for layer in free if layer.name not in refused])
    return refused if together else [layer.name for layer in free]


class _Trial:
    """A network with noise on its weights, and random inputs, to try mergers on."""

    def __init__(self, program: Program) -> None:
        self.program = program
        try:
            self._prepare(torch.float64)
            bind(program, DENSE, self.states.__getitem__)(*self.inputs)
            self.tolerance = _TOLERANCE
        except RuntimeError:
            # User code that makes tensors of its own type in the middle.
            self._prepare(None)
            self.tolerance = _COARSE_TOLERANCE

    def _prepare(self, dtype: torch.dtype | None) -> None:
        generator = torch.Generator().manual_seed(0)
        buffers = _buffers(self.program)

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

        def noise(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            return cast(torch.randn(x.shape, generator=generator).to(x.device, x.dtype))

        def shaken(name: str) -> Tensor:
            """A parameter with noise on it: behind one that is all zeros no difference would be seen."""
            tensor = cast(self.program.state(name))
            if name in buffers or not tensor.is_floating_point():
                return tensor
            return torch.add(tensor, noise(tensor) * tensor.abs().mean().clamp_min(0.1), alpha=0.1)

        self.states = {name: shaken(name) for name in self.program.state_nodes}
        self.inputs = [noise(x) for x in tree_leaves(self.program.example)]

    def holds(self, layers: Iterable[Layer]) -> bool:
        """Whether the network gives the same whole and merged where a third of these layers' channels are equal."""
        program = self.program
        # All into one: if every channel were there equally often, a mean over channels would not show it.
        kept = {layer.name: tuple(range(layer.channels - max(1, layer.channels // 3))) for layer in layers}
        joins = {name: np.minimum(np.arange(program.layer(name).channels), len(at) - 1) for name, at in kept.items()}
        equal = dict(self.states)
        with torch.no_grad():
            for name, to in joins.items():
                for slot in program.layer(name).slots:
                    if not is_summed(program, slot):
                        equal[slot.state] = _with_equals(equal[slot.state], slot, to)
            summed = {**equal, **_joined(program, joins, equal.__getitem__)}
            whole = bind(program, DENSE, equal.__getitem__)(*self.inputs)
            small = bind(program, Selection(kept), summed.__getitem__)(*self.inputs)
        return float((whole - small).norm()) <= self.tolerance * float(whole.norm())


def _with_equals(tensor: Tensor, slot: Slot, to: NDArray[np.int64]) -> Tensor:
    """A tensor in which every channel of a slot is a copy of the one that it goes to."""
    source = torch.from_numpy(slot.index[to].reshape(-1)).to(tensor.device)
    target = torch.from_numpy(slot.index.reshape(-1)).to(tensor.device)
    found: Tensor = tensor.index_copy(slot.dim, target, tensor.index_select(slot.dim, source))
    return found
