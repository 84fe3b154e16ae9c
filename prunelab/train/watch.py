"""Looking at a training while it runs."""

from __future__ import annotations

from typing import Protocol

from prunelab.train.position import Position


class Watch(Protocol):
    """Is told how a training goes, in the main process, on the thread that trains.

    Where there is one process, it ends the training by raising ``Stopped``: what is best so far stays.
    """

    def step(self, at: Position, of: int, loss: float) -> None:
        """Steps are done: on a CPU each, on a GPU some together, since reading a loss waits for the device.

        Args:
            at: where the training is; it goes on changing.
            of: steps of an epoch.
            loss: mean loss of the images since the last call.
        """

    def validated(self, done: int) -> None:
        """A part of the validation set is done: so many images."""
