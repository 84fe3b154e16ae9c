"""Accuracy between epochs, in the network's own precision, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from prunelab.errors import PruneLabError
from prunelab.preview import Score, labelled
from prunelab.program.guard import eval_mode
from prunelab.train.data import Batch, check_classes, fits
from prunelab.train.memory import halving
from prunelab.train.objective import main_output

_AT_ONCE = 500


class Judge:
    """The validation set, and how a network does on it."""

    def __init__(self, val: Any, score: Score | None, accelerator: Any) -> None:
        """Raises PruneLabError where the set is empty or has no labels."""
        self.accelerator = accelerator
        self.score = score
        self.at_once = _AT_ONCE
        self._held: Batch | None = None
        self._loader: Any = None
        if isinstance(val, DataLoader):
            self._loader = accelerator.prepare_data_loader(val, device_placement=False)
        else:
            images, labels = labelled(val)
            home = accelerator.device if fits((images, labels), accelerator.device) else images.device
            self._held = Batch((images.to(home),), labels.to(home))

    @property
    def labels(self) -> Any:
        """All labels, where they are held in memory, shape ``(images,)``."""
        return self._held.labels if self._held is not None else None

    def example(self) -> tuple[Any, ...]:
        """The network's inputs for the first two images, on the device."""
        first = next(self._batches(2), None)
        if first is None:
            raise PruneLabError("There are no images to measure accuracy on: the loader is empty.")
        return first.to(self.accelerator.device).split(2)[0].inputs

    @torch.no_grad()
    def __call__(self, model: nn.Module, on_part: Callable[[int], None] | None = None) -> float:
        """Accuracy, 0 to 1, or the mean score.

        Args:
            on_part: called after every part with how many images are done.

        Raises:
            PruneLabError: labels beyond the network's outputs, or not even one image fits into memory.
        """
        with eval_mode(model):
            # Shape (2,): the sum of the scores, and of how many images.
            total, done = torch.zeros(2, device=self.accelerator.device, dtype=torch.float32), 0
            for batch in self._batches(self.at_once):
                scores = self._scored(model, batch)
                if self._loader is not None:
                    scores = self.accelerator.gather_for_metrics(scores)
                total += torch.stack([scores.sum(), scores.new_tensor(len(scores))])
                done += len(scores)
                if on_part is not None:
                    on_part(done)
        if self._loader is None:
            total = self.accelerator.reduce(total, "sum")
        return float(total[0]) / max(float(total[1]), 1.0)

    def _scored(self, model: nn.Module, batch: Batch) -> Tensor:
        scores, at_once = halving(lambda n: self._scores(model, batch, n), self.at_once, "validation")
        self.at_once = at_once
        return scores

    def _scores(self, model: nn.Module, batch: Batch, at_once: int) -> Tensor:
        """One number per image, shape ``(images,)``."""
        found = []
        for part in batch.split(at_once):
            here = part.to(self.accelerator.device)
            outputs = main_output(model(*here.inputs))
            if self.score is not None:
                found.append(self.score(outputs, here.labels).float())
                continue
            check_classes(part.labels, outputs.shape[-1], "validation")
            found.append((outputs.argmax(1) == here.labels).float())
        return torch.cat(found)

    def _batches(self, at_once: int) -> Iterator[Batch]:
        """This process's share."""
        if self._held is not None:
            share = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
            yield from Batch((self._held.inputs[0][share],), self._held.labels[share]).split(at_once)
            return
        for parts in self._loader:
            batch = Batch.of(parts)
            if not isinstance(batch.labels, Tensor):
                raise PruneLabError("Accuracy needs labels: the data must give (image, label) pairs.")
            yield batch
