"""What each repair is worth: ResNet-56 on CIFAR-10, a share of every block's inner channels removed by L1, no training.

``python tests/bench/repair.py cifar10.npz resnet56-4bfd9763.th`` prints two tables: test accuracy on all 10,000 images,
with seconds for the first repair of the network and for another selection of it; and what a hand waits for. Seconds are
the processor's, on one thread unless told. ``cifar10.npz`` holds the images as :func:`prunelab.datasets.npz`
reads them; the weights are Yerlan Idelbayev's, from https://github.com/akamaster/pytorch_resnet_cifar10.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

import prunelab as pl
from prunelab.datasets import ImageSet
from prunelab.plan import REPAIRS
from prunelab.repair import Repaired, Repairer

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATIOS = (0.3, 0.5)
QUICK = "least-squares, quick"
SLIDERS = ("layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1", "layer3.8.conv1")
HEAD = """| removed | repair | test accuracy | seconds | another |
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
    model, images = resnet56(given.weights), train.images[: given.images]
    measure(model, images, test)
    live(model, images)


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
        for how in (*REPAIRS, QUICK):
            repairer = Repairer(program, images)
            seconds, repaired = timed(partial(repaired_by, repairer, selection, how))
            again, _ = timed(partial(repaired_by, repairer, inner_channels(program, ratio + 0.1), how))
            found = preview.accuracy(selection, repaired=repaired)
            print(f"| {ratio:.0%} | {how} | {found.accuracy:.2%} | {seconds:.2f} | {again:.3f} |", flush=True)


def repaired_by(repairer: Repairer, selection: pl.Selection, how: str) -> Repaired:
    """The repair of a name, the quick one among them."""
    found = repairer.quick(selection, "least-squares") if how == QUICK else repairer(selection, how)
    assert found is not None
    return found


def live(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Print what one slider takes, the others at half, and how long a repair that is not wanted any more goes on."""
    program = pl.trace(model, images[:2])
    repairer, half = Repairer(program, images), inner_channels(program, 0.5)
    print("\n| one slider | quick | the repair itself |\n| --- | ---: | ---: |")
    repairer.quick(half, "least-squares")
    for layer in SLIDERS:
        repairer(half, "least-squares")
        moved = replace(half, kept={**half.kept, layer: half.kept[layer][1:]})
        quick, _ = timed(partial(repaired_by, repairer, moved, QUICK))
        whole, _ = timed(partial(repaired_by, repairer, moved, "least-squares"))
        print(f"| {layer} | {quick:.3f} | {whole:.2f} |", flush=True)
    asked = [time.process_time()]

    def wanted() -> bool:
        asked.append(time.process_time())
        return True

    Repairer(program, images)(half, "least-squares", wanted)
    waits = [after - before for before, after in pairwise(asked)]
    print(f"\nA stopped repair goes on for {max(waits):.3f} s at most, {sum(waits) / len(waits):.4f} s on average.")


def timed(work: Callable[[], Repaired]) -> tuple[float, Repaired]:
    """Processor seconds that a repair takes, and the repair."""
    started = time.process_time()
    repaired = work()
    return time.process_time() - started, repaired


def inner_channels(program: pl.Program, ratio: float) -> pl.Selection:
    """The share of every block's inner channels with the least L1 norm removed."""
    plan = pl.Plan("l1")
    for layer in program.layers:
        if layer.name.endswith(".conv1"):
            plan = plan.set(layer.name, ratio=ratio)
    return plan.resolve(program)


if __name__ == "__main__":
    main()
