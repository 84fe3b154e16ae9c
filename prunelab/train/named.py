"""Functions by import path, ``package.module:function``: how a folder says where a network and data come from.

Whoever calls one runs the code that the path names, as ``import`` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from prunelab.errors import PruneLabError
from prunelab.plain import from_plain, to_plain
from prunelab.saving import Record


@dataclass(frozen=True)
class Named:
    """A function by import path, and what it is called with.

    Attributes:
        path: ``package.module:function``.
        arguments: by keyword; values that JSON can hold.
    """

    path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(given: Any) -> Named:
        """From a path, or from a path and a dict of arguments.

        Raises:
            PruneLabError: it is neither, cannot be imported by another process, or has arguments that JSON cannot hold.
        """
        path, arguments = given if isinstance(given, tuple | list) and len(given) == 2 else (given, {})
        module, _, function = path.partition(":") if isinstance(path, str) else ("", "", "")
        if not module or not function or not isinstance(arguments, Mapping):
            raise PruneLabError(
                f"A function by import path is written 'package.module:function', or ('package.module:function', "
                f"{{'argument': value}}), not {given!r}."
            )
        if module == "__main__":
            raise PruneLabError(
                f"{path!r} is known to this notebook or script alone: put the function into a module of its own."
            )
        named = Named(path, dict(arguments))
        named.to_record()
        return named

    def to_record(self) -> Record:
        """As values that JSON can hold.

        Raises:
            PruneLabError: an argument is no such value.
        """
        return {"function": self.path, "arguments": to_plain(dict(self.arguments), _no_tensor)}

    @staticmethod
    def from_record(record: Any) -> Named:
        """The reverse of :meth:`to_record`."""
        return Named.of((record["function"], from_plain(record["arguments"], _no_tensor)))

    def function(self) -> Any:
        """The function itself.

        Raises:
            PruneLabError: it cannot be imported.
        """
        module, _, name = self.path.partition(":")
        try:
            found: Any = import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except Exception as error:
            raise PruneLabError(
                f"{self.path!r} cannot be imported ({type(error).__name__}: {error}): start where its module is, or "
                "install it."
            ) from error
        if not callable(found):
            raise PruneLabError(f"{self.path!r} is a {type(found).__name__}, not a function.")
        return found

    def __call__(self) -> Any:
        """What the function gives.

        Raises:
            PruneLabError: it cannot be imported, or fails.
        """
        function = self.function()
        try:
            return function(**self.arguments)
        except PruneLabError:
            raise
        except Exception as error:
            raise PruneLabError(f"{self.path!r} failed ({type(error).__name__}: {error}).") from error


def _no_tensor(_: Any) -> Any:
    raise PruneLabError("The arguments of a function by import path must be values that JSON can hold, not tensors.")
