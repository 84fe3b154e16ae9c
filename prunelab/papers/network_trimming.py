"""Network Trimming: neurons that are zero for most inputs go, in rounds (Hu, Peng, Tai, Tang 2016, arXiv 1607.03250).

The Average Percentage of Zeros of channel c is the share of zeros of its output after the ReLU, over all images of a
validation set and all positions:

    APoZ_c = Σ_k Σ_j [O_c,j(k) = 0] / (N · M)        N images, M positions

In the paper: APoZ on validation images; a neuron goes where its APoZ lies more than one standard deviation above the
mean of its layer; trimming begins with a few layers of high mean APoZ and goes on to their neighbours; after every
trimming the network is trained again from the weights that survive, and this is repeated. Our reading: a tenth of the
first learning rate, at most half of a layer in a round, and the end, where a round would remove under 2 % of the
neurons that it looks at or costs more than half a point of accuracy after retraining (that round is not taken).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prunelab.commit import commit
from prunelab.criteria.registry import scores
from prunelab.errors import PruneLabError
from prunelab.papers.evidence import accuracy
from prunelab.plan import Plan, ratio_of_std
from prunelab.preview import labelled
from prunelab.profile.capture import Profile, profile
from prunelab.program.program import Program, cost, trace
from prunelab.train.finetune import finetune
from prunelab.train.recipe import Recipe


@dataclass(frozen=True)
class Round:
    """One trimming and the retraining after it.

    Attributes:
        plan: what was removed, of the network as it was before this round.
        apoz: mean APoZ of every layer before it, 0 to 1, by name.
        removed: neurons that went; ``widths``: those that are left, by layer.
        params, macs: of the network after it.
        before, after: accuracy on the validation images, after the cut and after retraining, 0 to 1.
        taken: whether the network was kept; the last round is not where retraining did not bring the accuracy back.
    """

    plan: Plan
    apoz: Mapping[str, float]
    removed: int
    widths: Mapping[str, int]
    params: int
    macs: int
    before: float
    after: float
    taken: bool


def network_trimming(model: nn.Module, train: Any, val: Any, **settings: Any) -> tuple[nn.Module, tuple[Round, ...]]:
    """Trim a trained network by APoZ and retrain it, round after round, to the end that the rules set.

    Args:
        settings: as for :func:`trimmings`.

    Returns:
        The last network that was kept, and all rounds. The given network is not changed.
    """
    small, rounds = model, []
    for found, network in trimmings(model, train, val, **settings):
        rounds.append(found)
        small = network if found.taken else small
    return (copy.deepcopy(model) if small is model else small), tuple(rounds)


def trimmings(
    model: nn.Module,
    train: Any,
    val: Any,
    *,
    first_lr: float = 0.1,
    std: float = 1.0,
    begin_with: int = 2,
    most: float = 0.5,
    least: float = 0.02,
    drop: float = 0.005,
    rounds: int = 20,
    layers: Sequence[str] | None = None,
    folder: Path | str | None = None,
    **settings: Any,
) -> Iterator[tuple[Round, nn.Module]]:
    """The rounds of :func:`network_trimming`, each with the network after it, as they are done.

    Args:
        train, val: as for :func:`prunelab.finetune`; APoZ is measured on ``val``.
        first_lr: what the network was trained with; it is retrained with a tenth.
        std: standard deviations above the mean of its layer at which a neuron goes.
        begin_with: layers in the first round, those of the highest mean APoZ; each round adds their neighbours.
        most: share of a layer that goes in one round at most.
        least: share of the neurons looked at below which a round is not worth it.
        drop: loss of accuracy after retraining, as a share, at which trimming ends.
        rounds: at most.
        layers: those that may be trimmed; all that can be unless given.
        folder: for checkpoints of the retrainings.
        settings: of the retraining, those of :class:`prunelab.Recipe`.

    Raises:
        PruneLabError: no layer can be trimmed, a layer that there is not, and all that finetune raises.
    """
    images, labels = labelled(val)
    base, now = accuracy(model, images, labels), model
    place = None if folder is None else Path(folder)
    recipe = Recipe.of({"lr": first_lr / 10, **settings})
    begun: list[str] = []
    for number in range(1, rounds + 1):
        program = trace(now, images[:2])
        zeros = profile(program, val, progress=False)
        if number == 1:
            chosen = _chosen(program, layers)
        # One that is down to a single neuron is no layer any more.
        names = [layer.name for layer in program.layers if layer.name in chosen]
        apoz = {name: mean_apoz(program, zeros, name) for name in names}
        begun = [name for name in begun if name in names]
        begun = begun or sorted(names, key=apoz.__getitem__, reverse=True)[:begin_with]
        plan = _next_plan(program, zeros, names, begun, number - 1, std, most, least)
        if plan is None:
            return
        selection = plan.resolve(program, zeros)
        small = commit(program, selection)
        before = accuracy(small, images, labels)
        finetune(small, train, val, recipe=recipe, folder=place and place / f"round-{number}", progress=False)
        after = accuracy(small, images, labels)
        found = cost(program, selection)
        widths = {name: len(selection.kept.get(name, range(program.layer(name).channels))) for name in names}
        removed = sum(program.layer(name).channels - width for name, width in widths.items())
        taken = after >= base - drop
        yield Round(plan, apoz, removed, widths, found.params, found.macs, before, after, taken), small
        if not taken:
            return
        now = small


def _chosen(program: Program, layers: Sequence[str] | None) -> list[str]:
    """Names of the layers that may be trimmed.

    Raises:
        PruneLabError: there is none, or not one of the given ones.
    """
    asked = program.layers if layers is None else [program.layer(name) for name in layers]
    names = [layer.name for layer in asked if not layer.pinned]
    if not names:
        raise PruneLabError("Network Trimming has no layer to trim: all that it may look at are pinned.")
    return names


def mean_apoz(program: Program, zeros: Profile, name: str) -> float:
    """Mean APoZ of a layer's neurons, 0 to 1."""
    return -float(scores(program, zeros, "apoz", program.layer(name)).mean())


def _next_plan(
    program: Program,
    zeros: Profile,
    names: Sequence[str],
    begun: Sequence[str],
    reach: int,
    std: float,
    most: float,
    least: float,
) -> Plan | None:
    """What the next round removes from the layers within reach of the first ones; looks further where that is little.

    Returns:
        None where all layers together have less to remove than a round is worth.
    """
    places = [names.index(name) for name in begun]
    for further in range(reach, len(names) + reach):
        near = [name for k, name in enumerate(names) if min(abs(k - place) for place in places) <= further]
        plan, gone = Plan("apoz"), 0
        for name in near:
            score = scores(program, zeros, "apoz", program.layer(name))
            ratio = min(ratio_of_std(score, std), most)
            plan, gone = plan.set(name, ratio=ratio), gone + int(ratio * score.size + 1e-9)
        if gone and gone >= least * sum(program.layer(name).channels for name in near):
            return plan
    return None


def to_widths(program: Program, widths: Mapping[str, int]) -> Plan:
    """The plan that leaves so many neurons of each layer, those of the lowest APoZ.

    Raises:
        PruneLabError: a width that the layer does not have.
    """
    plan = Plan("apoz")
    for name, width in widths.items():
        channels = program.layer(name).channels
        if not 1 <= width <= channels:
            raise PruneLabError(f"Layer {name!r} has {channels} channels: it cannot be left with {width}.")
        plan = plan.set(name, ratio=(channels - width) / channels)
    return plan
