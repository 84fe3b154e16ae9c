"""The worker: the latest request wins, jobs are done, errors are heard."""

from __future__ import annotations

import threading
from collections.abc import Callable

from prunelab.explorer.worker import Worker


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
    running, seen = threading.Event(), []

    def long(wanted: Callable[[], bool]) -> None:
        running.set()
        while wanted():
            pass
        seen.append("stopped")

    worker.latest(long)
    assert running.wait(10)
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
