"""Users' forwards: hooks, overwritten values, checkpoints, own gradients; arguments and results of any form."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from users import Case, between, check_case, check_promise, conv, free

import prunelab as pl

BOTH = {"a": 8, "b": 6}


class Doubled(torch.autograd.Function):
    """Forward of the user's own, and its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2.0

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 2.0


def overwritten(m: Any, y: Tensor) -> Tensor:
    y = F.relu(y, inplace=True)
    y.mul_(0.5).add_(0.1).clamp_(max=2.0)
    y[:, :, 0] = 0.0
    y[:, :, 1:, 2] += 1.0
    y[y > 1.5] = 1.5
    return y.sqrt_()


def masked(m: Any, y: Tensor) -> Tensor:
    y.masked_fill_(y < 0, 0.0)
    other = y.new_empty(y.shape).copy_(y) if m.training else y.clone()
    other.sub_(y.mean((2, 3), keepdim=True)).tanh_()
    return other.transpose_(2, 3)


def remembering(m: Any, y: Tensor) -> Tensor:
    m.last = y
    m.seen["a"] = y.mean()
    return y


def with_hooks(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Hooks that change what comes in and what goes out."""

    def build() -> nn.Module:
        part = make()
        part.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
        part.register_forward_hook(lambda module, args, result: result.relu() + 0.25)
        return part

    return build


CASES: dict[str, Case] = {
    "hooks that change values": Case(
        *between(lambda m, y: m.c(y), 5, c=with_hooks(lambda: conv(8, 5))), {**BOTH, "c": 5}
    ),
    "a gradient of the user's own": Case(*between(lambda m, y: Doubled.apply(y)), BOTH),
    "checkpoint": Case(
        *between(lambda m, y: checkpoint(m.c, y, use_reentrant=False), c=lambda: conv(8, 8)), {**BOTH, "c": 8}
    ),
    "checkpoint, reentrant": Case(
        *between(lambda m, y: checkpoint(m.c, y, use_reentrant=True), c=lambda: conv(8, 8)), {**BOTH, "c": 8}
    ),
    "checkpoint_sequential": Case(
        *between(
            lambda m, y: checkpoint_sequential(m.c, 2, y, use_reentrant=False),
            c=lambda: nn.Sequential(conv(8, 7), nn.ReLU(), conv(7, 8)),
        ),
        {**BOTH, "c.0": 7, "c.2": 8},
    ),
    "if self.training": Case(*between(lambda m, y: F.dropout(y) if m.training else y * 0.5), BOTH),
    "overwritten in place": Case(*between(lambda m, y: y.relu_().mul_(0.5).add_(0.1).clamp_(max=2.0).sqrt_()), BOTH),
    "overwritten in parts": Case(*between(overwritten), {"b": 6}, {"a": "index_put"}),
    "overwritten by masks": Case(*between(masked), BOTH),
    "augmented assignment": Case(
        lambda m, x: m.head(grown(m, x).mean((2, 3))),
        lambda: {"a": conv(3, 8), "b": conv(8, 8), "head": nn.Linear(8, 3)},
        {"stream": 8},
    ),
    "without gradients, and detached": Case(
        *between(lambda m, y: m.c(y.detach()), 5, c=lambda: conv(8, 5)), {**BOTH, "c": 5}
    ),
    "a loop over depth": Case(*between(lambda m, y: looped(m, y), c=lambda: conv(8, 8)), {"stream": 8, "b": 6}),
}


def looped(m: Any, y: Tensor) -> Tensor:
    for _ in range(3):
        y = y + m.c(y).tanh()
    return y


def grown(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.a(x)
    y += m.b(y)
    y *= 0.5
    y -= y.mean((2, 3), keepdim=True)
    return y


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forwards(case: Case) -> None:
    check_case(case)


# Arguments and results ----------------------------------


class Pair(NamedTuple):
    logits: Tensor
    features: Tensor


@dataclass
class Registered:
    logits: Tensor
    features: list[Tensor]


pytree.register_dataclass(Registered)


@dataclass
class Plain:
    logits: Tensor
    features: Tensor


def heads(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.a(x).relu()
    return m.head(y.mean((2, 3))), m.b(y)


def two_heads() -> dict[str, Any]:
    return {"a": conv(3, 8), "b": conv(8, 6), "head": nn.Linear(8, 3)}


RESULTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda p, q: (p, q),
    "list": lambda p, q: [p, q, p],
    "dict": lambda p, q: {"logits": p, "features": q},
    "ordered dict": lambda p, q: OrderedDict(logits=p, features=q),
    "nested": lambda p, q: {"out": (p, [q, {"again": q}]), "none": None, "number": 3},
    "named tuple": Pair,
    "registered dataclass": lambda p, q: Registered(p, [q]),
}


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_results_of_any_form(result: Callable[[Tensor, Tensor], Any]) -> None:
    check_case(Case(lambda m, x: result(*heads(m, x)), two_heads, {"a": 8}))


def test_a_hidden_value_among_the_results_is_pinned() -> None:
    def body(m: Any, x: Tensor) -> dict[str, Tensor]:
        y = m.a(x)
        return {"logits": m.head(y.mean((2, 3))), "hidden": y}

    case = Case(body, lambda: {"a": conv(3, 8), "head": nn.Linear(8, 3)}, {})
    assert check_case(case).layer("a").pinned == "its outputs are the network's outputs"


def test_a_plain_dataclass_as_result_is_refused_in_a_sentence() -> None:
    case = Case(lambda m, x: Plain(*heads(m, x)), two_heads, {})
    with pytest.raises(pl.PruneLabError, match=r"gives back a Plain.*register_dataclass"):
        pl.trace(case.build(), case.example())


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6).double()


def scaled(m: Any, x: Tensor, scale: Tensor | None = None, twice: bool = False) -> Tensor:
    y = m.a(x) if scale is None else m.a(x) * scale
    out: Tensor = m.head((m.b(y) * (2 if twice else 1)).mean((2, 3)))
    return out


def two_inputs(m: Any, x: Tensor, z: Tensor) -> Tensor:
    out: Tensor = m.head((m.b(m.a(x)) + m.c(z)).mean((2, 3)))
    return out


def one_argument() -> dict[str, Any]:
    return {"a": conv(3, 8), "b": conv(8, 6), "head": nn.Linear(6, 3)}


ARGUMENTS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]], dict[str, int]]] = {
    "two": (two_inputs, lambda: (images(), images()), {"a": 8, "stream": 6}),
    "two of different sizes": (two_inputs, lambda: (images(), images()[:, :, :1, :1]), {"a": 8, "stream": 6}),
    "one that is not per image": (scaled, lambda: (images(), torch.rand(8, 1, 1).double()), {"b": 6}),
    "a number and a flag": (scaled, lambda: (images(), 0.5, True), BOTH),
    "None": (scaled, lambda: (images(), None), BOTH),
    "the optional one left out": (scaled, lambda: (images(),), BOTH),
    "a dict": (
        lambda m, d: two_inputs(m, d["x"], d["z"]),
        lambda: ({"x": images(), "z": images()},),
        {"a": 8, "stream": 6},
    ),
    "a tensor and a dict": (
        lambda m, x, d: two_inputs(m, x, d["z"]),
        lambda: (images(), {"z": images()}),
        {"a": 8, "stream": 6},
    ),
    "a list": (lambda m, xs: two_inputs(m, *xs), lambda: ([images(), images()],), {"a": 8, "stream": 6}),
}


@pytest.mark.parametrize(("body", "args", "expected"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_of_any_form(
    body: Callable[..., Any], args: Callable[[], tuple[Any, ...]], expected: dict[str, int]
) -> None:
    pinned = {} if "a" in expected else {"a": "joins it with a value whose size is fixed"}
    parts = {**one_argument(), "c": conv(3, 6)}
    if "stream" not in expected:
        del parts["c"]
    check_case(Case(body, lambda: parts, expected, pinned, args=args))


def test_a_single_dict_is_one_argument() -> None:
    case = Case(lambda m, d: scaled(m, d["x"]), one_argument, BOTH)
    args = {"x": images()[:1]}
    program = pl.trace(case.build(), args)
    assert (free(program), program.batch) == (BOTH, None)
    check_promise(program, ({"x": images()},), mixes=False)


class Named(nn.Module):
    """An ordinary forward with a name for every argument and defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv(3, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, power: float = 2.0, **others: Any) -> Tensor:
        y = self.a(x) if mask is None else self.a(x) * mask
        out: Tensor = self.head(y.abs().pow(power).mean((2, 3)))
        return out


@pytest.mark.parametrize("mask", [False, True])
def test_optional_arguments(mask: bool) -> None:
    torch.manual_seed(0)
    args = (images(), torch.rand(2, 1, 6, 6).double()) if mask else (images(),)
    program = pl.trace(Named().double(), args)
    assert free(program) == {"a": 8}
    check_promise(program, args, mixes=False)


def test_values_that_forward_keeps_are_no_obstacle() -> None:
    case = Case(*between(remembering, seen=dict, last=lambda: None), BOTH)
    model = case.build()
    before = model(*case.example())
    kept = model.last
    program = pl.trace(model, case.example())
    assert free(program) == BOTH
    pl.commit(program, pl.Selection({"a": (0, 1)}))
    assert model.last is kept
    with torch.no_grad():
        assert torch.equal(model(*case.example()), before)
    check_promise(program, case.example(), mixes=False)
