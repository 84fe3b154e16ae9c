"""What a network's operators do not say, and its forward does: hints for finding its channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

Place = tuple[int, int]
"""One dimension of one value: node index, dimension."""


@dataclass(frozen=True)
class Hints:
    """Facts about the user's forward, each taken only where the proof holds with it.

    Attributes:
        axes: for reshapes that split a channel dimension, which part stays removable (heads, not the channels
            inside a head), by node index.
        ties: pairs of dimensions that forward makes equally long, because it reads the one's size for the other.
        attributes: numbers that modules keep and forward reads as a size, such as ``num_heads``, by module path
            and name, each with the dimension whose size it is.
        pins: classes that cannot be removed beyond what the rules find, by label, with the reason.
    """

    axes: Mapping[int, int] = field(default_factory=dict)
    ties: tuple[tuple[Place, Place], ...] = ()
    attributes: Mapping[tuple[str, str], Place] = field(default_factory=dict)
    pins: Mapping[int, str] = field(default_factory=dict)

    def plus(
        self,
        *,
        without_axes: frozenset[int] = frozenset(),
        ties: tuple[tuple[Place, Place], ...] = (),
        attributes: Mapping[tuple[str, str], Place] | None = None,
    ) -> Hints:
        """More ties and attributes, and fewer axes. Pins go: their labels are those of other classes now."""
        return Hints(
            axes={node: axis for node, axis in self.axes.items() if node not in without_axes},
            ties=(*self.ties, *(t for t in ties if t not in self.ties)),
            attributes={**(attributes or {}), **self.attributes},
        )

    def pinning(self, pins: Mapping[int, str]) -> Hints:
        """More pins."""
        return replace(self, pins={**pins, **self.pins})

    def among(self, alive: Sequence[bool]) -> Hints:
        """What still holds where some nodes are no longer there; without pins, whose labels change."""
        return Hints(
            axes=self.axes,
            ties=tuple((a, b) for a, b in self.ties if alive[a[0]] and alive[b[0]]),
            attributes={name: place for name, place in self.attributes.items() if alive[place[0]]},
        )
