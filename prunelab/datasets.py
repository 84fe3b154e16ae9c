"""Images held in memory: the embedded Fashion-MNIST, torchvision's sets and any ``.npz`` file.

Every reader returns ``(train, test)``, two :class:`ImageSet` of float32 images normalised with the same mean
and standard deviation. Only the readers of full sets need torchvision, and they import it when called.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from prunelab.errors import PruneLabError
from prunelab.resources import folder

Statistics = tuple[float, ...]
Arrays = tuple[NDArray[Any], NDArray[Any]]

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_MEAN, FASHION_STD = (0.2860,), (0.3530,)
MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_MOST_CLASSES = 100_000
_KEYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset[tuple[Tensor, int]]):
    """Normalised images and their labels.

    The constructor raises :class:`PruneLabError` where shapes, types or labels do not fit together.

    Attributes:
        images: float32 ``(images, channels, height, width)``, ``(raw - mean) / std`` with raw in 0..1.
        labels: int64 ``(images,)``, each in ``0..len(classes) - 1``.
        classes: the names of the classes.
        mean, std: one number per channel, on the scale 0..1.
        name: what the set is, for display.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: Statistics
    std: Statistics
    name: str

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or not self.images.is_floating_point() or not len(self.images):
            raise PruneLabError(
                f"The images of {self.name!r} must be a float tensor (images, channels, height, width) "
                f"with at least one image, not {self.images.dtype} of shape {tuple(self.images.shape)}."
            )
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise PruneLabError(
                f"The labels of {self.name!r} must be an int64 tensor of {len(self.images)} numbers, one "
                f"per image, not {self.labels.dtype} of shape {tuple(self.labels.shape)}."
            )
        low, high = (int(each) for each in self.labels.aminmax())
        if low < 0 or high >= len(self.classes):
            raise PruneLabError(
                f"The labels of {self.name!r} run from {low} to {high}, but it has {len(self.classes)} "
                "classes; labels must count from 0 and every class needs a name."
            )
        _check_statistics(self.mean, self.std, self.images.shape[1])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.images.shape[1:]))
        return f"ImageSet({self.name!r}: {len(self):,} images of {shape}, {len(self.classes)} classes)"

    def pixels(self, index: int) -> Tensor:
        """The raw image ``index``, for display: float32 ``(height, width, channels)`` in 0..1."""
        return displayed(self.images[index], self)

    def subset(self, n: int, seed: int = 0, stratified: bool = True) -> ImageSet:
        """Choose ``n`` images by ``seed``; if ``stratified``, classes keep their shares to within one image.

        Raises:
            PruneLabError: if ``n`` is not between 1 and the number of images.
        """
        if not isinstance(n, int) or not 1 <= n <= len(self):
            raise PruneLabError(f"A subset of {self.name!r} must have between 1 and {len(self):,} images, not {n!r}.")
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        if stratified:
            chosen = _spread(chosen, self.labels[chosen])
        chosen = chosen[:n].sort().values
        return ImageSet(self.images[chosen], self.labels[chosen], self.classes, self.mean, self.std, self.name)

    def fingerprint(self) -> str:
        """64 hexadecimal digits (blake2b) that change with any pixel, label, shape or the images' order."""
        digest = blake2b(digest_size=32)
        for tensor in (self.images, self.labels):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()


def class_names(data: Any) -> tuple[str, ...]:
    """The names of a set's classes, also of one under a loader or subset; none where it has no names."""
    under = data
    while not hasattr(under, "classes") and hasattr(under, "dataset"):
        under = under.dataset
    return tuple(str(name) for name in getattr(under, "classes", ()))


def displayed(image: Tensor, data: Any = None) -> Tensor:
    """An image for display, float32 ``(height, width, channels)`` in 0..1.

    Args:
        image: shape ``(channels, height, width)``.
        data: the set that it comes from, which may say how it was normalised; else its least and largest value become
            0 and 1.

    Raises:
        PruneLabError: it has another shape, or neither 1 nor 3 channels.
    """
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise PruneLabError(f"Inputs of shape {tuple(image.shape)} cannot be shown as images.")
    under = data
    while under is not None and not isinstance(under, ImageSet):
        under = getattr(under, "dataset", None)
    if under is not None:
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (under.mean, under.std))
        raw = image * std + mean
    else:
        low, high = image.aminmax()
        raw = (image - low) / (high - low).clamp_min(1e-12)
    return raw.float().clamp(0, 1).permute(1, 2, 0)


def _spread(order: Tensor, labels: Tensor) -> Tensor:
    """Reorder so that any beginning holds each class in proportion: by (rank in class + ½) / class size."""
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().flatten()
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / max(len(members), 1)
    return order[place.argsort(stable=True)]


def _image_set(
    raw: NDArray[Any],
    labels: NDArray[Any],
    classes: Sequence[str],
    mean: Statistics,
    std: Statistics,
    name: str,
) -> ImageSet:
    """Normalise ``raw``, float32 ``(images, channels, height, width)`` in 0..1."""
    scale, shift = (torch.tensor(each).view(1, -1, 1, 1) for each in (std, mean))
    images = torch.from_numpy(raw).sub(shift).div_(scale)
    return ImageSet(images, torch.from_numpy(labels.astype(np.int64)), tuple(classes), mean, std, name)


def _to_nchw(raw: NDArray[Any]) -> NDArray[Any]:
    """uint8 ``(N, H, W)`` or ``(N, H, W, C)`` to float32 ``(N, C, H, W)`` in 0..1."""
    raw = raw[:, None] if raw.ndim == 3 else raw.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(raw).astype(np.float32) / np.float32(255)


@lru_cache(maxsize=1)
def fashion_mnist() -> tuple[ImageSet, ImageSet]:
    """The embedded Fashion-MNIST: 10,000 training images (1,000 of each class) and all 10,000 test images.

    Images ``(N, 1, 28, 28)``. Read once and kept. Xiao, Rasul & Vollgraf 2017, arXiv 1708.07747.

    Raises:
        PruneLabError: if the file is missing from this installation.
    """
    path = folder("data") / "fashion_mnist" / "fashion_mnist.npz"
    return npz(path, FASHION_CLASSES, FASHION_MEAN, FASHION_STD, name="Fashion-MNIST")


def fashion_mnist_full(root: str | Path, download: bool = False) -> tuple[ImageSet, ImageSet]:
    """Fashion-MNIST, 60,000 and 10,000 images ``(N, 1, 28, 28)``, from torchvision's folder ``root``.

    Raises:
        PruneLabError: if the files are not under ``root`` and ``download`` is false.
    """
    return _torchvision("FashionMNIST", "Fashion-MNIST", root, download, FASHION_MEAN, FASHION_STD, FASHION_CLASSES)


def mnist(root: str | Path, download: bool = False) -> tuple[ImageSet, ImageSet]:
    """MNIST, 60,000 and 10,000 images ``(N, 1, 28, 28)``, from torchvision's folder ``root``.

    LeCun, Bottou, Bengio & Haffner 1998, Gradient-based learning applied to document recognition.

    Raises:
        PruneLabError: if the files are not under ``root`` and ``download`` is false.
    """
    return _torchvision("MNIST", "MNIST", root, download, MNIST_MEAN, MNIST_STD, tuple("0123456789"))


def cifar10(
    root: str | Path, download: bool = False, mean: Statistics = CIFAR10_MEAN, std: Statistics = CIFAR10_STD
) -> tuple[ImageSet, ImageSet]:
    """CIFAR-10, 50,000 and 10,000 images ``(N, 3, 32, 32)``, from torchvision's folder ``root``.

    ``mean`` and ``std`` are those of CIFAR-10; give those of ImageNet for checkpoints trained with them.
    Krizhevsky 2009, Learning multiple layers of features from tiny images.

    Raises:
        PruneLabError: if the files are not under ``root`` and ``download`` is false.
    """
    _check_statistics(mean, std, 3)
    return _torchvision("CIFAR10", "CIFAR-10", root, download, mean, std)


def _torchvision(
    kind: str,
    name: str,
    root: str | Path,
    download: bool,
    mean: Statistics,
    std: Statistics,
    classes: Sequence[str] | None = None,
) -> tuple[ImageSet, ImageSet]:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise PruneLabError(f"Reading {name} needs torchvision; install it with pip install torchvision.") from error
    try:
        halves = [getattr(datasets, kind)(str(root), train=train, download=download) for train in (True, False)]
    # What a missing, truncated or foreign file raises inside torchvision.
    except (RuntimeError, OSError, ValueError, AssertionError, EOFError) as error:
        advice = (
            "check the network and that the folder can be written"
            if download
            else "give the folder that holds it or pass download=True"
        )
        raise PruneLabError(f"{name} could not be read from {str(root)!r}; {advice}.") from error
    train, test = (
        _image_set(
            _to_nchw(np.asarray(half.data)),
            np.asarray(half.targets),
            classes or half.classes,
            mean,
            std,
            name,
        )
        for half in halves
    )
    return train, test


def npz(
    path: str | Path,
    classes: Sequence[str] | None = None,
    mean: Statistics | None = None,
    std: Statistics | None = None,
    name: str | None = None,
) -> tuple[ImageSet, ImageSet]:
    """Read ``x_train``, ``y_train``, ``x_test`` and ``y_test`` from a ``.npz`` file.

    Images are uint8 ``(N, H, W)`` or ``(N, H, W, C)``, scaled by 1/255, or float ``(N, C, H, W)``, taken as
    they are; labels are integers ``(N,)`` from 0. Without ``mean`` and ``std`` those of the training images
    are used, per channel; without ``classes`` the labels' numbers; without ``name`` the file's. Pickled
    arrays are refused.

    Raises:
        PruneLabError: if the file cannot be read, or arrays are missing or do not fit together.
    """
    path = Path(path)
    arrays = _read_npz(path)
    halves: list[Arrays] = [_half(arrays, half, path) for half in ("train", "test")]
    (x_train, y_train), (x_test, y_test) = halves
    if x_train.shape[1:] != x_test.shape[1:]:
        raise PruneLabError(
            f"x_train and x_test in {path.name!r} hold images of different shapes, (channels, height, "
            f"width) = {x_train.shape[1:]} and {x_test.shape[1:]}; make them the same."
        )
    count = int(max(y_train.max(), y_test.max())) + 1
    names = tuple(classes) if classes is not None else tuple(map(str, range(count)))
    if len(names) < count:
        raise PruneLabError(
            f"The labels in {path.name!r} reach {count - 1}, but {len(names)} class names were given; name all of them."
        )
    mean, std = _statistics(x_train, mean, std)
    title = path.stem if name is None else name
    train, test = (_image_set(x, y, names, mean, std, title) for x, y in halves)
    return train, test


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise PruneLabError(f"{path.name!r} holds a single array; save the four arrays with np.savez.")
        with file:
            missing = [key for key in _KEYS if key not in file]
            if missing:
                raise PruneLabError(
                    f"{path.name!r} has no {' and no '.join(missing)} among its arrays "
                    f"({', '.join(file.files)}); it needs {', '.join(_KEYS)}."
                )
            return {key: file[key] for key in _KEYS}
    except PruneLabError:
        raise
    except FileNotFoundError as error:
        raise PruneLabError(f"There is no file {str(path)!r}; give the path of a .npz file.") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise PruneLabError(
            f"{str(path)!r} cannot be read as a .npz file of plain arrays; save it with np.savez and numeric arrays."
        ) from error


def _half(arrays: dict[str, NDArray[Any]], half: str, path: Path) -> Arrays:
    """Check one half of a ``.npz`` and return its images, float32 ``(N, C, H, W)``, and labels ``(N,)``."""
    images, labels = arrays[f"x_{half}"], arrays[f"y_{half}"]
    where = f"in {path.name!r}"
    if images.dtype == np.uint8:
        if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] > 4):
            raise PruneLabError(
                f"x_{half} {where} has shape {images.shape}; uint8 images must be (N, H, W) or (N, H, W, C), C up to 4."
            )
    elif not np.issubdtype(images.dtype, np.floating) or images.ndim != 4:
        raise PruneLabError(
            f"x_{half} {where} is {images.dtype} of shape {images.shape}; "
            "it must be uint8 (N, H, W) or (N, H, W, C), or float (N, C, H, W)."
        )
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise PruneLabError(
            f"y_{half} {where} is {labels.dtype} of shape {labels.shape}; labels must be integers of shape (N,)."
        )
    if len(images) != len(labels) or images.size == 0:
        raise PruneLabError(
            f"x_{half} and y_{half} {where} hold {len(images)} images and {len(labels)} labels; "
            "give as many of one as of the other, and at least one."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= _MOST_CLASSES:
        raise PruneLabError(
            f"The labels of y_{half} {where} run from {low} to {high}; they must count from 0 and stay below "
            f"{_MOST_CLASSES:,}."
        )
    prepared = _to_nchw(images) if images.dtype == np.uint8 else images.astype(np.float32)
    if not np.isfinite(prepared).all():
        raise PruneLabError(f"x_{half} {where} holds values that are not finite; remove or replace them.")
    return prepared, labels


def _statistics(images: NDArray[Any], mean: Statistics | None, std: Statistics | None) -> tuple[Statistics, Statistics]:
    if (mean is None) != (std is None):
        raise PruneLabError("Give both mean and std of the images, or neither to have them computed.")
    if mean is not None and std is not None:
        _check_statistics(mean, std, images.shape[1])
        return tuple(mean), tuple(std)
    axes = (0, 2, 3)
    # A channel that never varies has no scale of its own; 1 leaves it at 0 instead of dividing by 0.
    spread = [float(each) or 1.0 for each in images.std(axes, dtype=np.float64)]
    return tuple(float(each) for each in images.mean(axes, dtype=np.float64)), tuple(spread)


def _check_statistics(mean: Statistics, std: Statistics, channels: int) -> None:
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise PruneLabError(
            f"The mean and std of images with {channels} channels need {channels} numbers each, std above 0; "
            f"got {tuple(mean)} and {tuple(std)}."
        )
