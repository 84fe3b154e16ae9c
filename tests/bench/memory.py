"""What a preview makes the process grow by, at its peak, against the budget that it was given.

``python tests/bench/memory.py`` prints one table; every row is a process of its own, in which one random layer after
another is cut to half and previewed. The growth is the process's own peak (``VmHWM`` of Linux) over what it had
once network and images were there and the network had run once.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

MIB = 2**20
# Network, side of its images, how many of them, budget in MiB, precision.
CASES = (
    ("resnet56", 32, 2000, 128, "auto"),
    ("resnet56", 32, 2000, 512, "auto"),
    ("resnet18", 224, 256, 256, "auto"),
    ("resnet18", 224, 128, 256, "float32"),
    ("resnet50", 224, 128, 512, "auto"),
)


def status(name: str) -> int:
    """A figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure(network: str, size: int, count: int, budget: int, precision: Any, moves: int) -> dict[str, float]:
    """Peak growth of this process, and what it consists of, in bytes."""
    import torch
    from torchvision import models

    import prunelab as pl
    from prunelab.program.cache import Cache
    from prunelab.program.liveness import working_bytes

    torch.set_num_threads(1)
    model = (pl.zoo.resnet56() if network == "resnet56" else getattr(models, network)()).eval()
    images, labels = torch.randn(count, 3, size, size), torch.zeros(count, dtype=torch.int64)
    program = pl.trace(model, images[:2])
    with torch.no_grad():
        model(images[:2])
    gc.collect()
    # The peak starts afresh.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, chance = status("VmRSS"), random.Random(0)
    memory = Cache(budget * MIB)
    preview = pl.Preview(program, images, labels, memory=memory)
    kept: dict[str, tuple[int, ...]] = {}
    for _ in range(moves):
        layer = chance.choice([layer for layer in program.layers if not layer.pinned])
        kept[layer.name] = tuple(sorted(chance.sample(range(layer.channels), (layer.channels + 1) // 2)))
        found = preview.accuracy(pl.Selection(dict(kept)), precision=precision)
    engine = preview._side(precision).engine
    shapes = (engine.program.nodes[k].shape for k in engine._recipe(engine.program).kept)
    item = 2 if found.precision == "bfloat16" else 4
    return {
        "everything": item * count * sum(prod(shape) for shape in shapes if shape is not None),
        "budget": budget * MIB,
        "batch": preview._step,
        "work": preview._step * working_bytes(program),
        "held": memory.held,
        "weights": sum(t.nbytes for t in model.parameters()),
        "growth": status("VmHWM") - before,
    }


def apart(case: tuple[Any, ...], moves: int) -> dict[str, float]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", *map(str, case), "--moves", str(moves)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(ended.stdout)
    return found


def main() -> None:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, default=20)
    parser.add_argument("--one", nargs=5, metavar=("NETWORK", "SIZE", "IMAGES", "BUDGET", "PRECISION"))
    asked = parser.parse_args()
    if asked.one:
        network, size, count, budget, precision = asked.one
        print(json.dumps(measure(network, int(size), int(count), int(budget), precision, asked.moves)))
        return
    heads = ("one selection's values", "budget", "work at hand", "values held", "network", "peak growth")
    print(f"| network, images, MiB of | {' | '.join(heads)} |")
    print(f"| --- | {' | '.join(['---:'] * len(heads))} |")
    for case in CASES:
        found = apart(case, asked.moves)
        cells = [f"{found[k] / MIB:.0f}" for k in ("everything", "budget", "work", "held", "weights", "growth")]
        print(f"| {case[0]}, {case[2]} at {case[1]} × {case[1]}, {case[4]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
