"""Data in batches: what counts as data, and what of a batch the network is given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

from prunelab.datasets import ImageSet
from prunelab.errors import PruneLabError
from prunelab.program.program import Program


def batches(data: Any, batch_size: int) -> tuple[Iterable[Any], int | None]:
    """A loader's or data set's batches in order, and how many there are.

    Raises:
        PruneLabError: it is neither.
    """
    if isinstance(data, DataLoader):
        return data, len(data) if hasattr(data.dataset, "__len__") else None
    if isinstance(data, Tensor):
        return torch.split(data, batch_size), -(-len(data) // batch_size)
    held = in_memory(data)
    if held is not None:
        return zip(*(torch.split(t, batch_size) for t in held), strict=True), -(-len(held[0]) // batch_size)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return DataLoader(data, batch_size), -(-len(data) // batch_size)
    if not hasattr(data, "__iter__"):
        raise PruneLabError(f"Data must be a Dataset, a DataLoader or batches, not a {type(data).__name__}.")
    return data, len(data) if hasattr(data, "__len__") else None


def repeats_its_order(data: Any) -> bool:
    """Whether data give the same images in the same order every time: sets do, and loaders that go through one."""
    if not isinstance(data, DataLoader):
        return hasattr(data, "__getitem__") and hasattr(data, "__len__")
    plain = data.batch_sampler is None or type(data.batch_sampler) is BatchSampler
    return plain and type(data.sampler) is SequentialSampler and not isinstance(data.dataset, IterableDataset)


def batches_after(data: Any, batch_size: int, images: int) -> tuple[Iterable[Any], int]:
    """The batches of data that repeat their order, from the one that holds this image on.

    Returns:
        the batches, and how many images come before them; 0 where only reading finds the place.
    """
    if isinstance(data, DataLoader) and data.batch_size is None:
        return data, 0
    size = data.batch_size if isinstance(data, DataLoader) and data.batch_size else batch_size
    first = images - images % size
    held = in_memory(data)
    if isinstance(data, Tensor):
        return torch.split(data[first:], size), first
    if held is not None:
        return zip(*(torch.split(t[first:], size) for t in held), strict=True), first
    if not isinstance(data, DataLoader):
        return DataLoader(data, sampler=range(first, len(data)), batch_size=size), first
    dataset: Any = data.dataset
    chosen = BatchSampler(range(first, len(dataset)), size, data.drop_last)
    rest = DataLoader(dataset, batch_sampler=chosen, **loader_settings(data))
    return rest, first


def loader_settings(loader: DataLoader[Any]) -> dict[str, Any]:
    """How a loader loads, whatever it loads."""
    names = "num_workers collate_fn pin_memory timeout worker_init_fn multiprocessing_context prefetch_factor"
    return {name: getattr(loader, name) for name in names.split()}


def in_order(data: Any) -> Any:
    """All items of a set, or of the set under a loader, in the set's own order; read by as many workers as before."""
    if not isinstance(data, DataLoader) or not data.num_workers:
        return getattr(data, "dataset", data)
    dataset: Any = data.dataset
    return DataLoader(dataset, data.batch_size or 1, **loader_settings(data))


def in_memory(data: Any) -> tuple[Tensor, Tensor] | None:
    """Images and labels of a set that holds them as whole tensors, ready as they are, or None."""
    if isinstance(data, ImageSet):
        return data.images, data.labels
    if isinstance(data, TensorDataset) and len(data.tensors) == 2:
        return data.tensors[0], data.tensors[1]
    return None


def inputs_of(program: Program, batch: Any) -> tuple[Any, ...]:
    """The network's inputs in a batch: all of it, or all but the last part, the labels.

    Raises:
        PruneLabError: the batch has not as many parts as the network has inputs.
    """
    count = sum(node.kind == "input" for node in program.nodes)
    parts = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    if not all(isinstance(part, Tensor) for part in parts[:count]) or len(parts) not in (count, count + 1):
        raise PruneLabError(
            f"A batch must hold the network's {count} input tensor{'s' * (count > 1)}, and labels if there "
            f"are any, not a {type(batch).__name__} of {len(parts)} part{'s' * (len(parts) > 1)}."
        )
    return parts[:count]


def check_images(program: Program, inputs: tuple[Any, ...]) -> None:
    """The images must have the shape and type that the network was traced with.

    Raises:
        PruneLabError: another shape or type, or a batch of another size where the user's code fixes it.
    """
    expected = [node for node in program.nodes if node.kind == "input"]
    examples = tree_leaves(program.example)
    for have, node, example in zip(inputs, expected, examples, strict=False):
        if not isinstance(have, Tensor) or node.shape is None:
            continue
        if tuple(have.shape[1:]) != node.shape[1:]:
            raise PruneLabError(
                f"The images have shape {tuple(have.shape[1:])}, but the network was traced with "
                f"{node.shape[1:]}: trace it with an example of the same shape as the data."
            )
        if have.dtype != example.dtype:
            raise PruneLabError(
                f"The images are {have.dtype}, but the network was traced with {example.dtype}: convert one of them."
            )
        if program.batch is not None and len(have) != program.batch:
            raise PruneLabError(
                f"Your forward takes batches of {program.batch} images only, not of {len(have)}: let it take "
                "the size from its input."
            )
