"""Streaming, mergeable statistics of every channel at a site.

Everything is a sum over images in float64, so that a profile of two halves, merged, is the profile of the
whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

# Bins of the pooled response: four to an octave from 2^-10 to 2^14 on either side of zero, so that they are fine
# near zero and still reach far, and the same for every data set: histograms of different parts can be added.
BINS = 192
_SIDE = BINS // 2
_LEAST = -10
# Where float32 keeps its exponent and the first two bits after the point: counted from 2^-10, they are the bin.
_DROPPED_BITS = 21
_FIRST = (127 + _LEAST) << 2
# Values looked at together: what fits beside their squares into the cache of one core.
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

    def at(self, places: NDArray[np.int64]) -> Statistics:
        """Statistics of some of the channels.

        Args:
            places: shape ``(channels, times)``; what stands in several places counts as so many images.
        """
        summed = (getattr(self, f.name)[places].sum(1) for f in fields(self)[2:])
        times = places.shape[1]
        return Statistics(self.images * times, self.positions * times, *summed)

    def arrays(self) -> dict[str, Array]:
        """All fields as arrays, for storing."""
        return {f.name: np.asarray(getattr(self, f.name), np.float64) for f in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Array]) -> Statistics:
        """The reverse of :meth:`arrays`."""
        summed = (arrays[f.name] for f in fields(cls)[2:])
        return cls(int(arrays["images"]), int(arrays["positions"]), *summed)


def edges() -> Array:
    """Edges of the histogram's bins, shape ``(BINS + 1,)``; what lies beyond the outermost is in the outermost bin."""
    steps = np.arange(1, _SIDE + 1)
    positive = np.ldexp(1.0 + (steps % 4) / 4.0, _LEAST + steps // 4)
    return np.concatenate([-positive[::-1], [0.0], positive])


def measure(value: Tensor, axis: int, nonnegative: bool = False) -> Statistics:
    """Statistics of one batch.

    Args:
        value: shape ``(images, …)`` with the channels along ``axis``.
        nonnegative: no value is below zero, as after a ReLU: saves a pass.
    """
    gathering = Gathering(axis, nonnegative)
    gathering.add(value)
    found = gathering.take()
    assert found is not None
    return found


class Gathering:
    """Statistics of the values of one site, which come piece by piece.

    Positions are summed in the values' own precision (at least float32) image by image, images in float64: how they
    come in pieces changes nothing but float64's rounding.
    """

    def __init__(self, axis: int, nonnegative: bool = False) -> None:
        """Args:
        axis: along which the channels lie; fastest where they are innermost in memory, other values are copied so.
        nonnegative: no value is below zero, as after a ReLU: saves a pass.
        """
        self._axis = axis
        self._nonnegative = nonnegative
        self._totals: _Totals | None = None

    def add(self, value: Tensor) -> Tensor:
        """Take in values of shape ``(images, …)``; gives their means over positions, shape ``(images, channels)``."""
        last = value.detach().movedim(self._axis, -1)
        images, channels = last.shape[0], last.shape[-1]
        flat = last.reshape(images, math.prod(last.shape[1:-1]), channels).contiguous()
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        if self._totals is None:
            self._totals = _Totals(flat.shape[1], channels, value.device)
        # Few enough at a time that what is made on the way stays in the processor's cache.
        for part in flat.split(max(1, _AT_ONCE // max(1, flat.shape[1] * channels))):
            self._totals.squares += _over_images(part.square())
            if not self._nonnegative:
                part = part.abs()
                self._totals.absolute += _over_images(part)
            self._totals.nonzero += _over_images(part.sign())
        return self._totals.add(_over_positions(flat))

    @property
    def finite(self) -> bool:
        """Whether all that was added is."""
        return self._totals is None or math.isfinite(self._totals.sum.sum())

    def take(self) -> Statistics | None:
        """The statistics of all that was added since the last time; None where that is nothing."""
        totals, self._totals = self._totals, None
        return None if totals is None else totals.statistics(self._nonnegative)


class _Totals:
    """What is added up for the channels of a site, and the sums of the last images, which are counted together."""

    def __init__(self, positions: int, channels: int, device: torch.device) -> None:
        self.positions = positions
        self.images = 0
        totals = torch.zeros(5, channels, dtype=torch.float64, device=device)
        self.sum, self.sum_squares, self.absolute, self.squares, self.nonzero = totals.unbind()
        self.histogram = torch.zeros(channels * BINS, dtype=torch.int64, device=device)
        self.waiting: list[Tensor] = []
        self.uncounted = 0

    def add(self, sums: Tensor) -> Tensor:
        """Take in sums over positions, shape ``(images, channels)``; gives the means."""
        means = sums / self.positions
        count, channels = sums.shape
        self.images += count
        self.uncounted += count
        self.waiting.append(means)
        exact = sums.double()
        self.sum += exact.sum(0)
        self.sum_squares += exact.square().sum(0)
        # Counting costs as much again per channel: too much for a few images at a time.
        if self.uncounted * channels >= 2 * _AT_ONCE:
            self.count()
        return means

    def count(self) -> None:
        self.histogram += torch.bincount(_bins(torch.cat(self.waiting)), minlength=len(self.histogram))
        self.waiting, self.uncounted = [], 0

    def statistics(self, nonnegative: bool) -> Statistics:
        if self.waiting:
            self.count()
        positions = self.images * self.positions
        return Statistics(
            images=self.images,
            positions=positions,
            zeros=_array(positions - self.nonzero),
            sum=_array(self.sum),
            sum_abs=_array(self.sum if nonnegative else self.absolute),
            sum_squares=_array(self.squares),
            pooled_sum=_array(self.sum / self.positions),
            pooled_squares=_array(self.sum_squares / self.positions**2),
            histogram=_array(self.histogram.reshape(-1, BINS)),
        )


def _over_images(values: Tensor) -> Tensor:
    """Sums per channel: image by image in the values' own precision, which no batch size changes, then in float64."""
    return _over_positions(values).sum(0, dtype=torch.float64)


def _over_positions(values: Tensor) -> Tensor:
    """Sums of ``(images, positions, channels)`` over positions."""
    return values.squeeze(1) if values.shape[1] == 1 else values.sum(1)


def _bins(pooled: Tensor) -> Tensor:
    """Where pooled responses ``(images, channels)`` are in the histogram ``(channels · BINS,)``."""
    # Minus zero plus zero is zero: it belongs to the positive side.
    bits = (pooled.float() + 0.0).view(torch.int32)
    # What is not finite has no bin of its own; whoever asks for statistics looks for it in the sums.
    steps = bits.bitwise_and(0x7FFFFFFF).bitwise_right_shift_(_DROPPED_BITS).sub_(_FIRST).clamp_(0, _SIDE - 1)
    # All bits of the sign are set below zero: step 0 becomes -1, step 1 becomes -2.
    bins = steps.bitwise_xor_(bits.bitwise_right_shift_(31)).add_(_SIDE)
    bins += torch.arange(pooled.shape[1], device=pooled.device, dtype=torch.int32) * BINS
    return bins.flatten()


def _array(tensor: Tensor) -> Array:
    return tensor.double().cpu().numpy()
