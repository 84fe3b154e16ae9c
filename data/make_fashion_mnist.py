"""Build fashion_mnist/fashion_mnist.npz from torchvision's full Fashion-MNIST.

usage: python data/make_fashion_mnist.py ROOT      (ROOT/FashionMNIST/raw holds the four original files)

Takes the first 1,000 training images of each class, in their order, and all 10,000 test images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from torchvision.datasets import FashionMNIST

PER_CLASS = 1_000


def main() -> None:
    """Read the command line and build the file."""
    parser = argparse.ArgumentParser(description="Build the embedded Fashion-MNIST from the full one.")
    parser.add_argument("root", metavar="ROOT", help="folder where torchvision.datasets.FashionMNIST finds its files")
    root = parser.parse_args().root
    train, test = (FashionMNIST(root, train=each) for each in (True, False))
    labels = train.targets.numpy()
    first = np.concatenate([np.flatnonzero(labels == label)[:PER_CLASS] for label in range(10)])
    kept = np.sort(first)
    target = Path(__file__).parent / "fashion_mnist" / "fashion_mnist.npz"
    np.savez_compressed(
        target,
        x_train=train.data.numpy()[kept],
        y_train=labels[kept].astype(np.uint8),
        x_test=test.data.numpy(),
        y_test=test.targets.numpy().astype(np.uint8),
    )
    print(f"{target.name}: {len(kept):,} + {len(test):,} images, {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
