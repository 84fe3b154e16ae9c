"""Training from the explorer: beside the hand on the sliders, stopped, failed, and squeezed. No browser."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hand import drag
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import prunelab as pl
from prunelab.explorer.app import Explorer
from prunelab.explorer.clock import Clock, in_words
from prunelab.explorer.train_plot import smoothed, training_curves
from prunelab.explorer.training import Course, Training

TRAIN, TEST = pl.datasets.fashion_mnist()


@pytest.fixture
def explorer() -> Explorer:
    lab = pl.Lab(pl.zoo.load("lenet"), TRAIN.subset(1000), TEST.subset(600), cache=False, criterion="l1")
    lab.run_profile(progress=False)
    found = pl.explore(lab)
    assert found._worker.drain(60)
    return found


def until(met: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something that another thread does."""
    give_up = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.005)


def begin(explorer: Explorer, epochs: int, steps: int = 1) -> Course:
    """Press fine-tune and wait for some steps."""
    view = explorer._training
    view.epochs.value = epochs
    view.finetune.click()
    course = explorer.lab.training
    assert course is not None
    until(lambda: len(course.losses) >= steps)
    return course


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# Beside the hand ---------------------------------------------


def test_planning_goes_on_while_a_network_is_trained(explorer: Explorer) -> None:
    lab, view, desk = explorer.lab, explorer._training, explorer.desk
    model, weights = lab.model, state(lab.model)
    begin(explorer, 1000)
    drag(explorer, "fc1", 0.9)
    assert desk.status["error"] == ""
    until(lambda: desk.estimate["state"] == "ready" and desk.estimate["edits"] == desk.edits)
    # Estimated meanwhile, and rightly: the training looks at nothing of it.
    assert view._running
    assert (
        desk.estimate["accuracy"]
        == pl.Preview(lab.program, lab._images, lab._labels).accuracy(lab.selection, precision="auto").accuracy
    )
    desk.selected = "conv2"
    explorer._criterion.value = "l2"
    drag(explorer, "conv2", 0.5)
    plan = lab.plan
    assert {name: s.ratio for name, s in plan.settings.items()} == {"fc1": 0.9, "conv2": 0.5}
    assert lab.model is model
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())

    view.stop.click()
    assert view.wait(60)
    # The plan was made for this structure, and goes on with the trained weights.
    assert lab.plan.settings == plan.settings
    assert desk.layers["fc1"]["value"] == 0.9
    if lab.model is not model:
        explorer._on_message(None, {"do": "undo"}, None)
    assert lab.model is model
    assert lab.plan == plan
    assert explorer._worker.drain(60)


@pytest.mark.parametrize("name", ["_commit", "export", "finetune", "squeeze", "speed"])
def test_what_cannot_go_on_beside_a_training_is_off_and_refused(explorer: Explorer, name: str) -> None:
    view = explorer._training
    button = next(
        getattr(part, name) for part in (explorer, view, explorer._tools, explorer._files) if hasattr(part, name)
    )
    explorer.lab.set("fc1", ratio=0.5)
    begin(explorer, 1000)
    model = explorer.lab.model
    assert button.disabled
    # A click may be on its way already.
    button.click()
    assert "A network is being trained: wait, or stop the training" in explorer.desk.status["error"]
    assert explorer.lab.model is model
    # Other long work takes its turn, and leaves the button off.
    explorer._measure.click()
    assert explorer._worker.drain(60)
    assert explorer.desk.status["text"].startswith("This plan scores")
    assert button.disabled
    view.stop.click()
    assert view.wait(60)
    assert not button.disabled


def test_what_is_trained_waits_for_other_long_work(explorer: Explorer) -> None:
    view, gate = explorer._training, threading.Event()
    course = begin(explorer, 1000)
    until(lambda: len(course.rows) > 1)
    explorer._job("long work", lambda: "done" if gate.wait(60) else "late")
    model = explorer.lab.model
    view.stop.click()
    assert view._worker.drain(60)
    assert explorer.lab.model is model
    assert view._running
    gate.set()
    assert view.wait(60)
    assert "Stopped" in explorer.desk.status["text"]
    assert not explorer._commit.disabled


# To the end, stopped, failed ---------------------------------------------


def some_epochs_of_half(explorer: Explorer) -> tuple[nn.Module, Course]:
    """Cut every layer to half, and train that, with a few epochs done; gives it as it was, and its training."""
    explorer.lab.set_all(ratio=0.5)
    explorer.lab.commit()
    cut = explorer.lab.model
    explorer._show_network()
    explorer._training.lr.value = 0.02
    course = begin(explorer, 1000)
    until(lambda: len(course.rows) > 3)
    return cut, course


ENDING = """
import time
import prunelab as pl

train, val = pl.datasets.fashion_mnist()
lab = pl.Lab(pl.zoo.load("lenet"), train.subset(1000), val.subset(600), cache=False, criterion="l1")
lab.run_profile(progress=False)
explorer = pl.explore(lab)
view = explorer._training
view.epochs.value = 1000
view.finetune.click()
while len(lab.training.losses) < 5:
    time.sleep(0.005)
explorer._scan.click()
"""


def test_the_interpreter_ends_while_a_network_is_trained_and_layers_are_scanned() -> None:
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "exception" not in done.stderr.lower()


def test_a_training_becomes_the_current_network_with_its_curves(explorer: Explorer) -> None:
    lab, view = explorer.lab, explorer._training
    model = lab.model
    for layer in ("conv1", "fc1"):
        lab.set(layer, ratio=0.5)
    lab.commit()
    cut = lab.model
    explorer._show_network()
    view.lr.value, view.augment.value, view.smoothing.value = 0.02, True, 0.1
    assert view.picture.layout.display == "none"
    course = begin(explorer, 2)
    assert view.wait(120)
    assert lab.model is not cut
    assert lab.training is course
    text = explorer.desk.status["text"]
    assert "after 2 of 2 epochs. This network is the current one now." in text
    assert f"{text} Undo brings back the one before." in view._text.value
    assert [row.epoch for row in course.rows] == [0, 1, 2]
    assert course.rows[0].accuracy == pytest.approx(next(p for p in lab.points if p.kind == "commit").accuracy)
    reference = pl.Preview(pl.trace(model, lab._images[:2]), lab._images, lab._labels).accuracy().accuracy
    assert course.reference == reference
    frame = course.to_frame()
    assert frame.index.tolist() == list(range(1, 17))
    assert frame["epoch"].iloc[[7, 15]].tolist() == [1.0, 2.0]
    # An epoch's loss is the mean of its steps' (the last batch is smaller than the others).
    sizes = np.array([128] * 7 + [104])
    for row, losses in zip(course.rows[1:], np.split(frame["loss"].to_numpy(), 2), strict=True):
        assert row.loss == pytest.approx((losses * sizes).sum() / 1000, rel=1e-4)
    assert course.share == 1.0
    light = bytes(view.picture.value)
    assert Image.open(io.BytesIO(light)).format == "PNG"
    assert view.picture.layout.display is None
    explorer.desk.dark = True
    assert explorer._worker.drain(60)
    assert bytes(view.picture.value) != light


def test_stop_answers_within_a_step_and_keeps_the_best(explorer: Explorer) -> None:
    lab, view = explorer.lab, explorer._training
    cut, course = some_epochs_of_half(explorer)
    view.stop.click()
    done = len(course.losses)
    assert view.wait(60)
    assert len(course.losses) <= done + 1
    assert "Stopped: accuracy" in explorer.desk.status["text"]
    assert lab.model is not cut
    assert lab.measure().accuracy == pytest.approx(course.kept.accuracy)


def test_a_validation_is_stopped_too(explorer: Explorer) -> None:
    training = Training(explorer.lab, "finetune", {"epochs": 3, "lr": 0.01})
    calls: list[int] = []

    def look() -> bool:
        calls.append(len(training.course.losses))
        # The first part of the validation after the first epoch of eight steps.
        return calls[-2:] != [8, 8]

    table = training.run(look=look)
    assert table.index.tolist() == [0]
    assert not training.changed


def test_stopped_before_an_epoch_is_done_nothing_changes(explorer: Explorer) -> None:
    lab, view = explorer.lab, explorer._training
    model, plan = lab.model, lab.plan
    view.epochs.value = 5
    # Before the first step, while the unpruned network is measured.
    view.finetune.click()
    view.stop.click()
    assert view.wait(60)
    assert "no epoch was finished, so the network stays as it was" in explorer.desk.status["text"]
    assert (lab.model, lab.plan, lab.can_undo) == (model, plan, False)


def test_an_error_is_said_and_leaves_everything_as_it_was(explorer: Explorer) -> None:
    lab, view = explorer.lab, explorer._training
    lab.set("fc1", ratio=0.5)
    model, plan, weights = lab.model, lab.plan, state(lab.model)
    view.lr.value = 1e9
    view.finetune.click()
    assert view.wait(60)
    assert "The training loss is not finite" in explorer.desk.status["error"]
    assert "everything is as it was" in view._text.value
    assert (lab.model, lab.plan) == (model, plan)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not view.finetune.disabled
    assert not explorer._commit.disabled
    view.lr.value = 0.01
    begin(explorer, 1)
    assert view.wait(60)
    assert explorer.desk.status["error"] == ""


def test_what_was_gained_before_an_error_is_kept(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, view = explorer.lab, explorer._training
    cut, course = some_epochs_of_half(explorer)

    def full(*_: object) -> None:
        raise pl.PruneLabError("no room is left")

    monkeypatch.setattr(Training, "step", full)
    assert view.wait(60)
    assert explorer.desk.status["error"] == "no room is left"
    assert "Failed: accuracy" in view._text.value
    assert lab.model is not cut
    assert [row["channels"] for row in explorer.desk.rows] == [layer.channels for layer in lab.program.layers]
    assert lab.measure().accuracy == pytest.approx(course.kept.accuracy)
    lab.undo()
    assert lab.model is cut


def test_a_run_that_is_complete_is_called_so(explorer: Explorer, tmp_path: Path) -> None:
    view = explorer._training
    view.folder.value, view.lr.value = str(tmp_path / "run"), 0.001
    for said in ("", "the run in this folder is complete"):
        view.epochs.value = 1
        view.finetune.click()
        assert view.wait(60)
        assert said in explorer.desk.status["text"]


def test_a_checkpoint_folder_goes_on_where_it_was(explorer: Explorer, tmp_path: Path) -> None:
    view = explorer._training
    view.folder.value = str(tmp_path / "run")
    course = begin(explorer, 40)
    until(lambda: len(course.rows) > 3)
    view.stop.click()
    assert view.wait(60)
    done = len(course.losses)
    again = begin(explorer, 40)
    assert again.losses[0][0] >= done
    assert len(again.rows) > 3
    view.stop.click()
    assert view.wait(60)


# Squeezing ---------------------------------------------


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (1152,), generator=generator)
    images = torch.randn(1152, 1, 10, 10, generator=generator) + labels[:, None, None, None] - 1.0
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip
    return model, TensorDataset(images[:1024], labels[:1024]), TensorDataset(images[1024:], labels[1024:])


def test_squeeze_fills_in_a_plan_that_loses_nothing(small: tuple[nn.Module, TensorDataset, TensorDataset]) -> None:
    lab = pl.Lab(*small, cache=False)
    explorer = pl.explore(lab)
    view = explorer._training
    view.epochs.value, view.lr.value, view.width.value = 60, 0.05, 0.5
    view.squeeze.click()
    assert view.wait(120)
    assert "The plan merges channels that are equal" in view._text.value
    assert lab.plan.repair == "merge"
    assert {name: entry["kept"] for name, entry in explorer.desk.layers.items() if not entry["locked"]} == {
        "0": 4, "3": 3, "7": 3,
    }  # fmt: skip
    shown = explorer.desk.estimate
    assert shown["accuracy"] == shown["base"]
    uncut = pl.Preview(lab.program, lab._images, lab._labels).accuracy().accuracy
    assert lab.measure().accuracy == uncut
    assert lab.training is not None
    assert lab.training.rows[-1].accuracy == uncut
    explorer._commit.click()
    assert explorer._worker.drain(60)
    assert lab.dense_cost().params < pl.cost(pl.trace(small[0], lab._images[:2])).params
    assert lab.measure().accuracy == uncut
    lab.undo()
    lab.undo()
    assert lab.model is small[0]


def test_a_script_squeezes_too(small: tuple[nn.Module, TensorDataset, TensorDataset]) -> None:
    lab = pl.Lab(*small, cache=False)
    squeezed = lab.squeeze(0.5, epochs=2, lr=0.05, progress=False)
    assert squeezed.table.index.tolist() == [0, 1, 2]
    assert lab.model is squeezed.program.model
    assert lab.plan.settings.keys() == {"0", "3"}
    assert [p.kind for p in lab.points] == ["squeeze"]
    assert lab.training is not None
    assert lab.training.to_frame().index.tolist() == list(range(1, 17))
    lab.finetune(epochs=1, progress=False)
    assert lab.training.kind == "finetune"
    assert lab.plan.settings == {}


# The time left ---------------------------------------------


def test_the_clock_counts_steps_and_validations() -> None:
    clock, now = Clock(epochs=3, images=100), 0.0
    for done in (50, 100):
        now += 1.0
        clock.validated(done, now)
    assert str(clock) == "estimating the time left"
    left = []
    for epoch in (1, 2, 3):
        for step in range(1, 11):
            now += 0.5
            clock.step(epoch, step, 10, now)
            left.append((now, clock.left))
        for done in (25, 50, 75, 100):
            now += 0.5
            clock.validated(done, now)
            left.append((now, clock.left))
    # Three epochs of ten half seconds and two of validation, and two more validations at the end.
    end = 2.0 + 3 * 7.0 + 2 * 2.0
    known = [(then, seconds) for then, seconds in left if seconds is not None]
    assert len(known) == len(left) - 5
    assert all(then + seconds == pytest.approx(end, abs=0.6) for then, seconds in known)


def test_one_slow_step_does_not_make_the_time_left_jump() -> None:
    clock, now, before = Clock(epochs=1, images=10), 0.0, None
    clock.validated(5, 0.0)
    clock.validated(10, 0.1)
    for step in range(1, 1001):
        now += 5.0 if step == 500 else 0.1
        clock.step(1, step, 1000, now)
        if before is not None and clock.left is not None:
            assert abs(clock.left - before) < 26
        before = clock.left
    # A machine that has become half as fast is noticed.
    for step in range(1, 301):
        now += 0.2
        clock.step(1, step, 1000, now)
    assert clock.left == pytest.approx(700 * 0.2, rel=0.1)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3, "a few seconds left"), (83, "about 85 s left"), (150, "about 2 min left"), (5000, "about 1 h 20 min left")],
)
def test_the_time_left_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_the_time_left_of_a_real_training_is_plausible(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    # The thread's own processor time: what other processes take of the machine comes and goes within the test.
    monkeypatch.setattr(time, "monotonic", time.thread_time)
    training = Training(explorer.lab, "finetune", {"epochs": 30, "lr": 0.01})
    said: list[tuple[float, float]] = []

    def look() -> bool:
        left = training.course.clock.left
        if left is not None:
            said.append((time.monotonic(), left))
        return True

    training.run(look=look)
    end = time.monotonic()
    middle = [(then, left) for then, left in said if 0.25 < (then - said[0][0]) / (end - said[0][0]) < 0.75]
    assert len(middle) > 20
    assert all(0.4 < left / (end - then) < 2.5 for then, left in middle)


def test_smoothing_keeps_a_constant_and_follows_a_fall() -> None:
    means, running = smoothed(np.full(1000, 3.0))
    assert (len(means), len(running)) == (200, 200)
    assert np.allclose(running, 3.0)
    means, running = smoothed(np.linspace(2, 1, 400))
    assert (np.diff(running) < 0).all()
    assert abs(running[-1] - 1) < 0.06


@pytest.mark.parametrize(("done", "end"), [(0, 5), (5, 5), (6, 10), (31, 40), (60, 60)])
def test_the_axis_of_a_long_training_grows_with_it(done: int, end: int) -> None:
    course = Course("finetune", 60, Clock(60, 10), of=4, losses=[(4 * done, 1.0)] if done else [])
    assert training_curves(course).axes[0].get_xlim() == (0, end)
