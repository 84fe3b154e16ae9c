"""Where a training is: its finished epochs, its place in the one that runs, the best weights so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from prunelab.program.trace import state_tensors
from prunelab.train.words import digest_of


@dataclass(frozen=True)
class Epoch:
    """One epoch: mean training loss, validation accuracy (0 to 1), last learning rate, seconds."""

    epoch: int
    loss: float
    accuracy: float
    lr: float
    seconds: float


@dataclass
class Position:
    """How far a training is.

    Attributes:
        epoch: the one that runs, from 1; 0 before the first.
        step: steps of it that are done.
        seconds: what it has taken so far.
        seen: images of it that this process has been trained on.
        at_once: images that go through the network together; 0 stands for whole batches.
        waited: epochs since the best one.
        done: whether nothing is left to do.
        rows: epochs that are finished.
        notes: what was decided on the way, in words.
    """

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    seen: int = 0
    at_once: int = 0
    waited: int = 0
    done: bool = False
    rows: list[Epoch] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Best:
    """The best epoch's accuracy, and its weights and buffers by name."""

    accuracy: float
    tensors: Mapping[str, Tensor]

    @staticmethod
    def of(model: nn.Module, accuracy: float) -> Best:
        """What a network is now."""
        return Best(accuracy, {name: t.detach().clone() for name, t in state_tensors(model).items()})

    @cached_property
    def digest(self) -> str:
        """A name for the tensors."""
        return digest_of(self.tensors)
