"""Image by image: what a network took it for before it was pruned, and what it takes it for now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunelab.errors import PruneLabError
from prunelab.intervals import paired_half_width
from prunelab.preview import Precision, Preview
from prunelab.program.run import removes_anything
from prunelab.program.selection import Selection
from prunelab.progress import Progress, track

if TYPE_CHECKING:
    import pandas as pd

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Predictions of the unpruned and the pruned network on the same images.

    Attributes:
        images: which of the preview's images, shape ``(n,)``; all that follow have the same shape and order.
        labels: their classes.
        before: classes that the unpruned network predicts; ``after`` the pruned one.
        totals: images that there are of each class.
        precision: of the arithmetic of both.
        changed: whether the selection removes anything; else no change is certain.
        names: of the classes, or empty.
    """

    images: Ints
    labels: Ints
    before: Ints
    after: Ints
    totals: Mapping[int, int]
    precision: str
    changed: bool = True
    names: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        """Images seen."""
        return len(self.images)

    @property
    def lost(self) -> NDArray[np.bool_]:
        """Images that the unpruned network had right and the pruned one has wrong."""
        found: NDArray[np.bool_] = (self.before == self.labels) & (self.after != self.labels)
        return found

    @property
    def gained(self) -> NDArray[np.bool_]:
        """Images that the unpruned network had wrong and the pruned one has right."""
        found: NDArray[np.bool_] = (self.before != self.labels) & (self.after == self.labels)
        return found

    def name(self, label: int) -> str:
        """A class in words."""
        return self.names[label] if 0 <= label < len(self.names) else str(label)

    def per_class(self) -> pd.DataFrame:
        """A row per class that has images: their number, accuracy before and after, change, and its interval.

        ``half`` is the half width of the 95 % interval of the change on all images of the class, from the paired
        outcomes on those seen; 0 once all are. Of twenty classes about one change lies outside its interval by chance.
        """
        import pandas as pd

        rows = []
        for label in np.unique(self.labels).tolist():
            own = self.labels == label
            before, after = self.before[own] == label, self.after[own] == label
            rows.append(
                {
                    "class": label,
                    "name": self.name(label),
                    "n": int(own.sum()),
                    "before": float(before.mean()),
                    "after": float(after.mean()),
                    "change": float(after.mean() - before.mean()),
                    "half": paired_half_width(after, before, self.totals[label]) if self.changed else 0.0,
                }
            )
        return pd.DataFrame(rows)

    def flipped(self) -> pd.DataFrame:
        """A row per image that is right in one network only, what was lost first: image, label, before, after, flip."""
        import pandas as pd

        chosen = [(np.flatnonzero(which), word) for which, word in ((self.lost, "lost"), (self.gained, "gained"))]
        at = np.concatenate([found[np.argsort(self.images[found])] for found, _ in chosen])
        columns = {"image": self.images, "label": self.labels, "before": self.before, "after": self.after}
        frame = pd.DataFrame({name: values[at] for name, values in columns.items()})
        return frame.assign(flip=[word for found, word in chosen for _ in found])

    def __str__(self) -> str:
        before, after = (float((found == self.labels).mean()) for found in (self.before, self.after))
        lost, gained = int(self.lost.sum()), int(self.gained.sum())
        return (
            f"{lost:,} images are wrong now that were right, {gained:,} right that were wrong: "
            f"{before:.2%} → {after:.2%} (n = {self.n:,} of {sum(self.totals.values()):,}, {self.precision})"
        )


def outcomes_of(
    preview: Preview,
    selection: Selection,
    n: int | None,
    repaired: Mapping[str, Tensor],
    precision: Precision,
    progress: Progress | bool,
) -> Outcomes:
    """As :meth:`Preview.outcomes`."""
    labels = preview.labels
    if labels.dim() != 1 or labels.is_floating_point():
        raise PruneLabError(f"Outcomes need one class number per image, not labels of shape {tuple(labels.shape)}.")
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    precisions: list[str] = []
    batches = preview.predictions(selection, n, repaired, precision)
    for images, before, after, name in track(batches, "predicting", None, progress):
        if after.dim() != 2 or len(after) != len(images):
            raise PruneLabError(f"Outcomes need outputs of shape (images, classes), not {tuple(after.shape)}.")
        parts.append((images, before.argmax(1).cpu(), after.argmax(1).cpu()))
        precisions.append(name)
    images, before, after = (torch.cat(column) for column in zip(*parts, strict=True))
    return Outcomes(
        images=images.numpy(),
        labels=labels[images].cpu().long().numpy(),
        before=before.numpy(),
        after=after.numpy(),
        totals=dict(zip(*(found.tolist() for found in labels.unique(return_counts=True)), strict=True)),
        precision=precisions[0],
        changed=removes_anything(preview.program, selection),
    )
