"""Multi-grain pruning: the small VGG and ResNet-20 on the embedded images, and VGG-19 on CIFAR-10."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from prunelab import zoo
from prunelab.papers.evidence import Measure, measured
from prunelab.papers.experiments import sources
from prunelab.papers.multi_grain import GRAINS, multi_grain
from prunelab.papers.multi_grain_record import Grain
from prunelab.papers.reproduce import Reproduction, Task
from prunelab.program.guard import random_kept
from prunelab.train.augment import Augment
from prunelab.train.finetune import finetune
from prunelab.train.recipe import Recipe


@dataclass(frozen=True)
class _Setting:
    """How a network is pruned.

    Attributes:
        budgets, stops, channels, weights: as for :func:`prunelab.papers.multi_grain.multi_grain`.
        recovery, finetuning: the training after a cut, and that at the end of each grain.
    """

    budgets: Mapping[str, float]
    stops: Mapping[str, Sequence[float]]
    channels: float
    weights: float
    recovery: Recipe
    finetuning: Mapping[str, Recipe]


def _pruned(task: Task, dense: nn.Module, sets: sources.Sets, setting: _Setting) -> Iterator[Measure]:
    """The unpruned network, and what every grain leaves of it. Choices are made on the validation images."""
    train, val, test = sets
    yield measured(dense, test, point="dense", method="unpruned", stage="dense")
    points = {grain: [f"{stop:g}×" for stop in stops] for grain, stops in setting.stops.items() if grain == "weight"}
    against = None if task.short else dense
    found: list[Measure] = []

    def measure(grain: Grain, model: nn.Module) -> None:
        names = points.get(grain.name)
        point = names.pop(0) if names else f"after {grain.name}s"
        task.say(
            f"  {point}: {len(grain.kept)} of {len(grain.cuts)} cuts kept, validation {100 * grain.accuracy:.2f} %"
        )
        # A grain that the network does not offer has left it as it was.
        if grain.kept:
            note = "" if grain.name == "weight" else ", ".join(cut.what for cut in grain.kept)
            method = "multi-grain"
            found.append(measured(model, test, point=point, method=method, stage="trained", dense=against, note=note))

    def seeded(recipe: Recipe) -> Recipe:
        return replace(recipe, seed=task.seed, teacher=dense, epochs=1 if task.short else recipe.epochs)

    multi_grain(
        dense,
        train,
        val,
        budgets=dict.fromkeys(setting.budgets, 1.0) if task.short else setting.budgets,
        stops=setting.stops,
        channels=0.3 if task.short else setting.channels,
        weights=0.8 if task.short else setting.weights,
        score="lamp",
        repair=_REPAIR,
        recovery=seeded(setting.recovery),
        finetuning={grain: seeded(recipe) for grain, recipe in setting.finetuning.items()},
        on_grain=measure,
        folder=task.work / "multi-grain",
        progress=False,
    )
    yield from found


_REPAIR = {**dict.fromkeys(GRAINS, "least-squares"), "weight": "none"}
_GREY = Recipe(epochs=1, lr=0.02, batch_size=64, weight_decay=1e-4, augment=Augment(flip=True, crop=2))
_SMALL = _Setting(
    budgets={"block": 0.01, "layer": 0.01, "channel": 0.01, "weight": 0.05},
    stops={"layer": (2.0,), "channel": (2.2,), "weight": (10.0, 20.0)},
    channels=0.05,
    weights=0.3,
    recovery=_GREY,
    finetuning={**dict.fromkeys(GRAINS, _GREY), "weight": replace(_GREY, epochs=14, keep="last")},
)
_RESNET = _Setting(
    budgets={"block": 0.02, "layer": 0.03, "channel": 0.04, "weight": 0.06},
    stops={"block": (1.4,), "layer": (1.6,), "channel": (1.8,), "weight": (10.0,)},
    channels=0.08,
    weights=0.4,
    recovery=_GREY,
    finetuning={**dict.fromkeys(GRAINS, _GREY), "weight": replace(_GREY, epochs=10, lr=0.05)},
)
_CIFAR = Recipe(epochs=2, lr=0.02, weight_decay=5e-4, augment=Augment(flip=True, crop=4))
_VGG19 = _Setting(
    budgets={"block": 0.003, "layer": 0.003, "channel": 0.005, "weight": 0.02},
    stops={"channel": (20.0,), "weight": (31.9, 185.3)},
    channels=0.1,
    weights=0.2,
    recovery=_CIFAR,
    finetuning=dict.fromkeys(GRAINS, replace(_CIFAR, epochs=40, lr=0.05)),
)
_SCRATCH = Recipe(epochs=160, lr=0.1, weight_decay=5e-4, augment=Augment(flip=True, crop=4))


def _vgg_small(task: Task) -> Iterator[Measure]:
    yield from _pruned(task, zoo.load("vgg_small"), sources.embedded(task), _SMALL)


def _resnet20(task: Task) -> Iterator[Measure]:
    yield from _pruned(task, zoo.load("resnet20"), sources.embedded(task), _RESNET)


def _vgg19(task: Task) -> Iterator[Measure]:
    sets = sources.cifar10(task)
    with random_kept():
        torch.manual_seed(task.seed)
        dense = zoo.vgg19()
    recipe = replace(_SCRATCH, seed=task.seed, epochs=1 if task.short else _SCRATCH.epochs)
    finetune(dense, *sets[:2], recipe=recipe, folder=task.work / "dense", progress=False)
    yield from _pruned(task, dense.eval(), sets, _VGG19)


_KNOWN = (
    "The embedded training images, and the 1,000 of them on which choices are made, are among the 60,000 that the "
    "checkpoint was trained on: the unpruned network does better on them than on images that it has not seen, and the "
    "budgets are wider for it. The test images are new to all networks. The unpruned network is the teacher throughout."
)

REPRODUCTIONS = (
    Reproduction(
        name="multi-grain-small",
        summary="Multi-grain pruning of the small VGG on the embedded Fashion-MNIST: 10 and 20 times smaller.",
        expected="6 min of one core",
        run=_vgg_small,
        remarks=_KNOWN + " This network has layers that can be bypassed, and no block of several: that grain takes "
        "nothing; `multi-grain-resnet20` has all four. The weight grain's settings were chosen by the distance to the "
        "teacher (Kullback-Leibler divergence) on augmented validation images, from 17 single runs of 3 to 20 "
        "epochs: no repair after a cut of weights (0.074 against 0.083 with least squares, learning rate 0.005), LAMP "
        "(0.066 against 0.068 by magnitude, less than one run can tell), learning rate 0.02 and temperature 2 (0.045 "
        "against 0.051 with 0.01 and 4). At temperature 2 a rate of 0.01 was ahead in a run of 7 epochs (0.064 against "
        "0.071) and was not tried for longer. Of the two runs of 20 epochs the test accuracy was seen as well; it had "
        "the same order.",
    ),
    Reproduction(
        name="multi-grain-resnet20",
        summary="Multi-grain pruning of ResNet-20 on the embedded Fashion-MNIST, with all four grains.",
        expected="about 30 min of one core; not run",
        run=_resnet20,
        remarks=_KNOWN,
    ),
    Reproduction(
        name="multi-grain-vgg19",
        summary="Multi-grain pruning of VGG-19 on CIFAR-10, trained from scratch, at the paper's 31.9× and 185.3×.",
        expected="about 1 h on one data-centre GPU; not run",
        run=_vgg19,
        paper={
            ("31.9×", "trained"): {"change": -0.0008, "compression": 31.9},
            ("185.3×", "trained"): {"change": -0.0173, "compression": 185.3},
        },
        gpu=True,
        remarks="The paper's base accuracy, criteria and schedule are not known to us; the recipe is our own.",
    ),
)
