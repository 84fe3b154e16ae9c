"""What several tests of the explorer begin with."""

from __future__ import annotations

import pytest

import prunelab as pl
from prunelab.explorer.app import Explorer


@pytest.fixture
def explorer(lab: pl.Lab) -> Explorer:
    """The explorer over the ``lab`` of a test's own file, profiled and at rest."""
    lab.run_profile(progress=False)
    found = pl.explore(lab)
    assert found._worker.drain(60)
    return found
