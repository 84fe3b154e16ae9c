"""Exported files say what the module says, for any number of images, and are as small as its parameters say."""

from __future__ import annotations

import copy
import sys
from functools import cache, partial
from pathlib import Path

import onnxruntime
import pytest
import torch
import torchvision.models as tv
from halved import committed, said
from support import Network, parameters, relative
from torch import Tensor, nn

import prunelab as pl
from prunelab import zoo

MEDIUM = (3, 64, 64)
NETWORKS = {
    "lenet": Network(zoo.lenet, (1, 28, 28)),
    "torchvision resnet18": Network(tv.resnet18, MEDIUM),
    "torchvision shufflenet_v2_x0_5": Network(tv.shufflenet_v2_x0_5, MEDIUM),
    "torchvision vision transformer": Network(partial(tv.VisionTransformer, 32, 8, 2, 4, 64, 128), (3, 32, 32)),
}


@cache
def half(name: str) -> tuple[nn.Module, Tensor]:
    """The same of a named network, made once: not to be changed."""
    return committed(NETWORKS[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_says_what_the_module_says_for_any_number_of_images(name: str, tmp_path: Path) -> None:
    small, images = half(name)
    path = pl.export(small, images, tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        images = NETWORKS[name].images(count, torch.float32)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        assert relative(torch.from_numpy(logits), said(small, images)) < 1e-4
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_size < 1.02 * 4 * parameters(small) + 350_000


@pytest.mark.parametrize("name", ["lenet", "torchvision resnet18", "torchvision vision transformer"])
def test_exported_program_says_the_same_and_is_small(name: str, tmp_path: Path) -> None:
    small, images = half(name)
    training = copy.deepcopy(small).train()
    path = pl.export(training, images, tmp_path / "deep" / "small.pt2")
    assert training.training
    program = torch.export.load(path)
    assert program.example_inputs is None
    again = program.module()
    for count in (1, 5):
        images = NETWORKS[name].images(count, torch.float32)
        assert relative(said(again, images), said(small, images)) < 1e-5
    assert path.stat().st_size < 1.02 * 4 * parameters(small) + 350_000


def test_unknown_suffix_and_missing_packages_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, images = half("lenet")
    with pytest.raises(pl.PruneLabError, match=r"ends in .pt2, .onnx or .safetensors, not 'small.pt'"):
        pl.export(small, images, tmp_path / "small.pt")
    # As Python itself marks a package that cannot be imported.
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(pl.PruneLabError, match=r"needs onnx: pip install 'prunelab\[onnx\]'"):
        pl.export(small, images, tmp_path / "small.onnx")
    assert not list(tmp_path.iterdir())


def test_failed_export_leaves_the_old_file(tmp_path: Path) -> None:
    path = pl.export(nn.Linear(3, 2), torch.randn(2, 3), tmp_path / "n.onnx")
    before = path.read_bytes()

    class Complex(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(pl.PruneLabError, match=r"Complex cannot be written as ONNX"):
        pl.export(Complex(), torch.randn(2, 3), path)
    assert path.read_bytes() == before
