"""Network Trimming by its rule on VGG-16 and ResNet-56 for CIFAR-10, with training from scratch beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunelab.papers.evidence import Measure, measured
from prunelab.papers.experiments.sources import Sets, cifar10, folder
from prunelab.papers.experiments.subjects import RESNETS, VGGS, Subject
from prunelab.papers.mean_activation import inner_layers
from prunelab.papers.network_trimming import trimmings
from prunelab.papers.reproduce import Reproduction, Task
from prunelab.papers.scratch import from_scratch, he_weights
from prunelab.program.program import trace
from prunelab.train.finetune import finetune


def by_rule(
    task: Task, name: str, dense: nn.Module, sets: Sets, rounds: int, **settings: Any
) -> Iterator[tuple[Measure, nn.Module]]:
    """Rounds of trimming by mean + 1 σ of APoZ, measured, each with its network.

    Args:
        name: goes before the points' names.
        settings: as for :func:`prunelab.papers.network_trimming.trimmings`.
    """
    train, val, test = sets
    for number, (found, small) in enumerate(trimmings(dense, train, val, rounds=rounds, **settings), start=1):
        widths = "-".join(map(str, found.widths.values()))
        note = f"seed {task.seed}: {widths}" + ("" if found.taken else ", lost too much: not taken")
        timed = None if task.short else dense
        point = f"{name}rule, round {number}"
        yield measured(small, test, point=point, method="apoz", stage="trained", dense=timed, note=note), small


@dataclass(frozen=True)
class Rounds:
    """What is trimmed, and for how long it is trained; called with a task, it yields the measures.

    Attributes:
        epochs: of the unpruned network; ``again``: after each round.
    """

    subjects: Sequence[Subject]
    data: Callable[[Task], Sets]
    epochs: int
    again: int
    rounds: int

    def __call__(self, task: Task) -> Iterator[Measure]:
        """Every subject: unpruned, after every round, and the last round's widths from scratch."""
        sets = self.data(task)
        for subject in self.subjects:
            yield from self._trimmed(task, subject, sets)

    def _trimmed(self, task: Task, subject: Subject, sets: Sets) -> Iterator[Measure]:
        train, val, test = sets
        epochs, again, rounds = (1, 1, 1) if task.short else (self.epochs, self.again, self.rounds)
        common: Mapping[str, Any] = {**subject.settings, "seed": task.seed}
        dense, here = subject.new(task), folder(task, subject.name)
        finetune(dense, train, val, folder=here / "dense", progress=False, **{**common, "epochs": epochs})
        yield measured(dense, test, point=f"{subject.name}, dense", method="dense", stage="dense")
        rate = common["lr"]
        layers = inner_layers(trace(dense, val.images[:2]))
        retraining = {**common, "lr": rate / 10, "epochs": again, "folder": here / "rule", "layers": layers}
        last: tuple[Measure, nn.Module] | None = None
        for last in by_rule(task, f"{subject.name}, ", dense, sets, rounds, **retraining):
            epochs += again
            yield last[0]
        if last is not None:
            point, small = last[0].point, last[1]
            torch.manual_seed(task.seed)
            control = {**common, "epochs": epochs, "weights": he_weights, "folder": here / "scratch"}
            fresh = from_scratch(small, train, val, **control)
            yield measured(fresh, test, point=point, method="scratch", stage="trained", note=f"{epochs} epochs")


_REMARKS = (
    "Neurons go whose APoZ lies more than one standard deviation above the mean of their layer, first in the two "
    "layers of the highest mean APoZ, then in their neighbours too; APoZ is measured on 5,000 training images held "
    "out. 'Scratch' has new weights in the widths of the last round and is trained as long as all before it together. "
    "The paper has no figures for CIFAR-10."
)

REPRODUCTIONS = (
    Reproduction(
        name="network-trimming-vgg16",
        summary="Network Trimming by its rule on VGG-16 and CIFAR-10, without batch norm and with it.",
        expected="about 2 h on one data-centre GPU, estimated; not run",
        run=Rounds(VGGS, cifar10, epochs=160, again=20, rounds=8),
        gpu=True,
        remarks=_REMARKS,
    ),
    Reproduction(
        name="network-trimming-resnet56",
        summary="Network Trimming by its rule on ResNet-56 and CIFAR-10, trained from scratch; inner convolutions.",
        expected="about 2 h on one data-centre GPU, estimated; not run",
        run=Rounds(RESNETS, cifar10, epochs=160, again=20, rounds=8),
        gpu=True,
        remarks=_REMARKS,
    ),
)
