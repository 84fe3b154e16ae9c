"""What a lab remembers: networks between commits, and points that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor

from prunelab.plan import Plan
from prunelab.preview import Preview
from prunelab.profile.capture import Profile
from prunelab.program.program import Program
from prunelab.train.words import digest_of

# With the versions of the tensors that it is of.
_digests: WeakKeyDictionary[Program, tuple[tuple[int, ...], str]] = WeakKeyDictionary()


def weights_of(program: Program) -> str:
    """Digest of a network's weights as they are now: another one where they were trained in place meanwhile."""
    versions, known = program.versions(), _digests.get(program)
    if known is None or known[0] != versions:
        known = _digests[program] = versions, digest_of(program.model)
    return known[1]


@dataclass(frozen=True)
class Stage:
    """A network between two commits: as given, as committed, or as fine-tuned.

    Attributes:
        program: the traced network; ``profile`` what it does on the training set, once measured.
        preview: quick accuracy on the probe images.
        masks: weights held at zero, by parameter name.
    """

    program: Program
    profile: Profile | None
    preview: Preview
    masks: Mapping[str, Tensor]

    def key(self, plan: Plan) -> str:
        """Names a plan for this network as it is now: the :attr:`Point.key` of what was measured of it."""
        return weights_of(self.program) + plan.to_json()


@dataclass(frozen=True)
class Point:
    """A measured plan or network, for the picture of accuracy against FLOPs.

    Attributes:
        kind: ``dense``, ``plan``, ``commit`` or ``finetune``.
        precision: of the arithmetic that gave the accuracy.
        weights: digest of those that it was measured with.
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

    @property
    def key(self) -> str:
        """Names the plan and the network that it is for."""
        return self.weights + self.plan
