"""A sensitivity scan against measuring each of its points from the input: ResNet-56 on CIFAR-10.

``python tests/bench/sensitivity.py WEIGHTS CIFAR10`` scans every free layer at 9 ratios on 500 images and prints one
table. At some points, drawn from all over the network, the other ways are timed in turn with the scan's own point: the
committed network in float32 as PyTorch runs it, and the scan's engine with nothing kept in memory. Weights and data are
those of ``tests/bench/live.py``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from live import MEAN, STD, network

import prunelab as pl
from prunelab.datasets import npz
from prunelab.program.cache import Cache
from prunelab.sensitivity import RATIOS


class Race:
    """Times every point of a scan, as its progress function, and the other ways at some of them.

    A way takes a cut and gives what is to be timed.

    Attributes:
        points: seconds of each point of the scan.
        others: by way, the seconds at the points that it was timed at, beside the scan's own.
    """

    def __init__(
        self,
        cuts: list[pl.Selection],
        every: int,
        clock: Callable[[], float],
        ways: dict[str, Callable[[pl.Selection], Callable[[], Any]]],
    ) -> None:
        self._cuts = cuts
        self._every = every
        self._clock = clock
        self._ways = ways
        self.points: list[float] = []
        self.others: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        self.begin()

    def begin(self) -> None:
        """Start the watch."""
        self._since = self._clock()

    def __call__(self, done: int, total: int | None, what: str) -> None:
        own = self._clock() - self._since
        self.points.append(own)
        if done % self._every == self._every // 2:
            for way, ready in self._ways.items():
                run = ready(self._cuts[done - 1])
                started = self._clock()
                run()
                self.others[way].append((self._clock() - started, own))
        self.begin()


def main() -> int:
    """Scan, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=int, default=2**30, help="bytes that values may take")
    parser.add_argument("--every", type=int, default=14, help="time the other ways at every so many points")
    parser.add_argument("--processor", action="store_true", help="count processor seconds, with one thread")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    asked = parser.parse_args()
    torch.set_num_threads(1 if asked.processor else asked.threads)
    clock = time.process_time if asked.processor else time.perf_counter
    _, test = npz(asked.cifar10, tuple("0123456789"), MEAN, STD, name="CIFAR-10")
    images, labels = test.images[: asked.images], test.labels[: asked.images]
    program = pl.trace(network(asked.weights), images[:2])
    free = [layer.name for layer in program.layers if not layer.pinned]
    cuts = [pl.Plan().set(name, ratio=ratio).resolve(program) for name in free for ratio in RATIOS]
    forgetful = pl.Preview(program, images, labels, memory=Cache(0))
    forgetful.accuracy(precision=asked.precision)
    ways = {
        "the cut network from the input, float32": lambda cut: _eager(program, cut, images),
        "the scan's engine without memory": lambda cut: partial(forgetful.accuracy, cut, precision=asked.precision),
    }
    race = Race(cuts, asked.every, clock, ways)
    found = pl.sensitivity(
        program, images, labels, n=asked.images, precision=asked.precision, progress=race, cache=False,
        memory=asked.budget,
    )  # fmt: skip
    print(f"{found!r}; {torch.get_num_threads()} threads, {clock.__name__}\n")
    print("| | per point, ms | whole scan, s | scan's own points, ms | times as fast |")
    print("| --- | ---: | ---: | ---: | ---: |")
    print(f"| the scan | {1000 * np.mean(race.points):.0f} | {np.sum(race.points):.1f} | | |")
    for way, pairs in race.others.items():
        then, own = np.array(pairs).T
        print(
            f"| {way}, {len(then)} points | {1000 * then.mean():.0f} | ≈ {then.mean() * len(cuts):.0f} | "
            f"{1000 * own.mean():.0f} | {then.sum() / own.sum():.1f} |"
        )
    return 0


def _eager(program: pl.Program, cut: pl.Selection, images: torch.Tensor) -> Callable[[], Any]:
    small = pl.commit(program, cut)

    def run() -> None:
        with torch.no_grad():
            torch.cat([small(part).argmax(1) for part in images.split(256)])

    return run


if __name__ == "__main__":
    raise SystemExit(main())
