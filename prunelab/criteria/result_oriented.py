"""The result-oriented score: what a channel tells of the data, and what of it the final response depends on.

Wu, Zhang, Zhao and Wang, 'Result-oriented, data-driven pruning', ICNLP 2023, doi 10.1109/ICNLP58431.2023.00043. The
abstract names propagation, inter-layer correlation and the information of feature maps; the formulas are our reading.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunelab.criteria.activations import entropy, feature_rank
from prunelab.criteria.ranks import ranks
from prunelab.criteria.registry import register, register_family
from prunelab.errors import PruneLabError, unknown

Scores = NDArray[np.float64]

INFORMATION: Mapping[str, tuple[str, Callable[[Any], Scores]]] = MappingProxyType(
    {
        "entropy": ("pooled", entropy),
        "variance": ("pooled", lambda pooled: np.asarray(pooled.var(axis=0), np.float64)),
        "mean": ("pooled", lambda pooled: np.asarray(pooled.mean(axis=0), np.float64)),
        "rank": ("activations", feature_rank),
    }
)
"""What a channel's information is measured by: what that needs, and the function; all but rank of pooled responses."""


_NAME = re.compile(
    r"result_oriented\(alpha=(?P<alpha>\d+(\.\d+)?(e-?\d+)?), (?P<information>\w+)(?P<uncorrelated>, R=1)?\)"
)


def balanced(information: Scores, importance: Scores, alpha: float) -> Scores:
    """rank(s)^α · rank(I)^(1−α), ranks as shares of the layer: equal values share the mean of theirs.

    Args:
        information, importance: I and s, shape ``(channels,)``.
        alpha: 0 looks at information alone, 1 at importance alone.

    Returns:
        shape ``(channels,)``, above 0, at most 1.
    """
    s, i = ranks(importance) / len(importance), ranks(information) / len(information)
    return np.asarray(s**alpha * i ** (1 - alpha), np.float64)


@register("result_oriented", needs=("pooled", "final_response"))
def result_oriented(pooled: Scores, importance: Scores) -> Scores:
    """√(rank(s) · rank(I)): entropy and importance for the final response (Wu et al., ICNLP 2023, reconstructed).

    I is the entropy of the mean response over images, see :func:`~prunelab.criteria.activations.entropy`; s is carried
    back from the last hidden layer, see :func:`~prunelab.criteria.responses.final_response`.

    Args:
        pooled: means over positions, shape ``(images, channels)``.
        importance: shape ``(channels,)``.

    Returns:
        shape ``(channels,)``, above 0, at most 1.
    """
    return balanced(entropy(pooled), importance, 0.5)


def variant(alpha: float = 0.5, *, information: str = "entropy", correlated: bool = True) -> str:
    """Register another choice of the result-oriented score.

    Args:
        alpha: share of the importance, see :func:`balanced`.
        information: one of :data:`INFORMATION`.
        correlated: False takes R = 1, importance carried back along the weights alone.

    Returns:
        the criterion's name, which says the choice: ``result_oriented(alpha=0, rank, R=1)``; with no choice made, it
        is ``result_oriented`` itself.

    Raises:
        PruneLabError: alpha outside 0 to 1, or an unknown measure of information.
    """
    if not 0 <= alpha <= 1:
        raise PruneLabError(f"alpha is a share from 0 to 1, not {alpha}.")
    if information not in INFORMATION:
        raise unknown("measure of information", information, INFORMATION)
    if (alpha, information, correlated) == (0.5, "entropy", True):
        return "result_oriented"
    need, measure = INFORMATION[information]
    # In few digits where those are all of it: other numbers would share its name.
    share = f"{alpha:g}" if float(f"{alpha:g}") == alpha else repr(float(alpha))
    name = f"result_oriented(alpha={share}, {information}{'' if correlated else ', R=1'})"

    def score(material: Any, importance: Scores) -> Scores:
        return balanced(measure(material), importance, alpha)

    joined = "" if correlated else ", with no correlation between layers"
    score.__doc__ = f"rank(s)^{alpha:g} · rank({information})^{1 - alpha:g}{joined} (a variant of result_oriented)."
    register(name, needs=(need, "final_response" if correlated else "final_response_by_weights"))(score)
    return name


@register_family("result_oriented")
def _named(name: str) -> None:
    """Register the variant of a name, such as a saved plan brings into a new process."""
    found = _NAME.fullmatch(name)
    if found is not None and found["information"] in INFORMATION and 0 <= float(found["alpha"]) <= 1:
        variant(float(found["alpha"]), information=found["information"], correlated=found["uncorrelated"] is None)
