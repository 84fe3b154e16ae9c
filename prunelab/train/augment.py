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
    which = chosen.nonzero().squeeze(1).to(images.device, non_blocking=True)
    found = _whole(images).clone()
    # An image is one piece of memory in either layout, if its dimensions stand as they lie there.
    lying, width = (found, 3) if found.is_contiguous() else (found.permute(0, 2, 3, 1), 2)
    lying.index_copy_(0, which, lying.index_select(0, which).flip(width))
    return found


def cropped(images: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """Windows of the images' own size out of images with a border of zeros.

    Args:
        images: shape ``(images, channels, height, width)``.
        padding: width of the border, in pixels.
        top, left: where each window begins, 0 to ``2 * padding``, whole numbers of shape ``(images,)``.
    """
    count, channels, height, width = images.shape
    bordered = pad(_whole(images), (padding,) * 4)
    each, channel, row, column = bordered.stride()
    apart = bordered.is_contiguous()  # a channel after the other, not a pixel after the other
    # Lines of a window lie in one piece: copied whole, they take a third of the time of single pixels.
    length = width if apart else width * channels
    lines = torch.arange(height, device=images.device) * row
    if apart:
        lines = (torch.arange(channels, device=images.device).view(-1, 1) * channel + lines).flatten()
    corners = torch.arange(count, device=images.device) * each + top * row + left * column
    starts = (corners.view(-1, 1) + lines).flatten()
    windows = bordered.as_strided((bordered.numel() - length + 1, length), (1, 1)).index_select(0, starts)
    if apart:
        return windows.view(images.shape)
    return windows.view(count, height, width, channels).permute(0, 3, 1, 2)


def _whole(images: Tensor) -> Tensor:
    """Images in one piece of memory, ``channels_last`` if they are that."""
    return images if images.is_contiguous(memory_format=torch.channels_last) else images.contiguous()


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
    return images.clone().masked_fill_((rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1), 0.0)


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
            generator: of the random numbers; one on the CPU gives the same ones on every device, and none waits.

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
            return torch.randint(stop, (count,), generator=generator, device=generator.device)

        def placed(stop: int) -> Tensor:
            return drawn(stop).to(images.device, non_blocking=True)

        if self.flip:
            images = flipped(images, drawn(2) == 1)
        if self.crop:
            top, left = (placed(2 * self.crop + 1) for _ in range(2))
            images = cropped(images, self.crop, top, left)
        if self.cutout:
            row, column = (placed(size) - self.cutout // 2 for size in (height, width))
            images = without_square(images, self.cutout, row, column)
        return images
