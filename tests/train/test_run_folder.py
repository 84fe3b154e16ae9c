"""``prunelab finetune`` and ``prunelab profile``: from a folder that a lab wrote, in one process and in two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import running
import torch
from torch import nn

import prunelab as pl
from prunelab.cli import main
from prunelab.train.augment import Augment
from prunelab.train.recipe import Recipe
from prunelab.train.runfile import RunFile


def result(folder: Path) -> tuple[nn.Module, pd.DataFrame]:
    return pl.load(folder / "result", running.network), pd.read_csv(folder / "result" / "table.csv", index_col="epoch")


def assert_same(one: Path, other: Path, rtol: float) -> None:
    (first, table), (second, again) = result(one), result(other)
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, rtol=rtol, atol=rtol)
    assert again["loss"].tolist() == pytest.approx(table["loss"].tolist(), rel=1e-6 if rtol else 0, abs=0, nan_ok=True)
    assert again["accuracy"].tolist() == table["accuracy"].tolist()


@pytest.fixture(scope="module")
def by_itself(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What one process makes of each kind of data, without a break."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("held", "loader")}
    for kind, folder in folders.items():
        running.saved(folder, kind)
        assert main(["finetune", str(folder)]) == 0
    return folders


def test_it_trains_what_the_lab_would_have_committed_and_fine_tuned(tmp_path: Path, by_itself: dict[str, Path]) -> None:
    lab = running.saved(tmp_path)
    lab.commit()
    settings = {name: value for name, value in vars(running.RECIPE).items() if name != "masks"}
    table = lab.finetune(**settings, progress=False)
    model, found = result(by_itself["held"])
    assert found["loss"].tolist()[1:] == table["loss"].tolist()[1:]
    assert found["loss"].iloc[-1] < found["loss"].iloc[1]
    for name, tensor in lab.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.get_parameter("conv1.weight").shape[0] == 4
    zeros = int((~lab.stage.masks["conv2.weight"]).sum())
    assert 0 < zeros == int((model.get_parameter("conv2.weight") == 0).sum())


@pytest.mark.parametrize("kind", ["held", "loader"])
def test_two_processes_killed_and_started_again_end_where_one_ends(
    kind: str, tmp_path: Path, by_itself: dict[str, Path]
) -> None:
    running.saved(tmp_path, kind)
    if kind == "loader":
        died = running.command("prunelab", "finetune", str(tmp_path), processes=2, DIES_IN=str(tmp_path))
        assert died.returncode != 0
        assert "epoch 2 of 4" in died.stdout
        assert not (tmp_path / "result").exists()
    done = running.command("prunelab", "finetune", str(tmp_path), processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 4 of 4") == 1
    assert ("epoch 2 of 4" in done.stdout) == (kind == "held")
    # Twelve steps; the loader drops what is left of its last batch: eight.
    assert_same(by_itself[kind], tmp_path, 1e-9)
    assert sorted(path.name for path in (tmp_path / "result").iterdir() if path.suffix != ".safetensors") == [
        "network.json", "notes.json", "table.csv",
    ]  # fmt: skip


def test_one_process_killed_and_started_again_ends_with_the_same_bits(
    tmp_path: Path, by_itself: dict[str, Path]
) -> None:
    running.saved(tmp_path, "loader")
    died = running.command("prunelab", "finetune", str(tmp_path), DIES_IN=str(tmp_path))
    assert died.returncode == -9
    for _ in range(2):
        # The second time there is nothing left to do.
        again = running.command("prunelab", "finetune", str(tmp_path))
        assert again.returncode == 0, again.stderr
        assert_same(by_itself["loader"], tmp_path, 0)
    assert "epoch 4" not in again.stdout


def test_two_processes_profile_as_one(tmp_path: Path) -> None:
    running.saved(tmp_path / "run")
    for processes in (1, 2):
        cache = str(tmp_path / str(processes))
        done = running.command("prunelab", "profile", str(tmp_path / "run"), processes=processes, PRUNELAB_CACHE=cache)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("44 images profiled: ")
        assert done.stdout.count("profiled") == 1
    program = pl.trace(running.network(), running.val().tensors[0][:2])
    one, two = (pl.profile(program, running.train(), cache=tmp_path / n, progress=False) for n in ("1", "2"))
    assert (one.folder, two.folder) != (None, None)
    # The cache was found: nothing has run here.
    assert one.images == two.images == 44
    for site, found in one.statistics.items():
        torch.testing.assert_close(two.statistics[site].arrays(), found.arrays(), rtol=1e-13, atol=1e-12)
        torch.testing.assert_close(two.activations[site], one.activations[site])


# What is refused ---------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "gone": ({"make_model": ("running:gone", {})}, "'running:gone' cannot be imported"),
    "no module": ({"train": ("nowhere.at_all:f", {})}, "cannot be imported (ModuleNotFoundError"),
    "other network": (
        {"make_model": ("running:network", {"width": 12})},
        "not those of the model that make_model gives",
    ),
    "no network": ({"make_model": ("running:val", {})}, "must be a function that gives the uncut torch.nn.Module"),
    "data missing": ({"train": ("running:missing", {})}, "'running:missing' failed (FileNotFoundError: no folder"),
    "wrong argument": ({"train": ("running:train", {"sort": 1})}, "'running:train' failed (TypeError"),
    "other images": ({"val": ("running:small_images", {})}, "cannot run on an example input of shape [(2, 3, 5, 5)]"),
}


@pytest.mark.parametrize(("functions", "message"), BAD.values(), ids=BAD)
def test_what_the_folder_names_is_refused_in_a_sentence(
    functions: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running.saved(tmp_path)
    record = json.loads((tmp_path / "lab.json").read_text())
    for name, (path, arguments) in functions.items():
        record["run"][name] = {"function": path, "arguments": {"dict": [list(each) for each in arguments.items()]}}
    (tmp_path / "lab.json").write_text(json.dumps(record))
    assert main(["finetune", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("prunelab: ")
    assert message in said
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "result").exists()


def test_folders_of_something_else_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pl.save(tmp_path / "network", running.network())
    lab = running.saved(tmp_path / "run")
    lab.save(tmp_path / "lab")
    for name, message in {
        "nothing": "There is no lab to load in",
        "network": "There is no lab to load in",
        "lab": "does not say where its network and data come from",
    }.items():
        assert main(["finetune", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    # Another plan in the place of the one that was committed.
    assert main(["finetune", str(tmp_path / "run")]) == 0
    before = (tmp_path / "run" / "result" / "network.json").read_bytes()
    lab.undo()
    lab.save(tmp_path / "run", make_model="running:network", train="running:train", val="running:val")
    assert main(["finetune", str(tmp_path / "run")]) == 2
    assert "is the commit of another plan or network" in capsys.readouterr().err
    assert (tmp_path / "run" / "result" / "network.json").read_bytes() == before


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one is missing": ({"train": None}, "train is missing"),
    "no function": ({"val": "running"}, "is written 'package.module:function'"),
    "of the notebook": ({"val": "__main__:val"}, "known to this notebook or script alone"),
    "not there": ({"val": "running:gone"}, "cannot be imported"),
    "no call": ({"val": "running:TIME"}, "is a int, not a function"),
    "a tensor": ({"train": ("running:train", {"kind": torch.zeros(1)})}, "not tensors"),
    "a loss": ({"recipe": Recipe(loss=nn.CrossEntropyLoss())}, "recipe's loss is a CrossEntropyLoss"),
}


@pytest.mark.parametrize(("functions", "message"), REFUSED.values(), ids=REFUSED)
def test_a_lab_refuses_what_another_process_could_not_use(
    functions: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(pl.PruneLabError, match=message):
        running.saved(tmp_path, **functions)
    assert not any(tmp_path.iterdir())


def test_recipes_come_back_as_they_were(tmp_path: Path) -> None:
    recipe = Recipe(epochs=7, augment=Augment(flip=True, crop=2), patience=3, keep="last", precision="bf16", warmup=0.0)
    running.saved(tmp_path, recipe=recipe)
    record = json.loads((tmp_path / "lab.json").read_text())
    back = RunFile.from_record(record, tmp_path)
    assert vars(back.recipe) == vars(recipe)
    assert back.make_model().conv1.out_channels == 8
