"""One background thread: the latest request wins, and long jobs run one at a time."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable

IDLE = 10.0
"""Seconds without work after which the thread ends; the next request starts another."""


_LAST_WAIT = 10.0
"""Seconds that the interpreter's end waits for work that runs."""


class Worker:
    """Runs quick work of which only the newest matters (estimates), and jobs that must be done (commit, fine-tune).

    Quick work is handed a function that says whether it is still wanted; no queue of it ever grows. The thread ends
    when there has been nothing to do for a while, so that what a closed notebook cell left behind can be freed.
    """

    def __init__(self, on_error: Callable[[Exception], None], stop: Callable[[], None] = lambda: None) -> None:
        """Args:
        on_error: called, on the worker's thread, with whatever a piece of work raises.
        stop: called when the interpreter ends: asks a job that runs to end.
        """
        self._on_error = on_error
        self._stop = stop
        self._wake = threading.Condition()
        self._quick: Callable[[Callable[[], bool]], None] | None = None
        self._jobs: list[Callable[[], None]] = []
        self._serial = 0
        self._busy = False
        self._ended = False
        self._thread: threading.Thread | None = None
        _workers.add(self)

    def latest(self, work: Callable[[Callable[[], bool]], None]) -> None:
        """Ask for quick work; it replaces what waits and stops what runs."""
        with self._wake:
            self._serial += 1
            self._quick = work
            self._start()

    def job(self, work: Callable[[], None]) -> None:
        """Ask for work that must be done; it goes before quick work and stops quick work that runs."""
        with self._wake:
            self._serial += 1
            self._jobs.append(work)
            self._start()

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until nothing waits or runs; False if that takes longer than ``timeout`` seconds."""
        with self._wake:
            return self._wake.wait_for(lambda: not (self._busy or self._jobs or self._quick), timeout)

    def end(self) -> threading.Thread | None:
        """Give up what waits, ask what runs to end, and take up no other work; gives the thread, if one runs."""
        with self._wake:
            self._serial += 1
            self._quick, self._ended = None, True
            self._jobs.clear()
            thread = self._thread
            self._wake.notify_all()
        self._stop()
        return thread

    def _start(self) -> None:
        if self._ended:
            return
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._loop, name="prunelab", daemon=True)
            self._thread.start()
        self._wake.notify_all()

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._busy = False
                self._wake.notify_all()
                wanted = self._wake.wait_for(lambda: self._ended or bool(self._jobs) or self._quick is not None, IDLE)
                if self._ended or not wanted:
                    self._thread = None
                    return
                self._busy = True
                job = self._jobs.pop(0) if self._jobs else None
                quick, mine = (None, 0) if job else (self._quick, self._serial)
                if quick is not None:
                    self._quick = None
            try:
                if job is not None:
                    job()
                elif quick is not None:
                    quick(lambda mine=mine: self._serial == mine)  # type: ignore[misc]  # binds now, not later
            except Exception as error:
                self._on_error(error)


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """A thread that is inside PyTorch when the interpreter ends would end the process with an abort."""
    # All are asked before one is waited for: what ends may ask another one for work.
    ending = [worker.end() for worker in list(_workers)]
    give_up = time.monotonic() + _LAST_WAIT
    for thread in ending:
        if thread is not None:
            thread.join(max(give_up - time.monotonic(), 0.0))
