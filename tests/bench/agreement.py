"""How many predictions in bfloat16 are those in float32, over random selections of ResNet-56 at every depth.

``python tests/bench/agreement.py WEIGHTS CIFAR10`` prints one table: selections that cut one layer only, some, half of
the layers and all of them, each by a random share of its smallest filters. WEIGHTS and CIFAR10 as in ``live.py``.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from live import MEAN, STD, network

import prunelab as pl
from prunelab.criteria.registry import scores
from prunelab.datasets import npz
from prunelab.preview import settled
from prunelab.program.program import Program
from prunelab.program.run import bind
from prunelab.program.selection import Selection


def cut(program: Program, layers: int, most: float, seed: int) -> Selection:
    """A selection that cuts so many random layers, each by up to a share of its filters, the smallest first."""
    chance = random.Random(seed)
    free = [layer for layer in program.layers if not layer.pinned]
    kept = {}
    for layer in chance.sample(free, min(layers, len(free))):
        gone = int(layer.channels * chance.uniform(0, most))
        kept[layer.name] = tuple(sorted(np.argsort(scores(program, None, "l1", layer))[gone:].tolist()))
    return Selection(kept)


def main() -> None:
    """Run the selections and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--each", type=int, default=10, help="selections of each kind")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    _, test = npz(asked.cifar10, tuple("0123456789"), MEAN, STD, name="CIFAR-10")
    images, labels = test.images[: asked.images], test.labels[: asked.images]
    program = pl.trace(network(asked.weights), images[:2])
    preview = pl.Preview(program, images, labels)
    fast = preview._side("bfloat16").engine
    print("| layers cut, by up to | least | median | least, bfloat16 alone | median | accuracy |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for layers, most in ((1, 0.9), (5, 0.5), (17, 0.3), (17, 0.6), (99, 0.2), (99, 0.5)):
        plain, agree, right = [], [], []
        for seed in range(asked.each):
            selection = cut(program, layers, most, seed)
            prepared = fast.prepare(selection, {})
            coarse, decided = [], []
            with torch.no_grad():
                bound = bind(program, selection)
                for k, part in enumerate(images.split(256)):
                    outputs = fast(prepared, (part,), k)
                    coarse.append(outputs.argmax(1))
                    decided.append(settled(outputs, part, bound).argmax(1))
            exact = preview.logits(selection).argmax(1)
            plain.append(float((torch.cat(coarse) == exact).double().mean()))
            agree.append(float((torch.cat(decided) == exact).double().mean()))
            right.append(float((exact == labels).double().mean()))
        name = "all" if layers > len(program.layers) else str(layers)
        shares = (min(agree), np.median(agree), min(plain), np.median(plain), np.median(right))
        print(f"| {name}, {most:.0%} | {' | '.join(f'{share:.2%}' for share in shares)} |", flush=True)


if __name__ == "__main__":
    main()
