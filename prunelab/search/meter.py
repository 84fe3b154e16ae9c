"""The loss of a whole selection: measured once, kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prunelab.errors import PruneLabError
from prunelab.preview import Precision, Preview
from prunelab.program.selection import Selection, with_masks
from prunelab.repair import Repairer
from prunelab.scanfile import read_scan, write_scan

_WORST = 1e6


@dataclass(frozen=True)
class Joint:
    """What a whole selection does, on ``n`` images.

    Attributes:
        loss: mean Kullback–Leibler divergence of the cut network's classes from the uncut network's, in nats.
        right: images classified right; ``lost`` those that only the uncut network gets right, ``gained`` the reverse.
    """

    loss: float
    right: int
    lost: int
    gained: int
    n: int


class Meter:
    """Measures selections, each once: what is known is kept on disk, by what it depends on."""

    def __init__(
        self,
        preview: Preview,
        repaired: Callable[[Selection], Mapping[str, Tensor]],
        *,
        begin: Callable[[], None] = lambda: None,
        n: int,
        masks: Mapping[str, Tensor],
        precision: Precision,
        file: Path | None,
    ) -> None:
        """Args:
        repaired: corrected tensors for a selection, by state name.
        begin: called before every measurement; whatever it raises ends the search.
        n: images.
        """
        self._preview = preview
        self._repaired = repaired
        self._begin = begin
        self._n = n
        self._masks = masks
        self._precision = precision
        self._file = file
        self._held = read_scan(file)

    def __call__(self, selection: Selection) -> Joint:
        """The whole network with this selection."""
        masked = with_masks(selection, self._masks)
        if masked.digest not in self._held:
            self._begin()
            found = self._measured(selection, masked)
            self._held[masked.digest] = (found.loss, float(found.right), float(found.lost), float(found.gained), 0.0)
            if self._file is not None and not write_scan(self._file, self._held):
                self._file = None
        loss, right, lost, gained, _ = self._held[masked.digest]
        return Joint(loss, int(right), int(lost), int(gained), self._n)

    def _measured(self, selection: Selection, masked: Selection) -> Joint:
        repaired = self._repaired(masked)
        images, before, now = outputs(self._preview, selection, self._n, repaired, self._precision)
        if now.dim() != 2 or len(now) != len(images):
            raise PruneLabError(f"A search needs outputs of shape (images, classes), not {tuple(now.shape)}.")
        labels = self._preview.labels[images].to(now.device)
        was, stays = before.argmax(1) == labels, now.argmax(1) == labels
        return Joint(
            loss=divergence(before, now),
            right=int(stays.sum()),
            lost=int((was & ~stays).sum()),
            gained=int((~was & stays).sum()),
            n=len(images),
        )


def outputs(
    preview: Preview, selection: Selection, n: int | None, repaired: Mapping[str, Tensor], precision: Precision
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of the images, and the uncut and the cut network's outputs for them, ``(images, classes)``."""
    parts = preview.predictions(selection, n, repaired, precision)
    images, before, now = (torch.cat(part) for part in list(zip(*parts, strict=True))[:3])
    return images, before, now


def divergence(before: Tensor, now: Tensor) -> float:
    """Mean of KL(softmax(before) ‖ softmax(now)) over images, in nats; outputs of shape ``(images, classes)``.

    It sees a change long before a class changes, and needs no labels. Outputs that are not finite count as very far.
    """
    p, q = before.double().log_softmax(1), now.double().log_softmax(1)
    each = (p.exp() * (p - q)).sum(1).nan_to_num(_WORST, _WORST, _WORST)
    return float(each.clamp(0, _WORST).mean())


def quickly(repairer: Repairer, cut: Selection, how: str) -> Mapping[str, Tensor]:
    """The quick form of a repair, or the repair itself where that leaves a layer as it is: wide ones, for example."""
    found = repairer.quick(cut, how)
    return repairer(cut, how) if found is None or found.left else found
