"""Networks to prune, and three of them trained: ``zoo.load("resnet20")``.

Builders return untrained networks in training mode; :func:`load` returns one with its embedded checkpoint, in
eval mode. The checkpoints were trained on Fashion-MNIST, one channel of 28×28, normalised as
:mod:`prunelab.datasets` does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from prunelab.errors import PruneLabError, unknown
from prunelab.resources import folder
from prunelab.zoo.lenet import LeNet
from prunelab.zoo.resnet import ResNet, Shortcut
from prunelab.zoo.vgg import SMALL, STAGES, VGG

__all__ = [
    "VGG",
    "LeNet",
    "ResNet",
    "Shortcut",
    "available",
    "lenet",
    "load",
    "record",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
    "vgg_small",
]


def lenet(classes: int = 10) -> LeNet:
    """LeNet 20-50-500 for 28×28 images of one channel (431,080 parameters), arXiv 1607.03250."""
    return LeNet(classes=classes)


def vgg_small(batch_norm: bool = True, in_channels: int = 1, classes: int = 10) -> VGG:
    """Six convolutions of 32, 64 and 128 filters for 28×28 images of one channel (288,170 parameters)."""
    return VGG(SMALL, batch_norm, in_channels, classes)


def vgg11(batch_norm: bool = True, in_channels: int = 3, classes: int = 10) -> VGG:
    """VGG-11 for 32×32 images with one linear classifier."""
    return VGG(STAGES[11], batch_norm, in_channels, classes)


def vgg13(batch_norm: bool = True, in_channels: int = 3, classes: int = 10) -> VGG:
    """VGG-13 for 32×32 images with one linear classifier."""
    return VGG(STAGES[13], batch_norm, in_channels, classes)


def vgg16(batch_norm: bool = True, in_channels: int = 3, classes: int = 10) -> VGG:
    """VGG-16 for 32×32 images with one linear classifier."""
    return VGG(STAGES[16], batch_norm, in_channels, classes)


def vgg19(batch_norm: bool = True, in_channels: int = 3, classes: int = 10) -> VGG:
    """VGG-19 for 32×32 images as in Network Slimming (20,035,018 parameters), arXiv 1708.06519."""
    return VGG(STAGES[19], batch_norm, in_channels, classes)


def resnet20(shortcut: Shortcut = "pad", in_channels: int = 3, classes: int = 10) -> ResNet:
    """ResNet-20 for small images (0.27 M parameters), arXiv 1512.03385."""
    return ResNet(20, shortcut, in_channels, classes)


def resnet32(shortcut: Shortcut = "pad", in_channels: int = 3, classes: int = 10) -> ResNet:
    """ResNet-32 for small images (0.46 M parameters), arXiv 1512.03385."""
    return ResNet(32, shortcut, in_channels, classes)


def resnet44(shortcut: Shortcut = "pad", in_channels: int = 3, classes: int = 10) -> ResNet:
    """ResNet-44 for small images (0.66 M parameters), arXiv 1512.03385."""
    return ResNet(44, shortcut, in_channels, classes)


def resnet56(shortcut: Shortcut = "pad", in_channels: int = 3, classes: int = 10) -> ResNet:
    """ResNet-56 for small images (0.85 M parameters), arXiv 1512.03385."""
    return ResNet(56, shortcut, in_channels, classes)


def resnet110(shortcut: Shortcut = "pad", in_channels: int = 3, classes: int = 10) -> ResNet:
    """ResNet-110 for small images (1.7 M parameters), arXiv 1512.03385."""
    return ResNet(110, shortcut, in_channels, classes)


# How the embedded checkpoints were built, the one place that the training script shares with `load`.
TRAINED: dict[str, Callable[[], nn.Module]] = {
    "lenet": lenet,
    "vgg_small": vgg_small,
    "resnet20": lambda: resnet20(in_channels=1),
}


def available() -> tuple[str, ...]:
    """Names that :func:`load` knows: the networks with an embedded Fashion-MNIST checkpoint."""
    return tuple(TRAINED)


def load(name: str) -> nn.Module:
    """Return the network ``name`` with its embedded checkpoint, in eval mode and float32.

    Takes images ``(images, 1, 28, 28)`` normalised as by :func:`prunelab.datasets.fashion_mnist`, gives
    ``(images, 10)``.

    Raises:
        PruneLabError: if there is no such checkpoint; the message names the nearest ones.
    """
    _check(name)
    model = TRAINED[name]()
    model.load_state_dict(load_file(_file(f"{name}.safetensors")))
    return model.eval()


def record(name: str) -> dict[str, Any]:
    """How the checkpoint ``name`` was trained: command, seed, epochs, … and ``test_accuracy``, from 0 to 1.

    Raises:
        PruneLabError: if there is no such checkpoint.
    """
    _check(name)
    found: dict[str, Any] = json.loads(_file(f"{name}.json").read_text(encoding="utf-8"))
    return found


def _file(name: str) -> Path:
    path = folder("data") / "checkpoints" / name
    if not path.is_file():
        raise PruneLabError(f"The file {name!r} is missing from this installation; install prunelab again.")
    return path


def _check(name: str) -> None:
    if name in TRAINED:
        return
    if name in __all__ and name.startswith(("vgg", "resnet")):
        raise PruneLabError(
            f"The zoo has no checkpoint of {name!r}, only of {', '.join(TRAINED)}; zoo.{name}() builds it untrained."
        )
    raise unknown("checkpoint", str(name), TRAINED)
