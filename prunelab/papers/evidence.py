"""Evidence: what was measured, on how many seeds, as JSON files and as a table beside the paper's figures.

Results are told as Blalock et al. 2020, arXiv 2003.03033, section 6, ask: compression, theoretical speedup and measured
latency, raw accuracy and its change, mean and standard deviation over seeds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.errors import PruneLabError
from prunelab.files import replacing
from prunelab.latency import compared
from prunelab.preview import labelled
from prunelab.program.guard import eval_mode
from prunelab.program.program import cost, trace

STAGES = ("dense", "cut", "repaired", "trained")
"""When a network was measured: unpruned, just cut, with its weights corrected, or trained after the cut."""

FORMAT = 1
# Few enough that the values of a small network stay in a processor's cache.
_AT_ONCE = 100
_LATENCY_BATCH = 64

Paper = Mapping[tuple[str, str], Mapping[str, float]]
"""By (point, stage) the paper's figures: ``accuracy`` and ``change`` as shares of one, ``compression``, ``speedup``."""


PROCESSOR_TIME, WALL_TIME = "processor time", "wall time"


@dataclass(frozen=True)
class Measure:
    """One network at one moment.

    Attributes:
        point: the row of the table that it belongs to: a ratio, a target. Equal text is the same row in every run.
        method: how the network was made: a criterion, "scratch", a setting.
        stage: one of :data:`STAGES`. What follows a "dense" measure in a run is compared with that one.
        accuracy: on the test set, 0 to 1, measured once.
        n: test images.
        params: parameters; ``nonzero`` without single weights that are zero; ``macs`` per image.
        latency: how many times as fast as the dense network, measured; None where it was not.
        seconds: since the measure before; processor time where a CPU computes, wall time where a GPU does.
        note: what a reader must know.
    """

    point: str
    method: str
    stage: str
    accuracy: float
    n: int
    params: int
    nonzero: int
    macs: int
    latency: float | None = None
    seconds: float = 0.0
    note: str = ""

    @property
    def row(self) -> tuple[str, str, str]:
        """What makes measures of different runs one row."""
        return self.point, self.method, self.stage


@dataclass(frozen=True)
class Run:
    """One seed of a reproduction, as its JSON file holds it.

    Attributes:
        name: of the reproduction.
        command: what makes this file again; DIR stands for the folder of the data.
        versions: of Python and the packages that decide results, by name.
        hardware: in words.
        shortened: what was made shorter than the reproduction asks, in a sentence; empty where nothing was.
        seconds: of the whole run, as in :class:`Measure`; without what was computed between a measure and a break.
        complete: whether it ran to its end.
        clock: what the seconds are of: "processor time" or "wall time".
    """

    name: str
    seed: int
    command: str
    versions: Mapping[str, str]
    hardware: str
    shortened: str
    seconds: float
    measures: tuple[Measure, ...] = ()
    complete: bool = False
    clock: str = PROCESSOR_TIME

    def write(self, path: Path) -> None:
        """Write JSON, in one step: whoever reads sees the file before or after it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False)
        with replacing(path) as beside:
            beside.write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Run:
        """The reverse of :meth:`write`.

        Raises:
            PruneLabError: the file is not such a run.
        """
        try:
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if raw.pop("format") != FORMAT:
                raise PruneLabError(f"it has another format than {FORMAT}")
            return Run(**{**raw, "measures": tuple(Measure(**each) for each in raw["measures"])})
        except Exception as error:
            raise PruneLabError(f"{path} is not a run of `prunelab reproduce`: {error}. Move it away.") from error


# Measuring ---------------------------------------------


def measured(
    model: nn.Module,
    test: Any,
    *,
    point: str,
    method: str,
    stage: str,
    dense: nn.Module | None = None,
    note: str = "",
) -> Measure:
    """Measure a network as it is: accuracy on all test images, parameters, MACs.

    Args:
        test: a set of (image, label), or a loader of them.
        dense: the unpruned network, to time this one against, in turns at batch 64; None leaves latency out.
    """
    images, labels = labelled(test)
    example = images[:2].to(_home(model))
    found = cost(trace(model, example, prove=False))
    # Biases that are zero are not pruned: a network that was just made has nothing else.
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
    speedup = None
    if dense is not None:
        (timing,) = compared(dense, model, (example,), batches=(_LATENCY_BATCH,), progress=False).timings
        speedup = timing.speedup
    return Measure(
        point=point,
        method=method,
        stage=stage,
        accuracy=accuracy(model, images, labels),
        n=len(labels),
        params=found.params,
        nonzero=found.params - zeros,
        macs=found.macs,
        latency=speedup,
        note=note,
    )


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that a network classifies right, in evaluation mode and its own precision, on its own device.

    Args:
        images, labels: shapes ``(images, …)`` and ``(images,)``.
    """
    home = _home(model)
    right = 0
    with eval_mode(model), torch.no_grad():
        for part, wanted in zip(images.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True):
            right += int((model(part.to(home)).argmax(1).cpu() == wanted.cpu()).sum())
    return right / len(labels)


def _home(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


# The table ---------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and the sample standard deviation (n − 1) where there are several."""

    mean: float
    sd: float | None

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of one value per seed."""
        return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def text(self, form: str = ".2f") -> str:
        """Both, in one format."""
        return f"{self.mean:{form}}" + ("" if self.sd is None else f" ± {self.sd:{form.lstrip('+')}}")


@dataclass(frozen=True)
class Row:
    """One row of the table, over seeds.

    Attributes:
        accuracy, change: in percent, and against the dense network of the same seed in points.
        params: parameters; ``compression``: dense parameters / non-zero parameters; ``structural``: dense
            parameters / parameters; ``speedup``: dense MACs / MACs; ``latency``: measured, None where it was not.
        seeds: how many.
    """

    point: str
    method: str
    stage: str
    accuracy: Spread
    change: Spread | None
    params: Spread
    compression: Spread
    structural: Spread
    speedup: Spread
    latency: Spread | None
    seeds: int


def table(runs: Sequence[Run]) -> tuple[Row, ...]:
    """Rows of all runs, in the order in which the runs measured them."""
    pairs: dict[tuple[str, str, str], list[tuple[Measure, Measure]]] = {}
    for run in runs:
        for measure, dense in _with_dense(run.measures):
            pairs.setdefault(measure.row, []).append((measure, dense))
    return tuple(_row(found) for found in pairs.values())


def _with_dense(measures: Iterable[Measure]) -> Iterable[tuple[Measure, Measure]]:
    dense: Measure | None = None
    for measure in measures:
        dense = measure if measure.stage == "dense" or dense is None else dense
        yield measure, dense


def _row(pairs: Sequence[tuple[Measure, Measure]]) -> Row:
    first = pairs[0][0]

    def over_seeds(value: Callable[[Measure, Measure], float]) -> Spread:
        return Spread.of([value(measure, dense) for measure, dense in pairs])

    latencies = [measure.latency for measure, _ in pairs if measure.latency is not None]
    return Row(
        *first.row,
        accuracy=over_seeds(lambda m, d: 100 * m.accuracy),
        change=None if first.stage == "dense" else over_seeds(lambda m, d: 100 * (m.accuracy - d.accuracy)),
        params=over_seeds(lambda m, d: m.params),
        compression=over_seeds(lambda m, d: d.params / m.nonzero),
        structural=over_seeds(lambda m, d: d.params / m.params),
        speedup=over_seeds(lambda m, d: d.macs / m.macs),
        latency=Spread.of(latencies) if latencies else None,
        seeds=len(pairs),
    )


HEAD = (
    *("point", "method", "stage", "paper", "accuracy %", "against dense", "parameters"),
    *("compression", "structural part", "MACs, times fewer", "latency, times as fast", "seeds"),
)


def markdown(rows: Sequence[Row], paper: Paper, method: str = "") -> str:
    """The table in Markdown.

    Args:
        paper: its figures.
        method: whose rows stand beside them; "" for all.
    """
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    for row in rows:
        mine = row.method == method or not method or row.stage == "dense"
        figures = paper.get((row.point, row.stage), {}) if mine else {}
        cells = (
            *(row.point, row.method, row.stage, _figures(figures), row.accuracy.text()),
            "" if row.change is None else row.change.text("+.2f"),
            f"{row.params.mean:,.0f}",
            *(f"{each.mean:.2f}×" for each in (row.compression, row.structural, row.speedup)),
            "" if row.latency is None else f"{row.latency.text()}×",
            str(row.seeds),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_FORMS: Mapping[str, Callable[[float], str]] = {
    "accuracy": lambda share: f"{100 * share:.2f} %",
    "change": lambda share: f"{100 * share:+.2f} points",
    "compression": lambda times: f"{times:g}×",
    "speedup": lambda times: f"{times:g}× fewer MACs",
}


def _figures(figures: Mapping[str, float]) -> str:
    return ", ".join(_FORMS[name](value) for name, value in figures.items())
