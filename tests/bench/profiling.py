"""What a profile costs against a plain forward pass over the same loader: ``python tests/bench/profiling.py``.

Both in turns in one process, processor seconds on one thread, the fastest of several rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision.models as tv
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import prunelab as pl
from prunelab import zoo


@dataclass(frozen=True)
class Case:
    """A network, and the images that it is profiled on."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    images: int


CASES = (
    Case("LeNet", zoo.lenet, (1, 28, 28), 8192),
    Case("VGG", zoo.vgg_small, (1, 28, 28), 2048),
    Case("ResNet-20", zoo.resnet20, (3, 32, 32), 2048),
    Case("ResNet-56", zoo.resnet56, (3, 32, 32), 1024),
    Case("ResNet-18", tv.resnet18, (3, 64, 64), 512),
    Case("MobileNetV3-small", tv.mobilenet_v3_small, (3, 64, 64), 2048),
)


@dataclass(frozen=True)
class Times:
    """Processor seconds: of a plain pass, of a profile, and of one that keeps 512 images' activations too."""

    plain: float
    profile: float
    sample: float

    @property
    def ratio(self) -> float:
        """How many times as long as a plain pass all statistics take."""
        return self.profile / self.plain


def measure(case: Case, rounds: int = 5) -> Times:
    """The fastest of several rounds, in turns."""
    torch.manual_seed(0)
    images = torch.randn(case.images, *case.shape)
    loader = DataLoader(TensorDataset(images, torch.zeros(len(images), dtype=torch.int64)), batch_size=256)
    model = case.make().eval()
    program = pl.trace(model, images[:2], prove=False)

    def plain() -> None:
        with torch.no_grad():
            for batch, _ in loader:
                model(batch)

    def profile(sample: int) -> None:
        pl.profile(program, loader, cache=False, progress=False, sample=sample)

    works = (plain, lambda: profile(0), lambda: profile(512))
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, seconds in zip(works, taken, strict=True):
            started = time.process_time()
            work()
            seconds.append(time.process_time() - started)
    return Times(*map(min, taken))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| network | images | plain forward (s) | profile (s) | ratio | with 512 images' activations |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for case in CASES:
        t = measure(case, rounds)
        print(
            f"| {case.name} | {case.images} of {'×'.join(map(str, case.shape))} | {t.plain:.2f} | {t.profile:.2f} "
            f"| {t.ratio:.2f} | {t.sample / t.plain:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
