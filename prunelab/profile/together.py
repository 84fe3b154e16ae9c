"""One profile that several processes make, each of its share of the data: all of it is a sum, or of the first images.

All of them end with the whole: statistics are added up by one all-reduce, and of the first images the processes that
had them send what they kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from prunelab.errors import PruneLabError
from prunelab.processes import Processes
from prunelab.profile.batches import in_memory, loader_settings, repeats_its_order
from prunelab.profile.result import Profile, site_axes
from prunelab.profile.statistics import Array, Statistics, measure


def share_of(data: Any, batch_size: int, processes: Processes) -> Any:
    """This process's share: whole batches that follow each other, those of the first process first.

    Raises:
        PruneLabError: the data do not come in the same order every time, so that nobody can say which are whose, or
            there are fewer batches than processes.
    """
    if processes.count == 1:
        return data
    loader = data if isinstance(data, DataLoader) else None
    if not repeats_its_order(data) or (loader is not None and loader.batch_size is None):
        raise PruneLabError(
            "Several processes can only share out data that come in the same order every time: give a Dataset, or a "
            "DataLoader over one with a batch_size and without shuffling."
        )
    dataset: Any = data if loader is None else loader.dataset
    images = len(dataset)
    # A loader's batches stay whole; those of a set are as small as it takes for everybody to have one.
    size = max(1, min(batch_size, -(-images // processes.count)))
    if loader is not None:
        size = loader.batch_size or size
        images -= images % size if loader.drop_last else 0
    whole = -(-images // size)
    if whole < processes.count:
        raise PruneLabError(
            f"There are {whole} batches of {size} images to profile, too few for {processes.count} processes: make the "
            "batches smaller, or start fewer processes."
        )
    start, stop = (min(images, whole * k // processes.count * size) for k in (processes.index, processes.index + 1))
    held = in_memory(data)
    if isinstance(data, Tensor):
        return data[start:stop]
    if held is not None:
        return TensorDataset(*(each[start:stop] for each in held))
    mine = Subset(dataset, range(start, stop))
    return mine if loader is None else DataLoader(mine, size, **loader_settings(loader))


def joined(mine: Profile, processes: Processes) -> Profile:
    """The profile of all shares, in every process; statistics are those of one pass, to float64's rounding."""
    if processes.count == 1:
        return mine
    images = torch.zeros(processes.count, dtype=torch.int64)
    images[processes.index] = mine.images
    counts = processes.sums(images).tolist()
    return replace(
        mine,
        images=sum(counts),
        statistics=_summed(mine, processes),
        activations=_of_the_first(mine.activations, counts, mine.room[0], processes),
        pooled=_of_the_first(mine.pooled, counts, mine.room[1], processes),
    )


def _summed(mine: Profile, processes: Processes) -> dict[int, Statistics]:
    """Statistics of all images by site, in one all-reduce."""
    shapes = {site: mine.program.nodes[site].shape or () for site in site_axes(mine.program)}
    arrays = {
        site: mine.statistics[site].arrays() if site in mine.statistics else _of_nothing(shapes[site][axis])
        for site, axis in site_axes(mine.program).items()
    }
    flat = [torch.from_numpy(each).reshape(-1) for found in arrays.values() for each in found.values()]
    parts = iter(processes.sums(torch.cat(flat)).split([len(each) for each in flat]))
    return {
        site: Statistics.from_arrays({name: next(parts).numpy().reshape(a.shape) for name, a in found.items()})
        for site, found in arrays.items()
    }


def _of_nothing(channels: int) -> dict[str, Array]:
    """Statistics of no images."""
    return {name: np.zeros_like(each) for name, each in measure(torch.zeros(1, channels), 1).arrays().items()}


def _of_the_first(
    values: Mapping[int, Tensor], counts: list[int], room: int, processes: Processes
) -> dict[int, Tensor]:
    """What is kept of the first images of all, by site.

    Args:
        values: what this process kept of the first of its own.
        counts: images of every process.
    """
    parts: dict[int, list[Tensor]] = {}
    for source, count in enumerate(counts):
        wanted = min(room - sum(counts[:source]), count)
        if wanted <= 0:
            continue
        mine = {str(site): value[:wanted] for site, value in values.items()}
        heads = processes.told({site: [list(v.shape), str(v.dtype)] for site, v in mine.items()}, source)
        for site, (shape, dtype) in heads.items():
            like = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
            value = mine[site] if processes.index == source else like
            parts.setdefault(int(site), []).append(processes.sent(value, source))
    return {site: found[0] if len(found) == 1 else torch.cat(found) for site, found in parts.items()}
