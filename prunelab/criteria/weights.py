"""Criteria that look at a filter's own weights, at its norm's scale, or at nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunelab.criteria.registry import register

Scores = NDArray[np.float64]


@register("l1", needs="weights")
def l1(filters: Scores) -> Scores:
    """Sum of absolute weights, Σ|F_c| (Li et al. 2017, 'Pruning filters for efficient convnets', arXiv 1608.08710).

    Args:
        filters: shape ``(channels, weights)``.

    Returns:
        shape ``(channels,)``, 0 and up.
    """
    return np.abs(filters).sum(axis=1)  # type: ignore[no-any-return]  # numpy types sum as Any


@register("l2", needs="weights")
def l2(filters: Scores) -> Scores:
    """Euclidean norm of the weights, ‖F_c‖₂ (Li et al. 2017, arXiv 1608.08710).

    Args:
        filters: shape ``(channels, weights)``.

    Returns:
        shape ``(channels,)``, 0 and up.
    """
    return np.sqrt((filters**2).sum(axis=1))  # type: ignore[no-any-return]  # numpy types sum as Any


@register("bn_scale", needs="scales")
def bn_scale(scales: Scores) -> Scores:
    """Scale of the norm, |γ_c| (Liu et al. 2017, 'Network Slimming', arXiv 1708.06519).

    It says most of networks that were trained with a penalty on Σ|γ|. A layer without a norm has ‖F_c‖₂ in place of
    γ, see :func:`prunelab.criteria.materials.scales`.

    Args:
        scales: shape ``(channels,)``.

    Returns:
        shape ``(channels,)``, 0 and up.
    """
    return np.abs(scales)


@register("random", needs=("channels", "seed"))
def random(channels: int, generator: Any) -> Scores:
    """Uniform in [0, 1), seeded: the baseline that every criterion must beat.

    Returns:
        shape ``(channels,)``.
    """
    return np.asarray(generator.random(channels), np.float64)
