"""The picture of a comparison: rank correlations in colour above, accuracy against what is removed below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from prunelab.criteria.registry import get
from prunelab.palette import colours

if TYPE_CHECKING:
    from prunelab.comparison import Comparison, Where

# Lines of one kind share a dash; within a kind, colours that colour-blind readers tell apart (Okabe and Ito 2008).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1")
_KINDS = {"weights": "-", "data": "--", "gradients": ":"}


def draw(found: Comparison, dark: bool = False) -> Figure:
    """One layer on the left, the network on the right."""
    c = colours(dark)
    count = len(found.criteria)
    figure = Figure(figsize=(9.6, 4.6 + 0.3 * count), dpi=110, layout="constrained")
    figure.patch.set_alpha(0.0)
    grid = figure.add_gridspec(3, 2, height_ratios=[0.27 * count + 1.2, 3.1, 0.55], hspace=0.06)
    _table(figure.add_subplot(grid[0, 0]), found, "layer", c, f"{found.layer} alone")
    _table(figure.add_subplot(grid[0, 1]), found, "network", c, "network, mean over its layers")
    left, right = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
    _curves(left, found, "layer", c)
    _curves(right, found, "network", c)
    right.set_xlabel("FLOPs left (%), every layer cut to the same ratio")
    left.set_xlabel("channels removed from the layer (%)")
    left.set_ylabel("accuracy (%)")
    _legend(figure.add_subplot(grid[2, :]), right, c)
    figure.suptitle(
        f"rank correlation of criteria (Spearman × 100), and accuracy without retraining\n"
        f"uncut {100 * found.base:.1f} % (thin line); n = {found.n:,}, {found.precision}; "
        "solid: criteria of weights, dashed: of data, dotted: of gradients",
        color=c["ink"],
        fontsize=10,
    )
    return figure


def _table(axes: Any, found: Comparison, where: Where, c: Mapping[str, str], title: str) -> None:
    values = np.array(found.on_layer if where == "layer" else found.on_network)
    names = found.criteria
    shades = LinearSegmentedColormap.from_list("alike", [c["mark"], c["back"], c["kept"]])
    axes.imshow(values, cmap=shades, vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    for (row, column), value in np.ndenumerate(values):
        ink = "back" if abs(value) > 0.6 else "ink"
        axes.text(column, row, f"{round(100 * value)}", color=c[ink], fontsize=6.5, ha="center", va="center")
    labels = names if where == "layer" else [""] * len(names)
    axes.set_yticks(range(len(names)), labels)
    axes.set_xticks(range(len(names)), names, rotation=55, ha="right", rotation_mode="anchor")
    axes.tick_params(colors=c["ink"], labelsize=7.5, length=0)
    axes.spines[:].set_visible(False)
    axes.patch.set_alpha(0.0)
    axes.set_title(title, fontsize=9.5, color=c["ink"])


def _curves(axes: Any, found: Comparison, where: Where, c: Mapping[str, str]) -> None:
    used = dict.fromkeys(_KINDS, 0)
    for name in found.criteria:
        kind = _kind(name)
        colour = _COLOURS[used[kind] % len(_COLOURS)] if name != "random" else c["gone"]
        used[kind] += name != "random"
        points = found.of(name, where)
        x = [100 * (p.flops / found.flops if where == "network" else p.ratio) for p in points]
        start = 100.0 if where == "network" else 0.0
        y = [100 * found.base, *(100 * p.accuracy for p in points)]
        wide, above = (2.4, 3) if name == "random" else (1.4, 2)
        axes.plot([start, *x], y, _KINDS[kind], color=colour, lw=wide, zorder=above, label=name)
    if where == "network":
        axes.invert_xaxis()
    axes.axhline(100 * found.base, color=c["faint"], lw=0.6)
    axes.patch.set_alpha(0.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(c["faint"])
    axes.tick_params(colors=c["faint"], labelsize=8)
    axes.xaxis.label.set(color=c["ink"], fontsize=9)
    axes.yaxis.label.set(color=c["ink"], fontsize=9)


def _legend(axes: Any, curves: Any, c: Mapping[str, str]) -> None:
    axes.set_axis_off()
    handles, labels = curves.get_legend_handles_labels()
    axes.legend(handles, labels, ncols=6, loc="center", fontsize=8, frameon=False, labelcolor=c["ink"], handlelength=3)


def _kind(name: str) -> str:
    """Of what a criterion is made."""
    parts = get(name).parts
    return "gradients" if "gradients" in parts else "data" if parts else "weights"
