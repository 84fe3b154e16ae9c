"""Work on a folder that a lab wrote, by one process or by all that ``accelerate launch`` or ``torchrun`` started.

The folder is read by all processes, so it must lie where all machines see it; the main process alone writes:
``committed`` (the network as the plan cut and repaired it), ``checkpoints`` and ``result``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prunelab.commit import commit
from prunelab.errors import PruneLabError
from prunelab.preview import labelled
from prunelab.processes import Processes
from prunelab.profile.batches import in_order
from prunelab.profile.capture import profile
from prunelab.program.program import sliced_masks, trace
from prunelab.program.run import removes_anything
from prunelab.program.selection import with_masks
from prunelab.repair import sample_of
from prunelab.saving import Record, save
from prunelab.train.finetune import finetune
from prunelab.train.keeping import Kept, read_lab, write_lab
from prunelab.train.position import Epoch
from prunelab.train.runfile import KEY, RunFile
from prunelab.train.setting import accelerated

if TYPE_CHECKING:
    import pandas as pd

Say = Callable[[str], None]
_UNFINISHED = ".unfinished-result-"


def finetune_run(folder: Path, say: Say) -> None:
    """Commit a folder's plan and fine-tune what it leaves; called again, go on where it was.

    Args:
        say: takes a line for every epoch, in the main process alone.

    Raises:
        PruneLabError: the folder does not hold a training, its functions cannot be imported or fail, its network or
            data do not fit, or its committed network or checkpoints are of another training.
    """
    with joined_processes() as (processes, _):
        run, kept, train, val = processes.all_or_none(partial(_read, folder), "read the folder")
        commit_once = partial(_commit, folder, kept, train, val) if processes.main else lambda: None
        processes.all_or_none(commit_once, "commit the plan")
        small = _read_committed(folder, run, kept)
        if processes.main:
            parameters = sum(p.numel() for p in small.model.parameters())
            say(f"{parameters:,} parameters, {processes.count} process{'es' * (processes.count > 1)}")
        table = finetune(
            small.model, train, val, recipe=replace(run.recipe, masks=small.masks), folder=folder / "checkpoints",
            progress=False, on_epoch=lambda row: say(_line(row, run.recipe.epochs)),
        )  # fmt: skip
        if processes.main:
            _write_result(folder, small.model, table)
            say(f"Best accuracy {table['accuracy'].max():.4f}, {table.attrs['ended']}: {folder / 'result'}")
        processes.wait()


def profile_run(folder: Path, say: Say) -> None:
    """Profile a folder's network on its training set; a lab with the same network, set and cache folder finds it.

    Args:
        say: takes a line at the end, in the main process alone.

    Raises:
        PruneLabError: as :func:`finetune_run` and :func:`prunelab.profile`.
    """
    with joined_processes() as (processes, device):
        _, kept, train, val = processes.all_or_none(partial(_read, folder), "read the folder")
        program = trace(kept.model.to(device), labelled(val, 2)[0].to(device))
        found = profile(program, in_order(train), together=True)
        if processes.main:
            say(f"{found.images:,} images profiled: {found.folder or 'not cached'}")
        processes.wait()


@contextmanager
def joined_processes() -> Iterator[tuple[Processes, torch.device]]:
    """All processes that were launched together, one where none were, and this one's device."""
    with accelerated("no") as accelerator:
        yield Processes.here(), accelerator.device
    # After trouble nobody waits: the launcher ends those that are left.
    Processes.leave()


def _read(folder: Path) -> tuple[RunFile, Kept, Any, Any]:
    """What a folder says about its training, its network, and its training and validation set."""
    kept = read_lab(folder, lambda record: RunFile.from_record(record, folder).make_model)
    run = RunFile.from_record(kept.record, folder)
    return run, kept, run.train(), run.val()


def _commit(folder: Path, kept: Kept, train: Any, val: Any) -> None:
    """Write what the plan leaves, unless it was written before.

    Once and for all processes: another machine, and the same one tomorrow, may round a repair otherwise.
    """
    if not (folder / "committed" / "lab.json").exists():
        write_lab(folder / "committed", replace(_cut(kept, train, val), record={"of": _origin(kept)}))


def _read_committed(folder: Path, run: RunFile, kept: Kept) -> Kept:
    """What the plan left.

    Raises:
        PruneLabError: it is what another plan left, or of another network.
    """
    found = read_lab(folder / "committed", lambda _: run.make_model)
    if found.record["of"] != _origin(kept):
        raise PruneLabError(
            f"{folder / 'committed'} is the commit of another plan or network than the lab in {folder}: save the lab "
            "to a folder of its own, or remove committed, checkpoints and result to begin again."
        )
    return found


def _origin(kept: Kept) -> Record:
    """What a commit is made from."""
    named = {name: kept.record[KEY][name] for name in ("make_model", "train")}
    return {name: kept.record[name] for name in ("tensors", "plan", "cut")} | named


def _cut(kept: Kept, train: Any, val: Any) -> Kept:
    """The network as its plan cuts and repairs it, and the masks of what is left."""
    program = trace(kept.model, labelled(val, 2)[0])
    if not removes_anything(program, kept.cut):
        return Kept(kept.model, kept.masks)
    selection = with_masks(kept.cut, kept.masks)
    repair = json.loads(kept.record["plan"])["repair"]
    images = sample_of(train) if repair != "none" else None
    return Kept(commit(program, selection, repair=repair, images=images), sliced_masks(program, selection))


def _line(row: Epoch, epochs: int) -> str:
    return (
        f"epoch {row.epoch} of {epochs}: loss {row.loss:.4f}, accuracy {row.accuracy:.4f}, lr {row.lr:.3g}, "
        f"{row.seconds:.0f} s"
    )


def _write_result(folder: Path, model: nn.Module, table: pd.DataFrame) -> None:
    """Put the network and the table into ``result``: whoever looks finds them whole, or those of the last time."""
    for left in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)
    beside = Path(mkdtemp(dir=folder, prefix=_UNFINISHED))
    new = beside / "new"
    save(new, model)
    table.to_csv(new / "table.csv")
    (new / "notes.json").write_text(json.dumps(table.attrs, indent=1), encoding="utf-8")
    if (folder / "result").exists():
        (folder / "result").rename(beside / "old")
    new.rename(folder / "result")
    shutil.rmtree(beside, ignore_errors=True)
