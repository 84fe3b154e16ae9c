"""Fine-tuning on whatever the machine has, through accelerate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from prunelab.errors import PruneLabError
from prunelab.program.guard import random_kept
from prunelab.progress import Progress
from prunelab.train.checkpoint import Checkpoints, identity
from prunelab.train.heap import freed_memory_kept
from prunelab.train.position import Epoch
from prunelab.train.recipe import Recipe
from prunelab.train.setting import accelerated, as_it_was
from prunelab.train.trainer import STOPPED, Trainer
from prunelab.train.watch import Watch

if TYPE_CHECKING:
    import pandas as pd


def finetune(
    model: nn.Module,
    train: Any,
    val: Any,
    *,
    recipe: Recipe | None = None,
    folder: Path | str | None = None,
    every: int = 200,
    progress: Progress | bool = True,
    on_epoch: Callable[[Epoch], None] | None = None,
    watch: Watch | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """Train a model in place and leave it with the weights of its best epoch.

    SGD with Nesterov momentum 0.9, its rate rising at first and then falling along a cosine, unless the settings say
    otherwise. A GPU is used if there is one, without being told; where its memory does not take a batch, the batch goes
    through in halves. Tensors that a ``TensorDataset`` or an ``ImageSet`` holds are kept on the device where there is
    room.

    Args:
        model: the network; its weights change, its structure does not.
        train: Dataset or DataLoader of (image, label); a Dataset is shuffled. The last part of a batch is the labels;
            with a teacher alone (``teacher_weight=1``) images will do.
        val: Dataset or DataLoader of (image, label); decides which epoch was best.
        recipe: how to train; the settings are those of :class:`Recipe` too.
        folder: for checkpoints. Where it holds one of this very run (the same network, weights, data and settings, or
            the weights that the run left), training goes on from there; on one CPU process it ends with the weights
            that it would have had without the break.
        every: steps between two checkpoints; there is one at the end of every epoch too.
        progress: True shows a bar; a function is called after every batch and stops by returning False: the
            best weights so far stay.
        on_epoch: called after every epoch.
        watch: is told the loss of every step and how far validation is.
        settings: those of :class:`Recipe`: ``epochs=10, lr=0.02, teacher=model``.

    Returns:
        a DataFrame with one row per finished epoch: loss, accuracy, lr, seconds. Epoch 0 is the state before
        training. Its ``attrs`` say what was used and decided, in words: device, precision, layout, data, images at
        once, norms, ended.

    Raises:
        PruneLabError: no images, no labels or labels beyond the network's classes, nothing to train, a loss that is
            not finite (the last good weights stay), or a folder with another run's checkpoint (it stays as it is).
    """
    import pandas as pd

    if every < 1:
        raise PruneLabError(f"There must be 1 step or more between two checkpoints, not {every}.")
    recipe = Recipe.chosen(recipe, settings)
    with random_kept(), as_it_was(model, recipe.optimizer), accelerated(recipe.precision) as accelerator:
        checkpoints = None if folder is None else Checkpoints(folder, identity(model, train, val, recipe))
        trainer = Trainer(accelerator, model, train, val, recipe, watch)
        with freed_memory_kept():
            trainer.run(progress, on_epoch, checkpoints, every)
    columns = [each.name for each in fields(Epoch)]
    table = pd.DataFrame([vars(row) for row in trainer.at.rows], columns=columns).set_index("epoch")
    table.attrs.update(trainer.at.notes)
    table.attrs["images at once"] = str(trainer.at.at_once or "whole batches")
    return table


def stopped(table: pd.DataFrame) -> bool:
    """Whether the training of such a table was asked to stop before its end: the best weights until then stay."""
    return str(table.attrs["ended"]).startswith(STOPPED)
