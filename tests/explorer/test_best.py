"""The best plan in lab and explorer: one step of undo, what is locked stays, a stop leaves everything as it was."""

from __future__ import annotations

from typing import Any

import pytest

import prunelab as pl
from prunelab.explorer.app import Explorer
from prunelab.explorer.best_view import WISHES
from prunelab.search import Wish

TRAIN, TEST = pl.datasets.fashion_mnist()


@pytest.fixture
def lab() -> pl.Lab:
    return pl.Lab(pl.zoo.load("lenet"), TRAIN.subset(200), TEST.subset(300), cache=False, probe=200)


def test_the_lab_takes_the_plan_in_one_step_of_undo(lab: pl.Lab) -> None:
    lab.set("conv1", ratio=0.25, locked=True)
    lab.set("fc1", ratio=0.9)
    lab.criterion("apoz")
    lab.repair("bias")
    before = lab.plan
    best = lab.best_plan(flops=0.5, n=64, progress=False)
    assert lab.plan == best.plan
    assert lab.cost().flops == best.found.flops <= 0.5 * lab.dense_cost().flops
    assert lab.plan.settings["conv1"] == before.settings["conv1"]
    assert (lab.plan.criterion, lab.plan.repair, lab.plan.network) == ("apoz", "bias", before.network)
    assert best.found.n == 200
    assert best.found.accuracy == lab.estimate().accuracy
    lab.undo()
    assert lab.plan == before


def test_what_is_refused_or_stopped_changes_nothing(lab: pl.Lab) -> None:
    lab.set("fc1", ratio=0.3)
    before = lab.plan
    with pytest.raises(pl.PruneLabError, match=r"cannot come down to 0\.1 % .* is left"):
        lab.best_plan(flops=0.001, n=64, progress=False)
    with pytest.raises(pl.Stopped):
        lab.best_plan(flops=0.5, n=64, progress=lambda done, total, what: done < 10)
    assert lab.plan == before
    lab.undo()
    assert lab.plan.settings == {}


def test_weights_that_a_commit_has_zeroed_stay_zero(lab: pl.Lab) -> None:
    lab.set("fc1", ratio=0.9, grain="weight")
    lab.commit()
    lab.repair("least-squares")
    best = lab.best_plan(flops=0.8, n=64, n_found=300, precision="float32", progress=False)
    assert best.found.accuracy == lab.measure().accuracy


@pytest.mark.parametrize("wish", WISHES)
def test_every_wish_of_the_explorer_can_be_asked(wish: str) -> None:
    assert "≤" in str(Wish(**WISHES[wish]))


def test_the_explorer_fills_in_the_sliders_and_stops(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, view = explorer.lab, explorer._best
    before = lab.plan
    assert view.picture.layout.display == "none"
    say = explorer._say

    def stopping(text: str, progress: float | None = None, **more: Any) -> None:
        say(text, progress, **more)
        if progress is not None and progress > 0.2:
            explorer._on_stop()

    monkeypatch.setattr(explorer, "_say", stopping)
    view.button.click()
    assert view.button.disabled
    assert explorer._worker.drain(120)
    assert explorer.desk.status["text"].startswith("Stopped: the plan is as it was")
    assert lab.plan == before
    monkeypatch.setattr(explorer, "_say", say)
    view.button.click()
    assert explorer._worker.drain(120)
    assert explorer.desk.status["text"].startswith("Best plan for FLOPs −50 %: ")
    assert explorer.desk.figures["flops"] == lab.cost().flops <= 0.5 * lab.dense_cost().flops
    shown = {name: entry["value"] for name, entry in explorer.desk.layers.items() if entry["rule"] == "ratio"}
    assert shown == {name: setting.ratio for name, setting in lab.plan.settings.items()}
    assert view.picture.layout.display is None
    assert not view.button.disabled
    explorer._on_message(None, {"do": "undo"}, None)
    assert lab.plan == before


def test_the_explorer_says_what_cannot_be_had(explorer: Explorer) -> None:
    for layer in ("conv1", "conv2", "fc1"):
        explorer.lab.set(layer, locked=True)
    explorer._best.button.click()
    assert explorer._worker.drain(60)
    assert "nothing to plan" in explorer.desk.status["error"]
    assert not explorer._best.button.disabled
