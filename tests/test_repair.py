"""Least-squares repair against plain numpy, and what it is for: a cut that costs a few points, not the network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import prunelab as pl
from prunelab.repair import repair


class Small(nn.Module):
    """A convolution, a norm, and two linear layers over a map of more than one position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, bias=False)
        self.fc1 = nn.Linear(8 * 9, 12)
        self.fc2 = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        x = torch.relu(self.conv2(x))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def program(images: torch.Tensor) -> pl.Program:
    torch.manual_seed(0)
    return pl.trace(Small().double().eval(), images[:2])


def test_linear_layer_equals_ridge_regression_in_numpy(program: pl.Program, images: torch.Tensor) -> None:
    sel = pl.Selection(kept={"fc1": (0, 2, 3, 7, 8)})
    found = repair(program, sel, "least-squares", images)
    assert set(found) == {"fc2.weight", "fc2.bias"}

    model = program.model
    with torch.no_grad():
        hidden = torch.relu(model.norm(model.conv1(images)))
        hidden = torch.relu(model.fc1(torch.relu(model.conv2(hidden)).flatten(1)))
        wanted = model.fc2(hidden).numpy()
    kept = list(sel.kept["fc1"])
    known = np.hstack([hidden.numpy()[:, kept], np.ones((len(images), 1))])
    old = np.hstack([model.fc2.weight.detach().numpy()[:, kept], model.fc2.bias.detach().numpy()[:, None]])
    gram = known.T @ known
    ridge = 1e-3 * gram.diagonal().mean() * np.eye(len(gram))
    new = old + np.linalg.solve(gram + ridge, known.T @ (wanted - known @ old.T)).T
    np.testing.assert_allclose(found["fc2.weight"].numpy(), new[:, :-1], atol=1e-10)
    np.testing.assert_allclose(found["fc2.bias"].numpy(), new[:, -1], atol=1e-10)


def test_every_repaired_layer_comes_nearer_to_what_it_gave(program: pl.Program, images: torch.Tensor) -> None:
    half = {layer.name: tuple(range(0, layer.channels, 2)) for layer in program.layers if not layer.pinned}
    sel = pl.Selection(kept=half)
    preview = pl.Preview(program, images, torch.zeros(len(images), dtype=torch.long))
    found = repair(program, sel, "least-squares", images)
    dense = preview.logits()
    plain = (preview.logits(sel) - dense).square().mean()
    mended = (preview.logits(sel, repaired=found) - dense).square().mean()
    assert mended < plain / 2


def test_the_preview_of_a_repair_is_its_commit(program: pl.Program, images: torch.Tensor) -> None:
    sel = pl.Selection(kept={"conv1": (0, 3, 4), "conv2": (1, 2, 5, 7), "fc1": (0, 1, 2, 3, 9)})
    found = repair(program, sel, "least-squares", images)
    before = {k: v.clone() for k, v in program.model.state_dict().items()}
    small = pl.commit(program, sel, repair="least-squares", images=images)
    preview = pl.Preview(program, images, torch.zeros(len(images), dtype=torch.long))
    shown = preview.logits(sel, repaired=found)
    with torch.no_grad():
        torch.testing.assert_close(small(images), shown, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in program.model.state_dict().items())


def test_masked_weights_stay_zero(program: pl.Program, images: torch.Tensor) -> None:
    mask = torch.rand(4, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    sel = pl.Selection(kept={"fc1": (0, 2, 3, 7, 8, 11)}, masks={"fc2.weight": mask})
    found = repair(program, sel, "least-squares", images)["fc2.weight"]
    assert not found[~mask[:, [0, 2, 3, 7, 8, 11]]].any()


def test_bad_input(program: pl.Program, images: torch.Tensor) -> None:
    sel = pl.Selection(kept={"fc1": (0,)})
    with pytest.raises(pl.PruneLabError, match="least-squares"):
        repair(program, sel, "least-square", images)
    with pytest.raises(pl.PruneLabError, match="needs images"):
        pl.commit(program, sel, repair="least-squares")
    assert repair(program, sel, "none", None) == {}


def test_resnet20_keeps_its_accuracy() -> None:
    """Half of every block's inner channels by L1: without repair the network is lost, with it a few points are."""
    train, test = pl.datasets.fashion_mnist()
    program = pl.trace(pl.zoo.load("resnet20"), test.images[:2])
    plan = pl.Plan("l1")
    for layer in program.layers:
        if layer.name.endswith(".conv1"):
            plan = plan.set(layer.name, ratio=0.5)
    sel = plan.resolve(program)
    preview = pl.Preview(program, test.images[:1000], test.labels[:1000])
    plain = preview.accuracy(sel)
    mended = preview.accuracy(sel, repaired=repair(program, sel, "least-squares", train.images[:500]))
    assert plain.accuracy < 0.5
    assert mended.accuracy > mended.base - 0.05
