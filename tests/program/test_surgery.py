"""Surgery: the committed module's attributes, also of parts that hold no tensor to read them from."""

from __future__ import annotations

import warnings

import pytest
import torch
from support import Network, half_of_everything, relative
from torch import Tensor, nn

import prunelab as pl
from prunelab.program.run import bind


class Bare(nn.Module):
    """Every kind of norm, with and without weights, between two convolutions."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3, padding=1), norm, nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.b(self.norm(self.a(x))).mean((2, 3)))
        return logits


NORMS = {
    "batch": (lambda: nn.BatchNorm2d(8), "num_features", 4),
    "batch, bare": (lambda: nn.BatchNorm2d(8, affine=False), "num_features", 4),
    "instance": (lambda: nn.InstanceNorm2d(8, affine=True), "num_features", 4),
    "instance, bare": (lambda: nn.InstanceNorm2d(8), "num_features", 4),
    "group": (lambda: nn.GroupNorm(2, 8), "num_channels", 4),
    "group, bare": (lambda: nn.GroupNorm(2, 8, affine=False), "num_channels", 4),
    "layer": (lambda: nn.LayerNorm([8, 6, 6]), "normalized_shape", (4, 6, 6)),
    "layer, bare": (lambda: nn.LayerNorm([8, 6, 6], elementwise_affine=False), "normalized_shape", (4, 6, 6)),
    "prelu": (lambda: nn.PReLU(8), "num_parameters", 4),
}


@pytest.mark.parametrize(("make", "attribute", "expected"), NORMS.values(), ids=NORMS)
def test_sizes_of_norms(make: object, attribute: str, expected: object) -> None:
    net = Network(lambda: Bare(make()), (3, 6, 6))  # type: ignore[operator]
    program = pl.trace(net.build(), net.images())
    assert not program.layer("a").pinned
    selection = half_of_everything(program, mask=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = pl.commit(program, selection)
        with torch.no_grad():
            assert relative(bind(program, selection)(net.images()), small(net.images())) < 1e-10
    assert getattr(small.norm, attribute) == expected
    assert getattr(program.model.norm, attribute) != expected
    assert str(expected).strip("()") in repr(small.norm)


def test_transposed_and_grouped_convolutions() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.grouped = nn.ConvTranspose2d(3, 8, 2), nn.Conv2d(8, 12, 3, groups=2)
            self.head = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.grouped(self.up(x)).mean((2, 3)))
            return logits

    net = Network(Both, (3, 6, 6))
    program = pl.trace(net.build(), net.images())
    small = pl.commit(program, half_of_everything(program, mask=False))
    assert repr(small.up).startswith("ConvTranspose2d(3, 4, ")
    assert repr(small.grouped) == "Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), groups=2)"


def test_embeddings_keep_their_entries() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.hidden, self.head = nn.Embedding(11, 8), nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.hidden(self.words(x)).relu().mean(1))
            return logits

    torch.manual_seed(0)
    model, x = Words().double().eval(), torch.randint(11, (4, 5))
    program = pl.trace(model, x)
    selection = half_of_everything(program, mask=False)
    small = pl.commit(program, selection)
    assert repr(small.words) == "Embedding(11, 4)"
    with torch.no_grad():
        assert relative(bind(program, selection)(x), small(x)) < 1e-12


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated", "ignore:The tensor attribute")
def test_weights_that_a_hook_computes_stay_real_tensors() -> None:
    net = Network(lambda: Bare(nn.Identity()), (3, 6, 6))
    model = net.build()
    torch.nn.utils.weight_norm(model.a)
    with torch.no_grad():
        before = model(net.images())
    program = pl.trace(model, net.images())
    assert type(model.a.weight) is Tensor
    selection = half_of_everything(program, mask=False)
    small = pl.commit(program, selection)
    with torch.no_grad():
        assert torch.equal(model(net.images()), before)
        assert relative(bind(program, selection)(net.images()), small(net.images())) < 1e-10


def test_parametrized_weights_are_followed() -> None:
    net = Network(lambda: Bare(nn.Identity()), (3, 6, 6))
    model = net.build()
    torch.nn.utils.parametrizations.weight_norm(model.b)
    program = pl.trace(model, net.images())
    selection = half_of_everything(program, mask=False)
    small = pl.commit(program, selection)
    with torch.no_grad():
        assert relative(bind(program, selection)(net.images()), small(net.images())) < 1e-10
