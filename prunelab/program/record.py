"""What a committed module remembers: the way from the user's code to its shapes.

It is one dict for every commit, of plain Python values only, so that it goes wherever the module goes: through
``copy.deepcopy``, ``torch.save`` and fine-tuning, and into JSON. This is the one place that writes and reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.errors import PruneLabError
from prunelab.plain import from_plain, to_plain
from prunelab.program.program import Program
from prunelab.program.run import kept_layers
from prunelab.program.selection import Selection
from prunelab.program.trace import state_tensors, unwrap

_ATTRIBUTE = "_prunelab_commits"


def commits(model: nn.Module) -> tuple[dict[str, Any], ...]:
    """The commits that made a module, the first one first; empty for one that was never committed.

    Each has ``kept`` (the channels that stayed, by layer), ``example`` (the arguments that the network was traced
    with, as shapes and dtypes; None where they are not plain) and ``dtypes`` (of its tensors then, by name).
    """
    return tuple(vars(unwrap(model)).get(_ATTRIBUTE, ()))


def remember(small: nn.Module, program: Program, selection: Selection) -> None:
    """Write into a module that ``selection`` made it from ``program``'s."""
    # Layers are those that are there without the bypassed units.
    program = program.under(selection)
    layers = program.structure.layers
    commit = {
        "kept": {layers[at].name: list(kept) for at, kept in kept_layers(program, selection).items()},
        "bypassed": list(program.bypassed),
        "example": _described(program.example),
        "dtypes": {name: str(tensor.dtype) for name, tensor in state_tensors(program.model).items()},
    }
    # Past __setattr__, which may be the user's own.
    vars(small)[_ATTRIBUTE] = (*commits(program.model), commit)


def selection_of(commit: Mapping[str, Any]) -> Selection:
    """What a commit kept."""
    kept = {layer: tuple(channels) for layer, channels in commit["kept"].items()}
    return Selection(kept, bypassed=tuple(commit["bypassed"]))


def example_of(commit: Mapping[str, Any], device: torch.device) -> tuple[Any, ...]:
    """Arguments like those that a commit's network was traced with: the same shapes and dtypes, zeros in them.

    Raises:
        PruneLabError: they held something other than tensors and plain values.
    """
    if commit["example"] is None:
        raise PruneLabError(
            "its example input was not made of tensors and plain values, so give it once more: example="
        )

    def zeros(like: Mapping[str, Any]) -> Tensor:
        return torch.zeros(like["shape"], dtype=dtype_of(like["dtype"]), device=device)

    example: tuple[Any, ...] = from_plain(commit["example"], zeros)
    return example


def dtype_of(name: str) -> torch.dtype:
    """The dtype that is written like this: ``torch.float16``."""
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype


def _described(example: tuple[Any, ...]) -> Any:
    try:
        return to_plain(example, lambda t: {"shape": list(t.shape), "dtype": str(t.dtype)})
    except PruneLabError:
        # That it cannot be saved must not keep a network from being committed.
        return None
