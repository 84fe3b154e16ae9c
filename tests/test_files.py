"""A full disk: said in a sentence, or gone on without; nothing half written, and what was there before stays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prunelab.files import replacing

# Files of more than so many bytes cannot be written, as on a full disk. In a process of its own: torch's writer of
# files ends the process that meets it.
FULL = """
import json, resource, sys, warnings
from pathlib import Path
import torch, prunelab as pl
from prunelab import zoo

folder = Path(sys.argv[1])
model, images = zoo.lenet(), torch.rand(2_100, 1, 28, 28)
data = torch.utils.data.TensorDataset(images[:40], torch.arange(40) % 10)
program = pl.trace(model, images[:2])
profile = pl.profile(program, images, cache=False, progress=False)

def export(suffix):
    path = folder / f"network.{suffix}"
    path.write_text("before")
    try:
        pl.export(model, images[:2], path)
    finally:
        assert path.read_text() == "before"
        path.unlink()

writers = {
    "pt2": lambda: export("pt2"),
    "onnx": lambda: export("onnx"),
    "safetensors": lambda: export("safetensors"),
    "save": lambda: pl.save(folder / "saved", model),
    "finetune": lambda: pl.finetune(model, data, data, epochs=1, folder=folder / "run", progress=False),
    "profile": lambda: pl.profile(program, images, cache=folder, progress=False).images,
    "gradients": lambda: pl.with_gradients(profile, data, cache=folder, progress=False).images,
}
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
found = {}
for name, write in writers.items():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found[name] = [str(write()), *(str(each.message) for each in said)]
        except Exception as error:
            found[name] = [type(error).__name__, str(error)]
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of a file's size there")
def test_a_full_disk_is_said_by_every_writer(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for what, (kind, *said) in found.items():
        assert all("File too large" in each for each in said), what
        if what in ("profile", "gradients"):
            assert kind == "2100"
            # The first 2,000 images are a shard, which cannot be kept either.
            assert len(said) == (2 if what == "profile" else 1)
            assert all("it goes on without" in each for each in said)
        else:
            noun = "training" if what == "finetune" else "network"
            assert kind == "PruneLabError"
            assert said[0].startswith(f"The {noun} cannot be written to {tmp_path}")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_cannot_be_written_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for text in ("first", "second"):
        with replacing(path) as beside:
            beside.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text

    def half() -> None:
        with replacing(path) as beside:
            beside.write_text("thi")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        half()
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]
    assert path.read_text() == "second"
