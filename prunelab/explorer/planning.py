"""The plan of a lab: settings, criteria, undo and redo, over one network after another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from prunelab.criteria.measuring import profile_for
from prunelab.criteria.registry import Scores, scores
from prunelab.errors import PruneLabError
from prunelab.explorer.stage import Stage
from prunelab.plan import Plan, Setting, in_force
from prunelab.preview import Preview
from prunelab.profile.batches import in_order
from prunelab.profile.capture import Profile, profile
from prunelab.program.channels import Layer
from prunelab.program.cost import Cost
from prunelab.program.program import Program, cost
from prunelab.program.selection import Selection, with_masks
from prunelab.progress import Progress


class Planning:
    """A network, what is known of it, and a plan for it; every change can be undone.

    The part of :class:`prunelab.Lab` that needs no images but those of the profile.
    """

    def __init__(self, first: Stage, plan: Plan, train: Any, cache: Path | str | bool) -> None:
        """Args:
        first: the network to begin with.
        train: what criteria look at, as for :func:`prunelab.profile`; ``cache`` as there.
        """
        self.train = train
        self.cache = cache
        self._first = first
        self._now: tuple[Stage, Plan] = (first, plan)
        self._past: list[tuple[Stage, Plan]] = []
        self._future: list[tuple[Stage, Plan]] = []
        # By program, and weakly: a network that undo can no longer reach takes its scores along.
        self._scores: WeakKeyDictionary[Program, dict[tuple[str, int, str, str], Scores]] = WeakKeyDictionary()
        self._scored: WeakKeyDictionary[Program, tuple[int, ...]] = WeakKeyDictionary()

    # What is there now ---------------------------------------------

    @property
    def stage(self) -> Stage:
        """The current network with its program, profile and preview."""
        return self._now[0]

    @property
    def program(self) -> Program:
        """The current network's program, with the plan's bypasses: what can still be cut."""
        return self.stage.program.without(self.plan.bypassed)

    @property
    def model(self) -> nn.Module:
        """The current network: the user's own until the first commit."""
        return self.stage.program.model

    @property
    def original(self) -> nn.Module:
        """The network that the lab began with."""
        return self._first.program.model

    @property
    def unpruned(self) -> Preview:
        """The preview of the network that the lab began with."""
        return self._first.preview

    @property
    def profile(self) -> Profile | None:
        """What the current network does on the training set, or None before :meth:`run_profile`."""
        return self.stage.profile

    @property
    def plan(self) -> Plan:
        """The current plan."""
        return self._now[1]

    @property
    def selection(self) -> Selection:
        """What the plan removes from the current network."""
        return self._resolve(*self._now)

    def cost(self) -> Cost:
        """Parameters and FLOPs with the plan applied, in closed form."""
        return cost(self.program, self._masked(self.selection))

    def dense_cost(self) -> Cost:
        """Parameters and FLOPs of the current network without the plan."""
        return cost(self.stage.program, self._masked(Selection()))

    def scores(self, layer: str) -> Scores:
        """The plan's criterion on a layer, shape ``(channels,)``, higher = keep."""
        self._notice_training(self.stage.program)
        return self._score(self.stage, self.plan, self.program.layer(layer))

    def _notice_training(self, program: Program) -> None:
        now = program.versions()
        if self._scored.setdefault(program, now) != now:
            # Somebody has trained it in place: what it scored before is of other weights.
            self._scores.clear()
            self._scored[program] = now

    def _score(self, stage: Stage, plan: Plan, layer: Layer) -> Scores:
        program = stage.program.without(plan.bypassed)
        held = self._scores.setdefault(program, {})
        key = (plan.criterion, plan.seed, plan.combine, layer.name)
        if key not in held:
            held[key] = scores(program, stage.profile, plan.criterion, layer, plan.seed, plan.combine)
        return held[key]

    # What criteria know ---------------------------------------------

    def run_profile(self, progress: Progress | bool = True) -> Profile:
        """Profile the current network on the training set; from the cache where it was done before.

        Once more after weights were trained in place: until then the profile is of what they were.
        """
        self._scores.clear()
        return self._know(profile(self.stage.program, in_order(self.train), cache=self.cache, progress=progress))

    def prepare(self, criterion: str, progress: Progress | bool = True) -> None:
        """Measure what a criterion needs to know of the current network and is not known yet.

        Raises:
            PruneLabError: there is no such criterion, or what it needs cannot be had.
            Stopped: the progress function returned False; what is done is kept in the cache.
        """
        program, data = self.stage.program, in_order(self.train)
        found = profile_for(program, data, criterion, known=self.profile, cache=self.cache, progress=progress)
        if found is not None and found is not self.profile:
            self._know(found)

    def _know(self, found: Profile) -> Profile:
        """The current network with this profile, here and in the history."""
        old = self.stage
        new = replace(old, profile=found)
        self._now = (new, self.plan)
        # The same network without a profile must not come back by undo.
        self._past = [(new if s is old else s, p) for s, p in self._past]
        self._future = [(new if s is old else s, p) for s, p in self._future]
        self._first = new if self._first is old else self._first
        return found

    # Planning ---------------------------------------------

    def set(self, layer: str, **setting: Any) -> None:
        """Change one layer's setting: ``ratio=``, ``std=``, ``remove=``, ``grain=`` or ``locked=``.

        Raises:
            PruneLabError: as :meth:`Plan.set` and :meth:`Plan.resolve`; the plan stays as it was.
        """
        name = self.program.layer(layer).name
        rule = any(setting.get(k) is not None for k in ("ratio", "std", "remove"))
        if rule and self.plan.settings.get(name, Setting()).locked:
            raise PruneLabError(f"Layer {name!r} is locked: unlock it before setting its rule.")
        self.use(self.plan.set(name, **setting))

    def set_all(self, **setting: Any) -> None:
        """The same setting for every layer that is neither pinned nor locked."""
        plan = self.plan
        for layer in self._free():
            plan = plan.set(layer.name, **setting)
        self.use(plan)

    def bypass(self, unit: str) -> None:
        """Remove a whole layer or block of ``program.units``: its input passes through.

        Settings of the layers inside rest, and come back with :meth:`restore`.

        Raises:
            PruneLabError: there is no such unit.
        """
        self.use(self.plan.bypass(unit))

    def restore(self, unit: str) -> None:
        """Bring a bypassed layer or block back, with the settings that it had.

        Raises:
            PruneLabError: the plan does not bypass it.
        """
        self.use(self.plan.restore(unit))

    def repair(self, how: str) -> None:
        """Correct the surviving weights, in the preview and in the commit alike.

        Args:
            how: one of :data:`prunelab.plan.REPAIRS`.

        Raises:
            PruneLabError: there is no such repair; the plan stays as it was.
        """
        self.use(replace(self.plan, repair=how))

    def multiple(self, of: int) -> None:
        """Round the widths that ratios and stds leave up to multiples, see :mod:`prunelab.widths`; 1 for any width.

        Raises:
            PruneLabError: it is no whole number from 1; the plan stays as it was.
        """
        self.use(replace(self.plan, multiple=of))

    def criterion(self, name: str) -> None:
        """Score channels by another criterion; what it needs to know of the network is measured first."""
        self.use(replace(self.plan, criterion=name))

    def combine(self, how: str) -> None:
        """Score rows with several members, as residual streams, by their members' mean, max or sum.

        Raises:
            PruneLabError: there is no such way; the plan stays as it was.
        """
        self.use(replace(self.plan, combine=how))

    def reset(self) -> None:
        """Remove nothing; locks stay."""
        settings = {k: Setting(locked=True) for k, s in self.plan.settings.items() if s.locked}
        self.use(replace(self.plan, settings=settings, bypassed=()))

    def use(self, plan: Plan, *, merge: bool = False) -> None:
        """Take a whole plan, after checking that it fits this network.

        Args:
            merge: the change goes on with the last one (a slider still moving): one step of undo for both.

        Raises:
            PruneLabError: it does not; the plan stays as it was.
        """
        plan = self._fitting(plan)
        if plan == self.plan:
            return
        if merge and self._past and self._past[-1][0] is self.stage:
            self._now = (self.stage, plan)
            self._future.clear()
        else:
            self._move((self.stage, plan))

    def _fitting(self, plan: Plan) -> Plan:
        """The plan for this network, after checking that it fits."""
        self.prepare(plan.criterion)
        if not plan.network:
            plan = replace(plan, network=self.stage.program.digest)
        self._resolve(self.stage, plan)
        # Under the layers' own names, whichever of their modules' paths they were given by.
        settings = {self._own_name(plan, name): setting for name, setting in plan.settings.items()}
        return replace(plan, settings=settings)

    def undo(self) -> None:
        """Back to the plan, or the network, before the last change."""
        if self._past:
            self._future.append(self._now)
            self._now = self._past.pop()

    def redo(self) -> None:
        """Forward again."""
        if self._future:
            self._past.append(self._now)
            self._now = self._future.pop()

    @property
    def can_undo(self) -> bool:
        """Whether there is something to undo."""
        return bool(self._past)

    @property
    def can_redo(self) -> bool:
        """Whether there is something to redo."""
        return bool(self._future)

    def _move(self, to: tuple[Stage, Plan]) -> None:
        self._past.append(self._now)
        self._future.clear()
        self._now = to

    @contextmanager
    def _or_as_before(self) -> Iterator[None]:
        """Leaves network, plan and history as they were where something fails or is stopped on the way."""
        before = self._now, [*self._past], [*self._future]
        try:
            yield
        except BaseException:
            self._now, self._past, self._future = before
            raise

    def _free(self) -> list[Layer]:
        settings = self.plan.settings.items()
        locked = {layer.name for n, s in settings if s.locked and (layer := in_force(self.program, n))}
        return [layer for layer in self.program.layers if not layer.pinned and layer.name not in locked]

    def _own_name(self, plan: Plan, name: str) -> str:
        program = self.stage.program
        layer = in_force(program.without(plan.bypassed), name)
        return layer.name if layer is not None else program.layer(name).name

    def _resolve(self, stage: Stage, plan: Plan) -> Selection:
        self._notice_training(stage.program)
        return plan.resolve(stage.program, stage.profile, lambda layer: self._score(stage, plan, layer))

    def _masked(self, selection: Selection) -> Selection:
        """The selection with the masks that earlier commits left."""
        return with_masks(selection, self.stage.masks)
