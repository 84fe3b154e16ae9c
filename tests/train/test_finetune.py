"""Fine-tuning: it recovers, holds masks, stops with the best weights, and refuses in a sentence."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import prunelab as pl

TRAIN, TEST = pl.datasets.fashion_mnist()
SOME, FEW = TRAIN.subset(1000), TEST.subset(300)


@pytest.fixture
def damaged() -> nn.Module:
    model = pl.zoo.load("lenet")
    program = pl.trace(model, TEST.images[:2])
    plan = pl.Plan("random").set("conv2", ratio=0.6).set("fc1", ratio=0.6)
    return pl.commit(program, plan.resolve(program))


def test_recovers_and_reports(damaged: nn.Module) -> None:
    damaged.train()
    damaged.conv1.training = False
    table = pl.finetune(damaged, SOME, FEW, epochs=2, progress=False)
    assert list(table.index) == [0, 1, 2]
    assert list(table.columns) == ["loss", "accuracy", "lr", "seconds"]
    assert table["accuracy"].max() > table["accuracy"].iloc[0] + 0.05
    assert damaged.training
    assert not damaged.conv1.training
    left = pl.Preview(pl.trace(damaged, FEW.images[:2]), FEW.images, FEW.labels).accuracy()
    assert left.accuracy == table["accuracy"].max()


def test_masks_hold_under_momentum_and_decay(damaged: nn.Module) -> None:
    mask = torch.rand_like(damaged.fc1.weight) < 0.5
    pl.finetune(damaged, SOME, FEW, epochs=1, lr=0.02, weight_decay=0.01, masks={"fc1.weight": mask}, progress=False)
    assert not damaged.fc1.weight[~mask].any()
    assert damaged.fc1.weight[mask].all()


def test_stop_keeps_the_best_weights(damaged: nn.Module) -> None:
    calls = []

    def stop_in_the_second_epoch(done: int, total: int | None, what: str) -> bool:
        calls.append(what)
        return not what.startswith("epoch 2")

    table = pl.finetune(damaged, SOME, FEW, epochs=5, progress=stop_in_the_second_epoch)
    assert list(table.index) == [0, 1]
    assert sum(c.startswith("epoch 2") for c in calls) == 1
    left = pl.Preview(pl.trace(damaged, FEW.images[:2]), FEW.images, FEW.labels).accuracy()
    assert left.accuracy == table["accuracy"].max()


def test_a_teacher_is_learned_from_without_labels_and_stays_as_it_is(damaged: nn.Module) -> None:
    teacher = pl.zoo.load("lenet").train()
    before = copy.deepcopy(teacher.state_dict())
    wrong = pl.datasets.ImageSet(
        SOME.images, torch.zeros_like(SOME.labels), SOME.classes, SOME.mean, SOME.std, SOME.name
    )
    table = pl.finetune(damaged, wrong, FEW, epochs=2, lr=0.005, teacher=teacher, progress=False)
    assert table["accuracy"].max() > table["accuracy"].iloc[0] + 0.05
    assert teacher.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_a_loss_that_is_not_finite_leaves_the_last_good_weights(damaged: nn.Module) -> None:
    before = copy.deepcopy(damaged.state_dict())
    with pytest.raises(pl.PruneLabError, match="not finite"):
        pl.finetune(damaged, SOME, FEW, epochs=1, loss=lambda x, y: x.sum() * torch.nan, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in damaged.state_dict().items())


def test_any_optimizer(damaged: nn.Module) -> None:
    made = []

    def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(torch.optim.Adam(parameters, lr=1e-3))
        return made[0]

    table = pl.finetune(damaged, SOME, FEW, epochs=1, optimizer=adam, progress=False)
    assert made
    assert table["accuracy"].max() > table["accuracy"].iloc[0]


def test_bad_input(damaged: nn.Module) -> None:
    before = copy.deepcopy(damaged.state_dict())
    empty = torch.utils.data.TensorDataset(SOME.images[:0], SOME.labels[:0])
    unlabelled = torch.utils.data.TensorDataset(SOME.images[:50])
    beyond = torch.utils.data.TensorDataset(SOME.images[:50], SOME.labels[:50] + 7)
    cases = [
        ({"train": empty, "val": FEW}, "empty"),
        ({"train": SOME, "val": empty}, "empty"),
        ({"train": unlabelled, "val": FEW}, "labels"),
        ({"train": SOME, "val": beyond}, "validation labels"),
        ({"train": beyond, "val": FEW}, "training labels"),
        ({"train": SOME, "val": FEW, "epochs": -1}, "epochs"),
        ({"train": SOME, "val": FEW, "teacher": damaged, "temperature": 0.0}, "temperature"),
        ({"train": SOME, "val": FEW, "masks": {"fc9.weight": torch.ones(1)}}, "fc1.weight"),
    ]
    for given, says in cases:
        with pytest.raises(pl.PruneLabError, match=says):
            pl.finetune(damaged, **{"epochs": 1, "progress": False, **given})
    damaged.requires_grad_(False)
    with pytest.raises(pl.PruneLabError, match="frozen"):
        pl.finetune(damaged, SOME, FEW, epochs=1, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in damaged.state_dict().items())
