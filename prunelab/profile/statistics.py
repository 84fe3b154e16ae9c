"""Streaming, mergeable statistics of every channel at a site.

Everything is a float64 or integer sum, so that a profile of two halves, merged, is the profile of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

# Bins of the pooled response: even steps of asinh(100·x), so that they are fine near zero and still reach ±1e4, and the
# same for every data set: histograms of different parts can be added.
BINS = 192
_REACH = 14.6


@dataclass(frozen=True)
class Statistics:
    """Sums over images and positions for the channels of one site.

    Attributes:
        images: how many images were seen.
        positions: values seen per channel (images · positions in the map).
        zeros: shape ``(channels,)``: how many values were exactly zero.
        sum: shape ``(channels,)``: sum of values; ``sum_abs`` of absolute values, ``sum_squares`` of squares.
        pooled_sum: shape ``(channels,)``: sum over images of the mean over positions; ``pooled_squares`` of its square.
        histogram: shape ``(channels, BINS)``: images by pooled response, in the bins of :func:`edges`.
    """

    images: int
    positions: int
    zeros: Array
    sum: Array
    sum_abs: Array
    sum_squares: Array
    pooled_sum: Array
    pooled_squares: Array
    histogram: Array

    @property
    def apoz(self) -> Array:
        """Share of zeros, shape ``(channels,)``, 0 to 1."""
        return self.zeros / self.positions

    @property
    def mean(self) -> Array:
        """Mean activation, shape ``(channels,)``."""
        return self.sum / self.positions

    @property
    def mean_abs(self) -> Array:
        """Mean of absolute values, shape ``(channels,)``."""
        return self.sum_abs / self.positions

    @property
    def variance(self) -> Array:
        """Population variance over images and positions, shape ``(channels,)``."""
        return np.maximum(self.sum_squares / self.positions - self.mean**2, 0.0)

    @property
    def pooled_variance(self) -> Array:
        """Population variance over images of the mean over positions, shape ``(channels,)``."""
        return np.maximum(self.pooled_squares / self.images - (self.pooled_sum / self.images) ** 2, 0.0)

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both parts together."""
        return Statistics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def arrays(self) -> dict[str, Array]:
        """All fields as arrays, for storing."""
        return {f.name: np.asarray(getattr(self, f.name), np.float64) for f in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Array]) -> Statistics:
        """The reverse of :meth:`arrays`."""
        counts = {k: int(arrays[k]) for k in ("images", "positions")}
        return cls(**{**{f.name: arrays[f.name] for f in fields(cls)}, **counts})


def edges() -> Array:
    """Edges of the histogram's bins, shape ``(BINS + 1,)``."""
    return np.sinh(np.linspace(-_REACH, _REACH, BINS + 1)) / 100.0


def measure(value: Tensor, axis: int) -> Statistics:
    """Statistics of one batch.

    Args:
        value: shape ``(images, …)`` with the channels along ``axis``.
    """
    channels = value.shape[axis]
    flat = value.detach().movedim(axis, 1).reshape(value.shape[0], channels, -1)
    wide = flat.double()
    sums = wide.sum(2)
    pooled = sums / flat.shape[2]
    bins = ((torch.asinh(pooled * 100.0) / _REACH + 1.0) * (BINS / 2)).floor().clamp_(0, BINS - 1).long()
    histogram = torch.zeros(channels, BINS, dtype=torch.float64, device=value.device)
    histogram.scatter_add_(1, bins.T.contiguous(), torch.ones_like(pooled.T))
    return Statistics(
        images=flat.shape[0],
        positions=flat.shape[0] * flat.shape[2],
        zeros=_array((flat == 0).sum((0, 2))),
        sum=_array(sums.sum(0)),
        sum_abs=_array(wide.abs().sum((0, 2))),
        sum_squares=_array(wide.square().sum((0, 2))),
        pooled_sum=_array(pooled.sum(0)),
        pooled_squares=_array(pooled.square().sum(0)),
        histogram=_array(histogram),
    )


def _array(tensor: Tensor) -> Array:
    return tensor.double().cpu().numpy()
