"""What the processor is made for."""

from __future__ import annotations

from typing import Any

import torch


def cpu_gains_from_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in its own instructions (AVX512-BF16 or AMX)."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16", False) or found.get("amx_bf16", False))
