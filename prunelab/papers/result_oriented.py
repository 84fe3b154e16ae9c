"""Result-oriented pruning: the network decides by itself what to cut, led by the result that is asked for.

Wu, Zhang, Zhao and Wang, 'Result-oriented, data-driven pruning', ICNLP 2023, doi 10.1109/ICNLP58431.2023.00043.

**This is a reconstruction.** The abstract says that the method brings in how a network propagates, the correlation
between layers and the information of feature maps, and that it decides by itself. No formula and no number of it is
public, to our knowledge. All of these are our reading:

1. Information I of a channel: the entropy of its mean response over images.
2. Importance s at the last hidden layer: Σ_k |W_kj| · E|a_j|, what the channel gives to the outputs.
3. Correlation R_ij of a channel with one of the next layer: |corr(a_i, a_j)| of their mean responses.
4. Propagation: s_i = Σ_j ‖W_ji‖₁ · R_ij · s_j, branches added up.
5. Score: rank(s)^α · rank(I)^(1−α), by which the channels of *one* layer are ordered. (Ranks know no scale: how much
   each layer loses is not decided by scores.)
6. Decision: layers are cut step after step, always the one whose cut costs least per size removed, until the result
   that is asked for, 'half of the FLOPs' or 'at most half a point', is reached: :func:`prunelab.best_plan`. With a
   repair in the loop, all are cut together at one price, from a scan of one layer at a time.

Steps 1 to 5 are the criterion ``"result_oriented"``, for every plan, slider and comparison. Step 6 is the button
'best plan' of the explorer, or ``lab.best_plan(criterion="result_oriented", flops=0.5)``: it fills in the sliders,
and the hand can go on from there.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from prunelab.commit import commit
from prunelab.criteria.measuring import profile_for
from prunelab.criteria.result_oriented import variant
from prunelab.preview import labelled
from prunelab.program.program import trace
from prunelab.progress import Progress, Stopped
from prunelab.repair import sample_of
from prunelab.search import Best, best_plan
from prunelab.train.finetune import finetune, stopped
from prunelab.train.recipe import Recipe

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Decided:
    """What was done.

    Attributes:
        best: the plan, every step of its search, and a plan of one ratio beside it.
        table: what :func:`prunelab.finetune` gave; None where nothing was trained.
    """

    best: Best
    table: pd.DataFrame | None


def result_oriented(
    model: nn.Module,
    train: Any,
    val: Any,
    *,
    flops: float | None = None,
    params: float | None = None,
    drop: float | None = None,
    alpha: float = 0.5,
    information: str = "entropy",
    correlated: bool = True,
    repair: str = "least-squares",
    layers: tuple[str, ...] | None = None,
    n: int = 500,
    certain: bool = True,
    epochs: int = 5,
    folder: Path | str | None = None,
    progress: Progress | bool = True,
    **settings: Any,
) -> tuple[nn.Module, Decided]:
    """Prune a network to a result, then fine-tune it. The given network is not changed.

    >>> small, decided = result_oriented(model, train, val, drop=0.005)

    Args:
        train: training images with labels; the network's responses are those to all of them.
        val: images with labels that the decision is made on; never those that it is tested on.
        flops, params: share of the unpruned network's that may be left.
        drop: loss of accuracy that is borne before fine-tuning: 0.005 is half a point.
        alpha, information, correlated: of the score, see :func:`prunelab.criteria.result_oriented.variant`.
        repair: how surviving weights are corrected, in every measurement of the decision and at its end.
        layers: names of those that may be cut; all that can be unless given.
        n: validation images that the steps of the decision are measured on.
        certain: whether the upper end of the drop's interval counts, see :func:`prunelab.best_plan`.
        epochs: of fine-tuning; 0 leave it out. ``folder`` is for its checkpoints.
        settings: those of :class:`prunelab.Recipe`.

    Returns:
        The small network, and what was done.

    Raises:
        PruneLabError: a wish that no plan grants, or what plan and training cannot use.
        Stopped: the progress function returned False.
    """
    # Wrong settings are told now, and not when the search is done.
    recipe = Recipe.of({"epochs": epochs, **settings})
    images, labels = labelled(val)
    program = trace(copy.deepcopy(model), images[:2])
    criterion = variant(alpha, information=information, correlated=correlated)
    seen = profile_for(program, train, criterion, progress=progress)
    sample = sample_of(train)
    best = best_plan(
        program,
        seen,
        images,
        labels,
        flops=flops,
        params=params,
        drop=drop,
        criterion=criterion,
        repair=repair,
        repair_images=sample,
        layers=layers,
        n=n,
        certain=certain,
        progress=progress,
    )
    small = commit(program, best.plan.resolve(program, seen), repair=repair, images=sample)
    if not epochs:
        return small, Decided(best, None)
    table = finetune(small, train, val, recipe=recipe, folder=folder, progress=progress)
    if stopped(table):
        raise Stopped("fine-tuning")
    return small, Decided(best, table)
