"""What a search can choose from: for every free layer the widths that ratios in steps of 5 % leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from prunelab.criteria.registry import Scores, scores
from prunelab.errors import PruneLabError
from prunelab.plan import Plan, Setting, in_force, removed
from prunelab.profile.capture import Profile
from prunelab.program.channels import Layer
from prunelab.program.program import Program, cost
from prunelab.program.selection import Selection

Choice = tuple[int, ...]
"""For every free layer, in order, the rung on which it stands; 0 is whole."""

RATIOS = tuple(step / 20 for step in range(20))
"""What rungs are made of: 0 to 95 % in steps of 5 %."""


@dataclass(frozen=True)
class Space:
    """All choices there are, over what is fixed.

    Attributes:
        program: the whole network.
        fixed: the plan that every choice is added to.
        layers: those that a choice may cut; ``rungs`` their ratios, ascending from 0, each leaving another width.
        scores: of a layer, shape ``(channels,)``.
    """

    program: Program
    profile: Profile | None
    fixed: Plan
    layers: tuple[Layer, ...]
    rungs: tuple[tuple[float, ...], ...]
    scores: Callable[[Layer], Scores]

    @property
    def whole(self) -> Choice:
        """Nothing cut beyond what is fixed."""
        return (0,) * len(self.layers)

    @property
    def last(self) -> Choice:
        """Everything cut as far as it goes."""
        return tuple(len(ratios) - 1 for ratios in self.rungs)

    def plan(self, choice: Choice) -> Plan:
        """The choice as an ordinary plan."""
        ratios = (ratios[rung] for ratios, rung in zip(self.rungs, choice, strict=True))
        return self.plan_of({layer.name: ratio for layer, ratio in zip(self.layers, ratios, strict=True)})

    def plan_of(self, ratios: Mapping[str, float]) -> Plan:
        """What is fixed, and these ratios."""
        cut = {name: Setting(ratio=ratio) for name, ratio in ratios.items() if ratio}
        return replace(self.fixed, settings={**self.fixed.settings, **cut})

    def nearest(self, ratios: Mapping[str, float]) -> Choice:
        """The choice whose ratios are nearest to some, by layer; of two that are as near the lower one."""
        return tuple(
            min(range(len(there)), key=lambda k: (abs(there[k] - ratios[layer.name]), k))
            for layer, there in zip(self.layers, self.rungs, strict=True)
        )

    def selection(self, plan: Plan) -> Selection:
        """What a plan removes."""
        return plan.resolve(self.program, self.profile, self.scores)

    def sizes(self, plan: Plan) -> tuple[int, int]:
        """FLOPs and parameters that a plan leaves."""
        found = cost(self.program, self.selection(plan))
        return found.flops, found.params


def rungs_of(layer: Layer, score: Scores, multiple: int, most: float) -> tuple[float, ...]:
    """Ratios that leave different widths of a layer, from 0 up to ``most``; of those for one width the least."""
    by_width = {0: 0.0}
    for ratio in RATIOS:
        if ratio <= most:
            by_width.setdefault(removed(Setting(ratio=ratio), score, layer, multiple).size, ratio)
    return tuple(sorted(by_width.values()))


def space_of(
    program: Program,
    profile: Profile | None,
    start: Plan,
    criterion: str,
    seed: int,
    combine: str,
    repair: str,
    layers: Sequence[str] | None,
    limits: Mapping[str, float],
) -> Space:
    """All choices over the locked settings and bypasses of a plan; arguments as :func:`prunelab.search.best_plan`.

    Raises:
        PruneLabError: no layer can be cut, or one that is named is unknown, pinned or locked.
    """
    locked = {name: setting for name, setting in start.settings.items() if setting.locked}
    # Under the start's own repair and criterion nothing would be known of the one that is asked for.
    fixed = replace(start, criterion=criterion, seed=seed, combine=combine, repair=repair, settings=locked)
    there = program.without(start.bypassed)
    known: dict[str, Scores] = {}

    def score(layer: Layer) -> Scores:
        if layer.name not in known:
            known[layer.name] = scores(there, profile, criterion, layer, seed, combine)
        return known[layer.name]

    held = {layer.name for name in locked if (layer := in_force(there, name)) is not None}
    free = [layer for layer in there.layers if not layer.pinned and layer.name not in held]
    if layers is not None:
        free = _named(there, free, layers)
    most = {there.layer(name).name: Setting(ratio=ratio).checked(name).ratio or 0.0 for name, ratio in limits.items()}
    rungs = [rungs_of(layer, score(layer), start.multiple, most.get(layer.name, 1.0)) for layer in free]
    able = [(layer, ratios) for layer, ratios in zip(free, rungs, strict=True) if len(ratios) > 1]
    if not able:
        raise PruneLabError("There is nothing to plan: every layer that may be cut is pinned, locked or one channel.")
    layers_able, ratios = tuple(layer for layer, _ in able), tuple(ratios for _, ratios in able)
    return Space(program.base, profile, fixed, layers_able, ratios, score)


def _named(program: Program, free: Sequence[Layer], names: Sequence[str]) -> list[Layer]:
    """The layers named, in order of execution."""
    wanted = {program.layer(name).name for name in names}
    barred = wanted - {layer.name for layer in free}
    if barred:
        raise PruneLabError(f"Layer {sorted(barred)[0]!r} is pinned or locked: a best plan cannot cut it.")
    return [layer for layer in free if layer.name in wanted]
