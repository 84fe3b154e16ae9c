"""Several processes that work on one thing, on one machine or many, seen from one of them.

``accelerate launch`` or ``torchrun`` starts them, and torch.distributed joins them. All methods but the properties are
meetings: every process must come to each of them, in the same order, or the others wait.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from prunelab.errors import PruneLabError
from prunelab.progress import Stopped

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among all.

    Attributes:
        index: which one this is, counted from 0.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    @staticmethod
    def here() -> Processes:
        """Those that torch.distributed has joined; this one alone where it has joined none."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return Processes()
        return Processes(distributed.get_rank(), distributed.get_world_size())

    @staticmethod
    def leave() -> None:
        """End what joined them, where anything did."""
        if distributed.is_available() and distributed.is_initialized():
            # A wrapped network that outlives its group ends the process with an abort, now and then.
            gc.collect()
            distributed.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.index == 0

    def sums(self, values: Tensor) -> Tensor:
        """The sum over all processes of tensors of one shape and dtype, the same bit for bit in all of them."""
        if self.count == 1:
            return values
        total = values.to(_meeting_place(), copy=True)
        distributed.all_reduce(total)
        return total.to(values.device)

    def any(self, here: bool) -> bool:
        """Whether it is so in any of the processes."""
        return bool(self.sums(torch.tensor(int(here))) > 0)

    def wait(self) -> None:
        """Until all have come here."""
        self.any(False)

    def sent(self, values: Tensor, source: int) -> Tensor:
        """The tensor of one process, in all of them; the others give one of the same shape and dtype."""
        if self.count == 1:
            return values
        # As bytes: not every backend knows every dtype.
        carried = values.contiguous().flatten().view(torch.uint8).to(_meeting_place())
        distributed.broadcast(carried, source)
        return values if self.index == source else carried.to(values.device).view(values.dtype).view(values.shape)

    def told(self, value: Any, source: int) -> Any:
        """A value of one process, in all of them: lists, dicts with words for keys, numbers, words; as JSON."""
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        length = int(self.sent(torch.tensor([len(text)]), source))
        heard = self.sent(text if self.index == source else torch.empty(length, dtype=torch.uint8), source)
        return json.loads(bytes(heard.tolist()))

    def all_or_none(self, work: Callable[[], T], what: str) -> T:
        """What work gives in this process, where it succeeds in every one.

        Args:
            what: the work, for the message: "Another process could not …".

        Raises:
            PruneLabError: it failed in another process, which has its own message.
            Stopped: it was stopped in another process.
            Exception: whatever work raises in this one.
        """
        trouble: Exception | None = None
        try:
            found = work()
        except Exception as error:
            # Kept until all have come: whoever went at once would leave the others waiting for it.
            trouble = error
        stopped = self.any(isinstance(trouble, Stopped))
        failed = self.any(trouble is not None)
        if trouble is not None:
            raise trouble
        if stopped:
            raise Stopped(what)
        if failed:
            raise PruneLabError(f"Another process could not {what}; its own message says why.")
        return found


def _meeting_place() -> torch.device:
    """Where tensors must be to be exchanged."""
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
