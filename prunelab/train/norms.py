"""Running statistics of batch norms, taken anew from training images once the weights have come to rest.

During training they trail behind the weights by some dozen steps, and see augmented images in few numbers. As the last
step of stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407, section 3.2), and as in EagleEye (Li et al.
2020, arXiv 2007.02491, section 3.4).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from prunelab.program.guard import eval_mode
from prunelab.train.data import Batch


def running(model: nn.Module) -> list[_NormBase]:
    """The norms that gather statistics while the network trains."""
    return [
        part
        for part in model.modules()
        if isinstance(part, _NormBase) and part.training and part.running_mean is not None
    ]


@torch.no_grad()
def take_anew(model: nn.Module, norms: list[_NormBase], batches: Iterable[Batch]) -> None:
    """Statistics become the mean over batches of their mean and variance (unbiased); all else is in evaluation mode."""
    momenta = [norm.momentum for norm in norms]
    with eval_mode(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.training = True
        try:
            for batch in batches:
                model(*batch.inputs)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def mean_over_processes(tensors: Iterable[torch.Tensor], accelerator: Any) -> None:
    """Every tensor becomes its mean over all processes."""
    for tensor in tensors:
        tensor.copy_(accelerator.reduce(tensor.clone(), "mean"))
