"""Cut a little, train, cut again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import killed
import pytest
import torch
from support import parameters
from torch import Tensor, nn

import prunelab as pl
from prunelab.train.iterative import Round

PLANS = [pl.Plan().set("conv", ratio=0.25), pl.Plan(repair="least-squares").set("conv", ratio=0.34)]
SETTINGS: dict[str, Any] = {"epochs": 2, "batch_size": 16, "lr": 0.05, "progress": False, "precision": "no"}
DATA = (killed.images(200, 0), killed.images(100, 1))


def run(model: nn.Module, folder: Path | None = None, **settings: Any) -> tuple[nn.Module, tuple[Round, ...]]:
    return pl.iterative(model, PLANS, *DATA, folder=folder, **{**SETTINGS, **settings})


def values(model: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in model.state_dict().values()]


def test_every_round_cuts_what_is_there_and_trains_it() -> None:
    model = killed.network()
    before = values(model)
    small, rounds = run(model)
    assert small.get_parameter("conv.weight").shape[0] == 4
    assert [len(each.selection.kept["conv"]) for each in rounds] == [6, 4]
    assert rounds[0].params > rounds[1].params == parameters(small)
    assert [each.table.index.tolist() for each in rounds] == [[0, 1, 2]] * 2
    assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))


def test_it_is_the_loop_that_one_would_write() -> None:
    found, _ = run(killed.network())
    now: nn.Module = killed.network()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        now.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    for number, plan in enumerate(PLANS):
        program = pl.trace(now, DATA[1].tensors[0][:2])
        selection = plan.resolve(program)
        now = pl.commit(program, selection, repair=plan.repair, images=DATA[0].tensors[0])
        optimizer = pl.carry(optimizer, program, selection, now)
        pl.finetune(now, *DATA, **{**SETTINGS, "optimizer": optimizer, "seed": number})
    assert all(torch.equal(a, b) for a, b in zip(values(found), values(now), strict=True))


def test_a_recipe_and_settings_together_are_refused() -> None:
    with pytest.raises(pl.PruneLabError, match="not both: epochs, lr belong into the recipe"):
        pl.iterative(killed.network(), PLANS, *DATA, recipe=pl.Recipe(), epochs=2, lr=0.1, progress=False)


def test_masks_of_a_round_hold_in_the_next() -> None:
    mask = torch.rand(4, 512, generator=torch.Generator().manual_seed(0)) > 0.5
    small, rounds = run(killed.network(), masks={"fc.weight": mask})
    left = mask.view(4, 8, 64)[:, list(rounds[0].selection.kept["conv"])][:, list(rounds[1].selection.kept["conv"])]
    weight = small.get_parameter("fc.weight").detach()
    assert torch.equal(weight != 0, left.reshape(4, -1))


def test_called_again_it_goes_on_where_it_was(tmp_path: Path) -> None:
    expected, _ = run(killed.network())
    calls: list[str] = []

    def stop(done: int, total: int | None, what: str) -> bool:
        calls.append(what)
        return len(calls) < 35

    # 26 steps a round: the stop falls into the second.
    run(killed.network(), tmp_path, progress=stop)
    calls.clear()
    found, _ = run(killed.network(), tmp_path, progress=lambda _, __, what: calls.append(what))
    assert all(torch.equal(a, b) for a, b in zip(values(found), values(expected), strict=True))
    assert len(calls) == 52 - 35


def test_a_plan_for_another_network_is_refused() -> None:
    with pytest.raises(pl.PruneLabError, match="made for another network"):
        pl.iterative(killed.network(), [pl.Plan(network="0123").set("conv", ratio=0.5)], *DATA, **SETTINGS)
