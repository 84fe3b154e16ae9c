"""From the user's model to plain nodes, through ``torch.export``."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._pytree import tree_leaves, tree_map

from prunelab.errors import PruneLabError
from prunelab.program.guard import eval_mode, quiet
from prunelab.program.lines import is_users, sentence
from prunelab.program.nodes import INPLACE, Node, Ref, is_inplace, may_give_back


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module under ``DataParallel``, ``DistributedDataParallel`` or ``torch.compile``."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]  # torch types it as Tensor | Module
        else:
            return model


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
    """The example as a tuple of arguments; a batch of one is doubled: the exporter fixes sizes 0 and 1."""
    args = tuple(example) if isinstance(example, tuple | list) else (example,)
    first = next((a for a in tree_leaves(args) if isinstance(a, Tensor)), None)
    if first is None or first.dim() == 0:
        raise PruneLabError("trace needs an example input: a tensor with the batch in its first dimension, or several.")
    batch = first.shape[0]
    if batch == 0:
        raise PruneLabError("The example input has no images: its first dimension is 0.")
    if batch > 1:
        return args
    doubled: tuple[Any, ...] = tree_map(_doubled, args)
    return doubled


def _doubled(leaf: Any) -> Any:
    return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == 1 else leaf


def export(model: nn.Module, args: tuple[Any, ...]) -> ExportedProgram:
    """Run ``torch.export`` with a free batch dimension.

    Raises:
        PruneLabError: the model cannot run on the example, or cannot be traced.
    """
    tensors = [a for a in tree_leaves(args) if isinstance(a, Tensor) and a.dim()]
    free = ShapesCollection()
    for tensor in tensors:
        if tensor.shape[0] == tensors[0].shape[0]:
            free[tensor] = {0: Dim.AUTO}
    # Without gradients, so that a forward's own torch.no_grad() changes nothing and leaves no trace.
    with eval_mode(model), torch.no_grad(), quiet(), redirect_stderr(StringIO()):
        try:
            shapes = free.dynamic_shapes(model, args)
            exported = torch.export.export(model, args, dynamic_shapes=shapes, strict=False)
            if all(_is_multiple(size) for node in exported.graph.nodes for size in _sizes(node.meta.get("val"))):
                return exported
            # Images are folded together in a way that no size for one image describes.
            return torch.export.export(model, args, strict=False)
        except Exception as error:
            _refuse_unfit(model, args)
            raise PruneLabError(f"{type(model).__name__} cannot be traced: {sentence(error)}") from error


def _refuse_unfit(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Tell an unfit example from a forward that cannot be traced: only the first fails without tracing."""
    try:
        with torch.no_grad():
            model(*args)
    except Exception as error:
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else a for a in args]
        raise PruneLabError(
            f"{type(model).__name__} cannot run on an example input of shape {shapes}: {sentence(error)}"
        ) from error


def refuse_unfollowable(model: nn.Module) -> None:
    """Say which part of a model torch itself cannot look into.

    Raises:
        PruneLabError: a layer is compiled by TorchScript, quantized, or lazy and without weights yet.
    """
    for name, part in model.named_modules():
        where = f"Layer {name!r}" if name else f"The model ({type(model).__name__})"
        if isinstance(part, torch.jit.ScriptModule):
            raise PruneLabError(f"{where} is compiled by torch.jit, which hides its code: trace what it came from.")
        if isinstance(part, LazyModuleMixin) and part.has_uninitialized_params():  # type: ignore[misc]  # torch's typing
            raise PruneLabError(f"{where} is lazy and has no weights yet: run the model once, then trace it.")
        if ".quantized." in f"{type(part).__module__}.":
            raise PruneLabError(f"{where} is quantized, its weights are packed: prune first, quantize afterwards.")


def constants(exported: ExportedProgram) -> dict[str, Tensor]:
    """Tensors that forward uses and that are neither parameters nor buffers, by name."""
    names = exported.graph_signature.inputs_to_lifted_tensor_constants.values()
    return {name: exported.constants[name] for name in names}


def to_nodes(exported: ExportedProgram, model: nn.Module) -> tuple[tuple[Node, ...], Any]:
    """Translate an exported graph.

    Returns:
        The nodes, in order of execution, and the output: the leaves that the exporter flattened it to, as
        :class:`Ref`.

    Raises:
        PruneLabError: the graph holds something other than plain operators.
    """
    signature = exported.graph_signature
    states = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    first_names = aliases(model)
    index: dict[fx.Node, int] = {}
    nodes: list[Node] = []
    output: Any = ()
    memory = _Memory(exported.graph)
    for node in exported.graph.nodes:
        if node.op == "output":
            output = tuple(_convert(a, index) for a in node.args[0])
            break
        if node.op not in ("placeholder", "call_function") or (node.target is operator.getitem and not node.users):
            continue
        target = states.get(node.name, "")
        same, seen_elsewhere = memory.overwritten(node)
        op = (node.target if seen_elsewhere else _pure(node)) if node.op == "call_function" else None
        new = _node(node, op, len(nodes), index, first_names.get(target, target))
        nodes.append(replace(new, overwrites=index[node.args[0]]) if same else new)
        # Later readers of an overwritten value read the new one.
        index.update(dict.fromkeys([*same, node], len(nodes) - 1))
    return tuple(nodes), output


def _node(node: fx.Node, op: Any, at: int, index: Mapping[fx.Node, int], target: str) -> Node:
    shape, batched, shapes = _shapes(node.meta.get("val"))
    args = _arguments(node, op, index) if op is not None else {}
    return Node(
        index=at,
        kind="op" if op is not None else ("state" if target else "input"),
        name=node.name,
        op=op,
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


def _arguments(node: fx.Node, op: Any, index: Mapping[fx.Node, int]) -> dict[str, Any]:
    """Arguments by name; an ATen overload's defaults are filled in from its schema."""
    schema = getattr(op, "_schema", None)
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


def _pure(node: fx.Node) -> Any:
    """An in-place operator's pure twin: values that never change can be kept and compared."""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    if packet is None and hasattr(target, "namespace"):
        where = f" ({_source(node)})" if _source(node) else ""
        raise PruneLabError(f"The network uses {target}{where}, whose inside cannot be followed.")
    match = INPLACE.match(packet.__name__) if packet is not None else None
    if packet is None or match is None:
        return target
    twin = getattr(torch.ops.aten, match.group(1), None)
    overload = getattr(twin, target._overloadname, None) or _alike(twin, target)
    if overload is None:
        raise PruneLabError(f"The in-place operator {packet.__name__} has no pure twin, so it cannot be traced.")
    return overload


def _alike(twin: Any, target: Any) -> Any:
    """The overload of an operator that takes the same arguments as another one, or None."""

    def taken(overload: Any) -> list[tuple[str, str]]:
        return [(a.name, str(a.type)) for a in overload._schema.arguments]

    overloads = [getattr(twin, name) for name in twin.overloads()] if twin is not None else []
    return next((o for o in overloads if taken(o) == taken(target)), None)


class _Memory:
    """Which values share memory, so that what an in-place operator overwrites is never read as it was."""

    def __init__(self, graph: fx.Graph) -> None:
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._root: dict[fx.Node, fx.Node] = {}
        self._views: dict[fx.Node, list[fx.Node]] = {}
        self._same: dict[fx.Node, list[fx.Node]] = {}

    def overwritten(self, node: fx.Node) -> tuple[list[fx.Node], bool]:
        """What an in-place operator overwrites; nothing for a pure one.

        Returns:
            the nodes that stand for exactly that value, and whether it is read later through another view: then a
            new value in its place is not enough, the memory itself must be overwritten.

        Raises:
            PruneLabError: that memory is the user's own: a parameter, a buffer or an input.
        """
        source = _shares(node)
        root = self._root[node] = self._root.get(source, source) if source is not None else node
        before = [*self._views.setdefault(root, []), root]
        self._views[root].append(node)
        if source is None or not is_inplace(node.target):
            return [], False
        same = self._same.setdefault(source, [source])
        self._same[node] = same
        others = (user for view in before if view not in same for user in view.users)
        elsewhere = any(self._order[user] > self._order[node] for user in others)
        if elsewhere and root.op == "placeholder":
            raise PruneLabError(
                f"The network overwrites part of {root.name} in place ({_source(node) or node.name}) and reads it "
                "through another view later; write that line without the in-place operation."
            )
        same.append(node)
        return same, elsewhere


def _shares(node: fx.Node) -> fx.Node | None:
    """The node whose memory this node's value may share."""
    first = node.args[0] if node.args and node.op == "call_function" else None
    return first if isinstance(first, fx.Node) and may_give_back(node.target) else None


def _shapes(value: Any) -> tuple[tuple[int, ...] | None, tuple[bool, ...], tuple[tuple[int, ...], ...]]:
    if isinstance(value, Tensor):
        return tuple(_size(s) for s in value.shape), tuple(_is_free(s) for s in value.shape), ()
    if isinstance(value, list | tuple) and all(isinstance(v, Tensor) for v in value):
        return None, (), tuple(tuple(_size(s) for s in v.shape) for v in value)
    return None, (), ()


def _sizes(value: Any) -> list[Any]:
    """All sizes of a tensor, or of the tensors in a list."""
    if isinstance(value, Tensor):
        return list(value.shape)
    return [s for v in value for s in _sizes(v)] if isinstance(value, list | tuple) else []


def _size(size: Any) -> int:
    """A size for a batch of one: the exporter's symbols stand for the batch alone."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def _is_free(size: Any) -> bool:
    """Whether a size grows with the batch; a symbol may also stand for a number that the user's code fixes."""
    return not isinstance(size, int) and bool(size.node.expr.free_symbols)


def _is_multiple(size: Any) -> bool:
    """Whether a size is a number, or a number times a power of the batch."""
    if not _is_free(size):
        return True
    expression = size.node.expr
    return len(expression.free_symbols) == 1 and all(
        factor.is_Integer or factor.is_Symbol or (factor.is_Pow and factor.exp.is_Integer and factor.exp > 0)
        for factor in expression.as_ordered_factors()
    )


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return str(path).split("@")[0]


def _source(node: fx.Node) -> str:
    """File and line of the innermost frame outside torch itself."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [f for f in frames if is_users(f[0])]
    return f"{own[-1][0]}:{own[-1][1]}" if own else ""
