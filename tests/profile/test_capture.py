"""The profile: one pass over the data, equal to what hooks on the user's own modules see; kept, found, stopped."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from support import Network
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

import prunelab as pl
from prunelab import zoo
from prunelab.profile import store
from prunelab.profile.capture import Profile
from prunelab.program.run import Bound

NETWORK = Network(zoo.vgg_small, (1, 28, 28))
# Two images run twice before all others: the fast way to run must give the same values.
COMPARED = (2, 2)


@pytest.fixture(scope="module")
def program() -> pl.Program:
    return pl.trace(NETWORK.build(torch.float32), NETWORK.images(dtype=torch.float32))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return NETWORK.images(60, torch.float32)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the batches that run, through the real interpreter."""
    counted: list[int] = []
    run = Bound.run

    def counting(self: Bound, inputs: tuple[Any, ...], *rest: Any) -> tuple[Any, ...]:
        counted.append(len(inputs[0]))
        return run(self, inputs, *rest)

    monkeypatch.setattr(Bound, "run", counting)
    return counted


def quiet(program: pl.Program, data: Any, **settings_: Any) -> Profile:
    return pl.profile(program, data, **{"progress": False, "cache": False, **settings_})


def same(a: Profile, b: Profile) -> bool:
    return (
        a.images == b.images
        and a.statistics.keys() == b.statistics.keys()
        and a.activations.keys() == b.activations.keys()
        and all(
            np.array_equal(x, y)
            for s in a.statistics
            for x, y in zip(a.statistics[s].arrays().values(), b.statistics[s].arrays().values(), strict=True)
        )
        and all(torch.equal(a.activations[s], b.activations[s]) for s in a.activations)
    )


# What it measures ---------------------------------------------


def test_equal_to_hooks_on_the_users_modules() -> None:
    model, data = NETWORK.build(), NETWORK.images(20)
    seen: dict[str, list[np.ndarray]] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _, __, out: seen.setdefault(name, []).append(out.numpy())

    relus = {name: part for name, part in model.named_modules() if isinstance(part, nn.ReLU)}
    hooks = [part.register_forward_hook(hook(name)) for name, part in relus.items()]
    with torch.no_grad():
        for part in data.split(7):
            model(part)
    for handle in hooks:
        handle.remove()
    hooked = {name: np.concatenate(parts) for name, parts in seen.items()}

    program = pl.trace(model, data)
    found = quiet(program, data, batch_size=9)
    for layer in (layer for layer in program.layers if not layer.pinned):
        ((statistics, at),) = found.of(layer)
        x = hooked[layer.name.replace("conv", "relu")]
        assert at.tolist() == [[c] for c in range(layer.channels)]
        assert found.images == statistics.images == 20
        assert np.array_equal(statistics.apoz, (x == 0).mean((0, 2, 3)))
        assert np.allclose(statistics.mean, x.mean((0, 2, 3)), rtol=1e-12, atol=0)
        assert np.allclose(statistics.variance, x.var((0, 2, 3)), rtol=1e-10)
        assert np.allclose(statistics.pooled_variance, x.mean((2, 3)).var(0), rtol=1e-9)
        maps = found.maps(layer, 3)
        assert maps is not None
        assert np.allclose(maps.numpy(), x[:3], rtol=1e-12)


@settings(max_examples=8)
@given(st.integers(1, 61), st.integers(1, 61))
def test_the_batch_size_does_not_matter(a: int, b: int) -> None:
    program = pl.trace(zoo.lenet(), torch.randn(2, 1, 28, 28), prove=False)
    data = Network(zoo.lenet, (1, 28, 28)).images(61, torch.float32)
    first, second = quiet(program, data, batch_size=a), quiet(program, data, batch_size=b)
    for site, ours in first.statistics.items():
        for name, array in ours.arrays().items():
            other = second.statistics[site].arrays()[name]
            # The convolutions themselves round differently for other batch sizes.
            assert np.allclose(array, other, rtol=1e-4, atol=1e-3 * np.abs(array).max()), name


def test_sites_are_measured_per_call_and_a_channel_used_twice_counts_twice() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.conv(x).relu().chunk(2, 1)
            logits: Tensor = self.head((left + right).mean((2, 3)))
            return logits

    torch.manual_seed(0)
    model, data = Halves().double(), torch.randn(5, 1, 6, 6).double()
    program = pl.trace(model, data)
    layer = program.layer("conv")
    ((statistics, at),) = quiet(program, data).of(layer)
    assert at.tolist() == [[c, c + 4] for c in range(4)]
    with torch.no_grad():
        zeros = (model.conv(data).relu() == 0).double().mean((0, 2, 3)).view(2, 4).mean(0)
    scored = pl.Plan("apoz").set("conv", ratio=0.5).resolve(program, quiet(program, data)).kept["conv"]
    assert sorted(zeros.argsort()[:2].tolist()) == list(scored)
    assert statistics.sum.shape == (8,)


# What it takes ---------------------------------------------


class Items(Dataset[Any]):
    """Images one by one, as a user's own class gives them."""

    def __init__(self, images: Tensor, labelled: bool = True) -> None:
        self.images_, self.labelled = images, labelled

    def __len__(self) -> int:
        return len(self.images_)

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError
        return (self.images_[index], index % 10) if self.labelled else self.images_[index]


class Stream(IterableDataset[Any]):
    """Images of which nobody knows how many there are."""

    def __init__(self, images: Tensor) -> None:
        self.images_ = images

    def __iter__(self) -> Iterator[Any]:
        yield from ((image, 0) for image in self.images_)


def test_every_kind_of_data_gives_the_same_profile(program: pl.Program, images: Tensor) -> None:
    labels = torch.arange(60) % 10
    kinds: list[Any] = [
        images,
        Items(images),
        Items(images, labelled=False),
        TensorDataset(images, labels),
        TensorDataset(images),
        pl.datasets.ImageSet(images, labels, tuple("0123456789"), (0.0,), (1.0,), "made"),
        DataLoader(Items(images), batch_size=16),
        DataLoader(Items(images, labelled=False), batch_size=16),
        DataLoader(Stream(images), batch_size=16),
        list(Items(images)),
    ]
    first = quiet(program, kinds[0], batch_size=16)
    assert first.images == 60
    assert all(same(first, quiet(program, kind, batch_size=16)) for kind in kinds[1:])
    assert same(first, quiet(program, iter([images[k : k + 16] for k in range(0, 60, 16)])))


BAD: dict[str, tuple[Any, str]] = {
    "no images": (torch.zeros(0, 1, 28, 28), "no images to profile"),
    "an empty data set": (Items(torch.zeros(0, 1, 28, 28)), "no images to profile"),
    "an empty loader": (DataLoader(Items(torch.zeros(0, 1, 28, 28))), "no images to profile"),
    "an empty list": ([], "no images to profile"),
    "another shape": (
        torch.zeros(4, 3, 28, 28),
        r"shape \(3, 28, 28\), but the network was traced with \(1, 28, 28\)",
    ),
    "another type": (torch.zeros(4, 1, 28, 28, dtype=torch.uint8), "images are torch.uint8"),
    "dictionaries": ([{"image": torch.zeros(1, 28, 28)}], "must hold the network's 1 input tensor"),
    "too many parts": (TensorDataset(*[torch.zeros(4, 1, 28, 28)] * 3), "input tensor, and labels"),
    "nothing of the kind": (3, "must be a Dataset, a DataLoader or batches, not a int"),
    "not a number": (
        torch.full((4, 1, 28, 28), torch.nan),
        r"stage1\S* are not finite .* batch from image 0",
    ),
    "infinite": (torch.full((4, 1, 28, 28), 1e38), r"are not finite .* batch from image 0: check"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_bad_data_is_refused_in_a_sentence(program: pl.Program, data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(pl.PruneLabError, match=message):
        pl.profile(program, data, cache=tmp_path, progress=False)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_batch_that_is_not_finite_is_named(program: pl.Program, images: Tensor) -> None:
    broken = images.clone()
    broken[37] = torch.nan
    with pytest.raises(pl.PruneLabError, match="in the batch from image 32"):
        quiet(program, broken, batch_size=16)


# The sample and its budget ---------------------------------------------


@pytest.mark.parametrize(("sample", "batch_size", "expected"), [(0, 16, 0), (7, 16, 7), (40, 16, 40), (500, 16, 60)])
def test_so_many_images_are_kept(
    program: pl.Program, images: Tensor, sample: int, batch_size: int, expected: int
) -> None:
    found = quiet(program, images, sample=sample, batch_size=batch_size)
    assert {len(v) for v in found.activations.values()} == ({expected} if expected else set())
    assert found.images == 60
    layer = program.layers[0]
    maps = found.maps(layer, 5)
    assert (maps is None) == (expected == 0)


@pytest.mark.parametrize("budget", [0, 1_000, 500_000, 2_000_000])
def test_the_byte_budget_holds(program: pl.Program, images: Tensor, budget: int) -> None:
    found = quiet(program, images, budget=budget)
    used = sum(v.numel() * v.element_size() for v in found.activations.values())
    per_image = sum(v[0].numel() * v.element_size() for v in quiet(program, images).activations.values())
    assert used <= budget
    assert used == min(60, budget // per_image) * per_image


# The cache ---------------------------------------------


def test_the_second_time_nothing_runs(program: pl.Program, images: Tensor, tmp_path: Path, forwards: list[int]) -> None:
    first = quiet(program, images, cache=tmp_path, batch_size=25)
    assert forwards == [*COMPARED, 25, 25, 10]
    second = quiet(program, images, cache=tmp_path, batch_size=25)
    assert forwards == [*COMPARED, 25, 25, 10]
    assert same(first, second)
    assert first.folder == second.folder
    assert first.folder is not None
    assert first.folder.is_relative_to(tmp_path)
    assert same(first, quiet(program, images, batch_size=25))


def test_the_cache_is_in_the_users_folder_unless_told(
    program: pl.Program, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNELAB_CACHE", str(tmp_path / "named"))
    assert store.cache_folder() == tmp_path / "named"
    found = pl.profile(program, images, progress=False)
    assert found.folder is not None
    assert found.folder.parent == tmp_path / "named" / "profiles"
    monkeypatch.delenv("PRUNELAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.cache_folder() == tmp_path / "xdg" / "prunelab"


def test_other_weights_data_or_settings_are_measured_again(images: Tensor, tmp_path: Path, forwards: list[int]) -> None:
    model = NETWORK.build(torch.float32)

    def runs(data: Any, **settings_: Any) -> bool:
        program = pl.trace(model, images[:2])
        forwards.clear()
        quiet(program, data, cache=tmp_path, **settings_)
        return bool(forwards)

    assert runs(images)
    assert not runs(images)
    changed = images.clone()
    changed[59, 0, 27, 27] += 0.01
    assert runs(TensorDataset(changed))
    assert runs(images[:59])
    assert runs(images, sample=3)
    assert runs(images, budget=1_000_000)
    with torch.no_grad():
        model.get_parameter("classifier.bias")[3] += 0.01
    assert runs(images)
    model.get_buffer("stage1.norm1.running_mean")[0] += 0.01
    assert runs(images)
    assert not runs(images)


def test_networks_that_differ_in_an_activation_alone_do_not_share_a_profile(images: Tensor, tmp_path: Path) -> None:
    class Small(nn.Module):
        def __init__(self, activation: Any) -> None:
            super().__init__()
            self.conv, self.head, self.activation = nn.Conv2d(1, 4, 3), nn.Linear(4, 3), activation

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.activation(self.conv(x)).mean((2, 3)))
            return logits

    means = []
    for activation in (torch.relu, torch.tanh):
        torch.manual_seed(0)
        program = pl.trace(Small(activation), images[:2])
        ((statistics, _),) = quiet(program, images, cache=tmp_path).of(program.layer("conv"))
        means.append(statistics.mean)
    assert not np.allclose(*means)


def test_a_loader_is_known_by_what_it_reads(
    program: pl.Program, images: Tensor, tmp_path: Path, forwards: list[int]
) -> None:
    def runs(**loading: Any) -> bool:
        forwards.clear()
        quiet(program, DataLoader(Items(images), **loading), cache=tmp_path)
        return bool(forwards)

    assert runs(batch_size=16)
    assert not runs(batch_size=16)
    # In another order: the same profile.
    assert not runs(batch_size=10, shuffle=True)
    assert runs(batch_size=16, drop_last=True)
    assert runs(batch_size=16, sampler=SubsetRandomSampler(range(30)))
    assert not runs(batch_size=16, sampler=SubsetRandomSampler(range(30)))
    assert runs(batch_size=16, sampler=SubsetRandomSampler(range(30, 60)))


def test_a_stream_is_never_taken_from_the_cache(
    program: pl.Program, images: Tensor, tmp_path: Path, forwards: list[int]
) -> None:
    for _ in range(2):
        forwards.clear()
        quiet(program, DataLoader(Stream(images), batch_size=30), cache=tmp_path)
        assert forwards == [*COMPARED, 30, 30]


def test_stopped_half_way_leaves_nothing(program: pl.Program, images: Tensor, tmp_path: Path) -> None:
    calls: list[tuple[int, int | None, str]] = []

    def stop_at_two(done: int, total: int | None, what: str) -> bool:
        calls.append((done, total, what))
        return done < 2

    with pytest.raises(pl.Stopped):
        quiet(program, images, cache=tmp_path, batch_size=10, progress=stop_at_two)
    assert calls == [(1, 6, "profile"), (2, 6, "profile")]
    assert not list(tmp_path.rglob("*"))


def test_a_write_that_is_interrupted_leaves_nothing(
    program: pl.Program, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quiet(program, images, cache=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def damage(folder: Path, how: str) -> None:
    statistics, activations = folder / "statistics.safetensors", folder / "activations.safetensors"
    if how == "cut off":
        activations.write_bytes(activations.read_bytes()[:-100])
    elif how == "garbage":
        statistics.write_bytes(random.Random(0).randbytes(5_000))
    elif how == "missing":
        activations.unlink()
    elif how == "not json":
        (folder / "profile.json").write_text("{")
    elif how == "older":
        (folder / "profile.json").write_text('{"format": 0, "images": 60}')
    elif how == "without images":
        (folder / "profile.json").write_text(f'{{"format": {store.FORMAT}}}')
    elif how == "a site less":
        tensors = load_file(statistics)
        site = next(iter(tensors)).partition("/")[0]
        save_file({k: v for k, v in tensors.items() if not k.startswith(f"{site}/")}, statistics)
    elif how == "other channels":
        save_file({k: v[:3] if v.dim() else v for k, v in load_file(statistics).items()}, statistics)
    elif how == "foreign":
        save_file({"weight": torch.ones(3)}, statistics)
        save_file({"weight": torch.ones(3)}, activations)


HOWS = (
    "cut off",
    "garbage",
    "missing",
    "not json",
    "older",
    "without images",
    "a site less",
    "other channels",
    "foreign",
)


@pytest.mark.parametrize("how", HOWS)
def test_damaged_and_foreign_files_are_measured_again_with_a_warning(
    program: pl.Program, images: Tensor, tmp_path: Path, forwards: list[int], how: str
) -> None:
    first = quiet(program, images, cache=tmp_path)
    assert first.folder is not None
    kept = {site: v.clone() for site, v in first.activations.items()}
    expected = Profile(program, first.images, first.statistics, kept, None)
    damage(first.folder, how)
    forwards.clear()
    with pytest.warns(UserWarning, match="It is measured again"):
        again = quiet(program, images, cache=tmp_path)
    assert forwards
    assert same(again, expected)
    # And the file is whole again.
    forwards.clear()
    assert same(quiet(program, images, cache=tmp_path), expected)
    assert not forwards


def test_a_full_disk_is_said_and_the_work_goes_on(
    program: pl.Program, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000))
    with pytest.warns(UserWarning, match="disk is full.*goes on without a cache"):
        found = quiet(program, images, cache=tmp_path)
    assert found.folder is None
    assert same(found, quiet(program, images))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_disk_that_fills_up_while_writing_is_said_too(
    program: pl.Program, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.warns(UserWarning, match="No space left on device.*goes on without a cache"):
        found = quiet(program, images, cache=tmp_path)
    assert found.images == 60
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_written_is_said(program: pl.Program, images: Tensor, tmp_path: Path) -> None:
    (tmp_path / "profiles").write_text("a file in the way")
    with pytest.warns(UserWarning, match="goes on without a cache"):
        assert quiet(program, images, cache=tmp_path).images == 60


def test_data_of_all_sorts_have_a_name() -> None:
    class Odd(Dataset[Any]):
        def __init__(self, what: Any) -> None:
            self.what = what

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            return {"image": torch.ones(2, 2), "name": self.what, "box": np.arange(4), "label": index}

    names = [store.digest_data(Odd(what)) for what in ("a", "b", "a")]
    assert names[0] == names[2] != names[1]
    ones, zeros = torch.ones(5, 3), torch.zeros(5, 3)
    assert store.digest_data(TensorDataset(ones)) == store.digest_data(TensorDataset(ones.clone()))
    assert store.digest_data(TensorDataset(ones)) != store.digest_data(TensorDataset(zeros))
    assert store.digest_data(TensorDataset(ones)) != store.digest_data(TensorDataset(ones.to(torch.bfloat16)))


def test_these_networks_have_channels_that_differ(program: pl.Program, images: Tensor) -> None:
    """A check on the tests above: a profile of nothing but zeros would let many of them pass."""
    found = quiet(program, images)
    for layer in (layer for layer in program.layers if not layer.pinned):
        ((statistics, _),) = found.of(layer)
        assert np.ptp(statistics.mean) > 0
        assert 0 < statistics.apoz.mean() < 1


class SequenceFirst(nn.Module):
    """Positions before images inside, images before positions outside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.first(x)).transpose(0, 1)
        inner = torch.relu(self.second(inner)).transpose(0, 1)
        out: Tensor = self.out(inner.mean(1))
        return out


def test_only_values_that_lie_image_by_image_are_kept() -> None:
    torch.manual_seed(0)
    program = pl.trace(SequenceFirst().eval(), torch.randn(2, 5, 6))
    images = torch.randn(9, 5, 6)
    found = pl.profile(program, images, batch_size=4, cache=False, progress=False)
    first, second = (program.layer(name).sites[0] for name in ("first", "second"))
    assert set(found.activations) & {first, second} == {first}
    assert set(found.pooled) & {first, second} == {first}
    with torch.no_grad():
        wanted = torch.relu(program.model.first(images))
    torch.testing.assert_close(found.activations[first], wanted)
    assert found.maps(program.layer("second")) is None
    assert np.isfinite(found.statistics[second].sum).all()
