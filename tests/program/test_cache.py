"""The store of values: never over its budget, and what is worth most stays."""

from __future__ import annotations

import random

import torch

from prunelab.program.cache import Cache


def of(size: int) -> torch.Tensor:
    """A tensor of so many bytes."""
    return torch.zeros(size, dtype=torch.uint8)


def test_it_never_holds_more_than_its_budget() -> None:
    chance, memory = random.Random(0), Cache(10_000, overhead=1)
    for _ in range(3000):
        memory.put(chance.randrange(500), of(chance.randrange(1, 4_000)), chance.random())
        memory.get(chance.randrange(500))
        held = [item.value for item in memory._items.values()]
        assert memory.held == sum(t.numel() for t in held) <= 10_000
    assert len(memory) > 1


def test_a_part_counts_as_the_whole_that_it_keeps_alive() -> None:
    memory = Cache(10_000, overhead=1)
    memory.put("part", of(20_000)[:10], 1.0)
    assert memory.get("part") is None
    memory.put("other", of(5_000)[:10], 1.0)
    assert memory.held == 5_000


def test_what_saves_the_fewest_seconds_per_byte_goes_first() -> None:
    memory = Cache(3_000, overhead=1)
    for key, size, seconds in (("slow", 1_000, 3.0), ("quick", 1_000, 1.0), ("small", 500, 1.0)):
        memory.put(key, of(size), seconds)
    memory.put("new", of(1_000), 5.0)
    assert [memory.get(k) is not None for k in ("slow", "quick", "small", "new")] == [True, False, True, True]


def test_what_nobody_asks_for_goes_in_the_end() -> None:
    memory = Cache(3_000, overhead=1)
    memory.put("forgotten", of(1_000), 4.0)
    memory.put("wanted", of(1_000), 4.0)
    for k in range(20):
        memory.put(k, of(1_000), 1.0)
        assert memory.get("wanted") is not None
    assert memory.get("forgotten") is None


def test_nothing_fits_into_nothing() -> None:
    memory = Cache(0, overhead=1)
    memory.put("a", of(1), 1.0)
    memory.put("number", 3, 1.0)
    assert (memory.get("a"), memory.get("number"), memory.held) == (None, None, 0)
