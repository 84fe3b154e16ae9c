"""The evidence that is committed: tables are what the runs beside them give, and the README's figures are theirs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prunelab.papers.evidence import Run, Spread, table
from prunelab.papers.reproduce import find, report, reproductions

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "notebooks" / "results"
NAMES = sorted(folder.name for folder in RESULTS.iterdir() if folder.is_dir())


def runs(name: str) -> list[Run]:
    return [Run.read(path) for path in sorted((RESULTS / name).glob("seed-*.json"))]


def evidence() -> list[tuple[str, list[str]]]:
    """The rows of the README's table, each with the name of its reproduction."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.split("<!-- evidence: begin -->")[1].split("<!-- evidence: end -->")[0].strip().splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    name, found = "", []
    for row in rows:
        name = row[0].strip("`") or name
        found.append((name, row))
    return found


def said(spread: Spread, form: str = ".2f") -> str:
    return spread.text(form).replace("-", "−").removesuffix(" ± 0.00")


def test_every_result_is_of_a_reproduction_that_can_be_run() -> None:
    assert NAMES
    assert set(NAMES) <= set(reproductions())
    assert {path.stem for path in RESULTS.glob("*.md")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_table_is_what_the_runs_give(name: str) -> None:
    chosen = find(name)
    assert all(run.complete and run.shortened == chosen.shortened for run in runs(name))
    assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") == report(chosen, runs(name))


def test_the_readme_says_what_the_runs_give() -> None:
    rows = evidence()
    assert len(rows) > 10
    for name, (_, what, dense, compression, macs, after, change, _) in rows:
        unpruned = [said(row.accuracy) for row in table(runs(name)) if row.change is None]
        factors = [float(re.findall(r"[\d.]+", cell)[0]) for cell in (compression, macs)]
        assert [
            row
            for row in table(runs(name))
            if row.change is not None
            and (f"{said(row.accuracy)} %", said(row.change, "+.2f")) == (after, change)
            and [row.compression.mean, row.speedup.mean] == pytest.approx(factors, abs=0.005)
        ], f"No network of {name} is that of the README's row {what} {compression}, {after}."
        assert not dense or dense.removesuffix(" %") in unpruned
