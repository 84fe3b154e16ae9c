"""Gradients for criteria: against autograd's own, image by image; whatever the batches; stopped, cached and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import Network
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import prunelab as pl
from prunelab import zoo
from prunelab.criteria.registry import scores
from prunelab.profile import gradients
from prunelab.profile.gates import of_filters, of_site

LENET = Network(lambda: zoo.LeNet((4, 6, 10)), (1, 28, 28))
RESNET = Network(lambda: zoo.resnet.ResNet(8, "projection"), (3, 8, 8))


def known(network: Network, count: int = 12) -> tuple[pl.Program, pl.Profile, TensorDataset]:
    program = pl.trace(network.build(), network.images())
    data = TensorDataset(network.images(count), torch.arange(count) % 10)
    return program, pl.profile(program, data.tensors[0], cache=False, progress=False), data


def gathered(profile: pl.Profile, data: Any, **settings: Any) -> pl.Profile:
    return pl.with_gradients(profile, data, **{"cache": False, "progress": False, **settings})


def per_image(model: nn.Module, data: TensorDataset, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradients of every image's loss with respect to some parameters."""
    held = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    def loss(some: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, {**held, **some}, (image[None],)), label[None])

    some = {name: held[name] for name in names}
    found: dict[str, Tensor] = vmap(grad(loss), (None, 0, 0))(some, *data.tensors)
    return found


@pytest.mark.parametrize(("network", "layer"), [(LENET, "conv1"), (LENET, "fc1"), (RESNET, "layer2.0.conv1")])
def test_gates_of_filters_are_sums_over_their_weights(network: Network, layer: str) -> None:
    program, profile, data = known(network)
    model = program.model
    names = tuple(n for n in (f"{layer}.weight", f"{layer}.bias") if n in dict(model.named_parameters()))
    found = per_image(model, data, names)
    t = sum((found[n] * model.get_parameter(n)).flatten(2).sum(2) if found[n].dim() > 2
            else found[n] * model.get_parameter(n) for n in names)  # fmt: skip
    assert isinstance(t, Tensor)
    gates = gathered(profile, data).gradients[of_filters(f"{layer}.weight", 0)]
    expected = t.detach().numpy()
    assert gates.images == 12
    assert np.allclose(gates.squares, (expected**2).sum(0), rtol=1e-10)
    assert np.allclose(gates.absolute, np.abs(expected).sum(0), rtol=1e-10)
    wanted = (expected**2).mean(0)
    found_scores = scores(program, gathered(profile, data), "taylor_weight", program.layer(layer))
    assert np.allclose(found_scores, wanted, rtol=1e-10)


def test_taylor_is_gradient_times_value_after_the_activation() -> None:
    program, profile, data = known(LENET)
    model, (images, labels) = program.model, data.tensors
    first: Tensor = model.get_submodule("conv1")(images).relu().detach().requires_grad_()
    pooled = nn.functional.max_pool2d(first, 2)
    second = nn.functional.max_pool2d(model.get_submodule("conv2")(pooled).relu(), 2)
    logits = model.get_submodule("fc2")(model.get_submodule("fc1")(second.flatten(1)).relu())
    (gradient,) = torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), first)
    expected = (gradient * first).mean((2, 3)).abs().mean(0).detach()
    found = scores(program, gathered(profile, data), "taylor", program.layer("conv1"))
    assert np.allclose(found, expected / expected.norm(), rtol=1e-10)


class Twice(nn.Module):
    """One weight, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.b(self.a(self.a(x).relu()).relu())
        return logits


def test_a_weight_that_is_used_twice_has_one_gate() -> None:
    program, profile, data = known(Network(Twice, (6,)))
    found = per_image(program.model, data, ("a.weight", "a.bias"))
    weight, bias = program.model.get_parameter("a.weight"), program.model.get_parameter("a.bias")
    t = (found["a.weight"] * weight).sum(2) + found["a.bias"] * bias
    gates = gathered(profile, data).gradients[of_filters("a.weight", 0)]
    assert np.allclose(gates.squares, t.square().sum(0).detach(), rtol=1e-10)


class Sequence(nn.Module):
    """Positions before images, as in (positions, images, channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.b(self.a(x.transpose(0, 1)).relu().mean(0))
        return logits


def test_images_are_told_apart_wherever_their_dimension_is() -> None:
    program, profile, data = known(Network(Sequence, (3, 4)))
    found = per_image(program.model, data, ("a.weight", "a.bias"))
    weight, bias = program.model.get_parameter("a.weight"), program.model.get_parameter("a.bias")
    t = (found["a.weight"] * weight).sum(2) + found["a.bias"] * bias
    gates = gathered(profile, data).gradients[of_filters("a.weight", 0)]
    assert gates.images == 12
    assert np.allclose(gates.absolute, t.abs().sum(0).detach(), rtol=1e-10)


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    _, profile, data = known(RESNET)
    whole = gathered(profile, data).gradients
    monkeypatch.setattr(gradients, "_AT_ONCE", 5)
    parts = gathered(profile, data).gradients
    loader = gathered(profile, DataLoader(data, batch_size=7)).gradients
    assert whole.keys() == parts.keys() == loader.keys()
    for name, gates in whole.items():
        assert np.allclose(parts[name].squares, gates.squares, rtol=1e-9)
        assert np.allclose(loader[name].absolute, gates.absolute, rtol=1e-9)
        assert parts[name].images == loader[name].images == 12


def test_merged_profiles_have_the_sums_of_both() -> None:
    program, _, data = known(LENET)
    images, labels = data.tensors
    halves = [TensorDataset(images[part], labels[part]) for part in (slice(0, 5), slice(5, 12))]
    both = [
        gathered(pl.profile(program, half, cache=False, progress=False), half) for half in halves
    ]  # fmt: skip
    whole = gathered(pl.profile(program, data, cache=False, progress=False), data)
    merged = both[0].merge(both[1])
    for name, gates in whole.gradients.items():
        assert np.allclose(merged.gradients[name].squares, gates.squares, rtol=1e-10)
    bare = pl.profile(program, halves[1], cache=False, progress=False)
    assert both[0].merge(bare).gradients == {}


def test_stopped_it_goes_on_where_it_was_and_then_comes_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, profile, data = known(LENET)
    monkeypatch.setattr(gradients, "_AT_ONCE", 4)
    wanted = gathered(profile, data).gradients
    with pytest.raises(pl.Stopped):
        gathered(profile, data, cache=tmp_path, progress=lambda done, *_: done < 2)
    ran: list[int] = []
    once = gradients.Gated.run

    def counted(self: Any, bound: Any, inputs: Any, labels: Tensor, loss: Any) -> Any:
        ran.append(len(labels))
        return once(self, bound, inputs, labels, loss)

    monkeypatch.setattr(gradients.Gated, "run", counted)
    found = gathered(profile, data, cache=tmp_path).gradients
    assert ran == [4]
    assert all(np.array_equal(found[name].squares, gates.squares) for name, gates in wanted.items())
    again = gathered(profile, data, cache=tmp_path).gradients
    assert ran == [4]
    assert all(np.array_equal(again[name].absolute, gates.absolute) for name, gates in wanted.items())


def test_a_damaged_cache_is_measured_again(tmp_path: Path) -> None:
    _, profile, data = known(LENET)
    wanted = gathered(profile, data, cache=tmp_path).gradients
    (file,) = (tmp_path / "gradients").iterdir()
    file.write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="damaged .* measured again"):
        found = gathered(profile, data, cache=tmp_path).gradients
    assert all(np.array_equal(found[name].squares, gates.squares) for name, gates in wanted.items())


def test_images_are_drawn_from_all_over_a_set() -> None:
    _, profile, data = known(LENET)
    some = gathered(profile, data, images=3).gradients
    first = gathered(profile, TensorDataset(*(t[:3] for t in data.tensors))).gradients
    name = of_site(profile.program.layer("conv1").sites[0])
    assert some[name].images == first[name].images == 3
    assert not np.allclose(some[name].absolute, first[name].absolute)


def test_a_loss_of_ones_own() -> None:
    program, profile, data = known(LENET)
    found = gathered(profile, data, loss=lambda outputs, _: outputs[:, 0]).gradients
    weight = program.model.get_parameter("fc2.weight").detach()
    with torch.no_grad():
        hidden = profile.activations[program.layer("fc1").sites[0]]
    expected = (hidden * weight[0]).abs().sum(0)
    assert np.allclose(found[of_site(program.layer("fc1").sites[0])].absolute, expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (torch.zeros(4, 1, 28, 28, dtype=torch.float64), {}, "need labels"),
        (TensorDataset(torch.zeros(4, 1, 28, 28, dtype=torch.float64), torch.zeros(4)), {}, "Cross-entropy needs"),
        (TensorDataset(torch.zeros(0, 1, 28, 28).double(), torch.zeros(0).long()), {}, "no images"),
        (TensorDataset(torch.full((4, 1, 28, 28), torch.nan).double(), torch.zeros(4).long()), {}, "not finite"),
        (TensorDataset(torch.zeros(4, 1, 28, 28).double(), torch.zeros(4).long()), {"images": 0}, "at least one"),
        (TensorDataset(torch.zeros(4, 1, 28, 28).double(), torch.zeros(4).long()),
         {"loss": lambda outputs, _: outputs.mean()}, "one number per image"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_said(data: Dataset[Any], settings: dict[str, Any], message: str) -> None:
    _, profile, _ = known(LENET, 4)
    with pytest.raises(pl.PruneLabError, match=message):
        gathered(profile, data, **settings)


class Stream(IterableDataset[tuple[Tensor, int]]):
    def __iter__(self) -> Any:
        return ((image, 1) for image in LENET.images(9))


def test_a_stream_gives_its_first_images() -> None:
    _, profile, _ = known(LENET)
    found = gathered(profile, DataLoader(Stream(), batch_size=4), images=6).gradients
    assert {gates.images for gates in found.values()} == {6}
