"""The one error that prunelab raises for input it cannot use, and the sentence that helps."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PruneLabError(ValueError):
    """Something the user gave cannot be used; the message says what, where and what to do."""


def unknown(what: str, name: str, known: Iterable[str]) -> PruneLabError:
    """An error for a name that does not exist, with the nearest names that do.

    Args:
        what: the kind of thing, for example ``"layer"``.
        name: the name that was asked for.
        known: the names that exist.
    """
    names = list(dict.fromkeys(known))
    begun = [n for n in names if name and n.startswith(name)]
    near = list(dict.fromkeys([*begun, *difflib.get_close_matches(name, names, n=3, cutoff=0.4)]))[:3]
    listed = ", ".join(repr(n) for n in near or names[:5])
    return PruneLabError(f"There is no {what} {name!r}; the nearest names are {listed}.")
