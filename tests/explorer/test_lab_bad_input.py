"""The lab meets what it was not made for: one sentence, and all as it was. And promises that outlive a commit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import prunelab as pl
from prunelab import zoo
from prunelab.datasets import ImageSet

TRAIN, TEST = (part.subset(300) for part in pl.datasets.fashion_mnist())


@pytest.fixture
def lab() -> pl.Lab:
    return pl.Lab(zoo.load("lenet"), TRAIN, TEST)


def state(lab: pl.Lab) -> tuple[Any, ...]:
    """Everything that a refusal must not change."""
    return lab.plan, lab.model, lab.can_undo, lab.can_redo, lab.points, lab.cost(), lab.stage.masks


# Bad input at the door

WRONG = torch.zeros(8, 3, 28, 28)
LABELS = torch.arange(8)

DOOR: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "no labels": (lambda: (zoo.lenet(), TRAIN, TensorDataset(TEST.images)), "Accuracy needs labels"),
    "no images": (lambda: (zoo.lenet(), TRAIN, TensorDataset(TEST.images[:0], TEST.labels[:0])), "set is empty"),
    "another shape": (lambda: (zoo.lenet(), TRAIN, TensorDataset(WRONG, LABELS)), "LeNet cannot run on an example"),
    "no module": (lambda: ("lenet", TRAIN, TEST), "needs a torch.nn.Module, not a str"),
    "no data": (lambda: (zoo.lenet(), TRAIN, None), "Data must be a Dataset"),
    "soft labels": (
        lambda: (zoo.lenet(), TRAIN, TensorDataset(TEST.images, torch.ones(300, 10))), "must be one class number",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "message"), DOOR.values(), ids=DOOR)
def test_what_cannot_be_opened_is_refused_in_a_sentence(given: Callable[[], tuple[Any, ...]], message: str) -> None:
    with pytest.raises(pl.PruneLabError, match=message) as caught:
        pl.Lab(*given())
    assert "\n" not in str(caught.value)


# Bad training data: met when a profile or a training needs it ---------------------------------------------

TRAINING: dict[str, tuple[Any, str]] = {
    "empty": (TensorDataset(TRAIN.images[:0], TRAIN.labels[:0]), "no images to profile"),
    "another shape": (TensorDataset(WRONG, LABELS), r"shape \(3, 28, 28\), but the network was traced"),
    "not numbers": (TensorDataset(TRAIN.images * torch.nan, TRAIN.labels), "are not finite"),
}


@pytest.mark.parametrize(("train", "message"), TRAINING.values(), ids=TRAINING)
@pytest.mark.parametrize("how", ["criterion", "use", "run_profile"])
def test_training_data_that_cannot_be_profiled_change_nothing(train: Any, message: str, how: str) -> None:
    lab = pl.Lab(zoo.load("lenet"), train, TEST)
    lab.set("conv2", ratio=0.5)
    before = state(lab)
    ways: dict[str, Callable[[], object]] = {
        "criterion": lambda: lab.criterion("apoz"),
        "use": lambda: lab.use(pl.Plan("apoz").set("conv1", ratio=0.5)),
        "run_profile": lambda: lab.run_profile(progress=False),
    }
    with pytest.raises(pl.PruneLabError, match=message):
        ways[how]()
    assert state(lab) == before
    assert lab.profile is None


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (TensorDataset(TRAIN.images), "Fine-tuning needs labels"),
        (TensorDataset(TRAIN.images[:0], TRAIN.labels[:0]), "training set is empty"),
        (TensorDataset(TRAIN.images, TRAIN.labels + 5), "training labels go up to 14, but the network has 10"),
        (TensorDataset(TRAIN.images * torch.nan, TRAIN.labels), "loss is not finite"),
    ],
)
def test_a_training_that_fails_changes_nothing(train: Any, message: str) -> None:
    lab = pl.Lab(zoo.load("lenet"), train, TEST)
    lab.set("conv2", ratio=0.5)
    before, weights = state(lab), [p.detach().clone() for p in lab.model.parameters()]
    with pytest.raises(pl.PruneLabError, match=message):
        lab.finetune(epochs=1, progress=False)
    assert state(lab) == before
    assert all(torch.equal(a, b) for a, b in zip(weights, lab.model.parameters(), strict=True))


def test_a_profile_that_is_stopped_changes_nothing(lab: pl.Lab, tmp_path: Path) -> None:
    lab.cache = tmp_path
    before = state(lab)
    with pytest.raises(pl.Stopped):
        lab.run_profile(progress=lambda *_: False)
    assert state(lab) == before
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "lab.json").unlink(),
        lambda folder: (folder / "lab.json").write_text("{"),
        lambda folder: (folder / "lab.json").write_text("{}"),
        lambda folder: next(folder.glob("*.safetensors")).unlink(),
        lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"not tensors"),
    ],
    ids=["no json", "half json", "empty json", "no tensors", "no safetensors"],
)
def test_damaged_folders_are_refused_in_a_sentence(lab: pl.Lab, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    lab.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(pl.PruneLabError, match="no lab to load"):
        pl.Lab.load(tmp_path, zoo.lenet, TRAIN, TEST)


def test_tensors_of_another_network_are_refused(lab: pl.Lab, tmp_path: Path) -> None:
    lab.save(tmp_path)
    with pytest.raises(pl.PruneLabError, match="not those of the model that make_model gives"):
        pl.Lab.load(tmp_path, zoo.vgg_small, TRAIN, TEST)


def test_a_place_that_cannot_be_written_is_said(lab: pl.Lab, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for write in (lab.save, lambda path: lab.export(path / "small.pt2")):
        with pytest.raises(pl.PruneLabError, match=r"cannot be (saved|written)"):
            write(tmp_path / "file")


# What must hold beyond a commit


def test_new_plans_end_what_could_be_redone(lab: pl.Lab) -> None:
    lab.set("conv1", ratio=0.1)
    lab.set("conv1", ratio=0.2)
    lab.undo()
    assert lab.can_redo
    lab.set("conv2", ratio=0.3)
    assert not lab.can_redo
    lab.redo()
    assert set(lab.plan.settings) == {"conv1", "conv2"}
    for _ in range(9):
        lab.undo()
    assert not lab.plan.settings
    assert not lab.can_undo


def test_a_plan_that_says_the_same_is_no_step(lab: pl.Lab) -> None:
    lab.set("conv1", ratio=0.25)
    lab.set("conv1", ratio=0.25)
    lab.undo()
    assert not lab.can_undo


def test_undo_and_redo_go_over_commits_and_trainings(lab: pl.Lab) -> None:
    models = [lab.model]
    for layer in ("conv1", "conv2"):
        lab.set(layer, ratio=0.5)
        models.append(lab.commit())
    lab.finetune(epochs=1, progress=False)
    models.append(lab.model)
    assert len({id(m) for m in models}) == 4
    seen = [lab.model]
    while lab.can_undo:
        lab.undo()
        if lab.model is not seen[-1]:
            seen.append(lab.model)
    assert seen == models[::-1]
    assert lab.model is lab.original is models[0]
    while lab.can_redo:
        lab.redo()
    assert lab.model is models[-1]


class Literal(nn.Module):
    """Its forward has the size of one layer in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(784, 12), nn.Linear(12, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x.flatten(1)).relu()
        logits: Tensor = self.head(self.b(hidden).relu().view(-1, 8))
        return logits


def test_what_was_pinned_stays_pinned_after_a_commit_and_a_training() -> None:
    torch.manual_seed(0)
    lab = pl.Lab(Literal().eval(), TRAIN, TEST)
    reason = lab.program.layer("b").pinned
    assert "forward does not follow the cut at view (in " in reason
    lab.set("a", ratio=0.5)
    lab.commit()
    assert lab.program.layer("b").pinned == reason
    lab.finetune(epochs=1, progress=False)
    assert lab.program.layer("b").pinned == reason
    with pytest.raises(pl.PruneLabError, match="'b' cannot be pruned: your forward does not follow"):
        lab.set("b", ratio=0.5)


def test_a_commit_down_to_single_channels_can_go_on(lab: pl.Lab) -> None:
    lab.set("conv1", ratio=1.0)
    lab.set("conv2", ratio=1.0)
    lab.commit()
    lab.set("fc1", ratio=0.5)
    small = lab.commit()
    assert [p.shape[0] for n, p in small.named_parameters() if n.endswith("weight")] == [1, 1, 250, 10]
    assert lab.dense_cost().params == sum(p.numel() for p in small.parameters())
    assert lab.measure().n == 300


def test_the_users_network_and_data_are_never_changed() -> None:
    model = zoo.load("resnet20").train()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    images = TRAIN.images.clone()
    lab = pl.Lab(model, TRAIN, TEST, criterion="apoz")
    lab.set_all(ratio=0.3)
    lab.measure()
    lab.commit()
    lab.finetune(epochs=1, progress=False)
    assert model.training
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(TRAIN.images, images)


def test_history_says_what_every_point_cost(lab: pl.Lab) -> None:
    lab.measure()
    lab.set_all(ratio=0.5)
    lab.estimate()
    lab.commit()
    lab.finetune(epochs=1, progress=False)
    frame = lab.history
    assert list(frame["kind"]) == ["dense", "plan", "commit", "finetune"]
    assert list(frame.columns) == [
        *("kind", "params", "compression", "nonzero", "speedup", "flops", "accuracy", "low", "high", "n", "plan"),
        "precision",
    ]
    assert frame["compression"].iloc[0] == frame["speedup"].iloc[0] == 1.0
    assert (frame["params"].iloc[1:] == lab.dense_cost().params).all()
    assert (frame["low"] <= frame["accuracy"]).all()
    assert (frame["accuracy"] <= frame["high"]).all()
    assert (frame["n"] == 300).all()
    assert pl.Plan.from_json(frame["plan"].iloc[1]).settings["conv2"].ratio == 0.5


def test_saved_masks_and_points_come_back(lab: pl.Lab, tmp_path: Path) -> None:
    lab.set("fc1", ratio=0.5, grain="weight")
    lab.set("conv2", ratio=0.5)
    lab.commit()
    lab.save(tmp_path)
    back = pl.Lab.load(tmp_path, zoo.lenet, TRAIN, TEST)
    assert back.points == lab.points
    assert back.dense_cost() == lab.dense_cost()
    assert back.dense_cost().nonzero < back.dense_cost().params
    back.finetune(epochs=1, progress=False)
    zeros = sum(int((p == 0).sum()) for p in back.model.parameters())
    assert zeros >= lab.dense_cost().params - lab.dense_cost().nonzero
    # Plain text beside plain tensors: nothing that is unpickled.
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert json.loads((tmp_path / "lab.json").read_text())["format"] == 1


def test_exported_weights_are_the_networks(lab: pl.Lab, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    lab.set_all(ratio=0.5)
    small = lab.commit()
    tensors = load_file(lab.export(tmp_path / "deep" / "small.safetensors"))
    assert tensors.keys() == small.state_dict().keys()
    assert all(torch.equal(tensors[k], v) for k, v in small.state_dict().items())


def test_any_batch_size_runs_an_exported_network(lab: pl.Lab, tmp_path: Path) -> None:
    again = torch.export.load(lab.export(tmp_path / "lenet.pt2")).module()
    for count in (1, 2, 9):
        with torch.no_grad():
            torch.testing.assert_close(again(TEST.images[:count]), lab.model(TEST.images[:count]))


def test_image_sets_are_what_these_tests_use() -> None:
    assert isinstance(TRAIN, ImageSet)
    assert len(TRAIN) == len(TEST) == 300
