"""prunelab beside Torch-Pruning on torchvision's networks; writes structure.json and the table in the README.

Run by ``make bench-structure``. Every network and side runs in a process of its own, on one thread, under a time limit;
what fails or does not end is a row like any other.

**How each side is used.** Half of the channels of everything that a side can prune goes, chosen at random.
Torch-Pruning: ``tp.pruner.BasePruner`` with ``tp.importance.RandomImportance``, set up as in its own example for
torchvision: the classifier and the output projections of ``nn.MultiheadAttention`` are ignored, the Vision
Transformer's channels are rounded to its heads and its ``hidden_dim`` is set afterwards, other attentions are named in
``num_heads``. prunelab: ``trace``, a random half of every free layer, ``commit``.

**What is timed**, in processor seconds, the fastest of up to three runs in float32: finding the structure
(``BasePruner(…)``; ``pl.trace`` with its proof), pruning (``pruner.step()``, in place; ``pl.commit``, which makes a
copy and proves it), and counting parameters and FLOPs again after one layer has changed
(``tp.utils.count_ops_and_params`` on the pruned network, which runs it; ``pl.cost``, which computes them before
anything is pruned).

**What is checked**, by neither side's own account of what it removed: every float64 number in the network says in its
last bits where it stands, and in a copy of the unpruned network all those that the pruned one no longer holds are set
to zero. That network must compute what the pruned one computes. In two places zero is not the same as gone,
and the copy counts only what is left: in the mean and variance of LayerNorm, and in the scale of
``scaled_dot_product_attention``, one over the root of its width. Attention that is written out (Swin, MaxViT) may
differ by that scale, which is nobody's fault. The number is given all the same, and what the table calls "runs" is
only that: finite outputs of the right shape.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"
RECORD = HERE / "structure.json"
BEGIN, END = "<!-- structure: begin -->", "<!-- structure: end -->"
MODELS = (
    *("resnet50", "vgg16_bn", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"),
    *("regnet_y_400mf", "shufflenet_v2_x1_0", "googlenet", "convnext_tiny", "swin_t", "vit_b_16", "maxvit_t"),
)
SIDES = {"prunelab": "prunelab", "torch_pruning": "Torch-Pruning"}
EXACT = 1e-10
PLACE = 2**28 - 1
Row = dict[str, Any]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What a function gives, and the processor seconds it takes, which other work on the machine does not lengthen."""
    started = time.process_time()
    made = work()
    return made, time.process_time() - started


def fastest(work: Callable[[], Any]) -> tuple[Any, float]:
    """What a function gives, and the seconds of the fastest of up to three runs, within five seconds."""
    taken: list[float] = []
    while len(taken) < 3 and sum(taken) < 5:
        made, seconds = timed(work)
        taken.append(seconds)
    return made, min(taken)


def network(name: str) -> Any:
    """A torchvision network in evaluation mode, with random numbers in its norms too, see :func:`numbered`."""
    import torch
    from torchvision import models

    torch.manual_seed(0)
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = getattr(models, name)(weights=None, **options).double().eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point() and (tensor.dim() < 2 or "layer_scale" in key):
                tensor.copy_(torch.rand_like(tensor) * (0.2 if "bias" in key or "mean" in key else 1.0) + 0.5)
            elif tensor.is_floating_point() and not tensor.any():
                # A head that starts at zero would hide everything before it.
                tensor.normal_(std=0.02)
    return numbered(model)


def numbered(model: Any) -> Any:
    """The model; the last bits of each number in its float64 parameters now say where in the parameter it stands."""
    import torch

    with torch.no_grad():
        for tensor in model.parameters():
            bits = tensor.view(torch.int64)
            bits.bitwise_and_(~PLACE).bitwise_or_(torch.arange(tensor.numel()).view(tensor.shape))
    return model


def difference(model: Any, small: Any, images: Any) -> float:
    """Largest relative difference between a pruned network and the unpruned one in which what it lacks is zero.

    Args:
        model: float64, its parameters :func:`numbered`.
    """
    import torch
    from torch.nn import functional

    reference = copy.deepcopy(model)
    left = dict(small.named_parameters())
    with torch.no_grad():
        for name, tensor in reference.named_parameters():
            values = left[name].detach().flatten()
            places = values.contiguous().view(torch.int64) & PLACE
            if not torch.equal(tensor.flatten()[places], values):
                raise ValueError(f"numbers in {name} have changed")
            there = torch.zeros(tensor.numel(), dtype=torch.bool)
            there[places] = True
            tensor.mul_(there.view(tensor.shape))
    norm, attention = functional.layer_norm, functional.scaled_dot_product_attention

    def over_what_is_left(x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
        kept = torch.nonzero(weight).flatten()
        y = torch.zeros_like(x)
        y[..., kept] = norm(x[..., kept], (len(kept),), weight[kept], bias[kept], eps)
        return y

    def scaled_by_what_is_left(query: Any, *others: Any, **options: Any) -> Any:
        widths = (query != 0).transpose(-1, -2).any(-1).sum(-1).clamp_min(1)
        scale = (query.shape[-1] / widths).sqrt()[..., None, None]
        return attention(query * scale, *others, **options)

    # The fused attention would not call the function above.
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        given = small(images)
        functional.layer_norm, functional.scaled_dot_product_attention = over_what_is_left, scaled_by_what_is_left
        expected = reference(images)
        functional.layer_norm, functional.scaled_dot_product_attention = norm, attention
    if given.shape != expected.shape or not bool(given.isfinite().all()):
        raise ValueError(f"outputs of shape {tuple(given.shape)}, some not finite")
    return float((given - expected).abs().max() / expected.abs().max())


def run_prunelab(name: str, say: Callable[..., None]) -> None:
    """One network through prunelab, each result said as soon as it is there."""
    import torch

    import prunelab as pl

    model, images = network(name), torch.randn(2, 3, 224, 224, dtype=torch.float64)
    single, example = copy.deepcopy(model).float(), images.float()
    program, seconds = fastest(lambda: pl.trace(single, example))
    say(find=seconds)
    chance = random.Random(0)
    free = [layer for layer in program.layers if not layer.pinned and layer.channels > 1]
    kept = {k.name: tuple(sorted(chance.sample(range(k.channels), k.channels - k.channels // 2))) for k in free}
    half = pl.Selection(kept)
    small, seconds = fastest(lambda: pl.commit(program, half))
    say(prune=seconds, params=share(small, model))
    changed = pl.Selection({**kept, free[0].name: (0,)})
    # One alone is shorter than the processor's clock can tell.
    say(project=fastest(lambda: [pl.cost(program, changed) for _ in range(200)])[1] / 200)
    # The structure does not depend on the precision of the numbers.
    exact = replace(program, model=model, example=(images,))
    say(difference=difference(model, pl.commit(exact, half), images[:1]))


def run_torch_pruning(name: str, say: Callable[..., None]) -> None:
    """One network through Torch-Pruning, each result said as soon as it is there."""
    import torch

    model, images = network(name), torch.randn(1, 3, 224, 224, dtype=torch.float64)
    single, example = copy.deepcopy(model).float(), images.float()
    finds: list[float] = []
    prunes: list[float] = []
    while len(finds) < 3 and sum(finds) < 5:
        small = copy.deepcopy(single)
        pruner, seconds = timed(lambda small=small: peer(small, example))
        finds.append(seconds)
        say(find=min(finds))
        prunes.append(timed(pruner.step)[1])
        say(prune=min(prunes))
    settle(small)
    say(params=share(small, model))
    import torch_pruning as tp

    say(project=fastest(lambda: tp.utils.count_ops_and_params(small, example))[1])
    exact = copy.deepcopy(model)
    peer(exact, images).step()
    settle(exact)
    say(difference=difference(model, exact, images))


def peer(model: Any, example: Any) -> Any:
    """Torch-Pruning's pruner, set up as its own example for torchvision does it."""
    import torch_pruning as tp
    from torch import nn
    from torchvision.models import VisionTransformer, maxvit, swin_transformer

    projection = nn.modules.linear.NonDynamicallyQuantizableLinear
    classifier = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    heads = {m.qkv: m.num_heads for m in model.modules() if isinstance(m, swin_transformer.ShiftedWindowAttention)}
    written_out = [m for m in model.modules() if isinstance(m, maxvit.RelativePositionalMultiHeadAttention)]
    heads |= {m.to_qkv: m.n_heads for m in written_out}
    return tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=0.5,
        ignored_layers=[*classifier, *(m for m in model.modules() if isinstance(m, projection))],
        round_to=model.encoder.layers[0].num_heads if isinstance(model, VisionTransformer) else None,
        num_heads=heads,
    )


def settle(model: Any) -> None:
    """What Torch-Pruning's example sets by hand: the Vision Transformer reads its width from an attribute."""
    if hasattr(model, "hidden_dim"):
        model.hidden_dim = model.conv_proj.out_channels


def share(small: Any, model: Any) -> float:
    """Parameters left, as a share."""
    return sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())


def one(side: str, name: str, limit: int) -> None:
    """Measure in this process; a line of JSON for every result."""
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))

    def say(**results: Any) -> None:
        print(json.dumps(results), flush=True)

    try:
        {"prunelab": run_prunelab, "torch_pruning": run_torch_pruning}[side](name, say)
    except Exception as error:
        lines = str(error).strip().splitlines()
        say(error=f"{type(error).__name__}: {lines[0] if lines else ''}"[:160])


def measured(side: str, name: str, limit: int) -> Row:
    """One network and side in a process of its own, which may use so many seconds of the processor."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", side, name, "--limit", str(limit)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    row: Row = {"model": name, "side": side}
    try:
        ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=4 * limit)
        output, status = ended.stdout, f"ended with status {ended.returncode}" if ended.returncode else ""
        if ended.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            status = f"not done within {limit} s"
    except subprocess.TimeoutExpired as late:
        output = (late.stdout or b"").decode() if isinstance(late.stdout, bytes) else (late.stdout or "")
        status = f"not done within {limit} s"
    if status:
        row["error"] = status
    for line in output.splitlines():
        if line.startswith("{"):
            row |= json.loads(line)
    return row


def table(rows: list[Row]) -> str:
    """The rows as a table in Markdown: one line per network, both sides beside each other."""
    heads = [
        "network",
        "find structure (s)",
        "prune to half (s)",
        "parameters left (%)",
        "count again (ms)",
        "masked = pruned",
    ]
    lines = [f"| {' | '.join(heads)} |", f"| --- | {' | '.join(['---:'] * 5)} |"]
    for name in dict.fromkeys(row["model"] for row in rows):
        pair = [next((r for r in rows if (r["model"], r["side"]) == (name, side)), {}) for side in SIDES]
        cells = [
            " / ".join(number(r, "find", 1, 2) for r in pair),
            " / ".join(number(r, "prune", 1, 2) for r in pair),
            " / ".join(number(r, "params", 100, 0) for r in pair),
            " / ".join(number(r, "project", 1000, 2 if r is pair[0] else 0) for r in pair),
            " / ".join(verdict(r) for r in pair),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def number(row: Row, key: str, factor: float, digits: int) -> str:
    return f"{row[key] * factor:.{digits}f}" if key in row else "–"


def verdict(row: Row) -> str:
    """Whether the pruned network computes what the masked one does."""
    if "difference" in row:
        exact = row["difference"] < EXACT
        return f"{row['difference']:.0e}" if exact else f"runs ({row['difference']:.0e})"
    error = row.get("error", "not run")
    return error if error.startswith("not") else f"fails: {re.split(r'[:(]', error)[0]}"


def write(rows: list[Row], readme: Path = README) -> None:
    """Put the table between the markers of the README."""
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{readme} has no {BEGIN} … {END}; nothing was written to it.")
    readme.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "MODEL"), help="measure here, print JSON")
    parser.add_argument("--limit", type=int, default=45, help="processor seconds for each process (default 45)")
    parser.add_argument("--models", nargs="*", default=MODELS, help="only these; nothing is written then")
    options = parser.parse_args()
    if options.one:
        one(*options.one, options.limit)
        return
    rows = []
    for name in options.models:
        for side in SIDES:
            rows.append(measured(side, name, options.limit))
            print(json.dumps(rows[-1]), flush=True)
    print(f"\nprunelab / Torch-Pruning\n{table(rows)}")
    if tuple(options.models) == MODELS:
        RECORD.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        write(rows)


if __name__ == "__main__":
    main()
