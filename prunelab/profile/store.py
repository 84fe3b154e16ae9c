"""Files of the profile: addressed by content, written whole or not at all, read without pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from prunelab.errors import PruneLabError
from prunelab.files import write_tensors
from prunelab.profile.statistics import Array, Statistics

FORMAT = 2


def cache_folder() -> Path:
    """Where profiles are kept: ``$PRUNELAB_CACHE``, else ``prunelab`` in the user's cache folder."""
    named = os.environ.get("PRUNELAB_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prunelab"


def digest_tensor(hasher: Any, tensor: Tensor) -> None:
    """Feed a tensor's type, shape and bytes to a hash."""
    flat = tensor.detach().cpu().contiguous().flatten()
    hasher.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    hasher.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")


def digest_data(data: Any) -> str:
    """A name for the content of a data set, or of the part of it that a loader reads.

    A set with a ``fingerprint()`` names itself; tensors held in memory are hashed whole. Other sets are told
    apart by their type, length and 64 items spread evenly, since hashing all of a large set costs as much as
    profiling it. A stream cannot be named without reading it: it gets a new name every time.
    """
    dataset: Any = data.dataset if isinstance(data, DataLoader) else data
    hasher = hashlib.blake2b(digest_size=16)
    tensors = getattr(dataset, "tensors", None)
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return uuid.uuid4().hex
    if callable(getattr(dataset, "fingerprint", None)):
        hasher.update(str(dataset.fingerprint()).encode())
    elif isinstance(tensors, tuple | list) and all(isinstance(t, Tensor) for t in tensors):
        for tensor in tensors:
            digest_tensor(hasher, tensor)
    else:
        _digest_items(hasher, dataset)
    if isinstance(data, DataLoader):
        _digest_loader(hasher, data)
    return hasher.hexdigest()


def _digest_items(hasher: Any, dataset: Any) -> None:
    length = len(dataset)
    hasher.update(f"{type(dataset).__name__}{length}".encode())
    for i in np.unique(np.linspace(0, length - 1, min(64, length)).astype(int)).tolist():
        for part in tree_leaves(dataset[i]):
            if isinstance(part, Tensor | np.ndarray | int | float):
                digest_tensor(hasher, torch.as_tensor(part))
            else:
                # An image of PIL, a string: whatever it is, its bytes or its text.
                hasher.update(part.tobytes() if hasattr(part, "tobytes") else repr(part).encode())


def _digest_loader(hasher: Any, loader: DataLoader[Any]) -> None:
    """Which items a loader reads, whatever their order: a profile does not depend on it."""
    batches: Any = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    each = (int(i) for batch in batches for i in (batch if isinstance(batch, list | tuple) else [batch]))
    items = np.fromiter(each, np.int64)
    items.sort()
    hasher.update(items.data)
    hasher.update(getattr(loader.collate_fn, "__qualname__", "").encode())


def need_room(folder: Path, count: int) -> None:
    """There must be room for so many bytes on the disk that will hold a folder, and some left.

    Raises:
        OSError: there is not.
    """
    while not folder.exists():
        folder = folder.parent
    if shutil.disk_usage(folder).free < count + (64 << 20):
        raise OSError("the disk is full")


def packed(stats: Mapping[int, Statistics]) -> dict[str, Tensor]:
    """Statistics by site as tensors by name."""
    return {f"{site}/{k}": torch.from_numpy(np.array(v)) for site, s in stats.items() for k, v in s.arrays().items()}


def unpacked(tensors: Mapping[str, Tensor]) -> dict[int, Statistics]:
    """The reverse of :func:`packed`."""
    arrays: dict[int, dict[str, Array]] = {}
    for key, tensor in tensors.items():
        site, _, name = key.partition("/")
        arrays.setdefault(int(site), {})[name] = tensor.numpy().copy()
    return {site: Statistics.from_arrays(found) for site, found in arrays.items()}


def named(values: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Values by site as safetensors takes them."""
    return {str(site): value.contiguous() for site, value in values.items()}


def write(
    folder: Path,
    meta: Mapping[str, Any],
    stats: Mapping[int, Statistics],
    values: Mapping[str, Mapping[int, Tensor]],
) -> None:
    """Write a profile beside its place, then rename: a reader sees all of it or nothing.

    Args:
        values: by name of the file, what is kept by site.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        beside.mkdir()
        write_tensors(packed(stats), beside / "statistics.safetensors")
        for name, tensors in values.items():
            write_tensors(named(tensors), beside / f"{name}.safetensors")
        (beside / "profile.json").write_text(json.dumps({"format": FORMAT, **meta}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def read(folder: Path, names: Iterable[str]) -> tuple[dict[str, Any], dict[int, Statistics], list[dict[int, Tensor]]]:
    """Read a profile; the values in the files named are memory-mapped, not loaded.

    Raises:
        PruneLabError: the files are damaged, incomplete or not a profile.
    """
    from safetensors.torch import load_file

    try:
        meta = json.loads((folder / "profile.json").read_text())
        if meta.get("format") != FORMAT:
            raise PruneLabError(f"The profile in {folder} was written by another version of prunelab.")
        stats = unpacked(load_file(folder / "statistics.safetensors"))
        values = [
            {int(site): value for site, value in mapped(folder / f"{name}.safetensors").items()} for name in names
        ]
    except PruneLabError:
        raise
    except Exception as error:
        raise PruneLabError(
            f"The profile in {folder} is damaged or not prunelab's ({error}); delete the folder."
        ) from error
    return meta, stats, values


def mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, memory-mapped."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
