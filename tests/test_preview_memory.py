"""The preview's memory: what a process grows by stays in the budget, where everything would not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn

import prunelab as pl
from prunelab import zoo
from prunelab.preview import _step
from prunelab.program.cache import Cache
from prunelab.program.liveness import working_bytes

BENCH = Path(__file__).parent / "bench" / "memory.py"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the process's own peak is known on Linux only")
@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_a_process_grows_by_no_more_than_the_budget(precision: str) -> None:
    command = [sys.executable, str(BENCH), "--one", "resnet56", "32", "600", "128", precision, "--moves", "3"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["everything"] > 2 * found["budget"]
    # It is used, too.
    assert found["held"] > 0.25 * found["budget"]
    # What the kernels take, whatever the budget, and sliced copies of the weights.
    assert found["growth"] <= found["budget"] + 16 * 2**20 + 2 * found["weights"]


class Chain(nn.Module):
    """Two convolutions, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x)).mean((2, 3))
        return out


def test_the_fullest_moment_of_a_run() -> None:
    program = pl.trace(Chain(), torch.randn(2, 3, 10, 10))
    # While the first convolution runs, what it reads, twice, and what it makes, and both in the kernel's layout.
    assert working_bytes(program) == 4 * 2 * (2 * 3 + 8) * 100
    double = pl.trace(Chain().double(), torch.randn(2, 3, 10, 10).double())
    assert working_bytes(double) == 2 * working_bytes(program)


def test_a_batch_takes_half_the_budget_at_most_and_eight_images_at_least() -> None:
    program = pl.trace(zoo.lenet(), torch.randn(2, 1, 28, 28))
    each = working_bytes(program)
    assert [_step(program, budget) for budget in (2**30, 200 * each, 40 * each, 0)] == [256, 64, 16, 8]
    large = pl.trace(tv.resnet18(), torch.randn(2, 3, 64, 64))
    assert _step(large, 2**40) < 256


def test_values_make_room_for_work() -> None:
    memory = Cache(10_000, overhead=2)
    for k in range(10):
        memory.put(k, torch.zeros(1_000, dtype=torch.uint8), 1.0)
    assert memory.held <= 5_000
    with memory.working(8_000):
        assert memory.held <= 1_000
        memory.put("new", torch.zeros(1_001, dtype=torch.uint8), 9.0)
        assert memory.get("new") is None
    memory.put("new", torch.zeros(1_001, dtype=torch.uint8), 9.0)
    assert memory.get("new") is not None
    assert memory.work == 0
