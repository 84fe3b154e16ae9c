"""The embedded images and networks as the lessons use them: chosen on one half of the test set, judged on the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from prunelab import datasets, zoo
from prunelab.datasets import ImageSet
from prunelab.plan import Plan
from prunelab.preview import Estimate, Preview
from prunelab.profile.capture import Profile, profile
from prunelab.program.cache import Cache
from prunelab.program.cost import Cost
from prunelab.program.program import Program, cost, trace
from prunelab.repair import Repairer, sample_of

_MEMORY = 256 << 20
"""Bytes that a checker may keep between two answers: the notebook's own explorer needs the room more."""


def fashion_mnist() -> tuple[ImageSet, ImageSet, ImageSet]:
    """The embedded Fashion-MNIST in three parts: 10,000 images to train, 5,000 to choose and 5,000 to judge.

    The last two are the halves of the test set: the embedded networks were trained on all training images, so that
    these say nothing about how well a cut network does on new ones.
    """
    train, test = datasets.fashion_mnist()
    half = len(test) // 2
    val = replace(test, images=test.images[:half], labels=test.labels[:half], name=f"{test.name}, to choose")
    rest = replace(test, images=test.images[half:], labels=test.labels[half:], name=f"{test.name}, to judge")
    return train, val, rest


@dataclass(frozen=True, eq=False)
class Embedded:
    """A network of the zoo, and what plans do to it.

    Attributes:
        profile: over the 10,000 training images.
        preview: on the 5,000 images to judge.
        repairer: from training images.
    """

    program: Program
    profile: Profile
    preview: Preview
    repairer: Repairer

    @property
    def dense(self) -> Cost:
        """The network as it is."""
        return cost(self.program)

    def cost(self, plan: Plan) -> Cost:
        """What a plan leaves."""
        return cost(self.program, plan.resolve(self.program, self.profile))

    def accuracy(self, plan: Plan) -> Estimate:
        """What the network scores as the plan would commit it, repaired as the plan says."""
        selection = plan.resolve(self.program, self.profile)
        return self.preview.accuracy(selection, repaired=self.repairer(selection, plan.repair))


@lru_cache(maxsize=1)
def embedded(name: str) -> Embedded:
    """A network of the zoo with its checkpoint: ``"lenet"``, ``"vgg_small"`` or ``"resnet20"``.

    Raises:
        PruneLabError: there is no such checkpoint.
    """
    train, _, test = fashion_mnist()
    program = trace(zoo.load(name), test.images[:2])
    preview = Preview(program, test.images, test.labels, memory=Cache(_MEMORY))
    return Embedded(
        program, profile(program, train, progress=False), preview, Repairer(program, sample_of(train), _MEMORY)
    )
