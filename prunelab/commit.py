"""From a selection to a smaller, ordinary module."""

from __future__ import annotations

from torch import nn

from prunelab.errors import unknown
from prunelab.program.program import Program
from prunelab.program.selection import Selection
from prunelab.program.surgery import cut

REPAIRS = ("none",)


def commit(program: Program, selection: Selection, *, repair: str = "none") -> nn.Module:
    """A new module of the user's own class with the selection's channels gone; the user's own is not touched.

    Every attribute that describes a size (``out_channels``, ``num_features``, ``groups``, …) is right, single weights
    that the selection removes are zero, and training flags, hooks and ``requires_grad`` are those of the original.

    Args:
        repair: a correction of the surviving weights; ``none`` is the one there is.
    """
    if repair not in REPAIRS:
        raise unknown("repair", repair, REPAIRS)
    return cut(program, selection)
