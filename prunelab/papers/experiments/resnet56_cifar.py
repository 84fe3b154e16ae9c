"""Five ways to cut a given ResNet-56 at equal MACs: accuracy as cut, repaired, and after a short fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import nn

from prunelab import zoo
from prunelab.commit import commit
from prunelab.criteria.result_oriented import variant
from prunelab.datasets import ImageSet
from prunelab.papers.evidence import Measure, measured
from prunelab.papers.experiments.five_methods_figure import draw
from prunelab.papers.experiments.sources import IMAGENET_MEAN, IMAGENET_STD, cifar10, folder, resnet56
from prunelab.papers.reproduce import Reproduction, Task
from prunelab.plan import Plan, Setting
from prunelab.profile.capture import Profile, profile
from prunelab.program.program import Program, cost, trace
from prunelab.progress import Stopped
from prunelab.repair import SAMPLE
from prunelab.search import Step, best_plan
from prunelab.train.augment import Augment
from prunelab.train.finetune import finetune

POINTS = (1.5, 2.0, 2.85, 4.0, 6.0)
"""Theoretical speedups."""

UNIFORM: Mapping[str, str] = MappingProxyType(
    {"mean activation": "mean_activation", "APoZ": "apoz", "L1": "l1", "random": "random"}
)
"""Methods that take the same ratio of every layer, and their criteria."""

PROPOSED = "result-oriented"
AUTOMATIC = "L1, automatic"
TRAINED = (PROPOSED, *UNIFORM, AUTOMATIC)
"""Methods whose networks are fine-tuned; the other ablations are measured as cut and repaired."""

REPAIR = "least-squares"
Plans = Mapping[tuple[float, str], Plan]
"""Plans by point and stage."""


def ablations() -> Mapping[str, str]:
    """The automatic decision with other scores, by method."""
    return {
        "α = 0": variant(0.0),
        "α = 1": variant(1.0),
        "R = 1": variant(correlated=False),
        AUTOMATIC: "l1",
    }


@dataclass(frozen=True)
class Effort:
    """How much is done: of the reproduction, and of a short run.

    Attributes:
        profiled, trained, searched: training images of the profile and the fine-tuning, validation images of the
            decision.
    """

    points: tuple[float, ...] = POINTS
    profiled: int = 10_000
    trained: int = 3_000
    searched: int = 128


SHORT = Effort(points=(2.0,), profiled=64, trained=64, searched=16)


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
    """Measure as cut and repaired, method by method, then as fine-tuned."""
    found = subject(task)
    evens = {speedup: uniform(found, speedup) for speedup in found.effort.points}
    yield measured(found.program.model, found.test, point="dense", method="dense", stage="dense")
    repaired: dict[tuple[float, str], nn.Module] = {}
    for method, criterion in {PROPOSED: "result_oriented", **UNIFORM, **ablations()}.items():
        if method in UNIFORM:
            plans = same_for_both(evens, criterion, task.seed)
        else:
            plans = decisions(found, method, criterion, evens, task)
        for (speedup, stage), plan in plans.items():
            # What does not depend on the seed is measured by the first one alone.
            if task.seed > 0 and method != "random" and (stage == "cut" or method not in TRAINED):
                continue
            small = committed(found, plan, stage)
            if task.seed == 0 or method == "random":
                yield measured(small, found.test, point=f"{speedup:g}×", method=method, stage=stage)
            if stage == "repaired" and method in TRAINED:
                repaired[speedup, method] = small
    for speedup, method in sorted(repaired):
        trained(found, repaired[speedup, method], method, speedup, task)
        yield measured(repaired[speedup, method], found.test, point=f"{speedup:g}×", method=method, stage="trained")


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


def decisions(found: Subject, method: str, criterion: str, evens: Mapping[float, Plan], task: Task) -> Plans:
    """By point and stage, the plans of the automatic decision, never with more MACs than one ratio for all layers."""
    chosen: dict[tuple[float, str], Plan] = {}
    for stage, repair in (("cut", "none"), ("repaired", REPAIR)):
        task.say(f"  deciding for {method}, {stage}")
        steps = decided(found, criterion, min(macs(found, plan) for plan in evens.values()), repair)
        for speedup, even in evens.items():
            budget = macs(found, even)
            step = next(step for step in steps if macs(found, step.plan) <= budget)
            chosen[speedup, stage] = replace(step.plan, repair="none")
    return chosen


def decided(found: Subject, criterion: str, least: int, repair: str) -> tuple[Step, ...]:
    """The steps of the decision, on validation images, until so many MACs are left.

    One search gives the plans for all points: what it would exchange between layers at its end is left out.
    """
    steps: list[Step] = []
    with suppress(Stopped):
        best_plan(
            found.program,
            found.profile,
            found.val.images,
            found.val.labels,
            flops=least / cost(found.program).macs,
            criterion=criterion,
            repair=repair,
            repair_images=None if repair == "none" else found.train.images[:SAMPLE],
            layers=found.layers,
            n=len(found.val),
            progress=lambda *_: not steps or steps[-1].flops > 2 * least,
            on_step=steps.append,
        )
    return tuple(steps)


def same_for_both(evens: Mapping[float, Plan], criterion: str, seed: int) -> Plans:
    """By point and stage, one ratio for all layers with a criterion's scores."""
    made = {speedup: replace(plan, criterion=criterion, seed=seed) for speedup, plan in evens.items()}
    return {(speedup, stage): plan for speedup, plan in made.items() for stage in ("cut", "repaired")}


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


# Networks ---------------------------------------------


def committed(found: Subject, plan: Plan, stage: str) -> nn.Module:
    """The cut network, with its weights corrected where that is the stage."""
    selection = plan.resolve(found.program, found.profile)
    sample: dict[str, Any] = {"repair": REPAIR, "images": found.train.images[:SAMPLE]} if stage == "repaired" else {}
    return commit(found.program, selection, **sample)


def trained(found: Subject, small: nn.Module, method: str, speedup: float, task: Task) -> None:
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
        folder=folder(task, f"{method} {speedup:g}"),
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
