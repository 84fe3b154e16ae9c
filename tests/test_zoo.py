"""The zoo: sizes against published ones, names of published checkpoints, embedded checkpoints against their
records.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from prunelab import zoo
from prunelab.datasets import fashion_mnist
from prunelab.errors import PruneLabError
from prunelab.zoo.resnet import PadShortcut, ResNet

REQUIRED = {"lenet": 0.905, "vgg_small": 0.925, "resnet20": 0.925}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("build", "published"),
    [
        (zoo.lenet, 431_080),  # Hu et al. 2016
        (zoo.vgg19, 20_035_018),  # Liu et al. 2017
        (lambda: zoo.vgg16(batch_norm=False), 14_719_818),  # 14.7 M, the 13 convolutions' biases included
        (zoo.resnet20, 269_722),  # 0.27 M, 0.46 M, 0.66 M, 0.85 M and 1.7 M in He et al. 2016
        (zoo.resnet32, 464_154),
        (zoo.resnet44, 658_586),
        (zoo.resnet56, 853_018),
        (zoo.resnet110, 1_727_962),
    ],
)
def test_parameters_as_published(build: Callable[[], nn.Module], published: int) -> None:
    with torch.device("meta"):
        assert parameters(build()) == published


def test_vgg_small_is_small() -> None:
    assert parameters(zoo.vgg_small()) == 288_170


@pytest.mark.parametrize("build", [zoo.vgg11, zoo.vgg13, zoo.vgg16, zoo.vgg19])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_vgg_depth_counts_its_layers(build: Callable[[bool], nn.Module], batch_norm: bool) -> None:
    with torch.device("meta"):
        model = build(batch_norm)
        weights = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    # The original has three linear layers, this one has one.
    assert len(weights) + 2 == int(build.__name__[3:])
    assert len(norms) == (len(weights) - 1 if batch_norm else 0)


@pytest.mark.parametrize("shortcut", ["pad", "projection"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 31, 33)])
def test_resnet_takes_any_small_image(shortcut: zoo.Shortcut, shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        model = zoo.resnet20(shortcut, in_channels=shape[0], classes=7)
        assert model(torch.empty(2, *shape)).shape == (2, 7)


def test_resnet_names_are_those_of_published_checkpoints() -> None:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", *(f"bn1.{part}" for part in norm), "linear.weight", "linear.bias"}
    for block in (f"layer{stage}.{index}" for stage in (1, 2, 3) for index in range(3)):
        for number in (1, 2):
            expected |= {f"{block}.conv{number}.weight", *(f"{block}.bn{number}.{part}" for part in norm)}
    assert set(zoo.resnet20().state_dict()) == expected


def test_pad_shortcut_equals_padding_with_zeros() -> None:
    x = torch.randn(2, 16, 7, 7)
    expected = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
    assert torch.equal(PadShortcut(8, 8)(x), expected)


def test_padded_channels_are_slots_of_a_buffer() -> None:
    shortcut = PadShortcut(8, 8)
    shortcut.before, shortcut.after = shortcut.before[:, :5], shortcut.after[:, :0]
    assert shortcut(torch.randn(2, 16, 8, 8)).shape == (2, 21, 4, 4)
    assert not shortcut.state_dict()


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (zoo.lenet(), (1, 28, 28)),
        (zoo.vgg_small(), (1, 28, 28)),
        (zoo.vgg11(batch_norm=False), (3, 32, 32)),
        (zoo.resnet20(), (3, 32, 32)),
        (zoo.resnet20("projection", in_channels=1), (1, 28, 28)),
    ],
    ids=["lenet", "vgg_small", "vgg11", "resnet20-pad", "resnet20-projection"],
)
def test_exports_with_a_free_batch_dimension(model: nn.Module, shape: tuple[int, ...]) -> None:
    example = torch.randn(4, *shape)
    model.eval()
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False)
    other = torch.randn(3, *shape)
    torch.testing.assert_close(program.module()(other), model(other))


@pytest.mark.parametrize("name", zoo.available())
def test_checkpoint_is_as_recorded(name: str) -> None:
    model, record = zoo.load(name), zoo.record(name)
    assert not model.training
    assert all(value.dtype in (torch.float32, torch.int64) for value in model.state_dict().values())
    assert parameters(model) == record["parameters"]
    assert record["test_images"] == 10_000
    assert record["test_accuracy"] >= REQUIRED[name]
    assert record["command"].startswith(f"python data/train_checkpoints.py --data DIR --only {name} --seed ")


@pytest.mark.parametrize("name", zoo.available())
def test_checkpoint_reaches_its_accuracy(name: str) -> None:
    model, (_, test) = zoo.load(name), fashion_mnist()
    with torch.inference_mode():
        right = model(test.images[:1000]).argmax(1) == test.labels[:1000]
    # Three standard deviations of a share of 1,000 images at 93 %.
    assert right.float().mean().item() == pytest.approx(zoo.record(name)["test_accuracy"], abs=0.024)


def test_load_returns_a_network_of_its_own_each_time() -> None:
    first, second = zoo.load("lenet"), zoo.load("lenet")
    next(first.parameters()).data.zero_()
    assert next(second.parameters()).abs().sum() > 0


@pytest.mark.parametrize("read", [zoo.load, zoo.record])
def test_unknown_checkpoint_names_the_nearest(read: Callable[[str], object]) -> None:
    with pytest.raises(PruneLabError, match="'resnet20'"):
        read("resnet-20")


def test_network_without_checkpoint_says_how_to_build_it() -> None:
    with pytest.raises(PruneLabError, match=r"zoo\.resnet56\(\) builds it untrained"):
        zoo.load("resnet56")


@pytest.mark.parametrize(("depth", "shortcut"), [(18, "pad"), (2, "pad"), (20, "none")])
def test_impossible_resnet_is_refused(depth: int, shortcut: zoo.Shortcut) -> None:
    with pytest.raises(PruneLabError, match=r"ResNet"):
        ResNet(depth, shortcut)
