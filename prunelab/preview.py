"""What a selection scores, before anything is changed: the sliced weights run on a set of images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunelab.errors import PruneLabError
from prunelab.profile.batches import batches, check_images, in_memory, inputs_of
from prunelab.program.guard import random_kept
from prunelab.program.program import Program
from prunelab.program.run import Bound, bind, removes_anything
from prunelab.program.selection import DENSE, Selection

Z95 = 1.959963984540054
BATCH = 256


@dataclass(frozen=True)
class Estimate:
    """An accuracy, and its change against the unpruned network on the same images.

    Attributes:
        accuracy: share of images classified right, 0 to 1; ``low`` and ``high`` bound it (95 %, Wilson).
        base: the unpruned network's, on the same images.
        change: ``accuracy − base``.
        half: half width of the 95 % interval of the change, from the paired outcomes.
        n: images seen; ``total``: images there are.
        precision: of the arithmetic.
        seconds: how long it took.
    """

    accuracy: float
    low: float
    high: float
    base: float
    change: float
    half: float
    n: int
    total: int
    precision: str
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.accuracy:.2%} ({self.change * 100:+.2f} ± {self.half * 100:.2f} points, "
            f"n = {self.n:,} of {self.total:,}, {self.precision})"
        )


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): holds its coverage for small n and near 0 and 1."""
    share, z2 = right / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * float(np.sqrt(share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At share 0 and 1 the bound is exactly the share; rounding must not move it past.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def paired_half_width(now: NDArray[np.bool_], before: NDArray[np.bool_]) -> float:
    """Half width of the 95 % interval of a change in accuracy on the same images.

    Agresti & Min (2005): one half is added to each cell of the 2 × 2 table, so that no change seen is not
    taken as certainty.
    """
    n = now.size + 2
    gained, lost = int((now & ~before).sum()), int((~now & before).sum())
    variance = (gained + lost + 1) - (gained - lost) ** 2 / n
    return Z95 * float(np.sqrt(variance)) / n


def labelled(data: Any, n: int | None = None) -> tuple[Tensor, Tensor]:
    """Images and labels of the first ``n`` items, shapes ``(n, …)`` and ``(n,)``.

    Raises:
        PruneLabError: there are no items, or they have no integer labels.
    """
    images, labels = in_memory(data) or _collect(data, n)
    stop = len(labels) if n is None else min(n, len(labels))
    if not stop:
        raise PruneLabError("There are no images to measure accuracy on: the set is empty.")
    return images[:stop], labels[:stop]


def _collect(data: Any, n: int | None) -> tuple[Tensor, Tensor]:
    images, labels, have = [], [], 0
    with random_kept():
        for batch in batches(data, 256)[0]:
            if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
                raise PruneLabError("Accuracy needs labels: the data must give (image, label) pairs.")
            images.append(batch[0])
            labels.append(batch[1])
            have += len(batch[1])
            if n is not None and have >= n:
                break
    if not have:
        raise PruneLabError("There are no images to measure accuracy on: the loader is empty.")
    return torch.cat(images), torch.cat(labels)


class Preview:
    """Quick accuracy of selections on a fixed set of images. The sliced weights are run, never masks."""

    def __init__(self, program: Program, images: Tensor, labels: Tensor) -> None:
        """Args:
            images: shape ``(images, …)`` as the network takes them.
            labels: shape ``(images,)``, class numbers.

        Raises:
            PruneLabError: shapes that do not fit each other or the network.
        """
        if labels.dim() != 1 or labels.is_floating_point() or len(labels) != len(images) or not len(labels):
            raise PruneLabError(
                f"Labels must be one class number for each of the {len(images)} images, not of shape "
                f"{tuple(labels.shape)} and type {labels.dtype}."
            )
        check_images(program, inputs_of(program, images[:BATCH]))
        self.program = program
        self.images = images
        self.labels = labels
        self._before: NDArray[np.bool_] = np.zeros(0, bool)

    def logits(
        self,
        selection: Selection = DENSE,
        images: Tensor | None = None,
        repaired: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Tensor:
        """Outputs of the pruned network, shape ``(images, classes)``.

        Args:
            repaired: what :func:`prunelab.repair.repair` gave for this selection.
        """
        bound = bind(self.program, selection).replaced(repaired)
        source = self.images if images is None else images
        return torch.cat([bound(part.to(bound.device)) for part in torch.split(source, BATCH)])

    def accuracy(
        self,
        selection: Selection = DENSE,
        *,
        n: int | None = None,
        repaired: Mapping[str, Tensor] = MappingProxyType({}),
        on_update: Callable[[Estimate], bool | None] | None = None,
    ) -> Estimate:
        """Accuracy on the first ``n`` images (all unless told).

        Args:
            repaired: what :func:`prunelab.repair.repair` gave for this selection.
            on_update: called with every estimate on the way; returning False stops there.
        """
        started = time.perf_counter()
        total = len(self.labels) if n is None else min(n, len(self.labels))
        before = self._correct_before(total)
        bound = bind(self.program, selection).replaced(repaired)
        # The same network twice: no change, and nothing uncertain about it.
        untouched = not removes_anything(self.program, selection)
        now = np.zeros(0, bool)
        estimate: Estimate | None = None
        for start, stop in _growing(total):
            now = np.concatenate([now, self._correct(bound, start, stop)])
            estimate = self._estimate(now, before[: now.size], time.perf_counter() - started)
            if untouched:
                estimate = replace(estimate, half=0.0)
            if on_update is not None and on_update(estimate) is False:
                break
        assert estimate is not None
        return estimate

    def _estimate(self, now: NDArray[np.bool_], before: NDArray[np.bool_], seconds: float) -> Estimate:
        low, high = wilson(int(now.sum()), now.size)
        return Estimate(
            accuracy=float(now.mean()),
            low=low,
            high=high,
            base=float(before.mean()),
            change=float(now.mean() - before.mean()),
            half=paired_half_width(now, before),
            n=now.size,
            total=len(self.labels),
            precision=str(self.images.dtype).removeprefix("torch."),
            seconds=seconds,
        )

    def _correct(self, bound: Bound, start: int, stop: int) -> NDArray[np.bool_]:
        logits = bound(self.images[start:stop].to(bound.device))
        if logits.dim() != 2 or len(logits) != stop - start:
            raise PruneLabError(f"Accuracy needs outputs of shape (images, classes), not {tuple(logits.shape)}.")
        return (logits.argmax(1).cpu() == self.labels[start:stop].cpu()).numpy()

    def _correct_before(self, n: int) -> NDArray[np.bool_]:
        """Outcomes of the unpruned network on the first ``n`` images, run once."""
        if self._before.size < n:
            bound = bind(self.program)
            done = self._before.size
            missing = [self._correct(bound, done + a, done + b) for a, b in _growing(n - done)]
            self._before = np.concatenate([self._before, *missing])
        return self._before[:n]


def _growing(total: int) -> Iterator[tuple[int, int]]:
    """Batches small enough that a first answer comes early and a stop is quick."""
    for start in range(0, total, BATCH):
        yield start, min(start + BATCH, total)
