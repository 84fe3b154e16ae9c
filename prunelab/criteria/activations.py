"""Criteria that look at what a channel does on data, after its norm and activation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prunelab.criteria.registry import register
from prunelab.profile.statistics import Statistics

Scores = NDArray[np.float64]


@register("apoz", needs="statistics")
def apoz(statistics: Statistics) -> Scores:
    """Minus the average percentage of zeros, −APoZ_c (Hu et al. 2016, 'Network Trimming', arXiv 1607.03250).

    Returns:
        shape ``(channels,)``, −1 (always zero: removed first) to 0 (never zero).
    """
    return -statistics.apoz


@register("mean_activation", needs="statistics")
def mean_activation(statistics: Statistics) -> Scores:
    """Mean over images and positions (Xie et al., CSCWD 2023; Molchanov et al. 2017).

    Returns:
        shape ``(channels,)``.
    """
    return statistics.mean
