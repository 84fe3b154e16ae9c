"""Centripetal SGD on the embedded images: ResNet-20 at 5/8 of its widths, and a LeNet twice as wide, then squeezed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from prunelab import zoo
from prunelab.commit import commit
from prunelab.datasets import ImageSet
from prunelab.papers.centripetal import centripetal_sgd, in_float64
from prunelab.papers.evidence import Measure, measured
from prunelab.papers.experiments.sources import Sets, embedded, folder
from prunelab.papers.reproduce import Reproduction, Task
from prunelab.plan import Plan
from prunelab.program.guard import random_kept
from prunelab.program.program import trace
from prunelab.train.augment import Augment
from prunelab.train.clusters import clusters
from prunelab.train.csgd import Squeezed, departure, squeeze_to
from prunelab.train.finetune import finetune

SHARE = 0.625
POINT = "5/8 widths"
NARROW = (10, 25, 250)
WAYS_AT_ONE_SEED = ("even", "imbalanced")

# Chosen on validation images, four epochs each: learning rates 0.01, 0.03 and 0.1, labels or the unpruned network's
# outputs, with and without flips and crops.
RECIPE: Mapping[str, Any] = {
    "epochs": 6,
    "lr": 0.01,
    "batch_size": 64,
    "augment": Augment(flip=True, crop=2),
    "keep": "last",
    "progress": False,
}
FROM_SCRATCH: Mapping[str, Any] = {"epochs": 16, "lr": 0.03, "batch_size": 64, "keep": "last", "progress": False}
# Members come together no faster than momentum lets them, whatever the pull: some 400 steps.
SHORT: Mapping[str, Any] = {"epochs": 12, "batch_size": 8}


def run(task: Task) -> Iterator[Measure]:
    """ResNet-20 squeezed and trimmed, its control, two other ways to cluster at the first seed, and the LeNets."""
    sets = embedded(task)
    test = sets[2]
    dense = zoo.ResNet(8, in_channels=1).eval() if task.short else zoo.load("resnet20")
    recipe = {**RECIPE, **(SHORT if task.short else {}), "seed": task.seed, "teacher": dense}
    yield measured(dense, test, point="dense", method="ResNet-20", stage="dense")
    yield from _squeezed(task, dense, sets, recipe, "kmeans")
    yield _control(task, dense, sets, recipe)
    if task.seed == 0 and not task.short:
        for how in WAYS_AT_ONE_SEED:
            *_, trimmed = _squeezed(task, dense, sets, recipe, how)
            yield trimmed
    yield from _wider(task, sets)


def _squeezed(task: Task, dense: nn.Module, sets: Sets, recipe: Mapping[str, Any], how: str) -> Iterator[Measure]:
    """The network after Centripetal SGD, as wide as before, and trimmed."""
    train, val, test = sets
    method = f"C-SGD, {how}"
    small, (step,) = centripetal_sgd(dense, train, val, shares=SHARE, how=how, folder=folder(task, method), **recipe)
    yield measured(step.squeezed.program.model, test, point=POINT, method=method, stage="trained")
    # All trimmed networks have the same shapes: one is timed.
    against = dense if task.seed == 0 and how == "kmeans" else None
    yield measured(
        small, test, point=POINT, method=method, stage="cut", dense=against, note=_lossless(step.squeezed, test)
    )


def _lossless(squeezed: Squeezed, test: ImageSet) -> str:
    """What trimming changes, on test images."""
    images = test.images[:1000]
    found = departure(squeezed.program, squeezed.clusters, images)
    return (
        f"pull {squeezed.pull:.3g}; largest change of a logit by trimming on {len(images):,} test images "
        f"{found:.1e} in float32, {in_float64(squeezed, images):.1e} in float64"
    )


def _control(task: Task, dense: nn.Module, sets: Sets, recipe: Mapping[str, Any]) -> Measure:
    """Filters of the same widths chosen by L1, and trained with the same recipe for as long."""
    train, val, test = sets
    program = trace(dense, val.images[:2])
    plan = Plan(criterion="l1")
    for layer in clusters(program, SHARE, how="even").of:
        plan = plan.set(layer, ratio=1 - SHARE)
    small = commit(program, plan.resolve(program))
    finetune(small, train, val, folder=folder(task, "control"), **recipe)
    return measured(small, test, point=POINT, method="L1, then fine-tuned", stage="trained")


def lenet(seed: int, factor: float) -> nn.Module:
    """A LeNet 10-25-250 with its widths multiplied."""
    first, second, hidden = (round(width * factor) for width in NARROW)
    with random_kept():
        torch.manual_seed(seed)
        return zoo.LeNet((first, second, hidden))


def _wider(task: Task, sets: Sets) -> Iterator[Measure]:
    """A LeNet trained at its width, and one trained twice as wide down to it, both from scratch, for as many epochs."""
    train, val, test = sets
    recipe = {**FROM_SCRATCH, **(SHORT if task.short else {}), "seed": task.seed}
    make = partial(lenet, task.seed)
    narrow = make(1.0)
    point = f"LeNet {'-'.join(map(str, NARROW))}"
    finetune(narrow, train, val, folder=folder(task, "narrow"), **recipe)
    yield measured(narrow, test, point=point, method="trained so", stage="dense")
    squeezed = squeeze_to(make, train, val, wider=2.0, folder=folder(task, "wider"), **recipe)
    method, note = "twice as wide, then squeezed", _lossless(squeezed, test)
    yield measured(squeezed.trimmed(), test, point=point, method=method, stage="cut", note=note)


REPRODUCTIONS = (
    Reproduction(
        name="centripetal-small",
        summary="Centripetal SGD on the embedded images: 5/8 of ResNet-20's widths, trimmed without fine-tuning.",
        expected="about 4 processor minutes on one core, 7 for the first seed",
        run=run,
        paper={(POINT, "cut"): {"change": 0.0005, "speedup": 2.55}},
        method="C-SGD, kmeans",
        remarks=(
            "The paper's figures are those of ResNet-56 on CIFAR-10 (93.39 % → 93.44 % at 5/8 widths). Here it is "
            "ResNet-20, trained on all 60,000 images of Fashion-MNIST and squeezed on 9,000 of them; 1,000 others "
            "chose the recipe. The unpruned network has seen those 1,000 too, so that only the test images compare "
            "it with what comes of it. Squeezing and the control have the same recipe: six epochs at a rate of 0.01, "
            "flips, crops by two pixels, and the unpruned network's outputs to learn. The last two rows: both LeNets "
            "begin untrained and see each image 16 times; 'against dense' is there against the one trained at its "
            "own width."
        ),
    ),
)
