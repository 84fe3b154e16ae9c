"""Times in a lab's history and in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prunelab.latency import Latency, Timing

if TYPE_CHECKING:
    import pandas as pd


def columns(found: Sequence[Latency | None]) -> pd.DataFrame:
    """A row for each: at every batch size the milliseconds per run, how many times as fast, and the bounds (95 %).

    ``timed_on`` says on what: device, threads and precision. Where nothing was timed there are no columns.
    """
    import pandas as pd

    return pd.DataFrame([_row(each) if each is not None else {} for each in found], index=range(len(found)))


def _row(found: Latency) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for timing in found.timings:
        at = f"batch_{timing.batch}"
        row |= {
            f"ms_{at}": 1e3 * timing.after,
            f"times_as_fast_{at}": timing.speedup,
            f"times_as_fast_{at}_low": timing.low,
            f"times_as_fast_{at}_high": timing.high,
        }
    return {**row, "timed_on": found.where}


def to_plain(found: Latency) -> dict[str, Any]:
    """As JSON can hold it."""
    return asdict(found)


def from_plain(plain: Mapping[str, Any]) -> Latency:
    """The reverse of :func:`to_plain`."""
    return Latency(**{**plain, "timings": tuple(Timing(**timing) for timing in plain["timings"])})
