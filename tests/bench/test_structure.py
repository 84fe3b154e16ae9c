"""The comparison with Torch-Pruning: its check finds what is wrong, and its table is honest about failures."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import prunelab as pl


@pytest.fixture(scope="module")
def structure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("structure", Path(__file__).parent / "structure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chain() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)]
    model = nn.Sequential(*layers).double().eval()
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    nn.init.uniform_(model[1].bias)
    return model


def test_the_check_accepts_a_right_cut_and_finds_a_wrong_one(structure: ModuleType) -> None:
    model, x = structure.numbered(chain()), torch.randn(3, 4, dtype=torch.float64)
    program = pl.trace(model, x)
    small = pl.commit(program, pl.Selection(kept={"0": (0, 2, 5), "3": (1, 2)}))
    assert structure.difference(model, small, x) < structure.EXACT
    wrong = copy.deepcopy(small)
    with torch.no_grad():
        # The second layer holds the numbers for channels 0, 2 and 6, but gets 0, 2 and 5.
        wrong[3].weight[:, 2] = model[3].weight[[1, 2], 6]
    assert structure.difference(model, wrong, x) > 1e-3
    with torch.no_grad():
        wrong[5].bias.mul_(2)
    with pytest.raises(ValueError, match="have changed"):
        structure.difference(model, wrong, x)


def test_the_table_says_what_failed(structure: ModuleType, tmp_path: Path) -> None:
    rows = [
        {
            "model": "a",
            "side": "prunelab",
            "find": 1.0,
            "prune": 0.5,
            "params": 0.27,
            "project": 0.001,
            "difference": 3e-16,
        },
        {"model": "a", "side": "torch_pruning", "error": "not done within 45 s", "find": 2.0},
        {"model": "b", "side": "prunelab", "error": "ValueError: something (long)"},
        {"model": "b", "side": "torch_pruning", "find": 1.0, "prune": 1.0, "project": 0.1, "difference": 0.5},
    ]
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{structure.BEGIN}\nold\n{structure.END}\nafter\n", encoding="utf-8")
    structure.write(rows, readme)
    lines = readme.read_text(encoding="utf-8").splitlines()
    assert (lines[0], lines[-1], "old" in lines) == ("before", "after", False)
    assert lines[4] == "| a | 1.00 / 2.00 | 0.50 / – | 27 / – | 1.00 / – | 3e-16 / not done within 45 s |"
    assert lines[5] == "| b | – / 1.00 | – / 1.00 | – / – | – / 100 | fails: ValueError / runs (5e-01) |"
    with pytest.raises(SystemExit, match="has no"):
        structure.write(rows, Path(__file__))
