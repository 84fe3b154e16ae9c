"""What cannot be followed is refused, or pinned, in a sentence that names the line of the user's own code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from users import Case, between, check_case, conv, free

import prunelab as pl

HERE = r" \(in .*test_refusals\.py, line \d+\)"
VALUES = f"Net cannot be traced: what it does depends on the values in a tensor.*{HERE}$"


def on_data(m: Any, y: Tensor) -> Tensor:
    return y if y.sum() > 0 else -y


def until_small(m: Any, y: Tensor) -> Tensor:
    while y.abs().max() > 1:
        y = y / 2
    return y


def cropped(m: Any, y: Tensor) -> Tensor:
    return y[:, :, : int(y.mean().item()) + 1]


def counted(m: Any, y: Tensor) -> Tensor:
    return y * len(y.nonzero())


def as_float(m: Any, y: Tensor) -> Tensor:
    return y * float(y.mean())


def through_numpy(m: Any, y: Tensor) -> Tensor:
    return torch.from_numpy(np.tanh(y.detach().numpy()))


def behind_the_back(m: Any, y: Tensor) -> Tensor:
    return y.data * 2


def on_a_gpu(m: Any, y: Tensor) -> Tensor:
    return y.to("cuda:7")


def conditional(m: Any, y: Tensor) -> Tensor:
    out: Tensor = torch.cond(y.sum() > 0, lambda t: t * 1.0, lambda t: -t, (y,))
    return out


def sparse(m: Any, y: Tensor) -> Tensor:
    return y.to_sparse().to_dense()


def broken(m: Any, y: Tensor) -> Tensor:
    out: Tensor = m.nowhere(y)
    return out


FORWARDS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "a branch on data": (on_data, VALUES),
    "a loop on data": (until_small, VALUES),
    "a size from data": (cropped, VALUES),
    "a count of data": (counted, VALUES),
    "a number from data": (as_float, VALUES),
    "NumPy": (through_numpy, f"leaves torch for NumPy, where it cannot be followed; use torch's functions{HERE}"),
    "data": (behind_the_back, r"uses \.data .*; use \.detach\(\)"),
    "another device": (on_a_gpu, f"cannot run on an example input of shape .*{HERE}"),
    "torch.cond": (conditional, r"uses cond \(.*users\.py:\d+\), whose inside cannot be followed"),
    "sparse tensors": (sparse, f"to_sparse.*{HERE}"),
    "a mistake": (broken, f"cannot run .* has no attribute 'nowhere'{HERE}"),
}


@pytest.mark.parametrize(("middle", "message"), FORWARDS.values(), ids=FORWARDS)
def test_forwards_that_cannot_be_followed(
    middle: Callable[[Any, Tensor], Tensor], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    case = Case(*between(middle), {})
    model = case.build()
    with pytest.raises(pl.PruneLabError, match=message):
        pl.trace(model, case.example())
    assert capfd.readouterr() == ("", "")


def linear(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), *parts, nn.Linear(4, 3))


def quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(linear(nn.ReLU()), {nn.Linear})


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lazy": (lambda: linear(nn.LazyLinear(4)), "^Layer '1' is lazy and has no weights yet: run the model once"),
    "lazy convolution": (lambda: nn.LazyConv2d(4, 3), r"^The model \(LazyConv2d\) is lazy"),
    "scripted": (lambda: torch.jit.script(linear()), "^The model .* is compiled by torch.jit"),
    "scripted in part": (lambda: linear(torch.jit.script(nn.ReLU())), "^Layer '1' is compiled by torch.jit"),
    "traced by jit": (
        lambda: linear(torch.jit.trace(nn.Linear(4, 4), torch.randn(2, 4))),
        "^Layer '1' is compiled by torch.jit, which hides its code: trace what it came from",
    ),
    "quantized": (quantized, "^Layer '0' is quantized, its weights are packed: prune first"),
    "on another device": (lambda: linear().to("meta"), "cannot run on an example input of shape"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "message"), MODELS.values(), ids=MODELS)
def test_models_that_cannot_be_followed(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    with pytest.raises(pl.PruneLabError, match=message):
        pl.trace(model, torch.randn(2, 6))


def test_a_lazy_model_that_has_run_once_is_an_ordinary_one() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(3))
    model(torch.randn(2, 3, 6, 6))
    assert free(pl.trace(model, torch.randn(2, 3, 6, 6))) == {"0": 8}


def test_a_number_read_out_of_a_tensor_pins_with_the_line() -> None:
    reason = f"your forward fails when it is cut: what it does depends on the values in a tensor.*{HERE}"
    case = Case(*between(lambda m, y: y * y.sum().item()), {}, {"a": reason, "b": reason})
    check_case(case)


@torch.jit.script
def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_function_is_looked_into() -> None:
    check_case(Case(*between(lambda m, y: swish(y)), {"a": 8, "b": 6}))


def test_a_unit_that_forward_checks_itself_is_pinned_with_its_words() -> None:
    def picky(m: Any, y: Tensor) -> Tensor:
        if y.shape[1] != 8:
            raise ValueError("I want eight channels")
        return F.relu(y)

    case = Case(*between(picky), {"b": 6}, {"a": f"your forward fails when it is cut: I want eight channels{HERE}"})
    check_case(case)


def test_what_leaves_no_line_of_the_users_is_still_said() -> None:
    with pytest.raises(
        pl.PruneLabError, match=r"^Sequential cannot run on an example input of shape \[\(2, 5\)\]: mat1"
    ):
        pl.trace(nn.Sequential(nn.Linear(6, 3)), torch.randn(2, 5))
    with pytest.raises(pl.PruneLabError, match="cannot run on an example"):
        pl.trace(conv(3, 4), torch.randn(2, 5, 6, 6))
