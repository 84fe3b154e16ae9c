"""A training of a copy of the lab's network: what it is of, how it goes, and what comes out.

While it runs it looks at nothing of the lab that can change, so the lab may be used meanwhile, on other threads too.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prunelab.explorer.clock import Clock
from prunelab.machine import GIB
from prunelab.plan import Plan
from prunelab.preview import Estimate, Preview
from prunelab.program.cache import Cache
from prunelab.program.trace import state_tensors
from prunelab.progress import Progress, Stopped
from prunelab.train.csgd import Squeezed, csgd
from prunelab.train.finetune import finetune
from prunelab.train.position import Epoch, Position

if TYPE_CHECKING:
    import pandas as pd

    from prunelab.explorer.lab import Lab

KINDS = {"finetune": "fine-tuning", "squeeze": "squeezing"}
_MEMORY = GIB // 8


@dataclass
class Course:
    """How a training goes, or went. Lists grow on the thread that trains; they can be read on any.

    Attributes:
        kind: one of :data:`KINDS`; ``epochs`` how many it is to have.
        clock: the time left.
        of: steps of an epoch, 0 before the first step.
        losses: what has been read of the loss, as (steps done since the first epoch began, mean loss).
        rows: the finished epochs; epoch 0 is the network before.
        reference: accuracy of the unpruned network on the same images, once measured.
    """

    kind: str
    epochs: int
    clock: Clock
    of: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    rows: tuple[Epoch, ...] = ()
    reference: float | None = None

    @property
    def share(self) -> float:
        """How much of the training is done, 0 to 1."""
        steps = self.losses[-1][0] if self.losses else 0
        return min(steps / max(self.epochs * self.of, 1), 1.0)

    @property
    def kept(self) -> Epoch:
        """The epoch whose weights stay if the training ends now: the best, or of squeezing the last."""
        return self.rows[-1] if self.kind == "squeeze" else max(self.rows, key=lambda row: row.accuracy)

    def to_frame(self) -> pd.DataFrame:
        """A row for every loss that was read: step, epoch (a fraction while it runs), loss."""
        import pandas as pd

        steps = [(step, step / self.of, loss) for step, loss in self.losses]
        return pd.DataFrame(steps, columns=["step", "epoch", "loss"]).set_index("step")

    def __str__(self) -> str:
        """Where it is, in one line."""
        words = [KINDS[self.kind]]
        if self.losses:
            epoch = min(-(-self.losses[-1][0] // self.of), self.epochs)
            words += [f"epoch {epoch} of {self.epochs}", f"loss {self.smooth_loss:.3f}"]
        if self.rows:
            words.append(f"accuracy {self.rows[-1].accuracy:.2%}")
        return " · ".join([*words, str(self.clock)])

    @property
    def smooth_loss(self) -> float:
        """Mean of the last losses, over a tenth of an epoch or ten."""
        last = [loss for _, loss in self.losses[-max(self.of // 10, 10) :]]
        return sum(last) / len(last) if last else math.nan


class Training:
    """One training, of the network that is current when it is made; its course is ``lab.training`` from then on.

    Attributes:
        model: the copy that is trained.
        course: how it goes.
        squeezed: what :func:`prunelab.train.csgd.csgd` gave, where it was that.
    """

    def __init__(self, lab: Lab, kind: str, settings: dict[str, Any], widths: Any = None) -> None:
        """Args:
        kind: one of :data:`KINDS`.
        settings: of :func:`prunelab.finetune`, ``epochs`` among them.
        widths: what is left by squeezing, as for :func:`prunelab.train.csgd.csgd`.
        """
        self.stage = lab.stage
        self.model: nn.Module = copy.deepcopy(lab.model)
        self.squeezed: Squeezed | None = None
        self.course = Course(kind, settings["epochs"], Clock(settings["epochs"], len(lab.unpruned.labels)))
        if lab.training is not None:
            self.course.reference = lab.training.reference
        # With memory of its own: what the lab's previews keep stays for the hand on the sliders.
        unpruned = lab.unpruned
        lab.training = self.course
        self._unpruned = Preview(unpruned.program, unpruned.images, unpruned.labels, memory=Cache(_MEMORY))
        self._data = (lab.train, lab.val)
        self._settings = {**settings, "masks": lab.stage.masks}
        self._widths = widths
        self._look: Callable[[], bool] = lambda: True
        self._compares = lab.knows_unpruned

    def run(
        self,
        progress: Progress | bool = False,
        on_epoch: Callable[[Epoch], None] | None = None,
        look: Callable[[], bool] | None = None,
    ) -> pd.DataFrame:
        """Train the copy.

        Args:
            progress, on_epoch: as for :func:`prunelab.finetune`.
            look: called after every step and every part of a validation; returning False ends the training, and what
                is best so far stays.

        Returns:
            the table of :func:`prunelab.finetune`.
        """
        self._look = look or self._look

        def ended(row: Epoch) -> None:
            self.course.rows = (*self.course.rows, row)
            if on_epoch is not None:
                on_epoch(row)

        asked = {**self._settings, "progress": progress, "on_epoch": ended, "watch": self}
        if look is not None:
            # Every step asks, also where losses are read seldom.
            asked["progress"] = lambda *_: self._look()
            if self._compares and self.course.reference is None:
                self._measure_reference()
        if self.course.kind == "squeeze":
            self.squeezed = csgd(self.model, *self._data, self._widths, **asked)
            table = self.squeezed.table
        else:
            table = finetune(self.model, *self._data, **asked)
        self.course.rows = tuple(Epoch(epoch, *row) for epoch, *row in table.itertuples())
        return table

    def _measure_reference(self) -> None:
        def update(found: Estimate) -> bool:
            return self._look()

        found = self._unpruned.accuracy(on_update=update)
        self.course.reference = found.accuracy if found.n == found.total else None

    def step(self, at: Position, of: int, loss: float) -> None:
        """As ``prunelab.train.watch.Watch``."""
        course = self.course
        course.of = of
        course.rows = tuple(at.rows)
        course.losses.append(((at.epoch - 1) * of + at.step, loss))
        course.clock.step(at.epoch, at.step, of, time.monotonic())

    def validated(self, done: int) -> None:
        """As ``prunelab.train.watch.Watch``."""
        self.course.clock.validated(done, time.monotonic())
        if not self._look():
            raise Stopped("validation")

    @property
    def changed(self) -> bool:
        """Whether the copy is another network than before; where no epoch was better than none, it is not."""
        before, now = state_tensors(self.stage.program.model), state_tensors(self.model)
        return any(not torch.equal(tensor, before[name]) for name, tensor in now.items())

    @property
    def gained(self) -> bool:
        """Whether there is something to keep of a training that failed: an epoch that was better than none."""
        return self.course.kind == "finetune" and self.changed

    def plan(self, old: Plan) -> Plan | None:
        """The plan for the network that came out, in the place of an old one; None where there is no other."""
        if self.squeezed is None:
            return None
        return replace(old, settings=self.squeezed.clusters.plan().settings, bypassed=(), repair="merge")
