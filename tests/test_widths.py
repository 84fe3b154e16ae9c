"""Widths in whole multiples: never less than a rule keeps, never more than there is, and always the lowest go."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

import prunelab as pl
from prunelab.plan import by_ratio, by_std
from prunelab.widths import rounded, step_of

scores_ = arrays(np.float64, st.integers(1, 70), elements=st.floats(-100, 100).map(lambda x: round(x, 1)))


class Grouped(nn.Module):
    """A grouped and a depthwise convolution, and widths that are no multiple of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 64, 3)
        self.b = nn.Conv2d(64, 64, 3, groups=4)
        self.c = nn.Conv2d(64, 42, 1)
        self.d = nn.Conv2d(42, 42, 3, groups=42)
        self.norm = nn.BatchNorm2d(42)
        self.head = nn.Linear(42, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.d(self.c(self.b(self.a(x)).relu())))
        logits: Tensor = self.head(x.relu().mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def program() -> pl.Program:
    torch.manual_seed(0)
    return pl.trace(Grouped().eval(), torch.randn(2, 3, 12, 12))


@given(scores_, st.floats(0, 1), st.integers(1, 40))
def test_the_next_multiple_is_kept_and_the_lowest_go(score: np.ndarray, ratio: float, step: int) -> None:
    asked = by_ratio(score, ratio)
    gone = rounded(asked, score, step)
    wanted, kept = score.size - asked.size, score.size - gone.size
    assert kept == min(math.ceil(wanted / step) * step, score.size)
    assert gone.tolist() == np.sort(np.argsort(score, kind="stable")[: gone.size]).tolist()
    assert rounded(gone, score, step).tolist() == gone.tolist()


@given(scores_, st.floats(-3, 3), st.integers(1, 40))
def test_a_std_loses_only_what_it_removed(score: np.ndarray, std: float, step: int) -> None:
    asked = by_std(score, std)
    gone = rounded(asked, score, step)
    assert set(gone.tolist()) <= set(asked.tolist())
    assert (score.size - gone.size) % step == 0 or not gone.size
    stays = np.setdiff1d(asked, gone)
    assert not (gone.size and stays.size) or score[gone].max() <= score[stays].min()


@given(scores_, st.floats(0, 1))
def test_multiples_of_one_change_nothing(score: np.ndarray, ratio: float) -> None:
    assert rounded(by_ratio(score, ratio), score, 1).tolist() == by_ratio(score, ratio).tolist()


def test_what_a_channel_occupies_counts(program: pl.Program) -> None:
    # Four groups: a channel of the rows "a" and "b" is one filter in each.
    assert {layer.name: layer.channels for layer in program.layers} == {"a": 16, "b": 16, "c": 42, "head": 5}
    assert {name: step_of(program.layer(name), 8) for name in ("a", "b", "c")} == {"a": 2, "b": 2, "c": 8}
    assert step_of(program.layer("a"), 6) == 3
    assert step_of(program.layer("a"), 4) == 1


@pytest.mark.parametrize("rule", [{"ratio": 0.4}, {"std": 0.3}])
@pytest.mark.parametrize("multiple", [1, 4, 8, 16, 32])
def test_committed_widths_are_multiples(program: pl.Program, multiple: int, rule: dict[str, float]) -> None:
    free = pl.Plan("l1").set("a", **rule).set("b", **rule).set("c", **rule)  # type: ignore[arg-type]
    plan = pl.Plan(settings=free.settings, multiple=multiple)
    selection = plan.resolve(program)
    small = pl.commit(program, selection)
    for name in ("a", "b", "c", "d"):
        width = getattr(small, name).out_channels
        full = getattr(program.model, name).out_channels
        least = getattr(pl.commit(program, free.resolve(program)), name).out_channels
        assert width == min(math.ceil(least / multiple) * multiple, full)


def test_the_hand_and_single_weights_are_left_as_they_are(program: pl.Program) -> None:
    plan = pl.Plan(multiple=16).set("c", remove=[0, 1, 2]).set("a", ratio=0.3, grain="weight")
    selection = plan.resolve(program)
    assert len(selection.kept["c"]) == 39
    assert int((~selection.masks["a.weight"]).sum()) == int(0.3 * program.state("a.weight").numel())


def test_a_layer_narrower_than_the_multiple_stays_whole() -> None:
    program = pl.trace(pl.zoo.resnet20(), torch.randn(2, 3, 32, 32))
    plan = pl.Plan(multiple=16).set("layer2 stream #1", ratio=0.9).set("layer3 stream #1", ratio=0.9)
    assert not plan.resolve(program).kept
    plan = plan.set("layer3.1.conv1", ratio=0.99)
    assert {name: len(kept) for name, kept in plan.resolve(program).kept.items()} == {"layer3.1.conv1": 16}


def test_it_is_part_of_the_plan() -> None:
    plan = pl.Plan(multiple=8).set("a", ratio=0.5)
    assert plan.to_python() == "(\n    pl.Plan(criterion='l1', multiple=8)\n    .set('a', ratio=0.5)\n)"
    assert plan != pl.Plan().set("a", ratio=0.5)
    # Plans that were written before there were multiples.
    assert pl.Plan.from_json('{"criterion": "l1", "settings": {}}') == pl.Plan()
