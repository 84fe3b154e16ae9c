"""Criteria that compare a channel with the others of its layer: what is like another can go."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunelab.criteria.registry import register
from prunelab.criteria.responses import correlation

Scores = NDArray[np.float64]

# Images that independence looks at, fewer where one alone costs much: (channels · rank³) of all together.
_IMAGES = 16
_WORK = 1 << 30


@register("geometric_median", needs="weights")
def geometric_median(filters: Scores) -> Scores:
    """Distance to all other filters, Σ_j ‖F_c − F_j‖₂ (He et al. 2019, 'FPGM', arXiv 1811.00250).

    A filter near the geometric median of its layer is what the others can stand in for. Distances are between the
    weights themselves.

    Args:
        filters: shape ``(channels, weights)``.

    Returns:
        shape ``(channels,)``, 0 and up.
    """
    points = torch.from_numpy(filters)
    # Not by way of matrix products, which lose half of the digits of a small distance.
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    return np.asarray(distances.sum(1).numpy(), np.float64)


@register("redundancy", needs="pooled")
def redundancy(pooled: Scores) -> Scores:
    """How little the nearest other channel tells of it, 1 − max_{j≠c} |corr(a_c, a_j)| over images (generic).

    A constant channel scores 0: it tells nothing. One that has no other beside it scores 1.

    Args:
        pooled: means over positions, shape ``(images, channels)``.

    Returns:
        shape ``(channels,)``, 0 to 1.
    """
    alike = correlation(pooled, pooled)
    constant = np.diag(alike) == 0
    np.fill_diagonal(alike, 0.0)
    return np.where(constant, 0.0, 1.0 - alike.max(axis=1))


@register("independence", needs="activations")
def independence(maps: Tensor) -> Scores:
    """Nuclear norm that goes with the channel, ‖A‖_* − ‖A with row c zeroed‖_* (Sui et al. 2021, arXiv 2110.13981).

    A holds an image's maps, ``(channels, positions)``; the mean over up to 16 images, fewer where one alone takes long.
    With A = UΣVᵀ, the singular values without row c are the roots of the eigenvalues of Σ² − zzᵀ, z = Σ U_cᵀ: a
    matrix as small as A's rank allows.

    Args:
        maps: shape ``(images, channels, …)``.

    Returns:
        shape ``(channels,)``, 0 and up.
    """
    channels = maps.shape[1]
    rank = min(channels, maps[0, 0].numel())
    images = max(1, min(_IMAGES, len(maps), _WORK // (channels * rank**3)))
    found = [_lost(image) for image in maps[:images].double().reshape(images, channels, -1)]
    return np.asarray(torch.stack(found).mean(0).numpy(), np.float64)


def _lost(rows: Tensor) -> Tensor:
    """For each row of a matrix ``(channels, positions)``, the nuclear norm that goes with it."""
    left, singular, _ = torch.linalg.svd(rows, full_matrices=False)
    scaled = left * singular
    without = torch.diag(singular.square()) - scaled.unsqueeze(2) * scaled.unsqueeze(1)
    remaining = torch.linalg.eigvalsh(without).clamp_min(0.0).sqrt().sum(1)
    lost: Tensor = (singular.sum() - remaining).clamp_min(0.0)
    return lost
