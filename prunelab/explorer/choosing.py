"""The explorer's choice of a criterion: what it computes in a line, and what it must measure first, with progress."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from prunelab.criteria.combining import COMBINES
from prunelab.criteria.registry import criteria_names, get
from prunelab.progress import Stopped

if TYPE_CHECKING:
    from prunelab.explorer.app import Explorer


class Choosing:
    """Widgets and what they do. The explorer places them, and says when the plan has changed.

    Attributes:
        criterion: the dropdown of criteria; ``combine`` that of ways to score rows with several members.
        line: what the chosen criterion computes, and ``combine``.
    """

    def __init__(self, explorer: Explorer) -> None:
        self._explorer = explorer
        self._lab = explorer.lab
        self.criterion = w.Dropdown(
            options=criteria_names(),
            value=self._lab.plan.criterion,
            description="criterion",
            layout=w.Layout(width="230px"),
        )
        self.combine = w.Dropdown(
            options=tuple(COMBINES),
            value=self._lab.plan.combine,
            description="coupled rows by",
            tooltip="How a row with several members, as a residual stream, gets its scores from theirs",
            style={"description_width": "initial"},
            layout=w.Layout(width="185px", flex="0 0 auto"),
        )
        self._about = w.HTML(layout=w.Layout(flex="1 1 340px", min_width="0", margin="0 12px 0 90px"))
        flow = w.Layout(display="flex", flex_flow="row wrap", align_items="flex-start")
        self.line = w.Box([self._about, self.combine], layout=flow)
        self._showing = False
        self.show()
        self.criterion.observe(self._on_criterion, "value")
        self.combine.observe(self._on_combine, "value")

    @property
    def controls(self) -> tuple[w.Widget, ...]:
        """What is off during long work."""
        return self.criterion, self.combine

    @property
    def chosen(self) -> tuple[str, str]:
        """What the plan has of this."""
        return self._lab.plan.criterion, self._lab.plan.combine

    def show(self) -> None:
        """The plan's criterion, and what it computes."""
        name, combine = self.chosen
        if name not in self.criterion.options:
            # Registered since, in another cell. New options choose the first of them for a moment.
            self._showing = True
            self.criterion.options = criteria_names()
            self._showing = False
        self.criterion.value, self.combine.value = name, combine
        about = html.escape(get(name).about.removesuffix("."))
        self._about.value = f'<div style="line-height: 1.4; padding: 5px 0">{about}</div>'

    def _on_criterion(self, change: dict[str, Any]) -> None:
        name, explorer = change["new"], self._explorer
        if self._showing or name == self._lab.plan.criterion:
            return
        explorer._guard(
            lambda: self.once_known(name, lambda: self._lab.criterion(name), f"Channels are scored by {name}.")
        )
        self._back_unless_chosen(name)

    def once_known(self, name: str, action: Callable[[], None], ending: str) -> None:
        """Change the plan to one by a criterion: at once, or after measuring what the criterion needs.

        Args:
            name: of the criterion.
            action: the change.
            ending: says so when it is done.

        Raises:
            PruneLabError: there is no such criterion, long work is going on, or what ``action`` raises.
        """
        explorer = self._explorer
        if get(name).missing(self._lab.profile):
            explorer._job(f"measuring what {name} needs", lambda: self._measured(name, action, ending))
        else:
            explorer._change(action)
            explorer._say(ending)

    def _measured(self, name: str, action: Callable[[], None], ending: str) -> str:
        """Measure what a criterion needs, then do what needs it; gives a sentence about how it ended."""
        explorer = self._explorer

        def progress(done: int, total: int | None, what: str) -> bool:
            explorer._say(f"measuring what {name} needs: {what}", done / (total or done), busy=True)
            return explorer._wanted()

        try:
            self._lab.prepare(name, progress)
            action()
        except Stopped:
            return (
                f"Stopped before all that {name} needs was measured: the plan is as it was, and what is there is kept."
            )
        return ending

    def _on_combine(self, change: dict[str, Any]) -> None:
        if change["new"] != self._lab.plan.combine:
            self._explorer._guard(lambda: self._explorer._change(lambda: self._lab.combine(change["new"])))

    def _back_unless_chosen(self, name: str) -> None:
        """A criterion that was refused does not stay in the dropdown."""
        if not self._explorer._long and self._lab.plan.criterion != name:
            self.show()
