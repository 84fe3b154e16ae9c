"""The best plan against one ratio for all layers at equal FLOPs: ResNet-56 on CIFAR-10, by L1, nothing trained.

``python tests/bench/search.py WEIGHTS CIFAR10`` prints a table per repair. Repairs look at the first 1,000 training
images, a plan is chosen by the next 2,000, and accuracy is that on all test images. At every operating point the budget
is the FLOPs of the plan of one ratio for all layers, exactly. Because residual streams are dear to this network, one
ratio for the layers inside blocks alone is shown too, at the same FLOPs. Seconds are the processor's, on one thread
unless told; points after the first take what they have in common with it from ``--cache``. Weights and data are
those of ``tests/bench/live.py``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from live import MEAN, STD, network

import prunelab as pl
from prunelab.datasets import npz
from prunelab.papers.mean_activation import inner_layers
from prunelab.repair import Repairer

POINTS = (0.8, 0.65, 0.5, 0.4, 0.3)
CHOSEN_BY, SAMPLE = 2000, 1000


def one_ratio(program: pl.Program, names: Sequence[str], most: float) -> pl.Plan | None:
    """The plan of the least single ratio for some layers that leaves at most so many FLOPs."""
    for step in range(1, 200):
        plan = pl.Plan()
        for name in names:
            plan = plan.set(name, ratio=step / 200)
        if pl.cost(program, plan.resolve(program)).flops <= most:
            return plan
    return None


def main() -> int:
    """Search, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repairs", nargs="+", default=["none", "least-squares"])
    parser.add_argument("--points", nargs="+", type=float, default=POINTS)
    parser.add_argument("--cache", type=Path, help="folder for measurements; a new one unless told")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    train, test = npz(asked.cifar10, tuple("0123456789"), MEAN, STD, name="CIFAR-10")
    program = pl.trace(network(asked.weights), test.images[:2])
    preview = pl.Preview(program, test.images, test.labels)
    chosen_by = slice(SAMPLE, SAMPLE + CHOSEN_BY)
    cache = asked.cache or Path(tempfile.mkdtemp())
    repairer = Repairer(program, train.images[:SAMPLE])
    for repair in asked.repairs:

        def accuracy(plan: pl.Plan | None, repair: str = repair) -> str:
            if plan is None:
                return ""
            selection = plan.resolve(program)
            found = preview.accuracy(selection, repaired=repairer(selection, repair), precision="auto")
            return f"{found.accuracy:.2%}"

        def search(share: float, repair: str = repair) -> pl.Best:
            return pl.best_plan(
                program, None, train.images[chosen_by], train.labels[chosen_by], flops=share, repair=repair,
                repair_images=train.images[:SAMPLE], progress=False, cache=cache,
            )  # fmt: skip

        table(program, asked.points, repair, accuracy, search)
    return 0


def table(
    program: pl.Program,
    points: Sequence[float],
    repair: str,
    accuracy: Callable[[pl.Plan | None], str],
    search: Callable[[float], pl.Best],
) -> None:
    """One repair's table, a line as soon as it is there."""
    free = [layer.name for layer in program.layers if not layer.pinned]
    inner = inner_layers(program)
    dense = pl.cost(program).flops
    print(f"\nrepair {repair}; unpruned {accuracy(pl.Plan())}\n")
    print("| FLOPs left | one ratio | one ratio inside blocks | best plan | parameters left | seconds |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for point in points:
        uniform = one_ratio(program, free, point * dense)
        assert uniform is not None
        share = pl.cost(program, uniform.resolve(program)).flops / dense
        started = time.process_time()
        best = search(share)
        seconds = time.process_time() - started
        print(
            f"| {share:.1%} | {accuracy(uniform)} | {accuracy(one_ratio(program, inner, share * dense))} | "
            f"{accuracy(best.plan)} | {best.found.params / best.params:.1%} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    raise SystemExit(main())
