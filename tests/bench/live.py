"""Accuracy while a slider moves: the preview against cutting a copy and running it, on the same images.

ResNet-56 for CIFAR-10. In every move one random layer's slider goes to a random place and the others stay where
earlier moves left them. ``python tests/bench/live.py WEIGHTS CIFAR10`` prints one table; all ways are timed in turn in
one run, so that their ratios hold on a busy machine too.

**Today's way**: a deep copy of the network, ``tp.pruner.BasePruner`` with the sliders' ratios and its own magnitude
criterion (as Torch-Pruning's documentation has it), and the smaller network run in float32 as PyTorch runs it. Our
own commit in its place is another row. The sliders are those of the layers inside blocks: Torch-Pruning fails on this
network's residual streams, whose shortcuts are padded. ``--streams`` moves those too, without it.

WEIGHTS is a checkpoint of the CIFAR-10 ResNet-56 by Yerlan Idelbayev, CIFAR10 a ``.npz`` of the set.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import prunelab as pl
from prunelab import zoo
from prunelab.criteria.registry import scores as scores_of
from prunelab.datasets import npz
from prunelab.program.cache import Cache
from prunelab.program.program import Program
from prunelab.program.selection import Selection

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network(path: Path) -> torch.nn.Module:
    """The checkpoint's network."""
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    states = {name.removeprefix("module."): t for name, t in loaded.get("state_dict", loaded).items()}
    model = zoo.resnet56()
    model.load_state_dict(states)
    return model.eval()


def moves(program: Program, count: int, seed: int, streams: bool) -> list[Selection]:
    """Selections, each with one layer's smallest filters removed to another extent than in the one before."""
    chance = random.Random(seed)
    free = [layer for layer in program.layers if not layer.pinned and (streams or len(layer.producers) == 1)]
    kept: dict[str, tuple[int, ...]] = {}
    found = []
    for _ in range(count):
        layer = chance.choice(free)
        scores = scores_of(program, None, "l1", layer)
        stay = np.argsort(scores)[chance.randrange(layer.channels) :]
        kept = {**kept, layer.name: tuple(sorted(stay.tolist()))}
        found.append(Selection(kept))
    return found


def torch_pruning(program: Program, selection: Selection, images: Tensor) -> nn.Module:
    """A copy of the network, cut by Torch-Pruning to the selection's widths."""
    import torch_pruning as tp

    small = copy.deepcopy(program.model)
    layers = {name: program.layer(name) for name in selection.kept}
    modules = {name: small.get_submodule(layer.producers[0][0].rpartition(".")[0]) for name, layer in layers.items()}
    pruner = tp.pruner.BasePruner(
        small,
        images[:1],
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.0,
        pruning_ratio_dict={modules[n]: 1 - len(kept) / layers[n].channels for n, kept in selection.kept.items()},
        ignored_layers=[small.get_submodule("linear")],
    )
    pruner.step()
    return small


def right(small: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Which images a network classifies right, in float32."""
    with torch.no_grad():
        return small(images).argmax(1) == labels


def main() -> int:
    """Run the moves and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("--moves", type=int, default=100)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=int, help="bytes that values may take; what the machine can spare")
    parser.add_argument("--every", type=int, default=10, help="time the other way at every so many moves")
    parser.add_argument("--processor", action="store_true", help="count processor seconds, with one thread")
    parser.add_argument("--first", action="store_true", help="leave each move after its first estimate")
    parser.add_argument("--streams", action="store_true", help="move residual streams too; without Torch-Pruning")
    asked = parser.parse_args()
    torch.set_num_threads(1 if asked.processor else asked.threads)
    clock = time.process_time if asked.processor else time.perf_counter
    _, test = npz(asked.cifar10, tuple("0123456789"), MEAN, STD, name="CIFAR-10")
    images, labels = test.images[: asked.images], test.labels[: asked.images]
    program = pl.trace(network(asked.weights), images[:2])
    memory = Cache(asked.budget)
    preview = pl.Preview(program, images, labels, memory=memory)
    base = list(preview.estimates())[-1]
    print(f"unpruned {base.base:.2%} in {base.precision}; {torch.get_num_threads()} threads, {clock.__name__}")

    def timed(work: Callable[[], object]) -> float:
        started = clock()
        work()
        return clock() - started

    ways = {"our commit, then eager float32": lambda s: right(pl.commit(program, s), images[:256], labels[:256])}
    if not asked.streams:
        ways["deep copy, Torch-Pruning, then eager float32"] = lambda s: right(
            torch_pruning(program, s, images), images[:256], labels[:256]
        )
    first, whole, costs, most = [], [], [], 0
    others: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for k, selection in enumerate(moves(program, asked.moves, 0, asked.streams)):
        costs.append(timed(lambda s=selection: pl.cost(program, s)))
        seen, started = [], clock()
        for _ in preview.estimates(selection):
            seen.append(clock() - started)
            most = max(most, memory.held)
            if asked.first:
                break
        first.append(seen[0])
        whole.append(seen[-1])
        if k % asked.every == asked.every - 1:
            for name, way in ways.items():
                others[name].append((timed(lambda s=selection, way=way: way(s)), seen[0]))
    print("| | median | 95th percentile |\n| --- | ---: | ---: |")
    print(row("parameters and FLOPs, ms", costs, digits=2))
    print(row("first estimate, 256 images, ms", first))
    if not asked.first:
        print(row(f"{asked.images:,} images, ms", whole))
    for name, pairs in others.items():
        print(row(f"256 images by {name}, ms", [then for then, _ in pairs]))
        print(f"| the preview is faster, times | {np.median([then / now for then, now in pairs]):.1f} | |")
        medians = [float(np.median(column)) for column in zip(*pairs, strict=True)]
        print(f"| the same, of the medians | {medians[0] / float(np.median(first)):.1f} | |")
    print(f"\nvalues held: {most / 2**20:.0f} MiB at most, of a budget of {memory.budget / 2**20:.0f}")
    return 0


def row(name: str, seconds: list[float], digits: int = 0) -> str:
    """A line of the table: median and 95th percentile, in milliseconds."""
    return f"| {name} | {1000 * np.median(seconds):.{digits}f} | {1000 * np.quantile(seconds, 0.95):.{digits}f} |"


if __name__ == "__main__":
    raise SystemExit(main())
