"""Repairs against networks whose right answer is known, and what they are for: a cut that costs a few points."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunelab as pl
from prunelab.plan import REPAIRS
from prunelab.program.run import removes_anything
from prunelab.repair import Repairer, repair
from prunelab.repair.equations import RIDGES, fitted, sums

KINDS = tuple(how for how in REPAIRS if how != "none")


class Small(nn.Module):
    """A convolution, a norm, and two linear layers over a map of more than one position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, bias=False)
        self.fc1 = nn.Linear(8 * 9, 12)
        self.fc2 = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        x = torch.relu(self.conv2(x))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


class Two(nn.Module):
    """Two layers without anything between them, and a mean over the positions."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Joined(nn.Module):
    """A convolution over two others' outputs side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 5, 1)
        self.other = nn.Conv2d(2, 3, 3, padding=1)
        self.second = nn.Conv2d(8, 4, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.cat([self.other(x), self.first(x)], 1))


class Residual(nn.Module):
    """Blocks of two linear layers over a sequence, each added to its input."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Two(nn.Linear(5, 5), nn.Linear(5, 5)) for _ in range(blocks))
        self.read = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.read(x)


class NormedBlocks(nn.Module):
    """Residual blocks with batch norms, as in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.inner = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(3))
        self.outer = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(6))
        self.read = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for k in range(3):
            inside = torch.relu(self.norms[2 * k](self.inner[k](x)))
            x = torch.relu(self.norms[2 * k + 1](self.outer[k](inside)) + x)
        return self.read(x.mean((2, 3)))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def traced(model: nn.Module, images: Tensor) -> pl.Program:
    """The model in float64 with random weights and statistics."""
    torch.manual_seed(1)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.running_mean, -0.5, 0.5)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    return pl.trace(model.double().eval(), images[:2])


def outputs(program: pl.Program, selection: pl.Selection, how: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the whole network gives, and what the committed one does."""
    small = pl.commit(program, selection, repair=how, images=images)
    with torch.no_grad():
        return program.model(images), small(images)


@pytest.fixture
def images() -> Tensor:
    return noise(300, 1, 8, 8)


@pytest.fixture
def program(images: Tensor) -> pl.Program:
    torch.manual_seed(0)
    return pl.trace(Small().double().eval(), images[:2])


# The equations ---------------------------------------------


def test_without_a_ridge_the_solution_is_that_of_lstsq() -> None:
    known, wanted = noise(500, 2, 7), noise(500, 2, 3, seed=1)
    found = sums(known, wanted).solved(0.0)
    for group in range(2):
        torch.testing.assert_close(found[group], torch.linalg.lstsq(known[:, group], wanted[:, group]).solution)


def test_sums_of_float32_rows_come_near_those_in_float64() -> None:
    known, wanted = noise(20_000, 1, 40) + 1, noise(20_000, 1, 5, seed=1)
    exact = torch.linalg.lstsq(known[:, 0], wanted[:, 0]).solution
    torch.testing.assert_close(sums(known.float(), wanted.float()).solved(1e-8)[0], exact, rtol=1e-3, atol=1e-5)


def test_the_ridge_is_the_one_that_predicts_held_out_rows_best() -> None:
    known = noise(60, 1, 20)
    wanted = known @ noise(20, 2, seed=1) * 0.2 + noise(60, 1, 2, seed=2)
    x, y = known[:, 0].numpy(), wanted[:, 0].numpy()

    def ridge(rows: slice, strength: float) -> np.ndarray:
        gram = x[rows].T @ x[rows]
        return np.linalg.solve(gram + strength * gram.diagonal().mean() * np.eye(20), x[rows].T @ y[rows])

    halves = (slice(0, 30), slice(30, 60))
    errors = [
        sum(((x[b] @ ridge(a, strength) - y[b]) ** 2).sum() for a, b in (halves, halves[::-1])) for strength in RIDGES
    ]
    expected = ridge(slice(None), RIDGES[int(np.argmin(errors))])
    assert min(errors) < (y**2).sum()
    np.testing.assert_allclose(fitted(known, wanted)[0].numpy(), expected, rtol=1e-8)


def test_pure_noise_is_not_fitted() -> None:
    assert not fitted(noise(40, 1, 18), noise(40, 1, 2, seed=1)).any()


def test_under_a_mask_every_output_has_a_solution_of_its_own() -> None:
    known = noise(200, 1, 6)
    wanted = known @ noise(6, 4, seed=1) + noise(200, 1, 4, seed=2)
    mask = noise(1, 6, 4, seed=3) > -0.3
    found = sums(known, wanted).solved_under(mask, 0.0)[0]
    for output in range(4):
        at = mask[0, :, output]
        torch.testing.assert_close(
            found[at, output], torch.linalg.lstsq(known[:, 0, at], wanted[:, 0, output]).solution
        )
        assert not found[~at, output].any()


# Networks whose right answer is known ---------------------------------------------

PAIRS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: Two(nn.Linear(6, 5), nn.Linear(5, 3)), (6,)),
    "linear over a sequence": (lambda: Two(nn.Linear(6, 5), nn.Linear(5, 3)), (7, 6)),
    "no bias": (lambda: Two(nn.Linear(6, 5, bias=False), nn.Linear(5, 3, bias=False)), (6,)),
    "conv1d": (lambda: Two(nn.Conv1d(2, 5, 3), nn.Conv1d(5, 4, 4, padding=2, dilation=2)), (2, 16)),
    "conv2d": (lambda: Two(nn.Conv2d(2, 5, 3), nn.Conv2d(5, 4, (3, 2), stride=(2, 1), padding=(1, 0))), (2, 9, 8)),
    "conv3d": (lambda: Two(nn.Conv3d(2, 5, 2), nn.Conv3d(5, 4, (1, 2, 3), padding=(0, 1, 1))), (2, 5, 4, 6)),
    "same": (lambda: Two(nn.Conv2d(2, 5, 3), nn.Conv2d(5, 4, (2, 4), padding="same")), (2, 9, 8)),
    "valid": (lambda: Two(nn.Conv2d(2, 5, 3), nn.Conv2d(5, 4, 3, padding="valid")), (2, 9, 8)),
    "grouped": (lambda: Two(nn.Conv2d(2, 10, 3), nn.Conv2d(10, 6, 3, padding=1, groups=2)), (2, 9, 8)),
    "concatenated": (Joined, (2, 9, 8)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_channel_that_follows_from_others_is_recovered(name: str) -> None:
    make, shape = PAIRS[name]
    images = noise(120, *shape)
    program = traced(make(), images)
    first = program.model.first
    with torch.no_grad():
        for start in range(0, len(first.weight), 5):
            for tensor in (first.weight, first.bias):
                if tensor is not None:
                    tensor[start + 4] = 2 * tensor[start] - tensor[start + 2]
    sel = pl.Selection(kept={"first": (0, 1, 2, 3)})
    whole, mended = outputs(program, sel, "least-squares", images)
    assert (outputs(program, sel, "none", images)[1] - whole).abs().max() > 0.05
    torch.testing.assert_close(mended, whole, rtol=1e-4, atol=1e-5)
    assert repair(program, sel, "least-squares", images).left == ()


def test_a_constant_channel_goes_into_the_next_bias() -> None:
    images = noise(50, 6)
    program = traced(Two(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.Linear(5, 3)), images)
    with torch.no_grad():
        program.model.first[0].weight[2] = 0
        program.model.first[0].bias[2] = 3
    sel = pl.Selection(kept={"first.0": (0, 1, 3, 4)})
    whole, mended = outputs(program, sel, "bias", images)
    torch.testing.assert_close(mended, whole, rtol=1e-10, atol=1e-12)
    expected = program.model.second.bias + 3 * program.model.second.weight[:, 2]
    found = repair(program, sel, "bias", images)
    torch.testing.assert_close(found["second.bias"], expected.detach())
    assert set(found) == {"second.bias"}


def test_a_constant_channel_goes_into_the_next_norms_mean_where_there_is_no_bias() -> None:
    images = noise(50, 2, 8, 8)
    second = nn.Sequential(nn.Conv2d(5, 4, 3, bias=False), nn.BatchNorm2d(4))
    program = traced(Two(nn.Conv2d(2, 5, 3), second), images)
    with torch.no_grad():
        program.model.first.weight[2] = 0
        program.model.first.bias[2] = 3
    sel = pl.Selection(kept={"first": (0, 1, 3, 4)})
    whole, mended = outputs(program, sel, "bias", images)
    torch.testing.assert_close(mended, whole, rtol=1e-10, atol=1e-12)
    assert set(repair(program, sel, "bias", images)) == {"second.1.running_mean"}


def test_a_layer_makes_up_for_the_error_of_the_shortcut_that_it_is_added_to() -> None:
    """The first block's cut cannot be undone in it, but the second's last layer sees a linear image of everything."""
    images = noise(200, 4, 5)
    program = traced(Residual(2), images)
    sel = pl.Selection(kept={"blocks.0.first": (0, 1, 3)})
    found = repair(program, sel, "least-squares", images)
    assert set(found) >= {"blocks.0.second.weight", "blocks.1.second.weight"}
    bound = pl.commit(program, sel, repair=found)
    before = {}
    program.model.read.register_forward_pre_hook(lambda _, args: before.update(whole=args[0]))
    bound.read.register_forward_pre_hook(lambda _, args: before.update(cut=args[0]))
    with torch.no_grad():
        program.model(images), bound(images)
    torch.testing.assert_close(before["cut"], before["whole"], rtol=1e-4, atol=1e-5)


class Separable(nn.Module):
    """A depthwise convolution between two pointwise ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 1, bias=False)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.second = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.depthwise(self.first(x)))


def test_the_layer_after_a_depthwise_convolution_makes_up_for_its_cut() -> None:
    images = noise(100, 2, 8, 8)
    program = traced(Separable(), images)
    with torch.no_grad():
        program.model.first.weight[5] = program.model.first.weight[1]
        program.model.depthwise.weight[5] = program.model.depthwise.weight[1]
    sel = pl.Selection(kept={"first": (0, 1, 2, 3, 4)})
    whole, mended = outputs(program, sel, "least-squares", images)
    torch.testing.assert_close(mended, whole, rtol=1e-4, atol=1e-5)
    assert set(repair(program, sel, "least-squares", images)) == {"second.weight", "second.bias"}


class Overwriting(nn.Module):
    """Part of a value is written in place, and the whole of it is read afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 5, 3)
        self.second = nn.Conv2d(5, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x[:, :, :2].add_(3.0)
        return self.second(x).mean((2, 3))


@pytest.mark.parametrize("how", KINDS)
def test_what_forward_overwrites_is_overwritten_in_a_repair_too(how: str, images: Tensor) -> None:
    program = traced(Overwriting(), images)
    with torch.no_grad():
        program.model.first.weight[3] = program.model.first.weight[1]
        program.model.first.bias[3] = program.model.first.bias[1]
    sel = pl.Selection(kept={"first": (0, 1, 2, 4)})
    same_in_preview_and_commit(program, sel, how, images)
    if how.startswith("least-squares"):
        whole, mended = outputs(program, sel, how, images)
        torch.testing.assert_close(mended, whole, rtol=1e-4, atol=1e-5)


def test_all_that_read_a_cut_stream_are_solved(images: Tensor) -> None:
    program = traced(NormedBlocks(), images)
    stream = program.layer("stem").name
    found = repair(program, pl.Selection(kept={stream: (0, 1, 3, 5)}), "least-squares", images)
    assert {f"inner.{k}.weight" for k in range(3)} | {"read.weight"} <= set(found)


@pytest.mark.parametrize("how", ["norm", "least-squares+norm"])
def test_norms_hold_the_statistics_of_what_they_are_given(how: str, images: Tensor) -> None:
    program = traced(NormedBlocks(), images)
    sel = pl.Selection(kept={"inner.0": (0, 2, 3), "inner.1": (1, 2, 4, 5)})
    small = pl.commit(program, sel, repair=how, images=images)
    given: dict[str, Tensor] = {}
    for name, part in small.named_modules():
        part.register_forward_hook(lambda _, args, __, name=name: given.update({name: args[0]}))
    with torch.no_grad():
        small(images)
    names = [f"norms.{k}" for k in ((2, 4) if how == "least-squares+norm" else (1, 2, 3, 4, 5))]
    for name in names:
        values = given[name].transpose(0, 1).flatten(1).numpy()
        held = small.get_submodule(name)
        np.testing.assert_allclose(held.running_mean.numpy(), values.mean(1), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(held.running_var.numpy(), values.var(1, ddof=1), rtol=1e-10)
    # Nothing has changed before the first: its statistics are the old ones.
    found = repair(program, sel, how, images)
    assert "norms.0.running_mean" not in found


# Every kind ---------------------------------------------


@pytest.mark.parametrize("how", KINDS)
def test_the_preview_of_a_repair_is_its_commit(how: str, program: pl.Program, images: Tensor) -> None:
    sel = pl.Selection(kept={"conv1": (0, 3, 4), "conv2": (1, 2, 5, 7), "fc1": (0, 1, 2, 3, 9)})
    same_in_preview_and_commit(program, sel, how, images)


@pytest.mark.parametrize("how", KINDS)
def test_the_preview_of_a_repair_is_its_commit_with_a_bypassed_block(how: str, images: Tensor) -> None:
    torch.manual_seed(2)
    program = pl.trace(pl.zoo.resnet20(in_channels=1).double().eval(), images[:2])
    kept = {"layer1.0.conv1": tuple(range(0, 16, 2)), "layer3.1.conv1": tuple(range(40))}
    sel = pl.Selection(kept=kept, bypassed=("layer2.1",))
    found = same_in_preview_and_commit(program, sel, how, images[:40])
    assert not any(name.startswith("layer2.1.") for name in found)
    # Merging changes only what reads a removed channel; the others mend what comes after the bypassed block.
    assert any(name.startswith("layer2.2.") for name in found) == (how != "merge")


def same_in_preview_and_commit(program: pl.Program, sel: pl.Selection, how: str, images: Tensor) -> dict[str, Tensor]:
    found = repair(program, sel, how, images)
    before = {k: v.clone() for k, v in program.model.state_dict().items()}
    small = pl.commit(program, sel, repair=how, images=images)
    preview = pl.Preview(program, images, torch.zeros(len(images), dtype=torch.long))
    with torch.no_grad():
        torch.testing.assert_close(small(images), preview.logits(sel, repaired=found), rtol=1e-10, atol=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in program.model.state_dict().items())
    return found


@pytest.mark.parametrize("how", KINDS)
def test_masked_weights_stay_zero(how: str, program: pl.Program, images: Tensor) -> None:
    masks = {"fc2.weight": noise(4, 12, seed=1) < 0, "conv2.weight": noise(8, 6, 3, 3, seed=2) < 0.5}
    kept = [0, 2, 3, 7, 8, 11]
    sel = pl.Selection(kept={"fc1": tuple(kept)}, masks=masks)
    found = repair(program, sel, how, images)
    small = pl.commit(program, sel, repair=found)
    assert not small.fc2.weight[~masks["fc2.weight"][:, kept]].any()
    assert not small.conv2.weight[~masks["conv2.weight"]].any()
    if how.startswith("least-squares"):
        assert {"fc2.weight", "conv2.weight"} <= set(found)


@pytest.mark.parametrize("how", ["bias", "least-squares", "least-squares+norm"])
def test_every_repair_comes_nearer_to_what_the_network_gave(how: str, program: pl.Program, images: Tensor) -> None:
    half = {layer.name: tuple(range(0, layer.channels, 2)) for layer in program.layers if not layer.pinned}
    sel = pl.Selection(kept=half)
    whole, plain = outputs(program, sel, "none", images)
    mended = outputs(program, sel, how, images)[1]
    factor = 2 if how.startswith("least-squares") else 1
    assert (mended - whole).square().mean() < (plain - whole).square().mean() / factor


# What is left alone ---------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.shared = nn.Linear(5, 5)
        self.up = nn.ConvTranspose1d(5, 2, 3)
        self.last = nn.Linear(12, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.shared(torch.relu(self.shared(torch.relu(self.first(x))))))
        x = x[:, :, None].expand(-1, -1, 4)
        return self.last(self.up(x).flatten(1))


def test_what_cannot_be_repaired_is_left_alone_and_named() -> None:
    images = noise(40, 6)
    program = traced(Twice(), images)
    name = next(layer.name for layer in program.layers if "shared" in layer.members)
    sel = pl.Selection(kept={name: (0, 1, 3)})
    found = repair(program, sel, "least-squares", images)
    assert dict(found.left) == {
        "shared": "its weight is used more than once",
        "up": "repair knows convolutions and linear layers, not conv_transpose1d",
    }
    assert set(found) == {"last.weight"}
    assert "2 layers left" in str(found)
    assert "last" in dict(repair(program, sel, "bias", images).left)
    assert not repair(program, sel, "bias", images)


def test_norms_are_missed_where_there_are_none() -> None:
    images = noise(40, 6)
    program = traced(Two(nn.Linear(6, 5), nn.Linear(5, 3)), images)
    found = repair(program, pl.Selection(kept={"first": (0, 1)}), "norm", images)
    assert not found
    assert found.left == (("the network", "no batch norm reads what the cut changes"),)


def test_bad_input(program: pl.Program, images: Tensor) -> None:
    sel = pl.Selection(kept={"fc1": (0,)})
    with pytest.raises(pl.PruneLabError, match="least-squares"):
        repair(program, sel, "least-square", images)
    with pytest.raises(pl.PruneLabError, match="needs images"):
        pl.commit(program, sel, repair="least-squares")
    with pytest.raises(pl.PruneLabError, match="shape"):
        repair(program, sel, "least-squares", noise(20, 1, 8, 9))
    assert repair(program, sel, "none", None) == {}
    assert repair(program, pl.DENSE, "norm", images) == {}


# Between calls ---------------------------------------------


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_what_is_kept_between_calls_changes_no_answer(budget: int, images: Tensor) -> None:
    program = traced(NormedBlocks(), images)
    repairer = Repairer(program, images, budget)
    for kept in ((0, 2, 3), (1, 4), (0, 2, 3)):
        sel = pl.Selection(kept={"inner.0": kept, "inner.1": kept})
        assert removes_anything(program, sel)
        for how in KINDS:
            found, fresh = repairer(sel, how), repair(program, sel, how, images)
            assert found.keys() == fresh.keys()
            assert all(torch.equal(found[name], fresh[name]) for name in fresh)


def test_resnet20_keeps_its_accuracy() -> None:
    """Half of every block's inner channels by L1: without repair the network is lost, with it few points are."""
    train, test = pl.datasets.fashion_mnist()
    program = pl.trace(pl.zoo.load("resnet20"), test.images[:2])
    plan = pl.Plan("l1")
    for layer in program.layers:
        if layer.name.endswith(".conv1"):
            plan = plan.set(layer.name, ratio=0.5)
    sel = plan.resolve(program)
    preview = pl.Preview(program, test.images[:1000], test.labels[:1000])
    repairer = Repairer(program, train.images[:500])
    plain = preview.accuracy(sel)
    mended = preview.accuracy(sel, repaired=repairer(sel, "least-squares"))
    assert plain.accuracy < 0.5
    assert mended.accuracy > mended.base - 0.03
    assert preview.accuracy(sel, repaired=repairer(sel, "norm")).accuracy > plain.accuracy
