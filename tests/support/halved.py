"""Committed networks with something to say, for tests of what becomes of them."""

from __future__ import annotations

from typing import Any

import torch
from support import Network, half_of_everything
from torch import Tensor, nn

import prunelab as pl


def committed(network: Network, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """Half of the network, its head not zero as some are made, and images for it."""
    model, images = network.build(dtype), network.images(3, dtype)
    with torch.no_grad():
        for head in model.modules():
            if isinstance(head, nn.Linear) and not head.weight.any():
                nn.init.normal_(head.weight)
    program = pl.trace(model, images)
    return pl.commit(program, half_of_everything(program)), images


def said(model: nn.Module, *arguments: Any) -> Tensor:
    """Logits, not all zero."""
    with torch.no_grad():
        logits: Tensor = model(*arguments)
    assert logits.abs().max() > 0
    return logits
