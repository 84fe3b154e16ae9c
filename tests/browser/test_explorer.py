"""The explorer as a person uses it: real Chromium, real JupyterLab, a real network on real images."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Locator, expect

if TYPE_CHECKING:
    from conftest import NotebookPage, OpenNotebook

OPEN = """
import prunelab as pl
train, test = pl.datasets.fashion_mnist()
explorer = pl.explore(pl.zoo.load({name!r}), train.subset({size}, seed=0), test, name={title!r}, criterion="apoz")
explorer
"""


LAB_OF_WEIGHTS = """
import prunelab as pl
train, test = pl.datasets.fashion_mnist()
lab = pl.Lab(pl.zoo.load("lenet"), train.subset(500), test)
lab.set_all(ratio=0.5, grain="weight")
lab.sensitivity(ratios=(0.3, 0.6, 0.9), n=100, progress=False)
pl.explore(lab)
"""


def lenet(size: int = 2000) -> list[str]:
    """Cells that open the explorer on LeNet."""
    return [OPEN.format(name="lenet", size=size, title="LeNet")]


def desk(page: NotebookPage) -> Locator:
    """The desk, on the screen and measured."""
    found = page.page.locator(".prunelab-desk").first
    found.scroll_into_view_if_needed()
    measured(found)
    return found


def measured(found: Locator) -> None:
    """Wait until the accuracy shown is the accuracy of what is shown."""
    total = found.locator('[data-total="accuracy"]')
    expect(total).to_contain_text("n = 2,048")
    expect(total).not_to_contain_text("updating")


def total(found: Locator, name: str) -> str:
    """The value after the arrow of one of the totals."""
    return found.locator(f'[data-total="{name}"] .pl-now').inner_text()


def amount(text: str) -> float:
    """The number in a total such as ``99.4 k``; the unit is not read."""
    return float(text.split("\u202f")[0])


def slider(found: Locator, layer: str, field: str) -> Locator:
    """A row's slider."""
    return found.locator(f'input[data-layer="{layer}"][data-field="{field}"]')


def drag(page: NotebookPage, handle: Locator, share: float) -> None:
    """Take a slider at its left end and move it with the mouse."""
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    assert box is not None
    mouse, y = page.page.mouse, box["y"] + box["height"] / 2
    mouse.move(box["x"] + 7, y)
    mouse.down()
    for step in range(1, 11):
        mouse.move(box["x"] + 7 + (box["width"] - 14) * share * step / 10, y)
    mouse.up()


def button(page: NotebookPage, text: str) -> Locator:
    """A button below the desk."""
    return page.page.locator(".prunelab button", has_text=re.compile(f"^{text}$"))


def test_drag_commit_finetune(notebook_page: OpenNotebook) -> None:
    page = notebook_page(lenet())
    found = desk(page)
    before = {name: total(found, name) for name in ("params", "flops", "accuracy")}

    drag(page, slider(found, "fc1", "ratio"), 0.6)
    # Drawn in the browser, before Python has answered.
    assert total(found, "params") != before["params"]
    drag(page, slider(found, "conv2", "ratio"), 0.5)
    measured(found)
    moved = {name: total(found, name) for name in before}
    assert all(moved[name] != before[name] for name in before)
    cell = found.locator('[data-row="conv2"] .c-kept .pl-number')
    kept = cell.inner_text()
    assert re.fullmatch(r"2\d/50", kept)

    button(page, "commit").click()
    expect(found.locator(".pl-status-text")).to_contain_text("Committed: 431,080 →")
    measured(found)
    # The new baseline: nothing is removed from it, and it weighs what the plan promised.
    assert amount(total(found, "params")) == pytest.approx(amount(moved["params"]), rel=0.01)
    expect(cell).to_have_text("/".join([kept[:2]] * 2))
    assert total(found, "accuracy") == moved["accuracy"]

    page.page.locator(".prunelab input[type=number]").first.fill("1")
    page.page.keyboard.press("Tab")
    button(page, "fine-tune").click()
    expect(found.locator(".pl-status-text")).to_contain_text("after 1 of 1 epochs")
    measured(found)
    assert amount(total(found, "accuracy")) > amount(moved["accuracy"])

    found.locator('[data-do="undo"]').click()
    found.locator('[data-do="undo"]').click()
    expect(cell).to_have_text(kept)
    measured(found)
    assert {name: total(found, name) for name in before} == moved
    page.assert_no_errors()


def test_planning_while_a_network_is_trained(notebook_page: OpenNotebook) -> None:
    page = notebook_page(lenet(), width=1000)
    found = desk(page)
    before = total(found, "accuracy")
    page.page.locator(".prunelab input[type=number]").first.fill("200")
    page.page.keyboard.press("Tab")
    button(page, "fine-tune").click()
    train = page.page.locator(".prunelab .jp-Accordion, .prunelab .jupyter-widget-Accordion").first
    expect(train).to_contain_text(re.compile(r"epoch \d+ of 200 · loss \d\.\d+ · accuracy \d+\.\d+% · about \d+"))
    # Rows can be chosen, sliders moved, and what they would do is measured meanwhile.
    drag(page, slider(found, "fc1", "ratio"), 0.95)
    measured(found)
    assert total(found, "accuracy") != before
    expect(found.locator('[data-row="fc1"]')).to_have_attribute("aria-current", "true")
    expect(button(page, "commit")).to_be_disabled()
    kept = found.locator('[data-row="fc1"] .c-kept .pl-number').inner_text()
    # The curves stand beside the two other pictures, and grow.
    pictures = page.page.locator(".prunelab img:visible")
    expect(pictures).to_have_count(3)
    was = pictures.last.get_attribute("src")
    expect(pictures.last).not_to_have_attribute("src", was or "")
    button(page, "stop training").click()
    expect(found.locator(".pl-status-text")).to_contain_text("Stopped: ")
    measured(found)
    expect(found.locator('[data-row="fc1"] .c-kept .pl-number')).to_have_text(kept)
    expect(button(page, "commit")).to_be_enabled()
    overflow: Callable[[str], bool] = page.page.locator(".prunelab").first.evaluate
    assert not overflow("node => node.scrollWidth > node.clientWidth + 1")
    page.assert_no_errors()


def test_keyboard(notebook_page: OpenNotebook) -> None:
    page = notebook_page(lenet())
    found = desk(page)
    handle = slider(found, "conv2", "ratio")
    handle.focus()
    for _ in range(5):
        page.page.keyboard.press("ArrowRight")
    expect(found.locator('[data-row="conv2"] .c-kept .pl-number')).to_have_text("45/50")
    measured(found)
    # Python's answer must not have taken the focus away: tab goes on to the next slider of the row.
    expect(handle).to_be_focused()
    page.page.keyboard.press("Tab")
    expect(slider(found, "conv2", "std")).to_be_focused()
    page.page.keyboard.press("ArrowRight")
    expect(found.locator('[data-row="conv2"]')).to_have_attribute("data-rule", "std")
    found.locator('[data-do="undo"]').click()
    expect(found.locator('[data-row="conv2"] .c-kept .pl-number')).to_have_text("45/50")
    page.assert_no_errors()


def test_remove_a_block_and_a_layer(notebook_page: OpenNotebook) -> None:
    page = notebook_page([OPEN.format(name="resnet20", size=500, title="ResNet-20")])
    found = desk(page)
    before = total(found, "params")
    drag(page, slider(found, "layer2.1.conv1", "ratio"), 0.5)
    drag(page, slider(found, "layer2 stream #2", "ratio"), 0.25)
    measured(found)
    kept = found.locator('[data-row="layer2 stream #2"] .c-kept .pl-number').inner_text()
    pruned = total(found, "params")
    assert amount(pruned) < amount(before)

    block = found.locator('tr[data-unit="layer2.1"]')
    block.locator("button").click()
    expect(block).to_contain_text("removed")
    # For the keyboard: the button that brings it back has the focus now.
    expect(block.locator("button")).to_be_focused()
    expect(found.locator('[data-row="layer2.1.conv1"]')).to_have_count(0)
    measured(found)
    assert amount(total(found, "params")) < amount(pruned)
    expect(found.locator('[data-row="layer2 stream #2"] .c-kept .pl-number')).to_have_text(kept)
    # The rows that are left still answer the hand, and the removed block stays removed.
    without = total(found, "params")
    drag(page, slider(found, "layer3.1.conv1", "ratio"), 0.5)
    assert amount(total(found, "params")) < amount(without)
    measured(found)
    expect(block).to_contain_text("removed")

    block.locator("button").focus()
    page.page.keyboard.press("Enter")
    expect(found.locator('[data-row="layer2.1.conv1"]')).to_have_attribute("data-rule", "ratio")
    found.locator('[data-row="layer1.1.conv1"] [data-field="unit"]').click()
    expect(found.locator('tr[data-unit="layer1.1.conv1"]')).to_contain_text("removed")
    measured(found)
    shown = {name: total(found, name) for name in ("params", "flops", "accuracy")}
    button(page, "commit").click()
    expect(found.locator(".pl-status-text")).to_contain_text("Committed")
    measured(found)
    assert total(found, "accuracy") == shown["accuracy"]
    assert amount(total(found, "params")) == pytest.approx(amount(shown["params"]), rel=0.01)
    page.assert_no_errors()


def test_multiples_speed_and_what_changed(notebook_page: OpenNotebook) -> None:
    page = notebook_page(lenet())
    found = desk(page)
    multiples = page.page.locator(".prunelab .widget-dropdown", has_text="multiples").locator("select")
    multiples.select_option("8")
    kept = found.locator('[data-row="conv2"] .c-kept')
    drag(page, slider(found, "conv2", "ratio"), 0.5)
    # Drawn in the browser, before Python has answered: the next multiple of what the ratio keeps, and so Python says.
    assert kept.locator(".pl-number").inner_text() in ("24/50", "32/50")
    before, flops = kept.inner_text(), total(found, "flops")
    measured(found)
    assert (kept.inner_text(), total(found, "flops")) == (before, flops)
    multiples.select_option("1")
    expect(kept.locator(".pl-number")).not_to_have_text(before.split()[0])
    multiples.select_option("32")
    expect(kept.locator(".pl-number")).to_have_text("32/50")
    measured(found)

    pictures = page.page.locator(".prunelab img:visible")
    expect(pictures).to_have_count(2)
    button(page, "what changed").click()
    expect(pictures).to_have_count(4)
    was = pictures.last.get_attribute("src")
    drag(page, slider(found, "fc1", "ratio"), 0.9)
    measured(found)
    expect(pictures.last).not_to_have_attribute("src", was or "")

    button(page, "measure speed").click()
    expect(found.locator(".pl-status-text")).to_contain_text("Times as fast as unpruned:")
    sentence = page.page.locator(".prunelab .widget-html:visible", has_text="interleaved pairs")
    expect(sentence).to_contain_text(re.compile(r"\d threads?, float32"))
    measured(found)
    expect(found.locator(".pl-stale")).to_have_count(0)
    drag(page, slider(found, "fc1", "ratio"), 0.3)
    # Another plan was not timed.
    expect(sentence).to_have_count(0)
    button(page, "what changed").click()
    expect(pictures).to_have_count(2)
    page.assert_no_errors()


def test_a_scan_draws_a_curve_behind_every_slider(notebook_page: OpenNotebook) -> None:
    page = notebook_page(lenet())
    found = desk(page)
    curves = found.locator(".pl-curve[aria-label]:not([visibility])")
    expect(curves).to_have_count(0)
    pictures = page.page.locator(".prunelab img:visible")
    before = pictures.count()

    button(page, "scan layers").click()
    expect(found.locator(".pl-status-text")).to_contain_text("Scanned 3 layers by apoz at 9 ratios, 500 images each.")
    measured(found)
    expect(curves).to_have_count(3)
    expect(found.locator('[data-row="fc2"] .pl-curve')).to_have_count(0)
    expect(pictures).to_have_count(before + 1)
    lane = found.locator('[data-row="conv2"] .pl-lane')
    words = lane.get_attribute("title") or ""
    assert "n = 500" in words
    assert len(re.findall(r"% removed: \d", words)) == 9
    removed = lane.locator(".pl-curve-area.pl-area-removed")
    assert removed.get_attribute("d") == ""
    drag(page, slider(found, "conv2", "ratio"), 0.5)
    # Drawn in the browser: the half that is gone turns grey.
    assert removed.get_attribute("d") != ""
    assert "; alone, accuracy" in (slider(found, "conv2", "ratio").get_attribute("aria-valuetext") or "")
    measured(found)

    page.page.locator(".prunelab select").first.select_option("l1")
    expect(found.locator("thead th.c-ratio")).to_have_text("ratio, stale scan")
    expect(lane).to_have_attribute("title", re.compile("Stale: measured by apoz"))
    found.locator('[data-do="undo"]').click()
    expect(found.locator("thead th.c-ratio")).to_have_text("ratio, accuracy")
    button(page, "commit").click()
    expect(found.locator(".pl-status-text")).to_contain_text("Committed")
    measured(found)
    expect(curves).to_have_count(0)
    expect(found.locator("thead th.c-ratio")).to_have_text("ratio")
    expect(pictures).to_have_count(before)
    page.assert_no_errors()


def test_a_scan_of_single_weights_stands_behind_the_rows_that_lose_single_weights(notebook_page: OpenNotebook) -> None:
    page = notebook_page([LAB_OF_WEIGHTS])
    found = desk(page)
    curves = found.locator(".pl-curve[aria-label]:not([visibility])")
    expect(curves).to_have_count(3)
    assert "; alone, accuracy" in (slider(found, "fc1", "ratio").get_attribute("aria-valuetext") or "")
    # Half of it is gone: a grey and a blue half.
    assert found.locator('[data-row="fc1"] .pl-curve-area.pl-area-removed').get_attribute("d") != ""
    assert found.locator('[data-row="fc1"] .pl-curve-area.pl-area-kept').get_attribute("d") != ""
    slider(found, "fc1", "grain").press("ArrowLeft")
    expect(curves).to_have_count(2)
    page.assert_no_errors()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1000, 1600])
def test_the_best_plan_fills_in_the_sliders(notebook_page: OpenNotebook, width: int, dark: bool) -> None:
    page = notebook_page(lenet(), width, 1000, dark)
    found = desk(page)
    pictures = page.page.locator(".prunelab img:visible")
    before, uncut = pictures.count(), total(found, "flops")
    whole = amount(uncut)
    wish = page.page.locator(".prunelab select", has_text="FLOPs −70 %")
    expect(wish).to_have_value("FLOPs −50 %")
    button(page, "best plan for").click()
    expect(found.locator(".pl-status-text")).to_contain_text(
        re.compile(r"Best plan for FLOPs −50 %: \d.*; one ratio for all layers: \d")
    )
    measured(found)
    assert 0.4 * whole < amount(total(found, "flops")) <= 0.5 * whole + 0.01
    assert any(float(slider(found, layer, "ratio").input_value()) > 0 for layer in ("conv1", "conv2", "fc1"))
    expect(pictures).to_have_count(before + 1)
    overflow: Callable[[str], bool] = page.page.locator(".prunelab").first.evaluate
    assert not overflow("node => node.scrollWidth > node.clientWidth + 1")
    if folder := os.environ.get("PRUNELAB_PICTURES"):
        page.page.screenshot(path=Path(folder) / f"best-{width}-{'dark' if dark else 'light'}.png")
    found.locator('[data-do="undo"]').click()
    expect(found.locator('[data-total="flops"] .pl-now')).to_have_text(uncut)
    page.assert_no_errors()


def test_a_search_shows_how_far_it_is_and_can_be_stopped(notebook_page: OpenNotebook) -> None:
    page = notebook_page([OPEN.format(name="resnet20", size=500, title="ResNet-20")])
    found = desk(page)
    page.page.locator(".prunelab select", has_text="drop ≤ 2 points").select_option("parameters −70 %")
    button(page, "best plan for").click()
    status = found.locator(".pl-status-text")
    expect(status).to_contain_text(re.compile(r"parameters −70 %: FLOPs \d+%, parameters \d+%, accuracy \d+\.\d%"))
    expect(button(page, "commit")).to_be_disabled()
    button(page, "stop").click()
    expect(status).to_contain_text("Stopped: the plan is as it was")
    expect(button(page, "commit")).to_be_enabled()
    page.assert_no_errors()


def test_an_error_is_shown_and_changes_nothing(notebook_page: OpenNotebook) -> None:
    page = notebook_page([*lenet(), "explorer._files.name.value = 'missing.json'"])
    found = desk(page)
    button(page, "load plan").click()
    expect(found.locator(".pl-error")).to_contain_text("There is no file missing.json")
    button(page, "commit").click()
    expect(found.locator(".pl-error")).to_contain_text("There is nothing to commit")
    assert total(found, "params") == "431\u202fk"
    page.assert_no_errors()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1000, 1600])
def test_fits(notebook_page: OpenNotebook, width: int, dark: bool) -> None:
    """Nothing is cut off or scrolls sideways. With PRUNELAB_PICTURES set, screenshots are left in that folder."""
    page = notebook_page([OPEN.format(name="resnet20", size=500, title="ResNet-20")], width, 1000, dark)
    found = desk(page)
    page.page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
    for layer, share in (("layer1.0.conv1", 0.4), ("layer2.1.conv1", 0.5)):
        drag(page, slider(found, layer, "ratio"), share)
    found.locator('tr[data-unit="layer1.1"] button').click()
    expect(found.locator('tr[data-unit="layer1.1"]')).to_contain_text("removed")
    measured(found)
    page.wait_idle()
    overflow: Callable[[str], bool] = page.page.locator(".prunelab").first.evaluate
    assert not overflow("node => node.scrollWidth > node.clientWidth + 1")
    if folder := os.environ.get("PRUNELAB_PICTURES"):
        page.page.wait_for_timeout(2000)
        name = f"explorer-{width}-{'dark' if dark else 'light'}.png"
        page.page.screenshot(path=Path(folder) / name)
    page.assert_no_errors()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1000, 1600])
def test_a_criterion_of_gradients_is_chosen(notebook_page: OpenNotebook, width: int, dark: bool) -> None:
    page = notebook_page([OPEN.format(name="resnet20", size=500, title="ResNet-20")], width, 1000, dark)
    found = desk(page)
    chosen = page.page.locator(".prunelab .widget-dropdown", has_text="criterion").locator("select")
    chosen.select_option("taylor")
    expect(found).to_contain_text("Channels are scored by taylor.")
    expect(page.page.locator(".prunelab")).to_contain_text("Change of the loss without the channel")
    measured(found)
    overflow: Callable[[str], bool] = page.page.locator(".prunelab").first.evaluate
    assert not overflow("node => node.scrollWidth > node.clientWidth + 1")
    if folder := os.environ.get("PRUNELAB_PICTURES"):
        button(page, "fine-tune").scroll_into_view_if_needed()
        page.page.screenshot(path=Path(folder) / f"criterion-{width}-{'dark' if dark else 'light'}.png")
    page.assert_no_errors()
