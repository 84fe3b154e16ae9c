"""Networks that the reproductions prune, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from prunelab import zoo
from prunelab.datasets import ImageSet
from prunelab.papers.experiments.sources import Sets, mnist
from prunelab.papers.reproduce import Task
from prunelab.train.augment import Augment


@dataclass(frozen=True)
class Subject:
    """A network to prune.

    Attributes:
        name: for the table.
        make: gives it, untrained; takes whether the run is short, for which a smaller one will do.
        settings: of its training, as for :func:`prunelab.finetune`, but for epochs and seed.
    """

    name: str
    make: Callable[[bool], nn.Module]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def new(self, task: Task) -> nn.Module:
        """The network with weights of the task's seed."""
        torch.manual_seed(task.seed)
        return self.make(task.short)


def mnist_on_black(task: Task) -> Sets:
    """MNIST with zero for black, not for the mean: what a padded crop brings in is background."""
    train, val, test = (_on_black(each) for each in mnist(task))
    return train, val, test


def _on_black(data: ImageSet) -> ImageSet:
    black = torch.tensor(data.mean).view(1, -1, 1, 1) / torch.tensor(data.std).view(1, -1, 1, 1)
    return replace(data, images=data.images + black, mean=(0.0,) * len(data.mean))


def _normed_lenet() -> nn.Module:
    """LeNet 20-50-500-10 with a batch norm after every layer but the last."""
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5, bias=False), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 50, 5, bias=False), nn.BatchNorm2d(50), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(800, 500, bias=False), nn.BatchNorm1d(500), nn.ReLU(), nn.Linear(500, 10)),
    )


def _vgg(norm: bool, short: bool) -> nn.Module:
    return zoo.VGG(((8, 8), (16, 16)), norm) if short else zoo.vgg16(norm)


def _resnet(short: bool) -> nn.Module:
    return zoo.ResNet(8) if short else zoo.resnet56()


_SHIFTED: Mapping[str, Any] = {"augment": Augment(crop=2), "batch_size": 128, "lr": 0.05}
_FLIPPED: Mapping[str, Any] = {"augment": Augment(flip=True, crop=4), "batch_size": 128, "lr": 0.1}

LENETS = (
    Subject("LeNet", lambda short: zoo.lenet(), _SHIFTED),
    Subject("LeNet with norms", lambda short: _normed_lenet(), _SHIFTED),
)
VGGS = (
    # Without norms a rate of 0.1 does not train thirteen convolutions.
    Subject("VGG-16 without norms", partial(_vgg, False), {**_FLIPPED, "lr": 0.02}),
    Subject("VGG-16", partial(_vgg, True), _FLIPPED),
)
RESNETS = (Subject("ResNet-56", _resnet, _FLIPPED),)
