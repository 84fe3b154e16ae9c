"""The proof that a cut is safe: the user's own forward, run without data on a cut copy, must call the same operators on
the same shapes as the program does. Layers for which it does not are pinned, with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from prunelab.program.run import bind
from prunelab.program.selection import DENSE, Selection
from prunelab.program.surgery import cut

if TYPE_CHECKING:
    from prunelab.program.program import Program

Calls = list[tuple[str, tuple[Any, ...]]]

# Operators that only rename or reinterpret memory, or check; the program may call more or fewer of them than forward.
_SILENT = {"detach", "alias", "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "clone", "expand"}


class _Recorder(TorchDispatchMode):
    """Writes down every operator that computes, with the shapes it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.strip("_") not in {s.strip("_") for s in _SILENT} and not name.startswith("_assert"):
            leaves = tree_leaves((args, kwargs or {}))
            read = tuple(
                tuple(v.shape) if isinstance(v, Tensor) else v for v in leaves if isinstance(v, Tensor | int | bool)
            )
            self.calls.append((name.rstrip("_"), read))
        return func(*args, **(kwargs or {}))


def unprovable(program: Program, args: tuple[Any, ...]) -> dict[str, str]:
    """Producers of layers whose cut the user's forward does not follow, each with the reason.

    All free layers are cut at once first; only when that fails are they searched, by halves.
    """
    free = [k for k, layer in enumerate(program.structure.layers) if not layer.pinned and layer.channels > 1]
    with _fake(program, args) as (tensor, fake_args):
        baseline = _mismatch(program, DENSE, tensor, fake_args)
        if baseline:
            # The recorder and the program disagree although nothing is cut: then only outcomes can be compared.
            return _search(program, free, lambda s: _fails(program, s, tensor, fake_args))
        return _search(program, free, lambda s: _mismatch(program, s, tensor, fake_args))


def _search(program: Program, free: list[int], check: Any) -> dict[str, str]:
    """Layers that fail, found by halving; what fails only in company is pinned too."""
    bad: dict[int, str] = {}

    def descend(some: list[int]) -> None:
        reason = check(_halved(program, some)) if some else ""
        if not reason:
            return
        if len(some) == 1:
            bad[some[0]] = reason
            return
        middle = len(some) // 2
        descend(some[:middle])
        descend(some[middle:])

    descend(free)
    rest = [k for k in free if k not in bad]
    while bad and rest and (reason := check(_halved(program, rest))):
        bad[rest.pop()] = reason
    layers = program.structure.layers
    return {state: reason for k, reason in bad.items() for state, _ in layers[k].producers}


def _halved(program: Program, some: list[int]) -> Selection:
    """Every other channel of some layers: uneven parts would show as wrong shapes."""
    layers = program.structure.layers
    return Selection(kept={layers[k].name: tuple(range(0, layers[k].channels, 2)) for k in some})


@contextmanager
def _fake(program: Program, args: tuple[Any, ...]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Tensors without data for every state and argument."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(value: Any) -> Any:
            return mode.from_tensor(value.detach()) if isinstance(value, Tensor) else value

        states = {n.target: fake(program.state(n.target)) for n in program.nodes if n.kind == "state"}
        yield states.__getitem__, tuple(tree_map(fake, a) for a in args)


def _mismatch(program: Program, selection: Selection, tensor: Any, args: tuple[Any, ...]) -> str:
    """Why forward and program differ on a cut, or ""."""
    module, error = _cut(program, selection, tensor)
    if module is None:
        return error
    said, error = _record(lambda: module(*args))
    if error:
        return f"your forward fails when it is cut: {error}"
    bound = bind(program, selection, tensor)
    expected, error = _record(lambda: bound.run(tuple(tree_leaves(args)), ()))
    if error:
        return f"the cut network cannot be run: {error}"
    for ours, theirs in zip(expected, said, strict=False):
        if ours != theirs:
            return f"your forward does not follow the cut at {theirs[0]}: it would read {theirs[1]}, not {ours[1]}"
    return "" if len(expected) == len(said) else "your forward takes another path when it is cut"


def _fails(program: Program, selection: Selection, tensor: Any, args: tuple[Any, ...]) -> str:
    module, error = _cut(program, selection, tensor)
    if module is None:
        return error
    _, error = _record(lambda: module(*args))
    return f"your forward fails when it is cut: {error}" if error else ""


def _cut(program: Program, selection: Selection, tensor: Any) -> tuple[nn.Module | None, str]:
    try:
        return cut(program, selection, tensor), ""
    except Exception as error:
        return None, f"it cannot be cut: {str(error).splitlines()[0]}"


def _record(run: Any) -> tuple[Calls, str]:
    with torch.no_grad(), _Recorder() as recorder:
        try:
            run()
        except Exception as error:
            lines = str(error).strip().splitlines()
            return recorder.calls, lines[0] if lines else type(error).__name__
    return recorder.calls, ""
