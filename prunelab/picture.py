"""Figures as PNG, drawn without pyplot, whose state all threads share."""

from __future__ import annotations

import io
import threading

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from prunelab.palette import colours

_LOCK = threading.Lock()


def png(figure: Figure, ground: str = "") -> bytes:
    """A figure as a PNG.

    Args:
        ground: its colour; transparent unless given.
    """
    with _LOCK:
        if ground:
            figure.patch.set(facecolor=ground, alpha=1.0)
        out = io.BytesIO()
        figure.set_canvas(FigureCanvasAgg(figure))
        figure.savefig(out, format="png")
        return out.getvalue()


def on_a_light_page(figure: Figure) -> bytes:
    """A figure that was drawn for a light page, as a PNG on such a ground: what a notebook shows of a value."""
    return png(figure, colours(dark=False)["back"])
