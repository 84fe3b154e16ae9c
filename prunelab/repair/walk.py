"""One walk from input to output: every layer in turn is corrected, given what the layers before it have become."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable
from itertools import product
from math import ceil, prod

import torch
from torch import Tensor

from prunelab.program.cache import Cache
from prunelab.program.incremental import worth_keeping
from prunelab.program.nodes import Node
from prunelab.program.program import Program
from prunelab.program.run import bind, kept_index
from prunelab.progress import Stopped
from prunelab.repair import addresses
from prunelab.repair.equations import (
    as_columns,
    as_weight,
    fitted,
    inputs_at,
    outputs_at,
    sampled,
)
from prunelab.repair.places import Cut, Place, adjustable, overwrites, places, schedule
from prunelab.repair.values import Keeping, Values, Wanted, in_parts, run_all

LEAST_ROWS = 20_000
"""Positions of every layer that are looked at, over all images: with more the answer hardly changes."""
ROWS_PER_UNKNOWN = 40
MOST_VALUES = 1 << 27
"""Inputs of a layer that are held at once, over all rows: half a gigabyte in float32."""

# A norm's scale below this part of its largest cannot carry a correction: it would need huge weights.
_LEAST_SCALE = 1e-3
_NO_SHIFT = "it has no bias, and no batch norm after it that could take one"


class Walk:
    """The corrections for one selection.

    What an earlier walk left in memory is taken from there: it begins at the first node that has changed since.

    Attributes:
        found: new tensors, by state name.
        left: layers that could not be corrected, each with the reason.
        kept: keys of the values that it may have left in memory.
    """

    kept: frozenset[Hashable] = frozenset()

    def __init__(self, cut: Cut, how: str, images: Tensor, memory: Cache, wanted: Wanted) -> None:
        """Args:
        how: one of :data:`prunelab.plan.REPAIRS`, but not ``none``.
        memory: of what is known of these images; what is missing is added.
        wanted: says whether to go on.
        """
        self.cut, self.program, self.how = cut, cut.program, how
        self.images, self.memory, self.wanted = images, memory, wanted
        self.found: dict[str, Tensor] = {}
        found, self.left = places(cut) if how != "norm" else ([], [])
        if how.startswith("least-squares"):
            found = [place for place in found if cut.asks_for(place)]
        if how == "bias":
            self.left += [(self._name(place.node), _NO_SHIFT) for place in found if not place.shifts]
            found = [place for place in found if place.shifts]
        self.places = {place.node: place for place in found}
        self.norms = self._norms() if "norm" in how else set()

    def _norms(self) -> set[int]:
        """Norms to estimate again: those whose input has changed, but not those that were fitted with a layer."""
        fitted_ = {place.norm for place in self.places.values()}
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

    def run(self, stale: frozenset[Hashable] = frozenset()) -> None:
        """Go through the network once, from the first thing that is not in memory.

        Args:
            stale: values in memory to let go, unless this walk can use them.

        Raises:
            Stopped: it is not wanted any more; what was found so far is in memory.
        """
        found = self.places.values()
        norms = {place.norm for place in found if place.norm is not None}
        order = schedule(self.program, found, [*self.places, *self.norms, *norms])
        self._addresses = addresses.of_values(self.cut, self.how, order, self.places, self.norms)
        bound = bind(self.program, self.cut.selection)
        keeping = self._keeping()
        self._parts = in_parts(bound, self.images, self.whole, keeping)
        self.kept = frozenset(product(keeping.addresses.values(), range(len(self._parts))))
        self.memory.drop(stale - self.kept)
        with torch.no_grad():
            missing = [i for i in order if (i in self.places or i in self.norms) and not self._recalled(i)]
            self._uncut = Uncut(self, [self.places[i] for i in missing if i in self.places])
            self._walk(order, missing)

    def _walk(self, order: list[int], missing: list[int]) -> None:
        """Correct what is missing, in order, and compute what that takes."""
        asked = [j for i in missing for j in self._read_by(i)]
        everything = _computed(self.program, order) if missing and overwrites(self.program) else []
        for part in self._parts:
            part.plan(asked, everything)
        done = 0
        for i in missing:
            stop = order.index(i)
            run_all(self._parts, order[done:stop], self.wanted)
            done, since = stop, time.perf_counter()
            self._correct(i)
            self._remember(i, time.perf_counter() - since)

    # What is in memory ---------------------------------------------

    @property
    def whole(self) -> bool:
        """Whether the images must be run all at once."""
        return self.program.batch is not None or overwrites(self.program)

    def _keeping(self) -> Keeping:
        whole = overwrites(self.program)
        kept = worth_keeping(() if whole else self.program.base.nodes, self.program.outputs)
        values = {i: address for i, address in self._addresses.items() if i in kept and not whole}
        return Keeping(self.memory, values)

    def _changes(self, at: int) -> list[int]:
        """The states that are corrected at a layer or norm."""
        own = addresses.changed_by(self.cut, self.places[at], self.how) if at in self.places else []
        return [*own, *(addresses.statistics(self.cut, at) if at in self.norms else [])]

    def _recalled(self, at: int) -> bool:
        """Whether the corrections at a layer or norm are in memory; then they are applied."""
        known = {state: self.memory.get(self._addresses[state]) for state in self._changes(at)}
        if any(tensor is None for tensor in known.values()):
            return False
        for state, tensor in known.items():
            self._put(state, tensor)
        return True

    def _remember(self, at: int, seconds: float) -> None:
        for state in self._changes(at):
            tensor = self.found.get(self.program.nodes[state].target)
            if tensor is not None:
                self.memory.put(self._addresses[state], tensor, seconds)

    def _read_by(self, at: int) -> list[int]:
        """The values that a correction reads."""
        shortcut = self.places[at].shortcut if at in self.places else None
        return [*self.program.nodes[at].inputs, *([] if shortcut is None else [shortcut])]

    def _name(self, node: int) -> str:
        return self.cut.name(self.program.nodes[node])

    # One layer ---------------------------------------------

    def rows(self, place: Place, part: Values) -> Tensor:
        """The positions of a layer's output to look at in a part of the images: the same whatever is cut."""
        node = self.program.nodes[place.node]
        shape = self.program.state(self.program.nodes[place.weight].target).shape
        assert node.shape is not None
        count = prod(node.shape) // shape[0] * (part.count if any(node.batched) else 1)
        unknowns = prod(shape[1:])
        most = MOST_VALUES // (unknowns * int(node.args.get("groups", 1)))
        limit = min(max(LEAST_ROWS, ROWS_PER_UNKNOWN * unknowns), most)
        return sampled(count, ceil(limit * part.count / len(self.images)), place.node + (part.number << 16))

    def at_rows(self, place: Place, value: int, parts: list[Values]) -> Tensor:
        """A value at the rows of a layer, over all parts, shape ``(rows, channels)``."""
        channel = self._channel(place)
        return torch.cat([outputs_at(part.held[value], channel, self.rows(place, part)) for part in parts])

    def _channel(self, place: Place) -> int:
        """The dimension that the outputs lie along."""
        return -1 if self.program.nodes[place.node].opname == "linear" else 1

    def _correct(self, at: int) -> None:
        """What is corrected at a layer or norm, in every part: the layers after it see it."""
        if not self.wanted():
            raise Stopped("repair")
        if at in self.places:
            self._solve(self.places[at])
        if at in self.norms:
            self._estimate(self.program.nodes[at])
        for part in self._parts:
            part.let_go(self._read_by(at))

    def _solve(self, place: Place) -> None:
        """Weights and bias of one layer."""
        wanted = self._wanted(place, self._uncut.at(place))
        known = self._known(place)
        error = wanted - self._given(place, known)
        if self.how == "bias":
            self._shift(place, error.mean(0, dtype=torch.float64))
            return
        weight, groups = self._state(place.weight), known.shape[1]
        mask = self._mask(place, groups)
        if place.shifts:
            known = torch.cat([known, torch.ones_like(known[:, :, :1])], 2)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1) if mask is not None else None
        change = fitted(known, error.unflatten(1, (groups, -1)), mask)
        if place.shifts:
            self._shift(place, change[:, -1].flatten())
            change = change[:, :-1]
        self._put(place.weight, weight + as_weight(change, weight.shape))

    def _shift(self, place: Place, shift: Tensor) -> None:
        """Add a number to each output: to the bias, or, the other way round, to the mean that the norm takes off."""
        at = addresses.shifted(self.cut, place)
        assert at is not None
        self._put(at, self._state(at) + (shift if place.bias is not None else -shift))

    def _state(self, at: int) -> Tensor:
        """A parameter or buffer as it is by now."""
        tensor: Tensor = self._parts[0].held[at]
        return tensor

    def _put(self, at: int, tensor: Tensor) -> None:
        tensor = tensor.to(self._state(at).dtype)
        self.found[self.program.nodes[at].target] = tensor
        for part in self._parts:
            part.held[at] = tensor

    def _known(self, place: Place) -> Tensor:
        """What the layer reads, shape ``(rows, groups, inputs)``."""
        node = self.program.nodes[place.node]
        args = self._parts[0].bound.args.get(place.node, node.args)
        kernel = tuple(self._state(place.weight).shape[2:])
        return torch.cat([
            inputs_at(node, part.held[node.args["input"].index], kernel, args, self.rows(place, part))
            for part in self._parts
        ])  # fmt: skip

    def _given(self, place: Place, known: Tensor) -> Tensor:
        """What the layer gives without being corrected, shape ``(rows, outputs)``."""
        columns = as_columns(self._state(place.weight), known.shape[1])
        given = (known.movedim(1, 0) @ columns).movedim(0, 1).flatten(1)
        bias = self.program.nodes[place.node].args.get("bias")
        return given if bias is None else given + self._parts[0].held[bias.index]

    def _mask(self, place: Place, groups: int) -> Tensor | None:
        """Where single weights may be other than zero, shape ``(groups, inputs, outputs)``."""
        mask = self.cut.masks.get(self.program.nodes[place.weight].target)
        if mask is None or mask.all():
            return None
        return as_columns(mask.bool(), groups)

    def _wanted(self, place: Place, target: Tensor) -> Tensor:
        """What the layer should give, shape ``(rows, outputs)``."""
        dims = self.program.structure.values[place.node]
        assert isinstance(dims, tuple)
        kept = kept_index(dims[self._channel(place)], self.program.structure.label, self.cut.gone)
        if kept is not None:
            target = target[:, torch.from_numpy(kept).to(target.device)]
        if place.shortcut is None:
            return target
        target = target - self.at_rows(place, place.shortcut, self._parts)
        return target if place.norm is None else self._before_norm(place.norm, target)

    def _before_norm(self, norm: int, after: Tensor) -> Tensor:
        """What a norm must be given to give this."""
        args = self.program.nodes[norm].args
        mean, var, gain, shift = (
            self._state(state.index) if (state := self.cut.state_of(args.get(name))) is not None else None
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        assert mean is not None and var is not None
        scale = (var + args["eps"]).rsqrt() * (1 if gain is None else gain)
        scale = torch.where(scale.abs() < _LEAST_SCALE * scale.abs().max(), torch.inf, scale)
        before: Tensor = (after - (0 if shift is None else shift)) / scale + mean
        return before

    def _estimate(self, norm: Node) -> None:
        """A norm's statistics from what it is given now; the variance is the unbiased one, as training keeps it."""
        parts = [part.held[norm.inputs[0]].double().transpose(0, 1).flatten(1) for part in self._parts]
        count = sum(part.shape[1] for part in parts)
        if count < 2:
            self.left.append((self._name(norm.index), "one value is too few for a variance: pass more images"))
            return
        mean = torch.stack([part.sum(1) for part in parts]).sum(0) / count
        squares = torch.stack([(part - mean[:, None]).square().sum(1) for part in parts]).sum(0)
        for at, tensor in zip(addresses.statistics(self.cut, norm.index), (mean, squares / (count - 1)), strict=True):
            self._put(at, tensor)


class Uncut:
    """The whole network beside the cut one, run only as far as it is asked for, and only for what is not in memory."""

    def __init__(self, walk: Walk, asked: Iterable[Place]) -> None:
        self._walk = walk
        base = walk.program.base
        # Held here until they were used: memory may let them go meanwhile.
        self._known = {place.node: walk.memory.get(_key(place)) for place in asked}
        self._missing = {place.target: place for place in asked if self._known[place.node] is None}
        order = _computed(base, schedule(base, (), self._missing))
        self._parts = in_parts(bind(base), walk.images, walk.whole) if order else []
        for part in self._parts:
            part.plan(list(self._missing), order)
        self._ahead = iter(order)

    def at(self, place: Place) -> Tensor:
        """What the uncut network gives at the rows of a layer, shape ``(rows, channels)``; asked for once."""
        while self._known[place.node] is None:
            self._go_on()
        found: Tensor = self._known.pop(place.node)
        return found

    def _go_on(self) -> None:
        """As far as the next value that is asked for."""
        since, nodes = time.perf_counter(), []
        for i in self._ahead:
            nodes.append(i)
            if i in self._missing:
                break
        run_all(self._parts, nodes, self._walk.wanted)
        place = self._missing[nodes[-1]]
        found = self._known[place.node] = self._walk.at_rows(place, nodes[-1], self._parts)
        for part in self._parts:
            part.let_go([nodes[-1]])
        self._walk.memory.put(_key(place), found, time.perf_counter() - since)


def _computed(program: Program, order: list[int]) -> list[int]:
    """Those of some nodes that are not given with the network."""
    return [i for i in order if program.nodes[i].kind != "state"]


def _key(place: Place) -> Hashable:
    """A name for what the uncut network gives at a layer."""
    return ("uncut", place.node, place.target)
