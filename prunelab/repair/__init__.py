"""Repair: the surviving weights corrected in closed form from a sample of images, without training.

Removing channels takes inputs away from the layers that read them. All repairs go from input to output, so that each
layer is corrected for what the layers before it have become. With *X* the inputs that a layer has left in the cut
network, one row per position of its output, *W* and *b* its weights and bias, and *Y* what it gave in the uncut one:

``bias``
    *b* + mean(*Y* − *XW* − *b*), the mean over all rows: where a layer has no bias, the running mean of the batch norm
    after it is lowered by as much. The removed channels' mean contribution, as in Nagel et al. 2019, Data-free
    quantization through weight equalization and bias correction, arXiv 1906.04721, appendix B.
``norm``
    Running mean and variance of every batch norm whose input has changed are those of its input in the cut network on
    the sample (the variance unbiased, as in training). As in Li et al. 2020, EagleEye, arXiv 2007.02491, section 3.4.
``least-squares``
    argmin over *W*, *b* of ‖*XW* + *b* − *Y*‖² + *λ*‖*W* − *W*₀‖², where *W*₀ are the weights before: directions that
    the sample does not show stay as they were. *λ* is chosen on held-out rows, by
    :func:`prunelab.repair.equations.fitted`. Where the layer's output, or that of the norm after it, is added to a
    shortcut, *Y* is what makes the sum right: the uncut sum less the cut network's shortcut, so that errors do not add
    up along a residual stream. Solved are the layers that have lost inputs, those whose output is added to a shortcut
    that has changed, and the last. As in He, Zhang and Sun 2017, Channel pruning for accelerating very deep neural
    networks, arXiv 1707.06168, sections 3.1 and 3.2.
``least-squares+norm``
    ``least-squares``, and ``norm`` for the norms that no solved layer feeds directly; the others are part of its fit.
``merge``
    The removed channels' weights in the layers that read them are added to those of the channels most like them; needs
    no sample. See :mod:`prunelab.repair.merge`.

Weights under a mask stay zero. What cannot be repaired is named with the reason in :attr:`Repaired.left`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from math import prod
from typing import Any

from torch import Tensor

from prunelab.errors import PruneLabError, unknown
from prunelab.machine import GIB
from prunelab.plan import REPAIRS
from prunelab.preview import labelled
from prunelab.profile.batches import check_images, in_order, inputs_of
from prunelab.program.cache import Cache
from prunelab.program.program import Program
from prunelab.program.run import removes_anything
from prunelab.program.selection import Selection
from prunelab.repair.merge import merged
from prunelab.repair.places import Cut
from prunelab.repair.quick import Quick
from prunelab.repair.values import Wanted, always
from prunelab.repair.walk import Walk

BUDGET = GIB
"""Bytes of values and of corrected weights that are kept for the next selection."""

SAMPLE = 1000
"""How many training images a repair looks at."""

_WALK_BYTES = 4 << 30
_HELD_AT_ONCE = 4


class Repaired(dict[str, Tensor]):
    """Corrected tensors of the cut network, by state name, in its own (cut) shapes; those not named stay.

    Attributes:
        left: layers that the cut changes but the repair could not correct, by module path, each with the reason.
        images: how many images were looked at.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor] | None = None, left: Iterable[tuple[str, str]] = (), images: int = 0
    ) -> None:
        super().__init__(tensors or {})
        self.left = tuple(left)
        self.images = images

    def __str__(self) -> str:
        """What was done, in one line."""
        left = f", {len(self.left)} layers left as they are" if self.left else ""
        source = f" from {self.images:,} images" if self.images else ""
        return f"{len(self)} tensors corrected{source}{left}"


class Repairer:
    """Repairs of one network from one sample. What one selection computed serves the next."""

    def __init__(self, program: Program, images: Tensor | None, budget: int = BUDGET) -> None:
        """Args:
        images: the sample, shape ``(images, …)``; a thousand do. Of large images only as many are looked at as the
            network's values of fit in a few gigabytes.
        budget: bytes to keep for the next selection.
        """
        self.program = program
        self.images = images[: _affordable(program, images.element_size())] if images is not None else None
        self._budget = budget
        self._forget()

    def _forget(self) -> None:
        """Begin with nothing remembered."""
        self._memory = Cache(self._budget)
        self._stale: frozenset[Hashable] = frozenset()
        self._last: tuple[tuple[Selection, str], Repaired] | None = None
        self._quick: Quick | None = None
        self._versions = self.program.versions()

    def _notice_training(self) -> None:
        # What is remembered is of the weights that the network had then.
        if self.program.versions() != self._versions:
            self._forget()

    def __call__(self, selection: Selection, how: str, wanted: Wanted = always) -> Repaired:
        """The correction for a selection. What an earlier one has in common with it is not computed again.

        Args:
            how: one of :data:`prunelab.plan.REPAIRS`.
            wanted: asked before every step, some milliseconds apart, whether to go on.

        Raises:
            Stopped: it is not wanted any more. What was found so far is kept for the next time.
            PruneLabError: there is no such repair, or it needs images, or they do not fit the network.
        """
        self._notice_training()
        if how == "merge":
            return Repaired(*merged(self.program, selection))
        images = self._checked(selection, how)
        if images is None:
            return Repaired()
        key = (selection, how)
        if self._last is None or self._last[0] != key:
            walk = Walk(Cut(self.program.under(selection), selection), how, images, self._memory, wanted)
            try:
                walk.run(self._stale)
            finally:
                self._stale = walk.kept
            self._last = (key, Repaired(walk.found, tuple(dict.fromkeys(walk.left)), len(images)))
        return self._last[1]

    def quick(self, selection: Selection, how: str, wanted: Wanted = always) -> Repaired | None:
        """What :mod:`prunelab.repair.quick` makes of it, in milliseconds: to be shown until the repair itself is there.

        None where that would be no quicker: if the repair is there already, or does not solve for weights.

        Raises:
            as calling the repairer.
        """
        self._notice_training()
        there = self._last is not None and self._last[0] == (selection, how)
        images = None if there or how == "merge" else self._checked(selection, how)
        if images is None or not how.startswith("least-squares"):
            return None
        assert self.images is not None
        if self._quick is None:
            self._quick = Quick(self.program, self.images)
        tensors, left = self._quick(selection, wanted)
        return Repaired(tensors, tuple(dict.fromkeys(left)), len(self._quick.images))

    def _checked(self, selection: Selection, how: str) -> Tensor | None:
        """The images to repair from, where the weights are; None if there is nothing to repair."""
        if how not in REPAIRS:
            raise unknown("repair", how, REPAIRS)
        if how == "none" or not removes_anything(self.program, selection):
            return None
        if self.images is None or not len(self.images):
            raise PruneLabError(f"The repair {how!r} needs images: pass a few hundred of the training set.")
        program = self.program.under(selection)
        check_images(program, inputs_of(program, self.images))
        return self.images.to(next(iter(program.model.parameters())).device)


def repair(program: Program, selection: Selection, how: str, images: Tensor | None) -> Repaired:
    """One repair, as :class:`Repairer` gives it; nothing is kept."""
    return Repairer(program, images, budget=0)(selection, how)


def sample_of(train: Any) -> Tensor:
    """What repairs look at: the first :data:`SAMPLE` images of a training set, or of the set under a loader."""
    return labelled(in_order(train), SAMPLE)[0]


def _affordable(program: Program, value_bytes: int) -> int:
    """Images whose values fit in memory, and that the user's code takes at once."""
    if program.batch is not None:
        return program.batch
    largest = max(prod(node.shape) for node in program.base.nodes if node.kind == "op" and node.shape is not None)
    return max(1, _WALK_BYTES // (_HELD_AT_ONCE * value_bytes * largest))
