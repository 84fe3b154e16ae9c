"""A lab's files: tensors as safetensors, all else as JSON; nothing by pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.errors import PruneLabError
from prunelab.explorer.stage import Cuts
from prunelab.program.program import Program, trace
from prunelab.program.selection import Selection
from prunelab.program.surgery import cut
from prunelab.program.trace import export

_MASK = "mask:"


def write_lab(folder: Path, model: nn.Module, masks: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write a network's tensors and masks, and a record of the rest that JSON can hold.

    Raises:
        PruneLabError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    with _written("lab", folder):
        folder.mkdir(parents=True, exist_ok=True)
        held = {f"{_MASK}{name}": mask.contiguous() for name, mask in masks.items()}
        save_file({**_tensors(model), **held}, folder / "network.safetensors")
        (folder / "lab.json").write_text(json.dumps({"format": 1, **record}, indent=1))


def read_lab(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """The reverse of :func:`write_lab`: state, masks and record; raises whatever reading raises."""
    from safetensors.torch import load_file

    record = json.loads((folder / "lab.json").read_text())
    tensors = load_file(folder / "network.safetensors")
    masks = {name.removeprefix(_MASK): t for name, t in tensors.items() if name.startswith(_MASK)}
    return {name: t for name, t in tensors.items() if not name.startswith(_MASK)}, masks, record


def write_network(program: Program, target: Path) -> None:
    """Write a network to a ``.pt2`` (runs without its code) or ``.safetensors`` (weights) file.

    Raises:
        PruneLabError: another suffix, or a file that cannot be written.
    """
    from safetensors.torch import save_file

    if target.suffix not in (".pt2", ".safetensors"):
        raise PruneLabError(f"Export to a file that ends in .pt2 or .safetensors, not {target.name!r}.")
    with _written("network", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".pt2":
            torch.export.save(export(program.model, program.example), target)
        else:
            save_file(_tensors(program.model), target)


def record_of(cuts: Cuts) -> list[dict[str, Any]]:
    """Cuts as JSON can hold them; :func:`cuts_of` is the reverse."""
    return [{"kept": dict(cut_.kept), "bypassed": list(cut_.bypassed)} for cut_ in cuts]


def cuts_of(record: list[dict[str, Any]]) -> Cuts:
    """The reverse of :func:`record_of`."""
    return tuple(Selection(kept=cut_["kept"], bypassed=tuple(cut_["bypassed"])) for cut_ in record)


def rebuild(model: nn.Module, cuts: Cuts, state: Mapping[str, Tensor], example: Tensor) -> nn.Module:
    """A fresh model cut to the saved shapes, with the saved tensors.

    Raises:
        PruneLabError: the tensors are another network's.
    """
    for selection in cuts:
        model = cut(trace(model, example, prove=False), selection)
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise PruneLabError("The saved tensors are not those of the model that make_model gives.") from error
    return model


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's state; cloned, since safetensors refuses tensors that share memory."""
    return {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}


@contextmanager
def _written(what: str, target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PruneLabError(f"The {what} cannot be written to {target}: {error}.") from error
