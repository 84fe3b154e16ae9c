"""Users' code with torch's own layers: convolutions, norms, gates, attention, recurrence, embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from users import Case, between, check_case, conv

BOTH = {"a": 8, "b": 6}
GATES = "its channels are joined by the gates of"


def squeezed(down: nn.Module, up: nn.Module) -> dict[str, Any]:
    return {"a": conv(3, 8), "down": down, "up": up, "b": conv(8, 6), "head": nn.Linear(6, 3)}


def norm_between(norm: Any) -> Any:
    return between(lambda m, y: m.norm(y), norm=norm)


def points(*parts: nn.Module) -> dict[str, nn.Module]:
    """A linear layer over points, whatever stands behind it, and the head."""
    return {"a": nn.Linear(4, 8), **{f"p{k}": part for k, part in enumerate(parts)}, "head": nn.Linear(8, 3)}


def standardised(m: Any, x: Tensor) -> Tensor:
    w = m.a.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
    out: Tensor = m.head(m.b(F.conv2d(x, w, m.a.bias, padding=1).relu()).mean((2, 3)))
    return out


def last(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return out


def own_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.q(x), m.k(x), m.v(x)
    weights = (q @ k.transpose(1, 2) / 2.0).softmax(-1)
    out: Tensor = m.head(m.out(weights @ v).mean(1))
    return out


def fused_attention(m: Any, x: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x))
    out: Tensor = m.head(m.out(y).mean(1))
    return out


def einsum_attention(m: Any, x: Tensor) -> Tensor:
    weights = torch.einsum("nid,njd->nij", m.q(x), m.k(x)).softmax(-1)
    out: Tensor = m.head(m.out(torch.einsum("nij,njd->nid", weights, m.v(x))).mean(1))
    return out


def causal_attention(m: Any, x: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x), is_causal=True, scale=0.3)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    scores = (m.q(x) @ m.k(x).mT).masked_fill(hidden, -1e9).softmax(-1)
    out: Tensor = m.head(m.out(y + scores @ m.v(x)).mean(1))
    return out


def attention_parts() -> dict[str, nn.Module]:
    widths = {"q": (4, 6), "k": (4, 6), "v": (4, 7), "out": (7, 5), "head": (5, 3)}
    return {name: nn.Linear(*width) for name, width in widths.items()}


ATTENTION = {"stream": 6, "v": 7, "out": 5}


def unrolled(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros(len(x), 8, dtype=x.dtype)
    for t in range(x.shape[1]):
        h = m.p0(x[:, t], h)
    out: Tensor = m.head(h)
    return out


CASES: dict[str, Case] = {
    # Convolutions ---------------------------------------
    "string padding": Case(
        *between(
            lambda m, y: m.c(m.d(y)),
            5,
            c=lambda: nn.Conv2d(7, 5, 3, padding="same", dilation=2),
            d=lambda: nn.Conv2d(8, 7, 3, padding="valid"),
        ),
        {**BOTH, "c": 5, "d": 7},
    ),
    "circular padding": Case(
        *between(lambda m, y: m.c(y), 5, c=lambda: conv(8, 5, padding_mode="circular")), {**BOTH, "c": 5}
    ),
    "depthwise and pointwise": Case(
        *between(lambda m, y: m.p(m.d(y).relu()), 5, d=lambda: conv(8, 8, groups=8), p=lambda: conv(8, 5, 1)),
        {"a": 8, "p": 5, "b": 6},
    ),
    "depth multiplier": Case(*between(lambda m, y: m.d(y), 16, d=lambda: conv(8, 16, groups=8)), BOTH),
    "depthwise on the image": Case(
        lambda m, x: m.head(m.a(m.d(x)).mean((2, 3))),
        lambda: {"d": conv(3, 6, groups=3), "a": conv(6, 8), "head": nn.Linear(8, 3)},
        {"a": 8},
        {"d": "conv2d joins it with channels that cannot be removed"},
    ),
    "grouped": Case(*between(lambda m, y: m.c(y), 12, c=lambda: conv(8, 12, groups=2)), {"a": 4, "b": 6, "c": 6}),
    "grouped, many groups": Case(
        *between(lambda m, y: m.c(y), 8, c=lambda: conv(8, 8, groups=4)), {"stream": 4, "b": 6}
    ),
    "transposed": Case(
        *between(lambda m, y: m.c(y), 5, c=lambda: nn.ConvTranspose2d(8, 5, 3, 2, 1, output_padding=1)),
        {**BOTH, "c": 5},
    ),
    "transposed, grouped": Case(
        *between(lambda m, y: m.c(y), 10, c=lambda: nn.ConvTranspose2d(8, 10, 2, 2, groups=2)),
        {"a": 4, "c": 5, "b": 6},
    ),
    "transposed, depthwise": Case(
        *between(lambda m, y: m.c(y), c=lambda: nn.ConvTranspose2d(8, 8, 2, 2, groups=8, bias=False)), BOTH
    ),
    "transposed, depth multiplier": Case(
        *between(lambda m, y: m.c(y), 16, c=lambda: nn.ConvTranspose2d(8, 16, 2, groups=8)),
        BOTH,
        {"c": "one group's output in a grouped convolution"},
    ),
    "transposed, many groups": Case(
        *between(lambda m, y: m.c(y), 4, c=lambda: nn.ConvTranspose2d(8, 4, 2, groups=4)), {"a": 4, "b": 6}
    ),
    "one dimension": Case(
        lambda m, x: m.head(m.b(m.up(m.a(x).relu())).amax(-1)),
        lambda: {
            "a": nn.Conv1d(3, 8, 3),
            "up": nn.ConvTranspose1d(8, 6, 2, groups=2),
            "b": nn.Conv1d(6, 5, 3, padding="same"),
            "head": nn.Linear(5, 3),
        },
        {"a": 4, "up": 3, "b": 5},
        image=(3, 9),
    ),
    "three dimensions": Case(
        lambda m, x: m.head(m.b(m.up(F.max_pool3d(m.norm(m.a(x)), 2))).mean((2, 3, 4))),
        lambda: {
            "a": nn.Conv3d(3, 8, 3, padding=1),
            "norm": nn.BatchNorm3d(8),
            "up": nn.ConvTranspose3d(8, 7, 2),
            "b": nn.Conv3d(7, 5, 1),
            "head": nn.Linear(5, 3),
        },
        {"a": 8, "up": 7, "b": 5},
        image=(3, 4, 4, 4),
    ),
    # Norms ----------------------------------------------
    "BatchNorm1d of points": Case(
        lambda m, x: m.head(m.p0(m.a(x))), lambda: points(nn.BatchNorm1d(8)), {"a": 8}, image=(4,)
    ),
    "BatchNorm2d": Case(*norm_between(lambda: nn.BatchNorm2d(8)), BOTH),
    "BatchNorm2d, not affine": Case(*norm_between(lambda: nn.BatchNorm2d(8, affine=False)), BOTH),
    "BatchNorm2d, not tracking": Case(*norm_between(lambda: nn.BatchNorm2d(8, track_running_stats=False)), BOTH),
    "BatchNorm2d, bare": Case(*norm_between(lambda: nn.BatchNorm2d(8, affine=False, track_running_stats=False)), BOTH),
    "LayerNorm over channels, height and width": Case(*norm_between(lambda: nn.LayerNorm([8, 6, 6])), BOTH, mixes=True),
    "LayerNorm, not affine": Case(
        *norm_between(lambda: nn.LayerNorm([8, 6, 6], elementwise_affine=False)), BOTH, mixes=True
    ),
    "LayerNorm over channels last": Case(
        *between(lambda m, y: m.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=lambda: nn.LayerNorm(8)),
        BOTH,
        mixes=True,
    ),
    "LayerNorm over positions only": Case(*norm_between(lambda: nn.LayerNorm([6, 6])), BOTH),
    "F.layer_norm of y.shape": Case(*between(lambda m, y: F.layer_norm(y, y.shape[1:])), BOTH, mixes=True),
    "GroupNorm, one group": Case(*norm_between(lambda: nn.GroupNorm(1, 8)), BOTH, mixes=True),
    "GroupNorm, few groups": Case(*norm_between(lambda: nn.GroupNorm(2, 8)), {"a": 4, "b": 6}, mixes=True),
    "GroupNorm, a group for every channel": Case(*norm_between(lambda: nn.GroupNorm(8, 8)), BOTH),
    "F.group_norm by a literal": Case(
        *between(lambda m, y: F.group_norm(y, 8)), {"b": 6}, {"a": r"your forward .*\(in .*test_layers.py"}
    ),
    "InstanceNorm": Case(*norm_between(lambda: nn.InstanceNorm2d(8)), BOTH),
    "InstanceNorm, affine": Case(*norm_between(lambda: nn.InstanceNorm2d(8, affine=True)), BOTH),
    "InstanceNorm, tracking": Case(
        *norm_between(lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)), BOTH
    ),
    "RMSNorm": Case(
        *between(lambda m, y: m.norm(y.movedim(1, -1)).movedim(-1, 1), norm=lambda: nn.RMSNorm(8)), BOTH, mixes=True
    ),
    "RMSNorm by hand": Case(
        *between(
            lambda m, y: y * torch.rsqrt(y.pow(2).mean(1, keepdim=True) + 1e-6) * m.g.view(1, -1, 1, 1),
            g=lambda: nn.Parameter(torch.rand(8)),
        ),
        BOTH,
        mixes=True,
    ),
    "LocalResponseNorm": Case(
        *norm_between(lambda: nn.LocalResponseNorm(3)), {"b": 6}, {"a": "avg_pool3d mixes it with its neighbours"}
    ),
    "weight standardisation": Case(
        standardised, lambda: {"a": conv(3, 8), "b": conv(8, 6), "head": nn.Linear(6, 3)}, BOTH, mixes=True
    ),
    "linear layers over channels last, between convolutions": Case(
        lambda m, x: m.head(last(m.d, m.c(m.c(last(m.b, m.a(x))).relu())).sigmoid().mean((2, 3))),
        lambda: {"a": conv(3, 6), "b": nn.Linear(6, 8), "c": conv(8, 8), "d": nn.Linear(8, 6), "head": nn.Linear(6, 3)},
        {"a": 6, "stream": 8, "d": 6},
    ),
    # Gates ----------------------------------------------
    "squeeze and excitation, linear": Case(
        lambda m, x: (
            lambda y: m.head(m.b(y * m.up(m.down(y.mean((2, 3))).relu()).sigmoid()[:, :, None, None]).mean((2, 3)))
        )(m.a(x)),
        lambda: squeezed(nn.Linear(8, 4), nn.Linear(4, 8)),
        {"stream": 8, "down": 4, "b": 6},
    ),
    "squeeze and excitation, convolutions": Case(
        lambda m, x: (
            lambda y: m.head(m.b(m.up(m.down(F.adaptive_avg_pool2d(y, 1)).relu()).sigmoid() * y).mean((2, 3)))
        )(m.a(x)),
        lambda: squeezed(nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)),
        {"stream": 8, "down": 4, "b": 6},
    ),
    "squeeze and excitation, view and expand_as": Case(
        lambda m, x: (
            lambda y: m.head(
                m.b(
                    y
                    * m.up(m.down(F.adaptive_avg_pool2d(y, 1).view(y.size(0), y.size(1))).relu())
                    .sigmoid()
                    .view(y.size(0), y.size(1), 1, 1)
                    .expand_as(y)
                ).mean((2, 3))
            )
        )(m.a(x)),
        lambda: squeezed(nn.Linear(8, 4), nn.Linear(4, 8)),
        {"stream": 8, "down": 4, "b": 6},
    ),
    "gate over positions": Case(
        *between(
            lambda m, y: y * m.gate(torch.cat([y.mean(1, True), y.amax(1, True)], 1)).sigmoid(), gate=lambda: conv(2, 1)
        ),
        BOTH,
        mixes=True,
    ),
    "F.glu": Case(*between(lambda m, y: F.glu(y, 1), 4), {"a": 4, "b": 6}),
    "nn.GLU over the last dimension": Case(
        lambda m, x: m.head(m.glu(m.a(x))),
        lambda: {"a": nn.Linear(4, 16), "glu": nn.GLU(), "head": nn.Linear(8, 3)},
        {"a": 8},
        image=(4,),
    ),
    "SwiGLU": Case(
        lambda m, x: m.head(F.silu(m.a(x)) * m.p0(x)), lambda: points(nn.Linear(4, 8)), {"stream": 8}, image=(4,)
    ),
    "PReLU": Case(*between(lambda m, y: m.s(m.t(y)), s=lambda: nn.PReLU(8), t=nn.PReLU), BOTH),
    "Hadamard gate by a parameter": Case(
        *between(lambda m, y: y * torch.sigmoid(m.g), g=lambda: nn.Parameter(torch.randn(1, 8, 6, 6))), BOTH
    ),
    "layer scale and stochastic depth": Case(
        lambda m, x: (lambda y: m.head((y + F.dropout(m.b(y), 0.1, m.training) * m.g[:, None, None]).mean((2, 3))))(
            m.a(x)
        ),
        lambda: {"a": conv(3, 8), "b": conv(8, 8), "g": nn.Parameter(torch.rand(8)), "head": nn.Linear(8, 3)},
        {"stream": 8},
    ),
    "bilinear": Case(
        lambda m, x: m.head(m.p0(m.a(x), m.a(x).tanh())),
        lambda: points(nn.Bilinear(8, 8, 8)),
        {},
        {"a": "the operator bilinear", "p0": "the operator bilinear"},
        image=(4,),
    ),
    # Attention ------------------------------------------
    "attention by hand, own widths": Case(own_attention, attention_parts, ATTENTION, image=(5, 4)),
    "scaled_dot_product_attention, own widths": Case(
        fused_attention, attention_parts, ATTENTION, image=(5, 4), mixes=True
    ),
    "attention by einsum": Case(einsum_attention, attention_parts, ATTENTION, image=(5, 4), least=2),
    "causal attention": Case(causal_attention, attention_parts, ATTENTION, image=(5, 4)),
    # Words and time -------------------------------------
    "embedding": Case(
        lambda m, x: m.head(m.fc(m.words(x)).relu().mean(1)),
        lambda: {"words": nn.Embedding(11, 8, padding_idx=0), "fc": nn.Linear(8, 6), "head": nn.Linear(6, 3)},
        {"words": 8, "fc": 6},
        args=lambda: (torch.randint(11, (2, 5)),),
    ),
    "embedding bag": Case(
        lambda m, x: m.head(m.fc(m.words(x)).relu()),
        lambda: {"words": nn.EmbeddingBag(11, 8, mode="max"), "fc": nn.Linear(8, 6), "head": nn.Linear(6, 3)},
        {"words": 8, "fc": 6},
        args=lambda: (torch.randint(11, (2, 5)),),
    ),
    "positions added": Case(
        lambda m, x: m.head((m.words(x) + m.places(torch.arange(5))).mean(1)),
        lambda: {"words": nn.Embedding(11, 8), "places": nn.Embedding(5, 8), "head": nn.Linear(8, 3)},
        {"stream": 8},
        args=lambda: (torch.randint(11, (2, 5)),),
    ),
    "LSTM": Case(
        lambda m, x: m.head(m.p0(m.a(x))[0][:, -1]),
        lambda: points(nn.LSTM(8, 8, num_layers=2, batch_first=True)),
        {},
        {"a": f"{GATES} lstm", "p0": f"{GATES} lstm"},
        image=(5, 4),
    ),
    "GRU": Case(
        lambda m, x: m.head(m.p0(m.a(x))[1].squeeze(0)),
        lambda: points(nn.GRU(8, 8, batch_first=True)),
        {},
        {"a": f"{GATES} gru", "p0": f"{GATES} gru"},
        image=(5, 4),
    ),
    "GRU cell": Case(
        unrolled,
        lambda: {"p0": nn.GRUCell(4, 8), "head": nn.Linear(8, 3)},
        {},
        {"p0": f"{GATES} gru_cell"},
        image=(5, 4),
    ),
    "recurrence by hand": Case(
        lambda m, x: m.head((m.p0(m.a(x[:, 1]) + m.p0(m.a(x[:, 0]).tanh()))).tanh()),
        lambda: points(nn.Linear(8, 8)),
        {"stream": 8},
        image=(2, 4),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_layers(case: Case) -> None:
    check_case(case)
