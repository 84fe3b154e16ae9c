"""The explorer's automatic plan: a wish to choose, a button, and a picture of the search."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ipywidgets as w

from prunelab.picture import png
from prunelab.progress import Stopped
from prunelab.search import Best, Step

if TYPE_CHECKING:
    from prunelab.explorer.app import Explorer

WISHES = {
    "FLOPs −30 %": {"flops": 0.7},
    "FLOPs −50 %": {"flops": 0.5},
    "FLOPs −70 %": {"flops": 0.3},
    "parameters −50 %": {"params": 0.5},
    "parameters −70 %": {"params": 0.3},
    "drop ≤ 0.5 points": {"drop": 0.005},
    "drop ≤ 1 point": {"drop": 0.01},
    "drop ≤ 2 points": {"drop": 0.02},
}
"""What can be asked for, as arguments of :func:`prunelab.best_plan`."""


class BestView:
    """Widgets and what they do. The explorer places them.

    Attributes:
        button: begins a search; ``wish`` chooses what for.
        picture: of the last search, hidden until there is one.
    """

    def __init__(self, explorer: Explorer) -> None:
        self._explorer = explorer
        self._best: Best | None = None
        self.button = explorer._button(
            "best plan for", self._on_button, "Search for the plan; locked and removed rows stay as they are"
        )
        self.wish = w.Dropdown(options=list(WISHES), value="FLOPs −50 %", layout=w.Layout(width="150px"))
        self.picture = w.Image(format="png", layout=w.Layout(display="none"))

    @property
    def controls(self) -> tuple[w.Widget, ...]:
        """What is off during long work."""
        return self.button, self.wish

    def draw(self) -> None:
        """The picture, in the page's colours."""
        if self._best is not None:
            self.picture.value = png(self._best.figure(self._explorer.desk.dark))
            self.picture.layout.display = None

    def _on_button(self) -> None:
        wish = self.wish.value
        self._explorer._job(f"searching the best plan for {wish}", lambda: self._run(wish))

    def _run(self, wish: str) -> str:
        """Search, and take the plan; gives a sentence about how it ended."""
        explorer = self._explorer
        dense = explorer.lab.dense_cost()
        there = ""

        def on_step(step: Step) -> None:
            nonlocal there
            left = f"FLOPs {step.flops / max(dense.flops, 1):.0%}, parameters {step.params / max(dense.params, 1):.0%}"
            there = f": {left}, accuracy {step.accuracy:.1%} (n = {step.n:,})"

        def progress(done: int, total: int | None, what: str) -> bool:
            explorer._say(f"searching the best plan for {wish}{there}", done / (total or done), busy=True)
            return explorer._wanted()

        try:
            self._best = explorer.lab.best_plan(**WISHES[wish], progress=progress, on_step=on_step)
        except Stopped:
            return "Stopped: the plan is as it was; press again to go on where the search was."
        self.draw()
        found, one = self._best.found, self._best.uniform
        beside = f"; one ratio for all layers: {one.accuracy:.1%}" if one is not None else ""
        return f"Best plan for {wish}: {found.accuracy:.1%}{beside} (n = {found.n:,}, {self._best.precision})."
