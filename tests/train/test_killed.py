"""Killed at any moment, a training goes on from its last checkpoint and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

import killed
import pytest
import torch
from safetensors.torch import load_file

Place = tuple[int, int]


@dataclass(frozen=True)
class Life:
    """One process of a training.

    Where the checkpoint stood before it, the steps that it made, and whether it came to the end.
    """

    checkpoint: Place
    steps: list[Place]
    ended: bool


@pytest.fixture(scope="module")
def server() -> Iterator[Popen[str]]:
    """Gives processes that train, and have all imported before they begin."""
    command = [sys.executable, str(killed.__file__)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True, env=environment) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def checkpoint(folder: Path) -> Place:
    """Epoch and step of the checkpoint in a folder; its file is whole whenever it is read."""
    file = folder / "run" / "training.json"
    if not file.exists():
        return (0, 0)
    record = json.loads(file.read_text())
    assert (folder / "run" / record["tensors"]).exists()
    return record["at"]["epoch"], record["at"]["step"]


def lived(server: Popen[str], kind: str, folder: Path, seconds: float | None) -> Life:
    """A process that is killed after so many seconds, or not at all."""
    assert server.stdin is not None
    assert server.stdout is not None
    log, before = folder / "log", checkpoint(folder)
    log.unlink(missing_ok=True)
    server.stdin.write(f"{kind} {folder / 'run'} {log} {folder / 'out'}\n")
    server.stdin.flush()
    process = int(server.stdout.readline())
    if seconds is not None:
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    code = int(server.stdout.readline())
    ended = code == 0
    assert ended or code == -signal.SIGKILL
    text = log.read_text().splitlines() if log.exists() else []
    return Life(before, [(int(e), int(s)) for e, s in (line.split() for line in text)], ended)


@pytest.mark.parametrize(("kind", "kills"), [("held", 20), ("loader", 3)])
def test_a_training_killed_at_random_moments_ends_with_the_very_same_weights(
    server: Popen[str], tmp_path: Path, kind: str, kills: int
) -> None:
    # The first process waits until the server has imported all.
    for name in ("first", "whole"):
        (tmp_path / name).mkdir()
        started = time.perf_counter()
        whole = lived(server, kind, tmp_path / name, None)
        taken = time.perf_counter() - started
        assert whole.ended
    expected = load_file(tmp_path / "whole" / "out")
    chance, done, run = random.Random(0), 0, 0
    while done < kills:
        folder = tmp_path / str(run)
        folder.mkdir()
        run += 1
        lives: list[Life] = []
        while not lives or not lives[-1].ended:
            lives.append(lived(server, kind, folder, chance.uniform(0, taken) if done < kills else None))
            done += not lives[-1].ended
        check(lives, whole)
        found = load_file(folder / "out")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert sorted(each.suffix for each in (folder / "run").iterdir()) == [".json", ".safetensors"]


def check(lives: list[Life], whole: Life) -> None:
    """Every life goes on right after its checkpoint, which is at most a few steps behind the end of the last life."""
    for life in lives:
        first, end = max(life.checkpoint, (1, 0)), len(life.steps)
        ahead = [place for place in whole.steps if place > first]
        assert life.steps == ahead[:end]
    for before, after in pairwise(lives):
        lost = [place for place in before.steps if place > max(after.checkpoint, (1, 0))]
        # At most those between two checkpoints, and the one that was being written down.
        assert len(lost) <= killed.EVERY + 1
        assert after.checkpoint >= before.checkpoint
