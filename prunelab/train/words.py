"""Settings in words that are the same in another process: by them a run is known again."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import BuiltinMethodType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from prunelab.profile.store import digest_tensor
from prunelab.program.trace import state_tensors

# What is written out within a setting; of what is longer, or lies deeper, a digest or the name will do.
_LONG, _DEEP = 100, 20


def network_in_words(model: nn.Module) -> str:
    """A network's structure, whatever its weights are."""
    shapes = [(name, tuple(t.shape), str(t.dtype), t.requires_grad) for name, t in state_tensors(model).items()]
    return f"{type(model).__name__} {_digest(repr(shapes).encode())}"


def digest_of(model: nn.Module | Mapping[str, Tensor]) -> str:
    """A name for a network's weights and buffers."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, tensor in (state_tensors(model) if isinstance(model, nn.Module) else model).items():
        hasher.update(name.encode())
        digest_tensor(hasher, tensor)
    return hasher.hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


class Words:
    """Says what settings are, in words that are the same in another process of the same program.

    Functions and classes of a module go by their names. Other functions are told apart by their code, their defaults
    and what they hold, which is looked at when the run begins; objects by their fields, data classes by those that
    equality goes by. The network that is trained goes by its name wherever it is held: its weights change.
    """

    def __init__(self, model: nn.Module) -> None:
        """Args:
        model: that is trained.
        """
        own = [*model.named_modules(), *state_tensors(model).items()]
        self._texts = {id(each): f"the network's {name}" if name else "the network" for name, each in own}
        self._own = frozenset(self._texts)
        # An id is that of one value only for as long as the value lives.
        self._looked_at: list[Any] = [each for _, each in own]
        self._depth = 0

    def of(self, value: Any) -> str:
        """One setting in words."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | Optimizer):
            return repr(value)
        key = id(value)
        if key in self._texts:
            return self._texts[key]
        if self._depth > _DEEP:
            return _name(value)
        # For what holds itself.
        self._texts[key] = _name(value)
        self._looked_at.append(value)
        self._depth += 1
        self._texts[key] = next((say for kind, say in _SAYERS if isinstance(value, kind)), Words._object)(self, value)
        self._depth -= 1
        return self._texts[key]

    def short(self, value: Any) -> str:
        """The same, and no longer than a line."""
        text = self.of(value)
        return text if len(text) <= _LONG else f"{type(value).__name__} {_digest(text.encode())}"

    def _all(self, values: Iterable[Any]) -> str:
        return ", ".join(self.short(value) for value in values)

    def _by_name(self, values: Mapping[Any, Any]) -> str:
        return ", ".join(f"{name}={self.short(values[name])}" for name in sorted(values, key=str))

    def _module(self, value: nn.Module) -> str:
        states = {name: t for name, t in state_tensors(value).items() if id(t) not in self._own}
        text = f"{type(value).__name__} {digest_of(states)}"
        if next(value.parameters(), None) is not None:
            return text
        # A loss: it is no weights that tell it from another, but its settings.
        settings = {
            f"{name}.{key}".lstrip("."): held
            for name, part in value.named_modules()
            for key, held in vars(part).items()
            if not key.startswith("_") and key != "training"
        }
        return f"{text} ({self._by_name(settings)})" if settings else text

    def _mapping(self, value: Mapping[Any, Any]) -> str:
        if not value:
            return "none"
        if all(isinstance(k, str) and isinstance(v, Tensor) and id(v) not in self._own for k, v in value.items()):
            return digest_of(value)
        pairs = {self.short(key): held for key, held in value.items()}
        return f"{{{self._by_name(pairs)}}}"

    def _several(self, value: list[Any] | tuple[Any, ...]) -> str:
        return f"[{self._all(value)}]"

    def _set(self, value: Iterable[Any]) -> str:
        # The order of a set of words is another one in every process.
        return f"{{{', '.join(sorted(self.short(each) for each in value))}}}"

    def _array(self, value: np.ndarray[Any, Any]) -> str:
        # The bytes of an array of objects are addresses.
        held = self.of(value.tolist()).encode() if value.dtype.hasobject else value.tobytes()
        return f"{value.dtype}{value.shape} {_digest(held)}"

    def _tensor(self, value: Tensor) -> str:
        return f"{value.dtype}{tuple(value.shape)} {digest_of({'': value})}"

    def _partial(self, value: partial[Any]) -> str:
        given = [self.short(value.func), self._all(value.args), self._by_name(value.keywords)]
        return f"partial({', '.join(filter(None, given))})"

    def _method(self, value: Any) -> str:
        owner = value.__self__
        return _name(value) if owner is None or isinstance(owner, ModuleType) else f"{self.of(owner)}.{value.__name__}"

    def _function(self, value: FunctionType) -> str:
        if _is_of_module(value):
            return _name(value)
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        held: dict[str, Any] = {name: each for name, cell in cells for each in _content(cell)}
        held |= {"its defaults": value.__defaults__} if value.__defaults__ else {}
        held |= value.__kwdefaults__ or {}
        return f"{_name(value)}({self._by_name(held)}) {self.of(value.__code__)}"

    def _code(self, value: CodeType) -> str:
        # Not the line: the same code further down is the same setting.
        names = (value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars)
        return _digest(value.co_code + self.of([*value.co_consts, *names]).encode())

    def _dataclass(self, value: Any) -> str:
        held = {each.name: getattr(value, each.name, None) for each in fields(value) if each.compare}
        return f"{type(value).__qualname__}({', '.join(f'{name}={self.short(each)}' for name, each in held.items())})"

    def _object(self, value: Any) -> str:
        if is_dataclass(value):
            return self._dataclass(value)
        # Its attributes, those in slots too. A method of its own may give what only pickle understands.
        state: Any = object.__getstate__(value)
        held = {k: v for part in (state if isinstance(state, tuple) else (state,)) for k, v in (part or {}).items()}
        text = repr(value) if not held else f"{_name(value)}({self._by_name(held)})"
        return _name(value) if not held and " at 0x" in text else text


_SAYERS: tuple[tuple[Any, Callable[[Words, Any], str]], ...] = (
    # Loggers hold all others.
    (type | ModuleType | logging.Logger, lambda _, value: _name(value)),
    (nn.Module, Words._module),
    (Mapping, Words._mapping),
    (list | tuple, Words._several),
    (set | frozenset, Words._set),
    (np.ndarray, Words._array),
    (Tensor, Words._tensor),
    (partial, Words._partial),
    (MethodType | BuiltinMethodType, Words._method),
    (FunctionType, Words._function),
    (CodeType, Words._code),
)


def _name(value: Any) -> str:
    """The name of a function, a class or a module; that of its class for another value."""
    named = value if hasattr(value, "__qualname__") or hasattr(value, "__name__") else type(value)
    name = getattr(named, "__qualname__", None) or named.__name__
    return f"{getattr(named, '__module__', '')}.{name}"


def _is_of_module(value: FunctionType) -> bool:
    """Whether a function is what its name says: its module has it, or it holds nothing and is not within another."""
    found: Any = sys.modules.get(value.__module__)
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is value or not (value.__closure__ or "<" in value.__qualname__)


def _content(cell: Any) -> list[Any]:
    """The value that a function's cell holds, or none: it is empty until its variable has one."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []
