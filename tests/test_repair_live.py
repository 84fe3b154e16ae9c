"""Repair under a moving hand: it goes on from what changed, gives way at once, and shows something meanwhile."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunelab as pl
from prunelab.progress import Stopped
from prunelab.repair import Repairer, repair
from prunelab.repair.equations import FIXED_RIDGE

TRAIN, TEST = pl.datasets.fashion_mnist()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def images() -> Tensor:
    return noise(100, 1, 8, 8)


@pytest.fixture
def program(images: Tensor) -> pl.Program:
    torch.manual_seed(0)
    return pl.trace(pl.zoo.resnet20(in_channels=1).double().eval(), images[:2])


def cut(**kept: int) -> pl.Selection:
    return pl.Selection(kept={name.replace("_", "."): tuple(range(count)) for name, count in kept.items()})


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


class Clock:
    """Counts how often it was asked, and says no from one time on."""

    def __init__(self, most: int) -> None:
        self.asked, self.most = 0, most

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked <= self.most


def steps(repairer: Repairer, selection: pl.Selection) -> int:
    clock = Clock(1 << 60)
    repairer(selection, "least-squares", clock)
    return clock.asked


def test_a_late_slider_does_not_walk_the_early_network_again(program: pl.Program, images: Tensor) -> None:
    repairer = Repairer(program, images)
    kept = {"layer1_0_conv1": 8, "layer2_1_conv1": 16}
    whole = steps(repairer, cut(**kept, layer3_2_conv1=40))
    assert 0 < steps(repairer, cut(**kept, layer3_2_conv1=30)) < whole / 6
    last = cut(**kept, layer3_2_conv1=20)
    assert same(repairer(last, "least-squares"), repair(program, last, "least-squares", images))


def test_what_a_stopped_repair_has_found_is_kept(program: pl.Program, images: Tensor) -> None:
    sel = cut(layer1_0_conv1=8, layer2_1_conv1=16, layer3_2_conv1=40)
    whole = steps(Repairer(program, images), sel)
    repairer = Repairer(program, images)
    with pytest.raises(Stopped):
        repairer(sel, "least-squares", Clock(int(0.8 * whole)))
    assert steps(repairer, sel) < 0.7 * whole
    assert same(repairer(sel, "least-squares"), repair(program, sel, "least-squares", images))


def test_a_repair_asks_many_times_a_second_whether_it_is_still_wanted() -> None:
    """Processor seconds between two questions: as long may a hand have to wait."""
    program = pl.trace(pl.zoo.load("resnet20"), TEST.images[:2])
    asked = [time.process_time()]

    def wanted() -> bool:
        asked.append(time.process_time())
        return True

    Repairer(program, TRAIN.images[:500])(cut(layer1_0_conv1=8, layer3_0_conv1=30), "least-squares", wanted)
    assert np.diff(asked).max() < 0.5


@pytest.mark.parametrize("budget", [0, 300_000, 1 << 30])
def test_no_budget_changes_an_answer_or_is_exceeded(budget: int, program: pl.Program, images: Tensor) -> None:
    repairer = Repairer(program, images, budget)
    for kept in (8, 3, 8):
        sel = cut(layer1_1_conv1=kept, layer3_0_conv1=40)
        assert same(repairer(sel, "least-squares+norm"), repair(program, sel, "least-squares+norm", images))
        assert repairer._memory.held <= budget


# The quick repair ---------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_the_quick_repair_is_ridge_regression_on_the_uncut_networks_values(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1, bias=bias)).double().eval()
    images = noise(90, 2, 8, 8)
    program = pl.trace(model, images[:2])
    kept = [0, 2, 3]
    found = Repairer(program, images).quick(pl.Selection(kept={"0": tuple(kept)}), "least-squares")
    assert found is not None
    with torch.no_grad():
        values = nn.functional.unfold(torch.relu(model[0](images)), 3, padding=1).movedim(1, 2).flatten(0, 1).numpy()
    weight = model[2].weight.detach().numpy()
    left = values.reshape(len(values), 5, 9)[:, kept].reshape(len(values), -1)
    error = values.reshape(len(values), 5, 9)[:, [1, 4]].reshape(len(values), -1) @ (weight[:, [1, 4]].reshape(4, -1).T)
    known = np.concatenate([left, np.ones((len(left), 1))], 1) if bias else left
    ridge = np.sqrt(FIXED_RIDGE * np.square(known).sum(0).mean())
    rows = np.concatenate([known, ridge * np.eye(known.shape[1])])
    change = np.linalg.lstsq(rows, np.concatenate([error, np.zeros((known.shape[1], 4))]), rcond=None)[0]
    expected = weight[:, kept] + change[: left.shape[1]].T.reshape(4, 3, 3, 3)
    np.testing.assert_allclose(found["2.weight"].numpy(), expected, rtol=1e-8, atol=1e-10)
    if bias:
        np.testing.assert_allclose(found["2.bias"].numpy(), model[2].bias.detach().numpy() + change[-1], rtol=1e-8)
    assert (found.images, found.left) == (90, ())


def test_the_quick_repair_wins_most_of_the_accuracy_back() -> None:
    program = pl.trace(pl.zoo.load("resnet20"), TEST.images[:2])
    plan = pl.Plan("l1")
    for layer in program.layers:
        if layer.name.endswith(".conv1"):
            plan = plan.set(layer.name, ratio=0.5)
    sel = plan.resolve(program)
    preview = pl.Preview(program, TEST.images[:1000], TEST.labels[:1000])
    found = Repairer(program, TRAIN.images[:300]).quick(sel, "least-squares")
    assert found is not None
    plain, mended = preview.accuracy(sel), preview.accuracy(sel, repaired=found)
    assert mended.accuracy > plain.accuracy + 0.6 * (plain.base - plain.accuracy)


def test_what_the_quick_repair_leaves_it_names(program: pl.Program, images: Tensor) -> None:
    mask = torch.ones(64, 64, 3, 3, dtype=torch.bool)
    mask[0, 0] = False
    sel = pl.Selection(kept={"layer3.1.conv1": tuple(range(20))}, masks={"layer3.1.conv2.weight": mask})
    found = Repairer(program, images).quick(sel, "least-squares")
    assert found is not None
    assert found.left == (("layer3.1.conv2", "its inputs are in groups or its weights under a mask"),)


def test_nothing_is_quicker_than_what_is_there(program: pl.Program, images: Tensor) -> None:
    repairer, sel = Repairer(program, images), cut(layer3_0_conv1=40)
    assert repairer.quick(sel, "bias") is None
    assert repairer.quick(pl.DENSE, "least-squares") is None
    repairer(sel, "least-squares")
    assert repairer.quick(sel, "least-squares") is None


def test_the_desk_says_which_repair_it_shows() -> None:
    lab = pl.Lab(pl.zoo.load("lenet"), TRAIN.subset(200), TEST.subset(200), cache=False)
    lab.run_profile(progress=False)
    explorer = pl.explore(lab)
    assert explorer._worker.drain(60)
    shown: list[str] = []
    explorer.desk.observe(lambda change: shown.append(change["new"].get("repair", "")), "estimate")
    lab.set("fc1", ratio=0.5)
    explorer._repair.value = "least-squares"
    assert explorer._worker.drain(60)
    assert "quick repair" in shown
    assert shown[-1] == ""
    assert explorer.desk.estimate["state"] == "ready"
    assert len(lab.points) == 2


def test_a_repair_that_a_newer_edit_stops_is_no_error() -> None:
    lab = pl.Lab(pl.zoo.load("lenet"), TRAIN.subset(200), TEST.subset(200), cache=False)
    lab.set("fc1", ratio=0.5)
    lab.repair("least-squares")
    explorer = pl.explore(lab)
    assert explorer._worker.drain(60)
    lab.set("fc1", ratio=0.4)
    before = explorer.desk.estimate
    explorer._estimate(lambda: False)
    assert explorer.desk.estimate == before
    assert not explorer.desk.status["error"]


@pytest.mark.parametrize("how", ["bias", "norm", "least-squares"])
def test_weights_that_were_trained_in_place_are_repaired_as_they_are_now(
    how: str, program: pl.Program, images: Tensor
) -> None:
    repairer, sel = Repairer(program, images), cut(layer1_0_conv1=8, layer3_0_conv1=40)
    repairer(sel, how)
    train_in_place(program.model)
    assert same(repairer(sel, how), repair(program, sel, how, images))


def test_the_quick_repair_is_of_the_weights_as_they_are_now(program: pl.Program, images: Tensor) -> None:
    repairer, sel = Repairer(program, images), cut(layer3_0_conv1=40)
    repairer.quick(sel, "least-squares")
    train_in_place(program.model)
    found, expected = (each.quick(sel, "least-squares") for each in (repairer, Repairer(program, images)))
    assert found is not None
    assert expected is not None
    assert same(found, expected)


def train_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
