"""The picture of a search: change of accuracy against FLOPs, plans of one ratio beside it."""

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
    _line(axes, best, best.uniforms, "gone", "one ratio for all layers", c)
    _line(axes, best, best.steps, "kept", "steps of the search", c)
    if best.uniform is not None:
        _point(axes, best, best.uniform, "gone", "", c)
    _point(axes, best, best.found, "mark", "the plan found", c)
    axes.axhline(0.0, color=c["faint"], lw=0.6)
    axes.invert_xaxis()
    axes.set_xlabel("FLOPs left (%)")
    axes.set_ylabel("change of accuracy (points)")
    in_haste = best.plan.repair.startswith("least-squares") and not best.wish.budgets
    quicker = ", a quicker one for the steps" if in_haste else ""
    axes.set_title(
        f"best plan for {best.wish} by {best.plan.criterion}: {best.found.accuracy:.1%}, uncut {best.base:.1%}\n"
        f"repair {best.plan.repair}{quicker}",
        fontsize=9,
    )
    axes.legend(fontsize=8, frameon=False, labelcolor=c["ink"], loc="lower left")
    _dress(axes, c)
    return figure


def _line(
    axes: Any,
    best: Best,
    tried: Sequence[Tried],
    ink: str,
    label: str,
    c: Mapping[str, str],
) -> None:
    x = [100.0, *(100 * t.flops / best.flops for t in tried)]
    y = [0.0, *(100 * t.change for t in tried)]
    n = f" (n = {tried[0].n:,})" if tried else ""
    axes.plot(x, y, "o-", color=c[ink], lw=1.3, ms=2.5, label=label + n)


def _point(axes: Any, best: Best, tried: Tried, ink: str, label: str, c: Mapping[str, str]) -> None:
    x, y = 100 * tried.flops / best.flops, 100 * tried.change
    axes.errorbar([x], [y], 100 * np.array([[tried.half], [tried.half]]), fmt="D", color=c[ink], ms=5, capsize=2,
                  label=f"{label} (n = {tried.n:,})" if label else None, zorder=4)  # fmt: skip


def _dress(axes: Any, c: Mapping[str, str]) -> None:
    axes.patch.set_alpha(0.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(c["faint"])
    axes.tick_params(colors=c["faint"], labelsize=8)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(c["ink"])
