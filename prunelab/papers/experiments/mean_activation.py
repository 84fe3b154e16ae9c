"""Mean activation: LeNet on MNIST, VGG-16 and ResNet-56 on CIFAR-10, with norms and without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from prunelab.papers.evidence import Measure, measured
from prunelab.papers.experiments.sources import Sets, cifar10, folder
from prunelab.papers.experiments.subjects import LENETS, RESNETS, VGGS, Subject, mnist_on_black
from prunelab.papers.mean_activation import basic_convergence, cut_by_mean_activation
from prunelab.papers.reproduce import Reproduction, Task
from prunelab.train.finetune import finetune


@dataclass(frozen=True)
class Sweep:
    """What is pruned, to what extent, and how long it is trained in all; called with a task, it yields the measures."""

    subjects: Sequence[Subject]
    data: Callable[[Task], Sets]
    ratios: Sequence[float]
    epochs: int

    def __call__(self, task: Task) -> Iterator[Measure]:
        """Every subject to basic convergence; from there, uncut and cut at each ratio, to the end."""
        sets = self.data(task)
        for subject in self.subjects:
            yield from self._sweep(task, subject, sets)

    def _sweep(self, task: Task, subject: Subject, sets: Sets) -> Iterator[Measure]:
        train, val, test = sets
        epochs = 2 if task.short else self.epochs
        basic, settings = subject.new(task), {**subject.settings, "seed": task.seed}
        here = folder(task, subject.name)
        before = basic_convergence(basic, train, val, epochs=epochs, folder=here / "basic", **settings)
        note = f"seed {task.seed}: basic convergence after {before} of {epochs} epochs"
        dense: nn.Module | None = None
        for ratio in (0.0, *(self.ratios[:1] if task.short else self.ratios)):
            # The same network, cut at 0: it has the same training behind it.
            small, _ = cut_by_mean_activation(basic, train, ratio)
            point = f"{subject.name}, {f'{ratio:.0%} of every layer' if ratio else 'dense'}"
            if ratio:
                yield measured(small, test, point=point, method="mean_activation", stage="cut")
            on = {**settings, "epochs": epochs - before, "folder": here / f"on-{ratio}"}
            finetune(small, train, val, progress=False, **on)
            stage, method = ("trained", "mean_activation") if dense is not None else ("dense", "dense")
            timed = None if task.short else dense
            yield measured(
                small, test, point=point, method=method, stage=stage, dense=timed, note="" if ratio else note
            )
            dense = dense or small


_REMARKS = (
    "Every network is trained to basic convergence first (at a constant rate, until the training loss moves by less "
    "than 1 % over five epochs or half of the epochs are done). From there it is trained to the end uncut ('dense') "
    "and cut at each ratio, for the same number of epochs along half a cosine. Activations are averaged over all "
    "training images. The paper's figures could not be had."
)

REPRODUCTIONS = (
    Reproduction(
        name="mean-activation-lenet",
        summary="Mean activation on LeNet and MNIST, without batch norm and with it.",
        expected="about 2 min of one processor core",
        run=Sweep(LENETS, mnist_on_black, (0.5, 0.75), epochs=6),
        remarks=_REMARKS,
    ),
    Reproduction(
        name="mean-activation-vgg16",
        summary="Mean activation on VGG-16 and CIFAR-10, without batch norm and with it.",
        expected="about 2 h on one data-centre GPU, estimated; not run",
        run=Sweep(VGGS, cifar10, (0.2, 0.3, 0.4, 0.5, 0.6), epochs=160),
        gpu=True,
        remarks=_REMARKS,
    ),
    Reproduction(
        name="mean-activation-resnet56",
        summary="Mean activation on ResNet-56 and CIFAR-10, trained from scratch; inner convolutions.",
        expected="about 2 h on one data-centre GPU, estimated; not run",
        run=Sweep(RESNETS, cifar10, (0.2, 0.3, 0.4, 0.5, 0.6), epochs=160),
        gpu=True,
        remarks=_REMARKS,
    ),
)
