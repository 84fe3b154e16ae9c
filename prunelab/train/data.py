"""Training data by epoch and step: sets held as whole tensors, or a loader's batches; each process gets its share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from prunelab.errors import PruneLabError
from prunelab.profile.batches import in_memory
from prunelab.train.chance import seed_all, seed_of

# A set on the device may take this share of what is free there: network and activations need the rest.
_SHARE_OF_DEVICE = 0.25


@dataclass(frozen=True)
class Batch:
    """The network's inputs, each of shape ``(images, …)``, and their labels, or None where the data has none."""

    inputs: tuple[Any, ...]
    labels: Any

    @staticmethod
    def of(parts: Any) -> Batch:
        """A loader's batch: the last of several parts are the labels, a part alone has none."""
        if isinstance(parts, Tensor):
            return Batch((parts,), None)
        if not isinstance(parts, tuple | list) or not parts:
            raise PruneLabError(
                f"A training batch must be tensors, the last of them labels, not a {type(parts).__name__}."
            )
        return Batch(tuple(parts[:-1]), parts[-1]) if len(parts) > 1 else Batch((parts[0],), None)

    def __len__(self) -> int:
        return len(self.inputs[0])

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(tuple(_sent(each, device) for each in self.inputs), _sent(self.labels, device))

    def laid_out(self, channels_last: bool) -> Batch:
        """The batch with its images, where it has any, in a memory layout."""
        return Batch(in_layout(self.inputs, channels_last), self.labels)

    def split(self, at_once: int) -> list[Batch]:
        """The batch in parts of so many images."""
        return [
            Batch(
                tuple(each[start : start + at_once] for each in self.inputs),
                None if self.labels is None else self.labels[start : start + at_once],
            )
            for start in range(0, len(self), at_once)
        ]


def in_layout(inputs: tuple[Any, ...], channels_last: bool) -> tuple[Any, ...]:
    """A network's inputs, those with four dimensions in a memory layout."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return tuple(
        each.contiguous(memory_format=layout) if isinstance(each, Tensor) and each.dim() == 4 else each
        for each in inputs
    )


def _sent(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


class Held:
    """A set held as whole tensors, in a new order every epoch."""

    def __init__(self, tensors: tuple[Tensor, ...], batch_size: int, seed: int, accelerator: Any) -> None:
        self.device: torch.device = accelerator.device
        self.seed = seed
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        self.batch_size = batch_size
        home = self.device if fits(tensors, self.device) else tensors[0].device
        self.tensors = tuple(each.to(home) for each in tensors)
        self.where = f"held on {home.type}"

    @property
    def labels(self) -> Tensor | None:
        """All labels, shape ``(images,)``."""
        return self.tensors[-1] if len(self.tensors) > 1 else None

    def __len__(self) -> int:
        """Steps in an epoch."""
        whole, rest = divmod(len(self.tensors[0]), self.batch_size)
        # One image alone has no variance that a norm could take: such a rest waits for the next epoch's order.
        return whole + (rest >= 2 * self.processes or (rest > 0 and not whole))

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """This process's share of an epoch's batches from a step on, on the device.

        The same images belong to a step, whatever the number of processes.
        """
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", number))
        order = torch.randperm(len(self.tensors[0]), generator=generator).to(self.tensors[0].device)
        for step in range(start, len(self)):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            if self.processes > 1:
                share = -(-len(chosen) // self.processes)
                # Every process takes as many: where the step does not divide, its first images are taken twice.
                chosen = torch.cat([chosen, chosen[: share * self.processes - len(chosen)]])
                chosen = chosen[self.rank * share : (self.rank + 1) * share]
            yield Batch.of(tuple(_taken(each, chosen) for each in self.tensors)).to(self.device)


def _taken(tensor: Tensor, which: Tensor) -> Tensor:
    """Some of a tensor's items, in the memory layout that it has."""
    if tensor.dim() != 4 or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.index_select(0, which)
    # index_select itself gives the plain layout, by a copy that is four times as slow.
    return tensor.permute(0, 2, 3, 1).index_select(0, which).permute(0, 3, 1, 2)


class Loaded:
    """A DataLoader's batches, shared out by accelerate."""

    where = "loaded batch by batch"

    def __init__(self, loader: DataLoader[Any], seed: int, accelerator: Any) -> None:
        """Raises PruneLabError where a batch cannot be shared out evenly."""
        self.seed = seed
        self._generators = _generators(loader)
        try:
            # Batches stay where they are until their labels have been looked at, which is free on a CPU alone.
            self.loader = accelerator.prepare_data_loader(loader, device_placement=False)
        except ValueError as error:
            raise PruneLabError(f"The loader's batches cannot be shared out among the processes: {error}") from error

    def __len__(self) -> int:
        """Steps in an epoch."""
        return len(self.loader)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """This process's share of an epoch's batches from a step on.

        Batches before it are loaded too, and forgotten: what is random in them must be drawn.
        """
        seed_all(self.seed, "data", number)
        for generator in self._generators:
            generator.manual_seed(seed_of(self.seed, "order", number))
        self.loader.set_epoch(number)
        for step, parts in enumerate(self.loader):
            if step >= start:
                yield Batch.of(parts)


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    holders = (loader, loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    found = (getattr(holder, "generator", None) for holder in holders)
    return [each for each in found if isinstance(each, torch.Generator)]


def training_source(train: Any, batch_size: int, seed: int, accelerator: Any) -> Held | Loaded:
    """Where the training batches come from: a loader is taken as it is, a set is shuffled.

    Raises:
        PruneLabError: it is empty, or nobody knows how long it is.
    """
    if not hasattr(getattr(train, "dataset", train), "__len__"):
        raise PruneLabError("Fine-tuning needs a training set of known length: a Dataset or a loader over one.")
    tensors = whole_tensors(train)
    if not len(train):
        raise PruneLabError("There are no images to fine-tune on: the training set is empty.")
    if tensors is not None:
        return Held(tensors, batch_size, seed, accelerator)
    loader = train if isinstance(train, DataLoader) else DataLoader(train, batch_size, shuffle=True)
    return Loaded(loader, seed, accelerator)


def whole_tensors(data: Any) -> tuple[Tensor, ...] | None:
    """The tensors of a set that holds itself whole in memory, or None."""
    return tuple(data.tensors) if isinstance(data, TensorDataset) else in_memory(data)


def fits(tensors: tuple[Tensor, ...], device: torch.device) -> bool:
    """Whether tensors are on a device, or small enough to be held there."""
    if device.type != "cuda":
        return device.type == "cpu"
    free, _ = torch.cuda.mem_get_info(device)
    return sum(each.numel() * each.element_size() for each in tensors) <= _SHARE_OF_DEVICE * free


def check_classes(labels: Any, outputs: int, which: str) -> None:
    """Class numbers beyond the outputs would fail deep inside the loss, on a GPU beyond repair.

    Args:
        outputs: how many the network has.
        which: of which set the labels are, for the message.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 1 or not len(labels):
        return
    low, high = (int(each) for each in labels.aminmax())
    # -100 is what PyTorch's cross entropy leaves out.
    if high >= outputs or (low < 0 and low != -100):
        edge = f"go up to {high}" if high >= outputs else f"begin at {low}"
        raise PruneLabError(f"The {which} labels {edge}, but the network has {outputs} outputs, counted from 0.")
