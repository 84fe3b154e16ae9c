"""Points of sensitivity scans on disk: one JSON file per network, images and way to measure, addressed by them."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from prunelab.files import replacing
from prunelab.preview import Estimate
from prunelab.profile.result import network_digest
from prunelab.profile.store import cache_folder, digest_tensor
from prunelab.program.program import Program

FORMAT = 1
"""Raised whenever the same cut of the same network would be measured otherwise."""

Numbers = tuple[float, float, float, float, float]
"""Accuracy, its lower and upper bound, change and half width of a point."""


def scan_file(
    program: Program, tensors: Iterable[Tensor | None], settings: tuple[Any, ...], cache: Path | str | bool
) -> Path | None:
    """Where the points of a network on these tensors lie, or None where nothing is kept.

    Args:
        settings: what else a point depends on, besides what is cut.
        cache: True for the cache folder, a path for that folder, False for none.
    """
    if cache is False:
        return None
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(f"{network_digest(program.base)}{settings}{FORMAT}".encode())
    for tensor in tensors:
        if tensor is None:
            hasher.update(b"none")
        else:
            digest_tensor(hasher, tensor)
    root = cache_folder() if cache is True else Path(cache)
    return root / "scans" / f"{hasher.hexdigest()}.json"


def numbers_of(found: Estimate) -> Numbers:
    """What is kept of an estimate."""
    return found.accuracy, found.low, found.high, found.change, found.half


def read_scan(file: Path | None) -> dict[str, Numbers]:
    """Points by the digest of what they cut; of a file that cannot be read none, with a warning."""
    if file is None or not file.exists():
        return {}
    try:
        raw = json.loads(file.read_text())
        if raw["format"] != FORMAT:
            return {}
        return {str(digest): _numbers(values) for digest, values in raw["points"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"The scan in {file} is damaged ({error}); it is measured again.", stacklevel=4)
        return {}


def _numbers(values: Any) -> Numbers:
    accuracy, low, high, change, half = map(float, values)
    if not all(map(math.isfinite, (accuracy, low, high, change, half))):
        raise ValueError("a point is not finite")
    return accuracy, low, high, change, half


def write_scan(file: Path, points: Mapping[str, Numbers]) -> bool:
    """Write all points beside their place, then rename; False, with a warning, where that cannot be done."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as beside:
            beside.write_text(json.dumps({"format": FORMAT, "points": points}))
    except OSError as error:
        warnings.warn(f"The scan is not kept in {file} ({error}); it goes on without a cache.", stacklevel=4)
        return False
    return True
