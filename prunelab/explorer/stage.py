"""What a lab remembers: networks between commits, and points that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from prunelab.preview import Preview
from prunelab.profile.capture import Profile
from prunelab.program.program import Program


@dataclass(frozen=True)
class Stage:
    """A network between two commits: as given, as committed, or as fine-tuned.

    Attributes:
        program: the traced network; ``profile`` what it does on the training set, once measured.
        preview: quick accuracy on the probe images.
        masks: weights held at zero, by parameter name.
        weights: digest of its weights: two networks of one structure are two.
    """

    program: Program
    profile: Profile | None
    preview: Preview
    masks: Mapping[str, Tensor]
    weights: str


@dataclass(frozen=True)
class Point:
    """A measured plan or network, for the picture of accuracy against FLOPs.

    Attributes:
        kind: ``dense``, ``plan``, ``commit`` or ``finetune``.
        precision: of the arithmetic that gave the accuracy.
        weights: as :class:`Stage` has them, of the network that the plan is for.
    """

    kind: str
    params: int
    nonzero: int
    flops: int
    accuracy: float
    low: float
    high: float
    n: int
    plan: str
    precision: str = "float32"
    weights: str = ""
