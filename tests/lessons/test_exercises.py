"""Checkers: each accepts what is right, refuses what is nearly right with the reason, and answers anything kindly."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import prunelab as pl
from prunelab import lessons

# Anything ---------------------------------------------


@pytest.mark.parametrize("name", sorted(lessons.exercises()))
@pytest.mark.parametrize("answer", ["half", [1, 2], object(), float("nan"), int, True, {}, torch.zeros(3)])
def test_an_answer_of_the_wrong_kind_gets_a_sentence_and_the_task_again(name: str, answer: Any) -> None:
    verdict = lessons.check(name, answer)
    assert not verdict
    assert verdict.text.startswith("The answer must be ")
    assert verdict.text.endswith(lessons.exercises()[name])


@pytest.mark.parametrize("name", sorted(lessons.exercises()))
def test_no_answer_is_told_what_is_asked(name: str) -> None:
    assert lessons.check(name) == lessons.Verdict(False, f"No answer yet. {lessons.exercises()[name]}")


def test_an_unknown_exercise_is_named_with_its_neighbours() -> None:
    with pytest.raises(pl.PruneLabError, match="no exercise 'mean'; the nearest names are 'mean-activation'"):
        lessons.check("mean", 1)


def test_an_exercise_of_ones_own_works_like_the_others() -> None:
    @lessons.exercise("tests-own", "Give two.")
    def own(answer: Any) -> lessons.Verdict:
        return lessons.Verdict(answer == 2, "Twice one.")

    assert lessons.check("tests-own", 2)
    assert not lessons.check("tests-own", 3)


def test_a_verdict_shows_itself_in_text_and_in_html() -> None:
    right, wrong = lessons.Verdict(True, "`a` < b"), lessons.Verdict(False, "No.")
    assert (repr(right), str(wrong)) == ("✓ `a` < b", "✗ No.")
    assert "<b>✓</b> <code>a</code> &lt; b" in right._repr_html_()
    assert "<b>✗</b> No." in wrong._repr_html_()


# Mean activation ---------------------------------------------


def means(responses: Tensor) -> Tensor:
    return responses.transpose(0, 1).flatten(1).mean(1)


def lowest(score: Tensor, ratio: float) -> list[int]:
    count = min(int(ratio * len(score)), len(score) - 1)
    return score.argsort(stable=True)[:count].tolist()


def with_threshold(responses: Tensor, ratio: float) -> list[int]:
    score = means(responses)
    return (score <= score.sort().values[max(int(ratio * len(score)) - 1, 0)]).nonzero().flatten().tolist()


def in_place(responses: Tensor, ratio: float) -> list[int]:
    found = lowest(means(responses), ratio)
    responses.zero_()
    return found


def test_mean_activation_accepts_the_method() -> None:
    for function in (
        lambda r, p: lowest(means(r), p),
        lambda r, p: torch.tensor(lowest(means(r), p)),
        # Among equal channels any may go.
        lambda r, p: [r.shape[1] - 1 - c for c in lowest(means(r).flip(0), p)],
    ):
        assert lessons.check("mean-activation", function).right


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda r, p: lowest(-means(r), p), "removes the channels that respond most"),
        (lambda r, p: lowest(r.transpose(0, 1).flatten(1).amax(1), p), "Layer . of 6: .* keeps channel"),
        (lambda r, p: means(r).argsort()[: round(p * r.shape[1])], "7 channels at ratio 0.55 .* removes 4 and not 3"),
        (
            with_threshold,
            "of 8 channels at ratio 0.25 your function removes 5 and not 2. Several channels never respond",
        ),
        (lambda r, p: lowest(means((r > 0).double()), p), "keeps channel"),
        (lambda r, p: lowest(means(r) / means((r > 0).float()).clamp(min=1e-9), p), "Layer . of 6: .* keeps channel"),
        (lambda r, p: lowest(r.mean((0, 2, 3)), p), "Your function stopped with IndexError.*shape \\(60, 12\\)"),
        (lambda r, p: means(r).argsort()[: int(p * r.shape[1])], "at ratio 1 your function removes 5 and not 4"),
        (in_place, "changes the responses that it is given"),
        (lambda r, p: means(r), "gave float32 of shape \\(10,\\), not the numbers of channels"),
        (lambda r, p: means(r) < 0.3, "gave bool"),
        (lambda r, p: None, "gave a NoneType"),
        (lambda r, p: [99], "channels count from 0 to 9"),
        (lambda r: [], "Your function stopped with TypeError"),
    ],
)
def test_mean_activation_refuses_what_is_not_it(function: Callable[..., Any], reason: str) -> None:
    verdict = lessons.check("mean-activation", function)
    assert not verdict
    assert re.search(reason, verdict.text), verdict.text


# Network Trimming ---------------------------------------------

TRIMMED = pl.Plan("apoz").set("conv1", std=1.0).set("conv2", std=1.0).set("fc1", std=0.5)


def test_network_trimming_accepts_thresholds_that_do_both() -> None:
    verdict = lessons.check("network-trimming", TRIMMED)
    assert verdict.right, verdict
    assert verdict.text.startswith("1.85 times smaller, -3.")


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (pl.Plan("apoz"), "1.00 times smaller, +0.0 points .* not small enough"),
        (pl.Plan("apoz").set("conv1", std=1.0).set("conv2", std=1.0).set("fc1", std=1.0), "not small enough"),
        (pl.Plan("apoz").set("fc1", std=0.0), "costs too much"),
        (pl.Plan("l1").set("fc1", std=0.5), "scores by l1"),
        (pl.Plan("apoz").set("fc1", ratio=0.5), "std= alone"),
        (TRIMMED.set("fc1", grain="weight"), "channels, and std= alone"),
        (pl.Plan("apoz", repair="bias").set("fc1", std=0.5), "set no repair"),
        (TRIMMED.set("fc7", std=0.5), "There is no layer 'fc7'"),
        (TRIMMED.set("fc2", std=0.5), "'fc2' cannot be pruned"),
    ],
)
def test_network_trimming_refuses_what_is_not_it(plan: pl.Plan, reason: str) -> None:
    verdict = lessons.check("network-trimming", plan)
    assert not verdict
    assert re.search(reason.replace("+", "\\+"), verdict.text), verdict.text


def test_network_trimming_takes_a_lab_as_it_stands() -> None:
    train, val, _ = lessons.fashion_mnist()
    lab = pl.Lab(pl.zoo.load("lenet"), train, val, criterion="apoz")
    lab.run_profile(progress=False)
    assert "not small enough" in lessons.check("network-trimming", lab).text
    lab.use(TRIMMED)
    assert lessons.check("network-trimming", lab).right


# A quarter of the size ---------------------------------------------

SHARES = dict(zip(("stage1.conv1", "stage1.conv2", "stage2.conv1", "stage2.conv2", "stage3.conv1", "stage3.conv2"),
                  (0.2, 0.5, 0.55, 0.62, 0.72, 0.87), strict=True))  # fmt: skip


def zeroed(shares: dict[str, float], grain: str = "weight", **settings: Any) -> pl.Plan:
    plan = pl.Plan(**settings)
    for name, share in shares.items():
        plan = plan.set(name, ratio=share, grain=grain)
    return plan


def test_a_quarter_of_the_size_accepts_shares_chosen_by_layer() -> None:
    verdict = lessons.check("a-quarter-of-the-size", zeroed(SHARES))
    assert verdict.right, verdict
    assert verdict.text.startswith("24.")


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (zeroed(dict.fromkeys(SHARES, 0.76)), "24.* of the parameters, 1.* accuracy .* too much is lost"),
        (zeroed({**SHARES, "stage3.conv2": 0.5}), "Still too large"),
        (zeroed(SHARES, grain="channel"), "stage1.conv1, .* single weights"),
        (zeroed(SHARES).bypass("stage3"), "stage3: here single weights go"),
        (zeroed(SHARES, repair="norm"), "set no repair"),
        (zeroed({"conv2": 0.5}), "There is no layer 'conv2'"),
    ],
)
def test_a_quarter_of_the_size_refuses_what_is_not_it(plan: pl.Plan, reason: str) -> None:
    verdict = lessons.check("a-quarter-of-the-size", plan)
    assert not verdict
    assert re.search(reason, verdict.text), verdict.text


# Centripetal SGD ---------------------------------------------


def gradients_of(weights: Tensor, gradients: Tensor, clusters: list[int], pull: float, sign: float = 1.0) -> Tensor:
    number = torch.tensor(clusters)
    same = (number[:, None] == number[None, :]).to(weights.dtype)
    mean = same / same.sum(1, keepdim=True)
    return mean @ gradients + sign * pull * (weights - mean @ weights)


def overwriting(weights: Tensor, gradients: Tensor, clusters: list[int], pull: float) -> Tensor:
    return gradients.copy_(gradients_of(weights, gradients, clusters, pull))


def counted_from_zero(weights: Tensor, gradients: Tensor, clusters: list[int], pull: float) -> Tensor:
    found = torch.zeros_like(gradients)
    for cluster in range(len(set(clusters))):
        members = [k for k, number in enumerate(clusters) if number == cluster]
        if members:
            found[members] = gradients[members].mean(0) + pull * (weights[members] - weights[members].mean(0))
    return found


def test_centripetal_sgd_accepts_the_formula() -> None:
    assert lessons.check("centripetal-sgd", gradients_of).right
    assert lessons.check("centripetal-sgd", lambda w, g, c, p: gradients_of(w, g, c, p).float()).right


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda w, g, c, p: gradients_of(w, g, c, 0.0), "Layer 3 of 5: filter . differs .* The pull is on"),
        (lambda w, g, c, p: gradients_of(w, g, c, p, -1.0), "driven away from their centre"),
        (lambda w, g, c, p: g + p * w, "Layer 1 of 5: .* the mean of the cluster's gradients"),
        (lambda w, g, c, p: gradients_of(w, g, c, p) + p * w, "Layer 2 of 5: .* it is its own centre"),
        (counted_from_zero, "Layer 5 of 5: .* numbers of clusters are names"),
        (overwriting, "changes what it is given"),
        (lambda w, g, c, p: g.mean(0), "shape \\(9,\\), not one gradient a weight"),
        (lambda w, g, c, p: None, "gave a NoneType"),
        (lambda w, g: g, "Your function stopped with TypeError"),
    ],
)
def test_centripetal_sgd_refuses_what_is_not_it(function: Callable[..., Any], reason: str) -> None:
    verdict = lessons.check("centripetal-sgd", function)
    assert not verdict
    assert re.search(reason, verdict.text), verdict.text
