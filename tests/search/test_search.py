"""The best plan grants the wish, wins against one ratio on images that it was not chosen by, and says the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

import prunelab as pl
from prunelab import search, zoo
from prunelab.repair import Repairer
from prunelab.search import Tried
from prunelab.search.meter import Meter, quickly

TRAIN, TEST = pl.datasets.fashion_mnist()
IMAGES, LABELS = TEST.images[:1000], TEST.labels[:1000]
OTHERS = slice(5000, 7000)


@pytest.fixture(scope="module")
def program() -> pl.Program:
    return pl.trace(zoo.load("lenet"), IMAGES[:2])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[pl.Selection]:
    """Every selection that is run rather than read from disk."""
    found: list[pl.Selection] = []
    run = Meter._measured

    def counting(self: Meter, selection: pl.Selection, masked: pl.Selection) -> object:
        found.append(selection)
        return run(self, selection, masked)

    monkeypatch.setattr(Meter, "_measured", counting)
    return found


def best(program: pl.Program, **wish: object) -> pl.Best:
    """A quick search that leaves nothing behind."""
    given = {"n": 128, "cache": False, "progress": False, "repair_images": TRAIN.images[:256], **wish}
    return pl.best_plan(program, None, IMAGES, LABELS, **given)  # type: ignore[arg-type]


def stop_after(hundredths: int) -> Callable[[int, int | None, str], bool]:
    return lambda done, total, what: done < hundredths


# What is asked ---------------------------------------------


@pytest.mark.parametrize(
    "wish", [{"flops": 0.7}, {"flops": 0.35}, {"params": 0.3}, {"flops": 0.8, "params": 0.4}], ids=str
)
def test_the_network_is_within_the_budget_exactly(program: pl.Program, wish: dict[str, float]) -> None:
    found = best(program, **wish)
    dense, left = pl.cost(program), pl.cost(program, found.plan.resolve(program))
    assert (found.found.flops, found.found.params) == (left.flops, left.params)
    assert left.flops <= wish.get("flops", 1.0) * dense.flops
    assert left.params <= wish.get("params", 1.0) * dense.params
    # What the budget allows is used: the last step of one layer would be enough.
    assert left.flops > 0.9 * wish.get("flops", 0) * dense.flops or "params" in wish


def test_a_drop_holds_with_its_interval_or_only_on_these_images(program: pl.Program) -> None:
    sure = best(program, drop=0.02)
    assert sure.found.change - sure.found.half >= -0.02
    here = best(program, drop=0.02, certain=False)
    assert here.found.change >= -0.02
    assert here.found.flops < sure.found.flops < sure.flops
    # Another way to count: the paired outcomes of the committed network.
    with torch.no_grad():
        was, now = (
            model(IMAGES).argmax(1) == LABELS
            for model in (program.model, pl.commit(program, here.plan.resolve(program)))
        )
    assert here.found.change == pytest.approx(float(now.double().mean() - was.double().mean()), abs=0.003)


def test_locked_settings_and_bypassed_units_stay() -> None:
    program = pl.trace(zoo.load("resnet20"), IMAGES[:2])
    start = (
        pl.Plan(multiple=4)
        .set("layer1.0.conv1", ratio=0.5, locked=True)
        .set("layer2.0.conv1", locked=True)
        .set("layer3.0.conv1", ratio=0.9)
        .bypass("layer1.1")
    )
    found = best(program, flops=0.8, start=start, n=32, n_found=100)
    assert found.plan.settings["layer1.0.conv1"] == start.settings["layer1.0.conv1"]
    assert found.plan.settings["layer2.0.conv1"] == start.settings["layer2.0.conv1"]
    assert (found.plan.bypassed, found.plan.multiple) == (("layer1.1",), 4)
    widths = [len(kept) for kept in found.plan.resolve(program).kept.values()]
    assert widths
    assert all(width % 4 == 0 for width in widths)
    assert found.found.flops <= 0.8 * pl.cost(program).flops


def test_only_the_layers_named_are_cut_and_no_further_than_their_limit(program: pl.Program) -> None:
    found = best(program, params=0.4, layers=["conv2", "fc1"], limits={"fc1": 0.35})
    assert found.plan.settings.keys() <= {"conv2", "fc1"}
    assert found.plan.settings["fc1"].ratio == 0.35
    assert all(step.ratio <= 0.35 for step in found.steps if step.layer == "fc1")


def test_nothing_is_cut_where_the_wish_is_granted_already(program: pl.Program) -> None:
    found = best(program, flops=1.0)
    assert (dict(found.plan.settings), found.steps) == ({}, ())
    assert (found.found.change, found.found.loss) == (0.0, 0.0)


# It wins ---------------------------------------------


@pytest.mark.parametrize(("name", "flops"), [("lenet", 0.5), ("vgg_small", 0.6), ("resnet20", 0.7)])
def test_it_beats_one_ratio_on_images_that_it_was_not_chosen_by(name: str, flops: float) -> None:
    program = pl.trace(zoo.load(name), IMAGES[:2])
    found = best(program, flops=flops, n=64, n_found=256)
    assert found.uniform is not None
    preview = pl.Preview(program, TEST.images[OTHERS], TEST.labels[OTHERS])
    ours, theirs = (preview.accuracy(t.plan.resolve(program)).accuracy for t in (found.found, found.uniform))
    assert ours > theirs + 0.05


def redundant() -> tuple[pl.Program, torch.Tensor, torch.Tensor]:
    """A network whose first layer has four filters, each of them in four sizes; noise, and what it calls it."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 8))
    with torch.no_grad():
        for part in (first.weight, first.bias):
            part.copy_(torch.cat([part[:4] * scale for scale in (1.0, 1.5, 0.5, 2.0)]))
        model[6].weight.mul_(20)
        images = torch.randn(1500, 3, 8, 8)
        labels = model(images).argmax(1)
    return pl.trace(model, images[:2]), images, labels


def best_repaired(
    program: pl.Program, images: torch.Tensor, labels: torch.Tensor, cache: Path | bool = False, **wish: float
) -> pl.Best:
    given = {"repair": "least-squares", "repair_images": images[500:1000], "cache": cache, "progress": False, **wish}
    return pl.best_plan(program, None, images[:500], labels[:500], n=128, **given)  # type: ignore[arg-type]


def test_searches_that_repair_in_different_ways_do_not_take_what_the_other_has_kept(tmp_path: Path) -> None:
    program, images, labels = redundant()
    wishes = [{"drop": 0.05}, {"flops": 0.5}, {"drop": 0.05}]
    kept = [best_repaired(program, images, labels, tmp_path, **wish) for wish in wishes]
    assert kept == [best_repaired(program, images, labels, **wish) for wish in wishes]


def test_by_itself_a_layer_too_wide_for_the_quick_form_is_repaired_all_the_same() -> None:
    program = pl.trace(zoo.load("vgg_small"), IMAGES[:2])
    repairer = Repairer(program, TRAIN.images[:64])
    for layer, quick in {"stage3.conv1": False, "stage2.conv1": True}.items():
        cut = pl.Plan("l1").set(layer, ratio=0.5).resolve(program)
        # 128 inputs of 3×3 weights for one output of the next layer; the others have half as many or fewer.
        assert bool(repairer.quick(cut, "least-squares")) is quick
        assert quickly(repairer, cut, "least-squares")


def test_what_is_done_of_the_work_never_falls(program: pl.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    counted = search._hundredths

    def noted(given: Iterator[float]) -> Iterator[int]:
        return counted(shares.append(share) or share for share in given)

    monkeypatch.setattr(search, "_hundredths", noted)
    for repair in ("none", "least-squares"):
        shares.clear()
        pl.best_plan(
            program, None, IMAGES, LABELS, flops=0.5, criterion="l1", repair=repair, repair_images=TRAIN.images[:256],
            n=200, cache=False, progress=False,
        )  # fmt: skip
        assert shares == sorted(shares)
        assert 0 < shares[0] < 0.6 < shares[-1] <= 1


@pytest.mark.parametrize("wish", [{"flops": 0.5}, {"drop": 0.05}], ids=str)
def test_with_a_repair_it_cuts_the_layer_whose_channels_follow_from_others(wish: dict[str, float]) -> None:
    program, images, labels = redundant()
    found = best_repaired(program, images, labels, **wish)
    ratios = {name: setting.ratio or 0.0 for name, setting in found.plan.settings.items()}
    # A quarter of the first layer says it all; the second has nothing to spare. Half of the FLOPs are more than half of
    # the first layer, and which step of equal accuracy it ends with is the arithmetic's.
    assert 0.5 < ratios["0"] <= 0.75
    assert ratios.get("2", 0.0) < 0.2
    preview, repairer = pl.Preview(program, images[1000:], labels[1000:]), Repairer(program, images[500:1000])
    accuracies = []
    for tried in (found.found, found.uniform):
        assert tried is not None
        selection = tried.plan.resolve(program)
        accuracies.append(preview.accuracy(selection, repaired=repairer(selection, "least-squares")).accuracy)
    if "flops" in wish:
        assert accuracies[0] > accuracies[1] + 0.05
    else:
        assert found.uniform is not None
        assert found.found.flops < 0.8 * found.uniform.flops


@pytest.mark.parametrize("repair", ["none", "least-squares"])
@pytest.mark.parametrize("flops", [0.9, 0.3])
def test_it_is_never_worse_than_one_ratio_on_the_images_that_it_was_chosen_by(
    program: pl.Program, repair: str, flops: float
) -> None:
    found = best(program, flops=flops, repair=repair)
    assert found.uniform is not None
    assert found.found.accuracy >= found.uniform.accuracy


def test_any_criterion_can_lead_it(program: pl.Program) -> None:
    plans = {name: best(program, flops=0.5, criterion=name, seed=3) for name in ("l1", "random", "geometric_median")}
    for name, found in plans.items():
        assert (found.plan.criterion, found.plan.seed) == (name, 3)
    assert plans["random"].found.accuracy != plans["l1"].found.accuracy


# Numbers ---------------------------------------------


def test_what_it_says_is_what_the_committed_network_does(program: pl.Program) -> None:
    found = best(program, flops=0.6, precision="float32")
    small = pl.commit(program, found.plan.resolve(program))
    with torch.no_grad():
        before, now = program.model(IMAGES).double(), small(IMAGES).double()
    assert found.found.accuracy == float((now.argmax(1) == LABELS).double().mean())
    assert found.base == float((before.argmax(1) == LABELS).double().mean())
    # KL(p ‖ q) as cross-entropy less entropy, in place of the difference of logarithms.
    p, q = before.softmax(1), now.softmax(1)
    divergence = float((-(p * q.log()).sum(1) + (p * p.log()).sum(1)).mean())
    assert found.found.loss == pytest.approx(divergence, rel=1e-4)


def test_with_a_repair_the_repaired_network_is_measured(program: pl.Program) -> None:
    found = best(program, flops=0.4, repair="least-squares")
    selection = found.plan.resolve(program)
    repaired = Repairer(program, TRAIN.images[:256])(selection, "least-squares")
    preview = pl.Preview(program, IMAGES, LABELS)
    assert found.found.accuracy == preview.accuracy(selection, repaired=repaired, precision="auto").accuracy
    assert found.found.accuracy > preview.accuracy(selection, precision="auto").accuracy + 0.1
    assert found.plan.repair == "least-squares"


def test_steps_go_from_the_whole_network_to_the_plan(program: pl.Program) -> None:
    told: list[Tried] = []
    found = best(program, flops=0.5, on_step=told.append)
    assert tuple(told) == found.steps
    # Each step's cost is that of its own plan, and the last one is the plan found.
    for step in found.steps:
        assert step.flops == pl.cost(program, step.plan.resolve(program)).flops
    assert found.steps[-1].plan == found.plan
    frame = found.frame()
    assert list(frame["layer"]) == [step.layer for step in found.steps]
    assert set(frame["n"]) == {128}


def test_the_same_search_gives_the_same_plan_and_remembers(
    program: pl.Program, tmp_path: Path, measured: list[pl.Selection]
) -> None:
    first = best(program, flops=0.6, cache=tmp_path)
    once = len(measured)
    again = best(program, flops=0.6, cache=tmp_path)
    assert len(measured) == once > 10
    assert again == first == best(program, flops=0.6)


def test_a_stopped_search_goes_on_where_it_was(
    program: pl.Program, tmp_path: Path, measured: list[pl.Selection]
) -> None:
    with pytest.raises(pl.Stopped):
        best(program, flops=0.5, cache=tmp_path, progress=stop_after(30))
    stopped = len(measured)
    whole = best(program, flops=0.5, cache=tmp_path)
    assert 0 < stopped < len(measured)
    digests = [selection.digest for selection in measured]
    # The network chosen is measured twice: on few images, and on all.
    assert len(digests) - len(set(digests)) <= 6
    assert whole == best(program, flops=0.5)


@pytest.mark.parametrize("repair", ["none", "least-squares"])
def test_a_search_hears_a_stop_before_every_measurement(
    program: pl.Program, measured: list[pl.Selection], repair: str
) -> None:
    heard: list[int] = []

    def progress(done: int, total: int | None, what: str) -> bool:
        heard.append(len(measured))
        return len(measured) < 40

    with pytest.raises(pl.Stopped, match="best plan"):
        best(program, flops=0.5, repair=repair, progress=progress)
    assert len(measured) == 40
    assert set(heard) == set(range(41))


def test_the_network_is_not_touched(program: pl.Program) -> None:
    before = {name: tensor.clone() for name, tensor in program.model.state_dict().items()}
    best(program, flops=0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in program.model.state_dict().items())
    assert not program.model.training


# What cannot be had ---------------------------------------------


@pytest.mark.parametrize("value", [0, -0.5, 1.5, math.nan, math.inf, True, "half"])
@pytest.mark.parametrize("name", ["flops", "params", "drop"])
def test_a_wish_that_is_no_share_is_refused(program: pl.Program, name: str, value: object) -> None:
    with pytest.raises(pl.PruneLabError, match=f"{name} is the .* above 0 and up to 1, not"):
        best(program, **{name: value})


def test_what_cannot_be_reached_is_refused_with_what_can(program: pl.Program) -> None:
    with pytest.raises(pl.PruneLabError, match=r"needs a wish, for example flops=0\.5"):
        best(program)
    start = pl.Plan().set("conv1", ratio=0.0, locked=True)
    with pytest.raises(pl.PruneLabError, match=r"FLOPs cannot come down to 1 % .* 16\.\d+ % is left"):
        best(program, flops=0.01, start=start)
    with pytest.raises(pl.PruneLabError, match=r"drop ≤ 0.1 points changes accuracy by -\d+"):
        best(program, flops=0.3, drop=0.001)
    with pytest.raises(pl.PruneLabError, match=r"Even the first step .* points on 60 images"):
        best(program, drop=0.005, n_found=60)
    with pytest.raises(pl.PruneLabError, match="'fc2' is pinned or locked"):
        best(program, flops=0.5, layers=["fc2"])
    with pytest.raises(pl.PruneLabError, match="'conv7'"):
        best(program, flops=0.5, layers=["conv7"])
    everything = replace(start.set("conv2", locked=True).set("fc1", locked=True))
    with pytest.raises(pl.PruneLabError, match="nothing to plan"):
        best(program, flops=0.5, start=everything)
    with pytest.raises(pl.PruneLabError, match="at least one image"):
        best(program, flops=0.5, n=0)
    with pytest.raises(pl.PruneLabError, match="needs images"):
        best(program, flops=0.5, repair="bias", repair_images=None)


# Showing ---------------------------------------------


@pytest.mark.parametrize("wish", [{"flops": 0.6}, {"drop": 0.03}, {"flops": 1.0}], ids=str)
def test_the_picture_holds_all_that_was_measured(program: pl.Program, wish: dict[str, float]) -> None:
    found = best(program, **wish)
    for dark in (False, True):
        figure = found.figure(dark)
        FigureCanvasAgg(figure).draw()
        lines = {line.get_label().partition(" (")[0]: line for line in figure.axes[0].get_lines()}
        steps = lines["steps of the search"].get_xdata()
        assert list(steps[1:]) == [100 * step.flops / found.flops for step in found.steps]
        assert len(lines["one ratio for all layers"].get_xdata()) == len(found.uniforms) + 1
    assert found._repr_png_().startswith(b"\x89PNG")
    assert str(found.wish) in repr(found)
    assert f"{found.found.accuracy:.2%}" in repr(found)
