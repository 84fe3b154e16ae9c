"""``prunelab reproduce NAME``: run a reproduction for several seeds, and write what came out."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from prunelab.errors import PruneLabError, unknown
from prunelab.papers.evidence import PROCESSOR_TIME, WALL_TIME, Measure, Paper, Run, markdown, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHORT = "A run of seconds for checking the code, on a few embedded images: its figures mean nothing."
"""What a short run says of itself."""

EXPERIMENTS = (
    *("lenet_mnist", "mean_activation", "trimming_rule", "multi_grain"),
    *("centripetal_small", "centripetal_resnet56", "resnet56_cifar"),
)
"""Modules of :mod:`prunelab.papers.experiments`; each lists its ``REPRODUCTIONS``."""


CAPTION = (
    "Mean ± sample standard deviation over seeds. Accuracy on {n:,} test images, each network measured once; 'against "
    "dense' in points, seed by seed. Compression is dense parameters / non-zero parameters, the structural part dense "
    "parameters / parameters; latency is measured at batch 64, in turns with the dense network."
)


@dataclass(frozen=True)
class Task:
    """What a reproduction is asked for.

    Attributes:
        data: the folder of the data sets, see :mod:`prunelab.papers.experiments.sources`.
        seed: of all that is random.
        say: takes a line about what is being done.
        short: run for seconds, on embedded images, to see that the code runs.
        work: a folder for the checkpoints of trainings, so that a run that was broken off goes on; deleted at its end.
    """

    data: Path
    seed: int
    say: Callable[[str], None]
    short: bool
    work: Path


@dataclass(frozen=True)
class Reproduction:
    """One row of evidence.

    Attributes:
        name: what people type.
        summary: what it shows, in one line.
        expected: how long one seed takes on what, and whether it was run.
        run: yields every measure as soon as it is known.
        paper: the paper's figures.
        method: whose rows they stand beside; "" for all.
        gpu: whether it wants one.
        shortened: what is shorter than in the paper, in a sentence.
        remarks: what a reader of the table must know, in Markdown.
        figure: draws the runs; saved as a PNG beside the table.
    """

    name: str
    summary: str
    expected: str
    run: Callable[[Task], Iterable[Measure]]
    paper: Paper = field(default_factory=dict)
    method: str = ""
    gpu: bool = False
    shortened: str = ""
    remarks: str = ""
    figure: Callable[[Sequence[Run]], Figure] | None = None


def reproductions() -> Mapping[str, Reproduction]:
    """All reproductions by name."""
    modules = (import_module(f"prunelab.papers.experiments.{name}") for name in EXPERIMENTS)
    return {each.name: each for module in modules for each in module.REPRODUCTIONS}


def find(name: str) -> Reproduction:
    """A reproduction by name.

    Raises:
        PruneLabError: there is none, with the nearest names.
    """
    known = reproductions()
    if name not in known:
        raise unknown("reproduction", name, known)
    return known[name]


def listing() -> str:
    """All reproductions in a few lines each: name, time, what it shows."""
    return "\n".join(
        f"{each.name}\n    {each.summary}\n    {'wants a GPU; ' if each.gpu else ''}one seed: {each.expected}"
        for each in reproductions().values()
    )


def reproduce(
    what: str | Reproduction,
    data: Path | str,
    *,
    seeds: int = 3,
    out: Path | str = "notebooks/results",
    short: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Run a reproduction for seeds 0, 1, …; write ``<out>/<name>/seed-<seed>.json`` and the table ``<out>/<name>.md``.

    A seed that is complete is not run again. One that was broken off runs again from the checkpoints of its trainings.

    Args:
        what: a reproduction or its name.
        data: the folder of the data sets.
        say: takes lines about what is being done.

    Returns:
        The table's file.

    Raises:
        PruneLabError: an unknown name, data that is not there, or files of another run where the results go.
    """
    chosen = find(what) if isinstance(what, str) else what
    if seeds < 1:
        raise PruneLabError(f"A reproduction needs at least 1 seed, not {seeds}.")
    if chosen.gpu and not short and not torch.cuda.is_available():
        say(f"{chosen.name} wants a GPU ({chosen.expected}), and there is none: this will take days.")
    folder = Path(out) / chosen.name
    runs = []
    for seed in range(seeds):
        path = folder / f"seed-{seed}.json"
        wanted = _wanted(chosen, seed, short)
        before = _before(path, wanted)
        if before is not None and before.complete:
            say(f"{chosen.name}, seed {seed}: complete in {path}.")
            runs.append(before)
        else:
            task = Task(Path(data), seed, say, short, folder / f".seed-{seed}")
            runs.append(_run(chosen, task, before or wanted, path))
        written = folder.with_suffix(".md")
        written.write_text(report(chosen, runs), encoding="utf-8")
        if chosen.figure is not None:
            chosen.figure(runs).savefig(folder.with_suffix(".png"))
    say(f"The table is in {written}.")
    return written


def _wanted(chosen: Reproduction, seed: int, short: bool) -> Run:
    command = f"prunelab reproduce {chosen.name} --data DIR --seeds {seed + 1}{' --short' if short else ''}"
    # A processor is often shared, and what others take of it says nothing.
    clock = WALL_TIME if torch.cuda.is_available() else PROCESSOR_TIME
    shortened = SHORT if short else chosen.shortened
    return Run(chosen.name, seed, command, versions(), hardware(), shortened, 0.0, clock=clock)


def _before(path: Path, wanted: Run) -> Run | None:
    """What is in the file already.

    Raises:
        PruneLabError: it is the file of another run.
    """
    if not path.exists():
        return None
    found = Run.read(path)
    for what in ("command", "shortened"):
        if getattr(found, what) != getattr(wanted, what):
            raise PruneLabError(
                f"{path} was written by another run ({found.command}; {found.shortened or 'nothing shortened'}): give "
                "another --out, or move the file away."
            )
    return found


def _run(chosen: Reproduction, task: Task, before: Run, path: Path) -> Run:
    """One seed to its end; the file is written with every measure."""
    # A measure that was made before a break comes again from checkpoints, in no time: what it took stands in the file.
    taken = {measure.row: measure.seconds for measure in before.measures}
    run = replace(before, versions=versions(), hardware=hardware(), measures=(), complete=False)
    task.say(f"{chosen.name}, seed {task.seed}: begins ({chosen.expected}).")
    clock = time.perf_counter if run.clock == WALL_TIME else time.process_time
    last = clock()
    for measure in chosen.run(task):
        now = clock()
        seconds = round(taken.get(measure.row, 0.0) + now - last, 1)
        last = now
        measures = (*run.measures, replace(measure, seconds=seconds))
        run = replace(run, measures=measures, seconds=round(sum(each.seconds for each in measures), 1))
        run.write(path)
        task.say(
            f"  {measure.point} · {measure.method} · {measure.stage}: {100 * measure.accuracy:.2f} %, "
            f"{measure.nonzero:,} weights, {seconds:.0f} s"
        )
    run = replace(run, complete=True)
    run.write(path)
    shutil.rmtree(task.work, ignore_errors=True)
    return run


def report(chosen: Reproduction, runs: list[Run]) -> str:
    """The table with what a reader must know of it, in Markdown."""
    last = runs[-1]
    first = last.measures[0]
    kinds = {f"{run.hardware}; {', '.join(f'{k} {v}' for k, v in run.versions.items())}" for run in runs}
    notes = dict.fromkeys(f"- {m.point}, {m.method}: {m.note}" for run in runs for m in run.measures if m.note)
    took = ", ".join(f"{run.seconds / 60:.0f} min" if run.seconds >= 60 else f"{run.seconds:.0f} s" for run in runs)
    parts = [
        f"# {chosen.name}",
        chosen.summary,
        *([f"**{last.shortened}**"] if last.shortened else []),
        f"    {last.command}",
        markdown(table(runs), chosen.paper, chosen.method),
        CAPTION.format(n=first.n),
        *([f"![{chosen.summary}]({chosen.name}.png)"] if chosen.figure is not None else []),
        *([chosen.remarks] if chosen.remarks else []),
        *(["\n".join(notes)] if notes else []),
        f"Run on: {' | '.join(sorted(kinds))}. {last.clock.capitalize()} by seed: {took}.",
    ]
    return "\n\n".join(parts) + "\n"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    from prunelab import __version__

    found = {"prunelab": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("numpy", "accelerate"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def hardware() -> str:
    """What computes, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    kind = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}, {kind}), {threads} thread{'s' * (threads > 1)}"
