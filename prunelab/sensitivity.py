"""Sensitivity: what each layer alone costs in accuracy, at ratio after ratio, everything else left whole.

As in Li et al. 2017, Pruning filters for efficient ConvNets, arXiv 1608.08710, section 3.1: layers whose accuracy falls
steeply should lose little, layers whose curve stays flat can lose much. Nothing is retrained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prunelab.criteria.registry import Scores, scores
from prunelab.errors import PruneLabError, unknown
from prunelab.machine import GIB
from prunelab.plan import REPAIRS, Plan, Setting
from prunelab.preview import Precision, Preview, Score
from prunelab.profile.capture import Profile
from prunelab.program.cache import Cache
from prunelab.program.program import Program, cost
from prunelab.program.selection import Selection, with_masks
from prunelab.progress import Progress, Stopped, track
from prunelab.repair import Repairer
from prunelab.scanfile import Numbers, numbers_of, read_scan, scan_file, write_scan

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The ratios of a scan, unless told."""


@dataclass(frozen=True)
class Measured:
    """One layer cut to one ratio, alone.

    Attributes:
        kept: channels that stay.
        accuracy: share of ``n`` images classified right, or the mean of a score of your own; ``low`` and ``high``
            bound it (95 %).
        change: against the network with nothing removed, on the same images; ``half`` is the half width of its 95 %
            interval.
        params, flops: of the network with this cut; single weights that are zero still count.
        precision: of the arithmetic.
    """

    layer: str
    ratio: float
    kept: int
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
class Sensitivity:
    """A scan: every free layer alone at each ratio. What a stopped scan has not come to is not there.

    Attributes:
        criterion, seed: what chose the channels.
        repair: how the surviving weights were corrected.
        ratios: at which each layer was, or was to be, cut; ascending.
        channels: of every layer by name, in order of execution.
        pinned: why a layer cannot be cut, by name.
        base: accuracy with nothing cut, on the same ``n`` images.
        precision: of the arithmetic.
        measure: ``accuracy``, or the name of a score of your own.
        combine: how rows with several members got their scores.
        grain: what a ratio is a share of: channels, or single weights, of which the smallest go.
        points: in the order in which they were measured.
    """

    criterion: str
    seed: int
    repair: str
    ratios: tuple[float, ...]
    channels: Mapping[str, int]
    pinned: Mapping[str, str]
    base: float
    n: int
    precision: str
    measure: str = "accuracy"
    points: tuple[Measured, ...] = ()
    combine: str = "mean"
    grain: str = "channel"

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", MappingProxyType(dict(self.channels)))
        object.__setattr__(self, "pinned", MappingProxyType(dict(self.pinned)))

    @property
    def complete(self) -> bool:
        """Whether every free layer was measured at every ratio."""
        return len(self.points) == len(self.ratios) * (len(self.channels) - len(self.pinned))

    @property
    def by(self) -> str:
        """What chose what goes, in words: a criterion chooses channels, single weights go by their magnitude."""
        return self.criterion if self.grain == "channel" else "single weights"

    def of(self, layer: str) -> tuple[Measured, ...]:
        """What was measured of one layer, by ratio; empty for a pinned one.

        Raises:
            PruneLabError: there is no such layer, with the nearest names.
        """
        if layer not in self.channels:
            raise unknown("layer", layer, self.channels)
        return tuple(sorted((p for p in self.points if p.layer == layer), key=lambda p: p.ratio))

    def frame(self) -> pd.DataFrame:
        """One row per layer and ratio, in order of execution, and one without numbers per pinned layer.

        ``pinned`` says why a layer has none; accuracies and shares lie in 0 to 1.
        """
        import pandas as pd

        same = {"repair": self.repair, "criterion": self.criterion}
        rows: list[dict[str, Any]] = []
        for layer, channels in self.channels.items():
            if layer in self.pinned:
                rows.append({"layer": layer, "kept": channels, **same, "pinned": self.pinned[layer]})
            rows += [{**asdict(point), **same, "pinned": ""} for point in self.of(layer)]
        return pd.DataFrame(rows, columns=[*(f.name for f in fields(Measured)), *same, "pinned"])

    def figure(self, dark: bool = False) -> Figure:
        """A table of all layers and ratios, each cell coloured by the accuracy that is lost; pinned layers hatched."""
        from prunelab.heatmap import heatmap

        return heatmap(self, dark)

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the picture for a light page, on a ground of its own."""
        from prunelab.picture import on_a_light_page

        return on_a_light_page(self.figure())

    def to_json(self) -> str:
        """The scan as JSON text."""
        whole = {f.name: getattr(self, f.name) for f in fields(self)}
        return json.dumps(
            {
                **whole,
                "channels": dict(self.channels),
                "pinned": dict(self.pinned),
                "points": [asdict(point) for point in self.points],
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """The reverse of :meth:`to_json`.

        Raises:
            PruneLabError: the text is not a scan.
        """
        try:
            raw = json.loads(text)
            points = tuple(Measured(**point) for point in raw.pop("points"))
            return cls(**{**raw, "ratios": tuple(raw["ratios"]), "points": points})
        except Exception as error:
            raise PruneLabError(f"This is not a sensitivity scan in JSON: {error}.") from error

    def __repr__(self) -> str:
        free = len(self.channels) - len(self.pinned)
        return (
            f"Sensitivity of {free} layers ({len(self.pinned)} pinned) at {len(self.ratios)} ratios by "
            f"{self.by}, repair {self.repair}: {len(self.points)} of {free * len(self.ratios)} points, each on "
            f"{self.n:,} images in {self.precision}"
        )


def sensitivity(
    program: Program,
    images: Tensor,
    labels: Tensor,
    *,
    profile: Profile | None = None,
    criterion: str = "l1",
    seed: int = 0,
    combine: str = "mean",
    grain: str = "channel",
    ratios: Sequence[float] = RATIOS,
    repair: str = "none",
    repair_images: Tensor | None = None,
    masks: Mapping[str, Tensor] = MappingProxyType({}),
    n: int = 500,
    score: Score | None = None,
    precision: Precision = "auto",
    progress: Progress | bool = True,
    on_layer: Callable[[Sensitivity], None] | None = None,
    cache: Path | str | bool = True,
    memory: int = GIB,
) -> Sensitivity:
    """Measure every free layer alone at each ratio, on ``n`` images each.

    Layers are taken in order of execution, so that what lies before a layer is computed once for all of its ratios.
    A scan that was stopped goes on where it was: every point is on disk, by what it depends on, as soon as it is
    measured.

    Args:
        program: where units are bypassed, the layers that are left then; changes are still against the network with
            nothing removed.
        images: shape ``(images, …)`` as the network takes them.
        labels: shape ``(images,)``, class numbers, or whatever ``score`` takes.
        profile: for criteria that need one.
        criterion: which channels go first, as in :class:`prunelab.Plan`; ``seed`` is that of ``random``, and
            ``combine`` that of rows with several members.
        grain: what to remove of a layer: channels, or single weights of the smallest magnitude, whatever the criterion.
        ratios: share of a layer's channels to remove, 0 to 1; always rounded down, and one channel stays.
        repair: one of :data:`prunelab.plan.REPAIRS`, done anew for every point, from ``repair_images``.
        masks: weights that are zero and that no repair may fill, by parameter name, True where a weight stays.
        n: images; fewer than there are are drawn at random, always the same.
        score: what to measure instead of accuracy, as in :class:`prunelab.Preview`. A function has no content to be
            found by, so that nothing is kept on disk then.
        precision: as :meth:`prunelab.Preview.estimates`.
        progress: True shows a bar; a function is called after every point and stops the scan by returning False.
        on_layer: called with all that was measured so far after every layer, and before ``Stopped`` is raised.
        cache: True keeps points in the cache folder, a path in that folder, False not at all.
        memory: bytes that the unpruned network's values may take.

    Raises:
        PruneLabError: a ratio outside 0 to 1, or what Preview, criterion or repair cannot use.
        Stopped: the progress function returned False.
    """
    wanted = _ratios(ratios, grain)
    if repair not in REPAIRS:
        raise unknown("repair", repair, REPAIRS)
    if n < 1:
        raise PruneLabError(f"A sensitivity scan needs at least one image, not n={n}.")
    values = _Unpruned(memory)
    preview = Preview(program.base, images, labels, score=score, memory=values)
    with values.learning():
        base = preview.accuracy(Selection(bypassed=program.bypassed), n=n, precision=precision)
    empty = Sensitivity(
        criterion=criterion,
        seed=seed,
        repair=repair,
        ratios=wanted,
        channels={layer.name: layer.channels for layer in program.layers},
        pinned={layer.name: layer.pinned for layer in program.layers if layer.pinned},
        base=base.accuracy,
        n=base.n,
        precision=base.precision,
        measure="accuracy" if score is None else getattr(score, "__name__", "score"),
        combine=combine,
        grain=grain,
    )
    sample = None if repair == "none" else repair_images
    file = scan_file(
        program, (images, labels, sample), (base.n, base.precision, repair), cache if score is None else False
    )
    scan = _Scan(preview, Repairer(program.base, sample), masks, precision, file, empty)
    return scan.run(_cuts(program, profile, empty), progress, on_layer)


def _ratios(ratios: Sequence[float], grain: str) -> tuple[float, ...]:
    found = {Setting(ratio=ratio, grain=grain).checked("of every scan").ratio for ratio in ratios}
    if not found:
        raise PruneLabError("A sensitivity scan needs at least one ratio, for example ratios=(0.25, 0.5, 0.75).")
    return tuple(sorted(ratio for ratio in found if ratio is not None))


def _cuts(program: Program, profile: Profile | None, scan: Sensitivity) -> list[tuple[str, float, Selection]]:
    """Layer, ratio and what that removes, in order of execution."""
    free = [layer for layer in program.layers if not layer.pinned]
    known: dict[str, Scores] = {}
    if scan.grain == "channel":
        known = {layer.name: scores(program, profile, scan.criterion, layer, scan.seed, scan.combine) for layer in free}
    cuts = []
    for layer, ratio in product(free, scan.ratios):
        setting = Setting(ratio=ratio, grain=scan.grain)
        plan = Plan(scan.criterion, {layer.name: setting}, scan.seed, bypassed=program.bypassed)
        cuts.append((layer.name, ratio, plan.resolve(program.base, profile, lambda layer: known[layer.name])))
    return cuts


class _Unpruned(Cache):
    """Keeps values that the network has before any cut, and no others: what lies behind a cut serves only itself."""

    def __init__(self, budget: int) -> None:
        super().__init__(budget)
        self._known: set[Hashable] = set()
        self._learning = False

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Within this, every value is one of them; what the budget had no room for is known again later."""
        self._learning = True
        yield
        self._learning = False

    def put(self, key: Hashable, value: Any, seconds: float) -> None:
        if self._learning:
            self._known.add(key)
        if key in self._known:
            super().put(key, value, seconds)


class _Scan:
    """A scan under way."""

    def __init__(
        self,
        preview: Preview,
        repairer: Repairer,
        masks: Mapping[str, Tensor],
        precision: Precision,
        file: Path | None,
        empty: Sensitivity,
    ) -> None:
        self._preview = preview
        self._repairer = repairer
        self._masks = masks
        self._precision = precision
        self._file = file
        self._held = read_scan(file)
        self._found = empty

    def run(
        self,
        cuts: list[tuple[str, float, Selection]],
        progress: Progress | bool,
        on_layer: Callable[[Sensitivity], None] | None,
    ) -> Sensitivity:
        """Measure what is not known yet."""
        tell = on_layer or (lambda _: None)
        try:
            for layer, ratio, selection in track(cuts, "sensitivity", len(cuts), progress):
                self._add(layer, ratio, selection)
                if ratio == self._found.ratios[-1]:
                    tell(self._found)
        except Stopped:
            tell(self._found)
            raise
        return self._found

    def _add(self, layer: str, ratio: float, selection: Selection) -> None:
        masked = with_masks(selection, self._masks)
        if masked.digest not in self._held:
            self._held[masked.digest] = self._measured(selection, masked)
            if self._file is not None and not write_scan(self._file, self._held):
                self._file = None
        accuracy, low, high, change, half = self._held[masked.digest]
        program, found = self._preview.program, self._found
        size = cost(program, selection)
        point = Measured(
            layer=layer,
            ratio=ratio,
            kept=len(selection.kept.get(layer, range(found.channels[layer]))),
            accuracy=accuracy,
            low=low,
            high=high,
            change=change,
            half=half,
            n=found.n,
            params=size.params,
            flops=size.flops,
            precision=found.precision,
        )
        self._found = replace(found, points=(*found.points, point))

    def _measured(self, selection: Selection, masked: Selection) -> Numbers:
        repaired = self._repairer(masked, self._found.repair)
        # Without the masks, whose weights are zero already: so it shares values with the unpruned network.
        found = self._preview.accuracy(selection, n=self._found.n, repaired=repaired, precision=self._precision)
        return numbers_of(found)
