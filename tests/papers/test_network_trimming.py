"""Network Trimming: which neurons go, in which layers, when it ends, and the control."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import prunelab as pl
from prunelab import zoo
from prunelab.errors import PruneLabError
from prunelab.papers.network_trimming import (
    mean_apoz,
    network_trimming,
    to_widths,
    trimmings,
)
from prunelab.papers.scratch import default_weights, from_scratch, he_weights

WIDTHS = (12, 16, 20)


class Chain(nn.Module):
    """Three hidden layers; biases make some of the neurons of each silent for most inputs."""

    def __init__(self, silent: Mapping[str, int]) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 12), nn.Linear(12, 16), nn.Linear(16, 20)
        self.out = nn.Linear(20, 3)
        with torch.no_grad():
            for name, count in silent.items():
                self.get_submodule(name).bias.add_(0.7)
                self.get_submodule(name).bias[:count] -= 3.0

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(x)))))))


def network(**silent: int) -> nn.Module:
    torch.manual_seed(1)
    return Chain(silent).double().eval()


def data(count: int = 200, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(images, images[:, :3].argmax(1))


def apoz_by_hand(model: nn.Module, images: Tensor) -> dict[str, NDArray[np.float64]]:
    found, x = {}, images
    for name in ("first", "second", "third"):
        x = torch.relu(model.get_submodule(name)(x))
        found[name] = (x == 0).double().mean(0).numpy()
    return found


SETTINGS = {"epochs": 0, "precision": "no", "drop": 1.0}


def test_neurons_go_whose_apoz_is_more_than_one_deviation_above_their_layers_mean() -> None:
    model, val = network(second=3, third=4), data()
    by_hand = apoz_by_hand(model, val.tensors[0])
    wanted = {name: np.flatnonzero(a > a.mean() + a.std()) for name, a in by_hand.items()}
    found, small = next(trimmings(model, data(seed=1), val, begin_with=3, **SETTINGS))
    assert found.removed == sum(map(len, wanted.values())) > 5
    for name, gone in wanted.items():
        kept = np.setdiff1d(np.arange(len(by_hand[name])), gone)
        assert found.widths[name] == len(kept)
        assert torch.equal(small.get_submodule(name).bias, model.get_submodule(name).bias[kept])
        assert found.apoz[name] == pytest.approx(by_hand[name].mean())


def test_it_begins_with_the_layer_of_the_highest_mean_apoz_and_goes_on_to_its_neighbours() -> None:
    model = network(first=0, second=0, third=5)
    rounds = [found for found, _ in trimmings(model, data(seed=1), data(), begin_with=1, rounds=3, **SETTINGS)]
    assert max(rounds[0].apoz, key=lambda name: rounds[0].apoz[name]) == "third"
    assert [sorted(found.plan.settings) for found in rounds] == [
        ["third"],
        ["second", "third"],
        ["first", "second", "third"],
    ]


def test_at_most_half_of_a_layer_goes_in_a_round() -> None:
    model = network(third=10)
    for found, _ in trimmings(model, data(seed=1), data(), begin_with=1, rounds=1, std=-1.0, most=0.5, **SETTINGS):
        assert found.widths["third"] == 10


def test_it_ends_where_a_round_would_remove_too_little() -> None:
    assert list(trimmings(network(third=4), data(seed=1), data(), std=50.0, **SETTINGS)) == []
    small, rounds = network_trimming(model := network(third=4), data(seed=1), data(), std=50.0, **SETTINGS)
    assert rounds == ()
    assert small is not model
    assert torch.equal(small.out.weight, model.out.weight)


def test_a_round_that_loses_too_much_is_told_but_not_taken() -> None:
    model = network(second=3, third=4)
    small, rounds = network_trimming(model, data(seed=1), data(), **{**SETTINGS, "drop": -1.0})
    assert [found.taken for found in rounds] == [False]
    assert [found.removed > 0 for found in rounds] == [True]
    assert small.third.out_features == 20
    assert small is not model


def test_retraining_starts_from_the_surviving_weights_and_brings_accuracy_back() -> None:
    torch.manual_seed(0)
    model = zoo.lenet()
    train, test = pl.datasets.fashion_mnist()
    few, val = train.subset(600), test.subset(200)
    pl.finetune(model, few, val, epochs=4, lr=0.05, progress=False)
    before = copy.deepcopy(model.state_dict())
    small, rounds = network_trimming(model, few, val, first_lr=0.2, rounds=2, epochs=2, drop=1.0, std=0.0)
    assert all(found.after > found.before for found in rounds)
    assert rounds[-1].params == sum(p.numel() for p in small.parameters()) < 431_080
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_rounds_go_on_from_their_checkpoints(tmp_path: Path) -> None:
    model, train = network(third=4), data(seed=1)
    settings = {**SETTINGS, "epochs": 1, "folder": tmp_path, "rounds": 2}
    next(trimmings(model, train, data(), **settings))
    assert [path.name for path in tmp_path.iterdir()] == ["round-1"]
    once, _ = network_trimming(model, train, data(), **settings)
    again, _ = network_trimming(model, train, data(), **{**settings, "folder": None})
    assert torch.equal(once.out.weight, again.out.weight)


def test_a_network_with_nothing_to_trim_is_refused() -> None:
    with pytest.raises(PruneLabError, match="no layer to trim"):
        list(trimmings(network(), data(seed=1), data(), layers=["out"], **SETTINGS))


def test_a_layer_that_is_not_there_is_told() -> None:
    with pytest.raises(PruneLabError, match="no layer 'secnd'"):
        list(trimmings(network(), data(seed=1), data(), layers=["third", "secnd"], **SETTINGS))


def test_a_layer_down_to_one_neuron_is_left_alone_and_the_others_go_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 3)).double().eval()
    with torch.no_grad():
        model.get_parameter("0.bias")[0] -= 20.0
        model.get_parameter("2.bias")[:4] -= 20.0
    settings = {**SETTINGS, "std": 0.5, "begin_with": 1, "layers": ["0", "2"]}
    small, rounds = network_trimming(model, data(seed=1), data(), **settings)
    assert small.get_parameter("0.weight").shape == (1, 6)
    assert rounds[0].plan.settings.keys() == {"0"}
    assert any("2" in found.plan.settings for found in rounds[1:])


def test_widths_keep_the_neurons_of_the_lowest_apoz() -> None:
    model, val = network(third=4), data()
    program = pl.trace(model, val.tensors[0][:2])
    zeros = pl.profile(program, val, progress=False)
    kept = to_widths(program, {"third": 13}).resolve(program, zeros).kept["third"]
    by_hand = apoz_by_hand(model, val.tensors[0])["third"]
    assert len(kept) == 13
    assert max(by_hand[list(kept)]) <= min(np.delete(by_hand, kept))
    assert mean_apoz(program, zeros, "third") == pytest.approx(by_hand.mean())
    with pytest.raises(PruneLabError, match="'third' has 20 channels: it cannot be left with 21"):
        to_widths(program, {"third": 21})


def test_new_weights_are_new_in_attention_too_and_what_cannot_be_made_anew_is_told() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    torch.manual_seed(1)
    default_weights(model)
    after = model.state_dict()
    assert all(float((after[name] - tensor).abs().max()) < 1.0 for name, tensor in before.items())
    assert torch.equal(after["self_attn.out_proj.bias"], torch.zeros(8))
    model.token = nn.Parameter(torch.zeros(8))
    with pytest.raises(PruneLabError, match=r"holds the parameter 'token'.*reset_parameters"):
        default_weights(model)


@pytest.mark.parametrize("weights", [default_weights, he_weights])
def test_the_control_has_the_same_widths_and_other_weights(weights: object) -> None:
    small, train = zoo.VGG(((4, 4), (8,)), batch_norm=False).double(), data()
    images = torch.randn(20, 3, 8, 8, dtype=torch.float64)
    train = TensorDataset(images, torch.arange(20) % 10)
    before = copy.deepcopy(small.state_dict())
    fresh = from_scratch(small, train, train, weights=weights, epochs=1, precision="no")  # type: ignore[arg-type]
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert fresh.state_dict()[name].shape == tensor.shape
    assert not torch.allclose(fresh.stage1.conv1.weight, small.stage1.conv1.weight)
