"""Centripetal SGD from beginning to end: train filters to be equal in clusters, then trim all but one of each.

Ding et al. 2019, arXiv 1904.03837; Hao et al. 2023, doi 10.1109/TNNLS.2023.3298263.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from prunelab.commit import commit
from prunelab.errors import PruneLabError
from prunelab.files import replacing
from prunelab.preview import labelled
from prunelab.profile.batches import batches
from prunelab.program.guard import random_kept
from prunelab.program.program import Program, trace
from prunelab.program.run import bind
from prunelab.repair import repair
from prunelab.train.centripetal import Centripetal
from prunelab.train.checkpoint import NAME, difference, of_another_run
from prunelab.train.clusters import Clusters, clusters
from prunelab.train.finetune import finetune
from prunelab.train.recipe import Recipe
from prunelab.train.setting import as_it_was
from prunelab.train.words import Words, network_in_words

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

    With a ``folder`` the clusters are kept in it, beside the checkpoint: a squeeze that goes on from there goes on with
    them, since k-means would find others in weights that are half squeezed.

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
        PruneLabError: as :func:`prunelab.finetune` and :func:`prunelab.train.clusters.clusters`; nothing to squeeze;
            the folder holds the checkpoint of a squeeze to other widths, or clusters that cannot be read.
    """
    own = ("folder", "every", "progress", "on_epoch", "watch")
    given = {name: settings.pop(name) for name in own if name in settings}
    how_to = Recipe.chosen(recipe, settings if recipe is not None else {"lr": 0.03, **settings})
    images, _ = labelled(val, 64)
    program = trace(model, images[:2])
    folder = None if given.get("folder") is None else Path(given["folder"])
    asked = {"network": network_in_words(model), "widths": Words(model).short(widths), "how": how}
    chosen = _read_clusters(folder, asked)
    if chosen is None:
        chosen = widths if isinstance(widths, Clusters) else clusters(program, widths, how=how, seed=how_to.seed)
    if not chosen.of:
        raise PruneLabError("There is nothing to squeeze: no layer is to lose a channel.")
    _write_clusters(folder, asked, chosen)
    steps = how_to.epochs * (batches(train, how_to.batch_size)[1] or 0)
    rates = how_to.lr * sum(how_to.factor(step, steps) for step in range(steps))
    strength = pull if pull is not None else pull_for(max(rates, 1e-12), decay=how_to.weight_decay)
    centripetal = Centripetal(program, chosen, pull=strength, vector_pull=vector_pull)
    make = how_to.optimizer or partial(_sgd, lr=how_to.lr, weight_decay=how_to.weight_decay)
    # Another machine's cosines may differ in the last digit.
    squeezing = Squeezing(make, chosen.of, float(f"{strength:.9g}"), float(vector_pull), centripetal)
    try:
        with as_it_was(model, make):
            table = finetune(model, train, val, recipe=replace(how_to, optimizer=squeezing, keep="last"), **given)
    finally:
        centripetal.detach()
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


@dataclass(frozen=True)
class Squeezing:
    """Makes the optimizer of a squeeze; a checkpoint is of another squeeze where what equality goes by is another.

    Attributes:
        make: makes the optimizer of the training, or is it.
        clusters: by layer, the number of every channel's cluster.
        pull, vector_pull: as :class:`prunelab.train.centripetal.Centripetal` has them.
        centripetal: what changes the gradients; it follows from the others.
    """

    make: Callable[[list[nn.Parameter]], Optimizer] | Optimizer
    clusters: Mapping[str, tuple[int, ...]]
    pull: float
    vector_pull: float
    centripetal: Centripetal = field(compare=False)

    def __call__(self, parameters: list[nn.Parameter]) -> Optimizer:
        """The optimizer, whose steps begin with the squeeze."""
        optimizer = self.make if isinstance(self.make, Optimizer) else self.make(parameters)
        self.centripetal.attach(optimizer)
        return optimizer


def _sgd(parameters: list[nn.Parameter], *, lr: float, weight_decay: float) -> Optimizer:
    vectors = [p for p in parameters if p.dim() < 2]
    others = [p for p in parameters if p.dim() >= 2]
    groups = [{"params": others, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return SGD([group for group in groups if group["params"]], lr, momentum=0.9, nesterov=True, foreach=True)


# The clusters of the run that a folder holds ---------------------------------------------

_CLUSTERS = "clusters.json"


def _read_clusters(folder: Path | None, asked: Mapping[str, str]) -> Clusters | None:
    """Those that the run in a folder began with; None where there is no checkpoint, or it is not a squeeze's.

    Whether that run is this one, its checkpoint decides.

    Raises:
        PruneLabError: something else was asked for then, or the file is damaged.
    """
    if folder is None or not (folder / f"{NAME}.json").exists() or not (folder / _CLUSTERS).exists():
        return None
    try:
        held = json.loads((folder / _CLUSTERS).read_text(encoding="utf-8"))
        before, found = dict(held["asked"]), Clusters.from_json(held["clusters"])
    except (OSError, ValueError, KeyError, TypeError, PruneLabError) as error:
        raise PruneLabError(
            f"The clusters of the squeeze in {folder} cannot be read from {_CLUSTERS} ({error}): give this run a "
            "folder of its own."
        ) from error
    other = difference(before, asked)
    if other:
        raise of_another_run(folder, other)
    return found


def _write_clusters(folder: Path | None, asked: Mapping[str, str], chosen: Clusters) -> None:
    """Keep the clusters of a run that begins; those beside a checkpoint are its own, and stay.

    Raises:
        PruneLabError: the folder cannot be written.
    """
    if folder is None or (folder / f"{NAME}.json").exists():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / _CLUSTERS) as beside:
            beside.write_text(json.dumps({"asked": dict(asked), "clusters": chosen.to_json()}), encoding="utf-8")
    except OSError as error:
        raise PruneLabError(f"The clusters cannot be written to {folder}: {error}.") from error
