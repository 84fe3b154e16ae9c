"""Attention and kept sizes: what forward reads is found out, and heads and widths become removable or are pinned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from support import Network, flops, half_of_everything, parameters, relative
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.vision_transformer import VisionTransformer

import prunelab as pl
from prunelab.program.run import bind

SWIN = {"patch_size": [2, 2], "embed_dim": 12, "depths": [2, 2], "num_heads": [3, 6], "window_size": [4, 4]}
VIT = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 24, "mlp_dim": 40}
MAXVIT = {"stem_channels": 8, "partition_size": 2, "block_channels": [8, 16], "block_layers": [1, 2], "head_dim": 4}


class Block(nn.Module):
    """A residual attention block between two linear layers; each test brings how it attends."""

    def __init__(self, attend: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 12), nn.LayerNorm(12)
        self.attend = attend
        self.wide, self.narrow = nn.Linear(12, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attend(self.norm(x))
        x = x + self.narrow(self.wide(x).relu())
        logits: Tensor = self.head(x.mean(1))
        return logits


class Attend(nn.Module):
    """Attention as people write it; ``heads`` and widths are read as the function ``split`` does."""

    def __init__(self, split: Callable[[Attend, Tensor, Tensor], Tensor], inner: int = 12) -> None:
        super().__init__()
        self.heads, self.split = 3, split
        self.qkv, self.out = nn.Linear(12, 3 * inner), nn.Linear(inner, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.split(self, x, self.qkv(x)))
        return out


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads in dimension 1; gives them side by side."""
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in plain products, with a scale that is worked out from a size."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def kept_heads(net: Attend, x: Tensor, qkv: Tensor) -> Tensor:
    q, k, v = (part.unflatten(2, (net.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, 2))
    return fused(q, k, v)


def as_wide_as_given(net: Attend, x: Tensor, qkv: Tensor) -> Tensor:
    n, length, width = x.shape
    q, k, v = qkv.reshape(n, length, 3, net.heads, width // net.heads).permute(2, 0, 3, 1, 4)
    return by_hand(q, k, v).reshape(n, length, width)


def literal_heads(net: Attend, x: Tensor, qkv: Tensor) -> Tensor:
    q, k, v = (part.view(x.shape[0], -1, 3, 4).transpose(1, 2) for part in qkv.chunk(3, 2))
    return fused(q, k, v)


def literal_count_of_heads(net: Attend, x: Tensor, qkv: Tensor) -> Tensor:
    q, k, v = (part.unflatten(2, (3, -1)).transpose(1, 2) for part in qkv.chunk(3, 2))
    return fused(q, k, v)


def folded_into_the_batch(net: Attend, x: Tensor, qkv: Tensor) -> Tensor:
    n, length, _ = x.shape
    parts = (part.reshape(n, length, net.heads, -1).transpose(1, 2) for part in qkv.chunk(3, 2))
    q, k, v = (part.reshape(n * net.heads, length, -1) for part in parts)
    scores = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
    return torch.bmm(scores, v).view(n, net.heads, length, -1).transpose(1, 2).reshape(n, length, -1)


def with_einsum(net: Attend, x: Tensor, qkv: Tensor) -> Tensor:
    q, k, v = (part.unflatten(2, (net.heads, -1)) for part in qkv.chunk(3, 2))
    scores = torch.einsum("n i h d, n j h d -> n h i j", q, k).softmax(-1)
    return torch.einsum("n h i j, n j h d -> n i h d", scores, v).flatten(2)


class Torchs(nn.Module):
    """PyTorch's own attention over what it is given."""

    def __init__(self, **given: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True, **given)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x)[0]
        return out


class Across(nn.Module):
    """PyTorch's own attention to something of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Linear(12, 7)
        self.attention = nn.MultiheadAttention(12, 3, kdim=7, vdim=7, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.memory(x).relu()
        out: Tensor = self.attention(x, memory, memory, need_weights=False)[0]
        return out


def layer(**given: bool) -> nn.Module:
    """PyTorch's own encoder layer."""
    return nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, **given)


SEQUENCE = (6, 5)
OWN_WIDTH = {"attend.qkv": 3, "embed stream": 12, "wide": 20}
COUPLED = {"embed stream": 3, "wide": 20}
ATTENTIONS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "heads kept by the module": (partial(Attend, kept_heads), OWN_WIDTH),
    "a width of its own": (partial(Attend, kept_heads, inner=18), OWN_WIDTH),
    "as wide as what it is given": (partial(Attend, as_wide_as_given), COUPLED),
    "a literal count of heads": (partial(Attend, literal_count_of_heads), {**OWN_WIDTH, "attend.qkv": 4}),
    "heads folded into the batch": (partial(Attend, folded_into_the_batch), OWN_WIDTH),
    "einsum": (partial(Attend, with_einsum), OWN_WIDTH),
    "torch's own": (Torchs, COUPLED),
    "torch's own without biases": (partial(Torchs, bias=False), COUPLED),
    "torch's own with a bias for keys": (partial(Torchs, add_bias_kv=True), COUPLED),
    "torch's own, across": (Across, {"attend.memory": 7, **COUPLED}),
    "torch's encoder layer": (layer, {"embed stream": 3, "attend.linear1": 16, "wide": 20}),
    "torch's encoder layer, norm first": (
        partial(layer, norm_first=True),
        {"embed stream": 3, "attend.linear1": 16, "wide": 20},
    ),
}


def free(program: pl.Program) -> dict[str, int]:
    """Channels of every layer that can be pruned, streams without their number."""
    rows = {row.name: row.channels for row in program.layers if not row.pinned}
    streams = {name: "embed stream" for name in rows if name.endswith("stream")}
    return {streams.get(name, name): channels for name, channels in rows.items()}


def check(net: Network, seeds: int = 3) -> pl.Program:
    """Promise 1 on a network, cut in several ways; gives the program."""
    program = pl.trace(net.build(), net.images())
    for seed in range(seeds):
        selection = half_of_everything(program, seed)
        small = pl.commit(program, selection)
        with torch.no_grad():
            assert relative(bind(program, selection)(net.images(3)), small(net.images(3))) < 1e-10
        projected = pl.cost(program, selection)
        assert projected.params == parameters(small)
        assert projected.flops == flops(small, net.images(1))
    return program


@pytest.mark.parametrize(("attend", "expected"), ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention_is_opened(attend: Callable[[], nn.Module], expected: dict[str, int]) -> None:
    assert free(check(Network(lambda: Block(attend()), SEQUENCE))) == expected


def test_a_literal_in_a_view_pins_the_heads_with_its_line() -> None:
    program = check(Network(lambda: Block(Attend(literal_heads)), SEQUENCE))
    assert free(program) == {"embed stream": 12, "wide": 20}
    assert "when it is cut" in program.layer("attend.qkv").pinned
    assert "test_opening.py, line " in program.layer("attend.qkv").pinned


def test_heads_are_removed_whole() -> None:
    """The committed attention is the old one with one head left out, computed from its own weights."""
    net = Network(lambda: Block(Attend(kept_heads)), SEQUENCE)
    program = pl.trace(net.build(), net.images())
    small = pl.commit(program, pl.Selection({"attend.qkv": (0, 2)}))
    assert small.attend.heads == 2
    model = copy.deepcopy(program.model)
    with torch.no_grad():
        # The second of three heads of width four gives nothing where the output layer does not read it.
        model.attend.out.weight[:, 4:8] = 0
        assert relative(small(net.images()), model(net.images())) < 1e-10


TRANSFORMERS = {
    "vit": (Network(lambda: VisionTransformer(**VIT, num_classes=5), (3, 16, 16)), {"encoder.layers stream": 4}),
    "swin": (
        Network(lambda: SwinTransformer(**SWIN, num_classes=5), (3, 16, 16)),
        {"features stream #1": 3, "features stream #2": 6},
    ),
    "swin v2": (
        Network(
            lambda: SwinTransformer(
                **SWIN, num_classes=5, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2
            ),
            (3, 16, 16),
        ),
        {"features stream #1": 3, "features stream #2": 6},
    ),
    "maxvit": (
        Network(
            lambda: MaxVit((32, 32), stochastic_depth_prob=0.0, num_classes=5, **MAXVIT),
            (3, 32, 32),
        ),
        {"blocks.0.layers.0.layers stream": 2, "blocks.1.layers stream": 4},
    ),
}


@pytest.mark.parametrize(("net", "streams"), TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_transformers_lose_heads_and_widths(net: Network, streams: dict[str, int]) -> None:
    program = check(net, seeds=2)
    assert [row.pinned for row in program.layers if row.pinned] == ["its outputs are the network's outputs"]
    rows = {row.name: row for row in program.layers}
    assert {name: rows[name].channels for name in streams} == streams
    assert any(".mlp" in name for name in rows)


def test_numbers_that_forward_reads_follow() -> None:
    net, _ = TRANSFORMERS["vit"]
    program = pl.trace(net.build(), net.images())
    small = pl.commit(program, pl.Selection({"encoder.layers stream": (0, 2, 3)}))
    assert small.hidden_dim == 18
    attention = small.encoder.layers[0].self_attention
    assert (attention.num_heads, attention.embed_dim, attention.head_dim, attention.kdim) == (3, 18, 6, 18)


def test_a_kept_size_that_only_names_something_else_is_left_alone() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = self.kernel = 8
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.b(self.a(x).view(-1, self.width).relu() * self.kernel)
            return logits

    net = Network(Kept, (4,))
    program = check(net)
    assert free(program) == {"a": 8}
    small = pl.commit(program, pl.Selection({"a": (1, 2, 5)}))
    assert (small.width, small.kernel) == (3, 8)
