"""``prunelab reproduce``: a real reproduction of seconds, its files, its table, and what it refuses."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import prunelab as pl
from prunelab import cli, zoo
from prunelab.errors import PruneLabError
from prunelab.papers.evidence import Measure, Run, Spread, accuracy, markdown, measured, table
from prunelab.papers.experiments import sources
from prunelab.papers.reproduce import SHORT, Reproduction, Task, listing, reproduce, reproductions


def half_of_lenet(task: Task) -> Iterator[Measure]:
    """Train, halve a layer by L1, train on."""
    train, val, test = sources.mnist(task)
    torch.manual_seed(task.seed)
    dense = zoo.lenet()
    pl.finetune(dense, train, val, epochs=1, lr=0.05, seed=task.seed, folder=task.work / "dense", progress=False)
    yield measured(dense, test, point="dense", method="dense", stage="dense")
    program = pl.trace(dense, train.images[:2])
    small = pl.commit(program, pl.Plan("l1").set("conv2", ratio=0.5).resolve(program))
    yield measured(small, test, point="2×", method="l1", stage="cut", dense=dense)
    pl.finetune(small, train, val, epochs=1, lr=0.01, seed=task.seed, progress=False)
    yield measured(small, test, point="2×", method="l1", stage="trained", note="one epoch")


TINY = Reproduction(
    "tiny",
    "Half of a layer of LeNet.",
    "2 s",
    half_of_lenet,
    paper={("2×", "trained"): {"accuracy": 0.9926, "compression": 1.99}},
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two seeds of it have filled."""
    out = tmp_path_factory.mktemp("results")
    reproduce(TINY, Path(), seeds=2, out=out, short=True, say=lambda line: None)
    return out


def runs_in(out: Path) -> list[Run]:
    return [Run.read(path) for path in sorted((out / "tiny").glob("seed-*.json"))]


def test_every_seed_leaves_a_json_that_says_how_it_was_made(results: Path) -> None:
    first, second = runs_in(results)
    assert (first.name, first.seed, second.seed) == ("tiny", 0, 1)
    assert first.command == "prunelab reproduce tiny --data DIR --seeds 1 --short"
    assert first.shortened == SHORT
    assert first.complete
    assert first.versions["torch"] == torch.__version__
    assert first.hardware
    assert [measure.stage for measure in first.measures] == ["dense", "cut", "trained"]
    assert first.measures[0].accuracy != second.measures[0].accuracy
    assert first.seconds == pytest.approx(sum(m.seconds for m in first.measures), abs=0.05)
    assert sorted(path.name for path in (results / "tiny").iterdir()) == ["seed-0.json", "seed-1.json"]


def test_measures_count_what_the_network_has(results: Path) -> None:
    dense, cut, trained = runs_in(results)[0].measures
    # 20·25+20, 50·20·25+50, 500·800+500, 10·500+10; with half of conv2 also half of fc1's inputs.
    assert dense.params == dense.nonzero == 431_080
    assert cut.params == trained.params == 520 + 12_525 + 200_500 + 5_010
    # conv1 on 24×24, conv2 on 8×8.
    assert cut.macs == 576 * 500 + 64 * 12_500 + 200_000 + 5_000
    assert cut.n == 200
    assert cut.latency is not None
    assert cut.latency > 0.3
    assert trained.latency is None


def test_the_table_tells_mean_and_sample_deviation_of_the_seeds(results: Path) -> None:
    runs = runs_in(results)
    row = table(runs)[2]
    found = [100 * run.measures[2].accuracy for run in runs]
    changes = [100 * (run.measures[2].accuracy - run.measures[0].accuracy) for run in runs]
    assert row.accuracy.mean == pytest.approx(statistics.mean(found))
    assert row.accuracy.sd == pytest.approx(abs(found[0] - found[1]) / math.sqrt(2))
    assert row.change is not None
    assert row.change.mean == pytest.approx(statistics.mean(changes))
    assert row.structural.mean == pytest.approx(431_080 / 218_555)
    written = (results / "tiny.md").read_text()
    assert "| 2× | l1 | trained | 99.26 %, 1.99× |" in written
    assert "- 2×, l1: one epoch" in written
    assert f"**{SHORT}**" in written
    assert "1.97×" in written


def measure(**changes: object) -> Measure:
    return replace(Measure("dense", "dense", "dense", 0.9, 100, 1000, 1000, 5000), **changes)  # type: ignore[arg-type]


def test_a_measure_is_compared_with_the_dense_one_before_it_in_its_own_run() -> None:
    def run(*accuracies: float) -> Run:
        first, cut, second, later = accuracies
        measures = (
            measure(accuracy=first),
            measure(point="2×", stage="cut", accuracy=cut, params=500, nonzero=250, macs=1000),
            measure(point="dense without norm", accuracy=second, params=2000),
            measure(point="4×", stage="cut", accuracy=later, params=500, nonzero=500),
        )
        return Run("two", 0, "", {}, "", "", 0.0, measures, True)

    two, four = (row for row in table([run(0.9, 0.8, 0.5, 0.6), run(0.8, 0.6, 0.4, 0.4)]) if row.change is not None)
    assert two.change == Spread(pytest.approx(-15.0), pytest.approx(100 * statistics.stdev([-0.1, -0.2])))
    assert (two.compression.mean, two.structural.mean, two.speedup.mean) == (4.0, 2.0, 5.0)
    assert four.change is not None
    assert four.change.mean == pytest.approx(5.0)
    assert four.structural.mean == 4.0


def test_the_papers_figures_stand_beside_its_own_method_alone() -> None:
    run = Run("x", 0, "", {}, "", "", 0.0, (measure(), measure(point="2×", method="random", stage="cut")), True)
    paper = {("2×", "cut"): {"accuracy": 0.5}}
    assert "50.00 %" in markdown(table([run]), paper)
    assert "50.00 %" not in markdown(table([run]), paper, "apoz")


def test_a_complete_seed_is_not_run_again_and_a_further_one_is(results: Path) -> None:
    said: list[str] = []
    before = (results / "tiny" / "seed-0.json").read_bytes()
    reproduce(TINY, Path(), seeds=2, out=results, short=True, say=said.append)
    assert [line for line in said if "begins" in line] == []
    assert (results / "tiny" / "seed-0.json").read_bytes() == before


def test_a_seed_that_was_broken_off_says_so_and_goes_on_to_the_same_figures(results: Path, tmp_path: Path) -> None:
    def broken(task: Task) -> Iterator[Measure]:
        yield next(iter(half_of_lenet(task)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce(replace(TINY, run=broken), Path(), seeds=1, out=tmp_path, short=True, say=lambda line: None)
    (left,) = runs_in(tmp_path)
    assert not left.complete
    assert len(left.measures) == 1
    assert (tmp_path / "tiny" / ".seed-0" / "dense").is_dir()
    reproduce(TINY, Path(), seeds=1, out=tmp_path, short=True, say=lambda line: None)
    (done,), (never_broken, _) = runs_in(tmp_path), runs_in(results)
    assert done.complete
    assert [m.accuracy for m in done.measures] == [m.accuracy for m in never_broken.measures]
    assert done.measures[0].seconds >= left.measures[0].seconds
    assert not (tmp_path / "tiny" / ".seed-0").exists()


def test_results_of_another_run_are_refused_and_stay(results: Path) -> None:
    before = (results / "tiny" / "seed-0.json").read_bytes()
    with pytest.raises(PruneLabError, match=r"seed-0\.json was written by another run .*give another --out"):
        reproduce(TINY, Path(), seeds=1, out=results, say=lambda line: None)
    with pytest.raises(PruneLabError, match=r"by another run .*its figures mean nothing"):
        reproduce(replace(TINY, shortened="Ten epochs."), Path(), seeds=1, out=results, say=lambda line: None)
    assert (results / "tiny" / "seed-0.json").read_bytes() == before


def test_a_foreign_file_in_the_place_of_a_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny" / "seed-0.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"format": 99}))
    with pytest.raises(PruneLabError, match="is not a run of `prunelab reproduce`"):
        reproduce(TINY, Path(), seeds=1, out=tmp_path, short=True, say=lambda line: None)


def test_missing_data_is_refused_with_where_to_get_it(tmp_path: Path) -> None:
    task = Task(tmp_path, 0, print, False, tmp_path)
    with pytest.raises(PruneLabError, match=r"MNIST could not be read from .*datasets\.mnist\(.*download=True"):
        sources.mnist(task)
    with pytest.raises(PruneLabError, match=r"CIFAR-10 could not be read from .*datasets\.cifar10\("):
        sources.cifar10(task)
    with pytest.raises(PruneLabError, match=r"resnet56-4bfd9763\.th could not be read.*github\.com/akamaster"):
        sources.resnet56(task)


def test_the_checkpoint_of_resnet56_is_read_without_its_prefix(tmp_path: Path) -> None:
    torch.manual_seed(3)
    made = zoo.resnet56()
    torch.save({"state_dict": {f"module.{k}": v for k, v in made.state_dict().items()}}, tmp_path / sources.RESNET56)
    read = sources.resnet56(Task(tmp_path, 0, print, False, tmp_path))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(read(images), made.eval()(images))


def test_held_out_images_are_neither_trained_on_nor_tested_on(tmp_path: Path) -> None:
    task = Task(tmp_path, 0, print, True, tmp_path)
    sets = [{image.numpy().tobytes() for image in each.images} for each in sources.mnist(task)]
    assert [len(each) for each in sets] == [300, 200, 200]
    assert len(set().union(*sets)) == 700
    assert sources.cifar10(task)[0].images.shape == (300, 3, 32, 32)


def test_accuracy_counts_images(results: Path) -> None:
    images, labels = torch.eye(4).repeat(200, 1), torch.arange(4).repeat(200)
    wrong = labels.clone()
    wrong[:100] = (wrong[:100] + 1) % 4
    assert accuracy(torch.nn.Identity(), images, wrong) == 700 / 800


def test_the_command_lists_what_there_is_and_refuses_what_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce"]) == 0
    assert capsys.readouterr().out.strip() == listing()
    assert cli.main(["reproduce", "network-triming", "--short"]) == 2
    assert "There is no reproduction 'network-triming'" in capsys.readouterr().err


def test_the_command_asks_for_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    for name in reproductions():
        assert cli.main(["reproduce", name]) == 2
        assert "--data DIR" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["network-trimming-lenet", "mean-activation-lenet", "network-trimming-resnet56"])
def test_reproductions_run_in_short(name: str, tmp_path: Path) -> None:
    reproduce(name, tmp_path, seeds=1, out=tmp_path, short=True, say=lambda line: None)
    run = Run.read(tmp_path / name / "seed-0.json")
    assert run.complete
    assert run.shortened == SHORT
    assert {"dense", "trained"} <= {measure.stage for measure in run.measures}
    assert all(measure.params < run.measures[0].params for measure in run.measures if measure.stage == "cut")
