"""Fine-tuning on whatever the machine has, through accelerate."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from prunelab.errors import PruneLabError, unknown
from prunelab.preview import labelled
from prunelab.progress import Progress, Stopped, say_once, track
from prunelab.train.masks import Masks

if TYPE_CHECKING:
    import pandas as pd


PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class Epoch:
    """One epoch: mean training loss, validation accuracy (0 to 1), last learning rate, seconds."""

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
    teacher: nn.Module | None = None,
    temperature: float = 2.0,
    masks: Mapping[str, Tensor] | None = None,
    precision: str | None = None,
    seed: int = 0,
    progress: Progress | bool = True,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> pd.DataFrame:
    """Train a model in place and leave it with the weights of its best epoch.

    SGD with Nesterov momentum 0.9 under a cosine schedule unless another optimizer is given. A GPU is used if
    there is one, without being told.

    Args:
        model: the network; its weights change, its structure does not.
        train: Dataset or DataLoader of (image, label); a Dataset is shuffled.
        val: Dataset or DataLoader of (image, label); decides which epoch was best.
        lr: first learning rate: a tenth of what the network was trained with is a good start.
        optimizer: makes an optimizer from the parameters, instead of SGD.
        teacher: a network whose outputs are learned instead of the labels, usually the unpruned one (knowledge
            distillation, Hinton et al. 2015); it is not changed.
        temperature: softens both outputs where a teacher is given.
        masks: weights to hold at zero, by parameter name.
        precision: ``"no"``, ``"bf16"`` or ``"fp16"``; bf16 on a GPU and float32 on a CPU unless told.
        seed: of the shuffling.
        progress: True shows a bar; a function is called after every batch and stops by returning False: the
            best weights so far stay.
        on_epoch: called after every epoch.

    Returns:
        a DataFrame with one row per finished epoch: loss, accuracy, lr, seconds. Epoch 0 is the state before
        training.

    Raises:
        PruneLabError: no images, no labels or labels beyond the network's classes, nothing to train, or a loss
            that is not finite (the last good weights stay).
    """
    import pandas as pd

    if epochs < 0:
        raise PruneLabError(f"The number of epochs must be 0 or more, not {epochs}.")
    if precision is not None and precision not in PRECISIONS:
        raise unknown("precision", str(precision), PRECISIONS)
    rows: list[Epoch] = []
    with _as_it_was(model), _accelerator(precision) as accelerator:
        run = _Run(
            accelerator,
            model,
            train,
            val,
            lr,
            batch_size,
            weight_decay,
            optimizer,
            loss if teacher is None else Distillation(teacher, temperature),
            masks or {},
            seed,
            epochs,
        )
        try:
            rows.append(Epoch(0, math.nan, run.evaluate(), lr, 0.0))
            run.keep_if_best(rows[0].accuracy)
            for epoch in range(1, epochs + 1):
                rows.append(run.epoch(epoch, epochs, progress))
                run.keep_if_best(rows[-1].accuracy)
                if on_epoch is not None:
                    on_epoch(rows[-1])
        except Stopped:
            pass
        finally:
            run.restore_best()
    return pd.DataFrame([vars(r) for r in rows]).set_index("epoch")


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards the module's training flags, its device and its forward are those that it had."""
    flags = [(m, m.training) for m in model.modules()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    own = set(vars(model))
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
        model.to(device)
        # accelerate leaves its mark and, for mixed precision, a forward of its own in the module.
        for name in {"forward", "_original_forward", "_is_accelerate_prepared"} - own:
            vars(model).pop(name, None)


@contextmanager
def _accelerator(precision: str | None) -> Iterator[Any]:
    """An accelerator of this precision, whatever precision a training before it, or the user's own, had."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if not torch.cuda.is_available():
        say_once("No GPU was found: fine-tuning runs on the CPU.")
    before = dict(AcceleratorState._shared_state)
    AcceleratorState._reset_state()
    try:
        yield Accelerator(mixed_precision=precision or ("bf16" if torch.cuda.is_available() else "no"))
    finally:
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(before)


class Distillation:
    """Divergence from a teacher's softened outputs, times T² (Hinton et al. 2015, arXiv 1503.02531)."""

    def __init__(self, teacher: nn.Module, temperature: float) -> None:
        if not temperature > 0:
            raise PruneLabError(f"The temperature must be above 0, not {temperature}.")
        # A copy: the device and the training flags of the user's own network stay as they are.
        self.teacher = copy.deepcopy(teacher).eval()
        self.temperature = temperature

    def __call__(self, outputs: Tensor, *inputs: Tensor) -> Tensor:
        """Loss of the student's outputs, shape ``(images, classes)``, on these inputs."""
        with torch.no_grad():
            taught = self.teacher.to(outputs.device)(*inputs)
        student, wanted = ((x.float() / self.temperature).log_softmax(1) for x in (outputs, taught))
        divergence = nn.functional.kl_div(student, wanted, log_target=True, reduction="batchmean")
        return divergence * self.temperature**2


class _Run:
    """Everything that one fine-tuning holds on to."""

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        train: Any,
        val: Any,
        lr: float,
        batch_size: int,
        weight_decay: float,
        optimizer: Any,
        loss: Any,
        masks: Mapping[str, Tensor],
        seed: int,
        epochs: int,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.loss = loss
        self.val = labelled(val)
        loader = _shuffled(train, batch_size, seed)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise PruneLabError("The network has no parameters to train: all of them are frozen.")
        chosen = (
            optimizer(parameters)
            if optimizer
            else torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay, nesterov=True)
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(chosen, max(1, epochs * len(loader)))
        self.best: tuple[float, dict[str, Tensor]] = (-1.0, {})
        self.wrapped, self.optimizer, self.loader = accelerator.prepare(model, chosen, loader)
        self.masks = Masks(model, masks)
        self.masks.apply()

    def epoch(self, epoch: int, epochs: int, progress: Progress | bool) -> Epoch:
        """One pass over the training set."""
        started, total, seen, rate = time.perf_counter(), 0.0, 0, 0.0
        self.wrapped.train()
        for batch in track(self.loader, f"epoch {epoch} of {epochs}", len(self.loader), progress):
            rate = self.optimizer.param_groups[0]["lr"]
            value = self._step(batch)
            total, seen = total + value * len(batch[-1]), seen + len(batch[-1])
        return Epoch(epoch, total / max(seen, 1), self.evaluate(), rate, time.perf_counter() - started)

    def _step(self, batch: Any) -> float:
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise PruneLabError("Fine-tuning needs labels: the data must give (image, label) pairs.")
        with self.accelerator.autocast():
            outputs = self.wrapped(*batch[:-1])
            if isinstance(self.loss, Distillation):
                loss = self.loss(outputs, *batch[:-1])
            else:
                _check_labels(batch[-1], outputs, "training")
                loss = self.loss(outputs, batch[-1])
        value = float(loss.detach())
        if not math.isfinite(value):
            raise PruneLabError(
                "The training loss is not finite; the last good weights are kept. A smaller lr may help."
            )
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
            _check_labels(y, logits, "validation")
            right += int((logits.argmax(1).cpu() == y.cpu()).sum())
        return right / len(labels)

    def keep_if_best(self, accuracy: float) -> None:
        """Remember the weights of the best epoch."""
        if accuracy > self.best[0]:
            self.best = (accuracy, {k: v.detach().clone() for k, v in self.model.state_dict().items()})

    def restore_best(self) -> None:
        """Leave the model with them."""
        if self.best[1]:
            self.model.load_state_dict(self.best[1])


def _shuffled(train: Any, batch_size: int, seed: int) -> DataLoader[Any]:
    """A loader over the training set; one that the user gave stays as it is."""
    if not hasattr(getattr(train, "dataset", train), "__len__"):
        raise PruneLabError("Fine-tuning needs a training set of known length: a Dataset or a loader over one.")
    if isinstance(train, DataLoader):
        loader = train
    else:
        # An empty set cannot be shuffled.
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(train, batch_size, shuffle=len(train) > 0, generator=generator)
    if not len(loader):
        raise PruneLabError("There are no images to fine-tune on: the training set is empty.")
    return loader


def _check_labels(labels: Any, outputs: Any, which: str) -> None:
    """Class numbers beyond the outputs would fail deep inside the loss."""
    numbers = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dim() == 1
    if numbers and isinstance(outputs, Tensor) and int(labels.max()) >= outputs.shape[-1]:
        raise PruneLabError(
            f"The {which} labels go up to {int(labels.max())}, but the network has {outputs.shape[-1]} outputs."
        )
