"""The rules and the cost in the browser, run by a real JavaScript engine, against Python's on the same layers."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prunelab as pl
from prunelab import explorer, zoo
from prunelab.explorer.desk import rows_of, terms_of
from prunelab.plan import Setting, by_ratio, by_std, removed, std_of_ratio

DESK = Path(explorer.__file__).parent / "desk_base.js"

SCRIPT = """
import { readFileSync } from "node:fs";
import { removedUnits, keptUnits, equivalentStd, evaluate } from "./desk.mjs";
const { rules, costs, equivalents } = JSON.parse(readFileSync(process.argv[2], "utf8"));
process.stdout.write(JSON.stringify({
  removed: rules.map(([row, entry]) => removedUnits(row, entry)),
  kept: rules.map(([row, entry]) => keptUnits(row, { ...entry, grain: "channel" })),
  equivalents: equivalents.map(([row, gone]) => equivalentStd(row, gone)),
  costs: costs.map(([terms, kept]) => evaluate(terms, kept)),
}));
"""


def engine() -> str:
    """A JavaScript engine: the machine's own, or the one that the browser tests bring along."""
    found = shutil.which("node")
    if found is None:
        from playwright._impl._driver import compute_driver_executable

        found = str(compute_driver_executable()[0])
    return found


def in_the_browser(folder: Path, asked: dict[str, Any]) -> dict[str, list[Any]]:
    shutil.copy(DESK, folder / "desk.mjs")
    (folder / "run.mjs").write_text(SCRIPT)
    (folder / "asked.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [engine(), str(folder / "run.mjs"), str(folder / "asked.json")], capture_output=True, check=False, text=True
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, list[Any]] = json.loads(done.stdout)
    return answer


def scores_to_try() -> list[np.ndarray]:
    """Scores of all sorts: spread out, with ties, all equal, of one channel."""
    numbers = np.random.default_rng(0)
    sizes = (1, 2, 3, 7, 10, 16, 50, 64, 100, 500)
    some = [numbers.normal(size=n) for n in sizes] + [numbers.integers(0, 4, n).astype(float) for n in sizes]
    return some + [np.full(n, value) for n in sizes for value in (0.1, 0.3, -7.7)]


@pytest.fixture(scope="module")
def lab() -> pl.Lab:
    torch.manual_seed(0)
    train, test = pl.datasets.fashion_mnist()
    return pl.Lab(zoo.resnet20("pad", in_channels=1), train.subset(50), test.subset(50))


def row_of(lab: pl.Lab, score: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The row that the desk makes of these scores."""
    monkeypatch.setattr(lab, "scores", lambda _: score)
    row = next(row for row in rows_of(lab) if not row["pinned"])
    return {**row, "channels": score.size}


def test_rules_equal_pythons(lab: pl.Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = [k / 100 for k in range(101)]
    stds = [k / 20 for k in range(-20, 61)]
    rules, expected, equivalents, wanted = [], [], [], []
    for score in scores_to_try():
        row = row_of(lab, score, monkeypatch)
        for ratio in ratios:
            gone = by_ratio(score, ratio).size
            rules.append((row, {"rule": "ratio", "value": ratio}))
            expected.append(gone)
            equivalents.append((row, gone))
            wanted.append(std_of_ratio(score, ratio))
        for std in stds:
            rules.append((row, {"rule": "std", "value": std}))
            expected.append(by_std(score, std).size)
    answer = in_the_browser(tmp_path, {"rules": rules, "costs": [], "equivalents": equivalents})
    sizes = [row["channels"] for row, _ in rules]
    assert answer["removed"] == expected
    assert answer["kept"] == [n - gone for n, gone in zip(sizes, expected, strict=True)]
    # The same number, to the last bit.
    assert answer["equivalents"] == wanted
    assert len(set(expected)) > 50


@pytest.mark.parametrize("multiple", [2, 4, 8, 12, 32])
def test_rounded_widths_equal_pythons(
    lab: pl.Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, multiple: int
) -> None:
    layer = next(layer for layer in lab.program.layers if not layer.pinned)
    lab.multiple(multiple)
    rules, expected = [], []
    for score in scores_to_try():
        row = row_of(lab, score, monkeypatch)
        for setting in (*(Setting(ratio=k / 20) for k in range(21)), *(Setting(std=k / 10) for k in range(-10, 21))):
            value = setting.ratio if setting.std is None else setting.std
            rules.append((row, {"rule": setting.rule, "value": value}))
            expected.append(removed(setting, score, layer, multiple).size)
    lab.undo()
    answer = in_the_browser(tmp_path, {"rules": rules, "costs": [], "equivalents": []})
    assert answer["removed"] == expected
    assert len(set(expected)) > 10


def test_cost_equals_pythons(lab: pl.Lab, tmp_path: Path) -> None:
    chance = random.Random(0)
    terms = terms_of(lab)
    selections, costs = [], []
    for _ in range(50):
        kept = {
            layer.name: tuple(range(chance.randint(1, layer.channels)))
            for layer in lab.program.layers
            if not layer.pinned
        }
        selections.append(pl.Selection(kept))
        counts = [len(kept.get(layer.name, range(layer.channels))) for layer in lab.program.layers]
        costs += [(terms["params"], counts), (terms["macs"], counts)]
    answer = in_the_browser(tmp_path, {"rules": [], "costs": costs, "equivalents": []})
    found = [pl.cost(lab.program, selection) for selection in selections]
    assert answer["costs"] == [number for each in found for number in (each.params, each.macs)]
