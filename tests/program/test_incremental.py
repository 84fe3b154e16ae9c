"""The incremental interpreter: the same outputs as the plain one, and only what changed is computed again."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
import torchvision.models as tv
from support import Network, half_of_everything, relative
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import prunelab as pl
from prunelab import zoo
from prunelab.program.cache import Cache
from prunelab.program.fold import find_folds
from prunelab.program.incremental import Incremental
from prunelab.program.run import bind
from prunelab.repair import repair


class Overwriting(nn.Module):
    """Part of a value is overwritten before it is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x)) * 1.5
        y[:, :, 1:].relu_()
        out: Tensor = self.last(y.mean((2, 3)))
        return out


NETWORKS = {
    "overwriting": Network(Overwriting, (3, 8, 8)),
    "residual": Network(lambda: zoo.resnet20(), (3, 16, 16)),
    "chain": Network(lambda: zoo.vgg_small(), (1, 28, 28)),
    "bottlenecks": Network(lambda: tv.resnet50(), (3, 32, 32)),
    "depthwise": Network(lambda: tv.mobilenet_v3_small(), (3, 32, 32)),
    "shuffled groups": Network(lambda: tv.shufflenet_v2_x0_5(), (3, 32, 32)),
    "dense": Network(lambda: tv.DenseNet(8, (2, 2), 8), (3, 32, 32)),
    "attention": Network(lambda: tv.VisionTransformer(16, 4, 2, 2, 8, 16), (3, 16, 16)),
}


class Convolutions(TorchDispatchMode):
    """Counts what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket is torch.ops.aten.convolution
        return func(*args, **kwargs or {})


def walk(program: pl.Program, count: int, seed: int = 0) -> list[pl.Selection]:
    """Selections, each a little different from the one before, some with masks and bypassed units, some seen before."""
    chance = random.Random(seed)
    kept: dict[str, tuple[int, ...]] = {}
    found = [pl.DENSE]
    units = [unit.name for unit in program.units]
    for _ in range(count):
        layer = chance.choice([layer for layer in program.layers if not layer.pinned and layer.channels > 1])
        number = chance.randint(1, layer.channels)
        kept = {**kept, layer.name: tuple(sorted(chance.sample(range(layer.channels), number)))}
        masks = half_of_everything(program, chance.randrange(3)).masks if chance.random() < 0.3 else {}
        bypassed = tuple(chance.sample(units, 1)) if units and chance.random() < 0.3 else ()
        if bypassed:
            there = {layer.name: layer for layer in program.without(bypassed).layers if not layer.pinned}
            inside = {n: c for n, c in kept.items() if n in there and max(c) < there[n].channels}
            found.append(pl.Selection(inside, masks, bypassed))
        else:
            found.append(pl.Selection(kept, masks))
    return [*found, *chance.sample(found, min(3, len(found)))]


@pytest.mark.parametrize("budget", [2**20, 2**28])
@pytest.mark.parametrize("network", NETWORKS)
def test_outputs_are_those_of_the_plain_interpreter(network: str, budget: int) -> None:
    net = NETWORKS[network]
    program, images = pl.trace(net.build(), net.images()), net.images()
    exact = Incremental(program, Cache(budget))
    folding = Incremental(program, Cache(budget), fast=torch.float64)
    for selection in walk(program, 6):
        expected = bind(program, selection)(images)
        # The same operators on the same values give the same bits; folding rounds differently.
        assert torch.equal(exact(exact.prepare(selection, {}), (images,), 0), expected)
        assert relative(folding(folding.prepare(selection, {}), (images,), 0), expected) < 1e-10


def test_repaired_tensors_are_part_of_the_address() -> None:
    net = NETWORKS["residual"]
    program, images = pl.trace(net.build(), net.images(8)), net.images(8)
    selection, engine = half_of_everything(program), Incremental(program, Cache())
    mended = repair(program, selection, "least-squares", images)
    repairs = [{}, mended, {name: tensor + 0.1 for name, tensor in mended.items()}]
    outputs = []
    for repaired in (*repairs, *repairs):
        outputs.append(engine(engine.prepare(selection, repaired), (images,), 0))
        assert torch.equal(outputs[-1], bind(program, selection).replaced(repaired)(images))
    assert all(relative(a, b) > 1e-3 for a, b in ((outputs[0], outputs[1]), (outputs[1], outputs[2])))


def test_only_what_a_change_can_affect_runs_again() -> None:
    net = NETWORKS["residual"]
    program, images = pl.trace(net.build(), net.images()), net.images()
    engine = Incremental(program, Cache())

    def run(selection: pl.Selection) -> int:
        prepared = engine.prepare(selection, {})
        with Convolutions() as seen:
            engine(prepared, (images,), 0)
        return seen.count

    assert run(pl.DENSE) == 19
    assert run(pl.DENSE) == 0
    assert run(pl.Selection({"layer3.2.conv1": (0, 1, 2)})) == 2
    assert run(pl.Selection({"layer2.0.conv1": (0, 1, 2)})) == 12
    # The unpruned network's first layers serve any cut of later ones, whatever was run meanwhile.
    assert run(pl.Selection({"layer3.1.conv1": (5, 6), "layer3.2.conv1": (1,)})) == 4
    assert run(pl.Selection({"layer3.1.conv1": (5, 6), "layer3.2.conv1": (2,)})) == 2
    assert run(pl.DENSE) == 0
    assert run(pl.Selection({"layer1.0.conv1": (1,)})) == 18
    # A bypassed block: what comes before it stays.
    assert run(pl.Selection(bypassed=("layer3.1",))) == 2


def test_only_what_changed_is_sliced() -> None:
    net = NETWORKS["residual"]
    program = pl.trace(net.build(), net.images())
    engine = Incremental(program, Cache(), fast=torch.bfloat16)
    before = engine.prepare(pl.DENSE, {}).bound
    after = engine.prepare(pl.Selection({"layer2.1.conv1": (0, 1)}), {}).bound
    changed = {program.nodes[i].target for i, t in after.states.items() if t is not before.states[i]}
    assert {name.rpartition(".")[0] for name in changed} == {"layer2.1.conv1", "layer2.1.bn1", "layer2.1.conv2"}
    new = [i for i, a in after.args.items() if a.get("weight") is not before.args[i].get("weight")]
    assert len(new) == 2


class Twice(nn.Module):
    """One convolution's value that a norm and an addition read, and one that only a norm reads."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.alone = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, bias=False)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)
        self.flat, self.last = nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(x)
        x = x + self.first(x)
        out: Tensor = self.last(self.flat(self.second(self.alone(x)).mean((2, 3))))
        return out


def test_a_norm_is_folded_only_where_nobody_else_reads_what_it_reads() -> None:
    net = Network(Twice, (3, 6, 6))
    program, images = pl.trace(net.build(), net.images()), net.images()
    assert [fold.norm.module for fold in find_folds(program)] == ["second", "last"]
    engine = Incremental(program, Cache(), fast=torch.float64)
    for selection in walk(program, 5):
        expected = bind(program, selection)(images)
        assert relative(engine(engine.prepare(selection, {}), (images,), 0), expected) < 1e-12


def test_batches_do_not_mix() -> None:
    net = NETWORKS["chain"]
    program = pl.trace(net.build(), net.images())
    engine = Incremental(program, Cache())
    prepared = engine.prepare(half_of_everything(program), {})
    for _ in range(2):
        for count in (2, 3, 4):
            images = net.images(count)
            assert torch.equal(engine(prepared, (images,), count), bind(program, half_of_everything(program))(images))


def test_addresses_are_all_different() -> None:
    net = NETWORKS["residual"]
    program = pl.trace(net.build(), net.images())
    engine = Incremental(program, Cache())
    addresses = engine.prepare(half_of_everything(program), {}).addresses
    assert max(Counter(addresses).values()) == 1
