"""What multi-grain pruning did: every cut that was tried, what each grain left, and the network's compression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prunelab.program.table import aligned

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Size:
    """What a network weighs: ``params``, ``nonzero`` of them that no mask zeroes, ``macs`` per image."""

    params: int
    nonzero: int
    macs: int


@dataclass(frozen=True)
class Cut:
    """One cut that was tried.

    Attributes:
        what: what it takes away, in words; the name of a layer or block.
        size: of the network after it.
        before, after: accuracy on the validation set before and after the short recovery.
        kept: whether the accuracy after it was within the grain's budget; if not, the cut was taken back.
    """

    what: str
    size: Size
    before: float
    after: float
    kept: bool


@dataclass(frozen=True)
class Grain:
    """What one grain took away.

    Attributes:
        name: ``block``, ``layer``, ``channel`` or ``weight``.
        cuts: all that were tried, in order; the last one may have been taken back.
        size: of the network that the grain left.
        accuracy: of that network on the validation set, after the fine-tuning that ends the grain.
    """

    name: str
    cuts: tuple[Cut, ...]
    size: Size
    accuracy: float

    @property
    def kept(self) -> tuple[Cut, ...]:
        """The cuts that the network has."""
        return tuple(cut for cut in self.cuts if cut.kept)


@dataclass(frozen=True)
class MultiGrain:
    """The whole of it, from coarse to fine; prints as a table.

    Attributes:
        dense: size of the unpruned network.
        accuracy: its accuracy on the validation set.
        grains: in the order in which they were taken; one that paused for a fine-tuning is there several times.
        masks: by parameter name, True where a weight stays: further training holds them with ``masks=``.
    """

    dense: Size
    accuracy: float
    grains: tuple[Grain, ...]
    masks: Mapping[str, Tensor]

    @property
    def size(self) -> Size:
        """Of the network that is left."""
        return self.grains[-1].size if self.grains else self.dense

    @property
    def compression(self) -> float:
        """Dense parameters / non-zero parameters."""
        return self.dense.params / self.size.nonzero

    @property
    def structural(self) -> float:
        """The part of it that blocks, layers and channels have: no sparse storage, and faster everywhere."""
        return self.dense.params / self.size.params

    @property
    def speedup(self) -> float:
        """Dense MACs / MACs. Weights that are zero are multiplied all the same."""
        return self.dense.macs / self.size.macs

    def rows(self) -> list[dict[str, Any]]:
        """One dict per grain: its cuts, its size, compression and its structural part, accuracy and its change."""
        return [
            {
                "grain": grain.name,
                "cuts": len(grain.kept),
                "params": grain.size.params,
                "nonzero": grain.size.nonzero,
                "macs": grain.size.macs,
                "compression": self.dense.params / grain.size.nonzero,
                "structural": self.dense.params / grain.size.params,
                "before": grain.kept[-1].before if grain.kept else grain.accuracy,
                "accuracy": grain.accuracy,
                "change": grain.accuracy - self.accuracy,
            }
            for grain in self.grains
        ]

    def to_frame(self) -> pd.DataFrame:
        """The table as a DataFrame; accuracies are shares of one, ``before`` that after the last cut, untrained."""
        import pandas as pd

        return pd.DataFrame(self.rows()).set_index("grain")

    def __repr__(self) -> str:
        body = [
            [r["grain"], f"{r['cuts']}", f"{r['params']:,}", f"{r['nonzero']:,}", f"{r['macs']:,}",
             f"{r['compression']:.2f}×", f"{r['structural']:.2f}×", f"{r['before']:.2%}", f"{r['accuracy']:.2%}"]
            for r in self.rows()
        ]  # fmt: skip
        head = ["grain", "cuts", "parameters", "non-zero", "MACs", "compression", "structural", "cut", "trained"]
        dense = ["unpruned", "", f"{self.dense.params:,}", f"{self.dense.nonzero:,}", f"{self.dense.macs:,}"]
        return aligned([head, [*dense, "1.00×", "1.00×", "", f"{self.accuracy:.2%}"], *body])
