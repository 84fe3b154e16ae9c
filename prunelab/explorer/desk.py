"""The desk: one widget with a row per layer. What is here turns a lab into plain values for the browser, and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets

from prunelab.explorer.lab import Lab
from prunelab.plan import GRAINS, Plan, Setting, spread
from prunelab.preview import Estimate
from prunelab.program.channels import Layer
from prunelab.program.cost import Term
from prunelab.program.program import Program
from prunelab.program.units import Unit
from prunelab.widths import step_of

_HERE = Path(__file__).parent


class Desk(anywidget.AnyWidget):
    """Rows, sliders and totals. Every trait is plain JSON; Python has the last word."""

    # anywidget takes one module: these files, read in this order, are it.
    _esm = "\n".join(
        (_HERE / name).read_text() for name in ("desk_base.js", "desk_curves.js", "desk_parts.js", "desk.js")
    )
    _css = _HERE / "desk.css"

    header: Any = traitlets.Dict().tag(sync=True)
    """Title and note above the rows."""
    rows: Any = traitlets.List().tag(sync=True)
    """One dict per layer: name, kind, channels, step (units kept are a multiple of it), members, pinned, scores, mean,
    std, shares, stage."""
    units: Any = traitlets.List().tag(sync=True)
    """Blocks that can be removed whole, and blocks and layers that are: name, kind, removed, at (how many rows come
    before), stage, shares. A layer that can be removed has its unit's name in its row."""
    layers: Any = traitlets.Dict().tag(sync=True)
    """By layer name: rule, value, grain, locked, kept, and shown (which rows the entry was made from, see
    :class:`prunelab.explorer.edits.Edits`). Written by the browser (with ``edits``) and by Python (with ``revision``);
    whole, so that coalesced changes lose nothing."""
    edits = traitlets.Int(0).tag(sync=True)
    """Counts the user's changes."""
    revision = traitlets.Int(0).tag(sync=True)
    """Counts Python's changes."""
    grains = traitlets.List(list(GRAINS)).tag(sync=True)
    """Grains to choose from."""
    terms: Any = traitlets.Dict().tag(sync=True)
    """Closed-form cost, for arithmetic in the browser."""
    figures: Any = traitlets.Dict().tag(sync=True)
    """Cost as Python computed it."""
    estimate: Any = traitlets.Dict({"state": "none"}).tag(sync=True)
    """Quick accuracy and its state: none, stale, running, ready."""
    status: Any = traitlets.Dict({"text": "", "error": "", "busy": False, "progress": None}).tag(sync=True)
    """What is going on, and what went wrong."""
    curves: Any = traitlets.Dict().tag(sync=True)
    """The sensitivity scan: a curve per layer, their one scale, and in what it differs from the plan (stale)."""
    can: Any = traitlets.Dict({"undo": False, "redo": False}).tag(sync=True)
    """Which of undo and redo are possible."""
    selected = traitlets.Unicode("").tag(sync=True)
    """The row whose details are shown."""
    dark = traitlets.Bool(False).tag(sync=True)
    """Whether the page is dark; written by the browser."""


def header_of(lab: Lab) -> dict[str, str]:
    """Title and note."""
    pinned = sum(bool(layer.pinned) for layer in lab.program.layers)
    data = getattr(lab.val, "name", "")
    seen = f"profiled on {lab.profile.images:,} images · " if lab.profile else ""
    plural = "layer" if len(lab.program.layers) == 1 else "layers"
    return {
        "title": " · ".join(t for t in (lab.name, data) if t),
        "note": f"{seen}{len(lab.program.layers)} {plural}, {pinned} pinned",
    }


def rows_of(lab: Lab) -> list[dict[str, Any]]:
    """What the browser needs to draw each row and to turn a slider into a cut."""
    shares = {r["name"]: (r["params"], r["flops"]) for r in lab.program.layers.rows()}
    units = {unit.name for unit in lab.program.units if unit.grain == "layer"}
    return [_row(lab, layer, *shares[layer.name], units) for layer in lab.program.layers]


def _row(lab: Lab, layer: Layer, params: float, flops: float, units: set[str]) -> dict[str, Any]:
    score = np.zeros(0) if layer.pinned else lab.scores(layer.name)
    mean, std = spread(score) if score.size else (0.0, 0.0)
    return {
        "name": layer.name,
        "kind": layer.kind,
        "channels": layer.channels,
        "step": step_of(layer, lab.plan.multiple),
        "members": len(layer.producers),
        "pinned": layer.pinned,
        "scores": np.sort(score).tolist(),
        "mean": mean,
        "std": std,
        "params_share": params,
        "flops_share": flops,
        "stage": layer.stage,
        "unit": layer.members[0] if len(layer.members) == 1 and layer.members[0] in units else "",
    }


def units_of(lab: Lab) -> list[dict[str, Any]]:
    """Blocks that can be removed, and units that are, in order of execution.

    What lies in a removed unit is not shown, nor is a block that holds the same as the one around it.
    """
    program, removed = lab.program, lab.plan.bypassed
    units, shares = program.units, program.units.shares
    places = _places(program)
    shown: list[Unit] = []
    for unit in units:
        around = [other for other in units if other is not unit and all(other.holds(m) for m in unit.modules)]
        wrapped = any(shares[other.name] == shares[unit.name] for other in around)
        offered = unit.name in removed or (unit.grain == "block" and not wrapped)
        if offered and not any(other.name in removed for other in around):
            shown.append(unit)
    return [
        {
            "name": unit.name,
            "kind": unit.grain,
            "removed": unit.name in removed,
            "at": sum(place < unit.first for place in places),
            "stage": unit.name.split(".")[0] if unit.grain == "block" or "." in unit.name else "",
            "params_share": shares[unit.name][0],
            "flops_share": shares[unit.name][1],
        }
        for unit in shown
    ]


def _places(program: Program) -> list[int]:
    """For every row, the first node that reads a weight of its producers."""
    first: dict[str, int] = {}
    for node in program.nodes:
        for i in node.inputs:
            first.setdefault(program.nodes[i].target, node.index)
    return [min(first[state] for state, _ in layer.producers) for layer in program.layers]


def layers_of(lab: Lab) -> dict[str, dict[str, Any]]:
    """The plan as the browser's map."""
    kept = lab.selection.kept
    found = {}
    for layer in lab.program.layers:
        setting = lab.plan.settings.get(layer.name, Setting())
        value = {"ratio": setting.ratio, "std": setting.std}.get(setting.rule)
        found[layer.name] = {
            "rule": setting.rule,
            "value": value if value is not None else 0.0,
            "grain": setting.grain,
            "locked": setting.locked,
            "kept": len(kept.get(layer.name, range(layer.channels))),
        }
    return found


def plan_of(layers: dict[str, dict[str, Any]], old: Plan) -> Plan:
    """The browser's map as a plan; channels chosen by hand, and settings without a row, stay those of the old plan."""
    settings = {name: setting for name, setting in old.settings.items() if name not in layers}
    for name, entry in layers.items():
        before = old.settings.get(name, Setting())
        rule, value = entry.get("rule"), float(entry.get("value") or 0.0)
        setting = Setting(
            ratio=value if rule == "ratio" else None,
            std=value if rule == "std" else None,
            remove=before.remove if rule == "manual" else None,
            grain=entry.get("grain", before.grain),
            locked=bool(entry.get("locked", before.locked)),
        )
        if setting != Setting():
            settings[name] = setting
    return replace(old, settings=settings)


def onto(now: Plan, before: Plan, after: Plan) -> Plan:
    """A plan with the settings that were changed between two others, and its own where they were not."""
    settings = dict(now.settings)
    for name in before.settings.keys() | after.settings.keys():
        setting = after.settings.get(name, Setting())
        if setting != before.settings.get(name, Setting()):
            settings[name] = setting
    return replace(now, settings={name: setting for name, setting in settings.items() if setting != Setting()})


def figures_of(lab: Lab) -> dict[str, int]:
    """Cost of the plan and of the current network."""
    now, dense = lab.cost(), lab.dense_cost()
    return {
        "params": now.params,
        "params0": dense.params,
        "nonzero": now.nonzero,
        "flops": now.flops,
        "flops0": dense.flops,
        "bytes": now.bytes,
        "bytes0": dense.bytes,
    }


def terms_of(lab: Lab) -> dict[str, Any]:
    """The closed-form cost as nested lists."""

    def plain(term: Term) -> list[Any]:
        return [term.coefficient, [[s.constant, [list(pair) for pair in s.layers]] for s in term.sizes]]

    terms = lab.program.terms
    return {
        "names": [layer.name for layer in lab.program.layers],
        "params": [plain(t) for t in terms.params],
        "macs": [plain(t) for t in terms.macs],
    }


def estimate_of(found: Estimate, state: str, repair: str = "") -> dict[str, Any]:
    """An estimate for the header.

    Args:
        repair: what to say of the repair, if it is not the plan's.
    """
    return {
        "state": state,
        "accuracy": found.accuracy,
        "base": found.base,
        "change": found.change,
        "half": found.half,
        "n": found.n,
        "total": found.total,
        "precision": found.precision,
        "repair": repair,
    }
