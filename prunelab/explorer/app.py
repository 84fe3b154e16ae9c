"""The explorer: the desk, the pictures beside it and the controls below, over one lab."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import ipywidgets as w
from torch import nn

from prunelab.errors import PruneLabError
from prunelab.explorer import plots
from prunelab.explorer.best_view import BestView
from prunelab.explorer.choosing import Choosing
from prunelab.explorer.desk import (
    Desk,
    estimate_of,
    figures_of,
    header_of,
    rows_of,
    terms_of,
    units_of,
)
from prunelab.explorer.edits import Edits
from prunelab.explorer.filing import Filing
from prunelab.explorer.lab import Lab
from prunelab.explorer.scan_view import ScanView
from prunelab.explorer.summary import summary
from prunelab.explorer.tools import Tools
from prunelab.explorer.train_view import TrainView
from prunelab.explorer.worker import Worker
from prunelab.picture import png
from prunelab.plan import GRAINS, REPAIRS
from prunelab.preview import Estimate
from prunelab.progress import Stopped


def explore(model: nn.Module | Lab, train: Any = None, val: Any = None, **settings: Any) -> Explorer:
    """Open the explorer on a trained network.

    Args:
        model: the network, or a :class:`Lab`.
        train: Dataset or DataLoader of (image, label): profiled and fine-tuned on.
        val: Dataset or DataLoader of (image, label): accuracy is measured on it.
        settings: as for :class:`Lab`.

    Raises:
        PruneLabError: the network or the data cannot be used.
    """
    if isinstance(model, Lab):
        return Explorer(model)
    if train is None or val is None:
        raise PruneLabError("explore needs the data too: explore(model, train, val).")
    return Explorer(Lab(model, train, val, **settings))


class Explorer(w.VBox):
    """The widget. Everything it does is one call on ``lab``; what it shows is read back from there."""

    def __init__(self, lab: Lab) -> None:
        """Args:
        lab: what is explored; ``explorer.lab`` afterwards.
        """
        self.lab = lab
        # The lab is changed by widget callbacks, which arrive on threads of their own and hold this, or by long work on
        # the worker, during which they are refused. A training changes nothing: it works on a copy.
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._worker = Worker(self._failed, self._stop.set)
        self._long = False
        self._seen = 0
        self._held: list[dict[str, Any]] = []
        self.desk = Desk()
        self._edits = Edits(lab, self.desk)
        self._scans = ScanView(lab, self.desk)
        self._scatter, self._details = w.Image(format="png"), w.Image(format="png")
        self._build()
        super().__init__([self._columns], layout=w.Layout(width="100%"))
        self.add_class("prunelab")
        if lab.profile is None:
            lab.run_profile()
        lab.prepare(lab.plan.criterion)
        self._show_network()
        self.desk.observe(self._on_edit, "edits")
        self.desk.observe(self._on_view, ["selected", "dark"])
        self.desk.on_msg(self._on_message)

    # Layout ---------------------------------------------

    def _build(self) -> None:
        self._choosing = Choosing(self)
        self._criterion = self._choosing.criterion
        self._repair = w.Dropdown(options=tuple(REPAIRS), value=self.lab.plan.repair, description="repair",
                                  layout=w.Layout(width="220px"))  # fmt: skip
        self._repaired = w.HTML(layout=w.Layout(display="none", margin="0 0 0 90px"))
        self._grain = w.Dropdown(options=GRAINS, value="channel", description="all grains",
                                 layout=w.Layout(width="190px"))  # fmt: skip
        self._ratio = w.FloatSlider(0.0, min=0.0, max=0.95, step=0.05, description="all ratios",
                                    continuous_update=False, readout_format=".0%",
                                    layout=w.Layout(width="280px"))  # fmt: skip
        self._measure = self._button(
            "measure on all", self._on_measure, "Accuracy of this plan on the whole validation set"
        )
        self._scan = self._button(
            "scan layers", self._on_scan, "Accuracy with each layer cut alone: a curve behind every ratio slider"
        )
        self._commit = self._button("commit", self._on_commit, "Make the plan real: a new, smaller network", "primary")
        self._stopper = self._button("stop", self._on_stop, "Stop; what is done so far is kept")
        self._stopper.disabled = True
        self._tools = Tools(self)
        self._best = BestView(self)
        self._files = Filing(self)
        self._training = TrainView(self)
        controls = w.VBox([
            self._line(self._criterion, self._grain, self._ratio, self._tools.multiple),
            self._choosing.line,
            self._line(
                self._repair, self._measure, self._scan, self._tools.speed, self._tools.changed, self._commit,
                self._stopper,
            ),
            self._line(*self._best.controls),
            self._repaired,
            self._tools.times,
            self._training.controls,
            self._line(*self._files.controls),
            self._files.python,
        ], layout=w.Layout(margin="8px 0 0 0"))  # fmt: skip
        self._arrange(controls)
        self._repair.observe(self._on_repair, "value")
        self._grain.observe(self._on_grain, "value")
        self._ratio.observe(self._on_ratio, "value")

    def _arrange(self, controls: w.Widget) -> None:
        """Desk and controls on the left, pictures on the right; below each other where the page is narrow."""
        # The desk is measured by container queries, so its content gives it no width: it comes from outside.
        self.desk.layout = w.Layout(width="100%")
        left = w.VBox([self.desk, controls], layout=w.Layout(flex="3 1 640px", min_width="0", margin="0 8px 8px 0"))
        pictures = [self._scatter, self._details, self._best.picture, self._training.picture, self._scans.picture]
        for picture in pictures:
            picture.layout = w.Layout(
                flex="1 1 300px", min_width="0", max_width="460px", height="auto", object_fit="contain",
                display=picture.layout.display,
            )  # fmt: skip
        right = w.Box(
            [*pictures, *self._tools.pictures],
            layout=w.Layout(display="flex", flex_flow="row wrap", flex="1 1 320px", min_width="0"),
        )
        flow = w.Layout(display="flex", flex_flow="row wrap", width="100%", align_items="flex-start")
        self._columns = w.Box([left, right], layout=flow)

    def _line(self, *widgets: w.Widget) -> w.Box:
        return w.Box(list(widgets), layout=w.Layout(display="flex", flex_flow="row wrap", align_items="center"))

    def _button(self, text: str, action: Callable[[], None], tip: str, style: str = "") -> w.Button:
        button = w.Button(description=text, tooltip=tip, button_style=style, layout=w.Layout(width="auto"))
        button.on_click(lambda _: self._guard(action))
        return button

    # Showing ---------------------------------------------

    def _show_network(self) -> None:
        """Everything that a new network or criterion changes."""
        # Rows, units and terms belong together: in one message, or the browser would draw some with the others' old;
        # and with them the word that the accuracy is that of the rows before.
        with self.desk.hold_sync():
            self.desk.header = header_of(self.lab)
            self.desk.rows = rows_of(self.lab)
            self.desk.units = units_of(self.lab)
            self.desk.terms = terms_of(self.lab)
            self._edits.show()
            self._outdate()
        self._rows_of = self._kind_of_rows
        if self.desk.selected not in {r["name"] for r in self.desk.rows}:
            self.desk.selected = next((r["name"] for r in self.desk.rows if not r["pinned"]), "")
        self._show_plan()

    def _show(self) -> None:
        """The lab as it is now; all of it where the rows are of something else, which a cell may have changed."""
        # During long work the network may be on its way: its end shows it.
        if self._long or self._rows_of == self._kind_of_rows:
            self._show_plan()
        else:
            self._show_network()

    @property
    def _kind_of_rows(self) -> tuple[Any, ...]:
        plan = self.lab.plan
        return self.lab.stage.program, plan.bypassed, plan.criterion, plan.seed, plan.combine, plan.multiple

    def _show_plan(self) -> None:
        """The plan as Python knows it, and a new estimate on its way."""
        self._edits.show()
        self._scans.show()
        self.desk.revision += 1
        self._choosing.show()
        self._repair.value = self.lab.plan.repair
        self._after_edit()

    def _after_edit(self) -> None:
        # With the revision, so that rows which were sent again are answered again, by equal figures too.
        self.desk.figures = {**figures_of(self.lab), "edits": self._seen, "revision": self.desk.revision}
        self.desk.can = {"undo": self.lab.can_undo, "redo": self.lab.can_redo}
        self._tools.show()
        self._files.show()
        self._outdate()
        self._worker.latest(self._estimate)

    def _outdate(self) -> None:
        """The accuracy shown is no longer that of what is shown."""
        self.desk.estimate = {**self.desk.estimate, "state": "stale" if "n" in self.desk.estimate else "none"}

    def _show_repair(self) -> None:
        """What the repair did, in one line; pointing at it lists what it could not correct, and why."""
        repaired = self.lab.repaired
        reasons = "\n".join(f"{name}: {reason}" for name, reason in repaired.left)
        self._repaired.value = f'<span title="{html.escape(reasons)}">{html.escape(str(repaired))}</span>'
        self._repaired.layout.display = "none" if self.lab.plan.repair == "none" else None

    def _estimate(self, wanted: Callable[[], bool]) -> None:
        """Quick accuracy, shown as it grows, then the pictures; given up as soon as a newer request is there.

        Until the plan's repair is there, what a quick one gives is shown, and called so.
        """

        def update(found: Estimate) -> bool:
            if wanted():
                self.desk.estimate = {**estimate_of(found, "running"), "edits": answered}
            return wanted()

        answered = self._seen
        try:
            first = self.lab.quick_estimate(wanted)
            if first is not None and wanted():
                self.desk.estimate = {**estimate_of(first, "running", "quick repair"), "edits": answered}
            found = self.lab.estimate(on_update=update, wanted=wanted)
        except Stopped:
            return
        if wanted():
            self.desk.estimate = {**estimate_of(found, "ready"), "edits": answered}
            self._show_repair()
        if wanted():
            self._draw_details()
        if wanted():
            self._draw_scatter()
        if wanted():
            self._tools.draw(wanted)

    def _draw_details(self) -> None:
        # The row may have gone with a block meanwhile.
        if self.desk.selected in {layer.name for layer in self.lab.program.layers}:
            self._details.value = png(plots.layer_details(self.lab, self.desk.selected, self.desk.dark))

    def _draw_scatter(self) -> None:
        self._scatter.value = png(plots.scatter(self.lab, self.desk.dark))

    def _say(self, text: str, progress: float | None = None, error: str = "", busy: bool = False) -> None:
        self.desk.status = {"text": text, "error": error, "busy": busy, "progress": progress}

    def _failed(self, error: Exception) -> None:
        """Whatever goes wrong is said where the user looks."""
        text = str(error) if isinstance(error, PruneLabError) else f"{type(error).__name__}: {error}"
        self._say("", error=text)

    def _guard(self, action: Callable[[], None]) -> None:
        """Run a callback; its error becomes the visible line."""
        try:
            with self._lock:
                action()
        except Exception as error:
            self._failed(error)

    # Hands ---------------------------------------------

    def _on_edit(self, change: dict[str, Any]) -> None:
        self._seen = change["new"]
        self._guard(self._edit)
        held, self._held = self._held, []
        for content in held:
            self._on_message(None, content, None)

    def _edit(self) -> None:
        try:
            self._refuse_while_busy()
            more = self._edits.take()
        except PruneLabError:
            self._show()
            raise
        if more:
            self._show()
        else:
            self._after_edit()

    def _on_view(self, change: dict[str, Any]) -> None:
        def draw(wanted: Callable[[], bool]) -> None:
            self._draw_details()
            if change["name"] == "dark" and wanted():
                self._draw_scatter()
                self._scans.draw()
                self._best.draw()
                self._training.draw()
                self._tools.draw(wanted)
            if self.desk.estimate.get("state") != "ready":
                self._estimate(wanted)

        self._worker.latest(draw)

    def _on_message(self, _: Any, content: dict[str, Any], __: Any) -> None:
        if content.get("edits", 0) > self._seen:
            # While the kernel is busy a message overtakes the edits made before it: it waits for them.
            self._held.append(content)
            return
        unit = str(content.get("unit", ""))
        actions: dict[str, Callable[[], None]] = {
            "undo": self.lab.undo,
            "redo": self.lab.redo,
            "reset": self.lab.reset,
            "bypass": partial(self.lab.bypass, unit),
            "restore": partial(self.lab.restore, unit),
        }
        action = actions.get(content.get("do", ""))
        if action is not None:
            self._guard(lambda: self._change(action))

    def _change(self, action: Callable[[], None]) -> None:
        """A change of plan or network that did not start in the rows."""
        self._refuse_while_busy()
        self._edits.rest()
        action()
        self._show()

    def _on_repair(self, change: dict[str, Any]) -> None:
        if change["new"] != self.lab.plan.repair:
            self._guard(lambda: self._change(lambda: self.lab.repair(change["new"])))

    def _on_grain(self, change: dict[str, Any]) -> None:
        self._guard(lambda: self._change(lambda: self.lab.set_all(grain=change["new"])))

    def _on_ratio(self, change: dict[str, Any]) -> None:
        self._guard(lambda: self._change(lambda: self.lab.set_all(ratio=change["new"])))

    # Long work ---------------------------------------------

    def _job(self, text: str, work: Callable[[], str]) -> None:
        """Run long work on the worker with the controls off, and say how it ended."""
        self._refuse_while_busy()
        self._begin(text)
        self._worker.job(lambda: self._to_the_end(work))

    def _later(self, text: str, work: Callable[[], str]) -> None:
        """The same from another thread, as soon as the worker is done with what it has: nobody is refused."""

        def run() -> None:
            with self._lock:
                self._begin(text)
            self._to_the_end(work)

        self._worker.job(run)

    def _begin(self, text: str) -> None:
        self._stop.clear()
        self._enable(False)
        self._say(text, busy=True)

    def _to_the_end(self, work: Callable[[], str]) -> None:
        with self._lock:
            # Work that waited its turn: what ended before it has turned the controls on.
            self._enable(False)
        try:
            done = work()
        except Exception:
            with self._lock:
                self._enable(True)
                # Whatever is current now; and the estimate that this work had stopped.
                self._show_network()
            raise
        # Held until the rows are those of the new network: no edit of the old ones gets in between.
        with self._lock:
            self._edits.rest()
            self._enable(True)
            self._show_network()
            self._say(done)

    def _wanted(self) -> bool:
        """Whether long work is to go on."""
        return not self._stop.is_set()

    def _refuse_while_busy(self) -> None:
        if self._long:
            raise PruneLabError("The network is being changed or measured: wait, or stop it first.")

    def _enable(self, on: bool) -> None:
        self._long = not on
        for widget in (
            self._measure,
            self._scan,
            *self._best.controls,
            *self._choosing.controls,
            self._grain,
            self._ratio,
            self._repair,
            self._tools.multiple,
        ):
            widget.disabled = not on
        self._stopper.disabled = on
        self._training.allow(on)

    @property
    def alone(self) -> tuple[w.Button, ...]:
        """What cannot go on beside a training: it changes or traces the network, or needs the machine for itself."""
        return self._commit, self._tools.speed, self._files.export

    def _on_measure(self) -> None:
        def work() -> str:
            def update(e: Estimate) -> bool:
                self._say("measuring on the whole validation set", e.n / e.total, busy=True)
                return self._wanted()

            try:
                return f"This plan scores {self.lab.measure(on_update=update, wanted=self._wanted)}."
            except Stopped:
                return "Stopped during the repair: nothing was measured."

        self._job("measuring on the whole validation set", work)

    def _on_scan(self) -> None:
        def progress(done: int, total: int | None, what: str) -> bool:
            self._say("scanning layers", done / (total or done), busy=True)
            return self._wanted()

        self._job("scanning layers", lambda: self._scans.run(progress))

    def _on_commit(self) -> None:
        self._training.refuse("a commit")

        def work() -> str:
            before = self.lab.dense_cost()
            try:
                self.lab.commit(wanted=self._wanted)
            except Stopped:
                return "Stopped: nothing was committed."
            now = self.lab.dense_cost()
            return f"Committed: {before.params:,} → {now.params:,} parameters, {before.flops:,} → {now.flops:,} FLOPs."

        self._job("committing", work)

    def _on_stop(self) -> None:
        if not self._long:
            return  # it has ended while the click was on its way
        self._stop.set()
        self._say("stopping; what is done so far is kept", busy=True)

    # Without a kernel ---------------------------------------------

    def summary(self) -> str:
        """The plan in plain HTML, for a saved notebook that no kernel runs behind."""
        return summary(self.lab)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        if isinstance(bundle, dict):
            bundle["text/html"] = self.summary()
        return bundle
