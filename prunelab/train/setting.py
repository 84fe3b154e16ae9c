"""The machine under a training: accelerator, precision, memory layout; and the module as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunelab.errors import PruneLabError
from prunelab.machine import cpu_gains_from_bfloat16
from prunelab.program.guard import eval_mode
from prunelab.program.trace import state_tensors
from prunelab.progress import say_once
from prunelab.train.data import in_layout


class Shell(nn.Module):
    """Stands around the user's network: what accelerate puts into a module's forward stays out of theirs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        """What the network gives."""
        return self.model(*inputs)


def best_precision() -> str:
    """What this machine trains fastest in, and safely: bfloat16 where it has it, float16 on older GPUs.

    On a CPU with AMX bfloat16 takes a little over half the time of float32.
    """
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if cpu_gains_from_bfloat16() else "no"


@contextmanager
def accelerated(precision: str | None) -> Iterator[Any]:
    """An accelerator of this precision, whatever precision a training before it, or the user's own, had."""
    from accelerate import Accelerator, DataLoaderConfiguration, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    if not torch.cuda.is_available():
        say_once("No GPU was found: fine-tuning runs on the CPU.")
    before = dict(AcceleratorState._shared_state)
    AcceleratorState._reset_state()
    try:
        yield Accelerator(
            mixed_precision=precision or best_precision(),
            # A batch is that of all processes together: as many steps, and the same images in each, on any number.
            dataloader_config=DataLoaderConfiguration(split_batches=True),
            # The others wait while the main process repairs a large network.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=1))],
        )
    finally:
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(before)


@contextmanager
def as_it_was(model: nn.Module, optimizer: Any) -> Iterator[None]:
    """Afterwards training flags, device and memory layout are those of before; so are an optimizer's rates."""
    flags = [(m, m.training) for m in model.modules()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    strides = {name: t.stride() for name, t in state_tensors(model).items() if t.dim() == 4}
    rates = [group["lr"] for group in optimizer.param_groups] if isinstance(optimizer, Optimizer) else []
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
        model.to(device)
        for name, tensor in state_tensors(model).items():
            if name in strides and tensor.stride() != strides[name]:
                before = torch.empty_strided(tensor.shape, strides[name], dtype=tensor.dtype, device=tensor.device)
                tensor.data = before.copy_(tensor)
        if isinstance(optimizer, Optimizer):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            lay_out_like_parameters(optimizer)


def lay_out_like_parameters(optimizer: Optimizer) -> None:
    """Momenta, and what else has its parameter's shape, on their parameter's device and in its memory layout."""
    for parameter, held in optimizer.state.items():
        for key, value in held.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                held[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def laid_out(model: nn.Module, inputs: tuple[Any, ...], wanted: bool | None) -> tuple[bool, Any]:
    """Bring a network into the memory layout that is faster, if its forward takes it; try it on a few images.

    Args:
        inputs: on the network's device.
        wanted: True or False decide; None tries ``channels_last`` where there are filters.

    Returns:
        Whether it is ``channels_last``, and the outputs for the inputs.

    Raises:
        PruneLabError: the network does not take these images, or not in the layout that is wanted.
    """
    filters = any(p.dim() == 4 for p in model.parameters())
    if wanted is not False and filters:
        model.to(memory_format=torch.channels_last)
        # Forwards with .view() may not take it.
        with suppress(RuntimeError):
            return True, _outputs(model, in_layout(inputs, channels_last=True))
        if wanted:
            raise PruneLabError(
                "The network's forward does not take the channels_last layout: leave channels_last out."
            )
        model.to(memory_format=torch.contiguous_format)
    try:
        return False, _outputs(model, inputs)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(each.shape)) for each in inputs if isinstance(each, Tensor))
        raise PruneLabError(f"The network does not take a batch of shape {shapes} from the data: {error}") from error


@torch.no_grad()
def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    with eval_mode(model):
        return model(*inputs)
