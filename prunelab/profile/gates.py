"""Gates: what closing a channel would change the loss by, to first order, image by image.

A gate is a factor of one on a channel of one image. The gradient of the loss with respect to it is
``t = Σ_positions ∂L/∂z · z`` (Molchanov et al. 2017, arXiv 1611.06440; 2019, arXiv 1906.10771). At the output of a
filter that equals ``Σ_w ∂L/∂w · w`` over the filter's weights and bias, since the output is linear in them: no memory
is needed for each image's gradients of weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunelab.errors import PruneLabError
from prunelab.program.channels import channel_axis
from prunelab.program.nodes import map_refs
from prunelab.program.program import Program
from prunelab.program.run import Bound
from prunelab.program.weighted import weighted_nodes

Array = NDArray[np.float64]
Loss = Callable[[Tensor, Tensor], Tensor]
"""Takes outputs and labels of a batch and gives one loss per image, shape ``(images,)``."""


@dataclass(frozen=True)
class Gates:
    """Sums over images of the gradients ``t`` of the gates at one place.

    Attributes:
        images: how many images were seen; ``positions`` of each map.
        absolute: shape ``(channels,)``: sum of |t|; ``squares`` of t².
    """

    images: int
    positions: int
    absolute: Array
    squares: Array

    def merge(self, other: Gates) -> Gates:
        """Sums over the images of both."""
        return Gates(
            self.images + other.images, self.positions, self.absolute + other.absolute, self.squares + other.squares
        )

    def at(self, places: NDArray[np.int64]) -> Gates:
        """Those of some channels; what stands in several of ``places (channels, times)`` counts as so many images."""
        times = places.shape[1]
        return Gates(self.images * times, self.positions, self.absolute[places].sum(1), self.squares[places].sum(1))


def of_site(site: int) -> str:
    """The name of the gates at a site."""
    return f"site/{site}"


def of_filters(state: str, dim: int) -> str:
    """The name of the gates of a weight's filters."""
    return f"filters/{state}/{dim}"


@dataclass(frozen=True)
class Gated:
    """Where gates stand: for every node, the names of its gates and the dimension of its channels."""

    program: Program
    at: Mapping[int, tuple[tuple[str, int], ...]]

    @classmethod
    def of(cls, program: Program) -> Gated:
        """Gates at every site and behind every filter of a program's layers."""
        structure = program.structure
        found: dict[int, dict[tuple[str, int], None]] = defaultdict(dict)
        for layer in structure.layers:
            for site in layer.sites:
                axis = channel_axis(structure.values[site], structure.label, layer.labels)
                assert axis is not None
                found[site][of_site(site), axis] = None
        made = {(state, dim) for layer in structure.layers for state, dim in layer.producers}
        for use in weighted_nodes(program):
            for state, dim in sorted(made):
                axis = use.channels_of(program, state, dim) if state in use.states else None
                if axis is not None:
                    found[use.node][of_filters(state, dim), axis] = None
        return cls(program, {node: tuple(places) for node, places in found.items()})

    @property
    def names(self) -> set[str]:
        """Names of all gates."""
        return {name for places in self.at.values() for name, _ in places}

    def check(self, bound: Bound, inputs: tuple[Tensor, ...]) -> None:
        """The network with its gates must be the network: where user's code overwrites values it may not be.

        Raises:
            PruneLabError: it gives other outputs.
        """
        with torch.no_grad():
            found, wanted = self._forward(bound, inputs)[0], bound(*inputs)
        if not torch.allclose(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise PruneLabError(
                "No gradients can be had: your forward overwrites values in place that a gate would have to follow. "
                "Choose a criterion that needs none, for example l1 or apoz."
            )

    def run(self, bound: Bound, inputs: tuple[Tensor, ...], labels: Tensor, loss: Loss) -> dict[str, Gates]:
        """One batch, forward and backward: no parameter gets a gradient, no gradient that is there is touched.

        Raises:
            PruneLabError: the loss is not one number per image, or gradients cannot be had or are not finite.
        """
        with torch.enable_grad():
            try:
                # What the user made in inference mode takes no part in gradients; a copy does.
                inputs = tuple(x.clone() if x.is_inference() else x for x in inputs)
                outputs, opened = self._forward(bound, inputs)
                losses = loss(outputs, labels)
                if losses.shape != labels.shape[:1]:
                    raise PruneLabError(f"A loss gives one number per image, not {tuple(losses.shape)}.")
                found = torch.autograd.grad(losses.sum(), [gate.ones for gate in opened], allow_unused=True)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                raise PruneLabError(
                    f"No gradients can be had ({reason}): choose a criterion that needs none, for example l1 or apoz."
                ) from error
        by_name: dict[str, Tensor] = {}
        for gate, gradient in zip(opened, found, strict=True):
            t = gate.by_image(gradient, len(labels))
            # A weight that is used twice has one gate: the gradients of its uses add up.
            by_name[gate.name] = by_name[gate.name] + t if gate.name in by_name else t
        positions = {gate.name: gate.positions for gate in opened}
        return {name: _summed(t.double(), positions[name], name) for name, t in by_name.items()}

    def _forward(self, bound: Bound, inputs: tuple[Tensor, ...]) -> tuple[Tensor, list[_Open]]:
        """The first output, and the gates that it went through."""
        values: dict[int, Any] = {}
        feed: Iterator[Any] = iter(inputs)
        opened: list[_Open] = []
        for node in self.program.nodes:
            value = bound.value(node, values, feed)
            for name, axis in self.at.get(node.index, ()):
                gate = _Open.before(value, name, axis, node.batched)
                opened.append(gate)
                value = value * gate.ones
            values[node.index] = value
            for dead in self.program.last_used[node.index]:
                del values[dead]
        outputs = (map_refs(o, values.__getitem__) for o in self.program.outputs)
        return next(o for o in outputs if isinstance(o, Tensor)), opened


@dataclass(frozen=True)
class _Open:
    """Gates at one place for one batch: ``ones`` for every image and channel."""

    name: str
    ones: Tensor
    axes: tuple[int, ...]
    positions: int

    @classmethod
    def before(cls, value: Tensor, name: str, axis: int, batched: tuple[bool, ...]) -> _Open:
        """Gates for a value with its channels along ``axis``."""
        images = [k for k, grows in enumerate(batched) if grows and k != axis][:1]
        shape = [n if k in (*images, axis) else 1 for k, n in enumerate(value.shape)]
        ones = torch.ones(shape, dtype=value.dtype, device=value.device, requires_grad=True)
        return cls(name, ones, (*images, axis), value.numel() // max(1, ones.numel()))

    def by_image(self, gradient: Tensor | None, images: int) -> Tensor:
        """Gradients of the gates, shape ``(images, channels)``; those of an image's parts are added up."""
        if gradient is None:
            gradient = torch.zeros_like(self.ones)
        last = gradient.movedim(self.axes, tuple(range(-len(self.axes), 0))).flatten(0, -2)
        if len(last) % images:
            raise PruneLabError("Gradients cannot be told apart by image: choose a criterion that needs none.")
        return last.reshape(images, -1, last.shape[-1]).sum(1)


def _summed(t: Tensor, positions: int, name: str) -> Gates:
    if not t.isfinite().all():
        raise PruneLabError(f"The gradients at {name} are not finite (NaN or infinite): check weights, data and loss.")
    return Gates(len(t), positions, t.abs().sum(0).cpu().numpy(), t.square().sum(0).cpu().numpy())
