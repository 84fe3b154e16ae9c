"""Centripetal SGD as a paper's method: squeezed, trimmed without loss, step by step; and its reproductions."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import prunelab as pl
from prunelab.papers.centripetal import centripetal_sgd, in_float64
from prunelab.papers.evidence import Run
from prunelab.papers.reproduce import reproduce
from prunelab.progress import Stopped

RUN = {"epochs": 30, "lr": 0.05, "batch_size": 16, "progress": False}
Data = tuple[TensorDataset, TensorDataset]


@pytest.fixture(scope="module")
def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (384,), generator=generator)
    images = torch.randn(384, 1, 10, 10, generator=generator) + labels[:, None, None, None] - 1.0
    return TensorDataset(images[:256], labels[:256]), TensorDataset(images[256:], labels[256:])


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


def test_trimming_loses_nothing_in_float32_and_in_float64(model: nn.Module, data: Data) -> None:
    before = copy.deepcopy(model.state_dict())
    small, (step,) = centripetal_sgd(model, *data, shares=0.5, **RUN)
    assert [small[0].out_channels, small[3].out_channels] == [4, 3]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    wide = step.squeezed.program.model
    for dtype, found in ((torch.float32, step.squeezed.departure), (torch.float64, step.exact)):
        images = data[1].tensors[0][:64].to(dtype)
        pair = (copy.deepcopy(each).to(dtype).eval() for each in (wide, small))
        with torch.no_grad():
            whole, trimmed = (each(images) for each in pair)
        change = float((whole - trimmed).abs().max())
        assert change < 1e-4
        # In float64 the small network's weights are those that float32 could hold; in float32 sums differ in order.
        assert found == pytest.approx(change, abs=2e-5)
        assert torch.equal(whole.argmax(1), trimmed.argmax(1))
    # What was learned is in the small network without any fine-tuning.
    images, labels = data[1].tensors
    with torch.no_grad():
        right = float((small.eval()(images).argmax(1) == labels).double().mean())
    assert right == step.squeezed.table["accuracy"].iloc[-1] > 0.9


def test_the_record_says_what_the_small_network_is(model: nn.Module, data: Data) -> None:
    small, (step,) = centripetal_sgd(model, *data, shares=0.5, how="even", **RUN)
    found = pl.cost(pl.trace(small, data[1].tensors[0][:2]))
    assert (step.params, step.flops) == (found.params, found.flops)
    assert step.squeezed.clusters.of == {"0": (0, 0, 2, 2, 4, 4, 6, 6), "3": (0, 0, 2, 2, 4, 4)}


def test_members_that_differ_still_show_in_float64(model: nn.Module, data: Data) -> None:
    squeezed = pl.csgd(model, *data, 0.5, pull=0.0, **{**RUN, "epochs": 1})
    images = data[1].tensors[0][:64]
    assert in_float64(squeezed, images) == pytest.approx(squeezed.departure, rel=1e-3)
    assert squeezed.departure > 1e-2


def test_widths_fall_in_steps_that_are_shares_of_the_first_network(model: nn.Module, data: Data) -> None:
    small, steps = centripetal_sgd(model, *data, shares=(0.75, 0.5), **RUN)
    assert [step.share for step in steps] == [0.75, 0.5]
    assert [len(step.squeezed.clusters.selection().kept["0"]) for step in steps] == [6, 4]
    assert [small[0].out_channels, small[3].out_channels] == [4, 3]
    assert steps[1].flops < steps[0].flops
    assert max(step.exact for step in steps) < 1e-4


@pytest.mark.parametrize("shares", [(), (0.5, 0.75), (0.5, 0.5)])
def test_shares_that_do_not_fall_are_refused(model: nn.Module, data: Data, shares: tuple[float, ...]) -> None:
    with pytest.raises(pl.PruneLabError, match="each smaller than the one before"):
        centripetal_sgd(model, *data, shares=shares, **RUN)


def test_a_run_that_was_broken_off_goes_on_in_the_steps_folders(model: nn.Module, data: Data, tmp_path: Path) -> None:
    shares = (0.75, 0.5)
    whole, _ = centripetal_sgd(model, *data, shares=shares, **RUN)
    calls: list[int] = []

    def stop_in_the_second_step(done: int, total: int | None, what: str) -> bool:
        calls.append(done)
        return len(calls) < 16 * 33

    asked = {**RUN, "progress": stop_in_the_second_step, "folder": tmp_path}
    with pytest.raises(Stopped, match=r"squeezing to 0\.5"):
        centripetal_sgd(model, *data, shares=shares, **asked)
    again, _ = centripetal_sgd(model, *data, shares=shares, **{**RUN, "folder": tmp_path})
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize("name", ["centripetal-small", "centripetal-resnet56"])
def test_a_short_reproduction_squeezes_and_trims_without_loss(name: str, tmp_path: Path) -> None:
    reproduce(name, tmp_path, seeds=1, out=tmp_path, short=True, say=lambda text: None)
    run = Run.read(tmp_path / name / "seed-0.json")
    assert run.complete
    assert run.shortened
    wide = [m for m in run.measures if m.stage == "trained" and m.method.startswith("C-SGD")]
    cut = [m for m in run.measures if m.stage == "cut" and m.method.startswith("C-SGD")]
    assert wide[0].accuracy == cut[0].accuracy
    assert {m.macs for m in cut} == {cut[0].macs}
    assert 0.37 < cut[0].macs / wide[0].macs < 0.42
    assert all("in float64" in m.note for m in cut)
