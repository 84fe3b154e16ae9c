"""Reading what a student has given: a plan, a number, a function. What is of another kind is refused in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from prunelab.errors import PruneLabError
from prunelab.plan import Plan


def plan_in(answer: Any) -> Plan:
    """The plan that an answer is or holds: a plan, a lab, an explorer over a lab, a best plan.

    Raises:
        PruneLabError: there is none in it.
    """
    held = getattr(answer, "lab", answer)
    plan = getattr(held, "plan", held)
    if not isinstance(plan, Plan):
        raise PruneLabError(f"The answer must be a plan, or a lab with one, and this is {_kind(answer)}.")
    return plan


def number_in(answer: Any) -> float:
    """A finite number.

    Raises:
        PruneLabError: it is something else.
    """
    if isinstance(answer, bool) or not isinstance(answer, Real) or not math.isfinite(answer):
        raise PruneLabError(f"The answer must be a number, and this is {_kind(answer)}.")
    return float(answer)


def function_in(answer: Any) -> Callable[..., Any]:
    """A function that can be called without fear: whatever goes wrong within becomes a ``PruneLabError``.

    Raises:
        PruneLabError: it cannot be called, or is a class.
    """
    if not callable(answer) or isinstance(answer, type):
        raise PruneLabError(f"The answer must be a function, its name without brackets, and this is {_kind(answer)}.")

    def called(*arguments: Any) -> Any:
        try:
            return answer(*arguments)
        except Exception as error:
            given = ", ".join(_described(argument) for argument in arguments)
            raise PruneLabError(
                f"Your function stopped with {type(error).__name__}: {error}. Given: {given}."
            ) from error

    return called


def _kind(answer: Any) -> str:
    name = type(answer).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _described(argument: Any) -> str:
    shape = getattr(argument, "shape", None)
    return repr(argument) if shape is None else f"a {type(argument).__name__} of shape {tuple(shape)}"
