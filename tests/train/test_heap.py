"""Memory between training steps."""

from __future__ import annotations

import resource
import sys

import psutil
import pytest
import torch

from prunelab.train.heap import freed_memory_kept

BLOCKS, BYTES = 6, 20 * 2**20


def step() -> int:
    """Take and free memory as a step does; how many pages the system had to fill with zeros for it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.empty(BYTES, dtype=torch.uint8).fill_(1) for _ in range(BLOCKS)]
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc alone")
def test_what_a_step_frees_is_there_for_the_next_one_and_given_back_at_the_end() -> None:
    with freed_memory_kept():
        step()
        filled = sum(step() for _ in range(4))
        held = psutil.Process().memory_info().rss
    # Two of the 24 blocks may find a place of their own before the heap has settled.
    assert filled < 2.5 * BYTES / resource.getpagesize()
    assert psutil.Process().memory_info().rss < held - BLOCKS * BYTES / 2
