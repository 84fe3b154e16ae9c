"""The preview's numbers: the committed module's accuracy exactly, and intervals against independent formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from support import Network, half_of_everything, relative
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import prunelab as pl
from prunelab import zoo
from prunelab.preview import Estimate, labelled, paired_half_width, wilson

Z = 1.959963984540054


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    _, test = pl.datasets.fashion_mnist()
    return test.images[:1000], test.labels[:1000]


@pytest.fixture(scope="module", params=["lenet", "vgg_small"])
def program(request: pytest.FixtureRequest, data: tuple[Tensor, Tensor]) -> pl.Program:
    return pl.trace(zoo.load(request.param), data[0][:2])


# Accuracy ---------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_accuracy_is_the_committed_modules(program: pl.Program, data: tuple[Tensor, Tensor], seed: int) -> None:
    images, labels = data
    selection = half_of_everything(program, seed)
    small = pl.commit(program, selection)
    with torch.no_grad():
        logits = torch.cat([small(part) for part in images.split(256)])
        base = (torch.cat([program.model(part) for part in images.split(256)]).argmax(1) == labels).numpy()
    now = (logits.argmax(1) == labels).numpy()
    preview = pl.Preview(program, images, labels)
    found = preview.accuracy(selection)
    assert found.accuracy == now.mean()
    assert found.base == base.mean()
    assert found.change == pytest.approx(now.mean() - base.mean(), abs=1e-15)
    assert found.half == paired_half_width(now, base)
    assert (found.n, found.total, found.precision) == (1000, 1000, "float32")
    assert relative(preview.logits(selection), logits) < 1e-5
    assert relative(preview.logits(selection, images[:10]), logits[:10]) < 1e-5
    # The networks of the zoo know clothes; half of everything is another matter.
    assert found.base > 0.85 > found.accuracy


def test_the_change_is_against_the_same_images(program: pl.Program, data: tuple[Tensor, Tensor]) -> None:
    preview, selection = pl.Preview(program, *data), half_of_everything(program)
    one_by_one = [preview.accuracy(selection, n=n) for n in (1, 10, 300, 1000)]
    afresh = [pl.Preview(program, *data).accuracy(selection, n=n) for n in (1, 10, 300, 1000)]
    for ours, theirs in zip(one_by_one, afresh, strict=True):
        assert (ours.base, ours.accuracy, ours.n, ours.half) == (theirs.base, theirs.accuracy, theirs.n, theirs.half)
    assert [e.n for e in one_by_one] == [1, 10, 300, 1000]
    assert preview.accuracy(selection, n=5_000).n == 1000


@pytest.mark.parametrize("how", ["dense", "all kept", "all ones"])
def test_what_removes_nothing_changes_nothing_for_certain(
    program: pl.Program, data: tuple[Tensor, Tensor], how: str
) -> None:
    layer = program.layers[0]
    selection = {
        "dense": pl.DENSE,
        "all kept": pl.Selection({layer.name: tuple(range(layer.channels))}),
        "all ones": pl.Selection(
            masks={s: torch.ones_like(program.state(s), dtype=torch.bool) for s, _ in layer.producers}
        ),
    }[how]
    seen: list[Estimate] = []
    found = pl.Preview(program, *data).accuracy(selection, on_update=seen.append)
    assert [(e.change, e.half) for e in [*seen, found]] == [(0.0, 0.0)] * (len(seen) + 1)
    assert found.low < found.accuracy < found.high


def test_a_change_that_was_not_seen_is_not_certain(program: pl.Program, data: tuple[Tensor, Tensor]) -> None:
    name = program.layers[0].producers[0][0]
    mask = torch.ones_like(program.state(name), dtype=torch.bool)
    mask.view(-1)[int(program.state(name).abs().argmin())] = False
    found = pl.Preview(program, *data).accuracy(pl.Selection(masks={name: mask}), n=50)
    assert found.change == 0
    assert found.half > 0


def test_updates_grow_and_false_stops(program: pl.Program, data: tuple[Tensor, Tensor]) -> None:
    preview, selection = pl.Preview(program, *data), half_of_everything(program)
    seen: list[Estimate] = []
    last = preview.accuracy(selection, on_update=seen.append)
    assert [e.n for e in seen] == [256, 512, 768, 1000]
    assert seen[-1] == last
    assert {e.total for e in seen} == {1000}
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(seen))
    seen.clear()

    def stop(estimate: Estimate) -> bool:
        seen.append(estimate)
        return len(seen) < 2

    stopped = preview.accuracy(selection, on_update=stop)
    assert [e.n for e in seen] == [256, 512]
    assert stopped == seen[-1]
    assert stopped.accuracy == preview.accuracy(selection, n=512).accuracy


def test_an_estimate_says_what_it_is(program: pl.Program, data: tuple[Tensor, Tensor]) -> None:
    text = str(pl.Preview(program, *data).accuracy(half_of_everything(program), n=512))
    assert "n = 512 of 1,000, float32" in text
    assert "±" in text
    assert "%" in text


# Intervals ---------------------------------------------


@given(st.integers(1, 20_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_its_equation(counts: tuple[int, int]) -> None:
    right, n = counts
    low, high = wilson(right, n)
    share = right / n
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1 and bound != share:
            # The bound is the true share at which what was seen lies exactly z standard errors away.
            assert abs(share - bound) == pytest.approx(Z * math.sqrt(bound * (1 - bound) / n), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("right", "n", "expected"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_as_published(right: int, n: int, expected: tuple[float, float]) -> None:
    """Newcombe 1998, 'Two-sided confidence intervals for the single proportion', table I, method 3."""
    assert wilson(right, n) == pytest.approx(expected, abs=5e-5)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300))
def test_paired_half_width(outcomes: list[tuple[bool, bool]]) -> None:
    now, before = (np.array(column) for column in zip(*outcomes, strict=True))
    both = sum(a and b for a, b in outcomes) + 0.5
    gained = sum(a and not b for a, b in outcomes) + 0.5
    lost = sum(b and not a for a, b in outcomes) + 0.5
    neither = sum(not a and not b for a, b in outcomes) + 0.5
    n = both + gained + lost + neither
    p, q = gained / n, lost / n
    expected = Z * math.sqrt((p + q - (p - q) ** 2) / n)
    assert paired_half_width(now, before) == pytest.approx(expected, rel=1e-12)


def test_paired_intervals_hold_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        before = random.random(300) < 0.9
        now = np.where(random.random(300) < 0.05, random.random(300) < 0.5, before)
        truth = 0.05 * (0.5 - 0.9)
        held += abs(now.mean() - before.mean() - truth) <= paired_half_width(now, before)
    assert 0.93 < held / 2000 < 0.98


# Data ---------------------------------------------


class Items(Dataset[Any]):
    """Whatever a function makes, item by item."""

    def __init__(self, length: int, make: Callable[[int], Any]) -> None:
        self.length, self.make = length, make

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if index >= self.length:
            raise IndexError
        return self.make(index)


def test_every_kind_of_labelled_data() -> None:
    images, labels = torch.randn(700, 1, 4, 4), torch.arange(700) % 10
    items = Items(700, lambda k: (images[k], int(labels[k])))
    kinds: list[Any] = [
        pl.datasets.ImageSet(images, labels, tuple("0123456789"), (0.0,), (1.0,), "made"),
        TensorDataset(images, labels), items, DataLoader(items, batch_size=33),
        DataLoader(items, batch_size=33, shuffle=False),
    ]  # fmt: skip
    for kind in kinds:
        for n in (None, 1, 300, 9_999):
            found = labelled(kind, n)
            expected = 700 if n is None else min(n, 700)
            assert torch.equal(found[0], images[:expected])
            assert torch.equal(found[1], labels[:expected])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Items(0, lambda k: k), "the loader is empty"),
        (DataLoader(Items(0, lambda k: k)), "the loader is empty"),
        (TensorDataset(torch.zeros(0, 1), torch.zeros(0)), "the set is empty"),
        (Items(3, lambda k: torch.zeros(1, 4, 4)), "Accuracy needs labels"),
        (DataLoader(Items(3, lambda k: torch.zeros(1, 4, 4))), "Accuracy needs labels"),
        (Items(3, lambda k: (torch.zeros(1, 4, 4), "shirt")), "Accuracy needs labels"),
        (Items(3, lambda k: {"image": torch.zeros(1, 4, 4), "label": 1}), "Accuracy needs labels"),
        (None, "must be a Dataset, a DataLoader or batches"),
    ],
)
def test_data_without_labels_are_refused(bad: Any, message: str) -> None:
    with pytest.raises(pl.PruneLabError, match=message):
        labelled(bad)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            torch.zeros(4, 3, 28, 28),
            torch.zeros(4, dtype=torch.int64),
            r"shape \(3, 28, 28\), but the network was traced",
        ),
        (torch.zeros(4, 1, 28, 28), torch.zeros(3, dtype=torch.int64), "one class number for each of the 4 images"),
        (torch.zeros(4, 1, 28, 28), torch.zeros(4), "one class number for each of the 4 images"),
        (torch.zeros(4, 1, 28, 28), torch.zeros(4, 10, dtype=torch.int64), "one class number for each of the 4 images"),
        (torch.zeros(0, 1, 28, 28), torch.zeros(0, dtype=torch.int64), "one class number for each of the 0 images"),
        (torch.zeros(4, 1, 28, 28).double(), torch.zeros(4, dtype=torch.int64), "images are torch.float64"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(images: Tensor, labels: Tensor, message: str) -> None:
    program = pl.trace(zoo.lenet(), torch.randn(2, 1, 28, 28))
    with pytest.raises(pl.PruneLabError, match=message):
        pl.Preview(program, images, labels)


def test_outputs_that_are_no_classes_are_refused() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(x)
            return out

    net = Network(Dense, (1, 6, 6))
    program = pl.trace(net.build(), net.images())
    preview = pl.Preview(program, net.images(4), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(pl.PruneLabError, match=r"outputs of shape \(images, classes\), not \(4, 4, 4, 4\)"):
        preview.accuracy()
