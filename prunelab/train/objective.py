"""What training makes small: the loss against labels, against a teacher, or between the two."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunelab.errors import PruneLabError
from prunelab.train.recipe import Recipe


def main_output(outputs: Any) -> Tensor:
    """The first tensor of what a network gives: with auxiliary classifiers the others follow it.

    Raises:
        PruneLabError: there is none.
    """
    found = next((leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)), None)
    if found is None:
        raise PruneLabError(
            f"The network gives a {type(outputs).__name__} without a tensor: there is nothing to train."
        )
    return found


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean divergence of softened outputs times T² (Hinton et al. 2015, arXiv 1503.02531, section 2).

    Args:
        student, teacher: outputs before the softmax, shape ``(images, classes)``.
        temperature: *T*, by which both are divided.
    """
    found, wanted = ((each.to(student.dtype) / temperature).log_softmax(1) for each in (student, teacher))
    return nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean") * temperature**2


class Objective:
    """The loss of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        # A copy: device, layout and training flags of the user's own network stay as they are.
        self.teacher = None if recipe.teacher is None else copy.deepcopy(recipe.teacher).eval().requires_grad_(False)

    @property
    def needs_labels(self) -> bool:
        """Whether the labels have a share in it."""
        return self.teacher is None or self.recipe.teacher_weight < 1

    @property
    def needs_classes(self) -> bool:
        """Whether labels must be numbers of the network's outputs."""
        return self.needs_labels and self.recipe.loss is None

    @torch.no_grad()
    def taught(self, inputs: tuple[Any, ...]) -> Tensor | None:
        """The teacher's outputs, shape ``(images, classes)``, or None where there is no teacher."""
        return None if self.teacher is None else main_output(self.teacher(*inputs))

    def __call__(self, outputs: Any, labels: Any, taught: Tensor | None) -> Tensor:
        """Mean loss of outputs.

        Args:
            outputs: the network's, usually of shape ``(images, classes)``.
            labels: one per image; not looked at where they have no share.
            taught: the teacher's outputs for the same images.
        """
        if taught is None:
            return self._labelled(outputs, labels)
        weight = self.recipe.teacher_weight
        against_teacher = divergence(main_output(outputs), taught, self.recipe.temperature)
        if not self.needs_labels:
            return against_teacher
        return weight * against_teacher + (1 - weight) * self._labelled(outputs, labels)

    def _labelled(self, outputs: Any, labels: Tensor) -> Tensor:
        if self.recipe.loss is not None:
            return self.recipe.loss(outputs, labels)
        smoothing = self.recipe.label_smoothing
        return nn.functional.cross_entropy(main_output(outputs), labels, label_smoothing=smoothing)
