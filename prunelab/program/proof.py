"""The proof that a cut is safe, without data.

The user's own forward, run on a cut copy, must call the same operators on the same shapes as the program
does. Layers for which it does not are pinned, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from prunelab.program.guard import eval_mode, quiet
from prunelab.program.lines import running_line, sentence
from prunelab.program.run import bind
from prunelab.program.selection import DENSE, Selection
from prunelab.program.surgery import cut

if TYPE_CHECKING:
    from prunelab.program.program import Program

Calls = list[tuple[str, tuple[Any, ...]]]

# Operators that change nothing, or only check; the program may call more or fewer of them than forward.
_SILENT = {
    *("detach", "alias", "clone", "lift_fresh", "_assert_tensor_metadata", "_assert_scalar", "_assert_async"),
}
_RESHAPES = {"view", "_unsafe_view", "reshape", "expand"}


class _Recorder(TorchDispatchMode):
    """Writes down every operator that computes or moves values, with the shapes and numbers it reads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.calls: Calls = []
        self.lines: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        call = _call(func, args, kwargs or {}, result)
        if call is not None:
            self.calls.append(call)
            self.lines.append(running_line())
        return result


def _call(func: Any, args: Any, kwargs: Any, result: Any) -> tuple[str, tuple[Any, ...]] | None:
    """An operator's name and the shapes and numbers it reads; None for one that changes nothing."""
    # An in-place operator is compared with its pure twin.
    name = func.overloadpacket.__name__
    pure = name.rstrip("_")
    if func.namespace == "prim" or name in _SILENT or pure in _SILENT:
        return None
    if name in _RESHAPES:
        before, after = tuple(args[0].shape), tuple(result.shape)
        return None if before == after else ("view", (before, after))
    if pure == "slice":
        size = args[0].shape[args[1] if len(args) > 1 else 0]
        taken = slice(*(*args[2:], None, None, None)[:3]).indices(size)
        return None if taken == (0, size, 1) else (pure, (tuple(args[0].shape), *args[1:2], *taken))
    leaves = tree_leaves((args, kwargs))
    read = (v for v in leaves if isinstance(v, Tensor | int | float | bool))
    return pure, tuple(tuple(v.shape) if isinstance(v, Tensor) else v for v in read)


@dataclass(frozen=True, eq=False)
class _Stand:
    """Tensors without data for every state and argument of a program."""

    program: Program
    inside: Callable[[], AbstractContextManager[Any]]
    tensors: dict[str, Tensor]
    args: tuple[Any, ...]

    def mismatch(self, selection: Selection) -> str:
        """Why forward and program differ on a cut, or ""."""
        said, failed = self.forward(selection)
        expected, error = self.expected(selection)
        if error:
            return failed or f"the cut network cannot be run: {error}"
        if expected == said and not failed:
            return ""
        same_path = len(expected) == len(self.dense[0]) and len(said) == len(self.dense[1])
        # What goes wrong first is the cause, also where forward fails only later.
        for i, j in self.alike if same_path or failed else ():
            if i < len(expected) and j < len(said) and expected[i] != said[j]:
                name, read = said[j]
                where = f"{name}{self.line(selection, j)}"
                wanted = f", not {expected[i][1]}" if expected[i][0] == name else ""
                return f"your forward does not follow the cut at {where}: it would read {read}{wanted}"
        return failed or ("" if same_path else "your forward takes another path when it is cut")

    @cached_property
    def dense(self) -> tuple[Calls, Calls]:
        """What program and forward call when nothing is cut."""
        return self.expected(DENSE)[0], self.forward(DENSE)[0]

    @cached_property
    def alike(self) -> list[tuple[int, int]]:
        """Places of the calls that both make when nothing is cut.

        They are not always all: a forward that counts its calls in a buffer does more than the program.
        """
        blocks = SequenceMatcher(None, *self.dense, autojunk=False).get_matching_blocks()
        return [(b.a + k, b.b + k) for b in blocks for k in range(b.size)]

    def expected(self, selection: Selection) -> tuple[Calls, str]:
        """What the program calls on a cut, and why it fails, or ""."""
        bound = bind(self.program, selection, self.tensors.__getitem__)
        return self.record(lambda: bound.run(tuple(tree_leaves(self.args))))

    def forward(self, selection: Selection) -> tuple[Calls, str]:
        """What the user's forward calls on a cut, and why it fails, or ""."""
        try:
            module = self.module(selection)
        except Exception as error:
            return [], f"it cannot be cut: {sentence(error)}"
        said, problem = self.record(lambda: module(*self.args))
        return said, f"your forward fails when it is cut: {problem}" if problem else ""

    def module(self, selection: Selection) -> nn.Module:
        """A cut copy of the user's module on tensors without data."""
        # Torch multiplies matrices in another way where a weight wants a gradient; the program's weights never do.
        return cut(self.program, selection, self.tensors.__getitem__).requires_grad_(False)

    def line(self, selection: Selection, at: int) -> str:
        """Where in the user's code the forward of a cut makes one of its calls."""
        module = self.module(selection)
        with torch.no_grad(), self.inside(), _Recorder() as recorder, suppress(Exception):
            module(*self.args)
        return str(recorder.lines[at])

    def record(self, run: Callable[[], Any]) -> tuple[Calls, str]:
        """What is called, and the error that ended it, or ""."""
        with torch.no_grad(), self.inside(), _Recorder() as recorder:
            try:
                run()
            except Exception as error:
                return recorder.calls, sentence(error)
        return recorder.calls, ""


def unprovable(program: Program) -> dict[int, str]:
    """Classes of layers whose cut the user's forward does not follow, each with the reason, by label.

    All free layers are cut at once first; only when that fails are they searched, by halves.
    """
    layers = program.structure.layers
    free = [k for k, layer in enumerate(layers) if not layer.pinned and layer.channels > 1]

    def search(stand: _Stand) -> dict[int, str]:
        return _search(free, lambda some: _first_reason(stand, _cuts(program, some)))

    bad = _try(program, search) if free else {}
    return {label: reason for k, reason in bad.items() for label in layers[k].labels.tolist()}


def refusal(program: Program, selection: Selection) -> str:
    """Why the user's forward does not follow this one cut, or ""."""
    return _try(program, lambda stand: stand.mismatch(selection)) if selection.kept else ""


T = TypeVar("T")


def _try(program: Program, check: Callable[[_Stand], T]) -> T:
    """A check on meta tensors, which are quick; on fake ones where a tensor is made on a device that is named."""
    with _stand(program, fake=False) as stand:
        found = check(stand)
        if not found or not (stand.forward(DENSE)[1] or stand.expected(DENSE)[1]):
            return found
    with _stand(program, fake=True) as stand:
        return check(stand)


def _first_reason(stand: _Stand, selections: list[Selection]) -> str:
    return next((found for s in selections if (found := stand.mismatch(s))), "")


def _search(free: list[int], check: Callable[[list[int]], str]) -> dict[int, str]:
    """Layers that fail, found by halving; what fails only in company is pinned too."""
    bad: dict[int, str] = {}

    def descend(some: list[int]) -> None:
        reason = check(some) if some else ""
        if reason and len(some) == 1:
            bad[some[0]] = reason
        elif reason:
            middle = len(some) // 2
            descend(some[:middle])
            descend(some[middle:])

    descend(free)
    rest = [k for k in free if k not in bad]
    while rest and (reason := check(rest)):
        bad[rest.pop()] = reason
    return bad


def _cuts(program: Program, some: list[int]) -> list[Selection]:
    """Cuts of some layers that, between them, no forward follows by chance.

    First every other channel of all of them; then every second layer down to a single channel, then the others:
    a size that forward has in its code, or works out from another one, comes out wrong in one of the three.
    """
    layers = [program.structure.layers[k] for k in some]
    cuts = [Selection({layer.name: tuple(range(0, layer.channels, 2)) for layer in layers})]
    for turn in (0, 1):
        # Not always the same one: the first channel of every part would hide how long the part is.
        single = {layer.name: ((k * 7 + turn) % layer.channels,) for k, layer in enumerate(layers) if k % 2 == turn}
        cuts.append(Selection(single))
    return [cut_ for cut_ in cuts if cut_.kept]


@contextmanager
def _stand(program: Program, fake: bool) -> Iterator[_Stand]:
    """Tensors without data: fake ones, which know their device, or meta ones, which are quicker."""
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None

    def empty(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return mode.from_tensor(value.detach()) if mode is not None else value.detach().to("meta")

    states = {name: empty(program.state(name)) for name in program.state_nodes}
    args = tuple(tree_map(empty, a) for a in program.example)
    with eval_mode(program.model), quiet():
        yield _Stand(program, lambda: torch.device("meta") if mode is None else mode, states, args)
