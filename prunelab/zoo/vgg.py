"""VGG networks for small images (Simonyan & Zisserman 2015, arXiv 1409.1556), with one linear classifier.

The CIFAR form is that of Network Slimming (Liu et al. 2017, arXiv 1708.06519): convolutions without bias,
each followed by batch norm and ReLU, a global average at the end and a single linear layer, so that VGG-19
has 20,035,018 parameters.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

Stages = tuple[tuple[int, ...], ...]

STAGES: dict[int, Stages] = {
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    13: ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}
SMALL: Stages = ((32,) * 2, (64,) * 2, (128,) * 2)


def _stage(in_channels: int, widths: Sequence[int], batch_norm: bool, pool: bool) -> nn.Sequential:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for number, width in enumerate(widths, start=1):
        parts[f"conv{number}"] = nn.Conv2d(in_channels, width, 3, padding=1, bias=not batch_norm)
        if batch_norm:
            parts[f"norm{number}"] = nn.BatchNorm2d(width)
        parts[f"relu{number}"] = nn.ReLU()
        in_channels = width
    if pool:
        parts["pool"] = nn.MaxPool2d(2)
    return nn.Sequential(parts)


class VGG(nn.Module):
    """Stages of 3×3 convolutions with max pooling between them, a global average and a linear classifier.

    Maps ``(images, in_channels, height, width)`` to logits ``(images, classes)``; height and width must be at
    least ``2 ** (len(stages) - 1)``. Convolution ``k`` of stage ``s`` is the module ``stage{s}.conv{k}`` (the
    papers' CONV5-3 is ``stage5.conv3``). Without batch norm the convolutions have biases.
    """

    def __init__(self, stages: Stages, batch_norm: bool = True, in_channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        named: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for number, widths in enumerate(stages, start=1):
            named[f"stage{number}"] = _stage(channels, widths, batch_norm, pool=number < len(stages))
            channels = widths[-1]
        self.names = tuple(named)
        for name, stage in named.items():
            self.add_module(name, stage)
        self.classifier = nn.Linear(channels, classes)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(images, classes)`` for images ``(images, in_channels, height, width)``."""
        for name in self.names:
            x = self.get_submodule(name)(x)
        pooled = functional.adaptive_avg_pool2d(x, 1).flatten(1)
        logits: Tensor = self.classifier(pooled)
        return logits
