"""The registry of criteria, and how a criterion becomes the scores of a layer."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunelab.criteria.combining import COMBINES, combined
from prunelab.criteria.materials import MATERIALS, Row
from prunelab.errors import PruneLabError, unknown
from prunelab.profile.capture import Profile
from prunelab.program.channels import Layer
from prunelab.program.program import Program

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Criterion:
    """A named scoring function.

    Attributes:
        name: what plans call it.
        needs: what the function takes, in order: names of :data:`~prunelab.criteria.materials.MATERIALS`.
        function: gives the scores, shape ``(channels,)``; higher = keep.
    """

    name: str
    needs: tuple[str, ...]
    function: Callable[..., Any]

    @property
    def about(self) -> str:
        """What it computes, in a line: the first of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def parts(self) -> frozenset[str]:
        """What of a profile it needs, by the names of its attributes; nothing for criteria of weights alone."""
        return frozenset(MATERIALS[need].part for need in self.needs) - {""}

    def missing(self, profile: Profile | None) -> str:
        """Why it cannot be used with a profile, in a sentence; empty where it can."""
        if self.parts and profile is None:
            return f"The criterion {self.name!r} needs a profile: run profile(program, data) first."
        for part in sorted(self.parts):
            if profile is not None and profile.statistics and not getattr(profile, part):
                return f"The criterion {self.name!r} needs {part}, which this profile does not hold: {_ADVICE[part]}."
        return ""


_ADVICE = {
    "gradients": "run with_gradients(profile, data) first",
    "activations": "profile with sample=512 and a larger budget",
    "pooled": "profile with a larger budget",
    "statistics": "profile again",
}
_CRITERIA: dict[str, Criterion] = {}
_FAMILIES: dict[str, Callable[[str], None]] = {}


def register(name: str, needs: str | Sequence[str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a criterion under a name; a function of the user's own works like the built-in ones.

    >>> @register("max_weight", needs="weights")
    ... def max_weight(filters):
    ...     return abs(filters).max(axis=1)

    It is called once for every member of a row, a residual stream having several, with what it needs:

    - ``weights``: filters as a matrix ``(channels, weights of one filter)``;
    - ``scales``: size of γ of the norms' γ, ``(channels,)``;
    - ``statistics``: a :class:`~prunelab.profile.statistics.Statistics` over all images;
    - ``pooled``: means over positions ``(images, channels)``;
    - ``activations``: a tensor ``(images, channels, …)``;
    - ``gradients``, ``filter_gradients``: :class:`~prunelab.profile.gates.Gates` at the sites, behind the filters;
    - ``propagated``: importance carried back from the outputs, ``(channels,)``;
    - ``final_response``: importance for the final response, along weights and correlated channels, ``(channels,)``;
      ``final_response_by_weights`` without the correlations;
    - ``next_weights``: norms of the weights that read each channel, ``(channels,)``;
    - ``channels``, ``seed``: how many there are, and a generator of random numbers.

    Args:
        needs: one of these, or several, which the function then takes in this order.

    Raises:
        PruneLabError: there is no such thing to need, or what belongs to different members is wanted at once.
    """
    wanted = (needs,) if isinstance(needs, str) else tuple(needs)
    for need in wanted:
        if need not in MATERIALS:
            raise unknown("material for criteria", need, MATERIALS)
    members = sorted({MATERIALS[need].per for need in wanted} - {"row"})
    if len(members) > 1:
        raise PruneLabError(
            f"The criterion {name!r} wants what there is one of per {' and per '.join(members)}, and a row has not "
            "as many of each: choose one kind."
        )

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _CRITERIA[name] = Criterion(name, wanted, function)
        return function

    return add


def register_family(name: str) -> Callable[[Callable[[str], None]], Callable[[str], None]]:
    """Add a family of criteria, whose members are called ``name(…)`` and made when one is asked for.

    The decorated function takes a member's whole name and registers it, or does nothing where there is no such member.
    """

    def add(make: Callable[[str], None]) -> Callable[[str], None]:
        _FAMILIES[name] = make
        return make

    return add


def criteria_names() -> tuple[str, ...]:
    """Names of all criteria."""
    return tuple(_CRITERIA)


def get(name: str) -> Criterion:
    """A criterion by name.

    Raises:
        PruneLabError: there is none, with the nearest names.
    """
    family, bracket, _ = name.partition("(")
    if name not in _CRITERIA and bracket and family in _FAMILIES:
        _FAMILIES[family](name)
    if name not in _CRITERIA:
        raise unknown("criterion", name, _CRITERIA)
    return _CRITERIA[name]


def scores(
    program: Program, profile: Profile | None, criterion: str, layer: Layer, seed: int = 0, combine: str = "mean"
) -> Scores:
    """Scores of a layer's channels, shape ``(channels,)``, higher = keep.

    A row has as many members as weights produce it, or as there are sites at which it is observed, whichever the
    criterion looks at; a residual stream has several of both. The members' scores are brought to one scale and
    combined, see :func:`~prunelab.criteria.combining.combined`. Where units are bypassed, a profile is still that of
    the whole network, and its sites are those that are still there. A row of which a criterion sees nothing, as one
    whose values do not have images in their first dimension, scores zero throughout: the criterion tells none apart.

    Args:
        combine: one of :data:`~prunelab.criteria.combining.COMBINES`.

    Raises:
        PruneLabError: the criterion is unknown, needs a profile that is not there, or gave scores that are not
        finite.
    """
    chosen = get(criterion)
    if combine not in COMBINES:
        raise unknown("way to combine", combine, COMBINES)
    missing = chosen.missing(profile)
    if missing:
        raise PruneLabError(missing)
    # Named by the layer, so that one layer's draw does not depend on the others.
    generator = np.random.default_rng([seed, zlib.crc32(layer.name.encode())])
    if not chosen.parts:
        return _scored(chosen, Row(program, layer, layer.sites, None, generator), combine)
    assert profile is not None
    if profile.program is not program.base and profile.program.digest != program.base.digest:
        raise PruneLabError("The profile is of another network: run profile(program, data) for this one.")
    return _profiled(program, profile, chosen, layer, generator, combine)


def _profiled(
    program: Program, profile: Profile, chosen: Criterion, layer: Layer, generator: np.random.Generator, combine: str
) -> Scores:
    """Scores from a profile of the whole network, channel by channel of the layers that they belong to there."""
    owners, channels = program.origins(layer)
    found = {}
    for k in np.unique(owners).tolist():
        old = program.base.structure.layers[k]
        here = tuple(site for site in old.sites if program.nodes[site] is program.base.nodes[site])
        row = Row(program.base, old, here or old.sites, profile, generator)
        found[k] = _scored(chosen, row, combine)
    return np.array([found[k][c] for k, c in zip(owners.tolist(), channels.tolist(), strict=True)])


def _scored(chosen: Criterion, row: Row, combine: str) -> Scores:
    """A row's scores, from those of its members."""
    given = [MATERIALS[need].take(row) for need in chosen.needs]
    count = max(map(len, given), default=0) if all(given) else 0
    if not count:
        return np.zeros(row.layer.channels)
    members = zip(
        *(found if MATERIALS[n].per != "row" else found * count for n, found in zip(chosen.needs, given, strict=True)),
        strict=True,
    )
    values = [np.asarray(chosen.function(*member), np.float64) for member in members]
    if any(v.shape != (row.layer.channels,) or not np.isfinite(v).all() for v in values):
        raise PruneLabError(
            f"The criterion {chosen.name!r} gave scores for layer {row.layer.name!r} that are not {row.layer.channels} "
            "finite numbers."
        )
    return combined(values, combine)
