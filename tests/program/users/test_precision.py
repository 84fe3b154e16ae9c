"""Users' models in other precisions, memory formats and wrappers: a commit keeps all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import half_of_everything, relative
from torch import Tensor, nn
from users import Net, check_promise, conv, free

import prunelab as pl
from prunelab.program.run import bind


def network() -> nn.Module:
    torch.manual_seed(0)
    parts = {"a": conv(3, 8), "norm": nn.BatchNorm2d(8), "b": conv(8, 6, groups=2), "head": nn.Linear(6, 3)}
    return Net(lambda m, x: m.head(m.b(m.norm(m.a(x)).relu()).mean((2, 3))), **parts).eval()


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision_is_kept(dtype: torch.dtype) -> None:
    program = pl.trace(network().to(dtype), images(dtype))
    assert free(program) == {"a": 4, "b": 3}
    selection = half_of_everything(program, mask=False)
    small = pl.commit(program, selection)
    assert {p.dtype for p in small.parameters()} == {dtype}
    with torch.no_grad():
        assert torch.equal(bind(program, selection)(images(dtype)), small(images(dtype)))
    held = small.state_dict().values()
    assert pl.cost(program, selection).bytes == sum(t.numel() * t.element_size() for t in held)


def test_mixed_precision_is_kept() -> None:
    model = Net(lambda m, x: m.head(m.b(m.a(x).half()).float().mean((2, 3))), a=conv(3, 8), b=conv(8, 6).half(),
                head=nn.Linear(6, 3)).eval()  # fmt: skip
    program = pl.trace(model, images())
    assert free(program) == {"a": 8, "b": 6}
    small = pl.commit(program, half_of_everything(program, mask=False))
    assert [p.dtype for p in small.parameters()] == [p.dtype for p in model.parameters()]
    with torch.no_grad():
        assert small(images()).shape == (4, 3)


def test_channels_last_is_kept() -> None:
    model = network().double().to(memory_format=torch.channels_last)
    x = images(torch.float64).to(memory_format=torch.channels_last)
    program = pl.trace(model, x)
    assert free(program) == {"a": 4, "b": 3}
    check_promise(program, (x,), mixes=True)
    small = pl.commit(program, pl.Selection({"a": (0, 1, 3), "b": (0, 2)}))
    for name in ("a.weight", "b.weight"):
        assert small.get_parameter(name).is_contiguous(memory_format=torch.channels_last), name
    assert small.get_parameter("head.weight").is_contiguous()


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_complex_numbers_are_right() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.head((m.b(m.a(torch.complex(x, -x))) * m.w).abs()),
        a=nn.Linear(5, 8, dtype=torch.complex128),
        b=nn.Linear(8, 6, dtype=torch.complex128),
        w=nn.Parameter(torch.randn(6, dtype=torch.complex128)),
        head=nn.Linear(6, 3, dtype=torch.float64),
    )
    x = torch.randn(4, 5, dtype=torch.float64)
    program = pl.trace(model, x)
    assert free(program) == {"a": 8, "b": 6}
    for seed in range(3):
        selection = half_of_everything(program, seed, mask=False)
        small = pl.commit(program, selection)
        with torch.no_grad():
            assert relative(bind(program, selection)(x), small(x)) < 1e-10
        assert pl.cost(program, selection).params == sum(p.numel() for p in small.parameters())


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "compiled DataParallel": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_looked_through(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = network().double()
    program = pl.trace(wrap(model), images(torch.float64))
    assert program.model is model
    assert free(program) == {"a": 4, "b": 3}
    assert type(pl.commit(program, pl.Selection({"a": (0,)}))) is Net


def test_parts_may_be_wrapped() -> None:
    torch.manual_seed(0)
    compiled = torch.compile(nn.Linear(4, 5), backend="eager")
    model = nn.Sequential(nn.DataParallel(nn.Linear(6, 4)), compiled, nn.Linear(5, 3))
    program = pl.trace(model.double(), images(torch.float64).mean(1))
    assert free(program) == {"0.module": 4, "1._orig_mod": 5}
    check_promise(program, (images(torch.float64).mean(1),), mixes=False)
