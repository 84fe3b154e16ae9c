"""One pass over the data: statistics of every channel at every site, and the activations of a sample."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from prunelab.errors import PruneLabError
from prunelab.profile import store
from prunelab.profile.statistics import Statistics, measure
from prunelab.program.channels import Layer, channel_axis
from prunelab.program.program import Program
from prunelab.program.run import Bound, bind
from prunelab.progress import Progress, track


@dataclass(frozen=True)
class Profile:
    """What a network does on data.

    Attributes:
        program: the network.
        images: how many images the statistics cover.
        statistics: by site (node index).
        activations: values at the sites for the first ``sample`` images, shape ``(sample, …)``; memory-mapped when
            they come from the cache. Sites beyond the byte budget are missing.
        folder: where it is kept, or None.
    """

    program: Program
    images: int
    statistics: Mapping[int, Statistics]
    activations: Mapping[int, Tensor]
    folder: Path | None

    def of(self, layer: Layer) -> list[tuple[Statistics, NDArray[np.int64]]]:
        """For each site of a layer: its statistics and the positions of the layer's channels in them."""
        return [(self.statistics[s], positions(self.program, layer, s)) for s in layer.sites]

    def maps(self, layer: Layer, images: int = 8) -> Tensor | None:
        """Cached activations of a layer at its first site, shape ``(images, channels, …)``, or None if not cached."""
        for site in layer.sites:
            if site in self.activations:
                axis = site_axis(self.program, layer, site)
                index = torch.from_numpy(positions(self.program, layer, site))
                return self.activations[site][:images].index_select(axis, index).movedim(axis, 1)
        return None


def site_axis(program: Program, layer: Layer, site: int) -> int:
    """The dimension along which a layer's channels lie at a site."""
    axis = channel_axis(program.structure.values[site], program.structure.label, set(layer.labels.tolist()))
    assert axis is not None
    return axis


def positions(program: Program, layer: Layer, site: int) -> NDArray[np.int64]:
    """Where a layer's channels stand along the channel dimension of a site, shape ``(channels,)``."""
    dims = program.structure.values[site]
    assert isinstance(dims, tuple)
    ids = dims[site_axis(program, layer, site)]
    assert ids is not None
    labels = program.structure.label[ids]
    order = np.argsort(labels, kind="stable")
    return order[np.searchsorted(labels[order], layer.labels)]


def batches(data: Any, batch_size: int) -> tuple[Iterable[Any], int | None]:
    """A loader's or data set's batches in order, and how many there are."""
    if isinstance(data, DataLoader):
        return data, len(data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return DataLoader(data, batch_size=batch_size), -(-len(data) // batch_size)
    return data, len(data) if hasattr(data, "__len__") else None


def inputs_of(batch: Any) -> tuple[Any, ...]:
    """The network's inputs in a batch: the batch itself, or all of it but the last part, the labels."""
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, tuple | list) and batch:
        return tuple(batch[:-1]) if len(batch) > 1 else tuple(batch)
    raise PruneLabError(f"A batch must be a tensor or (inputs, labels), not a {type(batch).__name__}.")


def check_images(program: Program, inputs: tuple[Any, ...]) -> None:
    """The images must have the shape that the network was traced with.

    Raises:
        PruneLabError: another shape.
    """
    expected = [n.shape for n in program.nodes if n.kind == "input"]
    for have, want in zip(inputs, expected, strict=False):
        if isinstance(have, Tensor) and want is not None and tuple(have.shape[1:]) != want[1:]:
            raise PruneLabError(
                f"The images have shape {tuple(have.shape[1:])}, but the network was traced with {want[1:]}: "
                "trace it with an example of the same shape as the data."
            )


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
        progress: True shows a bar; a function is called after every batch and stops the pass by returning False.

    Raises:
        PruneLabError: no images, images of another shape, or activations that are not finite.
        Stopped: the progress function returned False; nothing is written.
    """
    folder = _folder(program, data, sample, budget, cache)
    if folder is not None and folder.exists():
        cached = _cached(program, folder)
        if cached is not None:
            return cached
    sites = sorted({s for layer in program.structure.layers for s in layer.sites})
    statistics, activations, images = _pass(program, data, sites, sample, batch_size, budget, progress)
    result = Profile(program, images, statistics, activations, None)
    return result if folder is None else _keep(result, folder)


def _pass(
    program: Program, data: Any, sites: list[int], sample: int, batch_size: int, budget: int, progress: Progress | bool
) -> tuple[dict[int, Statistics], dict[int, Tensor], int]:
    bound = bind(program)
    statistics: dict[int, Statistics] = {}
    kept: dict[int, list[Tensor]] = {s: [] for s in sites}
    axes = {s: _axis(program, s) for s in sites}
    images = 0
    device = next(iter(bound.states.values())).device if bound.states else torch.device("cpu")
    loader, total = batches(data, batch_size)
    for values in _values(program, bound, track(loader, "profile", total, progress), sites, device):
        count = next(iter(values.values())).shape[0] if values else 0
        for site, value in values.items():
            found = measure(value, axes[site])
            if not np.isfinite(found.sum).all():
                raise PruneLabError(_not_finite(program, site, images))
            statistics[site] = statistics[site].merge(found) if site in statistics else found
            room = min(sample, _fit(values, budget)) - images
            if room > 0:
                kept[site].append(value[:room].cpu().clone())
        images += count
    if not images:
        raise PruneLabError("There are no images to profile: the loader is empty.")
    return statistics, {s: torch.cat(parts) for s, parts in kept.items() if parts}, images


def _values(
    program: Program, bound: Bound, loader: Iterator[Any], sites: list[int], device: torch.device
) -> Iterator[dict[int, Tensor]]:
    for batch in loader:
        inputs = tuple(x.to(device) if isinstance(x, Tensor) else x for x in inputs_of(batch))
        check_images(program, inputs)
        yield bound.run(inputs, frozenset(sites))[1]


def _fit(values: Mapping[int, Tensor], budget: int) -> int:
    """How many images' activations fit into the budget."""
    per_image = sum(v.element_size() * v[0].numel() for v in values.values())
    return budget // max(per_image, 1)


def _axis(program: Program, site: int) -> int:
    """The channel dimension of a site, from any layer observed there."""
    layer = next(layer for layer in program.structure.layers if site in layer.sites)
    return site_axis(program, layer, site)


def _not_finite(program: Program, site: int, first: int) -> str:
    where = program.nodes[site].module or program.nodes[site].name
    return f"The activations of {where} are not finite (NaN or infinite) in the batch from image {first}: check the weights and data."


def _folder(program: Program, data: Any, sample: int, budget: int, cache: Path | str | bool) -> Path | None:
    if cache is False:
        return None
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(f"{program.digest}{sample}{budget}{store.FORMAT}{store.digest_data(data)}".encode())
    for node in program.nodes:
        if node.kind == "state":
            store.digest_tensor(hasher, program.state(node.target))
    root = store.cache_folder() if cache is True else Path(cache)
    return root / "profiles" / hasher.hexdigest()


def _cached(program: Program, folder: Path) -> Profile | None:
    """The profile in a folder, or None (said once) when its files cannot be used."""
    try:
        meta, stats, activations = store.read(folder)
        return Profile(
            program,
            int(meta["images"]),
            {int(s): v for s, v in stats.items()},
            {int(s): v for s, v in activations.items()},
            folder,
        )
    except (PruneLabError, KeyError, ValueError) as error:
        warnings.warn(f"{error} It is measured again.", stacklevel=3)
        return None


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
