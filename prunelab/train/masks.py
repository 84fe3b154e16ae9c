"""Weight masks that hold while weights move."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prunelab.errors import PruneLabError, unknown


class Masks:
    """Keeps masked weights at zero after every step, whatever momentum and weight decay make of them."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Args:
            masks: by parameter name, True where a weight stays; shapes are the parameters' own.

        Raises:
            PruneLabError: a name or shape that the model does not have.
        """
        parameters = dict(model.named_parameters())
        self._pairs: list[tuple[Tensor, Tensor]] = []
        for name, mask in masks.items():
            if name not in parameters:
                raise unknown("parameter", name, parameters)
            if parameters[name].shape != mask.shape:
                raise PruneLabError(
                    f"The mask of {name} has shape {tuple(mask.shape)}, not {tuple(parameters[name].shape)}."
                )
            self._pairs.append((parameters[name], mask.to(parameters[name].device)))

    @torch.no_grad()
    def apply(self) -> None:
        """Zero what is masked."""
        for parameter, mask in self._pairs:
            parameter.mul_(mask)
