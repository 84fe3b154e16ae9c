"""Centripetal SGD: gradients by the paper's formula, filters that become equal, and a trim that loses nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import prunelab as pl
from prunelab.train.centripetal import Centripetal
from prunelab.train.clusters import WAYS, Clusters, clusters, kmeans
from prunelab.train.csgd import csgd, pull_for, squeeze_to


def network(width: float = 1.0) -> nn.Module:
    """A small network with norms, a biased convolution and a linear layer."""
    a, b = round(8 * width), round(6 * width)
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, a, 3, bias=False), nn.BatchNorm2d(a), nn.ReLU(), nn.Conv2d(a, b, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * b, 3),
    )  # fmt: skip


@pytest.fixture(scope="module")
def data() -> tuple[TensorDataset, TensorDataset]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (384,), generator=generator)
    images = torch.randn(384, 1, 10, 10, generator=generator) + labels[:, None, None, None] - 1.0
    return TensorDataset(images[:256], labels[:256]), TensorDataset(images[256:], labels[256:])


def test_kmeans_finds_groups_and_leaves_no_cluster_empty() -> None:
    generator = torch.Generator().manual_seed(1)
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    rows = (centres.repeat_interleave(5, 0) + 0.1 * torch.randn(15, 2, generator=generator)).double()
    for seed in range(5):
        numbers = kmeans(rows, 3, seed)
        assert [len(set(part)) for part in np.split(numbers, 3)] == [1, 1, 1]
        assert len(set(numbers.tolist())) == 3
    assert len(set(kmeans(torch.zeros(7, 2, dtype=torch.float64), 4, 0).tolist())) == 4


@pytest.mark.parametrize("how", list(WAYS))
def test_every_way_gives_as_many_clusters_as_asked(how: str) -> None:
    program = pl.trace(pl.zoo.resnet20(), torch.randn(2, 3, 32, 32))
    found = clusters(program, 0.625, how=how)
    for layer in program.structure.layers:
        if not layer.pinned:
            assert len(set(found.of[layer.name])) == round(0.625 * layer.channels)
            # Each is numbered by its first member.
            assert all(found.of[layer.name][first] == first <= k for k, first in enumerate(found.of[layer.name]))
    assert set(found.left) == {layer.name for layer in program.structure.layers if layer.pinned}
    assert Clusters.from_json(found.to_json()) == found


def test_sizes_of_even_and_imbalanced_clusters() -> None:
    rows = torch.zeros(8, 1)
    assert np.bincount(WAYS["even"](rows, 3, 0)).tolist() == [3, 3, 2]
    assert np.bincount(WAYS["imbalanced"](rows, 3, 0)).tolist() == [6, 1, 1]


@pytest.mark.parametrize(
    ("widths", "said"),
    [
        ({"0": 9}, "from 1 to 8"),
        ({"0": 0.0}, "above 0"),
        ({"nothing": 0.5}, "nothing"),
        ({"7": 1}, "network's outputs"),
    ],
)
def test_what_cannot_be_clustered_is_refused_in_a_sentence(widths: dict[str, float], said: str) -> None:
    program = pl.trace(network(), torch.randn(2, 1, 10, 10))
    with pytest.raises(pl.PruneLabError, match=said):
        clusters(program, widths)


def expected(weight: Tensor, gradient: Tensor, groups: list[list[int]], pull: float) -> Tensor:
    """The paper's formula, filter by filter, without the weight decay that the optimizer adds."""
    found = torch.empty_like(gradient)
    for group in groups:
        mean = sum(gradient[k] for k in group) / len(group)
        centre = sum(weight[k] for k in group) / len(group)
        for j in group:
            found[j] = mean + pull * (weight[j] - centre)
    return found


def test_gradients_are_those_of_the_papers_formula() -> None:
    model = network().double()
    program = pl.trace(model, torch.randn(2, 1, 10, 10, dtype=torch.float64))
    chosen = Clusters({"0": (0, 0, 2, 3, 0, 2, 6, 6), "3": (0, 1, 1, 1, 4, 4)})
    centripetal = Centripetal(program, chosen, pull=0.7, vector_pull=0.1)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    centripetal.apply()
    groups = {"0": [[0, 1, 4], [2, 5], [3], [6, 7]], "3": [[0], [1, 2, 3], [4, 5]]}
    of = {"0.weight": ("0", 0.7), "1.weight": ("0", 0.07), "1.bias": ("0", 0.07), "3.weight": ("3", 0.7),
          "3.bias": ("3", 0.07)}  # fmt: skip
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if name in of:
            layer, pull = of[name]
            wanted = expected(parameter.detach(), before[name], groups[layer], pull)
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(parameter.grad, before[name])


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    model = network()
    program = pl.trace(model, torch.randn(2, 1, 10, 10))
    centripetal = Centripetal(program, clusters(program, 0.5), pull=1.0)
    optimizer = torch.optim.Adam(model.parameters())
    centripetal.attach(optimizer)
    model(torch.randn(2, 1, 10, 10)).sum().backward()
    model[0].weight.grad = None
    before = model[0].weight.clone()
    optimizer.step()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("optimizer", [None, lambda p: torch.optim.AdamW(p, 0.003)])
def test_a_run_sized_by_the_rule_is_trimmed_without_loss(
    data: tuple[TensorDataset, TensorDataset], optimizer: Callable[..., torch.optim.Optimizer] | None
) -> None:
    model = network()
    settings = {"epochs": 30, "lr": 0.05, "batch_size": 16} if optimizer is None else {"epochs": 60, "pull": 2.0}
    squeezed = csgd(model, *data, 0.5, progress=False, optimizer=optimizer, **settings)
    if optimizer is None:
        assert squeezed.departure < 1e-4
        small = squeezed.trimmed().eval()
        images, labels = data[1].tensors
        with torch.no_grad():
            whole, trimmed = model.eval()(images), small(images)
        assert float((whole - trimmed).abs().max()) < 1e-4
        assert float((trimmed.argmax(1) == labels).double().mean()) == squeezed.table["accuracy"].iloc[-1]
        assert [small[0].out_channels, small[3].out_channels] == [4, 3]
    else:
        # Adam's own scaling of gradients lets members differ a little longer; they do come together.
        start = Centripetal(pl.trace(network(), torch.randn(2, 1, 10, 10)), squeezed.clusters, pull=1.0).spread()
        assert squeezed.spread < start / 5


def asked_to_stop_after(steps: int) -> Callable[..., bool]:
    calls = iter(range(steps - 1))
    return lambda *_: next(calls, None) is not None


SHORT: dict[str, Any] = {"epochs": 2, "lr": 0.05, "batch_size": 16, "progress": False}


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        ({"widths": 0.75}, {"widths": 0.25}, "widths was 0.75, and is 0.25"),
        ({"widths": 0.5}, {"widths": 0.5, "how": "even"}, "how was kmeans, and is even"),
        ({"pull": 0.5}, {"pull": 0.25}, r"optimizer was Squeezing\(.*pull=0.5, .*, and is .*pull=0.25, "),
        ({"vector_pull": 1.0}, {"vector_pull": 0.1}, "optimizer was .*vector_pull=1.0.*vector_pull=0.1"),
        ({"optimizer": torch.optim.SGD}, {"optimizer": torch.optim.Adam}, "optimizer was .*SGD.* and is .*Adam"),
    ],
)
def test_a_folder_of_another_squeeze_is_refused_and_not_touched(
    data: tuple[TensorDataset, TensorDataset], tmp_path: Path, first: dict[str, Any], then: dict[str, Any], said: str
) -> None:
    model = network()
    csgd(model, *data, **{"widths": 0.5, **SHORT, **first}, folder=tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for each in (model, network()):
        weights = [t.clone() for t in each.state_dict().values()]
        with pytest.raises(pl.PruneLabError, match=f"of another run: {said}"):
            csgd(each, *data, **{"widths": 0.5, **SHORT, **then}, folder=tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(weights, each.state_dict().values(), strict=True))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_other_clusters_other_networks_and_other_trainings_are_refused_too(
    data: tuple[TensorDataset, TensorDataset], tmp_path: Path
) -> None:
    given = Clusters({"0": (0, 0, 2, 2, 4, 4, 6, 6)}), Clusters({"0": (0, 1, 0, 1, 4, 4, 6, 6)})
    csgd(network(), *data, given[0], folder=tmp_path / "given", **SHORT)
    with pytest.raises(pl.PruneLabError, match="of another run: widths was Clusters"):
        csgd(network(), *data, given[1], folder=tmp_path / "given", **SHORT)
    # Where nothing says what was asked for then, the clusters themselves tell.
    (tmp_path / "given" / "clusters.json").unlink()
    with pytest.raises(pl.PruneLabError, match=r"of another run: optimizer was Squeezing\("):
        csgd(network(), *data, given[1], folder=tmp_path / "given", **SHORT)
    csgd(network(), *data, 0.5, folder=tmp_path, **SHORT)
    with pytest.raises(pl.PruneLabError, match="of another run: network was Sequential"):
        csgd(network(2.0), *data, 0.5, folder=tmp_path, **SHORT)
    pl.finetune(network(), *data, folder=tmp_path / "plain", **SHORT)
    with pytest.raises(pl.PruneLabError, match="of another run: "):
        csgd(network(), *data, 0.5, folder=tmp_path / "plain", **SHORT)
    assert not (tmp_path / "plain" / "clusters.json").exists()


@pytest.mark.parametrize("anew", [False, True])
def test_a_squeeze_goes_on_with_its_own_clusters(
    data: tuple[TensorDataset, TensorDataset], tmp_path: Path, anew: bool
) -> None:
    # No pull: the weights go where k-means finds other clusters.
    settings = {**SHORT, "pull": 0.0, "lr": 0.3, "folder": tmp_path}
    whole, model = network(), network()
    expected = csgd(whole, *data, 0.5, **{**settings, "folder": None})
    first = csgd(model, *data, 0.5, **{**settings, "progress": asked_to_stop_after(30)})
    assert first.table.attrs["ended"].startswith("stopped in epoch 2")
    assert clusters(pl.trace(model, data[1].tensors[0][:2]), 0.5) != first.clusters
    found = csgd(network() if anew else model, *data, 0.5, **settings)
    assert found.clusters == expected.clusters == first.clusters
    trained = found.program.model.state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in whole.state_dict().items())
    # Called again when all is done: no step, and the same clusters.
    again = csgd(found.program.model, *data, 0.5, **{**settings, "progress": lambda *_: pytest.fail("a step")})
    assert again.clusters == expected.clusters
    assert again.departure == found.departure


def test_clusters_that_cannot_be_read_or_written_are_said(
    data: tuple[TensorDataset, TensorDataset], tmp_path: Path
) -> None:
    csgd(network(), *data, 0.5, folder=tmp_path, **SHORT)
    held = json.loads((tmp_path / "clusters.json").read_text())
    for damaged in ("{", "[]", json.dumps({**held, "clusters": "no"})):
        (tmp_path / "clusters.json").write_text(damaged)
        with pytest.raises(pl.PruneLabError, match=r"clusters of the squeeze in .* cannot be read from clusters.json"):
            csgd(network(), *data, 0.5, folder=tmp_path, **SHORT)
    (tmp_path / "file").write_text("")
    with pytest.raises(pl.PruneLabError, match="clusters cannot be written to"):
        csgd(network(), *data, 0.5, folder=tmp_path / "file" / "run", **SHORT)


def test_clusters_that_a_killed_process_left_without_a_checkpoint_are_made_anew(
    data: tuple[TensorDataset, TensorDataset], tmp_path: Path
) -> None:
    held = {"asked": {"widths": "0.9"}, "clusters": Clusters({"0": (0, 0, 0, 0, 0, 0, 0, 0)}).to_json()}
    (tmp_path / "clusters.json").write_text(json.dumps(held))
    found = csgd(network(), *data, 0.5, folder=tmp_path, **SHORT)
    assert Clusters.from_json(json.loads((tmp_path / "clusters.json").read_text())["clusters"]) == found.clusters
    assert [len(set(numbers)) for numbers in found.clusters.of.values()] == [4, 3]


def test_an_optimizer_that_was_lent_is_given_back_as_it_was(
    data: tuple[TensorDataset, TensorDataset], tmp_path: Path
) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    settings = {**SHORT, "optimizer": optimizer, "folder": tmp_path}
    csgd(model, *data, 0.5, pull=0.5, **settings)
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert not optimizer._optimizer_step_pre_hooks
    with pytest.raises(pl.PruneLabError, match=r"of another run: optimizer was .*pull=0.5, "):
        csgd(model, *data, 0.5, pull=0.25, **settings)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_recipe_and_settings_together_are_refused(data: tuple[TensorDataset, TensorDataset]) -> None:
    model = network()
    with pytest.raises(pl.PruneLabError, match="not both: epochs belong into the recipe"):
        csgd(model, *data, 0.5, recipe=pl.Recipe(), epochs=2, progress=False)
    # What says how to look on is no setting of the training.
    assert len(csgd(model, *data, 0.5, recipe=pl.Recipe(epochs=1), progress=False).table) == 2


def test_the_pull_is_as_strong_as_the_run_is_short() -> None:
    assert pull_for(10.0, momentum=0.9, decay=5e-4) == pytest.approx(20 * 0.1 / 10 - 5e-4)
    assert pull_for(1e9) == 0.0


def test_members_that_still_differ_are_not_trimmed(data: tuple[TensorDataset, TensorDataset]) -> None:
    squeezed = csgd(network(), *data, 0.5, progress=False, epochs=1, pull=0.0)
    with pytest.raises(pl.PruneLabError, match="Trimming would change outputs"):
        squeezed.trimmed()


def test_wider_then_squeezed_has_the_narrow_networks_shapes(data: tuple[TensorDataset, TensorDataset]) -> None:
    squeezed = squeeze_to(network, *data, wider=1.5, progress=False, epochs=30, lr=0.05, batch_size=16)
    small = squeezed.trimmed()
    assert {n: p.shape for n, p in small.named_parameters()} == {n: p.shape for n, p in network().named_parameters()}


def test_the_plan_of_a_run_is_shown_and_applied_like_any_other(data: tuple[TensorDataset, TensorDataset]) -> None:
    model = network()
    squeezed = csgd(model, *data, 0.5, progress=False, epochs=30, lr=0.05, batch_size=16)
    lab = pl.Lab(model, *data)
    before = lab.measure()
    lab.use(squeezed.clusters.plan())
    assert lab.measure().accuracy == before.accuracy
    small = lab.commit()
    assert {n: p.shape for n, p in small.named_parameters()} == {
        n: p.shape for n, p in squeezed.trimmed().named_parameters()
    }
