"""Merging equal channels changes nothing that a network gives, and says where it cannot be done."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import relative, shaken
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models

import prunelab as pl
from prunelab import zoo
from prunelab.program.run import bind
from prunelab.repair import Repairer, repair
from prunelab.repair.merge import is_summed, nearest, unmergeable


class Blocks(nn.Module):
    """Depthwise and grouped convolutions, a concatenation, a sum, squeeze-and-excitation, a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.grouped = nn.Conv2d(12, 8, 3, padding=1, groups=2)
        self.side = nn.Conv2d(12, 6, 1)
        self.gate, self.back = nn.Linear(14, 5), nn.Linear(5, 14)
        self.out = nn.Linear(14 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        x = x + self.deep(x)
        x = torch.cat([self.grouped(x), self.side(x)], 1)
        x = x * torch.sigmoid(self.back(functional.relu(self.gate(x.mean((2, 3))))))[..., None, None]
        out: Tensor = self.out(functional.adaptive_avg_pool2d(x, 4).flatten(1))
        return out


class Normalised(nn.Module):
    """A layer norm over one layer's channels, none over the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 9), nn.LayerNorm(9)
        self.second, self.out = nn.Linear(9, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(functional.relu(self.second(self.norm(self.first(x)))))
        return out


def with_equals(program: pl.Program, share: int = 2) -> pl.Selection:
    """Make every ``share``-th channel of free layers like the one before it; the selection that keeps the others."""
    kept = {}
    tensors = {**dict(program.model.named_parameters()), **dict(program.model.named_buffers())}
    for layer in program.structure.layers:
        if layer.pinned or layer.channels < 3:
            continue
        gone = np.arange(1, layer.channels, share)
        kept[layer.name] = tuple(sorted(set(range(layer.channels)) - set(gone.tolist())))
        for slot in layer.slots:
            if not is_summed(program, slot):
                tensor = tensors[slot.state].data
                for c in gone:
                    for here, there in zip(slot.index[c], slot.index[c - 1], strict=True):
                        tensor.select(slot.dim, int(here)).copy_(tensor.select(slot.dim, int(there)))
    return pl.Selection(kept)


@pytest.mark.parametrize(
    ("network", "image"),
    [
        (lambda: zoo.lenet(), (1, 28, 28)),
        (lambda: zoo.resnet20(), (3, 32, 32)),
        (lambda: zoo.resnet20(shortcut="projection"), (3, 32, 32)),
        (Blocks, (3, 8, 8)),
        (lambda: models.mobilenet_v3_small(), (3, 32, 32)),
        (lambda: models.shufflenet_v2_x0_5(), (3, 32, 32)),
        (lambda: models.densenet121(), (3, 32, 32)),
    ],
)
def test_equal_channels_are_merged_without_any_change(network: object, image: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = shaken(network()).double().eval()  # type: ignore[operator]
    program = pl.trace(model, torch.randn(2, *image, dtype=torch.float64))
    assert not unmergeable(program)
    selection = with_equals(program, 3)
    images = torch.randn(3, *image, dtype=torch.float64)
    small = pl.commit(program, selection, repair="merge")
    with torch.no_grad():
        assert relative(small(images), model(images)) < 1e-10
        plain = pl.commit(program, selection)
        assert relative(plain(images), model(images)) > 1e-3
        preview = bind(program, selection).replaced(repair(program, selection, "merge", None))
        assert torch.equal(preview(images), small(images))


def test_a_layer_that_is_normalised_with_others_is_named_and_left() -> None:
    torch.manual_seed(0)
    model = Normalised().double().eval()
    program = pl.trace(model, torch.randn(2, 6, dtype=torch.float64))
    assert set(unmergeable(program)) == {"first"}
    selection = with_equals(program)
    repaired = Repairer(program, None)(selection, "merge")
    assert [name for name, _ in repaired.left] == ["first"]
    assert "normalised" in repaired.left[0][1]
    assert set(repaired) == {"out.weight"}


def test_weights_that_are_zero_hide_nothing() -> None:
    model = Normalised().double().eval()
    nn.init.zeros_(model.out.weight)
    program = pl.trace(model, torch.randn(2, 6, dtype=torch.float64))
    assert set(unmergeable(program)) == {"first"}


def test_a_channel_goes_to_the_kept_one_nearest_to_it() -> None:
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0], [0, 1], [0.9, 0.1], [0.1, 0.8]]))
        model[2].weight.copy_(torch.tensor([[1.0, 10, 100, 1000]]))
    program = pl.trace(model, torch.randn(2, 2))
    assert nearest(program, program.layer("0"), (0, 1)).tolist() == [0, 1, 0, 1]
    repaired = repair(program, pl.Selection({"0": (0, 1)}), "merge", None)
    assert repaired["2.weight"].tolist() == [[101.0, 1010.0]]


def test_a_plan_with_the_merge_repair_is_previewed_as_it_is_committed() -> None:
    _, test = pl.datasets.fashion_mnist()
    val = test.subset(64)
    lab = pl.Lab(zoo.load("resnet20"), val, val)
    lab.set("layer1.0.conv1", remove=(3, 5))
    lab.repair("merge")
    seen = lab.measure()
    small = lab.commit()
    with torch.no_grad():
        right = (small.eval()(val.images).argmax(1) == val.labels).double().mean()
    assert seen.accuracy == pytest.approx(float(right), abs=1e-12)
