"""How long tracing, profiling, committing and projecting take, against what was promised."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torchvision.models as tv
from support import half_of_everything
from torch import nn

import prunelab as pl
from prunelab import zoo
from prunelab.program.selection import Selection


def best(work: Callable[[], object], times: int = 4) -> float:
    """Seconds of the fastest of several runs."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def test_tracing_resnet50_with_its_proof() -> None:
    model, example = tv.resnet50(), torch.randn(2, 3, 224, 224)
    seconds = best(lambda: pl.trace(model, example))
    print(f"\ntrace of ResNet-50: {seconds:.2f} s")
    assert seconds < 2


@pytest.mark.parametrize(
    ("name", "model", "shape", "most"),
    [
        ("LeNet", zoo.lenet(), (2048, 1, 28, 28), 1.4),
        ("VGG", zoo.vgg_small(), (2048, 1, 28, 28), 1.3),
        # Layers so thin that looking at their values costs a good part of what computing them costs.
        ("ResNet-20", zoo.resnet20(in_channels=1), (2048, 1, 28, 28), 1.6),
        ("ResNet-18", tv.resnet18(), (512, 3, 64, 64), 1.4),
    ],
)
def test_a_profile_against_a_plain_forward(name: str, model: nn.Module, shape: tuple[int, ...], most: float) -> None:
    images = torch.randn(shape)
    program = pl.trace(model.eval(), images[:2])

    def forward() -> None:
        with torch.no_grad():
            for part in images.split(256):
                model(part)

    plain = best(forward)
    profiled = best(lambda: pl.profile(program, images, cache=False, progress=False, sample=0))
    print(f"\n{name}: forward {plain:.2f} s, profile {profiled:.2f} s, {profiled / plain:.2f} times as long")
    assert profiled / plain < most


def test_committing_and_projecting_half_of_resnet50() -> None:
    program = pl.trace(tv.resnet50(), torch.randn(2, 3, 224, 224))
    selection = half_of_everything(program, mask=False)
    seconds = best(lambda: pl.commit(program, selection))
    print(f"\ncommit of ResNet-50 at half its channels: {seconds:.2f} s")
    assert seconds < 0.4
    changed = Selection({**selection.kept, "layer1.0.conv1": (0, 1)})
    seconds = best(lambda: pl.cost(program, changed), times=20)
    print(f"parameters and FLOPs of ResNet-50 after one change: {1000 * seconds:.2f} ms")
    assert seconds < 0.001
