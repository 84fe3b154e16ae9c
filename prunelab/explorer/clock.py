"""How long a training will still take, from how long its steps and validations have taken so far."""

from __future__ import annotations

_SURE_AFTER = 5
"""Steps that are measured before anything is said."""
_STEP_COUNTS, _VALIDATION_COUNTS = 0.01, 0.3
"""What the newest step and validation count at least: a machine that slows down is noticed, one slow step is not."""
_CLOSING = 2
"""Validations after the last epoch: with norm statistics taken anew, and of the network once it is the current one."""


class Clock:
    """Told of every step and every part of a validation, it says how many seconds are left."""

    def __init__(self, epochs: int, images: int) -> None:
        """Args:
        epochs: of the training.
        images: of the validation set.
        """
        self._epochs, self._images = epochs, images
        # What was done last (a step or a validation), when, and how much of it.
        self._last: tuple[str, float, int] | None = None
        self._began = (0.0, 0)
        self._step, self._steps, self._steps_left = 0.0, 0, 0
        self._image, self._validations, self._validations_left = 0.0, 0, 0
        self._image_before = 0.0

    def step(self, epoch: int, done: int, of: int, now: float) -> None:
        """So many steps of so many are done in an epoch, counted from 1; ``now`` in seconds."""
        what, then, before = self._last or ("", now, done)
        if what == "step" and before < done:
            # The first step of an epoch is left out: it waits for data, and the first of all for kernels.
            self._steps += 1
            taken = (now - then) / (done - before)
            self._step += (taken - self._step) * max(1 / self._steps, _STEP_COUNTS)
        self._last = ("step", now, done)
        self._steps_left = (self._epochs - epoch) * of + of - done
        self._validations_left = self._epochs - epoch + 1 + _CLOSING

    def validated(self, done: int, now: float) -> None:
        """So many images of a validation are done."""
        what, then, before = self._last or ("", now, done)
        if what != "validation" or done <= before:
            self._validations += 1
            self._validations_left -= what == "validation"
            # Nobody knows when the very first began.
            self._began = (then, 0) if what else (now, done)
            self._image_before = self._image
        start, first = self._began
        if done > first:
            taken = (now - start) / (done - first)
            counts = 1.0 if self._validations == 1 else max(1 / self._validations, _VALIDATION_COUNTS)
            counts *= 1.0 if self._validations == 1 else min(done / self._images, 1.0)
            self._image = self._image_before + (taken - self._image_before) * counts
        self._last = ("validation", now, done)

    @property
    def left(self) -> float | None:
        """Seconds until the trained network is the current one; None while too little has been measured."""
        if self._steps < _SURE_AFTER or not self._image:
            return None
        done = self._last[2] if self._last is not None and self._last[0] == "validation" else 0
        images = max(self._validations_left * self._images - done, 0)
        return self._step * self._steps_left + self._image * images

    def __str__(self) -> str:
        return "estimating the time left" if self.left is None else in_words(self.left)


def in_words(seconds: float) -> str:
    """Seconds that are left, as precisely as they are known.

    >>> in_words(83)
    'about 85 s left'
    """
    if seconds < 10:
        return "a few seconds left"
    if seconds < 100:
        return f"about {5 * round(seconds / 5)} s left"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"about {minutes} min left"
    return f"about {minutes // 60} h {5 * (minutes % 60 // 5):02d} min left"
