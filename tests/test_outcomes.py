"""Image by image: the predictions are the committed network's, and they add up to the preview's accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import half_of_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import prunelab as pl
from prunelab import zoo
from prunelab.datasets import class_names, displayed
from prunelab.intervals import paired_half_width
from prunelab.outcomes import Outcomes
from prunelab.repair import repair

TRAIN, TEST = pl.datasets.fashion_mnist()


@pytest.fixture(scope="module", params=["lenet", "resnet20"])
def program(request: pytest.FixtureRequest) -> pl.Program:
    return pl.trace(zoo.load(request.param), TEST.images[:2])


@pytest.fixture(scope="module")
def preview(program: pl.Program) -> pl.Preview:
    return pl.Preview(program, TEST.images[:700], TEST.labels[:700])


def test_predictions_are_the_committed_networks(program: pl.Program, preview: pl.Preview) -> None:
    selection = half_of_everything(program)
    found = preview.outcomes(selection)
    small = pl.commit(program, selection)
    with torch.no_grad():
        now, before = (
            torch.cat([m(x) for x in TEST.images[:700].split(256)]).argmax(1) for m in (small, program.model)
        )
    assert sorted(found.images.tolist()) == list(range(700))
    assert (found.n, sum(found.totals.values()), found.precision, found.changed) == (700, 700, "float32", True)
    assert np.array_equal(found.labels, TEST.labels[:700].numpy()[found.images])
    assert np.array_equal(found.before, before.numpy()[found.images])
    assert np.array_equal(found.after, now.numpy()[found.images])
    assert 0 < found.lost.sum() < 700


@pytest.mark.parametrize("n", [None, 1, 300, 10_000])
def test_they_add_up_to_the_accuracy(program: pl.Program, preview: pl.Preview, n: int | None) -> None:
    for seed in range(3):
        selection = half_of_everything(program, seed)
        found, estimate = preview.outcomes(selection, n=n), preview.accuracy(selection, n=n)
        right_before, right_now = found.before == found.labels, found.after == found.labels
        assert (right_now.mean(), right_before.mean()) == (estimate.accuracy, estimate.base)
        assert paired_half_width(right_now, right_before, 700) == estimate.half
        assert found.n == estimate.n


def test_a_repair_and_a_precision_are_those_of_the_accuracy(program: pl.Program, preview: pl.Preview) -> None:
    selection = half_of_everything(program, mask=False)
    repaired = repair(program, selection, "bias", TRAIN.images[:200])
    for precision in ("float32", "auto"):
        found = preview.outcomes(selection, repaired=repaired, precision=precision)  # type: ignore[arg-type]
        estimate = preview.accuracy(selection, repaired=repaired, precision=precision)  # type: ignore[arg-type]
        assert found.precision == estimate.precision
        assert (found.after == found.labels).mean() == estimate.accuracy


def test_per_class(program: pl.Program, preview: pl.Preview) -> None:
    found = preview.outcomes(half_of_everything(program), n=400)
    table = found.per_class()
    assert table["class"].tolist() == list(range(10))
    assert table["n"].sum() == 400
    estimate = preview.accuracy(half_of_everything(program), n=400)
    for column, value in (("before", estimate.base), ("after", estimate.accuracy), ("change", estimate.change)):
        assert (table[column] * table["n"]).sum() / 400 == pytest.approx(value, abs=1e-12)
    for row in table.itertuples():
        of_class = found.labels == row[1]
        right = [(each == found.labels)[of_class] for each in (found.after, found.before)]
        there_are = int((TEST.labels[:700] == row[1]).sum())
        assert row.half == paired_half_width(*right, there_are) > 0
        assert row.n == of_class.sum() < there_are
    # All images of the set are seen: what has changed on it is no longer uncertain.
    assert (preview.outcomes(half_of_everything(program)).per_class()["half"] == 0).all()


def test_flipped_images(program: pl.Program, preview: pl.Preview) -> None:
    found = preview.outcomes(half_of_everything(program))
    table = found.flipped()
    assert table["flip"].value_counts().to_dict() == {"lost": found.lost.sum(), "gained": found.gained.sum()}
    # What was lost comes first, and within that the images' order.
    assert table["flip"].is_monotonic_decreasing
    for word, part in table.groupby("flip"):
        assert part["image"].is_monotonic_increasing
        wrong, right = ("after", "before") if word == "lost" else ("before", "after")
        assert (part[right] == part["label"]).all()
        assert (part[wrong] != part["label"]).all()
        assert (TEST.labels[part["image"].tolist()].numpy() == part["label"]).all()


def test_nothing_removed_nothing_changed(preview: pl.Preview) -> None:
    found = preview.outcomes()
    assert np.array_equal(found.before, found.after)
    assert found.flipped().empty
    assert list(found.flipped().columns) == ["image", "label", "before", "after", "flip"]
    assert (found.per_class()[["change", "half"]] == 0).all(axis=None)


def test_by_hand() -> None:
    def ints(*values: int) -> Any:
        return np.array(values, np.int64)

    found = Outcomes(
        images=ints(7, 3, 5, 1, 9),
        labels=ints(0, 0, 2, 2, 2),
        before=ints(0, 0, 2, 0, 1),
        after=ints(1, 0, 0, 2, 0),
        totals={0: 2, 2: 18},
        precision="float32",
        names=("cat", "dog"),
    )
    assert found.flipped().to_dict("records") == [
        {"image": 5, "label": 2, "before": 2, "after": 0, "flip": "lost"},
        {"image": 7, "label": 0, "before": 0, "after": 1, "flip": "lost"},
        {"image": 1, "label": 2, "before": 0, "after": 2, "flip": "gained"},
    ]
    table = found.per_class()
    assert table["name"].tolist() == ["cat", "2"]
    assert table["change"].tolist() == [-0.5, 0.0]
    # Both images of class 0 are seen, and 3 of the 18 of class 2: one flip each way, and one more each way added.
    half = 1.959963984540054 * np.sqrt(4) / 3 * np.sqrt(15 / 17) + 0.5 / 18
    assert table["half"].tolist() == pytest.approx([0.0, half], rel=1e-12)
    assert str(found) == (
        "2 images are wrong now that were right, 1 right that were wrong: 60.00% → 40.00% (n = 5 of 20, float32)"
    )


def test_it_can_be_stopped_and_what_is_known_serves_again(program: pl.Program) -> None:
    preview = pl.Preview(program, TEST.images[:700], TEST.labels[:700])
    with pytest.raises(pl.Stopped):
        preview.outcomes(half_of_everything(program), progress=lambda done, total, what: False)
    again = preview.outcomes(half_of_everything(program))
    assert np.array_equal(
        again.after,
        pl.Preview(program, TEST.images[:700], TEST.labels[:700]).outcomes(half_of_everything(program)).after,
    )


def test_what_is_no_classifier_is_told_so(program: pl.Program) -> None:
    def negative_error(outputs: Tensor, wanted: Tensor) -> Tensor:
        return -(outputs - wanted).square().mean(1)

    preview = pl.Preview(program, TEST.images[:50], torch.randn(50, 10), score=negative_error)
    with pytest.raises(pl.PruneLabError, match=r"one class number per image, not labels of shape \(50, 10\)"):
        preview.outcomes()
    torch.manual_seed(0)
    maps = pl.trace(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)).eval(), TEST.images[:2])
    with pytest.raises(pl.PruneLabError, match=r"outputs of shape \(images, classes\), not \(50, 2, 24, 24\)"):
        pl.Preview(maps, TEST.images[:50], TEST.labels[:50], score=lambda o, t: o.mean((1, 2, 3))).outcomes()


# Names and images for display ---------------------------------------------


def test_class_names_are_found_under_loaders_and_subsets() -> None:
    loader = DataLoader(Subset(TEST, range(10)), batch_size=2)
    assert class_names(TEST) == class_names(loader) == TEST.classes
    assert class_names(TensorDataset(torch.zeros(2, 1), torch.zeros(2))) == ()


def test_images_are_shown_as_they_were_before_they_were_normalised() -> None:
    image = TEST.images[3]
    raw = (image * TEST.std[0] + TEST.mean[0]).permute(1, 2, 0)
    for data in (TEST, DataLoader(TEST), Subset(TEST, range(10))):
        assert torch.allclose(displayed(image, data), raw.clamp(0, 1), atol=1e-7)
    assert torch.equal(TEST.pixels(3), displayed(image, TEST))
    stretched = displayed(image)
    assert (stretched.min(), stretched.max()) == (0, 1)
    assert torch.isfinite(displayed(torch.zeros(1, 4, 4))).all()
