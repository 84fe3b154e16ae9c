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
from prunelab.papers.mean_activation import inner_layers
from prunelab.papers.reproduce import Reproduction, Task
from prunelab.plan import Plan, Setting
from prunelab.preview import Preview
from prunelab.profile.capture import Profile, profile
from prunelab.program.program import Program, cost, trace
from prunelab.progress import Stopped
from prunelab.repair import SAMPLE, Repairer
from prunelab.search import Step, best_plan
from prunelab.search.meter import Meter, quickly
from prunelab.search.shares import RATIOS, Curve, Ratios, fitted, one_price
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

CHOSEN = {"cut": variant(0.5), "repaired": variant(1.0, correlated=False)}
"""The score of the proposed method by stage, as chosen on validation images."""

REPAIR = "least-squares"
Plans = Mapping[tuple[float, str], Plan]
"""Plans by point and stage."""


def ablations() -> Mapping[str, Mapping[str, str]]:
    """The decision with other choices of the score, by method and stage."""
    return {
        "α = 0": {"cut": variant(0.0), "repaired": variant(0.0)},
        "α = ½": {"repaired": variant(0.5, correlated=False)},
        "α = 1": {"cut": variant(1.0)},
        "R measured": {"repaired": variant(1.0)},
        "R = 1": {"cut": variant(0.5, correlated=False)},
    }


@dataclass(frozen=True)
class Effort:
    """How much is done: of the reproduction, and of a short run.

    Attributes:
        profiled, trained: training images of the profile and of the fine-tuning.
        searched, scanned: validation images of the decisions, as cut and as repaired.
    """

    points: tuple[float, ...] = POINTS
    profiled: int = 10_000
    trained: int = 6_000
    searched: int = 128
    scanned: int = 300


SHORT = Effort(points=(2.0,), profiled=64, trained=64, searched=16, scanned=16)


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
    """The five methods as cut and repaired, then as fine-tuned; the ablations at the end."""
    found = subject(task)
    evens = {speedup: uniform(found, speedup) for speedup in found.effort.points}
    yield measured(found.program.model, found.test, point="dense", method="dense", stage="dense")
    for methods in ((PROPOSED, *UNIFORM), (AUTOMATIC,), tuple(ablations())):
        repaired: dict[tuple[float, str], nn.Module] = {}
        for method in methods:
            for (speedup, stage), plan in plans_of(found, method, evens, task).items():
                small = committed(found, plan, stage)
                if depends_on(task.seed, method):
                    yield measured(small, found.test, point=f"{speedup:g}×", method=method, stage=stage)
                if stage == "repaired" and method in TRAINED:
                    repaired[speedup, method] = small
        for speedup, method in sorted(repaired):
            small = trained(found, repaired[speedup, method], method, speedup, task)
            yield measured(small, found.test, point=f"{speedup:g}×", method=method, stage="trained")


def depends_on(seed: int, method: str) -> bool:
    """Whether networks as cut and repaired are measured: but for random's, the first seed's stand for all."""
    return seed == 0 or method == "random"


def subject(task: Task) -> Subject:
    """The network, its profile, and the images for everything."""
    effort = SHORT if task.short else Effort()
    train, val, test = cifar10(task, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    model = zoo.resnet.ResNet(8).eval() if task.short else resnet56(task)
    program = trace(model, train.images[:2])
    task.say(f"  profiling on {effort.profiled:,} training images")
    seen = profile(program, train.subset(effort.profiled), progress=False)
    return Subject(
        program,
        seen,
        train,
        val.subset(max(effort.searched, effort.scanned)),
        test,
        tuple(inner_layers(program)),
        effort,
    )


# Plans ---------------------------------------------


def plans_of(found: Subject, method: str, evens: Mapping[float, Plan], task: Task) -> Plans:
    """By point and stage, the plans of a method, none with more MACs than one ratio for all layers leaves."""
    # Later seeds only train what the first one has measured as repaired.
    stages = ("cut", "repaired") if depends_on(task.seed, method) else ("repaired",) if method in TRAINED else ()
    if not stages:
        return {}
    if method in UNIFORM:
        made = {speedup: replace(plan, criterion=UNIFORM[method], seed=task.seed) for speedup, plan in evens.items()}
        return {(speedup, stage): plan for speedup, plan in made.items() for stage in stages}
    criteria = {PROPOSED: CHOSEN, AUTOMATIC: {"cut": "l1", "repaired": "l1"}, **ablations()}[method]
    budgets = {speedup: macs(found, even) for speedup, even in evens.items()}
    task.say(f"  deciding for {method}")
    plans: dict[tuple[float, str], Plan] = {}
    if "cut" in criteria and "cut" in stages:
        steps = decided(found, criteria["cut"], min(budgets.values()))
        for speedup, budget in budgets.items():
            step = next(step for step in steps if macs(found, step.plan) <= budget)
            plans[speedup, "cut"] = step.plan
    if "repaired" in criteria:
        curves = scan(found, criteria["repaired"])
        for speedup, budget in budgets.items():
            plans[speedup, "repaired"] = priced(found, criteria["repaired"], curves, budget)
    return plans


def decided(found: Subject, criterion: str, least: int) -> tuple[Step, ...]:
    """The steps of the automatic decision for the network as cut, on validation images, until so many MACs are left.

    One search gives the plans for all points: what it would exchange between layers at its end is left out.
    """
    steps: list[Step] = []
    with suppress(Stopped):
        best_plan(
            found.program,
            found.profile,
            found.val.images[: found.effort.searched],
            found.val.labels[: found.effort.searched],
            flops=least / cost(found.program).macs,
            criterion=criterion,
            layers=found.layers,
            n=found.effort.searched,
            progress=lambda *_: not steps or steps[-1].flops > 2 * least,
            on_step=steps.append,
        )
    return tuple(steps)


def scan(found: Subject, criterion: str) -> Mapping[str, Curve]:
    """What every layer alone costs the repaired network, on validation images."""
    n, whole = found.effort.scanned, cost(found.program).macs
    repairer = Repairer(found.program, found.train.images[:SAMPLE])
    meter = Meter(
        Preview(found.program, found.val.images[:n], found.val.labels[:n]),
        lambda cut: quickly(repairer, cut, REPAIR),
        n=n,
        masks={},
        precision="auto",
        file=None,
    )
    curves = {}
    for name in found.layers:
        plans = [Plan(criterion).set(name, ratio=ratio) for ratio in RATIOS]
        losses = [meter(plan.resolve(found.program, found.profile)).loss for plan in plans]
        curves[name] = fitted(losses, (whole - macs(found, plans[1])) / RATIOS[1])
    return curves


def priced(found: Subject, criterion: str, curves: Mapping[str, Curve], most: int) -> Plan:
    """One price for all layers, such that at most so many MACs are left."""
    return plan_of(criterion, one_price(curves, lambda ratios: macs(found, plan_of(criterion, ratios)) <= most))


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
    return plan_of("l1", dict.fromkeys(found.layers, ratio))


def plan_of(criterion: str, ratios: Ratios) -> Plan:
    """A ratio for every layer."""
    return Plan(criterion, {name: Setting(ratio=ratio) for name, ratio in ratios.items()})


def macs(found: Subject, plan: Plan) -> int:
    """Multiplications of one image that a plan leaves."""
    return cost(found.program, plan.resolve(found.program, found.profile)).macs


# Networks ---------------------------------------------


def committed(found: Subject, plan: Plan, stage: str) -> nn.Module:
    """The cut network, with its weights corrected where that is the stage."""
    selection = plan.resolve(found.program, found.profile)
    sample: dict[str, Any] = {"repair": REPAIR, "images": found.train.images[:SAMPLE]} if stage == "repaired" else {}
    return commit(found.program, selection, **sample)


def trained(found: Subject, small: nn.Module, method: str, speedup: float, task: Task) -> nn.Module:
    """The network after a short fine-tuning, the unpruned network being the teacher; the same for every method."""
    finetune(
        small,
        found.train.subset(found.effort.trained),
        found.val,
        epochs=1,
        lr=0.003,
        teacher=found.program.model,
        augment=Augment(flip=True, crop=4),
        norm_images=0,
        folder=folder(task, f"{method} {speedup:g}"),
        seed=task.seed,
        keep="last",
        progress=False,
    )
    return small


REMARKS = """\
Only the first convolution of every block is cut, by all methods alike. Mean activation, APoZ, L1 and random take one
ratio of all layers. Result-oriented and its ablations decide how much of each layer goes, on images held out of the
training set (which the given network was trained on, like all training images), never with more MACs than the one
ratio leaves. As cut, they take the steps of `best_plan` without its exchanges, each measured on 128 images. Repaired,
they take a scan of one layer at a time on 300 images, and one price for all layers, with which `best_plan` begins too
(`search/shares.py`). The score is led by the result as well: α = ½ with measured correlation as cut, α = 1 without
(R = 1) repaired, chosen on validation images after some thirty scores and three ways of deciding had been looked at
there. So in the repaired networks neither information nor correlation has a part: what is left is importance carried
back along the weights, and the decision. The ablations show the other choices, one at a time, and L1 in place of the
score. The repair is least squares on 1,000 training images. Training starts from the repaired network: one epoch over
6,000 training images with flips and crops, learning rate 0.003, the unpruned network as teacher; rate and number were
chosen on 2,000 validation images at 2× (of 0.001, 0.003 and 0.01 on 3,000 and 6,000). Batch norms see statistics of
batches in training that a repair has not been solved for, and so short a training costs accuracy where the cut is
small. Of the ablations only L1 was trained. What does not depend on a seed is measured by seed 0 alone, so that its
rows have one seed."""

REPRODUCTIONS = (
    Reproduction(
        name="five-methods-resnet56",
        summary="Mean activation, APoZ, L1, random and result-oriented on a given ResNet-56, CIFAR-10, at equal MACs.",
        expected="45 min of one core for the first, 20 min for each other",
        run=run,
        shortened="Fine-tuning is one epoch over 6,000 of the 45,000 training images.",
        remarks=REMARKS,
        figure=draw,
    ),
)
