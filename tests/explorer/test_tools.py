"""Width multiples, measured speed and what a plan changes: in the lab, and in the explorer without a browser."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import prunelab as pl
from prunelab.explorer.app import Explorer
from prunelab.explorer.changes import class_changes, flipped_images, saying
from prunelab.outcomes import Outcomes
from prunelab.picture import png

TRAIN, TEST = pl.datasets.fashion_mnist()


@pytest.fixture
def lab() -> pl.Lab:
    return pl.Lab(pl.zoo.load("lenet"), TRAIN.subset(200), TEST.subset(300), cache=False, criterion="l1")


# Multiples ---------------------------------------------


def test_a_multiple_is_a_step_of_the_plan(lab: pl.Lab) -> None:
    lab.set_all(ratio=0.5)
    free = lab.cost().params
    lab.multiple(8)
    kept = {name: len(kept) for name, kept in lab.selection.kept.items()}
    assert kept == {"conv1": 16, "conv2": 32, "fc1": 256}
    assert lab.cost().params > free
    lab.undo()
    assert lab.cost().params == free
    lab.redo()
    small = lab.commit()
    assert small.get_parameter("conv2.weight").shape == (32, 16, 5, 5)
    # The next plan goes on in the same multiples.
    assert lab.plan == pl.Plan("l1", network=lab.program.digest, multiple=8)
    with pytest.raises(pl.PruneLabError, match="multiple of a plan must be a whole number from 1, not 0"):
        lab.multiple(0)
    assert lab.plan.multiple == 8


def test_the_rows_know_the_multiple(explorer: Explorer) -> None:
    lab = explorer.lab
    explorer._tools.multiple.value = 16
    assert lab.plan.multiple == 16
    assert {row["name"]: row["step"] for row in explorer.desk.rows} == dict.fromkeys(
        ("conv1", "conv2", "fc1", "fc2"), 16
    )
    explorer._on_message(None, {"do": "undo"}, None)
    assert explorer._tools.multiple.value == 1
    assert {row["step"] for row in explorer.desk.rows} == {1}
    # A plan of one's own multiple can be shown too.
    explorer._change(lambda: lab.multiple(5))
    assert explorer._tools.multiple.value == 5
    assert explorer._worker.drain(60)


def test_rows_that_are_sent_again_are_answered_by_figures(explorer: Explorer) -> None:
    explorer.lab.set("fc1", ratio=0.3)
    explorer._show_plan()
    answers: list[dict[str, int]] = []
    explorer.desk.observe(lambda change: answers.append(change["new"]), "figures")
    # A browser that rounded by rows it had from before is put right; the cost stays what it was.
    layers = explorer.desk.layers
    explorer.desk.layers = {**layers, "fc1": {**layers["fc1"], "kept": 7}}
    explorer._show_plan()
    assert explorer.desk.layers == layers
    assert [answer["params"] for answer in answers] == [explorer.lab.cost().params]
    assert explorer._worker.drain(60)


# Speed ---------------------------------------------


def test_times_stand_in_the_history_and_come_back(lab: pl.Lab, tmp_path: Path) -> None:
    with pytest.raises(pl.PruneLabError, match="nothing to time"):
        lab.latency(progress=False)
    lab.set("fc1", ratio=0.9)
    lab.estimate()
    lab.set("fc1", ratio=0.95)
    # Not measured yet: its row is made.
    found = lab.latency(batch=(1, 16), repeats=6, progress=False)
    assert lab.timed == found
    history = lab.history
    assert history["times_as_fast_batch_16"].isna().tolist() == [True, False]
    last = history.iloc[-1]
    first, second = found.timings
    assert (last["ms_batch_1"], last["ms_batch_16"]) == (1e3 * first.after, 1e3 * second.after)
    assert last["times_as_fast_batch_16"] == second.speedup
    assert (last["times_as_fast_batch_1_low"], last["times_as_fast_batch_1_high"]) == (first.low, first.high)
    assert last["timed_on"] == found.where
    # The ratio of FLOPs is another column.
    assert last["speedup"] == pl.cost(lab.program).flops / last["flops"]
    lab.undo()
    assert lab.timed is None
    lab.redo()
    lab.save(tmp_path)
    again = pl.Lab.load(tmp_path, lambda: pl.zoo.load("lenet"), TRAIN.subset(200), TEST.subset(300), cache=False)
    assert again.timed == found
    assert again.history.equals(history)


def test_a_committed_network_is_timed_beside_the_first(lab: pl.Lab) -> None:
    shapes: list[torch.Size] = []
    lab.set("fc1", ratio=0.5)
    lab.commit()

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        shapes.append(module.get_parameter("weight").shape)

    hooks = [model.get_submodule("fc1").register_forward_hook(note) for model in (lab.original, lab.model)]
    lab.latency(batch=2, repeats=6, progress=False)
    assert set(shapes) == {torch.Size([500, 800]), torch.Size([250, 800])}
    assert "times_as_fast_batch_2" in lab.history.dropna().columns
    for hook in hooks:
        hook.remove()


def test_the_button_measures_says_and_can_be_stopped(explorer: Explorer) -> None:
    explorer.lab.set("fc1", ratio=0.9)
    explorer._show_plan()
    assert explorer._worker.drain(60)
    assert explorer._tools.times.layout.display == "none"
    explorer._tools.speed.click()
    assert explorer._tools.speed.disabled
    assert explorer._tools.multiple.disabled
    assert explorer._worker.drain(120)
    assert explorer.lab.timed is not None
    assert explorer.desk.status["text"].startswith("Times as fast as unpruned: ")
    assert explorer._tools.times.layout.display is None
    assert "interleaved pairs" in explorer._tools.times.value
    assert not explorer._tools.speed.disabled
    explorer.lab.set("fc1", ratio=0.5)
    explorer._show_plan()
    # Times of another plan are not this one's.
    assert explorer._tools.times.layout.display == "none"
    assert explorer._worker.drain(60)
    gate, tools = threading.Event(), explorer._tools
    explorer.desk.observe(lambda change: gate.set() if change["new"]["progress"] else None, "status")
    tools.speed.click()
    assert gate.wait(60)
    explorer._on_stop()
    assert explorer._worker.drain(60)
    assert "Stopped before" in explorer.desk.status["text"]
    assert explorer.lab.timed is None


def test_nothing_to_time_is_said(explorer: Explorer) -> None:
    explorer._tools.speed.click()
    assert explorer._worker.drain(60)
    assert "nothing to time" in explorer.desk.status["error"]


# What changed ---------------------------------------------


def test_the_labs_outcomes_are_its_estimate(lab: pl.Lab) -> None:
    lab.set("fc1", ratio=0.9)
    lab.repair("bias")
    estimate, found = lab.estimate(), lab.outcomes()
    assert (found.after == found.labels).mean() == estimate.accuracy
    assert (found.before == found.labels).mean() == estimate.base
    assert (found.n, found.precision, found.names) == (estimate.n, estimate.precision, TEST.classes)
    index = int(found.images[3])
    assert torch.equal(lab.image(index), TEST.subset(300).pixels(index))


def shown(explorer: Explorer) -> list[bytes]:
    return [bytes(p.value) for p in explorer._tools.pictures if p.layout.display is None]


def test_what_is_put_away_while_it_is_drawn_stays_away(explorer: Explorer) -> None:
    tools = explorer._tools
    tools.changed.value = True
    assert explorer._worker.drain(60)
    assert [picture.layout.display for picture in tools.pictures] == [None, None]
    explorer.lab.set("fc1", ratio=0.5)

    def wanted() -> bool:
        tools.changed.value = False
        return True

    tools.draw(wanted)
    assert [picture.layout.display for picture in tools.pictures] == ["none", "none"]


def test_what_changed_is_drawn_when_asked_and_when_the_plan_settles(explorer: Explorer) -> None:
    assert shown(explorer) == []
    explorer.lab.set("fc1", ratio=0.9)
    explorer._show_plan()
    assert explorer._worker.drain(60)
    assert shown(explorer) == []
    explorer._tools.changed.value = True
    assert explorer._worker.drain(60)
    first = shown(explorer)
    assert len(first) == 2
    assert {Image.open(io.BytesIO(picture)).format for picture in first} == {"PNG"}
    explorer.lab.set("fc1", ratio=0.97)
    explorer._show_plan()
    assert explorer._worker.drain(60)
    second = shown(explorer)
    assert len(second) == 2
    assert all(a != b for a, b in zip(first, second, strict=True))
    explorer.desk.dark = True
    assert explorer._worker.drain(60)
    assert all(a != b for a, b in zip(second, shown(explorer), strict=True))
    explorer._tools.changed.value = False
    assert shown(explorer) == []


def test_what_cannot_be_shown_is_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    data = TensorDataset(torch.randn(100, 3), torch.randint(0, 4, (100,)))
    lab = pl.Lab(model, data, data, cache=False)
    explorer = pl.explore(lab)
    lab.set("0", ratio=0.8)
    explorer._show_plan()
    explorer._tools.changed.value = True
    assert explorer._worker.drain(60)
    # The classes can be told apart, the inputs cannot be shown.
    assert lab.outcomes().lost.any()
    found = shown(explorer)
    assert len(found) == 2
    assert found[1] == png(saying("Inputs of shape (3,) cannot be shown as images."))


def texts(figure: Figure) -> list[str]:
    """Every text of a figure that is not empty."""
    from matplotlib.text import Text

    return [found.get_text() for found in figure.findobj(Text) if found.get_text()]


def some(lost: int, gained: int) -> Outcomes:
    """Outcomes with so many images lost and gained, each of class 0."""
    labels = np.zeros(lost + gained, np.int64)
    wrong = np.arange(lost + gained) % 3 + 1
    before = np.where(np.arange(lost + gained) < lost, 0, wrong)
    after = np.where(np.arange(lost + gained) < lost, wrong, 0)
    return Outcomes(
        np.arange(lost + gained), labels, before, after, {0: 500}, "float32", names=("cat", "dog", "hen", "cow")
    )


@pytest.mark.parametrize(
    ("lost", "gained", "images"),
    [(100, 100, (15, 5)), (100, 2, (18, 2)), (3, 100, (3, 17)), (5, 0, (5, 0)), (0, 1, (0, 1))],
)
def test_the_sheet_shows_both_kinds(lost: int, gained: int, images: tuple[int, int]) -> None:
    asked: list[int] = []

    def image(index: int) -> Tensor:
        asked.append(index)
        return torch.zeros(4, 4, 3)

    found = texts(flipped_images(some(lost, gained), image))
    assert asked == [*range(images[0]), *range(lost, lost + images[1])]
    assert found.count("cat\n→ dog") == len([k for k in range(images[0]) if k % 3 == 0])
    assert (f"right before, wrong now: {images[0]} of {lost}" in found) == (lost > 0)
    assert (f"wrong before, right now: {images[1]} of {gained}" in found) == (gained > 0)


def test_no_flipped_image_is_said_in_words() -> None:
    assert texts(flipped_images(some(0, 0), TEST.pixels)) == [
        "No image is right in one network and wrong in the other."
    ]


def test_bars_say_change_interval_and_number() -> None:
    outcomes = some(30, 10)
    figure = class_changes(outcomes)
    (bar,) = figure.axes[0].patches
    assert bar.get_width() == pytest.approx(100 * (10 - 30) / 40)  # type: ignore[attr-defined]
    found = texts(figure)
    assert "cat (40)" in found
    assert "points, 95 % interval (n = 40, float32)" in found


def test_of_many_classes_the_most_changed_are_shown() -> None:
    labels = np.repeat(np.arange(100), 2)
    after = labels.copy()
    after[[10, 50, 51]] += 1
    found = texts(
        class_changes(Outcomes(np.arange(200), labels, labels, after, dict.fromkeys(range(100), 2), "float32"))
    )
    assert {"5 (2)", "25 (2)"} <= set(found)
    assert len({text for text in found if text.endswith(" (2)")}) == 20
    assert "change in accuracy, the 20 most changed of 100 classes (images)" in found
