"""Promise 3: the proof. A forward that does not follow a cut is found out, whatever it does instead."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import Network, relative
from torch import Tensor, nn

import prunelab as pl
from prunelab import zoo
from prunelab.program.proof import refusal
from prunelab.program.run import bind


class Wide(nn.Module):
    """Many layers, of which some are written so that they cannot be cut."""

    def __init__(self, stubborn: frozenset[int], forward: Callable[[Wide, int, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(9))
        self.stubborn, self.step = stubborn, forward

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x).relu()
            if number in self.stubborn:
                x = self.step(self, number, x)
        return x


def literal_view(net: Wide, number: int, x: Tensor) -> Tensor:
    return x.view(-1, 2, 4).flatten(1)


def counted(net: Wide, number: int, x: Tensor) -> Tensor:
    return x / x.shape[-1]


def refusing(net: Wide, number: int, x: Tensor) -> Tensor:
    if x.shape[-1] != 8:
        raise RuntimeError("eight or nothing")
    return x


def another_way(net: Wide, number: int, x: Tensor) -> Tensor:
    return x.tanh() if x.shape[-1] == 8 else x


def another_order(net: Wide, number: int, x: Tensor) -> Tensor:
    return x.view(-1, 2, x.shape[-1] // 2).transpose(1, 2).flatten(1) if x.shape[-1] == 8 else x.clone()


@pytest.mark.parametrize("step", [literal_view, counted, refusing, another_way, another_order])
@pytest.mark.parametrize("stubborn", [{0}, {3}, {2, 6, 7}])
def test_exactly_the_layers_that_cannot_be_cut_are_pinned(
    step: Callable[[Wide, int, Tensor], Tensor], stubborn: set[int]
) -> None:
    net = Network(lambda: Wide(frozenset(stubborn), step), (8,))
    program = pl.trace(net.build(), net.images())
    pinned = {int(layer.name.split(".")[1]) for layer in program.layers if layer.pinned}
    # The last one makes the outputs.
    assert pinned == {*stubborn, 8}
    kept = {layer.name: tuple(range(0, layer.channels, 3)) for layer in program.layers if not layer.pinned}
    with torch.no_grad():
        small = pl.commit(program, pl.Selection(kept))
        assert relative(bind(program, pl.Selection(kept))(net.images()), small(net.images())) < 1e-12


def test_the_reason_is_the_users_error() -> None:
    net = Network(lambda: Wide(frozenset({4}), refusing), (8,))
    program = pl.trace(net.build(), net.images())
    assert program.layer("layers.4").pinned.startswith("your forward fails when it is cut: eight or nothing (in ")


def test_a_forward_that_makes_tensors_on_a_named_device_is_proven_too() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.a(x) + torch.full((1, 1), 2.0, device="cpu"))
            return logits

    program = pl.trace(Named(), torch.randn(2, 4))
    assert not program.layer("a").pinned


def test_what_only_one_cut_shows_is_refused_at_the_commit() -> None:
    """A forward that goes another way for one width alone passes the trial cuts, and is stopped when it matters."""

    def at_seven(net: Wide, number: int, x: Tensor) -> Tensor:
        return x.tanh() if x.shape[-1] == 7 else x

    net = Network(lambda: Wide(frozenset({2}), at_seven), (8,))
    program = pl.trace(net.build(), net.images())
    six, seven = (pl.Selection({"layers.2": tuple(range(n))}) for n in (6, 7))
    assert not program.layer("layers.2").pinned
    pl.commit(program, six)
    with pytest.raises(pl.PruneLabError, match=r"cannot be committed: .* follow the cut at tanh"):
        pl.commit(program, seven)


def test_refusal_of_good_selections_is_empty() -> None:
    program = pl.trace(zoo.lenet(), torch.randn(2, 1, 28, 28))
    assert refusal(program, pl.DENSE) == ""
    assert refusal(program, pl.Selection({"conv1": (1,)})) == ""


def test_without_proof_nothing_is_pinned_but_by_the_rules() -> None:
    net = Network(lambda: Wide(frozenset({4}), refusing), (8,))
    program = pl.trace(net.build(), net.images(), prove=False)
    assert [layer.name for layer in program.layers if layer.pinned] == ["layers.8"]


def test_what_a_branch_reads_in_training_alone_is_pinned() -> None:
    """An auxiliary classifier that evaluation never runs would not follow a cut of what it reads."""

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head, self.aux = (nn.Linear(*sizes) for sizes in ((4, 6), (6, 5), (5, 2), (6, 2)))

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            x = self.a(x).relu()
            logits: Tensor = self.head(self.b(x).relu())
            return (logits, self.aux(x)) if self.training else logits

    model = Auxiliary().eval()
    program = pl.trace(model, torch.randn(2, 4))
    assert {layer.name for layer in program.layers if not layer.pinned} == {"b"}
    assert "your forward fails in training mode when it is cut" in program.layer("a").pinned
    small = pl.commit(program, pl.Selection({"b": (0, 3)})).train()
    assert [tuple(out.shape) for out in small(torch.randn(3, 4))] == [(3, 2), (3, 2)]
