"""The notebooks as they are committed: run to the end, readable without a kernel, and all of them reach the user."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from outputs import cleaned

from prunelab import cli, resources

FOLDER = resources.folder("notebooks")
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LESSONS = sorted(FOLDER.glob("0*.ipynb"))


def opened(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def shown(notebook: NotebookNode) -> str:
    """Everything that the outputs say in HTML or in text."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") + output.get("data", {}).get("text/html", "") for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_run_from_top_to_bottom_and_cleaned(path: Path) -> None:
    notebook = opened(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run `make outputs`"
    assert notebook == cleaned(notebook), "run `make outputs`"
    assert [o for cell in code for o in cell.outputs if o.output_type == "error"] == []
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_has_its_parts(path: Path) -> None:
    notebook = opened(path)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.match(r"# (Lesson )?\d", prose), "a title"
    assert "$$" in prose, "a formula"
    assert "cannot do" in prose
    assert re.search("^## .*next", prose, re.MULTILINE)
    seen = shown(notebook)
    assert "<details><summary>The answer</summary>" in seen, "a question"
    assert ">set to</th>" in seen, "the explorer"
    assert "<b>✓</b>" in seen, "a solution of the exercise"


def test_all_notebooks_reach_the_user_and_are_in_the_table(tmp_path: Path) -> None:
    cli.copy_notebooks(tmp_path)
    table = (tmp_path / "README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
        assert f"]({path.name})" in table
    assert cli.prepare_folder(tmp_path, None)[1].name == "quickstart.ipynb"


# Cleaning ---------------------------------------------


def test_cleaning_leaves_out_what_only_a_kernel_can_show() -> None:
    view = "application/vnd.jupyter.widget-view+json"
    outputs = [
        {"output_type": "stream", "name": "stderr", "text": "100 %"},
        {"output_type": "stream", "name": "stdout", "text": "said"},
        {"output_type": "display_data", "metadata": {}, "data": {view: {"model_id": "1"}, "text/plain": "HBox()"}},
        {"output_type": "execute_result", "execution_count": 1, "metadata": {"x": 1}, "data": {
            view: {"model_id": "2"}, "text/html": "<table id='T_0a1b2'>", "text/plain": "<Styler at 0x7f12ab34cd56>",
        }},
    ]  # fmt: skip
    cell = nbformat.from_dict(
        {"cell_type": "code", "id": "a", "source": "", "execution_count": 1, "outputs": outputs,
         "metadata": {"execution": {"iopub": "now"}, "tags": ["kept"]}},
    )  # fmt: skip
    notebook = nbformat.v4.new_notebook(
        cells=[cell], metadata={"kernelspec": {"name": "mine", "display_name": "Mine"}, "widgets": {}}
    )
    (found,) = cleaned(notebook).cells
    assert found.metadata == {"tags": ["kept"]}
    said, result = found.outputs
    assert said.text == "said"
    assert result.data.keys() == {"text/html", "text/plain"}
    assert result.data["text/plain"] == "<Styler>"
    assert set(cleaned(notebook).metadata) == {"kernelspec", "language_info"}
    assert cleaned(notebook).metadata.kernelspec.name == "python3"


def test_names_of_tables_are_the_same_every_time_and_no_two_alike() -> None:
    def page(*names: str) -> list[str]:
        cells = [
            nbformat.v4.new_code_cell(
                outputs=[
                    nbformat.v4.new_output(
                        "display_data", {"text/html": f'<style>#T_{n}_row0 </style><table id="T_{n}">'}
                    )
                ]
            )
            for n in names
        ]
        found = cleaned(nbformat.v4.new_notebook(cells=cells))
        return [cell.outputs[0].data["text/html"] for cell in found.cells]

    first = page("abcde", "12345")
    assert first == page("00f00", "fffff")
    assert [set(re.findall(r"T_\w{5}", text)) for text in first] == [{"T_00000"}, {"T_00001"}]
