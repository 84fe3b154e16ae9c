"""The result-oriented score: information, importance for the final response, and how they are weighed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from support import shaken
from torch import Tensor, nn

import prunelab as pl
from prunelab import zoo
from prunelab.criteria.activations import entropy
from prunelab.criteria.registry import get, scores
from prunelab.criteria.responses import correlation, final_response
from prunelab.criteria.result_oriented import balanced, result_oriented, variant


def profiled(model: nn.Module, images: Tensor) -> pl.Profile:
    program = pl.trace(model.eval(), images[:2])
    return pl.profile(program, images, cache=False, progress=False)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def importance(profile: pl.Profile, layer: str, correlated: bool = True) -> np.ndarray:
    row = profile.program.layer(layer)
    found = final_response(profile, correlated)[row.sites[0]][row.labels]
    return found / found.sum()


# By hand ---------------------------------------------


def test_score_is_the_geometric_mean_of_two_ranks() -> None:
    importance, information = np.array([0.1, 0.4, 0.2, 0.3]), np.array([3.0, 1.0, 1.0, 9.0])
    # Ranks 1, 4, 2, 3 and 3, 1½, 1½, 4, of four.
    expected = np.sqrt(np.array([1 * 3, 4 * 1.5, 2 * 1.5, 3 * 4])) / 4
    assert np.allclose(balanced(information, importance, 0.5), expected, rtol=1e-12)
    assert np.allclose(balanced(information, importance, 0.0), [0.75, 0.375, 0.375, 1.0], rtol=1e-12)
    assert np.allclose(balanced(information, importance, 1.0), [0.25, 1.0, 0.5, 0.75], rtol=1e-12)


def test_default_is_half_of_entropy_and_half_of_importance() -> None:
    pooled, s = normal(50, 6).numpy(), normal(6).abs().numpy()
    assert np.array_equal(result_oriented(pooled, s), balanced(entropy(pooled), s, 0.5))


def test_correlation_is_absolute_and_nothing_for_a_constant_and_one_where_it_is_not_known() -> None:
    up, known = np.arange(4.0), np.array([[np.nan]])
    a = np.stack([up, -2 * up + 1, np.full(4, 0.1)], axis=1)
    assert np.allclose(correlation(a, up[:, None]), [[1], [1], [0]], atol=1e-12)
    assert np.allclose(correlation(a, known), 1)
    square = (up - up.mean()) ** 2
    assert correlation(up[:, None], square[:, None]) == pytest.approx(0)


class Two(nn.Module):
    """Two hidden units, two more, one output: small enough to be followed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(2, n, bias=False) for n in (2, 2, 1))
        with torch.no_grad():
            self.a.weight.copy_(torch.eye(2))
            self.b.weight.copy_(torch.tensor([[1.0, 0.0], [3.0, 1.0]]))
            self.c.weight.copy_(torch.tensor([[-2.0, 0.5]]))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.c(self.b(self.a(x).relu()).relu())
        return found


def test_importance_of_a_network_followed_by_hand() -> None:
    # The hidden units are (1, 0), (0, 3), (2, 0): b's are (1, 3), (0, 3), (2, 6), of means 1 and 4.
    found = profiled(Two().double(), torch.tensor([[1.0, 0], [0, 3], [2, 0]], dtype=torch.float64))
    # s of b: |−2|·1 and |0.5|·4.
    assert np.allclose(importance(found, "b"), [0.5, 0.5], rtol=1e-6)
    # R of a_1 with b_1: 1; of a_1 (1, 0, 2) with b_2 (3, 3, 6): √3/2; of a_2 (0, 3, 0) with b_2: 1/2.
    first, second = 2 * 1 * 1 + 2 * 3 * np.sqrt(3) / 2, 2 * 1 * 0.5
    assert np.allclose(importance(found, "a"), np.array([first, second]) / (first + second), rtol=1e-6)
    assert np.allclose(importance(found, "a", correlated=False), [0.8, 0.2], rtol=1e-6)


# Against another computation ---------------------------------------------


class Branches(nn.Module):
    """A residual block with norms, whose stream is read twice, and a head over its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.values(x)[2].mean((2, 3)))
        return logits

    def values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stream = self.stem(x).relu()
        inner = self.inner(stream).relu()
        return stream, inner, (stream + self.norm(self.outer(inner))).relu()


def absolute_correlation(a: Tensor, b: Tensor) -> np.ndarray:
    found = np.corrcoef(a.mean((2, 3)).numpy().T, b.mean((2, 3)).numpy().T)
    return np.abs(found[: a.shape[1], a.shape[1] :])


def test_importance_goes_back_along_branches_and_correlations() -> None:
    torch.manual_seed(0)
    model = shaken(Branches()).double().eval()
    images = normal(40, 3, 5, 5)
    profile = profiled(model, images)
    with torch.no_grad():
        stream, inner, out = model.values(images)

    def joins(conv: nn.Conv2d) -> np.ndarray:
        return conv.weight.detach().abs().sum((2, 3)).numpy()

    assert model.norm.running_var is not None
    scale = (model.norm.weight.detach().abs() / (model.norm.running_var + model.norm.eps).sqrt()).numpy()
    last = model.head.weight.detach().abs().sum(0).numpy() * out.abs().mean((0, 2, 3)).numpy()
    between = (last * scale) @ (joins(model.outer) * absolute_correlation(inner, out).T)
    first = last + between @ (joins(model.inner) * absolute_correlation(stream, inner).T)
    found = final_response(profile)
    row = profile.program.layer("inner")
    assert np.allclose(found[row.sites[0]][row.labels], between / between.max(), rtol=1e-5)
    (both,) = [layer for layer in profile.program.layers if layer.kind == "stream"]
    for site, expected in zip(both.sites, (first, last), strict=True):
        assert np.allclose(found[site][both.labels], expected / expected.max(), rtol=1e-5)


def test_importance_follows_weights_and_data() -> None:
    torch.manual_seed(0)
    model = shaken(Branches()).double().eval()
    profile = profiled(model, normal(20, 3, 5, 5))
    before = importance(profile, "inner")
    other = pl.profile(profile.program, normal(30, 3, 5, 5)[10:], cache=False, progress=False)
    assert not np.allclose(importance(other, "inner"), before)
    assert np.array_equal(importance(profile, "inner"), before)
    with torch.no_grad():
        model.outer.weight[:, 0] = 0
    assert importance(profile, "inner")[0] == 0


# Variants ---------------------------------------------


@pytest.mark.parametrize("information", ["entropy", "variance", "mean", "rank"])
@pytest.mark.parametrize("correlated", [True, False])
def test_variants_are_criteria_of_their_own(information: str, correlated: bool) -> None:
    torch.manual_seed(0)
    profile = profiled(zoo.resnet.ResNet(8).double(), normal(12, 3, 16, 16))
    criterion = variant(0.25, information=information, correlated=correlated)
    assert information in criterion
    assert information in get(criterion).about
    free = [layer for layer in profile.program.layers if not layer.pinned]
    plan = pl.Plan(criterion, {layer.name: pl.Setting(ratio=0.5) for layer in free})
    assert set(plan.resolve(profile.program, profile).kept) == {layer.name for layer in free}


def test_variant_that_chooses_nothing_is_the_default() -> None:
    assert variant() == variant(0.5, information="entropy", correlated=True) == "result_oriented"
    assert variant(0) == "result_oriented(alpha=0, entropy)"


def test_variants_that_cannot_be_are_refused() -> None:
    with pytest.raises(pl.PruneLabError, match="alpha is a share from 0 to 1, not 2"):
        variant(2)
    with pytest.raises(pl.PruneLabError, match="no measure of information 'entrophy'; the nearest"):
        variant(information="entrophy")


def test_without_pooled_responses_it_says_what_to_do() -> None:
    images = normal(8, 1, 28, 28)
    program = pl.trace(zoo.LeNet((4, 6, 10)).double().eval(), images[:2])
    bare = pl.profile(program, images, cache=False, progress=False, budget=0)
    with pytest.raises(pl.PruneLabError, match=r"'result_oriented' needs pooled, .* larger budget"):
        scores(program, bare, "result_oriented", program.layer("conv1"))


LOADING = """
import sys
import prunelab as pl
from prunelab.criteria.registry import get
plan = pl.Plan.from_json(sys.stdin.read())
print(plan.criterion, get(plan.criterion).needs)
"""


@pytest.mark.parametrize("choice", [{"alpha": 0.3}, {"alpha": 1 / 3, "information": "rank", "correlated": False}])
def test_a_plan_by_a_variant_is_read_in_a_new_process(choice: dict[str, Any]) -> None:
    name = variant(**choice)
    asked = pl.Plan(name).set("conv1", ratio=0.5).to_json()
    done = subprocess.run(
        [sys.executable, "-c", LOADING], input=asked, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == f"{name} {get(name).needs}"


@pytest.mark.parametrize("name", ["result_oriented(alpha=2, rank)", "result_oriented(alpha=0.5, rang)", "l1(alpha=0)"])
def test_a_variant_that_cannot_be_is_unknown(name: str) -> None:
    with pytest.raises(pl.PruneLabError, match="no criterion"):
        get(name)


def test_two_choices_of_alpha_have_two_names() -> None:
    assert variant(1 / 3) != variant(0.333333)
