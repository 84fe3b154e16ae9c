"""Accuracy while a slider moves: the preview against cutting a copy and running it, on the same images.

ResNet-56 for CIFAR-10. In every move one random layer's slider goes to a random place and the others stay where
earlier moves left them. ``python tests/bench/live.py WEIGHTS CIFAR10`` prints one table; both ways are timed in turn in
one run, so that their ratio holds on a busy machine too.

WEIGHTS is a checkpoint of the CIFAR-10 ResNet-56 by Yerlan Idelbayev, CIFAR10 a ``.npz`` of the set.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch

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


def moves(program: Program, count: int, seed: int) -> list[Selection]:
    """Selections, each with one layer's smallest filters removed to another extent than in the one before."""
    chance = random.Random(seed)
    free = [layer for layer in program.layers if not layer.pinned]
    kept: dict[str, tuple[int, ...]] = {}
    found = []
    for _ in range(count):
        layer = chance.choice(free)
        scores = scores_of(program, None, "l1", layer)
        stay = np.argsort(scores)[chance.randrange(layer.channels) :]
        kept = {**kept, layer.name: tuple(sorted(stay.tolist()))}
        found.append(Selection(kept))
    return found


def todays_way(program: Program, selection: Selection, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Cut a copy of the network and run it in float32."""
    small = pl.commit(program, selection)
    with torch.no_grad():
        torch.cat([small(part).argmax(1) == part_labels for part, part_labels in
                   zip(images.split(256), labels.split(256), strict=True)])  # fmt: skip


def main() -> int:
    """Run the moves and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("--moves", type=int, default=100)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=int, default=2**30, help="bytes that values may take")
    parser.add_argument("--every", type=int, default=10, help="time the other way at every so many moves")
    parser.add_argument("--processor", action="store_true", help="count processor seconds, with one thread")
    parser.add_argument("--first", action="store_true", help="leave each move after its first estimate")
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
    first, whole, old, most = [], [], [], 0
    for k, selection in enumerate(moves(program, asked.moves, seed=0)):
        seen, started = [], clock()
        for _ in preview.estimates(selection):
            seen.append(clock() - started)
            most = max(most, memory.held)
            if asked.first:
                break
        first.append(seen[0])
        whole.append(seen[-1])
        if k % asked.every == 0:
            started = clock()
            todays_way(program, selection, images[:256], labels[:256])
            old.append((clock() - started, seen[0]))
    ratios = [then / now for then, now in old]
    print("| | median | 95th percentile |")
    print("| --- | ---: | ---: |")
    rows = {"first estimate, 256 images, ms": first, f"{asked.images:,} images, ms": whole,
            "cut a copy and run 256 images, ms": [then for then, _ in old]}  # fmt: skip
    for name, seconds in rows.items():
        print(f"| {name} | {1000 * np.median(seconds):.0f} | {1000 * np.quantile(seconds, 0.95):.0f} |")
    print(f"| times as fast at 256 images | {np.median(ratios):.1f} | {np.quantile(ratios, 0.05):.1f} |")
    print(f"| median against median | {np.median([then for then, _ in old]) / np.median(first):.1f} | |")
    print(f"\nvalues held: {most / 2**20:.0f} MiB at most, of {asked.budget / 2**20:.0f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
