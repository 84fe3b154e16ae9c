"""The interpreter: what it keeps, frees and says on the way."""

from __future__ import annotations

import weakref

import torch
from support import Network, relative
from torch import Tensor

import prunelab as pl
from prunelab import zoo
from prunelab.program.run import bind

NETWORK = Network(zoo.resnet20, (3, 16, 16))


def test_watched_values_are_those_of_the_users_modules() -> None:
    model = NETWORK.build()
    seen: dict[str, Tensor] = {}
    model.get_submodule("layer2.1.bn1").register_forward_hook(lambda _, __, out: seen.update(hooked=out.clone()))
    program = pl.trace(model, NETWORK.images())
    seen.clear()
    site = next(n.index for n in program.nodes if n.module == "layer2.1.bn1" and n.opname == "batch_norm")
    bind(program).run((NETWORK.images(),), {site: lambda value: seen.update(watched=value.clone())})
    with torch.no_grad():
        model(NETWORK.images())
    assert relative(seen["watched"], seen["hooked"]) < 1e-12


def test_values_are_freed_when_nobody_reads_them_any_more() -> None:
    program = pl.trace(NETWORK.build(), NETWORK.images())
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watch(value: Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(value))
        most = max(most, sum(ref() is not None for ref in alive))

    operators = [n.index for n in program.nodes if n.kind == "op" and n.shape is not None]
    bind(program).run((NETWORK.images(),), dict.fromkeys(operators, watch))
    assert len(operators) > 60
    # A residual block holds its input, what it computes, and the few values that go on into it.
    assert most <= 8


def test_any_number_of_images() -> None:
    program = pl.trace(NETWORK.build(), NETWORK.images())
    bound = bind(program, pl.Selection({"layer1.0.conv1": (0, 5)}))
    images = NETWORK.images(7)
    parts = torch.cat([bound(part) for part in images.split(3)])
    assert relative(bound(images), parts) < 1e-12


def test_a_program_reads_the_weights_as_they_are_now() -> None:
    model = NETWORK.build()
    program = pl.trace(model, NETWORK.images())
    before = bind(program)(NETWORK.images())
    with torch.no_grad():
        model.linear.weight.mul_(2.0)
        model.linear.bias.mul_(2.0)
    assert relative(bind(program)(NETWORK.images()), 2 * before) < 1e-12
