"""Values kept for the next time, under a budget of bytes; the least worth keeping go first."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

from torch import Tensor

from prunelab.machine import spare_memory

OVERHEAD = 2.0
"""Bytes that the process grows by for each byte held: blocks of many sizes leave holes. 1.4 to 1.9 with glibc."""
_NO_TENSOR = 64
_LEFT = 0.97


@dataclass
class _Held:
    value: Any
    size: int
    worth: float
    rank: float


class Cache:
    """A store of tensors by key. What it makes the process grow by, the work at hand included, stays in its budget.

    What goes first is what saves the fewest seconds per byte and has not been asked for lately: the greedy dual
    algorithm of Cao and Irani (1997, "Cost-aware WWW proxy caching algorithms").

    Attributes:
        budget: bytes at most.
        held: bytes of the values now.
        work: bytes that runs need besides, now.
    """

    def __init__(self, budget: int | None = None, overhead: float = OVERHEAD) -> None:
        """Args:
        budget: bytes; what the machine can spare unless given.
        overhead: what the process grows by for each byte held.
        """
        self.budget = spare_memory() if budget is None else budget
        self.held = 0
        self.work = 0
        self._overhead = overhead
        self._items: dict[Hashable, _Held] = {}
        # What was evicted last had this rank: newcomers start above it, and what nobody asks for falls behind.
        self._age = 0.0
        self._lock = Lock()

    @contextmanager
    def working(self, size: int) -> Iterator[None]:
        """Make room for work that needs so many bytes, until it is done."""
        with self._lock:
            self.work += size
            self._evict()
        try:
            yield
        finally:
            with self._lock:
                self.work -= size

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: Hashable) -> Any:
        """The value with this key, or None."""
        with self._lock:
            item = self._items.get(key)
            if item is None:
                return None
            item.rank = self._age + item.worth
            return item.value

    def drop(self, keys: Iterable[Hashable]) -> None:
        """Let go of what has one of these keys."""
        with self._lock:
            for key in keys:
                gone = self._items.pop(key, None)
                self.held -= gone.size if gone is not None else 0

    def put(self, key: Hashable, value: Any, seconds: float) -> None:
        """Keep a value, unless it is larger than the whole budget.

        Args:
            seconds: what it saves to have it.
        """
        size = value.untyped_storage().nbytes() if isinstance(value, Tensor) else _NO_TENSOR
        with self._lock:
            if key in self._items or size > self._room():
                return
            worth = seconds / max(size, 1)
            self._items[key] = _Held(value, size, worth, self._age + worth)
            self.held += size
            self._evict()

    def _room(self) -> float:
        """Bytes that values may take now."""
        return (self.budget - self.work) / self._overhead

    def _evict(self) -> None:
        if self.held <= self._room():
            return
        # A little more than must go, so that not every value that comes has all the others ranked.
        for key in sorted(self._items, key=lambda k: self._items[k].rank):
            if self.held <= _LEFT * self._room():
                break
            gone = self._items.pop(key)
            self.held -= gone.size
            self._age = gone.rank
