"""Ten thousand requests with a real lab behind them: none queues up, and the newest is what is shown at the end."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import Tensor

import prunelab as pl
from prunelab.explorer.worker import Worker
from prunelab.plan import Setting
from prunelab.preview import Estimate

TRAIN, TEST = pl.datasets.fashion_mnist()


def test_of_ten_thousand_plans_the_last_ones_accuracy_is_on_the_desk() -> None:
    lab = pl.Lab(pl.zoo.load("lenet"), TRAIN.subset(200), TEST.subset(1000), cache=False, memory=2**24)
    lab.run_profile(progress=False)
    explorer = pl.explore(lab)
    assert explorer._worker.drain(60)
    plans = [replace(lab.plan, settings={"conv2": Setting(ratio=k / 16)}) for k in range(1, 16)]
    points, threads = len(lab.points), threading.active_count()
    for k in range(10_000):
        lab.use(plans[k % 15], merge=True)
        explorer._after_edit() if k % 100 == 99 else explorer._worker.latest(explorer._estimate)
        assert not explorer._worker._jobs
    assert explorer._worker.drain(60)
    assert threading.active_count() <= threads + 1
    shown = explorer.desk.estimate
    assert (shown["state"], shown["n"]) == ("ready", 1000)
    assert lab.plan == plans[9_999 % 15]
    assert shown["accuracy"] == lab.estimate().accuracy
    assert 0 < lab._memory.held <= lab._memory.budget
    # Every plan is one point at most, however often it was asked for.
    assert points < len(lab.points) <= points + 15


def test_a_newer_request_stops_the_running_one_before_its_next_batch() -> None:
    program = pl.trace(pl.zoo.load("lenet"), TEST.images[:2])
    batches: list[str] = []

    def score(outputs: Tensor, labels: Tensor) -> Tensor:
        batches.append(asking[-1])
        return (outputs.argmax(1) == labels).double()

    asking = ["the unpruned network"]
    preview = pl.Preview(program, TEST.images[:2000], TEST.labels[:2000], score=score)
    preview.accuracy()
    assert len(batches) == 8
    worker, running, gate = Worker(lambda error: None), threading.Event(), threading.Event()
    shown: list[tuple[str, int]] = []

    def request(name: str, keep: int) -> Callable[[Callable[[], bool]], None]:
        def work(wanted: Callable[[], bool]) -> None:
            def update(found: Estimate) -> bool:
                running.set()
                assert gate.wait(30)
                return wanted()

            asking.append(name)
            found = preview.accuracy(pl.Selection({"conv1": tuple(range(keep))}), on_update=update)
            shown.append((name, found.n))

        return work

    worker.latest(request("older", 3))
    assert running.wait(30)
    for k in range(10_000):
        worker.latest(request(f"request {k}", 1 + k % 5))
    gate.set()
    assert worker.drain(60)
    assert shown == [("older", 256), ("request 9999", 2000)]
    assert batches[8:] == ["older", *["request 9999"] * 8]


ENDING = """
import pytest
import torch
from prunelab.explorer.worker import Worker

def busy(wanted):
    while wanted():
        torch.randn(64, 64) @ torch.randn(64, 64)

workers = [Worker(print) for _ in range(4)]
for worker in workers:
    worker.latest(busy)
while not all(worker._busy for worker in workers):
    pass
"""

# A training that is asked to end hands over to another worker, which would take longer than the end waits.
HANDING_OVER = """
import threading
import time
import torch
from prunelab.explorer.worker import Worker

def long():
    began = time.monotonic()
    while time.monotonic() < began + 100:
        torch.randn(64, 64) @ torch.randn(64, 64)

def train(stop, other):
    while not stop.is_set():
        torch.randn(64, 64) @ torch.randn(64, 64)
    other.job(long)

pairs = []
for _ in range(4):  # which of the workers is asked first is chance
    stop = threading.Event()
    trains, other = Worker(print, stop.set), Worker(print)
    trains.job(lambda stop=stop, other=other: train(stop, other))
    pairs.append((trains, other))
"""


@pytest.mark.parametrize("script", [ENDING, HANDING_OVER])
def test_the_interpreter_ends_while_work_runs(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
