"""What the desk shows is what the lab holds, both ways, and its arithmetic terms are the cost."""

from __future__ import annotations

import math
from typing import Any

import pytest

import prunelab as pl
from prunelab.explorer.desk import figures_of, layers_of, plan_of, rows_of, terms_of, units_of

TRAIN, TEST = pl.datasets.fashion_mnist()


@pytest.fixture(scope="module")
def lab() -> pl.Lab:
    return pl.Lab(pl.zoo.load("resnet20"), TRAIN.subset(100), TEST.subset(100), criterion="l1")


def evaluate(terms: list[Any], kept: list[int]) -> int:
    """As the browser does it."""
    return sum(
        c * math.prod(const + sum(kept[k] * n for k, n in parts) for const, parts in sizes) for c, sizes in terms
    )


def test_the_browsers_arithmetic_is_pythons(lab: pl.Lab) -> None:
    lab.reset()
    lab.set_all(ratio=0.37)
    terms, layers, figures = terms_of(lab), layers_of(lab), figures_of(lab)
    kept = [layers[name]["kept"] for name in terms["names"]]
    assert evaluate(terms["params"], kept) == figures["params"]
    assert 2 * evaluate(terms["macs"], kept) == figures["flops"]


def test_plan_to_browser_and_back(lab: pl.Lab) -> None:
    lab.reset()
    names = [layer.name for layer in lab.program.layers if not layer.pinned]
    lab.set(names[0], ratio=0.25)
    lab.set(names[1], std=0.5, locked=True)
    lab.set(names[2], remove=[1, 3])
    lab.set(names[3], ratio=0.5, grain="weight")
    assert plan_of(layers_of(lab), lab.plan) == lab.plan


def test_shares_are_parts_of_one_whole(lab: pl.Lab) -> None:
    rows = rows_of(lab)
    assert 0.9 < sum(r["params_share"] for r in rows) <= 1 + 1e-9
    assert sum(r["flops_share"] for r in rows) == pytest.approx(1)


def test_units_stand_before_what_they_hold(lab: pl.Lab) -> None:
    lab.reset()
    rows, units = rows_of(lab), units_of(lab)
    names = [row["name"] for row in rows]
    assert [unit["name"] for unit in units] == [
        *("layer1", "layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2")
    ]
    block = next(unit for unit in units if unit["name"] == "layer2.1")
    assert names[block["at"]] == "layer2.1.conv1"
    assert (block["kind"], block["removed"], block["stage"]) == ("block", False, "layer2")
    # Only what has a row of its own can be removed as a layer there.
    assert {row["name"]: row["unit"] for row in rows}["layer1.0.conv1"] == "layer1.0.conv1"
    assert {row["name"]: row["unit"] for row in rows}["layer1 stream"] == ""


def test_settings_without_a_row_outlive_the_browser(lab: pl.Lab) -> None:
    lab.reset()
    lab.set("layer1.1.conv1", ratio=0.5)
    lab.set("layer2.1.conv1", ratio=0.25)
    lab.bypass("layer1.1")
    lab.bypass("layer2.1.conv1")
    layers, units = layers_of(lab), units_of(lab)
    assert not {"layer1.1.conv1", "layer2.1.conv1"} & layers.keys()
    assert [unit["name"] for unit in units if unit["removed"]] == ["layer1.1", "layer2.1.conv1"]
    assert plan_of(layers, lab.plan) == lab.plan
    terms, figures = terms_of(lab), figures_of(lab)
    kept = [layers[name]["kept"] for name in terms["names"]]
    assert evaluate(terms["params"], kept) == figures["params"]
    assert 2 * evaluate(terms["macs"], kept) == figures["flops"]
    assert figures["params0"] == lab.dense_cost().params
    lab.reset()
