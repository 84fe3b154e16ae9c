"""What the machine is taken to be good at."""

from __future__ import annotations

import pytest
import torch

from prunelab.machine import cpu_gains_from_bfloat16


@pytest.mark.parametrize(
    ("found", "gains"),
    [({"amx_bf16": True, "avx512_bf16": True}, True), ({"amx_bf16": False, "avx512_bf16": True}, False), ({}, False)],
)
def test_bfloat16_pays_with_matrix_instructions_alone(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, bool], gains: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert cpu_gains_from_bfloat16() is gains
