"""What criteria cost on ResNet-56: ``python tests/bench/criteria.py``.

Processor milliseconds on one thread for the scores of all its layers, the fastest of several rounds, and processor
seconds of what they need once: the profile and the gradients of so many random CIFAR-sized images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.utils.data import TensorDataset

import prunelab as pl
from prunelab import zoo
from prunelab.criteria.registry import get, scores


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Processor seconds of the fastest round."""
    taken = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return min(taken)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1024)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = torch.randn(asked.images, 3, 32, 32), torch.arange(asked.images) % 10
    program = pl.trace(zoo.resnet56().eval(), images[:2], prove=False)
    data = TensorDataset(images, labels)
    profile = pl.profile(program, data, cache=False, progress=False)
    passes = {
        "profile": seconds(lambda: pl.profile(program, data, cache=False, progress=False), 1),
        "gradients": seconds(lambda: pl.with_gradients(profile, data, cache=False, progress=False), 1),
    }
    profile = pl.with_gradients(profile, data, images=64, cache=False, progress=False)
    free = [layer for layer in program.layers if not layer.pinned]
    print(f"ResNet-56, {len(free)} layers; {asked.images:,} images once: {passes['profile']:.1f} s for the profile, "
          f"{passes['gradients']:.1f} s for gradients.\n")  # fmt: skip
    print("| criterion | needs | all layers (ms) |\n| --- | --- | ---: |")
    for name in pl.criteria_names():
        taken = seconds(lambda: [scores(program, profile, name, layer) for layer in free], asked.rounds)  # noqa: B023
        print(f"| {name} | {', '.join(get(name).needs)} | {1000 * taken:.0f} |", flush=True)


if __name__ == "__main__":
    main()
