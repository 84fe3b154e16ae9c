"""Mean activation: the cut against one computed by hand, and when the network has converged."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import prunelab as pl
from prunelab import zoo
from prunelab.errors import PruneLabError
from prunelab.papers.mean_activation import (
    basic_convergence,
    cut_by_mean_activation,
    inner_layers,
    mean_activation,
)


def data(count: int = 150) -> TensorDataset:
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, 12, 12, generator=generator, dtype=torch.float64)
    return TensorDataset(images, torch.arange(count) % 10)


def network(norm: bool) -> nn.Module:
    torch.manual_seed(0)
    return zoo.VGG(((6, 7), (10,)), norm).double().eval()


def activations_by_hand(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Values after the activation function, shape ``(images, channels, height, width)``, by the convolution's name."""
    found, last, x = {}, "", images
    for stage in ("stage1", "stage2"):
        for name, part in model.get_submodule(stage).named_children():
            x = part(x)
            last = f"{stage}.{name}" if name.startswith("conv") else last
            if name.startswith("relu"):
                found[last] = x
    return found


@pytest.mark.parametrize("norm", [True, False])
def test_the_weakest_share_of_every_layer_goes_measured_on_all_training_images(norm: bool) -> None:
    model, train = network(norm), data()
    with torch.no_grad():
        values = activations_by_hand(model, train.tensors[0])
    small, cut = cut_by_mean_activation(model, train, 0.35)
    assert cut.images == 150
    assert sorted(cut.thresholds) == sorted(values)
    for name, value in values.items():
        means = value.mean((0, 2, 3)).numpy()
        kept = np.sort(np.argsort(means)[int(0.35 * len(means)) :])
        assert torch.equal(
            small.get_submodule(name).weight[:, 0, 0, 0],
            model.get_submodule(name).weight[kept, 0 if name == "stage1.conv1" else _first_kept(values, name), 0, 0],
        )
        assert (means < cut.thresholds[name] - 1e-9).sum() == int(0.35 * len(means))
        assert cut.thresholds[name] == pytest.approx(means[kept].min())


def _first_kept(values: dict[str, Tensor], name: str) -> int:
    before = list(values)[list(values).index(name) - 1]
    means = values[before].mean((0, 2, 3)).numpy()
    return int(np.sort(np.argsort(means)[int(0.35 * len(means)) :])[0])


def test_ratios_by_layer_leave_the_others_whole_and_one_channel_stays() -> None:
    small, cut = cut_by_mean_activation(network(True), data(), {"stage1.conv1": 1.0})
    assert small.stage1.conv1.out_channels == 1
    assert small.stage1.conv2.out_channels == 7
    assert list(cut.thresholds) == ["stage1.conv1"]


def test_residual_streams_are_cut_where_asked_for_alone() -> None:
    program = pl.trace(zoo.ResNet(8), torch.randn(2, 3, 32, 32))
    inner = inner_layers(program)
    assert inner == ["layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"]
    assert set(inner) < set(inner_layers(program, streams=True))
    with pytest.raises(PruneLabError, match="no layer to cut"):
        inner_layers(pl.trace(nn.Linear(3, 2), torch.randn(2, 3)))


def test_convergence_is_basic_where_the_loss_has_stopped_moving() -> None:
    settings = {"epochs": 40, "precision": "no", "batch_size": 50}
    assert basic_convergence(network(False), data(), data(20), lr=0.0, **settings) == 10


def test_half_of_the_epochs_are_left_for_the_time_after_the_cut() -> None:
    settings = {"precision": "no", "batch_size": 50}
    assert basic_convergence(network(True), data(), data(20), lr=0.05, epochs=13, **settings) == 6


def test_the_whole_method_trains_cuts_and_trains_on(tmp_path: Path) -> None:
    model, train, val = network(True), data(), data(20)
    before = copy.deepcopy(model.state_dict())
    settings = {"epochs": 5, "lr": 0.05, "precision": "no", "batch_size": 50}
    small, cut = mean_activation(model, train, val, 0.5, folder=tmp_path, **settings)
    assert (cut.before, cut.after, cut.images) == (2, 3, 150)
    assert small.stage2.conv1.weight.shape == (5, 4, 3, 3)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    again, _ = mean_activation(model, train, val, 0.5, folder=tmp_path, **settings)
    assert torch.equal(again.stage2.conv1.weight, small.stage2.conv1.weight)
