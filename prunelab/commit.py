"""From a selection to a smaller, ordinary module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prunelab.errors import PruneLabError
from prunelab.program.program import Program
from prunelab.program.proof import refusal
from prunelab.program.record import remember
from prunelab.program.selection import Selection
from prunelab.program.surgery import cut
from prunelab.program.trace import state_tensors
from prunelab.repair import repair as repaired_by


def commit(
    program: Program,
    selection: Selection,
    *,
    repair: str | Mapping[str, Tensor] = "none",
    images: Tensor | None = None,
) -> nn.Module:
    """A new module of the user's own class without the selection's channels and units; the user's is not touched.

    Every attribute that describes a size (``out_channels``, ``num_features``, ``groups``, …) is right, single
    weights that the selection removes are zero, and training flags, hooks and ``requires_grad`` are those of
    the original. The module remembers what it kept, so that :func:`prunelab.load` can build it again.

    Args:
        repair: a correction of the surviving weights, one of :data:`prunelab.plan.REPAIRS`, or what a
            :class:`prunelab.repair.Repairer` has given for this selection.
        images: a sample of the training set for the repair, shape ``(images, …)``; a few hundred do.

    Raises:
        PruneLabError: a selection that does not fit the network, or a cut that the user's forward does not
        follow.
    """
    corrected = repaired_by(program, selection, repair, images) if isinstance(repair, str) else repair
    small = cut(program, selection)
    reason = refusal(program, selection)
    if reason:
        raise PruneLabError(f"This selection cannot be committed: {reason}.")
    held = state_tensors(small)
    with torch.no_grad():
        for name, tensor in corrected.items():
            held[name].copy_(tensor)
    remember(small, program, selection)
    return small
