"""What each repair is worth: ResNet-56 on CIFAR-10, a share of every block's inner channels removed by L1, no training.

``python tests/bench/repair.py cifar10.npz resnet56-4bfd9763.th`` prints the table: test accuracy on all 10,000 images,
and seconds for the first repair of the network and for the next of the same network. ``cifar10.npz`` holds the images
as :func:`prunelab.datasets.npz` reads them; the weights are Yerlan Idelbayev's, from
https://github.com/akamaster/pytorch_resnet_cifar10.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import prunelab as pl
from prunelab.datasets import ImageSet
from prunelab.plan import REPAIRS
from prunelab.repair import Repaired, Repairer

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATIOS = (0.3, 0.5)
HEAD = """| removed | repair | test accuracy | seconds | again |
| ---: | --- | ---: | ---: | ---: |"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--images", type=int, default=1000, help="training images that a repair looks at")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    train, test = pl.datasets.npz(given.data, mean=MEAN, std=STD)
    measure(resnet56(given.weights), train.images[: given.images], test)


def resnet56(weights: Path) -> torch.nn.Module:
    """The trained network, in evaluation mode."""
    model = pl.zoo.resnet56()
    saved = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in saved.items()})
    return model.eval()


def measure(model: torch.nn.Module, images: torch.Tensor, test: ImageSet) -> None:
    """Print the table, a line as soon as it is there."""
    program = pl.trace(model, test.images[:2])
    preview = pl.Preview(program, test.images, test.labels)
    print(HEAD)
    print(f"| 0 % | | {preview.accuracy().accuracy:.2%} | | |", flush=True)
    for ratio in RATIOS:
        selection = inner_channels(program, ratio)
        for how in REPAIRS:
            repairer = Repairer(program, images)
            seconds, repaired = timed(repairer, selection, how)
            # Another repair between the two, so that the answer itself is not remembered.
            repairer(selection, "bias" if how == "norm" else "norm")
            again, _ = timed(repairer, selection, how)
            found = preview.accuracy(selection, repaired=repaired)
            print(f"| {ratio:.0%} | {how} | {found.accuracy:.2%} | {seconds:.1f} | {again:.1f} |", flush=True)


def timed(repairer: Repairer, selection: pl.Selection, how: str) -> tuple[float, Repaired]:
    """Seconds that a repair takes, and the repair."""
    started = time.perf_counter()
    repaired = repairer(selection, how)
    return time.perf_counter() - started, repaired


def inner_channels(program: pl.Program, ratio: float) -> pl.Selection:
    """The share of every block's inner channels with the least L1 norm removed."""
    plan = pl.Plan("l1")
    for layer in program.layers:
        if layer.name.endswith(".conv1"):
            plan = plan.set(layer.name, ratio=ratio)
    return plan.resolve(program)


if __name__ == "__main__":
    main()
