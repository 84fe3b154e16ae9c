"""Training from the explorer: its controls, its thread, and its curves while it runs.

A training has a thread of its own, which works on a copy of the network and never touches the lab or the desk. What
comes out becomes the current network on the worker, as a commit does.
"""

from __future__ import annotations

import html
import threading
import time
from typing import TYPE_CHECKING, Any

import ipywidgets as w

from prunelab.errors import PruneLabError
from prunelab.explorer.train_plot import training_curves
from prunelab.explorer.training import KINDS, Course, Training
from prunelab.explorer.worker import Worker
from prunelab.picture import png
from prunelab.train.augment import Augment
from prunelab.train.csgd import LOSSLESS, Squeezed

if TYPE_CHECKING:
    from prunelab.explorer.app import Explorer

_SAY_EVERY, _DRAW_EVERY = 0.25, 0.5
_DRAWING_SHARE = 0.05
"""Of the time that is spent on drawing at most: it is taken from the training."""
_FAILED = "Failed: everything is as it was before."


class TrainView:
    """Widgets and what they do. The explorer places them.

    Attributes:
        controls: what is set and pressed, with a line about the training below.
        picture: the curves, hidden until there are some.
        finetune, squeeze, stop: the buttons.
    """

    def __init__(self, explorer: Explorer) -> None:
        self._explorer = explorer
        self._lab = explorer.lab
        self._running = False
        self._stop = threading.Event()
        self._worker = Worker(explorer._failed, self._stop.set)
        self._drawing = threading.Lock()
        self._said = self._drawn = 0.0
        self._next_drawing = _DRAW_EVERY
        self.picture = w.Image(format="png", layout=w.Layout(display="none"))
        self._build()
        self.controls = self._arranged()

    # Layout ---------------------------------------------

    def _build(self) -> None:
        wide = {"description_width": "initial"}
        explorer, margin = self._explorer, "2px 16px 2px 2px"
        self.epochs = w.BoundedIntText(3, min=1, max=1000, description="epochs", style=wide,
                                       layout=w.Layout(width="120px", margin=margin))  # fmt: skip
        self.lr = w.FloatText(0.01, description="lr", step=0.001, style=wide,
                              layout=w.Layout(width="100px", margin=margin))  # fmt: skip
        self.smoothing = w.BoundedFloatText(0.0, min=0.0, max=0.9, step=0.05, description="label smoothing", style=wide,
                                            layout=w.Layout(width="170px", margin=margin))  # fmt: skip
        self.augment = w.Checkbox(False, description="augment images", indent=False, disabled=not self._images,
                                  tooltip="Mirror images left to right and shift them by up to an eighth of their side",
                                  layout=w.Layout(width="auto", margin=margin))  # fmt: skip
        self.distil = w.Checkbox(False, description="learn from the unpruned network", indent=False,
                                 tooltip="Its outputs take the place of the labels, which are not smoothed then"
                                 if self._lab.knows_unpruned else "It is not in the folder that this lab came from",
                                 layout=w.Layout(width="auto", margin=margin))  # fmt: skip
        self.folder = w.Text("", description="checkpoint folder", placeholder="none", style=wide,
                             tooltip="A training that was stopped or killed goes on from there",
                             layout=w.Layout(width="260px", margin=margin))  # fmt: skip
        self.width = w.BoundedFloatText(0.625, min=0.05, max=0.95, step=0.025, style=wide, description="to a width of",
                                        tooltip="The share of its channels that every layer keeps, 0 to 1",
                                        layout=w.Layout(width="165px"))  # fmt: skip
        self.finetune = explorer._button("fine-tune", lambda: self._begin("finetune"),
                                         "Train a copy of the current network")  # fmt: skip
        self.squeeze = explorer._button("squeeze", lambda: self._begin("squeeze"),
                                        "Train a copy so that channels become equal in clusters (Centripetal SGD), and "
                                        "plan to merge those: a trim that loses nothing")  # fmt: skip
        self.stop = explorer._button(
            "stop training", self._on_stop, "The best epoch so far is kept; of squeezing, the last"
        )
        self._bar = w.FloatProgress(0.0, min=0.0, max=1.0, layout=w.Layout(flex="0 1 320px", margin="2px 8px"))
        self._text = w.HTML()
        self.distil.observe(self._show, "value")

    def _arranged(self) -> w.Widget:
        line = self._explorer._line
        self._state = w.VBox([line(self.stop, self._bar), self._text])
        page = w.VBox([
            line(self.epochs, self.lr, self.smoothing, self.augment, self.distil),
            line(self.folder, self.finetune, w.HTML("or", layout=w.Layout(margin="2px 8px")), self.squeeze, self.width),
            self._state,
        ])  # fmt: skip
        self._show()
        return w.Accordion([page], titles=("train",), selected_index=0, layout=w.Layout(margin="8px 0"))

    @property
    def _images(self) -> bool:
        """Whether the data are images, which can be augmented."""
        some = self._lab.unpruned.images
        return some.dim() == 4 and some.is_floating_point()

    # Rules ---------------------------------------------

    def refuse(self, what: str) -> None:
        """Raises PruneLabError where a training runs that something must wait for."""
        if self._running:
            raise PruneLabError(f"A network is being trained: wait, or stop the training, before {what}.")

    def _show(self, _: Any = None) -> None:
        """What can be pressed now."""
        running = self._running
        for widget in (self.epochs, self.lr, self.folder, self.width):
            widget.disabled = running
        self.distil.disabled = running or not self._lab.knows_unpruned
        self.augment.disabled = running or not self._images
        self.smoothing.disabled = running or self.distil.value
        self.stop.disabled = not running or self._stop.is_set()
        self._state.layout.display = None if self._text.value else "none"
        self.allow(not self._explorer._long)

    def allow(self, on: bool) -> None:
        """Buttons that are off while other long work, or a training, is under way."""
        for button in (self.finetune, self.squeeze, *self._explorer.alone):
            button.disabled = self._running or not on

    # A training ---------------------------------------------

    def _begin(self, kind: str) -> None:
        """Take a copy of the current network and train it on a thread of its own."""
        self._explorer._refuse_while_busy()
        self.refuse("training another")
        settings = {
            "epochs": self.epochs.value,
            "lr": self.lr.value,
            "label_smoothing": 0.0 if self.distil.value else self.smoothing.value,
            "augment": self._augmentation() if self.augment.value else None,
            "teacher": self._lab.original if self.distil.value else None,
            "folder": self.folder.value.strip() or None,
        }
        training = Training(self._lab, kind, settings, self.width.value)
        self._running = True
        self._stop.clear()
        self._said = self._drawn = 0.0
        self._say(f"{KINDS[kind]} begins; planning can go on meanwhile", 0.0)
        self._show()
        self._worker.job(lambda: self._train(training))

    def _augmentation(self) -> Augment:
        return Augment(flip=True, crop=max(self._lab.unpruned.images.shape[-1] // 8, 1))

    def _train(self, training: Training) -> None:
        try:
            training.run(look=lambda: self._look(training.course))
        except Exception as error:
            if training.gained:
                self._hand_over(training, error)
            else:
                self._end(_FAILED)
                self._explorer._failed(error)
        else:
            self._hand_over(training)
        self.draw()

    def _hand_over(self, training: Training, error: Exception | None = None) -> None:
        self.stop.disabled = True
        self._say("taking the trained network over", 1.0)
        self._explorer._later("taking the trained network over", lambda: self._take(training, error))

    def _look(self, course: Course) -> bool:
        """Say and draw how it goes, not too often; gives whether to go on."""
        now = time.monotonic()
        if not self._stop.is_set() and now - self._said > _SAY_EVERY:
            self._said = now
            self._say(str(course), course.share)
        if now - self._drawn > self._next_drawing:
            self.draw()
            self._drawn = time.monotonic()
            self._next_drawing = max(_DRAW_EVERY, (self._drawn - now) / _DRAWING_SHARE)
        return not self._stop.is_set()

    def _take(self, training: Training, error: Exception | None) -> str:
        """Make what came out the current network, on the worker; gives a sentence about it.

        Raises:
            Exception: the one that ended the training, once what it had gained is kept.
        """
        try:
            said, more = self._outcome(training, failed=error is not None)
        except Exception:
            self._end(_FAILED)
            raise
        self._end(f"{said} {more}")
        if error is not None:
            raise error
        return said

    def _outcome(self, training: Training, failed: bool) -> tuple[str, str]:
        """What came out, in a sentence, and what else there is to know."""
        course = training.course
        done = "Fine-tuned" if course.kind == "finetune" else "Squeezed"
        word = "Failed" if failed else "Stopped" if self._stop.is_set() else done
        epochs = max(len(course.rows) - 1, 0)
        if not training.changed:
            why = "no epoch was better than the beginning" if epochs else "no epoch was finished"
            if epochs and not course.losses:
                why = "the run in this folder is complete, and another folder, or none, trains further"
            return f"{word}: {why}, so the network stays as it was.", ""
        self._lab.enter(training, keep_plan=True)
        change = f"accuracy {course.rows[0].accuracy:.2%} → {course.kept.accuracy:.2%}"
        merging = "" if training.squeezed is None else _merging(training.squeezed)
        return (
            f"{word}: {change} after {epochs} of {course.epochs} epochs. This network is the current one now.",
            f"Undo brings back the one before. {merging}",
        )

    def _end(self, said: str) -> None:
        # Other long work may end at the same moment: the buttons must know of both.
        with self._explorer._lock:
            self._running = False
            self._say(said, None)
            self._show()

    def _on_stop(self) -> None:
        self._stop.set()
        self.stop.disabled = True
        self._say("stopping; what is best so far is kept", self._bar.value)

    def wait(self, timeout: float) -> bool:
        """Wait until no training runs and nothing is left to show; False if that takes longer than so many seconds."""
        return self._worker.drain(timeout) and self._explorer._worker.drain(timeout) and not self._running

    # Showing ---------------------------------------------

    def _say(self, text: str, share: float | None) -> None:
        self._text.value = f'<div style="line-height: 1.5; padding: 4px 2px">{html.escape(text)}</div>' if text else ""
        self._bar.layout.display = "none" if share is None else None
        self._bar.value = share or 0.0

    def draw(self) -> None:
        """The curves of the last training, in the page's colours. On any thread: the last one draws what is newest."""
        with self._drawing:
            course = self._lab.training
            if course is not None:
                self.picture.value = png(training_curves(course, self._explorer.desk.dark))
                self.picture.layout.display = None


def _merging(squeezed: Squeezed) -> str:
    """What the plan that a squeeze leaves would do."""
    if squeezed.departure <= LOSSLESS:
        return f"The plan merges channels that are equal: outputs change by at most {squeezed.departure:.0e}."
    return f"Channels are not equal yet: merging them as planned changes outputs by up to {squeezed.departure:.2g}."
