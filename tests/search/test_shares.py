"""Power laws are found again, one price is a minimum, and paths go between one ratio and one price."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from prunelab.search.shares import MOST, RATIOS, Curve, Ratios, between, fitted, one_price, one_ratio, priced_path

CURVES = {"cheap": Curve(0.01, 2.0, 100.0), "dear": Curve(0.1, 3.0, 100.0), "small": Curve(0.02, 1.5, 10.0)}


def left(ratios: Ratios) -> float:
    return sum(curve.size * (1 - ratios[name]) for name, curve in CURVES.items())


def lost(ratios: Ratios) -> float:
    return sum(curve.scale * ratios[name] ** curve.power for name, curve in CURVES.items())


def test_a_power_law_is_found_again_and_its_price_is_the_slope() -> None:
    curve = fitted([0.2 * ratio**2.5 for ratio in RATIOS], size=100.0)
    assert (curve.scale, curve.power) == (pytest.approx(0.2), pytest.approx(2.5))
    step = 1e-6
    slope = 0.2 * ((0.3 + step) ** 2.5 - (0.3 - step) ** 2.5) / (2 * step) / 100
    assert curve.ratio(slope) == pytest.approx(0.3)
    assert curve.ratio(1e9) == MOST


def test_a_layer_of_two_widths_has_a_curve_through_its_one_point() -> None:
    curve = fitted([0.03], size=5.0, ratios=(0.5,))
    assert curve.scale * 0.5**curve.power == pytest.approx(0.03)


def test_a_layer_that_loses_nothing_is_cut_as_far_as_it_goes() -> None:
    curve = fitted([0.0, 0.0, 0.0, 0.0], size=100.0)
    assert curve.ratio(1e-4) == MOST


def test_one_price_loses_least_at_its_size() -> None:
    # Every other choice of the same size on a fine grid loses as much or more.
    priced = one_price(CURVES, lambda ratios: left(ratios) <= 130)
    assert left(priced) == pytest.approx(130, abs=1e-6)
    grid = np.linspace(0, MOST, 96)
    others = []
    for cheap, small in itertools.product(grid, grid):
        dear = (210 - 130 - 100 * cheap - 10 * small) / 100
        if 0 <= dear <= MOST:
            others.append(lost({"cheap": cheap, "dear": dear, "small": small}))
    assert lost(priced) <= min(others) * (1 + 1e-9)
    assert min(others) < lost(one_ratio(tuple(CURVES), lambda ratios: left(ratios) <= 130))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, 1.3])
def test_between_one_ratio_and_one_price_all_have_the_size(share: float) -> None:
    def fits(ratios: Ratios) -> bool:
        return left(ratios) <= 150

    even, priced = one_ratio(tuple(CURVES), fits), one_price(CURVES, fits)
    found = between(even, priced, share, fits)
    assert left(found) == pytest.approx(150, abs=1e-6)
    if share in (0.0, 1.0):
        assert found == pytest.approx(even if share == 0 else priced, abs=1e-6)
    elif share > 1:
        assert found["cheap"] > priced["cheap"]
    else:
        assert even["cheap"] < found["cheap"] < priced["cheap"]


def test_the_path_takes_what_loses_least_and_ends_where_nothing_fits() -> None:
    rungs = np.linspace(0, 0.9, 10)

    def nearest(ratios: Ratios) -> tuple[int, ...]:
        return tuple(int(np.abs(rungs - ratios[name]).argmin()) for name in CURVES)

    def ratios(choice: tuple[int, ...]) -> Ratios:
        return {name: float(rungs[rung]) for name, rung in zip(CURVES, choice, strict=True)}

    found = list(
        priced_path(
            CURVES,
            nearest,
            lambda choice, part: left(ratios(choice)) <= 210 * (1 - part),
            lambda choice: lost(ratios(choice)),
            parts=20,
        )
    )
    sizes = [left(ratios(choice)) for choice in found]
    # 21 are left at the least, a tenth.
    assert len(found) == 18
    assert all(size <= 210 * (1 - (k + 1) / 20) + 1e-9 for k, size in enumerate(sizes))
    even = one_ratio(tuple(CURVES), lambda r: left(ratios(nearest(r))) <= 105)
    assert lost(ratios(found[9])) < lost(ratios(nearest(even)))
