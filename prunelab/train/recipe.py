"""How to train: every setting of a fine-tuning in one value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from prunelab.errors import PruneLabError, unknown
from prunelab.preview import Score
from prunelab.train.augment import Augment

PRECISIONS = ("no", "bf16", "fp16")
Schedule = Callable[[float], float]
"""Takes the share of all steps that are done, 0 to 1; gives the factor of the learning rate for the next step."""


def cosine(warmup: float = 0.05) -> Schedule:
    """Half a cosine from one to zero (Loshchilov and Hutter 2017, arXiv 1608.03983, without restarts).

    Args:
        warmup: over this share of the steps the factor rises in a straight line instead (Goyal et al. 2017,
            arXiv 1706.02677, section 2.2).
    """

    def factor(done: float) -> float:
        if done < warmup:
            return done / warmup
        return (1 + math.cos(math.pi * (done - warmup) / ((1 - warmup) or 1.0))) / 2

    return factor


def constant(done: float) -> float:
    """The schedule that leaves the rate as it is: for a training that is one of several in a row."""
    return 1.0


@dataclass(frozen=True, eq=False)
class Recipe:
    """The settings of a fine-tuning.

    Attributes:
        epochs: passes over the training set.
        lr: highest learning rate: a tenth of what the network was trained with is a good start. An optimizer of your
            own keeps its own.
        batch_size: images of one step, over all processes together. A loader of your own keeps its own.
        weight_decay: of SGD.
        warmup: share of all steps in which the learning rate rises, before it falls along half a cosine.
        schedule: factor of the learning rate by the share of the steps done, instead of those two.
        optimizer: what makes one from the parameters, instead of SGD with Nesterov momentum 0.9; or one that holds
            the network's parameters, such as :func:`prunelab.carry` gives: it goes on with the momenta that it has,
            and has those of the last step afterwards.
        loss: takes outputs and labels, gives their mean loss.
        label_smoothing: of the default loss (Szegedy et al. 2016, arXiv 1512.00567, section 7).
        teacher: a network whose outputs are learned, usually the unpruned one (knowledge distillation, Hinton et al.
            2015, arXiv 1503.02531); it is not changed.
        temperature: softens both outputs where there is a teacher.
        teacher_weight: share of the teacher in the loss, 0 to 1; at 1 the labels are not looked at, nor needed.
        score: one number per validation image instead of 1 where it is classified right; takes outputs and labels.
        masks: weights to hold at zero, by parameter name: True where a weight stays.
        augment: what is done to training batches on the device.
        precision: ``"no"``, ``"bf16"`` or ``"fp16"``; None takes what the machine is made for. Accuracy is measured
            in the network's own.
        channels_last: memory layout of images and filters; None takes it where the network can.
        patience: epochs without a better accuracy before training ends early; None waits to the end.
        norm_images: how many training images the running statistics of batch norms are taken anew from at the end;
            they are kept where the accuracy is higher for it. 0 leaves the statistics of the training.
        keep: ``"best"`` leaves the network with the weights of its best epoch, ``"last"`` with those of the last.
        seed: of the order of the images and of all that is random in augmentation and network.
    """

    epochs: int = 5
    lr: float = 0.01
    batch_size: int = 128
    weight_decay: float = 5e-4
    warmup: float = 0.05
    schedule: Schedule | None = None
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | Optimizer | None = None
    loss: Callable[[Any, Tensor], Tensor] | None = None
    label_smoothing: float = 0.0
    teacher: nn.Module | None = None
    temperature: float = 2.0
    teacher_weight: float = 1.0
    score: Score | None = None
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    augment: Augment | None = None
    precision: str | None = None
    channels_last: bool | None = None
    patience: int | None = None
    norm_images: int = 2048
    keep: str = "best"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision is not None and self.precision not in PRECISIONS:
            raise unknown("precision", str(self.precision), PRECISIONS)
        if self.keep not in ("best", "last"):
            raise unknown("epoch to keep", self.keep, ("best", "last"))
        for name, least in {"epochs": 0, "batch_size": 1, "norm_images": 0}.items():
            if getattr(self, name) < least:
                what = name.replace("_", " ").replace("epochs", "number of epochs")
                raise PruneLabError(f"The {what} must be {least} or more, not {getattr(self, name)}.")
        for name in ("warmup", "label_smoothing", "teacher_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise PruneLabError(f"{name} is a share from 0 to 1, not {getattr(self, name)}.")
        if self.patience is not None and self.patience < 1:
            raise PruneLabError(f"The patience must be 1 epoch or more, not {self.patience}.")
        if not self.temperature > 0:
            raise PruneLabError(f"The temperature must be above 0, not {self.temperature}.")
        if self.loss is not None and self.label_smoothing:
            raise PruneLabError("Label smoothing belongs to the default loss: build it into the loss of your own.")

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Recipe:
        """A recipe from settings by name; ``masks=None`` is no masks.

        Raises:
            PruneLabError: there is no such setting.
        """
        known = [each.name for each in fields(Recipe)]
        for name in settings:
            if name not in known:
                raise unknown("setting", name, known)
        return Recipe(**{**settings, "masks": settings.get("masks") or {}})

    @staticmethod
    def chosen(recipe: Recipe | None, settings: Mapping[str, Any]) -> Recipe:
        """The recipe that was given, or that of settings by name.

        Raises:
            PruneLabError: both were given, or as :meth:`of`.
        """
        if recipe is not None and settings:
            raise PruneLabError(f"Give a recipe or settings, not both: {', '.join(settings)} belong into the recipe.")
        return recipe or Recipe.of(settings)

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by in a step (counted from 0) of so many."""
        # In the middle of the step: the first one has a rate above zero, and so has the last.
        return (self.schedule or cosine(self.warmup))((step + 0.5) / max(steps, 1))

    def optimizer_for(self, model: nn.Module) -> Optimizer:
        """The optimizer of a network's parameters that are not frozen.

        Raises:
            PruneLabError: all of them are frozen.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise PruneLabError("The network has no parameters to train: all of them are frozen.")
        if isinstance(self.optimizer, Optimizer):
            return self.optimizer
        if self.optimizer is not None:
            return self.optimizer(parameters)
        # Not fused: that mistakes a gradient whose strides are not its weight's, and fails where one comes later.
        return SGD(parameters, self.lr, momentum=0.9, weight_decay=self.weight_decay, nesterov=True, foreach=True)
