"""What the machine has: instructions of the processor, memory."""

from __future__ import annotations

from typing import Any

import psutil
import torch

GIB = 2**30


def cpu_gains_from_bfloat16() -> bool:
    """Whether the processor multiplies matrices of bfloat16 in its own instructions (AMX).

    Not those of vectors, AVX512-BF16: with them alone training took 1.4 times as long as in float32, for LeNet, a small
    VGG and ResNet-20 alike, and previews as long.
    """
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("amx_bf16", False))


def spare_memory() -> int:
    """Bytes that values may take without being in the way of others: a quarter of what is free, 1 to 3 GiB."""
    free: int = psutil.virtual_memory().available
    return min(max(free // 4, GIB), 3 * GIB)
