"""Promise 1: the preview is the commit. Logits, parameters and FLOPs, for the zoo and torchvision's networks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import pytest
import torch
import torchvision.models as tv
from support import Network, flops, half_of_everything, parameters, relative, with_channels_at_zero
from torch import Tensor, nn
from torch.nn import functional

import prunelab as pl
from prunelab import zoo
from prunelab.program.program import Program
from prunelab.program.run import bind

SMALL, MEDIUM = (3, 32, 32), (3, 64, 64)
NETWORKS = {
    "lenet": Network(zoo.lenet, (1, 28, 28)),
    "vgg_small": Network(zoo.vgg_small, (1, 28, 28)),
    "vgg_small without norms": Network(partial(zoo.vgg_small, batch_norm=False), (1, 28, 28)),
    "vgg16": Network(zoo.vgg16, SMALL),
    "vgg16 without norms": Network(partial(zoo.vgg16, batch_norm=False), SMALL),
    "vgg19": Network(zoo.vgg19, SMALL),
    "vgg19 without norms": Network(partial(zoo.vgg19, batch_norm=False), SMALL),
    "resnet20": Network(zoo.resnet20, SMALL),
    "resnet20 with projections": Network(partial(zoo.resnet20, shortcut="projection"), SMALL),
    "resnet56": Network(zoo.resnet56, SMALL),
    "torchvision resnet18": Network(tv.resnet18, MEDIUM),
    "torchvision resnet50": Network(tv.resnet50, MEDIUM),
    "torchvision vgg16_bn": Network(tv.vgg16_bn, SMALL),
    "torchvision mobilenet_v2": Network(tv.mobilenet_v2, MEDIUM),
    "torchvision densenet121": Network(tv.densenet121, MEDIUM),
    "torchvision resnext50_32x4d": Network(tv.resnext50_32x4d, MEDIUM),
    "torchvision mobilenet_v3_small": Network(tv.mobilenet_v3_small, MEDIUM),
    "torchvision efficientnet_b0": Network(tv.efficientnet_b0, MEDIUM),
    "torchvision squeezenet1_0": Network(tv.squeezenet1_0, MEDIUM),
    "torchvision shufflenet_v2_x1_0": Network(tv.shufflenet_v2_x1_0, MEDIUM),
}


@dataclass(frozen=True)
class Case:
    """A network, its program, a selection, and everything that follows, computed once."""

    network: Network
    program: Program
    selection: pl.Selection
    images: Tensor

    @cached_property
    def small(self) -> nn.Module:
        return pl.commit(self.program, self.selection)

    @cached_property
    def logits(self) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.small(self.images)
        return found


@pytest.fixture(scope="module", params=NETWORKS)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    network = NETWORKS[request.param]
    program = pl.trace(network.build(), network.images())
    return Case(network, program, half_of_everything(program), network.images())


def test_previewed_logits_are_the_committed_modules(case: Case) -> None:
    assert relative(bind(case.program, case.selection)(case.images), case.logits) < 1e-10


def test_committed_module_is_the_network_with_these_channels_at_zero(case: Case) -> None:
    with torch.no_grad():
        expected = with_channels_at_zero(case.program, case.selection)(case.images)
    assert relative(case.logits, expected) < 1e-10


def test_selection_changes_what_the_network_says(case: Case) -> None:
    with torch.no_grad():
        assert relative(case.program.model(case.images), case.logits) > 1e-3


def test_dense_preview_is_the_users_module(case: Case) -> None:
    with torch.no_grad():
        assert relative(bind(case.program)(case.images), case.program.model(case.images)) < 1e-10


def test_projected_parameters_are_the_counted_ones(case: Case) -> None:
    projected = pl.cost(case.program, case.selection)
    assert projected.params == parameters(case.small) < parameters(case.program.model)
    masked = sum(int((~mask).sum()) for mask in pl.sliced_masks(case.program, case.selection).values())
    assert projected.nonzero == projected.params - masked < projected.params


def test_projected_flops_are_the_counted_ones(case: Case) -> None:
    projected, image = pl.cost(case.program, case.selection), case.images[:1]
    assert projected.flops == 2 * projected.macs == flops(case.small, image) < flops(case.program.model, image)


def test_projected_bytes_are_those_of_the_state(case: Case) -> None:
    held = case.small.state_dict().values()
    assert pl.cost(case.program, case.selection).bytes == sum(t.numel() * t.element_size() for t in held)


def test_attributes_and_repr_follow_the_shapes(case: Case) -> None:
    for part in case.small.modules():
        if isinstance(part, nn.Conv2d):
            outputs, inputs = part.weight.shape[:2]
            assert (part.in_channels, part.out_channels) == (inputs * part.groups, outputs)
            assert repr(part).startswith(f"Conv2d({inputs * part.groups}, {outputs}, ")
            grouped = re.search(r"groups=(\d+)", repr(part))
            assert part.groups == int(grouped[1] if grouped else 1)
        elif isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_mean.shape == part.weight.shape == (part.num_features,)
            assert repr(part).startswith(f"BatchNorm2d({part.num_features}, ")
        elif isinstance(part, nn.Linear):
            assert part.weight.shape == (part.out_features, part.in_features)
            assert repr(part).startswith(f"Linear(in_features={part.in_features}, out_features={part.out_features}, ")


def test_everything_but_the_output_layer_is_free(case: Case) -> None:
    weights = {n for n, m in case.program.model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    free = {
        slot.state.removesuffix(".weight")
        for layer in case.program.layers
        for slot in layer.slots
        if not layer.pinned and slot.dim == 0
    }
    assert len(weights - free) == 1
    assert len(weights) < 10 or len(weights & free) >= 0.9 * len(weights)


def test_it_is_a_module_of_the_users_class_with_a_state_that_loads(case: Case) -> None:
    again = pl.commit(case.program, case.selection)
    assert type(again) is type(case.program.model)
    assert case.small.state_dict().keys() == case.program.model.state_dict().keys()
    with torch.no_grad():
        next(again.parameters()).add_(1.0)
    again.load_state_dict(case.small.state_dict())
    with torch.no_grad():
        assert torch.equal(again(case.images), case.logits)


# By hand: what slicing means, in plain indexing ---------------------------------------------


def test_lenet_by_hand() -> None:
    network = NETWORKS["lenet"]
    model, x = network.build(), network.images()
    assert isinstance(model, zoo.LeNet)
    program = pl.trace(model, x)
    first, second, hidden = [0, 3, 19], [1, 2, 30, 49], [5, 6, 7, 499]
    kept = {"conv1": tuple(first), "conv2": tuple(second), "fc1": tuple(hidden)}
    mask = torch.rand(500, 800, generator=torch.Generator().manual_seed(0)) > 0.5
    small = pl.commit(program, pl.Selection(kept, {"fc1.weight": mask}))

    flat = torch.arange(50 * 16).reshape(50, 16)[second].flatten()
    with torch.no_grad():
        y = functional.conv2d(x, model.conv1.weight[first], model.conv1.bias[first])
        y = functional.max_pool2d(y.relu(), 2)
        y = functional.conv2d(y, model.conv2.weight[second][:, first], model.conv2.bias[second])
        y = functional.max_pool2d(y.relu(), 2).flatten(1)
        y = functional.linear(y, (model.fc1.weight * mask)[hidden][:, flat], model.fc1.bias[hidden]).relu()
        y = functional.linear(y, model.fc2.weight[:, hidden], model.fc2.bias)
        assert relative(small(x), y) < 1e-12
    assert relative(bind(program, pl.Selection(kept, {"fc1.weight": mask}))(x), y) < 1e-12
    # 3 of 20 filters of 25 weights; 4 of 50 of 3·25; 4 of 500 neurons of 4·16; 10 of 4; each with its biases.
    assert parameters(small) == 3 * 26 + 4 * (3 * 25 + 1) + 4 * (4 * 16 + 1) + 10 * 5


class Mixed(nn.Module):
    """A residual sum, a depthwise convolution, a concatenation and a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.side = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear((8 + 6) * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.inner(x)
        x = torch.cat([self.depthwise(x), self.side(x)], 1)
        logits: Tensor = self.head(functional.adaptive_avg_pool2d(x.relu(), 2).flatten(1))
        return logits


def test_small_network_by_hand() -> None:
    network = Network(Mixed, (3, 8, 8))
    model, x = network.build(), network.images()
    assert isinstance(model, Mixed)
    program = pl.trace(model, x)
    a, b = [0, 2, 3, 7], [1, 5]
    names = {layer.members: layer.name for layer in program.layers}
    kept = {names["stem", "inner"]: tuple(a), names["side",]: tuple(b)}
    small = pl.commit(program, pl.Selection(kept))

    with torch.no_grad():
        y = functional.conv2d(x, model.stem.weight[a], padding=1)
        norm = model.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        y = (y - norm.running_mean[a, None, None]) / (norm.running_var[a, None, None] + norm.eps).sqrt()
        y = (y * norm.weight[a, None, None] + norm.bias[a, None, None]).relu()
        y = y + functional.conv2d(y, model.inner.weight[a][:, a], model.inner.bias[a], padding=1)
        left = functional.conv2d(y, model.depthwise.weight[a], model.depthwise.bias[a], padding=1, groups=4)
        right = functional.conv2d(y, model.side.weight[b][:, a], model.side.bias[b])
        y = functional.adaptive_avg_pool2d(torch.cat([left, right], 1).relu(), 2).flatten(1)
        columns = torch.arange(14 * 4).reshape(14, 4)[[*a, *(8 + c for c in b)]].flatten()
        y = functional.linear(y, model.head.weight[:, columns], model.head.bias)
        assert relative(small(x), y) < 1e-12
    assert relative(bind(program, pl.Selection(kept))(x), y) < 1e-12
    assert small.depthwise.groups == 4


# What commit gives ---------------------------------------------


def test_new_module_shares_nothing_with_the_old_one() -> None:
    network = NETWORKS["resnet20"]
    model = network.build()
    program = pl.trace(model, network.images())
    for selection in (pl.DENSE, half_of_everything(program)):
        small = pl.commit(program, selection)
        old = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()] if t.numel()}
        new = {t.untyped_storage().data_ptr() for t in [*small.parameters(), *small.buffers()] if t.numel()}
        assert small is not model
        assert not old & new
        assert not {id(m) for m in model.modules()} & {id(m) for m in small.modules()}


def test_flags_hooks_and_requires_grad_are_the_originals() -> None:
    network = NETWORKS["vgg_small"]
    model = network.build()
    model.stage1.train()
    model.stage2.requires_grad_(False)
    said: list[str] = []
    model.stage1.register_forward_hook(lambda *_: said.append("hook"))
    program = pl.trace(model, network.images())
    small = pl.commit(program, half_of_everything(program))
    flags = {name: part.training for name, part in model.named_modules()}
    assert {name: part.training for name, part in small.named_modules()} == flags
    wants = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in small.named_parameters()} == wants
    said.clear()
    small(network.images())
    assert said == ["hook"]


def test_masked_weights_are_zero_and_only_they() -> None:
    network = NETWORKS["lenet"]
    program = pl.trace(network.build(), network.images())
    mask = torch.rand(50, 20, 5, 5, generator=torch.Generator().manual_seed(1)) > 0.4
    small = pl.commit(program, pl.Selection({"conv1": tuple(range(0, 20, 2))}, {"conv2.weight": mask}))
    assert torch.equal(small.get_parameter("conv2.weight") != 0, mask[:, ::2])


def test_weights_that_are_shared_stay_shared() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.b(self.a(x).relu()).relu() + self.a(x))
            return logits

    network = Network(Shared, (6,))
    program = pl.trace(network.build(), network.images())
    selection = half_of_everything(program, mask=False)
    small = pl.commit(program, selection)
    assert small.b.weight is small.a.weight
    assert pl.cost(program, selection).params == parameters(small)
    with torch.no_grad():
        assert relative(bind(program, selection)(network.images()), small(network.images())) < 1e-10


def test_unknown_repair_names_the_known_ones() -> None:
    network = NETWORKS["lenet"]
    program = pl.trace(network.build(), network.images())
    with pytest.raises(pl.PruneLabError, match="'none'"):
        pl.commit(program, pl.DENSE, repair="nonne")


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"conv1": ()}, "must keep some of the channels 0 to 19"),
        ({"conv1": (3, 2)}, "ascending"),
        ({"conv1": (0, 20)}, "must keep some of the channels 0 to 19"),
        ({"conv1": (-1, 2)}, "must keep some of the channels 0 to 19"),
        ({"fc2": (0, 1)}, "cannot be pruned: its outputs are the network's outputs"),
        ({"conv9": (0,)}, "nearest names are 'conv"),
    ],
)
def test_selection_that_does_not_fit_is_refused_everywhere(kept: dict[str, tuple[int, ...]], message: str) -> None:
    network = NETWORKS["lenet"]
    program = pl.trace(network.build(), network.images())
    selection = pl.Selection(kept)
    for use in (pl.commit, pl.cost, bind):
        with pytest.raises(pl.PruneLabError, match=message):
            use(program, selection)


def test_mask_that_does_not_fit_is_refused_everywhere() -> None:
    network = NETWORKS["lenet"]
    program = pl.trace(network.build(), network.images())
    wrong = (
        {"conv1.weight": torch.ones(20, dtype=torch.bool)},
        {"conv9.weight": torch.ones(20, dtype=torch.bool)},
    )
    for masks in wrong:
        for use in (pl.commit, pl.cost, bind):
            with pytest.raises(pl.PruneLabError, match=r"conv\d.weight"):
                use(program, pl.Selection(masks=masks))
