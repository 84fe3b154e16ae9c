"""The scan's numbers are the preview's, it goes on where it was stopped, and what is pinned is never called robust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import prunelab as pl
from prunelab import zoo
from prunelab.program.cache import Cache
from prunelab.repair import Repairer

RATIOS = (0.2, 0.5, 0.8)
TRAIN, TEST = pl.datasets.fashion_mnist()
IMAGES, LABELS = TEST.images[:400], TEST.labels[:400]


@pytest.fixture(scope="module")
def program() -> pl.Program:
    return pl.trace(zoo.load("lenet"), IMAGES[:2])


@pytest.fixture(scope="module")
def deep() -> pl.Program:
    return pl.trace(zoo.load("resnet20"), IMAGES[:2])


def alone(program: pl.Program, point: pd.Series, **plan: str) -> pl.Selection:
    """What a plan with this one setting removes."""
    return pl.Plan(**plan).set(point["layer"], ratio=point["ratio"]).resolve(program)


class Stop:
    """A progress function that stops after some points."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, done: int, total: int | None, what: str) -> bool:
        return done < self.after


# Numbers ---------------------------------------------


def test_every_point_is_what_the_preview_measures_on_its_own(deep: pl.Program) -> None:
    scan = pl.sensitivity(
        deep, IMAGES, LABELS, ratios=(0.3, 0.7), n=100, precision="float32", progress=False, cache=False
    )
    frame = scan.frame()
    free = [layer.name for layer in deep.layers if not layer.pinned]
    assert scan.complete
    measured = frame[frame["pinned"] == ""]
    assert list(measured["layer"]) == [name for name in free for _ in range(2)]
    forgetful = pl.Preview(deep, IMAGES, LABELS, memory=Cache(0))
    for _, point in measured.iterrows():
        cut = alone(deep, point)
        found = forgetful.accuracy(cut, n=100)
        for name in ("accuracy", "low", "high", "change", "half", "n", "precision"):
            assert point[name] == getattr(found, name)
        size = pl.cost(deep, cut)
        assert (point["params"], point["flops"]) == (size.params, size.flops)
        assert point["kept"] == len(cut.kept[point["layer"]])
        assert scan.base == found.base
    assert measured["accuracy"].nunique() > 10


class Convolutions(TorchDispatchMode):
    """Counts the convolutions that are run."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name == "aten::convolution"
        return func(*args, **(kwargs or {}))


def test_what_lies_before_a_layer_is_run_once_for_all_its_ratios(deep: pl.Program) -> None:
    with Convolutions() as counted:
        pl.sensitivity(deep, IMAGES, LABELS, ratios=RATIOS, n=20, precision="float32", progress=False, cache=False)
    every = [node.index for node in deep.nodes if node.opname == "conv2d"]
    first = {layer.name: min(_reader(deep, state) for state, _ in layer.producers) for layer in deep.layers}
    behind = sum(at >= first[layer.name] for layer in deep.layers if not layer.pinned for at in every)
    # The network uncut, then of every cut what lies behind its first convolution; where that is within a residual
    # block, from the start of the block.
    least = len(every) + len(RATIOS) * behind
    assert least <= counted.count <= least + len(RATIOS) * (len(deep.layers) - 1)


def _reader(program: pl.Program, state: str) -> int:
    index = program.state_nodes[state]
    return next(node.index for node in program.nodes if index in node.inputs)


def test_a_small_memory_changes_no_number(deep: pl.Program) -> None:
    settings = {"ratios": (0.5,), "n": 100, "precision": "float32", "progress": False, "cache": False}
    ample = pl.sensitivity(deep, IMAGES, LABELS, **settings)
    assert pl.sensitivity(deep, IMAGES, LABELS, memory=2**20, **settings) == ample


def test_a_pinned_layer_has_a_reason_and_no_accuracy(program: pl.Program) -> None:
    scan = pl.sensitivity(program, IMAGES, LABELS, ratios=RATIOS, n=50, progress=False, cache=False)
    rows = scan.frame().set_index("layer").loc[["fc2"]]
    assert list(rows["pinned"]) == [program.layer("fc2").pinned]
    assert rows[["ratio", "accuracy", "change", "half", "n"]].isna().all(axis=None)
    assert scan.of("fc2") == ()
    with pytest.raises(pl.PruneLabError, match="conv1"):
        scan.of("conv")


def test_what_removes_nothing_changes_nothing(program: pl.Program) -> None:
    scan = pl.sensitivity(program, IMAGES, LABELS, ratios=(0.0, 0.01), n=50, progress=False, cache=False)
    whole = scan.of("conv1")
    assert [(p.kept, p.change, p.half, p.accuracy) for p in whole] == [(20, 0.0, 0.0, scan.base)] * 2


def test_other_criteria_choose_other_channels(program: pl.Program) -> None:
    profile = pl.profile(program, TRAIN.subset(200), cache=False, progress=False)
    for criterion in ("apoz", "random"):
        scan = pl.sensitivity(
            program, IMAGES, LABELS, profile=profile, criterion=criterion, ratios=(0.5,), progress=False, cache=False,
            precision="float32",
        )  # fmt: skip
        for name in ("conv1", "conv2", "fc1"):
            cut = pl.Plan(criterion).set(name, ratio=0.5).resolve(program, profile)
            assert scan.of(name)[0].accuracy == pl.Preview(program, IMAGES, LABELS).accuracy(cut).accuracy
    with pytest.raises(pl.PruneLabError, match="needs a profile"):
        pl.sensitivity(program, IMAGES, LABELS, criterion="apoz", progress=False, cache=False)


def test_single_weights_are_scanned_as_a_plan_would_zero_them(program: pl.Program) -> None:
    scan = pl.sensitivity(
        program, IMAGES, LABELS, criterion="apoz", grain="weight", ratios=(0.9,), n=100, precision="float32",
        progress=False, cache=False,
    )  # fmt: skip
    assert scan.complete
    assert pl.Sensitivity.from_json(scan.to_json()) == scan
    chosen = pl.sensitivity(program, IMAGES, LABELS, ratios=(0.0,), n=100, progress=False, cache=False)
    assert chosen.grain == "channel"
    for name in ("conv1", "conv2", "fc1"):
        (point,) = scan.of(name)
        cut = pl.Plan().set(name, ratio=0.9, grain="weight").resolve(program)
        assert point.accuracy == pl.Preview(program, IMAGES, LABELS).accuracy(cut, n=100).accuracy
        assert point.kept == program.layer(name).channels
    axes = scan.figure().axes[0]
    assert axes.get_xlabel() == "weights removed (%)"
    assert "apoz" not in axes.get_title()


def test_repair_is_done_for_every_point(program: pl.Program) -> None:
    sample = TRAIN.images[:200]
    settings = {"ratios": (0.5, 0.8), "precision": "float32", "progress": False, "cache": False}
    bare = pl.sensitivity(program, IMAGES, LABELS, **settings)
    scan = pl.sensitivity(program, IMAGES, LABELS, repair="least-squares", repair_images=sample, **settings)
    repairer, preview = Repairer(program, sample), pl.Preview(program, IMAGES, LABELS)
    for point in scan.points:
        cut = pl.Plan().set(point.layer, ratio=point.ratio).resolve(program)
        found = preview.accuracy(cut, repaired=repairer(cut, "least-squares"))
        assert (point.accuracy, point.half) == (found.accuracy, found.half)
    assert set(scan.frame()["repair"]) == {"least-squares"}
    assert sum(p.accuracy for p in scan.points) > sum(p.accuracy for p in bare.points) + 0.2


def test_bypassed_units_are_out_of_the_scan(deep: pl.Program) -> None:
    without = deep.without(("layer2.1",))
    scan = pl.sensitivity(
        without, IMAGES, LABELS, ratios=(0.5,), n=100, precision="float32", progress=False, cache=False
    )
    assert list(scan.channels) == [layer.name for layer in without.layers]
    preview = pl.Preview(deep, IMAGES, LABELS)
    assert scan.base == preview.accuracy(pl.Selection(bypassed=("layer2.1",)), n=100).accuracy
    plan = pl.Plan().bypass("layer2.1").set("layer3.1.conv1", ratio=0.5)
    assert scan.of("layer3.1.conv1")[0].accuracy == preview.accuracy(plan.resolve(deep), n=100).accuracy


class Denoiser(nn.Module):
    """A network that is no classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(1, 8, 3, padding=1)
        self.outer = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.outer(self.inner(image).relu())


def test_a_network_that_is_no_classifier_is_scanned_by_a_score(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clean = TEST.images[:64]
    program = pl.trace(Denoiser().eval(), clean[:2])

    def closeness(outputs: Tensor, wanted: Tensor) -> Tensor:
        return -(outputs - wanted).square().mean((1, 2, 3))

    scan = pl.sensitivity(
        program, clean, clean, score=closeness, ratios=(0.25, 0.75), precision="float32", progress=False, cache=tmp_path
    )
    for point in scan.of("inner"):
        cut = pl.Plan().set("inner", ratio=point.ratio).resolve(program)
        with torch.no_grad():
            wanted = closeness(pl.commit(program, cut)(clean), clean).double().mean()
        assert point.accuracy == pytest.approx(float(wanted), rel=1e-5)
    assert not list(tmp_path.iterdir())
    (axes,) = scan.figure().axes
    assert axes.get_title().startswith("closeness with one layer cut")
    assert f"{scan.points[0].accuracy:.3g}" in {text.get_text() for text in axes.texts}


# Stopping and going on ---------------------------------------------


def test_a_stopped_scan_goes_on_where_it_was(program: pl.Program, tmp_path: Path) -> None:
    settings = {"ratios": RATIOS, "n": 200, "cache": tmp_path}
    whole = pl.sensitivity(program, IMAGES, LABELS, ratios=RATIOS, n=200, cache=False, progress=False)
    parts: list[pl.Sensitivity] = []
    with pytest.raises(pl.Stopped):
        pl.sensitivity(program, IMAGES, LABELS, progress=Stop(5), on_layer=parts.append, **settings)
    assert [len(part.points) for part in parts] == [3, 5]
    assert not parts[-1].complete
    assert parts[-1].points == whole.points[:5]

    (file,) = (tmp_path / "scans").iterdir()
    # A mark in what is there shows that it is taken from there, and not measured again.
    text = json.loads(file.read_text())
    assert len(text["points"]) == 5
    first = next(iter(text["points"]))
    text["points"][first][0] = 0.125
    file.write_text(json.dumps(text))
    again = pl.sensitivity(program, IMAGES, LABELS, progress=False, **settings)
    assert again.points[0].accuracy == 0.125
    text["points"][first][0] = whole.points[0].accuracy
    file.write_text(json.dumps(text))
    again = pl.sensitivity(program, IMAGES, LABELS, progress=False, **settings)
    assert again == whole
    pd.testing.assert_frame_equal(again.frame(), whole.frame())


def test_other_images_weights_and_settings_have_files_of_their_own(program: pl.Program, tmp_path: Path) -> None:
    def scans(network: pl.Program = program, images: Tensor = IMAGES, **settings: object) -> int:
        given = {"ratios": (0.5,), "n": 50, "precision": "float32", **settings}
        pl.sensitivity(network, images, LABELS, cache=tmp_path, progress=False, **given)
        return len(list((tmp_path / "scans").iterdir()))

    trained = zoo.load("lenet")
    with torch.no_grad():
        trained.fc2.bias[0] += 1.0
    assert scans() == 1
    assert scans(criterion="l2") == 1  # the same way to measure, for other channels
    assert scans(n=60) == 2
    assert scans(images=IMAGES.flip(3)) == 3
    assert scans(network=pl.trace(trained, IMAGES[:2])) == 4
    assert scans(repair="bias", repair_images=TRAIN.images[:50]) == 5
    assert scans(repair="bias", repair_images=TRAIN.images[50:100]) == 6
    assert scans() == 6


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "points": {"a": [1, 2]}}'])
def test_a_damaged_file_is_measured_again(program: pl.Program, tmp_path: Path, text: str) -> None:
    settings = {"ratios": (0.5,), "n": 50, "cache": tmp_path, "progress": False}
    whole = pl.sensitivity(program, IMAGES, LABELS, **settings)
    (file,) = (tmp_path / "scans").iterdir()
    file.write_text(text)
    with pytest.warns(UserWarning, match="measured again"):
        assert pl.sensitivity(program, IMAGES, LABELS, **settings) == whole
    assert pl.sensitivity(program, IMAGES, LABELS, **settings) == whole


def test_a_folder_that_cannot_be_written_is_said(program: pl.Program, tmp_path: Path) -> None:
    (tmp_path / "scans").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="goes on without a cache") as said:
        scan = pl.sensitivity(program, IMAGES, LABELS, ratios=(0.5,), n=50, cache=tmp_path, progress=False)
    assert len(said) == 1
    assert scan.complete


# Forms ---------------------------------------------


def test_json_and_back(program: pl.Program) -> None:
    scan = pl.sensitivity(program, IMAGES, LABELS, ratios=RATIOS, n=50, cache=False, progress=False)
    assert pl.Sensitivity.from_json(scan.to_json()) == scan
    for text in ("", "{}", "[1]", scan.to_json().replace('"kept"', '"held"')):
        with pytest.raises(pl.PruneLabError, match="not a sensitivity scan"):
            pl.Sensitivity.from_json(text)


def test_the_figure_gives_a_pinned_layer_no_number(program: pl.Program) -> None:
    parts: list[pl.Sensitivity] = []
    with pytest.raises(pl.Stopped):
        pl.sensitivity(
            program, IMAGES, LABELS, ratios=RATIOS, n=50, cache=False, progress=Stop(4), on_layer=parts.append
        )
    for dark in (False, True):
        figure = parts[-1].figure(dark)
        FigureCanvasAgg(figure).draw()
        (axes,) = figure.axes
        assert [label.get_text() for label in axes.get_yticklabels()] == ["conv1", "conv2", "fc1", "fc2"]
        words = {(text.get_position()[1], text.get_text()) for text in axes.texts}
        assert {word for row, word in words if row == 3} == {"pinned"}
        assert sum(row == 1 for row, _ in words) == 1  # conv2 was stopped after one point
        assert not any(row == 2 for row, _ in words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ratios": ()}, "at least one ratio"),
        ({"ratios": (1.5,)}, "0 to 1"),
        ({"ratios": (float("nan"),)}, "finite"),
        ({"criterion": "l3"}, "no criterion 'l3'"),
        ({"repair": "glue"}, "no repair 'glue'"),
        ({"grain": "block"}, "no grain 'block'"),
        ({"repair": "bias"}, "needs images"),
        ({"precision": "float8"}, "no precision"),
        ({"n": 0}, "n="),
    ],
)
def test_what_cannot_be_scanned_is_refused(program: pl.Program, settings: dict[str, object], words: str) -> None:
    with pytest.raises(pl.PruneLabError, match=words):
        pl.sensitivity(program, IMAGES, LABELS, cache=False, progress=False, **settings)
