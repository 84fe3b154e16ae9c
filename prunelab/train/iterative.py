"""Cut a little, train, cut again: a plain loop over plans."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from prunelab.commit import commit
from prunelab.criteria.measuring import profile_for
from prunelab.optimizers import build, carry, read
from prunelab.plan import Plan
from prunelab.preview import labelled
from prunelab.program.program import cost, sliced_masks, trace
from prunelab.program.selection import Selection, with_masks
from prunelab.repair import sample_of
from prunelab.train.finetune import finetune
from prunelab.train.recipe import Recipe

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Round:
    """One cut and the training after it.

    Attributes:
        selection: what was removed from the network as it was before this round.
        params, flops: of the network after it.
        table: what :func:`prunelab.finetune` gave.
    """

    selection: Selection
    params: int
    flops: int
    table: pd.DataFrame


def iterative(
    model: nn.Module,
    plans: Iterable[Plan],
    train: Any,
    val: Any,
    *,
    recipe: Recipe | None = None,
    folder: Path | str | None = None,
    **settings: Any,
) -> tuple[nn.Module, tuple[Round, ...]]:
    """Commit a plan, fine-tune, and so on with the next plan for what the network is by then.

    Momenta and masks go along with every cut. The given network is not changed.

    >>> small, rounds = pl.iterative(model, [pl.Plan().set("conv2", ratio=0.2)] * 3, train, val, epochs=2)

    Args:
        plans: each for the network that the ones before it leave: a ratio is one of the channels that are there then.
        recipe, settings: as for :func:`prunelab.finetune`; the seed is one higher in every round.
        folder: for checkpoints, each round's in a folder of its own; called again with the same arguments, the loop
            goes on where it was.

    Returns:
        The last network, and what was done.

    Raises:
        PruneLabError: a plan that does not fit the network, and all that finetune raises.
    """
    now = copy.deepcopy(model)
    example = labelled(val, 2)[0]
    watched = {name: settings.pop(name) for name in ("every", "progress", "on_epoch", "watch") if name in settings}
    recipe = Recipe.chosen(recipe, settings)
    masks: dict[str, Tensor] = dict(recipe.masks)
    optimizer = recipe.optimizer_for(now)
    if isinstance(recipe.optimizer, Optimizer):
        optimizer = build(type(optimizer), read(optimizer, model), now)
    rounds: list[Round] = []
    for plan in plans:
        program = trace(now, example)
        statistics = profile_for(program, train, plan.criterion, progress=False)
        selection = with_masks(plan.resolve(program, statistics), masks)
        images = sample_of(train) if plan.repair != "none" else None
        now = commit(program, selection, repair=plan.repair, images=images)
        masks, optimizer = sliced_masks(program, selection), carry(optimizer, program, selection, now)
        here = None if folder is None else Path(folder) / f"round-{len(rounds) + 1}"
        # With one seed for all, every round would see the same images in the same order.
        asked = replace(recipe, optimizer=optimizer, masks=masks, seed=recipe.seed + len(rounds))
        table = finetune(now, train, val, recipe=asked, folder=here, **watched)
        found = cost(trace(now, example, prove=False))
        rounds.append(Round(selection, found.params, found.flops, table))
    return now, tuple(rounds)
