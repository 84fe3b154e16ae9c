"""Random small convolutional networks, each built from a description that prints, and what must hold of them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import event, note, strategies as st
from support import flops, parameters, relative, shaken, with_channels_at_zero
from torch import Tensor, nn
from torch.nn import functional

import prunelab as pl
from prunelab.program.program import Program
from prunelab.program.run import bind

Step = tuple[Any, ...]


@dataclass(frozen=True)
class Description:
    """A network as plain values: the size of its images, and what is done to them in order."""

    channels: int
    size: int
    steps: tuple[Step, ...]

    @property
    def mixes(self) -> bool:
        """Whether some operator looks at several channels at once, so that zero channels still count."""
        return any(step[0] in ("group_norm", "channel_mean", "softmax") for step in self.steps)


class Built(nn.Module):
    """The network of a description. Steps with weights have a module of the step's own number."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.description = description
        self.parts = nn.ModuleDict()
        for number, (name, *given) in enumerate(description.steps):
            if name in MODULES:
                self.parts[str(number)] = MODULES[name](*given)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(images, classes)``."""
        saved: list[Tensor] = []
        for number, (name, *given) in enumerate(self.description.steps):
            if name == "save":
                saved.append(x)
            elif name in MODULES:
                x = self.parts[str(number)](x)
            else:
                x = FUNCTIONS[name](x, saved, *given)
        return x


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


FUNCTIONS: dict[str, Any] = {
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

PLAIN = (
    "relu_in_place",
    "relu",
    "relu",
    "silu",
    "sigmoid",
    "flipped",
    "first_times_all",
    "halved",
    "scaled",
    "overwritten",
    "channel_mean",
)
WEIGHED = (
    "conv",
    "conv",
    "depthwise",
    "grouped",
    "norm",
    "norm",
    "excite",
    "pointwise",
    "prelu",
    "transposed",
)
SHAPED = ("shuffled", "chunked", "sliced", "padded", "residual", "residual", "dense", "group_norm", "pool")


@st.composite
def descriptions(draw: st.DrawFn) -> Description:
    """Networks of a few steps after a first convolution."""
    image = draw(st.sampled_from((1, 3)))
    channels, size = draw(st.sampled_from((4, 6, 8, 12))), 6
    steps: list[Step] = [("conv", image, channels, 3, 1, draw(st.booleans()))]
    for _ in range(draw(st.integers(0, 7))):
        new, channels, size = _block(draw, channels, size)
        steps += new
    steps.append(("end", channels, draw(st.sampled_from((1, 2))), draw(st.integers(2, 6)), 3))
    return Description(image, 6, tuple(steps))


def _block(draw: st.DrawFn, channels: int, size: int) -> tuple[list[Step], int, int]:
    """A few steps that belong together, and the channels and size after them."""
    kind = draw(st.sampled_from((*PLAIN, *WEIGHED, *SHAPED)))
    divisors = [d for d in (2, 3, 4) if channels % d == 0 and channels > d]
    if kind in ("norm", "prelu"):
        return [(kind, channels)], channels, size
    if kind in ("conv", "pointwise", "transposed"):
        outputs = draw(st.sampled_from((4, 6, 8)))
        given = (draw(st.sampled_from((1, 3))), 1, draw(st.booleans())) if kind == "conv" else ()
        return [(kind, channels, outputs, *given)], outputs, size
    if kind == "depthwise":
        outputs = channels * draw(st.sampled_from((1, 1, 2)) if channels <= 8 else st.just(1))
        return [("conv", channels, outputs, 3, channels, draw(st.booleans()))], outputs, size
    if kind == "excite":
        return [(kind, channels, draw(st.integers(1, 4)))], channels, size
    if kind == "padded" and channels <= 12:
        before, after = draw(st.integers(0, 2)), draw(st.integers(1, 3))
        return [(kind, before, after)], channels + before + after, size
    if kind == "sliced" and channels > 1:
        return [(kind, draw(st.integers(1, channels - 1)), draw(st.booleans()))], channels, size
    if kind == "residual":
        inner = draw(st.sampled_from((2, 4, 6)))
        body = [("save",), ("conv", channels, inner, 3, 1, True), ("relu",)]
        return [*body, ("conv", inner, channels, 1, 1, False), ("norm", channels), ("add",)], channels, size
    if kind == "dense" and channels <= 12:
        grown = draw(st.integers(1, 4))
        return [("save",), ("conv", channels, grown, 3, 1, True), ("cat",)], channels + grown, size
    if kind == "pool":
        name = draw(st.sampled_from(("max_pool", "avg_pool", "resize", "frame")))
        after = {"resize": size * 2, "frame": size + 1}.get(name, size // 2)
        return ([(name,)], channels, after) if 2 <= after <= 12 else ([("relu",)], channels, size)
    if kind in ("shuffled", "grouped", "group_norm", "chunked") and divisors:
        return _divided(draw, kind, channels, size, draw(st.sampled_from(divisors)))
    if (kind in FUNCTIONS and kind not in ("shuffled", "sliced", "chunked", "halved")) or channels % 2 == 0:
        return [(kind if kind in PLAIN else "relu",)], channels, size
    return [("relu",)], channels, size


def _divided(draw: st.DrawFn, kind: str, channels: int, size: int, by: int) -> tuple[list[Step], int, int]:
    if kind == "shuffled":
        return [(kind, by)], channels, size
    if kind == "group_norm":
        return [(kind, by, channels)], channels, size
    if kind == "grouped":
        outputs = by * draw(st.integers(1, 3))
        return [("conv", channels, outputs, 3, by, draw(st.booleans()))], outputs, size
    how = draw(st.sampled_from(("add", "mul", "cat")))
    return [(kind, by, how)], channels if how == "cat" else channels // by, size


def selection_of(program: Program, seed: int) -> pl.Selection:
    """Random units bypassed, random channels of some free layers, down to a single one, and a mask on one producer."""
    chance = random.Random(seed)
    bypassed = tuple(unit.name for unit in program.units if chance.random() < 0.3)
    event(f"{'no' if not bypassed else 'some'} bypassed units")
    program = program.without(bypassed)
    free = [layer for layer in program.layers if not layer.pinned and layer.channels > 1]
    event(f"{'no' if not free else 'some'} free layers")
    kept = {}
    for layer in free:
        if chance.random() < 0.9:
            count = chance.randint(1, layer.channels)
            kept[layer.name] = tuple(sorted(chance.sample(range(layer.channels), count)))
    masks = {}
    if free and chance.random() < 0.5:
        state = chance.choice(free).producers[0][0]
        masks[state] = torch.rand(program.state(state).shape) > 0.5
    return pl.Selection(kept, masks, bypassed)


def check(description: Description, seed: int) -> None:
    """Promise 1 and 3 on one network: what is cut computes what was previewed, and costs what was projected."""
    torch.manual_seed(seed)
    model = shaken(Built(description), seed).double().eval()
    images = torch.randn(2, description.channels, description.size, description.size, dtype=torch.float64)
    program = pl.trace(model, images)
    note(repr(program))
    with torch.no_grad():
        assert relative(bind(program)(images), model(images)) < 1e-10
    selection = selection_of(program, seed)
    note(f"{selection.bypassed} {dict(selection.kept)}")
    small = pl.commit(program, selection)
    with torch.no_grad():
        logits = small(images)
        assert relative(bind(program, selection)(images), logits) < 1e-10
        if not description.mixes:
            assert relative(with_channels_at_zero(program, selection)(images), logits) < 1e-10
    projected = pl.cost(program, selection)
    assert projected.params == parameters(small)
    assert projected.flops == flops(small, images[:1])
    state = small.state_dict().values()
    assert projected.bytes == sum(t.numel() * t.element_size() for t in state)
    _check_profile(program, images)


def _check_profile(program: Program, images: Tensor) -> None:
    """Every layer has a site where all its channels are seen, and so a score."""
    profile = pl.profile(program, images, cache=False, progress=False)
    plan = pl.Plan("apoz")
    for layer in program.layers:
        if not layer.pinned:
            plan = plan.set(layer.name, ratio=0.5)
    kept = plan.resolve(program, profile).kept
    free = {layer.name: layer.channels for layer in program.layers if not layer.pinned and layer.channels > 1}
    assert {name: len(channels) for name, channels in kept.items()} == {n: c - c // 2 for n, c in free.items()}
