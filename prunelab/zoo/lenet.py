"""LeNet 20-50-500-10, from the first table of Network Trimming (Hu et al. 2016, arXiv 1607.03250)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class LeNet(nn.Module):
    """Caffe's LeNet for one-channel 28×28 images, with a ReLU after each layer but the last.

    Maps ``(images, 1, 28, 28)`` to logits ``(images, classes)``; 431,080 parameters with the default widths.
    ``widths`` are the filters of ``conv1`` and ``conv2`` and the neurons of ``fc1``.
    """

    def __init__(self, widths: tuple[int, int, int] = (20, 50, 500), classes: int = 10) -> None:
        super().__init__()
        first, second, hidden = widths
        self.conv1 = nn.Conv2d(1, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(second * 4 * 4, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(images, classes)`` for images ``(images, 1, 28, 28)``."""
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        x = functional.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc2(x)
        return logits
