"""Where the files that travel with prunelab lie: embedded data, checkpoints and notebooks."""

from __future__ import annotations

from pathlib import Path

from prunelab.errors import PruneLabError

_NAMES = ("data", "notebooks")


def folder(name: str) -> Path:
    """Return the folder ``"data"`` or ``"notebooks"``, from an installed wheel or from a source checkout.

    Raises:
        PruneLabError: if ``name`` is neither, or if this installation came without that folder.
    """
    if name not in _NAMES:
        raise PruneLabError(f"There is no resource folder {name!r}; ask for 'data' or 'notebooks'.")
    package = Path(__file__).resolve().parent
    installed = package / "_share" / name
    if installed.is_dir():
        return installed
    # Beside an installed package a folder called "data" could be anybody's; only a checkout has a
    # pyproject.toml there.
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    raise PruneLabError(
        f"The folder {name!r} is missing from this installation of prunelab; "
        "install prunelab again from its wheel or work in a full source checkout."
    )
