"""Criteria that look at what a channel does on data, after its norm and activation."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunelab.criteria.registry import register
from prunelab.profile.statistics import Statistics

Scores = NDArray[np.float64]

BINS = 16
"""Bins of the histogram that ``entropy`` is taken of."""


@register("apoz", needs="statistics")
def apoz(statistics: Statistics) -> Scores:
    """Minus the average percentage of zeros, −APoZ_c (Hu et al. 2016, 'Network Trimming', arXiv 1607.03250).

    Zeros are counted after the activation.

    Returns:
        shape ``(channels,)``, −1 (always zero: removed first) to 0 (never zero).
    """
    return -statistics.apoz


@register("mean_activation", needs="statistics")
def mean_activation(statistics: Statistics) -> Scores:
    """Mean activation over images and positions (Xie et al., CSCWD 2023; Molchanov et al. 2017, arXiv 1611.06440).

    Returns:
        shape ``(channels,)``.
    """
    return statistics.mean


@register("variance", needs="statistics")
def variance(statistics: Statistics) -> Scores:
    """Variance over images of the mean response (Polyak & Wolf 2015, 'Channel-level acceleration', IEEE Access 3).

    A channel whose response is always the same can be replaced by a constant.

    Returns:
        shape ``(channels,)``, 0 and up.
    """
    return statistics.pooled_variance


@register("entropy", needs="pooled")
def entropy(pooled: Scores) -> Scores:
    """Entropy of the mean response over images, −Σ p log p (Luo & Wu 2017, arXiv 1706.05791).

    p is the share of images in each of 16 equal bins from the channel's least to its largest mean response, so that
    its scale does not matter.

    Args:
        pooled: means over positions, shape ``(images, channels)``.

    Returns:
        shape ``(channels,)`` in nats, 0 (constant) to log 16.
    """
    low, high = pooled.min(axis=0), pooled.max(axis=0)
    reach = np.where(high > low, high - low, 1.0)
    bins = np.minimum(((pooled - low) / reach * BINS).astype(np.int64), BINS - 1)
    channels = pooled.shape[1]
    counts = np.bincount((bins + BINS * np.arange(channels)).ravel(), minlength=channels * BINS)
    share = counts.reshape(channels, BINS) / len(pooled)
    return np.asarray(-(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=1) + 0.0, np.float64)


@register("feature_rank", needs="activations")
def feature_rank(maps: Tensor) -> Scores:
    """Mean rank of the map as a matrix, over images (Lin et al. 2020, 'HRank', arXiv 2002.10179).

    The rank is numerical, to the values' own precision. A map of one dimension has rank 1, a single value too, unless
    it is zero throughout.

    Args:
        maps: shape ``(images, channels, …)``; dimensions before the last are taken as rows.

    Returns:
        shape ``(channels,)``, 0 to the shorter side of the map.
    """
    images, channels = maps.shape[:2]
    width = maps.shape[-1] if maps.dim() > 2 else 1
    matrices = maps.reshape(images, channels, math.prod(maps.shape[2:]) // width, width)
    # The computation knows no half precision; the tolerance is that of the values all the same.
    tolerance = max(matrices.shape[-2:]) * torch.finfo(maps.dtype).eps
    exact = matrices if maps.dtype in (torch.float32, torch.float64) else matrices.float()
    return np.asarray(torch.linalg.matrix_rank(exact, rtol=tolerance).double().mean(0).numpy(), np.float64)


@register("output_energy", needs=("statistics", "next_weights"))
def output_energy(statistics: Statistics, next_weights: Scores) -> Scores:
    """What the next layers receive, ‖a_c‖_rms · ‖W_next[:, c]‖₂ (generic).

    Args:
        next_weights: norms of all weights that read the channel, shape ``(channels,)``.

    Returns:
        shape ``(channels,)``, 0 and up.
    """
    return np.asarray(np.sqrt(statistics.sum_squares / statistics.positions) * next_weights, np.float64)
