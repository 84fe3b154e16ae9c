"""How much of each layer goes, from a scan of one layer at a time: all are cut until the next bit costs the same.

The loss L of a layer alone, cut to a ratio r, is measured at a few ratios and fitted by a power law, L = a·rᵖ. If
losses of several layers add up, their sum at a given size is least where dL/dr is the same price for every layer, per
size that r removes: that price is found by bisection. It takes four measurements per layer for plans of any size.
Losses of deep cuts do more than add up; with a repair, which keeps what one layer loses from the next ones, they
nearly do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from prunelab.plan import Plan
from prunelab.preview import Preview
from prunelab.profile.capture import Profile
from prunelab.program.program import Program, cost
from prunelab.progress import Progress, track
from prunelab.repair import Repairer
from prunelab.search.meter import divergence, outputs

RATIOS = (0.25, 0.5, 0.75, 0.9375)
"""Where each layer is measured."""

MOST = 0.95
"""The largest ratio of a layer."""

_LEAST_LOSS = 1e-6
_POWERS = (1.3, 6.0)


@dataclass(frozen=True)
class Curve:
    """What a layer alone costs: ``scale · ratio ** power`` nats of divergence; ratio 1 would remove ``size`` MACs."""

    scale: float
    power: float
    size: float

    def ratio(self, price: float) -> float:
        """How far to cut it at a price in nats per MAC, at most :data:`MOST`."""
        return float(min(MOST, (price * self.size / (self.scale * self.power)) ** (1 / (self.power - 1))))


def fitted(losses: Sequence[float], size: float, ratios: Sequence[float] = RATIOS) -> Curve:
    """The power law nearest to losses at some ratios, by least squares of their logarithms; the power lies in 1.3 to 6.

    Below 1.3 a layer would be cut at once or not at all.
    """
    x, y = np.log(ratios), np.log(np.maximum(losses, _LEAST_LOSS))
    power = float(np.clip(np.polyfit(x, y, 1)[0], *_POWERS))
    return Curve(float(np.exp(np.mean(y - power * x))), power, size)


def scanned(
    program: Program,
    profile: Profile | None,
    images: Tensor,
    labels: Tensor,
    *,
    criterion: str,
    layers: Sequence[str],
    repair: str = "none",
    repair_images: Tensor | None = None,
    progress: Progress | bool = True,
) -> Mapping[str, Curve]:
    """Every layer alone, by name: the divergence of the network's classes from the uncut network's.

    Args:
        images, labels: to measure on, shapes ``(images, …)`` and ``(images,)``.
        repair: its quick form where it has one, from ``repair_images``.
    """
    preview, repairer = Preview(program, images, labels), Repairer(program, repair_images)
    whole = cost(program).macs
    found = {}
    for name in track(layers, "scan", len(layers), progress):
        losses = []
        for ratio in RATIOS:
            selection = Plan(criterion).set(name, ratio=ratio).resolve(program, profile)
            repaired = repairer.quick(selection, repair) or repairer(selection, repair)
            _, before, now = outputs(preview, selection, None, repaired, "auto")
            losses.append(divergence(before, now))
        half = Plan(criterion).set(name, ratio=0.5).resolve(program, profile)
        found[name] = fitted(losses, 2.0 * (whole - cost(program, half).macs))
    return found


def shared(curves: Mapping[str, Curve], macs: Callable[[Plan], int], most: int, criterion: str) -> Plan:
    """The plan with one price for all layers that leaves at most so many MACs."""

    def at(log_price: float) -> Plan:
        plan = Plan(criterion)
        for name, curve in curves.items():
            plan = plan.set(name, ratio=curve.ratio(float(np.exp(log_price))))
        return plan

    low, high = -60.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if macs(at(middle)) <= most else (middle, high)
    return at(high)
