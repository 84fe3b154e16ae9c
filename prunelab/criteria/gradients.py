"""Criteria that ask what a channel is worth to the loss, to first order, and what it hands on to the outputs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prunelab.criteria.registry import register
from prunelab.profile.gates import Gates

Scores = NDArray[np.float64]


@register("taylor", needs="gradients")
def taylor(gates: Gates) -> Scores:
    """Change of the loss without the channel, |mean over positions of ∂L/∂z · z|, averaged over images.

    The scores of a layer are divided by their norm ‖·‖₂; z is the value after norm and activation. Molchanov et al.
    2017, 'Pruning convolutional neural networks for resource efficient inference', arXiv 1611.06440, equations 7 and 8.

    Returns:
        shape ``(channels,)``, 0 and up, with ‖scores‖₂ = 1 unless all are zero.
    """
    change = gates.absolute / (gates.images * gates.positions)
    norm = float(np.linalg.norm(change))
    return np.asarray(change / norm if norm else change, np.float64)


@register("taylor_weight", needs="filter_gradients")
def taylor_weight(gates: Gates) -> Scores:
    """Squared change of the loss without the filter, mean over images of (Σ_{w∈c} ∂L/∂w · w)².

    Molchanov et al. 2019, 'Importance estimation for neural network pruning', arXiv 1906.10771, in its gate form: the
    sum over the filter's weights and bias is squared. The paper takes each batch's mean loss; here it is each image's,
    so that no batch size matters.

    Returns:
        shape ``(channels,)``, 0 and up.
    """
    return gates.squares / gates.images


@register("propagated", needs="propagated")
def propagated(importance: Scores) -> Scores:
    """What a channel hands on to the outputs, s^l = |W^{l+1}|ᵀ s^{l+1} (Yu et al. 2018, 'NISP', arXiv 1711.05908).

    See :func:`prunelab.criteria.propagation.carried_back`.

    Returns:
        shape ``(channels,)``, 0 and up, with a sum of 1.
    """
    total = float(importance.sum())
    return np.asarray(importance / total if total else importance, np.float64)
