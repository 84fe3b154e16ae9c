"""What a selection scores, before anything is changed: the sliced weights run on a set of images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from threading import RLock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from prunelab.errors import PruneLabError, unknown
from prunelab.intervals import Floats, half_width, paired_half_width, wilson
from prunelab.machine import cpu_gains_from_bfloat16
from prunelab.profile.batches import batches, check_images, in_memory, inputs_of
from prunelab.program.cache import Cache
from prunelab.program.guard import random_kept
from prunelab.program.incremental import Incremental, Prepared
from prunelab.program.liveness import working_bytes
from prunelab.program.program import Program, cost
from prunelab.program.run import Bound, bind, removes_anything, versions
from prunelab.program.selection import DENSE, Selection
from prunelab.progress import Progress

if TYPE_CHECKING:
    from prunelab.outcomes import Outcomes

BATCH = 256
# Some 60 ms of two cores: a ResNet-56 on 256 images of 32 × 32.
_STEP_MACS = 33_000_000_000
# What bfloat16 may change in the outputs, relative to their norm, before it is too coarse for a network.
_BEARABLE = 0.05
# One image in so many is decided again in float32.
_CLOSE = 64

Precision = Literal["auto", "float32", "bfloat16"]
Score = Callable[[Tensor, Tensor], Tensor]
"""Takes outputs and labels of a batch and gives one number per image, shape ``(images,)``."""


@dataclass(frozen=True)
class Estimate:
    """An accuracy, and its change against the unpruned network on the same images.

    Attributes:
        accuracy: share of images classified right, 0 to 1; ``low`` and ``high`` bound it (95 %, Wilson).
        base: the unpruned network's, on the same images.
        change: ``accuracy − base``.
        half: half width of the 95 % interval of the change on all ``total`` images, from the paired outcomes on those
            seen; 0 once all are seen. It holds at any one ``n``, and where it ends the run itself (``half=``). Nobody
            should wait for the one among many estimates that suits them: all of 8 hold together in 80 % of cases, all
            of 40 in 57 %.
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
    """Quick accuracy of selections on a fixed set of images. The sliced weights are run, never masks.

    What one selection computed serves the next: only what their difference can affect is run again.
    """

    def __init__(
        self,
        program: Program,
        images: Tensor,
        labels: Tensor,
        *,
        score: Score | None = None,
        memory: Cache | None = None,
    ) -> None:
        """Args:
            images: shape ``(images, …)`` as the network takes them.
            labels: shape ``(images,)``, class numbers; with a ``score`` of your own whatever that takes, one per
                image.
            score: what to measure instead of accuracy.
            memory: where values are kept for the next selection; what the machine can spare unless given. Several
                previews may share one. Its budget holds for what is kept and what is under way, with at least eight
                images at once; sliced copies of the weights and some 10 MiB for kernels come on top.

        Raises:
            PruneLabError: shapes that do not fit each other or the network.
        """
        classes = labels.dim() == 1 and not labels.is_floating_point()
        if len(labels) != len(images) or not len(labels) or not (classes or score):
            what = "one value" if score else "one class number"
            raise PruneLabError(
                f"Labels must be {what} for each of the {len(images)} images, not of shape "
                f"{tuple(labels.shape)} and type {labels.dtype}."
            )
        check_images(program, inputs_of(program, images[:BATCH]))
        self.program = program
        self.images = images
        self.labels = labels
        self.memory = Cache() if memory is None else memory
        self._score = score
        self._step = _step(program, self.memory.budget)
        # Sets are often sorted by class: only a random sample speaks for all of it.
        self._order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        self._lock = RLock()
        self._forget()

    def logits(
        self,
        selection: Selection = DENSE,
        images: Tensor | None = None,
        repaired: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Tensor:
        """Outputs of the pruned network, shape ``(images, classes)``, in its own arithmetic.

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
        precision: Precision = "float32",
    ) -> Estimate:
        """Accuracy on ``n`` of the images (all unless told), by default exactly that of the committed network.

        Args:
            n: images; fewer than there are are drawn at random, always the same.
            repaired: what :func:`prunelab.repair.repair` gave for this selection.
            on_update: called with every estimate on the way; returning False stops there.
            precision: as :meth:`estimates`.
        """
        for estimate in self.estimates(selection, n=n, repaired=repaired, precision=precision):
            if on_update is not None and on_update(estimate) is False:
                break
        return estimate

    def estimates(
        self,
        selection: Selection = DENSE,
        *,
        n: int | None = None,
        repaired: Mapping[str, Tensor] = MappingProxyType({}),
        precision: Precision = "auto",
        half: float = 0.0,
    ) -> Iterator[Estimate]:
        """Accuracy on more and more images, each estimate on all images so far.

        It can be left after any of them; then nothing runs on.

        Args:
            n: images at most; all unless told. They come in a random order, always the same.
            repaired: what :func:`prunelab.repair.repair` gave for this selection.
            precision: ``float32`` for the network's own arithmetic, operator by operator: the committed network's
                outcomes exactly. ``bfloat16`` with norms folded, the closest decisions taken again in float32: a few
                outcomes in a thousand differ. ``auto`` for bfloat16 where the processor has instructions for it and
                the network bears it. The unpruned network is run in the same.
            half: stop once the half width of the interval of the change is at most this.

        Raises:
            PruneLabError: the selection does not fit the network, or bfloat16 was asked for and cannot be had.
        """
        started = time.perf_counter()
        total = len(self.labels) if n is None else min(n, len(self.labels))
        untouched = not removes_anything(self.program, selection)
        with self._lock:
            side = self._side(precision)
            ready = self._ready(side, selection, repaired)
        now = before = np.zeros(0)
        for start in range(0, total, self._step):
            stop = min(start + self._step, total)
            with self._lock:
                before = np.concatenate([before, self._before(side, start, stop)])
                # The same network twice: no change, and nothing uncertain about it.
                fresh = before[start:] if untouched else self._scores(side, ready, start, stop)
                now = np.concatenate([now, fresh])
            estimate = self._estimate(now, before, side.name, time.perf_counter() - started)
            if untouched:
                estimate = replace(estimate, half=0.0)
            yield estimate
            if half > 0 and estimate.half <= half:
                return

    def outcomes(
        self,
        selection: Selection = DENSE,
        *,
        n: int | None = None,
        repaired: Mapping[str, Tensor] = MappingProxyType({}),
        precision: Precision = "float32",
        progress: Progress | bool = False,
    ) -> Outcomes:
        """What the unpruned and the pruned network take each image for, with the classes and images that changed.

        Args: as :meth:`accuracy`, which counts the same predictions.

        Raises:
            PruneLabError: as :meth:`estimates`, or the network is no classifier.
            Stopped: ``progress`` said so.
        """
        from prunelab.outcomes import outcomes_of  # it stands on this module

        return outcomes_of(self, selection, n, repaired, precision, progress)

    def predictions(
        self, selection: Selection, n: int | None, repaired: Mapping[str, Tensor], precision: Precision
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, str]]:
        """Batch by batch: numbers of the images, outputs of the unpruned and the pruned network, and the arithmetic."""
        total = len(self.labels) if n is None else min(n, len(self.labels))
        with self._lock:
            side = self._side(precision)
            networks = [self._ready(side, DENSE, {}), self._ready(side, selection, repaired)]
        for start in range(0, total, self._step):
            stop = min(start + self._step, total)
            with self._lock:
                before, now = (self._outputs(side, network, start, stop) for network in networks)
            yield self._order[start:stop], before, now, side.name

    def _estimate(self, now: Floats, before: Floats, precision: str, seconds: float) -> Estimate:
        if self._score is None:
            low, high = wilson(int(now.sum()), now.size)
            half = paired_half_width(now > 0.5, before > 0.5, len(self.labels))
        else:
            own, half = half_width(now), half_width(now - before, len(self.labels))
            low, high = float(now.mean()) - own, float(now.mean()) + own
        return Estimate(
            accuracy=float(now.mean()),
            low=low,
            high=high,
            base=float(before.mean()),
            change=float(now.mean() - before.mean()),
            half=half,
            n=now.size,
            total=len(self.labels),
            precision=precision,
            seconds=seconds,
        )

    # Running ---------------------------------------------

    def _forget(self) -> None:
        """Begin with nothing remembered."""
        self._sides: dict[Precision, _Side] = {}
        self._name = object()
        self._versions = versions(self.program)

    def _side(self, precision: Precision) -> _Side:
        """The engine of a precision."""
        if versions(self.program) != self._versions:
            # The network was trained meanwhile.
            self._forget()
        if precision not in self._sides:
            self._sides[precision] = self._new_side(precision)
        return self._sides[precision]

    def _new_side(self, precision: Precision) -> _Side:
        if precision not in get_args(Precision):
            raise unknown("precision", precision, get_args(Precision))
        if precision == "float32":
            return _Side(Incremental(self.program, self.memory), str(self.images.dtype).removeprefix("torch."))
        if precision == "auto":
            return self._side("bfloat16" if has_bfloat16(self.program) and not self._departure() else "float32")
        reason = self._departure()
        if reason:
            raise PruneLabError(f"This network cannot run in bfloat16: {reason}. Ask for float32.")
        return _Side(Incremental(self.program, self.memory, fast=torch.bfloat16), "bfloat16")

    def _departure(self) -> str:
        """Why the network does not bear bfloat16; empty where it does."""
        inputs = inputs_of(self.program, self.images[: self.program.batch or min(32, self._step)])
        if not all(x.dtype == torch.float32 for x in inputs):
            return "its images are not float32"
        engine, exact = Incremental(self.program, Cache(0), fast=torch.bfloat16), bind(self.program)
        inputs = tuple(x.to(exact.device) for x in inputs)
        try:
            found = engine(engine.prepare(DENSE, {}), inputs, None)
        except (RuntimeError, TypeError) as error:
            return str(error).partition("\n")[0]
        wanted = exact(*inputs).double()
        far = float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))
        return "" if far < _BEARABLE else f"its outputs differ by {far:.0%}"

    def _before(self, side: _Side, start: int, stop: int) -> Floats:
        """Scores of the unpruned network, run once."""
        if (start, stop) not in side.before:
            side.before[start, stop] = self._scores(side, self._ready(side, DENSE, {}), start, stop)
        return side.before[start, stop]

    def _ready(self, side: _Side, selection: Selection, repaired: Mapping[str, Tensor]) -> _Ready:
        decides = side.name == "bfloat16" and self._score is None and self.program.batch is None
        exact = self._side("float32").engine.prepare(selection, repaired).bound if decides else None
        return _Ready(side.engine.prepare(selection, repaired), exact)

    def _outputs(self, side: _Side, ready: _Ready, start: int, stop: int) -> Tensor:
        inputs = (self.images[self._order[start:stop]].to(ready.fast.bound.device),)
        # A newer request stops an older one: the first images are asked for most.
        share = 1 / (1 + start // self._step)
        outputs = side.engine(ready.fast, inputs, (self._name, side.name, start, stop), share)
        if ready.exact is not None and outputs.dim() == 2 and outputs.shape[1] > 1:
            return settled(outputs, inputs[0], ready.exact)
        return outputs

    def _scores(self, side: _Side, ready: _Ready, start: int, stop: int) -> Floats:
        outputs = self._outputs(side, ready, start, stop)
        labels = self.labels[self._order[start:stop]].to(outputs.device)
        if self._score is None:
            if outputs.dim() != 2 or len(outputs) != stop - start:
                raise PruneLabError(f"Accuracy needs outputs of shape (images, classes), not {tuple(outputs.shape)}.")
            found = outputs.argmax(1) == labels
        else:
            found = self._score(outputs.to(self.images.dtype), labels)
            if found.shape != (stop - start,):
                raise PruneLabError(f"A score gives one number per image, not {tuple(found.shape)}.")
        return found.double().cpu().numpy()


def settled(outputs: Tensor, images: Tensor, exact: Bound) -> Tensor:
    """Outputs of a coarse run, shape ``(images, classes)``, in which the closest decisions are taken again exactly.

    Where coarse arithmetic changes a class, the best two outputs lay close together: on ResNet-56 for CIFAR-10 one
    image in 64 brings the agreement with float32 from 98.9 % and more to 99.7 % and more.
    """
    best = outputs.float().topk(2, dim=1).values
    close = (best[:, 0] - best[:, 1]).argsort(stable=True)[: -(-len(outputs) // _CLOSE)]
    found = outputs.to(images.dtype, copy=True)
    found[close] = exact(images[close])
    return found


@dataclass(frozen=True)
class _Ready:
    """A selection made ready to run, and the network's own arithmetic for what bfloat16 is too coarse for."""

    fast: Prepared
    exact: Bound | None


@dataclass(frozen=True)
class _Side:
    """One way to compute: an engine, the name of its arithmetic, and the unpruned network's scores by batch."""

    engine: Incremental
    name: str
    before: dict[tuple[int, int], Floats] = field(default_factory=dict)


def _step(program: Program, budget: int) -> int:
    """Images per batch: few enough that a first answer comes early, a stop is quick, and half the budget is left."""
    if program.batch is not None:
        return BATCH
    affordable = min(_STEP_MACS // max(cost(program.base).macs, 1), budget // 2 // max(working_bytes(program.base), 1))
    return BATCH if affordable >= BATCH else int(max(8, 2 ** int(np.log2(max(affordable, 1)))))


def has_bfloat16(program: Program) -> bool:
    """Whether the network lies on a processor that gains from bfloat16."""
    tensors = [program.state(name) for name in program.base.state_nodes]
    return cpu_gains_from_bfloat16() and all(t.device.type == "cpu" for t in tensors)
