"""The worker: the latest request wins, jobs are done, errors are heard."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable

import pytest

from prunelab.explorer import worker as worker_module
from prunelab.explorer.worker import Worker


def start_unwilling(worker: Worker, log: list[str]) -> None:
    """Start quick work that runs until it is no longer wanted, and then says so in ``log``."""
    running = threading.Event()

    def long(wanted: Callable[[], bool]) -> None:
        running.set()
        while wanted():
            pass
        log.append("stopped")

    worker.latest(long)
    assert running.wait(10)


def test_the_last_of_ten_thousand_requests_is_the_one_at_the_end() -> None:
    done: list[int] = []
    worker = Worker(lambda error: done.append(-1))

    def request(number: int) -> Callable[[Callable[[], bool]], None]:
        return lambda wanted: done.append(number) if wanted() else None

    threads = threading.active_count()
    for number in range(10_000):
        worker.latest(request(number))
    assert worker.drain(30)
    assert done[-1] == 9_999
    assert done == sorted(done)
    assert threading.active_count() <= threads + 1


def test_a_newer_request_stops_the_running_one() -> None:
    worker = Worker(lambda error: None)
    seen: list[str] = []

    start_unwilling(worker, seen)
    worker.latest(lambda wanted: seen.append("newest"))
    assert worker.drain(10)
    assert seen == ["stopped", "newest"]


def test_jobs_all_run_and_errors_reach_the_handler() -> None:
    errors: list[Exception] = []
    worker = Worker(errors.append)
    done: list[int] = []

    def fail() -> None:
        raise ValueError("on purpose")

    worker.job(lambda: done.append(1))
    worker.job(fail)
    worker.job(lambda: done.append(2))
    assert worker.drain(10)
    assert done == [1, 2]
    assert [str(e) for e in errors] == ["on purpose"]


def test_of_many_requests_only_the_last_runs_while_one_is_under_way() -> None:
    worker, running, gate = Worker(lambda error: None), threading.Event(), threading.Event()
    done: list[int] = []

    def first(wanted: Callable[[], bool]) -> None:
        running.set()
        gate.wait(10)
        done.append(-1 if wanted() else 0)

    worker.latest(first)
    assert running.wait(10)
    for number in range(10_000):
        worker.latest(lambda wanted, number=number: done.append(number))  # type: ignore[misc]  # binds now
    gate.set()
    assert worker.drain(10)
    assert done == [0, 9_999]


def test_jobs_go_before_quick_work_in_their_order_and_stop_what_runs() -> None:
    worker = Worker(lambda error: None)
    order: list[str] = []

    start_unwilling(worker, order)
    with worker._wake:  # all three are there before the worker looks
        worker.latest(lambda wanted: order.append("quick"))
        worker.job(lambda: order.append("first job"))
        worker.job(lambda: order.append("second job"))
    assert worker.drain(10)
    assert order == ["stopped", "first job", "second job", "quick"]


def test_an_error_of_quick_work_is_heard_and_work_goes_on() -> None:
    errors: list[Exception] = []
    worker, done = Worker(errors.append), []

    def fail(wanted: Callable[[], bool]) -> None:
        raise KeyError("on purpose")

    worker.latest(fail)
    assert worker.drain(10)
    worker.latest(lambda wanted: done.append(wanted()))
    assert worker.drain(10)
    assert [type(e) for e in errors] == [KeyError]
    assert done == [True]


def test_threads_end_when_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "IDLE", 0.05)
    before = threading.active_count()
    workers = [Worker(lambda error: None) for _ in range(20)]
    done: list[int] = []
    for _ in range(2):  # and start again when there is
        for worker in workers:
            worker.job(lambda: done.append(1))
        assert all(worker.drain(10) for worker in workers)
        deadline = time.monotonic() + 10
        while threading.active_count() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() == before
    assert len(done) == 40


def test_work_that_has_ended_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "IDLE", 0.05)

    class Held:
        pass

    held, worker = Held(), Worker(lambda error: None)
    ref = weakref.ref(held)
    worker.job(lambda held=held: None)  # type: ignore[misc]  # binds now
    assert worker.drain(10)
    del held
    deadline = time.monotonic() + 10
    while ref() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ref() is None
