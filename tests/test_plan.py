"""The plan: a plain value with a JSON and a Python form, and the arithmetic of its rules."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

import prunelab as pl
from prunelab.plan import by_ratio, by_std, ratio_of_std, std_of_ratio

TRAIN, TEST = pl.datasets.fashion_mnist()
NAMES = st.text(min_size=1, max_size=12)
FINITE = st.floats(-4, 4)
RULES = st.one_of(
    st.fixed_dictionaries({"ratio": st.floats(0, 1)}),
    st.fixed_dictionaries({"std": FINITE}),
    st.fixed_dictionaries({"remove": st.lists(st.integers(0, 500), max_size=9)}),
    st.fixed_dictionaries({"ratio": st.floats(0, 1), "grain": st.just("weight"), "locked": st.booleans()}),
)


@st.composite
def plans(draw: st.DrawFn) -> pl.Plan:
    criterion = draw(st.sampled_from(pl.criteria_names()))
    plan = pl.Plan(
        criterion=criterion, seed=draw(st.integers(0, 99)), repair=draw(st.sampled_from(["none", "least-squares"]))
    )
    for name in draw(st.lists(NAMES, max_size=5)):
        plan = plan.clear(name).set(name, **draw(RULES)) if name not in plan.settings else plan
    return plan


@given(plans())
def test_json_and_python_give_the_plan_back(plan: pl.Plan) -> None:
    assert pl.Plan.from_json(plan.to_json()) == plan
    assert pl.Plan.from_python(plan.to_python()) == plan
    assert eval(plan.to_python(), {"pl": pl}) == plan  # what a user who pastes it gets
    assert hash(pl.Plan.from_json(plan.to_json())) == hash(plan)


def test_nothing_changes_in_place() -> None:
    plan = pl.Plan()
    longer = plan.set("conv2", ratio=0.5)
    assert not plan.settings
    assert longer != plan
    with pytest.raises(dataclasses.FrozenInstanceError):
        longer.criterion = "apoz"  # type: ignore[misc]  # what must not work
    with pytest.raises(TypeError):
        longer.settings["conv1"] = pl.Setting()  # type: ignore[index]  # what must not work
    assert longer.set("conv2", std=1.0).settings["conv2"].ratio is None


@pytest.mark.parametrize(
    "text",
    [
        "__import__('pathlib').Path('{path}').touch()",
        "pl.Plan(criterion=__import__('pathlib').Path('{path}').touch())",
        "pl.Plan().set('conv1', ratio=open('{path}', 'w').write('x'))",
        "pl.Plan().save('conv1')",
        "[pl.Plan() for _ in open('{path}', 'w')]",
        "1 + 1",
        "pl.Plan(",
    ],
)
def test_from_python_executes_nothing(text: str, tmp_path: Path) -> None:
    target = tmp_path / "touched"
    with pytest.raises(pl.PruneLabError, match="not a plan in Python"):
        pl.Plan.from_python(text.format(path=target))
    assert not target.exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"criterion": "l1"}', '{"criterion": "l1", "settings": {"a": 3}}']
)
def test_damaged_json(text: str) -> None:
    with pytest.raises(pl.PruneLabError, match="not a plan in JSON"):
        pl.Plan.from_json(text)


SCORES = st.lists(st.integers(-5, 5), min_size=1, max_size=40).map(lambda v: np.array(v, float))


@given(SCORES, st.floats(0, 1))
def test_ratio_removes_the_lowest_in_stable_order(score: np.ndarray, ratio: float) -> None:
    gone = by_ratio(score, ratio)
    count = min(math.floor(ratio * score.size + 1e-9), score.size - 1)
    assert gone.tolist() == sorted(sorted(range(score.size), key=lambda i: (score[i], i))[:count])


@given(SCORES, FINITE)
def test_std_removes_what_lies_below(score: np.ndarray, std: float) -> None:
    gone = set(by_std(score, std).tolist())
    below = {i for i in range(score.size) if score[i] < score.mean() - std * score.std()}
    if len(below) == score.size:
        below.remove(int(np.argmax(score)))
    assert gone == below


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=40, unique=True), st.floats(0, 1))
def test_ratio_and_std_amount_to_each_other(values: list[float], ratio: float) -> None:
    score = np.array(values)
    std = std_of_ratio(score, ratio)
    if std is not None:
        gone = by_ratio(score, ratio).size
        # The threshold lies on the lowest kept score: rounding may put it on either side of that one.
        assert abs(ratio_of_std(score, std) * score.size - gone) <= 1 + 1e-9


def test_three_tenths_of_ten_is_three() -> None:
    assert by_ratio(np.arange(10.0), 0.3).size == 3


def test_resolve_refuses_in_a_sentence() -> None:
    program = pl.trace(pl.zoo.load("lenet"), TEST.images[:2])
    cases = [
        (pl.Plan().set("conv3", ratio=0.5), "conv2"),
        (pl.Plan().set("fc2", ratio=0.5), "network's outputs"),
        (pl.Plan("apoz").set("conv2", ratio=0.5), "needs a profile"),
        (pl.Plan(network="00").set("conv2", ratio=0.5), "another network"),
        (pl.Plan().set("conv1", remove=range(20)), "last channel"),
        (pl.Plan().set("conv1", remove=[3, 20]), "0 to 19"),
    ]
    for plan, says in cases:
        with pytest.raises(pl.PruneLabError, match=says):
            plan.resolve(program)
    for bad in ({"ratio": -0.1}, {"ratio": 1.1}, {"ratio": float("nan")}, {"std": float("inf")}, {"grain": "chanel"}):
        with pytest.raises(pl.PruneLabError):
            pl.Plan().set("conv1", **bad)
    with pytest.raises(pl.PruneLabError, match="apoz"):
        pl.Plan("apozz")


def test_weight_grain_masks_the_smallest() -> None:
    program = pl.trace(pl.zoo.load("lenet"), TEST.images[:2])
    mask = pl.Plan().set("fc1", ratio=0.4, grain="weight").resolve(program).masks["fc1.weight"]
    weight = program.model.fc1.weight.detach().abs()
    assert int((~mask).sum()) == 160_000
    assert weight[~mask].max() <= weight[mask].min()
