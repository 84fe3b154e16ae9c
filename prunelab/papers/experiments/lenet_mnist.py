"""Network Trimming on LeNet and MNIST: the paper's widths, the paper's rule, and retraining from scratch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunelab import zoo
from prunelab.commit import commit
from prunelab.papers.evidence import Measure, measured
from prunelab.papers.experiments.sources import Sets, folder
from prunelab.papers.experiments.subjects import LENETS, mnist_on_black
from prunelab.papers.experiments.trimming_rule import by_rule
from prunelab.papers.network_trimming import to_widths
from prunelab.papers.reproduce import Reproduction, Task
from prunelab.papers.scratch import from_scratch
from prunelab.profile.capture import profile
from prunelab.program.program import trace
from prunelab.train.finetune import finetune

SUBJECT = LENETS[0]
EPOCHS = 15
ROUNDS, ROUND_EPOCHS = 3, 1


@dataclass(frozen=True)
class Point:
    """Filters of conv2 and neurons of fc1 that are left, and epochs of retraining."""

    conv2: int
    fc1: int
    epochs: int


POINTS: Mapping[str, Point] = {
    "1.41×": Point(41, 426, 5),
    "2.23×": Point(31, 349, 5),
    "3.11×": Point(26, 293, 5),
    "3.85×": Point(24, 252, 15),
    "5.87×": Point(20, 190, 5),
}
"""By compression: four of the paper, and one beyond."""

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
    """Train LeNet; cut it to the paper's widths one after the other, and by its rule; and train from scratch."""
    sets = train, val, test = mnist_on_black(task)
    epochs, rounds = (1, 1) if task.short else (EPOCHS, ROUNDS)
    dense = SUBJECT.new(task)
    settings = {**SUBJECT.settings, "seed": task.seed}
    finetune(dense, train, val, folder=folder(task, "dense"), progress=False, **{**settings, "epochs": epochs})
    yield measured(dense, test, point="dense", method="dense", stage="dense", note=f"{epochs} epochs")
    settings |= {"teacher": dense, "temperature": 4.0, "teacher_weight": 0.7}
    yield from _widths(task, dense, sets, settings)
    retraining = {**settings, "lr": settings["lr"] / 10, "epochs": ROUND_EPOCHS, "folder": folder(task, "rule")}
    for found, _ in by_rule(task, "", dense, sets, rounds, **retraining):
        yield found
    yield _from_scratch(task, sets, settings)


def _widths(task: Task, dense: nn.Module, sets: Sets, settings: Mapping[str, Any]) -> Iterator[Measure]:
    """To each of the widths, from the network of the one before."""
    train, val, test = sets
    now, spent = dense, 1 if task.short else EPOCHS
    for point, left in POINTS.items():
        program = trace(now, val.images[:2])
        zeros = profile(program, val, progress=False)
        plan = to_widths(program, {"conv2": left.conv2, "fc1": left.fc1})
        now = commit(program, plan.resolve(program, zeros))
        yield measured(now, test, point=point, method="apoz", stage="cut")
        epochs = 1 if task.short else left.epochs
        finetune(now, train, val, folder=folder(task, point), progress=False, **{**settings, "epochs": epochs})
        spent += epochs
        note = f"{spent} epochs in all, {epochs} of them after this cut"
        timed = None if task.short else dense
        yield measured(now, test, point=point, method="apoz", stage="trained", dense=timed, note=note)
        if task.short:
            break


def _from_scratch(task: Task, sets: Sets, settings: Mapping[str, Any]) -> Measure:
    """The control: new weights in the same widths, for as many epochs as there were up to there."""
    train, val, test = sets
    names = list(POINTS)
    before = [POINTS[name] for name in names[: names.index(CONTROL) + 1]]
    epochs = 1 if task.short else EPOCHS + sum(point.epochs for point in before)
    torch.manual_seed(task.seed)
    like = zoo.LeNet((20, before[-1].conv2, before[-1].fc1))
    fresh = from_scratch(like, train, val, folder=folder(task, "scratch"), **{**settings, "epochs": epochs})
    note = f"new weights, {epochs} epochs, the same teacher"
    return measured(fresh, test, point=CONTROL, method="scratch", stage="trained", note=note)


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
        "shifts nor distillation are in the paper. Each width is cut from the network of the one before it and "
        "retrained from the first learning rate on: at a tenth of it, which the rule's rounds take, accuracy on the "
        "held-out images came back by less in as many epochs. 5.87× goes on where the paper ends. The paper's "
        "accuracies are second hand.",
    ),
)
