"""Save, load and export: tensors as safetensors, all else as JSON; nothing by pickle.

A saved network is its tensors and the way to their shapes, not its code: ``load`` asks the user's own code for the
uncut network, commits to it what was committed, and puts the saved tensors in.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunelab.commit import commit
from prunelab.errors import PruneLabError
from prunelab.files import write_tensors
from prunelab.optimizers import build, from_record, read, to_record
from prunelab.program.program import trace
from prunelab.program.record import commits, dtype_of, example_of, selection_of
from prunelab.program.trace import aliases, as_example, export as exported, state_tensors, unwrap

FORMAT = 1
Record = dict[str, Any]

# What stands before the names of tensors that are neither parameters nor buffers.
_PLAIN, _OPTIMIZER = "plain:", "optimizer:"


def save(folder: Path | str, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Write a network, committed or not, to a folder: ``network.json``, and the safetensors file that it names.

    An interrupted save leaves what was there before.

    Args:
        folder: made where there is none; a network saved in it before is replaced.
        optimizer: its memory (momenta, step counts, settings) is saved too, for :func:`load_optimizer`.

    Raises:
        PruneLabError: the folder cannot be written, or something in network or optimizer needs pickle.
    """
    tensors, record = described(model)
    if optimizer is not None:
        record["optimizer"] = to_record(read(optimizer, model), lambda t: _held(tensors, t))
    write_folder(Path(folder), "network", tensors, record)


def load(folder: Path | str, make_model: Callable[[], nn.Module], *, example: Any = None) -> nn.Module:
    """The network that :func:`save` wrote: the same tensors, dtypes, training flags and ``requires_grad``.

    Args:
        make_model: gives the network before the first commit, from the user's own code; its tensors do not matter.
        example: an input of forward; needed only where the one that the network was traced with was not made of
            tensors and plain values.

    Raises:
        PruneLabError: there is no saved network, or it is another one than ``make_model`` gives.
    """
    return rebuilt(make_model, *read_folder(Path(folder), "network"), example=example)


def load_optimizer(folder: Path | str, model: nn.Module, make: Callable[..., Optimizer]) -> Optimizer:
    """The optimizer that :func:`save` wrote with a network, over the parameters of the loaded network.

    Args:
        model: what :func:`load` gave.
        make: the optimizer's class, for example ``torch.optim.AdamW``; settings are those that were saved.

    Raises:
        PruneLabError: no optimizer was saved, or another one than ``make`` gives.
    """
    tensors, record = read_folder(Path(folder), "network")
    if "optimizer" not in record:
        raise PruneLabError(f"The network in {folder} was saved without an optimizer.")
    return build(make, from_record(record["optimizer"], tensors.__getitem__, model), model)


# A network as tensors and a record ---------------------------------------------


def described(model: nn.Module) -> tuple[dict[str, Tensor], Record]:
    """A network's tensors by name, and all else that :func:`rebuilt` needs, as values that JSON can hold.

    Raises:
        PruneLabError: a part of it has extra state, which may be anything.
    """
    model = unwrap(model)
    for name, part in model.named_modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            raise PruneLabError(f"{name or 'The network'} ({type(part).__name__}) has extra state: it needs pickle.")
    states = state_tensors(model)
    record = {
        "class": type(model).__name__,
        "commits": list(commits(model)),
        "tied": _tied(model),
        "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
        "training": [name for name, part in model.named_modules() if part.training],
        "strides": {name: list(_strides(t)) for name, t in states.items() if not _is_plainly_laid_out(t)},
    }
    plain = {f"{_PLAIN}{_dotted(*place)}": t for place, t in _plain_tensors(model).items()}
    return {name: t.detach() for name, t in {**states, **plain}.items()}, record


def rebuilt(
    make_model: Callable[[], nn.Module], tensors: Mapping[str, Tensor], record: Record, example: Any = None
) -> nn.Module:
    """The network that :func:`described` took apart.

    Raises:
        PruneLabError: it is another one than ``make_model`` gives.
    """
    model = _made(make_model)
    made = type(model).__name__
    try:
        for made_by in record["commits"]:
            model = _committed(model, made_by, example)
    except PruneLabError as error:
        raise PruneLabError(
            f"The saved tensors are not those of the model that make_model gives: the cuts of the saved "
            f"{record['class']} do not fit this {made}. {error}"
        ) from error
    misfit = _misfit(model, tensors, record)
    if misfit:
        raise PruneLabError(
            f"The saved tensors are not those of the model that make_model gives: {misfit} "
            f"(saved from a {record['class']}, made a {made})."
        )
    _fill(model, tensors, record)
    return model


def _made(make_model: Callable[[], nn.Module]) -> nn.Module:
    model = None if isinstance(make_model, nn.Module) else make_model()
    if not isinstance(model, nn.Module):
        raise PruneLabError("make_model must be a function that gives the uncut torch.nn.Module: lambda: MyNetwork().")
    return unwrap(model)


def _committed(model: nn.Module, made_by: Mapping[str, Any], example: Any) -> nn.Module:
    """One recorded commit made again."""
    for name, tensor in state_tensors(model).items():
        if name in made_by["dtypes"]:
            tensor.data = tensor.data.to(dtype_of(made_by["dtypes"][name]))
    if example is None:
        device = next((t.device for t in state_tensors(model).values()), torch.device("cpu"))
        example = example_of(made_by, device)
    selection = selection_of(made_by)
    try:
        return commit(trace(model, example), selection)
    except PruneLabError:
        # The user's own program may have been traced without the proof, which pins more.
        return commit(trace(model, example, prove=False), selection)


def _misfit(model: nn.Module, tensors: Mapping[str, Tensor], record: Record) -> str:
    """Where a network is not the saved one, or ""."""
    made = {name: tuple(t.shape) for name, t in state_tensors(model).items()}
    saved = {name: tuple(t.shape) for name, t in tensors.items() if not name.startswith((_PLAIN, _OPTIMIZER))}
    for name in [*saved, *made]:
        if name not in made or name not in saved:
            return f"{name} is only in the {'saved' if name in saved else 'made'} one"
        if made[name] != saved[name]:
            return f"{name} has shape {made[name]}, the saved one {saved[name]}"
    return "" if _tied(model) == record["tied"] else "they share other tensors"


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], record: Record) -> None:
    """Give a network of the right shapes the saved tensors and flags."""
    for name, tensor in state_tensors(model).items():
        # Before the data: whole numbers cannot require gradients.
        tensor.requires_grad_(False)
        tensor.data = _laid_out(tensors[name], record["strides"].get(name)).to(tensor.device)
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(name not in record["frozen"])
    training = set(record["training"])
    for name, part in model.named_modules():
        part.training = name in training
    plain = _plain_tensors(model)
    for (name, attribute), tensor in plain.items():
        saved = tensors.get(f"{_PLAIN}{_dotted(name, attribute)}")
        if saved is not None:
            vars(model.get_submodule(name))[attribute] = saved.to(tensor.device)


def _tied(model: nn.Module) -> dict[str, str]:
    """Further names of tied tensors, with the first."""
    return {name: first for name, first in aliases(model).items() if name != first}


def _plain_tensors(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """Tensors that modules hold as ordinary attributes, which no ``state_dict`` has, by module and attribute."""
    return {
        (name, attribute): value
        for name, part in model.named_modules()
        for attribute, value in vars(part).items()
        if isinstance(value, Tensor)
    }


def _dotted(module: str, attribute: str) -> str:
    return f"{module}.{attribute}" if module else attribute


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """How a copy of the tensor lies in memory; ``channels_last`` weights compute by other kernels than others."""
    return torch.empty_like(tensor, device="meta").stride()


def _is_plainly_laid_out(tensor: Tensor) -> bool:
    return _strides(tensor) == torch.empty(tensor.shape, device="meta").stride()


def _laid_out(tensor: Tensor, strides: list[int] | None) -> Tensor:
    """A copy, in memory of torch's own: it is aligned, as a file's is not, and some kernels round by alignment."""
    if strides is None:
        return tensor.clone()
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)


# Files ---------------------------------------------


def write_folder(folder: Path, name: str, tensors: Mapping[str, Tensor], record: Record) -> None:
    """Write tensors and a record; whoever reads gets both from this save or both from the last.

    The safetensors file is called by what is in it. The record, which names it, is moved to its place last, and in
    one step; then the file that the last record named is deleted.

    Raises:
        PruneLabError: the folder cannot be written.
    """
    from prunelab import __version__

    with _beside(folder, name, f"{name}.json") as beside:
        unnamed = beside / "tensors"
        _write_tensors(tensors, unnamed)
        with unnamed.open("rb") as file:
            called = f"{name}-{hashlib.file_digest(file, 'blake2b').hexdigest()[:16]}.safetensors"
        unnamed.rename(beside / called)
        head = {"format": FORMAT, "prunelab": __version__, "torch": torch.__version__, "tensors": called}
        (beside / f"{name}.json").write_text(json.dumps({**head, **record}), encoding="utf-8")
    delete_others(folder, name, called)


def delete_others(folder: Path, name: str, called: str) -> None:
    """Delete the tensors of other saves than the one whose safetensors file is called so."""
    for old in folder.glob(f"{name}-*.safetensors"):
        if old.name != called:
            # Another process may have been faster, or the folder is one to read alone.
            with suppress(OSError):
                old.unlink()


def read_folder(folder: Path, name: str) -> tuple[dict[str, Tensor], Record]:
    """The reverse of :func:`write_folder`.

    Raises:
        PruneLabError: there is nothing of that name in the folder, or it is damaged or of a later format.
    """
    from safetensors.torch import load_file

    try:
        record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise PruneLabError(f"it has format {record['format']}, this version reads {FORMAT}")
        return load_file(folder / record["tensors"]), record
    except Exception as error:
        raise PruneLabError(f"There is no {name} to load in {folder}: {error}.") from error


def _write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    try:
        # Clones: safetensors refuses tensors that share memory.
        write_tensors({name: t.detach().contiguous().clone() for name, t in tensors.items()}, file)
    except KeyError as error:
        raise PruneLabError(f"Tensors of {error.args[0]} cannot be kept in a safetensors file.") from error


def _held(tensors: dict[str, Tensor], tensor: Tensor) -> str:
    """Put an optimizer's tensor among the others, under a name of its own."""
    name = f"{_OPTIMIZER}{len(tensors)}"
    tensors[name] = tensor
    return name


@contextmanager
def _beside(folder: Path, what: str, last: str) -> Iterator[Path]:
    """A folder within ``folder`` for new files; when all are written they move out, the one called ``last`` last."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".unfinished-") as beside:
            yield Path(beside)
            for file in sorted(Path(beside).iterdir(), key=lambda file: file.name == last):
                file.replace(folder / file.name)
    except OSError as error:
        raise PruneLabError(f"The {what} cannot be written to {folder}: {error}.") from error


# Export ---------------------------------------------


def export(model: nn.Module, example: Any, path: Path | str) -> Path:
    """Write a network to one file that runs, or loads, without prunelab.

    ``.pt2`` is ``torch.export``'s (runs without the network's code), ``.onnx`` is for other runtimes; both are the
    network in evaluation mode, for any number of images where its code allows that. ``.safetensors`` holds its
    ``state_dict``. A network of more than 2 GB as ``.onnx`` gets its weights in a file ``.onnx.data`` beside it.

    Args:
        example: an input of forward, shape ``(images, …)``, or a tuple of all its arguments.

    Returns:
        The file.

    Raises:
        PruneLabError: another suffix, a network that the format cannot hold, a package that is missing, or a file
            that cannot be written.
    """
    target = Path(path)
    if target.suffix not in _WRITERS:
        raise PruneLabError(f"Export to a file that ends in .pt2, .onnx or .safetensors, not {target.name!r}.")
    with _beside(target.parent, "network", target.name) as beside:
        _WRITERS[target.suffix](unwrap(model), example, beside / target.name)
    return target


def _write_pt2(model: nn.Module, example: Any, file: Path) -> None:
    program = exported(model, as_example(example))
    # The user's own images, which the file would otherwise hold.
    program.example_inputs = None
    # In memory first: torch's own writer of files ends the whole process where the disk is full.
    held = io.BytesIO()
    torch.export.save(program, held)
    file.write_bytes(held.getbuffer())


def _write_safetensors(model: nn.Module, example: Any, file: Path) -> None:
    _write_tensors(model.state_dict(), file)


def _write_onnx(model: nn.Module, example: Any, file: Path) -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise PruneLabError(f"Export to ONNX needs {' and '.join(missing)}: pip install 'prunelab[onnx]'.")
    program = exported(model, as_example(example))
    size = sum(t.numel() * t.element_size() for t in state_tensors(model).values())
    try:
        torch.onnx.export(program, f=file, dynamo=True, verbose=False, external_data=size > _LARGEST_ONNX)
    except OSError:
        raise
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PruneLabError(f"{type(model).__name__} cannot be written as ONNX: {line}") from error


# Protocol buffers end at 2 GiB, and the graph needs some of it.
_LARGEST_ONNX = 2**31 - 2**26
_WRITERS: Mapping[str, Callable[[nn.Module, Any, Path], None]] = {
    ".pt2": _write_pt2,
    ".onnx": _write_onnx,
    ".safetensors": _write_safetensors,
}
FORMATS = tuple(_WRITERS)
"""How the names of files end that :func:`export` writes."""
