"""Five ways to cut a given ResNet-56 at equal MACs: accuracy as cut, repaired, and after a short fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
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
from prunelab.preview import Preview
from prunelab.profile.capture import Profile, profile
from prunelab.program.program import Program, cost, trace
from prunelab.progress import Stopped
from prunelab.repair import SAMPLE, Repairer
from prunelab.search import Step, best_plan
from prunelab.search.meter import Meter
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
AUTOMATIC_SCORE = "the best"
Plans = Mapping[tuple[float, str], Plan]
"""Plans by point and stage."""


SCORES: Mapping[str, str] = MappingProxyType(
    {
        "full": "result_oriented",
        "mean, R = 1": variant(information="mean", correlated=False),
        "α = 0": variant(0.0),
        "α = 1": variant(1.0),
        "R = 1": variant(correlated=False),
    }
)
"""Scores, of which the proposed method takes the one with the best result on the validation images."""

ABLATIONS = ("α = 0", "α = 1", "R = 1")
"""Scores that are shown by themselves too, each with ratios decided for it alone."""


@dataclass(frozen=True)
class Effort:
    """How much is done: of the reproduction, and of a short run.

    Attributes:
        profiled, trained: training images of the profile and the fine-tuning.
        searched, judged: validation images of the search's steps, and of the choice between its plans.
    """

    points: tuple[float, ...] = POINTS
    profiled: int = 10_000
    trained: int = 3_000
    searched: int = 128
    judged: int = 1_000


SHORT = Effort(points=(2.0,), profiled=64, trained=64, searched=16, judged=32)


@dataclass(frozen=True)
class Subject:
    """The network and what plans are made from.

    Attributes:
        layers: names of those that may be cut: the first convolution of every block, for all methods alike.
        meters: by stage, the loss that a selection causes on the validation images, repaired where that is the stage.
    """

    program: Program
    profile: Profile
    train: ImageSet
    val: ImageSet
    test: ImageSet
    layers: tuple[str, ...]
    effort: Effort
    meters: Mapping[str, Meter]


def run(task: Task) -> Iterator[Measure]:
    """Measure as cut and repaired, method by method, then as fine-tuned."""
    found = subject(task)
    evens = {speedup: uniform(found, speedup) for speedup in found.effort.points}
    yield measured(found.program.model, found.test, point="dense", method="dense", stage="dense")
    known: dict[tuple[str, str], Measure] = {}
    repaired: dict[tuple[float, str], nn.Module] = {}
    for method, plans in methods(found, evens, task):
        for (speedup, stage), plan in plans.items():
            # What does not depend on the seed is measured by the first one alone.
            new = task.seed == 0 or method == "random"
            if not new and (stage == "cut" or method not in TRAINED):
                continue
            small = committed(found, plan, stage)
            if new:
                same = stage, plan.resolve(found.program, found.profile).digest
                point = f"{speedup:g}×"
                if same not in known:
                    known[same] = measured(small, found.test, point=point, method=method, stage=stage)
                yield replace(known[same], point=point, method=method)
            if stage == "repaired" and method in TRAINED:
                repaired[speedup, method] = small
    for speedup, method in sorted(repaired):
        trained(found, repaired[speedup, method], method, speedup, task)
        yield measured(repaired[speedup, method], found.test, point=f"{speedup:g}×", method=method, stage="trained")


def methods(found: Subject, evens: Mapping[float, Plan], task: Task) -> Iterator[tuple[str, Plans]]:
    """Every method with its plans."""
    for method, criterion in UNIFORM.items():
        yield method, same_for_both(evens, criterion, task.seed)
    yield AUTOMATIC, decisions(found, "l1", {"": "l1"}, evens, task)[AUTOMATIC_SCORE]
    chosen = decisions(found, "result_oriented", SCORES, evens, task)
    yield PROPOSED, chosen[AUTOMATIC_SCORE]
    for score in ABLATIONS:
        # As cut, the three are told apart by the choice on the validation images alone.
        yield score, {at: plan for at, plan in chosen[score].items() if at[1] == "repaired"}


def subject(task: Task) -> Subject:
    """The network, its profile, and the images for everything."""
    effort = SHORT if task.short else Effort()
    train, val, test = cifar10(task, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    model = zoo.resnet.ResNet(8).eval() if task.short else resnet56(task)
    program = trace(model, train.images[:2])
    inner = [layer.name for layer in program.layers if not layer.pinned and len(layer.producers) == 1]
    task.say(f"  profiling on {effort.profiled:,} training images")
    seen = profile(program, train.subset(effort.profiled), progress=False)
    judges = val.subset(effort.judged)
    preview, repairer = Preview(program, judges.images, judges.labels), Repairer(program, train.images[:SAMPLE])
    meters = {
        stage: Meter(preview, repairer, repair, n=len(judges), quick=False, masks={}, precision="auto", file=None)
        for stage, repair in (("cut", "none"), ("repaired", REPAIR))
    }
    return Subject(program, seen, train, judges, test, tuple(inner), effort, meters)


# Plans ---------------------------------------------


def decisions(
    found: Subject, led_by: str, scores: Mapping[str, str], evens: Mapping[float, Plan], task: Task
) -> Mapping[str, Plans]:
    """Plans of the automatic decision, never with more MACs than one ratio for all layers.

    One search, led by one score, gives ratios for all points; at each point they and one ratio for all layers are tried
    with every score, and what loses least on the validation images is chosen: for each score, and among all of them.

    Returns:
        By score, and under :data:`AUTOMATIC_SCORE` the best of all, plans by point and stage.
    """
    chosen: dict[str, dict[tuple[float, str], Plan]] = {name: {} for name in (AUTOMATIC_SCORE, *scores)}
    least = min(macs(found, plan) for plan in evens.values())
    for stage, repair in (("cut", "none"), ("repaired", REPAIR)):
        task.say(f"  deciding by {led_by}, {stage}")
        steps = decided(found, led_by, least, repair)
        for speedup, even in evens.items():
            budget = macs(found, even)
            step = next(step for step in steps if macs(found, step.plan) <= budget)
            tried = {
                name: [replace(plan, criterion=score, repair="none") for plan in (step.plan, even)]
                for name, score in scores.items()
            }
            loss = partial(loss_of, found, stage)
            for name, plans in tried.items():
                chosen[name][speedup, stage] = min(plans, key=loss)
            best = min((chosen[name][speedup, stage] for name in scores), key=loss)
            chosen[AUTOMATIC_SCORE][speedup, stage] = best
            task.say(f"    {speedup:g}×: {best.criterion}, one ratio: {best.settings == even.settings}")
    return chosen


def loss_of(found: Subject, stage: str, plan: Plan) -> float:
    """Divergence of the cut network's classes from the uncut one's on the validation images."""
    return found.meters[stage](plan.resolve(found.program, found.profile)).loss


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
            n=found.effort.searched,
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
of all layers. Result-oriented decides by itself, on 1,000 images held out of the training set (which the given network
was trained on like all training images): one search, led by its score, gives a ratio to every layer; these ratios and
one ratio for all layers are tried with each of five scores (the full one; mean activation as information and R = 1;
α = 0: information alone; α = 1: importance alone; R = 1: importance without correlation), and what diverges least from
the unpruned network is taken, once for the cut network, once with the repair in the loop for the repaired and trained
one. The ablations take one score alone. "L1, automatic" is the same decision with L1 as its only score. The repair is
least squares on 1,000 training images. Training starts from the repaired network: one epoch over 3,000 training images
with flips and crops, learning rate 0.01, the unpruned network as teacher; of the ablations only L1 was trained. What
does not depend on a seed stands in the file of seed 0 alone, so that its rows have one seed."""

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
