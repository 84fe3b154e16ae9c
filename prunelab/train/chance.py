"""Random numbers by place: those of an epoch or a step depend on the seed and its number alone.

So a training that goes on in another process draws what it would have drawn, and no checkpoint holds the state of a
generator.
"""

from __future__ import annotations

import random
from hashlib import blake2b

import numpy as np
import torch


def seed_of(*place: int | str) -> int:
    """A number below 2³² that belongs to a place, for example ``(seed, "epoch", 3)``."""
    return int.from_bytes(blake2b(repr(place).encode(), digest_size=4).digest(), "little")


def seed_all(*place: int | str) -> None:
    """Start every global generator (Python's, NumPy's, PyTorch's on CPU and GPUs) at the place's number."""
    seed = seed_of(*place)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # it is the state that users' data sets draw from
    # Not torch.manual_seed: on a machine without a GPU it remembers every call, with its traceback, for the day of one.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
