"""How long ``import prunelab`` takes beside ``import torch`` alone, in fresh processes, the best of three."""

from __future__ import annotations

import subprocess
import sys
import time


def seconds_to_run(statement: str, runs: int = 3) -> float:
    """Return the least wall time in seconds of a fresh interpreter that runs ``statement``."""
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True, timeout=300)
        taken.append(time.perf_counter() - start)
    return min(taken)


def test_import_costs_little_more_than_torch() -> None:
    seconds_to_run("import torch, prunelab", runs=1)  # fills the disk cache for both
    torch_alone = seconds_to_run("import torch")
    prunelab = seconds_to_run("import prunelab")
    print(f"\nimport torch {torch_alone:.2f} s, import prunelab {prunelab:.2f} s")
    assert prunelab <= 1.3 * torch_alone + 0.2
