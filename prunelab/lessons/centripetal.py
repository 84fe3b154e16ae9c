"""The exercise of the lesson on Centripetal SGD: write the change of the gradients yourself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunelab.errors import PruneLabError
from prunelab.lessons.answers import function_in
from prunelab.lessons.exercises import Verdict, exercise
from prunelab.lessons.question import Question

QUESTION = Question(
    "Suppose that gradients are averaged over each cluster, but nothing pulls: `ε = 0`. Do its filters become equal?",
    {
        "Yes: they have the same gradient, so they go the same way": "They do go the same way, and that is why not: "
        "who walks side by side stays as far apart as before. Only the weight decay draws them together, "
        "and it is weak.",
        "No: they keep their distance": "Right. Equal gradients move all members by the same step. The pull, and a "
        "little the weight decay, is what makes them meet; equal gradients keep them together afterwards.",
        "No: they drift apart": "Not with one gradient for all: their differences do not change by it.",
    },
    right="No: they keep their distance",
)
"""What one gradient for a whole cluster does by itself; the notebook measures it."""


@dataclass(frozen=True)
class _Case:
    """A step to try a function on, and what to say where it fails there alone.

    Attributes:
        weights, gradients: a filter in each row, shape ``(filters, values)``.
        clusters: of every filter the number of its cluster.
        pull: how strongly members are drawn to their centre.
    """

    weights: Tensor
    gradients: Tensor
    clusters: tuple[int, ...]
    pull: float
    hint: str

    @property
    def wanted(self) -> Tensor:
        """The paper's formula, one filter after another, shape ``(filters, values)``."""
        found = torch.empty_like(self.gradients)
        for j, cluster in enumerate(self.clusters):
            members = [k for k, other in enumerate(self.clusters) if other == cluster]
            shared = sum(self.gradients[k] for k in members) / len(members)
            centre = sum(self.weights[k] for k in members) / len(members)
            found[j] = shared + self.pull * (self.weights[j] - centre)
        return found


@exercise(
    "centripetal-sgd",
    "Write a function of a layer's weights and gradients, two tensors (filters, values), of a list with the number of "
    "each filter's cluster, and of the pull, that gives the gradients with which Centripetal SGD steps.",
)
def centripetal_sgd(answer: Any) -> Verdict:
    """Tries the function on random layers and clusters, against the formula taken filter by filter."""
    cases = _cases()
    for number, case in enumerate(cases, start=1):
        wrong = _wrong(function_in(answer), case)
        if wrong:
            return Verdict(False, f"Layer {number} of {len(cases)}: {wrong}")
    return Verdict(True, f"On all {len(cases)} layers your gradients are those of the formula.")


def _wrong(change: Callable[..., Any], case: _Case) -> str:
    """What is wrong with the gradients that a function gives, or nothing."""
    weights, gradients = case.weights.clone(), case.gradients.clone()
    found = _gradients(change(weights, gradients, list(case.clusters), case.pull), case)
    if not torch.equal(weights, case.weights) or not torch.equal(gradients, case.gradients):
        return "your function changes what it is given; work on a copy."
    far = (found - case.wanted).abs().amax(1)
    worst = int(far.argmax())
    # An answer in float32 is as good.
    if far[worst] < 1e-5:
        return ""
    # The shared gradient, and the pull with the other sign.
    if torch.allclose(found, 2 * _shared(case) - case.wanted):
        return "your filters are driven away from their centre: a step goes against the gradient, so look at the sign."
    return f"filter {worst} differs from the formula by {far[worst]:.3g}. {case.hint}"


def _shared(case: _Case) -> Tensor:
    """The gradients with no pull, shape ``(filters, values)``."""
    return _Case(case.weights, case.gradients, case.clusters, 0.0, case.hint).wanted


def _gradients(value: Any, case: _Case) -> Tensor:
    """What a function gave.

    Raises:
        PruneLabError: it is not a gradient for each weight.
    """
    if not isinstance(value, Tensor):
        raise PruneLabError(f"Your function gave a {type(value).__name__}, not a tensor of gradients.")
    if value.shape != case.gradients.shape:
        raise PruneLabError(f"Your function gave a tensor of shape {tuple(value.shape)}, not one gradient a weight.")
    return value.detach().double()


def _cases() -> tuple[_Case, ...]:
    chance = torch.Generator().manual_seed(0)

    def layer(clusters: tuple[int, ...], pull: float, hint: str) -> _Case:
        weights, gradients = (torch.randn(len(clusters), 9, generator=chance, dtype=torch.float64) for _ in range(2))
        return _Case(weights, gradients, clusters, pull, hint)

    return (
        layer((0, 0, 0), 0.0, "Without a pull there is the mean of the cluster's gradients, for each of its members."),
        layer((0, 1, 2), 0.5, "Each filter is alone here: it is its own centre, and keeps its own gradient."),
        layer((0, 0, 1, 1), 0.5, "The pull is on the difference between a filter's weights and its cluster's mean."),
        layer((1, 0, 1, 1, 0), 0.3, "Members need not stand beside each other, and clusters differ in size."),
        layer((7, 3, 7, 5), 2.0, "The numbers of clusters are names: they need not begin at 0, nor be without gaps."),
    )
