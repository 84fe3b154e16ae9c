"""Promises 1 and 3 on random networks; ``make fuzz`` tries many more."""

from __future__ import annotations

from hypothesis import given, settings, strategies as st
from random_networks import Description, check, descriptions


@settings(max_examples=100)
@given(descriptions(), st.integers(0, 2**32 - 1))
def test_random_networks(description: Description, seed: int) -> None:
    check(description, seed)
