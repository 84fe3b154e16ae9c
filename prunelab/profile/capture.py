"""One pass over the data: statistics of every channel at every site, and the activations of a sample."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from prunelab.errors import PruneLabError
from prunelab.profile import store
from prunelab.profile.batches import batches, check_images, inputs_of
from prunelab.profile.statistics import Statistics, measure
from prunelab.program.channels import Layer, channel_axis, positions
from prunelab.program.guard import random_kept
from prunelab.program.program import Program
from prunelab.program.run import bind
from prunelab.progress import Progress, track


@dataclass(frozen=True)
class Profile:
    """What a network does on data.

    Attributes:
        program: the network.
        images: how many images the statistics cover.
        statistics: by site (node index).
        activations: values at the sites for the first ``sample`` images, shape ``(sample, …)``, fewer where
            the byte budget does not allow them; memory-mapped when they come from the cache.
        folder: where it is kept, or None.
    """

    program: Program
    images: int
    statistics: Mapping[int, Statistics]
    activations: Mapping[int, Tensor]
    folder: Path | None

    def of(self, layer: Layer) -> list[tuple[Statistics, NDArray[np.int64]]]:
        """For each site of a layer: its statistics and where the layer's channels stand in them.

        The places have shape ``(channels, times)``: a channel that your code uses in two halves stands in
        both.
        """
        return [(self.statistics[s], places(self.program, layer, s)) for s in layer.sites]

    def maps(self, layer: Layer, images: int = 8) -> Tensor | None:
        """Cached activations of a layer at its first site, or None where none were kept.

        Returns:
            shape ``(images, channels, …)``.
        """
        for site in layer.sites:
            if site in self.activations:
                axis = site_axis(self.program, layer, site)
                index = torch.from_numpy(places(self.program, layer, site)[:, 0].copy())
                return self.activations[site][:images].index_select(axis, index).movedim(axis, 1)
        return None


def site_axis(program: Program, layer: Layer, site: int) -> int:
    """The dimension along which a layer's channels lie at a site."""
    axis = channel_axis(program.structure.values[site], program.structure.label, layer.labels)
    assert axis is not None
    return axis


def places(program: Program, layer: Layer, site: int) -> NDArray[np.int64]:
    """Where a layer's channels stand along the channel dimension of a site, shape ``(channels, times)``."""
    dims = program.structure.values[site]
    assert isinstance(dims, tuple)
    ids = dims[site_axis(program, layer, site)]
    assert ids is not None
    return positions(ids, program.structure.label, layer.labels)


def profile(
    program: Program,
    data: Any,
    *,
    sample: int = 512,
    batch_size: int = 256,
    cache: Path | str | bool = True,
    budget: int = 1 << 30,
    progress: Progress | bool = True,
) -> Profile:
    """Run the network once over data, in evaluation mode, and keep what it does.

    Args:
        program: the traced network.
        data: a Dataset or DataLoader of ``(images, labels)`` or images; read in the order it gives.
        sample: how many images' activations to keep.
        batch_size: used when ``data`` is a Dataset.
        cache: True keeps the profile in the cache folder, a path in that folder, False not at all.
        budget: bytes that the kept activations may take; fewer images are kept where that is not enough.
        progress: True shows a bar; a function is called after every batch and stops the pass by returning
            False.

    Raises:
        PruneLabError: no images, images of another shape, or activations that are not finite.
        Stopped: the progress function returned False; nothing is written.
    """
    with random_kept():
        folder = _folder(program, data, sample, budget, cache)
        cached = _cached(program, folder) if folder is not None and folder.exists() else None
        if cached is not None:
            return cached
        result = _pass(program, data, sample, batch_size, budget, progress)
    return result if folder is None else _keep(result, folder)


def _pass(program: Program, data: Any, sample: int, batch_size: int, budget: int, progress: Progress | bool) -> Profile:
    found = _Sites(program, sample, budget)
    bound = bind(program)
    loader, total = batches(data, batch_size)
    for batch in track(loader, "profile", total, progress):
        inputs = tuple(x.to(bound.device) for x in inputs_of(program, batch))
        check_images(program, inputs)
        if not len(inputs[0]):
            continue
        bound.run(inputs, found.watch)
        found.images += len(inputs[0])
    if not found.images:
        raise PruneLabError("There are no images to profile: the loader is empty.")
    activations = {site: values[: found.images] for site, values in found.kept.items()}
    return Profile(program, found.images, found.statistics, activations, None)


# Operators that give no value below zero: their sums are their absolute sums.
_NONNEGATIVE = {"relu", "relu6", "sigmoid", "hardsigmoid"}


class _Sites:
    """Takes in every site's value as it is computed: statistics of all images, activations of the first."""

    def __init__(self, program: Program, sample: int, budget: int) -> None:
        self.program = program
        self.images = 0
        self.statistics: dict[int, Statistics] = {}
        self.kept: dict[int, Tensor] = {}
        axes = _axes(program)
        self.watch = {site: partial(self._take, site, axis) for site, axis in axes.items()}
        self.room = min(sample, budget // max(_bytes_per_image(program, list(axes)), 1))

    def _take(self, site: int, axis: int, value: Tensor) -> None:
        node = self.program.nodes[site]
        new = measure(value, axis, node.opname in _NONNEGATIVE)
        if not np.isfinite(new.sum).all():
            raise PruneLabError(
                f"The activations of {node.module or node.name} are not finite (NaN or infinite) in the "
                f"batch from image {self.images}: check the weights and data."
            )
        self.statistics[site] = self.statistics[site].merge(new) if site in self.statistics else new
        if self.images < self.room:
            self._keep(site, value[: self.room - self.images])

    def _keep(self, site: int, value: Tensor) -> None:
        # One tensor from the start: joining many at the end would need twice the memory.
        if site not in self.kept:
            self.kept[site] = torch.empty((self.room, *value.shape[1:]), dtype=value.dtype)
        self.kept[site][self.images : self.images + len(value)].copy_(value)


def _axes(program: Program) -> dict[int, int]:
    """Every site and the dimension along which channels lie there."""
    pairs = [(site, layer) for layer in program.structure.layers for site in layer.sites]
    return {site: site_axis(program, layer, site) for site, layer in sorted(pairs, key=lambda pair: pair[0])}


def _bytes_per_image(program: Program, sites: list[int]) -> int:
    element = next((x.element_size() for x in tree_leaves(program.example) if isinstance(x, Tensor)), 4)
    return element * sum(math.prod(program.nodes[site].shape or ()) for site in sites)


def _folder(program: Program, data: Any, sample: int, budget: int, cache: Path | str | bool) -> Path | None:
    if cache is False:
        return None
    hasher = hashlib.blake2b(digest_size=16)
    # The layers' digest says nothing of what happens between them: two networks may differ in an activation
    # alone.
    graph = repr([(n.opname, dict(n.args), n.target) for n in program.nodes])
    hasher.update(f"{graph}{sample}{budget}{store.FORMAT}{store.digest_data(data)}".encode())
    for name in program.state_nodes:
        store.digest_tensor(hasher, program.state(name))
    root = store.cache_folder() if cache is True else Path(cache)
    return root / "profiles" / hasher.hexdigest()


def _cached(program: Program, folder: Path) -> Profile | None:
    """The profile in a folder, or None (with a warning) when its files cannot be used."""
    try:
        meta, stats, activations = store.read(folder)
        found = Profile(
            program,
            int(meta["images"]),
            {int(site): v for site, v in stats.items()},
            {int(site): v for site, v in activations.items()},
            folder,
        )
        if not _fits(found):
            raise PruneLabError(f"The profile in {folder} is of another network.")
    except (PruneLabError, KeyError, ValueError) as error:
        warnings.warn(f"{error} It is measured again.", stacklevel=3)
        return None
    return found


def _fits(found: Profile) -> bool:
    """Whether a profile read from a file covers every site of its network, with the right shapes."""
    axes, nodes = _axes(found.program), found.program.nodes
    shapes = {site: nodes[site].shape or () for site in axes}
    return (
        axes.keys() == found.statistics.keys() >= found.activations.keys()
        and all(found.statistics[s].sum.shape == (shapes[s][axis],) for s, axis in axes.items())
        and all(v.shape[1:] == shapes[s][1:] for s, v in found.activations.items())
    )


def _keep(result: Profile, folder: Path) -> Profile:
    """Write a profile to the cache; a full disk is said, not raised."""
    need = sum(v.element_size() * v.numel() for v in result.activations.values())
    try:
        if store.free_bytes(folder) < need + (64 << 20):
            raise OSError("the disk is full")
        store.write(
            folder,
            {"images": result.images, "network": type(result.program.model).__name__},
            {str(s): v for s, v in result.statistics.items()},
            {str(s): v for s, v in result.activations.items()},
        )
    except Exception as error:
        warnings.warn(f"The profile is not cached in {folder} ({error}); it goes on without a cache.", stacklevel=3)
        return result
    return _cached(result.program, folder) or result
