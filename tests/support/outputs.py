"""Run notebooks from top to bottom and keep what reads well without a kernel: `make outputs`.

    python tests/support/outputs.py notebooks/quickstart.ipynb …

What changes from run to run for no reason is taken out, so that a diff shows what has changed in the lesson.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

_WIDGET = "application/vnd.jupyter.widget-view+json"
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
_LANGUAGE = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}
# Of a cell: what it is for, whether its heading or its code is folded, and whether it may be run by a test.
_KEPT = ("tags", "jp-MarkdownHeadingCollapsed", "jupyter")
_ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")
# pandas gives every styled table a random name, and its cells names that begin with it.
_TABLE = re.compile(r"\bT_[0-9a-f]{5}(?=[_ \"])")


def executed(path: Path) -> NotebookNode:
    """The notebook as it is after a fresh kernel has run all of it, in the notebook's own folder."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
        # A widget's state would bring its progress bars and pictures along a second time.
        store_widget_state=False,
    )
    return client.execute()


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """A copy without what only a running kernel can show or what differs between two equal runs."""
    names: dict[str, str] = {}
    found: NotebookNode = nbformat.from_dict(
        {
            "nbformat": notebook.nbformat,
            "nbformat_minor": notebook.nbformat_minor,
            "metadata": {"kernelspec": _KERNEL, "language_info": _LANGUAGE},
            "cells": [_cell(cell, names) for cell in notebook.cells],
        }
    )
    return found


def _cell(cell: Mapping[str, Any], names: dict[str, str]) -> dict[str, Any]:
    kept = {key: value for key, value in cell["metadata"].items() if key in _KEPT}
    if cell["cell_type"] != "code":
        return {**cell, "metadata": kept}
    outputs = [_output(output, names) for output in cell["outputs"]]
    return {**cell, "metadata": kept, "outputs": [output for output in outputs if output is not None]}


def _output(output: Mapping[str, Any], names: dict[str, str]) -> dict[str, Any] | None:
    """An output without its widget, or None where nothing else is in it.

    Args:
        names: of the styled tables so far, which no two of a page may share; added to.
    """
    if output["output_type"] == "stream":
        return None if output["name"] == "stderr" else dict(output)
    if "data" not in output:
        return dict(output)
    data = {kind: _settled(value, names) for kind, value in output["data"].items() if kind != _WIDGET}
    if _WIDGET in output["data"] and set(data) <= {"text/plain"}:
        return None
    return {**output, "data": data, "metadata": {}}


def _settled(value: Any, names: dict[str, str]) -> Any:
    if not isinstance(value, str):
        return value
    return _TABLE.sub(lambda found: names.setdefault(found.group(), f"T_{len(names):05}"), _ADDRESS.sub("", value))


def main(paths: list[str]) -> None:
    """Run each notebook and write it back; one that fails stays as it is."""
    for path in map(Path, paths):
        began = time.monotonic()
        notebook = cleaned(executed(path))
        nbformat.write(notebook, path)
        print(f"{path}: {time.monotonic() - began:.0f} s, {path.stat().st_size / 1024:.0f} KiB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
