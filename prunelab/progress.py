"""Progress and stopping of long work, the same for a script, a notebook and the explorer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

Progress = Callable[[int, int | None, str], bool | None]
"""Called with (done, total, what) after each step; returning False stops the work at that point."""


class Stopped(Exception):  # noqa: N818  # it is no error: the user asked for it
    """Long work was asked to stop; what it had finished is kept, nothing is half-written."""


def track(
    items: Iterable[T], what: str, total: int | None, progress: Progress | bool = True, before: int = 0
) -> Iterator[T]:
    """Iterate with progress.

    Args:
        progress: True shows a progress bar (tqdm), False shows nothing, a function is called after every
            item.
        before: items of the total that were done earlier and are not among these.

    Raises:
        Stopped: the function returned False.
    """
    if progress is True:
        yield from _bar(items, what, total, before)
        return
    for done, item in enumerate(items, start=before + 1):
        yield item
        if callable(progress) and progress(done, total, what) is False:
            raise Stopped(what)


_said: set[str] = set()


def say_once(text: str) -> None:
    """Tell the user something that is worth knowing once in a process."""
    if text not in _said:
        _said.add(text)
        # A notebook shows what comes by stderr on red, as if something was wrong.
        (sys.stdout if _in_notebook() else sys.stderr).write(text + "\n")


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def _bar(items: Iterable[T], what: str, total: int | None, before: int) -> Iterator[T]:
    bar: Any = items
    try:
        from tqdm.auto import tqdm
    except ImportError:  # a bare machine with torch alone
        pass
    else:
        bar = tqdm(items, desc=what, total=total, initial=before, leave=False)
    yield from bar
