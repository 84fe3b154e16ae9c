"""The whole network, run as fast as its values allow: norms folded, channels innermost in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from prunelab.program.cache import Cache
from prunelab.program.incremental import Incremental
from prunelab.program.program import Program
from prunelab.program.run import Bound, bind
from prunelab.program.selection import Selection

# What another order of summing may change in a value, relative to its norm.
_BEARABLE = {torch.float32: 1e-4, torch.float64: 1e-10}


@dataclass(frozen=True)
class Runner:
    """A program ready to run.

    Attributes:
        bound: its weights and operators.
        innermost: whether images are given with their channels innermost in memory.
    """

    bound: Bound
    innermost: bool = False

    def run(self, inputs: tuple[Tensor, ...], watch: Mapping[int, Callable[[Tensor], None]]) -> None:
        """Run a batch; ``watch`` is that of :meth:`Bound.run`, and must not keep a value without copying it."""
        inputs = tuple(x.to(self.bound.device) for x in inputs)
        if self.innermost:
            inputs = tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)
        self.bound.run(inputs, watch)


def quickest(program: Program, sites: Iterable[int], inputs: tuple[Tensor, ...]) -> Runner:
    """The program ready to run: the fast way where it gives the same values at all sites, else operator by operator.

    Args:
        inputs: some images to compare the two on.
    """
    plain = Runner(bind(program))
    dtypes = {t.dtype for t in (*plain.bound.states.values(), *inputs) if t.is_floating_point()}
    if len(dtypes) != 1 or not dtypes <= _BEARABLE.keys() or plain.bound.device.type != "cpu":
        return plain
    (dtype,) = dtypes
    prepared = Incremental(program, Cache(0), fast=dtype).prepare(Selection(bypassed=program.bypassed), {})
    if prepared.recipe.overwrites:
        return plain
    fast = Runner(replace(prepared.bound, program=replace(program, nodes=prepared.recipe.nodes)), innermost=True)
    try:
        found = _values(fast, sites, inputs)
    except (RuntimeError, TypeError):
        # An operator that wants memory in the usual order.
        return plain
    wanted = _values(plain, sites, inputs)
    same = all(float((found[s] - wanted[s]).norm()) <= _BEARABLE[dtype] * float(wanted[s].norm()) for s in sites)
    return fast if same else plain


def _values(runner: Runner, sites: Iterable[int], inputs: tuple[Tensor, ...]) -> dict[int, Tensor]:
    values: dict[int, Tensor] = {}

    def keep(site: int, value: Tensor) -> None:
        values[site] = value.clone()

    runner.run(inputs, {site: partial(keep, site) for site in sites})
    return values
