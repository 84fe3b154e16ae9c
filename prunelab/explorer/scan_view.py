"""What the explorer shows of a sensitivity scan: a curve behind each ratio slider, and a picture of all layers."""

from __future__ import annotations

import ipywidgets as w

from prunelab.explorer.desk import Desk
from prunelab.explorer.lab import Lab
from prunelab.explorer.scanning import curves_of
from prunelab.picture import png
from prunelab.progress import Progress, Stopped


class ScanView:
    """The scan of one lab, on one desk.

    Attributes:
        picture: hidden while there is no scan of the current network.
    """

    def __init__(self, lab: Lab, desk: Desk) -> None:
        self.picture = w.Image(format="png")
        self._lab = lab
        self._desk = desk

    def show(self) -> None:
        """The curves as they are now: after every layer, and whenever plan or network may have changed."""
        self._desk.curves = curves_of(self._lab)
        self.picture.layout.display = None if self._desk.curves and self.picture.value else "none"

    def draw(self) -> None:
        """The picture, in the page's colours."""
        if self._lab.scanned is not None and curves_of(self._lab):
            self.picture.value = png(self._lab.scanned.found.figure(self._desk.dark))
        self.show()

    def run(self, progress: Progress) -> str:
        """Scan, showing every layer as it is done; gives a sentence about how it ended."""
        try:
            found = self._lab.sensitivity(progress=progress, on_layer=lambda _: self.show())
        except Stopped:
            return "Stopped: the layers scanned so far are shown; press again to go on where it was."
        finally:
            self.draw()
        free = len(found.channels) - len(found.pinned)
        return f"Scanned {free} layers by {found.by} at {len(found.ratios)} ratios, {found.n:,} images each."
