"""95 % intervals: against independent formulas, and by simulation of how often they hold what they should."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from prunelab.intervals import flip_half_width, half_width, paired_half_width, student95, wilson

Z = 1.959963984540054
BATCH = 256


@given(st.integers(1, 20_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_its_equation(counts: tuple[int, int]) -> None:
    right, n = counts
    low, high = wilson(right, n)
    share = right / n
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1 and bound != share:
            # The bound is the true share at which what was seen lies exactly z standard errors away.
            assert abs(share - bound) == pytest.approx(Z * math.sqrt(bound * (1 - bound) / n), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("right", "n", "expected"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_as_published(right: int, n: int, expected: tuple[float, float]) -> None:
    """Newcombe 1998, 'Two-sided confidence intervals for the single proportion', table I, method 3."""
    assert wilson(right, n) == pytest.approx(expected, abs=5e-5)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300), st.integers(0, 500))
def test_a_change_varies_as_the_outcomes_do_with_one_flip_more_each_way(
    outcomes: list[tuple[bool, bool]], more: int
) -> None:
    now, before = (np.array(column) for column in zip(*outcomes, strict=True))
    changes = np.array([*(int(a) - int(b) for a, b in outcomes), 1, -1])
    n, total = len(outcomes), len(outcomes) + more
    plain = Z * changes.std() * math.sqrt(n + 2) / n
    assert paired_half_width(now, before) == pytest.approx(plain, rel=1e-12)
    expected = plain * math.sqrt(more / (total - 1)) + 0.5 / total if more else 0.0
    assert paired_half_width(now, before, total) == pytest.approx(expected, rel=1e-12)


def test_of_a_set_seen_whole_nothing_is_uncertain() -> None:
    random = np.random.default_rng(0)
    now, before = random.random((2, 300)) < 0.8
    assert paired_half_width(now, before, 300) == half_width(random.random(300), 300) == 0
    assert paired_half_width(now, before, 301) > 0 < half_width(random.random(300), 301)


@pytest.mark.parametrize(("freedom", "point"), [(2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (120, 1.9799)])
def test_students_points_as_published(freedom: int, point: float) -> None:
    """Abramowitz and Stegun 1964, table 26.10."""
    within = {2: 0.031, 3: 0.0075}.get(freedom, 0.0015)
    assert student95(freedom) == pytest.approx(point, rel=within)


# Simulations ---------------------------------------------


def held(total: int, gained: float, lost: float, runs: int) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Whether intervals hold the whole set's change, and their half widths, as a run goes through a random order of it.

    Args:
        gained: share of the set that only the pruned network gets right; ``lost`` that only the unpruned one does.

    Returns:
        two arrays of shape ``(runs, total)``: column ``n − 1`` after ``n`` images.
    """
    more, fewer = round(gained * total), round(lost * total)
    changes = np.repeat(np.array([1, -1, 0], np.int8), [more, fewer, total - more - fewer])
    orders = np.random.default_rng(0).permuted(np.tile(changes, (runs, 1)), axis=1)
    up, down = (np.cumsum(orders == sign, axis=1, dtype=np.int32) for sign in (1, -1))
    n = np.arange(1, total + 1)
    half = flip_half_width(up, down, n, total)
    return np.abs((up - down) / n - (more - fewer) / total) <= half + 1e-12, half


RATES = [(0.0, 0.0), (0.0, 0.002), (0.002, 0.002), (0.0, 0.02), (0.01, 0.03), (0.1, 0.1), (0.02, 0.3), (0.05, 0.6)]


@pytest.mark.parametrize(("gained", "lost"), RATES)
def test_intervals_hold_the_whole_sets_change_after_any_number_of_images(gained: float, lost: float) -> None:
    for total in (40, 300, 2000):
        covers, _ = held(total, gained, lost, runs=2000)
        rates = covers.mean(0)
        assert rates.min() > 0.925, 1 + rates.argmin()
        assert rates[-1] == 1
        # Nor are they wider than they say, once there are flips enough for a normal distribution.
        if total == 2000 and gained + lost >= 0.2:
            assert 0.94 < rates[255:-250].mean() < 0.965


@pytest.mark.parametrize("half", [0.05, 0.02, 0.012, 0.006])
@pytest.mark.parametrize(("gained", "lost"), RATES)
def test_intervals_hold_it_where_they_end_the_run(gained: float, lost: float, half: float) -> None:
    covers, halves = held(4000, gained, lost, runs=1000)
    looks = [*range(BATCH - 1, 3999, BATCH), 3999]
    first = (halves[:, looks] <= half).argmax(1)
    assert covers[:, looks][np.arange(1000), first].mean() > 0.925


@pytest.mark.parametrize(("total", "low", "high"), [(2_000, 0.77, 0.85), (10_000, 0.53, 0.62)])
def test_of_many_estimates_not_every_one_holds_it(total: int, low: float, high: float) -> None:
    """What ``Estimate.half`` says of somebody who waits for the estimate that suits them."""
    covers, _ = held(total, 0.02, 0.3, runs=500)
    looks = [*range(BATCH - 1, total - 1, BATCH), total - 1]
    assert low < covers[:, looks].all(1).mean() < high


@pytest.mark.parametrize("n", [3, 5, 20, 256, 900, 999])
@pytest.mark.parametrize("kind", ["even", "skewed"])
def test_intervals_of_a_score_hold_the_whole_sets_mean(kind: str, n: int) -> None:
    random, total = np.random.default_rng(0), 1000
    scores = random.normal(0, 0.3, total) if kind == "even" else random.gamma(2.0, 1.0, total)
    drawn = random.permuted(np.tile(scores, (1500, 1)), axis=1)[:, :n]
    covers = [abs(part.mean() - scores.mean()) <= half_width(part, total) for part in drawn]
    assert (0.935 if kind == "even" else 0.88 if n < 20 else 0.91) < np.mean(covers) < 0.972


def test_two_images_say_nothing_of_a_scores_spread() -> None:
    assert half_width(np.array([0.3, 0.4])) == math.inf
