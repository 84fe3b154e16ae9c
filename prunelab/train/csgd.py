"""Centripetal SGD from beginning to end: train filters to be equal in clusters, then trim all but one of each.

Ding et al. 2019, arXiv 1904.03837; Hao et al. 2023, doi 10.1109/TNNLS.2023.3298263.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from prunelab.commit import commit
from prunelab.errors import PruneLabError
from prunelab.preview import labelled
from prunelab.profile.batches import batches
from prunelab.program.guard import random_kept
from prunelab.program.program import Program, trace
from prunelab.program.run import bind
from prunelab.repair import repair
from prunelab.train.centripetal import Centripetal
from prunelab.train.clusters import Clusters, clusters
from prunelab.train.finetune import finetune
from prunelab.train.recipe import Recipe

if TYPE_CHECKING:
    import pandas as pd

SHRINK = 20.0
"""A cluster's members come nearer to each other by exp of this: to about 2e-9 of what they were apart."""
LOSSLESS = 1e-4
"""The change of any output that trimming may make."""


@dataclass(frozen=True)
class Squeezed:
    """What Centripetal SGD has made of a network.

    Attributes:
        program: of the trained network, as wide as before; ``program.model`` is that network.
        clusters: whose members are equal now.
        table: of the training, as :func:`prunelab.finetune` gives it.
        pull: the *ε* that was used.
        spread: how far apart members still are, relative to the weights' norm.
        departure: largest change of an output that trimming makes on some validation images.
    """

    program: Program
    clusters: Clusters
    table: pd.DataFrame
    pull: float
    spread: float
    departure: float

    def trimmed(self) -> nn.Module:
        """The small network: one member of each cluster, and the readers' weights for all of them summed.

        Raises:
            PruneLabError: members are not equal enough yet for that to be lossless.
        """
        if self.departure > LOSSLESS:
            raise PruneLabError(
                f"Trimming would change outputs by {self.departure:.1e}, more than {LOSSLESS:.0e}: train for longer, "
                "or with a stronger pull."
            )
        return commit(self.program, self.clusters.selection(), repair="merge")


def pull_for(rates: float, *, momentum: float = 0.9, decay: float = 5e-4, shrink: float = SHRINK) -> float:
    """The pull *ε* with which distances within clusters shrink by exp(``shrink``) over a training.

    They shrink like exp(−Σ *τ*(*ε* + *η*)/(1 − *μ*)) under a momentum *μ* and a weight decay *η*.

    Args:
        rates: Σ *τ*, the learning rates of all steps added up.
    """
    return max(shrink * (1 - momentum) / rates - decay, 0.0)


def csgd(
    model: nn.Module,
    train: Any,
    val: Any,
    widths: float | Mapping[str, float | int] | Clusters = 0.625,
    *,
    how: str = "kmeans",
    pull: float | None = None,
    vector_pull: float = 1.0,
    recipe: Recipe | None = None,
    **settings: Any,
) -> Squeezed:
    """Train a network in place so that filters become equal in clusters.

    Args:
        model: the network; its weights change, its structure does not: :meth:`Squeezed.trimmed` gives the small one.
        train, val: as for :func:`prunelab.finetune`.
        widths: as for :func:`prunelab.train.clusters.clusters`; or clusters, to go on with.
        how: one of ``prunelab.train.clusters.WAYS``.
        pull: *ε*; as strong as the length of the training needs, unless given (the paper has 3e-3 for 600 epochs of
            CIFAR-10).
        vector_pull: factor of that for biases and norms (the paper's code: 0.1).
        recipe, settings: as for :func:`prunelab.finetune`. Without an optimizer of yours: SGD with Nesterov momentum
            whose weight decay leaves biases and norms alone, as in the paper's code.

    Raises:
        PruneLabError: as :func:`prunelab.finetune` and :func:`prunelab.train.clusters.clusters`; nothing to squeeze.
    """
    own = ("folder", "every", "progress", "on_epoch", "watch")
    given = {name: settings.pop(name) for name in own if name in settings}
    how_to = Recipe.chosen(recipe, settings if recipe is not None else {"lr": 0.03, **settings})
    images, _ = labelled(val, 64)
    program = trace(model, images[:2])
    chosen = widths if isinstance(widths, Clusters) else clusters(program, widths, how=how, seed=how_to.seed)
    if not chosen.of:
        raise PruneLabError("There is nothing to squeeze: no layer is to lose a channel.")
    steps = how_to.epochs * (batches(train, how_to.batch_size)[1] or 0)
    rates = how_to.lr * sum(how_to.factor(step, steps) for step in range(steps))
    strength = pull if pull is not None else pull_for(max(rates, 1e-12), decay=how_to.weight_decay)
    centripetal = Centripetal(program, chosen, pull=strength, vector_pull=vector_pull)
    make = how_to.optimizer or (lambda parameters: _sgd(parameters, how_to))
    how_to = replace(how_to, optimizer=_attached(make, centripetal), keep="last")
    table = finetune(model, train, val, recipe=how_to, **given)
    found = departure(program, chosen, images)
    return Squeezed(program, chosen, table, strength, centripetal.spread(), found)


def departure(program: Program, chosen: Clusters, images: Tensor) -> float:
    """Largest absolute change of an output that trimming makes on some images."""
    selection = chosen.selection()
    corrected = repair(program, selection, "merge", None)
    with torch.no_grad():
        whole = bind(program)
        small = bind(program, selection).replaced(corrected)
        images = images.to(whole.device)
        return float((whole(images) - small(images)).abs().max())


def squeeze_to(
    make: Callable[[float], nn.Module], train: Any, val: Any, *, wider: float = 1.5, **settings: Any
) -> Squeezed:
    """Wider, then squeezed: train a network that is wider than wanted down to the wanted width.

    The papers find it better than training the narrow network from the start.

    Args:
        make: builds the network with its widths multiplied by a factor; called with 1.0 and ``wider``. The wide one is
            trained from what ``make`` gives: train it there first if you want it so.
        wider: the factor.
        settings: as for :func:`csgd`.

    Raises:
        PruneLabError: the two networks do not have the same layers; as :func:`csgd`.
    """
    images, _ = labelled(val, 2)
    with random_kept():
        narrow, wide = trace(make(1.0), images), make(wider)
    targets = {layer.name: layer.channels for layer in narrow.structure.layers if not layer.pinned}
    layers = {layer.name: layer for layer in trace(wide, images).structure.layers}
    missing = sorted(targets.keys() - layers.keys())
    if missing:
        raise PruneLabError(f"The wide network has no layer {missing[0]!r}: only widths may differ.")
    return csgd(wide, train, val, targets, **settings)


def _sgd(parameters: list[nn.Parameter], recipe: Recipe) -> Optimizer:
    vectors = [p for p in parameters if p.dim() < 2]
    others = [p for p in parameters if p.dim() >= 2]
    groups = [{"params": others, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return SGD([group for group in groups if group["params"]], recipe.lr, momentum=0.9, nesterov=True, foreach=True)


def _attached(make: Any, centripetal: Centripetal) -> Any:
    if isinstance(make, Optimizer):
        centripetal.attach(make)
        return make

    def optimizer(parameters: list[nn.Parameter]) -> Optimizer:
        chosen: Optimizer = make(parameters)
        centripetal.attach(chosen)
        return chosen

    return optimizer
