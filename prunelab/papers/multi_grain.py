"""Multi-grain pruning: from coarse to fine, blocks, layers, channels, single weights.

Kollek, Aguilar, Braun and Kummert 2021, 'Multi-Grain Pruning', PIC 2021, doi 10.1109/PIC53636.2021.9687071. Stated in
its abstract: pruning over up to four granularities, of which blocks of several layers are new, from coarse to fine, for
far higher compression than one of them gives. Criteria and schedule are not given there; what follows is our reading:

    for every grain, from blocks to weights:
        score what can go; take the least of it away while the accuracy after a short recovery ≥ base − budget;
        fine-tune

Blocks and layers, replaced by the identity, are scored by the loss that bypassing them adds on a calibration set once
the weights behind them are repaired. Channels are scored by any criterion, counted in standard deviations from their
layer's mean, all layers together; coupled ones go together. Weights go by magnitude or by LAMP, all layers together;
what is zero stays zero in all training. After every cut the surviving weights are repaired, unless told otherwise, and
then trained.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from prunelab.commit import commit
from prunelab.criteria.registry import get as find_criterion
from prunelab.errors import PruneLabError, unknown
from prunelab.papers.evidence import accuracy
from prunelab.papers.multi_grain_record import Cut, Grain, MultiGrain, Size
from prunelab.papers.multi_grain_scores import WEIGHT_SCORES, added_loss, lowest_channels, smallest_weights
from prunelab.plan import REPAIRS, Plan
from prunelab.preview import labelled
from prunelab.program.program import Program, cost, sliced_masks, trace
from prunelab.program.selection import Selection
from prunelab.progress import Progress, Stopped
from prunelab.repair import sample_of
from prunelab.train.chance import seed_of
from prunelab.train.finetune import finetune, stopped
from prunelab.train.recipe import Recipe

GRAINS = ("block", "layer", "channel", "weight")
BUDGETS: Mapping[str, float] = {"block": 0.005, "layer": 0.005, "channel": 0.01, "weight": 0.01}
"""How far the accuracy may fall below the unpruned network's in each grain, as a share of one."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Network:
    """A network on its way: traced, with the masks that it has so far."""

    model: nn.Module
    program: Program
    masks: Mapping[str, Tensor]

    @property
    def size(self) -> Size:
        found = cost(self.program, Selection(masks=self.masks))
        return Size(found.params, found.nonzero, found.macs)


@dataclass(frozen=True)
class _Method:
    """The settings of :func:`multi_grain`."""

    train: Any
    val: Any
    criterion: str
    score: str
    repair: Mapping[str, str]
    channels: float
    weights: float
    calibration: int
    recovery: Mapping[str, Recipe]
    finetuning: Mapping[str, Recipe]
    folder: Path | None
    progress: Progress | bool


def multi_grain(model: nn.Module, train: Any, val: Any, **settings: Any) -> tuple[nn.Module, MultiGrain]:
    """Prune a network from coarse to fine. The given one is not changed.

    >>> small, record = multi_grain(model, train, val, budgets={"layer": 0.01, "channel": 0.01, "weight": 0.01})

    Args:
        settings: as for :func:`grains`.
    """
    *_, (record, small) = grains(model, train, val, **settings)
    return copy.deepcopy(model) if small is model else small, record


def grains(
    model: nn.Module,
    train: Any,
    val: Any,
    *,
    budgets: Mapping[str, float] = BUDGETS,
    stops: Mapping[str, Sequence[float]] | None = None,
    criterion: str = "l1",
    score: str = "magnitude",
    repair: str | Mapping[str, str] = "least-squares",
    channels: float = 0.1,
    weights: float = 0.2,
    calibration: int = 512,
    recovery: Recipe | Mapping[str, Recipe] | None = None,
    finetuning: Recipe | Mapping[str, Recipe] | None = None,
    folder: Path | str | None = None,
    progress: Progress | bool = True,
) -> Iterator[tuple[MultiGrain, nn.Module]]:
    """The grains of :func:`multi_grain` as they are done: what all did up to now, and the network as it is then.

    The first is that of no grain, with the given network.

    Args:
        train: Dataset or DataLoader of (image, label), as for :func:`prunelab.finetune`.
        val: likewise; on it the budgets are kept. Not the test set.
        budgets: by grain, how far accuracy may fall below the unpruned network's, 0 to 1. A grain without one is left
            out; one that the network does not offer takes nothing away.
        stops: by grain, rising compressions (dense parameters / non-zero parameters). The grain pauses at each of them
            for its fine-tuning, and ends with the last; without them it goes on until its budget is spent.
        criterion: scores channels, one of :func:`prunelab.criteria_names`.
        score: scores single weights, one of :data:`prunelab.papers.multi_grain_scores.WEIGHT_SCORES`.
        repair: of the surviving weights after every cut, one of :data:`prunelab.plan.REPAIRS`, or one for each grain
            by name. Least squares after a large cut of weights gives a better network at once, and one that may be
            harder to train: where inputs are much alike, its weights are large, and the same learning rate too high.
        channels: share of all channels that one cut takes; ``weights``: share of the weights that are not zero yet.
        calibration: training images on which bypasses are scored.
        recovery: the training after each cut, one epoch unless told; ``finetuning``: that at the end of a grain, five
            epochs unless told. Each a recipe, or one for each grain by name; they learn from the unpruned network,
            unless they name a teacher of their own.
        folder: for checkpoints, each training's in a folder of its own; called again with the same arguments, it goes
            on where it was.
        progress: as for :func:`prunelab.finetune`.

    Raises:
        PruneLabError: an unknown grain, criterion, repair or score, a budget, share or stop out of range, masks in a
            recipe, and all that finetune raises.
        Stopped: the progress function returned False; with a folder, the same call goes on from there.
    """
    short, long = _by_grain(recovery or Recipe(epochs=1)), _by_grain(finetuning or Recipe(epochs=5))
    repairs = _by_grain(repair)
    _check(budgets, stops or {}, {"channels": channels, "weights": weights}, short, long, repairs, score)
    find_criterion(criterion)
    short, long = _taught(short, model), _taught(long, model)
    place = None if folder is None else Path(folder)
    method = _Method(
        train, val, criterion, score, repairs, channels, weights, calibration, short, long, place, progress
    )
    now = _Network(model, trace(model, labelled(val, 2)[0]), {})
    dense, base = now.size, accuracy(model, *labelled(val))
    record = MultiGrain(dense, base, (), {})
    yield record, model
    for name in (grain for grain in GRAINS if grain in budgets):
        for stop in (stops or {}).get(name, (math.inf,)):
            now, grain = _grain(method, now, name, base - budgets[name], dense.params / stop, len(record.grains))
            record = replace(record, grains=(*record.grains, grain), masks=now.masks)
            yield record, now.model
            if grain.cuts and not grain.cuts[-1].kept:
                break


def _grain(
    method: _Method, now: _Network, name: str, floor: float, wanted: float, place: int
) -> tuple[_Network, Grain]:
    """Cut after cut while accuracy is at least ``floor`` and more than ``wanted`` parameters are not zero."""
    cuts: list[Cut] = []
    while now.size.nonzero > wanted and (found := _next(method, now, name, wanted)) is not None:
        tried, cut = _tried(method, now, *found, floor, name, f"{place}-{name}-{len(cuts)}")
        cuts.append(cut)
        if not cut.kept:
            break
        now = tried
    if any(cut.kept for cut in cuts):
        _train(method, now, method.finetuning[name], f"{place}-{name}")
    return now, Grain(name, tuple(cuts), now.size, accuracy(now.model, *labelled(method.val)))


def _tried(
    method: _Method, now: _Network, what: str, selection: Selection, floor: float, grain: str, place: str
) -> tuple[_Network, Cut]:
    model = commit(now.program, selection, repair=method.repair[grain], images=sample_of(method.train))
    example = labelled(method.val, 2)[0]
    tried = _Network(model, trace(model, example), sliced_masks(now.program, selection))
    before = accuracy(model, *labelled(method.val))
    _train(method, tried, method.recovery[grain], place)
    after = accuracy(model, *labelled(method.val))
    return tried, Cut(what, tried.size, before, after, kept=after >= floor)


def _train(method: _Method, now: _Network, recipe: Recipe, place: str) -> None:
    folder = None if method.folder is None else method.folder / place
    # With one seed for all, every training would see the same images in the same order, shifted in the same way.
    recipe = replace(recipe, masks=now.masks, seed=seed_of(recipe.seed, place))
    table = finetune(now.model, method.train, method.val, recipe=recipe, folder=folder, progress=method.progress)
    if stopped(table):
        # Cuts of a network that is half trained would be other cuts.
        raise Stopped(place)


def _next(method: _Method, now: _Network, grain: str, wanted: float) -> tuple[str, Selection] | None:
    """What the next cut takes, in words and as a selection; None where the network offers nothing."""
    if grain in ("block", "layer"):
        added = added_loss(now.program, grain, method.train, method.repair[grain], method.calibration)
        least = min(added, key=added.__getitem__, default=None)
        return None if least is None else (least, Plan().bypass(least).resolve(now.program))
    if grain == "channel":
        selection = lowest_channels(now.program, method.train, method.criterion, method.channels)
        gone = sum(now.program.layer(name).channels - len(kept) for name, kept in selection.kept.items())
        return (f"{gone} channels of {len(selection.kept)} layers", selection) if gone else None
    selection = Selection(masks=smallest_weights(now.program, now.masks, method.weights, wanted, method.score))
    gone = now.size.nonzero - cost(now.program, selection).nonzero
    return (f"{gone:,} weights", selection) if gone else None


# Settings ---------------------------------------------


def _by_grain(given: T | Mapping[str, T]) -> Mapping[str, T]:
    return given if isinstance(given, Mapping) else dict.fromkeys(GRAINS, given)


def _taught(recipes: Mapping[str, Recipe], teacher: nn.Module) -> Mapping[str, Recipe]:
    return {
        grain: recipe if recipe.teacher is not None else replace(recipe, teacher=teacher)
        for grain, recipe in recipes.items()
    }


def _check(
    budgets: Mapping[str, float],
    stops: Mapping[str, Sequence[float]],
    shares: Mapping[str, float],
    short: Mapping[str, Recipe],
    long: Mapping[str, Recipe],
    repairs: Mapping[str, str],
    score: str,
) -> None:
    for name in (*budgets, *stops, *short, *long, *repairs):
        if name not in GRAINS:
            raise unknown("grain", str(name), GRAINS)
    # Now, and not when their grain's turn comes, after hours.
    for how in repairs.values():
        if how not in REPAIRS:
            raise unknown("repair", how, REPAIRS)
    if score not in WEIGHT_SCORES:
        raise unknown("score of weights", score, WEIGHT_SCORES)
    for name, budget in budgets.items():
        if not 0 <= budget <= 1:
            raise PruneLabError(f"The budget of the grain {name!r} is a share of accuracy from 0 to 1, not {budget}.")
    for name, listed in stops.items():
        if name not in budgets:
            raise PruneLabError(f"The grain {name!r} has stops and no budget: give it one in budgets.")
        if not listed or list(listed) != sorted(set(listed)) or listed[0] <= 1:
            raise PruneLabError(f"The stops of the grain {name!r} must be rising compressions above 1, not {listed}.")
    for name in budgets:
        if name not in short:
            raise PruneLabError(f"The grain {name!r} has no recipe to recover by: give it one in recovery.")
        if name not in long:
            raise PruneLabError(f"The grain {name!r} has no recipe to fine-tune by: give it one in finetuning.")
        if name not in repairs:
            raise PruneLabError(f"The grain {name!r} has no repair: give it one in repair, or 'none'.")
    for name, share in shares.items():
        if not 0 < share < 1:
            raise PruneLabError(f"The share of {name} that one cut takes lies between 0 and 1, not {share}.")
    if any(recipe.masks for recipe in (*short.values(), *long.values())):
        raise PruneLabError("Masks do not fit a network that loses channels: the grain 'weight' makes them, last.")
