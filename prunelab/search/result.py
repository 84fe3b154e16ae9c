"""What a search is asked and what it gives: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING

from prunelab.errors import PruneLabError
from prunelab.plan import Plan

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Wish:
    """What is asked of a plan; where there are several, all hold.

    Attributes:
        flops, params: share of the uncut network's that may be left, above 0 and up to 1.
        drop: loss of accuracy that is borne, above 0 and up to 1: 0.005 is half a point.
        certain: whether ``drop`` must hold for images like those measured (the upper end of the 95 % interval of the
            loss), or only on those measured.
    """

    flops: float | None = None
    params: float | None = None
    drop: float | None = None
    certain: bool = True

    def __post_init__(self) -> None:
        given = {"flops": self.flops, "params": self.params, "drop": self.drop}
        if all(value is None for value in given.values()):
            raise PruneLabError("A best plan needs a wish, for example flops=0.5, params=0.5 or drop=0.01.")
        for name, value in given.items():
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= 1:
                what = "loss of accuracy that is borne" if name == "drop" else "share of the uncut network's to keep"
                raise PruneLabError(f"{name} is the {what}, above 0 and up to 1, not {value!r}.")

    @property
    def budgets(self) -> Mapping[str, float]:
        """The shares that may be left, by ``FLOPs`` and ``parameters``."""
        given = {"FLOPs": self.flops, "parameters": self.params}
        return {name: float(value) for name, value in given.items() if value is not None}

    def __str__(self) -> str:
        words = [f"{name} ≤ {100 * share:.4g} %" for name, share in self.budgets.items()]
        return ", ".join(words + ([f"drop ≤ {100 * self.drop:.4g} points"] if self.drop is not None else []))


@dataclass(frozen=True)
class Tried:
    """A plan, and what was measured of it.

    Attributes:
        flops, params: of the network that it leaves.
        loss: mean Kullback–Leibler divergence of its classes from the uncut network's, in nats.
        accuracy: share of ``n`` images classified right; ``change`` against the uncut network on the same images,
            ``half`` the half width of its 95 % interval for images like these.
    """

    plan: Plan
    flops: int
    params: int
    loss: float
    accuracy: float
    change: float
    half: float
    n: int

    def __str__(self) -> str:
        points = f"{100 * self.change:+.2f} ± {100 * self.half:.2f} points"
        return f"{self.flops:,} FLOPs, {self.params:,} parameters, {self.accuracy:.2%} ({points}, n = {self.n:,})"


@dataclass(frozen=True)
class Step(Tried):
    """A step of the search.

    Attributes:
        layer: the one that is cut furthest in it; in an exchange the layer that pays, if one does.
        ratio: of its channels that are gone then.
    """

    layer: str = ""
    ratio: float = 0.0


@dataclass(frozen=True)
class Best:
    """The plan that was found, and how.

    Attributes:
        wish: what was asked.
        found: the plan, measured on all images with the repair itself.
        uniform: the same for the plan that takes one ratio for all layers and grants the wish too, where there is one.
        steps: of the search, as they were tried, each measured on ``n`` images and repaired from fewer than the plan
            found. With a drop alone they have a quicker repair in the place of least squares, and some go too far: then
            it turns back.
        uniforms: plans of one ratio, measured as the steps.
        flops, params, base: of the uncut network; ``base`` is its accuracy on all images.
        precision: of the arithmetic.
    """

    wish: Wish
    found: Tried
    uniform: Tried | None
    steps: tuple[Step, ...]
    uniforms: tuple[Tried, ...]
    flops: int
    params: int
    base: float
    precision: str

    @property
    def plan(self) -> Plan:
        """An ordinary plan, for ``lab.use`` or :meth:`prunelab.Plan.resolve`."""
        return self.found.plan

    def frame(self) -> pd.DataFrame:
        """One row per step; shares and accuracies lie in 0 to 1, ``loss`` is in nats."""
        import pandas as pd

        columns = ["layer", "ratio", *(f.name for f in fields(Tried) if f.name != "plan")]
        return pd.DataFrame([{name: getattr(step, name) for name in columns} for step in self.steps], columns=columns)

    def figure(self, dark: bool = False) -> Figure:
        """Change of accuracy against FLOPs: the steps, plans of one ratio beside them, and the plan found."""
        from prunelab.search.figure import draw

        return draw(self, dark)

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the picture for a light page, on a ground of its own."""
        from prunelab.picture import on_a_light_page

        return on_a_light_page(self.figure())

    def __repr__(self) -> str:
        beside = f"; one ratio for all: {self.uniform}" if self.uniform is not None else ""
        return f"Best plan for {self.wish} by {self.plan.criterion}, repair {self.plan.repair}: {self.found}{beside}"
