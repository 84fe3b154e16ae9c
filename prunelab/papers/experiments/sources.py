"""Data and checkpoints of the reproductions, from one folder DIR.

    DIR/MNIST/raw/…                  torchvision's layout
    DIR/cifar10.npz                  x_train, y_train, x_test, y_test (uint8), or DIR/cifar-10-batches-py/…
    DIR/resnet56-4bfd9763.th         ResNet-56 trained on CIFAR-10, by Yerlan Idelbayev

A short run reads nothing from it: it takes a few of the embedded Fashion-MNIST images, in the shape of the set that it
stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import pad

from prunelab import datasets, zoo
from prunelab.datasets import ImageSet, Statistics
from prunelab.errors import PruneLabError
from prunelab.papers.reproduce import Task

Sets = tuple[ImageSet, ImageSet, ImageSet]
"""Training, validation and test images. Validation images are held out of the training set."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What the checkpoint of ResNet-56 was trained with."""

RESNET56 = "resnet56-4bfd9763.th"
_SHORT = (300, 200, 200)
_ADVICE = "to fetch it: python -c \"from prunelab import datasets; datasets.{name}('{folder}', download=True)\""


def mnist(task: Task, held_out: int = 5_000) -> Sets:
    """MNIST: 60,000 training images but for those held out, the held out, and 10,000 test images.

    Raises:
        PruneLabError: it is not in the folder of the data; says how to fetch it.
    """
    return _embedded() if task.short else _split(*_full(task, "mnist"), held_out)


def embedded(task: Task, held_out: int = 1_000) -> Sets:
    """The embedded Fashion-MNIST: 10,000 training images but for those held out, the held out, and 10,000 to test."""
    return _embedded() if task.short else _split(*datasets.fashion_mnist(), held_out)


def cifar10(
    task: Task,
    held_out: int = 5_000,
    mean: Statistics = datasets.CIFAR10_MEAN,
    std: Statistics = datasets.CIFAR10_STD,
) -> Sets:
    """CIFAR-10: 50,000 training images but for those held out, the held out, and 10,000 test images.

    Raises:
        PruneLabError: it is not in the folder of the data; says how to fetch it.
    """
    if task.short:
        train, val, test = (_in_colour(each) for each in _embedded())
        return train, val, test
    if (task.data / "cifar10.npz").is_file():
        return _split(*datasets.npz(task.data / "cifar10.npz", mean=mean, std=std, name="CIFAR-10"), held_out)
    return _split(*_full(task, "cifar10", mean=mean, std=std), held_out)


def resnet56(task: Task) -> zoo.ResNet:
    """ResNet-56 trained on CIFAR-10 with images normalised as ImageNet's; untrained in a short run.

    Raises:
        PruneLabError: the checkpoint is not in the folder of the data; says where it is from.
    """
    model = zoo.resnet56()
    if task.short:
        return model.eval()
    path = task.data / RESNET56
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        found = loaded.get("state_dict", loaded)
        model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in found.items()})
    except Exception as error:
        raise PruneLabError(
            f"The checkpoint {path} could not be read: {error}. It is one of the pretrained models of "
            "https://github.com/akamaster/pytorch_resnet_cifar10."
        ) from error
    return model.eval()


def _full(task: Task, name: str, **settings: Statistics) -> tuple[ImageSet, ImageSet]:
    read: Callable[..., tuple[ImageSet, ImageSet]] = getattr(datasets, name)
    try:
        return read(task.data, **settings)
    except PruneLabError as error:
        advice = _ADVICE.format(name=name, folder=task.data)
        raise PruneLabError(f"{str(error).partition(';')[0]}; {advice}") from error


def _split(train: ImageSet, test: ImageSet, held_out: int) -> Sets:
    """The validation images are the same for every seed, so that what was chosen on them holds for all."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    val, rest = (
        replace(train, images=train.images[part], labels=train.labels[part])
        for part in (order[:held_out], order[held_out:])
    )
    return rest, val, test


def _embedded() -> Sets:
    train, test = datasets.fashion_mnist()
    few, val, seen = _SHORT
    first, second, _ = _split(train.subset(few + val), test, val)
    return first, second, test.subset(seen)


def _in_colour(data: ImageSet) -> ImageSet:
    """Grey images of 28×28 as three equal channels of 32×32, in the shape of CIFAR-10's."""
    images = pad(data.images, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous()
    return replace(data, images=images, mean=data.mean * 3, std=data.std * 3)


def folder(task: Task, name: str) -> Path:
    """Where the checkpoints of one training go."""
    return task.work / name.replace("/", "-").replace(" ", "-")
