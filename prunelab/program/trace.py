"""From the user's model to plain nodes, through ``torch.export``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from prunelab.errors import PruneLabError
from prunelab.program.nodes import Node, Ref

# An in-place operator becomes its pure twin: values of a program never change, so that they can be cached.
_INPLACE = re.compile(r"^(?!__)(.*[^_])_$")


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module under ``DataParallel``, ``DistributedDataParallel`` or ``torch.compile``."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]  # torch types it as Tensor | Module
        else:
            return model


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module's training flag and the random state are as before."""
    flags = [(m, m.training) for m in model.modules()]
    random = torch.random.get_rng_state()
    for module, _ in flags:
        # Not model.eval(): users override train(), for example to keep norms frozen.
        module.training = False
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
        torch.random.set_rng_state(random)


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, tied ones under the first of their names only."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    found.update(model.named_buffers())
    return found


def aliases(model: nn.Module) -> dict[str, str]:
    """For every parameter and buffer name, the first name of the same tensor (tied weights)."""
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def as_example(example: Any) -> tuple[Any, ...]:
    """The example as a tuple of arguments; a batch of one is doubled, since the exporter fixes sizes 0 and 1."""
    args = tuple(example) if isinstance(example, tuple | list) else (example,)
    first = next((a for a in args if isinstance(a, Tensor)), None)
    if first is None or first.dim() == 0:
        raise PruneLabError("trace needs an example input: a tensor with the batch in its first dimension, or a tuple of them.")
    batch = first.shape[0]
    if batch == 0:
        raise PruneLabError("The example input has no images: its first dimension is 0.")
    if batch > 1:
        return args
    return tuple(torch.cat([a, a]) if isinstance(a, Tensor) and a.dim() and a.shape[0] == 1 else a for a in args)


def export(model: nn.Module, args: tuple[Any, ...]) -> ExportedProgram:
    """Run ``torch.export`` with a free batch dimension.

    Raises:
        PruneLabError: the model cannot run on the example, or cannot be traced.
    """
    batch = next(a.shape[0] for a in args if isinstance(a, Tensor))
    shapes = tuple(
        {0: Dim.AUTO} if isinstance(a, Tensor) and a.dim() and a.shape[0] == batch else None for a in args
    )
    with eval_mode(model):
        try:
            return torch.export.export(model, args, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            _refuse_unfit(model, args)
            raise PruneLabError(
                f"{type(model).__name__} cannot be traced: {_first_line(error)}{_user_line(error)}"
            ) from error


def _refuse_unfit(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Tell an example that does not fit from a forward that cannot be traced: only the first fails in plain Python too."""
    try:
        with torch.no_grad():
            model(*args)
    except Exception as error:
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else a for a in args]
        raise PruneLabError(
            f"{type(model).__name__} cannot run on an example input of shape {shapes}: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _user_line(error: Exception) -> str:
    """The innermost line of code outside torch in the traceback, in words."""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "/torch/" not in name and "/prunelab/program/" not in name:
            found = f" (in {name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return found


def to_nodes(exported: ExportedProgram, model: nn.Module) -> tuple[tuple[Node, ...], Any]:
    """Translate an exported graph.

    Returns:
        The nodes, in order of execution, and the output: a structure of :class:`Ref` inside tuples, lists and dicts
        as the exporter flattened it (a tuple of the leaves).
    """
    signature = exported.graph_signature
    states = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    first_names = aliases(model)
    index: dict[fx.Node, int] = {}
    nodes: list[Node] = []
    output: Any = ()
    for node in exported.graph.nodes:
        if node.op == "output":
            output = tuple(_convert(a, index) for a in node.args[0])
            break
        target = states.get(node.name, "")
        nodes.append(_node(node, len(nodes), index, first_names.get(target, target)))
        mutated = _mutated(node)
        index[node] = len(nodes) - 1
        if mutated is not None:
            _refuse_aliases(mutated, node)
            # Later readers of the mutated value read the new one.
            index[mutated] = len(nodes) - 1
    return tuple(nodes), output


def _node(node: fx.Node, at: int, index: Mapping[fx.Node, int], target: str) -> Node:
    shape, batched, shapes = _shapes(node.meta.get("val"))
    kind: Any = "op" if node.op == "call_function" else ("state" if target else "input")
    args = _arguments(node, index) if kind == "op" else {}
    return Node(
        index=at,
        kind=kind,
        name=node.name,
        op=_pure(node.target) if kind == "op" else None,
        args=args,
        inputs=tuple(dict.fromkeys(_refs(list(args.values())))),
        shape=shape,
        batched=batched,
        shapes=shapes,
        module=_module(node),
        source=_source(node),
        target=target,
    )


def _convert(value: Any, index: Mapping[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return Ref(index[value])
    if isinstance(value, list | tuple):
        return [_convert(v, index) for v in value]
    return value


def _arguments(node: fx.Node, index: Mapping[fx.Node, int]) -> dict[str, Any]:
    """Arguments by name; an ATen overload's defaults are filled in from its schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(i): _convert(a, index) for i, a in enumerate(node.args)}
    names = [a.name for a in schema.arguments]
    given = {**{a.name: a.default_value for a in schema.arguments if a.has_default_value()}}
    given.update(zip(names, node.args, strict=False))
    given.update(node.kwargs)
    return {name: _convert(given[name], index) for name in names if name in given}


def _refs(values: Sequence[Any]) -> Iterator[int]:
    for value in values:
        if isinstance(value, Ref):
            yield value.index
        elif isinstance(value, list | tuple):
            yield from _refs(value)


def _pure(target: Any) -> Any:
    packet = getattr(target, "overloadpacket", None)
    match = _INPLACE.match(packet.__name__) if packet is not None else None
    if match is None:
        return target
    twin = getattr(torch.ops.aten, match.group(1), None)
    overload = getattr(twin, target._overloadname, None) if twin is not None else None
    if overload is None:
        raise PruneLabError(f"The in-place operator {packet.__name__} has no pure twin, so it cannot be traced.")
    return overload


def _mutated(node: fx.Node) -> fx.Node | None:
    """The node whose value an in-place operator overwrites, or None."""
    packet = getattr(node.target, "overloadpacket", None)
    if node.op != "call_function" or packet is None or not _INPLACE.match(packet.__name__):
        return None
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


def _refuse_aliases(mutated: fx.Node, by: fx.Node) -> None:
    """A view that shares memory with an overwritten value, and is read later, would silently be stale."""
    order = {n: i for i, n in enumerate(by.graph.nodes)}
    related = [mutated.args[0]] if _is_view(mutated) and isinstance(mutated.args[0], fx.Node) else []
    related += [user for user in mutated.users if _is_view(user)]
    for other in related:
        if other is by:
            continue
        if any(order[user] > order[by] for user in other.users):
            raise PruneLabError(
                f"The network overwrites part of a value in place ({_source(by) or by.name}) and reads it through "
                "another view later; write that line without the in-place operation."
            )


_VIEWS = {
    *("view", "reshape", "flatten", "slice", "select", "transpose", "permute", "chunk", "split", "expand"),
    *("squeeze", "unsqueeze", "unflatten", "narrow", "t", "detach", "alias", "split_with_sizes", "unbind", "numpy_T"),
}


def _is_view(node: fx.Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    return packet is not None and packet.__name__ in _VIEWS


def _shapes(value: Any) -> tuple[tuple[int, ...] | None, tuple[bool, ...], tuple[tuple[int, ...], ...]]:
    if isinstance(value, Tensor):
        return tuple(_size(s) for s in value.shape), tuple(not isinstance(s, int) for s in value.shape), ()
    if isinstance(value, list | tuple) and all(isinstance(v, Tensor) for v in value):
        return None, (), tuple(tuple(_size(s) for s in v.shape) for v in value)
    return None, (), ()


def _size(size: Any) -> int:
    """A size for a batch of one: the exporter's symbols stand for the batch alone."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs({symbol: 1 for symbol in expression.free_symbols}))


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return str(path).split("@")[0]


def _source(node: fx.Node) -> str:
    """File and line of the innermost frame outside torch itself."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [f for f in frames if "/torch/nn/" not in f[0]]
    return f"{own[-1][0]}:{own[-1][1]}" if own else ""
