"""Cost: parameters, FLOPs and bytes in closed form, equal to what is counted on a module that exists."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from support import Network, flops, half_of_everything, parameters
from torch import Tensor, nn

import prunelab as pl
from prunelab import zoo
from prunelab.program.cost import Size, Term

LENET = Network(zoo.lenet, (1, 28, 28))


@pytest.fixture(scope="module")
def lenet() -> pl.Program:
    return pl.trace(LENET.build(torch.float32), LENET.images(dtype=torch.float32))


def test_lenet_costs_what_the_paper_says(lenet: pl.Program) -> None:
    dense = pl.cost(lenet)
    assert dense.params == dense.nonzero == 431_080  # Hu et al. 2016, table 1
    # 24·24 places of 20 filters of 25 weights, 8·8 of 50 of 500, and two matrices.
    assert dense.macs == 24 * 24 * 20 * 25 + 8 * 8 * 50 * 500 + 800 * 500 + 500 * 10
    assert dense.flops == 2 * dense.macs
    assert dense.bytes == 4 * dense.params


@settings(max_examples=20)
@given(st.integers(1, 20), st.integers(1, 50), st.integers(1, 500))
def test_any_widths_of_lenet(a: int, b: int, c: int) -> None:
    program = pl.trace(LENET.build(torch.float32), LENET.images(dtype=torch.float32), prove=False)
    selection = pl.Selection({"conv1": tuple(range(a)), "conv2": tuple(range(b)), "fc1": tuple(range(c))})
    found = pl.cost(program, selection)
    assert found.params == 26 * a + b * (25 * a + 1) + c * (16 * b + 1) + 10 * (c + 1)
    assert found.macs == 576 * 25 * a + 64 * 25 * a * b + 16 * b * c + 10 * c


def test_what_the_mask_zeroes_is_not_counted_as_nonzero(lenet: pl.Program) -> None:
    mask = torch.ones(500, 800, dtype=torch.bool)
    mask[0] = False
    mask[:, 0] = False
    selection = pl.Selection({"fc1": tuple(range(1, 500))}, {"fc1.weight": mask})
    found = pl.cost(lenet, selection)
    # The masked row is cut away with its channel; what is left of the masked column is zero.
    assert found.params - found.nonzero == 499
    assert pl.sliced_masks(lenet, selection)["fc1.weight"].shape == (499, 800)


def test_rows_add_up(lenet: pl.Program) -> None:
    found = pl.cost(lenet, half_of_everything(lenet))
    frame = found.to_frame()
    assert isinstance(frame, pd.DataFrame)
    assert list(frame.index) == ["conv1", "conv2", "fc1", "fc2"]
    assert frame["params"].sum() == found.params
    assert frame["flops"].sum() == found.flops
    assert str(found) == f"{found.params:,} parameters, {found.flops:,} FLOPs per image, {found.bytes:,} bytes"


def test_terms_are_products_of_linear_forms() -> None:
    kept = [3, 5]
    assert Size(2, ((0, 4), (1, 1)))(kept) == 2 + 12 + 5
    assert Term(10, (Size(0, ((0, 1),)), Size(1, ((1, 2),))), "w")(kept) == 10 * 3 * 11


def test_memory_of_other_precisions_and_of_buffers() -> None:
    model = zoo.resnet20().bfloat16()
    program = pl.trace(model, torch.randn(2, 3, 32, 32).bfloat16())
    held = model.state_dict().values()
    assert pl.cost(program).bytes == sum(t.numel() * t.element_size() for t in held)


class Odd(nn.Module):
    """A network whose cost lies elsewhere than in convolutions of single images."""

    def __init__(self, body: Callable[[Odd, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(2, 6, 3)
        self.head, self.aside = nn.Linear(4, 3), nn.Linear(7, 7)
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self, self.conv(x)))
        return logits


ODD: dict[str, Callable[[Odd, Tensor], Tensor]] = {
    "unused parameters": lambda net, y: y.mean((2, 3)),
    "a part without use": lambda net, y: y.mean((2, 3)) if net.second(y[:, :2]) is not None else y,
    "einsum": lambda net, y: torch.einsum("nchw,cd->nd", y, net.matrix),
    "matrix times vector": lambda net, y: (y.mean((2, 3)) @ net.matrix[0])[:, None].expand(-1, 4),
    "addmm": lambda net, y: torch.addmm(net.matrix[0], y.mean((2, 3)), net.matrix),
    "batched product": lambda net, y: torch.bmm(y.flatten(2), y.flatten(2).transpose(1, 2)).mean(2),
    "several images out of one": lambda net, y: (
        net.second(y.view(-1, 2, 6, 6)).mean((1, 2, 3)).view(-1, 2).repeat(1, 2)
    ),
}


@pytest.mark.parametrize("body", ODD.values(), ids=ODD)
def test_cost_of_the_unusual(body: Callable[[Odd, Tensor], Tensor]) -> None:
    net = Network(lambda: Odd(body), (3, 6, 6))
    program = pl.trace(net.build(), net.images())
    assert pl.cost(program).flops == flops(program.model, net.images(1))
    selection = half_of_everything(program)
    small = pl.commit(program, selection)
    assert pl.cost(program, selection).params == parameters(small)
    assert pl.cost(program, selection).flops == flops(small, net.images(1))
