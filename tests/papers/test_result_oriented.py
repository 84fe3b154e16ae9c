"""Result-oriented pruning: the decision follows the score and reaches the result, and the reproduction is fair."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import prunelab as pl
from prunelab import datasets, zoo
from prunelab.criteria.measuring import profile_for
from prunelab.criteria.registry import scores
from prunelab.datasets import ImageSet
from prunelab.papers import result_oriented as module
from prunelab.papers.evidence import Measure, Run
from prunelab.papers.experiments import resnet56_cifar
from prunelab.papers.experiments.five_methods_figure import draw
from prunelab.papers.reproduce import Task, reproduce
from prunelab.papers.result_oriented import Decided, result_oriented
from prunelab.progress import Stopped


@pytest.fixture(scope="module")
def data() -> tuple[ImageSet, ImageSet]:
    train, test = datasets.fashion_mnist()
    return train.subset(600), test.subset(400)


def decided(data: tuple[ImageSet, ImageSet], **settings: object) -> tuple[torch.nn.Module, Decided]:
    given = {"n": 100, "epochs": 0, "progress": False, **settings}
    return result_oriented(zoo.load("lenet"), *data, **given)  # type: ignore[arg-type]  # by name, of several types


def test_half_of_the_flops_is_reached_by_removing_what_scores_least(data: tuple[ImageSet, ImageSet]) -> None:
    model = zoo.load("lenet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small, found = result_oriented(model, *data, flops=0.5, n=100, repair="none", epochs=0, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    program = pl.trace(model, data[1].images[:2])
    assert pl.cost(pl.trace(small, data[1].images[:2])).flops <= 0.5 * pl.cost(program).flops
    assert found.table is None
    profile = profile_for(program, data[0], found.best.plan.criterion, progress=False)
    kept = found.best.plan.resolve(program, profile).kept
    assert kept
    for name, channels in kept.items():
        score = scores(program, profile, "result_oriented", program.layer(name))
        gone = sorted(set(range(len(score))) - set(channels))
        assert max(score[gone]) <= min(score[list(channels)])


def test_every_step_of_the_decision_is_a_plan_for_the_explorer(data: tuple[ImageSet, ImageSet]) -> None:
    _, found = decided(data, flops=0.6, repair="none")
    assert {step.plan.criterion for step in found.best.steps} == {"result_oriented"}
    lab = pl.Lab(zoo.load("lenet"), *data)
    lab.use(found.best.plan)
    assert lab.cost().flops == found.best.found.flops
    lab.set("conv1", ratio=0.0)
    assert lab.cost().flops > found.best.found.flops


def test_a_loss_that_is_borne_is_kept_to(data: tuple[ImageSet, ImageSet]) -> None:
    small, found = decided(data, drop=0.02)
    images, labels = data[1].images, data[1].labels
    with torch.no_grad():
        right = [(net(images).argmax(1) == labels).double().mean() for net in (zoo.load("lenet").eval(), small.eval())]
    assert found.best.found.flops < found.best.flops
    assert right[1] >= right[0] - 0.02 - 1e-9


def test_fine_tuning_follows_the_decision(data: tuple[ImageSet, ImageSet]) -> None:
    small, found = decided(data, flops=0.3, repair="none", epochs=1, lr=0.02)
    assert found.table is not None
    assert list(found.table.index) == [0, 1]
    assert found.table.accuracy.max() > found.table.accuracy[0]
    assert pl.cost(pl.trace(small, data[1].images[:2])).flops == found.best.found.flops


def test_settings_are_told_before_the_search_and_a_stop_of_fine_tuning_is_heard(
    data: tuple[ImageSet, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    searches: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(module, "best_plan", lambda *args, **settings: searches.append("began"))
        with pytest.raises(pl.PruneLabError, match="no setting 'epoch'"):
            decided(data, flops=0.5, epoch=3)
    assert searches == []
    with pytest.raises(Stopped):
        decided(data, flops=0.3, repair="none", epochs=2, progress=lambda done, total, what: "epoch" not in what)


# The reproduction ---------------------------------------------


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    (chosen,) = resnet56_cifar.REPRODUCTIONS
    reproduce(chosen, Path(), seeds=1, out=out, short=True, say=lambda line: None)
    return out / chosen.name


def test_all_methods_are_measured_at_equal_cost(short: Path) -> None:
    first = Run.read(short / "seed-0.json").measures
    dense, rest = first[0], first[1:]
    methods = {*resnet56_cifar.TRAINED, "α = 0"}
    assert {(m.method, m.stage) for m in rest} >= {(m, s) for m in methods for s in ("cut", "repaired")}
    finetuned = {m.method for m in rest if m.stage == "trained"}
    assert finetuned == set(resnet56_cifar.TRAINED)
    even = next(m.macs for m in rest if m.method == "L1")
    assert even < dense.macs
    assert all(m.macs == even for m in rest if m.method in resnet56_cifar.UNIFORM)
    # A stage of eight channels comes in coarse steps.
    assert all(0.85 * even <= m.macs <= even for m in rest)


def test_the_table_has_its_picture_beside_it(short: Path) -> None:
    assert f"]({short.name}.png)" in short.with_suffix(".md").read_text(encoding="utf-8")
    assert short.with_suffix(".png").stat().st_size > 10_000


def test_later_seeds_make_again_only_what_a_seed_changes() -> None:
    task = Task(Path(), 1, print, True, Path())
    found = resnet56_cifar.subject(task)
    evens = {2.0: resnet56_cifar.uniform(found, 2.0)}
    made = {method: set(resnet56_cifar.plans_of(found, method, evens, task)) for method in ("L1", "random", "α = 0")}
    assert made == {"L1": {(2.0, "repaired")}, "random": {(2.0, "cut"), (2.0, "repaired")}, "α = 0": set()}
    assert [resnet56_cifar.depends_on(1, method) for method in ("L1", "random")] == [False, True]


def test_one_ratio_is_found_for_every_point() -> None:
    found = resnet56_cifar.subject(Task(Path(), 0, print, True, Path()))
    whole = pl.cost(found.program).macs
    plan = resnet56_cifar.uniform(found, 1.3)
    ratios = {setting.ratio for setting in plan.settings.values()}
    assert len(ratios) == 1
    assert whole / resnet56_cifar.macs(found, plan) == pytest.approx(1.3, rel=0.03)


def test_the_picture_has_a_panel_for_each_stage_and_no_line_for_what_was_not_measured() -> None:
    def at(point: str, method: str, stage: str, macs: int, accuracy: float) -> Measure:
        return Measure(point, method, stage, accuracy, 100, 10, 10, macs)

    dense = at("dense", "dense", "dense", 100, 0.9)
    cut = (at("2×", "L1", "cut", 50, 0.5), at("2×", "L1", "trained", 50, 0.8))
    figure = draw([Run("x", 0, "", {}, "", "", 0.0, (dense, *cut), True)])
    assert [ax.get_title() for ax in figure.axes] == ["as cut", "repaired", "after a short fine-tuning"]
    drawn = {
        (ax.get_title(), curve.get_label()): curve.lines[0].get_xydata().tolist()
        for ax in figure.axes
        for curve in ax.containers
    }
    assert drawn["as cut", "L1"] == [[100, 90], [50, 50]]
    assert drawn["after a short fine-tuning", "L1"] == [[100, 90], [50, 80]]
    assert drawn["repaired", "L1"] == drawn["as cut", "APoZ"] == []


def test_a_plan_of_one_price_is_no_larger_than_that_of_one_ratio() -> None:
    found = resnet56_cifar.subject(Task(Path(), 0, print, True, Path()))
    curves = resnet56_cifar.scan(found, "l1")
    assert set(curves) == set(found.layers)
    most = resnet56_cifar.macs(found, resnet56_cifar.uniform(found, 2.0))
    plan = resnet56_cifar.priced(found, "l1", curves, most)
    assert 0.85 * most <= resnet56_cifar.macs(found, plan) <= most
    assert len({setting.ratio for setting in plan.settings.values()}) > 1
