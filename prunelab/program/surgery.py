"""A copy of the user's module that holds sliced tensors, with the attributes that describe them put right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from prunelab.program.nodes import Ref
from prunelab.program.run import rebound_args, slice_states
from prunelab.program.selection import Selection

if TYPE_CHECKING:
    from prunelab.program.program import Program


def cut(program: Program, selection: Selection, tensor: Callable[[str], Tensor] | None = None) -> nn.Module:
    """A new module of the user's own class with the selection's channels gone.

    Only the sliced tensors are copied, never the uncut ones: the module's structure is copied around them.

    Args:
        tensor: gives the uncut tensor of a state name; the model's own unless given.
    """
    model = program.model
    sliced = slice_states(program, selection, tensor or program.state)
    memo: dict[int, Any] = {}
    for name, old in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        if name in sliced:
            memo[id(old)] = _like(old, sliced[name])
    module = copy.deepcopy(model, memo)
    _set_attributes(program, selection, module)
    return module


def _like(old: Tensor, new: Tensor) -> Tensor:
    """The sliced values as the same kind of tensor: a parameter with its flag, or a buffer."""
    # A tensor that was not sliced still shares the user's memory.
    fresh = new.detach().clone() if new.shape == old.shape else new.detach()
    if isinstance(old, nn.Parameter):
        return nn.Parameter(fresh, requires_grad=old.requires_grad)
    return fresh


def _set_attributes(program: Program, selection: Selection, module: nn.Module) -> None:
    """``out_channels``, ``num_features``, ``groups`` and their kin follow the tensors they describe."""
    groups: dict[str, int] = {}
    for index, args in rebound_args(program, selection).items():
        weight = args.get("weight")
        if "groups" in args and isinstance(weight, Ref):
            groups[program.nodes[weight.index].target.rpartition(".")[0]] = args["groups"]
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.conv._ConvNd):
            _set_conv(part, groups.get(name, part.groups))
        for kind, attributes in _ATTRIBUTES.items():
            if isinstance(part, kind):
                for attribute, value in attributes(part).items():
                    if getattr(part, attribute, None) != value:
                        setattr(part, attribute, value)


def _set_conv(conv: nn.modules.conv._ConvNd, groups: int) -> None:
    first, second = conv.weight.shape[:2]
    conv.groups = groups
    if conv.transposed:
        conv.in_channels, conv.out_channels = first, second * groups
    else:
        conv.in_channels, conv.out_channels = second * groups, first


def _norm_features(norm: Any) -> dict[str, Any]:
    held = norm.weight if norm.weight is not None else norm.running_mean
    return {} if held is None else {"num_features": held.shape[0]}


def _normalized(norm: Any) -> dict[str, Any]:
    return {} if norm.weight is None else {"normalized_shape": tuple(norm.weight.shape)}


_ATTRIBUTES: Mapping[Any, Callable[[Any], dict[str, Any]]] = {
    nn.Linear: lambda m: {"in_features": m.weight.shape[1], "out_features": m.weight.shape[0]},
    nn.modules.batchnorm._NormBase: _norm_features,
    nn.GroupNorm: lambda m: {} if m.weight is None else {"num_channels": m.weight.shape[0]},
    nn.LayerNorm: _normalized,
    nn.RMSNorm: _normalized,
    nn.Embedding: lambda m: {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1]},
    nn.PReLU: lambda m: {"num_parameters": m.weight.shape[0]},
}
