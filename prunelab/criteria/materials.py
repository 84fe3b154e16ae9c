"""What criteria are given: for every member of a row its weights, statistics, responses or gradients.

A row's members are the weights that produce its channels (``filter``), the norms that scale them (``norm``) or the
sites at which they are observed (``site``); a residual stream has several of each. What belongs to the row as a whole
(``row``) goes with every member.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunelab.criteria.propagation import importance, next_weights
from prunelab.criteria.responses import by_image, final_response
from prunelab.profile.gates import of_filters, of_site
from prunelab.profile.result import Profile, places, site_axis
from prunelab.program.channels import NORMS, Layer
from prunelab.program.nodes import Ref
from prunelab.program.program import Program

Array = NDArray[np.float64]

IMAGES = 64
"""Images of the profile's sample that criteria of whole maps look at."""


@dataclass(frozen=True)
class Row:
    """A layer, and what is known of it.

    Attributes:
        sites: those of the layer that are looked at.
        profile: of the program, or None where no criterion of the plan needs one.
        generator: for what is drawn at random.
    """

    program: Program
    layer: Layer
    sites: tuple[int, ...]
    profile: Profile | None
    generator: np.random.Generator

    @property
    def seen(self) -> Profile:
        """The profile, which whoever asks for it has made sure of."""
        assert self.profile is not None
        return self.profile

    def places(self, site: int) -> NDArray[np.int64]:
        """Where the row's channels stand at a site, shape ``(channels, times)``."""
        return places(self.program, self.layer, site)


@dataclass(frozen=True)
class Material:
    """Something that a criterion can ask for.

    Attributes:
        per: what there is one of.
        take: gives all members' of a row.
        part: what of the profile must be there: ``""`` for nothing, else the name of its attribute.
    """

    per: Literal["filter", "norm", "site", "row"]
    take: Callable[[Row], list[Any]]
    part: str = ""


def filters(row: Row) -> list[Array]:
    """Each producer's filters, shape ``(channels, weights of one filter)``."""
    return [_filters(row, state, dim) for state, dim in row.layer.producers]


def _filters(row: Row, state: str, dim: int) -> Array:
    slot = next(s for s in row.layer.slots if s.state == state and s.dim == dim)
    weight = row.program.state(state).double().cpu().movedim(dim, 0).flatten(1).numpy()
    return np.asarray(weight[slot.index].reshape(row.layer.channels, -1), np.float64)


def scales(row: Row) -> list[Array]:
    """The scale |γ| of every norm over these channels, shape ``(channels,)``.

    Where there is none, ‖F_c‖₂ of each producer: what γ would be for white inputs, whose response to a filter has the
    standard deviation ‖F_c‖₂, which a norm divides by.
    """
    weights = [node.args.get("weight") for node in row.program.nodes if node.opname in NORMS]
    names = {row.program.nodes[ref.index].target for ref in weights if isinstance(ref, Ref)}
    found = [
        row.program.state(slot.state).double().cpu().abs().numpy()[slot.index].mean(1)
        for slot in row.layer.slots
        if slot.state in names and row.program.state(slot.state).dim() == 1
    ]
    return found or [np.sqrt((f**2).sum(1)) for f in filters(row)]


def statistics(row: Row) -> list[Any]:
    """:class:`~prunelab.profile.statistics.Statistics` of the row's channels at every site."""
    return [row.seen.statistics[site].at(row.places(site)) for site in row.sites]


def pooled(row: Row) -> list[Array]:
    """Means over positions at every site, shape ``(images, channels)``."""
    return [_apart(row.seen.pooled[site], row.places(site), 1).double().numpy() for site in _by_image(row)]


def activations(row: Row) -> list[Tensor]:
    """Values at every site for the first images of the sample, shape ``(images, channels, …)``."""
    return [
        _apart(row.seen.activations[site][:IMAGES], row.places(site), site_axis(row.program, row.layer, site))
        for site in _by_image(row)
    ]


def _by_image(row: Row) -> list[int]:
    """The sites whose values are kept image by image."""
    return [site for site in row.sites if by_image(row.program, site)]


def _apart(value: Tensor, at: NDArray[np.int64], axis: int) -> Tensor:
    """A row's channels of a value, in dimension 1; where they stand several times, each time is an image of its own."""
    index = torch.from_numpy(at.T.reshape(-1).copy())
    chosen = value.movedim(axis, 1).index_select(1, index)
    apart: Tensor = chosen.unflatten(1, at.T.shape).flatten(0, 1)
    return apart


def gradients(row: Row) -> list[Any]:
    """:class:`~prunelab.profile.gates.Gates` of the row's channels at every site."""
    return [row.seen.gradients[of_site(site)].at(row.places(site)) for site in row.sites]


def filter_gradients(row: Row) -> list[Any]:
    """:class:`~prunelab.profile.gates.Gates` behind each producer's filters, where gates can stand."""
    slots = {(slot.state, slot.dim): slot.index for slot in row.layer.slots}
    known = row.seen.gradients
    return [known[of_filters(*made)].at(slots[made]) for made in row.layer.producers if of_filters(*made) in known]


def propagated(row: Row) -> list[Array]:
    """What each channel hands on to the outputs from every site, shape ``(channels,)``; see :mod:`.propagation`."""
    found = importance(row.program)
    return [found[site][row.layer.labels] for site in row.sites]


def for_final_response(row: Row, correlated: bool = True) -> list[Array]:
    """What the final response depends on of every site, shape ``(channels,)``; see :mod:`.responses`."""
    found = final_response(row.seen, correlated)
    return [found[site][row.layer.labels] for site in _by_image(row)]


MATERIALS: Mapping[str, Material] = MappingProxyType(
    {
        "channels": Material("row", lambda row: [row.layer.channels]),
        "seed": Material("row", lambda row: [row.generator]),
        "next_weights": Material("row", lambda row: [next_weights(row.program, row.layer)]),
        "weights": Material("filter", filters),
        "scales": Material("norm", scales),
        "propagated": Material("site", propagated),
        "statistics": Material("site", statistics, "statistics"),
        "pooled": Material("site", pooled, "pooled"),
        "final_response": Material("site", for_final_response, "pooled"),
        "final_response_by_weights": Material("site", partial(for_final_response, correlated=False), "pooled"),
        "activations": Material("site", activations, "activations"),
        "gradients": Material("site", gradients, "gradients"),
        "filter_gradients": Material("filter", filter_gradients, "gradients"),
    }
)
"""What a criterion can ask for, by name."""
