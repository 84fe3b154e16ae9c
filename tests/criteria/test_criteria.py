"""Criteria by hand-computed examples, their sign, and the registry."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

import prunelab as pl
from prunelab.criteria import registry


class Two(nn.Module):
    """Two filters on one pixel, a ReLU, and a reader."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 1)
        self.head = nn.Conv2d(3, 2, 1)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, -2.0, 0.5]).reshape(3, 1, 1, 1))
            self.conv.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x))).mean((2, 3))


@pytest.fixture
def program() -> pl.Program:
    return pl.trace(Two(), torch.zeros(2, 1, 2, 2))


@pytest.fixture
def profile(program: pl.Program) -> pl.Profile:
    # Three of four pixels are positive: the first filter is zero at one in four, the second at three in four.
    images = torch.tensor([[1.0, 2.0, 3.0, -4.0], [5.0, 6.0, 7.0, -8.0]]).reshape(2, 1, 2, 2)
    return pl.profile(program, images, cache=False, progress=False)


def scores(program: pl.Program, profile: pl.Profile | None, name: str) -> list[float]:
    return registry.scores(program, profile, name, program.layer("conv")).tolist()


def test_by_hand(program: pl.Program, profile: pl.Profile) -> None:
    assert scores(program, None, "l1") == [1.0, 2.0, 0.5]
    assert scores(program, None, "l2") == [1.0, 2.0, 0.5]
    # After the ReLU, and higher = keep: the channel with the most zeros has the lowest score.
    third = [max(0.0, 0.5 * x + 1) for x in (1, 2, 3, -4, 5, 6, 7, -8)]
    assert scores(program, profile, "apoz") == [-0.25, -0.75, -0.25]
    assert scores(program, profile, "mean_activation") == pytest.approx([24 / 8, 24 / 8, sum(third) / 8])


def test_random_is_seeded_by_layer(program: pl.Program) -> None:
    assert scores(program, None, "random") == scores(program, None, "random")
    other = registry.scores(program, None, "random", program.layer("conv"), seed=1).tolist()
    assert other != scores(program, None, "random")


@pytest.fixture
def own() -> Iterator[str]:
    @pl.register("largest_weight", needs="weights")
    def largest(filters: np.ndarray) -> np.ndarray:
        return np.abs(filters).max(axis=1)

    yield "largest_weight"
    registry._CRITERIA.pop("largest_weight")


def test_a_criterion_of_the_users_own(program: pl.Program, own: str) -> None:
    assert scores(program, None, own) == [1.0, 2.0, 0.5]
    assert pl.Plan(own).set("conv", ratio=0.34).resolve(program).kept == {"conv": (0, 1)}


def test_refusals(program: pl.Program) -> None:
    with pytest.raises(pl.PruneLabError, match="needs a profile"):
        scores(program, None, "apoz")
    with pytest.raises(pl.PruneLabError, match="mean_activation"):
        scores(program, None, "mean_activations")
