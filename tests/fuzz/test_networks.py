"""Promises 1 and 3 on a thousand random networks: ``make fuzz``."""

from __future__ import annotations

from hypothesis import given, strategies as st
from random_networks import Description, check, descriptions


@given(descriptions(), st.integers(0, 2**32 - 1))
def test_random_networks(description: Description, seed: int) -> None:
    check(description, seed)
