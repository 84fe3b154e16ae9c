"""The lesson on mean activation: what to predict, and the method's first half to write yourself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunelab.errors import PruneLabError
from prunelab.lessons.answers import function_in
from prunelab.lessons.exercises import Verdict, exercise
from prunelab.lessons.question import Question
from prunelab.plan import by_ratio

QUESTION = Question(
    "A fifth of the channels of every layer goes, and nothing is trained. Once the quietest go, once those with the "
    "smallest filters. Of 94 % accuracy, where is more left?",
    {
        "Where the quietest channels go": "Yes, by far: what hardly responds adds little to the next layer.",
        "Where the smallest filters go": "No: a batch norm behind each of these convolutions scales its channels "
        "anew, so that a small filter may feed a loud channel.",
        "Much the same: small filters give small responses": "No: they would if nothing followed them, but a "
        "batch norm behind each of these convolutions scales its channels anew.",
    },
    right="Where the quietest channels go",
)
"""What a fifth of the small VGG costs by either score; the notebook measures it."""


@dataclass(frozen=True)
class _Case:
    """Responses to try a function on, and what to say where it fails there alone.

    Attributes:
        responses: after the ReLU, shape ``(images, channels, height, width)``, or without height and width.
    """

    responses: Tensor
    ratio: float
    hint: str

    @property
    def means(self) -> NDArray[np.float64]:
        """Mean response of every channel over images and positions, shape ``(channels,)``."""
        found: NDArray[np.float64] = self.responses.double().transpose(0, 1).flatten(1).mean(1).numpy()
        return found

    @property
    def wanted(self) -> int:
        """How many channels go."""
        return by_ratio(self.means, self.ratio).size


@exercise(
    "mean-activation",
    "Write a function of a layer's responses after the ReLU, a tensor (images, channels, height, width) or "
    "(images, neurons), and of a ratio, that gives the numbers of the channels to remove.",
)
def mean_activation(answer: Any) -> Verdict:
    """Tries the function on random layers, on ties, on a rare but strong channel, and on neurons."""
    cases = _cases()
    for number, case in enumerate(cases, start=1):
        wrong = _wrong(function_in(answer), case)
        if wrong:
            return Verdict(False, f"Layer {number} of {len(cases)}: {wrong}")
    return Verdict(
        True, f"On all {len(cases)} layers your function removes as many channels as the ratio says, and the quietest."
    )


def _wrong(choose: Callable[..., Any], case: _Case) -> str:
    """What is wrong with the channels that a function chooses, or nothing."""
    given, means = case.responses.clone(), case.means
    gone = _channels(choose(given, case.ratio), means.size)
    if not torch.equal(given, case.responses):
        return "your function changes the responses that it is given; work on a copy."
    if gone.size != case.wanted:
        return (
            f"of {means.size} channels at ratio {case.ratio:g} your function removes {gone.size} and not "
            f"{case.wanted}. {case.hint}"
        )
    kept = np.setdiff1d(np.arange(means.size), gone)
    loudest, quietest = gone[means[gone].argmax()], kept[means[kept].argmin()]
    # The responses are float32, and a mean of them may be taken in it.
    if means[loudest] <= means[quietest] * (1 + 1e-5):
        return ""
    if set(gone) == set(by_ratio(-means, case.ratio)):
        return "your function removes the channels that respond most: look at the order again."
    return (
        f"your function removes channel {loudest}, which responds by {means[loudest]:.3f} on average, and keeps "
        f"channel {quietest}, which responds by {means[quietest]:.3f}. {case.hint}"
    )


def _channels(value: Any, channels: int) -> NDArray[np.int64]:
    """The numbers that a function gave, ascending.

    Raises:
        PruneLabError: they are not numbers of channels.
    """
    try:
        found = np.asarray(torch.as_tensor(value if isinstance(value, Tensor) else list(value)))
    except (TypeError, ValueError, RuntimeError) as error:
        raise PruneLabError(f"Your function gave a {type(value).__name__}, not the numbers of channels.") from error
    if found.size and (found.dtype == bool or not np.issubdtype(found.dtype, np.integer) or found.ndim != 1):
        raise PruneLabError(
            f"Your function gave {found.dtype} of shape {found.shape}, not the numbers of channels, such as [0, 3]."
        )
    unique = np.unique(found).astype(np.int64)
    if unique.size and (unique[0] < 0 or unique[-1] >= channels):
        raise PruneLabError(f"Your function gave {unique.tolist()}, but channels count from 0 to {channels - 1}.")
    return unique


def _cases() -> tuple[_Case, ...]:
    chance = torch.Generator().manual_seed(0)

    def layer(*shape: int) -> Tensor:
        spread = (torch.rand(shape[1], generator=chance) + 0.2).view(1, -1, *[1] * (len(shape) - 2))
        return (torch.randn(shape, generator=chance) * spread).relu()

    ties, rare = layer(20, 8, 4, 4), layer(50, 6, 3, 3)
    ties[:, 2:7] = 0
    # Two speak on one image alone: one so loudly that its mean is the highest, one so that its mean is the lowest
    # although it is then the loudest but that one.
    rare[:, [1, 4]] = 0
    others = rare[:, [0, 2, 3, 5]].mean((0, 2, 3))
    rare[7, 4], rare[9, 1] = 60 * others.max(), 30 * others.min()
    return (
        _Case(layer(40, 10, 5, 5), 0.5, "The score of a channel is its mean over all images and all positions."),
        _Case(layer(30, 7, 4, 4), 0.55, "What goes is the ratio times the number of channels, rounded down."),
        _Case(ties, 0.25, "Several channels never respond: all are equal, but only as many go as the ratio says."),
        _Case(rare, 0.5, "Two channels are silent on all images but one: those images count as much as the others."),
        _Case(layer(60, 12), 0.75, "This layer is linear: its responses have no positions, shape (images, neurons)."),
        _Case(layer(20, 5, 3, 3), 1.0, "At least one channel must stay, or nothing goes through the layer."),
    )
