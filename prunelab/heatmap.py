"""A sensitivity scan as one picture: a row per layer, a column per ratio, a cell's colour the accuracy that is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from prunelab.palette import colours

if TYPE_CHECKING:
    from prunelab.sensitivity import Sensitivity

_ROW = 0.17
_LONGEST = 24


def heatmap(scan: Sensitivity, dark: bool = False) -> Figure:
    """Layers from input to output, accuracy in each cell in per cent; a pinned layer is hatched and has no colour."""
    c = colours(dark)
    names = list(scan.channels)
    figure = Figure(figsize=(4.6, 1.15 + _ROW * len(names)), dpi=150, layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    values = np.array([[_at(scan, name, ratio) for ratio in scan.ratios] for name in names]).reshape(len(names), -1)
    shades = LinearSegmentedColormap.from_list("kept", [c["back"], c["kept"]])
    least = float(np.nanmin(values, initial=scan.base))
    picture = axes.imshow(
        np.ma.masked_invalid(values), cmap=shades, vmin=least, vmax=max(scan.base, least + 0.01), aspect="auto"
    )
    for row, name in enumerate(names):
        if name in scan.pinned:
            _pinned(axes, row, len(scan.ratios), c)
    _numbers(axes, values, picture, c)
    _dress(axes, scan, names, c)
    return figure


def _at(scan: Sensitivity, layer: str, ratio: float) -> float:
    found = [point.accuracy for point in scan.of(layer) if point.ratio == ratio]
    return found[0] if found else float("nan")


def _pinned(axes: Any, row: int, columns: int, c: Any) -> None:
    place = (-0.5, row - 0.5)
    axes.add_patch(Rectangle(place, columns, 1, fill=False, hatch="////", edgecolor=c["gone"], linewidth=0))
    ground = {"facecolor": c["back"], "edgecolor": "none", "pad": 1.5}
    axes.text((columns - 1) / 2, row, "pinned", color=c["faint"], fontsize=7, ha="center", va="center", bbox=ground)


def _numbers(axes: Any, values: Any, picture: Any, c: Any) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            shade = picture.norm(value)
            ink = c["back"] if shade > 0.55 else c["ink"]
            axes.text(column, row, f"{100 * value:.0f}", color=ink, fontsize=6.5, ha="center", va="center")


def _dress(axes: Any, scan: Sensitivity, names: list[str], c: Any) -> None:
    axes.set_xticks(range(len(scan.ratios)), [f"{100 * ratio:.3g}" for ratio in scan.ratios])
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.tick_params(colors=c["ink"], labelsize=7, length=0)
    axes.spines[:].set_visible(False)
    repaired = "" if scan.repair == "none" else f", repair {scan.repair}"
    axes.set_title(
        f"accuracy (%) with one layer cut, {scan.criterion}{repaired}\n"
        f"uncut {100 * scan.base:.1f}; n = {scan.n:,}, {scan.precision}",
        fontsize=8.5,
        color=c["ink"],
    )
    axes.set_xlabel("channels removed (%)", fontsize=8, color=c["ink"])


def _short(name: str) -> str:
    """A long name loses its beginning: its end tells layers apart."""
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
