"""What goes next, grain by grain: the layer or block, the channels or the weights that a network misses least.

Our reading, see :mod:`prunelab.papers.multi_grain`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from prunelab.criteria.measuring import profile_for
from prunelab.criteria.registry import Scores, scores
from prunelab.errors import unknown
from prunelab.plan import Plan, spread
from prunelab.preview import Preview, labelled
from prunelab.profile.batches import in_memory, in_order
from prunelab.program.program import Program, cost
from prunelab.program.selection import Selection
from prunelab.program.weighted import weighted_nodes
from prunelab.repair import Repairer, sample_of


def added_loss(program: Program, grain: str, train: Any, repair: str, n: int) -> dict[str, float]:
    """By name of every unit of a grain: what its bypass adds to the mean cross-entropy, once the weights are repaired.

    Without a repair what follows a bypassed layer reads values that it was not made for, and every layer looks needed.

    Args:
        grain: ``block`` or ``layer``.
        train: of (image, label).
        n: images to measure it on, and to repair from.
    """
    units = [unit.name for unit in program.units if unit.grain == grain]
    if not units:
        return {}
    # All images where they are in memory: the preview then draws its sample from all classes.
    preview = Preview(program, *(in_memory(train) or labelled(in_order(train), n)), score=_minus_loss)
    repaired = Repairer(program, sample_of(train)[:n])
    added = {}
    for name in units:
        bypass = Plan().bypass(name).resolve(program)
        added[name] = -preview.accuracy(bypass, n=n, repaired=repaired(bypass, repair)).change
    return added


def _minus_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return -cross_entropy(outputs, labels, reduction="none")


def lowest_channels(program: Program, train: Any, criterion: str, share: float) -> Selection:
    """A cut of the channels that lie the most standard deviations below their layer's mean score, all layers together.

    It is the rule ``std`` with one number for all layers.

    Args:
        train: what the criterion is measured on.
        share: of all free channels, 0 to 1; one goes at least, unless no layer can tell its channels apart. Those that
            are equally far below go together, were they more than the share.
    """
    profile = profile_for(program, train, criterion, progress=False)
    free = [layer for layer in program.layers if not layer.pinned and layer.channels > 1]
    found = {layer.name: scores(program, profile, criterion, layer) for layer in free}
    if not found:
        return Selection()
    far = np.sort(np.concatenate([_standardised(score) for score in found.values()]))
    # Below the first that stays: where many are equal, such as dead channels, the share may end among the lowest.
    least = far[max(1, int(share * far.size))]
    stays = least if least > far[0] else far[far > far[0]].min(initial=np.inf)
    if not np.isfinite(stays):
        return Selection()
    plan = Plan(criterion)
    for name in found:
        plan = plan.set(name, std=-float(stays))
    return plan.resolve(program, score=lambda layer: found[layer.name])


def _standardised(score: Scores) -> Scores:
    mean, sd = spread(score)
    return (score - mean) / (sd or 1.0)


def magnitude(weights: Tensor) -> Tensor:
    """Magnitudes of a layer's weights, in any shape."""
    return weights.abs()


def lamp(weights: Tensor) -> Tensor:
    """Layer-adaptive magnitudes of a layer's weights, in any shape; 1 for the largest, 0 for what is zero.

    *w*² over the sum of the squares of the layer's weights that are not smaller, which lets layers of different scale
    be compared: Lee et al. 2021, Layer-adaptive sparsity for the magnitude-based pruning, arXiv 2010.07611.
    """
    squares, order = weights.flatten().square().sort(descending=True, stable=True)
    scores = torch.empty_like(squares)
    # Where the sum is zero, all that is left is zero: so is its score.
    scores[order] = squares / squares.cumsum(0).clamp_min(torch.finfo(squares.dtype).tiny)
    return scores.view(weights.shape)


WEIGHT_SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {"magnitude": magnitude, "lamp": lamp}
"""What single weights are scored by: functions of all weights of a layer, those that went already being zero."""


def smallest_weights(
    program: Program, masks: Mapping[str, Tensor], share: float, enough: float = 0.0, score: str = "magnitude"
) -> Mapping[str, Tensor]:
    """Masks without the weights of the lowest score, all layers together.

    Weights are what convolutions, linear layers and their like multiply inputs by; biases, norms, scales of layers and
    embeddings are left alone.

    Args:
        masks: those that there are, by parameter name, True where a weight stays; what is zero stays so.
        share: of the weights that are not zero yet, 0 to 1, to go now; one at least.
        enough: no more go than leaves just so many parameters that are not zero.
        score: one of :data:`WEIGHT_SCORES`.

    Returns:
        masks of all weights; equal to those that there are where nothing more may go.

    Raises:
        PruneLabError: there is no such score.
    """
    if score not in WEIGHT_SCORES:
        raise unknown("score of weights", score, WEIGHT_SCORES)
    weigh = frozenset[str]().union(*(use.states for use in weighted_nodes(program)))
    weights = {k: p.detach().double().cpu() for k, p in program.model.named_parameters() if p.dim() > 1 and k in weigh}
    stays = {k: masks[k].bool().cpu() if k in masks else torch.ones_like(w).bool() for k, w in weights.items()}
    alive = torch.cat([stay.flatten() for stay in stays.values()])
    found = torch.cat([WEIGHT_SCORES[score](w * stays[k]).flatten() for k, w in weights.items()])
    zero, left = int((~alive).sum()), int(alive.sum())
    count = min(zero + max(1, int(share * left)), math.ceil(cost(program).params - enough), alive.numel() - 1)
    alive[found.masked_fill(~alive, -1.0).argsort(stable=True)[:count]] = False
    parts = alive.split([w.numel() for w in weights.values()])
    return {k: part.view(w.shape) for (k, w), part in zip(weights.items(), parts, strict=True)}
