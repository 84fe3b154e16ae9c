"""The program: a network traced once, and what follows from it. Nothing in it changes after ``trace``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from prunelab.errors import PruneLabError, unknown
from prunelab.program import cost as costs
from prunelab.program.channels import Layer, Structure, find, module_of
from prunelab.program.hints import Hints
from prunelab.program.nodes import Node
from prunelab.program.opening import opened
from prunelab.program.proof import attempt, departure, provable, unprovable
from prunelab.program.run import checked_masks, kept_layers, last_used, literal_nodes, slice_states
from prunelab.program.selection import DENSE, Selection
from prunelab.program.table import Layers
from prunelab.program.trace import (
    aliases,
    as_example,
    constants,
    export,
    refuse_unfollowable,
    state_tensors,
    to_nodes,
    unwrap,
)
from prunelab.program.units import Unit, Units, bypassed, find_units

if TYPE_CHECKING:
    from prunelab.program.draw import Drawing


@dataclass(frozen=True, eq=False)
class Program:
    """A traced network.

    Attributes:
        model: the user's module, unwrapped; never changed.
        nodes: the network as operators, in order of execution.
        outputs: the leaves of the network's output, as references to nodes.
        structure: channel ids, classes and layers.
        terms: closed-form cost.
        batch: None when any number of images can run at once, else the number that the user's code fixes.
        example: the arguments that it was traced with.
        constants: tensors that the user's code holds besides parameters and buffers, by name.
        proven: whether cuts were tried on the user's own forward.
        hints: what was found out about that forward beyond its operators.
        origin: where units are bypassed, the program without that.
        bypassed: names of the units that are bypassed, sorted.
        identities: paths of the modules that are an ``nn.Identity`` then.
    """

    model: nn.Module
    nodes: tuple[Node, ...]
    outputs: tuple[Any, ...]
    structure: Structure
    terms: costs.Terms
    batch: int | None
    example: tuple[Any, ...]
    constants: Mapping[str, Tensor]
    proven: bool
    hints: Hints = field(default_factory=Hints)
    origin: Program | None = None
    bypassed: tuple[str, ...] = ()
    identities: tuple[str, ...] = ()

    @property
    def base(self) -> Program:
        """The program of the whole network: itself, unless units are bypassed."""
        return self.origin or self

    @cached_property
    def units(self) -> Units:
        """The layers and blocks that can be bypassed, each proved; found when first asked for.

        Where units are bypassed, still those of the whole network.
        """
        if self.origin is not None:
            return self.origin.units
        return Units.of(find_units(self), cost(self).rows)

    def unit(self, name: str) -> Unit:
        """The unit with this name.

        Raises:
            PruneLabError: there is none, with the nearest names.
        """
        found = next((unit for unit in self.units if unit.name == name), None)
        if found is None:
            raise unknown("layer or block to bypass", name, [unit.name for unit in self.units])
        return found

    def without(self, names: Iterable[str]) -> Program:
        """The program with these units bypassed too, and everything that follows from it found again.

        Node indices stay, and layers keep their names where their first producer is still there. A unit within
        another bypassed one goes with it.

        Raises:
            PruneLabError: there is no such unit, or the user's forward does not follow these bypasses together.
        """
        wanted = tuple(sorted({*self.bypassed, *names}))
        return self if wanted == self.bypassed else self.base._without(wanted)

    @cached_property
    def _without(self) -> Callable[[tuple[str, ...]], Program]:
        return lru_cache(maxsize=8)(lambda names: _bypass(self, names))

    def under(self, selection: Selection) -> Program:
        """The program that a selection's channels and masks are meant for: that without the units it bypasses."""
        return self.without(selection.bypassed)

    def origins(self, layer: Layer) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where a layer's channels are in the whole network: the position of a layer of ``base``, the channel there.

        Returns:
            two arrays of shape ``(channels,)``.
        """
        state, dim = layer.producers[0]
        slot = next(s for s in layer.slots if (s.state, s.dim) == (state, dim))
        structure = self.base.structure
        dims = structure.values[self.base.state_nodes[state]]
        assert isinstance(dims, tuple)
        ids = dims[dim]
        assert ids is not None
        labels = structure.label[ids[slot.index[:, 0]]]
        owners = structure.owner[labels]
        places = [
            int(np.flatnonzero(structure.layers[k].labels == label)[0]) for k, label in zip(owners, labels, strict=True)
        ]
        return owners.astype(np.int64), np.array(places, np.int64)

    @cached_property
    def layers(self) -> Layers:
        """The rows of the desk."""
        dense = self.widths(DENSE)
        whole = cost(self.base)
        by_module: dict[str, tuple[int, int]] = {}
        for term in self.terms.params:
            _add(by_module, module_of(term.name), term(dense), 0)
        for term in self.terms.macs:
            _add(by_module, term.name, 0, term(dense))
        shares = {}
        for layer in self.structure.layers:
            own = [(part, by_module.get(module_of(state), (0, 0))) for state, part in self._parts(layer)]
            shares[layer.name] = (
                sum(part * own_cost[0] for part, own_cost in own) / (whole.params or 1),
                sum(part * own_cost[1] for part, own_cost in own) / (whole.macs or 1),
            )
        return Layers.of(self.structure.layers, shares)

    def _parts(self, layer: Layer) -> list[tuple[str, float]]:
        """A layer's producers, each with the part of its outputs that are the layer's: several layers may share one."""
        at = {(slot.state, slot.dim): slot.index.size for slot in layer.slots}
        return [(state, at[state, dim] / self.state(state).shape[dim]) for state, dim in layer.producers]

    @cached_property
    def last_used(self) -> tuple[tuple[int, ...], ...]:
        """For every node, the values that can be freed after it."""
        return last_used(self.nodes, self.outputs)

    @cached_property
    def literal_nodes(self) -> tuple[int, ...]:
        """Nodes whose literals a cut may rewrite."""
        return literal_nodes(self.nodes)

    @cached_property
    def state_nodes(self) -> dict[str, int]:
        """The (first) node of every parameter, buffer and constant."""
        states = [n for n in self.nodes if n.kind == "state" and n.shape is not None]
        return {n.target: n.index for n in reversed(states)}

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {layer.name: k for k, layer in enumerate(self.structure.layers)}

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return {**self.constants, **state_tensors(self.model)}

    def state(self, name: str) -> Tensor:
        """A parameter or buffer of the user's model, detached (shared memory: read only)."""
        return self._tensors[name].detach()

    def versions(self) -> tuple[int, ...]:
        """How often each tensor of the network was overwritten: another number where it was trained meanwhile."""
        tensors = (self.state(name) for name in self.base.state_nodes)
        return tuple(0 if t.is_inference() else t._version for t in tensors)

    def position(self, name: str) -> int:
        """Place of a layer in ``layers``, by its name or by the module path of one of its producers.

        Raises:
            PruneLabError: no layer has that name, with the nearest that do.
        """
        found = self._positions.get(name)
        if found is None:
            found = self._aliases.get(name)
        if found is None:
            raise unknown("layer", name, [*self._positions, *self._aliases])
        return found

    def layer(self, name: str) -> Layer:
        """The layer with this name, or that the module with this path feeds."""
        return self.structure.layers[self.position(name)]

    @cached_property
    def _aliases(self) -> dict[str, int]:
        """Module paths that belong to one layer only."""
        owners: dict[str, set[int]] = {}
        for k, layer in enumerate(self.structure.layers):
            for module in layer.members:
                owners.setdefault(module, set()).add(k)
        return {module: ks.copy().pop() for module, ks in owners.items() if len(ks) == 1}

    def widths(self, selection: Selection) -> list[int]:
        """Channels kept in every layer, in the order of ``layers``.

        Where the selection bypasses units, of the layers that are there then.
        """
        program = self.under(selection)
        if program is not self:
            return program.widths(selection)
        kept = [layer.channels for layer in self.structure.layers]
        for at, channels in kept_layers(self, selection).items():
            kept[at] = len(channels)
        return kept

    @cached_property
    def digest(self) -> str:
        """A name for the network's structure (not its weights): equal for equal layers."""
        parts = [(layer.name, layer.channels, layer.producers) for layer in self.structure.layers]
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    def draw(self, selection: Selection = DENSE) -> Drawing:
        """A picture of the network: a notebook shows it, ``draw().save("network.svg")`` keeps it.

        One box stands for every operator with weights, with the norms and activations around it. Boxes whose
        outputs go together share a colour and a number, what is pinned is hatched and says why; pointing at a
        box shows the details.

        Args:
            selection: what is to be removed; every box then shows how many of its channels stay.

        Raises:
            PruneLabError: the selection does not fit the network.
        """
        from prunelab.program.draw import draw

        return draw(self, selection)

    def __repr__(self) -> str:
        pinned = sum(bool(layer.pinned) for layer in self.layers)
        head = f"Program of {type(self.model).__name__}: {len(self.layers)} layers, {pinned} pinned"
        return f"{head}\n{self.layers!r}"


def _add(table: dict[str, tuple[int, int]], key: str, params: int, macs: int) -> None:
    before = table.get(key, (0, 0))
    table[key] = (before[0] + params, before[1] + macs)


def trace(model: nn.Module, example: Any, *, prove: bool = True) -> Program:
    """Trace a network and find what can be removed from it.

    The model is not changed: training flags, hooks, gradients, buffers and random state are as before. Its forward
    runs about ten times on tensors without data, and its forward hooks with it, since they may change values: what
    they print appears as often. A commit runs it once more; profile and preview never do.

    Args:
        model: any ``nn.Module``; wrappers of torch (``DataParallel``, ``torch.compile``) are looked through.
        example: an input of forward, shape ``(images, …)``, or a tuple of all its positional arguments, which may
            be tensors, numbers, None, and lists or dicts of them. Arguments left out keep their defaults.
        prove: try cuts of every layer on the user's own ``forward``, without data, and pin the layers whose
            cut the forward does not follow.

    Raises:
        PruneLabError: the model cannot run on the example, or its forward cannot be traced.
    """
    if not isinstance(model, nn.Module):
        raise PruneLabError(f"trace needs a torch.nn.Module, not a {type(model).__name__}.")
    model = unwrap(model)
    refuse_unfollowable(model)
    args = as_example(example)
    exported = export(model, args)
    nodes, outputs = to_nodes(exported, model)
    first = next(n for n in nodes if n.kind == "input" and n.shape is not None)
    assert first.shape is not None
    program = Program(
        model=model,
        nodes=nodes,
        outputs=outputs,
        structure=Structure((), np.zeros(0, np.int64), np.zeros(0, np.int32), ()),
        terms=costs.Terms((), (), ()),
        batch=None if first.batched[0] else first.shape[0],
        example=args,
        constants=constants(exported),
        proven=prove,
    )
    return opened(lambda hints: _found(program, hints), nodes) if prove else _found(program, Hints())


def _found(program: Program, hints: Hints) -> Program:
    """The program with its layers and costs, from its nodes."""
    model, nodes = program.model, program.nodes
    structure = find(nodes, program.outputs, program.constants.keys(), hints)
    persistent = set(aliases(model).values()) & set(model.state_dict())
    parameters = {n: p.element_size() for n, p in model.named_parameters()}
    buffers = {n: b.element_size() for n, b in model.named_buffers() if n in persistent}
    terms = costs.terms(nodes, structure, parameters, buffers, program.batch or 1)
    return replace(program, structure=structure, terms=terms, hints=hints)


def _bypass(base: Program, names: tuple[str, ...]) -> Program:
    """A program with some of its units bypassed."""
    units = [base.unit(name) for name in names]
    try:
        program = bypassed(base, units)
        reason = departure(program) if base.proven else ""
    except PruneLabError as error:
        reason = str(error)
    if reason:
        listed = ", ".join(repr(name) for name in names)
        raise PruneLabError(f"{listed} cannot be bypassed together: {reason}.")
    hints = base.hints.among([node.kind != "dropped" for node in program.nodes])
    found = _found(program, hints)
    if base.proven and not provable(found):
        # What forward did not follow before, it hardly follows now: the search starts from there.
        old = _found(program, hints.pinning(_old_pins(found)))
        found = _found(program, old.hints.pinning(attempt(old, unprovable)))
    return replace(found, structure=replace(found.structure, layers=_names_of_old(found)))


def _old_pins(program: Program) -> dict[int, str]:
    """Classes of a program with bypasses that the whole network's proof pinned, with the reason."""
    pins, old = program.base.hints.pins, program.base.structure.layers
    return {
        int(label): pins[int(old[k].labels[c])]
        for layer in program.structure.layers
        for label, k, c in zip(layer.labels, *program.origins(layer), strict=True)
        if int(old[k].labels[c]) in pins
    }


def _names_of_old(program: Program) -> tuple[Layer, ...]:
    """Layers under the names and in the stages that they have in the whole network, so that settings find them."""
    old = program.base.structure.layers
    taken: set[str] = set()
    named = []
    for layer in program.structure.layers:
        before = old[program.origins(layer)[0][0]]
        name = before.name
        # A layer that falls apart: the parts after the first are new.
        while name in taken:
            name += "'"
        taken.add(name)
        named.append(replace(layer, name=name, stage=before.stage))
    return tuple(named)


def cost(program: Program, selection: Selection = DENSE) -> costs.Cost:
    """Parameters, FLOPs and bytes of a selection, in closed form: nothing is run."""
    program = program.under(selection)
    kept = program.widths(selection)
    params = [(t, t(kept)) for t in program.terms.params]
    buffers = [(t, t(kept)) for t in program.terms.buffers]
    macs = [(t, t(kept)) for t in program.terms.macs]
    total = sum(n for _, n in params)
    zeroed = sum(int(mask.numel() - mask.sum()) for mask in sliced_masks(program, selection).values())
    rows = [(t.name.rpartition(".")[0], n, 0) for t, n in params] + [(t.name, 0, 2 * n) for t, n in macs]
    return costs.Cost(
        params=total,
        nonzero=total - zeroed,
        macs=sum(n for _, n in macs),
        bytes=sum(n * t.dtype_bytes for t, n in params + buffers),
        rows=tuple(rows),
    )


def sliced_masks(program: Program, selection: Selection) -> dict[str, Tensor]:
    """A selection's weight masks in the shapes of the committed module, by parameter name.

    They are what fine-tuning holds.
    """
    program = program.under(selection)
    masks = checked_masks(program, selection)
    if not masks:
        return {}
    return slice_states(program, Selection(kept=selection.kept), masks.__getitem__, masks)
