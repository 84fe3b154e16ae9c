"""The explorer's own rules, without a browser: who may change what, and when."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hand import drag

import prunelab as pl
from prunelab.explorer.app import Explorer

TRAIN, TEST = pl.datasets.fashion_mnist()


def test_an_edit_during_long_work_is_refused_and_leaves_the_controls_off(lab: pl.Lab, explorer: Explorer) -> None:
    gate = threading.Event()
    explorer._job("long work", lambda: "done" if gate.wait(30) else "late")
    plan = lab.plan
    for ratio in (0.3, 0.6):
        drag(explorer, "conv2", ratio)
        assert "wait, or stop it first" in explorer.desk.status["error"]
        assert lab.plan == plan
        assert explorer._commit.disabled
        assert not explorer._stopper.disabled
    gate.set()
    assert explorer._worker.drain(60)
    assert explorer.desk.status["text"] == "done"
    assert not explorer._commit.disabled


def test_the_repair_says_what_it_did(lab: pl.Lab, explorer: Explorer) -> None:
    assert explorer._repaired.layout.display == "none"
    lab.set("fc1", ratio=0.5)
    explorer._repair.value = "least-squares"
    assert explorer._worker.drain(60)
    assert "2 tensors corrected from 200 images" in explorer._repaired.value
    assert explorer._repaired.layout.display is None
    explorer._repair.value = "none"
    assert explorer._worker.drain(60)
    assert explorer._repaired.layout.display == "none"


def test_with_new_rows_comes_the_word_that_the_accuracy_is_of_the_old_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = pl.Lab(pl.zoo.load("vgg_small"), TRAIN.subset(200), TEST.subset(200), cache=False)
    lab.run_profile(progress=False)
    explorer = pl.explore(lab)
    assert explorer._worker.drain(60)
    assert explorer.desk.estimate["state"] == "ready"
    sent: list[tuple[set[str], str]] = []

    def send(key: str | set[str] | None = None) -> None:
        sent.append(({key} if isinstance(key, str) else set(key or ()), explorer.desk.estimate["state"]))

    monkeypatch.setattr(explorer.desk, "send_state", send)
    explorer._on_message(None, {"do": "bypass", "unit": "stage3.conv2"}, None)
    assert explorer._worker.drain(60)
    assert [("estimate" in keys, state) for keys, state in sent if "units" in keys] == [(True, "stale")]


def test_a_plan_goes_to_a_file_and_comes_back_or_the_place_is_refused(
    lab: pl.Lab, explorer: Explorer, tmp_path: Path
) -> None:
    lab.set("fc1", ratio=0.5)
    plan = lab.plan
    explorer._files.name.value = str(tmp_path / "plan.json")
    explorer._guard(explorer._files._on_save)
    lab.reset()
    assert lab.plan != plan
    explorer._guard(explorer._files._on_load)
    assert lab.plan == plan
    explorer._files.name.value = str(tmp_path / "nowhere" / "plan.json")
    explorer._guard(explorer._files._on_save)
    error = explorer.desk.status["error"]
    assert error.startswith(f"The plan cannot be written to {tmp_path}")
    assert "No such file or directory" in error
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]
