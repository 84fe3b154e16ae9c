"""Images per second of fine-tuning: against a loop written by hand, and against a DataLoader with transforms.

``python tests/bench/train.py CIFAR10`` prints one table, CIFAR10 a ``.npz`` of the set. Both sides of a row work on the
same images, in turn in one run, so that their ratio holds on a busy machine too; the ratio is the median over the
turns. A rate is that of the steps, from the end of one to the end of another; what a call takes besides (setting up,
the accuracy before and after, the first steps as far as they are slower) is in a column of its own. On a CPU without
workers processor seconds are counted, otherwise seconds. Memory that ``finetune`` has told the process to keep is kept
for the loop by hand as well: in a process of its own it may be slower.

1. The same tensors at the same precision: ``finetune`` against index, forward, backward, step, as one would write it.
2. With flips and padded crops: tensors augmented on the device against torchvision's transforms of one uint8 image
   after another in a DataLoader, both trained on by ``finetune``; and the batches alone, without a network. Were
   augmentation on the device free and neither slowed the other down, the ratio would be (network + loader) / network,
   in seconds of an image: "at most", from the rates of the same run. Workers overlap with the network, and less is won.
"""

from __future__ import annotations

import argparse
import copy
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
import torchvision.transforms as transforms
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import prunelab as pl
from prunelab import zoo
from prunelab.datasets import CIFAR10_MEAN, CIFAR10_STD
from prunelab.train.data import Held
from prunelab.train.setting import accelerated, best_precision

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# Tells that a step is done.
Mark = Callable[..., None]
Work = Callable[[Mark], object]
# So many steps come before those that are measured.
WARM = 4
DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def lenet(filters: tuple[int, int] = (20, 50), neurons: tuple[int, ...] = (500,)) -> nn.Module:
    """LeNet 20-50-500 for CIFAR-10, or of other widths; 6-16-120-84 is that of PyTorch's own tutorial."""
    parts: list[nn.Module] = []
    for into, out in pairwise((3, *filters)):
        parts += [nn.Conv2d(into, out, 5), nn.ReLU(), nn.MaxPool2d(2)]
    parts.append(nn.Flatten())
    for into, out in pairwise((filters[-1] * 25, *neurons)):
        parts += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(neurons[-1], 10))


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "lenet5": lambda: lenet((6, 16), (120, 84)),
    "lenet": lenet,
    "vgg_small": lambda: zoo.vgg_small(in_channels=3),
    "resnet20": zoo.resnet20,
    "resnet56": zoo.resnet56,
}


class Transformed(Dataset[tuple[Tensor, int]]):
    """CIFAR-10 as torchvision gives it: a PIL image at a time, transformed."""

    def __init__(self, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose([
            transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize(CIFAR10_MEAN, CIFAR10_STD),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def by_hand(
    model: nn.Module, images: Tensor, labels: Tensor, batch: int, precision: str, epochs: int, mark: Mark
) -> None:
    """The plain loop, in the memory layout that is the faster one for filters."""
    model.to(DEVICE, memory_format=torch.channels_last).train()
    images, labels = images.to(DEVICE), labels.to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * -(-len(images) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).to(DEVICE).split(batch):
            with torch.autocast(DEVICE.type, DTYPES[precision], enabled=precision != "no"):
                loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            mark()


@dataclass(frozen=True)
class Taken:
    """Seconds of a step, and of a call besides its steps."""

    step: float
    besides: float


def taken(work: Work, steps: int, processor: bool) -> Taken:
    """How long work of so many steps takes, in processor seconds if asked."""
    clock = time.process_time if processor else time.perf_counter
    done, at = 0, {}

    def mark(*_: object) -> None:
        nonlocal done
        done += 1
        if done in (WARM, steps):
            at[done] = now()

    def now() -> float:
        if GPU:
            torch.cuda.synchronize()
        return clock()

    started = now()
    work(mark)
    whole = now() - started
    step = (at[steps] - at[WARM]) / (steps - WARM)
    return Taken(step, whole - steps * step)


def tuned(model: nn.Module, train: Any, val: Any, **settings: Any) -> Work:
    """A fine-tuning without what a loop by hand does not do: it measures on two images."""
    return lambda mark: pl.finetune(model, train, val, progress=mark, norm_images=0, **settings)


def each(items: Iterable[object], mark: Mark) -> None:
    """Go through batches."""
    for _ in items:
        mark()


def main() -> int:
    """Time the pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("--images", type=int, default=50_000 if GPU else 2560)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2 if GPU else 1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--workers", type=int, default=8 if GPU else 0, help="of the loader with transforms")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with np.load(asked.cifar10) as file:
        raw, numbers = file["x_train"][: asked.images], file["y_train"][: asked.images].reshape(-1).astype(np.int64)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (CIFAR10_MEAN, CIFAR10_STD))
    images, labels = (torch.from_numpy(raw).permute(0, 3, 1, 2) / 255 - mean) / std, torch.from_numpy(numbers)
    held, val = TensorDataset(images, labels), TensorDataset(images[:2], labels[:2])
    loader = DataLoader(
        Transformed(raw, numbers), asked.batch, shuffle=True, num_workers=asked.workers, pin_memory=GPU
    )  # fmt: skip
    best = best_precision()
    chip = torch.cuda.get_device_name() if GPU else platform.processor() or platform.machine()
    print(
        f"{chip}; {asked.threads} threads; batch {asked.batch}, {asked.images:,} images, {asked.epochs} epochs a turn"
    )
    print(f"PyTorch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}")
    print("\n| network | what | precision | images/s | once, ms | against | images/s | once, ms | ratio | at most |")
    print("| --- | --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    augment, transformed = pl.Augment(flip=True, crop=4), f"loader, transforms, {asked.workers} workers"
    with accelerated("no") as accelerator:
        source, generator = Held((images, labels), asked.batch, 0, accelerator), torch.Generator()
    own = (augment(batch.inputs[0], generator) for k in count() for batch in source.epoch(k))
    loaded = (parts[0].to(DEVICE) for _ in count() for parts in loader)
    steps = asked.epochs * -(-asked.images // asked.batch)
    _, loading = report("none", "augmented on the device", "no", lambda mark: each(islice(own, steps), mark),
                        transformed, lambda mark: each(islice(loaded, steps), mark), asked)  # fmt: skip
    for name in asked.networks:
        network = NETWORKS[name]().to(DEVICE)
        settings: dict[str, Any] = {"epochs": asked.epochs, "batch_size": asked.batch}
        for precision in dict.fromkeys(("no", best)):
            plain = tuned(copy.deepcopy(network), held, val, precision=precision, **settings)
            hand = copy.deepcopy(network)
            alone, _ = report(name, "finetune", precision, plain, "a loop by hand",
                lambda mark, hand=hand, precision=precision: by_hand(
                    hand, images, labels, asked.batch, precision, asked.epochs, mark), asked)  # fmt: skip
        report(name, "augmented on the device", best,
               tuned(copy.deepcopy(network), held, val, augment=augment, precision=best, **settings),
               transformed, tuned(copy.deepcopy(network), loader, val, precision=best, **settings), asked,
               1 + loading / alone)  # fmt: skip
    return 0


def report(
    name: str,
    what: str,
    precision: str,
    ours: Work,
    other: str,
    theirs: Work,
    asked: argparse.Namespace,
    most: float | None = None,
) -> tuple[float, float]:
    """Time two ways in turn and print a row.

    Args:
        most: what the ratio cannot exceed.

    Returns:
        Seconds of a step in both ways, medians over the turns.
    """
    processor, steps = not GPU and not asked.workers, asked.epochs * -(-asked.images // asked.batch)
    pairs = [(taken(ours, steps, processor), taken(theirs, steps, processor)) for _ in range(asked.turns + 1)][1:]
    mine, its = (float(np.median([turn.step for turn in side])) for side in zip(*pairs, strict=True))
    once = (f"{1000 * np.median([turn.besides for turn in side]):,.0f}" for side in zip(*pairs, strict=True))
    ratio = float(np.median([b.step / a.step for a, b in pairs]))
    rates = [f"{asked.batch / step:,.0f} | {fixed}" for step, fixed in zip((mine, its), once, strict=True)]
    bound = "" if most is None else f"{most:.2f}"
    print(f"| {name} | {what} | {precision} | {rates[0]} | {other} | {rates[1]} | {ratio:.2f} | {bound} |", flush=True)
    return mine, its


if __name__ == "__main__":
    raise SystemExit(main())
