"""How long a pruned network takes on this machine, beside the unpruned one: measured, never derived from FLOPs.

Both networks run as users run them: the committed module's own ``forward``, eager, in evaluation mode. They take turns,
each first as often as the other, so that whatever else the machine does meets both alike; the ratio is taken pair by
pair, and its interval is that of the pairs' median.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prunelab.commit import commit
from prunelab.errors import PruneLabError, unknown
from prunelab.program.guard import random_kept
from prunelab.program.lines import sentence
from prunelab.program.program import Program
from prunelab.program.selection import DENSE, Selection
from prunelab.program.surgery import cut
from prunelab.program.trace import as_example
from prunelab.progress import Progress, Stopped, track

if TYPE_CHECKING:
    import pandas as pd

BATCHES = (1, 64)
"""Batch sizes that are timed unless told: one image that somebody waits for, and many at once."""

PRECISIONS = ("float64", "float32", "bfloat16", "float16")

# Five pairs cannot bound their median with 95 % confidence: 2 · ½⁵ is more than 5 %.
_LEAST_PAIRS = 6
# The first runs allocate memory, choose algorithms and wake the clock.
_WARM_RUNS, _WARM_SECONDS = 3, 0.2
# A measurement much shorter than this is mostly the clock's and the scheduler's.
_LEAST_SECONDS = 0.01
_MOST_RUNS = 1000


@dataclass(frozen=True)
class Timing:
    """Times at one batch size.

    Attributes:
        batch: images per run.
        before: seconds per run of the unpruned network, the median of the pairs; ``after`` of the pruned one.
        speedup: median of the pairs' ratios ``before / after``; ``low`` and ``high`` bound it (95 %).
        pairs: how many; ``runs``: the runs of each network in every pair, of which it holds the mean.
    """

    batch: int
    before: float
    after: float
    speedup: float
    low: float
    high: float
    pairs: int
    runs: int

    def __str__(self) -> str:
        runs = f" of {self.runs} runs" if self.runs > 1 else ""
        return (
            f"batch {self.batch}: {_words(self.before)} → {_words(self.after)}, {self.speedup:.2f} times as fast "
            f"(95 % {self.low:.2f} to {self.high:.2f}, {self.pairs} interleaved pairs{runs})"
        )


@dataclass(frozen=True)
class Latency:
    """Times of a pruned network beside the unpruned one, and what they were measured on.

    Attributes:
        timings: one per batch size, in the order that was asked for.
        device: what ran the networks, with its name or its instruction set.
        threads: of PyTorch within an operator, on the processor.
        precision: type of weights and inputs.
        channels_last: whether the channels of images lay innermost.
    """

    timings: tuple[Timing, ...]
    device: str
    threads: int
    precision: str
    channels_last: bool = False

    @property
    def where(self) -> str:
        """What the times were measured on, in words."""
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.device.startswith("cpu") else ""
        layout = ", channels last" if self.channels_last else ""
        return f"{self.device}{threads}, {self.precision}{layout}"

    def __str__(self) -> str:
        return f"{'; '.join(map(str, self.timings))}; on {self.where}"

    def to_frame(self) -> pd.DataFrame:
        """One row per batch size; times in seconds."""
        import pandas as pd

        return pd.DataFrame([{**asdict(timing), "where": self.where} for timing in self.timings])


def latency(
    program: Program,
    selection: Selection,
    images: Any = None,
    *,
    batch: int | Sequence[int] | None = None,
    repeats: int = 30,
    device: torch.device | str | None = None,
    precision: str | None = None,
    channels_last: bool = False,
    against: Program | None = None,
    progress: Progress | bool = True,
) -> Latency:
    """Time the network that a selection commits beside the unpruned one, on this machine.

    The user's model is not changed; copies of it run, with the hooks that it has. A repair changes no shape, and so no
    time. Inputs lie on the device before the clock starts.

    Args:
        images: the inputs, as :func:`prunelab.trace` takes an example; the program's own unless given. They are
            repeated to fill a batch.
        batch: images per run, one number or several; 1 and 64 unless given.
        repeats: pairs of measurements, at least 6.
        device: where to run; where the network lies unless given.
        precision: type that weights and inputs are converted to: ``float32``, ``bfloat16``, ``float16`` or
            ``float64``; the network's own unless given.
        channels_last: lay the channels of images innermost, as convolutions on GPUs and newer processors like it.
        against: the network that stands for the unpruned one, if it is not the program's own.
        progress: a bar, nothing, or a function as in :mod:`prunelab.progress`.

    Raises:
        PruneLabError: a selection that does not fit the network, or a batch, device or precision that it cannot run.
        Stopped: stopped before six pairs of any batch size; later, what was measured is the result.
    """
    fixed = program.batch
    batches = _batches((fixed or BATCHES) if batch is None else batch)
    if fixed is not None and set(batches) != {fixed}:
        raise PruneLabError(f"Your forward takes batches of {fixed} images only: time it with batch={fixed}.")
    args = program.example if images is None else as_example(images)
    return compared(
        cut(program if against is None else against, DENSE),
        commit(program, selection),
        args,
        batches=batches,
        repeats=repeats,
        device=device,
        precision=precision,
        channels_last=channels_last,
        progress=progress,
    )


def compared(
    before: nn.Module,
    after: nn.Module,
    args: tuple[Any, ...],
    *,
    batches: Sequence[int] = BATCHES,
    repeats: int = 30,
    device: torch.device | str | None = None,
    precision: str | None = None,
    channels_last: bool = False,
    progress: Progress | bool = True,
) -> Latency:
    """Time two modules of the caller's own, which are moved to the device and converted.

    Args and errors: as :func:`latency`; ``args`` are the arguments of both.
    """
    if isinstance(repeats, bool) or not isinstance(repeats, Integral) or repeats < _LEAST_PAIRS:
        raise PruneLabError(f"An interval needs at least {_LEAST_PAIRS} repeats, not {repeats!r}.")
    if precision is not None and precision not in PRECISIONS:
        raise unknown("precision", str(precision), PRECISIONS)
    tensors = [t for t in chain(before.parameters(), before.buffers()) if t.is_floating_point()]
    place = torch.device(device) if device is not None else tensors[0].device if tensors else torch.device("cpu")
    kind = getattr(torch, precision) if precision is not None else None
    models = [_ready(model, place, kind, channels_last) for model in (before, after)]
    own = kind or (tensors[0].dtype if tensors else torch.float32)
    inputs = {size: tree_map(partial(_input, args, size, place, kind, channels_last), args) for size in batches}
    with random_kept():
        timings = _timings(models, inputs, int(repeats), place, progress)
    return Latency(timings, _name(place), torch.get_num_threads(), str(own).removeprefix("torch."), channels_last)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the median, whatever the distribution: the order statistics that enclose it often enough.

    Conover 1999, Practical nonparametric statistics, section 3.2.

    Args:
        values: at least 6.
    """
    ordered, n = sorted(values), len(values)
    outside, rank = 0.0, 0
    while outside + math.comb(n, rank) / 2**n <= 0.025:
        outside += math.comb(n, rank) / 2**n
        rank += 1
    return ordered[rank - 1], ordered[n - rank]


# Preparing ---------------------------------------------


def _batches(given: int | Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(given) if isinstance(given, Iterable) else (given,)
    if not sizes or not all(isinstance(n, Integral) and not isinstance(n, bool) and n > 0 for n in sizes):
        raise PruneLabError(f"A batch must be a whole number of images from 1, or several such, not {given!r}.")
    return tuple(dict.fromkeys(int(n) for n in sizes))


def _ready(model: nn.Module, device: torch.device, kind: torch.dtype | None, channels_last: bool) -> nn.Module:
    for part in model.modules():
        # Not model.eval(): users override train(), for example to keep norms frozen.
        part.training = False
    try:
        model = model.to(device, kind)
        return model.to(memory_format=torch.channels_last) if channels_last else model
    except (RuntimeError, AssertionError) as error:
        raise PruneLabError(f"The network cannot be moved to {device} so: {sentence(error)}") from error


def _input(
    args: tuple[Any, ...],
    size: int,
    device: torch.device,
    kind: torch.dtype | None,
    channels_last: bool,
    leaf: Any,
) -> Any:
    """One argument with ``size`` images: what has as many as the first tensor is repeated or shortened."""
    if not isinstance(leaf, Tensor):
        return leaf
    first = next(a for a in tree_leaves(args) if isinstance(a, Tensor))
    if leaf.dim() and len(leaf) == len(first):
        leaf = leaf[torch.arange(size) % len(leaf)]
    leaf = leaf.to(device, kind if leaf.is_floating_point() else None)
    return leaf.contiguous(memory_format=torch.channels_last) if channels_last and leaf.dim() == 4 else leaf


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})" if device.type == "cpu" else str(device)


# Measuring ---------------------------------------------

Pair = tuple[float, float]


def _timings(
    models: Sequence[nn.Module], inputs: dict[int, Any], repeats: int, device: torch.device, progress: Progress | bool
) -> tuple[Timing, ...]:
    pairs: dict[int, list[Pair]] = {size: [] for size in inputs}
    runs: dict[int, int] = {}
    steps = _pairs(models, inputs, repeats, device)
    try:
        for size, count, pair in track(steps, "timing", repeats * len(inputs), progress):
            pairs[size].append(pair)
            runs[size] = count
    except Stopped:
        if not any(len(found) >= _LEAST_PAIRS for found in pairs.values()):
            raise
    return tuple(_timing(size, runs[size], found) for size, found in pairs.items() if len(found) >= _LEAST_PAIRS)


def _pairs(
    models: Sequence[nn.Module], inputs: dict[int, Any], repeats: int, device: torch.device
) -> Iterator[tuple[int, int, Pair]]:
    """Batch size, runs and seconds per run of both networks, which begin in turn."""
    for size, args in inputs.items():
        runners = [partial(_seconds, model, args, device) for model in models]
        count = _warmed(runners, size)
        for turn in range(repeats):
            order = (0, 1) if turn % 2 == 0 else (1, 0)
            found = {which: runners[which](count) for which in order}
            yield size, count, (found[0], found[1])


def _warmed(runners: Sequence[Callable[[int], float]], size: int) -> int:
    """Run both networks until they are warm; how many runs make a measurement of the faster one long enough."""
    started, fastest = time.perf_counter(), math.inf
    try:
        for turn in range(_MOST_RUNS):
            if turn >= _WARM_RUNS and time.perf_counter() - started > _WARM_SECONDS:
                break
            fastest = min(fastest, *(runner(1) for runner in runners))
    except (RuntimeError, NotImplementedError) as error:
        raise PruneLabError(f"The network cannot run a batch of {size} so: {sentence(error)}") from error
    return min(max(1, math.ceil(_LEAST_SECONDS / fastest)), _MOST_RUNS)


def _seconds(model: nn.Module, args: tuple[Any, ...], device: torch.device, runs: int) -> float:
    """Mean seconds from a batch's start to its last output, each run by itself."""
    total = 0.0
    with torch.inference_mode():
        for _ in range(runs):
            _wait(device)
            start = time.perf_counter()
            model(*args)
            _wait(device)
            total += time.perf_counter() - start
    return total / runs


def _wait(device: torch.device) -> None:
    """An accelerator returns before its work is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _timing(size: int, runs: int, pairs: Sequence[Pair]) -> Timing:
    before, after = np.array(pairs).T
    low, high = median_interval((before / after).tolist())
    return Timing(
        batch=size,
        before=float(np.median(before)),
        after=float(np.median(after)),
        speedup=float(np.median(before / after)),
        low=low,
        high=high,
        pairs=len(pairs),
        runs=runs,
    )


def _words(seconds: float) -> str:
    """Seconds to three digits, in the unit that suits them."""
    scale, unit = next(((s, u) for s, u in ((1.0, "s"), (1e-3, "ms")) if seconds >= s), (1e-6, "µs"))
    return f"{seconds / scale:.3g} {unit}"
