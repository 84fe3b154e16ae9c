"""What a criterion needs to know of a network, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunelab.criteria.registry import get
from prunelab.errors import PruneLabError
from prunelab.profile.capture import Profile, profile
from prunelab.profile.gradients import with_gradients
from prunelab.program.program import Program
from prunelab.progress import Progress


def profile_for(
    program: Program,
    data: Any,
    criterion: str,
    *,
    known: Profile | None = None,
    cache: Path | str | bool = True,
    progress: Progress | bool = True,
) -> Profile | None:
    """A profile with all that a criterion needs; None where it needs none.

    Args:
        data: as for :func:`prunelab.profile`; with labels where the criterion needs gradients.
        known: what is known already; it comes back, with what it lacked.

    Raises:
        PruneLabError: there is no such criterion, or what it needs cannot be had.
        Stopped: the progress function returned False; what is done is kept in the cache.
    """
    chosen = get(criterion)
    if chosen.parts and known is None:
        known = profile(program, data, cache=cache, progress=progress)
    if "gradients" in chosen.parts and known is not None and not known.gradients:
        known = with_gradients(known, data, cache=cache, progress=progress)
    missing = chosen.missing(known)
    if missing:
        raise PruneLabError(missing)
    return known
