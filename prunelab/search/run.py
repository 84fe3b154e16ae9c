"""A search under way: its steps in order, and what it tries at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from prunelab.errors import PruneLabError
from prunelab.intervals import flip_half_width
from prunelab.plan import Plan
from prunelab.preview import Precision, Preview
from prunelab.program.cache import Cache
from prunelab.program.program import cost
from prunelab.repair import Repairer
from prunelab.scanfile import scan_file
from prunelab.search.meter import Meter
from prunelab.search.moves import exchanged, path
from prunelab.search.result import Best, Step, Tried, Wish
from prunelab.search.space import RATIOS, Choice, Space

# What is done, of all, when the path is at its end and when the exchanges are.
_PATH, _EXCHANGES = 0.6, 0.95
_MOST_EXCHANGES = 8
_STRIDE = 2
"""Rungs of 5 % that a step of the path takes."""
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
        precision: Precision,
        cache: Path | str | bool,
        memory: int,
        on_step: Callable[[Step], None] | None,
    ) -> None:
        """Args: as :func:`prunelab.search.best_plan`."""
        if n < 1:
            raise PruneLabError(f"A search needs at least one image, not n={n}.")
        self._wish = wish
        self._space = space
        self._tell = on_step or (lambda _: None)
        self._dense = cost(space.program)
        preview = Preview(space.program, images, labels, memory=Cache(memory))
        self._base = preview.accuracy(precision=precision)
        repair = space.fixed.repair
        sample = None if repair == "none" else repair_images

        def meter(images_of_repair: Tensor | None, n: int, quick: bool) -> Meter:
            file = scan_file(
                space.program,
                (images, labels, images_of_repair),
                ("search", n, self._base.precision, repair, quick),
                cache,
            )
            repairer = Repairer(space.program, images_of_repair)
            return Meter(preview, repairer, repair, n=n, quick=quick, masks=masks, precision=precision, file=file)

        self._rough = meter(None if sample is None else sample[:_SEARCH_SAMPLE], min(n, len(labels)), True)
        self._exact = meter(sample, len(labels), False)
        self._sizes: dict[Choice, tuple[int, int]] = {}
        self._losses: dict[Choice, float] = {}

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
        flops, params = self._sizes[choice]
        shares = {"FLOPs": flops / max(self._dense.flops, 1), "parameters": params / max(self._dense.params, 1)}
        return {name: shares[name] for name in self._wish.budgets or ("FLOPs",)}

    def _fits(self, choice: Choice) -> bool:
        return self._lack(choice) <= 0

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
        steps: list[Step] = []
        choices = [self._space.whole]
        for choice in path(self._space.whole, self._space.last, self._loss, self._lack, _STRIDE):
            steps.append(self._step(choices[-1], choice))
            choices.append(choice)
            yield _PATH * self._share_done(steps[-1], choice)
            if self._hopeless(steps[-1]):
                break
        if self._wish.budgets:
            size, last = self._size, self._space.last
            for k, choice in enumerate(exchanged(choices[-1], last, self._loss, self._fits, size, _MOST_EXCHANGES)):
                steps.append(self._step(choices[-1], choice))
                choices.append(choice)
                yield _PATH + (_EXCHANGES - _PATH) * (k + 1) / _MOST_EXCHANGES
        found, uniform = self._last(choices), self._uniform()
        if uniform is not None and self._better(uniform, found):
            found = uniform
        self._refuse_loss(found)
        self.best = Best(
            wish=self._wish,
            found=found,
            uniform=uniform,
            steps=tuple(steps),
            uniforms=self._uniforms(found),
            flops=self._dense.flops,
            params=self._dense.params,
            base=self._base.accuracy,
            precision=self._base.precision,
        )

    def _step(self, before: Choice, now: Choice) -> Step:
        """What a step has done; of an exchange, the layer that pays."""
        k = max(range(len(now)), key=lambda k: now[k] - before[k])
        tried = self._tried(self._space.plan(now), self._rough)
        values = {name: getattr(tried, name) for name in Tried.__dataclass_fields__}
        step = Step(**values, layer=self._space.layers[k].name, ratio=self._space.rungs[k][now[k]])
        self._tell(step)
        return step

    def _share_done(self, step: Step, choice: Choice) -> float:
        if self._wish.budgets:
            return 1 - self._lack(choice) / self._lack(self._space.whole)
        assert self._wish.drop is not None
        return float(np.clip(-step.change / (self._wish.drop + step.half), 0, 1))

    def _hopeless(self, step: Step) -> bool:
        """Whether a step has certainly lost more than the wish bears, so that there is no use in going on."""
        drop = self._wish.drop
        return not self._wish.budgets and drop is not None and step.change + step.half < -drop

    def _grants(self, tried: Tried) -> bool:
        """Whether what was measured is within the drop."""
        if self._wish.drop is None:
            return True
        return tried.change - (tried.half if self._wish.certain else 0.0) >= -self._wish.drop

    def _last(self, choices: list[Choice]) -> Tried:
        """The choice at the end; with a drop alone the last that grants it, by bisection."""
        if self._wish.budgets:
            return self._tried(self._space.plan(choices[-1]), self._exact)
        found = last_that([self._space.plan(choice) for choice in choices[1:]], self._granted)
        if found is None:
            first = self._tried(self._space.plan(choices[1]), self._exact)
            raise PruneLabError(self._too_much("Even the first step of the search", first))
        return self._tried(found, self._exact)

    def _granted(self, plan: Plan) -> bool:
        return self._grants(self._tried(plan, self._exact))

    def _uniform(self) -> Tried | None:
        """The plan of one ratio for all layers that grants the wish too, with the most left of a budget."""
        plans = [self._space.plan_of(self._same(ratio)) for ratio in _FINE]
        if self._wish.budgets:
            fitting = (plan for plan in plans if self._plan_fits(plan))
            plan = next(fitting, None)
        else:
            plan = last_that(plans[1:], self._granted)
        return None if plan is None else self._tried(plan, self._exact)

    def _same(self, ratio: float) -> dict[str, float]:
        """One ratio for all layers, as far as each goes."""
        tops = [ratios[-1] for ratios in self._space.rungs]
        return {layer.name: min(ratio, top) for layer, top in zip(self._space.layers, tops, strict=True)}

    def _plan_fits(self, plan: Plan) -> bool:
        flops, params = self._space.sizes(plan)
        shares = {"FLOPs": flops / max(self._dense.flops, 1), "parameters": params / max(self._dense.params, 1)}
        return all(shares[name] <= share for name, share in self._wish.budgets.items())

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

    def _refuse_loss(self, found: Tried) -> None:
        if not self._grants(found):
            raise PruneLabError(self._too_much(f"The best plan found for {self._wish}", found))

    def _too_much(self, what: str, found: Tried) -> str:
        return (
            f"{what} changes accuracy by {100 * found.change:+.2f} ± {100 * found.half:.2f} points on {found.n:,} "
            "images. Allow a larger drop, measure on more images, or ask for certain=False."
        )


def last_that(plans: Sequence[Plan], granted: Callable[[Plan], bool]) -> Plan | None:
    """The last plan that is granted, by bisection: plans before it are taken to be granted too. None if none is."""
    low, high = 0, len(plans)
    while low < high:
        middle = (low + high) // 2
        if granted(plans[middle]):
            low = middle + 1
        else:
            high = middle
    return plans[low - 1] if low else None
