"""Moves of a search: from one choice of widths to the next, and when to take which."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prunelab.search.space import Choice

Measure = Callable[[Choice], float]

_WORTH_IT = 0.99
"""What an exchange must bring the loss down to, of what it was: less is the chance of the images."""
_TRIED = 12
"""Exchanges that are tried in vain before all layers are measured again."""
_LOOKED_AT = 8
"""Layers that are looked at on either side of an exchange."""
_TINY = 1e-12


def path(start: Choice, last: Choice, loss: Measure, size: Measure, stride: int) -> Iterator[Choice]:
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


def _further(now: Choice, last: Choice, k: int, stride: int, size: Measure) -> Choice | None:
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
    now: Choice, last: Choice, loss: Measure, fits: Callable[[Choice], bool], size: Measure, most: int
) -> Iterator[Choice]:
    """Better and better choices that fit: one layer gets channels back, and another pays for it.

    What a rung is worth is measured in every layer, then exchanges are tried in the order of what they promise. After
    one that keeps its promise only the two layers in it are measured again; all are, before the search gives up.

    Args:
        size: of the network.
        most: exchanges that are looked for.
    """
    layers = range(len(now))
    known, fresh = _worths(now, last, layers, loss, size), True
    for _ in range(most):
        tried = _promising(now, last, known, fits, size)
        found = next((there for there in tried if loss(there) < _WORTH_IT * loss(now)), None)
        if found is not None:
            changed = [k for k in layers if found[k] != now[k]]
            now, fresh = found, False
            yield now
        elif fresh:
            return
        else:
            changed, fresh = list(layers), True
        known = {**known, **_worths(now, last, changed, loss, size)}


@dataclass(frozen=True)
class _Worth:
    """What a rung of one layer is worth: change of loss per size when it is given back, and when it is taken.

    Infinite where there is none.
    """

    given: float
    taken: float


def _worths(now: Choice, last: Choice, layers: Iterable[int], loss: Measure, size: Measure) -> dict[int, _Worth]:
    def worth(k: int, rung: int) -> float:
        if not 0 <= rung <= last[k]:
            return math.inf
        there = moved(now, k, rung)
        return (loss(there) - loss(now)) / max(abs(size(there) - size(now)), _TINY)

    return {k: _Worth(worth(k, now[k] - 1), worth(k, now[k] + 1)) for k in layers}


def _promising(
    now: Choice,
    last: Choice,
    known: Mapping[int, _Worth],
    fits: Callable[[Choice], bool],
    size: Measure,
) -> list[Choice]:
    """The exchanges that promise most, best first."""
    promised: list[tuple[float, Choice]] = []
    givers = sorted((k for k in known if now[k] > 0), key=lambda k: known[k].given)[:_LOOKED_AT]
    payers = sorted((k for k in known if now[k] < last[k]), key=lambda k: known[k].taken)[:_LOOKED_AT]
    for giver in givers:
        there = moved(now, giver, now[giver] - 1)
        gain = known[giver].given * (size(there) - size(now))
        if fits(there):
            promised.append((gain, there))
        for payer in payers:
            paid = None if payer == giver else _paid(there, last, payer, fits)
            if paid is not None:
                promised.append((gain + known[payer].taken * (size(there) - size(paid)), paid))
    return [choice for _, choice in sorted(promised)[:_TRIED]]


def _paid(choice: Choice, last: Choice, payer: int, fits: Callable[[Choice], bool]) -> Choice | None:
    """The choice with one layer cut just as far that it fits; None where that is not to be had."""
    rungs = range(choice[payer] + 1, last[payer] + 1)
    return next((there for rung in rungs if fits(there := moved(choice, payer, rung))), None)
