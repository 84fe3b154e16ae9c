"""Criteria that look at a filter's own weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunelab.criteria.registry import register

Scores = NDArray[np.float64]


@register("l1", needs="weights")
def l1(filters: Scores) -> Scores:
    """Sum of absolute weights, Σ|F_c| (Li et al. 2017, 'Pruning filters for efficient convnets').

    Args:
        filters: shape ``(channels, weights)``.

    Returns:
        shape ``(channels,)``.
    """
    return np.abs(filters).sum(axis=1)  # type: ignore[no-any-return]  # numpy types sum as Any


@register("l2", needs="weights")
def l2(filters: Scores) -> Scores:
    """Euclidean norm, ‖F_c‖₂.

    Args:
        filters: shape ``(channels, weights)``.

    Returns:
        shape ``(channels,)``.
    """
    return np.sqrt((filters**2).sum(axis=1))  # type: ignore[no-any-return]  # numpy types sum as Any


@register("random", needs="seed")
def random(channels: int, generator: Any) -> Scores:
    """Uniform in [0, 1), seeded: the baseline that every criterion must beat.

    Returns:
        shape ``(channels,)``.
    """
    return np.asarray(generator.random(channels), np.float64)
