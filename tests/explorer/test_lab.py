"""The lab: settings, undo, commits, training, keeping; and that a refusal changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import prunelab as pl

TRAIN, TEST = pl.datasets.fashion_mnist()


@pytest.fixture
def lab() -> pl.Lab:
    return pl.Lab(pl.zoo.load("lenet"), TRAIN.subset(500), TEST.subset(500), criterion="l1", name="LeNet")


def test_plan_undo_redo_reset(lab: pl.Lab) -> None:
    lab.set("conv2", ratio=0.5)
    lab.set("fc1", std=0.5)
    assert lab.selection.kept.keys() == {"conv2", "fc1"}
    assert lab.cost().params < lab.dense_cost().params
    lab.undo()
    assert lab.selection.kept.keys() == {"conv2"}
    lab.redo()
    assert lab.selection.kept.keys() == {"conv2", "fc1"}
    lab.set("conv2", locked=True)
    lab.reset()
    assert not lab.selection.kept
    assert lab.plan.settings["conv2"].locked


def test_one_movement_is_one_step_of_undo(lab: pl.Lab) -> None:
    lab.set("conv2", ratio=0.1)
    for ratio in (0.2, 0.3, 0.4):
        lab.use(lab.plan.set("conv2", ratio=ratio), merge=True)
    lab.undo()
    assert not lab.plan.settings


def test_set_all_leaves_pinned_and_locked_alone(lab: pl.Lab) -> None:
    lab.set("conv1", locked=True)
    lab.set_all(ratio=0.5)
    assert lab.selection.kept.keys() == {"conv2", "fc1"}
    with pytest.raises(pl.PruneLabError, match="locked"):
        lab.set("conv1", ratio=0.5)


def test_commit_is_the_new_baseline_and_undo_brings_the_users_network_back(lab: pl.Lab) -> None:
    mine = lab.model
    state = {k: v.clone() for k, v in mine.state_dict().items()}
    lab.set_all(ratio=0.5)
    promised, shown = lab.cost(), lab.measure()
    small = lab.commit()
    assert lab.model is small
    assert small is not mine
    assert lab.dense_cost().params == promised.params == sum(p.numel() for p in small.parameters())
    assert lab.measure().accuracy == shown.accuracy
    assert [p.kind for p in lab.points][-1] == "commit"
    lab.undo()
    assert lab.model is mine
    assert lab.cost().params == promised.params
    assert all(torch.equal(v, state[k]) for k, v in mine.state_dict().items())


def test_finetune_trains_a_copy_and_masks_hold(lab: pl.Lab) -> None:
    lab.set("fc1", ratio=0.5, grain="weight")
    lab.set("conv2", ratio=0.5)
    lab.commit()
    cut, before = lab.model, lab.dense_cost()
    weights = {k: v.clone() for k, v in cut.state_dict().items()}
    assert before.nonzero < before.params
    table = lab.finetune(epochs=1, progress=False)
    assert list(table.columns) == ["loss", "accuracy", "lr", "seconds"]
    assert lab.model is not cut
    assert all(torch.equal(v, weights[k]) for k, v in cut.state_dict().items())
    zeros = sum(int((p == 0).sum()) for p in lab.model.parameters())
    assert zeros >= before.params - before.nonzero
    lab.undo()
    assert lab.model is cut


def test_repair_shows_in_preview_and_commit_alike(lab: pl.Lab) -> None:
    lab.set("fc1", ratio=0.95)
    plain = lab.measure()
    lab.repair("least-squares")
    shown = lab.measure()
    assert shown.accuracy > plain.accuracy
    assert set(lab.repaired) == {"fc2.weight", "fc2.bias"}
    assert lab.repaired.left == ()
    lab.commit()
    assert lab.measure().accuracy == shown.accuracy


@pytest.mark.parametrize("name", ["lenet", "resnet20"])
def test_save_and_load(name: str, tmp_path: Path) -> None:
    train, test = TRAIN.subset(200), TEST.subset(200)
    lab = pl.Lab(pl.zoo.load(name), train, test, criterion="l1")
    lab.set_all(ratio=0.4)
    lab.commit()
    first = next(layer.name for layer in lab.program.layers if not layer.pinned)
    lab.set(first, remove=[0, 2])
    shown = lab.measure()
    lab.save(tmp_path / "lab")

    def make() -> nn.Module:
        return pl.zoo.lenet() if name == "lenet" else pl.zoo.resnet20(in_channels=1)

    back = pl.Lab.load(tmp_path / "lab", make, train, test)
    assert back.plan == lab.plan
    assert back.cost() == lab.cost()
    assert back.measure().accuracy == shown.accuracy
    assert [p.kind for p in back.points[: len(lab.points)]] == [p.kind for p in lab.points]
    with pytest.raises(pl.PruneLabError, match="no lab to load"):
        pl.Lab.load(tmp_path / "nothing", make, train, test)


def test_lab_of_several_commits_with_training_between_comes_back(lab: pl.Lab, tmp_path: Path) -> None:
    lab.set_all(ratio=0.4)
    lab.commit()
    lab.finetune(epochs=1, progress=False)
    lab.set("conv2", remove=[1, 3])
    small = lab.commit()
    lab.save(tmp_path)
    back = pl.Lab.load(tmp_path, pl.zoo.lenet, lab.train, lab.val).model
    with torch.no_grad():
        assert torch.equal(back(TEST.images[:7]), small(TEST.images[:7]))


def test_export(lab: pl.Lab, tmp_path: Path) -> None:
    lab.set_all(ratio=0.5)
    small = lab.commit()
    path = lab.export(tmp_path / "small.pt2")
    again = torch.export.load(path).module()
    with torch.no_grad():
        torch.testing.assert_close(again(TEST.images[:7]), small(TEST.images[:7]))
    with pytest.raises(pl.PruneLabError, match="ends in"):
        lab.export(tmp_path / "small.pt")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lab: lab.set("conv2", ratio=1.5), "0 to 1"),
        (lambda lab: lab.set("conv3", ratio=0.5), "conv2"),
        (lambda lab: lab.set("fc2", ratio=0.5), "network's outputs"),
        (lambda lab: lab.set("conv1", remove=range(20)), "last channel"),
        (lambda lab: lab.set("conv1", remove=[20]), "0 to 19"),
        (lambda lab: lab.criterion("apox"), "apoz"),
        (lambda lab: lab.repair("squares"), "least-squares"),
        (lambda lab: lab.use(pl.Plan(network="0123").set("conv2", ratio=0.5)), "another network"),
        (lambda lab: lab.commit(), "nothing to commit"),
    ],
)
def test_a_refusal_is_one_sentence_and_changes_nothing(lab: pl.Lab, change: object, says: str) -> None:
    before = (lab.plan, lab.model, lab.can_undo, lab.points)
    with pytest.raises(pl.PruneLabError, match=says) as caught:
        change(lab)  # type: ignore[operator]  # a lambda from the table above
    assert "\n" not in str(caught.value)
    assert (lab.plan, lab.model, lab.can_undo, lab.points) == before


def test_history(lab: pl.Lab) -> None:
    assert lab.history.empty
    lab.measure()
    lab.set_all(ratio=0.5)
    lab.measure()
    frame = lab.history
    assert list(frame["kind"]) == ["dense", "plan"]
    assert frame["compression"].iloc[0] == 1.0
    assert frame["speedup"].iloc[1] > 1.5


def test_an_accuracy_is_never_filed_under_a_newer_plan(lab: pl.Lab) -> None:
    lab.set("conv2", ratio=0.5)
    lab.estimate(on_update=lambda _: lab.set("conv2", ratio=0.9))
    assert not lab.points
    lab.estimate()
    assert [p.params for p in lab.points] == [lab.cost().params]


def test_a_repair_leaves_the_zeros_of_an_earlier_commit(lab: pl.Lab) -> None:
    lab.use(pl.Plan("l1").set("fc1", ratio=0.5, grain="weight"))
    lab.commit()
    lab.use(pl.Plan("l1", repair="least-squares").set("conv2", ratio=0.5))
    shown, promised = lab.measure(), lab.cost()
    small = lab.commit()
    zeros = int((small.fc1.weight == 0).sum())
    assert zeros >= small.fc1.weight.numel() - int(lab.stage.masks["fc1.weight"].sum())
    assert lab.dense_cost().nonzero == promised.nonzero
    assert lab.measure().accuracy == shown.accuracy


@pytest.fixture
def residual() -> pl.Lab:
    return pl.Lab(pl.zoo.load("resnet20"), TRAIN.subset(300), TEST.subset(300), criterion="apoz")


def test_bypass_restore_undo_redo(residual: pl.Lab) -> None:
    lab = residual
    lab.set("layer2.1.conv1", ratio=0.5)
    lab.set("layer2 stream #2", ratio=0.25)
    before = lab.cost()
    lab.bypass("layer2.1")
    assert lab.cost().params < before.params
    assert lab.selection.kept.keys() == {"layer2 stream #2"}
    assert "layer2.1.conv1" not in {layer.name for layer in lab.program.layers}
    lab.undo()
    assert lab.cost() == before
    lab.redo()
    lab.restore("layer2.1")
    assert lab.cost() == before
    lab.bypass("layer2.1")
    lab.reset()
    assert lab.cost() == lab.dense_cost()
    with pytest.raises(pl.PruneLabError, match=r"no layer or block to bypass 'layer2.9'"):
        lab.bypass("layer2.9")
    assert not lab.plan.bypassed


def test_a_bypass_is_measured_committed_and_loaded(residual: pl.Lab, tmp_path: Path) -> None:
    lab = residual
    lab.set_all(ratio=0.3)
    lab.bypass("layer2.1")
    lab.bypass("layer3.2.conv1")
    lab.set("layer1.0.conv1", ratio=0.5, grain="weight")
    promised, shown = lab.cost(), lab.measure()
    point = lab.points[-1]
    assert (point.kind, point.params, point.flops) == ("plan", promised.params, promised.flops)
    assert pl.Plan.from_json(point.plan).bypassed == ("layer2.1", "layer3.2.conv1")
    small = lab.commit()
    assert isinstance(small.layer2[1], nn.Identity)
    assert lab.dense_cost().nonzero == promised.nonzero
    assert lab.measure().accuracy == shown.accuracy
    assert not lab.plan.bypassed
    # Bypassed after a commit with masks: those of what is bypassed go along.
    lab.bypass("layer1.0")
    lab.commit()
    shown = lab.measure()
    lab.save(tmp_path / "lab")
    back = pl.Lab.load(tmp_path / "lab", lambda: pl.zoo.resnet20(in_channels=1), lab.train, lab.val)
    assert back.dense_cost() == lab.dense_cost()
    assert back.measure().accuracy == shown.accuracy


def test_a_repair_makes_up_for_a_bypass_in_preview_and_commit_alike(residual: pl.Lab) -> None:
    residual.bypass("layer2.1")
    residual.set("layer3.0.conv1", ratio=0.5)
    residual.repair("least-squares")
    shown = residual.measure()
    residual.commit()
    assert residual.measure().accuracy == shown.accuracy


def test_a_plan_may_name_layers_by_their_modules(residual: pl.Lab) -> None:
    residual.use(pl.Plan("l1").set("layer1.1.conv2", ratio=0.5).bypass("layer1.1"))
    assert residual.plan.settings.keys() == {"layer1 stream"}


def test_weights_trained_in_place_are_scored_as_they_are_now(lab: pl.Lab) -> None:
    lab.set("conv2", ratio=0.5)
    gone = lab.selection.kept["conv2"]
    with torch.no_grad():
        for channel in gone:
            lab.model.get_parameter("conv2.weight")[channel] *= 1e-3
    assert not set(lab.selection.kept["conv2"]) & set(gone)
    assert lab.scores("conv2")[list(gone)].max() < lab.scores("conv2").mean()


def test_profile_taken_again_after_training_in_place_scores_anew(lab: pl.Lab) -> None:
    lab.criterion("mean_activation")
    before = lab.scores("conv2")
    with torch.no_grad():
        lab.model.get_parameter("conv2.weight").mul_(2)
    lab.run_profile(progress=False)
    assert (lab.scores("conv2") != before).any()


def test_loaded_lab_compares_with_the_network_that_it_once_began_with(lab: pl.Lab, tmp_path: Path) -> None:
    lab.measure()
    lab.set_all(ratio=0.5)
    lab.measure()
    lab.commit()
    lab.save(tmp_path)
    back = pl.Lab.load(tmp_path, pl.zoo.lenet, lab.train, lab.val)
    back.measure()
    assert back.history.equals(lab.history)
    found = back.latency(batch=4, repeats=6, progress=False)
    assert found.timings[0].batch == 4
    whole = sum(p.numel() for p in lab.original.parameters())
    assert sum(p.numel() for p in back._uncut().model.parameters()) == whole


def test_an_estimate_is_of_one_network_and_one_plan_though_a_hand_moves_on_meanwhile(lab: pl.Lab) -> None:
    lab.set("conv2", ratio=0.5)
    lab.commit()
    lab.repair("least-squares")
    lab.set("fc1", ratio=0.5)
    wanted = lab.estimate()
    points, asked = lab.points, []

    def back_to_the_uncut_network() -> bool:
        if not asked:
            asked.append(True)
            while lab.can_undo:
                lab.undo()
        return True

    # What was repaired a moment ago is not repaired again.
    lab._repairer = None
    found = lab.estimate(wanted=back_to_the_uncut_network)
    assert asked
    assert found.accuracy == wanted.accuracy
    assert lab.points == points
