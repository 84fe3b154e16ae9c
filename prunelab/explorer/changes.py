"""What a plan changes, as pictures: accuracy class by class, and the images that the two networks see differently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from prunelab.explorer.plots import _dress, _figure
from prunelab.outcomes import Outcomes
from prunelab.palette import colours

_MOST_CLASSES = 20
_COLUMNS = 5
_INCHES = 4.2


def class_changes(outcomes: Outcomes, dark: bool = False) -> Figure:
    """Change in accuracy of every class with its 95 % interval, the worst first; of many classes those most changed."""
    c = colours(dark)
    every = outcomes.per_class()
    table = every.loc[every["change"].abs().sort_values(ascending=False, kind="stable").index[:_MOST_CLASSES]]
    table = table.sort_values("change", ascending=False, kind="stable")
    which = "by class" if len(table) == len(every) else f"the {len(table)} most changed of {len(every)} classes"
    figure = _figure(_INCHES, 1.1 + 0.19 * len(table))
    axes = figure.add_subplot()
    change, half = 100 * table["change"], 100 * table["half"]
    ink = np.where(change < 0, c["mark"], c["kept"])
    axes.barh(range(len(table)), change, height=0.62, color=ink.tolist())
    axes.errorbar(change, range(len(table)), xerr=half, fmt="none", ecolor=c["ink"], elinewidth=0.8, capsize=2)
    axes.axvline(0, color=c["faint"], lw=0.8)
    axes.set_yticks(range(len(table)), [f"{name} ({n:,})" for name, n in zip(table["name"], table["n"], strict=True)])
    axes.set(
        xlabel=f"points, 95 % interval (n = {outcomes.n:,}, {outcomes.precision})",
        title=f"change in accuracy, {which} (images)",
        ylim=(-0.7, max(len(table), 1) - 0.3),
    )
    _dress(axes, c)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(axis="y", labelcolor=c["ink"], length=0)
    return figure


def flipped_images(outcomes: Outcomes, image: Callable[[int], Tensor], dark: bool = False, most: int = 20) -> Figure:
    """Images that only one of the two networks has right, with what they were and are taken for; what was lost first.

    Args:
        image: gives an image for display, ``(height, width, channels)``, by its number.
        most: how many images at most; what was gained gets a quarter of them, or what is free.
    """
    c = colours(dark)
    table = outcomes.flipped()
    lost, gained = (table[table["flip"] == word] for word in ("lost", "gained"))
    shares = _shares(len(lost), len(gained), most)
    parts = [
        (part.iloc[:share], f"{words}: {share} of {len(part):,}", ink)
        for part, share, words, ink in (
            (lost, shares[0], "right before, wrong now", "mark"),
            (gained, shares[1], "wrong before, right now", "kept"),
        )
        if share
    ]
    if not parts:
        return saying("No image is right in one network and wrong in the other.", dark)
    rows = [-(-len(part) // _COLUMNS) for part, *_ in parts]
    figure = _figure(_INCHES, sum(0.3 + 1.1 * n for n in rows))
    bands = np.ravel(np.asarray(figure.subfigures(len(parts), 1, height_ratios=[0.3 + 1.1 * n for n in rows])))
    for band, count, (part, title, ink) in zip(bands, rows, parts, strict=True):
        band.patch.set_alpha(0.0)
        band.suptitle(title, fontsize=9, color=c["ink"])
        grid = band.subplots(count, _COLUMNS, squeeze=False).ravel()
        for axes in grid:
            axes.set_axis_off()
        for axes, (_, row) in zip(grid, part.iterrows(), strict=False):
            _show(axes, image(int(row["image"])).numpy(), _words(outcomes, row), c[ink])
    return figure


def saying(text: str, dark: bool = False) -> Figure:
    """A sentence in the place of a picture."""
    figure = _figure(_INCHES, 0.9)
    figure.text(0.5, 0.5, text, ha="center", va="center", color=colours(dark)["ink"], fontsize=9, wrap=True)
    return figure


def _shares(lost: int, gained: int, most: int) -> tuple[int, int]:
    """How many of either kind to show: three quarters and one, and what one leaves free goes to the other."""
    few = min(gained, max(most // 4, most - lost))
    return min(lost, most - few), few


def _words(outcomes: Outcomes, row: pd.Series) -> str:
    before, after = (_short(outcomes.name(int(row[which]))) for which in ("before", "after"))
    return f"{before}\n→ {after}"


def _short(name: str) -> str:
    return name if len(name) <= 11 else name[:10] + "…"


def _show(axes: Any, pixels: NDArray[np.float32], words: str, ink: str) -> None:
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    axes.set_title(words, fontsize=7, color=ink, pad=2)
