"""Fine-tuning on whatever the machine has, through accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from prunelab.errors import PruneLabError
from prunelab.preview import labelled
from prunelab.progress import Progress, Stopped, say_once, track
from prunelab.train.masks import Masks

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Epoch:
    """One epoch of fine-tuning: mean training loss, validation accuracy (0 to 1), last learning rate, seconds."""

    epoch: int
    loss: float
    accuracy: float
    lr: float
    seconds: float


def finetune(
    model: nn.Module,
    train: Any,
    val: Any,
    *,
    epochs: int = 5,
    lr: float = 0.01,
    batch_size: int = 128,
    weight_decay: float = 5e-4,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    masks: Mapping[str, Tensor] | None = None,
    precision: str | None = None,
    seed: int = 0,
    progress: Progress | bool = True,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> pd.DataFrame:
    """Train a model in place and leave it with the weights of its best epoch.

    SGD with Nesterov momentum 0.9 under a cosine schedule unless another optimizer is given. A GPU is used if there is
    one, without being told.

    Args:
        model: the network; its weights change, its structure does not.
        train: Dataset or DataLoader of (image, label); a Dataset is shuffled.
        val: Dataset or DataLoader of (image, label); decides which epoch was best.
        lr: first learning rate: a tenth of what the network was trained with is a good start.
        optimizer: makes an optimizer from the parameters, instead of SGD.
        masks: weights to hold at zero, by parameter name.
        precision: ``"no"``, ``"bf16"`` or ``"fp16"``; bf16 on a GPU and float32 on a CPU unless told.
        seed: of the shuffling.
        progress: True shows a bar; a function is called after every batch and stops by returning False: the best
            weights so far stay.
        on_epoch: called after every epoch.

    Returns:
        a DataFrame with one row per finished epoch: loss, accuracy, lr, seconds. Epoch 0 is the state before training.

    Raises:
        PruneLabError: no images, labels beyond the network's classes, or a loss that is not finite (the last good
            weights stay).
    """
    import pandas as pd

    if epochs < 0:
        raise PruneLabError(f"The number of epochs must be 0 or more, not {epochs}.")
    run = _Run(model, train, val, lr, batch_size, weight_decay, optimizer, loss, masks or {}, precision, seed, epochs)
    flags = [(m, m.training) for m in model.modules()]
    rows = [Epoch(0, math.nan, run.evaluate(), lr, 0.0)]
    run.keep_if_best(rows[0].accuracy)
    try:
        for epoch in range(1, epochs + 1):
            rows.append(run.epoch(epoch, epochs, progress))
            run.keep_if_best(rows[-1].accuracy)
            if on_epoch is not None:
                on_epoch(rows[-1])
    except Stopped:
        pass
    finally:
        run.restore_best()
        for module, flag in flags:
            module.training = flag
    return pd.DataFrame([vars(r) for r in rows]).set_index("epoch")


class _Run:
    """Everything that one fine-tuning holds on to."""

    def __init__(
        self, model: nn.Module, train: Any, val: Any, lr: float, batch_size: int, weight_decay: float, optimizer: Any,
        loss: Any, masks: Mapping[str, Tensor], precision: str | None, seed: int, epochs: int,
    ) -> None:  # fmt: skip
        from accelerate import Accelerator

        if not torch.cuda.is_available():
            say_once("No GPU was found: fine-tuning runs on the CPU.")
        self.accelerator = Accelerator(mixed_precision=precision or ("bf16" if torch.cuda.is_available() else "no"))
        self.model = model
        self.loss = loss
        generator = torch.Generator().manual_seed(seed)
        loader = train if isinstance(train, DataLoader) else DataLoader(train, batch_size, shuffle=True, generator=generator)
        if not len(loader):
            raise PruneLabError("There are no images to fine-tune on: the training set is empty.")
        self.val = labelled(val)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise PruneLabError("The network has no parameters to train: all of them are frozen.")
        chosen = optimizer(parameters) if optimizer else torch.optim.SGD(
            parameters, lr=lr, momentum=0.9, weight_decay=weight_decay, nesterov=True)  # fmt: skip
        steps = max(1, epochs * len(loader))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(chosen, steps)
        self.wrapped, self.optimizer, self.loader = self.accelerator.prepare(model, chosen, loader)
        self.schedule = schedule
        self.masks = Masks(model, masks)
        self.masks.apply()
        self.best: tuple[float, dict[str, Tensor]] = (-1.0, {})

    def epoch(self, epoch: int, epochs: int, progress: Progress | bool) -> Epoch:
        """One pass over the training set."""
        started, total, seen, rate = time.perf_counter(), 0.0, 0, 0.0
        self.wrapped.train()
        for batch in track(self.loader, f"epoch {epoch} of {epochs}", len(self.loader), progress):
            rate = self.optimizer.param_groups[0]["lr"]
            value = self._step(batch)
            total, seen = total + value * len(batch[1]), seen + len(batch[1])
        return Epoch(epoch, total / max(seen, 1), self.evaluate(), rate, time.perf_counter() - started)

    def _step(self, batch: Any) -> float:
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise PruneLabError("Fine-tuning needs labels: the data must give (image, label) pairs.")
        with self.accelerator.autocast():
            outputs = self.wrapped(*batch[:-1])
            loss = self.loss(outputs, batch[-1])
        value = float(loss.detach())
        if not math.isfinite(value):
            raise PruneLabError("The training loss is not finite; the last good weights are kept. A smaller lr may help.")
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.masks.apply()
        return value

    @torch.no_grad()
    def evaluate(self) -> float:
        """Accuracy on the validation set, 0 to 1."""
        self.wrapped.eval()
        images, labels = self.val
        right = 0
        for x, y in zip(torch.split(images, 500), torch.split(labels, 500), strict=True):
            logits = self.wrapped(x.to(self.accelerator.device))
            if int(y.max()) >= logits.shape[-1]:
                raise PruneLabError(
                    f"The validation labels go up to {int(y.max())}, but the network has {logits.shape[-1]} outputs."
                )
            right += int((logits.argmax(1).cpu() == y).sum())
        return right / len(labels)

    def keep_if_best(self, accuracy: float) -> None:
        """Remember the weights of the best epoch."""
        if accuracy > self.best[0]:
            self.best = (accuracy, {k: v.detach().clone() for k, v in self.model.state_dict().items()})

    def restore_best(self) -> None:
        """Leave the model with them."""
        if self.best[1]:
            self.model.load_state_dict(self.best[1])
