"""The program: a network traced once, and what follows from it. Nothing in it changes after ``trace``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from prunelab.errors import PruneLabError, unknown
from prunelab.program import cost as costs
from prunelab.program.channels import Layer, Structure, find, module_of
from prunelab.program.hints import Hints
from prunelab.program.nodes import Node
from prunelab.program.opening import opened
from prunelab.program.run import checked_masks, kept_layers, last_used, literal_nodes, slice_states
from prunelab.program.selection import DENSE, Selection
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

if TYPE_CHECKING:
    import pandas as pd

    from prunelab.program.draw import Drawing


class Layers(tuple[Layer, ...]):
    """The layers in order of execution; prints as a table, and becomes a DataFrame."""

    costs_: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, layers: tuple[Layer, ...], shares: Mapping[str, tuple[float, float]]) -> Layers:
        """Layers with their shares of parameters and FLOPs."""
        table = cls(layers)
        table.costs_ = shares
        return table

    def rows(self) -> list[dict[str, Any]]:
        """One dict per layer: name, kind, channels, members, shares of parameters and FLOPs, why pinned."""
        return [
            {
                "name": layer.name,
                "kind": layer.kind,
                "channels": layer.channels,
                "members": len(layer.producers),
                "params": self.costs_[layer.name][0],
                "flops": self.costs_[layer.name][1],
                "pinned because": layer.pinned,
            }
            for layer in self
        ]

    def to_frame(self) -> pd.DataFrame:
        """The table as a DataFrame; ``params`` and ``flops`` are shares of the whole network, 0 to 1."""
        import pandas as pd

        return pd.DataFrame(self.rows()).set_index("name")

    def __repr__(self) -> str:
        heads = ["layer", "kind", "channels", "members", "params", "FLOPs", "pinned because"]
        body = [
            [r["name"], r["kind"], f"{r['channels']}", f"{r['members']}", f"{r['params']:.1%}",
            f"{r['flops']:.1%}",
             r["pinned because"]]
            for r in self.rows()
        ]  # fmt: skip
        widths = [max(len(line[k]) for line in [heads, *body]) for k in range(len(heads))]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in [heads, *body]
        )

    def _repr_html_(self) -> str:
        styled = self.to_frame()
        return str(styled.to_html(formatters={"params": "{:.1%}".format, "flops": "{:.1%}".format}))


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
        hints: what was found out about the user's forward beyond its operators.
    """

    model: nn.Module
    nodes: tuple[Node, ...]
    outputs: tuple[Any, ...]
    structure: Structure
    terms: costs.Terms
    batch: int | None
    example: tuple[Any, ...]
    constants: Mapping[str, Tensor]
    hints: Hints

    @cached_property
    def layers(self) -> Layers:
        """The rows of the desk."""
        dense = self.widths(DENSE)
        params = sum(t(dense) for t in self.terms.params) or 1
        macs = sum(t(dense) for t in self.terms.macs) or 1
        by_module: dict[str, tuple[int, int]] = {}
        for term in self.terms.params:
            _add(by_module, module_of(term.name), term(dense), 0)
        for term in self.terms.macs:
            _add(by_module, term.name, 0, term(dense))
        shares = {}
        for layer in self.structure.layers:
            own = [(part, by_module.get(module_of(state), (0, 0))) for state, part in self._parts(layer)]
            shares[layer.name] = (
                sum(part * cost[0] for part, cost in own) / params,
                sum(part * cost[1] for part, cost in own) / macs,
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
        """Channels kept in every layer, in the order of ``layers``."""
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
    held = constants(exported)

    def build(hints: Hints) -> Program:
        return _build(model, nodes, outputs, args, held, hints)

    return opened(build, nodes) if prove else build(Hints())


def _build(
    model: nn.Module,
    nodes: tuple[Node, ...],
    outputs: tuple[Any, ...],
    example: tuple[Any, ...],
    held: Mapping[str, Tensor],
    hints: Hints,
) -> Program:
    structure = find(nodes, outputs, held.keys(), hints)
    first = next(n for n in nodes if n.kind == "input" and n.shape is not None)
    assert first.shape is not None
    batch = None if first.batched[0] else first.shape[0]
    persistent = set(aliases(model).values()) & set(model.state_dict())
    parameters = {n: p.element_size() for n, p in model.named_parameters()}
    buffers = {n: b.element_size() for n, b in model.named_buffers() if n in persistent}
    return Program(
        model=model,
        nodes=nodes,
        outputs=outputs,
        structure=structure,
        terms=costs.terms(nodes, structure, parameters, buffers, batch or 1),
        batch=batch,
        example=example,
        constants=held,
        hints=hints,
    )


def cost(program: Program, selection: Selection = DENSE) -> costs.Cost:
    """Parameters, FLOPs and bytes of a selection, in closed form: nothing is run."""
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
    masks = checked_masks(program, selection)
    return slice_states(program, Selection(kept=selection.kept), masks.__getitem__, masks)
