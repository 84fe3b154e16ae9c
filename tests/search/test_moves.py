"""Moves of a search on losses that are known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from prunelab.search.moves import exchanged, path
from prunelab.search.run import last_that
from prunelab.search.space import Choice

LAST = (4, 4, 4)
WEIGHTS = (5.0, 3.0, 2.0)


def size(choice: Choice) -> float:
    """A rung is worth a unit in the first layer, two in the second, three in the third."""
    return sum((k + 1) * (top - rung) for k, (rung, top) in enumerate(zip(choice, LAST, strict=True)))


def alone(choice: Choice) -> float:
    """Layers that do not see each other, each the more sensitive the further it is cut."""
    return sum(weight * rung**2 for weight, rung in zip(WEIGHTS, choice, strict=True))


def together(choice: Choice) -> float:
    """The first two layers stand in for each other: cutting both costs more than either."""
    return alone(choice) + 9.0 * choice[0] * choice[1]


def within(budget: float) -> Callable[[Choice], bool]:
    return lambda choice: size(choice) <= budget


def lack(budget: float) -> Callable[[Choice], float]:
    return lambda choice: max(size(choice) - budget, 0.0)


def least(loss: Callable[[Choice], float], budget: float) -> float:
    """The best loss there is, by trying everything."""
    return min(loss(choice) for choice in product(*(range(top + 1) for top in LAST)) if size(choice) <= budget)


def test_the_path_takes_the_least_loss_per_size_at_every_step() -> None:
    now: Choice = (0, 0, 0)
    for there in path(now, LAST, together, lack(4.0), 1):
        prices = []
        for k, rung in enumerate(now):
            if rung < LAST[k]:
                after = (*now[:k], rung + 1, *now[k + 1 :])
                prices.append(((together(after) - together(now)) / (lack(4.0)(now) - lack(4.0)(after)), after))
        assert there == min(prices)[1]
        now = there
    assert size(now) <= 4.0


def test_the_path_ends_where_nothing_can_be_cut_any_more() -> None:
    *_, end = path((0, 0, 0), LAST, alone, lack(-1.0), 2)
    assert end == LAST


def test_a_price_is_measured_again_only_when_its_layer_would_be_next() -> None:
    asked: list[Choice] = []

    def loss(choice: Choice) -> float:
        asked.append(choice)
        return alone(choice)

    steps = list(path((0, 0, 0), LAST, loss, lack(4.0), 1))
    assert len(set(asked)) < 3 * len(steps)


@pytest.mark.parametrize("loss", [alone, together])
@pytest.mark.parametrize("budget", [18.0, 12.0, 7.0])
def test_exchanges_come_to_the_best_choice_from_a_bad_one(loss: Callable[[Choice], float], budget: float) -> None:
    start = next(c for c in product(*(range(top + 1) for top in LAST)) if size(c) <= budget)
    found = list(exchanged(start, LAST, loss, within(budget), size, most=40))
    losses = [loss(choice) for choice in (start, *found)]
    assert losses == sorted(losses, reverse=True)
    assert all(size(choice) <= budget for choice in found)
    assert losses[-1] == least(loss, budget)


def test_the_last_that_is_granted_is_found_by_halving() -> None:
    plans = list(range(100))
    for edge in (0, 1, 57, 100):
        asked: list[int] = []

        def granted(plan: int, edge: int = edge, asked: list[int] = asked) -> bool:
            asked.append(plan)
            return plan < edge

        assert last_that(plans, granted) == (plans[edge - 1] if edge else None)
        assert len(asked) <= 7
