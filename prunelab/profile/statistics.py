"""Streaming, mergeable statistics of every channel at a site.

Everything is a sum over images in float64, so that a profile of two halves, merged, is the profile of the
whole.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

# Bins of the pooled response: even steps of asinh(100·x), so that they are fine near zero and still reach
# ±1e4, and the same for every data set: histograms of different parts can be added.
BINS = 192
_REACH = 14.6
# Values looked at together: what fits beside their signs into the cache of one core.
_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class Statistics:
    """Sums over images and positions for the channels of one site.

    Attributes:
        images: how many images were seen.
        positions: values seen per channel (images · positions in the map).
        zeros: shape ``(channels,)``: how many values were exactly zero.
        sum: shape ``(channels,)``: sum of values; ``sum_abs`` of absolute values, ``sum_squares`` of squares.
        pooled_sum: shape ``(channels,)``: sum over images of the mean over positions; ``pooled_squares`` of
            its square.
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
        summed = (arrays[f.name] for f in fields(cls)[2:])
        return cls(int(arrays["images"]), int(arrays["positions"]), *summed)


def edges() -> Array:
    """Edges of the histogram's bins, shape ``(BINS + 1,)``."""
    return np.sinh(np.linspace(-_REACH, _REACH, BINS + 1)) / 100.0


def measure(value: Tensor, axis: int, nonnegative: bool = False) -> Statistics:
    """Statistics of one batch.

    Positions are summed in the value's own precision (at least float32) image by image, which does not depend
    on how images are batched; images are summed in float64.

    Args:
        value: shape ``(images, …)`` with the channels along ``axis``.
        nonnegative: no value is below zero, as after a ReLU: saves a pass.
    """
    images, channels = value.shape[0], value.shape[axis]
    flat = value.detach().movedim(axis, 1).reshape(images, channels, -1)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    size = flat.shape[2]
    sums = flat.sum(2).double()
    absolute, nonzero = _magnitudes(flat, sums if nonnegative else None)
    pooled = sums / size
    return Statistics(
        images=images,
        positions=images * size,
        zeros=_array(images * size - nonzero),
        sum=_array(sums.sum(0)),
        sum_abs=_array(absolute),
        sum_squares=_array(torch.linalg.vector_norm(flat, 2, 2).double().square_().sum(0)),
        pooled_sum=_array(pooled.sum(0)),
        pooled_squares=_array(pooled.square().sum(0)),
        histogram=_array(_histogram(pooled)),
    )


def _magnitudes(flat: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of absolute values, and how many values differ from zero, both of shape ``(channels,)``.

    A few images at a time: what a whole batch makes on the way would not fit into the processor's cache.

    Args:
        sums: shape ``(images, channels)``: where nothing is below zero they are the absolute sums.
    """
    absolute, nonzero = [], []
    for part in flat.split(max(1, _AT_ONCE // max(1, flat[0].numel()))):
        if sums is None:
            magnitude = part.abs()
            absolute.append(magnitude.sum(2))
            nonzero.append(magnitude.sign_().sum(2))
        else:
            nonzero.append(part.sign().sum(2))
    count = torch.cat(nonzero).sum(0, dtype=torch.float64)
    return (sums if sums is not None else torch.cat(absolute)).sum(0, dtype=torch.float64), count


def _histogram(pooled: Tensor) -> Tensor:
    """Images by bin of the pooled response ``(images, channels)``, shape ``(channels, BINS)``."""
    # asinh by hand: torch's own is several times slower.
    scaled = pooled * 100.0
    place = scaled.square().add_(1.0).sqrt_().add_(scaled.abs()).log_().copysign_(scaled)
    # What is not finite has no bin; whoever asks for statistics looks for it in the sums.
    bins = place.mul_(BINS / 2 / _REACH).add_(BINS / 2).nan_to_num_().clamp_(0, BINS - 1).long()
    bins += torch.arange(pooled.shape[1], device=pooled.device) * BINS
    return torch.bincount(bins.flatten(), minlength=pooled.shape[1] * BINS).reshape(-1, BINS)


def _array(tensor: Tensor) -> Array:
    return tensor.double().cpu().numpy()
