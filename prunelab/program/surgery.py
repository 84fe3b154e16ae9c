"""A copy of the user's module that holds sliced tensors, with the attributes that describe them put right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunelab.program.nodes import Ref
from prunelab.program.run import kept_index, rebound_args, removed_labels, slice_states
from prunelab.program.selection import Selection
from prunelab.program.trace import state_tensors

if TYPE_CHECKING:
    from prunelab.program.program import Program


def cut(program: Program, selection: Selection, tensor: Callable[[str], Tensor] | None = None) -> nn.Module:
    """A new module of the user's own class with the selection's channels gone and its units bypassed.

    Only the sliced tensors are copied, never the uncut ones: the module's structure is copied around them. Bypassed
    modules are not copied at all; an ``nn.Identity`` stands in their places.

    Args:
        tensor: gives the uncut tensor of a state name; the model's own unless given.
    """
    program = program.under(selection)
    model = program.model
    sliced = slice_states(program, selection, tensor or program.state)
    memo: dict[int, Any] = {}
    for name, old in {**program.constants, **state_tensors(model)}.items():
        if name in sliced:
            memo[id(old)] = _like(old, sliced[name])
    for part in model.modules():
        # Most of what a module keeps is flags and empty tables of hooks.
        for held in tree_leaves([v for v in vars(part).values() if _may_hold_tensors(v)]):
            if isinstance(held, Tensor) and not held.is_leaf:
                # A value that forward or a hook has left there; torch copies none that has a gradient's history.
                memo[id(held)] = held.detach().clone()
    for path in program.identities:
        old_module = model.get_submodule(path)
        memo[id(old_module)] = nn.Identity().train(old_module.training)
    module = copy.deepcopy(model, memo)
    _set_attributes(program, selection, module)
    return module


def _may_hold_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, dict | list | tuple) and bool(value))


def _like(old: Tensor, new: Tensor) -> Tensor:
    """The sliced values as the same kind of tensor: a parameter with its flag, or a buffer, in the old layout."""
    # A tensor that was not sliced still shares the user's memory.
    fresh = new.detach().clone() if new.shape == old.shape else new.detach()
    for dimensions, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if old.dim() == dimensions and not old.is_contiguous() and old.is_contiguous(memory_format=layout):
            fresh = fresh.contiguous(memory_format=layout)
    if isinstance(old, nn.Parameter):
        return nn.Parameter(fresh, requires_grad=old.requires_grad)
    return fresh


def _set_attributes(program: Program, selection: Selection, module: nn.Module) -> None:
    """``out_channels``, ``num_features``, ``groups`` and their kin follow the tensors they describe."""
    groups: dict[str, int] = {}
    for at, args in rebound_args(program, selection).items():
        weight = args.get("weight")
        norm = module.get_submodule(program.nodes[at].module) if "num_groups" in args else None
        if isinstance(norm, nn.GroupNorm):
            norm.num_groups = args["num_groups"]
        if "groups" in args and isinstance(weight, Ref):
            groups[program.nodes[weight.index].target.rpartition(".")[0]] = args["groups"]
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.conv._ConvNd):
            _set_conv(part, groups.get(name, part.groups))
        for kind, attributes in _ATTRIBUTES.items():
            if isinstance(part, kind):
                _set(part, attributes(part))
    _set_bare_norms(program, selection, module)
    _set_read_by_forward(program, selection, module)


def _set_read_by_forward(program: Program, selection: Selection, module: nn.Module) -> None:
    """Numbers that forward was found to read as sizes: ``hidden_dim``, ``num_heads``."""
    gone, structure = removed_labels(program, selection), program.structure
    parts = dict(module.named_modules())
    for (path, attribute), (node, dim) in program.hints.attributes.items():
        dims = structure.values[node]
        index = kept_index(dims[dim], structure.label, gone) if isinstance(dims, tuple) else None
        if index is not None:
            _set(parts[path], {attribute: len(index)})


def _set(part: nn.Module, attributes: Mapping[str, Any]) -> None:
    for attribute, value in attributes.items():
        if getattr(part, attribute, None) != value:
            setattr(part, attribute, value)


def _set_conv(conv: nn.modules.conv._ConvNd, groups: int) -> None:
    first, second = conv.weight.shape[:2]
    channels = (first, second * groups) if conv.transposed else (second * groups, first)
    _set(conv, {"groups": groups, "in_channels": channels[0], "out_channels": channels[1]})


def _set_bare_norms(program: Program, selection: Selection, module: nn.Module) -> None:
    """Norms without weights or statistics hold no tensor: their size is that of what they are given."""
    gone, structure = removed_labels(program, selection), program.structure
    parts = dict(module.named_modules())
    for node in program.nodes:
        part, attribute = parts.get(node.module), _BARE.get(node.opname)
        if part is None or attribute is None or not hasattr(part, attribute):
            continue
        if part.state_dict():
            continue
        dims, shape = structure.values[node.inputs[0]], program.nodes[node.inputs[0]].shape
        assert isinstance(dims, tuple) and shape is not None
        indices = [kept_index(ids, structure.label, gone) for ids in dims]
        kept = [n if index is None else len(index) for index, n in zip(indices, shape, strict=True)]
        old = getattr(part, attribute)
        _set(part, {attribute: tuple(kept[-len(old) :]) if isinstance(old, tuple) else kept[1]})


def _norm_features(norm: Any) -> dict[str, Any]:
    held = norm.weight if norm.weight is not None else norm.running_mean
    return {} if held is None else {"num_features": held.shape[0]}


def _normalized(norm: Any) -> dict[str, Any]:
    return {} if norm.weight is None else {"normalized_shape": tuple(norm.weight.shape)}


def _attention_sizes(attention: nn.MultiheadAttention) -> dict[str, int]:
    """A head keeps its width; how many there are follows from what they give together."""
    width = attention.out_proj.weight.shape[1]
    if attention.in_proj_weight is not None:
        inputs = keys = values = attention.in_proj_weight.shape[1]
    else:
        inputs, keys, values = (
            w.shape[1] for w in (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        )
    heads = width // attention.head_dim
    return {"embed_dim": inputs, "kdim": keys, "vdim": values, "num_heads": heads}


_BARE = {
    "batch_norm": "num_features",
    "instance_norm": "num_features",
    "group_norm": "num_channels",
    "layer_norm": "normalized_shape",
    "rms_norm": "normalized_shape",
}

_ATTRIBUTES: Mapping[Any, Callable[[Any], dict[str, Any]]] = {
    nn.Linear: lambda m: {"in_features": m.weight.shape[1], "out_features": m.weight.shape[0]},
    nn.modules.batchnorm._NormBase: _norm_features,
    nn.GroupNorm: lambda m: {} if m.weight is None else {"num_channels": m.weight.shape[0]},
    nn.LayerNorm: _normalized,
    nn.RMSNorm: _normalized,
    nn.Embedding: lambda m: {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1]},
    nn.MultiheadAttention: _attention_sizes,
    nn.PReLU: lambda m: {"num_parameters": m.weight.shape[0]},
}
