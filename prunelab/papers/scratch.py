"""The control of every pruning: the same widths with new weights (Liu et al. 2019, arXiv 1810.05270)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from prunelab.errors import PruneLabError
from prunelab.train.finetune import finetune


def default_weights(model: nn.Module) -> None:
    """Give every module the weights that PyTorch gives a new one.

    Raises:
        PruneLabError: a module holds parameters of its own, such as a class token, and has no way to reset them.
    """
    for part in model.modules():
        reset = getattr(part, "reset_parameters", None)
        if reset is not None:
            reset()
    # Attention and transformers of PyTorch's: what they set of their parts comes after those have.
    for name, part in reversed(list(model.named_modules())):
        late = getattr(part, "_reset_parameters", None)
        own = next((key for key, _ in part.named_parameters(recurse=False)), None)
        if late is not None:
            late()
        elif own is not None and not hasattr(part, "reset_parameters"):
            raise PruneLabError(
                f"{name or 'The network'} holds the parameter {own!r}, which would stay as it was trained: give "
                f"{type(part).__name__} a method reset_parameters, or pass weights= of your own."
            )


def he_weights(model: nn.Module) -> None:
    """The same, and convolutions as He et al. 2015, arXiv 1502.01852, without biases: for deep networks."""
    default_weights(model)
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def from_scratch(
    small: nn.Module,
    train: Any,
    val: Any,
    *,
    weights: Callable[[nn.Module], None] = default_weights,
    folder: Path | None = None,
    **settings: Any,
) -> nn.Module:
    """A network of the same widths with new weights, trained; the given one is not changed.

    Args:
        weights: gives a network its new weights, from PyTorch's random numbers.
        settings: those of :class:`prunelab.Recipe`.
    """
    fresh = copy.deepcopy(small)
    weights(fresh)
    finetune(fresh, train, val, folder=folder, progress=False, **settings)
    return fresh
