"""Edits that were on their way while a cell, or a job, changed the lab; and whose numbers are whose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hand import moved, ratios, send

import prunelab as pl
from prunelab.explorer.app import Explorer
from prunelab.explorer.summary import summary

TRAIN, TEST = pl.datasets.fashion_mnist()


def rows(explorer: Explorer) -> dict[str, int]:
    return {row["name"]: row["channels"] for row in explorer.desk.rows}


def test_all_of_a_drag_keeps_what_a_cell_has_set(lab: pl.Lab, explorer: Explorer) -> None:
    lab.set("conv2", ratio=0.5)
    # Both are sent before the browser hears of the cell.
    sent = send(explorer, moved(explorer.desk.layers, "conv1", 0.1))
    sent = send(explorer, moved(sent, "conv1", 0.2))
    assert ratios(lab) == {"conv1": 0.2, "conv2": 0.5}
    # The browser has, of the answer, all rows but the one in the user's hand.
    sent = send(explorer, {**explorer.desk.layers, "conv1": moved(sent, "conv1", 0.25)["conv1"]})
    send(explorer, sent)
    assert ratios(lab) == {"conv1": 0.25, "conv2": 0.5}
    assert explorer.desk.layers["conv1"]["value"] == 0.25
    # One movement of the hand is one step.
    explorer._on_message(None, {"do": "undo"}, None)
    assert ratios(lab) == {"conv2": 0.5}


def test_nothing_of_a_drag_of_another_networks_rows_is_made(lab: pl.Lab, explorer: Explorer) -> None:
    sent = send(explorer, moved(explorer.desk.layers, "conv1", 0.5))
    lab.commit()
    for ratio in (0.1, 0.2, 0.3):
        sent = send(explorer, moved(sent, "conv2", ratio))
    assert ratios(lab) == {}
    # Let go, the row is as Python has it, and the next move counts.
    assert explorer.desk.layers["conv2"]["value"] == 0
    send(explorer, moved(explorer.desk.layers, "conv2", 0.3))
    assert ratios(lab) == {"conv2": 0.3}


def test_an_edit_that_a_commit_overtook_is_not_made_on_the_new_network(lab: pl.Lab, explorer: Explorer) -> None:
    sent = send(explorer, moved(explorer.desk.layers, "conv1", 0.5))
    explorer._commit.click()
    assert explorer._worker.drain(60)
    send(explorer, moved(sent, "conv2", 0.3))
    assert ratios(lab) == {}
    assert rows(explorer)["conv1"] == 10


def test_a_drag_after_a_cell_does_not_swallow_the_cells_step(lab: pl.Lab, explorer: Explorer) -> None:
    send(explorer, moved(explorer.desk.layers, "conv1", 0.1))
    lab.set("conv2", ratio=0.5)
    send(explorer, moved(explorer.desk.layers, "conv1", 0.2))
    lab.undo()
    assert ratios(lab) == {"conv1": 0.1, "conv2": 0.5}


def test_two_rows_cleared_at_once_are_two_steps(lab: pl.Lab, explorer: Explorer) -> None:
    for layer in ("conv1", "conv2"):
        send(explorer, moved(explorer.desk.layers, layer, 0.5))
    for layer in ("conv1", "conv2"):
        send(explorer, {**explorer.desk.layers, layer: {**explorer.desk.layers[layer], "rule": "none", "value": 0}})
    lab.undo()
    assert ratios(lab) == {"conv2": 0.5}


@pytest.mark.parametrize("how", ["commit", "criterion"])
def test_any_button_shows_the_rows_that_a_cell_has_changed(lab: pl.Lab, explorer: Explorer, how: str) -> None:
    send(explorer, moved(explorer.desk.layers, "conv1", 0.5))
    before = explorer.desk.rows
    if how == "commit":
        lab.commit()
    else:
        lab.criterion("random")
    explorer._on_message(None, {"do": "reset"}, None)
    assert rows(explorer) == {layer.name: layer.channels for layer in lab.program.layers}
    assert [row["scores"] for row in explorer.desk.rows] != [row["scores"] for row in before]


def test_a_drag_beside_a_block_that_a_cell_removed_shows_its_rows_gone() -> None:
    lab = pl.Lab(pl.zoo.load("resnet20"), TRAIN.subset(200), TEST.subset(200), cache=False)
    lab.run_profile(progress=False)
    explorer = pl.explore(lab)
    lab.bypass("layer2.1")
    send(explorer, moved(explorer.desk.layers, "layer1.0.conv1", 0.5))
    assert lab.plan.bypassed == ("layer2.1",)
    assert "layer2.1.conv1" not in rows(explorer)
    assert explorer._worker.drain(60)


# Whose numbers they are ---------------------------------------------


def test_an_accuracy_is_not_that_of_weights_that_were_trained_in_place_since(lab: pl.Lab, tmp_path: Path) -> None:
    lab.set("conv1", ratio=0.5)
    lab.measure()
    assert "accuracy" in summary(lab)
    lab.save(tmp_path)
    assert "accuracy" in summary(pl.Lab.load(tmp_path, pl.zoo.lenet, lab.train, lab.val, cache=False))
    with torch.no_grad():
        lab.model.get_parameter("fc2.weight").mul_(-1)
    assert "accuracy" not in summary(lab)


def test_times_are_of_the_network_that_was_timed(lab: pl.Lab) -> None:
    # How much goes by std depends on the weights.
    lab.set("fc1", std=0.5)
    lab.latency(batch=1, repeats=6, progress=False)
    assert lab.timed is not None
    lab.undo()
    lab.set("fc1", std=0.5)
    assert lab.timed is not None
    with torch.no_grad():
        lab.model.get_parameter("fc1.weight")[:250] *= 1e-3
    assert lab.timed is None


def test_a_network_that_is_not_entered_after_all_leaves_no_point(lab: pl.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.set("conv1", ratio=0.5)
    before = lab.points, lab.model, lab.plan

    def fail(*_: object) -> None:
        raise pl.PruneLabError("on purpose")

    monkeypatch.setattr(lab, "_fitting", fail)
    with pytest.raises(pl.PruneLabError, match="on purpose"):
        lab.squeeze(0.5, epochs=1, progress=False)
    assert (lab.points, lab.model, lab.plan) == before


@pytest.mark.parametrize("name", ["NET.PT2", "net.onnx", ""])
def test_a_plan_is_neither_written_over_nor_read_from_a_network(explorer: Explorer, tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    if name:
        place.write_bytes(b"\x80\xff")
    explorer._files.name.value = str(place) if name else "  "
    for act in (explorer._files._on_save, explorer._files._on_load):
        explorer.desk.status = {**explorer.desk.status, "error": ""}
        explorer._guard(act)
        error = explorer.desk.status["error"]
        assert error
        assert "Error" not in error
    assert not name or place.read_bytes() == b"\x80\xff"
