"""The registry of criteria, and how a criterion becomes the scores of a layer."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from prunelab.errors import PruneLabError, unknown
from prunelab.profile.capture import Profile
from prunelab.program.channels import Layer
from prunelab.program.program import Program

Scores = NDArray[np.float64]
Needs = Literal["weights", "statistics", "seed"]


@dataclass(frozen=True)
class Criterion:
    """A named scoring function.

    Attributes:
        name: what plans call it.
        needs: what the function takes: ``weights``, a matrix ``(channels, weights of one filter)``;
            ``statistics``, a :class:`~prunelab.profile.statistics.Statistics`; ``seed``, the number of
            channels and a generator.
        function: gives the scores, shape ``(channels,)``; higher = keep.
    """

    name: str
    needs: Needs
    function: Callable[..., Any]


_CRITERIA: dict[str, Criterion] = {}


def register(name: str, needs: Needs) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a criterion under a name; a function of the user's own works like the built-in ones.

    >>> @register("max_weight", needs="weights")
    ... def max_weight(filters):
    ...     return abs(filters).max(axis=1)
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _CRITERIA[name] = Criterion(name, needs, function)
        return function

    return add


def criteria_names() -> tuple[str, ...]:
    """Names of all criteria."""
    return tuple(_CRITERIA)


def get(name: str) -> Criterion:
    """A criterion by name.

    Raises:
        PruneLabError: there is none, with the nearest names.
    """
    if name not in _CRITERIA:
        raise unknown("criterion", name, _CRITERIA)
    return _CRITERIA[name]


def scores(program: Program, profile: Profile | None, criterion: str, layer: Layer, seed: int = 0) -> Scores:
    """Scores of a layer's channels, shape ``(channels,)``, higher = keep.

    Where several producers or sites make up the layer (a residual stream), the mean of their scores. Where units are
    bypassed, a profile is still that of the whole network, and its sites are those that are still there.

    Raises:
        PruneLabError: the criterion is unknown, needs a profile that is not there, or gave scores that are
        not finite.
    """
    chosen = get(criterion)
    if chosen.needs == "weights":
        found = [chosen.function(_filters(program, layer, state, dim)) for state, dim in layer.producers]
    elif chosen.needs == "seed":
        # Named by the layer, so that one layer's draw does not depend on the others.
        found = [chosen.function(layer.channels, np.random.default_rng([seed, zlib.crc32(layer.name.encode())]))]
    elif profile is None:
        raise PruneLabError(f"The criterion {criterion!r} needs a profile: run profile(program, data) first.")
    elif profile.program is not program.base and profile.program.digest != program.base.digest:
        raise PruneLabError("The profile is of another network: run profile(program, data) for this one.")
    else:
        found = [_profiled(program, profile, chosen, layer)]
    values = [np.asarray(f, np.float64) for f in found]
    if any(v.shape != (layer.channels,) or not np.isfinite(v).all() for v in values):
        raise PruneLabError(
            f"The criterion {criterion!r} gave scores for layer {layer.name!r} that are not {layer.channels} "
            "finite numbers."
        )
    return np.asarray(np.mean(values, axis=0), np.float64)


def _profiled(program: Program, profile: Profile, criterion: Criterion, layer: Layer) -> Any:
    """Scores from a profile of the whole network, channel by channel of the layers that they belong to there."""
    owners, channels = program.origins(layer)
    old = {k: program.base.structure.layers[k] for k in np.unique(owners).tolist()}
    found = {k: _seen(program, profile, criterion, before) for k, before in old.items()}
    wrong = [values for k, values in found.items() if values.shape != (old[k].channels,)]
    if wrong:
        return wrong[0]
    return np.array([found[k][c] for k, c in zip(owners.tolist(), channels.tolist(), strict=True)])


def _seen(program: Program, profile: Profile, criterion: Criterion, layer: Layer) -> Scores:
    """Mean scores of a layer of the whole network at the sites that bypasses have left, or at all if none is left."""
    here = [program.nodes[site] is program.base.nodes[site] for site in layer.sites]
    found = [
        _take(criterion.function(statistics), at)
        for (statistics, at), there in zip(profile.of(layer), here, strict=True)
        if there or not any(here)
    ]
    wrong = [values for values in found if values.shape != (layer.channels,)]
    return wrong[0] if wrong else np.asarray(np.mean(found, axis=0), np.float64)


def _take(values: Any, at: NDArray[np.int64]) -> Scores:
    """Scores of a layer's channels among those of a site; one that stands there twice gets their mean."""
    found: Scores = np.asarray(values, np.float64)
    fits = found.ndim == 1 and found.size > at.max()
    return np.asarray(found[at].mean(axis=1), np.float64) if fits else found


def _filters(program: Program, layer: Layer, state: str, dim: int) -> Scores:
    """A producer's filters of the layer's channels, shape ``(channels, weights of one filter)``."""
    slot = next(s for s in layer.slots if s.state == state and s.dim == dim)
    weight = program.state(state).double().cpu().movedim(dim, 0).flatten(1).numpy()
    return np.asarray(weight[slot.index].reshape(layer.channels, -1), np.float64)
