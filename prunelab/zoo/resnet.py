"""ResNets for small images (He et al. 2016, arXiv 1512.03385, section 4.2), of depth 6n + 2 in three stages.

Parameter names follow the widely used CIFAR-10 checkpoints by Yerlan Idelbayev (``layer1.0.conv1.weight``,
``linear.bias``), so that those load once their ``module.`` prefix is stripped.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunelab.errors import PruneLabError

Shortcut = Literal["pad", "projection"]
WIDTHS = (16, 32, 64)


class PadShortcut(nn.Module):
    """Option A: every second row and column, with channels of zeros before and after.

    Maps ``(images, channels, height, width)`` to ``(images, before + channels + after, height/2,
    width/2)``, halves rounded up. The zeros are buffers ``(1, before, 1, 1)`` and ``(1, after, 1, 1)``, left
    out of the state dict.
    """

    before: Tensor
    after: Tensor

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        # A buffer, unlike a literal pad width, has one slot per padded channel, which pruning can slice.
        self.register_buffer("before", torch.zeros(1, before, 1, 1), persistent=False)
        self.register_buffer("after", torch.zeros(1, after, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the halved and padded ``x``."""
        x = x[:, :, ::2, ::2]
        images, _, height, width = x.shape
        before = self.before.expand(images, -1, height, width)
        after = self.after.expand(images, -1, height, width)
        return torch.cat([before, x, after], 1)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm, added to a shortcut; the first may halve the image."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels:
            self.shortcut = _shortcut(in_channels, channels, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(images, in_channels, height, width)`` to ``channels`` maps, each side over ``stride``."""
        inner = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


def _shortcut(in_channels: int, channels: int, stride: int, kind: Shortcut) -> nn.Module:
    if kind == "pad":
        before = (channels - in_channels) // 2
        return PadShortcut(before, channels - in_channels - before)
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))


class ResNet(nn.Module):
    """Three stages of ``(depth - 2) / 6`` basic blocks with 16, 32 and 64 channels.

    Maps ``(images, in_channels, height, width)`` to logits ``(images, classes)``. ``shortcut`` is ``"pad"``
    (option A, no parameters) or ``"projection"`` (option B, a 1×1 convolution with batch norm where the width
    changes).

    Raises:
        PruneLabError: if ``depth`` is not 6n + 2 or ``shortcut`` is unknown.
    """

    def __init__(self, depth: int, shortcut: Shortcut = "pad", in_channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise PruneLabError(f"A ResNet for small images has depth 6n + 2, such as 20 or 56, not {depth}.")
        if shortcut not in ("pad", "projection"):
            raise PruneLabError(f"The shortcut of a ResNet must be 'pad' or 'projection', not {shortcut!r}.")
        blocks = (depth - 2) // 6
        first, second, third = WIDTHS
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _stage(first, first, blocks, shortcut)
        self.layer2 = _stage(first, second, blocks, shortcut)
        self.layer3 = _stage(second, third, blocks, shortcut)
        self.linear = nn.Linear(third, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(images, classes)`` for images ``(images, in_channels, height, width)``."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def _stage(in_channels: int, channels: int, blocks: int, shortcut: Shortcut) -> nn.Sequential:
    stride = 1 if in_channels == channels else 2
    first = BasicBlock(in_channels, channels, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1, shortcut) for _ in range(blocks - 1)))
