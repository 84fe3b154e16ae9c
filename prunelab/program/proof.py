"""The proof that a cut is safe, without data.

The user's own forward, run on a cut copy, must call the same operators on the same shapes as the program
does. Layers for which it does not are pinned, with the reason.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from prunelab.errors import PruneLabError
from prunelab.program.guard import eval_mode, quiet
from prunelab.program.lines import running_line, sentence
from prunelab.program.run import bind
from prunelab.program.selection import DENSE, Selection
from prunelab.program.surgery import cut

if TYPE_CHECKING:
    from prunelab.program.program import Program
    from prunelab.program.units import Unit

Call = tuple[str, tuple[Any, ...]]
Calls = list[Call]

# Operators that change nothing, or only check; the program may call more or fewer of them than forward.
_SILENT = {
    *("detach", "alias", "clone", "lift_fresh", "_assert_tensor_metadata", "_assert_scalar", "_assert_async"),
}
_RESHAPES = {"view", "_unsafe_view", "reshape", "expand"}


class _Recorder(TorchDispatchMode):
    """Writes down every operator that computes or moves values, with the shapes and numbers it reads.

    Asked for lines, also where in the user's code; that takes time, so only for the one that a reason names.
    """

    def __init__(self, lines: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.calls: Calls = []
        self.lines: list[str] = []
        self._wanted = lines

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shortcut = _SHORTCUTS.get(func)
        result = shortcut(*args) if shortcut is not None else func(*args, **(kwargs or {}))
        call = _call(func, args, kwargs or {}, result)
        if call is not None:
            self.calls.append(call)
            if self._wanted:
                self.lines.append(running_line())
        return result


def _batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, *_: Any) -> Any:
    """The shapes alone: PyTorch takes this operator apart in Python where there is no data, at ten times the cost."""
    if any(t is not None and t.shape != x.shape[1:2] for t in (weight, bias, mean)):
        raise RuntimeError(f"a batch norm is given {x.shape[1]} channels, which is not what it holds")
    return torch.empty_like(x), x.new_empty(0), x.new_empty(0)


_SHORTCUTS: Mapping[Any, Callable[..., Any]] = {
    torch.ops.aten.native_batch_norm.default: _batch_norm,
    torch.ops.aten.relu.default: torch.empty_like,
    torch.ops.aten.relu_.default: lambda x: x,
}


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


@dataclass(frozen=True)
class Failure:
    """Where and why forward and program differ on a cut.

    Attributes:
        reason: in words.
        node: the first node that differs, or None where it cannot be told.
    """

    reason: str
    node: int | None


@dataclass(frozen=True, eq=False)
class Stand:
    """Tensors without data for every state and argument of a program."""

    program: Program
    inside: Callable[[], AbstractContextManager[Any]]
    tensors: dict[str, Tensor]
    args: tuple[Any, ...]

    def on(self, program: Program) -> Stand:
        """The same for a program of the same nodes: what is known of the uncut network is not run again."""
        other = replace(self, program=program)
        for name in {"_uncut", "_same_when_dense", "_alike", "_trains"} & vars(self).keys():
            vars(other)[name] = vars(self)[name]
        return other

    def mismatch(self, selection: Selection) -> Failure | None:
        """Why forward and program differ on a cut, or None where they agree."""
        said, error = self.forward(selection)
        expected, problem = self.expected(selection)
        if problem and not error:
            return Failure(f"the cut network cannot be run: {problem}", None)
        if not error and said == [call for _, call in expected]:
            return self._in_training(selection)
        other_path = not self._same_when_dense and [len(expected), len(said)] != [len(calls) for calls in self._dense]
        if other_path and not error:
            return Failure("your forward takes another path when it is cut", None)
        for i, j in self._pairs(min(len(expected), len(said))):
            node, (name, wanted) = expected[i]
            called, read = said[j]
            if expected[i][1] != said[j]:
                where, other = self._line(selection, j), f", not {wanted}" if called == name else ""
                # What goes wrong first is the cause, also where forward fails only later.
                reason = f"your forward does not follow the cut at {called}{where}: it would read {read}{other}"
                return Failure(reason, node)
        if error:
            return Failure(error, self._node_at(len(said), expected))
        if self._same_when_dense and len(expected) != len(said):
            return Failure("your forward takes another path when it is cut", None)
        return self._in_training(selection)

    def _in_training(self, selection: Selection) -> Failure | None:
        """Why a branch that only runs in training, such as an auxiliary classifier, does not follow a cut."""
        if not self._trains:
            return None
        problem = self._training(selection)
        return Failure(f"your forward fails in training mode when it is cut: {problem}", None) if problem else None

    def _training(self, selection: Selection) -> str:
        """The error of the user's forward in training mode, or ""."""
        module = self._module(selection)
        for part in module.modules():
            part.training = True
        return self.record(lambda: module(*self.args))[1]

    @cached_property
    def _trains(self) -> bool:
        """Whether there are parameters that only training reads, and forward runs then when nothing is cut."""
        nodes = self.program.base.nodes
        read = {i for node in nodes for i in node.inputs}
        parameters = {name for name, _ in self.program.model.named_parameters()}
        unread = any(n.kind == "state" and n.index not in read and n.target in parameters for n in nodes)
        return unread and not self._training(DENSE)

    def _node_at(self, position: int, expected: list[tuple[int, Call]]) -> int | None:
        """The node that makes the call which forward did not come to make."""
        if self._same_when_dense:
            return expected[position][0] if position < len(expected) else None
        return next((self._dense[0][i][0] for i, j in self._alike if j >= position), None)

    def _pairs(self, count: int) -> Iterable[tuple[int, int]]:
        """Places of the calls, among the first so many, that stand for each other on a cut."""
        pairs = ((i, i) for i in range(count)) if self._same_when_dense else self._alike
        return (pair for pair in pairs if max(pair) < count)

    @cached_property
    def _same_when_dense(self) -> bool:
        return [call for _, call in self._dense[0]] == self._dense[1]

    @cached_property
    def _uncut(self) -> tuple[tuple[list[tuple[int, Call]], str], tuple[Calls, str]]:
        return self.expected(DENSE), self.forward(DENSE)

    @property
    def runs(self) -> bool:
        """Whether program and forward run on these tensors when nothing is cut."""
        return not any(problem for _, problem in self._uncut)

    @property
    def _dense(self) -> tuple[list[tuple[int, Call]], Calls]:
        """What program (with its nodes) and forward call when nothing is cut."""
        (expected, _), (said, _) = self._uncut
        return expected, said

    @cached_property
    def _alike(self) -> list[tuple[int, int]]:
        """Places of the calls that both make when nothing is cut.

        They are not always all: a forward that counts its calls in a buffer does more than the program.
        """
        return _matched(*self._dense)

    def departure(self, base: Stand) -> str:
        """Why forward does not follow the program's bypasses, or ""; ``base`` is the network without them."""
        said, error = self.forward(DENSE)
        if error:
            return error
        expected, error = self.expected(DENSE)
        if error:
            return f"the network cannot be run without it: {error}"
        now, before = len(_matched(expected, said)), len(base._alike)
        ours, theirs = base._dense
        if len(expected) - now > len(ours) - before or len(said) - now > len(theirs) - before:
            return "your forward does not do the same when an identity stands in its place"
        return ""

    def expected(self, selection: Selection) -> tuple[list[tuple[int, Call]], str]:
        """What the program calls on a cut, each with its node, and why it fails, or ""."""
        bound = bind(self.program, selection, self.tensors.__getitem__)
        counts: list[int] = []
        recorder = _Recorder()
        watch = {n.index: lambda _: counts.append(len(recorder.calls)) for n in self.program.nodes}
        calls, problem = self.record(lambda: bound.run(tuple(tree_leaves(self.args)), watch), recorder)
        nodes = [bisect_right(counts, k) for k in range(len(calls))]
        return list(zip(nodes, calls, strict=True)), problem

    def forward(self, selection: Selection) -> tuple[Calls, str]:
        """What the user's forward calls on a cut, and why it fails, or ""."""
        try:
            module = self._module(selection)
        except Exception as error:
            return [], f"it cannot be cut: {sentence(error)}"
        said, problem = self.record(lambda: module(*self.args))
        return said, f"your forward fails when it is cut: {problem}" if problem else ""

    def _module(self, selection: Selection) -> nn.Module:
        """A cut copy of the user's module on tensors without data."""
        # Torch multiplies matrices in another way where a weight wants a gradient; the program's weights never do.
        return cut(self.program, selection, self.tensors.__getitem__).requires_grad_(False)

    def _line(self, selection: Selection, at: int) -> str:
        """Where in the user's code the forward of a cut makes one of its calls."""
        module = self._module(selection)
        with torch.no_grad(), self.inside(), _Recorder(lines=True) as recorder, suppress(Exception):
            module(*self.args)
        return str(recorder.lines[at])

    def record(self, run: Callable[[], Any], recorder: _Recorder | None = None) -> tuple[Calls, str]:
        """What is called, and the error that ended it, or ""."""
        recorder = recorder or _Recorder()
        with torch.no_grad(), self.inside(), recorder:
            try:
                run()
            except Exception as error:
                return recorder.calls, sentence(error)
        return recorder.calls, ""


def _matched(expected: list[tuple[int, Call]], said: Calls) -> list[tuple[int, int]]:
    """Places of the calls that stand for each other in two lists."""
    ours = [call for _, call in expected]
    if ours == said:
        return [(i, i) for i in range(len(ours))]
    blocks = SequenceMatcher(None, ours, said, autojunk=False).get_matching_blocks()
    return [(b.a + k, b.b + k) for b in blocks for k in range(b.size)]


def free_layers(program: Program) -> list[int]:
    """Places of the layers of which something can be removed."""
    layers = program.structure.layers
    return [k for k, layer in enumerate(layers) if not layer.pinned and layer.channels > 1]


def unprovable(stand: Stand) -> dict[int, str]:
    """Classes of layers whose cut the user's forward does not follow, each with the reason, by label.

    All free layers are cut at once first; only when that fails are they searched, by halves.
    """

    def reason(some: list[int]) -> str:
        failure = first_failure(stand, some)
        return failure.reason if failure is not None else ""

    bad = _search(free_layers(stand.program), reason)
    layers = stand.program.structure.layers
    return {label: reason for k, reason in bad.items() for label in layers[k].labels.tolist()}


def provable(program: Program) -> bool:
    """Whether the user's forward follows a cut of all free layers at once."""
    return attempt(program, lambda stand: first_failure(stand, free_layers(program))) is None


def refusal(program: Program, selection: Selection) -> str:
    """Why the user's forward does not follow this one cut, or ""."""
    program = program.under(selection)
    failure = attempt(program, lambda stand: stand.mismatch(selection)) if selection.kept else None
    return failure.reason if failure is not None else ""


def departure(program: Program) -> str:
    """Why the user's forward does not do what a program with bypassed units does, or ""."""
    return attempt(program, lambda stand: stand.departure(replace(stand, program=program.base)))


def unprovable_bypasses(
    program: Program, groups: list[list[Unit]], bypassed: Callable[[list[Unit]], Program]
) -> set[Unit]:
    """Units whose bypass the user's forward does not follow.

    Args:
        groups: units that can be tried at once.
        bypassed: the program with some units of a group bypassed.
    """

    def search(stand: Stand) -> set[Unit]:
        def check(group: list[Unit], some: list[int]) -> str:
            try:
                program = bypassed([group[k] for k in some])
            except PruneLabError as error:
                return str(error)
            return replace(stand, program=program).departure(stand)

        return {group[k] for group in groups for k in _search([*range(len(group))], partial(check, group))}

    return attempt(program, search) if groups else set()


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


def attempt(program: Program, check: Callable[[Stand], T]) -> T:
    """A check on tensors without data that the uncut forward runs on."""
    with _stand(program, fake=False) as stand:
        found = check(stand)
        if not found or stand.runs:
            return found
    # It makes tensors on a device that it names.
    with _stand(program, fake=True) as stand:
        return check(stand)


def first_failure(stand: Stand, some: list[int]) -> Failure | None:
    """Where forward first leaves the program when some layers are cut, if it does."""
    cuts = trial_cuts(stand.program, some)
    return next((found for s in cuts if (found := stand.mismatch(s)) is not None), None)


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


def trial_cuts(program: Program, some: list[int]) -> list[Selection]:
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
def _stand(program: Program, fake: bool) -> Iterator[Stand]:
    """Tensors without data: fake ones, which know their device, or meta ones, which are quicker."""
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None

    def empty(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return mode.from_tensor(value.detach()) if mode is not None else value.detach().to("meta")

    states = {name: empty(program.state(name)) for name in program.base.state_nodes}
    args = tuple(tree_map(empty, a) for a in program.example)
    with eval_mode(program.model), quiet():
        yield Stand(program, lambda: torch.device("meta") if mode is None else mode, states, args)
