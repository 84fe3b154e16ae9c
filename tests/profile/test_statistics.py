"""Statistics: equal to numpy in float64, and to themselves when the data come in parts."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from prunelab.profile.statistics import BINS, Statistics, edges, measure

INTEGERS = ("images", "positions", "zeros", "histogram")


def some(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, relu: bool = True) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3.0
    return (values.relu() if relu else values).to(dtype)


def by_numpy(value: Tensor, axis: int) -> dict[str, np.ndarray]:
    x = np.moveaxis(value.double().numpy(), axis, 1)
    x = x.reshape(*x.shape[:2], -1)
    pooled = x.mean(2)
    histogram = [np.histogram(np.clip(p, edges()[0], edges()[-1]), edges())[0] for p in pooled.T]
    return {
        "images": np.array(x.shape[0]),
        "positions": np.array(x.shape[0] * x.shape[2]),
        "zeros": (x == 0).sum((0, 2)),
        "sum": x.sum((0, 2)),
        "sum_abs": np.abs(x).sum((0, 2)),
        "sum_squares": (x**2).sum((0, 2)),
        "pooled_sum": pooled.sum(0),
        "pooled_squares": (pooled**2).sum(0),
        "histogram": np.stack(histogram),
    }


def assert_equal(found: Statistics, expected: dict[str, np.ndarray], tolerance: float) -> None:
    scale = {"sum": "sum_abs", "pooled_sum": "sum_abs"}
    for name, ours in found.arrays().items():
        if name in INTEGERS:
            assert np.array_equal(ours, expected[name]), name
        else:
            # Sums of both signs may cancel: what counts is the size of what was added up.
            size = np.abs(expected[scale.get(name, name)]).max()
            assert np.abs(ours - expected[name]).max() <= tolerance * size, name


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(("shape", "axis"), [((5, 4, 6, 7), 1), ((9, 3), 1), ((4, 6, 5), 2), ((2, 3, 2, 2, 3), 1)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_equal_to_numpy(shape: tuple[int, ...], axis: int, relu: bool, dtype: torch.dtype, tolerance: float) -> None:
    value = some(0, shape, dtype, relu)
    assert_equal(measure(value, axis, nonnegative=relu), by_numpy(value, axis), tolerance)
    assert_equal(measure(value, axis), by_numpy(value, axis), tolerance)


def test_large_maps_are_summed_as_exactly_as_small_ones() -> None:
    value = some(1, (3, 2, 300, 301), torch.float32)
    assert_equal(measure(value, 1), by_numpy(value, 1), 1e-6)


@given(st.integers(0, 2**20), st.lists(st.integers(1, 7), min_size=1, max_size=6), st.booleans(), st.booleans())
def test_parts_merged_are_the_whole(seed: int, sizes: list[int], relu: bool, double: bool) -> None:
    value = some(seed, (sum(sizes), 5, 4, 3), torch.float64 if double else torch.float32, relu)
    whole = measure(value, 1)
    first, *rest = (measure(part, 1) for part in value.split(sizes))
    for other in rest:
        first = first.merge(other)
    assert_equal(first, whole.arrays(), 1e-12)


def test_merging_is_associative_and_commutative() -> None:
    a, b, c = (measure(some(seed, (4, 3, 5, 5), torch.float32), 1) for seed in range(3))
    assert_equal(a.merge(b).merge(c), c.merge(b.merge(a)).arrays(), 1e-14)


def test_derived_numbers() -> None:
    value = some(2, (6, 4, 5, 5))
    found, x = measure(value, 1), value.numpy()
    assert np.allclose(found.apoz, (x == 0).mean((0, 2, 3)), rtol=1e-14)
    assert np.allclose(found.mean, x.mean((0, 2, 3)), rtol=1e-14)
    assert np.allclose(found.mean_abs, np.abs(x).mean((0, 2, 3)), rtol=1e-14)
    assert np.allclose(found.variance, x.var((0, 2, 3)), rtol=1e-12)
    assert np.allclose(found.pooled_variance, x.mean((2, 3)).var(0), rtol=1e-10)


def test_variance_of_a_constant_is_zero_not_negative() -> None:
    found = measure(torch.full((7, 2, 3, 3), 0.1, dtype=torch.float64), 1)
    assert (found.variance >= 0).all()
    assert (found.pooled_variance >= 0).all()
    assert found.variance.max() < 1e-15


def test_every_image_falls_into_one_bin() -> None:
    value = some(3, (50, 3, 2, 2), relu=False) * 1e5
    found = measure(value, 1)
    assert found.histogram.shape == (3, BINS)
    assert (found.histogram.sum(1) == 50).all()
    zeros = measure(torch.zeros(4, 2, 3, 3), 1)
    at = int(zeros.histogram[0].argmax())
    assert zeros.histogram[0, at] == 4
    assert edges()[at] <= 0 < edges()[at + 1]


def test_minus_zero_is_a_zero() -> None:
    assert measure(torch.tensor([[-0.0, 1.0], [0.0, -0.0]]), 1).zeros.tolist() == [2, 1]


def test_what_is_not_finite_shows_in_the_sum() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        value = some(4, (3, 2, 4))
        value[1, 1, 2] = bad
        assert np.isfinite(measure(value, 1).sum).tolist() == [True, False]


def test_storing_loses_nothing() -> None:
    found = measure(some(5, (4, 3, 2)), 1)
    again = Statistics.from_arrays(found.arrays())
    for field in fields(Statistics):
        ours, theirs = getattr(found, field.name), getattr(again, field.name)
        assert np.array_equal(ours, theirs)
        assert type(ours) is type(theirs)
