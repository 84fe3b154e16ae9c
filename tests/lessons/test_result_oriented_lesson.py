"""The exercise on carrying importance back: what passes, and what each mistake is told."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prunelab import lessons


def right(weight: Tensor, here: Tensor, there: Tensor, importance: Tensor) -> Tensor:
    together = np.nan_to_num(np.corrcoef(here.numpy().T, there.numpy().T))
    across = torch.from_numpy(together[here.shape[1] :, : here.shape[1]]).abs()
    joined = weight.abs().flatten(2).sum(2) if weight.dim() > 2 else weight.abs()
    found = (joined * across).T @ importance
    return found / found.sum()


def test_another_way_to_compute_it_passes() -> None:
    with np.errstate(all="ignore"):
        verdict = lessons.check("result-oriented", right)
    assert verdict, verdict.text


def signed(weight: Tensor, here: Tensor, there: Tensor, importance: Tensor) -> Tensor:
    across = torch.corrcoef(torch.cat([there, here], 1).T)[: there.shape[1], there.shape[1] :]
    found = (weight.abs().flatten(2).sum(2) * across).T @ importance
    return found / found.sum()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (signed, "Mind the sign of R"),
        (lambda w, h, t, s: right(w, h, t, s) * 2, "the sum is 2 and not 1"),
        (lambda w, h, t, s: right(w.sum((2, 3)), h, t, s), "summed over the kernel"),
        (lambda w, h, t, s: s, r"gave the shape \(3,\), and there are 8 channels"),
        (lambda w, h, t, s: torch.full((h.shape[1],), torch.nan), "not finite"),
        (lambda w, h, t, s: "much", "gave a str, not a tensor of numbers"),
        (lambda w, h: h, "Your function stopped with TypeError"),
        (3, "must be a function"),
    ],
)
def test_mistakes_are_named(answer: Any, said: str) -> None:
    verdict = lessons.check("result-oriented", answer)
    assert not verdict
    assert re.search(said, verdict.text), verdict.text
