"""Gradients for criteria that ask what a channel is worth to the loss: one pass backward, kept beside the profile."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

from prunelab.errors import PruneLabError
from prunelab.files import replacing, write_tensors
from prunelab.profile import store
from prunelab.profile.batches import batches, check_images, in_memory, inputs_of
from prunelab.profile.gates import Gated, Gates, Loss
from prunelab.profile.result import Profile, network_digest
from prunelab.program.guard import random_kept
from prunelab.program.program import Program
from prunelab.program.run import bind
from prunelab.progress import Progress, track

FORMAT = 1
# Bytes that the values of a batch may take, and images at once at most.
_BUDGET = 1 << 30
_AT_ONCE = 64


def with_gradients(
    profile: Profile,
    data: Any,
    *,
    images: int = 1024,
    loss: Loss | None = None,
    cache: Path | str | bool = True,
    progress: Progress | bool = True,
) -> Profile:
    """The profile with what criteria like ``taylor`` need: the gradient of the loss at every channel, image by image.

    The traced program is run forward and backward, in evaluation mode; the user's module, its gradients and buffers are
    not touched. Sums do not depend on how images lie in batches. A pass that was stopped goes on where it was, where
    the same images come again (from a data set, or a loader that keeps its order) and ``cache`` is not False.

    Args:
        data: a Dataset or DataLoader of (image, label).
        images: how many; from a data set they are drawn at random, always the same, from a loader the first.
        loss: gives one loss per image; cross-entropy unless given. One of your own has no name to be found by, so that
            nothing is cached.
        cache: True keeps them in the cache folder, a path in that folder, False not at all.
        progress: True shows a bar; a function is called after every batch and stops the pass by returning False.

    Raises:
        PruneLabError: no images, no labels, or gradients that cannot be had or are not finite.
        Stopped: the progress function returned False.
    """
    if images < 1:
        raise PruneLabError(f"Gradients need at least one image, not images={images}.")
    gated = Gated.of(profile.program)
    with random_kept(), torch.inference_mode(False):
        file = None if cache is False or loss is not None else _file(profile.program, data, images, cache)
        found = _gathered(gated, _drawn(data, images), images, loss or _cross_entropy, file, progress)
    return replace(profile, gradients=found)


def _gathered(
    gated: Gated, data: Any, images: int, loss: Loss, file: Path | None, progress: Progress | bool
) -> dict[str, Gates]:
    """Gates added up batch by batch; what a pass has behind it when it ends, however it does, lies in the file."""
    program, bound = gated.program, bind(gated.program)
    found = _read(file, gated.names)
    seen = _images(found)
    images = min(images, len(data)) if isinstance(data, Sized) and not isinstance(data, DataLoader) else images
    if 0 < images <= seen or not gated.names:
        return found
    size = program.batch or _affordable(program)
    at = 0
    try:
        for inputs, labels in track(_parts(program, data, size, images), "gradients", -(-images // size), progress):
            at += len(labels)
            if at <= seen:
                continue
            inputs = tuple(x.to(bound.device) for x in inputs)
            if not found:
                gated.check(bound, inputs)
            new = gated.run(bound, inputs, labels.to(bound.device), loss)
            found = {name: found[name].merge(gates) if name in found else gates for name, gates in new.items()}
    finally:
        if file is not None and _images(found) > seen:
            _write(file, found)
    if not found:
        raise PruneLabError("There are no images to take gradients of: the set is empty.")
    return found


def _parts(program: Program, data: Any, size: int, images: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Inputs and labels of the first images, some at a time."""
    left = images
    for batch in batches(data, size)[0]:
        inputs = inputs_of(program, batch)
        check_images(program, inputs)
        if len(batch) == len(inputs) or not isinstance(batch[-1], Tensor) or isinstance(batch, Tensor):
            raise PruneLabError("Gradients need labels: the data must give (image, label) pairs.")
        labels = batch[-1]
        step = len(labels) if program.batch is not None else size
        for start in range(0, len(labels) if program.batch is not None else min(len(labels), left), step):
            stop = start + step if program.batch is not None else min(start + step, left)
            yield tuple(x[start:stop] for x in inputs), labels[start:stop]
        left -= len(labels)
        if left <= 0:
            return


def _images(found: Mapping[str, Gates]) -> int:
    return max((gates.images for gates in found.values()), default=0)


def _affordable(program: Program) -> int:
    """Images at once: all values on the way wait for the way back, and each gate doubles one."""
    values = sum(math.prod(node.shape) for node in program.nodes if node.kind == "op" and node.shape is not None)
    return int(min(_AT_ONCE, max(1, _BUDGET // (8 * max(1, values)))))


def _cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    if outputs.dim() != 2 or labels.is_floating_point() or labels.dim() != 1:
        raise PruneLabError(
            f"Cross-entropy needs outputs (images, classes) and class numbers, not {tuple(outputs.shape)} and "
            f"{tuple(labels.shape)}: give with_gradients a loss of your own."
        )
    return cross_entropy(outputs, labels, reduction="none")


def _drawn(data: Any, images: int) -> Any:
    """So many images of a set, from all over it: sets are often sorted by class. A loader gives them in its order."""
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return data
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:images]
    held = in_memory(data)
    if held is not None:
        return TensorDataset(*(tensor[chosen] for tensor in held))
    return Subset(data, chosen.tolist())


def _file(program: Program, data: Any, images: int, cache: Path | str | bool) -> Path:
    name = f"{network_digest(program)}{store.digest_data(data)}{images}{FORMAT}"
    root = store.cache_folder() if isinstance(cache, bool) else Path(cache)
    return root / "gradients" / f"{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}.safetensors"


def _read(file: Path | None, names: Collection[str]) -> dict[str, Gates]:
    """Sums that a pass left behind; none where the file is not there or cannot be used."""
    if file is None or not file.exists():
        return {}
    try:
        tensors = store.mapped(file)
        found = {
            name: Gates(*tensors[f"counts/{name}"].tolist(), *tensors[f"sums/{name}"].numpy().copy()) for name in names
        }
    except Exception as error:
        warnings.warn(f"The gradients in {file} are damaged ({error}); they are measured again.", stacklevel=4)
        return {}
    return found


def _write(file: Path, found: Mapping[str, Gates]) -> None:
    """Write sums beside their place, then rename; a full disk is said, not raised."""
    tensors = {f"counts/{name}": torch.tensor([gates.images, gates.positions]) for name, gates in found.items()}
    sums = {name: torch.from_numpy(np.stack([gates.absolute, gates.squares])) for name, gates in found.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as beside:
            write_tensors({**tensors, **{f"sums/{name}": both for name, both in sums.items()}}, beside)
    except OSError as error:
        warnings.warn(f"The gradients are not kept in {file} ({error}); it goes on without a cache.", stacklevel=4)
