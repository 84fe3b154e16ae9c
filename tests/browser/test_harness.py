"""The harness itself: a slider moved by the keyboard reaches Python, whose answer reaches the page."""

from __future__ import annotations

import sys

import nbformat
import pytest
from playwright.sync_api import expect

SLIDER = """
import ipywidgets

slider = ipywidgets.IntSlider(value=5, min=0, max=10)
label = ipywidgets.Label("not moved")


def follow(change):
    label.value = f"moved to {change['new']}"


slider.observe(follow, "value")
ipywidgets.VBox([slider, label])
"""


def test_a_slider_moved_by_keyboard_reaches_python_and_its_answer_the_page(notebook_page) -> None:
    notebook = notebook_page([SLIDER])
    label = notebook.page.locator(".widget-label").filter(has_text="moved")
    expect(label).to_have_text("not moved")
    handle = notebook.page.locator(".noUi-handle")
    handle.focus()
    handle.press("ArrowRight")
    expect(label).to_contain_text("moved to 6")
    # By now Python hears the page on another thread: JupyterLab opens a subshell for widgets' messages.
    handle.press("ArrowLeft")
    handle.press("ArrowLeft")
    expect(label).to_contain_text("moved to 4")
    notebook.wait_idle()
    notebook.assert_no_errors()
    expect(notebook.page.locator(".Toastify__toast")).to_have_count(0)


def test_the_kernel_is_the_interpreter_that_runs_the_tests(notebook_page) -> None:
    notebook = notebook_page(["import sys", "print(sys.executable)"])
    expect(notebook.outputs.last).to_contain_text(sys.executable)


def test_a_notebook_file_is_run_on_a_copy_and_can_be_run_again(notebook_page, tmp_path) -> None:
    path = tmp_path / "lesson.ipynb"
    cell = nbformat.v4.new_code_cell("runs = globals().get('runs', 0) + 1\nprint('run', runs)")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Lesson"), cell]), path)
    before = path.read_bytes()
    notebook = notebook_page(path)
    expect(notebook.outputs).to_contain_text("run 1")
    notebook.run_all()
    expect(notebook.outputs).to_contain_text("run 2")
    assert path.read_bytes() == before


@pytest.mark.parametrize("dark", [False, True])
def test_the_theme_and_the_size_are_those_asked_for(notebook_page, dark: bool) -> None:
    notebook = notebook_page(["1 + 1"], width=1100, height=700, dark=dark)
    background = notebook.page.evaluate("() => getComputedStyle(document.body).getPropertyValue('--jp-layout-color0')")
    assert background.strip() in (("#111111", "#111") if dark else ("white", "#ffffff", "#fff"))
    assert notebook.page.evaluate("() => [innerWidth, innerHeight]") == [1100, 700]


def test_a_cell_that_fails_fails_the_test_with_its_traceback(notebook_page) -> None:
    with pytest.raises(pytest.fail.Exception, match="ZeroDivisionError"):
        notebook_page(["1 / 0", "2"])
