"""The lab's automatic plan: searched for over the current network and plan, then one step of undo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prunelab.search import Best, best_plan

if TYPE_CHECKING:
    from prunelab.explorer.lab import Lab


def take_best_plan(lab: Lab, **settings: Any) -> Best:
    """Search by the plan's criterion and repair; its locked settings, bypassed units and multiple stay.

    The lab's plan changes only at the end.
    """
    plan = lab.plan
    lab.prepare(settings.get("criterion", plan.criterion))
    stage = lab.stage
    given: dict[str, Any] = {
        "criterion": plan.criterion,
        "seed": plan.seed,
        "combine": plan.combine,
        "repair": plan.repair,
        "start": plan,
        "masks": stage.masks,
        "cache": lab.cache,
        "memory": stage.preview.memory.budget,
        **settings,
    }
    best = best_plan(stage.program, stage.profile, stage.preview.images, stage.preview.labels, **given)
    lab.use(best.plan)
    return best
