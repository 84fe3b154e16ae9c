"""Centripetal SGD: train filters to be equal in clusters, and trim all but one of each without loss.

Ding, Ding, Guo and Han 2019, Centripetal SGD for pruning very deep convolutional networks with complicated structure,
arXiv 1904.03837; Hao, Ding, Han, Guo and Ding 2023, doi 10.1109/TNNLS.2023.3298263.

Stated there: filters are divided into clusters before training, by k-means on their flattened weights; every step
averages a cluster's gradients and pulls its members to their centre; afterwards each cluster's first member stays, and
whoever read the others reads it with the sum of their weights; no fine-tuning follows. Producers of one residual stream
follow its first. On ImageNet the widths go down in steps, with a training for each.

Our reading: the pull is sized by the length of the training, so that distances within clusters shrink by exp(20), and
is the same for biases and norms (the authors' code has a tenth for them, over 600 epochs). Whether trimming loses
nothing is measured, not assumed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunelab.errors import PruneLabError
from prunelab.preview import labelled
from prunelab.program.program import cost, trace
from prunelab.progress import Stopped
from prunelab.train.clusters import Clusters, clusters
from prunelab.train.csgd import Squeezed, csgd, departure
from prunelab.train.finetune import stopped


@dataclass(frozen=True)
class Squeeze:
    """One training and the trimming after it.

    Attributes:
        share: of its first channels that every layer keeps.
        squeezed: the wide network whose clusters have become one, its training, the pull, how far apart members still
            are, and the largest change of an output by trimming, in the network's precision.
        exact: that change in float64: what the members' distance makes of it, without rounding.
        params, flops: of the trimmed network.
    """

    share: float
    squeezed: Squeezed
    exact: float
    params: int
    flops: int


def centripetal_sgd(
    model: nn.Module,
    train: Any,
    val: Any,
    *,
    shares: float | Sequence[float] = 0.625,
    how: str = "kmeans",
    folder: Path | str | None = None,
    **settings: Any,
) -> tuple[nn.Module, tuple[Squeeze, ...]]:
    """Squeeze a network to a share of its widths. The given network is not changed.

    >>> small, steps = centripetal_sgd(model, train, val, shares=0.625, epochs=8)

    Args:
        train, val: as for :func:`prunelab.finetune`.
        shares: of every layer's first channels that are to stay; several ones, falling, are squeezed to one after the
            other, with a training for each.
        how: the clusters are made: one of ``prunelab.train.clusters.WAYS``.
        folder: for checkpoints, each training's in a folder of its own.
        settings: as for :func:`prunelab.csgd`: ``epochs``, ``lr``, ``pull``, ``teacher`` …

    Returns:
        The small network, and what was done.

    Raises:
        PruneLabError: as :func:`prunelab.csgd`; shares that do not fall; members that still differ after a training.
        Stopped: the progress function returned False; with a folder, the same call goes on from there.
    """
    steps = (shares,) if isinstance(shares, int | float) else tuple(shares)
    if not steps or any(after >= before for before, after in pairwise(steps)):
        raise PruneLabError(f"Shares must be one or more numbers, each smaller than the one before, not {shares!r}.")
    now, done = copy.deepcopy(model), []
    images, _ = labelled(val, 64)
    # A step's widths are shares of the network that there was at first.
    widths = [_widths(clusters(trace(now, images[:2]), share, how="even")) for share in steps]
    for share, width in zip(steps, widths, strict=True):
        here = None if folder is None else Path(folder) / f"to-{share:g}"
        squeezed = csgd(now, train, val, width, how=how, folder=here, **settings)
        if stopped(squeezed.table):
            raise Stopped(f"squeezing to {share:g}")
        now = squeezed.trimmed()
        small = cost(squeezed.program, squeezed.clusters.selection())
        done.append(Squeeze(share, squeezed, in_float64(squeezed, images), small.params, small.flops))
    return now, tuple(done)


def _widths(groups: Clusters) -> dict[str, int]:
    """How many channels each layer is left with."""
    return {layer: len(kept) for layer, kept in groups.selection().kept.items()}


def in_float64(squeezed: Squeezed, images: Tensor) -> float:
    """Largest absolute change of an output that trimming makes, computed in float64.

    Args:
        images: shape ``(images, …)``.
    """
    model, images = copy.deepcopy(squeezed.program.model).double(), images.double()
    return departure(trace(model, images[:2], prove=False), squeezed.clusters, images)
