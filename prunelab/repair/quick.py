"""A repair in milliseconds, while a slider moves: every layer by itself, from products that are taken once.

Let *X* be the inputs of a layer in the uncut network and a column of ones, *G* = *XᵀX*, *S* the inputs that are left
and *R* those that are gone. The change of the weights of *S* that best makes up for what *R* gave is
``(G_SS + λI)⁻¹ G_SR W_R``: nothing is run for a new *S*. Errors of the layers before are not seen, as the walk sees
them, so that this serves to show, not to commit.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from math import prod

import torch
from torch import Tensor

from prunelab.profile.batches import inputs_of
from prunelab.program.program import Program
from prunelab.program.run import bind, kept_index
from prunelab.program.selection import Selection
from prunelab.progress import Stopped
from prunelab.repair import addresses
from prunelab.repair.equations import FIXED_RIDGE, Sums, as_columns, as_weight, inputs_at, sampled, sums
from prunelab.repair.places import Cut, Place, places
from prunelab.repair.values import PART, Wanted

IMAGES = 256
"""Images that are looked at: with a thousand the accuracy is the same."""
ROWS = 20_000
MOST_UNKNOWNS = 1024
"""Weights of one output beyond which solving takes longer than a movement of the hand."""


class Quick:
    """Quick repairs of one network; what its layers read is looked at once."""

    def __init__(self, program: Program, images: Tensor) -> None:
        """Args:
        images: of which the first :data:`IMAGES` are looked at.
        """
        self.program = program.base
        self.images = images[:IMAGES] if program.batch is None else images
        self._grams: dict[int, Tensor] = {}
        self._solved: dict[int, tuple[bytes, dict[str, Tensor]]] = {}

    def __call__(self, selection: Selection, wanted: Wanted) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
        """New tensors by state name, and the layers left as they are, each with the reason.

        Raises:
            Stopped: it is not wanted any more.
        """
        cut = Cut(self.program.under(selection), selection)
        found, left = places(cut)
        own = [place for place in found if place.node in cut.lost]
        reasons = {place.node: self._unsuitable(cut, place) for place in own}
        left += [(cut.name(cut.program.nodes[i]), reason) for i, reason in reasons.items() if reason]
        own = [place for place in own if not reasons[place.node]]
        names = addresses.of_states(cut)
        tensors: dict[str, Tensor] = {}
        with torch.no_grad():
            self._look([place for place in own if place.node not in self._grams], wanted)
            for place in own:
                name = names[place.weight]
                if place.node not in self._solved or self._solved[place.node][0] != name:
                    self._solved[place.node] = (name, self._solve(cut, place))
                tensors.update(self._solved[place.node][1])
        return tensors, left

    def _unsuitable(self, cut: Cut, place: Place) -> str:
        """Why a layer must wait for the walk, or ""."""
        node, weight = cut.program.nodes[place.node], cut.program.nodes[place.weight].target
        if node.inputs != self.program.nodes[place.node].inputs:
            return "what it reads now was not its input before"
        if int(node.args.get("groups", 1)) > 1 or weight in cut.masks:
            return "its inputs are in groups or its weights under a mask"
        if self.program.state(weight)[0].numel() > MOST_UNKNOWNS:
            return f"each of its outputs has more than {MOST_UNKNOWNS:,} weights"
        return ""

    def _look(self, missing: list[Place], wanted: Wanted) -> None:
        """Products of what some layers read, from one run of the uncut network up to the last of them."""
        readers: dict[int, list[Place]] = defaultdict(list)
        for place in missing:
            readers[self.program.nodes[place.node].args["input"].index].append(place)
        if not readers:
            return
        grams: dict[int, list[Tensor]] = defaultdict(list)

        def look(at: int, x: Tensor) -> None:
            if not wanted():
                raise Stopped("repair")
            for place in readers[at]:
                grams[place.node].append(self._gram(place, x))

        bound = bind(self.program)
        watch = {at: partial(look, at) for at in readers}
        for part in self.images.split(PART if self.program.batch is None else len(self.images)):
            bound.run(inputs_of(self.program, part.to(bound.device)), watch)
        self._grams.update({node: torch.stack(parts).sum(0) for node, parts in grams.items()})

    def _gram(self, place: Place, x: Tensor) -> Tensor:
        """Products of what a layer reads on a part of the images, shape ``(1, inputs + 1, inputs + 1)``."""
        node, weight = self.program.nodes[place.node], self._state(place.weight)
        assert node.shape is not None
        positions = x[..., 0].numel() if node.opname == "linear" else len(x) * prod(node.shape[2:])
        rows = sampled(positions, ROWS * len(x) // len(self.images), place.node)
        known = inputs_at(node, x, tuple(weight.shape[2:]), node.args, rows)
        return sums(torch.cat([known, torch.ones_like(known[:, :, :1])], 2), known[:, :, :0]).gram

    def _solve(self, cut: Cut, place: Place) -> dict[str, Tensor]:
        """Weight of a layer, and what takes the shift, by state name."""
        weight, gram = self._state(place.weight), self._grams[place.node]
        outputs, inputs = (_kept(cut, place.weight, dim, weight) for dim in (0, 1))
        # The equations have an input's number for every position of the kernel, and the ones last.
        stays = torch.zeros(as_columns(weight, 1).shape[1] // weight.shape[1], weight.shape[1], dtype=torch.bool)
        stays[:, inputs] = True
        left = torch.cat([stays.flatten(), torch.tensor([place.shifts])]).nonzero()[:, 0].to(gram.device)
        gone = (~stays.flatten()).nonzero()[:, 0].to(gram.device)
        lost = as_columns(weight[outputs], 1)[:, gone].to(gram.dtype)
        change = Sums(gram[:, left][:, :, left], gram[:, left][:, :, gone] @ lost).solved(FIXED_RIDGE)
        tensors = {}
        at = addresses.shifted(cut, place)
        if at is not None:
            shift = change[0, -1] if place.bias is not None else -change[0, -1]
            change, before = change[:, :-1], self._state(at)
            tensors[self.program.nodes[at].target] = (before[outputs] + shift).to(before.dtype)
        cut_weight = weight[outputs][:, inputs]
        mended = cut_weight + as_weight(change, cut_weight.shape)
        return {self.program.nodes[place.weight].target: mended.to(weight.dtype), **tensors}

    def _state(self, at: int) -> Tensor:
        return self.program.state(self.program.nodes[at].target)


def _kept(cut: Cut, state: int, dim: int, tensor: Tensor) -> Tensor:
    """Positions along a dimension of a parameter that the cut leaves."""
    dims = cut.program.structure.values[state]
    assert isinstance(dims, tuple)
    index = kept_index(dims[dim], cut.program.structure.label, cut.gone)
    return torch.arange(tensor.shape[dim]) if index is None else torch.from_numpy(index)
