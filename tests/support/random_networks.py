"""Random small networks, each built from a description that prints, and what must hold of them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import event, note, strategies as st
from random_parts import FUNCTIONS, MODULES
from support import flops, parameters, relative, shaken, with_channels_at_zero
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

import prunelab as pl
from prunelab.program.cache import Cache
from prunelab.program.incremental import Incremental
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
        return any(step[0] in MIXING for step in self.steps)

    def images(self, count: int) -> tuple[Tensor, ...]:
        """Random images, one tensor for every argument of forward."""
        arguments = 1 + any(step[0] == "second_input" for step in self.steps)
        shape = (count, self.channels, self.size, self.size)
        return tuple(torch.randn(shape, dtype=torch.float64) for _ in range(arguments))


class Built(nn.Module):
    """The network of a description. Steps with weights have a module of the step's own number."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.description = description
        self.parts = nn.ModuleDict()
        for number, (name, *given) in enumerate(description.steps):
            if name in MODULES:
                self.parts[str(number)] = MODULES[name](*given)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor | dict[str, Any]:
        """Logits ``(images, classes)``, with what other heads say where there are any."""
        saved: list[Tensor] = []
        said: list[Tensor] = []
        for number, (name, *given) in enumerate(self.description.steps):
            if name == "save":
                saved.append(x)
            elif name == "second_input":
                x = x + functional.interpolate(self.parts[str(number)](other), size=x.shape[2:])
            elif name == "second_output":
                said.append(self.parts[str(number)](x))
            elif name in MODULES:
                x = self.parts[str(number)](x)
            else:
                x = FUNCTIONS[name](x, saved, *given)
        return {"logits": x, "others": said} if said else x


MIXING = {
    *("group_norm", "channel_mean", "softmax", "layer_norm", "rms_norm", "attention", "weight_norm", "normalised"),
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
    "normalised",
    "fourier",
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
    "weight_norm",
    "instance_norm",
    "layer_norm",
    "rms_norm",
    "attention",
    "functional",
    "twice",
    "second_input",
    "second_output",
)
SHAPED = (
    *("shuffled", "chunked", "sliced", "padded", "residual", "residual", "dense", "group_norm", "pool"),
    *("glu", "stacked", "repeated", "pixel_shuffle", "pixel_unshuffle", "up_grouped"),
)


@st.composite
def descriptions(draw: st.DrawFn) -> Description:
    """Networks of a few steps after a first convolution."""
    image = draw(st.sampled_from((1, 3)))
    channels, size = draw(st.sampled_from((4, 6, 8, 12))), 6
    steps: list[Step] = [("conv", image, channels, 3, 1, draw(st.booleans()))]
    for _ in range(draw(st.integers(0, 7))):
        new, channels, size = _block(draw, image, channels, size)
        steps += new
    steps.append(("end", channels, draw(st.sampled_from((1, 2))), draw(st.integers(2, 6)), 3))
    return Description(image, 6, tuple(steps))


def _block(draw: st.DrawFn, image: int, channels: int, size: int) -> tuple[list[Step], int, int]:
    """A few steps that belong together, and the channels and size after them."""
    kind = draw(st.sampled_from((*PLAIN, *WEIGHED, *SHAPED)))
    divisors = [d for d in (2, 3, 4) if channels % d == 0 and channels > d]
    if kind in ("glu", "stacked", "repeated", "pixel_shuffle", "pixel_unshuffle"):
        return _resized(draw, kind, channels, size)
    if kind in ("norm", "prelu", "layer_norm", "rms_norm", "second_output"):
        return [(kind, channels)], channels, size
    if kind in ("instance_norm", "attention", "twice", "second_input"):
        given = {
            "instance_norm": (channels, draw(st.booleans()), draw(st.booleans())),
            "attention": (channels, draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.booleans())),
            "twice": (channels, draw(st.booleans())),
            "second_input": (image, channels),
        }[kind]
        return [(kind, *given)], channels, size
    if kind == "functional":
        how = draw(st.sampled_from(("conv2d", "scale", "einsum", "matmul", "linear")))
        outputs = channels if how in ("scale", "einsum") else draw(st.sampled_from((4, 6)))
        return [(kind, how, channels, outputs)], outputs, size
    if kind in ("conv", "pointwise", "transposed", "weight_norm"):
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
    if kind == "group_norm":
        divisors = [*divisors, 1, channels]
    if kind in ("shuffled", "grouped", "group_norm", "chunked", "up_grouped") and divisors:
        return _divided(draw, kind, channels, size, draw(st.sampled_from(divisors)))
    if (kind in FUNCTIONS and kind not in ("shuffled", "sliced", "chunked", "halved")) or channels % 2 == 0:
        return [(kind if kind in PLAIN else "relu",)], channels, size
    return [("relu",)], channels, size


def _resized(draw: st.DrawFn, kind: str, channels: int, size: int) -> tuple[list[Step], int, int]:
    """Steps that make more or fewer channels of those there are; an activation where they do not fit."""
    how = draw(st.sampled_from(("sum", "flatten")))
    steps: dict[str, tuple[list[Step], int, int]] = {
        "glu": ([("glu",)], channels // 2, size),
        "stacked": ([("stacked", how)], channels * (1 if how == "sum" else 2), size),
        "repeated": ([("repeated",)], channels * 4, size - 1),
        "pixel_shuffle": ([("pixel_shuffle",)], channels // 4, size * 2),
        "pixel_unshuffle": ([("pixel_unshuffle",)], channels * 4, size // 2),
    }
    by = {"glu": 2, "pixel_shuffle": 4}.get(kind, 1)
    fits = channels % by == 0 and 1 <= steps[kind][1] <= 24 and 2 <= steps[kind][2] <= 12
    even = kind != "pixel_unshuffle" or size % 2 == 0
    return steps[kind] if fits and even else ([("relu",)], channels, size)


def _divided(draw: st.DrawFn, kind: str, channels: int, size: int, by: int) -> tuple[list[Step], int, int]:
    if kind == "shuffled":
        return [(kind, by)], channels, size
    if kind == "group_norm":
        return [(kind, by, channels)], channels, size
    if kind == "grouped":
        outputs = by * draw(st.integers(1, 3))
        return [("conv", channels, outputs, 3, by, draw(st.booleans()))], outputs, size
    if kind == "up_grouped":
        outputs = by * draw(st.integers(1, 3))
        return [(kind, channels, outputs, by)], outputs, size
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
        # A direction of which a mask leaves nothing has no norm.
        if ".parametrizations." not in state:
            masks[state] = torch.rand(program.state(state).shape) > 0.5
    return pl.Selection(kept, masks, bypassed)


def check(description: Description, seed: int) -> None:
    """Promise 1 and 3 on one network: what is cut computes what was previewed, and costs what was projected."""
    note(f"check({description!r}, {seed})")
    torch.manual_seed(seed)
    model = shaken(Built(description), seed).double().eval()
    images = description.images(2)
    program = pl.trace(model, images)
    note(repr(program))
    _agree(bind(program).run(images), model, images)
    selection = selection_of(program, seed)
    note(f"{selection.bypassed} {dict(selection.kept)}")
    small = pl.commit(program, selection)
    _agree(bind(program, selection).run(images), small, images)
    if not description.mixes:
        _agree(bind(program, selection).run(images), with_channels_at_zero(program, selection), images)
    _check_incremental(program, selection, images)
    projected = pl.cost(program, selection)
    assert projected.params == parameters(small)
    assert projected.flops == flops(small, *(x[:1] for x in images))
    state = {t.data_ptr(): t for t in small.state_dict().values()}.values()
    assert projected.bytes == sum(t.numel() * t.element_size() for t in state)
    _check_profile(program, images)


def _check_incremental(program: Program, selection: pl.Selection, images: tuple[Tensor, ...]) -> None:
    """Values kept from other selections, and norms folded into convolutions, give the same outputs."""
    exact = Incremental(program, Cache())
    folding = Incremental(program, Cache(), fast=torch.float64)
    for chosen in (pl.DENSE, selection, pl.DENSE, selection):
        expected = bind(program, chosen)(*images)
        assert torch.equal(exact(exact.prepare(chosen, {}), images, "batch"), expected)
        assert relative(folding(folding.prepare(chosen, {}), images, "batch"), expected) < 1e-10


def _agree(ours: tuple[Any, ...], model: nn.Module, images: tuple[Tensor, ...]) -> None:
    """Every output is that of the module."""
    with torch.no_grad():
        theirs = tree_leaves(model(*images))
    assert all(relative(a, b) < 1e-10 for a, b in zip(ours, theirs, strict=True))


def _check_profile(program: Program, images: tuple[Tensor, ...]) -> None:
    """Every layer has a site where all its channels are seen, and so a score."""
    profile = pl.profile(program, iter([images]), cache=False, progress=False)
    plan = pl.Plan("apoz")
    for layer in program.layers:
        if not layer.pinned:
            plan = plan.set(layer.name, ratio=0.5)
    kept = plan.resolve(program, profile).kept
    free = {layer.name: layer.channels for layer in program.layers if not layer.pinned and layer.channels > 1}
    assert {name: len(channels) for name, channels in kept.items()} == {n: c - c // 2 for n, c in free.items()}
