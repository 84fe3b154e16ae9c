"""One pass over the data: what comes by at every site is added up, and of the first images kept."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunelab.errors import PruneLabError
from prunelab.profile import shards
from prunelab.profile.batches import batches, batches_after, check_images, inputs_of
from prunelab.profile.quick import Runner, quickest
from prunelab.profile.result import Profile, fits, site_axes
from prunelab.profile.statistics import Gathering
from prunelab.program.nodes import Node
from prunelab.progress import Progress, track

# Images that run at once: few enough for the processor's cache, enough that calling operators costs little.
_AT_ONCE = 128


def observe(empty: Profile, data: Any, batch_size: int, progress: Progress | bool, folder: Path | None) -> Profile:
    """Run the network once over data.

    Args:
        empty: the profile of no images, with the room that it has.
        folder: where shards are written and an interrupted pass is taken up, or None.

    Raises:
        PruneLabError, Stopped: as :func:`prunelab.profile.capture.profile`.
    """
    begun = shards.load(folder, empty) if folder is not None else None
    if begun is None or not fits(begun):
        begun = empty
    loader, total = batches(data, batch_size)
    at = 0
    what = "profile"
    if begun.images:
        loader, at = batches_after(data, batch_size, begun.images)
        what = f"profile, taken up after {begun.images:,} images"
    run = _Pass(begun, folder)
    size = getattr(data, "batch_size", None) or batch_size
    for batch in track(loader, what, total, progress, at // size):
        inputs = inputs_of(empty.program, batch)
        check_images(empty.program, inputs)
        count = len(inputs[0])
        # Images that an earlier pass has counted are read here, but not run.
        run.add(inputs, min(count, max(0, begun.images - at)), count)
        at += count
    if not run.images:
        raise PruneLabError("There are no images to profile: the loader is empty.")
    return run.profile()


class _Pass:
    """Takes in batches: statistics of all images, activations and pooled responses of the first."""

    def __init__(self, begun: Profile, folder: Path | None) -> None:
        self.images = self.saved = begun.images
        self._count = 0
        self._program = begun.program
        self._room = begun.room
        self._folder = folder
        self._axes = site_axes(begun.program)
        self._statistics = dict(begun.statistics)
        self._gathered = {s: Gathering(a, _nonnegative(self._program.nodes[s])) for s, a in self._axes.items()}
        self._activations = _Kept(begun.room[0], begun.activations)
        self._pooled = _Kept(begun.room[1], begun.pooled, torch.float32)
        self._watch = {site: partial(self._take, site) for site in self._axes}
        self._runner: Runner | None = None

    def add(self, inputs: tuple[Tensor, ...], start: int, stop: int) -> None:
        """Run the images of a batch from ``start`` to ``stop``, some at a time; what a shard has behind it is kept."""
        while start < stop:
            end = min(stop, start + _AT_ONCE, start + shards.SHARD - self.images % shards.SHARD)
            if self._program.batch is not None:
                end = stop
            self._count = end - start
            self._run(self._cut(inputs, start, end))
            self.images += self._count
            start = end
            if self.images // shards.SHARD > self.saved // shards.SHARD:
                self._end_shard()

    def profile(self) -> Profile:
        """All that is known so far."""
        for site, gathering in self._gathered.items():
            new = gathering.take()
            if new is not None:
                self._statistics[site] = self._statistics[site].merge(new) if site in self._statistics else new
        kept = (self._activations.first(self.images), self._pooled.first(self.images))
        return Profile(self._program, self.images, dict(self._statistics), kept[0], None, kept[1], self._room)

    def _cut(self, inputs: tuple[Tensor, ...], start: int, end: int) -> tuple[Tensor, ...]:
        nodes = (node for node in self._program.nodes if node.kind == "input")
        return tuple(x[start:end] if node.batched[:1] == (True,) else x for x, node in zip(inputs, nodes, strict=True))

    def _run(self, inputs: tuple[Tensor, ...]) -> None:
        if self._runner is None:
            some = inputs if self._program.batch is not None else self._cut(inputs, 0, 2)
            self._runner = quickest(self._program, self._axes, some)
        self._runner.run(inputs, self._watch)

    def _take(self, site: int, value: Tensor) -> None:
        gathering = self._gathered[site]
        means = gathering.add(value)
        if not gathering.finite:
            node = self._program.nodes[site]
            raise PruneLabError(
                f"The activations of {node.module or node.name} are not finite (NaN or infinite) in the "
                f"batch from image {self.images}: check the weights and data."
            )
        if self._image_by_image(site, value):
            self._activations.add(site, self.images, value)
            self._pooled.add(site, self.images, means)

    def _image_by_image(self, site: int, value: Tensor) -> bool:
        """Whether a value's first dimension is that of the images: a sequence may come first, or windows of images."""
        first = self._program.nodes[site].batched[:1]
        return len(value) == self._count and (first == (True,) or self._program.batch is not None)

    def _end_shard(self) -> None:
        # Added up here whether or not it is written, so that a pass that was taken up ends with the very same sums.
        found = self.profile()
        try:
            if self._folder is not None:
                shards.save(self._folder, found, self.saved)
        except FileNotFoundError:
            # Another process has finished the same profile and removed the shards: ours are no longer needed.
            self._folder = None
        except OSError as error:
            warnings.warn(f"What is done cannot be kept in {self._folder} ({error}); it goes on without.", stacklevel=6)
            self._folder = None
        self.saved = self.images


class _Kept:
    """Values of the first images, by site."""

    def __init__(self, room: int, begun: Mapping[int, Tensor], dtype: torch.dtype | None = None) -> None:
        self._room = room
        self._dtype = dtype
        self._values: dict[int, Tensor] = {}
        for site, values in begun.items():
            self.add(site, 0, values)

    def add(self, site: int, images: int, value: Tensor) -> None:
        """Take in values that come after so many images."""
        if images >= self._room:
            return
        # One tensor from the start: joining many at the end would need twice the memory.
        if site not in self._values:
            self._values[site] = torch.empty((self._room, *value.shape[1:]), dtype=self._dtype or value.dtype)
        self._values[site][images : images + len(value)].copy_(value[: self._room - images])

    def first(self, images: int) -> dict[int, Tensor]:
        """The values of so many images, fewer where there was no room."""
        return {site: values[:images] for site, values in self._values.items()}


def _nonnegative(node: Node) -> bool:
    """Whether an operator gives no value below zero: its sums are its absolute sums."""
    return node.opname in ("relu", "relu6", "sigmoid", "hardsigmoid")
