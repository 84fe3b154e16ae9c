"""The explorer and cells change the same lab: nobody's change is lost, shown for another's, or half done."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hand import drag, ratios

import prunelab as pl
from prunelab.explorer import lab as lab_module
from prunelab.explorer.app import Explorer
from prunelab.explorer.summary import summary

TRAIN, TEST = pl.datasets.fashion_mnist()


def channels(explorer: Explorer) -> list[int]:
    return [row["channels"] for row in explorer.desk.rows]


# Cells beside the desk ---------------------------------------------


def test_a_drag_keeps_what_a_cell_has_set_and_taken_back(lab: pl.Lab, explorer: Explorer) -> None:
    drag(explorer, "fc1", 0.3)
    lab.set("conv2", ratio=0.5)
    lab.set("fc1", ratio=0.0)
    drag(explorer, "conv1", 0.25)
    assert ratios(lab) == {"conv1": 0.25, "conv2": 0.5, "fc1": 0.0}
    shown = {name: explorer.desk.layers[name]["value"] for name in ("conv1", "conv2", "fc1")}
    assert shown == {"conv1": 0.25, "conv2": 0.5, "fc1": 0.0}


def test_a_drag_of_the_rows_of_another_network_is_not_made(lab: pl.Lab, explorer: Explorer) -> None:
    drag(explorer, "conv1", 0.5)
    lab.commit()
    drag(explorer, "conv2", 0.5)
    assert ratios(lab) == {}
    assert "changed in a cell" in explorer.desk.status["error"]
    assert channels(explorer) == [layer.channels for layer in lab.program.layers]
    drag(explorer, "conv2", 0.5)
    assert ratios(lab) == {"conv2": 0.5}


# Undo ---------------------------------------------


def test_a_drag_after_an_undo_is_a_step_of_its_own(lab: pl.Lab, explorer: Explorer) -> None:
    drag(explorer, "conv1", 0.25)
    drag(explorer, "conv2", 0.5)
    explorer._on_message(None, {"do": "undo"}, None)
    assert ratios(lab) == {"conv1": 0.25}
    drag(explorer, "conv2", 0.75)
    explorer._on_message(None, {"do": "undo"}, None)
    assert ratios(lab) == {"conv1": 0.25}


def test_a_plan_with_a_new_multiple_is_one_step(lab: pl.Lab, explorer: Explorer, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(pl.Plan(multiple=12).set("conv1", ratio=0.3).to_json())
    lab.multiple(8)
    explorer._show_network()
    before, steps = lab.plan, len(lab._past)
    explorer._files.name.value = str(tmp_path / "plan.json")
    explorer._guard(explorer._files._on_load)
    assert (lab.plan.multiple, explorer._tools.multiple.value, len(lab._past)) == (12, 12, steps + 1)
    lab.undo()
    assert lab.plan == before


# Failures half-way ---------------------------------------------


def test_a_commit_that_fails_leaves_network_and_rows_as_they_were(
    lab: pl.Lab, explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    drag(explorer, "conv1", 0.5)
    model, before, past = lab.model, channels(explorer), list(lab._past)

    def fail(*_: object, **__: object) -> None:
        raise pl.PruneLabError("on purpose")

    with monkeypatch.context() as patched:
        patched.setattr(lab, "prepare", fail)
        explorer._commit.click()
        assert explorer._worker.drain(60)
        assert "on purpose" in explorer.desk.status["error"]
    assert (lab.model, lab._past, ratios(lab)) == (model, past, {"conv1": 0.5})
    assert channels(explorer) == before


def test_an_estimate_that_a_refused_job_stopped_is_made_again(explorer: Explorer) -> None:
    gate = threading.Event()
    explorer._worker.latest(lambda wanted: gate.wait(30) and None)
    explorer._outdate()
    explorer._commit.click()  # there is nothing to commit
    gate.set()
    assert explorer._worker.drain(60)
    assert "nothing to commit" in explorer.desk.status["error"]
    assert explorer.desk.estimate["state"] == "ready"


@pytest.mark.parametrize(
    ("button", "said"), [("_commit", "nothing was committed"), ("_measure", "nothing was measured")]
)
def test_a_stop_during_the_repair_is_heard(
    lab: pl.Lab, explorer: Explorer, monkeypatch: pytest.MonkeyPatch, button: str, said: str
) -> None:
    lab.set("conv1", ratio=0.5)
    lab.repair("least-squares")
    explorer._show_plan()
    assert explorer._worker.drain(60)
    lab._repairer = None  # nothing is known of the repair from the estimate
    model, real = lab.model, lab._repair

    def stopped(*given: Any) -> Any:
        explorer._stopper.click()
        return real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(lab, "_repair", stopped)
        getattr(explorer, button).click()
        assert explorer._worker.drain(60)
    assert said in explorer.desk.status["text"]
    assert lab.model is model
    assert ratios(lab) == {"conv1": 0.5}


def test_a_stop_that_comes_late_stops_nothing(explorer: Explorer) -> None:
    explorer._job("short work", lambda: "done")
    assert explorer._worker.drain(60)
    explorer._on_stop()
    assert explorer.desk.status["text"] == "done"
    assert not explorer.desk.status["busy"]


@pytest.mark.parametrize(("name", "said"), [("", "Name a file in the field"), ("net.pt2", "name of a network's file")])
def test_a_plan_needs_a_file_of_its_own(explorer: Explorer, tmp_path: Path, name: str, said: str) -> None:
    explorer._files.name.value = str(tmp_path / name) if name else ""
    explorer._guard(explorer._files._on_save)
    assert said in explorer.desk.status["error"]
    assert list(tmp_path.iterdir()) == []


# Whose accuracy it is ---------------------------------------------


def test_a_summary_has_the_accuracy_of_this_network_and_not_of_one_of_its_shape(lab: pl.Lab) -> None:
    lab.set("conv1", ratio=0.9)
    lab.commit()
    cut = lab.points[-1]
    lab.finetune(epochs=2, lr=0.02, progress=False)
    trained = lab.points[-1]
    assert trained.plan == cut.plan
    assert trained.accuracy > cut.accuracy
    assert f"accuracy {trained.accuracy:.1%}" in summary(lab)
    lab.undo()
    assert f"accuracy {cut.accuracy:.1%}" in summary(lab)


def test_a_point_is_that_of_the_plan_that_was_measured(lab: pl.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.set("conv2", ratio=0.25)
    measured, before = lab.plan.to_json(), lab.cost()
    real = lab_module.removes_anything

    def in_between(*given: Any) -> bool:
        lab.set("conv2", ratio=0.75)
        return real(*given)

    monkeypatch.setattr(lab_module, "removes_anything", in_between)
    lab.measure()
    assert [(point.plan, point.params, point.flops) for point in lab.points] == [
        (measured, before.params, before.flops)
    ]


@pytest.mark.parametrize("how", ["channel", "weight", "trained"])
def test_a_loaded_lab_has_no_unpruned_network_to_learn_from(lab: pl.Lab, tmp_path: Path, how: str) -> None:
    lab.save(tmp_path / "begun")
    assert pl.Lab.load(tmp_path / "begun", pl.zoo.lenet, lab.train, lab.val).knows_unpruned
    if how == "trained":
        lab.finetune(epochs=1, lr=0.02, progress=False, keep="last")
    else:
        lab.set("conv1", ratio=0.5, grain=how)
        lab.commit()
    assert lab.knows_unpruned
    lab.save(tmp_path)
    back = pl.Lab.load(tmp_path, pl.zoo.lenet, lab.train, lab.val)
    back.run_profile(progress=False)
    view = pl.explore(back)._training
    assert view.distil.disabled
    assert "not in the folder" in view.distil.tooltip
    view.epochs.value = 1
    view.finetune.click()
    assert view.wait(60)
    assert back.training is not None
    assert back.training.reference is None
    assert not pl.explore(lab)._training.distil.disabled


def test_a_fine_tuning_that_fails_late_keeps_its_best_epoch(lab: pl.Lab) -> None:
    lab.set("conv1", ratio=0.9)
    lab.commit()
    before = {name: tensor.clone() for name, tensor in lab.model.state_dict().items()}

    def fail(row: Any) -> None:
        if row.epoch == 2:
            raise KeyError("on purpose")

    with pytest.raises(KeyError):
        lab.finetune(epochs=3, lr=0.02, progress=False, on_epoch=fail)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in lab.model.state_dict().items())
    lab.undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in lab.model.state_dict().items())


def test_work_that_waited_for_a_training_to_be_taken_over_has_the_controls_off(explorer: Explorer) -> None:
    gate, seen = threading.Event(), []
    explorer._worker.latest(lambda wanted: gate.wait(30) and None)
    explorer._later("taking over", lambda: "taken over")
    explorer._job("long work", lambda: seen.append((explorer._long, explorer._stopper.disabled)) or "done")
    gate.set()
    assert explorer._worker.drain(60)
    assert seen == [(True, False)]
    assert explorer.desk.status["text"] == "done"
    assert not explorer._long
