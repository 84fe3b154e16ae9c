"""Measured time: both networks take turns, the interval is the median's, and nothing of the user's changes.

How fast anything is, is not tested: only that a network that costs a thousand times as much takes longer.
"""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from support import Network, half_of_everything
from torch import Tensor, nn

import prunelab as pl
from prunelab import zoo
from prunelab.latency import Latency, Timing, compared, median_interval

NETWORK = Network(zoo.lenet, (1, 28, 28))


@pytest.fixture(scope="module")
def program() -> pl.Program:
    return pl.trace(NETWORK.build(torch.float32), NETWORK.images(dtype=torch.float32))


class Noted(nn.Module):
    """Writes down that it was run, and on what."""

    def __init__(self, name: str, log: list[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.name, self.log = name, log
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not self.training
        self.log.append((self.name, x))
        out: Tensor = self.layer(x)
        return out


def test_both_take_turns_and_begin_in_turn() -> None:
    log: list[tuple[str, Tensor]] = []
    found = compared(Noted("a", log), Noted("b", log), (torch.randn(2, 3),), batches=(5,), repeats=7, progress=False)
    (timing,) = found.timings
    measured = [name for name, _ in log[-2 * timing.pairs * timing.runs :]]
    blocks = [measured[k : k + timing.runs] for k in range(0, len(measured), timing.runs)]
    assert all(len(set(block)) == 1 for block in blocks)
    assert [block[0] for block in blocks] == list("abbaabbaabbaab")
    # Warmed up by turns too, and as often.
    before = [name for name, _ in log[: -len(measured)]]
    assert before == list("ab") * (len(before) // 2)
    assert len(before) >= 6
    assert {x.shape for _, x in log} == {(5, 3)}


def test_a_thousand_times_the_work_takes_longer() -> None:
    large, small = nn.Linear(2000, 2000), nn.Linear(2000, 2)
    found = compared(large, small, (torch.randn(2, 2000),), batches=(1, 32), repeats=6, progress=False)
    for timing in found.timings:
        assert timing.before > 3 * timing.after
        assert timing.high >= timing.speedup >= timing.low > 2
    assert [timing.batch for timing in found.timings] == [1, 32]


def test_it_says_what_it_is(program: pl.Program) -> None:
    found = pl.latency(program, half_of_everything(program, mask=False), batch=3, repeats=6, progress=False)
    (timing,) = found.timings
    threads = torch.get_num_threads()
    assert (found.threads, found.precision, found.channels_last) == (threads, "float32", False)
    assert (timing.batch, timing.pairs) == (3, 6)
    assert found.device.startswith("cpu (")
    assert f"{threads} thread" in str(found)
    assert "float32" in str(found)
    frame = found.to_frame()
    assert frame.loc[0, "speedup"] == timing.speedup
    assert frame.loc[0, "where"] == found.where


def test_the_sentence() -> None:
    timings = (Timing(1, 0.00123, 0.00061, 2.016, 1.9, 2.1, 30, 9), Timing(64, 1.5, 0.75, 2.0, 1.99, 2.01, 30, 1))
    assert str(Latency(timings, "cpu (AVX2)", 2, "float32", True)) == (
        "batch 1: 1.23 ms → 610 µs, 2.02 times as fast (95 % 1.90 to 2.10, 30 interleaved pairs of 9 runs); "
        "batch 64: 1.5 s → 750 ms, 2.00 times as fast (95 % 1.99 to 2.01, 30 interleaved pairs); "
        "on cpu (AVX2), 2 threads, float32, channels last"
    )
    assert Latency(timings, "cuda:0 (NVIDIA H100)", 2, "bfloat16").where == "cuda:0 (NVIDIA H100), bfloat16"


def test_nothing_of_the_users_changes(program: pl.Program) -> None:
    model = program.model.train()
    before = copy.deepcopy(model.state_dict())
    seeds = (random.getstate(), torch.get_rng_state())
    pl.latency(program, half_of_everything(program), batch=2, repeats=6, precision="bfloat16", progress=False)
    assert all(part.training for part in model.modules())
    assert {n: t.dtype for n, t in model.state_dict().items()} == {n: t.dtype for n, t in before.items()}
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert random.getstate() == seeds[0]
    assert torch.equal(torch.get_rng_state(), seeds[1])
    model.eval()


@pytest.mark.parametrize(("precision", "layout"), [("bfloat16", False), ("float64", True), (None, True)])
def test_precision_and_layout_are_those_asked_for(precision: str | None, layout: bool) -> None:
    seen: list[Tensor] = []

    class Seeing(nn.Conv2d):
        """Looks at its input and weight."""

        def forward(self, x: Tensor) -> Tensor:
            seen[:] = [x, self.weight]
            return super().forward(x)

    found = compared(
        Seeing(4, 8, 3), Seeing(4, 2, 3), (torch.randn(2, 4, 9, 9),), batches=(3,), repeats=6, precision=precision,
        channels_last=layout, progress=False,
    )  # fmt: skip
    assert found.precision == (precision or "float32")
    assert {str(t.dtype) for t in seen} == {f"torch.{found.precision}"}
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in seen) == layout
    assert found.channels_last == layout


def test_inputs_fill_the_batch_and_other_arguments_stay() -> None:
    seen: list[tuple[Tensor, ...]] = []

    class Two(nn.Module):
        """Two inputs with the images first, a tensor without images, and a number."""

        def forward(self, a: Tensor, b: Tensor, table: Tensor, factor: float) -> Tensor:
            seen.append((a, b, table))
            return (a + b) @ table * factor

    args = (torch.arange(6.0).view(3, 2), torch.ones(3, 2), torch.ones(2, 5), 2.0)
    compared(Two(), Two(), args, batches=(7, 2), repeats=6, progress=False)
    assert {tuple(map(tuple, (t.shape for t in found))) for found in seen} == {
        ((7, 2), (7, 2), (2, 5)),
        ((2, 2), (2, 2), (2, 5)),
    }
    assert torch.equal(seen[0][0], args[0][[0, 1, 2, 0, 1, 2, 0]])


# Stopping ---------------------------------------------


def test_progress_counts_all_pairs(program: pl.Program) -> None:
    calls: list[tuple[int, int | None]] = []

    def note(done: int, total: int | None, what: str) -> None:
        calls.append((done, total))

    pl.latency(program, pl.DENSE, batch=(1, 2), repeats=6, progress=note)
    assert calls == [(k, 12) for k in range(1, 13)]


def test_what_was_measured_before_a_stop_is_kept(program: pl.Program) -> None:
    def after(pairs: int) -> Latency:
        return pl.latency(program, pl.DENSE, repeats=8, progress=lambda done, total, what: done < pairs)

    with pytest.raises(pl.Stopped):
        after(5)
    assert [(t.batch, t.pairs) for t in after(7).timings] == [(1, 7)]
    assert [(t.batch, t.pairs) for t in after(10).timings] == [(1, 8)]
    assert [(t.batch, t.pairs) for t in after(15).timings] == [(1, 8), (64, 7)]


# The interval ---------------------------------------------


@pytest.mark.parametrize(("n", "low", "high"), [(6, 1, 6), (8, 1, 8), (9, 2, 8), (10, 2, 9), (20, 6, 15), (30, 10, 21)])
def test_order_statistics_of_the_tables(n: int, low: int, high: int) -> None:
    # The ranks that tables of the binomial distribution give for 95 %.
    values = list(range(1, n + 1))
    random.Random(0).shuffle(values)
    assert median_interval(values) == (low, high)


@pytest.mark.parametrize("n", [6, 15, 30])
def test_it_covers_the_median_as_often_as_it_says(n: int) -> None:
    # A skewed distribution with a known median, as times on a busy machine have.
    draws = np.random.default_rng(0).exponential(size=(4000, n))
    covered = [low <= np.log(2) <= high for low, high in map(median_interval, draws.tolist())]
    assert 0.945 < np.mean(covered) < 0.99


# What cannot be ---------------------------------------------


def test_what_cannot_be_timed_is_refused(program: pl.Program) -> None:
    refusals = [
        ({"repeats": 5}, "at least 6 repeats, not 5"),
        ({"batch": 0}, "whole number of images from 1, or several such, not 0"),
        ({"batch": ()}, "whole number of images from 1"),
        ({"batch": 2.5}, "whole number of images from 1"),
        ({"precision": "float"}, "no precision 'float'; the nearest names are 'float"),
        ({"images": torch.randn(2, 1, 5, 5)}, "cannot run a batch of 1 so"),
    ]
    for given, message in refusals:
        with pytest.raises(pl.PruneLabError, match=message):
            pl.latency(program, pl.DENSE, progress=False, **given)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_refused(program: pl.Program) -> None:
    with pytest.raises(pl.PruneLabError, match="cannot be moved to cuda so"):
        pl.latency(program, pl.DENSE, device="cuda", progress=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_a_gpu_the_clock_waits_for_the_work(precision: str) -> None:
    large, small = nn.Linear(8192, 8192), nn.Linear(8192, 8)
    found = compared(
        large, small, (torch.randn(2, 8192),), batches=(4096,), repeats=6, device="cuda", precision=precision,
        progress=False,
    )  # fmt: skip
    # Launching both takes the same time; computing them does not.
    assert found.timings[0].speedup > 3
    assert found.where.startswith("cuda")


def test_a_forward_that_fixes_its_batch() -> None:
    class Fixed(nn.Module):
        """Takes batches of four images only."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.b(self.a(x).view(4, -1).relu())
            return logits

    program = pl.trace(Fixed().eval(), torch.randn(4, 3))
    found = pl.latency(program, pl.Selection({"a": (1, 2)}), repeats=6, progress=False)
    assert [timing.batch for timing in found.timings] == [4]
    with pytest.raises(pl.PruneLabError, match="batches of 4 images only: time it with batch=4"):
        pl.latency(program, pl.DENSE, batch=1)
