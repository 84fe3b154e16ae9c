"""What the machine has: instructions of the processor, memory."""

from __future__ import annotations

from typing import Any

import psutil
import torch

GIB = 2**30


def cpu_gains_from_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in its own instructions (AVX512-BF16 or AMX)."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16", False) or found.get("amx_bf16", False))


def spare_memory() -> int:
    """Bytes that values may take without being in the way of others: a quarter of what is free, 1 to 3 GiB."""
    free: int = psutil.virtual_memory().available
    return min(max(free // 4, GIB), 3 * GIB)
