"""An optimizer's memory: cut along with its network, written down, and built again over another one's parameters."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from prunelab.errors import PruneLabError
from prunelab.plain import from_plain, to_plain
from prunelab.program.program import Program
from prunelab.program.run import slice_states
from prunelab.program.selection import Selection
from prunelab.program.trace import unwrap

Values = dict[str, Any]


@dataclass(frozen=True)
class Cache:
    """What an optimizer holds, with names in place of parameters.

    Attributes:
        kind: name of the optimizer's class.
        defaults: the settings it was made with.
        groups: parameter names and settings of every group.
        state: what it remembers of every parameter, by the parameter's name: ``momentum_buffer``, ``step``, …
    """

    kind: str
    defaults: Values
    groups: tuple[tuple[tuple[str, ...], Values], ...]
    state: Mapping[str, Values]


def carry(optimizer: Optimizer, program: Program, selection: Selection, small: nn.Module) -> Optimizer:
    """An optimizer for a committed network that goes on where the uncut network's optimizer was.

    It is of the same class, with the same groups and settings. Momenta, and all else that has its parameter's own
    shape, are cut as the parameter was; step counts are copied; parameters that the network lost are left out. The
    given optimizer is not changed. Hooks and learning-rate schedulers stay with it: attach them anew.

    Args:
        optimizer: holds parameters of ``program.model``.
        program: the traced network, and ``selection`` what was removed from it.
        small: what :func:`prunelab.commit` made of the two.

    Raises:
        PruneLabError: the optimizer is not this network's, ``small`` is not this selection's, or the optimizer
            remembers of a cut parameter something of another shape.
    """
    memory = read(optimizer, program.model)
    return build(type(optimizer), replace(memory, state=_cut(memory.state, program, selection, small)), small)


def read(optimizer: Optimizer, model: nn.Module) -> Cache:
    """What an optimizer over a network's parameters holds; the tensors are the optimizer's own.

    Raises:
        PruneLabError: one of its parameters is not the network's.
    """
    names = {id(p): name for name, p in unwrap(model).named_parameters()}
    foreign = next((p for group in optimizer.param_groups for p in group["params"] if id(p) not in names), None)
    if foreign is not None:
        raise PruneLabError(
            f"The optimizer holds a parameter of shape {tuple(foreign.shape)} that is not one of this "
            f"{type(unwrap(model)).__name__}'s: give the optimizer of this very network."
        )
    return Cache(
        kind=type(optimizer).__name__,
        defaults=dict(optimizer.defaults),
        groups=tuple(
            (tuple(names[id(p)] for p in group["params"]), {k: v for k, v in group.items() if k != "params"})
            for group in optimizer.param_groups
        ),
        state={names[id(p)]: dict(held) for p, held in optimizer.state.items()},
    )


def build(make: Callable[..., Optimizer], memory: Cache, model: nn.Module) -> Optimizer:
    """An optimizer over a network's parameters that holds a memory; names that the network lacks are left out.

    Args:
        make: the optimizer's class, or what makes one from a list of groups.

    Raises:
        PruneLabError: ``make`` does not give such an optimizer.
    """
    parameters = dict(unwrap(model).named_parameters())
    groups = [_group(names, values, parameters) for names, values in memory.groups]
    accepted = inspect.signature(make).parameters
    defaults = {k: v for k, v in memory.defaults.items() if k in accepted}
    try:
        optimizer = make(groups, **defaults)
    except Exception as error:
        raise PruneLabError(f"The {memory.kind} cannot be built over the smaller network: {error}") from error
    if type(optimizer).__name__ != memory.kind:
        raise PruneLabError(f"This is the memory of a {memory.kind}, not of a {type(optimizer).__name__}.")
    for name, held in memory.state.items():
        if name in parameters:
            optimizer.state[parameters[name]] = copy.deepcopy(held)
    return optimizer


def refill(optimizer: Optimizer, memory: Cache, model: nn.Module) -> None:
    """Give an optimizer over a network's parameters a memory in place of its own.

    Raises:
        PruneLabError: it is of another class or has other groups.
    """
    parameters = dict(unwrap(model).named_parameters())
    own = read(optimizer, model)
    if (own.kind, [names for names, _ in own.groups]) != (memory.kind, [names for names, _ in memory.groups]):
        raise PruneLabError(f"This is the memory of a {memory.kind} with other groups, not of this {own.kind}.")
    for group, (_, values) in zip(optimizer.param_groups, memory.groups, strict=True):
        group.update(copy.deepcopy(values))
    optimizer.state.clear()
    for name, held in memory.state.items():
        optimizer.state[parameters[name]] = copy.deepcopy(held)


def _group(names: tuple[str, ...], values: Values, parameters: Mapping[str, nn.Parameter]) -> Values:
    """A group as an optimizer takes it. The user's own names of its parameters, where there are any, go along."""
    there = [k for k, name in enumerate(names) if name in parameters]
    group = {**values, "params": [parameters[names[k]] for k in there]}
    if "param_names" in values:
        group["param_names"] = [values["param_names"][k] for k in there]
    return group


def _cut(
    state: Mapping[str, Values], program: Program, selection: Selection, small: nn.Module
) -> dict[str, dict[str, Any]]:
    """The state of every parameter, tensors of the parameter's own shape cut as the selection cuts it."""
    program = program.under(selection)
    before = dict(program.model.named_parameters())
    after = {name: p.shape for name, p in unwrap(small).named_parameters()}
    # Masks zero weights; what is remembered of them stays as it is.
    channels = replace(selection, masks={})
    found = {}
    for name, held in state.items():
        if name not in after:
            continue
        found[name] = dict(held)
        if name not in program.state_nodes or before[name].shape == after[name]:
            continue
        for key, value in held.items():
            if isinstance(value, Tensor) and value.shape == before[name].shape:
                found[name][key] = slice_states(program, channels, {name: value}.__getitem__, [name])[name]
                if found[name][key].shape != after[name]:
                    raise PruneLabError(f"The smaller network is not this selection's: {name} has another shape.")
            elif not _is_one_number(value):
                raise PruneLabError(
                    f"The optimizer remembers {key!r} of {name}, which does not have the parameter's shape and "
                    "cannot be cut along: make a new optimizer for the smaller network."
                )
    return found


def _is_one_number(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else value is None or isinstance(value, bool | int | float)


def to_record(memory: Cache, hold: Callable[[Tensor], Any]) -> Values:
    """A memory as values that JSON can hold.

    Args:
        hold: keeps a tensor elsewhere and says what stands for it.

    Raises:
        PruneLabError: a setting is no plain value.
    """
    try:
        return {
            "class": memory.kind,
            "defaults": to_plain(memory.defaults, hold),
            "groups": [[list(names), to_plain(values, hold)] for names, values in memory.groups],
            "state": {name: to_plain(held, hold) for name, held in memory.state.items()},
        }
    except PruneLabError as error:
        raise PruneLabError(f"This {memory.kind} cannot be saved without pickle: {error}") from error


def from_record(record: Values, held: Callable[[Any], Tensor], model: nn.Module) -> Cache:
    """The reverse of :func:`to_record`, with tensors on the devices where their parameters are.

    Args:
        held: the tensor for what stands for it.
    """
    parameters = dict(unwrap(model).named_parameters())
    groups = tuple((tuple(names), from_plain(values, held)) for names, values in record["groups"])
    # As torch does it: step counts stay on the CPU unless the step itself runs on the device.
    on_device = {name for names, values in groups if values.get("fused") or values.get("capturable") for name in names}
    state = {}
    for name in record["state"].keys() & parameters.keys():
        state[name] = from_plain(record["state"][name], held)
        for key, value in state[name].items():
            if isinstance(value, Tensor) and (key != "step" or name in on_device):
                state[name][key] = value.to(parameters[name].device)
    return Cache(record["class"], from_plain(record["defaults"], held), groups, state)
