"""Profiles of parts are the profile of the whole; what is kept of the first images; the fast way to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from support import Network
from torch import Tensor, nn

import prunelab as pl
from prunelab import zoo
from prunelab.profile.quick import quickest
from prunelab.profile.result import Profile

NETWORK = Network(zoo.lenet, (1, 28, 28))
DATA = NETWORK.images(61)
PROGRAM = pl.trace(NETWORK.build(), DATA[:2], prove=False)


def quiet(program: pl.Program, data: Any, **settings_: Any) -> Profile:
    return pl.profile(program, data, **{"progress": False, "cache": False, "sample": 40, **settings_})


WHOLE = quiet(PROGRAM, DATA)


def assert_whole(found: Profile) -> None:
    assert found.images == 61
    assert found.folder is None
    for site, expected in WHOLE.statistics.items():
        for name, array in expected.arrays().items():
            ours = found.statistics[site].arrays()[name]
            assert np.abs(ours - array).max() <= 1e-12 * max(1.0, np.abs(array).max()), name
        for ours_kept, kept in ((found.activations, WHOLE.activations), (found.pooled, WHOLE.pooled)):
            assert ours_kept[site].shape == kept[site].shape
            assert torch.allclose(ours_kept[site], kept[site], rtol=1e-6, atol=1e-9)


@settings(max_examples=10)
@given(st.lists(st.integers(1, 60), unique=True, max_size=5).map(sorted))
def test_profiled_in_parts_it_is_profiled_in_one(cuts: list[int]) -> None:
    ends = [*cuts, 61]
    first, *rest = (quiet(PROGRAM, DATA[a:b]) for a, b in zip([0, *cuts], ends, strict=True))
    assert_whole(first.merge(*rest))


def test_parts_of_the_same_network_traced_again_and_kept_on_disk_merge_too(tmp_path: Path) -> None:
    again = pl.trace(NETWORK.build(), DATA[:2], prove=False)
    first, second = quiet(PROGRAM, DATA[:30], cache=tmp_path), quiet(again, DATA[30:], cache=tmp_path)
    assert first.room == quiet(PROGRAM, DATA[:30], cache=tmp_path).room == (40, 2048)
    assert_whole(first.merge(second))


def test_parts_of_other_networks_are_refused() -> None:
    model = NETWORK.build()
    with torch.no_grad():
        next(model.parameters()).flatten()[0] += 1e-9
    other = quiet(pl.trace(model, DATA[:2], prove=False), DATA[:30])
    with pytest.raises(pl.PruneLabError, match="Only profiles of the same network can be merged"):
        WHOLE.merge(other)


# Pooled responses ---------------------------------------------


def test_pooled_responses_are_means_over_positions_of_the_first_images() -> None:
    found = quiet(PROGRAM, DATA, sample=61)
    assert found.pooled.keys() == found.statistics.keys()
    for site, pooled in found.pooled.items():
        values = found.activations[site]
        assert pooled.dtype == torch.float32
        assert torch.allclose(pooled.double(), values.flatten(2).mean(2) if values.dim() > 2 else values, rtol=1e-6)
        assert np.allclose(pooled.double().numpy().var(0), found.statistics[site].pooled_variance, rtol=1e-4)


def test_pooled_responses_stay_in_their_share_of_the_budget(tmp_path: Path) -> None:
    channels = sum(len(s.sum) for s in WHOLE.statistics.values())
    found = quiet(PROGRAM, DATA, budget=8 * 4 * channels * 17, cache=tmp_path)
    assert {len(v) for v in found.pooled.values()} == {17}
    assert all(torch.equal(found.pooled[s], WHOLE.pooled[s][:17]) for s in found.pooled)
    many = NETWORK.images(2100)
    assert {len(v) for v in quiet(PROGRAM, many, sample=0).pooled.values()} == {2048}


# The fast way to run ---------------------------------------------


def test_networks_that_the_fast_way_does_not_fit_run_operator_by_operator() -> None:
    class Strided(nn.Module):
        """A user's own view, which memory in another order does not allow, and one that would compute otherwise."""

        def __init__(self, reading: Any) -> None:
            super().__init__()
            self.conv, self.norm, self.head, self.reading = (
                nn.Conv2d(1, 4, 3),
                nn.BatchNorm2d(4),
                nn.Linear(4, 3),
                reading,
            )

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.reading(self.norm(self.conv(x)).relu()))
            return logits

    x = torch.randn(8, 1, 8, 8)
    for reading, fast in ((lambda y: y.mean((2, 3)), True), (lambda y: y.as_strided((len(y), 4), (144, 36)), False)):
        torch.manual_seed(0)
        model = Strided(reading).eval()
        program = pl.trace(model, x[:2], prove=False)
        sites = quiet(program, x, sample=8, batch_size=2).activations
        assert quickest(program, tuple(sites), (x[:2],)).innermost == fast
        with torch.no_grad():
            seen = model.norm(model.conv(x)).relu()
        assert any(v.shape == seen.shape and torch.allclose(v, seen, atol=1e-6) for v in sites.values())
