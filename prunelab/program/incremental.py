"""An interpreter that runs again only what a changed selection can affect.

Every value has an address: a digest of all it depends on. Two selections that give a value the same address give it
the same content, so what one of them computed serves the other.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from prunelab.program.cache import Cache
from prunelab.program.fold import Fold, find_folds, folded
from prunelab.program.ids import FIXED
from prunelab.program.liveness import working_bytes
from prunelab.program.nodes import INPLACE, Node, Ref, map_refs
from prunelab.program.program import Program
from prunelab.program.run import (
    Bound,
    checked_masks,
    kept_index,
    kept_layers,
    rebound_args,
    removed_labels,
    slice_states,
)
from prunelab.program.selection import Selection

_WEIGHTED = ("conv", "linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention")

_MAKING = ("conv", "linear", "batch_norm", "add")
_PURE = ("aten.relu.default", "aten.add.Tensor")
_IN_PLACE = {"relu": torch.ops.aten.relu_.default, "add": torch.ops.aten.add_.Tensor}

Address = bytes


def digest(*parts: bytes) -> Address:
    """A name for some bytes: 16 bytes that differ where they do."""
    # The lengths keep ("ab", "c") and ("a", "bc") apart.
    lengths = ",".join(str(len(p)) for p in parts).encode()
    return blake2b(b"".join((lengths, b";", *parts)), digest_size=16).digest()


def digest_of(tensor: Tensor) -> Address:
    """A name for a tensor's content."""
    whole = tensor.detach().cpu().contiguous()
    return digest(f"{whole.dtype}{tuple(whole.shape)}".encode(), whole.reshape(-1).view(torch.uint8).numpy().tobytes())


@dataclass(frozen=True)
class Recipe:
    """How a program's nodes are run, whatever the selection.

    Attributes:
        nodes: the program's, rewritten: norms that are folded only pass on what they get.
        folds: by node of the convolution.
        owners: for every state, the places of the layers that cut it.
        kept: nodes whose values are worth keeping.
        reused: nodes that write their value where their first argument's was.
        exact: states that keep their type: those of norms, and what norms are folded into.
        overwrites: whether an operator of the user's overwrites a value that others read: then the program runs as a
            whole or not at all.
    """

    nodes: tuple[Node, ...]
    folds: Mapping[int, Fold]
    owners: Mapping[str, tuple[int, ...]]
    kept: frozenset[int]
    reused: frozenset[int]
    exact: frozenset[int]
    overwrites: bool


def recipe(program: Program, fast: bool) -> Recipe:
    """What can be said of a program before any selection.

    Args:
        fast: with norms folded; else operator by operator as the user's forward has them.
    """
    overwrites = any(INPLACE.match(str(node.op).partition(".")[2].partition(".")[0]) for node in program.nodes)
    fast = fast and not overwrites
    folds = {fold.node.index: fold for fold in find_folds(program)} if fast else {}
    norms = {fold.norm.index: fold for fold in folds.values()}
    nodes = tuple(_rewritten(node, norms) for node in program.nodes) if fast else program.nodes
    inexact = {
        i for node in program.nodes if node.opname != "batch_norm" and node.index not in folds for i in node.inputs
    }
    exact = frozenset(n.index for n in nodes if n.kind == "state" and n.index not in inexact)
    # The whole network's, so that what it left in memory is found where units are bypassed.
    kept = worth_keeping(() if overwrites else program.base.nodes, program.outputs)
    reused = _reusable(nodes, program.outputs, kept, norms) if fast else frozenset()
    nodes = tuple(replace(n, op=_IN_PLACE[n.opname]) if n.index in reused else n for n in nodes)
    return Recipe(nodes, folds, _owners(program), kept, reused, exact, overwrites)


def _rewritten(node: Node, norms: Mapping[int, Fold]) -> Node:
    fold = norms.get(node.index)
    if fold is not None:
        at = fold.node.index
        return replace(node, op=torch.ops.aten.alias.default, args={"self": Ref(at)}, inputs=(at,))
    if node.opname == "view" and "size" in node.args:
        # Images whose channels lie innermost cannot be viewed in another shape.
        return replace(
            node, op=torch.ops.aten.reshape.default, args={"self": node.args["self"], "shape": node.args["size"]}
        )
    return node


def _reusable(
    nodes: tuple[Node, ...], outputs: Iterable[Any], kept: Collection[int], norms: Collection[int]
) -> frozenset[int]:
    """Nodes that may overwrite their first argument: it is new, as large as the result, and nobody else reads it.

    New memory for every value costs a fifth of the time of thin layers, most of it the operating system's.
    """
    readers = Counter(i for node in nodes for i in node.inputs)
    readers.update(o.index for o in outputs if isinstance(o, Ref))
    found = set()
    for node in nodes:
        at = node.args.get("self")
        if str(node.op) not in _PURE or not isinstance(at, Ref) or readers[at.index] != 1 or at.index in kept:
            continue
        source = nodes[at.index]
        new = source.opname.startswith(_MAKING) or source.index in norms or source.index in found
        if new and (source.shape, source.batched) == (node.shape, node.batched) and node.inputs[0] == at.index:
            found.add(node.index)
    return frozenset(found)


def _owners(program: Program) -> dict[str, tuple[int, ...]]:
    structure = program.structure
    owners = {}
    for name, index in program.state_nodes.items():
        dims = structure.values[index]
        assert isinstance(dims, tuple)
        found = {int(k) for ids in dims if ids is not None for k in structure.owner[structure.label[ids[ids != FIXED]]]}
        owners[name] = tuple(sorted(found - {-1}))
    return owners


def worth_keeping(nodes: tuple[Node, ...], outputs: Iterable[Any]) -> frozenset[int]:
    """Values from which a run can begin: the network's outputs, those that several operators read (a residual
    stream), and where nothing else is under way, what a convolution or linear layer reads.
    """
    ops = [node for node in nodes if node.kind == "op"]
    is_tensor = {node.index for node in ops if node.shape is not None}
    readers: dict[int, list[Node]] = {}
    for node in ops:
        for i in node.inputs:
            if i in is_tensor and node.index in is_tensor:
                readers.setdefault(i, []).append(node)
    last = {i: found[-1].index for i, found in readers.items()}
    kept = {o.index for o in outputs if isinstance(o, Ref)}
    live: set[int] = set()
    for node in ops:
        live = {i for i in live if last[i] > node.index}
        if node.index not in last:
            continue
        live.add(node.index)
        read_by = readers[node.index]
        begins = live == {node.index} and any(r.opname.startswith(_WEIGHTED) for r in read_by)
        if begins or len(read_by) > 1:
            kept.add(node.index)
    return frozenset(kept)


@dataclass(frozen=True)
class Prepared:
    """A selection made ready to run.

    Attributes:
        recipe: of the program without the units that the selection bypasses.
        bound: the sliced states and rewritten arguments.
        addresses: of every node's value, by index; for one batch they do not depend on.
    """

    recipe: Recipe
    bound: Bound
    addresses: tuple[Address, ...]


class Incremental:
    """Runs one network with many selections; slices and computes again only what differs.

    Attributes:
        fast: the type to compute in, with norms folded and channels innermost; None to compute exactly what
            :class:`prunelab.program.run.Bound` does.
    """

    def __init__(self, program: Program, memory: Cache, fast: torch.dtype | None = None) -> None:
        self.program = program.base
        self.memory = memory
        self.fast = fast
        self._working = working_bytes(self.program)
        self._recipe = lru_cache(maxsize=8)(lambda p: recipe(p, fast is not None))
        self._states: dict[str, tuple[Hashable, Address, Tensor]] = {}
        self._folded: dict[int, tuple[Address, Tensor, Tensor]] = {}

    def prepare(self, selection: Selection, repaired: Mapping[str, Tensor]) -> Prepared:
        """Slice what changed since the last selection, and address every value.

        Raises:
            PruneLabError: the selection does not fit the network.
        """
        program = self.program.under(selection)
        with torch.no_grad():
            return self._prepared(program, self._recipe(program), selection, repaired)

    def _prepared(
        self, program: Program, how: Recipe, selection: Selection, repaired: Mapping[str, Tensor]
    ) -> Prepared:
        cut = self._cut(program, how, selection, repaired)
        changed = rebound_args(program, selection)
        args: dict[int, Mapping[str, Any]] = {
            i: {**how.nodes[i].args, "shape": a["size"]} if how.nodes[i].opname != program.nodes[i].opname else a
            for i, a in changed.items()
            if a != program.nodes[i].args
        }
        states = {n.index: cut[n.target][1] for n in how.nodes if n.kind == "state"}
        addresses: list[Address] = []
        for node in how.nodes:
            if node.kind == "state":
                addresses.append(cut[node.target][0])
                continue
            own = f"{node.index} {node.opname} {args.get(node.index, '')}".encode()
            fold = how.folds.get(node.index)
            reads = (*node.inputs, *(i for i in fold.states[1:] if i is not None)) if fold else node.inputs
            addresses.append(digest(own, *(addresses[i] for i in reads)))
            if fold is not None:
                weight, bias = self._fold(fold, addresses, states)
                args[node.index] = {**args.get(node.index, node.args), "weight": weight, "bias": bias}
        if how.overwrites:
            whole = digest(*addresses)
            addresses = [digest(whole, address) for address in addresses]
        return Prepared(how, Bound(program, states, args), tuple(addresses))

    def _cut(
        self, program: Program, how: Recipe, selection: Selection, repaired: Mapping[str, Tensor]
    ) -> dict[str, tuple[Address, Tensor]]:
        """Address and tensor of every state; only those that changed are sliced."""
        kept = kept_layers(program, selection)
        masks = {name: digest_of(mask) for name, mask in checked_masks(program, selection).items()}
        mended = {name: digest_of(tensor) for name, tensor in repaired.items() if name in program.state_nodes}
        keys: dict[str, Hashable] = {}
        for name in program.state_nodes:
            own = tuple((k, kept[k]) for k in how.owners[name] if k in kept)
            keys[name] = (program.bypassed if own else (), own, masks.get(name), mended.get(name))
        missing = [name for name, key in keys.items() if name not in self._states or self._states[name][0] != key]
        if missing:
            tensors = slice_states(program, selection, program.state, [n for n in missing if n not in mended])
            gone = removed_labels(program, selection)
        for name in missing:
            if name in mended:
                address, tensor = digest(name.encode(), mended[name]), repaired[name]
            else:
                address, tensor = state_address(program, name, gone, masks.get(name, b"")), tensors[name]
            self._states[name] = (keys[name], address, self._formatted(program, how, name, tensor))
        return {name: self._states[name][1:] for name in keys}

    def _formatted(self, program: Program, how: Recipe, name: str, tensor: Tensor) -> Tensor:
        return tensor if program.state_nodes[name] in how.exact else self._fast(tensor)

    def _fold(self, fold: Fold, addresses: list[Address], states: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        key = digest(*(b"" if i is None else addresses[i] for i in fold.states))
        found = self._folded.get(fold.node.index)
        if found is None or found[0] != key:
            weight, bias = folded(fold, states)
            found = self._folded[fold.node.index] = (key, self._fast(weight), self._fast(bias))
        return found[1:]

    def _fast(self, tensor: Tensor) -> Tensor:
        """In the type to compute in if it holds fractions, with channels innermost if it holds images or filters."""
        if self.fast is None:
            return tensor
        layout = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
        return tensor.to(self.fast if tensor.is_floating_point() else tensor.dtype, memory_format=layout)

    def __call__(self, prepared: Prepared, inputs: tuple[Tensor, ...], batch: Hashable, share: float = 1.0) -> Tensor:
        """The network's (first) output for a batch.

        Args:
            batch: what names the batch, in memory.
            share: how likely it is that this batch is asked for again, against others.
        """
        outputs = prepared.bound.program.outputs
        work = self._working * len(inputs[0])
        with torch.no_grad(), self.memory.working(work):
            values = self._values(prepared, inputs, batch, share)
        return next(o for o in (map_refs(o, values.__getitem__) for o in outputs) if isinstance(o, Tensor))

    def _values(self, prepared: Prepared, inputs: tuple[Tensor, ...], batch: Hashable, share: float) -> dict[int, Any]:
        """Values of the outputs, from those in memory and those that must be computed."""
        nodes, kept, bound = prepared.recipe.nodes, prepared.recipe.kept, prepared.bound
        wanted = [o.index for o in bound.program.outputs if isinstance(o, Ref)]
        values, missing = self._found(prepared, wanted, batch)
        feeds = {n.index: (x,) for n, x in zip((n for n in nodes if n.kind == "input"), inputs, strict=False)}
        readers = Counter(i for k in missing for i in nodes[k].inputs)
        readers.update(wanted)
        spent = time.perf_counter()
        for k in missing:
            node = nodes[k]
            values[k] = bound.value(node, values, map(self._fast, feeds.get(k, ())))
            others = node.inputs[1:] if k in prepared.recipe.reused else node.inputs
            if k in kept and not _shares_memory(values[k], [values[i] for i in others]):
                now = time.perf_counter()
                self.memory.put((prepared.addresses[k], batch), values[k], share * (now - spent))
                spent = now
            for i in node.inputs:
                readers[i] -= 1
                if not readers[i]:
                    del values[i]
        return values

    def _found(self, prepared: Prepared, wanted: list[int], batch: Hashable) -> tuple[dict[int, Any], list[int]]:
        """From the outputs back: values in memory, and the nodes to compute after them, in order."""
        values: dict[int, Any] = {}
        missing: set[int] = set()
        todo = list(wanted)
        while todo:
            k = todo.pop()
            if k in values or k in missing:
                continue
            held = self.memory.get((prepared.addresses[k], batch)) if k in prepared.recipe.kept else None
            if held is not None:
                values[k] = held
                continue
            missing.add(k)
            todo.extend(prepared.recipe.nodes[k].inputs)
        if missing and prepared.recipe.overwrites:
            return {}, list(range(len(prepared.recipe.nodes)))
        return values, sorted(missing)


def state_address(program: Program, name: str, gone: Any, mask: Address) -> Address:
    """A name for a parameter or buffer as a selection leaves it: what it keeps along each dimension, and its mask."""
    dims = program.structure.values[program.state_nodes[name]]
    assert isinstance(dims, tuple)
    indices = [kept_index(ids, program.structure.label, gone) for ids in dims]
    return digest(name.encode(), mask, *(b"" if index is None else index.tobytes() for index in indices))


def _shares_memory(value: Any, inputs: list[Any]) -> bool:
    """Whether keeping a value would keep one of its inputs."""
    if not isinstance(value, Tensor):
        return False
    at = value.untyped_storage().data_ptr()
    return any(isinstance(i, Tensor) and i.untyped_storage().data_ptr() == at for i in inputs)
