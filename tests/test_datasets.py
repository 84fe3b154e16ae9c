"""Readers of image sets: what they return, and one clear sentence for each thing that can be wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from prunelab import resources
from prunelab.datasets import ImageSet, cifar10, fashion_mnist, fashion_mnist_full, mnist, npz
from prunelab.errors import PruneLabError


@pytest.fixture
def arrays() -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "x_train": random.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": random.integers(0, 256, (4, 6, 5, 3), dtype=np.uint8),
        "y_test": np.arange(4) % 3,
    }


def write(folder: Path, arrays: dict[str, Any]) -> Path:
    path = folder / "images.npz"
    np.savez(path, **arrays)
    return path


def some_images(count: int = 30) -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 1, 4, 4, generator=generator)
    labels = torch.cat([torch.zeros(count - 10), torch.ones(10)]).long()
    return ImageSet(images, labels, ("a", "b"), (0.5,), (0.25,), "some")


def test_embedded_fashion_mnist_is_balanced_and_normalised() -> None:
    train, test = fashion_mnist()
    for half in (train, test):
        assert half.images.shape == (10_000, 1, 28, 28)
        assert half.images.dtype == torch.float32
        assert half.labels.bincount().tolist() == [1_000] * 10
        assert half.labels.dtype == torch.int64
        assert abs(half.images.mean().item()) < 0.02
        assert abs(half.images.std().item() - 1) < 0.02
    assert train.classes[9] == "Ankle boot"
    assert train.name == "Fashion-MNIST"
    # The first training image of the original is an ankle boot.
    assert train.labels[0] == 9
    assert train.pixels(0).shape == (28, 28, 1)


def test_embedded_folder_carries_licence_and_citation() -> None:
    folder = resources.folder("data") / "fashion_mnist"
    assert "Zalando SE" in (folder / "LICENSE").read_text()
    assert "1708.07747" in (folder / "README.md").read_text()


def test_unknown_resource_folder() -> None:
    with pytest.raises(PruneLabError, match="'data' or 'notebooks'"):
        resources.folder("..")


def test_missing_resource_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()  # a stranger's folder: nothing beside it says that this is a checkout
    monkeypatch.setattr(resources, "__file__", str(tmp_path / "prunelab" / "resources.py"))
    with pytest.raises(PruneLabError, match="missing from this installation"):
        resources.folder("data")


def test_installed_resource_folder_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = tmp_path / "prunelab" / "_share" / "data"
    installed.mkdir(parents=True)
    monkeypatch.setattr(resources, "__file__", str(tmp_path / "prunelab" / "resources.py"))
    assert resources.folder("data") == installed.resolve()


def test_image_set_works_in_a_data_loader() -> None:
    images, labels = next(iter(DataLoader(some_images(), batch_size=8)))
    assert images.shape == (8, 1, 4, 4)
    assert labels.dtype == torch.int64
    assert sum(len(batch) for _, batch in DataLoader(some_images(), batch_size=7)) == 30


def test_pixels_undo_the_normalisation(tmp_path: Path, arrays: dict[str, Any]) -> None:
    train, _ = npz(write(tmp_path, arrays))
    np.testing.assert_allclose(train.pixels(3), arrays["x_train"][3] / 255, atol=1e-6)


def test_subset_keeps_the_shares_of_the_classes() -> None:
    subset = some_images().subset(9, seed=3)
    assert subset.labels.bincount().tolist() == [6, 3]
    assert torch.equal(subset.images, some_images().subset(9, seed=3).images)
    assert not torch.equal(subset.images, some_images().subset(9, seed=4).images)


def test_subset_of_everything_is_everything() -> None:
    whole = some_images()
    for stratified in (True, False):
        assert whole.subset(30, seed=5, stratified=stratified).fingerprint() == whole.fingerprint()


@pytest.mark.parametrize("n", [0, 31, 2.5])
def test_impossible_subset(n: Any) -> None:
    with pytest.raises(PruneLabError, match="between 1 and 30"):
        some_images().subset(n)


def test_fingerprint_follows_the_content() -> None:
    one, other = some_images(), some_images()
    assert one.fingerprint() == other.fingerprint()
    assert len(one.fingerprint()) == 64
    other.images[7, 0, 2, 2] += 1e-3
    assert one.fingerprint() != other.fingerprint()
    other = some_images()
    other.labels[0] = 1
    assert one.fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(30, 4, 4)}, "must be a float tensor"),
        ({"images": torch.zeros(30, 1, 4, 4, dtype=torch.uint8)}, "must be a float tensor"),
        ({"labels": torch.zeros(29).long()}, "30 numbers, one per image"),
        ({"labels": torch.zeros(30)}, "must be an int64 tensor"),
        ({"classes": ("a",)}, "every class needs a name"),
        ({"std": (0.0,)}, "std above 0"),
        ({"mean": (0.5, 0.5)}, "1 numbers each"),
    ],
)
def test_image_set_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    good = some_images()
    with pytest.raises(PruneLabError, match=message):
        ImageSet(**{**vars(good), **changes})


def test_npz_of_colour_images(tmp_path: Path, arrays: dict[str, Any]) -> None:
    train, test = npz(write(tmp_path, arrays))
    assert train.images.shape == (12, 3, 6, 5)
    assert test.images.shape == (4, 3, 6, 5)
    assert train.classes == ("0", "1", "2")
    assert train.name == "images"
    mean, std = train.images.mean((0, 2, 3)), train.images.std((0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(std, torch.ones(3))


def test_npz_of_grey_images(tmp_path: Path, arrays: dict[str, Any]) -> None:
    grey = {key: value[..., 0] if key[0] == "x" else value for key, value in arrays.items()}
    train, _ = npz(write(tmp_path, grey), classes=("cat", "dog", "bird"), mean=(0.5,), std=(0.5,), name="pets")
    expected = torch.from_numpy(grey["x_train"][:, None]).float() / 255 * 2 - 1
    torch.testing.assert_close(train.images, expected, atol=1e-6, rtol=0)
    assert train.classes[1] == "dog"
    assert train.name == "pets"


def test_npz_of_float_images_is_not_scaled(tmp_path: Path, arrays: dict[str, Any]) -> None:
    floats = {key: value.transpose(0, 3, 1, 2) / 7.0 if key[0] == "x" else value for key, value in arrays.items()}
    train, _ = npz(write(tmp_path, floats), mean=(0.0,) * 3, std=(1.0,) * 3)
    np.testing.assert_allclose(train.images, floats["x_train"], rtol=1e-6)


def test_npz_with_a_constant_channel(tmp_path: Path, arrays: dict[str, Any]) -> None:
    arrays["x_train"][..., 1] = 9
    train, _ = npz(write(tmp_path, arrays))
    assert train.std[1] == 1.0
    assert train.images[:, 1].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "has no y_test .*it needs x_train, y_train, x_test, y_test"),
        ({"y_train": np.arange(11)}, "12 images and 11 labels"),
        ({"x_test": np.zeros((4, 5, 5, 3), np.uint8)}, "different shapes"),
        ({"x_train": np.zeros((12, 3), np.uint8)}, r"must be \(N, H, W\)"),
        ({"x_train": np.zeros((12, 3, 32, 32), np.uint8)}, "C up to 4"),
        ({"x_train": np.zeros((12, 6, 5, 3), np.int64)}, r"or float \(N, C, H, W\)"),
        ({"x_train": np.zeros((12, 6, 5))}, r"or float \(N, C, H, W\)"),
        ({"x_train": np.full((12, 3, 6, 5), np.nan)}, "not finite"),
        ({"x_train": np.zeros((0, 6, 5, 3), np.uint8), "y_train": np.arange(0)}, "at least one"),
        ({"y_train": np.arange(12) / 2}, "labels must be integers"),
        ({"y_train": np.arange(12) - 1}, "count from 0"),
        ({"y_test": np.full(4, 2**40)}, "stay below 100,000"),
        ({"y_train": np.array([None] * 12, dtype=object)}, "plain arrays"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path: Path, arrays: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    changed = {key: value for key, value in {**arrays, **changes}.items() if value is not None}
    with pytest.raises(PruneLabError, match=message):
        npz(write(tmp_path, changed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ("a", "b")}, "reach 2, but 2 class names"),
        ({"mean": (0.5,) * 3}, "both mean and std"),
        ({"mean": (0.5,), "std": (0.5,)}, "need 3 numbers each"),
    ],
)
def test_npz_with_options_that_do_not_fit(
    tmp_path: Path, arrays: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PruneLabError, match=message):
        npz(write(tmp_path, arrays), **options)


def test_npz_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PruneLabError, match="There is no file"):
        npz(tmp_path / "absent.npz")


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut short"])
def test_npz_that_is_something_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.npz"
    path.write_bytes(content)
    with pytest.raises(PruneLabError, match=r"cannot be read as a \.npz file"):
        npz(path)


def test_single_array_is_not_an_npz(tmp_path: Path) -> None:
    path = tmp_path / "one.npy"
    np.save(path, np.zeros(3))
    with pytest.raises(PruneLabError, match="a single array"):
        npz(path)


@pytest.mark.parametrize("read", [mnist, fashion_mnist_full, cifar10])
def test_absent_full_set_says_how_to_get_it(read: Any, tmp_path: Path) -> None:
    with pytest.raises(PruneLabError, match="pass download=True"):
        read(tmp_path)


def test_cifar10_takes_other_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    raw = np.arange(2 * 32 * 32 * 3, dtype=np.uint32).reshape(2, 32, 32, 3).astype(np.uint8)

    def stand_in(root: str, train: bool, download: bool) -> SimpleNamespace:
        return SimpleNamespace(data=raw, targets=[3, 8], classes=list("abcdefghij"))

    monkeypatch.setattr(datasets, "CIFAR10", stand_in)
    train, _ = cifar10("anywhere", mean=(0.0,) * 3, std=(1.0,) * 3)
    np.testing.assert_allclose(train.images, raw.transpose(0, 3, 1, 2) / 255, atol=1e-6)
    assert train.labels.tolist() == [3, 8]
    assert train.classes == tuple("abcdefghij")
    with pytest.raises(PruneLabError, match="need 3 numbers each"):
        cifar10("anywhere", mean=(0.5,), std=(0.5,))
