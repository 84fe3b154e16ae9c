"""Values of a network on a part of the images, computed one node after the other and let go when nobody needs them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from torch import Tensor

from prunelab.profile.batches import inputs_of
from prunelab.program.cache import Cache
from prunelab.program.run import Bound
from prunelab.progress import Stopped

PART = 64
"""Images that are run at once: a thousand do not fit in the processor's cache, and take twice as long."""

Wanted = Callable[[], bool]
"""Says whether the work is still wanted; asked many times a second."""


def always() -> bool:
    """Work that nobody stops."""
    return True


@dataclass(frozen=True)
class Keeping:
    """Where values are kept for the next selection.

    Attributes:
        memory: the store.
        addresses: of the values worth keeping, by node.
    """

    memory: Cache
    addresses: Mapping[int, Hashable]


class Values:
    """The values on one part of the images that are still needed."""

    def __init__(self, bound: Bound, images: Tensor, number: int, keeping: Keeping | None = None) -> None:
        """Args:
        number: of the part.
        """
        self.bound, self.number, self.count = bound, number, len(images)
        feed = inputs_of(bound.program, images)
        nodes = bound.program.nodes
        self._inputs = dict(zip((n.index for n in nodes if n.kind == "input"), feed, strict=True))
        self._keeping = keeping
        self._reads: Counter[int] = Counter()
        self._compute: set[int] = set()
        self.held: dict[int, Any] = dict(bound.states)

    def plan(self, asked: Collection[int], everything: Collection[int] = ()) -> None:
        """Say what will be needed; what has to be computed for it follows, back to what is in memory or to the input.

        Args:
            asked: values that others need, once for every time.
            everything: what must be computed in any case.
        """
        nodes = self.bound.program.nodes
        self._compute = set(everything)
        open_ = [] if everything else list(asked)
        while open_:
            at = open_.pop()
            if at not in self._compute and not self._recalled(at):
                self._compute.add(at)
                open_ += nodes[at].inputs
        self._reads.update(asked)
        self._reads.update(i for at in self._compute for i in nodes[at].inputs)

    def _recalled(self, at: int) -> bool:
        """Whether a value is in memory; then it is held here too, as memory may let it go."""
        if at not in self.held and self._keeping is not None and at in self._keeping.addresses:
            value = self._keeping.memory.get((self._keeping.addresses[at], self.number))
            if value is not None:
                self.held[at] = value
        return at in self.held

    def let_go(self, values: Iterable[int]) -> None:
        """One of those who needed each of these values needs it no more."""
        for i in values:
            self._reads[i] -= 1
            if self._reads[i] <= 0 and i not in self.bound.states:
                self.held.pop(i, None)

    def run(self, nodes: Sequence[int], wanted: Wanted) -> None:
        """Compute those of some nodes that are needed, in turn; what they are the last to need is let go.

        Raises:
            Stopped: it is not wanted any more.
        """
        since = time.perf_counter()
        for at in (at for at in nodes if at in self._compute):
            if not wanted():
                raise Stopped("repair")
            node = self.bound.program.nodes[at]
            value = self.held[at] = self.bound.value(node, self.held, iter([self._inputs.get(at)]))
            if self._keeping is not None and at in self._keeping.addresses:
                now = time.perf_counter()
                self._keeping.memory.put((self._keeping.addresses[at], self.number), value, now - since)
                since = now
            self.let_go([*node.inputs, *([] if self._reads[at] else [at])])


def in_parts(bound: Bound, images: Tensor, whole: bool, keeping: Keeping | None = None) -> list[Values]:
    """The images in parts, in order; in one where they must be run as a ``whole``."""
    # Of one size: some networks take a single image otherwise than several.
    parts = images.tensor_split(1 if whole else ceil(len(images) / PART))
    return [Values(bound, part, number, keeping) for number, part in enumerate(parts)]


def run_all(parts: Iterable[Values], nodes: Sequence[int], wanted: Wanted) -> None:
    """Compute some nodes on every part.

    Raises:
        Stopped: it is not wanted any more.
    """
    for part in parts:
        part.run(nodes, wanted)
