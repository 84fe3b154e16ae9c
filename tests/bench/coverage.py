"""Every classification model of torchvision, cut to half: what is free, what is pinned, and whether promise 1 holds.

Random weights and norm statistics, float64, the smallest image each accepts. Each model has a process of its own with
a time limit. ``python tests/bench/coverage.py`` writes the table; names of models on the command line only print.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from support import Network, flops, half_of_everything, parameters, relative

import prunelab as pl
from prunelab.program.run import bind

TABLE = Path(__file__).with_name("coverage.md")
SECONDS = 600
SIDES = {"alexnet": 63, "inception_v3": 75, "maxvit_t": 224}
HEAD = """# Coverage of torchvision

Written by `make coverage`. Every classification model of torchvision {torchvision}, traced and cut to a random half of
the channels of every free layer, in float64 on PyTorch {torch}. *Free* are the convolution and linear layers that run
in evaluation mode and whose outputs can be removed; *difference* is the largest one between the previewed and the
committed logits, relative to the largest logit; FLOPs are equal when what the closed form projects is what PyTorch's
counter finds on the committed module, attention unfused. Processor seconds to trace, on one thread.

| model | layers | free | trace s | difference | parameters | FLOPs | pinned |
| --- | ---: | ---: | ---: | ---: | --- | --- | --- |
"""


def examine(name: str) -> dict[str, object]:
    """One row of the table."""
    torch.set_num_threads(1)
    side = SIDES.get(name, 224 if name.startswith("vit") else 64)
    given = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    net = Network(lambda: torchvision.models.get_model(name, weights=None, **given), (3, side, side))
    model, images = net.build(), net.images()
    start = time.process_time()
    program = pl.trace(model, images)
    seconds = time.process_time() - start
    weights = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    read = {program.nodes[i].target for node in program.nodes for i in node.inputs}
    weights = {n for n in weights if f"{n}.weight" in read}
    rows = [(slot.state.removesuffix(".weight"), row) for row in program.layers for slot in row.slots if slot.dim == 0]
    free = weights & {name for name, row in rows if not row.pinned}
    selection = half_of_everything(program)
    small = pl.commit(program, selection)
    del model
    with torch.no_grad():
        difference = relative(bind(program, selection)(images), small(images))
    projected = pl.cost(program, selection)
    return {
        "model": name,
        "layers": len(program.layers),
        "weights": len(weights),
        "free": len(free),
        "trace": seconds,
        "difference": difference,
        "parameters": projected.params == parameters(small),
        "flops": projected.flops == flops(small, images[:1]),
        "pinned": Counter(row.pinned for row in program.layers if row.pinned),
    }


def line(row: dict[str, object]) -> str:
    """A row as Markdown."""
    if "failed" in row:
        return f"| {row['model']} | | | | | | | failed: {row['failed']} |"
    pinned = row["pinned"]
    assert isinstance(pinned, dict)
    reasons = "; ".join(f"{count} × {reason}" for reason, count in pinned.items())
    reasons = re.sub(r"\(in \S*/", "(in ", reasons)  # where torchvision lies on this machine says nothing
    equal = ["equal" if row[key] else "DIFFERENT" for key in ("parameters", "flops")]
    return (
        f"| {row['model']} | {row['layers']} | {row['free']} of {row['weights']} | {row['trace']:.1f} "
        f"| {row['difference']:.0e} | {equal[0]} | {equal[1]} | {reasons} |"
    )


def apart(name: str) -> dict[str, object]:
    """A row from a process of its own."""
    command = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"model": name, "failed": f"not done within {SECONDS} s"}
    if done.returncode:
        return {"model": name, "failed": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    row: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def main() -> int:
    """Examine models, print each as it is done, and write the table when all were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--one", metavar="MODEL", help="examine it in this process and print JSON")
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(examine(asked.one)))
        return 0
    rows = []
    for name in asked.models or torchvision.models.list_models(module=torchvision.models):
        rows.append(apart(name))
        print(line(rows[-1]), flush=True)
    done = [row for row in rows if "failed" not in row]
    weights, free = (sum(int(str(row[key])) for row in done) for key in ("weights", "free"))
    total = f"\n{len(done)} of {len(rows)} models; {free:,} of {weights:,} convolution and linear layers free.\n"
    print(total)
    if not asked.models:
        head = HEAD.format(torchvision=torchvision.__version__, torch=torch.__version__)
        TABLE.write_text(head + "\n".join(map(line, rows)) + "\n" + total)
    good = (row.get("parameters") and row.get("flops") and float(str(row["difference"])) < 1e-10 for row in rows)
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
