"""Selections: values that compare by content."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import prunelab as pl
from prunelab import zoo
from prunelab.program.run import removes_anything


def test_equal_content_is_equal_and_has_the_same_digest() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    first = pl.Selection({"a": (0, 2), "b": (1,)}, {"w": mask})
    second = pl.Selection({"b": [1], "a": np.array([0, 2])}, {"w": mask.clone()})  # type: ignore[dict-item]
    assert first == second
    assert first.digest == second.digest
    assert hash(first) == hash(second)
    assert len({first, second}) == 1
    assert pl.Selection(bypassed=("b", "a", "b")) == pl.Selection(bypassed=("a", "b"))


@pytest.mark.parametrize(
    "other",
    [
        pl.Selection(),
        pl.Selection({"a": (0, 1)}, {"w": torch.tensor([True, False])}),
        pl.Selection({"b": (0, 2)}, {"w": torch.tensor([True, False])}),
        pl.Selection({"a": (0, 2)}, {"w": torch.tensor([False, False])}),
        pl.Selection({"a": (0, 2)}, {"v": torch.tensor([True, False])}),
        pl.Selection({"a": (0, 2)}, {"w": torch.tensor([True, False])}, ("b",)),
        "a selection",
    ],
)
def test_other_content_is_not(other: object) -> None:
    assert pl.Selection({"a": (0, 2)}, {"w": torch.tensor([True, False])}) != other


def test_nothing_in_it_changes() -> None:
    given = {"a": (0, 2)}
    selection = pl.Selection(given)
    given["a"] = (0,)
    assert selection.kept["a"] == (0, 2)
    with pytest.raises(TypeError):
        selection.kept["a"] = (0,)  # type: ignore[index]
    with pytest.raises(AttributeError):
        selection.kept = {}  # type: ignore[misc]


def test_what_removes_nothing_is_known() -> None:
    program = pl.trace(zoo.lenet(), torch.randn(2, 1, 28, 28))
    whole = pl.Selection({"conv1": tuple(range(20))}, {"fc2.weight": torch.ones(10, 500, dtype=torch.bool)})
    assert not removes_anything(program, pl.DENSE)
    assert not removes_anything(program, whole)
    assert removes_anything(program, pl.Selection({"conv1": tuple(range(19))}))
    assert removes_anything(program, pl.Selection(masks={"fc2.weight": torch.zeros(10, 500, dtype=torch.bool)}))


def test_a_layer_under_two_names_is_refused() -> None:
    program = pl.trace(zoo.resnet20("projection"), torch.randn(2, 3, 32, 32))
    both = pl.Selection({"layer2 stream": (0,), "layer2.1.conv2": (0, 1)})
    for use in (pl.cost, pl.commit):
        with pytest.raises(pl.PruneLabError, match="names layer 'layer2 stream' twice"):
            use(program, both)
