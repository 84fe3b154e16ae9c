"""Train the embedded checkpoints on the full Fashion-MNIST and record how.

usage: python data/train_checkpoints.py --data DIR [--only NAME] [--epochs N] [--seed 0]

Writes checkpoints/NAME.safetensors and checkpoints/NAME.json beside this file. The test set is looked at
once, after the last epoch, in float32; it selects nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from prunelab import zoo
from prunelab.datasets import ImageSet, fashion_mnist_full

FOLDER = Path(__file__).parent / "checkpoints"
CROP_PADDING = 2


@dataclass(frozen=True)
class Recipe:
    """Nesterov SGD with momentum 0.9 and a one-cycle learning rate that peaks at ``lr``."""

    epochs: int
    lr: float
    batch: int = 128
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0


RECIPES = {
    "lenet": Recipe(epochs=25, lr=0.05),
    "vgg_small": Recipe(epochs=25, lr=0.1, label_smoothing=0.1),
    "resnet20": Recipe(epochs=30, lr=0.1, label_smoothing=0.1),
}


def augment(images: Tensor, background: float) -> Tensor:
    """Flip each of ``(images, channels, height, width)`` at random and crop it at random after padding."""
    count, _, height, width = images.shape
    flipped = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images, images.flip(3))
    padded = functional.pad(flipped, (CROP_PADDING,) * 4, value=background)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    offsets = torch.randint(0, 2 * CROP_PADDING + 1, (2, count))
    return windows[torch.arange(count), :, offsets[0], offsets[1]]


def batches(data: ImageSet, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of augmented batches in random order; what does not fill a batch is left out."""
    background = -data.mean[0] / data.std[0]
    order = torch.randperm(len(data))
    for chosen in order[: len(data) // size * size].split(size):
        images = augment(data.images[chosen], background)
        yield images.contiguous(memory_format=torch.channels_last), data.labels[chosen]


def train(model: nn.Module, data: ImageSet, recipe: Recipe) -> None:
    """Train ``model`` in place, under bfloat16 autocast with float32 weights."""
    model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    steps = recipe.epochs * (len(data) // recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=steps, pct_start=0.2, cycle_momentum=False, final_div_factor=1e3
    )
    for epoch in range(recipe.epochs):
        start, total, right, seen = time.perf_counter(), 0.0, 0, 0
        for images, labels in batches(data, recipe.batch):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images)
            loss = functional.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total, seen = total + loss.item() * len(labels), seen + len(labels)
            right += int((logits.argmax(1) == labels).sum())
        print(
            f"epoch {epoch + 1}/{recipe.epochs}: training loss {total / seen:.4f}, accuracy "
            f"{right / seen:.4f}, "
            f"{time.perf_counter() - start:.1f} s",
            flush=True,
        )


@torch.inference_mode()
def accuracy(model: nn.Module, data: ImageSet) -> float:
    """Share of ``data`` that ``model`` classifies rightly, in float32 and eval mode."""
    model.eval()
    right = 0
    for images, labels in DataLoader(data, batch_size=500):
        right += int((model(images).argmax(1) == labels).sum())
    return right / len(data)


def build(name: str, recipe: Recipe, seed: int, data: tuple[ImageSet, ImageSet], command: str) -> None:
    """Train one checkpoint and write its two files."""
    torch.manual_seed(seed)
    model = zoo.TRAINED[name]()
    start = time.perf_counter()
    train(model, data[0], recipe)
    seconds = time.perf_counter() - start
    model.to(memory_format=torch.contiguous_format)
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    FOLDER.mkdir(exist_ok=True)
    weights = FOLDER / f"{name}.safetensors"
    save_file(state, weights)
    weights.chmod(0o644)  # safetensors writes files that only their owner can read
    record = {
        "name": name,
        "dataset": data[0].name,
        "command": command,
        "seed": seed,
        **asdict(recipe),
        "precision": "bfloat16 autocast, float32 weights",
        "augmentation": f"horizontal flip, crop after padding by {CROP_PADDING}",
        "training_images": len(data[0]),
        "test_images": len(data[1]),
        "test_accuracy": accuracy(model, data[1]),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "torch": torch.__version__,
        "seconds": round(seconds),
    }
    (FOLDER / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{name}: test accuracy {record['test_accuracy']:.4f} in {seconds:.0f} s", flush=True)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train the embedded checkpoints on the full Fashion-MNIST.")
    parser.add_argument("--data", required=True, help="folder where torchvision finds FashionMNIST")
    parser.add_argument("--only", choices=RECIPES, help="train this network alone")
    parser.add_argument("--epochs", type=int, help="instead of each recipe's own number")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = fashion_mnist_full(options.data)
    for name in [options.only] if options.only else RECIPES:
        recipe = RECIPES[name]
        command = f"python data/train_checkpoints.py --data DIR --only {name} --seed {options.seed}"
        if options.epochs is not None:
            recipe = Recipe(**{**asdict(recipe), "epochs": options.epochs})
            command += f" --epochs {options.epochs}"
        build(name, recipe, options.seed, data, command)


if __name__ == "__main__":
    main()
