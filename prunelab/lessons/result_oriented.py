"""The lesson on result-oriented pruning: what to predict, and the step that carries importance back to write."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunelab.criteria.responses import correlation
from prunelab.errors import PruneLabError
from prunelab.lessons.answers import function_in
from prunelab.lessons.exercises import Verdict, exercise
from prunelab.lessons.question import Question

QUESTION = Question(
    "Half of the FLOPs may be left, and the network decides how much of each layer goes. Which score leaves the most "
    "accuracy: information alone (α = 0), importance alone (α = 1), or both alike (α = ½)?",
    {
        "Information alone: what tells much must stay": "No: it comes last. A channel may tell much that no later "
        "layer listens to, and a quiet one may carry what the output hangs on.",
        "Importance alone: what the response depends on must stay": "Yes, on this network, and clearly. Propagated "
        "importance knows the weights that read a channel; entropy knows nothing of what comes after.",
        "Both alike: two opinions are better than one": "No, not on this network: half a poor opinion makes a good one "
        "worse. Other networks may say otherwise, which is why α is a setting and is measured.",
    },
    right="Importance alone: what the response depends on must stay",
)
"""What the notebook then measures on the small VGG."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Case:
    """A layer and the next one.

    Attributes:
        weight: of the next layer, shape ``(next, here, height, width)`` or ``(next, here)``.
        here, there: mean responses, shapes ``(images, here)`` and ``(images, next)``.
        importance: of the next layer's channels, shape ``(next,)``.
        hint: what to say where a function fails here alone.
    """

    weight: Tensor
    here: Tensor
    there: Tensor
    importance: Tensor
    hint: str

    @property
    def wanted(self) -> Array:
        """Importance of the channels here, with a sum of one."""
        joined = self.weight.abs().flatten(2).sum(2) if self.weight.dim() > 2 else self.weight.abs()
        found = (joined.numpy() * correlation(self.there.numpy(), self.here.numpy())).T @ self.importance.numpy()
        return np.asarray(found / found.sum(), np.float64)


@exercise(
    "result-oriented",
    "Write a function of the next layer's weight (next, here, height, width) or (next, here), the mean responses of "
    "both layers (images, here) and (images, next), and the importance of the next layer's channels, that gives the "
    "importance of the channels here, with a sum of one.",
)
def result_oriented(answer: Any) -> Verdict:
    """Tries the function on random layers, signs, a constant channel and a linear layer, against float64."""
    cases = _cases()
    carry = function_in(answer)
    for number, case in enumerate(cases, start=1):
        wrong = _wrong(carry(case.weight.clone(), case.here.clone(), case.there.clone(), case.importance.clone()), case)
        if wrong:
            return Verdict(False, f"Layer {number} of {len(cases)}: {wrong} {case.hint}")
    return Verdict(True, f"On all {len(cases)} layers your function carries importance back as the formula says.")


def _wrong(value: Any, case: _Case) -> str:
    """What is wrong with the importance that a function gave, or nothing."""
    try:
        found = torch.as_tensor(value).double().numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise PruneLabError(f"Your function gave a {type(value).__name__}, not a tensor of numbers.") from error
    wanted = case.wanted
    if found.shape != wanted.shape:
        return f"your function gave the shape {found.shape}, and there are {wanted.size} channels here."
    if not np.isfinite(found).all():
        return "your function gave numbers that are not finite."
    if np.allclose(found, wanted, rtol=1e-4, atol=1e-7):
        return ""
    if np.allclose(found / found.sum(), wanted, rtol=1e-4, atol=1e-7):
        return f"the proportions are right, but the sum is {found.sum():.3g} and not 1."
    worst = int(np.abs(found - wanted).argmax())
    return f"channel {worst} gets {found[worst]:.4f} and should get {wanted[worst]:.4f}."


def _cases() -> tuple[_Case, ...]:
    chance = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance, dtype=torch.float64)

    def case(hint: str, here: int, there: int, *kernel: int) -> _Case:
        responses = normal(60, here)
        mixed = responses @ normal(here, there) + normal(60, there)
        return _Case(normal(there, here, *kernel), responses, mixed, normal(there).abs(), hint)

    positive = case("Mind the sign of R.", 8, 3, 3, 3)
    silent = case("Channel 2 always responds the same: it is correlated with nothing.", 4, 6, 3, 3)
    silent.here[:, 2] = 0.7
    return (
        replace(positive, weight=positive.weight.abs()),
        case("Weights count by their absolute values, summed over the kernel.", 5, 7, 3, 3),
        case("This layer is linear: its weight has no kernel.", 6, 4),
        silent,
    )
