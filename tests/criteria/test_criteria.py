"""Criteria: higher = keep, always; what each computes, and what a registered one of the user's own may not do."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support import Network
from torch import Tensor, nn

import prunelab as pl
from prunelab import zoo
from prunelab.criteria import registry
from prunelab.criteria.registry import scores

NETWORK = Network(zoo.lenet, (1, 28, 28))


@pytest.fixture(scope="module")
def program() -> pl.Program:
    return pl.trace(NETWORK.build(), NETWORK.images())


@pytest.fixture(scope="module")
def profile(program: pl.Program) -> pl.Profile:
    return pl.profile(program, NETWORK.images(40), cache=False, progress=False)


@pytest.fixture
def own() -> Iterator[None]:
    """Takes the criteria that a test registers out again."""
    before = dict(registry._CRITERIA)
    yield
    registry._CRITERIA.clear()
    registry._CRITERIA.update(before)


def test_those_there_are() -> None:
    assert set(pl.criteria_names()) >= {"l1", "l2", "random", "apoz", "mean_activation"}


@pytest.mark.parametrize(("name", "order"), [("l1", 1), ("l2", 2)])
def test_norms_of_filters(program: pl.Program, name: str, order: int) -> None:
    for layer in ("conv1", "conv2", "fc1"):
        weight = program.model.get_parameter(f"{layer}.weight").detach().flatten(1)
        expected = torch.linalg.vector_norm(weight, order, 1)
        assert np.allclose(scores(program, None, name, program.layer(layer)), expected, rtol=1e-12)


class Half(nn.Module):
    """A convolution whose channel 0 is always above zero, 1 always below, 2 now and then."""

    def __init__(self, after: nn.Module) -> None:
        super().__init__()
        self.conv, self.after, self.head = nn.Conv2d(1, 3, 1), after, nn.Linear(3, 2)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1, 1))
            self.conv.bias.copy_(torch.tensor([1.0, -1.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.after(self.conv(x)).mean((2, 3)))
        return logits


def test_apoz_counts_zeros_after_the_relu_and_its_sign_keeps_what_is_active() -> None:
    images = torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0]).view(5, 1, 1, 1).expand(5, 1, 2, 2).contiguous()
    program = pl.trace(Half(nn.ReLU()), images)
    profile = pl.profile(program, images, cache=False, progress=False)
    found = scores(program, profile, "apoz", program.layer("conv"))
    # Never zero, always zero, and zero on two of five images.
    assert found.tolist() == pytest.approx([0.0, -1.0, -0.4])
    kept = pl.Plan("apoz").set("conv", ratio=0.34).resolve(program, profile).kept["conv"]
    assert kept == (0, 2)
    assert scores(program, profile, "mean_activation", program.layer("conv")).tolist() == pytest.approx([1.0, 0.0, 1.2])


def test_apoz_is_measured_after_the_norm_not_before_it() -> None:
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([-5.0, 5.0, 5.0]))
    images = torch.ones(4, 1, 2, 2)
    program = pl.trace(Half(nn.Sequential(norm, nn.ReLU())), images)
    profile = pl.profile(program, images, cache=False, progress=False)
    assert scores(program, profile, "apoz", program.layer("conv")).tolist() == [-1.0, 0.0, 0.0]


def test_producers_of_a_stream_are_brought_to_one_scale_and_combined() -> None:
    program = pl.trace(zoo.resnet20("projection").double(), torch.randn(2, 3, 32, 32).double())
    stream = program.layer("layer3 stream")
    each = [program.model.get_parameter(f"{m}.weight").detach().abs().flatten(1).sum(1) for m in stream.members]
    assert len(each) == 4
    alike = torch.stack([norms / norms.square().mean().sqrt() for norms in each])
    wanted = {"mean": alike.mean(0), "max": alike.amax(0), "sum": alike.sum(0)}
    for how, expected in wanted.items():
        assert np.allclose(scores(program, None, "l1", stream, combine=how), expected, rtol=1e-12)


def test_random_is_seeded_by_plan_and_layer(program: pl.Program) -> None:
    first, second = (scores(program, None, "random", program.layer(n), 3) for n in ("conv1", "conv2"))
    assert np.array_equal(first, scores(program, None, "random", program.layer("conv1"), 3))
    assert not np.array_equal(first, scores(program, None, "random", program.layer("conv1"), 4))
    assert not np.array_equal(first, second[:20])
    assert (first >= 0).all()
    assert (first < 1).all()


@pytest.mark.usefixtures("own")
def test_one_of_the_users_own(program: pl.Program, profile: pl.Profile) -> None:
    @pl.register("max_weight", needs="weights")
    def max_weight(filters: np.ndarray) -> np.ndarray:
        return abs(filters).max(axis=1)

    @pl.register("spread", needs="statistics")
    def spread(statistics: object) -> np.ndarray:
        return statistics.variance  # type: ignore[attr-defined, no-any-return]

    assert {"max_weight", "spread"} <= set(pl.criteria_names())
    weight = program.model.get_parameter("conv1.weight").detach().abs().flatten(1)
    assert np.array_equal(scores(program, None, "max_weight", program.layer("conv1")), weight.amax(1))
    selection = pl.Plan("spread").set("conv1", ratio=0.5).resolve(program, profile)
    assert len(selection.kept["conv1"]) == 10


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("needs", ["weights", "statistics"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, "one number", "too few", "a matrix"])
def test_scores_that_are_none_are_refused(program: pl.Program, profile: pl.Profile, needs: str, wrong: object) -> None:
    answers = {"one number": np.float64(1), "too few": np.ones(3), "a matrix": np.ones((20, 2))}

    @pl.register("broken", needs=needs)
    def broken(_: object) -> np.ndarray:
        return answers[wrong] if isinstance(wrong, str) else np.r_[np.ones(19), wrong]

    with pytest.raises(pl.PruneLabError, match="'broken' gave scores for layer 'conv1' that are not 20 finite"):
        scores(program, profile, "broken", program.layer("conv1"))


def test_unknown_criterion_names_the_nearest(program: pl.Program) -> None:
    with pytest.raises(pl.PruneLabError, match="no criterion 'mean'; the nearest names are 'mean_activation'"):
        scores(program, None, "mean", program.layer("conv1"))


def test_a_profile_of_another_network_is_refused(profile: pl.Profile) -> None:
    other = pl.trace(zoo.LeNet((20, 40, 500)).double(), NETWORK.images())
    with pytest.raises(pl.PruneLabError, match="profile is of another network"):
        scores(other, profile, "apoz", other.layer("conv1"))
