"""Centripetal SGD: what a step costs beside a plain one, and what trimming costs after a run sized by the rule.

``python tests/bench/csgd.py`` prints both. The step: ResNet-56 with projections, 64 images of 32 × 32, all widths to
5/8; the three parts of a step are timed by turns in one run. The run: the embedded ResNet-20 on the embedded
Fashion-MNIST images, all widths to 5/8, no fine-tuning afterwards; eight epochs take about two minutes on two cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

import prunelab as pl
from prunelab import zoo
from prunelab.preview import Preview
from prunelab.train.centripetal import Centripetal
from prunelab.train.clusters import clusters
from prunelab.train.csgd import csgd

SHARE = 0.625


def step(turns: int) -> None:
    """Time gradients, the centripetal change of them, and the optimizer's step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = zoo.resnet56(shortcut="projection")
    program = pl.trace(model, torch.randn(2, 3, 32, 32))
    centripetal = Centripetal(program, clusters(program, SHARE), pull=3e-3)
    model.to(device).train()
    images, labels = torch.randn(64, 3, 32, 32, device=device), torch.randint(10, (64,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)

    def gradients() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()

    parts: dict[str, Callable[[], object]] = {
        "gradients": gradients,
        "centripetal": centripetal.apply,
        "SGD": optimizer.step,
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(turns + 1):
        for name, part in parts.items():
            _wait(device)
            started = time.perf_counter()
            part()
            _wait(device)
            seconds[name].append(time.perf_counter() - started)
    plain = [g + s for g, s in zip(seconds["gradients"], seconds["SGD"], strict=True)][1:]
    ratio = np.median([1 + c / p for c, p in zip(seconds["centripetal"][1:], plain, strict=True)])
    print(f"| ResNet-56, 64 images, {_name(device)}, torch {torch.__version__} | SGD step | C-SGD step | ratio |")
    print("| --- | ---: | ---: | ---: |")
    print(
        f"| ms, median of {turns} | {1e3 * np.median(plain):.1f} | {1e3 * ratio * np.median(plain):.1f} | {ratio:.3f} |"
    )


def run(epochs: int) -> None:
    """Squeeze the embedded ResNet-20 and trim it."""
    train, test = pl.datasets.fashion_mnist()
    model = zoo.load("resnet20")
    started = time.perf_counter()
    squeezed = csgd(model, train, test.subset(1000), SHARE, epochs=epochs, lr=0.03, batch_size=64)
    spent = time.perf_counter() - started
    selection = squeezed.clusters.selection()
    small = squeezed.trimmed().eval()
    with torch.no_grad():
        pairs = [(model.eval()(part), small(part)) for part in test.images.split(500)]
    far = max(float((a - b).abs().max()) for a, b in pairs)
    whole = Preview(squeezed.program, test.images, test.labels).accuracy().accuracy
    trimmed = float((torch.cat([b for _, b in pairs]).argmax(1) == test.labels).double().mean())
    before, after = pl.cost(squeezed.program), pl.cost(squeezed.program, selection)
    what = f"ResNet-20, {len(train):,} images, {epochs} epochs in {spent:.0f} s, pull {squeezed.pull:.3g}"
    print(f"\n| {what} | wide | trimmed |")
    print("| --- | ---: | ---: |")
    print(f"| accuracy on {len(test):,} test images | {whole:.2%} | {trimmed:.2%} |")
    print(f"| parameters | {before.params:,} | {after.params:,} |")
    print(f"| FLOPs | {before.flops:,} | {after.flops:,} (−{1 - after.flops / before.flops:.1%}) |")
    print(f"\nLargest change of a logit by trimming: {far:.1e}; members of a cluster are {squeezed.spread:.1e} apart.")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--turns", type=int, default=15)
    asked = parser.parse_args()
    step(asked.turns)
    if asked.epochs:
        run(asked.epochs)


if __name__ == "__main__":
    main()
