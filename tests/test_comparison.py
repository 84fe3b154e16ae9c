"""Comparing criteria: correlations by hand, points equal to what the preview says, stopped and taken up, and drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from support import Network

import prunelab as pl
from prunelab import zoo
from prunelab.comparison import spearman
from prunelab.picture import png

NETWORK = Network(lambda: zoo.LeNet((6, 8, 10)), (1, 28, 28))
IMAGES, LABELS = NETWORK.images(60, torch.float32), torch.arange(60) % 10


@pytest.fixture(scope="module")
def program() -> pl.Program:
    return pl.trace(NETWORK.build(torch.float32), IMAGES[:2])


@pytest.fixture(scope="module")
def profile(program: pl.Program) -> pl.Profile:
    return pl.profile(program, IMAGES, cache=False, progress=False)


def compared(program: pl.Program, profile: pl.Profile | None, **settings: object) -> pl.Comparison:
    given: dict[str, object] = {"cache": False, "progress": False, "ratios": (0.5, 0.25), **settings}
    return pl.compare(program, profile, IMAGES, LABELS, **given)  # type: ignore[arg-type]  # as given


def test_rank_correlation_by_hand() -> None:
    a = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert spearman(a, a**3) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    # 1 − 6·Σd²/(n(n²−1)) with d = (1, −1, 0, 0, 0).
    assert spearman(a, np.array([2.0, 1.0, 3.0, 4.0, 5.0])) == pytest.approx(0.9)
    assert spearman(a, np.ones(5)) == 0
    some, other = np.random.default_rng(0).integers(0, 5, (2, 40)).astype(float)
    assert spearman(some, other) == pytest.approx(pd.Series(some).rank().corr(pd.Series(other).rank()))


def test_every_point_is_what_the_preview_says(program: pl.Program, profile: pl.Profile) -> None:
    found = compared(program, profile, criteria=("l1", "apoz"), layer="conv2", precision="float32")
    preview = pl.Preview(program, IMAGES, LABELS)
    assert len(found.points) == 8
    for point in found.points:
        plan = pl.Plan(point.criterion)
        for layer in ("conv1", "conv2", "fc1") if point.where == "network" else ("conv2",):
            plan = plan.set(layer, ratio=point.ratio)
        selection = plan.resolve(program, profile)
        estimate = preview.accuracy(selection)
        assert (point.accuracy, point.change, point.n) == (estimate.accuracy, estimate.change, 60)
        assert (point.params, point.flops) == (pl.cost(program, selection).params, pl.cost(program, selection).flops)
    assert [p.ratio for p in found.of("l1", "layer")] == [0.25, 0.5]
    with pytest.raises(pl.PruneLabError, match="'l2'"):
        found.of("l2")


def test_those_that_the_profile_allows_are_compared_unless_told(program: pl.Program, profile: pl.Profile) -> None:
    weights = compared(program, None, ratios=(0.5,)).criteria
    assert set(weights) == {"l1", "l2", "bn_scale", "random", "geometric_median", "propagated"}
    assert "taylor" not in compared(program, profile, ratios=(0.5,)).criteria
    with pytest.raises(pl.PruneLabError, match="run with_gradients"):
        compared(program, profile, criteria=("taylor",))


def test_correlations_are_those_of_the_layer_and_the_mean_of_all(program: pl.Program) -> None:
    found = compared(program, None, criteria=("l1", "l2"), layer="conv1")
    weights = [
        program.model.get_parameter(f"{n}.weight").detach().flatten(1).double() for n in ("conv1", "conv2", "fc1")
    ]
    each = [spearman(w.norm(1, 1).numpy(), w.norm(2, 1).numpy()) for w in weights]
    assert found.correlations("layer").loc["l1", "l2"] == pytest.approx(each[0])
    assert found.correlations().loc["l2", "l1"] == pytest.approx(np.mean(each))
    assert found.correlations().loc["l1", "l1"] == 1


def test_stopped_it_goes_on_where_it_was(program: pl.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[pl.Comparison] = []
    with pytest.raises(pl.Stopped):
        compared(program, None, cache=tmp_path, on_point=seen.append, progress=lambda done, *_: done < 5)
    assert len(seen[-1].points) == 5
    ran: list[pl.Selection] = []
    plain = pl.Preview.accuracy

    def counted(self: pl.Preview, selection: pl.Selection, **settings: object) -> pl.Estimate:
        ran.append(selection)
        return plain(self, selection, **settings)  # type: ignore[arg-type]  # as given

    monkeypatch.setattr(pl.Preview, "accuracy", counted)
    whole = compared(program, None, cache=tmp_path)
    # The unpruned network, and what five points have not measured; points may cut the same channels.
    assert len(ran) <= 1 + len(whole.points) - 5
    assert whole.points[:5] == seen[-1].points
    ran.clear()
    assert compared(program, None, cache=tmp_path) == whole
    assert len(ran) == 1


def test_as_a_table_and_as_a_picture(program: pl.Program, profile: pl.Profile) -> None:
    found = compared(program, profile)
    frame = found.frame()
    assert len(frame) == 2 * 2 * len(found.criteria)
    assert {"criterion", "where", "ratio", "accuracy", "flops"} <= set(frame.columns)
    assert "60 of" not in repr(found)
    pictures = [png(found.figure(dark)) for dark in (False, True)]
    assert pictures[0] != pictures[1]
    assert all(len(picture) > 30_000 for picture in pictures)


def test_what_cannot_be_compared_is_said(program: pl.Program) -> None:
    with pytest.raises(pl.PruneLabError, match="'fc2' cannot be pruned"):
        compared(program, None, layer="fc2")
    with pytest.raises(pl.PruneLabError, match="at least one image and one ratio"):
        compared(program, None, ratios=())
    with pytest.raises(pl.PruneLabError, match="must lie in 0 to 1"):
        compared(program, None, ratios=(1.5,))
    with pytest.raises(pl.PruneLabError, match="no criterion"):
        compared(program, None, criteria=("l3",))
