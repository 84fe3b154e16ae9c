"""What a saved notebook shows of the explorer: this plan's numbers and no other's, in HTML that stands alone."""

from __future__ import annotations

import re

import pytest

import prunelab as pl
from prunelab.explorer.summary import summary

TRAIN, TEST = pl.datasets.fashion_mnist()


@pytest.fixture
def lab() -> pl.Lab:
    return pl.Lab(pl.zoo.load("lenet"), TRAIN.subset(100), TEST.subset(100), cache=False, name="<Le>Net")


def row_of(text: str, layer: str) -> list[str]:
    row = next(row for row in text.split("<tr>") if f">{layer}</td>" in row)
    return [re.sub(r"<[^>]*>", "", cell) for cell in row.split("</td>")]


def test_rows_say_what_is_set_and_what_stays(lab: pl.Lab) -> None:
    lab.set("conv1", ratio=0.5)
    lab.set("conv2", std=1.0)
    lab.set("fc1", ratio=0.9, grain="weight")
    text = summary(lab)
    kept = len(lab.selection.kept["conv2"])
    assert row_of(text, "conv1")[2:4] == ["50% of channels", "10 of 20"]
    assert row_of(text, "conv2")[2:4] == ["mean − 1·σ", f"{kept} of 50"]
    assert row_of(text, "fc1")[1:4] == ["92.9%", "90% of weights", "40,000 of 400,000"]
    assert row_of(text, "fc2")[2:4] == ["", "10 of 10"]
    assert "outputs" in row_of(text, "fc2")[5]
    assert f"→ {lab.cost().nonzero:,} parameters that are not zero" in text
    assert "&lt;Le&gt;Net" in text
    assert "<Le>" not in text


def test_the_accuracy_is_that_of_this_plan_or_none(lab: pl.Lab) -> None:
    lab.set("conv1", ratio=0.5)
    assert "accuracy" not in summary(lab)
    found = lab.measure()
    interval = f"{found.low:.1%} to {found.high:.1%}"
    assert f"accuracy {found.accuracy:.1%} ({interval}, 100 images, float32)" in summary(lab)
    lab.set("conv1", ratio=0.6)
    assert "accuracy" not in summary(lab)
