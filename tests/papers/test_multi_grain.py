"""Multi-grain pruning: its order, its budgets, its masks, and a record that equals what is counted on the network."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import killed
import pytest
import torch
from support import flops, parameters
from torch import Tensor, nn

import prunelab as pl
from prunelab.papers.evidence import accuracy
from prunelab.papers.experiments.multi_grain import _Mixed
from prunelab.papers.multi_grain import GRAINS, grains, multi_grain
from prunelab.papers.multi_grain_record import Grain, MultiGrain
from prunelab.papers.multi_grain_scores import added_loss, lamp, lowest_channels, smallest_weights
from prunelab.papers.reproduce import reproduce
from prunelab.progress import Stopped

TRAIN, VAL = killed.images(400, 0), killed.images(200, 1)
RECIPE = pl.Recipe(epochs=1, lr=0.02, batch_size=32, precision="no")
ALL = dict.fromkeys(GRAINS, 1.0)
STOPS = {"block": (1.2,), "layer": (2.0,), "channel": (5.0,), "weight": (8.0, 12.0)}
GIVEN: dict[str, Any] = {
    "budgets": ALL,
    "stops": STOPS,
    "recovery": RECIPE,
    "finetuning": RECIPE,
    "progress": False,
}


def stage(given: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(given, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]


def network(*stages: int) -> nn.Module:
    """Convolutions of these widths, each with its norm and activation, pooled and classified, and trained a little."""
    torch.manual_seed(0)
    widths = (3, *stages)
    parts = [part for given, width in zip(widths, stages, strict=False) for part in stage(given, width)]
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * stages[-1], 4))
    pl.finetune(model, TRAIN, VAL, epochs=2, lr=0.05, batch_size=32, precision="no", progress=False)
    return model


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    """With a block of three equal layers, and one more layer that can be bypassed."""
    return network(8, 8, 8, 8, 12, 12)


def pruned(model: nn.Module, **settings: Any) -> tuple[nn.Module, MultiGrain]:
    return multi_grain(model, TRAIN, VAL, **{**GIVEN, **settings})


@pytest.fixture(scope="module")
def whole(dense: nn.Module) -> tuple[nn.Module, MultiGrain, list[tuple[Grain, nn.Module]]]:
    """All grains on it, with a copy of the network that each of them left."""
    left: list[tuple[Grain, nn.Module]] = []
    for record, small in grains(dense, TRAIN, VAL, **GIVEN):
        left += [(grain, copy.deepcopy(small)) for grain in record.grains[-1:]]
    return small, record, left


Whole = tuple[nn.Module, MultiGrain, list[tuple[Grain, nn.Module]]]


def zeros(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_every_grain_takes_something_from_coarse_to_fine(whole: Whole) -> None:
    _, record, left = whole
    assert [grain.name for grain in record.grains] == ["block", "layer", "channel", "weight", "weight"]
    assert [grain for grain, _ in left] == list(record.grains)
    assert all(grain.kept for grain in record.grains)
    assert record.grains[0].kept[0].what == "3 … 9"
    assert "channels of" in record.grains[2].kept[0].what
    sizes = [record.dense.nonzero, *(grain.size.nonzero for grain in record.grains)]
    assert sizes == sorted(sizes, reverse=True)


def test_the_record_is_what_is_counted_on_the_network_after_each_grain(whole: Whole) -> None:
    small, record, left = whole
    for grain, model in left:
        assert grain.size.params == parameters(model)
        assert grain.size.nonzero == parameters(model) - zeros(model)
        assert 2 * grain.size.macs == flops(model.eval(), VAL.tensors[0][:1])
        right = (model(VAL.tensors[0]).argmax(1) == VAL.tensors[1]).float().mean()
        assert grain.accuracy == pytest.approx(float(right))
    assert record.compression == record.dense.params / (parameters(small) - zeros(small))
    assert record.structural == record.dense.params / parameters(small)


def test_a_stop_is_reached_and_not_passed_by_weights(whole: Whole) -> None:
    _, record, _ = whole
    reached = [record.dense.params / grain.size.nonzero for grain in record.grains]
    assert all(found >= stop for found, stop in zip(reached, (1.2, 2.0, 5.0, 8.0, 12.0), strict=True))
    assert [grain.size.nonzero for grain in record.grains[3:]] == [int(record.dense.params / stop) for stop in (8, 12)]


def test_weights_once_zero_stay_zero_and_the_masks_say_which(whole: Whole) -> None:
    small, record, left = whole
    before, after = dict(left[3][1].named_parameters()), dict(small.named_parameters())
    for name, mask in record.masks.items():
        assert torch.equal(after[name] != 0, mask)
        assert not (mask & (before[name] == 0)).any()
    pl.finetune(copy.deepcopy(small), TRAIN, VAL, masks=record.masks, epochs=1, batch_size=64, progress=False)


def test_the_given_network_is_not_touched(dense: nn.Module, whole: Whole) -> None:
    fresh = network(8, 8, 8, 8, 12, 12)
    assert whole[0] is not dense
    assert all(torch.equal(a, b) for a, b in zip(values(dense).values(), values(fresh).values(), strict=True))
    assert dense.training == fresh.training
    assert all(p.grad is None for p in dense.parameters())


def test_a_cut_beyond_the_budget_is_taken_back(dense: nn.Module) -> None:
    base = accuracy(dense, *VAL.tensors)
    settings = {"recovery": pl.Recipe(epochs=0), "repair": "none", "channels": 0.3, "weights": 0.5}
    small, record = pruned(dense, budgets={"channel": 0.2, "weight": 0.3}, stops={}, **settings)
    for grain, budget in zip(record.grains, (0.2, 0.3), strict=True):
        assert [cut.kept for cut in grain.cuts] == [cut.after >= base - budget for cut in grain.cuts]
        assert [cut.kept for cut in grain.cuts] == [True] * (len(grain.cuts) - 1) + [False]
    assert record.grains[1].kept
    assert record.size == record.grains[1].kept[-1].size
    # Fine-tuning leaves nothing worse than the last cut that was kept.
    assert record.grains[1].accuracy == accuracy(small, *VAL.tensors) >= base - 0.3


def test_without_a_budget_nothing_that_costs_accuracy_goes(dense: nn.Module) -> None:
    small, record = pruned(dense, budgets={"weight": 0.0}, stops={}, weights=0.99, recovery=pl.Recipe(epochs=0))
    assert not record.grains[0].kept
    assert small is not dense
    assert all(torch.equal(a, b) for a, b in zip(values(small).values(), values(dense).values(), strict=True))


def test_a_network_without_anything_to_bypass_goes_on_to_channels() -> None:
    _, record = pruned(network(6, 10), stops={"channel": (1.5,), "weight": (3.0,)})
    assert [(grain.name, bool(grain.cuts)) for grain in record.grains] == [
        *[("block", False), ("layer", False)],
        *[("channel", True), ("weight", True)],
    ]
    assert record.grains[0].size == record.dense
    assert record.compression >= 3


def test_a_bypass_is_scored_by_the_loss_that_it_adds_after_repair(dense: nn.Module) -> None:
    program = pl.trace(dense, VAL.tensors[0][:2])
    found = added_loss(program, "layer", TRAIN, "least-squares", 400)
    assert list(found) == [unit.name for unit in program.units if unit.grain == "layer"]
    images, labels = TRAIN.tensors
    for name, added in found.items():
        cut = pl.Plan().bypass(name).resolve(program)
        small = pl.commit(program, cut, repair="least-squares", images=images).eval()
        with torch.no_grad():
            losses = [
                float(nn.functional.cross_entropy(m(images), labels)) for m in (small, copy.deepcopy(dense).eval())
            ]
        assert added == pytest.approx(losses[0] - losses[1], abs=1e-4)


def test_channels_go_by_standard_deviations_all_layers_together() -> None:
    model = network(6, 10)
    program = pl.trace(model, VAL.tensors[0][:2])
    kept = lowest_channels(program, TRAIN, "l1", 0.25).kept
    far = {}
    for name in ("0", "3"):
        norms = model.get_parameter(f"{name}.weight").detach().double().abs().sum((1, 2, 3))
        for channel, score in enumerate((norms - norms.mean()) / norms.std(correction=0)):
            far[name, channel] = float(score)
    gone = sorted(far, key=far.__getitem__)[:4]
    assert {
        (n, c) for n, channels in kept.items() for c in range(len(far)) if (n, c) in far and c not in channels
    } == set(gone)


def test_dead_channels_go_together_though_they_are_more_than_the_share() -> None:
    model = network(20, 10)
    with torch.no_grad():
        for norm in (model.get_submodule("1"), model.get_submodule("4")):
            norm.bias[:6], norm.weight[:6] = -1.0, 0.0
    program = pl.trace(model, VAL.tensors[0][:2])
    # In one of the layers they are further below the mean than in the other.
    ((name, kept),) = lowest_channels(program, TRAIN, "mean_activation", 0.1).kept.items()
    assert kept == tuple(range(6, program.layer(name).channels))
    # No layer can tell its channels apart: nothing goes.
    with torch.no_grad():
        for norm in (model.get_submodule("1"), model.get_submodule("4")):
            norm.bias[:], norm.weight[:] = -1.0, 0.0
    assert not lowest_channels(pl.trace(model, VAL.tensors[0][:2]), TRAIN, "mean_activation", 0.1).kept


def test_norms_of_several_dimensions_and_scales_of_layers_lose_no_weight() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(3, 6, 3), nn.LayerNorm([6, 4, 4]), nn.Linear(6, 4)
            self.scale = nn.Parameter(torch.full((6, 1, 1), 1e-4))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.out((self.scale * self.norm(self.conv(x))).mean((2, 3)))
            return found

    program = pl.trace(Scaled().eval(), torch.randn(2, 3, 6, 6))
    assert smallest_weights(program, {}, 0.5).keys() == {"conv.weight", "out.weight"}


def test_weights_go_by_magnitude_over_all_layers(dense: nn.Module) -> None:
    program = pl.trace(dense, VAL.tensors[0][:2])
    masks = smallest_weights(program, {}, 0.4)
    named = dict(dense.named_parameters())
    kept, gone = (torch.cat([named[k].abs()[m if stay else ~m] for k, m in masks.items()]) for stay in (True, False))
    assert gone.numel() == int(0.4 * (kept.numel() + gone.numel()))
    assert gone.max() <= kept.min()
    assert all(named[name].dim() > 1 for name in masks)
    more = smallest_weights(program, masks, 0.5)
    assert all(not (more[name] & ~mask).any() for name, mask in masks.items())


def test_lamp_divides_each_square_by_those_that_are_not_smaller() -> None:
    found = lamp(torch.tensor([[1.0, -3.0], [0.0, 2.0]], dtype=torch.float64))
    assert found.tolist() == [[1 / 14, 1.0], [0.0, 4 / 13]]
    assert lamp(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_lamp_leaves_a_layer_of_small_weights_its_share() -> None:
    model, share = network(6, 10), 0.65
    expected = smallest_weights(pl.trace(model, VAL.tensors[0][:2]), {}, share, score="lamp")
    with torch.no_grad():
        model.get_parameter("3.weight").mul_(2**-10)
    program = pl.trace(model, VAL.tensors[0][:2])
    found = smallest_weights(program, {}, share, score="lamp")
    assert all(torch.equal(mask, expected[name]) for name, mask in found.items())
    assert found["3.weight"].any()
    assert not smallest_weights(program, {}, share)["3.weight"].any()


def test_what_went_already_has_no_part_in_lamp() -> None:
    program = pl.trace(network(6, 10), VAL.tensors[0][:2])
    before = smallest_weights(program, {}, 0.5)
    masks = smallest_weights(program, before, 0.5, score="lamp")
    assert all(not (masks[name] & ~stay).any() for name, stay in before.items())
    assert sum(int(m.sum()) for m in masks.values()) == -(-sum(int(m.sum()) for m in before.values()) // 2)


def test_each_grain_can_have_a_repair_of_its_own(dense: nn.Module) -> None:
    settings = {"budgets": {"layer": 1.0, "weight": 1.0}, "stops": {"layer": (1.05,), "weight": (2.0,)}}
    settings |= {"recovery": pl.Recipe(epochs=0), "finetuning": pl.Recipe(epochs=0), "weights": 0.9}
    found = {}
    for repair in ("none", "least-squares"):
        _, record = pruned(dense, **settings, repair={"layer": "least-squares", "weight": repair})
        found[repair] = record
    assert found["none"].grains[0] == found["least-squares"].grains[0]
    assert found["none"].grains[1].accuracy < found["least-squares"].grains[1].accuracy


def test_each_grain_can_have_a_recovery_of_its_own_and_no_two_trainings_see_the_same_images_in_order() -> None:
    seen: dict[str, list[Tensor]] = {"channel": [], "weight": []}

    def recipe(grain: str) -> pl.Recipe:
        def noted(images: Tensor, generator: torch.Generator) -> Tensor:
            seen[grain].append(images.sum((1, 2, 3)))
            return images

        return replace(RECIPE, augment=noted)

    recipes = {grain: recipe(grain) for grain in seen}
    stops = {"channel": (1.5,), "weight": (3.0,)}
    _, record = pruned(network(6, 10), budgets=dict.fromkeys(seen, 1.0), stops=stops, recovery=recipes)
    steps = -(-len(TRAIN) // RECIPE.batch_size)
    for grain in record.grains:
        assert len(seen[grain.name]) == len(grain.cuts) * steps
    firsts = [tuple(batch.tolist()) for found in seen.values() for batch in found[::steps]]
    assert len(set(firsts)) == len(firsts) > 2


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_broken_off_it_goes_on_where_it_was(tmp_path: Path, how: str) -> None:
    model, settings = network(6, 10), {"stops": {"channel": (1.5,), "weight": (3.0,)}}
    expected, wanted = pruned(model, **settings)
    steps: list[str] = []

    def counted(done: int, total: int | None, what: str) -> None:
        steps.append(what)

    def broken(done: int, total: int | None, what: str) -> bool:
        steps.append(what)
        if len(steps) == 30 and how == "killed":
            raise KeyboardInterrupt
        return len(steps) != 30

    with pytest.raises(KeyboardInterrupt if how == "killed" else Stopped):
        pruned(model, **settings, folder=tmp_path, progress=broken)
    assert len(steps) == 30
    steps.clear()
    found, record = pruned(model, **settings, folder=tmp_path, progress=counted)
    assert record.grains == wanted.grains
    assert all(torch.equal(a, b) for a, b in zip(values(found).values(), values(expected).values(), strict=True))


def test_the_table_names_grains_and_sizes(whole: Whole) -> None:
    _, record, _ = whole
    assert list(record.to_frame().index) == [grain.name for grain in record.grains]
    assert f"{record.size.nonzero:,}" in repr(record)
    assert f"{record.compression:.2f}×" in repr(record)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budgets": {"chanel": 0.1}}, "no grain 'chanel'; the nearest names are 'channel'"),
        ({"budgets": {"channel": -0.1}}, "budget of the grain 'channel' is a share"),
        ({"budgets": {"channel": 0.1}, "stops": {"weight": (2.0,)}}, "'weight' has stops and no budget"),
        ({"stops": {"weight": (4.0, 2.0)}}, "rising compressions above 1"),
        ({"channels": 1.0}, "share of channels"),
        ({"finetuning": {"weight": RECIPE}}, "'block' has no recipe to fine-tune by"),
        ({"recovery": {"weight": RECIPE}}, "'block' has no recipe to recover by"),
        ({"repair": {"weight": "none"}}, "'block' has no repair"),
        ({"repair": {**dict.fromkeys(GRAINS, "none"), "weight": "lest-squares"}}, "no repair 'lest-squares'"),
        ({"score": "lamb"}, "no score of weights 'lamb'"),
        ({"criterion": "l3"}, "no criterion 'l3'"),
        ({"recovery": pl.Recipe(masks={"0.weight": torch.ones(1)})}, "the grain 'weight' makes them"),
    ],
)
def test_what_cannot_be_meant_is_refused(dense: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(pl.PruneLabError, match=message):
        pruned(dense, **settings)


def test_the_reproduction_of_the_small_network_runs(tmp_path: Path) -> None:
    written = reproduce("multi-grain-small", tmp_path, seeds=1, out=tmp_path, short=True, say=lambda line: None)
    text = written.read_text(encoding="utf-8")
    assert all(point in text for point in ("after layers", "after channels", "10×", "20×"))


def test_half_of_the_images_are_mixed_and_none_is_more_another_than_itself() -> None:
    # Image i holds 2 to the power of i: whatever was mixed can be read off.
    images = (2.0 ** torch.arange(40)).double().view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    found = torch.cat([_Mixed()(images, torch.Generator().manual_seed(seed)) for seed in range(20)])
    whole = images.repeat(20, 1, 1, 1)
    assert (found >= whole / 2).all()
    assert 0.4 < (found == whole).all(dim=(1, 2, 3)).double().mean() < 0.6
    assert (found.amax((1, 2, 3)) == found.amin((1, 2, 3))).all()
