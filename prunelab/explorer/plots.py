"""Pictures beside the desk: matplotlib figures drawn without pyplot, whose global state is not safe across threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from prunelab.explorer.lab import Lab
from prunelab.explorer.stage import Point
from prunelab.palette import colours
from prunelab.plan import Setting, removed
from prunelab.program.channels import Layer


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.patch.set_alpha(0.0)
    return figure


def _dress(axes: Any, c: Mapping[str, str]) -> None:
    """Quiet axes in the page's ink."""
    axes.patch.set_alpha(0.0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(c["faint"])
    axes.tick_params(colors=c["faint"], labelsize=8)
    axes.xaxis.label.set(color=c["ink"], fontsize=9)
    axes.yaxis.label.set(color=c["ink"], fontsize=9)
    axes.title.set(color=c["ink"], fontsize=10)


def frontier(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats in both FLOPs and accuracy, by FLOPs."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.flops, -p.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


def scatter(lab: Lab, dark: bool = False) -> Figure:
    """Accuracy against FLOPs of everything measured: plans as dots, commits and trained networks by their own marks."""
    c = colours(dark)
    figure = _figure(4.2, 3.0)
    axes = figure.add_subplot()
    axes.set(xlabel="FLOPs per image (millions)", ylabel="accuracy (%)", title="every plan measured")
    styles = {
        "dense": ("o", "ink"),
        "plan": ("o", "kept"),
        "commit": ("s", "mark"),
        "finetune": ("D", "mark"),
        "squeeze": ("^", "mark"),
    }
    words = {
        "dense": "unpruned",
        "plan": "plan",
        "commit": "committed",
        "finetune": "fine-tuned",
        "squeeze": "squeezed",
    }
    for kind, (marker, ink) in styles.items():
        some = [p for p in lab.points if p.kind == kind]
        if some:
            x, y = np.array([p.flops for p in some]) / 1e6, np.array([p.accuracy for p in some]) * 100
            errors = np.array([[p.accuracy - p.low, p.high - p.accuracy] for p in some]).T * 100
            axes.errorbar(x, y, errors.clip(min=0), fmt="none", ecolor=c["gone"], elinewidth=0.8, zorder=1)
            axes.scatter(x, y, s=26, marker=marker, color=c[ink], label=words[kind], zorder=3)
    edge = frontier(lab.points)
    if len(edge) > 1:
        axes.plot([p.flops / 1e6 for p in edge], [p.accuracy * 100 for p in edge], color=c["faint"], lw=1, zorder=2)
    if lab.points:
        axes.legend(fontsize=7, frameon=False, labelcolor=c["ink"], loc="lower right")
    else:
        axes.text(0.5, 0.5, "move a slider", transform=axes.transAxes, ha="center", color=c["faint"])
    _dress(axes, c)
    return figure


def layer_details(lab: Lab, name: str, dark: bool = False) -> Figure:
    """One layer: its scores as a histogram with mean ± k·std and the cut, and maps of the channels at the cut."""
    c = colours(dark)
    figure = _figure(4.2, 3.4)
    layer = lab.program.layer(name)
    if layer.pinned:
        figure.text(
            0.5,
            0.5,
            f"{layer.name}\npinned: {layer.pinned}",
            ha="center",
            va="center",
            color=c["ink"],
            wrap=True,
        )
        return figure
    score = lab.scores(layer.name)
    setting = lab.plan.settings.get(layer.name, Setting())
    gone = np.zeros(0, np.int64)
    if setting.grain == "channel" and setting.rule != "none":
        gone = removed(setting, score, layer, lab.plan.multiple)
    maps = _seen(lab, layer)
    spatial = maps is not None and maps.dim() == 4
    parts: list[Any] = (
        np.ravel(np.asarray(figure.subfigures(2, 1, height_ratios=[5, 2]))).tolist() if spatial else [figure]
    )
    top, *below = parts
    top.patch.set_alpha(0.0)
    _histogram(top.add_subplot(), lab, layer, score, gone, c)
    if below:
        below[0].patch.set_alpha(0.0)
        assert maps is not None
        _maps(below[0], maps[0].float().numpy(), score, gone, c)
    return figure


def _seen(lab: Lab, layer: Layer) -> Any:
    """A layer's channels on the first cached image, shape ``(1, channels, …)``, or None where none are kept.

    The profile is of the network without bypasses.
    """
    owners, channels = lab.program.origins(layer)
    if lab.profile is None or (owners != owners[0]).any():
        return None
    maps = lab.profile.maps(lab.program.base.structure.layers[owners[0]], images=1)
    return None if maps is None else maps[:, channels.tolist()]


def _histogram(axes: Any, lab: Lab, layer: Layer, score: Any, gone: Any, c: Mapping[str, str]) -> None:
    bins = np.histogram_bin_edges(score, bins=min(40, max(8, score.size // 4)))
    kept = np.setdiff1d(np.arange(score.size), gone)
    axes.hist(
        [score[kept], score[gone]],
        bins=bins,
        stacked=True,
        color=[c["kept"], c["gone"]],
        label=["kept", "removed"],
    )
    mean, std = float(score.mean()), float(score.std())
    for k in (-1, 0, 1):
        axes.axvline(mean + k * std, color=c["faint"], lw=1, ls="-" if k == 0 else ":")
    axes.set(
        title=f"{layer.name}: {lab.plan.criterion}",
        xlabel="score (lines: mean and ±1 std)",
        ylabel="channels",
    )
    # Scores near each other have long labels, which would run into one another.
    axes.locator_params(axis="x", nbins=5)
    axes.legend(fontsize=7, frameon=False, labelcolor=c["ink"])
    _dress(axes, c)


def _maps(figure: Any, maps: Any, score: Any, gone: Any, c: Mapping[str, str]) -> None:
    """Channels on either side of the cut, for the first cached image."""
    order = np.argsort(score, kind="stable")
    cut = gone.size
    first = min(max(cut - 4, 0), max(order.size - 8, 0))
    shown = order[first : first + 8]
    lost = set(gone.tolist())
    grid = figure.subplots(1, 8, squeeze=False)[0]
    figure.suptitle("maps of the channels next to the cut, lowest score first", fontsize=8, color=c["ink"])
    for axes in grid:
        axes.set_axis_off()
    for axes, channel in zip(grid, shown.tolist(), strict=False):
        axes.imshow(maps[channel], cmap="gray")
        axes.set_title(str(channel), fontsize=8, color=c["gone"] if channel in lost else c["kept"], pad=2)
