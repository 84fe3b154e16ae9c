"""The curves of a training: loss above, accuracy below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from prunelab.explorer.plots import _dress, _figure
from prunelab.explorer.training import KINDS, Course
from prunelab.palette import colours

_POINTS = 200
"""Points of a loss curve at most: more cannot be told apart, and would take longer to draw."""


def training_curves(course: Course, dark: bool = False) -> Figure:
    """Loss by step, smoothed, and by epoch; validation accuracy by epoch beside that of the unpruned network."""
    c = colours(dark)
    figure = _figure(4.2, 3.8)
    above, below = figure.subplots(2, 1, sharex=True)
    _loss(above, course, c)
    _accuracy(below, course, c)
    for axes in (above, below):
        _dress(axes, c)
        axes.set_xlim(0, _last_shown(course))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    above.tick_params(axis="x", labelbottom=False)
    return figure


def _last_shown(course: Course) -> int:
    """Where the axis ends: at five epochs, and twice as many whenever it is full, so that it seldom moves."""
    end = 5
    while end < course.share * course.epochs:
        end *= 2
    return max(min(end, course.epochs), 1)


def smoothed(losses: NDArray[np.float64], points: int = _POINTS) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means over equal stretches, and their running mean.

    Args:
        losses: shape ``(steps,)``.
        points: stretches at most.

    Returns:
        Both of shape ``(stretches,)``; the running mean reaches back over a twentieth of all stretches, and begins
        without a bias towards the first.
    """
    means = np.array([part.mean() for part in np.array_split(losses, min(points, len(losses)))])
    keep = 1 - 1 / max(len(means) / 20, 2)
    running, weight, found = 0.0, 0.0, []
    for mean in means:
        running, weight = keep * running + (1 - keep) * mean, keep * weight + (1 - keep)
        found.append(running / weight)
    return means, np.array(found)


def _loss(axes: Any, course: Course, c: Mapping[str, str]) -> None:
    axes.set(ylabel="training loss", title=f"{KINDS[course.kind]}: loss and accuracy by epoch")
    losses = np.array(course.losses)
    if not len(losses):
        axes.text(0.5, 0.5, "the first step is on its way", transform=axes.transAxes, ha="center", color=c["faint"])
        return
    means, running = smoothed(losses[:, 1])
    at = np.array([part.mean() for part in np.array_split(losses[:, 0], len(means))]) / course.of
    axes.plot(at, means, color=c["gone"], lw=0.7, alpha=0.7, label="steps")
    axes.plot(at, running, color=c["kept"], lw=1.4, label="smoothed")
    epochs = [row for row in course.rows if row.epoch]
    # An epoch's mean stands in its middle.
    axes.plot([row.epoch - 0.5 for row in epochs], [row.loss for row in epochs], "o", ms=3.5, color=c["ink"],
              label="mean of an epoch")  # fmt: skip
    axes.legend(fontsize=7, frameon=False, labelcolor=c["ink"], loc="upper right")


def _accuracy(axes: Any, course: Course, c: Mapping[str, str]) -> None:
    axes.set(xlabel="epoch", ylabel="accuracy (%)")
    rows = course.rows
    axes.plot([row.epoch for row in rows], [100 * row.accuracy for row in rows], "-o", ms=3.5, lw=1.4, color=c["kept"],
              label="validation")  # fmt: skip
    if rows:
        kept, word = course.kept, "last" if course.kind == "squeeze" else "best"
        axes.plot([kept.epoch], [100 * kept.accuracy], "D", ms=5, color=c["mark"], label=f"{word}: {kept.accuracy:.2%}")
    if course.reference is not None:
        label = f"unpruned: {course.reference:.2%}"
        axes.axhline(100 * course.reference, color=c["faint"], lw=1, ls="--", label=label)
    if rows or course.reference is not None:
        axes.legend(fontsize=7, frameon=False, labelcolor=c["ink"], loc="best")
