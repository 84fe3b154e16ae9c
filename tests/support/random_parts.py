"""What random networks are made of: modules and functions by name, each as small as can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations


class Excite(nn.Module):
    """Squeeze and excitation (Hu et al. 2018)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """The image with every channel scaled by a gate."""
        gate = self.up(self.down(x.mean((2, 3))).relu()).sigmoid()
        return x * gate[:, :, None, None]


class Padded(nn.Module):
    """Channels of zeros, before and after."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.register_buffer("before", torch.zeros(1, before, 1, 1), persistent=False)
        self.register_buffer("after", torch.zeros(1, after, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The image between the zeros."""
        n, _, h, w = x.shape
        return torch.cat([self.before.expand(n, -1, h, w), x, self.after.expand(n, -1, h, w)], 1)


class Pointwise(nn.Module):
    """A linear layer over channels, with the image's dimensions moved out of the way."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """The image with new channels."""
        out: Tensor = self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


class Flat(nn.Module):
    """The end: a map flattened, with more than one position for every channel, and linear layers."""

    def __init__(self, channels: int, size: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.size = size
        self.hidden, self.out = nn.Linear(channels * size * size, hidden), nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = functional.adaptive_avg_pool2d(x, self.size).flatten(1)
        logits: Tensor = self.out(self.hidden(x).relu())
        return logits


class Last(nn.Module):
    """A norm over channels, with the image's dimensions moved out of the way."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """The image, normed at every position."""
        out: Tensor = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return out


class Attend(nn.Module):
    """Attention over positions, with widths of its own for queries and keys, and for values."""

    def __init__(self, channels: int, width: int, values: int, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.q, self.k = nn.Linear(channels, width), nn.Linear(channels, width)
        self.v, self.out = nn.Linear(channels, values), nn.Linear(values, channels)

    def forward(self, x: Tensor) -> Tensor:
        """The image plus what its positions see of each other."""
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.q(tokens), self.k(tokens), self.v(tokens)
        if self.fused:
            seen = functional.scaled_dot_product_attention(q, k, v)
        else:
            seen = (q @ k.transpose(1, 2) * 0.5).softmax(-1) @ v
        out: Tensor = x + self.out(seen).transpose(1, 2).unflatten(2, x.shape[2:])
        return out


class Functional(nn.Module):
    """Bare parameters, used by functional calls."""

    def __init__(self, how: str, channels: int, outputs: int) -> None:
        super().__init__()
        self.how = how
        shape = {"conv2d": (outputs, channels, 1, 1), "scale": (channels,), "einsum": (channels,)}
        self.w = nn.Parameter(torch.randn(shape.get(how, (channels, outputs))))

    def forward(self, x: Tensor) -> Tensor:
        """The image with new channels, or with its own scaled."""
        if self.how == "conv2d":
            return functional.conv2d(x, self.w)
        if self.how == "scale":
            return x * self.w[None, :, None, None] + self.w.view(1, -1, 1, 1)
        if self.how == "einsum":
            return torch.einsum("nchw,c->nchw", x, self.w)
        last = x.permute(0, 2, 3, 1)
        out = last @ self.w if self.how == "matmul" else functional.linear(last, self.w.t())
        return out.permute(0, 3, 1, 2)


class Twice(nn.Module):
    """One convolution used twice, or two that share their weight."""

    def __init__(self, channels: int, tied: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1) if tied else self.first
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """The image after both."""
        out: Tensor = self.second(self.first(x).relu())
        return out


class Mean(nn.Module):
    """A second head: the mean of every channel, and a linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Two more numbers for every image."""
        out: Tensor = self.linear(x.mean((2, 3)))
        return out


def _convolution(inputs: int, outputs: int, kernel: int, groups: int, bias: bool) -> nn.Module:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=bias)


MODULES: dict[str, Any] = {
    "conv": _convolution,
    "transposed": lambda inputs, outputs: nn.ConvTranspose2d(inputs, outputs, 3, padding=1),
    "norm": nn.BatchNorm2d,
    "group_norm": nn.GroupNorm,
    "prelu": nn.PReLU,
    "excite": Excite,
    "padded": Padded,
    "pointwise": Pointwise,
    "up_grouped": lambda inputs, outputs, groups: nn.ConvTranspose2d(inputs, outputs, 3, padding=1, groups=groups),
    "weight_norm": lambda inputs, outputs: parametrizations.weight_norm(nn.Conv2d(inputs, outputs, 3, padding=1)),
    "instance_norm": lambda channels, affine, tracking: nn.InstanceNorm2d(channels, 1e-5, 0.1, affine, tracking),
    "layer_norm": lambda channels: Last(nn.LayerNorm(channels)),
    "rms_norm": lambda channels: Last(nn.RMSNorm(channels)),
    "attention": Attend,
    "functional": Functional,
    "twice": Twice,
    "second_input": lambda image, channels: nn.Conv2d(image, channels, 1),
    "second_output": Mean,
    "end": Flat,
}


def _shuffled(x: Tensor, _: list[Tensor], groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def _sliced(x: Tensor, _: list[Tensor], at: int, swap: bool) -> Tensor:
    parts = [x[:, :at].relu(), x[:, at:]]
    return torch.cat(parts[::-1] if swap else parts, 1)


def _halved(x: Tensor, _: list[Tensor]) -> Tensor:
    half = x.shape[1] // 2
    return torch.cat([x[:, half:], x[:, :half].tanh()], 1)


def _chunked(x: Tensor, _: list[Tensor], count: int, how: str) -> Tensor:
    first, *rest = x.chunk(count, 1)
    if how == "cat":
        return torch.cat([*rest, first.relu()], 1)
    for part in rest:
        first = first + part if how == "add" else first * part
    return first


def _overwritten(x: Tensor, _: list[Tensor]) -> Tensor:
    y = x * 1.5
    y[:, :, 1:].relu_()
    y += 0.25
    return y


def _stacked(x: Tensor, _: list[Tensor], how: str) -> Tensor:
    both = torch.stack([x, x.tanh()], 2)
    return both.sum(2) if how == "sum" else both.flatten(1, 2)


def _normalised(x: Tensor, _: list[Tensor]) -> Tensor:
    return functional.normalize(x, dim=1, eps=1e-3) + x.max(1, keepdim=True)[0]


def _fourier(x: Tensor, _: list[Tensor]) -> Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[-2:])


FUNCTIONS: dict[str, Any] = {
    "glu": lambda x, _: functional.glu(x, 1),
    "stacked": _stacked,
    "repeated": lambda x, _: x.repeat_interleave(2, 1).repeat(1, 2, 1, 1)[:, :, 1:],
    "pixel_shuffle": lambda x, _: functional.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x, _: functional.pixel_unshuffle(x, 2),
    "normalised": _normalised,
    "fourier": _fourier,
    "relu": lambda x, _: x.relu(),
    "relu_in_place": lambda x, _: functional.relu(x, inplace=True),
    "silu": lambda x, _: functional.silu(x),
    "sigmoid": lambda x, _: x.sigmoid(),
    "max_pool": lambda x, _: functional.max_pool2d(x, 2),
    "avg_pool": lambda x, _: functional.avg_pool2d(x, 2),
    "resize": lambda x, _: functional.interpolate(x, scale_factor=2, mode="nearest"),
    "frame": lambda x, _: functional.pad(x, (1, 0, 0, 1)),
    "add": lambda x, saved: x + saved.pop(),
    "cat": lambda x, saved: torch.cat([saved.pop(), x], 1),
    "chunked": _chunked,
    "sliced": _sliced,
    "halved": _halved,
    "shuffled": _shuffled,
    "flipped": lambda x, _: x.flip(1),
    "first_times_all": lambda x, _: x[:, :1] * x,
    "channel_mean": lambda x, _: x - x.mean(1, keepdim=True),
    "softmax": lambda x, _: x.softmax(1) * 4.0,
    "scaled": lambda x, _: x / x.shape[1],
    "overwritten": _overwritten,
}
