"""What every test run shares: bounded threads, a cache folder of its own, and hypothesis' profiles."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

_APART = pytest.StashKey[Path]()

# No deadlines: the first example of a test pays for importing and tracing, and machines differ.
hypothesis.settings.register_profile("default", deadline=None, max_examples=50)
# The same examples on every run, so that a failure in one place is a failure everywhere.
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("default"), derandomize=True)
hypothesis.settings.register_profile(
    "fuzz", deadline=None, max_examples=1_000, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before anything imports torch or prunelab, for the tests and what they start."""
    config.stash[_APART] = apart = Path(tempfile.mkdtemp(prefix="prunelab-tests-"))
    os.environ["PRUNELAB_CACHE"] = str(apart / "cache")
    os.environ["MPLCONFIGDIR"] = str(apart / "matplotlib")
    # Tiny networks are slower, not faster, on many threads; and sums by more threads differ in their last bits.
    os.environ["OMP_NUM_THREADS"] = "1"
    profile = os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") == "true" else "default")
    hypothesis.settings.load_profile(profile)


@pytest.fixture(scope="module", autouse=True)
def _cache_emptied(pytestconfig: pytest.Config) -> Iterator[None]:
    """Profiles of one module's networks, up to 180 MB each, do not wait for the end of the run on a small disk."""
    yield
    shutil.rmtree(pytestconfig.stash[_APART] / "cache", ignore_errors=True)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what the run cached."""
    shutil.rmtree(config.stash[_APART], ignore_errors=True)
