"""What several tests of the explorer begin with."""

from __future__ import annotations

import pytest

import prunelab as pl
from prunelab.explorer.app import Explorer

TRAIN, TEST = pl.datasets.fashion_mnist()


@pytest.fixture
def lab() -> pl.Lab:
    return pl.Lab(pl.zoo.load("lenet"), TRAIN.subset(200), TEST.subset(200), cache=False)


@pytest.fixture
def explorer(lab: pl.Lab) -> Explorer:
    """The explorer over the ``lab``, which a file may have of its own, profiled and at rest."""
    lab.run_profile(progress=False)
    found = pl.explore(lab)
    assert found._worker.drain(60)
    return found
