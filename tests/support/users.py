"""Networks as users write them, each for one idiom, and what must hold of every one of them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from support import half_of_everything, parameters, relative, shaken, with_channels_at_zero
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import prunelab as pl
from prunelab.program.channels import OUTPUT, Layer
from prunelab.program.run import bind

Body = Callable[..., Any]


class Net(nn.Module):
    """Whatever parts and whatever forward a test wants."""

    def __init__(self, body: Body, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = body

    def forward(self, *args: Any) -> Any:
        """What the test's own function makes of the arguments."""
        return self.body(self, *args)


@dataclass(frozen=True)
class Case:
    """An idiom: a network that uses it, and exactly what can be removed from it.

    Attributes:
        body: the forward, called with the network and its arguments.
        parts: makes what the network holds, by name.
        free: the channels of every layer that can be pruned.
        pinned: why others cannot, as patterns; layers whose outputs are the network's are not named.
        image: shape of one image; ``args`` are the arguments instead where that is not enough.
        mixes: some operator looks at several channels at once, so that channels at zero still count.
        least: how narrow layers are cut; an einsum over a single channel is a product, which the FLOP counter
            does not count.
    """

    body: Body
    parts: Callable[[], Mapping[str, Any]]
    free: Mapping[str, int]
    pinned: Mapping[str, str] = field(default_factory=dict)
    image: tuple[int, ...] = (3, 6, 6)
    args: Callable[[], tuple[Any, ...]] | None = None
    mixes: bool = False
    least: int = 1

    def build(self) -> nn.Module:
        """The network in evaluation mode and float64, with random weights everywhere."""
        torch.manual_seed(0)
        return shaken(Net(self.body, **self.parts())).double().eval()

    def example(self) -> tuple[Any, ...]:
        """Arguments for two images."""
        torch.manual_seed(1)
        return self.args() if self.args is not None else (torch.randn(2, *self.image).double(),)


def check_case(case: Case) -> pl.Program:
    """What is free is free, what is pinned says why, and promise 1 holds; gives the program."""
    model, args = case.build(), case.example()
    program = pl.trace(model, args)
    assert free(program) == dict(case.free), program
    check_reasons(program, case.pinned)
    check_promise(program, args, case.mixes, case.least)
    return program


def free(program: pl.Program) -> dict[str, int]:
    """Channels of every layer that can be pruned."""
    return {layer.name: layer.channels for layer in program.layers if not layer.pinned}


def check_reasons(program: pl.Program, expected: Mapping[str, str]) -> None:
    """Every layer that is pinned for another reason than being the output says what it should."""
    said = {layer.name: layer.pinned for layer in program.layers if layer.pinned not in ("", OUTPUT)}
    assert said.keys() == expected.keys(), said
    for name, pattern in expected.items():
        assert re.search(pattern, said[name]), (name, said[name])


def selections(program: pl.Program, least: int = 1) -> list[pl.Selection]:
    """Random halves, every layer down to one channel (or ``least``), and single layers alone."""
    chance = random.Random(0)
    pruned = [layer for layer in program.layers if not layer.pinned and layer.channels > 1]
    # Weight norm divides by the length of a direction, which a mask may leave with nothing.
    mask = not any(node.opname == "_weight_norm" for node in program.nodes)
    halves = [half_of_everything(program, seed, mask) for seed in range(3)]

    def some(layer: Layer) -> tuple[int, ...]:
        return tuple(sorted(chance.sample(range(layer.channels), min(least, layer.channels))))

    single = [{layer.name: some(layer) for layer in pruned} for _ in range(2)]
    alone = [{layer.name: some(layer)} for layer in pruned]
    return [pl.DENSE, *halves, *map(pl.Selection, single), *map(pl.Selection, alone[:4])]


def check_promise(
    program: pl.Program, args: tuple[Any, ...], mixes: bool, least: int = 1, tolerance: float = 1e-10
) -> None:
    """Promise 1: preview equals commit, projected equals counted, and both equal the network with zeros."""
    for selection in selections(program, least):
        small = pl.commit(program, selection)
        with torch.no_grad():
            expected = leaves(small(*args))
        # The counter does not see into fused attention.
        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            small(*first_image(args))
        agree(bind(program, selection).run(tuple(tree_leaves(args))), expected, tolerance)
        if not mixes:
            with torch.no_grad():
                agree(leaves(with_channels_at_zero(program, selection)(*args)), expected, tolerance)
        projected = pl.cost(program, selection)
        assert projected.params == parameters(small)
        assert projected.flops == counter.get_total_flops(), dict(selection.kept)
        assert projected.bytes == held_bytes(small)


def first_image(args: tuple[Any, ...]) -> Any:
    """The arguments for one image."""
    count = len(next(a for a in tree_leaves(args) if isinstance(a, Tensor)))
    return tree_map(lambda a: a[:1] if isinstance(a, Tensor) and a.dim() and len(a) == count else a, args)


def leaves(output: Any) -> list[Any]:
    """The tensors and numbers of an output."""
    return list(tree_leaves(output))


def agree(ours: Any, theirs: Any, tolerance: float) -> None:
    """Two lists of tensors (and numbers) are the same."""
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(b, Tensor) and b.is_floating_point():
            assert relative(a, b) < tolerance
        elif isinstance(b, Tensor):
            assert torch.equal(a, b)
        else:
            assert a == b


def held_bytes(model: nn.Module) -> int:
    """Bytes of what a module's state holds, each tensor once."""
    held = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}
    return sum(held.values())


def conv(inputs: int, outputs: int, kernel: int = 3, **given: Any) -> nn.Conv2d:
    """A convolution that keeps the size of the image."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **given)


def between(middle: Body, after: int = 8, features: int = 6, **parts: Callable[[], Any]) -> tuple[Body, Any]:
    """A convolution ``a`` of 8 filters, what a test does, a convolution ``b`` of 6 that reads ``after`` channels.

    The rest of the network is a mean over positions and a linear layer.
    """

    def body(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.head(m.b(middle(m, m.a(x))).mean((2, 3)))
        return out

    def build() -> dict[str, Any]:
        made = {name: make() for name, make in parts.items()}
        return {"a": conv(3, 8), "b": conv(after, features), "head": nn.Linear(features, 3), **made}

    return body, build
