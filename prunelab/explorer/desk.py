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

_HERE = Path(__file__).parent


class Desk(anywidget.AnyWidget):
    """Rows, sliders and totals. Every trait is plain JSON; Python has the last word."""

    # anywidget takes one module: three files, read in this order, are it.
    _esm = "\n".join((_HERE / name).read_text() for name in ("desk_base.js", "desk_parts.js", "desk.js"))
    _css = _HERE / "desk.css"

    header: Any = traitlets.Dict().tag(sync=True)
    """Title and note above the rows."""
    rows: Any = traitlets.List().tag(sync=True)
    """One dict per layer: name, kind, channels, members, pinned, scores, mean, std, shares, stage."""
    layers: Any = traitlets.Dict().tag(sync=True)
    """By layer name: rule, value, grain, locked, kept. Written by the browser (with ``edits``) and by Python (with
    ``revision``); whole, so that coalesced changes lose nothing."""
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
    return [_row(lab, layer, *shares[layer.name]) for layer in lab.program.layers]


def _row(lab: Lab, layer: Layer, params: float, flops: float) -> dict[str, Any]:
    score = np.zeros(0) if layer.pinned else lab.scores(layer.name)
    mean, std = spread(score) if score.size else (0.0, 0.0)
    return {
        "name": layer.name,
        "kind": layer.kind,
        "channels": layer.channels,
        "members": len(layer.producers),
        "pinned": layer.pinned,
        "scores": np.sort(score).tolist(),
        "mean": mean,
        "std": std,
        "params_share": params,
        "flops_share": flops,
        "stage": layer.stage,
    }


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
    """The browser's map as a plan; channels chosen by hand stay those of the old plan."""
    settings = {}
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


def estimate_of(found: Estimate, state: str) -> dict[str, Any]:
    """An estimate for the header."""
    return {
        "state": state,
        "accuracy": found.accuracy,
        "base": found.base,
        "change": found.change,
        "half": found.half,
        "n": found.n,
        "total": found.total,
        "precision": found.precision,
    }
