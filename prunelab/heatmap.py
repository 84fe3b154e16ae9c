"""A sensitivity scan as one picture: a row per layer, a column per ratio, a cell's colour the accuracy that is lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from prunelab.palette import colours

if TYPE_CHECKING:
    from prunelab.sensitivity import Sensitivity

_ROW = 0.17
_LONGEST = 24


def heatmap(scan: Sensitivity, dark: bool = False) -> Figure:
    """Layers from input to output, in each cell the accuracy that is left in per cent.

    The more is lost, the deeper the colour; a number is faint where the loss may be chance (95 %). A pinned layer is
    hatched and has no number; a cell that was not measured is empty.
    """
    c = colours(dark)
    names = list(scan.channels)
    figure = Figure(figsize=(4.6, 1.2 + _ROW * len(names)), dpi=150, layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    at = {(names.index(p.layer), scan.ratios.index(p.ratio)): p for p in scan.points}
    lost = np.full((len(names), len(scan.ratios)), np.nan)
    for place, point in at.items():
        lost[place] = max(scan.base - point.accuracy, 0.0)
    # Small losses are what one chooses by: the root sets them apart.
    norm = PowerNorm(0.5, 0.0, float(np.nanmax(lost, initial=0.0)) or 1.0)
    shades = LinearSegmentedColormap.from_list("lost", [to_rgba(c["mark"], 0.0), to_rgba(c["mark"], 1.0)])
    axes.imshow(np.ma.masked_invalid(lost), cmap=shades, norm=norm, aspect="auto", interpolation="nearest")
    for place, point in at.items():
        ink = "faint" if abs(point.change) <= point.half else "ink"
        ink = "back" if norm(lost[place]) > 0.6 else ink
        text = f"{100 * point.accuracy:.0f}" if scan.measure == "accuracy" else f"{point.accuracy:.3g}"
        axes.text(place[1], place[0], text, color=c[ink], fontsize=6.5, ha="center", va="center")
    for name in scan.pinned:
        _pinned(axes, names.index(name), len(scan.ratios), c)
    _dress(axes, scan, names, c)
    return figure


def _pinned(axes: Any, row: int, columns: int, c: Mapping[str, str]) -> None:
    place = (-0.5, row - 0.5)
    axes.add_patch(Rectangle(place, columns, 1, fill=False, hatch="////", edgecolor=c["gone"], linewidth=0))
    ground = {"facecolor": c["back"], "edgecolor": "none", "pad": 1.5}
    axes.text((columns - 1) / 2, row, "pinned", color=c["faint"], fontsize=7, ha="center", va="center", bbox=ground)


def _dress(axes: Any, scan: Sensitivity, names: list[str], c: Mapping[str, str]) -> None:
    axes.set_xticks(range(len(scan.ratios)), [f"{100 * ratio:.3g}" for ratio in scan.ratios])
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.tick_params(colors=c["ink"], labelsize=7, length=0, which="both")
    axes.spines[:].set_visible(False)
    share = scan.measure == "accuracy"
    what, base = ("accuracy (%)", f"{100 * scan.base:.1f}") if share else (scan.measure, f"{scan.base:.4g}")
    by = f", by {scan.criterion}" if scan.grain == "channel" else ""
    repaired = "" if scan.repair == "none" else f", repair {scan.repair}"
    axes.set_title(
        f"{what} with one layer cut{by}{repaired}\n"
        f"uncut {base}; n = {scan.n:,}, {scan.precision}; faint: may be chance",
        fontsize=8.5,
        color=c["ink"],
    )
    axes.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.grid(which="minor", axis="y", color=c["gone"], linewidth=0.3, alpha=0.5)
    axes.set_xlabel(f"{scan.grain}s removed (%)", fontsize=8, color=c["ink"])


def _short(name: str) -> str:
    """A long name loses its beginning: its end tells layers apart."""
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
