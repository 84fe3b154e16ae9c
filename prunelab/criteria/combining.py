"""How a row with several members gets one score per channel: a residual stream has several producers and sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]

COMBINES: Mapping[str, str] = MappingProxyType(
    {
        "mean": "the mean of its members' scores",
        "max": "the highest of its members' scores: what any member needs is kept",
        "sum": "the sum of its members' scores: rows with many members score high",
    }
)
"""How the scores of a row's members become the row's, by name, each in words."""

_FUNCTIONS: Mapping[str, Callable[..., Any]] = {"mean": np.mean, "max": np.max, "sum": np.sum}


def combined(members: list[Scores], how: str) -> Scores:
    """One score per channel from those of all members, shape ``(channels,)`` each.

    A single member's scores stay as they are. Several are first brought to one scale, each divided by the root of its
    mean square: else the member with the largest weights or maps would decide alone. A member that scores zero
    everywhere stays so. (Fang et al. 2023, 'DepGraph', arXiv 2301.12900, combine members of a group likewise.)

    Args:
        how: one of :data:`COMBINES`.
    """
    if len(members) == 1:
        return members[0]
    return np.asarray(_FUNCTIONS[how]([_unit(scores) for scores in members], axis=0), np.float64)


def _unit(scores: Scores) -> Scores:
    # Divided by the largest first, so that no square is too large or too small for a float.
    largest = float(np.abs(scores).max(initial=0.0))
    if largest == 0:
        return scores
    part = scores / largest
    return np.asarray(part / np.sqrt(np.mean(part**2)), np.float64)
