"""The preview's numbers: the committed module's accuracy exactly, and intervals against independent formulas."""

from __future__ import annotations

import copy
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support import Network, half_of_everything, relative
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import prunelab as pl
from prunelab import zoo
from prunelab.explorer.worker import Worker
from prunelab.intervals import half_width, paired_half_width
from prunelab.preview import Estimate, has_bfloat16, labelled, settled
from prunelab.program.cache import Cache
from prunelab.program.run import bind


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
    assert found.half == 0
    first = preview.accuracy(selection, n=300)
    seen = preview._order[:300].numpy()
    assert first.half == paired_half_width(now[seen], base[seen], 1000)
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


# Precision, memory and scores ---------------------------------------------


@pytest.mark.parametrize("name", ["lenet", "vgg_small", "resnet20"])
def test_bfloat16_gives_the_same_predictions(name: str, data: tuple[Tensor, Tensor]) -> None:
    images, labels = data
    program = pl.trace(zoo.load(name), images[:2])
    preview = pl.Preview(program, images, labels)
    fast, layer = preview._side("bfloat16").engine, program.layers[0]
    narrow = pl.Selection({layer.name: tuple(range(layer.channels // 2))})
    for selection in (pl.DENSE, narrow, half_of_everything(program, mask=False)):
        exact, agree = bind(program, selection), 0
        for k, part in enumerate(images.split(250)):
            outputs = fast(fast.prepare(selection, {}), (part,), k)
            before = outputs.clone()
            agree += int((settled(outputs, part, exact).argmax(1) == exact(part).argmax(1)).sum())
            # What lies in memory for the next selection is left alone.
            assert torch.equal(outputs, before)
        assert agree >= 0.995 * len(images)
    found = list(preview.estimates(narrow, precision="bfloat16"))
    assert [e.precision for e in found] == ["bfloat16"] * 4
    assert found[-1].accuracy == pytest.approx(preview.accuracy(narrow).accuracy, abs=0.005)


def test_the_closest_decisions_are_taken_again_exactly(data: tuple[Tensor, Tensor]) -> None:
    images = data[0][:130]
    exact = bind(pl.trace(zoo.load("lenet"), images[:2]))
    right = exact(images)
    # Outputs without any difference between classes but for the images that are far from a tie.
    coarse = right.clone()
    ties = [5, 70, 129]
    coarse[ties] = 0.0
    found = settled(coarse, images, exact)
    assert relative(found, right) < 1e-5
    assert not coarse[ties].any()


def test_auto_says_what_it_took(program: pl.Program, data: tuple[Tensor, Tensor]) -> None:
    found = next(pl.Preview(program, *data).estimates())
    assert found.precision == ("bfloat16" if has_bfloat16(program) else "float32")
    double = pl.trace(copy.deepcopy(program.model).double(), data[0][:2].double())
    assert next(pl.Preview(double, data[0].double(), data[1]).estimates()).precision == "float64"


class Loud(nn.Module):
    """What bfloat16 cannot hold: a small difference of large numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) + 1000) - 1000


def test_a_network_that_bfloat16_is_too_coarse_for_stays_in_float32(data: tuple[Tensor, Tensor]) -> None:
    preview = pl.Preview(pl.trace(Loud(), data[0][:2]), *data)
    assert next(preview.estimates()).precision == "float32"
    with pytest.raises(pl.PruneLabError, match="cannot run in bfloat16: its outputs differ by"):
        next(preview.estimates(precision="bfloat16"))
    with pytest.raises(pl.PruneLabError, match="no precision 'float8'"):
        next(preview.estimates(precision="float8"))  # type: ignore[arg-type]


def test_an_estimate_ends_where_its_interval_is_narrow_enough(program: pl.Program, data: tuple[Tensor, Tensor]) -> None:
    preview, selection = pl.Preview(program, *data), half_of_everything(program)
    halves = [e.half for e in preview.estimates(selection)]
    assert len(halves) == 4
    assert [e.half for e in preview.estimates(selection, half=halves[1])] == halves[:2]
    assert [e.half for e in preview.estimates(selection, half=1.0)] == halves[:1]


def test_images_come_in_a_random_order(data: tuple[Tensor, Tensor]) -> None:
    images, order = data[0], data[1].argsort()
    program = pl.trace(zoo.load("lenet"), images[:2])
    first = pl.Preview(program, images[order], data[1][order]).accuracy(n=256)
    # Sorted by class, the first quarter would be three classes, easy ones or hard ones.
    assert first.low < pl.Preview(program, images, data[1]).accuracy().accuracy < first.high


def test_a_network_that_was_trained_meanwhile_is_measured_anew(data: tuple[Tensor, Tensor]) -> None:
    program = pl.trace(copy.deepcopy(zoo.load("lenet")), data[0][:2])
    preview = pl.Preview(program, *data)
    before = preview.accuracy()
    with torch.no_grad():
        next(program.model.parameters()).zero_()
    after = preview.accuracy()
    assert before.accuracy > after.accuracy == after.base == pl.Preview(program, *data).accuracy().accuracy


def test_a_score_of_the_users(program: pl.Program, data: tuple[Tensor, Tensor]) -> None:
    images, labels = data

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, labels, reduction="none")

    selection = half_of_everything(program)
    found = pl.Preview(program, images, labels, score=loss).accuracy(selection)
    preview = pl.Preview(program, images, labels)
    now, before = (loss(preview.logits(chosen), labels).double().numpy() for chosen in (selection, pl.DENSE))
    assert found.accuracy == pytest.approx(now.mean(), rel=1e-5)
    assert found.change == pytest.approx(now.mean() - before.mean(), rel=1e-4)
    part = pl.Preview(program, images, labels, score=loss).accuracy(selection, n=300)
    seen = preview._order[:300].numpy()
    assert part.half == pytest.approx(half_width((now - before)[seen], 1000), rel=1e-4)
    with pytest.raises(pl.PruneLabError, match="one number per image"):
        pl.Preview(program, images, labels, score=lambda outputs, labels: outputs.mean()).accuracy()


def test_ten_thousand_requests_leave_the_last_ones_answer(data: tuple[Tensor, Tensor]) -> None:
    images, labels = data
    program = pl.trace(zoo.load("lenet"), images[:2])
    memory, errors, shown = Cache(2**22), [], []
    preview = pl.Preview(program, images, labels, memory=memory)
    worker = Worker(errors.append)
    layer = program.layers[0]
    selections = [pl.Selection({layer.name: tuple(range(k + 1))}) for k in range(layer.channels)]

    def request(selection: pl.Selection) -> Callable[[Callable[[], bool]], None]:
        def work(wanted: Callable[[], bool]) -> None:
            found = preview.accuracy(selection, on_update=lambda _: wanted(), precision="auto")
            shown.append((found, selection))

        return work

    threads = threading.active_count()
    for k in range(10_000):
        worker.latest(request(selections[k % len(selections)]))
        if k % 1_000 == 0:
            time.sleep(0.02)
    assert worker.drain(60)
    assert not errors
    assert threading.active_count() <= threads + 1
    assert 0 < memory.held <= memory.budget
    last, selection = shown[-1]
    assert (last.n, selection) == (1000, selections[9_999 % len(selections)])
    afresh = pl.Preview(program, images, labels, memory=Cache(2**22))
    assert last.accuracy == afresh.accuracy(selection, precision="auto").accuracy


def test_two_threads_at_once_get_what_each_would_get_alone(program: pl.Program, data: tuple[Tensor, Tensor]) -> None:
    preview = pl.Preview(program, *data, memory=Cache(2**23))
    selections = [half_of_everything(program, seed) for seed in range(4)]
    alone = [pl.Preview(program, *data).accuracy(selection) for selection in selections]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(preview.accuracy, selections * 3))
    assert [(e.accuracy, e.base, e.half) for e in together] == [(e.accuracy, e.base, e.half) for e in alone] * 3


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
