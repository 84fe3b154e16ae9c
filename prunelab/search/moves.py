"""Moves of a search: from one choice of widths to the next, and when to take which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prunelab.search.space import Choice


def path(
    start: Choice, last: Choice, loss: Callable[[Choice], float], size: Callable[[Choice], float], stride: int
) -> Iterator[Choice]:
    """Choice after choice, in each one layer cut further: the one with the least added loss per size removed.

    A layer's price is measured on top of all that is cut already. It is measured again only when by what it was before
    the layer would be the next: prices mostly rise while layers are cut (Minoux 1978, Accelerated greedy algorithms for
    maximizing submodular set functions).

    Args:
        size: what is still to be removed; at 0 the path ends.
        stride: rungs of a step.
    """
    now = start
    price = {k: float("-inf") for k in range(len(start))}
    while size(now) > 0 and price:
        fresh: set[int] = set()
        while price and (k := min(price, key=lambda k: (price[k], k))) not in fresh:
            there = _further(now, last, k, stride, size)
            if there is None:
                del price[k]
            else:
                price[k] = (loss(there) - loss(now)) / (size(now) - size(there))
                fresh.add(k)
        if price:
            found = _further(now, last, k, stride, size)
            assert found is not None
            now = found
            yield now


def _further(now: Choice, last: Choice, k: int, stride: int, size: Callable[[Choice], float]) -> Choice | None:
    """The choice with one layer cut so many rungs further, more where that makes nothing smaller; None at its end."""
    for rung in range(min(now[k] + stride, last[k]), last[k] + 1):
        there = moved(now, k, rung)
        if rung > now[k] and size(there) < size(now):
            return there
    return None


def moved(choice: Choice, k: int, rung: int) -> Choice:
    """The choice with one layer on another rung."""
    return (*choice[:k], rung, *choice[k + 1 :])


def exchanged(
    now: Choice,
    last: Choice,
    loss: Callable[[Choice], float],
    fits: Callable[[Choice], bool],
    size: Callable[[Choice], float],
    most: int,
) -> Iterator[Choice]:
    """Better and better choices that fit: a layer gets channels back, and others pay for it.

    Args:
        size: of the network.
        most: exchanges at most.
    """
    for _ in range(most):
        better = min(_exchanges(now, last, loss, fits, size), key=loss, default=now)
        if loss(better) >= loss(now):
            return
        now = better
        yield now


def _exchanges(
    now: Choice,
    last: Choice,
    loss: Callable[[Choice], float],
    fits: Callable[[Choice], bool],
    size: Callable[[Choice], float],
) -> Iterator[Choice]:
    """The most promising ones: what gains most per size given back, paid where it costs least."""
    layers = range(len(now))
    given = [moved(now, k, now[k] - 1) for k in layers if now[k] > 0]
    taken = [moved(now, k, now[k] + 1) for k in layers if now[k] < last[k]]
    given.sort(key=lambda choice: (loss(choice) - loss(now)) / max(size(choice) - size(now), 1e-12))
    taken.sort(key=lambda choice: (loss(choice) - loss(now)) / max(size(now) - size(choice), 1e-12))
    payers = [next(k for k in layers if choice[k] != now[k]) for choice in taken[:_TRIED]]
    for choice in given[:_TRIED]:
        if fits(choice):
            yield choice
        for payer in payers:
            if choice[payer] >= now[payer]:
                paid = _paid(choice, last, payer, fits)
                if paid is not None:
                    yield paid


_TRIED = 4


def _paid(choice: Choice, last: Choice, payer: int, fits: Callable[[Choice], bool]) -> Choice | None:
    """The choice with one layer cut just as far that it fits; None where that is not to be had."""
    rungs: Sequence[int] = range(choice[payer] + 1, last[payer] + 1)
    return next((there for rung in rungs if fits(there := moved(choice, payer, rung))), None)
