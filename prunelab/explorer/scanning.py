"""The lab's sensitivity scan: measured for the current network, shown as long as it is of that network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prunelab.plan import Setting
from prunelab.program.program import Program
from prunelab.sensitivity import Measured, Sensitivity, sensitivity

if TYPE_CHECKING:
    from prunelab.explorer.lab import Lab


@dataclass(frozen=True)
class Scanned:
    """A scan, finished or not, and what it is of.

    Attributes:
        program: the current network of the time, with the plan's bypasses.
        found: what was measured.
    """

    program: Program
    found: Sensitivity


def scan(lab: Lab, on_layer: Callable[[Sensitivity], None] | None = None, **settings: Any) -> Sensitivity:
    """Scan the lab's network as its plan has it: criterion, seed, repair, grain and bypasses, every layer alone.

    The grain is the rows' own where they have one in common, and channels otherwise.

    What a stopped scan has measured is kept in ``lab.scanned`` too.
    """
    program, plan, preview = lab.program, lab.plan, lab.stage.preview

    def keep(found: Sensitivity) -> None:
        lab.scanned = Scanned(program, found)
        if on_layer is not None:
            on_layer(found)

    given: dict[str, Any] = {
        "criterion": plan.criterion,
        "seed": plan.seed,
        "combine": plan.combine,
        "repair": plan.repair,
        "grain": _common_grain(lab),
        "masks": lab.stage.masks,
        "cache": lab.cache,
        "memory": preview.memory.budget,
        **settings,
    }
    return sensitivity(program, preview.images, preview.labels, profile=lab.profile, on_layer=keep, **given)


def _common_grain(lab: Lab) -> str:
    free = [layer.name for layer in lab.program.layers if not layer.pinned]
    grains = {lab.plan.settings.get(name, Setting()).grain for name in free}
    return grains.pop() if len(grains) == 1 else "channel"


def stale(lab: Lab) -> str:
    """In what the lab's scan differs from the plan, in words; empty where it does not, or there is none."""
    if lab.scanned is None:
        return ""
    plan, found = lab.plan, lab.scanned.found
    seed = found.seed != plan.seed and plan.criterion == "random"
    # Single weights go by their magnitude, whatever scores the channels.
    scored = found.grain == "channel"
    differs = {
        f"by {found.criterion}": scored and (found.criterion != plan.criterion or seed),
        f"combined by {found.combine}": scored and found.combine != plan.combine,
        "without repair" if found.repair == "none" else f"with repair {found.repair}": found.repair != plan.repair,
        "with other blocks and layers removed": lab.scanned.program.bypassed != plan.bypassed,
    }
    return ", ".join(words for words, does in differs.items() if does)


def curves_of(lab: Lab) -> dict[str, Any]:
    """The scan for the browser: a curve per row, and the one scale of them all.

    A curve's points are the share of channels that are gone, the accuracy, its change and the change's half width.
    Rows whose layer is another one than when it was measured have no curve; a scan of another network gives none. The
    browser shows a curve only where the row's grain is the scan's.
    """
    scanned = lab.scanned
    if scanned is None or scanned.program.base is not lab.stage.program or not scanned.found.points:
        return {}
    found = scanned.found
    then = {layer.name: layer for layer in scanned.program.layers}
    same = [
        layer.name
        for layer in lab.program.layers
        if layer.name in then and then[layer.name].producers == layer.producers and found.of(layer.name)
    ]
    return {
        "base": found.base,
        "least": min(point.accuracy for point in found.points),
        "most": max(found.base, *(point.accuracy for point in found.points)),
        "n": found.n,
        "grain": found.grain,
        "precision": found.precision,
        "stale": stale(lab),
        "layers": {name: [_plain(p, found) for p in found.of(name)] for name in same},
    }


def _plain(point: Measured, scan: Sensitivity) -> list[float]:
    gone = point.ratio if scan.grain == "weight" else 1 - point.kept / scan.channels[point.layer]
    return [gone, point.accuracy, point.change, point.half]
