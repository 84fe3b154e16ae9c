"""Checkpoints: stopped and broken trainings go on, and nobody else's folder is touched."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import prunelab as pl
from prunelab.train.augment import Augment

SETTINGS: dict[str, Any] = {"epochs": 3, "batch_size": 16, "lr": 0.05, "augment": Augment(flip=True), "progress": False}


def tuned(model: nn.Module, folder: Path | None = None, **settings: Any) -> pd.DataFrame:
    data = killed.images(200, 0), killed.images(100, 1)
    return pl.finetune(model, *data, folder=folder, **{**SETTINGS, **settings})


def values(model: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in model.state_dict().values()]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(values(one), values(other), strict=True))


def stopping_after(steps: int) -> Callable[..., bool]:
    calls: list[int] = []

    def stop(*_: Any) -> bool:
        calls.append(1)
        return len(calls) < steps

    return stop


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def leave_as_killed(folder: Path) -> None:
    """What a process leaves that is killed right after its last checkpoint has moved to its place."""
    (folder / ".unfinished-abc").mkdir()
    (folder / ".unfinished-abc" / "tensors").write_text("half")
    (folder / "training-0123456789abcdef.safetensors").write_text("the one before")


def test_a_stopped_training_goes_on_with_the_model_it_left_and_with_the_one_it_began_with(tmp_path: Path) -> None:
    whole = killed.network()
    expected = tuned(whole)
    model = killed.network()
    for steps in (5, 17, 4):
        table = tuned(model, tmp_path / "run", progress=stopping_after(steps))
        assert table.attrs["ended"].startswith("stopped in epoch")
    at = json.loads((tmp_path / "run" / "training.json").read_text())["at"]
    # 13 steps an epoch: the stop is answered after the very step, and that step is kept.
    assert (at["epoch"], at["step"]) == (2, 13)
    other = killed.network()
    table = tuned(other, tmp_path / "run")
    assert same(other, whole)
    pd.testing.assert_frame_equal(table.drop(columns="seconds"), expected.drop(columns="seconds"))
    before = contents(tmp_path / "run")
    again = tuned(other, tmp_path / "run", progress=lambda *_: pytest.fail("a step"))
    assert same(other, whole)
    pd.testing.assert_frame_equal(again, table)
    assert before == contents(tmp_path / "run")


def test_what_was_left_beside_the_last_checkpoint_is_gone_when_the_run_is_looked_at_again(tmp_path: Path) -> None:
    model = killed.network()
    tuned(model, tmp_path, epochs=1)
    before = contents(tmp_path)
    (tmp_path / "notes.txt").write_text("the user's own")
    leave_as_killed(tmp_path)
    tuned(model, tmp_path, epochs=1)
    assert contents(tmp_path) == {**before, "notes.txt": b"the user's own"}
    assert not list(tmp_path.glob(".unfinished-*"))


def test_momentum_of_other_optimizers_survives_too(tmp_path: Path) -> None:
    def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": parameters[:2], "lr": 1e-2}, {"params": parameters[2:]}], lr=3e-3)

    whole, model = killed.network(), killed.network()
    tuned(whole, optimizer=adam)
    tuned(model, tmp_path / "run", optimizer=adam, progress=stopping_after(20))
    tuned(model, tmp_path / "run", optimizer=adam)
    assert same(model, whole)


def test_a_loss_that_is_not_finite_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    steps: list[int] = []

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        steps.append(1)
        return nn.functional.cross_entropy(outputs, labels) * (math.nan if len(steps) == 17 else 1.0)

    with pytest.raises(pl.PruneLabError, match="loss is not finite; the last good weights are kept"):
        tuned(killed.network(), tmp_path / "run", loss=loss, every=5)
    at = json.loads((tmp_path / "run" / "training.json").read_text())["at"]
    assert (at["epoch"], at["step"]) == (2, 0)


class Wider(killed.Small):
    """Another network."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8 * 64, 5)


def changed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    return model


OTHER: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "network": (Wider, {}, "network was Small .*, and is Wider"),
    "weights": (lambda: changed(killed.network()), {}, "it began with other weights"),
    "setting": (killed.network, {"lr": 0.1}, "lr was 0.05, and is 0.1"),
    "augmentation": (killed.network, {"augment": None}, r"augment was Augment\(flip=True, .*, and is None"),
    "teacher": (killed.network, {"teacher": killed.network()}, "teacher was None, and is Small"),
    "masks": (killed.network, {"masks": {"fc.bias": torch.zeros(4)}}, "masks was none, and is"),
}


@pytest.mark.parametrize(("make", "settings", "message"), OTHER.values(), ids=OTHER)
def test_another_runs_folder_is_refused_and_not_touched(
    tmp_path: Path, make: Callable[[], nn.Module], settings: dict[str, Any], message: str
) -> None:
    tuned(killed.network(), tmp_path, epochs=1)
    leave_as_killed(tmp_path)
    before, model = contents(tmp_path), make()
    weights = values(model)
    with pytest.raises(pl.PruneLabError, match=f"of another run: {message}"):
        tuned(model, tmp_path, **{"epochs": 1, **settings})
    assert contents(tmp_path) == before
    assert all(torch.equal(a, b) for a, b in zip(weights, values(model), strict=True))


def test_other_data_is_refused(tmp_path: Path) -> None:
    train, val = killed.images(200, 0), killed.images(100, 1)
    pl.finetune(killed.network(), train, val, folder=tmp_path, **{**SETTINGS, "epochs": 1})
    for other, what in (((killed.images(200, 5), val), "training"), ((train, killed.images(90, 1)), "validation")):
        with pytest.raises(pl.PruneLabError, match=f"of another run: {what} set was"):
            pl.finetune(killed.network(), *other, folder=tmp_path, **{**SETTINGS, "epochs": 1})


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(pl.PruneLabError, match="There is no training to load in"):
        tuned(killed.network(), tmp_path)
    assert (tmp_path / "training.json").read_text() == "{"


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(pl.PruneLabError, match="training cannot be written to"):
        tuned(killed.network(), tmp_path / "file" / "run")


def test_the_lab_trains_with_a_folder(tmp_path: Path) -> None:
    lab = pl.Lab(killed.network(), killed.images(200, 0), killed.images(100, 1), cache=False)
    lab.finetune(progress=stopping_after(5), folder=tmp_path, epochs=1)
    lab.undo()
    table = lab.finetune(progress=False, folder=tmp_path, epochs=1)
    whole = copy.deepcopy(killed.network())
    pl.finetune(whole, killed.images(200, 0), killed.images(100, 1), epochs=1, progress=False)
    assert table.index.tolist() == [0, 1]
    assert same(lab.model, whole)
