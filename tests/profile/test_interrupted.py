"""Profiles that were interrupted are taken up, profiles made twice at once do no harm, memory stays bounded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import Network
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

import prunelab as pl
from prunelab import zoo
from prunelab.profile import shards
from prunelab.profile.result import Profile
from prunelab.program.run import Bound

NETWORK = Network(zoo.lenet, (1, 28, 28))
COMPARED = 4


# The network and the data that every process makes again, the same each time.
SAME = """
import os, signal, sys
from pathlib import Path
import torch
from support import Network
from torch.utils.data import DataLoader, TensorDataset
import prunelab as pl
from prunelab import zoo
network = Network(zoo.lenet, (1, 28, 28))
program = pl.trace(network.build(torch.float32), network.images(2, torch.float32), prove=False)
images = network.images(6000, torch.float32)
data = TensorDataset(images, torch.zeros(6000, dtype=torch.int64))
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Start:
    """Starts a Python process that runs some code after ``SAME``."""

    def started(code: str, *arguments: object) -> subprocess.Popen[str]:
        folders = [str(Path(pl.__file__).parents[1]), str(Path(__file__).parents[1] / "support")]
        paths = f"import sys; sys.path[:0] = {folders!r}\n"
        command = [sys.executable, "-c", paths + SAME + code, *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return started


@pytest.fixture(scope="module")
def program() -> pl.Program:
    return pl.trace(NETWORK.build(torch.float32), NETWORK.images(2, torch.float32), prove=False)


@pytest.fixture(scope="module")
def data() -> TensorDataset:
    return TensorDataset(NETWORK.images(6000, torch.float32), torch.zeros(6000, dtype=torch.int64))


@pytest.fixture(scope="module")
def whole(program: pl.Program, data: TensorDataset) -> Profile:
    return pl.profile(program, data, cache=False, progress=False, sample=2100)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images that run, batch by batch, through the real interpreter."""
    counted: list[int] = []
    run = Bound.run

    def counting(self: Bound, inputs: tuple[Any, ...], *rest: Any) -> tuple[Any, ...]:
        counted.append(len(inputs[0]))
        return run(self, inputs, *rest)

    monkeypatch.setattr(Bound, "run", counting)
    return counted


def assert_same(found: Profile, expected: Profile) -> None:
    assert found.images == expected.images
    assert found.room == expected.room
    assert found.statistics.keys() == expected.statistics.keys()
    for site, statistics in expected.statistics.items():
        for name, array in statistics.arrays().items():
            assert np.array_equal(found.statistics[site].arrays()[name], array), name
        assert torch.equal(found.activations[site], expected.activations[site])
        assert torch.equal(found.pooled[site], expected.pooled[site])


def stopping_at(batch: int) -> Any:
    return lambda done, *_: done < batch


KILLED = """
def die(done, total, what):
    print(done, what, flush=True)
    if done == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
pl.profile(program, data, cache=sys.argv[1], sample=2100, progress=die)
"""


def test_killed_twice_it_is_taken_up_and_ends_as_if_it_never_was(
    program: pl.Program, data: TensorDataset, whole: Profile, tmp_path: Path, start: Start, ran: list[int]
) -> None:
    first = start(KILLED, tmp_path, 11)
    out, err = first.communicate(timeout=300)
    assert first.returncode == -signal.SIGKILL, err
    assert out.splitlines()[0] == "1 profile"
    second = start(KILLED, tmp_path, 20)
    out, err = second.communicate(timeout=300)
    assert second.returncode == -signal.SIGKILL, err
    assert out.splitlines()[0] == "9 profile, taken up after 2,048 images"
    seen: list[tuple[int, int | None, str]] = []
    found = pl.profile(program, data, cache=tmp_path, sample=2100, progress=lambda *step: seen.append(step))
    assert seen[0] == (17, 24, "profile, taken up after 4,096 images")
    assert seen[-1][:2] == (24, 24)
    # What the killed processes had completed did not run again.
    assert sum(ran) - COMPARED == 6000 - 4096
    assert_same(found, whole)
    assert found.folder is not None
    assert [path.name for path in (tmp_path / "profiles").iterdir()] == [found.folder.name]


class Counted(Dataset[tuple[Tensor, int]]):
    """Images one by one, and which were asked for; one of them cannot be read."""

    def __init__(self, images: Tensor, broken: int | None = None) -> None:
        self.images_, self.broken = images, broken
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.images_)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.asked.append(index)
        if index == self.broken:
            raise OSError("the disk is gone")
        return self.images_[index], 0

    def fingerprint(self) -> str:
        return "counted"


@pytest.mark.parametrize("loader", [False, True])
def test_after_an_error_images_that_count_already_are_not_read_again(
    program: pl.Program, data: TensorDataset, whole: Profile, tmp_path: Path, loader: bool
) -> None:
    def wrapped(items: Counted) -> Any:
        return DataLoader(items, batch_size=100) if loader else items

    images = data.tensors[0]
    with pytest.raises(OSError, match="the disk is gone"):
        pl.profile(program, wrapped(Counted(images, 5000)), cache=tmp_path, progress=False, sample=2100, batch_size=100)
    again = Counted(images)
    found = pl.profile(program, wrapped(again), cache=tmp_path, progress=False, sample=2100, batch_size=100)
    # The batch that the shard ended in is read whole.
    assert again.asked[0] == 4000
    expected = pl.profile(program, wrapped(again), cache=False, progress=False, sample=2100, batch_size=100)
    assert_same(found, expected)


class Batches(Dataset[Tensor]):
    """Whole batches by number."""

    def __init__(self, images: Tensor) -> None:
        self.parts = images.split(256)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Tensor:
        return self.parts[index]


def test_where_the_place_cannot_be_found_batches_are_read_and_not_run(
    program: pl.Program, data: TensorDataset, whole: Profile, tmp_path: Path, ran: list[int]
) -> None:
    loader = DataLoader(Batches(data.tensors[0]), batch_size=None)
    with pytest.raises(pl.Stopped):
        pl.profile(program, loader, cache=tmp_path, sample=2100, progress=stopping_at(10))
    ran.clear()
    found = pl.profile(program, loader, cache=tmp_path, sample=2100, progress=False)
    assert sum(ran) - COMPARED == 6000 - 2048
    assert_same(found, whole)


def test_a_shuffling_loader_begins_again(
    program: pl.Program, data: TensorDataset, tmp_path: Path, ran: list[int]
) -> None:
    for sequential_first in (True, False):
        folder = tmp_path / str(sequential_first)
        loader = DataLoader(data, batch_size=256, shuffle=not sequential_first)
        with pytest.raises(pl.Stopped):
            pl.profile(program, loader, cache=folder, progress=stopping_at(20))
        ran.clear()
        other = DataLoader(data, batch_size=256, shuffle=sequential_first)
        pl.profile(program, other, cache=folder, progress=False)
        assert sum(ran) - COMPARED == 6000


@pytest.mark.parametrize("how", ["cut off", "a sample less", "garbage"])
def test_damaged_shards_are_measured_again(
    program: pl.Program, data: TensorDataset, whole: Profile, tmp_path: Path, ran: list[int], how: str
) -> None:
    with pytest.raises(pl.Stopped):
        pl.profile(program, data, cache=tmp_path, sample=2100, progress=stopping_at(20))
    (folder,) = (tmp_path / "profiles").iterdir()
    sample, statistics = sorted(folder.glob("sample-*"))[0], next(folder.glob("statistics-*"))
    if how == "cut off":
        statistics.write_bytes(statistics.read_bytes()[:-100])
    elif how == "garbage":
        sample.write_bytes(b"garbage" * 100)
    else:
        sample.unlink()
    ran.clear()
    assert_same(pl.profile(program, data, cache=tmp_path, sample=2100, progress=False), whole)
    assert sum(ran) - COMPARED == 6000


def test_what_was_left_behind_long_ago_is_removed(program: pl.Program, data: TensorDataset, tmp_path: Path) -> None:
    old, fresh = (tmp_path / "profiles" / f".{name}-shards" for name in ("old", "fresh"))
    for folder in (old, fresh):
        folder.mkdir(parents=True)
    then = time.time() - 8 * 24 * 3600
    os.utime(old, (then, then))
    pl.profile(program, data, cache=tmp_path, progress=False, sample=0)
    assert not old.exists()
    assert fresh.exists()


def test_a_full_disk_stops_the_shards_not_the_pass(
    program: pl.Program, data: TensorDataset, whole: Profile, tmp_path: Path
) -> None:
    (tmp_path / "profiles").write_text("a file in the way")
    with pytest.warns(UserWarning, match="cannot be kept"), pytest.warns(UserWarning, match="is not cached"):
        found = pl.profile(program, data, cache=tmp_path, sample=2100, progress=False)
    assert_same(found, whole)


# Several processes ---------------------------------------------

BOTH = """
import time
together = Path(sys.argv[1]) / f"ready-{sys.argv[2]}"
together.touch()
while len(list(together.parent.glob("ready-*"))) < 2:
    time.sleep(0.001)
import warnings
warnings.simplefilter("error")
found = pl.profile(program, data, cache=sys.argv[1], sample=2100, progress=False)
print(found.folder.name, found.images)
"""


def test_two_processes_at_once_both_get_the_right_profile(
    program: pl.Program, data: TensorDataset, whole: Profile, tmp_path: Path, start: Start, ran: list[int]
) -> None:
    both = [start(BOTH, tmp_path, k) for k in range(2)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    ran.clear()
    found = pl.profile(program, data, cache=tmp_path, sample=2100, progress=False)
    assert not ran
    assert_same(found, whole)
    assert found.folder is not None
    assert [path.name for path in (tmp_path / "profiles").iterdir()] == [found.folder.name]


MANY = """
from torch.utils.data import Dataset

class Drawn(Dataset):
    def __len__(self):
        return -(-int(sys.argv[2]) // 256)

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        count = min(256, int(sys.argv[2]) - 256 * index)
        return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(index))

del data, images
found = pl.profile(program, DataLoader(Drawn(), batch_size=None), cache=sys.argv[1], sample=64, progress=False)
# Not getrusage: that begins with what the parent process had.
(peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(found.images, peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from Linux's /proc")
def test_sixty_thousand_images_take_no_more_memory_than_two_thousand(tmp_path: Path, start: Start) -> None:
    peaks = []
    for images in (2_000, 60_000):
        out, err = start(MANY, tmp_path, images).communicate(timeout=300)
        assert out, err
        seen, kilobytes = map(int, out.split())
        assert seen == images
        peaks.append(kilobytes / 1024)
    print(f"\npeak memory: {peaks[0]:.0f} MiB with 2,000 images, {peaks[1]:.0f} MiB with 60,000")
    # The images alone are 179 MiB.
    assert peaks[1] < peaks[0] + 16


def test_a_shard_is_two_thousand_images_whatever_the_batch(
    program: pl.Program, data: TensorDataset, tmp_path: Path
) -> None:
    for size in (100, 256, 1000):
        with pytest.raises(pl.Stopped):
            pl.profile(program, data, cache=tmp_path / str(size), batch_size=size, progress=stopping_at(5500 // size))
        (folder,) = (tmp_path / str(size) / "profiles").iterdir()
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["sample-000000000000.safetensors", f"statistics-{2 * shards.SHARD:012}.safetensors"]
