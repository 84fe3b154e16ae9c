"""What an interrupted pass has behind it, kept beside the place of its profile until that is whole.

After every shard, some thousand images, the statistics of all images so far replace those of the shard before; what is
kept of the sample's images is written once, by the shard that they are in.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from prunelab.files import replacing, write_tensors
from prunelab.processes import Processes
from prunelab.profile import store
from prunelab.profile.result import Profile

# Images in a shard.
SHARD = 2048
# Nobody comes back for what was left behind earlier than this.
_SECONDS_KEPT = 7 * 24 * 3600
_STATISTICS = re.compile(r"statistics-(\d{12})\.safetensors")


def shards_beside(folder: Path, processes: Processes) -> Path:
    """Where this process keeps the shards of a profile."""
    share = f"-{processes.index}-of-{processes.count}" if processes.count > 1 else ""
    return folder.with_name(f".{folder.name}-shards{share}")


def save(folder: Path, found: Profile, before: int) -> None:
    """Write all that is known after a shard; every file is there whole or not at all.

    Args:
        before: images of the shards before.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    new = {
        f"{name}/{site}": value[before:].contiguous()
        for name, values in (("activations", found.activations), ("pooled", found.pooled))
        for site, value in values.items()
        if len(value) > before
    }
    statistics = store.packed(found.statistics)
    store.need_room(folder, sum(t.nbytes for t in (*new.values(), *statistics.values())))
    if not folder.exists():
        _sweep(folder.parent)
        folder.mkdir(parents=True, exist_ok=True)
    if new:
        _write(folder / f"sample-{before:012}.safetensors", new)
    _write(folder / f"statistics-{found.images:012}.safetensors", statistics)
    for path in sorted(folder.glob("statistics-*"))[:-1]:
        path.unlink(missing_ok=True)


def load(folder: Path, empty: Profile) -> Profile | None:
    """What the shards before hold, or None where there is nothing that can be used.

    Args:
        empty: the profile that is to be made, of no images yet.
    """
    try:
        last = max(path.name for path in folder.iterdir() if _STATISTICS.fullmatch(path.name))
        images = int(last[11:23])
        stats = store.unpacked(store.mapped(folder / last))
        parts: dict[str, list[Tensor]] = {}
        for path in sorted(folder.glob("sample-*.safetensors")):
            if int(path.name[7:19]) < images:
                for name, value in store.mapped(path).items():
                    parts.setdefault(name, []).append(value)
    except Exception:
        # Never begun, removed this moment by another process that is done, or damaged: it is measured again.
        return None
    joined = {name: torch.cat(values) for name, values in parts.items()}
    found = Profile(
        empty.program, images, stats, _of("activations", joined), None, _of("pooled", joined), room=empty.room
    )
    kept = zip(found.room, (found.activations, found.pooled), strict=True)
    return found if all(_complete(values, min(room, images), found) for room, values in kept) else None


def _complete(values: Mapping[int, Tensor], count: int, found: Profile) -> bool:
    """Whether so many images are there for every site."""
    return values.keys() == (found.statistics.keys() if count else set()) and all(
        len(value) == count for value in values.values()
    )


def remove(folder: Path) -> None:
    """Nobody needs the shards of a profile that is whole."""
    shutil.rmtree(folder, ignore_errors=True)


def _of(name: str, values: Mapping[str, Tensor]) -> dict[int, Tensor]:
    return {int(key.partition("/")[2]): v for key, v in values.items() if key.startswith(f"{name}/")}


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with replacing(path) as beside:
        write_tensors(tensors, beside)


def _sweep(profiles: Path) -> None:
    """Remove what processes that were killed left behind long ago."""
    for path in profiles.glob(".*") if profiles.exists() else ():
        if path.is_dir() and path.stat().st_mtime < time.time() - _SECONDS_KEPT:
            shutil.rmtree(path, ignore_errors=True)
