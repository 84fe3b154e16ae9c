"""Weight masks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunelab as pl
from prunelab.train.masks import Masks


def test_apply_zeroes_what_is_masked_and_nothing_else() -> None:
    model = nn.Linear(4, 3)
    before, mask = model.weight.detach().clone(), torch.rand(3, 4) > 0.5
    Masks(model, {"weight": mask}).apply()
    assert torch.equal(model.weight.detach(), before * mask)
    assert model.weight.requires_grad


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"wight": torch.ones(3, 4)}, "no parameter 'wight'; the nearest names are 'weight'"),
        ({"weight": torch.ones(4, 3)}, r"mask of weight has shape \(4, 3\), not \(3, 4\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(pl.PruneLabError, match=message):
        Masks(nn.Linear(4, 3), masks)
