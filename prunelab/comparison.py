"""Which criterion to use: how alike criteria order channels, and the accuracy that each leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prunelab.criteria.ranks import ranks
from prunelab.criteria.registry import Scores, criteria_names, get, scores
from prunelab.errors import PruneLabError, unknown
from prunelab.machine import GIB
from prunelab.plan import Plan, Setting
from prunelab.preview import Precision, Preview
from prunelab.profile.capture import Profile
from prunelab.program.cache import Cache
from prunelab.program.channels import Layer
from prunelab.program.program import Program, cost
from prunelab.program.selection import Selection
from prunelab.progress import Progress, track
from prunelab.scanfile import numbers_of, read_scan, scan_file, write_scan

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Matrix = tuple[tuple[float, ...], ...]
Where = Literal["network", "layer"]
RATIOS = (0.1, 0.2, 0.3, 0.5, 0.7)
"""The ratios of a comparison, unless told."""


@dataclass(frozen=True)
class Compared:
    """What is left when a criterion chooses which channels go.

    Attributes:
        where: ``network``: every free layer is cut to the ratio; ``layer``: the one layer alone.
        accuracy: share of ``n`` images classified right; ``low`` and ``high`` bound it (95 %).
        change: against the network with nothing removed, on the same images; ``half`` is the half width of its 95 %
            interval.
        params, flops: of the network with this cut.
    """

    criterion: str
    where: Where
    ratio: float
    accuracy: float
    low: float
    high: float
    change: float
    half: float
    n: int
    params: int
    flops: int
    precision: str


@dataclass(frozen=True)
class Comparison:
    """Criteria side by side. What a stopped comparison has not come to is not there.

    Attributes:
        criteria: those compared, in order.
        layer: the one layer.
        ratios: ascending.
        combine: how rows with several members got their scores; ``seed``: of ``random``.
        base: accuracy with nothing cut, on the same ``n`` images; ``flops`` of that network.
        precision: of the arithmetic.
        on_layer: Spearman's rank correlation of the layer's scores by every two criteria, ``criteria × criteria``.
        on_network: its mean over all free layers.
        points: in the order in which they were measured.
    """

    criteria: tuple[str, ...]
    layer: str
    ratios: tuple[float, ...]
    combine: str
    seed: int
    base: float
    flops: int
    n: int
    precision: str
    on_layer: Matrix
    on_network: Matrix
    points: tuple[Compared, ...] = ()

    def of(self, criterion: str, where: Where = "network") -> tuple[Compared, ...]:
        """The curve of a criterion, by ratio.

        Raises:
            PruneLabError: it is not among those compared.
        """
        if criterion not in self.criteria:
            raise unknown("criterion in this comparison", criterion, self.criteria)
        found = (point for point in self.points if (point.criterion, point.where) == (criterion, where))
        return tuple(sorted(found, key=lambda point: point.ratio))

    def frame(self) -> pd.DataFrame:
        """One row per criterion, place and ratio; accuracies and shares lie in 0 to 1."""
        import pandas as pd

        return pd.DataFrame([asdict(point) for point in self.points], columns=[f.name for f in fields(Compared)])

    def correlations(self, where: Where = "network") -> pd.DataFrame:
        """Spearman's rank correlation between criteria, −1 to 1, as a square table."""
        import pandas as pd

        matrix = self.on_layer if where == "layer" else self.on_network
        return pd.DataFrame(matrix, index=list(self.criteria), columns=list(self.criteria))

    def figure(self, dark: bool = False) -> Figure:
        """Rank correlations as tables in colour, accuracies as curves below: the layer left, the network right."""
        from prunelab.comparison_figure import draw

        return draw(self, dark)

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the picture for a light page, on a ground of its own."""
        from prunelab.picture import on_a_light_page

        return on_a_light_page(self.figure())

    def __repr__(self) -> str:
        wanted = 2 * len(self.criteria) * len(self.ratios)
        return (
            f"Comparison of {len(self.criteria)} criteria on {self.layer!r} and on the network at {len(self.ratios)} "
            f"ratios: {len(self.points)} of {wanted} points, each on {self.n:,} images in {self.precision}"
        )


def compare(
    program: Program,
    profile: Profile | None,
    images: Tensor,
    labels: Tensor,
    *,
    criteria: Sequence[str] | None = None,
    layer: str | None = None,
    ratios: Sequence[float] = RATIOS,
    combine: str = "mean",
    seed: int = 0,
    n: int = 500,
    precision: Precision = "auto",
    progress: Progress | bool = True,
    on_point: Callable[[Comparison], None] | None = None,
    cache: Path | str | bool = True,
    memory: int = GIB,
) -> Comparison:
    """Compare criteria: how alike they order channels, and the accuracy after each has chosen, nothing retrained.

    Every point is kept on disk as soon as it is measured, in common with :func:`prunelab.sensitivity`: a comparison
    that was stopped goes on where it was.

    Args:
        program: where units are bypassed, the layers that are left are cut.
        profile: for criteria that need one; with :func:`prunelab.with_gradients` for those that need gradients.
        images: shape ``(images, …)``; ``labels``: shape ``(images,)``, class numbers.
        criteria: names; all that the profile allows unless given.
        layer: the one layer; unless given, the middle one of those that can be cut.
        ratios: share of channels removed from the layer, or from every free layer of the network.
        combine, seed: as in :class:`prunelab.Plan`.
        n: images to measure each point on; fewer than there are are drawn at random, always the same.
        precision: as :meth:`prunelab.Preview.estimates`.
        progress: True shows a bar; a function is called after every point and stops by returning False.
        on_point: called with all that was found so far after every point.
        cache: True keeps points in the cache folder, a path in that folder, False not at all.
        memory: bytes that the preview may take to keep what the next point can use.

    Raises:
        PruneLabError: no layer can be cut, or what criteria, plan or preview cannot use.
        Stopped: the progress function returned False.
    """
    free = [found for found in program.layers if not found.pinned and found.channels > 1]
    if not free:
        raise PruneLabError("There is nothing to compare criteria on: no layer of this network can be cut.")
    if n < 1 or not ratios:
        raise PruneLabError(f"A comparison needs at least one image and one ratio, not n={n} and ratios={ratios!r}.")
    one = program.layer(layer) if layer is not None else free[len(free) // 2]
    if one.pinned:
        raise PruneLabError(f"Layer {one.name!r} cannot be pruned: {one.pinned}.")
    names = tuple(criteria) if criteria is not None else _usable(profile)
    known = {name: {f.name: scores(program, profile, name, f, seed, combine) for f in [*free, one]} for name in names}
    preview = Preview(program.base, images, labels, memory=Cache(memory))
    base = preview.accuracy(Selection(bypassed=program.bypassed), n=n, precision=precision)
    found = Comparison(
        criteria=names,
        layer=one.name,
        ratios=tuple(sorted(set(map(float, ratios)))),
        combine=combine,
        seed=seed,
        base=base.accuracy,
        flops=cost(program).flops,
        n=base.n,
        precision=base.precision,
        on_layer=_correlations([known[name][one.name] for name in names]),
        on_network=_mean([_correlations([known[name][f.name] for name in names]) for f in free]),
    )
    file = scan_file(program, (images, labels, None), (base.n, base.precision, "none"), cache)
    held = read_scan(file)
    places: tuple[Where, ...] = ("network", "layer")
    cuts = list(product(names, places, found.ratios))
    for name, where, ratio in track(cuts, "comparison", len(cuts), progress):
        cut = _cut(program, known[name], free if where == "network" else [one], ratio)
        if cut.digest not in held:
            held[cut.digest] = numbers_of(preview.accuracy(cut, n=n, precision=precision))
            file = file if file is not None and write_scan(file, held) else None
        size = cost(program, cut)
        point = Compared(name, where, ratio, *held[cut.digest], found.n, size.params, size.flops, found.precision)
        found = replace(found, points=(*found.points, point))
        if on_point is not None:
            on_point(found)
    return found


def _usable(profile: Profile | None) -> tuple[str, ...]:
    return tuple(name for name in criteria_names() if not get(name).missing(profile))


def _cut(program: Program, known: Mapping[str, Scores], layers: list[Layer], ratio: float) -> Selection:
    settings = {layer.name: Setting(ratio=ratio) for layer in layers}
    plan = Plan(settings=settings, bypassed=program.bypassed)
    return plan.resolve(program.base, None, lambda layer: known[layer.name])


def spearman(a: Scores, b: Scores) -> float:
    """Rank correlation of two scores of the same channels, −1 to 1; 0 where one of them tells none apart.

    Pearson's correlation of the ranks, equal scores sharing the mean of theirs.
    """
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / norm if norm else 0.0


def _correlations(all_scores: list[NDArray[np.float64]]) -> Matrix:
    return tuple(tuple(1.0 if a is b else spearman(a, b) for b in all_scores) for a in all_scores)


def _mean(matrices: list[Matrix]) -> Matrix:
    return tuple(tuple(row) for row in np.mean(np.array(matrices), axis=0).tolist())
