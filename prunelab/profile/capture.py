"""The profile of a network on data: found in the cache, or made in one pass and kept there."""

from __future__ import annotations

import hashlib
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from prunelab.errors import PruneLabError
from prunelab.processes import Processes
from prunelab.profile import shards, store
from prunelab.profile.batches import repeats_its_order
from prunelab.profile.observe import observe
from prunelab.profile.result import Profile as Profile, bytes_per_image, fits, network_digest, site_axes
from prunelab.profile.together import joined, share_of
from prunelab.program.guard import random_kept
from prunelab.program.program import Program
from prunelab.progress import Progress

# Files of what is kept by site, and images whose pooled responses are kept at most.
_KEPT = ("activations", "pooled")
_POOLED = 2048


def profile(
    program: Program,
    data: Any,
    *,
    sample: int = 512,
    batch_size: int = 256,
    cache: Path | str | bool = True,
    budget: int = 1 << 30,
    progress: Progress | bool = True,
    together: bool = False,
) -> Profile:
    """Run the network once over data, in evaluation mode, and keep what it does.

    Stopped, killed or failed, the next call with the same network and data goes on after the last 2,048 images that
    were completed, where the data come in the same order again (not from a shuffling loader) and ``cache`` is not
    False.

    Args:
        program: the traced network.
        data: a Dataset or DataLoader of ``(images, labels)`` or images; read in the order it gives.
        sample: how many images' activations to keep.
        batch_size: used when ``data`` is a Dataset.
        cache: True keeps the profile in the cache folder, a path in that folder, False not at all.
        budget: bytes that the kept activations may take, and the pooled responses an eighth of that besides; fewer
            images are kept where that is not enough.
        progress: True shows a bar; a function is called after every batch and stops the pass by returning
            False.
        together: all processes that torch.distributed has joined (``accelerate launch``, ``torchrun``) make this call,
            and share the work: each runs a part of the data, all get the profile of the whole, the main one shows
            progress and writes the cache. An interrupted pass is taken up by as many processes as began it.

    Raises:
        PruneLabError: no images, images of another shape, activations that are not finite, or data to be profiled
            together that do not come in the same order every time.
        Stopped: the progress function returned False.
    """
    processes = Processes.here() if together else Processes()
    with random_kept():
        share = share_of(data, batch_size, processes)
        folder = _folder(program, data, sample, budget, cache)
        empty = _empty(program, sample, budget)
        # Not every machine may have the cache: what the main process finds there is sent to the others.
        cached = _cached(program, folder) if folder is not None and processes.main and folder.exists() else None
        if processes.any(cached is not None):
            return joined(cached or empty, processes)
        beside = None if folder is None else shards.shards_beside(folder, processes)
        # A loader that shuffles gives other images first each time: what it had behind it cannot be told.
        behind = beside if repeats_its_order(data) else None
        shown = progress if processes.main else False
        work = partial(observe, empty, share, batch_size, shown, behind)
        result = joined(processes.all_or_none(work, "profile its share of the data"), processes)
    if folder is None or beside is None:
        return result
    if processes.main:
        result = _keep(result, folder)
    # Nobody gives up what it has behind it before the whole is kept.
    processes.wait()
    shards.remove(beside)
    return result


def _empty(program: Program, sample: int, budget: int) -> Profile:
    """The profile of no images, with room for some."""
    sites = site_axes(program)
    channels = sum((program.nodes[site].shape or ())[axis] for site, axis in sites.items())
    room = min(sample, budget // max(bytes_per_image(program, list(sites)), 1))
    pooled_room = min(_POOLED, budget // 8 // max(4 * channels, 1))
    return Profile(program, 0, {}, {}, None, room=(room, pooled_room))


def _folder(program: Program, data: Any, sample: int, budget: int, cache: Path | str | bool) -> Path | None:
    if cache is False:
        return None
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(f"{network_digest(program)}{sample}{budget}{store.FORMAT}{store.digest_data(data)}".encode())
    root = store.cache_folder() if cache is True else Path(cache)
    return root / "profiles" / hasher.hexdigest()


def _cached(program: Program, folder: Path) -> Profile | None:
    """The profile in a folder, or None (with a warning) when its files cannot be used."""
    try:
        return _read(program, folder)
    except PruneLabError as error:
        warnings.warn(f"{error} It is measured again.", stacklevel=3)
        return None


def _read(program: Program, folder: Path) -> Profile:
    meta, stats, (activations, pooled) = store.read(folder, _KEPT)
    try:
        room = (int(meta["room"][0]), int(meta["room"][1]))
        found = Profile(program, int(meta["images"]), stats, activations, folder, pooled, room)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise PruneLabError(f"The profile in {folder} lacks {error}.") from error
    if not fits(found):
        raise PruneLabError(f"The profile in {folder} is of another network.")
    return found


def _keep(result: Profile, folder: Path) -> Profile:
    """Write a profile to the cache; a full disk is said, not raised."""
    kept = (result.activations, result.pooled)
    meta = {"images": result.images, "room": result.room, "network": type(result.program.model).__name__}
    try:
        with suppress(PruneLabError):
            # Another process was quicker.
            return _read(result.program, folder)
        store.need_room(folder, sum(v.nbytes for values in kept for v in values.values()))
        store.write(folder, meta, result.statistics, dict(zip(_KEPT, kept, strict=True)))
        return _read(result.program, folder)
    except Exception as error:
        with suppress(PruneLabError):
            # Another process was quicker by a moment.
            return _read(result.program, folder)
        warnings.warn(f"The profile is not cached in {folder} ({error}); it goes on without a cache.", stacklevel=3)
        return result
