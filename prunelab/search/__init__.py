"""Automatic plans: the most accurate one within a budget of FLOPs or parameters, or the smallest within a loss.

Layers are cut one step after the other, always the one that adds least loss per size removed (:func:`moves.path`).
With a repair by least squares, which takes longer than a step may, norms get new statistics in its place; and for a
budget every layer is scanned alone, and all are cut together by one ratio, by one price, or between the two
(:func:`shares.priced_path`): what is better once it is repaired is taken.
Then what turns out too much in one layer is exchanged for more in another (:func:`moves.exchanged`). Loss is how far
the cut network's classes are from the uncut one's (:func:`meter.divergence`), measured on the whole network with
everything cut that is cut by then, and repaired if a repair is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from prunelab.machine import GIB
from prunelab.plan import Plan
from prunelab.preview import Precision
from prunelab.profile.capture import Profile
from prunelab.program.program import Program
from prunelab.progress import Progress, Stopped, track
from prunelab.search.result import Best as Best, Step as Step, Tried as Tried, Wish as Wish
from prunelab.search.run import Search
from prunelab.search.space import space_of

_WHAT = "best plan"


def best_plan(
    program: Program,
    profile: Profile | None,
    images: Tensor,
    labels: Tensor,
    *,
    flops: float | None = None,
    params: float | None = None,
    drop: float | None = None,
    certain: bool = True,
    criterion: str = "l1",
    seed: int = 0,
    combine: str = "mean",
    repair: str = "none",
    repair_images: Tensor | None = None,
    start: Plan | None = None,
    layers: Sequence[str] | None = None,
    limits: Mapping[str, float] = MappingProxyType({}),
    masks: Mapping[str, Tensor] = MappingProxyType({}),
    n: int = 256,
    n_found: int | None = None,
    precision: Precision = "auto",
    progress: Progress | bool = True,
    on_step: Callable[[Step], None] | None = None,
    cache: Path | str | bool = True,
    memory: int = GIB,
) -> Best:
    """The best plan for FLOPs ≤ x, or parameters ≤ x, or a drop ≤ y.

    With a budget, the most accurate plan within it; with a ``drop`` alone, the one with the least FLOPs among those
    found that lose no more. Everything measured is kept on disk: a search that was stopped goes on where it was, and
    the same search again is a matter of a second. The same arguments give the same plan.

    Choosing by images makes the plan suit them: they must not be those that it is tested on in the end.

    Args:
        program: of the uncut network.
        profile: for criteria that need one.
        images: shape ``(images, …)`` as the network takes them; ``labels``: shape ``(images,)``, class numbers.
        flops, params: share of the uncut network's that may be left, above 0 and up to 1.
        drop: loss of accuracy that is borne: 0.005 is half a point.
        certain: whether the upper end of the loss's 95 % interval (paired, for images like these) must be within
            ``drop``, or only the loss on the images given.
        criterion: what says which channels of a layer go first, as in :class:`prunelab.Plan`; ``seed`` and
            ``combine`` as there.
        repair: one of :data:`prunelab.plan.REPAIRS`, from ``repair_images``, of which all but the plan found take the
            first 256. In the place of least squares there is at times a quicker repair: for layers by themselves, for
            steps to a drop alone, and for a second path to a budget (new statistics of the norms, if there are any).
        start: a plan whose locked settings, bypassed units and multiple stay as they are.
        layers: names of those that may be cut; all that are neither pinned nor locked unless given.
        limits: the largest ratio of a layer, by name.
        masks: weights that are zero and that no repair may fill, by parameter name, True where a weight stays.
        n: images that steps are measured on; fewer than there are are drawn at random, always the same.
        n_found: images that the plan found is measured on; all unless told.
        precision: as :meth:`prunelab.Preview.estimates`.
        progress: True shows a bar; a function is called after every hundredth and before every measurement, and stops
            the search by returning False.
        on_step: called with every step as soon as it is taken.
        cache: True keeps measurements in the cache folder, a path in that folder, False not at all.
        memory: bytes that the preview may take to keep what the next measurement can use.

    Raises:
        PruneLabError: a wish that no plan grants, with what can be had; or what plan, criterion, repair or preview
            cannot use.
        Stopped: the progress function returned False.
    """
    wish = Wish(flops, params, drop, certain)
    done = 0

    def hear() -> None:
        # A hundredth may take many measurements, and with least squares each of them a second.
        if callable(progress) and progress(done, 100, _WHAT) is False:
            raise Stopped(_WHAT)

    search = Search(
        wish=wish,
        space=space_of(program, profile, start or Plan(), criterion, seed, combine, repair, layers, limits),
        images=images,
        labels=labels,
        repair_images=repair_images,
        masks=masks,
        n=n,
        n_found=n_found,
        precision=precision,
        cache=cache,
        memory=memory,
        on_step=on_step,
        on_measurement=hear,
    )
    for done in track(_hundredths(search.run()), _WHAT, 100, progress):  # noqa: B007  # hear() tells it
        pass
    return search.best


def _hundredths(shares: Iterator[float]) -> Iterator[int]:
    """One item per hundredth of the work, from the share that is done after each piece of it."""
    done = 0
    for share in shares:
        while done < int(100 * share):
            done += 1
            yield done
    while done < 100:
        done += 1
        yield done
