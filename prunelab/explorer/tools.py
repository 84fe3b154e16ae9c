"""The explorer's controls for width multiples, measured speed and what a plan changes: one line and two pictures."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ipywidgets as w
from matplotlib.figure import Figure

from prunelab.errors import PruneLabError
from prunelab.explorer import changes
from prunelab.latency import Latency
from prunelab.picture import png
from prunelab.progress import Stopped
from prunelab.widths import MULTIPLES

if TYPE_CHECKING:
    from prunelab.explorer.app import Explorer

_PICTURE = {
    **{"flex": "1 1 300px", "min_width": "0", "max_width": "460px", "height": "auto"},
    **{"object_fit": "contain", "object_position": "top"},
}


class Tools:
    """Widgets and what they do. The explorer places them, and says when the plan has changed or settled.

    Attributes:
        multiple: the dropdown of width multiples; ``speed`` and ``changed`` the buttons.
        times: the line that says how fast this plan was; ``pictures`` what it changes.
    """

    def __init__(self, explorer: Explorer) -> None:
        self._explorer = explorer
        self._lab = explorer.lab
        self.multiple = w.Dropdown(
            options=MULTIPLES,
            description="widths in multiples of",
            tooltip="Ratio and std leave widths rounded up to a multiple of this",
            style={"description_width": "initial"},
            layout=w.Layout(width="205px", margin="2px 2px 2px 12px"),
        )
        self.speed = explorer._button(
            "measure speed", self._on_speed, "Time this plan's network beside the unpruned one, on this machine"
        )
        self.changed = w.ToggleButton(
            description="what changed",
            tooltip="Accuracy by class, and the images that are taken for something else now",
            layout=w.Layout(width="auto"),
        )
        self.times = w.HTML(layout=w.Layout(display="none", margin="0 0 0 90px"))
        self.pictures = [w.Image(format="png", layout=w.Layout(display="none", **_PICTURE)) for _ in range(2)]
        self._showing = False
        self.show()
        self.multiple.observe(self._on_multiple, "value")
        self.changed.observe(self._on_changed, "value")

    def show(self) -> None:
        """The plan's multiple, and the times of the plan where they were taken."""
        multiple = self._lab.plan.multiple
        if multiple not in self.multiple.options:
            # New options choose the first of them for a moment: that is nobody's choice.
            self._showing = True
            self.multiple.options = sorted({*MULTIPLES, multiple})
            self._showing = False
        self.multiple.value = multiple
        found = self._lab.timed
        self.times.value = _lines(found) if found is not None else ""
        self.times.layout.display = None if found is not None else "none"

    def draw(self, wanted: Callable[[], bool]) -> None:
        """The pictures of what the plan changes, if they are asked for; given up when no longer wanted."""
        if not self.changed.value:
            return
        try:
            figures = self._figures(wanted, self._explorer.desk.dark)
        except Stopped:
            return
        for picture, figure in zip(self.pictures, [*figures, None], strict=False):
            if figure is not None:
                picture.value = png(figure)
            picture.layout.display = "none" if figure is None else None
        # They may have been put away while they were drawn.
        if not self.changed.value:
            self._hide()

    def _hide(self) -> None:
        for picture in self.pictures:
            picture.layout.display = "none"

    def _figures(self, wanted: Callable[[], bool], dark: bool) -> list[Figure]:
        figures: list[Figure] = []
        try:
            found = self._lab.outcomes(progress=lambda *_: wanted())
            figures.append(changes.class_changes(found, dark))
            figures.append(changes.flipped_images(found, self._lab.image, dark))
        except PruneLabError as error:
            # No classifier, or no images: that is said where the picture would be.
            figures.append(changes.saying(str(error), dark))
        return figures

    def _on_multiple(self, change: dict[str, Any]) -> None:
        if not self._showing and change["new"] != self._lab.plan.multiple:
            explorer = self._explorer
            explorer._guard(lambda: explorer._change(lambda: self._lab.multiple(change["new"])))

    def _on_changed(self, change: dict[str, Any]) -> None:
        if change["new"]:
            self._explorer._worker.latest(self._on_settled)
        else:
            self._hide()

    def _on_settled(self, wanted: Callable[[], bool]) -> None:
        # This request has taken the place of an estimate that was not done.
        ready = self._explorer.desk.estimate.get("state") == "ready"
        (self.draw if ready else self._explorer._estimate)(wanted)

    def _on_speed(self) -> None:
        explorer = self._explorer
        explorer._training.refuse("measuring speed")

        def progress(done: int, total: int | None, what: str) -> bool:
            explorer._say("measuring speed: both networks take turns", done / (total or done), busy=True)
            return explorer._wanted()

        def work() -> str:
            try:
                found = self._lab.latency(progress=progress)
            except Stopped:
                return "Stopped before there were enough measurements to say how fast this plan is."
            said = ", ".join(f"{timing.speedup:.2f} at batch {timing.batch}" for timing in found.timings)
            return f"Times as fast as unpruned: {said}."

        explorer._job("measuring speed", work)


def _lines(found: Latency) -> str:
    """Times in HTML: a line for each batch size, and one for what they were taken on."""
    lines = [*map(str, found.timings), f"on {found.where}"]
    return f'<div style="line-height: 1.5; padding: 4px 0">{"<br>".join(map(html.escape, lines))}</div>'
