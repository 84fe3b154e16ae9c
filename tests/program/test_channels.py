"""Channels: what every family of operators ties together and pins, shown on networks that use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import Network, flops, half_of_everything, parameters, relative, with_channels_at_zero
from torch import Tensor, nn
from torch.nn import functional

import prunelab as pl
from prunelab import zoo
from prunelab.program.context import Context
from prunelab.program.ids import FIXED, Ties, merge, split
from prunelab.program.nodes import Node
from prunelab.program.rules import apply
from prunelab.program.run import bind

Body = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Two convolutions of 8 filters, whatever a test does between them, and a linear layer."""

    def __init__(self, body: Body, second: nn.Module | None, features: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), second or nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.slope = nn.BatchNorm2d(8), nn.PReLU(8)
        self.groups, self.layer = nn.GroupNorm(2, 8), nn.LayerNorm([8, 6, 6])
        self.head = nn.Linear(features, 5)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self, self.a(x))
        logits: Tensor = self.head(y.mean((2, 3)) if y.dim() == 4 else y)
        return logits


def check(body: Body, second: nn.Module | None = None, features: int = 8, mixes: bool = False) -> pl.Program:
    """Promise 1 on the network, also against channels at zero unless some operator mixes them; gives the program."""
    net = Network(lambda: Net(body, second, features), (3, 6, 6))
    program = pl.trace(net.build(), net.images())
    for seed in range(3):
        selection = half_of_everything(program, seed)
        small = pl.commit(program, selection)
        with torch.no_grad():
            logits = small(net.images())
            assert relative(bind(program, selection)(net.images()), logits) < 1e-10
            if not mixes:
                assert relative(with_channels_at_zero(program, selection)(net.images()), logits) < 1e-10
        assert pl.cost(program, selection).params == parameters(small)
        assert pl.cost(program, selection).flops == flops(small, net.images(1))
    return program


def free(program: pl.Program) -> dict[str, int]:
    """Channels of every layer that can be pruned."""
    return {layer.name: layer.channels for layer in program.layers if not layer.pinned}


PLAIN: dict[str, Body] = {
    "activations": lambda net, y: net.b(functional.gelu(functional.hardswish(y)).clamp(-1, 4)),
    "norm and slope": lambda net, y: net.b(net.slope(net.norm(y))),
    "two dimensions swapped and back": lambda net, y: net.b(y.transpose(1, 3).relu().swapaxes(1, 3)),
    "moved last and back": lambda net, y: net.b(y.movedim(1, -1).relu().movedim(-1, 1)),
    "several moved": lambda net, y: net.b(y.movedim((1, 2), (2, 3)).relu().movedim((2, 3), (1, 2))),
    "permuted and back": lambda net, y: net.b(y.permute(2, 0, 1, 3).permute(1, 2, 0, 3)),
    "flipped": lambda net, y: net.b(y.flip(1)),
    "flipped along the image": lambda net, y: net.b(y.flip(2).roll(1, 3)),
    "pooled": lambda net, y: net.b(functional.max_pool2d(functional.avg_pool2d(y, 3, 1, 1), 2)),
    "resized": lambda net, y: net.b(functional.interpolate(y, scale_factor=2, mode="bilinear")),
    "framed": lambda net, y: net.b(functional.pad(functional.pad(y, (1, 1)), (1, 1, 1, 1), mode="reflect")),
    "squeezed": lambda net, y: net.b(y.mean((2, 3), keepdim=True).squeeze(3).squeeze(-1)[:, :, None, None]),
    "unflattened": lambda net, y: net.b(y.flatten(2).unflatten(2, (6, 6))),
    "expanded": lambda net, y: net.b(y * y.mean((2, 3), keepdim=True).expand(-1, -1, 6, 6)),
    "expanded as": lambda net, y: net.b(y * y.mean((2, 3), keepdim=True).expand_as(y)),
    "zeros like": lambda net, y: net.b(torch.maximum(y, torch.zeros_like(y))),
    "where": lambda net, y: net.b(torch.where(y > 0, y, 0.1 * y)),
    "masked": lambda net, y: net.b(y.masked_fill(y < 0, 0.0)),
    "gate": lambda net, y: net.b(y * net.b(y).sigmoid()),
    "per image": lambda net, y: net.b(y / y.square().mean((2, 3), keepdim=True).add(1.0).sqrt()),
}


@pytest.mark.parametrize("body", PLAIN.values(), ids=PLAIN)
def test_channels_are_followed_through(body: Body) -> None:
    found = free(check(body))
    assert found.pop("a", 8) == 8
    assert sum(found.values()) in (0, 8), found
    assert len(found) <= 1


MIXING: dict[str, Body] = {
    "group norm": lambda net, y: net.b(net.groups(y)),
    "layer norm": lambda net, y: net.b(net.layer(y)),
    "softmax": lambda net, y: net.b(y.softmax(1)),
    "mean over channels": lambda net, y: net.b(y - y.mean(1, keepdim=True)),
    "sum over channels": lambda net, y: net.b(y / (1.0 + y.abs().cumsum(1))),
}


@pytest.mark.parametrize(("body", "channels"), list(zip(MIXING.values(), (4, 8, 8, 8, 8), strict=True)), ids=MIXING)
def test_operators_over_channels_cover_the_survivors(body: Body, channels: int) -> None:
    found = free(check(body, mixes=True))
    assert found["a"] == channels


PINNED: dict[str, tuple[Body, str]] = {
    "picked": (
        lambda net, y: net.b(y * y[:, 3:4].relu() + y[:, 2].unsqueeze(1)),
        "picks it out by its number",
    ),
    "every other": (lambda net, y: net.b(torch.cat([y[:, ::2], y[:, 1::2]], 1)), "takes every n-th"),
    "rolled": (lambda net, y: net.b(y.roll(1, 1)), "rolls its channels"),
    "unbound": (lambda net, y: net.b(torch.stack(y.unbind(1)[::-1], 1)), "picks it out by its number"),
    "unequal parts": (lambda net, y: net.b(torch.cat(y.split([3, 5], 1)[::-1], 1)), "unequal, fixed sizes"),
    "unknown operator": (lambda net, y: net.b(y.renorm(2, 1, 1.0)), "renorm is not one whose channels"),
    "sorted": (lambda net, y: net.b(torch.sort(y, 1).values), "sort orders or numbers it among the others"),
    "a size in the code": (lambda net, y: net.b(y + torch.ones(8, 1, 1).double()), "fixed"),
    "a literal slice": (
        lambda net, y: net.b(torch.cat([y[:, :4].relu(), y[:, 4:]], 1)),
        "does not follow the cut",
    ),
    "a computed half": (
        lambda net, y: net.b(torch.cat([y[:, : y.shape[1] // 2].relu(), y[:, y.shape[1] // 2 :]], 1)),
        "does not follow the cut",
    ),
    "a number from a size": (lambda net, y: net.b(y * y.shape[1] ** -0.5), "does not follow the cut at mul"),
    "a literal view": (
        lambda net, y: net.b(y.view(-1, 8, 36).view(-1, 8, 6, 6)),
        "does not follow the cut at view",
    ),
    "squeezed without a name": (
        lambda net, y: net.b(y.mean((2, 3), keepdim=True).squeeze((1, 2, 3))[:, :, None, None]),
        "squeeze would drop its dimension",
    ),
    "padded channels": (
        lambda net, y: net.b(functional.pad(y[:, :6], (0, 0, 0, 0, 1, 1)) + y),
        "add joins it with channels that cannot be removed",
    ),
    "along an image dimension": (lambda net, y: net.b(y.transpose(1, 2)), "image dimension of a convolution"),
    "pooled over channels": (
        lambda net, y: net.b(functional.max_pool2d(y.transpose(1, 3), 3, 1, 1).transpose(1, 3)),
        "max_pool2d mixes it with its neighbours",
    ),
}


@pytest.mark.parametrize(("body", "reason"), PINNED.values(), ids=PINNED)
def test_what_is_not_proven_removable_is_pinned_with_the_reason(body: Body, reason: str) -> None:
    second = nn.Conv2d(6, 8, 3, padding=1) if "image dimension" in reason else None
    program = check(body, second)
    reasons = [layer.pinned for layer in program.layers if layer.name.split(" ")[0] in ("a", "stream")]
    assert any(reason in r for r in reasons), reasons
    assert program.layers[-1].pinned == "its outputs are the network's outputs"


COUPLED: dict[str, tuple[Body, nn.Module | None, int, dict[str, int]]] = {
    "chunks added": (
        lambda net, y: net.b(y.chunk(2, 1)[0] + y.chunk(2, 1)[1]), nn.Conv2d(4, 8, 1), 8, {"a": 4, "b": 8},
    ),
    "chunks joined the other way round": (
        lambda net, y: net.b(torch.cat(y.chunk(2, 1)[::-1], 1)), None, 8, {"a": 4, "b": 8},
    ),
    "channel shuffle": (
        lambda net, y: net.b(y.view(-1, 2, y.shape[1] // 2, 6, 6).transpose(1, 2).reshape(y.shape)),
        None, 8, {"a": 4, "b": 8},
    ),
    "torch's channel shuffle": (lambda net, y: net.b(torch.channel_shuffle(y, 2)), None, 8, {"a": 4, "b": 8}),
    "pixel shuffle": (
        lambda net, y: net.b(functional.pixel_shuffle(y, 2)), nn.Conv2d(2, 8, 1), 8, {"a": 2, "b": 8},
    ),
    "depthwise": (lambda net, y: net.b(y), nn.Conv2d(8, 8, 3, padding=1, groups=8), 8, {"a": 8}),
    "depthwise, doubled": (lambda net, y: net.b(y), nn.Conv2d(8, 16, 3, padding=1, groups=8), 16, {"a": 8}),
    "two groups": (lambda net, y: net.b(y), nn.Conv2d(8, 8, 3, groups=2), 8, {"a": 4, "b": 4}),
    "four groups of two": (lambda net, y: net.b(y), nn.Conv2d(8, 8, 3, groups=4), 8, {"a stream": 4}),
    "residual": (lambda net, y: y + net.b(y.relu()), None, 8, {"stream": 8}),
    "dense": (lambda net, y: torch.cat([y, net.b(y)], 1), None, 16, {"a": 8, "b": 8}),
    "flattened": (lambda net, y: net.b(y).flatten(1), None, 8 * 36, {"a": 8, "b": 8}),
    "flattened, channels last": (
        lambda net, y: net.b(y).permute(0, 2, 3, 1).flatten(1), None, 8 * 36, {"a": 8, "b": 8},
    ),
    "transposed": (lambda net, y: net.b(y), nn.ConvTranspose2d(8, 6, 2, 2), 6, {"a": 8, "b": 6}),
    "one for all": (lambda net, y: net.b(y * y[:, :1]), None, 8, {"a": 7, "b": 8}),
}  # fmt: skip


@pytest.mark.parametrize(("body", "second", "features", "expected"), COUPLED.values(), ids=COUPLED)
def test_what_must_go_together_is_one_channel(
    body: Body, second: nn.Module | None, features: int, expected: dict[str, int]
) -> None:
    found = free(check(body, second, features))
    assert sorted(found.values()) == sorted(expected.values()), found


def test_matrix_products_of_images_with_themselves() -> None:
    def body(net: Net, y: Tensor) -> Tensor:
        flat = net.b(y).flatten(2)
        gram = torch.matmul(flat.transpose(1, 2), flat).softmax(-1)
        return torch.matmul(flat, gram).unflatten(2, (6, 6))

    assert free(check(body, mixes=True)) == {"a": 8, "b": 8}


def test_parts_of_a_convolution_are_layers_of_their_own() -> None:
    """A part may not lose all its channels, which no plan could promise if both parts were one row."""
    model = Net(lambda net, y: net.b(torch.cat([y[:, 2:].relu(), y[:, :2]], 1)), None, 8)
    program = pl.trace(model, torch.randn(2, 3, 6, 6), prove=False)
    assert free(program) == {"a #1": 2, "a #2": 6, "b": 8}
    with pytest.raises(pl.PruneLabError, match="no layer 'a'; the nearest names are 'a #"):
        program.layer("a")


def test_two_shuffles_that_no_cut_follows_are_pinned() -> None:
    def shuffled(y: Tensor, groups: int) -> Tensor:
        return y.view(-1, groups, y.shape[1] // groups, 6, 6).transpose(1, 2).reshape(y.shape)

    program = check(lambda net, y: net.b(shuffled(shuffled(y, 4), 2)))
    assert "does not follow the cut at view" in program.layer("a").pinned


def test_a_depthwise_convolution_belongs_to_the_layer_before_it() -> None:
    program = check(lambda net, y: net.b(y.relu()), nn.Conv2d(8, 8, 3, groups=8))
    layer = program.layer("a")
    assert (layer.name, layer.kind, layer.members) == ("a", "conv", ("a",))
    assert {slot.state for slot in layer.slots} >= {"a.weight", "a.bias", "b.weight", "b.bias", "head.weight"}


def test_names_and_stages_of_streams() -> None:
    program = pl.trace(zoo.resnet20("projection"), torch.randn(2, 3, 32, 32))
    stream = program.layer("layer2 stream")
    assert (stream.kind, stream.channels, stream.stage) == ("stream", 32, "layer2")
    assert stream.members[:2] == ("layer2.0.conv2", "layer2.0.shortcut.0")
    assert len(stream.members) == 4
    assert program.layer("layer2.0.conv1").stage == "layer2"
    # A producer's name is as good as its layer's.
    assert program.layer("layer2.1.conv2") is stream


def test_slots_name_every_place_a_channel_occupies() -> None:
    program = pl.trace(zoo.lenet(), torch.randn(2, 1, 28, 28))
    slots = {(s.state, s.dim): s.index for s in program.layer("conv2").slots}
    assert slots.keys() == {("conv2.weight", 0), ("conv2.bias", 0), ("fc1.weight", 1)}
    assert slots["conv2.weight", 0].tolist() == [[c] for c in range(50)]
    assert np.array_equal(slots["fc1.weight", 1], np.arange(800).reshape(50, 16))


def test_sites_are_after_norm_and_activation_and_per_call() -> None:
    program = pl.trace(zoo.resnet20(), torch.randn(2, 3, 32, 32))
    assert [program.nodes[s].opname for s in program.layer("layer1.0.conv1").sites] == ["relu"]

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.b(self.a(self.b(self.a(x)).tanh())).relu())
            return logits

    program = pl.trace(Twice(), torch.randn(2, 4))
    assert [program.nodes[s].opname for s in program.layer("b").sites] == ["tanh", "relu"]


# The pieces ---------------------------------------------


def test_classes_are_connected_components() -> None:
    ties = Ties()
    a, b, c = ties.fresh(4), ties.fresh(4), ties.fresh(4)
    ties.tie(a, b, "")
    ties.tie(b[:2], c[:2][::-1], "")
    ties.pin(c[3:], "last")
    label, reasons = ties.labels()
    assert label[a].tolist() == label[b].tolist()
    assert label[c].tolist() == [*label[a[:2]][::-1], c[2], c[3]]
    assert reasons == {int(label[c[3]]): "last"}


def test_long_chains_of_ties_end_in_one_class() -> None:
    ties = Ties()
    ids = ties.fresh(10_000)
    order = np.random.default_rng(0).permutation(ids)
    ties.tie(order[:-1], order[1:], "")
    label, _ = ties.labels()
    assert len(np.unique(label[ids])) == 1


def test_ties_with_nothing_or_with_another_length_pin() -> None:
    ties = Ties()
    a, b = ties.fresh(3), ties.fresh(2)
    ties.tie(a, None, "alone")
    ties.tie(a, b, "unlike")
    ties.tie(np.array([FIXED, b[1]]), b[::-1].copy(), "fixed")
    _, reasons = ties.labels()
    assert set(reasons) == {*a.tolist(), *b[:1].tolist()}


def test_merge_then_split_gives_the_ids_back() -> None:
    ties = Ties()
    ids = ties.fresh(6)
    flat = merge([(4, None), (6, ids), (5, None)], ties, "")
    assert flat is not None
    assert flat.reshape(4, 6, 5)[2, :, 3].tolist() == ids.tolist()
    assert [x if x is None else x.tolist() for x in split(flat, [4, 6, 5], None, ties)] == [
        None,
        ids.tolist(),
        None,
    ]
    assert not ties.left


def test_an_operator_that_nobody_knows_pins_its_inputs() -> None:
    ties = Ties()
    ids = ties.fresh(3)
    source = Node(0, "input", "x", None, {}, (), (1, 3), (True, False), (), "", "")
    odd: Any = torch.ops.aten.linalg_qr.default
    node = Node(1, "op", "qr", odd, {}, (0,), None, (), ((1, 1), (1, 3)), "", "")
    assert apply(Context(node, (source, node), [(None, ids)], ties, {})) == [(None, None), (None, None)]
    assert len(ties.labels()[1]) == 3
