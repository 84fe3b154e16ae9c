"""Save and load give the very same network, bit for bit, and refuse another one's tensors in a sentence."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models as tv
from halved import committed, said
from support import Network, half_of_everything, shaken
from torch import Tensor, nn

import prunelab as pl
from prunelab import zoo
from prunelab.program.record import commits, example_of, remember

MEDIUM = (3, 64, 64)
NETWORKS = {
    "lenet": Network(zoo.lenet, (1, 28, 28)),
    "vgg_small": Network(zoo.vgg_small, (1, 28, 28)),
    "resnet20": Network(partial(zoo.resnet20, shortcut="projection"), (3, 32, 32)),
    "torchvision resnet18": Network(tv.resnet18, MEDIUM),
    "torchvision mobilenet_v2": Network(tv.mobilenet_v2, MEDIUM),
    "torchvision shufflenet_v2_x0_5": Network(tv.shufflenet_v2_x0_5, MEDIUM),
    "torchvision densenet121": Network(tv.densenet121, MEDIUM),
    "torchvision convnext_tiny": Network(tv.convnext_tiny, MEDIUM),
    "torchvision vision transformer": Network(partial(tv.VisionTransformer, 32, 8, 2, 4, 64, 128), (3, 32, 32)),
}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Class, tensors with dtypes, strides and flags, training flags, and what the module remembers."""
    assert type(one) is type(other)
    for tensors in (
        lambda m: m.named_parameters(remove_duplicate=False),
        lambda m: m.named_buffers(remove_duplicate=False),
    ):
        pairs = list(zip(tensors(one), tensors(other), strict=True))
        for (name, a), (again, b) in pairs:
            assert name == again
            assert (a.dtype, a.stride(), a.requires_grad) == (b.dtype, b.stride(), b.requires_grad), name
            assert torch.equal(a, b), name
    assert {n: m.training for n, m in one.named_modules()} == {n: m.training for n, m in other.named_modules()}
    assert [repr(m) for m in one.modules()] == [repr(m) for m in other.modules()]
    assert commits(one) == commits(other)


@pytest.mark.parametrize("name", NETWORKS)
def test_loaded_network_is_the_saved_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    small, images = committed(NETWORKS[name])
    pl.save(tmp_path, small)
    back = pl.load(tmp_path, NETWORKS[name].make)
    assert_same(back, small)
    assert torch.equal(said(back, images), said(small, images))
    # Some kernels round differently where memory is not aligned as torch aligns it.
    assert all(t.data_ptr() % 64 == 0 for t in [*back.parameters(), *back.buffers()])
    bytes_ = sum(t.numel() * t.element_size() for t in small.state_dict().values())
    (tensors,) = tmp_path.glob("*.safetensors")
    assert bytes_ < tensors.stat().st_size < bytes_ * 1.03 + 20_000


class Difficult(nn.Module):
    """Tied weights, buffers that follow channels (one of them in no state_dict), a plain tensor, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.again.weight = self.inner.weight
        self.head = nn.Linear(8, 5)
        self.register_buffer("gain", torch.rand(8) + 0.5)
        self.register_buffer("shift", torch.rand(8, 1, 1), persistent=False)
        self.tone = torch.rand(5)
        self.stem.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.again(self.inner(x * self.gain[:, None, None]).relu()) + self.shift
        logits: Tensor = self.head(x.mean((2, 3))) * self.tone.to(x.dtype)
        return logits


DIFFICULT = Network(Difficult, (3, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_difficult_network_of_any_precision_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    small, images = committed(DIFFICULT, dtype)
    small.to(memory_format=torch.channels_last)
    small.norm.train()
    small.head.bias.requires_grad_(False)
    pl.save(tmp_path, small)
    back = pl.load(tmp_path, Difficult)
    assert_same(back, small)
    assert back.again.weight is back.inner.weight
    assert back.stem.weight.shape[0] == 4
    assert torch.equal(said(back.eval(), images), said(small.eval(), images))


def test_several_commits_with_training_and_precision_changed_between(tmp_path: Path) -> None:
    small, images = committed(DIFFICULT, torch.float32)
    for dtype in (torch.float64, torch.bfloat16):
        with torch.no_grad():
            for p in small.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        small, images = small.to(dtype), images.to(dtype)
        program = pl.trace(small, images)
        free = next(layer for layer in program.layers if not layer.pinned and layer.channels > 1)
        small = pl.commit(program, pl.Selection({free.name: tuple(range(1, free.channels))}))
    pl.save(tmp_path, small)
    back = pl.load(tmp_path, Difficult)
    assert len(commits(back)) == 3
    assert_same(back, small)
    assert torch.equal(said(back, images), said(small, images))


def test_parametrized_weights_come_back(tmp_path: Path) -> None:
    def make() -> nn.Module:
        layers = [nn.Linear(6, 8), nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))]
        return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())), nn.Linear(8, 3))

    program = pl.trace(make(), torch.ones(2, 6))
    small = pl.commit(program, half_of_everything(program, mask=False))
    assert commits(small)[0]["kept"]
    pl.save(tmp_path, small)
    back = pl.load(tmp_path, make)
    assert torch.equal(said(back, torch.ones(2, 6)), said(small, torch.ones(2, 6)))


def test_network_that_was_never_committed_comes_back(tmp_path: Path) -> None:
    model = shaken(Difficult())
    pl.save(tmp_path, model)
    back = pl.load(tmp_path, Difficult)
    assert commits(back) == ()
    assert_same(back, model)


def test_wrappers_are_looked_through(tmp_path: Path) -> None:
    small, images = committed(DIFFICULT)
    pl.save(tmp_path, nn.DataParallel(small))
    back = pl.load(tmp_path, lambda: torch.compile(Difficult()))
    assert_same(back, small)
    assert torch.equal(said(back, images), said(small, images))


def test_what_a_commit_remembers_is_plain_and_goes_where_the_module_goes() -> None:
    small, _ = committed(DIFFICULT)
    kept = commits(small)[0]["kept"]
    assert {len(channels) for channels in kept.values()} == {4}
    assert json.loads(json.dumps(commits(small))) == list(commits(small))
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    for other in (copy.deepcopy(small), torch.load(file, weights_only=False)):
        assert commits(other) == commits(small)
    assert commits(Difficult()) == ()


class Several(nn.Module):
    """Takes two tensors, one of them of whole numbers, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(11, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, word: Tensor, scale: float) -> Tensor:
        logits: Tensor = self.head(self.inner(x + self.words(word)).relu()) * scale
        return logits


def test_network_of_several_arguments_needs_no_example_to_load(tmp_path: Path) -> None:
    arguments = (torch.randn(2, 6), torch.tensor([3, 10]), 0.5)
    program = pl.trace(Several(), arguments)
    small = pl.commit(program, half_of_everything(program, mask=False))
    pl.save(tmp_path, small)
    back = pl.load(tmp_path, Several)
    assert_same(back, small)
    assert back.inner.out_features == 4
    assert torch.equal(said(back, *arguments), said(small, *arguments))


def test_example_of_nested_arguments_is_remembered_as_shapes_and_dtypes() -> None:
    example = (torch.ones(2, 3), {"a": [torch.ones(2, dtype=torch.int32), 0.5], 7: (None, True, "word")})
    program = pl.trace(nn.Linear(3, 4), torch.ones(2, 3))
    small = nn.Linear(3, 4)
    remember(small, replace(program, example=example), pl.DENSE)
    (commit,) = json.loads(json.dumps(commits(small)))
    first, rest = example_of(commit, torch.device("cpu"))
    assert torch.equal(first, torch.zeros(2, 3))
    ((whole, number), others) = rest.values()
    assert (whole.shape, whole.dtype, number) == ((2,), torch.int32, 0.5)
    assert list(rest) == ["a", 7]
    assert others == (None, True, "word")


def test_example_that_is_not_plain_is_asked_for_at_load(tmp_path: Path) -> None:
    images = torch.ones(2, 3)
    program = pl.trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), images)
    program = replace(program, example=(images, object()))
    small = copy.deepcopy(program.model)
    remember(small, program, pl.DENSE)
    pl.save(tmp_path, small)
    with pytest.raises(pl.PruneLabError, match="give it once more: example="):
        pl.load(tmp_path, lambda: copy.deepcopy(program.model))
    back = pl.load(tmp_path, lambda: copy.deepcopy(program.model), example=images)
    assert torch.equal(said(back, images), said(small, images))


def test_cut_of_a_program_without_proof_comes_back(tmp_path: Path) -> None:
    """The proof pins a layer whose width forward names, although one cut of it is followed."""

    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            logits: Tensor = self.head(x.relu() if x.shape[1] in (4, 8) else x)
            return logits

    images = torch.randn(2, 6)
    assert pl.trace(Halved(), images).layer("inner").pinned
    small = pl.commit(pl.trace(Halved(), images, prove=False), pl.Selection({"inner": (0, 2, 4, 5)}))
    pl.save(tmp_path, small)
    assert_same(pl.load(tmp_path, Halved), small)


def test_plain_state_dict_loads_into_another_commit_of_the_same_selection(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    small, images = committed(NETWORKS["lenet"])
    other, _ = committed(NETWORKS["lenet"])
    nn.init.zeros_(other.conv1.weight)
    other.load_state_dict(load_file(pl.export(small, images, tmp_path / "small.safetensors")))
    assert torch.equal(said(other, images), said(small, images))


# Interrupted, damaged, another network's ---------------------------------------------

CRASHES = """
import os, sys
from pathlib import Path
import torch, prunelab as pl
from torch import nn

folder, kinds = Path(sys.argv[1]), ("os.mkdir", "open", "os.rename", "os.remove", "os.rmdir")

def make(fill=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    nn.init.constant_(model[0].weight, fill)
    return model

program = pl.trace(make(1.0), torch.zeros(2, 4))
old, new = (pl.commit(program, pl.Selection({"0": kept})) for kept in ((0, 1, 2, 3), (2, 5)))
pl.save(folder, old)
crashed, found = 0, []
while True:
    child = os.fork()
    if not child:
        left = crashed
        def hook(event, arguments):
            global left
            if event in kinds and str(folder) in str(arguments[0]):
                left -= 1
                if left < 0:
                    os._exit(7)
        sys.addaudithook(hook)
        pl.save(folder, new)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found.append(pl.load(folder, make)[0].out_features)
    assert code in (0, 7), code
    if code == 0:
        break
    pl.save(folder, old)
    crashed += 1
print(*found)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_save_that_dies_at_any_step_leaves_the_old_network_or_the_new(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CRASHES, str(tmp_path / "network")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert len(found) > 5
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == ("4", "2")


def test_new_save_leaves_nothing_of_the_last(tmp_path: Path) -> None:
    pl.save(tmp_path, Difficult())
    (tmp_path / "notes.txt").write_text("mine")
    pl.save(tmp_path, zoo.lenet())
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors", ".txt"]
    assert isinstance(pl.load(tmp_path, zoo.lenet), zoo.LeNet)


def untied() -> nn.Module:
    model = Difficult()
    model.again.weight = nn.Parameter(model.inner.weight.detach().clone())
    return model


def coarser() -> nn.Module:
    model = Difficult()
    model.stem = nn.Conv2d(3, 8, 1)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (zoo.lenet, r"cuts of the saved Difficult do not fit this LeNet"),
        (coarser, r"stem.weight has shape \(4, 3, 1, 1\), the saved one \(4, 3, 3, 3\)"),
        (untied, r"inner.bias has shape \(8,\), the saved one \(4,\)"),
    ],
)
def test_another_network_is_refused_in_a_sentence(make: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    pl.save(tmp_path, committed(DIFFICULT)[0])
    with pytest.raises(pl.PruneLabError, match=rf"not those of the model that make_model gives: .*({message})"):
        pl.load(tmp_path, make)


@pytest.mark.parametrize("make", [Difficult(), lambda: None])
def test_what_makes_no_network_is_refused(make: Any, tmp_path: Path) -> None:
    pl.save(tmp_path, Difficult())
    with pytest.raises(pl.PruneLabError, match="make_model must be a function"):
        pl.load(tmp_path, make)


def test_other_ties_are_refused(tmp_path: Path) -> None:
    pl.save(tmp_path, untied())
    with pytest.raises(pl.PruneLabError, match=r"again.weight is only in the saved one"):
        pl.load(tmp_path, Difficult)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "network.json").unlink(), "no network to load"),
        (lambda folder: (folder / "network.json").write_text("{"), "no network to load"),
        (lambda folder: (folder / "network.json").write_text('{"format": 99}'), "it has format 99"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "no network to load"),
        (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"not tensors"), "no network to load"),
    ],
)
def test_damaged_folder_is_refused_in_a_sentence(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    pl.save(tmp_path, zoo.lenet())
    damage(tmp_path)
    with pytest.raises(pl.PruneLabError, match=message):
        pl.load(tmp_path, zoo.lenet)


class Stateful(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"anything": self}


def test_what_would_need_pickle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pl.PruneLabError, match=r"1 \(Stateful\) has extra state"):
        pl.save(tmp_path, nn.Sequential(nn.ReLU(), Stateful(2, 2)))
    with pytest.raises(pl.PruneLabError, match=r"torch.complex128"):
        pl.save(tmp_path, nn.Linear(2, 2, dtype=torch.complex128))
    assert not list(tmp_path.iterdir())


def test_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(pl.PruneLabError, match="cannot be written to"):
        pl.save(tmp_path / "file", zoo.lenet())
