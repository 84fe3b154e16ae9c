"""Augmentation of batches, against the same done to one image after another."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torch import Tensor

import prunelab as pl
from prunelab.train.augment import Augment, cropped, flipped, without_square

IMAGES = torch.randn(40, 3, 9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LYING = {
    "contiguous": IMAGES,
    "channels_last": IMAGES.contiguous(memory_format=torch.channels_last),
    "parts": IMAGES.repeat_interleave(2, 3)[..., ::2],
    "grey": IMAGES[:, :1],
}
layouts = pytest.mark.parametrize("images", LYING.values(), ids=LYING)


def whole(stop: int, seed: int, start: int = 0) -> Tensor:
    return torch.randint(start, stop, (len(IMAGES),), generator=torch.Generator().manual_seed(seed))


@layouts
def test_chosen_images_are_mirrored(images: Tensor) -> None:
    chosen = whole(2, 1) == 1
    expected = [tv.horizontal_flip(image) if c else image for image, c in zip(images, chosen, strict=True)]
    assert torch.equal(flipped(images, chosen), torch.stack(expected))


@layouts
@pytest.mark.parametrize("padding", [0, 1, 4, 12])
def test_crops_are_windows_of_the_padded_image(padding: int, images: Tensor) -> None:
    top, left = whole(2 * padding + 1, 1), whole(2 * padding + 1, 2)
    expected = [
        tv.crop(tv.pad(image, [padding] * 4), t, p, 9, 7)
        for image, t, p in zip(images, top.tolist(), left.tolist(), strict=True)
    ]
    assert torch.equal(cropped(images, padding, top, left), torch.stack(expected))


@layouts
@pytest.mark.parametrize("size", [0, 1, 3, 20])
def test_squares_are_cut_out_as_far_as_they_lie_inside(size: int, images: Tensor) -> None:
    row, column = whole(9, 1, -3), whole(7, 2, -3)
    expected = images.clone()
    for image, r, c in zip(expected, row.tolist(), column.tolist(), strict=True):
        image[:, max(r, 0) : max(r + size, 0), max(c, 0) : max(c + size, 0)] = 0
    assert torch.equal(without_square(images, size, row, column), expected)


def test_channels_last_images_stay_that() -> None:
    found = Augment(flip=True, crop=2, cutout=3)(LYING["channels_last"], torch.Generator())
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, Augment(flip=True, crop=2, cutout=3)(IMAGES, torch.Generator()))


def test_the_generator_decides_and_the_given_images_stay() -> None:
    before = IMAGES.clone()
    augment = Augment(flip=True, crop=2, cutout=3)
    first, same, other = (augment(IMAGES, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(IMAGES, before)
    assert torch.equal(Augment()(IMAGES, torch.Generator()), IMAGES)


def test_every_flip_window_and_square_is_drawn_about_as_often_as_every_other() -> None:
    images = torch.ones(1, 1, 5, 5)
    images[..., 0] = 2.0
    many = images.expand(20000, 1, 5, 5)
    flips = Augment(flip=True)(many, torch.Generator().manual_seed(0))
    assert abs(float((flips[:, 0, 0, 4] == 2).double().mean()) - 0.5) < 0.02
    # Padded by one, a window reaches over the upper edge one time in three, and over the lower one as often.
    crops = Augment(crop=1)(many, torch.Generator().manual_seed(0))
    assert abs(float((crops[:, 0, 0, 2] == 0).double().mean()) - 1 / 3) < 0.02
    assert abs(float((crops[:, 0, 4, 2] == 0).double().mean()) - 1 / 3) < 0.02
    holes = (Augment(cutout=1)(many, torch.Generator().manual_seed(0)) == 0).double().mean(0)
    torch.testing.assert_close(holes, torch.full_like(holes, 1 / 25), atol=0.008, rtol=0)


@pytest.mark.parametrize("images", [torch.zeros(4, 3, 8), torch.zeros(4, 3, 8, 8, dtype=torch.uint8)])
def test_what_is_no_batch_of_images_is_refused(images: Tensor) -> None:
    with pytest.raises(pl.PruneLabError, match="Augmentation needs a floating-point batch"):
        Augment(flip=True)(images, torch.Generator())


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(pl.PruneLabError, match="0 pixels or more"):
        Augment(crop=-1)
