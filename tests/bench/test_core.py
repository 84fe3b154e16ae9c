"""How long tracing, profiling, committing and projecting take, against what was promised."""

from __future__ import annotations

import time
from collections.abc import Callable

import profiling
import pytest
import torch
import torchvision.models as tv
from support import half_of_everything

import prunelab as pl
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


@pytest.mark.parametrize("case", profiling.CASES, ids=lambda case: case.name)
def test_a_profile_against_a_plain_forward(case: profiling.Case) -> None:
    times = profiling.measure(case)
    print(f"\n{case.name}: forward {times.plain:.2f} s, profile {times.profile:.2f} s, {times.ratio:.2f} times as long")
    assert times.ratio <= 1.25


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
