"""A search under way: its steps in order, and what it tries at the end."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor

from prunelab.errors import PruneLabError
from prunelab.intervals import flip_half_width
from prunelab.plan import Plan
from prunelab.preview import Precision, Preview
from prunelab.program.cache import Cache
from prunelab.program.program import cost
from prunelab.program.selection import Selection
from prunelab.repair import Repairer
from prunelab.scanfile import scan_file
from prunelab.search.meter import Meter, quickly
from prunelab.search.moves import exchanged, moved, path
from prunelab.search.result import Best, Step, Tried, Wish
from prunelab.search.shares import RATIOS as SCANNED, Curve, fitted, priced_path
from prunelab.search.space import RATIOS, Choice, Space

T = TypeVar("T")
Repaired = Callable[[Selection], Mapping[str, Tensor]]

_SCAN, _PATH, _COMPARED = 0.2, 0.6, 0.8
"""Of the work, as shown, when the scan, the path and what comes between it and the last part are at their ends."""
_PARTS = 6
"""Choices of a path by prices."""
_STRIDE = 2
"""Rungs of 5 % that a step of the path takes."""
_EXCHANGES = 40, 8
"""At most, and where steps are repaired by least squares, for which every measurement takes ten times as long."""
_FINE = tuple(k / 200 for k in range(191))
_SEARCH_SAMPLE = 256
"""Images that a repair looks at for every step: it has to be quick rather than exact."""


class Search:
    """One search; :meth:`run` does it piece by piece, and leaves what it found in ``best``."""

    best: Best

    def __init__(
        self,
        wish: Wish,
        space: Space,
        images: Tensor,
        labels: Tensor,
        repair_images: Tensor | None,
        masks: Mapping[str, Tensor],
        n: int,
        n_found: int | None,
        precision: Precision,
        cache: Path | str | bool,
        memory: int,
        on_step: Callable[[Step], None] | None,
        on_measurement: Callable[[], None],
    ) -> None:
        """Args: as :func:`prunelab.search.best_plan`; ``on_measurement`` is called before each."""
        total = len(labels) if n_found is None else min(n_found, len(labels))
        if min(n, total) < 1:
            raise PruneLabError(f"A search needs at least one image, not n={n} and n_found={n_found}.")
        self._wish = wish
        self._space = space
        self._tell = on_step or (lambda _: None)
        self._dense = cost(space.program)
        preview = Preview(space.program, images, labels, memory=Cache(memory))
        self._base = preview.accuracy(n=total, precision=precision)
        repair = space.fixed.repair
        sample = None if repair == "none" else repair_images
        few = None if sample is None else sample[:_SEARCH_SAMPLE]

        def meter(how: str, n: int, of: Tensor | None, repaired: Repaired) -> Meter:
            settings = ("search", n, self._base.precision, repair, how)
            file = scan_file(space.program, (images, labels, of), settings, cache)
            return Meter(preview, repaired, begin=on_measurement, n=n, masks=masks, precision=precision, file=file)

        exactly, roughly = Repairer(space.program, sample), Repairer(space.program, few)
        self._exact = meter("exact", total, sample, lambda cut: exactly(cut, repair))
        solves = repair.startswith("least-squares")

        def hasty(cut: Selection) -> Mapping[str, Tensor]:
            """New statistics of the norms in the place of new weights; without norms, the quick form."""
            return roughly(cut, "norm") or quickly(roughly, cut, repair)

        self._by_price = solves and bool(wish.budgets)
        n = min(n, total)
        # By names of their own: what one measures is not what the other would.
        if solves:
            self._hasty = meter("hasty", n, few, hasty)
        if self._by_price:
            # A layer by itself needs no more than the quick form, and a scan has many of them.
            self._alone = meter("by itself", n, few, lambda cut: quickly(roughly, cut, repair))
        in_haste = solves and not self._by_price
        self._rough = self._hasty if in_haste else meter("rough", n, few, lambda cut: roughly(cut, repair))
        self._sizes: dict[Choice, tuple[int, int]] = {}
        self._losses: dict[Choice, float] = {}
        self._choices = [space.whole]
        self._steps: list[Step] = []

    # What is known of a choice ---------------------------------------------

    def _size(self, choice: Choice) -> float:
        """How large the network is, as share of the uncut one in what the wish counts."""
        return sum(self._shares(choice).values())

    def _lack(self, choice: Choice) -> float:
        """What is still above the wish's budgets; without any, all that is left."""
        budgets = self._wish.budgets
        shares = self._shares(choice)
        return sum(max(shares[name] - budgets.get(name, 0.0), 0.0) for name in shares)

    def _shares(self, choice: Choice) -> dict[str, float]:
        if choice not in self._sizes:
            self._sizes[choice] = self._space.sizes(self._space.plan(choice))
        return self._as_shares(*self._sizes[choice])

    def _as_shares(self, flops: int, params: int) -> dict[str, float]:
        """Of the uncut network's, what the wish counts."""
        shares = {"FLOPs": flops / max(self._dense.flops, 1), "parameters": params / max(self._dense.params, 1)}
        return {name: shares[name] for name in self._wish.budgets or ("FLOPs",)}

    def _no_larger_than(self, choice: Choice) -> Callable[[Choice], bool]:
        """What an exchange must keep to: the budgets, or the size there is."""
        most = self._size(choice)
        return lambda other: self._lack(other) <= 0 if self._wish.budgets else self._size(other) <= most

    def _exactly(self, choice: Choice) -> Tried:
        return self._tried(self._space.plan(choice), self._exact)

    def _loss(self, choice: Choice) -> float:
        if choice not in self._losses:
            self._losses[choice] = self._rough(self._space.selection(self._space.plan(choice))).loss
        return self._losses[choice]

    def _tried(self, plan: Plan, meter: Meter) -> Tried:
        selection = self._space.selection(plan)
        found = meter(selection)
        flops, params = self._space.sizes(plan)
        half = flip_half_width(np.array(found.gained), np.array(found.lost), np.array(found.n), None)
        return Tried(
            plan=plan,
            flops=flops,
            params=params,
            loss=found.loss,
            accuracy=found.right / found.n,
            change=(found.gained - found.lost) / found.n,
            half=float(half),
            n=found.n,
        )

    # The search ---------------------------------------------

    def run(self) -> Iterator[float]:
        """Search; gives the share of the work that is done, time and again.

        Raises:
            PruneLabError: no plan grants the wish, with what can be had.
        """
        self._refuse_unreachable()
        last = self._space.last
        if self._by_price:
            curves = yield from self._scan()
            priced = priced_path(curves, self._space.nearest, self._fits, self._loss, _PARTS)
            yield from self._go(priced, _SCAN, _PATH)
            yield from self._compare_one_by_one()
        else:
            yield from self._go(path(self._space.whole, last, self._loss, self._lack, _STRIDE), 0.0, _PATH)
        if self._wish.budgets:
            self._go_to(min(self._choices[-1], self._same_rungs(), key=self._loss))
        else:
            self._turn_back()
        now, most = self._choices[-1], _EXCHANGES[self._by_price]
        exchanges = exchanged(now, last, self._loss, self._no_larger_than(now), self._size, most)
        begin, end = _COMPARED if self._by_price else _PATH, 1.0 if self._wish.budgets else _COMPARED
        yield from self._go(exchanges, begin, end, most)
        if not self._wish.budgets:
            yield from self._go(path(self._choices[-1], last, self._loss, self._lack, 1), _COMPARED, 1.0)
            self._turn_back()
        self._end()

    def _scan(self) -> Generator[float, None, dict[str, Curve]]:
        """What every layer costs alone; gives the share of the work that is done."""
        curves: dict[str, Curve] = {}
        whole = self._size(self._space.whole)
        for k, (layer, ratios) in enumerate(zip(self._space.layers, self._space.rungs, strict=True)):
            rungs = sorted({min(range(1, len(ratios)), key=lambda r: abs(ratios[r] - at)) for at in SCANNED})
            alone = {ratios[r]: moved(self._space.whole, k, r) for r in rungs}
            losses = [self._alone(self._space.selection(self._space.plan(choice))).loss for choice in alone.values()]
            ratio, choice = list(alone.items())[len(alone) // 2]
            curves[layer.name] = fitted(losses, (whole - self._size(choice)) / ratio, tuple(alone))
            yield _SCAN * (k + 1) / len(self._space.layers)
        return curves

    def _compare_one_by_one(self) -> Iterator[float]:
        """Go to the choice that cutting layer after layer leads to, if that is better.

        Where layers share channels, as in residual networks, what each costs alone says little of what they cost
        together; a path measures them together, but has no time for the repair itself.
        """

        def loss(choice: Choice) -> float:
            return self._hasty(self._space.selection(self._space.plan(choice))).loss

        found = self._space.whole
        for found in path(self._space.whole, self._space.last, loss, self._lack, _STRIDE):
            yield _PATH + (_COMPARED - _PATH) * self._way(found)
        self._go_to(min(self._choices[-1], found, key=self._loss))

    def _fits(self, choice: Choice, part: float) -> bool:
        """Whether a choice is small enough for a part of the way to the budgets."""
        return self._within(self._shares(choice), part)

    def _within(self, shares: Mapping[str, float], part: float = 1.0) -> bool:
        # In this order the budget itself is met exactly.
        return all(shares[name] <= most + (1 - part) * (1 - most) for name, most in self._wish.budgets.items())

    def _go(self, choices: Iterator[Choice], begin: float, end: float, most: int | None = None) -> Iterator[float]:
        """Step after step, until the loss is hopeless; gives the share of the work that is done.

        Args:
            begin, end: that share before the first and after the last step.
            most: how many steps there may be; without it they are a path to what is wished.
        """
        for k, choice in enumerate(choices):
            step = self._go_to(choice)
            if self._hopeless(step, choice):
                return
            done = self._way(choice, step) if most is None else (k + 1) / most
            yield begin + (end - begin) * done

    def _hopeless(self, step: Step, choice: Choice) -> bool:
        """Whether there is no use in going on: with a drop alone, where a step has lost more than the wish bears.

        The few images of a step only say when it is time to measure as at the end.
        """
        if self._wish.budgets or self._wish.drop is None or step.change + step.half >= -self._wish.drop:
            return False
        return not self._grants(self._exactly(choice))

    def _go_to(self, choice: Choice) -> Step:
        """Take one step."""
        before = self._choices[-1]
        k = max(range(len(choice)), key=lambda k: choice[k] - before[k])
        tried = self._tried(self._space.plan(choice), self._rough)
        values = {field.name: getattr(tried, field.name) for field in fields(Tried)}
        step = Step(**values, layer=self._space.layers[k].name, ratio=self._space.rungs[k][choice[k]])
        if choice != before:
            self._choices.append(choice)
            self._steps.append(step)
            self._tell(step)
        return step

    def _turn_back(self) -> None:
        """To the last choice that is within the drop, by bisection."""
        found = last_that(self._choices[1:], lambda choice: self._grants(self._exactly(choice)))
        if found is None:
            raise PruneLabError(self._too_much("Even the first step of the search", self._exactly(self._choices[1])))
        self._choices = self._choices[: self._choices.index(found) + 1]

    def _end(self) -> None:
        """Measure what was found as it will be committed, beside one ratio for all layers."""
        found, uniform = self._exactly(self._choices[-1]), self._uniform()
        if uniform is not None and self._better(uniform, found):
            found = uniform
        if not self._grants(found):
            raise PruneLabError(self._too_much(f"The best plan found for {self._wish}", found))
        self.best = Best(
            wish=self._wish,
            found=found,
            uniform=uniform,
            steps=tuple(self._steps),
            uniforms=self._uniforms(found),
            flops=self._dense.flops,
            params=self._dense.params,
            base=self._base.accuracy,
            precision=self._base.precision,
        )

    def _way(self, choice: Choice, step: Step | None = None) -> float:
        """How far a path is on its way to the budgets or, without any, with this step to the drop: 0 to 1."""
        if step is not None and not self._wish.budgets:
            return float(np.clip(-step.change / (float(self._wish.drop or 0) + step.half), 0, 1))
        lack = self._lack(self._space.whole)
        return 1 - self._lack(choice) / lack if lack else 1.0

    def _grants(self, tried: Tried) -> bool:
        """Whether what was measured is within the drop."""
        if self._wish.drop is None:
            return True
        return tried.change - (tried.half if self._wish.certain else 0.0) >= -self._wish.drop

    def _uniform(self) -> Tried | None:
        """The plan of one ratio for all layers that grants the wish too, with the most left of a budget."""
        plans = [self._space.plan_of(self._same(ratio)) for ratio in _FINE]
        if self._wish.budgets:
            fitting = (plan for plan in plans if self._within(self._as_shares(*self._space.sizes(plan))))
            plan = next(fitting, None)
        else:
            plan = last_that(plans[1:], lambda plan: self._grants(self._tried(plan, self._exact)))
        return None if plan is None else self._tried(plan, self._exact)

    def _same_rungs(self) -> Choice:
        """The first choice of one rung for all layers, as far as each goes, that fits."""
        last = self._space.last
        rungs = (tuple(min(rung, top) for top in last) for rung in range(max(last) + 1))
        return next(choice for choice in rungs if self._lack(choice) <= 0)

    def _same(self, ratio: float) -> dict[str, float]:
        """One ratio for all layers, as far as each goes."""
        tops = [ratios[-1] for ratios in self._space.rungs]
        return {layer.name: min(ratio, top) for layer, top in zip(self._space.layers, tops, strict=True)}

    def _better(self, one: Tried, other: Tried) -> bool:
        if self._wish.budgets:
            return (one.accuracy, -one.loss) > (other.accuracy, -other.loss)
        return one.flops < other.flops

    def _uniforms(self, found: Tried) -> tuple[Tried, ...]:
        """Plans of one ratio down to the size of the plan found, measured as the steps."""
        plans = [self._space.plan_of(self._same(ratio)) for ratio in RATIOS[2::2]]
        larger = [plan for plan in plans if self._space.sizes(plan)[0] > found.flops]
        return tuple(self._tried(plan, self._rough) for plan in plans[: len(larger) + 1])

    # What cannot be had ---------------------------------------------

    def _refuse_unreachable(self) -> None:
        least = self._shares(self._space.last)
        for name, share in self._wish.budgets.items():
            if least[name] > share:
                raise PruneLabError(
                    f"{name} cannot come down to {100 * share:.4g} % of the uncut network's: with every layer cut as "
                    f"far as it may be, {100 * least[name]:.4g} % is left. Ask for more, or unlock layers."
                )

    def _too_much(self, what: str, found: Tried) -> str:
        return (
            f"{what} changes accuracy by {100 * found.change:+.2f} ± {100 * found.half:.2f} points on {found.n:,} "
            "images. Allow a larger drop, measure on more images, or ask for certain=False."
        )


def last_that(items: Sequence[T], granted: Callable[[T], bool]) -> T | None:
    """The last item that is granted, by bisection: those before it are taken to be granted too. None if none is."""
    low, high = 0, len(items)
    while low < high:
        middle = (low + high) // 2
        if granted(items[middle]):
            low = middle + 1
        else:
            high = middle
    return items[low - 1] if low else None
