"""The picture of a search: accuracy against FLOPs, plans of one ratio beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from prunelab.palette import colours

if TYPE_CHECKING:
    from prunelab.search.result import Best, Tried


def draw(best: Best, dark: bool = False) -> Figure:
    """The steps as a line in the accent colour, plans of one ratio in grey, the plan found with its interval."""
    c = colours(dark)
    figure = Figure(figsize=(4.6, 3.2), dpi=150, layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    dense = (100.0, 100 * best.base)
    _line(axes, best, best.uniforms, dense, "gone", "one ratio for all layers", c)
    _line(axes, best, best.steps, dense, "kept", "steps of the search", c)
    if best.uniform is not None:
        _point(axes, best, best.uniform, "gone", "", c)
    _point(axes, best, best.found, "mark", "the plan found", c)
    axes.axhline(dense[1], color=c["faint"], lw=0.6)
    axes.invert_xaxis()
    axes.set_xlabel("FLOPs left (%)")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(
        f"best plan for {best.wish}\nby {best.plan.criterion}, repair {best.plan.repair}; uncut {dense[1]:.1f} %",
        fontsize=9,
    )
    axes.legend(fontsize=7, frameon=False, labelcolor=c["ink"], loc="lower left")
    _dress(axes, c)
    return figure


def _line(
    axes: Any,
    best: Best,
    tried: Sequence[Tried],
    dense: tuple[float, float],
    ink: str,
    label: str,
    c: Mapping[str, str],
) -> None:
    x = [dense[0], *(100 * t.flops / best.flops for t in tried)]
    y = [dense[1], *(100 * t.accuracy for t in tried)]
    n = f" (n = {tried[0].n:,})" if tried else ""
    axes.plot(x, y, "o-", color=c[ink], lw=1.3, ms=2.5, label=label + n)


def _point(axes: Any, best: Best, tried: Tried, ink: str, label: str, c: Mapping[str, str]) -> None:
    x, y = 100 * tried.flops / best.flops, 100 * tried.accuracy
    axes.errorbar([x], [y], 100 * np.array([[tried.half], [tried.half]]), fmt="D", color=c[ink], ms=5, capsize=2,
                  label=f"{label} (n = {tried.n:,})" if label else None, zorder=4)  # fmt: skip


def _dress(axes: Any, c: Mapping[str, str]) -> None:
    axes.patch.set_alpha(0.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(c["faint"])
    axes.tick_params(colors=c["faint"], labelsize=8)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(c["ink"])
