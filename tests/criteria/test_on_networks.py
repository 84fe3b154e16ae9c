"""Criteria on networks: every kind of layer gets its scores, and what is carried back or gathered is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support import Network, shaken
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import prunelab as pl
from prunelab import zoo
from prunelab.criteria.propagation import importance
from prunelab.criteria.registry import get, scores


class Block(nn.Module):
    """Depthwise, grouped and pointwise convolutions around an addition, a flattened map and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.pointwise = nn.Conv2d(8, 8, 1, bias=False)
        self.last = nn.Conv2d(8, 6, 3)
        self.hidden, self.head = nn.Linear(6 * 16, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.pointwise(self.grouped(self.depthwise(x)).relu())).relu()
        logits: Tensor = self.head(self.hidden(self.last(x).relu().flatten(1)).tanh())
        return logits


NETWORKS = {
    "block": Network(Block, (3, 6, 6)),
    "resnet": Network(lambda: zoo.resnet.ResNet(8, "projection"), (3, 16, 16)),
    "lenet": Network(lambda: zoo.LeNet((4, 6, 10)), (1, 28, 28)),
}


def known(network: Network, count: int = 24) -> tuple[pl.Program, pl.Profile]:
    program = pl.trace(network.build(), network.images())
    images = network.images(count)
    profile = pl.profile(program, images, cache=False, progress=False)
    data = TensorDataset(images, torch.arange(count) % 4)
    return program, pl.with_gradients(profile, data, cache=False, progress=False)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_criterion_scores_every_layer(name: str) -> None:
    program, profile = known(NETWORKS[name])
    for criterion in pl.criteria_names():
        for layer in program.layers:
            if not layer.pinned:
                found = scores(program, profile, criterion, layer)
                assert found.shape == (layer.channels,)
                assert np.isfinite(found).all()


def test_with_blocks_bypassed_every_criterion_scores_what_is_left() -> None:
    program, profile = known(NETWORKS["resnet"])
    left = program.without([next(unit.name for unit in program.units if unit.grain == "block")])
    for criterion in pl.criteria_names():
        for layer in left.layers:
            if not layer.pinned:
                assert np.isfinite(scores(left, profile, criterion, layer)).all()


# What is asked for and cannot be had ---------------------------------------------


def test_what_a_profile_does_not_hold_is_named_with_what_to_do() -> None:
    network = NETWORKS["lenet"]
    program = pl.trace(network.build(), network.images())
    bare = pl.profile(program, network.images(8), cache=False, progress=False, budget=0)
    layer = program.layer("conv1")
    with pytest.raises(pl.PruneLabError, match=r"'taylor' needs gradients.* run with_gradients\(profile, data\) first"):
        scores(program, bare, "taylor", layer)
    with pytest.raises(pl.PruneLabError, match=r"'feature_rank' needs activations, which .* larger budget"):
        scores(program, bare, "feature_rank", layer)
    with pytest.raises(pl.PruneLabError, match="'apoz' needs a profile"):
        scores(program, None, "apoz", layer)
    assert get("propagated").missing(None) == ""


@pytest.mark.parametrize(
    ("needs", "message"),
    [("wieghts", "no material for criteria 'wieghts'; the nearest names are 'weights'"),
     (("weights", "statistics"), "one of per filter and per site")],
)  # fmt: skip
def test_a_criterion_cannot_need_what_there_is_not(needs: Any, message: str) -> None:
    with pytest.raises(pl.PruneLabError, match=message):
        pl.register("mine", needs=needs)
    assert "mine" not in pl.criteria_names()


def test_every_criterion_says_what_it_computes_and_where_it_comes_from() -> None:
    for name in pl.criteria_names():
        assert 20 < len(get(name).about) < 120


# Norms ---------------------------------------------


def test_the_scale_is_that_of_the_norm_and_of_the_filter_where_there_is_none() -> None:
    program = pl.trace(NETWORKS["block"].build(), NETWORKS["block"].images())
    model = program.model
    hidden = scores(program, None, "bn_scale", program.layer("hidden"))
    assert np.allclose(hidden, model.get_parameter("hidden.weight").detach().norm(dim=1), rtol=1e-12)
    stem = scores(program, None, "bn_scale", program.layer("stem"))
    # Two groups cut alike: each score stands for a channel in both.
    assert np.allclose(stem, model.get_parameter("norm.weight").detach().abs().reshape(2, 4).mean(0), rtol=1e-12)


# Carried back ---------------------------------------------


def sequence(*parts: nn.Module, image: Sequence[int]) -> pl.Program:
    torch.manual_seed(0)
    model = shaken(nn.Sequential(*parts)).double().eval()
    return pl.trace(model, torch.randn(2, *image, dtype=torch.float64))


def absolute(program: pl.Program, name: str) -> Tensor:
    weight: Tensor = program.model.get_parameter(f"{name}.weight").detach().abs()
    return weight.flatten(2).sum(2) if weight.dim() > 2 else weight


def carried(program: pl.Program, layer: str, expected: Tensor) -> None:
    found = scores(program, None, "propagated", program.layer(layer))
    assert np.allclose(found, (expected / expected.sum()).numpy(), rtol=1e-12)


def test_importance_goes_back_through_linear_layers() -> None:
    program = sequence(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3), image=(5,))
    last = absolute(program, "4").sum(0)
    carried(program, "2", last)
    carried(program, "0", absolute(program, "2").T @ last)


def test_importance_starts_at_a_single_output() -> None:
    program = sequence(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1), image=(5,))
    carried(program, "0", absolute(program, "2")[0])


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize(("read", "made", "groups"), [(8, 8, 8), (8, 16, 8), (8, 4, 4), (8, 12, 4)])
def test_importance_goes_back_through_groups_that_go_whole(kind: Any, read: int, made: int, groups: int) -> None:
    grouped, last = kind(read, made, 2, stride=2, groups=groups, bias=False), nn.Conv2d(made, 5, 2, bias=False)
    program = sequence(nn.Conv2d(3, read, 1), nn.ReLU(), grouped, nn.ReLU(), last, nn.Flatten(), image=(3, 4, 4))
    # What one pixel of a channel adds to each channel, at each place of a kernel or of a stride.
    plain = kind(read, made, 2, stride=2, groups=groups, bias=False).double().requires_grad_(False)
    plain.weight.copy_(program.model.get_parameter("2.weight").detach().abs())
    matrix = torch.zeros(read, made, dtype=torch.float64)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        pixel = torch.zeros(read, read, 2, 2, dtype=torch.float64)
        pixel[range(read), range(read), row, column] = 1.0
        matrix += plain(pixel).sum((2, 3))
    # A group's share lies evenly over the channels that it makes.
    each = program.model.get_parameter("4.weight").detach().abs().sum((0, 2, 3)).view(groups, -1)
    back = (matrix @ each.mean(1, keepdim=True).expand_as(each).flatten()).view(groups, -1).sum(1)
    layer = program.layers[0]
    found = importance(program)[min(layer.sites)][layer.labels]
    assert np.allclose(found / found.sum(), (back / back.sum()).numpy(), rtol=1e-12)


def test_importance_goes_back_through_norms_flattening_and_grouped_and_depthwise_convolutions() -> None:
    program = sequence(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 3), image=(3, 4, 4),
    )  # fmt: skip
    last = absolute(program, "8").sum(0).reshape(6, 4)
    carried(program, "5", last.sum(1))
    # A channel's positions share its importance evenly.
    before = absolute(program, "5").T @ last.sum(1)
    norm = program.model.get_submodule("3")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    scale = norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt()
    filters = program.model.get_parameter("2.weight").detach().abs().sum((1, 2, 3))
    # Its row is observed before the depthwise convolution.
    carried(program, "0", before * scale * filters)


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        logits: Tensor = self.c((y + self.b(y)).relu())
        return logits


def test_branches_of_importance_add_up() -> None:
    program = pl.trace(Added().double().eval(), torch.randn(2, 5, dtype=torch.float64))
    last = absolute(program, "c").sum(0)
    first = last + absolute(program, "b").T @ last
    members = [m / m.square().mean().sqrt() for m in (first / first.sum(), last / last.sum())]
    (row,) = [layer for layer in program.layers if not layer.pinned]
    assert len(row.sites) == 2
    found = scores(program, None, "propagated", row)
    assert np.allclose(found, torch.stack(members).mean(0), rtol=1e-12)


def test_importance_of_a_very_deep_network_does_not_overflow() -> None:
    parts: list[nn.Module] = []
    for _ in range(120):
        parts += [nn.Linear(4, 4), nn.ReLU()]
    program = sequence(*parts, nn.Linear(4, 2), image=(4,))
    with torch.no_grad():
        for parameter in program.model.parameters():
            parameter.mul_(1e6)
    found = scores(program, None, "propagated", program.layer("0"))
    assert np.isfinite(found).all()
    assert found.sum() == pytest.approx(1)


def test_importance_follows_weights_that_are_overwritten() -> None:
    program = sequence(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2), image=(5,))
    before = scores(program, None, "propagated", program.layer("0"))
    with torch.no_grad():
        program.model.get_parameter("2.weight")[:, 0] = 0
    after = scores(program, None, "propagated", program.layer("0"))
    assert before[0] > 0
    assert after[0] == 0


def test_output_energy_is_that_of_what_the_next_layers_are_given() -> None:
    program, profile = known(NETWORKS["lenet"])
    weight = program.model.get_parameter("fc1.weight").detach()
    layer = program.layer("conv2")
    maps = profile.activations[layer.sites[0]]
    rms = maps.square().mean((0, 2, 3)).sqrt()
    expected = rms * weight.reshape(10, 6, -1).square().sum((0, 2)).sqrt()
    assert np.allclose(scores(program, profile, "output_energy", layer), expected, rtol=1e-10)


# Data ---------------------------------------------


@pytest.mark.parametrize("criterion", ["variance", "entropy", "redundancy", "independence", "feature_rank"])
def test_criteria_see_the_values_after_the_activation(criterion: str) -> None:
    program, profile = known(NETWORKS["lenet"])
    model, images = program.model, NETWORKS["lenet"].images(24)
    with torch.no_grad():
        maps = model.get_submodule("conv1")(images).relu()
    pooled = maps.mean((2, 3)).float().numpy().astype(np.float64)
    given: dict[str, Any] = {
        "entropy": pooled, "redundancy": pooled, "independence": maps, "feature_rank": maps,
    }  # fmt: skip
    found = scores(program, profile, criterion, program.layer("conv1"))
    if criterion == "variance":
        expected = maps.mean((2, 3)).var(0, correction=0).numpy()
    else:
        expected = get(criterion).function(given[criterion])
    assert np.allclose(found, expected, rtol=1e-6)


def permuted(model: nn.Module, order: list[int]) -> None:
    """The same network with the channels of ``conv1`` in another order."""
    first, second = model.get_submodule("conv1"), model.get_submodule("conv2")
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.copy_(parameter[order].clone())
        weight = second.get_parameter("weight")
        weight.copy_(weight[:, order].clone())


@pytest.mark.parametrize("criterion", [name for name in pl.criteria_names() if name != "random"])
def test_scores_go_with_the_channels(criterion: str, orders: Callable[[], Any]) -> None:
    plain, changed, order = orders()
    before = scores(*plain, criterion, plain[0].layer("conv1"))
    after = scores(*changed, criterion, changed[0].layer("conv1"))
    assert np.allclose(after, before[order], rtol=1e-6)


@pytest.fixture(scope="module")
def orders() -> Callable[[], Any]:
    network, order = NETWORKS["lenet"], [2, 0, 3, 1]

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = zoo.LeNet((4, 6, 10))
        permuted(model, order)
        return model

    both = known(network), known(Network(make, network.image))
    return lambda: (*both, order)


class PositionsFirst(nn.Module):
    """Its values have shape (positions, images, channels) in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.b(self.a(x.transpose(0, 1)).relu().mean(0))
        return logits


def test_a_row_of_which_a_criterion_sees_nothing_scores_zero() -> None:
    program, profile = known(Network(PositionsFirst, (3, 4)))
    for criterion in pl.criteria_names():
        found = scores(program, profile, criterion, program.layer("a"))
        assert np.isfinite(found).all()
        assert found.any() == (get(criterion).parts.isdisjoint({"pooled", "activations"}))
