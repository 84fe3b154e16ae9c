"""What a lab's folder says about a training of its own: where network and data come from, and how to train.

All of it is JSON: functions by import path, and a recipe's plain values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from prunelab.errors import PruneLabError
from prunelab.saving import Record
from prunelab.train.augment import Augment
from prunelab.train.named import Named
from prunelab.train.recipe import Recipe

KEY = "run"


@dataclass(frozen=True)
class RunFile:
    """A training that a folder describes.

    Attributes:
        make_model: gives the uncut network.
        train, val: give the training and the validation set, each a Dataset or DataLoader.
        recipe: how to train, without masks: those are the lab's.
    """

    make_model: Named
    train: Named
    val: Named
    recipe: Recipe = field(default_factory=Recipe)

    @staticmethod
    def of(make_model: Any, train: Any, val: Any, recipe: Recipe | None) -> RunFile | None:
        """From what :meth:`prunelab.Lab.save` is given; None where it is given nothing.

        Raises:
            PruneLabError: one is missing, cannot be imported, or cannot be written as JSON.
        """
        given = {"make_model": make_model, "train": train, "val": val}
        if recipe is None and all(each is None for each in given.values()):
            return None
        missing = [name for name, each in given.items() if each is None]
        if missing:
            raise PruneLabError(
                f"A folder to train from needs make_model, train and val by import path; {missing[0]} is missing."
            )
        named = {name: Named.of(each) for name, each in given.items()}
        for each in named.values():
            each.function()
        found = RunFile(**named, recipe=recipe or Recipe())
        found.to_record()
        return found

    def to_record(self) -> Record:
        """As values that JSON can hold.

        Raises:
            PruneLabError: the recipe holds something that is no such value.
        """
        named = {name: getattr(self, name).to_record() for name in ("make_model", "train", "val")}
        return {KEY: {**named, "recipe": _plain(self.recipe)}}

    @staticmethod
    def from_record(record: Mapping[str, Any], folder: Path) -> RunFile:
        """The reverse of :meth:`to_record`.

        Args:
            folder: where the record was found, for the message.

        Raises:
            PruneLabError: the record does not say how to train, or something else than prunelab wrote it.
        """
        if KEY not in record:
            raise PruneLabError(
                f"The lab in {folder} does not say where its network and data come from: write it with "
                "lab.save(folder, make_model='package.module:function', train=…, val=…)."
            )
        try:
            run = record[KEY]
            settings = dict(run["recipe"])
            if "augment" in settings:
                settings["augment"] = Augment(**settings["augment"])
            named = {name: Named.from_record(run[name]) for name in ("make_model", "train", "val")}
            return RunFile(**named, recipe=Recipe.of(settings))
        except PruneLabError:
            raise
        except Exception as error:
            raise PruneLabError(
                f"What the lab in {folder} says about its training cannot be read: {error!r}."
            ) from error


def _plain(recipe: Recipe) -> Record:
    """The settings that are not the default ones, by name.

    Raises:
        PruneLabError: one of them is no number, word or augmentation.
    """
    found: Record = {}
    for each in fields(recipe):
        value = getattr(recipe, each.name)
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if value == default:
            continue
        if not isinstance(value, bool | int | float | str | Augment):
            raise PruneLabError(
                f"The recipe's {each.name} is a {type(value).__name__}, which JSON cannot hold: leave it out, or "
                "fine-tune with pl.finetune in a script of your own."
            )
        found[each.name] = asdict(value) if isinstance(value, Augment) else value
    return found
