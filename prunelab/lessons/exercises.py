"""Exercises that check themselves: a registry of checkers, and the verdict that each gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from prunelab.errors import PruneLabError, unknown
from prunelab.lessons.prose import prose


@dataclass(frozen=True, repr=False)
class Verdict:
    """What a checker says of an answer; true in a condition where the answer is right.

    Attributes:
        right: whether it is.
        text: one or a few sentences: what was measured; if wrong what is missing and a hint, never the solution.
    """

    right: bool
    text: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return f"{'✓' if self.right else '✗'} {self.text}"

    def _repr_html_(self) -> str:
        mark, colour = ("✓", "success") if self.right else ("✗", "warn")
        edge = f"border-left: 4px solid var(--jp-{colour}-color1, currentColor); padding: 2px 10px; max-width: 90ch"
        return f'<div style="{edge}"><b>{mark}</b> {prose(self.text)}</div>'


Checker = Callable[[Any], Verdict]
"""Takes what the student has given and judges it; what it cannot use it refuses with a ``PruneLabError``."""


@dataclass(frozen=True)
class Exercise:
    """Something to do, and how it is judged.

    Attributes:
        asks: one sentence.
    """

    name: str
    asks: str
    judge: Checker


_EXERCISES: dict[str, Exercise] = {}


def exercise(name: str, asks: str) -> Callable[[Checker], Checker]:
    """Register the checker of an exercise.

    >>> @exercise("two", "Give a number that is twice one.")
    ... def two(answer):
    ...     return Verdict(number_in(answer) == 2, "…")

    Args:
        asks: what is asked, in one sentence.
    """

    def add(judge: Checker) -> Checker:
        _EXERCISES[name] = Exercise(name, asks, judge)
        return judge

    return add


def exercises() -> Mapping[str, str]:
    """What each exercise asks, by its name."""
    return MappingProxyType({each.name: each.asks for each in _EXERCISES.values()})


def check(name: str, answer: Any = None) -> Verdict:
    """Judge an answer: measured or computed anew, never compared with a stored one.

    Args:
        name: of the exercise.
        answer: what it asks for: a plan, a lab, a number, a function; None says what is asked.

    Raises:
        PruneLabError: there is no such exercise, with the nearest names. An answer of any kind gets a verdict.
    """
    if name not in _EXERCISES:
        raise unknown("exercise", name, _EXERCISES)
    chosen = _EXERCISES[name]
    if answer is None:
        return Verdict(False, f"No answer yet. {chosen.asks}")
    try:
        return chosen.judge(answer)
    except PruneLabError as error:
        return Verdict(False, f"{error} {chosen.asks}")
