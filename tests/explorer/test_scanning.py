"""The scan in lab and explorer: of the network that is current, stale where the plan differs, kept when stopped."""

from __future__ import annotations

from typing import Any

import pytest

import prunelab as pl
from prunelab.explorer.scanning import curves_of, stale

TRAIN, TEST = pl.datasets.fashion_mnist()


def make(name: str = "lenet") -> pl.Lab:
    return pl.Lab(pl.zoo.load(name), TRAIN.subset(200), TEST.subset(200), cache=False, probe=100)


def test_the_lab_scans_by_its_plan_and_keeps_it() -> None:
    lab = make()
    assert curves_of(lab) == {}
    lab.set("conv1", ratio=0.5)
    lab.repair("bias")
    scan = lab.sensitivity(ratios=(0.25, 0.5), n=100, progress=False)
    assert (scan.criterion, scan.repair) == ("l1", "bias")
    assert lab.scanned is not None
    assert lab.scanned.found == scan
    # Each layer alone: what the plan removes elsewhere is not removed in the scan.
    assert scan.base == lab.stage.preview.accuracy(n=100, precision="auto").accuracy
    curves = curves_of(lab)
    assert curves["layers"].keys() == {"conv1", "conv2", "fc1"}
    first = scan.of("conv2")[0]
    assert curves["layers"]["conv2"][0] == [1 - first.kept / 50, first.accuracy, first.change, first.half]
    accuracies = [point.accuracy for point in scan.points]
    assert (curves["least"], curves["most"]) == (min(accuracies), max(scan.base, *accuracies))
    assert (curves["base"], curves["n"], curves["stale"]) == (scan.base, 100, "")


def test_another_criterion_or_repair_makes_it_stale_and_undo_fresh_again() -> None:
    lab = make()
    lab.sensitivity(ratios=(0.5,), n=50, progress=False)
    lab.set("conv1", ratio=0.5)
    assert stale(lab) == ""
    lab.criterion("l2")
    assert stale(lab) == "by l1"
    lab.repair("bias")
    assert curves_of(lab)["stale"] == "by l1, without repair"
    lab.undo()
    lab.undo()
    assert curves_of(lab)["stale"] == ""


def test_another_network_has_no_curves_until_undo_brings_this_one_back() -> None:
    lab = make()
    lab.sensitivity(ratios=(0.5,), n=50, progress=False)
    lab.set("conv1", ratio=0.5)
    lab.commit()
    assert curves_of(lab) == {}
    lab.undo()
    assert curves_of(lab)["layers"].keys() == {"conv1", "conv2", "fc1"}


def test_a_row_that_a_bypass_changes_loses_its_curve() -> None:
    lab = make("resnet20")
    lab.sensitivity(ratios=(0.5,), n=20, progress=False)
    before = curves_of(lab)["layers"].keys()
    lab.bypass("layer2.1")
    now = curves_of(lab)
    assert now["stale"] == "with other blocks and layers removed"
    rows = {layer.name: layer for layer in lab.program.layers}
    whole = {layer.name: layer for layer in lab.stage.program.layers}
    assert now["layers"].keys() == {n for n in before if n in rows and rows[n].producers == whole[n].producers}
    assert before - now["layers"].keys() >= {"layer2.1.conv1"}
    assert "layer3.1.conv1" in now["layers"]


def test_the_explorer_scans_stops_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = make()
    lab.run_profile(progress=False)
    explorer = pl.explore(lab)
    assert explorer._worker.drain(60)
    assert explorer._scans.picture.layout.display == "none"
    say, said = explorer._say, []

    def stopping(text: str, progress: float | None = None, **more: Any) -> None:
        said.append(progress)
        say(text, progress, **more)
        if progress is not None and progress > 0.5:
            explorer._on_stop()

    monkeypatch.setattr(explorer, "_say", stopping)
    explorer._on_scan()
    assert explorer._worker.drain(60)
    assert explorer.desk.status["text"].startswith("Stopped: the layers scanned so far are shown")
    assert "conv1" in explorer.desk.curves["layers"]
    assert "fc1" not in explorer.desk.curves["layers"]
    assert explorer._scans.picture.layout.display is None
    monkeypatch.setattr(explorer, "_say", say)
    explorer._on_scan()
    assert explorer._worker.drain(60)
    assert explorer.desk.status["text"] == "Scanned 3 layers by l1 at 9 ratios, 200 images each."
    assert explorer.desk.curves == curves_of(lab)
    assert explorer.desk.curves["layers"].keys() == {"conv1", "conv2", "fc1"}


def test_a_scan_fills_no_weight_that_a_commit_has_zeroed() -> None:
    lab = make()
    lab.set("fc1", ratio=0.99, grain="weight")
    lab.commit()
    lab.repair("least-squares")
    scan = lab.sensitivity(ratios=(0.5,), n=200, precision="float32", progress=False)
    lab.set("conv2", ratio=0.5)
    assert scan.of("conv2")[0].accuracy == lab.measure().accuracy


def test_rows_of_single_weights_are_scanned_by_single_weights() -> None:
    lab = pl.Lab(pl.zoo.load("lenet"), TRAIN, TEST.subset(200), cache=False)
    lab.set_all(ratio=0.5, grain="weight")
    found = lab.sensitivity(ratios=(0.5, 0.9), n=100, progress=False)
    assert found.grain == "weight"
    curves = curves_of(lab)
    assert curves["grain"] == "weight"
    assert [point[0] for point in curves["layers"]["fc1"]] == [0.5, 0.9]
    lab.criterion("l2")
    assert stale(lab) == ""
    lab.set("fc1", grain="channel")
    # Rows that differ are scanned by channels.
    assert lab.sensitivity(ratios=(0.5,), n=100, progress=False).grain == "channel"
    assert curves_of(lab)["grain"] == "channel"
