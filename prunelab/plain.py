"""Nested tuples, lists and dicts of numbers, words and tensors, as values that JSON keeps exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from prunelab.errors import PruneLabError


def to_plain(value: Any, tensor: Callable[[Tensor], Any]) -> Any:
    """A value as lists, dicts with words for keys, numbers, words and None.

    Args:
        tensor: what stands for a tensor; itself plain.

    Raises:
        PruneLabError: something else is among the values.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return {"tensor": tensor(value)}
    if type(value) is list:
        return [to_plain(v, tensor) for v in value]
    if type(value) is tuple:
        return {"tuple": [to_plain(v, tensor) for v in value]}
    if type(value) is dict:
        return {"dict": [[to_plain(k, tensor), to_plain(v, tensor)] for k, v in value.items()]}
    raise PruneLabError(f"A {type(value).__name__} is neither a tensor nor a value that JSON can hold.")


def from_plain(plain: Any, tensor: Callable[[Any], Tensor]) -> Any:
    """The reverse of :func:`to_plain`.

    Args:
        tensor: the tensor for what stands for it.
    """
    if isinstance(plain, list):
        return [from_plain(v, tensor) for v in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, held),) = plain.items()
    if kind == "tensor":
        return tensor(held)
    if kind == "tuple":
        return tuple(from_plain(v, tensor) for v in held)
    return {from_plain(k, tensor): from_plain(v, tensor) for k, v in held}
