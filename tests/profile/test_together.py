"""Two processes on this machine profile as one does."""

from __future__ import annotations

from pathlib import Path

import profiled
import pytest
import running
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    folder = tmp_path_factory.mktemp("together")
    done = running.command("profiled", str(folder), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("kind", [*profiled.DATA, "kept", "found"])
@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_has_the_profile_that_one_makes_of_all(folder: Path, kind: str, rank: int) -> None:
    one = profiled.values(profiled.made(kind if kind in profiled.DATA else "set", cache=False))
    two = load_file(folder / f"{kind}-{rank}")
    assert int(two["images"]) == (56 if kind == "loader" else 61)
    assert two.keys() == one.keys()
    assert {len(value) for name, value in two.items() if name.startswith("activations")} == {45}
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-12, atol=1e-12)


def test_the_main_process_alone_writes_the_cache(folder: Path) -> None:
    assert [path.name for path in folder.glob("cache-*")] == ["cache-0"]
    assert len(list(folder.glob("cache-0/profiles/*"))) == 1
    assert not list(folder.glob("cache-*/profiles/.*"))


def test_trouble_in_one_process_ends_all_of_them(folder: Path) -> None:
    first, second = ((folder / f"said-{rank}").read_text().splitlines() for rank in range(2))
    assert first[0] == (
        "PruneLabError: Another process could not profile its share of the data; its own message says why."
    )
    assert second[0] == "PruneLabError: This image cannot be read."
    assert first[1].startswith("Stopped: ")
    assert second[1].startswith("Stopped: ")
    assert first[2] == second[2]
    assert "come in the same order every time" in first[2]
    assert "There are 1 batches of 61 images to profile, too few for 2 processes" in first[3]
