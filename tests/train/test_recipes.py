"""The settings of a fine-tuning: what each of them does to the training, and what it refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import killed
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import prunelab as pl
from prunelab.train.objective import Objective, divergence
from prunelab.train.recipe import Recipe, cosine

TRAIN, VAL = killed.images(200, 0), killed.images(100, 1)
SETTINGS: dict[str, Any] = {"epochs": 1, "batch_size": 16, "lr": 0.05, "progress": False, "precision": "no"}


def tuned(model: nn.Module, train: Any = TRAIN, val: Any = VAL, **settings: Any) -> pd.DataFrame:
    return pl.finetune(model, train, val, **{**SETTINGS, **settings})


def values(model: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in model.state_dict().values()]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(values(one), values(other), strict=True))


def test_the_cosine_warms_up_and_falls_to_zero() -> None:
    factor = cosine(warmup=0.2)
    assert [factor(x) for x in (0.0, 0.1, 0.2)] == pytest.approx([0, 0.5, 1])
    assert [factor(x) for x in (0.6, 1.0)] == pytest.approx([0.5, 0])
    assert cosine(warmup=0.0)(0.0) == 1
    assert cosine(warmup=1.0)(1.0) <= 1


def test_the_default_is_nesterov_sgd_written_out_by_hand() -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double()
    train = TensorDataset(TRAIN.tensors[0].double(), TRAIN.tensors[1])
    w, b = (p.detach().clone() for p in linear.parameters())
    # Whole batches: the order of the images does not matter.
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 200, "warmup": 0.5, "label_smoothing": 0.1}
    kept: list[list[Tensor]] = []
    tuned(
        linear, train, TensorDataset(train.tensors[0][:50], train.tensors[1][:50]), **settings,
        on_epoch=lambda _: kept.append([p.detach().clone() for p in linear.parameters()]),
    )  # fmt: skip
    x, target = train.tensors[0].flatten(1), nn.functional.one_hot(train.tensors[1], 4).double() * 0.9 + 0.1 / 4
    momenta = [torch.zeros_like(w), torch.zeros_like(b)]
    for step in range(3):
        done = (step + 0.5) / 3
        rate = 0.05 * (done / 0.5 if done < 0.5 else (1 + math.cos(math.pi * (done - 0.5) / 0.5)) / 2)
        wrong = ((x @ w.T + b).softmax(1) - target) / len(x)
        gradients = [wrong.T @ x + 5e-4 * w, wrong.sum(0) + 5e-4 * b]
        momenta = [0.9 * m + g for m, g in zip(momenta, gradients, strict=True)]
        w, b = (p - rate * (g + 0.9 * m) for p, g, m in zip((w, b), gradients, momenta, strict=True))
        torch.testing.assert_close(kept[step], [w, b], rtol=1e-10, atol=1e-12)


def test_a_schedule_of_ones_own_decides() -> None:
    asked: list[float] = []

    def schedule(done: float) -> float:
        asked.append(done)
        return 0.5

    table = tuned(killed.network(), schedule=schedule, epochs=2)
    assert asked == pytest.approx([(k + 0.5) / 26 for k in range(26)])
    assert table["lr"].tolist() == [0.05, 0.025, 0.025]


def test_distillation_is_weighted_with_the_labels_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, taught = (torch.randn(8, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.arange(8) % 4
    p, q = (taught / 3).softmax(1), (outputs / 3).softmax(1)
    by_hand = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(divergence(outputs, taught, 3.0), by_hand)
    objective = Objective(Recipe(teacher=nn.Identity(), temperature=3.0, teacher_weight=0.7))
    hard = -outputs.log_softmax(1)[torch.arange(8), labels].mean()
    torch.testing.assert_close(objective(outputs, labels, taught), 0.7 * by_hand + 0.3 * hard)


def test_a_teacher_alone_needs_no_labels() -> None:
    teacher = killed.network()
    tuned(teacher, epochs=3)
    pupil = killed.network()
    images = TRAIN.tensors[0]
    tables = [
        tuned(copy.deepcopy(pupil), data, teacher=teacher, epochs=2)
        for data in (TensorDataset(images), DataLoader(images, batch_size=16), TRAIN)
    ]
    assert all(table["accuracy"].max() > table["accuracy"][0] + 0.2 for table in tables)
    assert tables[0]["loss"].tolist()[1:] == tables[2]["loss"].tolist()[1:]
    with pytest.raises(pl.PruneLabError, match="Fine-tuning needs labels"):
        tuned(pupil, TensorDataset(images), teacher=teacher, teacher_weight=0.5)


def test_no_better_epoch_for_a_while_ends_it() -> None:
    table = tuned(killed.network(), epochs=50, lr=1e-9, patience=3, norm_images=0)
    assert table.attrs["ended"] == "no better for 3 epochs"
    assert len(table) < 20
    assert table["accuracy"].iloc[-3:].max() <= table["accuracy"].iloc[:-3].max()


def test_an_optimizer_goes_on_with_its_momenta_and_keeps_its_rates() -> None:
    one, two, three = (killed.network() for _ in range(3))
    optimizers = {
        model: torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
        for model in (one, two)
    }
    tuned(one, optimizer=optimizers[one])
    assert [group["lr"] for group in optimizers[one].param_groups] == [0.05]
    momentum = optimizers[one].state[one.get_parameter("fc.weight")]["momentum_buffer"]
    assert float(momentum.abs().max()) > 0
    # The same as an optimizer that is made inside.
    tuned(three)
    assert same(one, three)
    # A second training begins with what the first one left, and so ends elsewhere than one that begins afresh.
    two.load_state_dict(one.state_dict())
    three.load_state_dict(one.state_dict())
    for model in (one, three):
        tuned(model, optimizer=optimizers.get(model), norm_images=0, patience=1, schedule=lambda _: 1.0)
    assert not same(one, three)


def test_momenta_are_carried_through_a_commit() -> None:
    model = killed.network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    tuned(model, optimizer=optimizer)
    program = pl.trace(model, TRAIN.tensors[0][:2])
    selection = pl.Plan().set("conv", ratio=0.5).resolve(program)
    small = pl.commit(program, selection)
    carried = pl.carry(optimizer, program, selection, small)
    kept = list(selection.kept["conv"])
    before = optimizer.state[model.get_parameter("conv.weight")]["momentum_buffer"][kept]
    assert torch.equal(carried.state[small.get_parameter("conv.weight")]["momentum_buffer"], before)
    table = tuned(small, optimizer=carried)
    assert table["accuracy"].max() > 0.5
    assert not torch.equal(carried.state[small.get_parameter("conv.weight")]["momentum_buffer"], before)


def test_norm_statistics_taken_anew_are_those_of_the_training_images() -> None:
    model = killed.network()
    # The statistics of the training lag behind so far that those taken anew must be better.
    model.get_submodule("norm").momentum = 1e-4
    table = tuned(model, epochs=2, norm_images=10**6, batch_size=200)
    assert table.attrs["norms"].endswith("kept")
    assert "not kept" not in table.attrs["norms"]
    values = model.get_submodule("conv")(TRAIN.tensors[0]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.get_buffer("norm.running_mean"), values.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.get_buffer("norm.running_var"), values.var(1), rtol=1e-4, atol=1e-5)
    assert model.get_submodule("norm").momentum == 1e-4
    with torch.no_grad():
        right = (model.eval()(VAL.tensors[0]).argmax(1) == VAL.tensors[1]).double().mean()
    assert float(right) > table["accuracy"].max()


def test_norm_statistics_that_are_no_better_are_not_kept() -> None:
    table = tuned(killed.network(), lr=1e-9, norm_images=64, val=TensorDataset(VAL.tensors[0][:1], VAL.tensors[1][:1]))
    assert table.attrs["norms"].endswith("not kept")


def test_the_table_says_what_was_used() -> None:
    said = tuned(killed.network()).attrs
    assert said["device"] == "cpu"
    assert said["precision"] == "the network's own"
    assert said["layout"] == "channels_last"
    assert said["data"] == "held on cpu"
    assert said["ended"] == "all epochs done"
    assert tuned(killed.network(), precision="bf16").attrs["precision"] == "bfloat16"
    assert tuned(killed.network(), DataLoader(TRAIN, 16)).attrs["data"] == "loaded batch by batch"


class Viewing(killed.Small):
    """A forward that no other memory layout goes through."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).view(len(x), -1))


def test_a_forward_that_cannot_take_channels_last_is_left_in_peace() -> None:
    model = Viewing()
    assert tuned(model).attrs["layout"] == "as it was"
    with pytest.raises(pl.PruneLabError, match="does not take the channels_last layout"):
        tuned(model, channels_last=True)


def test_memory_layout_is_as_before() -> None:
    model = killed.network()
    assert tuned(model).attrs["layout"] == "channels_last"
    assert model.get_parameter("conv.weight").is_contiguous()


class Cramped(killed.Small):
    """A network on a device where no more than ten images fit at once."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 10:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return self.fc(torch.relu(self.conv(x)).flatten(1))


class Roomy(Cramped):
    """The same where more fit."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def test_out_of_memory_halves_the_batch_and_gives_the_same_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    cramped, roomy = Cramped().double(), Roomy().double()
    roomy.load_state_dict(cramped.state_dict())
    train, val = (TensorDataset(held.tensors[0].double(), held.tensors[1]) for held in (TRAIN, VAL))
    table = tuned(cramped, train, val, batch_size=32)
    expected = tuned(roomy, train, val, batch_size=32)
    assert table.attrs["images at once"] == "8"
    assert expected.attrs["images at once"] == "whole batches"
    said = capsys.readouterr().err
    assert "Out of GPU memory in training with 16 images at once: going on with 8." in said
    assert "Out of GPU memory in validation" in said
    for a, b in zip(values(cramped), values(roomy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_not_one_image_is_said() -> None:
    class Full(Roomy):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return super().forward(x)

    model = Full()
    before = values(model)
    with pytest.raises(pl.PruneLabError, match="Not even one image fits into the GPU's memory for training"):
        tuned(model)
    assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))


def test_a_score_of_ones_own_is_what_makes_an_epoch_best() -> None:
    def far_from_zero(outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.abs().mean(1)

    table = tuned(killed.network(), score=far_from_zero, norm_images=0)
    assert table["accuracy"].max() != round(table["accuracy"].max(), 2)


def named(data: TensorDataset, classes: list[str]) -> TensorDataset:
    data = TensorDataset(*data.tensors)
    vars(data)["classes"] = classes
    return data


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"epoch": 3}, "no setting 'epoch'; the nearest names are 'epochs'"),
    "both": ({"recipe": Recipe()}, "Give a recipe or settings, not both"),
    "every": ({"every": 0}, "1 step or more between two checkpoints"),
    "batch size": ({"batch_size": 0}, "batch size must be 1 or more"),
    "patience": ({"patience": 0}, "patience must be 1 epoch or more"),
    "warm-up": ({"warmup": 1.5}, "warmup is a share from 0 to 1, not 1.5"),
    "temperature": ({"temperature": 0.0}, "temperature must be above 0"),
    "smoothing": ({"loss": nn.CrossEntropyLoss(), "label_smoothing": 0.1}, "belongs to the default loss"),
    "classes": (
        {"train": named(TRAIN, ["a", "b", "c", "d"]), "val": named(VAL, ["a", "c", "b", "d"])},
        "validation set has other classes than the training set",
    ),
    "shape": ({"val": TensorDataset(torch.zeros(4, 1, 8, 8), torch.zeros(4).long())}, "does not take a batch of shape"),
    "empty loader": ({"val": DataLoader(TensorDataset(*(t[:0] for t in VAL.tensors)), 4)}, "the loader is empty"),
    "negative": (
        {"train": TensorDataset(TRAIN.tensors[0], TRAIN.tensors[1] - 1)}, "training labels begin at -1, but the",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    model = killed.network()
    before = values(model)
    with pytest.raises(pl.PruneLabError, match=message):
        tuned(model, **settings)
    assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))
