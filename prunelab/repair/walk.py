"""One walk from input to output: every layer in turn is corrected, given what the layers before it have become."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor

from prunelab.profile.batches import inputs_of
from prunelab.program.nodes import Node
from prunelab.program.run import Bound, bind, kept_index
from prunelab.repair.equations import (
    as_columns,
    as_weight,
    convolution_inputs,
    fitted,
    linear_inputs,
    outputs_at,
    sampled,
)
from prunelab.repair.places import Cut, Place, adjustable, places, schedule

LEAST_ROWS = 20_000
"""Positions of every layer that are looked at, over all images: with more the answer hardly changes."""
ROWS_PER_UNKNOWN = 40
MOST_VALUES = 1 << 27
"""Inputs of a layer that are held at once, over all rows: half a gigabyte in float32."""

# A norm's scale below this part of its largest cannot carry a correction: it would need huge weights.
_LEAST_SCALE = 1e-3
_NO_SHIFT = "it has no bias, and no batch norm after it that could take one"


class Samples(dict[tuple[int, int], Tensor]):
    """Values of the uncut network at the rows of a layer, shape ``(rows, channels)``, by layer and target node."""

    def __init__(self, budget: int) -> None:
        """Args:
        budget: bytes beyond which values are let go once they were used.
        """
        super().__init__()
        self.budget = budget

    def used(self, key: tuple[int, int]) -> None:
        """This value may go, if there is no room for it."""
        if sum(tensor.nbytes for tensor in self.values()) > self.budget:
            del self[key]


class Values:
    """The values of a network that are still needed, computed one node after the other."""

    def __init__(self, bound: Bound, images: Tensor, order: Iterable[int], asked: Iterable[int] = ()) -> None:
        """Args:
        order: the nodes to compute; ``asked``: values that others need too, once for each time.
        """
        self.bound, self.order = bound, list(order)
        self.nodes = bound.program.nodes
        feed = inputs_of(bound.program, images)
        self._inputs = dict(zip((n.index for n in self.nodes if n.kind == "input"), feed, strict=True))
        self._reads = Counter([*asked, *(i for at in self.order for i in self.nodes[at].inputs)])
        self.held: dict[int, Any] = {}

    def compute(self, at: int) -> Any:
        """One node's value; those that it was the last to need are let go."""
        node = self.nodes[at]
        value = self.bound.value(node, self.held, iter([self._inputs.get(at)]))
        self.held[at] = value
        self.let_go([*node.inputs, *([] if self._reads[at] else [at])])
        return value

    def let_go(self, values: Iterable[int]) -> None:
        """One of those who needed each of these values needs it no more."""
        for i in values:
            self._reads[i] -= 1
            if self._reads[i] <= 0:
                self.held.pop(i, None)


class Walk:
    """The corrections for one selection.

    Attributes:
        found: new tensors, by state name.
        left: layers that could not be corrected, each with the reason.
    """

    def __init__(self, cut: Cut, how: str, images: Tensor, samples: Samples) -> None:
        """Args:
        how: one of :data:`prunelab.plan.REPAIRS`, but not ``none``.
        samples: what is known of the uncut network on these images; what is missing is added.
        """
        self.cut, self.program, self.how = cut, cut.program, how
        self.images, self.samples = images, samples
        self.found: dict[str, Tensor] = {}
        self.places, self.left = places(cut) if how != "norm" else ([], [])
        if how.startswith("least-squares"):
            self.places = [place for place in self.places if cut.asks_for(place)]
        if how == "bias":
            self.left += [(self._name(place.node), _NO_SHIFT) for place in self.places if not place.shifts]
            self.places = [place for place in self.places if place.shifts]
        self.norms = self._norms() if "norm" in how else set()

    def _norms(self) -> set[int]:
        """Norms to estimate again: those whose input has changed, but not those that were fitted with a layer."""
        fitted_ = {place.norm for place in self.places}
        changed = [
            node
            for node in self.program.nodes
            if node.opname == "batch_norm" and node.inputs[0] in self.cut.changed and node.index not in fitted_
        ]
        if self.how == "norm" and not changed:
            self.left.append(("the network", "no batch norm reads what the cut changes"))
        reasons = {node.index: adjustable(self.cut, node) for node in changed}
        self.left += [(self._name(i), reason) for i, reason in reasons.items() if reason]
        return {i for i, reason in reasons.items() if not reason}

    def run(self) -> None:
        """Go through the network once."""
        at = {place.node: place for place in self.places}
        wanted = [*at, *self.norms, *(p.norm for p in self.places if p.norm is not None)]
        order = schedule(self.program, self.places, wanted)
        shortcuts = [p.shortcut for p in self.places if p.shortcut is not None]
        now = Values(bind(self.program, self.cut.selection), self.images, order, shortcuts)
        uncut = Uncut(self, [place for place in self.places if (place.node, place.target) not in self.samples])
        with torch.no_grad():
            for i in order:
                if i in at:
                    self._correct(at[i], uncut.at(at[i]), now)
                    self.samples.used((i, at[i].target))
                if i in self.norms:
                    self._estimate(self.program.nodes[i], now)
                now.compute(i)

    def _name(self, node: int) -> str:
        return self.cut.name(self.program.nodes[node])

    # One layer ---------------------------------------------

    def rows(self, place: Place) -> Tensor:
        """The positions of a layer's output to look at: the same whatever is cut."""
        node = self.program.nodes[place.node]
        shape = self.program.state(self.program.nodes[place.weight].target).shape
        assert node.shape is not None
        count = prod(node.shape) // shape[0] * (len(self.images) if any(node.batched) else 1)
        unknowns = prod(shape[1:])
        most = MOST_VALUES // (unknowns * int(node.args.get("groups", 1)))
        return sampled(count, min(max(LEAST_ROWS, ROWS_PER_UNKNOWN * unknowns), most), place.node)

    def channel(self, place: Place) -> int:
        """The dimension that the outputs lie along."""
        return -1 if self.program.nodes[place.node].opname == "linear" else 1

    def _correct(self, place: Place, target: Tensor, now: Values) -> None:
        """Weights and bias of one layer: changed in ``now`` too, so that the layers after it see it."""
        rows = self.rows(place)
        error = self._wanted(place, target, now, rows) - self._given(place, now, rows)
        if self.how == "bias":
            self._shift(place, error.mean(0, dtype=torch.float64), now)
            return
        weight, known = now.held[place.weight], self._known(place, now, rows)
        groups = known.shape[1]
        mask = self._mask(place, groups)
        if place.shifts:
            known = torch.cat([known, torch.ones_like(known[:, :, :1])], 2)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1) if mask is not None else None
        change = fitted(known, error.unflatten(1, (groups, -1)), mask)
        if place.shifts:
            self._shift(place, change[:, -1].flatten(), now)
            change = change[:, :-1]
        self._put(place.weight, weight + as_weight(change, weight.shape), now)

    def _shift(self, place: Place, shift: Tensor, now: Values) -> None:
        """Add a number to each output: to the bias, or, the other way round, to the mean that the norm takes off."""
        at, sign = place.bias, 1
        if at is None:
            assert place.norm is not None
            at, sign = self.program.nodes[place.norm].args["running_mean"].index, -1
        self._put(at, now.held[at] + sign * shift, now)

    def _put(self, at: int, tensor: Tensor, now: Values) -> None:
        now.held[at] = tensor.to(now.held[at].dtype)
        self.found[self.program.nodes[at].target] = now.held[at]

    def _given(self, place: Place, now: Values, rows: Tensor) -> Tensor:
        """What the layer gives without being corrected, shape ``(rows, outputs)``."""
        value = now.bound.value(self.program.nodes[place.node], now.held, iter(()))
        return outputs_at(value, self.channel(place), rows)

    def _known(self, place: Place, now: Values, rows: Tensor) -> Tensor:
        """What the layer reads, shape ``(rows, groups, inputs)``."""
        node = self.program.nodes[place.node]
        args = now.bound.args.get(place.node, node.args)
        x = now.held[node.args["input"].index]
        if node.opname == "linear":
            return linear_inputs(x, rows)
        assert node.shape is not None
        return convolution_inputs(x, tuple(now.held[place.weight].shape[2:]), args, node.shape[2:], rows)

    def _mask(self, place: Place, groups: int) -> Tensor | None:
        """Where single weights may be other than zero, shape ``(groups, inputs, outputs)``."""
        mask = self.cut.masks.get(self.program.nodes[place.weight].target)
        if mask is None or mask.all():
            return None
        return as_columns(mask.bool(), groups)

    def _wanted(self, place: Place, target: Tensor, now: Values, rows: Tensor) -> Tensor:
        """What the layer should give, shape ``(rows, outputs)``."""
        dims = self.program.structure.values[place.node]
        assert isinstance(dims, tuple)
        kept = kept_index(dims[self.channel(place)], self.program.structure.label, self.cut.gone)
        if kept is not None:
            target = target[:, torch.from_numpy(kept).to(target.device)]
        if place.shortcut is None:
            return target
        target = target - outputs_at(now.held[place.shortcut], self.channel(place), rows)
        now.let_go([place.shortcut])
        return target if place.norm is None else self._before_norm(place.norm, target, now)

    def _before_norm(self, norm: int, after: Tensor, now: Values) -> Tensor:
        """What a norm must be given to give this."""
        args = self.program.nodes[norm].args
        mean, var, gain, shift = (
            now.held[state.index] if (state := self.cut.state_of(args.get(name))) is not None else None
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        assert mean is not None and var is not None
        scale = (var + args["eps"]).rsqrt() * (1 if gain is None else gain)
        scale = torch.where(scale.abs() < _LEAST_SCALE * scale.abs().max(), torch.inf, scale)
        before: Tensor = (after - (0 if shift is None else shift)) / scale + mean
        return before

    def _estimate(self, norm: Node, now: Values) -> None:
        """A norm's statistics from what it is given now; the variance is the unbiased one, as training keeps it."""
        x = now.held[norm.inputs[0]]
        if x.numel() < 2 * x.shape[1]:
            self.left.append((self._name(norm.index), "one value is too few for a variance: pass more images"))
            return
        var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1])
        for name, tensor in (("running_mean", mean), ("running_var", var)):
            at = norm.args[name].index
            self._put(at, tensor, now)


class Uncut:
    """The whole network beside the cut one, run only as far as it is asked for, and only for what is not known."""

    def __init__(self, walk: Walk, missing: list[Place]) -> None:
        self._walk = walk
        self._missing = {place.target: place for place in missing}
        base = walk.program.base
        order = schedule(base, (), self._missing)
        self._values = Values(bind(base), walk.images, order) if order else None
        self._ahead = iter(order)

    def at(self, place: Place) -> Tensor:
        """What the uncut network gives at the rows of a layer, shape ``(rows, channels)``."""
        key, samples = (place.node, place.target), self._walk.samples
        while key not in samples:
            assert self._values is not None
            i = next(self._ahead)
            value = self._values.compute(i)
            if i in self._missing:
                own = self._missing[i]
                samples[own.node, i] = outputs_at(value, self._walk.channel(own), self._walk.rows(own))
        return samples[key]
