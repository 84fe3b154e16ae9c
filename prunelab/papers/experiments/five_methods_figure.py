"""The picture of the five methods: accuracy against MACs, a curve per method, a panel per stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prunelab.palette import colours
from prunelab.papers.evidence import Row, Run, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that colour-blind readers tell apart (Okabe and Ito 2008); ablations are thin and dashed.
_LINES = {
    "result-oriented": ("#0072b2", "-", 2.4),
    "L1": ("#d55e00", "-", 1.4),
    "APoZ": ("#009e73", "-", 1.4),
    "mean activation": ("#cc79a7", "-", 1.4),
    "random": ("#9e9e9e", "-", 1.4),
    "L1, automatic": ("#d55e00", "--", 1.2),
    "α = 0": ("#56b4e9", "--", 1.0),
    "α = ½": ("#882255", "--", 1.0),
    "α = 1": ("#8c6bb1", "--", 1.0),
    "R = 1": ("#e69f00", "--", 1.0),
    "R measured": ("#b8860b", ":", 1.2),
}
_TITLES = {"cut": "as cut", "repaired": "repaired", "trained": "after a short fine-tuning"}


def draw(runs: Sequence[Run]) -> Figure:
    """On a light page, means over seeds; bars are their standard deviation."""
    from matplotlib.figure import Figure

    c = colours(dark=False)
    rows = table(runs)
    dense = next(row for row in rows if row.stage == "dense")
    figure = Figure(figsize=(11.0, 4.4), dpi=110, layout="constrained", facecolor=c["back"])
    axes = figure.subplots(1, len(_TITLES))
    for ax, (stage, title) in zip(axes, _TITLES.items(), strict=True):
        for method, (colour, dash, width) in _LINES.items():
            _curve(ax, dense, [r for r in rows if (r.method, r.stage) == (method, stage)], colour, dash, width, method)
        ax.axhline(dense.accuracy.mean, color=c["faint"], lw=0.6)
        ax.invert_xaxis()
        ax.set_title(title, fontsize=10, color=c["ink"])
        ax.set_xlabel("MACs left (%)", fontsize=9, color=c["ink"])
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8, colors=c["faint"])
    axes[0].set_ylabel("test accuracy (%)", fontsize=9, color=c["ink"])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    return figure


def _curve(ax: Any, dense: Row, rows: Sequence[Row], colour: str, dash: str, width: float, label: str) -> None:
    """One method's line from the unpruned network on; only a name for the legend where it was not measured."""
    x = [100.0, *(100 / row.speedup.mean for row in rows)] if rows else []
    y = [dense.accuracy.mean, *(row.accuracy.mean for row in rows)] if rows else []
    bars = [0.0, *(row.accuracy.sd or 0.0 for row in rows)] if rows else None
    ax.errorbar(x, y, bars, color=colour, ls=dash, lw=width, label=label, capsize=2)
