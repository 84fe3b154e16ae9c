"""The proof that a cut is safe, without data.

The user's own forward, run on a cut copy, must call the same operators on the same shapes as the program
does. Layers for which it does not are pinned, with the reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from prunelab.errors import PruneLabError
from prunelab.program.guard import eval_mode, quiet
from prunelab.program.run import bind
from prunelab.program.selection import DENSE, Selection
from prunelab.program.surgery import cut

if TYPE_CHECKING:
    from prunelab.program.program import Program
    from prunelab.program.units import Unit

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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        call = _call(func, args, kwargs or {}, result)
        if call is not None:
            self.calls.append(call)
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
        said, error = self.forward(selection)
        if error:
            return error
        expected, error = self.expected(selection)
        if error:
            return f"the cut network cannot be run: {error}"
        if expected == said:
            return ""
        if len(expected) != len(self.dense[0]) or len(said) != len(self.dense[1]):
            return "your forward takes another path when it is cut"
        for ours, theirs in ((expected[i], said[j]) for i, j in self.alike):
            if ours != theirs:
                return f"your forward does not follow the cut at {theirs[0]}: it would read {theirs[1]}, not {ours[1]}"
        return ""

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

    def departure(self, base: _Stand) -> str:
        """Why forward does not follow the program's bypasses, or ""; ``base`` is the network without them."""
        said, error = self.forward(DENSE)
        if error:
            return error
        expected, error = self.expected(DENSE)
        if error:
            return f"the network cannot be run without it: {error}"
        pairs = zip(_unmatched(expected, said), _unmatched(*base.dense), strict=True)
        if any(now > before for now, before in pairs):
            return "your forward does not do the same when an identity stands in its place"
        return ""

    def expected(self, selection: Selection) -> tuple[Calls, str]:
        """What the program calls on a cut, and why it fails, or ""."""
        bound = bind(self.program, selection, self.tensors.__getitem__)
        return self.record(lambda: bound.run(tuple(tree_leaves(self.args))))

    def forward(self, selection: Selection) -> tuple[Calls, str]:
        """What the user's forward calls on a cut, and why it fails, or ""."""
        try:
            module = cut(self.program, selection, self.tensors.__getitem__)
        except Exception as error:
            return [], f"it cannot be cut: {_line(error)}"
        said, problem = self.record(lambda: module(*self.args))
        return said, f"your forward fails when it is cut: {problem}" if problem else ""

    def record(self, run: Callable[[], Any]) -> tuple[Calls, str]:
        """What is called, and the error that ended it, or ""."""
        with torch.no_grad(), self.inside(), _Recorder() as recorder:
            try:
                run()
            except Exception as error:
                return recorder.calls, _line(error)
        return recorder.calls, ""


def _unmatched(ours: Calls, theirs: Calls) -> tuple[int, int]:
    """How many calls of each list have no counterpart in the other."""
    if ours == theirs:
        return 0, 0
    matching = SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
    both = sum(block.size for block in matching)
    return len(ours) - both, len(theirs) - both


def unprovable(program: Program) -> dict[int, str]:
    """Classes of layers whose cut the user's forward does not follow, each with the reason, by label.

    All free layers are cut at once first; only when that fails are they searched, by halves.
    """
    layers, free = program.structure.layers, _free(program)

    def search(stand: _Stand) -> dict[int, str]:
        return _search(free, lambda some: _first_reason(stand, _cuts(program, some)))

    bad = _try(program, search) if free else {}
    return {label: reason for k, reason in bad.items() for label in layers[k].labels.tolist()}


def provable(program: Program) -> bool:
    """Whether the user's forward follows a cut of all free layers at once."""
    free = _free(program)
    return not free or not _try(program, lambda stand: _first_reason(stand, _cuts(program, free)))


def _free(program: Program) -> list[int]:
    """Places of the layers that a cut may make narrower."""
    layers = enumerate(program.structure.layers)
    return [k for k, layer in layers if not layer.pinned and layer.channels > 1]


def refusal(program: Program, selection: Selection) -> str:
    """Why the user's forward does not follow this one cut, or ""."""
    program = program.under(selection)
    return _try(program, lambda stand: stand.mismatch(selection)) if selection.kept else ""


def departure(program: Program) -> str:
    """Why the user's forward does not do what a program with bypassed units does, or ""."""
    return _try(program, lambda stand: stand.departure(replace(stand, program=program.base)))


def unprovable_bypasses(
    program: Program, groups: list[list[Unit]], bypassed: Callable[[list[Unit]], Program]
) -> set[Unit]:
    """Units whose bypass the user's forward does not follow.

    Args:
        groups: units that can be tried at once.
        bypassed: the program with some units of a group bypassed.
    """

    def search(stand: _Stand) -> set[Unit]:
        def check(group: list[Unit], some: list[int]) -> str:
            try:
                program = bypassed([group[k] for k in some])
            except PruneLabError as error:
                return str(error)
            return replace(stand, program=program).departure(stand)

        return {group[k] for group in groups for k in _search([*range(len(group))], partial(check, group))}

    return _try(program, search) if groups else set()


def plainly_called(program: Program) -> frozenset[str]:
    """Paths of modules that forward calls once, with one tensor and nothing else, and that give one tensor."""
    for fake in (False, True):
        with _stand(program, fake) as stand:
            module = cut(program, DENSE, stand.tensors.__getitem__)
            calls: dict[str, list[bool]] = defaultdict(list)

            def note(path: str, _: Any, args: Any, kwargs: Any, result: Any, calls: Any = calls) -> None:
                plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
                calls[path].append(plain and isinstance(result, Tensor))

            for path, part in module.named_modules():
                part.register_forward_hook(partial(note, path), with_kwargs=True)
            if not stand.record(partial(module, *stand.args))[1]:
                return frozenset(path for path, plain in calls.items() if path and plain == [True])
    return frozenset()


T = TypeVar("T")


def _try(program: Program, check: Callable[[_Stand], T]) -> T:
    """A check on meta tensors, which are quick; on fake ones where forward makes tensors on a device it names."""
    with _stand(program, fake=False) as stand:
        found = check(stand)
        if not found or not stand.forward(DENSE)[1]:
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

    states = {name: empty(program.state(name)) for name in program.base.state_nodes}
    args = tuple(tree_map(empty, a) for a in program.example)
    with eval_mode(program.model), quiet():
        yield _Stand(program, lambda: torch.device("meta") if mode is None else mode, states, args)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
