"""A training in several processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import killed
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import prunelab as pl


class Plain(killed.Small):
    """Without a norm and dropout, which see the images of one process only."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape ``(images, 4)``."""
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def trained(kind: str, folder: Path | None = None, stop_after: int = 10**9) -> tuple[nn.Module, Any]:
    """A training in float64 of 44 images in batches of 16: the last one does not divide evenly among two."""
    torch.manual_seed(1)
    model = Plain().double().requires_grad_(True)
    for part in (model.norm, model.drop):
        part.requires_grad_(False)
    sets = (killed.images(44, 0), killed.images(31, 1))
    train, val = (TensorDataset(each.tensors[0].double(), each.tensors[1]) for each in sets)
    calls: list[int] = []

    def progress(done: int, total: int | None, what: str) -> bool:
        calls.append(done)
        return len(calls) < stop_after

    given: Any = train if kind == "held" else DataLoader(train, 16, drop_last=True)
    table = pl.finetune(
        model, given, val if kind == "held" else DataLoader(val, 8), folder=folder, batch_size=16, epochs=4, lr=0.05,
        precision="no", progress=progress, every=2,
    )  # fmt: skip
    return model, table


def main(folder: Path) -> None:
    """Train held and loaded, stopped in between and not, and write every process's weights and accuracies."""
    for kind in ("held", "loader"):
        trained(kind, folder / kind, stop_after=5)
        model, table = trained(kind, folder / kind)
        tensors = {"accuracy": torch.tensor(table["accuracy"].tolist()), "loss": torch.tensor(table["loss"].tolist())}
        rank = PartialState().process_index
        save_file({**tensors, **{k: v.contiguous() for k, v in model.state_dict().items()}}, folder / f"{kind}-{rank}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
