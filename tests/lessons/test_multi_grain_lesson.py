"""The exercise on multi-grain pruning: all three grains, small enough, and near enough."""

from __future__ import annotations

import re

import pytest

import prunelab as pl
from prunelab import lessons

LAYER = pl.Plan(repair="least-squares").bypass("stage3.conv2")
CHANNELS = LAYER.set("stage2.conv1", ratio=0.25)
WIDE = ("stage2.conv2", "stage3.conv1")


def with_weights(plan: pl.Plan, ratio: float) -> pl.Plan:
    for name in WIDE:
        plan = plan.set(name, ratio=ratio, grain="weight")
    return plan


def test_it_accepts_a_plan_with_all_grains() -> None:
    verdict = lessons.check("multi-grain", with_weights(CHANNELS, 0.75))
    assert verdict.right, verdict
    assert re.match(r"5\.\d\d times smaller, 2\.28 of it by layers and channels; -1\.\d points", verdict.text)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (pl.Plan(), "removes no layer"),
        (with_weights(LAYER, 0.8), "removes no channels"),
        (CHANNELS, "removes no single weights"),
        # What is set within a bypassed layer rests.
        (CHANNELS.set("stage3.conv2", ratio=0.5, grain="weight"), "removes no single weights"),
        (with_weights(CHANNELS, 0.5), "3.77 times smaller.* not small enough"),
        (with_weights(CHANNELS, 0.97), "costs too much: channels cost more"),
        (with_weights(CHANNELS, 0.75).bypass("stage2.conv2"), "costs too much: the layers are not equally idle"),
        (
            with_weights(pl.Plan().bypass("stage3.conv2").set("stage2.conv1", ratio=0.25), 0.75),
            "A plan can repair them",
        ),
        (LAYER.bypass("stage4.conv2"), "no layer or block to bypass 'stage4.conv2'"),
    ],
)
def test_it_refuses_what_is_not_enough(plan: pl.Plan, reason: str) -> None:
    verdict = lessons.check("multi-grain", plan)
    assert not verdict
    assert re.search(reason, verdict.text), verdict.text


def test_the_question_has_one_right_answer() -> None:
    question = lessons.multi_grain.QUESTION
    assert [choice for choice in question.choices if question.answer(choice)] == ["More than 93 %"]
