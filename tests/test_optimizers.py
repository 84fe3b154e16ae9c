"""An optimizer carried along with a cut goes on where it was: against slicing and stepping by hand, in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer, RMSprop

import prunelab as pl
from prunelab.program.program import Program

KEPT_A, KEPT_B = [0, 2, 3, 6], [1, 4]


class Small(nn.Module):
    """Two hidden layers, the second one used twice, a layer that forward leaves out, and a gain for every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)
        self.gain = nn.Parameter(torch.rand(7) + 0.5)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.b((self.a(x) * self.gain).relu()).relu())
        return logits


def sliced(name: str, tensor: Tensor) -> Tensor:
    """A tensor of a parameter's own shape, cut by plain indexing."""
    rows = {"a": KEPT_A, "b": KEPT_B, "gain": KEPT_A}.get(name.partition(".")[0])
    columns = {"b.weight": KEPT_A, "head.weight": KEPT_B}.get(name)
    tensor = tensor if rows is None else tensor[rows]
    return tensor if columns is None else tensor[:, columns]


SELECTION = pl.Selection({"a": tuple(KEPT_A), "b": tuple(KEPT_B)})


def trained(make: Callable[[list[dict[str, Any]]], Optimizer], steps: int = 3) -> tuple[nn.Module, Optimizer]:
    """A float64 network, a few steps into its training; ``a`` is frozen, ``b`` learns faster than the rest."""
    torch.manual_seed(0)
    model = Small().double()
    model.a.requires_grad_(False)
    fast = list(model.b.parameters())
    rest = [p for p in model.parameters() if all(p is not q for q in fast)]
    optimizer = make([{"params": rest}, {"params": fast, "lr": 0.05, "weight_decay": 0.1}])
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: Optimizer) -> None:
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def cut_along(model: nn.Module, optimizer: Optimizer) -> tuple[Program, nn.Module, Optimizer]:
    program = pl.trace(model, torch.randn(2, 5, dtype=torch.float64))
    small = pl.commit(program, SELECTION)
    return program, small, pl.carry(optimizer, program, SELECTION, small)


MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=0.01, betas=(0.8, 0.95)),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("name", MAKERS)
def test_state_is_cut_as_its_parameter_is(name: str) -> None:
    model, old = trained(MAKERS[name])
    before = {n: {k: v.clone() for k, v in old.state[p].items()} for n, p in model.named_parameters() if p in old.state}
    _, small, new = cut_along(model, old)
    assert type(new) is type(old)
    # Neither the frozen layer nor the one that forward leaves out has anything to remember.
    assert before.keys() == {"b.weight", "b.bias", "head.weight", "head.bias", "gain"}
    for parameter, held in before.items():
        carried = new.state[small.get_parameter(parameter)]
        assert carried.keys() == held.keys()
        for key, value in held.items():
            expected = value if value.dim() == 0 else sliced(parameter, value)
            assert torch.equal(carried[key], expected), (parameter, key)
            assert carried[key].dtype == value.dtype
            # A copy: stepping one optimizer does not move the other's memory.
            assert carried[key].data_ptr() != old.state[model.get_parameter(parameter)][key].data_ptr()
            assert torch.equal(old.state[model.get_parameter(parameter)][key], value)


def test_groups_and_settings_are_the_originals() -> None:
    model, old = trained(MAKERS["adamw"])
    old.param_groups[0]["lr"] = 0.003  # as a schedule leaves it
    old.param_groups[0]["initial_lr"] = 0.01
    _, small, new = cut_along(model, old)
    names = {id(p): n for m in (model, small) for n, p in m.named_parameters()}
    for before, after in zip(old.param_groups, new.param_groups, strict=True):
        assert {k: v for k, v in before.items() if k != "params"} == {k: v for k, v in after.items() if k != "params"}
        assert [names[id(p)] for p in before["params"]] == [names[id(p)] for p in after["params"]]
    assert new.defaults == old.defaults


def test_sgd_goes_on_as_by_hand() -> None:
    model, old = trained(lambda p: SGD(p, lr=0.01, momentum=0.9, dampening=0.2))
    momenta = {n: old.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters() if p in old.state}
    _, small, new = cut_along(model, old)
    before = {n: p.detach().clone() for n, p in small.named_parameters()}
    step(small, new)
    for name, p in small.named_parameters():
        if name not in momenta:
            assert torch.equal(p, before[name])
            continue
        rate, decay = (0.05, 0.1) if name.startswith("b.") else (0.01, 0.0)
        assert p.grad is not None
        momentum = 0.9 * sliced(name, momenta[name]) + 0.8 * (p.grad + decay * before[name])
        torch.testing.assert_close(p.detach(), before[name] - rate * momentum, rtol=1e-12, atol=1e-14)


def test_adamw_goes_on_as_by_hand() -> None:
    """Loshchilov and Hutter, Decoupled weight decay regularization, algorithm 2."""
    model, old = trained(MAKERS["adamw"])
    memory = {n: {k: v.clone() for k, v in old.state[p].items()} for n, p in model.named_parameters() if p in old.state}
    _, small, new = cut_along(model, old)
    before = {n: p.detach().clone() for n, p in small.named_parameters()}
    step(small, new)
    for name, held in memory.items():
        p = small.get_parameter(name)
        assert p.grad is not None
        rate, decay = (0.05, 0.1) if name.startswith("b.") else (0.01, 0.01)
        first = 0.8 * sliced(name, held["exp_avg"]) + 0.2 * p.grad
        second = 0.95 * sliced(name, held["exp_avg_sq"]) + 0.05 * p.grad**2
        unbiased = first / (1 - 0.8**4), second / (1 - 0.95**4)
        expected = before[name] * (1 - rate * decay) - rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)


def test_optimizer_that_has_not_stepped_is_carried_too() -> None:
    model, old = trained(MAKERS["adamw"], steps=0)
    _, small, new = cut_along(model, old)
    assert not new.state
    step(small, new)
    assert len(new.state) == 5


def test_parameters_that_vanish_are_left_out() -> None:
    torch.manual_seed(0)
    model = Small().double()
    old = SGD([(n, p) for n, p in model.named_parameters()], lr=0.1, momentum=0.9)
    step(model, old)
    program = pl.trace(model, torch.randn(2, 5, dtype=torch.float64))
    small = pl.commit(program, SELECTION)
    small.unused = nn.Identity()
    new = pl.carry(old, program, SELECTION, small)
    (group,) = new.param_groups
    assert len(group["params"]) == len(old.param_groups[0]["params"]) - 2
    assert group["param_names"] == [n for n, _ in small.named_parameters()]
    step(small, new)


def test_group_of_which_nothing_is_left_stays_in_its_place() -> None:
    model = Small().double()
    old = SGD([{"params": model.unused.parameters()}, {"params": model.b.parameters(), "lr": 0.3}], lr=0.1)
    program = pl.trace(model, torch.randn(2, 5, dtype=torch.float64))
    small = pl.commit(program, SELECTION)
    small.unused = nn.Identity()
    new = pl.carry(old, program, SELECTION, small)
    assert [(len(g["params"]), g["lr"]) for g in new.param_groups] == [(0, 0.1), (2, 0.3)]


def test_what_cannot_be_carried_is_refused_in_a_sentence() -> None:
    model, old = trained(MAKERS["sgd"])
    program, small, _ = cut_along(model, old)
    with pytest.raises(pl.PruneLabError, match=r"shape \(7,\) that is not one of this Small's"):
        pl.carry(SGD(Small().parameters(), lr=0.1), program, SELECTION, small)
    with pytest.raises(pl.PruneLabError, match="not this selection's: gain has another shape"):
        pl.carry(old, program, pl.Selection({"a": (0, 1)}), small)
    model, factored = trained(lambda p: Adafactor(p, lr=0.01))
    with pytest.raises(pl.PruneLabError, match=r"remembers 'row_var' of head.weight, .* make a new optimizer"):
        cut_along(model, factored)


# Saved and loaded ---------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_saved_optimizer_goes_on_as_the_kept_one_does(name: str, tmp_path: Path) -> None:
    model, old = trained(MAKERS[name])
    _, small, new = cut_along(model, old)
    step(small, new)
    pl.save(tmp_path, small, new)
    back = pl.load(tmp_path, lambda: Small().double())
    again = pl.load_optimizer(tmp_path, back, type(new))
    assert again.state_dict()["param_groups"] == new.state_dict()["param_groups"]
    assert again.defaults == new.defaults
    for _ in range(2):
        step(small, new)
        step(back, again)
    for p, q in zip(small.parameters(), back.parameters(), strict=True):
        assert torch.equal(p, q)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_memory_in_another_precision_than_its_parameters_comes_back_in_it(tmp_path: Path) -> None:
    model, old = trained(MAKERS["adam"])
    model.bfloat16()
    pl.save(tmp_path, model, old)
    back = pl.load(tmp_path, Small)
    again = pl.load_optimizer(tmp_path, back, lambda groups: Adam(groups, lr=1.0))
    held, kept = again.state[back.b.weight], old.state[model.b.weight]
    assert held["exp_avg"].dtype == torch.float64
    assert all(torch.equal(held[k], kept[k]) for k in kept)
    assert again.param_groups[1]["lr"] == 0.05


def test_optimizers_that_were_not_saved_or_are_others_are_refused(tmp_path: Path) -> None:
    model, old = trained(MAKERS["sgd"])
    pl.save(tmp_path, model)
    with pytest.raises(pl.PruneLabError, match="saved without an optimizer"):
        pl.load_optimizer(tmp_path, model, SGD)
    with pytest.raises(pl.PruneLabError, match="not one of this Small's"):
        pl.save(tmp_path, Small(), old)
    pl.save(tmp_path, model, old)
    with pytest.raises(pl.PruneLabError, match="memory of a SGD, not of a AdamW"):
        pl.load_optimizer(tmp_path, model, AdamW)
    old.param_groups[0]["schedule"] = len
    with pytest.raises(pl.PruneLabError, match="This SGD cannot be saved without pickle"):
        pl.save(tmp_path, model, old)


def test_state_of_a_bypassed_unit_is_left_out_and_the_network_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = pl.zoo.resnet20().double().eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    old = SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(images).square().mean().backward()
    old.step()
    program = pl.trace(model, images)
    selection = pl.Selection({"layer1.0.conv1": tuple(range(0, 16, 2))}, bypassed=("layer1.1",))
    small = pl.commit(program, selection)
    new = pl.carry(old, program, selection, small)
    names = {n for n, _ in small.named_parameters()}
    assert names < {n for n, _ in model.named_parameters()}
    assert {id(p) for p in new.state} == {id(p) for p in small.parameters()}
    momentum = old.state[model.get_parameter("layer1.0.conv1.weight")]["momentum_buffer"]
    assert torch.equal(new.state[small.get_parameter("layer1.0.conv1.weight")]["momentum_buffer"], momentum[::2])
    pl.save(tmp_path, small, new)
    back = pl.load(tmp_path, lambda: pl.zoo.resnet20().double())
    with torch.no_grad():
        assert torch.equal(back(images), small(images))
    assert len(pl.load_optimizer(tmp_path, back, SGD).state) == len(names)
