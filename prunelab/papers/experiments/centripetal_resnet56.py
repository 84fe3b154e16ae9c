"""Centripetal SGD as in the paper: ResNet-56 with projection shortcuts on CIFAR-10, to 5/8 of its widths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from prunelab import zoo
from prunelab.papers.centripetal import centripetal_sgd
from prunelab.papers.evidence import Measure, measured
from prunelab.papers.experiments.sources import cifar10, folder
from prunelab.papers.reproduce import Reproduction, Task
from prunelab.train.augment import Augment
from prunelab.train.finetune import finetune

SHARE = 0.625
POINT = "5/8 widths"
AUGMENT = Augment(flip=True, crop=4)


def in_three(done: float) -> float:
    """The paper's learning rate: a tenth after each third of the training."""
    return float(0.1 ** int(3 * done))


BASE: Mapping[str, Any] = {"epochs": 200, "lr": 0.1, "batch_size": 128}
# The paper's: 600 epochs at 0.03, batch 64, weight decay 1e-4, pull 3e-3.
SQUEEZE: Mapping[str, Any] = {
    "epochs": 600, "lr": 0.03, "batch_size": 64, "weight_decay": 1e-4, "pull": 3e-3, "schedule": in_three,
}  # fmt: skip
SHORT_BASE: Mapping[str, Any] = {"epochs": 1, "batch_size": 50}
# Members come together no faster than momentum lets them, whatever the pull: some 400 steps.
SHORT_SQUEEZE: Mapping[str, Any] = {"epochs": 12, "lr": 0.01, "batch_size": 8, "pull": None, "schedule": None}


def run(task: Task) -> Iterator[Measure]:
    """The network trained as usual, squeezed, and trimmed."""
    train, val, test = cifar10(task)
    torch.manual_seed(task.seed)
    dense = zoo.ResNet(8, "projection") if task.short else zoo.resnet56(shortcut="projection")
    common: dict[str, Any] = {"seed": task.seed, "augment": AUGMENT, "progress": False, "keep": "last"}
    base, squeeze = ({**BASE, **SHORT_BASE}, {**SQUEEZE, **SHORT_SQUEEZE}) if task.short else (BASE, SQUEEZE)
    finetune(dense, train, val, folder=folder(task, "base"), **common, **base)
    yield measured(dense, test, point="dense", method="ResNet-56", stage="dense")
    small, (step,) = centripetal_sgd(
        dense, train, val, shares=SHARE, folder=folder(task, "squeeze"), **common, **squeeze
    )
    yield measured(step.squeezed.program.model, test, point=POINT, method="C-SGD", stage="trained")
    note = (
        f"largest change of a logit by trimming on 64 validation images {step.squeezed.departure:.1e} in float32, "
        f"{step.exact:.1e} in float64"
    )
    yield measured(small, test, point=POINT, method="C-SGD", stage="cut", dense=dense, note=note)


REPRODUCTIONS = (
    Reproduction(
        name="centripetal-resnet56",
        summary="Centripetal SGD, ResNet-56 with projections on CIFAR-10: 5/8 widths, trimmed without fine-tuning.",
        expected="3 to 4 h on one data-centre GPU, from 25 ms a step; not run",
        run=run,
        paper={
            ("dense", "dense"): {"accuracy": 0.9339},
            (POINT, "cut"): {"accuracy": 0.9344, "change": 0.0005, "speedup": 2.55},
        },
        method="C-SGD",
        gpu=True,
    ),
)
