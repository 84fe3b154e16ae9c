"""Users' code with its own parameters and buffers: shared, functional, parametrized, frozen, nested."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from users import Case, Net, between, check_case, check_promise, conv, free

import prunelab as pl

BOTH = {"a": 8, "b": 6}
FIXED = "joins it with a value whose size is fixed"


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def linear_net(**parts: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"a": nn.Linear(4, 8), **{n: make() for n, make in parts.items()}, "head": nn.Linear(6, 3)}


def tied_words(m: Any, x: Tensor) -> Tensor:
    out: Tensor = m.out(m.fc(m.words(x)).relu().mean(1))
    return out


def tied_parts() -> dict[str, Any]:
    words, out = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
    out.weight = words.weight
    return {"words": words, "fc": nn.Linear(8, 8), "out": out}


def tied_convolutions() -> dict[str, Any]:
    a, b, c = conv(3, 8), conv(8, 8), conv(8, 8)
    c.weight = b.weight
    return {"a": a, "b": b, "c": c, "head": nn.Linear(8, 3)}


def transposed_pair(m: Any, x: Tensor) -> Tensor:
    """An autoencoder whose decoder is the encoder's transpose."""
    code = m.code(x).tanh()
    out: Tensor = F.linear(code, m.code.weight.t(), m.bias)
    return out


class Softplus(nn.Module):
    def forward(self, raw: Tensor) -> Tensor:
        return F.softplus(raw)


class Symmetric(nn.Module):
    def forward(self, raw: Tensor) -> Tensor:
        return raw.triu() + raw.triu(1).transpose(-1, -2)


def with_parametrization(module: nn.Module, made: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(module, "weight", made)


class Statistics(nn.Module):
    """Centred and scaled by buffers: one in the state, one not."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(channels, 1, 1))
        self.register_buffer("std", torch.rand(1, channels, 1, 1) + 0.5, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (x - self.mean) / self.std
        return out


class Shared(nn.Module):
    """Two branches that hold one and the same convolution."""

    def __init__(self) -> None:
        super().__init__()
        same = conv(8, 8)
        self.left, self.right = nn.Sequential(same, nn.ReLU()), nn.ModuleList([nn.Tanh(), same])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.right:
            x = part(x)
        out: Tensor = self.left(x)
        return out


def nested(m: Any, x: Tensor) -> Tensor:
    for block in m.blocks:
        x = block["norm"](block["conv"](x)).relu()
    out: Tensor = m.head(x.mean((2, 3)))
    return out


def nested_parts() -> dict[str, Any]:
    sizes = ((3, 8), (8, 7))
    blocks = [nn.ModuleDict({"conv": nn.Sequential(conv(i, o)), "norm": nn.BatchNorm2d(o)}) for i, o in sizes]
    return {"blocks": nn.ModuleList(blocks), "head": nn.Linear(7, 3)}


CASES: dict[str, Case] = {
    # Used several times ---------------------------------
    "the same module twice": Case(
        lambda m, x: m.head(m.b(m.b(m.a(x)).relu()).mean((2, 3))),
        lambda: {"a": conv(3, 8), "b": conv(8, 8), "head": nn.Linear(8, 3)},
        {"stream": 8},
    ),
    "the same module on several scales": Case(
        lambda m, x: m.head(sum(m.b(F.avg_pool2d(m.a(x), k)).mean((2, 3)) for k in (1, 2, 3))),
        lambda: {"a": conv(3, 8), "b": conv(8, 6), "head": nn.Linear(6, 3)},
        BOTH,
    ),
    "the same norm after two convolutions": Case(
        lambda m, x: m.head((m.norm(m.a(x)) * m.norm(m.b(x))).mean((2, 3))),
        lambda: {"a": conv(3, 8), "b": conv(3, 8), "norm": nn.BatchNorm2d(8), "head": nn.Linear(8, 3)},
        {"stream": 8},
    ),
    "a module under several names": Case(*between(lambda m, y: m.c(y), c=Shared), {"stream": 8, "b": 6}),
    "sequential, list and dict in each other": Case(
        nested, nested_parts, {"blocks.0.conv.0": 8, "blocks.1.conv.0": 7}, mixes=True
    ),
    # Tied -----------------------------------------------
    "tied convolutions": Case(
        lambda m, x: m.head(m.c(m.b(m.a(x)).relu()).mean((2, 3))), tied_convolutions, {"stream": 8}
    ),
    "output tied to the embedding": Case(
        tied_words,
        tied_parts,
        {"stream": 8},
        {"words": "its entries are chosen by the input data"},
        args=lambda: (torch.randint(11, (2, 5)),),
    ),
    "decoder tied to the encoder": Case(
        transposed_pair,
        lambda: {"code": nn.Linear(6, 9), "bias": parameter(6)},
        {"code #1": 9},
        {"code #2": "linear joins it with channels that cannot be removed"},
        image=(6,),
    ),
    # Functional -----------------------------------------
    "F.conv2d with parameters": Case(
        *between(
            lambda m, y: F.conv2d(y, m.w, m.v, padding=1), 5, w=lambda: parameter(5, 8, 3, 3), v=lambda: parameter(5)
        ),
        {**BOTH, "w": 5},
    ),
    "F.conv_transpose2d with parameters": Case(
        *between(lambda m, y: F.conv_transpose2d(y, m.w), 5, w=lambda: parameter(8, 5, 3, 3)), {**BOTH, "w": 5}
    ),
    "x @ w": Case(
        lambda m, x: m.head(m.a(x).relu() @ m.w), linear_net(w=lambda: parameter(8, 6)), {"a": 8, "w": 6}, image=(4,)
    ),
    "x @ w + bias, over points": Case(
        lambda m, x: m.head((m.a(x).relu() @ m.w + m.v).amax(1)),
        linear_net(w=lambda: parameter(8, 6), v=lambda: parameter(6)),
        {"a": 8, "w": 6},
        image=(5, 4),
    ),
    "w @ x": Case(
        lambda m, x: m.head((m.w @ m.a(x).mT).mean(-1)),
        linear_net(w=lambda: parameter(6, 8)),
        {"a": 8, "w": 6},
        image=(5, 4),
    ),
    "torch.addmm": Case(
        lambda m, x: m.head(torch.addmm(m.v, m.a(x), m.w)),
        linear_net(w=lambda: parameter(8, 6), v=lambda: parameter(6)),
        {"a": 8, "w": 6},
        image=(4,),
    ),
    "F.linear with a transposed parameter": Case(
        lambda m, x: m.head(F.linear(m.a(x), m.w.t())),
        linear_net(w=lambda: parameter(8, 6)),
        {"a": 8, "w": 6},
        image=(4,),
    ),
    "einsum with a parameter": Case(
        lambda m, x: m.head(torch.einsum("ni,io->no", m.a(x), m.w)),
        linear_net(w=lambda: parameter(8, 6)),
        {"a": 8, "w": 6},
        image=(4,),
        least=2,
    ),
    "einsum over a map": Case(
        *between(lambda m, y: torch.einsum("nchw, oc -> nohw", y, m.w), 5, w=lambda: parameter(5, 8)),
        {**BOTH, "w": 5},
        least=2,
    ),
    "einsum as a scale": Case(
        *between(lambda m, y: torch.einsum("nchw,c->nchw", y, m.w), w=lambda: parameter(8)), BOTH
    ),
    "einsum with an ellipsis": Case(
        *between(lambda m, y: torch.einsum("n...,n...->n...", y, y)), {"b": 6}, {"a": "the operator einsum"}
    ),
    "einsum of three": Case(
        lambda m, x: m.head(torch.einsum("ni,ij,jo->no", m.a(x), m.w, m.v)),
        linear_net(w=lambda: parameter(8, 5), v=lambda: parameter(5, 6)),
        {},
        {"a": "the operator einsum", "v": "the operator einsum"},
        image=(4,),
    ),
    "a weight joined from two": Case(
        *between(
            lambda m, y: F.conv2d(y, torch.cat([m.w, m.v])),
            7,
            w=lambda: parameter(5, 8, 1, 1),
            v=lambda: parameter(2, 8, 1, 1),
        ),
        {**BOTH, "w": 5, "v": 2},
    ),
    "scale and shift": Case(
        *between(
            lambda m, y: y * m.w[None, :, None, None] + m.v.view(1, -1, 1, 1),
            w=lambda: parameter(8),
            v=lambda: parameter(8),
        ),
        BOTH,
    ),
    "learned clamp": Case(
        *between(
            lambda m, y: y.clamp(min=m.w).clamp(max=m.v),
            w=lambda: nn.Parameter(-torch.ones(8, 1, 1)),
            v=lambda: nn.Parameter(torch.ones(8, 1, 1)),
        ),
        BOTH,
    ),
    "ParameterList and ParameterDict": Case(
        *between(
            lambda m, y: y * m.w[0] + m.v["shift"],
            w=lambda: nn.ParameterList([parameter(8, 1, 1)]),
            v=lambda: nn.ParameterDict({"shift": parameter(8, 1, 1)}),
        ),
        BOTH,
    ),
    # Buffers --------------------------------------------
    "buffers that follow channels": Case(*between(lambda m, y: m.s(y), s=lambda: Statistics(8)), BOTH, mixes=True),
    "buffers of the input's channels": Case(
        lambda m, x: m.head(m.a(m.s(x)).mean((2, 3))),
        lambda: {"s": Statistics(3), "a": conv(3, 8), "head": nn.Linear(8, 3)},
        {"a": 8},
    ),
    "a list of plain tensors": Case(
        *between(lambda m, y: y * m.w[0] + m.w[1], w=lambda: [torch.rand(8, 1, 1).double(), torch.rand(1).double()]),
        {"b": 6},
        {"a": FIXED},
    ),
    # Parametrized ---------------------------------------
    "weight norm": Case(
        *between(lambda m, y: m.c(y), 5, c=lambda: parametrizations.weight_norm(conv(8, 5))),
        {**BOTH, "c": 5},
        mixes=True,
    ),
    "weight norm of a linear layer, by inputs": Case(
        lambda m, x: m.head(m.c(m.a(x))),
        linear_net(c=lambda: parametrizations.weight_norm(nn.Linear(8, 6), dim=1)),
        {"a": 8, "c": 6},
        image=(4,),
        mixes=True,
    ),
    "weight norm of a transposed convolution": Case(
        *between(lambda m, y: m.c(y), 5, c=lambda: parametrizations.weight_norm(nn.ConvTranspose2d(8, 5, 2), dim=1)),
        {**BOTH, "c": 5},
        mixes=True,
    ),
    "spectral norm": Case(
        *between(lambda m, y: m.c(y), 5, c=lambda: parametrizations.spectral_norm(conv(8, 5))),
        {"b": 6},
        {"a": "mv", "c": "mv"},
    ),
    "orthogonal": Case(
        lambda m, x: m.head(m.c(m.a(x))),
        linear_net(c=lambda: parametrizations.orthogonal(nn.Linear(8, 6))),
        # Its inputs are the rows of a buffer that an orthogonal matrix is multiplied with.
        {"stream": 8},
        {"c": "the operator tril is not one"},
        image=(4,),
    ),
    "positive weights": Case(
        *between(lambda m, y: m.c(y), 5, c=lambda: with_parametrization(conv(8, 5), Softplus())),
        {**BOTH, "c": 5},
        mixes=True,
    ),
    "symmetric weights": Case(
        lambda m, x: m.head(m.c(m.a(x))[:, :6]),
        linear_net(c=lambda: with_parametrization(nn.Linear(8, 8), Symmetric())),
        {},
        {"a": "joins it with channels that cannot be removed", "c": "triu"},
        image=(4,),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_states(case: Case) -> None:
    check_case(case)


@pytest.mark.filterwarnings("ignore:.*is deprecated", "ignore:The tensor attribute")
@pytest.mark.parametrize(
    ("norm", "expected"),
    [(torch.nn.utils.weight_norm, {"a": 8, "c": 5, "b": 6}), (torch.nn.utils.spectral_norm, {"b": 6})],
)
def test_norms_on_weights_by_hooks(norm: Callable[[nn.Module], nn.Module], expected: dict[str, int]) -> None:
    case = Case(*between(lambda m, y: m.c(y), 5, c=lambda: conv(8, 5)), {})
    model = case.build()
    norm(model.get_submodule("c"))
    program = pl.trace(model, case.example())
    assert free(program) == expected
    check_promise(program, case.example(), mixes=True)


def test_a_followed_norm_on_weights_can_still_be_taken_off() -> None:
    case = Case(*between(lambda m, y: m.c(y), 5, c=lambda: parametrizations.weight_norm(conv(8, 5))), {})
    program = pl.trace(case.build(), case.example())
    small: Any = pl.commit(program, pl.Selection({"a": (1, 2), "c": (0, 3, 4)}))
    with torch.no_grad():
        before = small(*case.example())
        parametrize.remove_parametrizations(small.c, "weight")
        assert torch.allclose(small(*case.example()), before)
    assert small.c.weight.shape == (3, 2, 3, 3)


def test_frozen_parameters_stay_frozen() -> None:
    case = Case(*between(lambda m, y: m.c(m.norm(y)), c=lambda: conv(8, 8), norm=lambda: nn.BatchNorm2d(8)), {})
    model = case.build()
    model.get_submodule("a").requires_grad_(False)
    model.get_parameter("norm.weight").requires_grad_(False)
    program = pl.trace(model, case.example())
    small = pl.commit(program, pl.Selection({"a": (1, 2), "c": (0, 3, 4)}))
    assert {n: p.requires_grad for n, p in small.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    small(*case.example()).sum().backward()
    assert [n for n, p in small.named_parameters() if p.grad is None] == ["a.weight", "a.bias", "norm.weight"]


def test_tied_weights_stay_tied() -> None:
    case = Case(tied_words, tied_parts, {}, args=lambda: (torch.randint(11, (2, 5)),))
    program = pl.trace(case.build(), case.example())
    small: Any = pl.commit(program, pl.Selection({"stream": (1, 4, 6)}))
    assert small.out.weight is small.words.weight
    assert small.out.weight.shape == (11, 3)


def test_buffers_keep_their_place_in_the_state() -> None:
    case = Case(*between(lambda m, y: m.s(y), s=lambda: Statistics(8)), {})
    program = pl.trace(case.build(), case.example())
    small = pl.commit(program, pl.Selection({"a": (1, 4, 6)}))
    assert small.state_dict()["s.mean"].shape == (3, 1, 1)
    assert "s.std" not in small.state_dict()
    assert small.get_buffer("s.std").shape == (1, 3, 1, 1)
    assert isinstance(small, Net)
