"""What the browser does when a hand moves in the rows, and what the lab has of it."""

from __future__ import annotations

from typing import Any

import prunelab as pl
from prunelab.explorer.app import Explorer

Layers = dict[str, dict[str, Any]]


def moved(layers: Layers, layer: str, ratio: float) -> Layers:
    """The browser's rows after a move, from the rows that it has."""
    return {**layers, layer: {**layers[layer], "rule": "ratio", "value": ratio}}


def send(explorer: Explorer, layers: Layers) -> Layers:
    """The browser's rows on their way to Python."""
    explorer.desk.layers = layers
    explorer.desk.edits += 1
    return layers


def drag(explorer: Explorer, layer: str, ratio: float) -> None:
    """A move of a slider in the rows as Python has them."""
    send(explorer, moved(explorer.desk.layers, layer, ratio))


def ratios(lab: pl.Lab) -> dict[str, Any]:
    """By layer, what the plan removes."""
    return {name: setting.ratio for name, setting in lab.plan.settings.items()}
