"""Importance for the final response: carried back along weights and the correlation of the channels that they join.

Wu, Zhang, Zhao and Wang, 'Result-oriented, data-driven pruning', ICNLP 2023, doi 10.1109/ICNLP58431.2023.00043, names
propagation and inter-layer correlation in its abstract and gives no formula there. The formulas are our reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from weakref import ReferenceType, WeakKeyDictionary, ref

import numpy as np
from numpy.typing import NDArray

from prunelab.criteria.propagation import carried_back
from prunelab.profile.result import Profile, site_axes
from prunelab.program.ids import FIXED, Ids
from prunelab.program.program import Program
from prunelab.program.weighted import weighted_nodes

Array = NDArray[np.float64]

# Weakly: a program takes what is known of it along.
_Known = tuple[tuple[int, ...], ReferenceType[Profile], Mapping[int, Array]]
_KNOWN: WeakKeyDictionary[Program, dict[bool, _Known]] = WeakKeyDictionary()


def final_response(profile: Profile, correlated: bool = True) -> Mapping[int, Array]:
    """Importance of every channel class at every site for the network's final response.

    At the last hidden layer s_j = Σ_k |W_kj| · E|a_j|, what the channel gives to all outputs on average. Before that
    s_i = Σ_j ‖W_ji‖₁ · R_ij · s_j, where R_ij = |corr(a_i, a_j)| over images of the responses, averaged over positions,
    of a channel and of one in the next layer. Branches add up; see :func:`~prunelab.criteria.propagation.carried_back`.
    A constant channel has no correlation with any; where no responses are known, as of the image itself, R is 1.

    Args:
        correlated: False takes R = 1 throughout.

    Returns:
        by site, shape ``(classes,)``, indexed by channel class; the largest is 1. Computed once as long as no weight is
        overwritten.
    """
    versions = profile.program.versions()
    of_program = _KNOWN.setdefault(profile.program, {})
    known = of_program.get(correlated)
    if known is None or known[0] != versions or known[1]() is not profile:
        found = carried_back(profile.program, _Responses(profile, correlated).gain)
        known = of_program[correlated] = (versions, ref(profile), found)
    return known[2]


class _Responses:
    """How the channels of a network answer images, looked up at the sites that are nearest to where one asks."""

    def __init__(self, profile: Profile, correlated: bool) -> None:
        self._profile = profile
        self._correlated = correlated
        program = profile.program
        self._sites = site_axes(program)
        self._last = _last(program)
        # Of every node, the nearest sites that its inputs come from, and those that its value goes to.
        self._before: list[tuple[int, ...]] = []
        for node in program.nodes:
            self._before.append(_union((i,) if i in self._sites else self._before[i] for i in node.inputs))
        self._after: list[tuple[int, ...]] = [()] * len(program.nodes)
        for node in reversed(program.nodes):
            if node.index in self._sites:
                self._after[node.index] = (node.index,)
            for i in node.inputs:
                self._after[i] = _union((self._after[i], self._after[node.index]))

    def gain(self, node: int, made: Ids, read: Ids) -> Array:
        """E|a_j| of what the last layers read; R of what all others make and read."""
        if node in self._last:
            sizes = {site: found.mean_abs[None] for site, found in self._profile.statistics.items()}
            return np.nan_to_num(self._of(sizes, self._before[node], read), nan=1.0)
        if not self._correlated:
            return np.ones((1, 1))
        program, sites = self._profile.program, (*self._before[node], *self._after[node])
        pooled = {site: self._profile.pooled[site].double().numpy() for site in sites if by_image(program, site)}
        after, before = self._of(pooled, self._after[node], made), self._of(pooled, self._before[node], read)
        return correlation(after, before)

    def _of(self, values: Mapping[int, Array], sites: tuple[int, ...], classes: Ids) -> Array:
        """Values ``(rows, places)`` as those of channel classes, ``(rows, classes)``; NaN where they are not known.

        A class that stands in several places has their mean.
        """
        structure = self._profile.program.structure
        found = np.full((1, len(classes)), np.nan)
        for site in (site for site in sites if site in values):
            dims = structure.values[site]
            ids = dims[self._sites[site]] if isinstance(dims, tuple) else None
            assert ids is not None
            present, column, times = np.unique(structure.label[ids], return_inverse=True, return_counts=True)
            means = values[site] @ (np.eye(len(present))[column] / times)
            at = np.searchsorted(present, classes).clip(max=len(present) - 1)
            found = np.where((present[at] == classes) & (classes != FIXED), means[:, at], found)
        return found


def correlation(a: Array, b: Array) -> Array:
    """|corr(a_i, b_j)| over rows, 0 for a constant column, 1 where one of them is NaN: not known.

    Args:
        a, b: shapes ``(rows, m)`` and ``(rows, n)``; what is not known may have one row.

    Returns:
        shape ``(m, n)``, 0 to 1.
    """
    rows = max(len(a), len(b))
    left, right = (standardised(np.broadcast_to(np.nan_to_num(x), (rows, x.shape[1]))) for x in (a, b))
    unknown = np.logical_or.outer(np.isnan(a).any(axis=0), np.isnan(b).any(axis=0))
    return np.where(unknown, 1.0, np.minimum(np.abs(left.T @ right), 1.0))


def standardised(columns: Array) -> Array:
    """Columns less their mean, of length one each; zero where one is constant.

    Args:
        columns: shape ``(rows, columns)``.
    """
    centred = columns - columns.mean(axis=0)
    norms = np.sqrt((centred**2).sum(axis=0))
    # What is left of a constant after its mean is taken away is rounding.
    constant = norms <= 1e-12 * np.sqrt(len(columns)) * np.abs(columns).max(axis=0, initial=0.0)
    return np.where(constant, 0.0, centred / np.where(constant, 1.0, norms))


def by_image(program: Program, site: int) -> bool:
    """Whether a site's values are kept image by image: not where images lie in a later dimension."""
    return program.batch is not None or program.nodes[site].batched[:1] == (True,)


def _last(program: Program) -> frozenset[int]:
    """Nodes with a weight whose value reaches the outputs through no other weight."""
    weighted = {use.node for use in weighted_nodes(program)}
    followed: set[int] = set()
    for node in reversed(program.nodes):
        if node.index in weighted or node.index in followed:
            followed.update(node.inputs)
    return frozenset(weighted - followed)


def _union(parts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(site for part in parts for site in part))
