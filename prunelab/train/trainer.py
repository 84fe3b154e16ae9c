"""One training: its position, its best weights, and a step. Under several processes every one of them has a trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.errors import PruneLabError
from prunelab.optimizers import from_record, read, refill, to_record
from prunelab.program.guard import random_kept
from prunelab.program.trace import state_tensors
from prunelab.progress import Progress, Stopped, track
from prunelab.saving import Record
from prunelab.train.chance import seed_all, seed_of
from prunelab.train.checkpoint import Checkpoints
from prunelab.train.data import Batch, Held, Loaded, check_classes, in_layout, training_source
from prunelab.train.evaluate import Judge
from prunelab.train.masks import Masks
from prunelab.train.memory import halving
from prunelab.train.norms import mean_over_processes, running, take_anew
from prunelab.train.objective import Objective, main_output
from prunelab.train.position import Best, Epoch, Position
from prunelab.train.recipe import Recipe
from prunelab.train.setting import Shell, laid_out, lay_out_like_parameters
from prunelab.train.watch import Watch

# On a GPU reading the loss waits for the device: so many steps go by unread.
_LOOK_EVERY = 20
_MODEL, _BEST = "model:", "best:"
STOPPED = "stopped"
"""How the note on its end begins where a training was asked to stop."""


class Trainer:
    """Trains a network in place; :func:`prunelab.finetune` is its face."""

    def __init__(
        self, accelerator: Any, model: nn.Module, train: Any, val: Any, recipe: Recipe, watch: Watch | None = None
    ) -> None:
        """Raises PruneLabError where network, data and settings do not go together; no weight has changed then."""
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.model = model
        self.recipe = recipe
        self.judge = Judge(val, recipe.score, accelerator)
        self.source = training_source(train, recipe.batch_size, recipe.seed, accelerator)
        self.objective = Objective(recipe)
        self.own_optimizer = recipe.optimizer_for(model)
        example = self.judge.example()
        self.channels_last, outputs = laid_out(model.to(self.device), example, recipe.channels_last)
        if (teacher := self.objective.teacher) is not None:
            self.teacher_channels_last, _ = laid_out(teacher.to(self.device), example, recipe.channels_last)
        self._check_classes(train, val, outputs)
        lay_out_like_parameters(self.own_optimizer)
        self.rates = [group["lr"] for group in self.own_optimizer.param_groups]
        self.wrapped = accelerator.prepare_model(Shell(model))
        # accelerate's own is for float16's scaler alone, and looks through the disk for packages at every step.
        scaled = accelerator.scaler is not None
        self.optimizer = accelerator.prepare_optimizer(self.own_optimizer) if scaled else self.own_optimizer
        self.masks = Masks(model, recipe.masks)
        self.generator = torch.Generator()
        self.at = Position()
        self.best = Best(-math.inf, {})
        self.loss_sum = torch.zeros((), device=self.device)
        self.watch = watch if accelerator.is_main_process else None
        self._told = (0.0, 0)  # sum of the losses and images that the watch knows of
        self.at.notes = {
            "device": str(self.device),
            "precision": {"no": "the network's own", "bf16": "bfloat16", "fp16": "float16"}[
                accelerator.mixed_precision
            ],
            "layout": "channels_last" if self.channels_last else "as it was",
            "data": self.source.where,
        }

    def _check_classes(self, train: Any, val: Any, outputs: Any) -> None:
        names = [getattr(getattr(each, "dataset", each), "classes", None) for each in (train, val)]
        if all(isinstance(each, tuple | list) for each in names) and names[0] != names[1]:
            raise PruneLabError("The validation set has other classes than the training set: both must have the same.")
        classes = main_output(outputs).shape[-1]
        if isinstance(self.source, Held) and self.objective.needs_classes:
            check_classes(self.source.labels, classes, "training")
        if self.recipe.score is None:
            check_classes(self.judge.labels, classes, "validation")

    # The whole of it ---------------------------------------------

    def run(
        self,
        progress: Progress | bool,
        on_epoch: Callable[[Epoch], None] | None,
        checkpoints: Checkpoints | None,
        every: int,
    ) -> None:
        """Train to the end, or until somebody stops it, and leave the network with its best weights.

        Args:
            progress, on_epoch: called in the main process alone.
            checkpoints: None keeps none.
            every: steps between two of them.
        """
        main = self.accelerator.is_main_process
        found = checkpoints.read() if checkpoints is not None else None
        # Nobody writes before all have read.
        self.accelerator.wait_for_everyone()
        if found is not None:
            self.restore(*found)
        self.masks.apply()
        try:
            if not self.at.rows:
                self._end_epoch(Epoch(0, math.nan, self._accuracy(), max(self.rates), 0.0))
                self._keep(checkpoints)
            while not self.at.done:
                if self.at.epoch > self.recipe.epochs or self.at.waited >= (self.recipe.patience or math.inf):
                    self._finish()
                else:
                    self._epoch(progress if main else False, callable(progress), checkpoints, every)
                    if on_epoch is not None and main:
                        on_epoch(self.at.rows[-1])
                self._keep(checkpoints)
        except Stopped:
            if not self.at.done:
                self.at.notes["ended"] = f"{STOPPED} in epoch {self.at.epoch}"
            if self.at.rows:
                self._keep(checkpoints)
        finally:
            self.own_optimizer.zero_grad()
            self._load(self.best.tensors)

    def _epoch(self, progress: Progress | bool, asked: bool, checkpoints: Checkpoints | None, every: int) -> None:
        """The rest of an epoch, from where it stands."""
        at = self.at
        self.wrapped.train()
        self._told = (float(self.loss_sum), at.seen)
        began = time.perf_counter() - at.seconds
        ask = self._agreed(progress) if asked else progress
        what = f"epoch {at.epoch} of {self.recipe.epochs}"
        for batch in track(self.source.epoch(at.epoch, at.step), what, len(self.source), ask, at.step):
            self._step(batch)
            at.step += 1
            at.seconds = time.perf_counter() - began
            if self.device.type == "cpu" or at.step % _LOOK_EVERY == 0:
                self._check_finite()
            if at.step % every == 0 and at.step < len(self.source):
                self._keep(checkpoints)
        self._check_finite()
        total, seen = self._loss_of_all()
        rate = max(group["lr"] for group in self.own_optimizer.param_groups)
        accuracy = self._judged()
        self._end_epoch(Epoch(at.epoch, total / max(seen, 1), accuracy, rate, time.perf_counter() - began))

    def _end_epoch(self, row: Epoch) -> None:
        at = self.at
        at.rows.append(row)
        at.epoch, at.step, at.seen, at.seconds = row.epoch + 1, 0, 0, 0.0
        at.waited += 1
        self.loss_sum = torch.zeros_like(self.loss_sum)
        if self.recipe.keep == "last" or row.accuracy > self.best.accuracy:
            self.best = Best.of(self.model, row.accuracy)
            at.waited = 0

    def _finish(self) -> None:
        """Nothing is left to train: the statistics of the best weights' norms, and the end."""
        self._load(self.best.tensors)
        early = self.at.epoch <= self.recipe.epochs
        self.at.notes["ended"] = f"no better for {self.at.waited} epochs" if early else "all epochs done"
        self.at.done = True
        self.wrapped.train()
        norms = running(self.model)
        if not norms or not self.recipe.norm_images or not self.recipe.epochs:
            return
        steps = -(-self.recipe.norm_images // self.recipe.batch_size)
        batches = islice(self.source.epoch(self.recipe.epochs + 1), steps)
        parts = (part for batch in batches for part in batch.split(self.at.at_once or len(batch)))
        take_anew(self.model, norms, (self._sent(part) for part in parts))
        if self.accelerator.num_processes > 1:
            mean_over_processes(
                (b for norm in norms for b in norm.buffers() if b.is_floating_point()), self.accelerator
            )
        before, after = self.best.accuracy, self._accuracy()
        if after > before:
            self.best = Best.of(self.model, after)
        self.at.notes["norms"] = (
            f"statistics of {len(norms)} batch norms taken anew: accuracy {before:.4f} → {after:.4f}, "
            f"{'kept' if after > before else 'not kept'}"
        )

    # One step ---------------------------------------------

    def _step(self, batch: Batch) -> None:
        """Gradients of a batch, and what the optimizer makes of them."""
        if self.objective.needs_labels and batch.labels is None:
            raise PruneLabError("Fine-tuning needs labels: the data must give (image, label) pairs.")
        at, recipe, images = self.at, self.recipe, len(batch)
        done = (at.epoch - 1) * len(self.source) + at.step
        factor = recipe.factor(done, recipe.epochs * len(self.source))
        for group, rate in zip(self.own_optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        # A loader's own random numbers go on afterwards where they were.
        with random_kept() if isinstance(self.source, Loaded) else nullcontext():
            most = min(at.at_once or images, images)
            loss, at_once = halving(lambda at_once: self._gradients(batch, at_once), most, "training")
            self.optimizer.step()
        self.masks.apply()
        at.at_once = at_once if at_once < most else at.at_once
        at.seen += images
        self.loss_sum.add_(loss, alpha=images)

    def _gradients(self, batch: Batch, at_once: int) -> Tensor:
        """The mean loss of a batch, its gradients gathered over parts of so many images."""
        place = (self.recipe.seed, "step", self.at.epoch, self.at.step, self.accelerator.process_index)
        seed_all(*place)
        self.generator.manual_seed(seed_of(*place, "augment"))
        self.own_optimizer.zero_grad()
        parts = batch.split(at_once) if at_once < len(batch) else [batch]
        losses: list[Tensor] = []
        for part in parts:
            # Processes exchange their gradients once, with the last part.
            last = part is parts[-1]
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss = self._loss(part)
                loss = loss if len(parts) == 1 else loss * (len(part) / len(batch))
                self._backward(loss, exchange=last and self.accelerator.num_processes > 1)
            losses.append(loss.detach())
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _backward(self, loss: Tensor, exchange: bool) -> None:
        try:
            self.accelerator.backward(loss)
        except torch.cuda.OutOfMemoryError as error:
            if not exchange:
                raise
            raise PruneLabError(
                "Out of GPU memory while the processes exchanged gradients, where no process can begin a step again "
                "alone: begin again with a smaller batch_size; a gradient is then that of fewer images."
            ) from error

    def _loss(self, part: Batch) -> Tensor:
        here = self._sent(part)
        inputs = here.inputs
        if self.recipe.augment is not None:
            inputs = (self.recipe.augment(inputs[0], self.generator), *inputs[1:])
        outputs = self.wrapped(*inputs)
        if self.objective.needs_classes and not isinstance(self.source, Held):
            check_classes(part.labels, main_output(outputs).shape[-1], "training")
        if self.objective.teacher is None:
            return self.objective(outputs, here.labels, None)
        with self.accelerator.autocast():
            taught = self.objective.taught(in_layout(inputs, self.teacher_channels_last))
        return self.objective(outputs, here.labels, taught)

    def _sent(self, part: Batch) -> Batch:
        """A part of a batch as the network takes it."""
        return part.to(self.device).laid_out(self.channels_last)

    def _check_finite(self) -> None:
        # Once it is not finite, no later loss makes the sum finite again.
        total, seen = float(self.loss_sum), self.at.seen
        if not math.isfinite(total):
            raise PruneLabError(
                "The training loss is not finite; the last good weights are kept. A smaller lr may help."
            )
        if self.watch is not None and seen > self._told[1]:
            loss = (total - self._told[0]) / (seen - self._told[1])
            self._told = (total, seen)
            self.watch.step(self.at, len(self.source), loss)

    def _loss_of_all(self) -> tuple[float, int]:
        """The sum of the losses of the epoch so far, and of how many images, over all processes."""
        if self.accelerator.num_processes == 1:
            return float(self.loss_sum), self.at.seen
        both = torch.stack([self.loss_sum, self.loss_sum.new_tensor(self.at.seen)])
        total, seen = self.accelerator.reduce(both, "sum").tolist()
        return total, int(seen)

    def _count(self, total: float, seen: int) -> None:
        """The main process counts for all so far: its checkpoint is everybody's."""
        main = self.accelerator.is_main_process
        self.loss_sum.fill_(total if main else 0.0)
        self.at.seen = seen if main else 0

    def _judged(self) -> float:
        """Accuracy, with the main process's norm statistics in all processes."""
        if self.accelerator.num_processes > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        return self._accuracy()

    def _accuracy(self) -> float:
        watch = self.watch
        return self.judge(self.model, None if watch is None else watch.validated)

    def _agreed(self, progress: Progress | bool) -> Progress:
        """The main process's answer, in all of them: all stop after the same step."""

        def answer(done: int, total: int | None, what: str) -> bool:
            stop = callable(progress) and progress(done, total, what) is False
            if self.accelerator.num_processes == 1:
                return not stop
            return not bool(self.accelerator.reduce(torch.tensor(float(stop), device=self.device), "sum"))

        return answer

    # Checkpoints ---------------------------------------------

    def _keep(self, checkpoints: Checkpoints | None) -> None:
        """Write a checkpoint, if this is the process that does."""
        if checkpoints is None:
            return
        self._check_finite()
        self._count(*self._loss_of_all())
        if self.accelerator.is_main_process:
            checkpoints.write(*self.described(), self.best.digest)
        self.accelerator.wait_for_everyone()

    def described(self) -> tuple[dict[str, Tensor], Record]:
        """All that :meth:`restore` needs, as tensors by name and values that JSON can hold.

        Raises:
            PruneLabError: the optimizer cannot be written without pickle.
        """
        tensors = {f"{_MODEL}{name}": t for name, t in state_tensors(self.model).items()}
        tensors |= {f"{_BEST}{name}": t for name, t in self.best.tensors.items()}

        def hold(tensor: Tensor) -> str:
            name = f"optimizer:{len(tensors)}"
            tensors[name] = tensor
            return name

        scaler = self.accelerator.scaler
        record = {
            "at": {**vars(self.at), "rows": [vars(row) for row in self.at.rows]},
            "loss": float(self.loss_sum),
            "best": self.best.accuracy,
            "optimizer": to_record(read(self.own_optimizer, self.model), hold),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        return tensors, record

    def restore(self, tensors: Mapping[str, Tensor], record: Record) -> None:
        """Go on where a training was when :meth:`described` described it."""
        rows = [Epoch(**row) for row in record["at"]["rows"]]
        self.at = Position(**{**record["at"], "rows": rows})
        self._load({name.removeprefix(_MODEL): t for name, t in tensors.items() if name.startswith(_MODEL)})
        best = {name: torch.empty_like(t) for name, t in state_tensors(self.model).items()}
        for name, tensor in best.items():
            tensor.detach().copy_(tensors[f"{_BEST}{name}"])
        self.best = Best(record["best"], best)
        self._count(record["loss"], self.at.seen)
        refill(self.own_optimizer, from_record(record["optimizer"], tensors.__getitem__, self.model), self.model)
        lay_out_like_parameters(self.own_optimizer)
        if record["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(record["scaler"])

    @torch.no_grad()
    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        states = state_tensors(self.model)
        for name, tensor in tensors.items():
            states[name].copy_(tensor)
