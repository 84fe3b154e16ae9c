"""Widths in whole multiples: hardware computes 8, 16 or 32 channels at a time, and a part of them costs as much as all.

What a rule leaves of a layer is rounded up to the next multiple, so that at least what the rule keeps is kept; never
above the layer's own width, which stays whole where no smaller multiple holds what the rule keeps. A width is the
number of outputs that the layer's weights have for its channels: where a channel has several of them (a group of a
grouped convolution, a head of an attention), fewer channels make a whole multiple.
"""

from __future__ import annotations

from math import gcd, lcm

import numpy as np
from numpy.typing import NDArray

from prunelab.criteria.registry import Scores
from prunelab.program.channels import Layer

MULTIPLES = (1, 4, 8, 16, 32)
"""Multiples to choose from in the explorer; a plan takes any."""


def step_of(layer: Layer, multiple: int) -> int:
    """The least number of a layer's channels whose outputs are a whole multiple in every weight that makes them."""
    producers = set(layer.producers)
    times = [slot.index.shape[1] for slot in layer.slots if (slot.state, slot.dim) in producers]
    return lcm(*(multiple // gcd(multiple, n) for n in times))


def rounded(gone: NDArray[np.int64], score: Scores, step: int) -> NDArray[np.int64]:
    """As many of the channels to remove, lowest scores first, as leave a width of whole steps.

    Args:
        gone: channels that a rule removes, ascending.
        score: shape ``(channels,)``, higher = keep; of equal scores the first goes first.
        step: as :func:`step_of`.
    """
    kept = -(-(score.size - gone.size) // step) * step
    lowest_first = gone[np.argsort(score[gone], kind="stable")]
    return np.sort(lowest_first[: max(score.size - kept, 0)])
