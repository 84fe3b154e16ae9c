"""Fine-tuning: it recovers a damaged network, keeps the best weights, and leaves nothing but weights changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from support import half_of_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import prunelab as pl
from prunelab import zoo
from prunelab.datasets import ImageSet
from prunelab.train.position import Epoch


@pytest.fixture(scope="module")
def data() -> tuple[ImageSet, ImageSet]:
    train, test = pl.datasets.fashion_mnist()
    return train.subset(1000), test.subset(500)


@pytest.fixture
def damaged() -> nn.Module:
    """LeNet with noise on its weights."""
    model = zoo.load("lenet")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * parameter.std() * 1.2)
    return model


def accuracy(model: nn.Module, data: ImageSet) -> float:
    with torch.no_grad():
        return float((model.eval()(data.images).argmax(1) == data.labels).double().mean())


def tuned(model: nn.Module, data: tuple[Any, Any], **settings: Any) -> pd.DataFrame:
    return pl.finetune(model, *data, **{"progress": False, "epochs": 1, **settings})


def values(model: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in model.state_dict().values()]


def test_one_short_epoch_recovers_a_damaged_network(damaged: nn.Module, data: tuple[ImageSet, ImageSet]) -> None:
    before = accuracy(damaged, data[1])
    table = tuned(damaged, data)
    assert before < 0.75
    assert accuracy(damaged, data[1]) > before + 0.05
    assert accuracy(damaged, data[1]) == table["accuracy"].max()


def test_the_table(damaged: nn.Module, data: tuple[ImageSet, ImageSet]) -> None:
    seen: list[Epoch] = []
    before = accuracy(damaged, data[1])
    table = tuned(damaged, data, epochs=2, lr=0.02, on_epoch=seen.append)
    assert list(table.columns) == ["loss", "accuracy", "lr", "seconds"]
    assert table.index.name == "epoch"
    assert table.index.tolist() == [0, 1, 2]
    assert math.isnan(table["loss"][0])
    assert table["accuracy"][0] == before
    assert table["loss"][2] < table["loss"][1]
    # Cosine: the rate of the last step lies just above zero.
    assert 0.02 == table["lr"][0] > table["lr"][1] > table["lr"][2] > 0
    assert (table["seconds"][1:] > 0).all()
    assert [e.epoch for e in seen] == [1, 2]
    assert [e.accuracy for e in seen] == table["accuracy"][1:].tolist()


def test_no_epochs_measure_and_change_nothing(damaged: nn.Module, data: tuple[ImageSet, ImageSet]) -> None:
    before = values(damaged)
    table = tuned(damaged, data, epochs=0)
    assert len(table) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, values(damaged), strict=True))


def test_the_same_seed_gives_the_same_weights(damaged: nn.Module, data: tuple[ImageSet, ImageSet]) -> None:
    models = [copy.deepcopy(damaged) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        tuned(model, data, seed=seed)
    first, same, other = map(values, models)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_best_epoch_is_kept_not_the_last(damaged: nn.Module, data: tuple[ImageSet, ImageSet]) -> None:
    best: list[tuple[float, list[Tensor]]] = []

    def remember(epoch: Epoch) -> None:
        best.append((epoch.accuracy, values(damaged)))
        if epoch.epoch == 1:
            with torch.no_grad():
                # From here on it can only get worse.
                damaged.get_parameter("fc2.weight").mul_(-30.0)

    table = tuned(damaged, data, epochs=2, on_epoch=remember)
    assert table["accuracy"].idxmax() == 1
    assert all(torch.equal(a, b) for a, b in zip(best[0][1], values(damaged), strict=True))


def test_stopping_keeps_the_best_weights(damaged: nn.Module, data: tuple[ImageSet, ImageSet]) -> None:
    kept: list[list[Tensor]] = []
    calls: list[tuple[int, int | None, str]] = []

    def stop(done: int, total: int | None, what: str) -> bool:
        calls.append((done, total, what))
        return not (what == "epoch 2 of 3" and done == 3)

    table = tuned(damaged, data, epochs=3, progress=stop, on_epoch=lambda _: kept.append(values(damaged)))
    assert table.index.tolist() == [0, 1]
    assert calls[-1] == (3, 8, "epoch 2 of 3")
    assert all(torch.equal(a, b) for a, b in zip(kept[0], values(damaged), strict=True))


def test_stopping_at_once_leaves_the_weights(damaged: nn.Module, data: tuple[ImageSet, ImageSet]) -> None:
    before = values(damaged)
    table = tuned(damaged, data, progress=lambda *_: False)
    assert len(table) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, values(damaged), strict=True))


@pytest.mark.parametrize("when", [0, 9])
def test_a_loss_that_is_not_finite_is_said_and_the_good_weights_stay(
    damaged: nn.Module, data: tuple[ImageSet, ImageSet], when: int
) -> None:
    steps: list[int] = []
    kept = [values(damaged)]

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        steps.append(1)
        found = nn.functional.cross_entropy(outputs, labels)
        return found * math.nan if len(steps) > when else found

    with pytest.raises(pl.PruneLabError, match="loss is not finite; the last good weights are kept"):
        tuned(damaged, data, epochs=2, loss=loss, on_epoch=lambda _: kept.append(values(damaged)))
    assert len(kept) == (1 if when == 0 else 2)
    assert all(torch.equal(a, b) for a, b in zip(kept[-1], values(damaged), strict=True))


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01),
    "momentum and decay": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-4),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-3),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_any_optimizer_and_masks_that_hold(
    damaged: nn.Module, data: tuple[ImageSet, ImageSet], make: Callable[..., torch.optim.Optimizer]
) -> None:
    mask = torch.rand(500, 800, generator=torch.Generator().manual_seed(1)) > 0.5
    # Momentum from before must not bring a weight back either.
    before = damaged.get_parameter("fc1.weight").detach().clone()
    table = tuned(damaged, data, optimizer=make, masks={"fc1.weight": mask})
    after = damaged.get_parameter("fc1.weight").detach()
    assert table["accuracy"][1] > table["accuracy"][0]
    assert (after[~mask] == 0).all()
    assert (after[mask] != 0).all()
    assert not torch.equal(after[mask], before[mask])


def test_masks_hold_after_every_single_step(damaged: nn.Module, data: tuple[ImageSet, ImageSet]) -> None:
    mask = torch.rand(500, 800, generator=torch.Generator().manual_seed(1)) > 0.5
    weight = damaged.get_parameter("fc1.weight")
    seen: list[bool] = []

    def look(*_: Any) -> bool:
        seen.append(bool((weight.detach()[~mask] == 0).all()))
        return True

    tuned(damaged, data, masks={"fc1.weight": mask}, progress=look)
    assert seen == [True] * 8


def test_masks_of_a_committed_network(damaged: nn.Module, data: tuple[ImageSet, ImageSet]) -> None:
    program = pl.trace(damaged, data[0].images[:2])
    selection = half_of_everything(program)
    small, masks = pl.commit(program, selection), pl.sliced_masks(program, selection)
    tuned(small, data, masks=masks)
    ((name, mask),) = masks.items()
    assert (small.get_parameter(name).detach()[~mask] == 0).all()


@pytest.mark.parametrize("precision", ["no", "bf16", None])
def test_precisions_one_after_the_other_leave_a_plain_module(
    damaged: nn.Module, data: tuple[ImageSet, ImageSet], precision: str | None
) -> None:
    attributes = [sorted(vars(m)) for m in damaged.modules()]
    for each in ("no", precision, "bf16"):
        table = tuned(damaged, data, precision=each)
        assert table["accuracy"].iloc[-1] > 0.5
    assert [sorted(vars(m)) for m in damaged.modules()] == attributes
    assert {p.dtype for p in damaged.parameters()} == {torch.float32}
    assert damaged(data[1].images[:3]).dtype == torch.float32
    copy.deepcopy(damaged)


def test_flags_devices_and_frozen_parameters_stay(damaged: nn.Module, data: tuple[ImageSet, ImageSet]) -> None:
    damaged.train()
    damaged.get_submodule("conv2").eval()
    damaged.get_submodule("conv1").requires_grad_(False)
    flags, frozen = [m.training for m in damaged.modules()], damaged.get_parameter("conv1.weight").detach().clone()
    tuned(damaged, data)
    assert [m.training for m in damaged.modules()] == flags
    assert torch.equal(damaged.get_parameter("conv1.weight"), frozen)
    assert not damaged.get_parameter("conv1.weight").requires_grad


def test_an_accelerator_of_the_users_own_is_left_as_it_was(damaged: nn.Module, data: tuple[ImageSet, ImageSet]) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    own = Accelerator(mixed_precision="no")
    try:
        tuned(damaged, data, precision="bf16")
        assert own.mixed_precision == "no"
        assert Accelerator(mixed_precision="no").mixed_precision == "no"
    finally:
        AcceleratorState._reset_state()


def test_loaders_are_taken_as_they_are(damaged: nn.Module, data: tuple[ImageSet, ImageSet]) -> None:
    train, val = data
    calls: list[int] = []
    loader = DataLoader(train, batch_size=100)
    table = tuned(damaged, (loader, DataLoader(val, batch_size=50)), progress=lambda done, *_: calls.append(done))
    assert calls == list(range(1, 11))
    assert table["accuracy"][1] > table["accuracy"][0]


def test_a_teacher_is_learned_from_and_not_changed(damaged: nn.Module, data: tuple[ImageSet, ImageSet]) -> None:
    teacher = zoo.load("lenet").train()
    before = values(teacher)
    # Wrong labels do not matter: the teacher's outputs are learned.
    wrong = TensorDataset(data[0].images, torch.zeros(1000, dtype=torch.int64))
    table = tuned(damaged, (wrong, data[1]), teacher=teacher)
    assert table["accuracy"][1] > table["accuracy"][0] + 0.05
    assert teacher.training
    assert all(torch.equal(a, b) for a, b in zip(before, values(teacher), strict=True))


class Endless(IterableDataset[Any]):
    """Nobody knows how many."""

    def __iter__(self) -> Any:
        return iter(())


def labels_up_to(data: ImageSet, label: int) -> TensorDataset:
    labels = data.labels.clone()
    labels[37] = label
    return TensorDataset(data.images, labels)


BAD: dict[str, tuple[Callable[[Any, Any], tuple[Any, Any]], dict[str, Any], str]] = {
    "training labels": (lambda t, v: (labels_up_to(t, 10), v), {}, "training labels go up to 10, but the network"),
    "validation labels": (lambda t, v: (t, labels_up_to(v, 12)), {}, "validation labels go up to 12, but the"),
    "no training images": (lambda t, v: (TensorDataset(t.images[:0], t.labels[:0]), v), {}, "training set is empty"),
    "no validation images": (lambda t, v: (t, TensorDataset(v.images[:0], v.labels[:0])), {}, "set is empty"),
    "no training labels": (lambda t, v: (TensorDataset(t.images), v), {}, "Fine-tuning needs labels"),
    "no validation labels": (lambda t, v: (t, TensorDataset(v.images)), {}, "Accuracy needs labels"),
    "no length": (lambda t, v: (DataLoader(Endless()), v), {}, "training set of known length"),
    "epochs": (lambda t, v: (t, v), {"epochs": -1}, "epochs must be 0 or more, not -1"),
    "precision": (lambda t, v: (t, v), {"precision": "fp32"}, "no precision 'fp32'; the nearest names are 'fp16'"),
    "mask name": (
        lambda t, v: (t, v), {"masks": {"fc9.weight": torch.ones(1)}}, "no parameter 'fc9.weight'; the nearest names",
    ),
    "mask shape": (
        lambda t, v: (t, v), {"masks": {"fc2.weight": torch.ones(3, 3)}}, r"fc2.weight has shape \(3, 3\), not \(10, 5",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "settings", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_and_the_weights_stay(
    damaged: nn.Module,
    data: tuple[ImageSet, ImageSet],
    spoil: Callable[..., Any],
    settings: dict[str, Any],
    message: str,
) -> None:
    damaged.train()
    before = values(damaged)
    with pytest.raises(pl.PruneLabError, match=message):
        tuned(damaged, spoil(*data), **settings)
    assert damaged.training
    assert all(torch.equal(a, b) for a, b in zip(before, values(damaged), strict=True))


def test_nothing_to_train_is_said(damaged: nn.Module, data: tuple[ImageSet, ImageSet]) -> None:
    damaged.requires_grad_(False)
    with pytest.raises(pl.PruneLabError, match="no parameters to train: all of them are frozen"):
        tuned(damaged, data)


class Views(nn.Module):
    """Views its images as rows, which takes them in the plain layout alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(3 * 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape ``(images, 3)``."""
        return self.fc(x.view(len(x), -1)) + self.conv(x).mean(dim=(1, 2, 3)).unsqueeze(1)


def test_the_layout_of_the_images_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(70, 3, 8, 8, generator=generator), torch.randint(3, (70,), generator=generator)
    torch.manual_seed(0)
    filters = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    views = Views()
    # A teacher may take another layout than its pupil.
    for model, settings, layout in (
        (filters, {"teacher": views}, "channels_last"),
        (views, {"teacher": filters}, "as it was"),
        (views, {"augment": pl.Augment(flip=True, crop=1)}, "as it was"),
    ):
        found = []
        for lying in (images, images.contiguous(memory_format=torch.channels_last)):
            one = copy.deepcopy(model)
            data = TensorDataset(lying, labels), TensorDataset(images, labels)
            table = tuned(one, data, batch_size=16, precision="no", keep="last", **settings)
            assert table.attrs["layout"] == layout
            found.append(values(one))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
