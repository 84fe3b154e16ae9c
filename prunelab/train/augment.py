"""Augmentation of whole batches, where the batch lies: flips, padded crops, cutout.

The functions without random numbers take, for every image, what is to be done to it; :class:`Augment` draws that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from prunelab.errors import PruneLabError


def flipped(images: Tensor, chosen: Tensor) -> Tensor:
    """Images with some of them mirrored left to right.

    Args:
        images: shape ``(images, channels, height, width)``.
        chosen: which, boolean, shape ``(images,)``.
    """
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(3), images)


def cropped(images: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """Windows of the images' own size out of images with a border of zeros.

    Args:
        images: shape ``(images, channels, height, width)``.
        padding: width of the border, in pixels.
        top, left: where each window begins, 0 to ``2 * padding``, whole numbers of shape ``(images,)``.
    """
    count, channels, height, width = images.shape
    wide = width + 2 * padding
    rows = top.view(-1, 1, 1) + torch.arange(height, device=images.device).view(1, -1, 1)
    columns = left.view(-1, 1, 1) + torch.arange(width, device=images.device)
    pixels = (rows * wide + columns).view(count, 1, -1).expand(-1, channels, -1)
    return pad(images, (padding,) * 4).flatten(2).gather(2, pixels).view(images.shape)


def without_square(images: Tensor, size: int, row: Tensor, column: Tensor) -> Tensor:
    """Images with a square of zeros in each, the part of it that lies outside cut off.

    Args:
        images: shape ``(images, channels, height, width)``.
        size: side of the square, in pixels.
        row, column: its upper left corner, whole numbers of shape ``(images,)``; may lie outside.
    """
    down = torch.arange(images.shape[2], device=images.device) - row.view(-1, 1)
    right = torch.arange(images.shape[3], device=images.device) - column.view(-1, 1)
    rows, columns = (down >= 0) & (down < size), (right >= 0) & (right < size)
    return images.masked_fill((rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1), 0.0)


@dataclass(frozen=True)
class Augment:
    """What is done to every batch of training images. Zero is the mean colour of images that are normalised.

    Attributes:
        flip: mirror every image with probability one half.
        crop: pad by this many pixels and take a random window of the images' own size, as He et al. 2016,
            arXiv 1512.03385, section 4.2.
        cutout: zero a square of this side around a random pixel, as DeVries and Taylor 2017, arXiv 1708.04552.
    """

    flip: bool = False
    crop: int = 0
    cutout: int = 0

    def __post_init__(self) -> None:
        if self.crop < 0 or self.cutout < 0:
            raise PruneLabError("The crop's padding and the cutout's side must be 0 pixels or more.")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The batch, augmented; the given one stays as it is.

        Args:
            images: floating point, shape ``(images, channels, height, width)``.
            generator: of the random numbers, on the images' device.

        Raises:
            PruneLabError: they are no such images.
        """
        if images.ndim != 4 or not images.is_floating_point():
            raise PruneLabError(
                "Augmentation needs a floating-point batch (images, channels, height, width), not "
                f"{images.dtype} of shape {tuple(images.shape)}."
            )
        count, _, height, width = images.shape

        def drawn(stop: int) -> Tensor:
            return torch.randint(stop, (count,), generator=generator, device=images.device)

        if self.flip:
            images = flipped(images, drawn(2) == 1)
        if self.crop:
            images = cropped(images, self.crop, drawn(2 * self.crop + 1), drawn(2 * self.crop + 1))
        if self.cutout:
            half = self.cutout // 2
            images = without_square(images, self.cutout, drawn(height) - half, drawn(width) - half)
        return images
