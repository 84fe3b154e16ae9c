"""Five ways to cut a given ResNet-56 at equal MACs: accuracy as cut, repaired, and after a short fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from prunelab import zoo
from prunelab.commit import commit
from prunelab.criteria.result_oriented import variant
from prunelab.datasets import ImageSet
from prunelab.papers.evidence import Measure, measured
from prunelab.papers.experiments.five_methods_figure import draw
from prunelab.papers.experiments.sources import IMAGENET_MEAN, IMAGENET_STD, cifar10, resnet56
from prunelab.papers.reproduce import Reproduction, Task
from prunelab.plan import Plan, Setting
from prunelab.profile.capture import Profile, profile
from prunelab.program.program import Program, cost, trace
from prunelab.repair import SAMPLE
from prunelab.search import best_plan
from prunelab.train.augment import Augment
from prunelab.train.finetune import finetune

POINTS = (1.5, 2.0, 3.0, 4.0, 6.0)
"""Theoretical speedups."""

UNIFORM: Mapping[str, str] = MappingProxyType(
    {"mean activation": "mean_activation", "APoZ": "apoz", "L1": "l1", "random": "random"}
)
"""Methods that take the same ratio of every layer, and their criteria."""

PROPOSED = "result-oriented"
REPAIR = "least-squares"


def ablations() -> Mapping[str, str]:
    """The automatic decision with other scores, by method."""
    return {
        "α = 0": variant(0.0),
        "α = 1": variant(1.0),
        "R = 1": variant(correlated=False),
        "L1, automatic": "l1",
    }


@dataclass(frozen=True)
class Effort:
    """How much is done: of the reproduction, and of a short run.

    Attributes:
        profiled, trained, searched: training images of the profile and the fine-tuning, validation images of the
            decision; ``steps`` those of every step of it.
        ablated: points at which ablations are measured.
    """

    points: tuple[float, ...] = POINTS
    ablated: tuple[float, ...] = (2.0, 4.0)
    profiled: int = 10_000
    trained: int = 3_000
    searched: int = 1_000
    steps: int = 256


SHORT = Effort(points=(2.0,), ablated=(2.0,), profiled=64, trained=64, searched=32, steps=16)


@dataclass(frozen=True)
class Subject:
    """The network and what plans are made from.

    Attributes:
        layers: names of those that may be cut: the first convolution of every block, for all methods alike.
    """

    program: Program
    profile: Profile
    train: ImageSet
    val: ImageSet
    test: ImageSet
    layers: tuple[str, ...]
    effort: Effort


def run(task: Task) -> Iterator[Measure]:
    """Measure as cut and repaired at every point, then as fine-tuned."""
    found = subject(task)
    yield measured(found.program.model, found.test, point="dense", method="dense", stage="dense")
    repaired: dict[tuple[float, str], nn.Module] = {}
    for speedup in found.effort.points:
        for method, plan in plans(found, speedup, task):
            for stage, each in plan.items():
                small = committed(found, each, stage)
                # What does not depend on the seed is measured by the first one alone.
                if task.seed == 0 or method == "random":
                    yield measured(small, found.test, point=f"{speedup:g}×", method=method, stage=stage)
            if method not in ablations() or method == "L1, automatic":
                repaired[speedup, method] = small
    for (speedup, method), small in repaired.items():
        task.say(f"  training {method} at {speedup:g}×")
        trained(found, small, task)
        yield measured(small, found.test, point=f"{speedup:g}×", method=method, stage="trained")


def subject(task: Task) -> Subject:
    """The network, its profile, and the images for everything."""
    effort = SHORT if task.short else Effort()
    train, val, test = cifar10(task, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    model = zoo.resnet.ResNet(8).eval() if task.short else resnet56(task)
    program = trace(model, train.images[:2])
    inner = [layer.name for layer in program.layers if not layer.pinned and len(layer.producers) == 1]
    task.say(f"  profiling on {effort.profiled:,} training images")
    seen = profile(program, train.subset(effort.profiled), progress=False)
    return Subject(program, seen, train, val.subset(effort.searched), test, tuple(inner), effort)


# Plans ---------------------------------------------


def plans(found: Subject, speedup: float, task: Task) -> Iterator[tuple[str, Mapping[str, Plan]]]:
    """By method, the plans for both stages, all at the MACs that one ratio for all layers leaves nearest to the point.

    A plan of one ratio is the same for both. The automatic decision is made once for the network as cut and once for
    the network as repaired, with the repair in its loop.
    """
    even = uniform(found, speedup)
    for method, criterion in UNIFORM.items():
        plan = Plan(criterion, even.settings, seed=task.seed)
        yield method, {"cut": plan, "repaired": plan}
    others = ablations() if speedup in found.effort.ablated else {}
    for method, criterion in {PROPOSED: "result_oriented", **others}.items():
        task.say(f"  deciding for {method} at {speedup:g}×")
        yield (
            method,
            {"cut": decided(found, criterion, even, "none"), "repaired": decided(found, criterion, even, REPAIR)},
        )


def uniform(found: Subject, speedup: float) -> Plan:
    """One ratio for all layers, by bisection: the one whose MACs are nearest to those asked for."""
    wanted = cost(found.program).macs / speedup
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if macs(found, same_ratio(found, middle)) <= wanted else (middle, high)
    return min((same_ratio(found, ratio) for ratio in (low, high)), key=lambda plan: abs(macs(found, plan) - wanted))


def same_ratio(found: Subject, ratio: float) -> Plan:
    """The plan of one ratio; which channels go makes no difference to what it costs."""
    return Plan("l1", {name: Setting(ratio=ratio) for name in found.layers})


def macs(found: Subject, plan: Plan) -> int:
    """Multiplications of one image that a plan leaves."""
    return cost(found.program, plan.resolve(found.program, found.profile)).macs


def decided(found: Subject, criterion: str, even: Plan, repair: str) -> Plan:
    """The automatic decision, on validation images, at no more MACs than another plan."""
    return best_plan(
        found.program,
        found.profile,
        found.val.images,
        found.val.labels,
        flops=macs(found, even) / cost(found.program).macs,
        criterion=criterion,
        repair=repair,
        repair_images=None if repair == "none" else found.train.images[:SAMPLE],
        layers=found.layers,
        n=found.effort.steps,
        progress=False,
    ).plan


# Networks ---------------------------------------------


def committed(found: Subject, plan: Plan, stage: str) -> nn.Module:
    """The cut network, with its weights corrected where that is the stage."""
    selection = plan.resolve(found.program, found.profile)
    sample: dict[str, Any] = {"repair": REPAIR, "images": found.train.images[:SAMPLE]} if stage == "repaired" else {}
    return commit(found.program, selection, **sample)


def trained(found: Subject, small: nn.Module, task: Task) -> None:
    """A short fine-tuning in place, the unpruned network being the teacher; the same for every method."""
    finetune(
        small,
        found.train.subset(found.effort.trained),
        found.val,
        epochs=1,
        lr=0.01,
        teacher=found.program.model,
        augment=Augment(flip=True, crop=4),
        norm_images=0,
        seed=task.seed,
        keep="last",
        progress=False,
    )


REMARKS = """\
Only the first convolution of every block is cut, by all methods. Mean activation, APoZ, L1 and random take one ratio
of all layers; result-oriented and its ablations (α = 0: information alone, α = 1: importance alone, R = 1: importance
without correlation, L1: the same decision with L1 in place of the score) decide how much of each layer. The decision
is made on 1,000 images held out of the training set, which the given network was trained on like all training images:
once for the cut network, once with the repair in the loop for the repaired and trained one. The repair is least
squares on 1,000 training images. Training starts from the repaired network: one epoch over 3,000 training images with
flips and crops, learning rate 0.01, the unpruned network as teacher; of the ablations only L1 was trained. What does
not depend on a seed stands in the file of seed 0 alone, so that its rows have one seed."""

REPRODUCTIONS = (
    Reproduction(
        name="five-methods-resnet56",
        summary="Mean activation, APoZ, L1, random and result-oriented on a given ResNet-56, CIFAR-10, at equal MACs.",
        expected="50 min of one core for the first, 20 min for each other",
        run=run,
        shortened="Fine-tuning is one epoch over 3,000 of the 45,000 training images.",
        remarks=REMARKS,
        figure=draw,
    ),
)
