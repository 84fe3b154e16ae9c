"""What many tests need: networks with random norms, random selections, and ways to count and to compare."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.flop_counter import FlopCounterMode

from prunelab.program.program import Program
from prunelab.program.selection import Selection


@dataclass(frozen=True)
class Network:
    """How to build a network, and the smallest image that says something about it."""

    make: Callable[[], nn.Module]
    image: tuple[int, ...]

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The network in evaluation mode, with random weights and random norm statistics."""
        torch.manual_seed(0)
        return shaken(self.make()).to(dtype).eval()

    def images(self, count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
        """Random images, the same every time."""
        generator = torch.Generator().manual_seed(count)
        return torch.randn(count, *self.image, generator=generator, dtype=dtype)


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random statistics and weights in its norms, where new ones are all zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, _NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
                tensors = {"weight": 0.5, "bias": -0.3, "running_mean": -0.3, "running_var": 0.5}
                for name, least in tensors.items():
                    tensor = getattr(part, name, None)
                    if tensor is not None:
                        tensor.copy_(torch.rand(tensor.shape, generator=generator) + least)
    return model


def half_of_everything(program: Program, seed: int = 0, mask: bool = True) -> Selection:
    """A random half of the channels of every free layer, and a weight mask on one producer."""
    chance = random.Random(seed)
    free = [layer for layer in program.layers if not layer.pinned and layer.channels > 1]
    kept = {}
    for layer in free:
        count = layer.channels - layer.channels // 2
        kept[layer.name] = tuple(sorted(chance.sample(range(layer.channels), count)))
    masks = {}
    if mask and free:
        state = chance.choice(free).producers[0][0]
        generator = torch.Generator().manual_seed(seed)
        masks[state] = torch.rand(program.state(state).shape, generator=generator) > 0.3
    return Selection(kept, masks)


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))


def parameters(model: nn.Module) -> int:
    """Parameters, counted."""
    return sum(p.numel() for p in model.parameters())


def flops(model: nn.Module, *images: Tensor) -> int:
    """FLOPs of a batch (one tensor for every argument), as PyTorch counts them while it runs.

    Attention runs unfused meanwhile: PyTorch's counter sees nothing of its fused kernels on a CPU.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(*images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops())


def with_channels_at_zero(program: Program, selection: Selection) -> nn.Module:
    """A copy of the user's module, nothing cut, in which all that a selection removes is zero.

    Bypassed modules are replaced by identities.

    Where no operator looks at several channels at once (as a LayerNorm does), it computes what the smaller module
    computes, by another way.
    """
    program = program.under(selection)
    model = copy.deepcopy(program.model)
    for path in program.identities:
        model.set_submodule(path, nn.Identity())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, mask in selection.masks.items():
            tensors[name].mul_(mask)
        for name, kept in selection.kept.items():
            layer = program.layer(name)
            gone = sorted(set(range(layer.channels)) - set(kept))
            for slot in layer.slots:
                index = torch.from_numpy(slot.index[gone].reshape(-1).copy())
                tensors[slot.state].index_fill_(slot.dim, index, 0.0)
    return model
