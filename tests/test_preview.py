"""The preview's estimates: right on the images seen, with intervals that other formulas confirm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import prunelab as pl
from prunelab.preview import paired_half_width, wilson

TRAIN, TEST = pl.datasets.fashion_mnist()


@pytest.fixture(scope="module")
def program() -> pl.Program:
    return pl.trace(pl.zoo.load("lenet"), TEST.images[:2])


def accuracy(model: nn.Module, n: int) -> float:
    """Plainly counted."""
    with torch.no_grad():
        return float((model(TEST.images[:n]).argmax(1) == TEST.labels[:n]).double().mean())


def test_equals_the_committed_module(program: pl.Program) -> None:
    sel = pl.Plan("l1").set("conv2", ratio=0.4).set("fc1", ratio=0.3, grain="weight").resolve(program)
    found = pl.Preview(program, TEST.images, TEST.labels).accuracy(sel, n=700)
    assert found.n == 700
    assert found.accuracy == accuracy(pl.commit(program, sel), 700)
    assert found.base == accuracy(program.model, 700)
    assert found.change == found.accuracy - found.base
    assert found.precision == "float32"


def test_removing_nothing_changes_nothing(program: pl.Program) -> None:
    found = pl.Preview(program, TEST.images, TEST.labels).accuracy(n=300)
    assert (found.change, found.half) == (0.0, 0.0)


def test_stops_when_told(program: pl.Program) -> None:
    seen: list[int] = []
    preview = pl.Preview(program, TEST.images, TEST.labels)
    found = preview.accuracy(on_update=lambda e: seen.append(e.n) or len(seen) < 2)
    assert found.n == seen[-1] == 512
    assert seen == [256, 512]


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (50, 100), (921, 1000)])
def test_wilson_solves_its_equation(right: int, n: int) -> None:
    z, share = 1.959963984540054, right / n
    for bound in wilson(right, n):
        # The bound is where the share lies z standard errors away (or the share itself at 0 and 1).
        assert abs(share - bound) == pytest.approx(z * np.sqrt(bound * (1 - bound) / n), abs=1e-12) or bound == share


def test_the_interval_of_the_change_covers() -> None:
    """In 2,000 draws from a known pair of networks, 95 % intervals hold the true change about 95 times in 100."""
    rng = np.random.default_rng(0)
    gained, lost, n, hits = 0.02, 0.05, 400, 0
    for _ in range(2000):
        draw = rng.random(n)
        now, before = draw < 0.8 + gained, (draw < 0.8) | (draw > 1 - lost)
        half = paired_half_width(now, before)
        hits += abs((now.mean() - before.mean()) - (gained - lost)) <= half
    assert 0.93 <= hits / 2000 <= 0.975


def test_bad_input(program: pl.Program) -> None:
    images, labels = TEST.images[:20], TEST.labels[:20]
    for bad_images, bad_labels, says in [
        (images, labels[:10], "one class number"),
        (images, labels.float(), "one class number"),
        (images[:0], labels[:0], "one class number"),
        (images[:, :, :20], labels, "shape"),
    ]:
        with pytest.raises(pl.PruneLabError, match=says):
            pl.Preview(program, bad_images, bad_labels)
