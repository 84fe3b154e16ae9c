"""Choosing a criterion in lab and explorer: all are offered, what they need is measured first, and undo brings back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import prunelab as pl
from prunelab.explorer.app import Explorer

TRAIN, TEST = pl.datasets.fashion_mnist()


@pytest.fixture
def lab(tmp_path: Path) -> pl.Lab:
    model = pl.zoo.load("resnet20")
    return pl.Lab(model, TRAIN.subset(160), TEST.subset(64), cache=tmp_path, criterion="l1", probe=64)


def test_every_criterion_fills_every_row(explorer: Explorer) -> None:
    assert tuple(explorer._criterion.options) == pl.criteria_names()
    for name in pl.criteria_names():
        explorer._criterion.value = name
        assert explorer._worker.drain(60)
        assert explorer.lab.plan.criterion == name
        assert explorer.desk.status["error"] == ""
        free = [row for row in explorer.desk.rows if not row["pinned"]]
        assert len(free) > 10
        assert all(len(row["scores"]) == row["channels"] and np.isfinite(row["scores"]).all() for row in free)


def test_a_criterion_of_gradients_measures_them_and_says_so(explorer: Explorer) -> None:
    assert explorer.lab.profile is not None
    assert not explorer.lab.profile.gradients
    explorer._criterion.value = "taylor"
    assert explorer._worker.drain(60)
    assert explorer.lab.profile.gradients
    assert explorer.desk.status["text"] == "Channels are scored by taylor."
    assert "Change of the loss" in explorer._choosing._about.value
    explorer.lab.undo()
    assert explorer.lab.plan.criterion == "l1"
    explorer.lab.redo()
    assert explorer.lab.scores("conv1").shape == (16,)


def test_stopped_on_the_way_the_old_criterion_stays(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explorer._stop, "is_set", lambda: True)
    explorer._criterion.value = "taylor"
    assert explorer._worker.drain(60)
    assert explorer.lab.plan.criterion == explorer._criterion.value == "l1"
    assert explorer.desk.status["text"].startswith(
        "Stopped before all that taylor needs was measured: the plan is as it was"
    )
    monkeypatch.undo()
    explorer._criterion.value = "taylor"
    assert explorer._worker.drain(60)
    assert explorer.lab.plan.criterion == "taylor"


def test_a_plan_read_from_a_file_waits_for_what_its_criterion_needs(
    explorer: Explorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, files = explorer.lab, explorer._files
    files.name.value = str(tmp_path / "plan.json")
    name = next(layer.name for layer in lab.program.layers if not layer.pinned)
    wanted = replace(lab.plan, criterion="taylor").set(name, ratio=0.5)
    (tmp_path / "plan.json").write_text(wanted.to_json())
    said: list[Any] = []
    explorer.desk.observe(lambda change: said.append(change["new"]), "status")
    before = lab.plan
    monkeypatch.setattr(explorer._stop, "is_set", lambda: True)
    files.load.click()
    assert explorer._worker.drain(60)
    assert lab.plan == before
    assert explorer.desk.status["text"].startswith("Stopped before all that taylor needs was measured")
    monkeypatch.undo()
    files.load.click()
    assert explorer._worker.drain(60)
    assert lab.plan == wanted
    assert explorer._criterion.value == "taylor"
    assert explorer.desk.layers[name]["value"] == 0.5
    assert explorer.desk.status["text"] == f"The plan comes from {tmp_path / 'plan.json'}."
    assert any(each["busy"] and each["progress"] for each in said)


def test_a_lab_may_begin_with_any_criterion_and_keeps_it_over_a_commit(lab: pl.Lab) -> None:
    lab.criterion("taylor_weight")
    lab.set_all(ratio=0.5)
    lab.commit()
    assert lab.plan.criterion == "taylor_weight"
    assert lab.profile is not None
    assert lab.profile.gradients
    assert lab.scores("conv1").shape == (8,)


def test_the_way_to_combine_is_a_step_of_the_plan(explorer: Explorer) -> None:
    lab = explorer.lab
    stream = next(layer.name for layer in lab.program.layers if layer.kind == "stream" and not layer.pinned)
    by_mean = lab.scores(stream)
    explorer._choosing.combine.value = "max"
    assert explorer._worker.drain(60)
    assert lab.plan.combine == "max"
    assert not np.allclose(lab.scores(stream), by_mean)
    lab.undo()
    assert np.array_equal(lab.scores(stream), by_mean)
    with pytest.raises(pl.PruneLabError, match="no way to combine 'median'"):
        lab.combine("median")
    assert lab.plan.combine == "mean"
