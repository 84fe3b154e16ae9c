"""The plan in plain HTML: what a saved notebook shows where no kernel runs behind the explorer."""

from __future__ import annotations

import html

from prunelab.explorer.desk import header_of
from prunelab.explorer.lab import Lab
from prunelab.plan import Setting
from prunelab.program.channels import Layer
from prunelab.program.selection import Selection

_HEADS = ("layer", "share of parameters", "set to", "kept", "", "pinned because")
_BAR = "display: inline-block; width: 120px; height: 9px; background: #9e9e9e55"
_KEPT = "display: block; height: 9px; background: var(--jp-brand-color1, #1976d2)"


def summary(lab: Lab) -> str:
    """Network, size, accuracy where it was measured, and every row with what is set and what stays."""
    head, selection = header_of(lab), lab.selection
    shares = {row["name"]: row["params"] for row in lab.program.layers.rows()}
    rows = [_row(lab, layer, shares[layer.name], selection) for layer in lab.program.layers]
    rows += [_cells(html.escape(unit), "", "removed whole", "", "", "") for unit in lab.plan.bypassed]
    heads = "".join(f'<th style="text-align: left">{name}</th>' for name in _HEADS)
    return (
        f"<p><b>{html.escape(head['title'])}</b>, {html.escape(head['note'])}<br>{_size(lab)}{_accuracy(lab)}</p>"
        f"<table><tr>{heads}</tr>{''.join(rows)}</table>"
    )


def _size(lab: Lab) -> str:
    now, dense = lab.cost(), lab.dense_cost()
    parameters = "parameters that are not zero" if now.nonzero < now.params else "parameters"
    return (
        f"{dense.params:,} → {now.nonzero:,} {parameters} ({now.nonzero / dense.params:.0%}), "
        f"{dense.flops:,} → {now.flops:,} FLOPs ({now.flops / max(dense.flops, 1):.0%}), "
        f"scored by {html.escape(lab.plan.criterion)}, repair {lab.plan.repair}"
    )


def _accuracy(lab: Lab) -> str:
    """Of this plan for this network, not of one before it."""
    asked = lab.stage.key(lab.plan)
    found = next((point for point in reversed(lab.points) if point.key == asked), None)
    if found is None:
        return ""
    interval = f"{found.low:.1%} to {found.high:.1%}"
    return f"; accuracy {found.accuracy:.1%} ({interval}, {found.n:,} images, {found.precision})"


def _row(lab: Lab, layer: Layer, share: float, selection: Selection) -> str:
    setting = lab.plan.settings.get(layer.name, Setting())
    kept, count = len(selection.kept.get(layer.name, range(layer.channels))), layer.channels
    masks = [selection.masks[state] for state, _ in layer.producers if state in selection.masks]
    if masks:
        kept, count = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
    bar = f'<span style="{_BAR}"><span style="{_KEPT}; width: {100 * kept / count:.0f}%"></span></span>'
    return _cells(
        html.escape(layer.name), f"{share:.1%}", _words(setting), f"{kept:,} of {count:,}", bar,
        html.escape(layer.pinned),
    )  # fmt: skip


def _words(setting: Setting) -> str:
    found = {
        "none": "",
        "ratio": f"{setting.ratio or 0:.0%} of {setting.grain}s",
        "std": f"mean − {setting.std or 0:.2g}·σ",
        "manual": "chosen by hand",
    }
    return found[setting.rule]


def _cells(*texts: str) -> str:
    return (
        "<tr>" + "".join(f'<td style="text-align: left; white-space: nowrap">{text}</td>' for text in texts) + "</tr>"
    )
