"""``import prunelab`` brings in no widget, plot or table: those are loaded when they are first used."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("ipywidgets", "anywidget", "matplotlib", "pandas", "accelerate", "tqdm", "IPython", "pygraphviz")


def loaded_after(statement: str) -> set[str]:
    """Return the top-level modules loaded in a fresh interpreter that ran ``statement``."""
    code = f"import sys; {statement}; print('\\n'.join({{name.partition('.')[0] for name in sys.modules}}))"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True, timeout=300).split())


@pytest.mark.parametrize("module", ["prunelab", "prunelab.cli", "prunelab.zoo", "prunelab.datasets"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    loaded = loaded_after(f"import {module}")
    # torch itself loads some of these where they are installed; that is not prunelab's doing.
    assert sorted((loaded - loaded_after("import torch")).intersection(HEAVY)) == []


def test_the_command_line_loads_no_server() -> None:
    assert loaded_after("import prunelab.cli").isdisjoint({"jupyterlab", "jupyter_server", "tornado"})
