"""Checkpoints: tensors as safetensors, the rest as JSON, in a folder that belongs to one run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import IterableDataset

from prunelab.errors import PruneLabError
from prunelab.profile.store import digest_data
from prunelab.program.guard import random_kept
from prunelab.saving import Record, delete_others, read_folder, write_folder
from prunelab.train.chance import seed_all
from prunelab.train.recipe import Recipe
from prunelab.train.words import Words, digest_of, network_in_words

NAME = "training"


@dataclass(frozen=True)
class Identity:
    """What makes a run this run and no other.

    Attributes:
        facts: the network's structure, the data and every setting, in words or digests, by what they are.
        weights: digest of the weights that it begins with.
    """

    facts: Mapping[str, str]
    weights: str


def identity(model: nn.Module, train: Any, val: Any, recipe: Recipe) -> Identity:
    """The identity of a run that is about to begin. Data is told apart as profiles tell it apart."""
    words = Words(model)
    return Identity(
        {
            "network": network_in_words(model),
            "training set": _data(train),
            "validation set": _data(val),
            **{each.name: words.of(getattr(recipe, each.name)) for each in fields(recipe)},
        },
        digest_of(model),
    )


def _data(data: Any) -> str:
    dataset = getattr(data, "dataset", data)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return f"a {type(dataset).__name__}"
    with random_kept():
        # Random transforms give the same items in every process.
        seed_all("identity")
        return digest_data(data)


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What tells facts from those of before, or ""."""
    return next(
        (f"{name} was {before.get(name)}, and is {now[name]}" for name in now if before.get(name) != now[name]), ""
    )


def of_another_run(folder: Path, reason: str) -> PruneLabError:
    """The error for whoever comes with something else to a folder that has a checkpoint."""
    return PruneLabError(
        f"The checkpoint in {folder} is of another run: {reason}. Nothing was changed; give this run a folder of its "
        "own."
    )


class Checkpoints:
    """The checkpoint of one run in its folder: the newest alone is kept."""

    def __init__(self, folder: Path | str, run: Identity) -> None:
        self.folder = Path(folder)
        self.run = run
        self._first_weights = run.weights

    def read(self) -> tuple[dict[str, Tensor], Record] | None:
        """Tensors and record of the last checkpoint, or None where the run has none yet.

        What a killed process left beside that of a complete run is deleted.

        Raises:
            PruneLabError: the folder holds another run's, or a damaged one.
        """
        if not (self.folder / f"{NAME}.json").exists():
            return None
        tensors, record = read_folder(self.folder, NAME)
        reason = self._other(record)
        if reason:
            raise of_another_run(self.folder, reason)
        # Not those that it goes on with now: whoever has the first ones may go on as well.
        self._first_weights = record["weights"][0]
        # A run that is complete writes no further one, which would clear up; another may be writing one just now.
        if record["at"]["done"]:
            self._clear()
            delete_others(self.folder, NAME, record["tensors"])
        return tensors, record

    def _other(self, record: Record) -> str:
        """What tells the run in the folder from this one, or ""."""
        other = difference(record["run"], self.run.facts)
        return other or ("" if self.run.weights in record["weights"] else "it began with other weights")

    def write(self, tensors: Mapping[str, Tensor], record: Record, left: str) -> None:
        """Put a checkpoint in the place of the last one, in one step.

        Args:
            left: digest of the weights that the run would leave if it ended here: whoever comes with them goes on.

        Raises:
            PruneLabError: the folder cannot be written.
        """
        self._clear()
        head = {"run": dict(self.run.facts), "weights": [self._first_weights, left]}
        write_folder(self.folder, NAME, tensors, {**head, **record})

    def _clear(self) -> None:
        """What a process left unfinished when it was killed."""
        for unfinished in self.folder.glob(".unfinished-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
