"""Each criterion on numbers that can be worked out by hand, and what holds for all numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from prunelab.criteria.activations import entropy, feature_rank, output_energy, variance
from prunelab.criteria.combining import combined
from prunelab.criteria.gradients import taylor, taylor_weight
from prunelab.criteria.similarity import geometric_median, independence, redundancy
from prunelab.criteria.weights import bn_scale, l1, l2
from prunelab.profile.gates import Gates
from prunelab.profile.statistics import measure

FILTERS = np.array([[3.0, -4.0], [0.0, 0.0], [3.0, 0.0]])


def test_norms() -> None:
    assert l1(FILTERS).tolist() == [7.0, 0.0, 3.0]
    assert l2(FILTERS).tolist() == [5.0, 0.0, 3.0]


def test_scale_of_the_norm_has_no_sign() -> None:
    assert bn_scale(np.array([-2.0, 0.0, 1.0])).tolist() == [2.0, 0.0, 1.0]


def test_geometric_median_measures_between_the_weights_not_their_magnitudes() -> None:
    # Distances: first to second 5, first to third 4, second to third 3.
    assert geometric_median(FILTERS).tolist() == pytest.approx([9.0, 8.0, 7.0], rel=1e-15)
    # Opposite filters are far apart; between magnitudes they would be the same.
    assert geometric_median(np.array([[1.0], [-1.0]])).tolist() == [2.0, 2.0]


def test_geometric_median_of_filters_that_hardly_differ() -> None:
    near = np.ones((2, 40)) * 1e3
    near[1, 0] += 1e-7
    assert geometric_median(near) == pytest.approx([1e-7, 1e-7], rel=1e-5)


def test_variance_is_that_of_the_mean_response_not_of_the_map() -> None:
    # Two images of two positions: means 2 and 4, though values reach from 0 to 8.
    value = torch.tensor([[[0.0, 4.0]], [[0.0, 8.0]]], dtype=torch.float64)
    assert variance(measure(value, 1)).tolist() == [1.0]


def test_entropy_in_nats() -> None:
    spread = np.arange(16.0)
    half = np.repeat([0.0, 1.0], 8)
    quarter = np.array([0.0] * 12 + [5.0] * 4)
    found = entropy(np.stack([spread, half, quarter, np.full(16, 3.0)], 1))
    three = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found.tolist() == pytest.approx([math.log(16), math.log(2), three, 0.0], rel=1e-14)


def test_rank_of_maps() -> None:
    one = torch.outer(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, 0.0]))
    maps = torch.stack([one, torch.eye(3), torch.zeros(3, 3)])
    # The second image has the first channel at rank 3.
    images = torch.stack([maps, torch.stack([torch.eye(3), torch.eye(3), torch.zeros(3, 3)])])
    assert feature_rank(images).tolist() == [2.0, 3.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rank_of_maps_in_half_precision_is_numerical_to_that_precision(dtype: torch.dtype) -> None:
    # Rounded, a projection on k dimensions has full rank for float32.
    basis = torch.linalg.qr(torch.randn(6, 8, 8, generator=torch.Generator().manual_seed(0)))[0]
    maps = torch.stack([basis[:, :, :k] @ basis[:, :, :k].mT for k in (1, 3, 8)], dim=1).to(dtype)
    assert feature_rank(maps).tolist() == [1.0, 3.0, 8.0]
    assert feature_rank(maps.float())[1] > 7


@pytest.mark.parametrize("shape", [(4, 2), (4, 2, 5), (4, 2, 1, 1)])
def test_a_map_of_one_row_or_value_has_rank_one_unless_it_is_zero(shape: tuple[int, ...]) -> None:
    maps = torch.ones(shape)
    maps[:, 1] = 0
    maps[0, 1] = 1
    assert feature_rank(maps).tolist() == [1.0, 0.25]


def test_redundancy() -> None:
    a = np.array([1.0, -1.0, 1.0, -1.0])
    b = np.array([1.0, 1.0, -1.0, -1.0])
    mixed = 3 * a + 4 * b
    # The first two are uncorrelated; the third's correlations with them are 0.6 and −0.8; the fourth is constant.
    found = redundancy(np.stack([a, b, -mixed, np.full(4, 0.1)], 1))
    assert found.tolist() == pytest.approx([0.4, 0.2, 0.2, 0.0], abs=1e-14)
    assert redundancy(np.array([[1.0], [2.0]])).tolist() == [1.0]


def test_independence_of_a_diagonal_matrix_is_each_singular_value() -> None:
    maps = torch.diag(torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64)).unsqueeze(0)
    assert independence(maps).tolist() == pytest.approx([3.0, 2.0, 0.0], abs=1e-7)


@pytest.mark.parametrize("shape", [(3, 6, 4, 5), (3, 9, 2, 2), (2, 5), (2, 1, 3, 3)])
def test_independence_against_the_norm_with_the_row_zeroed(shape: tuple[int, ...]) -> None:
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = []
    for image in maps.reshape(shape[0], shape[1], -1):
        whole = torch.linalg.matrix_norm(image, "nuc")
        rows = []
        for c in range(shape[1]):
            without = image.clone()
            without[c] = 0
            rows.append(whole - torch.linalg.matrix_norm(without, "nuc"))
        expected.append(torch.stack(rows))
    assert torch.allclose(torch.from_numpy(independence(maps)), torch.stack(expected).mean(0), rtol=1e-6, atol=1e-6)


def test_taylor_is_a_mean_of_absolute_values_with_norm_one() -> None:
    # Two images of four positions: |t| sums of 24 and 32 are means of 3 and 4.
    gates = Gates(2, 4, np.array([24.0, 32.0]), np.array([7.0, 8.0]))
    assert taylor(gates).tolist() == pytest.approx([0.6, 0.8], rel=1e-15)
    assert taylor_weight(gates).tolist() == [3.5, 4.0]
    assert taylor(Gates(2, 4, np.zeros(2), np.zeros(2))).tolist() == [0.0, 0.0]


def test_output_energy() -> None:
    value = torch.tensor([[[3.0, 3.0], [0.0, 1.0]]], dtype=torch.float64)
    found = output_energy(measure(value, 1), np.array([2.0, 4.0]))
    assert found.tolist() == pytest.approx([6.0, 4 * math.sqrt(0.5)], rel=1e-15)


# What holds for all numbers ---------------------------------------------

RANDOM = torch.Generator().manual_seed(1)
VALUES = torch.randn(40, 7, 4, 4, generator=RANDOM, dtype=torch.float64).relu()
POOLED = VALUES.mean((2, 3)).numpy()

OF_FILTERS = (l1, l2, geometric_median)
OF_POOLED = (entropy, redundancy)
OF_MAPS = (feature_rank, independence)


@pytest.mark.parametrize("criterion", OF_FILTERS)
def test_scores_of_filters_go_with_them_and_with_their_scale(criterion: Callable[[np.ndarray], np.ndarray]) -> None:
    filters = np.random.default_rng(0).normal(size=(9, 12))
    order = np.random.default_rng(1).permutation(9)
    assert np.allclose(criterion(filters[order]), criterion(filters)[order], rtol=1e-12)
    assert np.allclose(criterion(-3 * filters), 3 * criterion(filters), rtol=1e-12)


@pytest.mark.parametrize("criterion", OF_POOLED)
def test_scores_of_responses_go_with_them_whatever_their_scale(criterion: Callable[[np.ndarray], np.ndarray]) -> None:
    order = np.random.default_rng(1).permutation(7)
    found = criterion(POOLED)
    assert np.allclose(criterion(POOLED[:, order]), found[order], rtol=1e-10)
    # Powers of two, so that no value changes its bin by rounding.
    assert np.allclose(criterion(POOLED * 2.0 ** np.arange(7)), found, rtol=1e-10)


@pytest.mark.parametrize("criterion", OF_MAPS)
def test_scores_of_maps_go_with_them(criterion: Callable[[Tensor], np.ndarray]) -> None:
    order = np.random.default_rng(1).permutation(7)
    assert np.allclose(criterion(VALUES[:, order.tolist()]), criterion(VALUES)[order], rtol=1e-6)


def test_the_rank_does_not_know_the_scale() -> None:
    assert feature_rank(1e-6 * VALUES).tolist() == feature_rank(VALUES).tolist()


@pytest.mark.parametrize(
    "found",
    [
        geometric_median(np.zeros((3, 4))),
        geometric_median(np.ones((1, 4))),
        entropy(np.zeros((5, 3))),
        redundancy(np.zeros((5, 3))),
        redundancy(np.full((5, 3), 0.1)),
        redundancy(np.ones((1, 3))),
        feature_rank(torch.zeros(2, 3, 4, 4)),
        independence(torch.zeros(2, 3, 4, 4)),
        independence(torch.ones(2, 3, 4, 4)),
        combined([np.zeros(3), np.ones(3)], "mean"),
        combined([np.full(3, 1e300), np.full(3, 1e-300)], "max"),
    ],
)
def test_nothing_is_ever_nan(found: np.ndarray) -> None:
    assert np.isfinite(found).all()


def test_members_are_brought_to_one_scale_and_combined_as_named() -> None:
    one, other = np.array([3.0, 4.0]), np.array([-100.0, 100.0])
    unit, sign = one / math.sqrt(12.5), np.array([-1.0, 1.0])
    assert combined([one], "sum").tolist() == [3.0, 4.0]
    assert combined([one, other], "mean") == pytest.approx((unit + sign) / 2)
    assert combined([one, other], "sum") == pytest.approx(unit + sign)
    assert combined([one, other], "max") == pytest.approx([unit[0], unit[1]])
