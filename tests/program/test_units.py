"""Units: which layers and blocks can be bypassed, and that bypassing one is an identity in its place, exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from support import Network, flops, half_of_everything, parameters, relative
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import prunelab as pl
from prunelab import zoo
from prunelab.criteria.registry import scores as scores_of
from prunelab.program.program import Program
from prunelab.program.run import bind
from prunelab.zoo.vgg import VGG


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=5
    )


NETWORKS = {
    "resnet18": Network(torchvision.models.resnet18, (3, 64, 64)),
    "resnet50": Network(torchvision.models.resnet50, (3, 64, 64)),
    "resnet20": Network(zoo.resnet20, (3, 32, 32)),
    "mobilenet_v2": Network(torchvision.models.mobilenet_v2, (3, 64, 64)),
    "vgg": Network(lambda: VGG(((8,) * 2, (16,) * 3, (16,) * 3)), (3, 16, 16)),
    "convnext_tiny": Network(torchvision.models.convnext_tiny, (3, 64, 64)),
    "vit": Network(vit, (3, 32, 32)),
}
EXACT = ("resnet18", "resnet20", "mobilenet_v2", "vgg", "vit")


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    """Traced when first asked for, once."""

    class Traced(dict[str, Program]):
        def __missing__(self, name: str) -> Program:
            net = NETWORKS[name]
            self[name] = pl.trace(net.build(), net.images())
            return self[name]

    return Traced()


def by_hand(model: nn.Module, modules: tuple[str, ...]) -> nn.Module:
    """A copy of the model with an identity in the place of each module: what a bypass must compute."""
    copied = copy.deepcopy(model)
    for path in modules:
        copied.set_submodule(path, nn.Identity())
    return copied


def holds(program: Program, images: Tensor, selection: pl.Selection) -> nn.Module:
    """Promise 1 on one selection; gives the committed module."""
    small = pl.commit(program, selection)
    with torch.no_grad():
        assert relative(bind(program, selection)(images), small(images)) < 1e-10
    projected = pl.cost(program, selection)
    assert projected.params == parameters(small)
    assert projected.flops == unfused_flops(small, images[:1])
    state = small.state_dict().values()
    assert projected.bytes == sum(t.numel() * t.element_size() for t in state)
    return small


def unfused_flops(model: nn.Module, images: Tensor) -> int:
    """FLOPs with attention taken apart: PyTorch's counter sees nothing of its fused forms."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return flops(model, images)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# Which units there are ---------------------------------------------


def names(program: Program, grain: str) -> list[str]:
    return [unit.name for unit in program.units if unit.grain == grain]


def test_residual_networks(programs: dict[str, Program]) -> None:
    # A block that changes the size or the width has no identity in its place; a stage of equal blocks has.
    assert names(programs["resnet18"], "block") == [
        "layer1", "layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"
    ]  # fmt: skip
    blocks = [f"layer{stage}.{k}" for stage, count in ((1, 3), (2, 4), (3, 6), (4, 3)) for k in range(1, count)]
    assert names(programs["resnet50"], "block") == blocks
    # The ReLU of a torchvision block is called several times: it stays.
    unit = programs["resnet18"].unit("layer1.0.conv1")
    assert (unit.grain, unit.modules) == ("layer", ("layer1.0.conv1", "layer1.0.bn1"))
    assert "layer2.0.conv1" not in names(programs["resnet18"], "layer")


def test_inverted_residuals(programs: dict[str, Program]) -> None:
    blocks = names(programs["mobilenet_v2"], "block")
    assert [name for name in blocks if name.count(".") == 1] == [
        f"features.{k}" for k in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)
    ]
    # Only the depthwise convolutions of equal size keep the shape, each with its own norm and activation.
    assert programs["mobilenet_v2"].unit("features.3.conv.1.0").modules == tuple(
        f"features.3.conv.1.{k}" for k in range(3)
    )
    assert "features.2.conv.1.0" not in names(programs["mobilenet_v2"], "layer")


def test_runs_between_pools(programs: dict[str, Program]) -> None:
    program = programs["vgg"]
    # The last stage ends without a pool: the run in it is a module already.
    assert names(program, "block") == ["stage2.conv2 … stage2.conv3", "stage3"]
    run, layers = program.unit("stage2.conv2 … stage2.conv3"), [program.unit(f"stage2.conv{k}") for k in (2, 3)]
    assert run.modules == tuple(f"stage2.{part}{k}" for k in (2, 3) for part in ("conv", "norm", "relu"))
    assert (run.source, run.output) == (layers[0].source, layers[1].output)
    assert layers[0].output == layers[1].source
    last = [f"stage3.conv{k}" for k in (1, 2, 3)]
    assert names(program, "layer") == ["stage1.conv2", "stage2.conv2", "stage2.conv3", *last]


def test_transformers_and_convnext(programs: dict[str, Program]) -> None:
    blocks = names(programs["vit"], "block")
    assert {f"encoder.layers.encoder_layer_{k}" for k in range(3)} <= set(blocks)
    # Attention is called with three tensors, so no identity can stand for it.
    assert not [name for name in blocks if name.endswith("self_attention")]
    stages = [f"features.{stage}.{k}" for stage, count in ((1, 3), (3, 3), (5, 9), (7, 3)) for k in range(count)]
    assert set(stages) <= set(names(programs["convnext_tiny"], "block"))


class Hand(nn.Module):
    """3 → 4 → 4 → 4 channels on 6 × 6 images; the second convolution keeps the shape, the last one is a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.middle, self.norm, self.act = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.pair = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.middle(self.stem(x))))
        logits: Tensor = self.head(self.pair(x).mean((2, 3)))
        return logits


def test_an_example_by_hand() -> None:
    net = Network(Hand, (3, 6, 6))
    program = pl.trace(net.build(), net.images())
    assert [(u.name, u.grain, u.modules) for u in program.units] == [
        ("middle", "layer", ("middle", "norm", "act")),
        ("pair", "block", ("pair",)),
    ]
    whole = (3 * 4 * 9 + 4) + (4 * 4 * 9 + 8) + (4 * 6 + 6) + (6 * 4 + 4) + (4 * 5 + 5)
    dense = pl.cost(program)
    assert dense.params == whole
    frame = program.units.to_frame()
    assert frame["params"]["middle"] == pytest.approx((4 * 4 * 9 + 8) / whole)
    assert frame["flops"]["pair"] == pytest.approx(2 * 36 * (24 + 24) / dense.flops)
    assert "middle  layer  3" in repr(program.units)
    now = pl.cost(program, pl.Selection(bypassed=("middle",)))
    assert now.params == whole - (4 * 4 * 9 + 8)
    assert now.flops == dense.flops - 2 * 36 * 4 * 4 * 9
    assert now.bytes == dense.bytes - 8 * (4 * 4 * 9 + 4 * 4) - 8
    # The stem's channels are now those that the pair reads: one bypass couples what the middle kept apart.
    assert [layer.name for layer in program.layers] == ["stem", "middle", "pair.0", "pair.2", "head"]
    left = program.without(["middle"])
    assert [layer.name for layer in left.layers] == ["stem", "pair.0", "pair.2", "head"]
    assert {slot.state for slot in left.layer("stem").slots} == {"stem.weight", "stem.bias", "pair.0.weight"}
    assert {slot.state for slot in program.layer("stem").slots} == {"stem.weight", "stem.bias", "middle.weight"}
    assert pl.cost(program, pl.Selection({"stem": (1, 3)}, bypassed=("middle",))).params == now.params - 2 * (28 + 6)


class Around(nn.Module):
    """A stem, something in the middle that tells two modules apart, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU()

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.middle(self.stem(x)).mean((2, 3)))
        return logits


class Changes(Around):
    """The shape changes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 3)

    def middle(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


class Twice(Around):
    """A convolution is called twice; the other once."""

    def middle(self, x: Tensor) -> Tensor:
        return self.a(self.act(self.b(self.a(x))))


class Sum(nn.Module):
    """Two convolutions, each on an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) + self.b(y)


class TwoInputs(Around):
    """A module takes two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = Sum()

    def middle(self, x: Tensor) -> Tensor:
        return self.sum(x, x.sigmoid())


class Peeking(Around):
    """The norm's input is read from outside, and so is its weight."""

    def middle(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.act(self.norm(x)) + x * self.norm.weight.mean()


class Tied(Around):
    """Two convolutions share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.b.weight = self.a.weight

    def middle(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


class Named(Around):
    """The forward asks a module for something that an identity has not."""

    def middle(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        return self.b(x) if self.b.out_channels == 4 else x


class Pair(nn.Module):
    """Gives two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.b(self.a(x)), x


class GivesTwo(Around):
    """A module gives two tensors, of which forward takes the first."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def middle(self, x: Tensor) -> Tensor:
        return self.pair(x)[0]


LISTED: dict[str, tuple[type[nn.Module], list[tuple[str, ...]]]] = {
    "another shape": (Changes, []),
    "called twice": (Twice, [("b", "act")]),
    "two inputs": (TwoInputs, [("sum.a",), ("sum.b",)]),
    "read from outside": (Peeking, [("a",)]),
    "shared weight": (Tied, []),
    "asked for its width": (Named, [("a", "act")]),
    "two outputs": (GivesTwo, [("pair.a", "pair.b"), ("pair.a",), ("pair.b",)]),
}


@pytest.mark.parametrize(("make", "expected"), LISTED.values(), ids=LISTED)
def test_what_is_not_proven_is_not_listed(make: type[nn.Module], expected: list[tuple[str, ...]]) -> None:
    net = Network(make, (3, 6, 6))
    program = pl.trace(net.build(), net.images())
    assert [unit.modules for unit in program.units] == expected
    for unit in program.units:
        holds(program, net.images(), pl.Selection(bypassed=(unit.name,)))


class InPlace(Around):
    """After the convolution that is bypassed, its output is overwritten, and its input is read again."""

    def middle(self, x: Tensor) -> Tensor:
        return functional.relu(self.a(x), inplace=True) + x * self.b(x).sigmoid()


class InPlacePart(Around):
    """Part of the convolution's output is overwritten, and part of its input is read again."""

    def middle(self, x: Tensor) -> Tensor:
        part = x[:, :2]
        y = functional.relu(self.a(x), inplace=True)
        return y + torch.cat([part, part], 1)


class InPlaceImage(nn.Module):
    """Without its first convolution the network would overwrite the user's images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(functional.relu(self.a(x), inplace=True))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("make", "expected"),
    [(InPlace, ["a", "b"]), (InPlacePart, []), (InPlaceImage, ["b", "head"])],
    ids=lambda v: str(v)[-15:],
)
def test_what_an_identity_lets_in_place_operators_overwrite(make: type[nn.Module], expected: list[str]) -> None:
    net = Network(make, (3, 6, 6))
    program, images = pl.trace(net.build(), net.images()), net.images()
    assert [unit.name for unit in program.units] == expected
    for unit in program.units:
        small = holds(program, images, pl.Selection(bypassed=(unit.name,)))
        with torch.no_grad():
            assert torch.equal(small(images), by_hand(program.model, unit.modules)(images))
    assert torch.equal(images, net.images())


def test_a_forward_that_takes_another_path_is_not_followed() -> None:
    class Counting(Around):
        """Calls as many blocks as it finds convolutions."""

        def middle(self, x: Tensor) -> Tensor:
            for part in (self.a, self.b):
                x = part(x)
                if isinstance(part, nn.Conv2d):
                    x = x.sigmoid()
            return x

    net = Network(Counting, (3, 6, 6))
    assert not pl.trace(net.build(), net.images()).units


# What a bypass is ---------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_a_bypass_is_an_identity_in_its_place(name: str, programs: dict[str, Program]) -> None:
    program, images = programs[name], NETWORKS[name].images()
    units = list(program.units)
    for unit in units[1 :: max(1, len(units) // 3)]:
        small = holds(program, images, pl.Selection(bypassed=(unit.name,)))
        assert [type(small.get_submodule(path)) for path in unit.modules] == [nn.Identity] * len(unit.modules)
        with torch.no_grad():
            assert torch.equal(small(images), by_hand(program.model, unit.modules)(images))


@pytest.mark.parametrize("name", EXACT)
def test_blocks_layers_channels_and_weights_together(name: str, programs: dict[str, Program]) -> None:
    program, net = programs[name], NETWORKS[name]
    chosen = tuple(unit.name for unit in list(program.units)[::3])
    left = program.without(chosen)
    part = half_of_everything(left, seed=1)
    small = holds(program, net.images(), pl.Selection(part.kept, part.masks, chosen))
    # The committed module is an ordinary network: it is traced, cut and bypassed like any other.
    again = pl.trace(small, net.images())
    assert {u.name for u in again.units} <= {u.name for u in program.units}
    if again.units:
        holds(again, net.images(), pl.Selection(bypassed=(again.units[0].name,)))


def test_overlapping_units_compose() -> None:
    class Overlap(Around):
        """A block whose last convolution has its norm outside."""

        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1))

        def middle(self, x: Tensor) -> Tensor:
            return self.norm(self.block(x))

    net = Network(Overlap, (3, 6, 6))
    program = pl.trace(net.build(), net.images())
    both = pl.Selection(bypassed=("block", "block.1"))
    assert program.unit("block.1").modules == ("block.1", "norm")
    with torch.no_grad():
        expected = by_hand(program.model, ("block", "norm"))(net.images())
        assert torch.equal(holds(program, net.images(), both)(net.images()), expected)


def test_a_stream_keeps_its_name_and_its_profile(programs: dict[str, Program]) -> None:
    program, images = programs["resnet20"], NETWORKS["resnet20"].images(8)
    profile = pl.profile(program, images, cache=False, progress=False)
    plan = pl.Plan("apoz").set("layer1 stream", ratio=0.5).set("layer1.1.conv1", ratio=0.5)
    everything = plan.bypass("layer1.0").bypass("layer1.1").bypass("layer1.2")
    for bypassed in (plan.bypass("layer1.1"), everything):
        selection = bypassed.resolve(program, profile)
        # The layer inside rests, the stream is still there under its name.
        assert selection.kept.keys() == {"layer1 stream"}
        holds(program, images, selection)
    layer = program.without(["layer1.1"]).layer("layer1 stream")
    scores = scores_of(program.without(["layer1.1"]), profile, "apoz", layer)
    # Of the four sites the one behind the bypassed block is left out.
    old = program.layer("layer1 stream")
    behind = program.unit("layer1.1").output
    seen = [s.apoz[at].mean(1) for site, (s, at) in zip(old.sites, profile.of(old), strict=True) if site != behind]
    assert len(seen) == len(old.sites) - 1
    # Every member on its own scale, the root mean square of its scores.
    expected = -sum(a / np.sqrt((a**2).mean()) for a in seen) / len(seen)
    assert scores == pytest.approx(expected)


def test_states_and_flags_of_what_stays_are_untouched(programs: dict[str, Program]) -> None:
    program = programs["resnet18"]
    program.model.train()
    program.model.layer1[0].eval()
    before = {name: t.clone() for name, t in program.model.state_dict().items()}
    small = pl.commit(program, pl.Selection(bypassed=("layer1.0", "layer2.1")))
    assert not small.layer1[0].training
    assert small.layer2[1].training
    assert small.training
    program.model.eval()
    assert all(torch.equal(t, before[name]) for name, t in program.model.state_dict().items())
    shared = {t.data_ptr() for t in program.model.state_dict().values()}
    assert not shared & {t.data_ptr() for t in small.state_dict().values()}


def test_masks_of_bypassed_weights_are_left_out(programs: dict[str, Program]) -> None:
    program = programs["resnet18"]
    mask = {f"layer1.{k}.conv1.weight": torch.rand(64, 64, 3, 3) > 0.5 for k in (0, 1)}
    selection = pl.Selection(masks=mask, bypassed=("layer1.0",))
    assert pl.sliced_masks(program, selection).keys() == {"layer1.1.conv1.weight"}
    lost = int((~mask["layer1.1.conv1.weight"]).sum())
    found = pl.cost(program, selection)
    assert found.params - found.nonzero == lost


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda p: p.without(["layer1.3"]), "no layer or block to bypass 'layer1.3'.*'layer1.1'"),
        (lambda p: pl.cost(p, pl.Selection(bypassed=("conv1",))), "no layer or block to bypass 'conv1'"),
        (lambda p: pl.commit(p, pl.Selection({"layer1.0.conv1": (0,)}, bypassed=("layer1.0",))), "layer1.0.conv1"),
    ],
)
def test_what_cannot_be_is_refused(use: Callable[[Program], object], says: str, programs: dict[str, Program]) -> None:
    with pytest.raises(pl.PruneLabError, match=says):
        use(programs["resnet18"])
