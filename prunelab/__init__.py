"""prunelab: see what pruning does to a network before it is done.

>>> import prunelab as pl
>>> program = pl.trace(model, example)
>>> profile = pl.profile(program, loader)
>>> plan = pl.Plan(criterion="apoz").set("conv2", ratio=0.5)
>>> small = pl.commit(program, plan.resolve(program, profile))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prunelab.commit import commit as commit
from prunelab.comparison import Comparison as Comparison, compare as compare
from prunelab.criteria import register as register
from prunelab.criteria.registry import criteria_names as criteria_names
from prunelab.errors import PruneLabError as PruneLabError
from prunelab.latency import Latency as Latency, latency as latency
from prunelab.outcomes import Outcomes as Outcomes
from prunelab.plan import Plan as Plan, Setting as Setting
from prunelab.preview import Estimate as Estimate, Preview as Preview
from prunelab.profile.capture import Profile as Profile, profile as profile
from prunelab.profile.gradients import with_gradients as with_gradients
from prunelab.program.program import (
    Program as Program,
    cost as cost,
    sliced_masks as sliced_masks,
    trace as trace,
)
from prunelab.program.selection import DENSE as DENSE, Selection as Selection
from prunelab.progress import Stopped as Stopped
from prunelab.search import Best as Best, best_plan as best_plan
from prunelab.sensitivity import Sensitivity as Sensitivity, sensitivity as sensitivity
from prunelab.train.augment import Augment as Augment
from prunelab.train.finetune import finetune as finetune
from prunelab.train.iterative import iterative as iterative
from prunelab.train.recipe import Recipe as Recipe

if TYPE_CHECKING:
    from prunelab import datasets as datasets, lessons as lessons, zoo as zoo
    from prunelab.explorer.app import explore as explore
    from prunelab.explorer.lab import Lab as Lab
    from prunelab.optimizers import carry as carry
    from prunelab.saving import (
        export as export,
        load as load,
        load_optimizer as load_optimizer,
        save as save,
    )
    from prunelab.train.csgd import csgd as csgd, squeeze_to as squeeze_to

__version__ = "0.1.0"

# Imported when asked for: they need more than torch, and the explorer needs a widget library.
_LATER = {
    "Lab": "prunelab.explorer.lab",
    "explore": "prunelab.explorer.app",
    "zoo": "prunelab",
    "datasets": "prunelab",
    "lessons": "prunelab",
    "carry": "prunelab.optimizers",
    "csgd": "prunelab.train.csgd",
    "squeeze_to": "prunelab.train.csgd",
    **dict.fromkeys(("export", "load", "load_optimizer", "save"), "prunelab.saving"),
}

__all__ = [
    *(
        "Best",
        "Comparison",
        "DENSE",
        "Augment",
        "Estimate",
        "Lab",
        "Latency",
        "Outcomes",
        "Plan",
        "Preview",
        "Profile",
        "Program",
        "PruneLabError",
        "Recipe",
        "Selection",
        "Sensitivity",
        "Setting",
    ),
    *(
        "Stopped",
        "best_plan",
        "carry",
        "commit",
        "compare",
        "cost",
        "criteria_names",
        "csgd",
        "datasets",
        "explore",
        "export",
        "finetune",
        "latency",
        "iterative",
        "lessons",
        "load",
        "load_optimizer",
        "profile",
        "register",
    ),
    *("save", "sensitivity", "sliced_masks", "squeeze_to", "trace", "with_gradients", "zoo"),
]


def __getattr__(name: str) -> Any:
    if name in ("zoo", "datasets", "lessons"):
        return import_module(f"prunelab.{name}")
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'prunelab' has no attribute {name!r}")
