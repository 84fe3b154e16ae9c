"""The colours of every matplotlib picture: those of the desk, on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Mapping

# The desk's two colours: one accent for what is kept, grey for what is removed.
_LIGHT = {
    "ink": "#212121",
    "faint": "#757575",
    "kept": "#1976d2",
    "gone": "#9e9e9e",
    "mark": "#c2410c",
    "back": "#ffffff",
}
_DARK = {
    "ink": "#e6e6e6",
    "faint": "#a3a3a3",
    "kept": "#64b5f6",
    "gone": "#757575",
    "mark": "#ffb74d",
    "back": "#111111",
}


def colours(dark: bool) -> Mapping[str, str]:
    """Names to colours, for a light or a dark page."""
    return _DARK if dark else _LIGHT
