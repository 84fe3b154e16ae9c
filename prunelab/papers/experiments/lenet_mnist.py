"""Network Trimming on LeNet and MNIST: the paper's widths, the paper's rule, and retraining from scratch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from prunelab.commit import commit
from prunelab.papers.evidence import Measure, measured
from prunelab.papers.experiments.sources import Sets, folder
from prunelab.papers.experiments.subjects import LENETS, mnist_on_black
from prunelab.papers.experiments.trimming_rule import by_rule
from prunelab.papers.network_trimming import from_scratch, to_widths
from prunelab.papers.reproduce import Reproduction, Task
from prunelab.profile.capture import profile
from prunelab.program.program import trace
from prunelab.train.finetune import finetune

SUBJECT = LENETS[0]
EPOCHS, AGAIN = 15, 4
ROUNDS, ROUND_EPOCHS = 5, 2

WIDTHS: Mapping[str, Mapping[str, int]] = {
    "1.41×": {"conv2": 41, "fc1": 426},
    "2.23×": {"conv2": 31, "fc1": 349},
    "3.11×": {"conv2": 26, "fc1": 293},
    "3.85×": {"conv2": 24, "fc1": 252},
    "5.87×": {"conv2": 20, "fc1": 190},
    "9.97×": {"conv2": 16, "fc1": 130},
}
"""Filters of conv2 and neurons of fc1 by compression: four of the paper, and two beyond."""

CONTROL = "3.85×"
"""Where retraining from scratch is shown."""

PAPER = {
    ("dense", "dense"): {"accuracy": 0.9927},
    **{
        (point, stage): {"accuracy": accuracy}
        for point, found in {
            "1.41×": (0.9875, 0.9929),
            "2.23×": (0.9534, 0.9930),
            "3.11×": (0.8821, 0.9925),
            "3.85×": (0.9675, 0.9926),
        }.items()
        for stage, accuracy in zip(("cut", "trained"), found, strict=True)
    },
}


def run(task: Task) -> Iterator[Measure]:
    """Train LeNet; cut it to the paper's widths one after the other; by its rule; and train from scratch."""
    sets = train, val, test = mnist_on_black(task)
    epochs, again, rounds, round_epochs = (1, 1, 1, 1) if task.short else (EPOCHS, AGAIN, ROUNDS, ROUND_EPOCHS)
    dense = SUBJECT.new(task)
    settings = {**SUBJECT.settings, "seed": task.seed}
    finetune(dense, train, val, folder=folder(task, "dense"), progress=False, **{**settings, "epochs": epochs})
    yield measured(dense, test, point="dense", method="dense", stage="dense", note=f"{epochs} epochs")
    settings |= {"teacher": dense, "temperature": 4.0, "teacher_weight": 0.7}
    yield from _widths(task, dense, sets, epochs, {**settings, "epochs": again})
    retraining = {**settings, "lr": settings["lr"] / 10, "epochs": round_epochs, "folder": folder(task, "rule")}
    for found, _ in by_rule(task, "", dense, sets, rounds, **retraining):
        yield found


def _widths(task: Task, dense: nn.Module, sets: Sets, spent: int, settings: Mapping[str, Any]) -> Iterator[Measure]:
    """To each of the widths, from the network of the one before; and the control."""
    train, val, test = sets
    now, again = dense, settings["epochs"]
    points = {CONTROL: WIDTHS[CONTROL]} if task.short else WIDTHS
    for point, widths in points.items():
        program = trace(now, val.images[:2])
        zeros = profile(program, val, progress=False)
        small = commit(program, to_widths(program, widths).resolve(program, zeros))
        yield measured(small, test, point=point, method="apoz", stage="cut")
        retraining = {**settings, "lr": settings["lr"] / 10, "folder": folder(task, point)}
        finetune(small, train, val, progress=False, **retraining)
        spent += again
        note = f"{spent} epochs in all, {again} of them after this cut"
        timed = None if task.short else dense
        yield measured(small, test, point=point, method="apoz", stage="trained", dense=timed, note=note)
        if point == CONTROL:
            torch.manual_seed(task.seed)
            fresh = from_scratch(small, train, val, **{**settings, "epochs": spent, "folder": folder(task, "scratch")})
            note = f"new weights, {spent} epochs from the first learning rate on, the same teacher"
            yield measured(fresh, test, point=point, method="scratch", stage="trained", note=note)
        now = small


REPRODUCTIONS = (
    Reproduction(
        name="network-trimming-lenet",
        summary="Network Trimming on LeNet 20-50-500-10 and MNIST at the paper's widths and by its rule, with training "
        "from scratch beside it.",
        expected="about 10 min of one processor core",
        run=run,
        paper=PAPER,
        method="apoz",
        remarks="All networks are trained with random shifts by up to two pixels; of the 60,000 training images 5,000 "
        "are held out, on which APoZ is measured and the best epoch chosen. Retraining and the control learn from "
        "labels and from the unpruned network of the same seed (distillation, weight 0.7, temperature 4). Neither "
        "shifts nor distillation are in the paper. Each width is cut from the network of the one before it; 5.87× and "
        "9.97× go on where the paper ends. The paper's accuracies are quoted from memory of its table.",
    ),
)
