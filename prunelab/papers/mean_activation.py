"""Mean activation: neurons that answer weakly to the whole training set go (Xie, Luo, She, Xiang, CSCWD 2023).

'Neural Network Model Pruning without Additional Computation and Structure Requirements',
doi 10.1109/CSCWD57460.2023.10152777. In the paper: train to basic convergence; feed the entire training set and take
each neuron's activation, layer by layer; a layer's prune ratio gives its threshold; neurons below it go, with the
weights of the layers before and after; train on to convergence. Nothing is added to the network and nothing is asked
of it: it works with and without batch norm.

Our reading: the activation of channel c is A_c = mean over images and positions of its value after the activation
function, in evaluation mode, images not augmented; the threshold of a layer with the ratio p and C channels lies where
exactly ⌊p · C⌋ of them go (equal ones in order), and one stays at least; convergence is basic where the training loss
moved by less than 1 % over five epochs, or where half of the epochs are done; inner layers alone, not the streams that
residual blocks add to, unless asked for.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from torch import nn

from prunelab.commit import commit
from prunelab.criteria.registry import scores
from prunelab.errors import PruneLabError
from prunelab.plan import Plan
from prunelab.preview import labelled
from prunelab.profile.capture import profile
from prunelab.program.program import Program, trace
from prunelab.train.finetune import finetune
from prunelab.train.recipe import constant

WINDOW = 5
"""Epochs over which the training loss is looked at."""

MOVED = 0.01
"""Share by which it may move over them at basic convergence."""


@dataclass(frozen=True)
class Cut:
    """What was done.

    Attributes:
        plan: what was removed.
        thresholds: by layer, the lowest mean activation of a neuron that stayed.
        images: training images over which activations were averaged.
        before, after: epochs of training before the cut and after it.
    """

    plan: Plan
    thresholds: Mapping[str, float]
    images: int
    before: int
    after: int


def mean_activation(
    model: nn.Module,
    train: Any,
    val: Any,
    ratio: float | Mapping[str, float],
    *,
    epochs: int,
    streams: bool = False,
    folder: Path | str | None = None,
    **settings: Any,
) -> tuple[nn.Module, Cut]:
    """Train to basic convergence, cut by mean activation, train on.

    Args:
        model: a network that need not be trained; it is not changed.
        train, val: as for :func:`prunelab.finetune`.
        ratio: share of the channels to remove, of every layer or by its name.
        epochs: of training in all.
        streams: whether a ratio for every layer is meant for residual streams too.
        folder: for checkpoints.
        settings: those of :class:`prunelab.Recipe`; the rate is constant up to the cut, and falls after it.

    Raises:
        PruneLabError: a ratio or layer that does not fit, and all that finetune raises.
    """
    trained, place = copy.deepcopy(model), None if folder is None else Path(folder)
    before = basic_convergence(trained, train, val, epochs=epochs, folder=place and place / "basic", **settings)
    small, cut = cut_by_mean_activation(trained, train, ratio, streams=streams)
    after = epochs - before
    finetune(small, train, val, epochs=after, folder=place and place / "on", progress=False, **settings)
    return small, Cut(cut.plan, cut.thresholds, cut.images, before, after)


def basic_convergence(
    model: nn.Module, train: Any, val: Any, *, epochs: int, folder: Path | None = None, seed: int = 0, **settings: Any
) -> int:
    """Train a network in place, at a constant rate, until its loss hardly moves, or half of the epochs are done.

    Returns:
        How many epochs that took.
    """
    done, losses = 0, []
    for part in count():
        size = min(WINDOW, epochs // 2 - done)
        if size < 1:
            break
        table = finetune(
            *(model, train, val),
            **{**settings, "epochs": size, "seed": 1000 * seed + part, "keep": "last", "schedule": constant},
            folder=folder and folder / str(part),
            progress=False,
        )
        losses += table["loss"].iloc[1:].tolist()
        done += size
        if len(losses) > WINDOW and abs(losses[-1] - losses[-1 - WINDOW]) < MOVED * losses[-1 - WINDOW]:
            break
    return done


def cut_by_mean_activation(
    model: nn.Module, train: Any, ratio: float | Mapping[str, float], *, streams: bool = False
) -> tuple[nn.Module, Cut]:
    """The cut alone, for a network that has converged.

    Args:
        train: the entire training set, not augmented.
        ratio, streams: as for :func:`mean_activation`.
    """
    program = trace(model, labelled(train, 2)[0])
    seen = profile(program, train, progress=False)
    ratios = ratio if isinstance(ratio, Mapping) else dict.fromkeys(inner_layers(program, streams), ratio)
    plan = Plan("mean_activation")
    for name, share in ratios.items():
        plan = plan.set(name, ratio=share)
    selection, thresholds = plan.resolve(program, seen), {}
    for name in ratios:
        means = scores(program, seen, "mean_activation", program.layer(name))
        thresholds[name] = float(means[list(selection.kept.get(name, range(means.size)))].min())
    return commit(program, selection), Cut(plan, thresholds, seen.images, 0, 0)


def inner_layers(program: Program, streams: bool = False) -> Sequence[str]:
    """Layers that can be cut: those that one producer makes whole, and with ``streams`` those that blocks add to.

    Raises:
        PruneLabError: there are none.
    """
    # A stream has several producers, or parts of one where a shortcut is padded.
    parts = Counter(producer for layer in program.layers for producer in layer.producers)
    found = [
        layer.name
        for layer in program.layers
        if not layer.pinned and (streams or (len(layer.producers) == 1 and parts[layer.producers[0]] == 1))
    ]
    if not found:
        raise PruneLabError("There is no layer to cut by mean activation: all are pinned, or residual streams.")
    return found
