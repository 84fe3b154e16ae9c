"""Files that are written whole or not at all."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new name beside a file, to write to: it takes the file's place in one step, and is gone after an error.

    Raises:
        OSError: the folder is missing, or another file cannot take the place.
    """
    beside = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write contiguous tensors that share no memory as safetensors.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
        KeyError: a data type that the format does not know.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
