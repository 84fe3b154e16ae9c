"""Going on where a GPU's memory does not take a batch: the same images, fewer at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from prunelab.errors import PruneLabError
from prunelab.progress import say_once

T = TypeVar("T")


def halving(work: Callable[[int], T], at_once: int, what: str) -> tuple[T, int]:
    """What work gives, and how many images at once it took.

    Args:
        work: takes how many images at once it may use; begins afresh when it is called again.
        at_once: how many to begin with.
        what: the work, for the message.

    Raises:
        PruneLabError: not even a single image fits.
    """
    while True:
        try:
            return work(at_once), at_once
        except torch.cuda.OutOfMemoryError as error:
            if at_once == 1:
                raise PruneLabError(f"Not even one image fits into the GPU's memory for {what}.") from error
        # Outside the handler: the error's traceback holds the tensors that are to be freed.
        torch.cuda.empty_cache()
        say_once(f"Out of GPU memory in {what} with {at_once} images at once: going on with {at_once // 2}.")
        at_once //= 2
