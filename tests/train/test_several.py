"""Two processes train as one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import running
import several
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    folder = tmp_path_factory.mktemp("several")
    command = [sys.executable, "-m", *running.launcher(2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, several.__file__, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("kind", ["held", "loader"])
def test_two_processes_stopped_and_resumed_end_where_one_ends(folder: Path, kind: str) -> None:
    model, table = several.trained(kind)
    for rank in range(2):
        found = load_file(folder / f"{kind}-{rank}")
        assert found.pop("accuracy").tolist() == pytest.approx(table["accuracy"].tolist(), abs=1e-6)
        torch.testing.assert_close(
            found.pop("loss").double(), torch.tensor(table["loss"]), rtol=1e-5, atol=1e-6, equal_nan=True
        )
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-12)
    assert sorted(file.suffix for file in (folder / kind).iterdir()) == [".json", ".safetensors"]
