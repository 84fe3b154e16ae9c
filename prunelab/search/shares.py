"""How much of each layer goes, from what each layer alone costs: one price for all of them, or one ratio, or between.

The loss L of a layer alone, cut to a ratio r, is measured at a few ratios and fitted by a power law, L = a·rᵖ. If
losses of several layers add up, their sum at a given size is least where dL/dr is the same price for every layer, per
size that r removes. With a repair, which keeps what one layer loses from the next ones, losses nearly add up as long as
they are small; what deep cuts lose is more than the sum, and one ratio for all layers is the better guess there.
Between the two lie plans of which a few measurements of the whole network find the best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prunelab.search.moves import Measure
from prunelab.search.space import Choice

Ratios = Mapping[str, float]
"""Share of the channels that go, by layer."""
Fits = Callable[[Ratios], bool]
"""Whether what ratios leave is small enough; if some fit, all greater ones do."""

RATIOS = (0.25, 0.5, 0.75, 0.9375)
"""Where each layer is measured."""

MOST = 0.95
"""The largest ratio of a layer."""

BETWEEN = (0.0, 0.5, 1.0)
"""Where between one ratio and one price a path looks, as :func:`between` counts."""

_LEAST_LOSS = 1e-6
_POWERS = (1.3, 6.0)
_LOG_PRICES = (-60.0, 20.0)
_HALVINGS = 40


@dataclass(frozen=True)
class Curve:
    """What a layer alone costs: ``scale · ratio ** power`` nats of divergence; ratio 1 would remove ``size``."""

    scale: float
    power: float
    size: float

    def ratio(self, price: float) -> float:
        """How far to cut it at a price in nats per size, at most :data:`MOST`."""
        return float(min(MOST, (price * self.size / (self.scale * self.power)) ** (1 / (self.power - 1))))


def fitted(losses: Sequence[float], size: float, ratios: Sequence[float] = RATIOS) -> Curve:
    """The power law nearest to losses at some ratios, by least squares of their logarithms; the power lies in 1.3 to 6.

    Below 1.3 a layer would be cut at once or not at all.
    """
    x, y = np.log(ratios), np.log(np.maximum(losses, _LEAST_LOSS))
    # Through one point goes the parabola of a smooth loss.
    power = float(np.clip(np.polyfit(x, y, 1)[0] if len(x) > 1 else 2.0, *_POWERS))
    return Curve(float(np.exp(np.mean(y - power * x))), power, size)


def one_price(curves: Mapping[str, Curve], fits: Fits) -> Ratios:
    """The least ratios of one price that fit."""

    def at(log_price: float) -> Ratios:
        return {name: curve.ratio(float(np.exp(log_price))) for name, curve in curves.items()}

    return at(_least(lambda log_price: fits(at(log_price)), *_LOG_PRICES))


def one_ratio(names: Sequence[str], fits: Fits) -> Ratios:
    """The least single ratio that fits."""
    return dict.fromkeys(names, _least(lambda ratio: fits(dict.fromkeys(names, ratio)), 0.0, MOST))


def between(even: Ratios, priced: Ratios, share: float, fits: Fits) -> Ratios:
    """The least ratios in the proportions even^(1 − share) · priced^share that fit.

    Args:
        share: 0 for those of one ratio, 1 for those of one price; beyond, differences between layers are exaggerated.
    """
    mixed = {name: even[name] ** (1 - share) * priced[name] ** share for name in even}

    def at(scale: float) -> Ratios:
        return {name: min(MOST, scale * ratio) for name, ratio in mixed.items()}

    return at(_least(lambda scale: fits(at(scale)), 0.0, MOST / max(min(mixed.values()), 1e-6)))


def priced_path(
    curves: Mapping[str, Curve],
    nearest: Callable[[Ratios], Choice],
    fits: Callable[[Choice, float], bool],
    loss: Measure,
    parts: int,
) -> Iterator[Choice]:
    """Choice after choice, all layers cut further in each: the best at its size between one ratio and one price.

    Args:
        nearest: the choice that comes nearest to some ratios.
        fits: whether a choice is small enough for a part of the way, 0 to 1; the path ends where none is.
        parts: of the way, each a choice.
    """
    for part in np.arange(1, parts + 1) / parts:

        def fit(ratios: Ratios, part: float = float(part)) -> bool:
            return fits(nearest(ratios), part)

        even, priced = one_ratio(tuple(curves), fit), one_price(curves, fit)
        tried = dict.fromkeys(nearest(between(even, priced, share, fit)) for share in BETWEEN)
        fitting = [choice for choice in tried if fits(choice, float(part))]
        if not fitting:
            return
        yield min(fitting, key=loss)


def _least(granted: Callable[[float], bool], low: float, high: float) -> float:
    """The least value between two that is granted, by bisection; the higher one if none is."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if granted(middle) else (middle, high)
    return high
