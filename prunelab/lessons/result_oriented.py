"""The lesson on result-oriented pruning: what to predict, and the step that carries importance back to write."""

from __future__ import annotations

from dataclasses import dataclass
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
    "Half of the FLOPs may be left. One ratio for all layers, or ratios that the network decides by itself, and by "
    "which score: what changes the accuracy most?",
    {
        "The score: result-oriented instead of l1": "No: measured below, two sensible scores are much closer to each "
        "other than two ways to share the cut among the layers.",
        "The shares: decided layer by layer instead of one ratio": "Yes. Layers differ far more in what they can spare "
        "than sensible scores differ in what they would remove of one layer.",
        "Neither: with half of the FLOPs gone all plans are alike": "No: between the best and the worst of these plans "
        "lie many points, and all of them cost the same.",
    },
    right="The shares: decided layer by layer instead of one ratio",
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

    def layer(here: int, there: int, *kernel: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        responses = normal(60, here)
        weight = normal(there, here, *kernel)
        mixed = responses @ normal(here, there) + normal(60, there)
        return weight, responses, mixed, normal(there).abs()

    linear, plain, positive, silent = layer(6, 4), layer(5, 7, 3, 3), layer(8, 3, 3, 3), layer(4, 6, 3, 3)
    silent[1][:, 2] = 0.7
    return (
        _Case(*(part.abs() if part is positive[0] else part for part in positive), hint="Mind the sign of R."),
        _Case(*plain, hint="Weights count by their absolute values, summed over the kernel."),
        _Case(*linear, hint="This layer is linear: its weight has no kernel."),
        _Case(*silent, hint="Channel 2 always responds the same: it is correlated with nothing."),
    )
