"""The profile: what a network does on data."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from prunelab.errors import PruneLabError
from prunelab.profile import store
from prunelab.profile.gates import Gates
from prunelab.profile.statistics import Statistics
from prunelab.program.channels import Layer, channel_axis, positions
from prunelab.program.program import Program


@dataclass(frozen=True)
class Profile:
    """What a network does on data.

    Attributes:
        program: the network.
        images: how many images the statistics cover.
        statistics: by site (node index).
        activations: values at the sites for the first ``sample`` images, shape ``(sample, …)``, fewer where
            the byte budget does not allow them; memory-mapped when they come from the cache. None at sites whose
            first dimension is not the images (a sequence first, windows of images).
        folder: where it is kept, or None.
        pooled: by site, means over positions of the first images, float32 ``(images, channels)``: up to 2,048, fewer
            where they would take more than an eighth of the byte budget; memory-mapped likewise.
        room: for how many images there is room in ``activations`` and in ``pooled``.
        gradients: what closing each channel would change the loss by, by the names that
            :mod:`prunelab.profile.gates` gives; empty unless :func:`prunelab.with_gradients` made this profile.
    """

    program: Program
    images: int
    statistics: Mapping[int, Statistics]
    activations: Mapping[int, Tensor]
    folder: Path | None
    pooled: Mapping[int, Tensor] = field(default_factory=dict)
    room: tuple[int, int] = (0, 0)
    gradients: Mapping[str, Gates] = field(default_factory=dict)

    def merge(self, *others: Profile) -> Profile:
        """The profile of all parts of a data set, from those of its parts in order, this one first.

        Statistics are those of one pass over all parts, to float64's rounding; activations and pooled responses are
        those of the first images, as many as this part has room for. Gradients are there if all parts have them.

        Raises:
            PruneLabError: the parts are of different networks.
        """
        merged = self
        mine = network_digest(self.program)
        for other in others:
            if other.program is not self.program and network_digest(other.program) != mine:
                raise PruneLabError(
                    "Only profiles of the same network can be merged, and these are of networks that differ in their "
                    "operators or weights: profile all parts with one network."
                )
            merged = replace(
                merged,
                images=merged.images + other.images,
                statistics={site: found.merge(other.statistics[site]) for site, found in merged.statistics.items()},
                activations=_joined(merged, merged.activations, other.activations, self.room[0]),
                pooled=_joined(merged, merged.pooled, other.pooled, self.room[1]),
                folder=None,
                gradients={
                    name: found.merge(other.gradients[name])
                    for name, found in merged.gradients.items()
                    if name in other.gradients
                },
            )
        return merged

    def of(self, layer: Layer) -> list[tuple[Statistics, NDArray[np.int64]]]:
        """For each site of a layer: its statistics and where the layer's channels stand in them.

        The places have shape ``(channels, times)``: a channel that your code uses in two halves stands in
        both.
        """
        return [(self.statistics[s], places(self.program, layer, s)) for s in layer.sites]

    def maps(self, layer: Layer, images: int = 8) -> Tensor | None:
        """Cached activations of a layer at its first site, or None where none were kept.

        Returns:
            shape ``(images, channels, …)``.
        """
        for site in layer.sites:
            if site in self.activations:
                axis = site_axis(self.program, layer, site)
                index = torch.from_numpy(places(self.program, layer, site)[:, 0].copy())
                return self.activations[site][:images].index_select(axis, index).movedim(axis, 1)
        return None


def site_axis(program: Program, layer: Layer, site: int) -> int:
    """The dimension along which a layer's channels lie at a site."""
    axis = channel_axis(program.structure.values[site], program.structure.label, layer.labels)
    assert axis is not None
    return axis


def places(program: Program, layer: Layer, site: int) -> NDArray[np.int64]:
    """Where a layer's channels stand along the channel dimension of a site, shape ``(channels, times)``."""
    dims = program.structure.values[site]
    assert isinstance(dims, tuple)
    ids = dims[site_axis(program, layer, site)]
    assert ids is not None
    return positions(ids, program.structure.label, layer.labels)


def site_axes(program: Program) -> dict[int, int]:
    """Every site and the dimension along which channels lie there."""
    pairs = [(site, layer) for layer in program.structure.layers for site in layer.sites]
    return {site: site_axis(program, layer, site) for site, layer in sorted(pairs, key=lambda pair: pair[0])}


def bytes_per_image(program: Program, sites: list[int]) -> int:
    """What the values at these sites take for one image."""
    element = next((x.element_size() for x in tree_leaves(program.example) if isinstance(x, Tensor)), 4)
    return element * sum(math.prod(program.nodes[site].shape or ()) for site in sites)


def fits(found: Profile) -> bool:
    """Whether a profile read from files covers every site of its network, with the right shapes."""
    axes, nodes = site_axes(found.program), found.program.nodes
    shapes = {site: nodes[site].shape or () for site in axes}
    channels = {site: (shapes[site][axis],) for site, axis in axes.items()}
    return (
        axes.keys() == found.statistics.keys() >= found.activations.keys() | found.pooled.keys()
        and all(found.statistics[s].sum.shape == channels[s] for s in axes)
        and all(v.shape[1:] == shapes[s][1:] for s, v in found.activations.items())
        and all(v.shape[1:] == channels[s] for s, v in found.pooled.items())
    )


def network_digest(program: Program) -> str:
    """A name for what a network computes: its operators and weights."""
    hasher = hashlib.blake2b(digest_size=16)
    # The layers' digest says nothing of what happens between them: two networks may differ in an activation
    # alone.
    hasher.update(repr([(n.opname, dict(n.args), n.target) for n in program.nodes]).encode())
    for name in program.state_nodes:
        store.digest_tensor(hasher, program.state(name))
    return hasher.hexdigest()


def _joined(
    before: Profile, first: Mapping[int, Tensor], second: Mapping[int, Tensor], room: int
) -> Mapping[int, Tensor]:
    """What is kept of the first images: the second part's come in where the first part kept all of its own."""
    return {
        site: torch.cat([kept, second[site][: room - len(kept)]])
        if site in second and len(kept) == before.images
        else kept
        for site, kept in first.items()
    }
