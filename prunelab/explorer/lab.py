"""The lab: the one mutable thing. It holds the current network, the plan and its history, and every point measured.

No widget is needed for it: the explorer only calls what is here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from prunelab.commit import commit
from prunelab.criteria.registry import Scores, get, scores
from prunelab.datasets import class_names, displayed
from prunelab.errors import PruneLabError
from prunelab.explorer.keeping import read_lab, write_lab
from prunelab.explorer.scanning import Scanned, scan
from prunelab.explorer.stage import Point, Stage
from prunelab.explorer.timed import columns, from_plain, to_plain
from prunelab.latency import Latency, latency
from prunelab.outcomes import Outcomes
from prunelab.plan import Plan, Setting, in_force
from prunelab.preview import Estimate, Precision, Preview, labelled
from prunelab.profile.capture import Profile, profile
from prunelab.program.cache import Cache
from prunelab.program.channels import Layer
from prunelab.program.cost import Cost
from prunelab.program.program import Program, cost, sliced_masks, trace
from prunelab.program.run import removes_anything, versions
from prunelab.program.selection import Selection, with_masks
from prunelab.progress import Progress
from prunelab.repair import Repaired, Repairer
from prunelab.repair.values import Wanted, always
from prunelab.saving import export
from prunelab.sensitivity import Sensitivity
from prunelab.train.finetune import finetune
from prunelab.train.position import Epoch

if TYPE_CHECKING:
    import pandas as pd


REPAIR_IMAGES = 1000
"""How many training images a repair looks at."""


class Lab:
    """A network under the knife: settings, previews, commits, fine-tuning, undo.

    >>> lab = Lab(model, train, val)
    >>> lab.set("conv2", ratio=0.5)
    >>> lab.measure()
    >>> small = lab.commit()
    >>> lab.finetune(epochs=5)
    """

    def __init__(
        self,
        model: nn.Module,
        train: Any,
        val: Any,
        *,
        example: Any = None,
        probe: int = 2048,
        cache: Path | str | bool = True,
        criterion: str = "l1",
        name: str = "",
        memory: int | None = None,
    ) -> None:
        """Args:
            model: a trained network; it is not changed, now or later.
            train: Dataset or DataLoader of (image, label): profiled and fine-tuned on.
            val: Dataset or DataLoader of (image, label): accuracy is measured on it.
            example: an input of forward, if the first images of ``val`` are not one.
            probe: how many images of ``val`` the quick accuracy uses.
            cache: where profiles are kept, as in :func:`prunelab.profile`.
            criterion: the first plan's criterion.
            name: what to call the network in titles.
            memory: bytes that the quick accuracy may take to keep what the next one can use; a quarter of what
                is free, 1 to 3 GiB, unless given.

        Raises:
            PruneLabError: the model or the data cannot be used.
        """
        self.train = train
        self.val = val
        self.cache = cache
        self.name = name or type(model).__name__
        self._images, self._labels = labelled(val)
        self._probe = min(probe, len(self._labels))
        self._memory = Cache(memory)
        first = example if example is not None else self._images[:2]
        self._first = self._stage(trace(model, first), {})
        # Of the network that everything is compared with, and how to come by it: not the first one after a load.
        self._began = _size(cost(self._first.program))
        self._uncut: Callable[[], Program] = lambda: self._first.program
        self._now: tuple[Stage, Plan] = (
            self._first,
            Plan(criterion=criterion, network=self._first.program.digest),
        )
        self._past: list[tuple[Stage, Plan]] = []
        self._future: list[tuple[Stage, Plan]] = []
        self._points: list[Point] = []
        self._timed: dict[str, Latency] = {}
        # By program, and weakly: a network that undo can no longer reach takes its scores along.
        self._scores: WeakKeyDictionary[Program, dict[tuple[str, int, str], Scores]] = WeakKeyDictionary()
        self._scored: WeakKeyDictionary[Program, tuple[int, ...]] = WeakKeyDictionary()
        self._repairer: Repairer | None = None
        self._repaired = Repaired()
        # The last sensitivity scan, of whichever network was current then.
        self.scanned: Scanned | None = None

    # What is there now ---------------------------------------------

    @property
    def stage(self) -> Stage:
        """The current network with its program, profile and preview."""
        return self._now[0]

    @property
    def program(self) -> Program:
        """The current network's program, with the plan's bypasses: what can still be cut."""
        return self.stage.program.without(self.plan.bypassed)

    @property
    def model(self) -> nn.Module:
        """The current network: the user's own until the first commit."""
        return self.stage.program.model

    @property
    def original(self) -> nn.Module:
        """The network that the lab began with."""
        return self._first.program.model

    @property
    def profile(self) -> Profile | None:
        """What the current network does on the training set, or None before :meth:`run_profile`."""
        return self.stage.profile

    @property
    def plan(self) -> Plan:
        """The current plan."""
        return self._now[1]

    @property
    def points(self) -> tuple[Point, ...]:
        """Everything measured so far, in order."""
        return tuple(self._points)

    @property
    def history(self) -> pd.DataFrame:
        """Everything measured so far as a DataFrame, with ratios to the first network, and times where they were taken.

        ``speedup`` is the ratio of FLOPs; ``times_as_fast_batch_…`` is what :meth:`latency` measured.
        """
        import pandas as pd

        frame = pd.DataFrame([vars(p) for p in self._points])
        if len(frame):
            frame.insert(2, "compression", self._began["params"] / frame["nonzero"])
            frame.insert(4, "speedup", self._began["flops"] / frame["flops"].clip(lower=1))
            frame = frame.join(columns([self._timed.get(point.plan) for point in self._points]))
        return frame

    @property
    def selection(self) -> Selection:
        """What the plan removes from the current network."""
        return self._resolve(self.plan)

    @property
    def repaired(self) -> Repaired:
        """What the repair of the plan last measured or committed has corrected, and in ``left`` what it has not."""
        return self._repaired

    def cost(self) -> Cost:
        """Parameters and FLOPs with the plan applied, in closed form."""
        return cost(self.program, self._masked(self.selection))

    def dense_cost(self) -> Cost:
        """Parameters and FLOPs of the current network without the plan."""
        return cost(self.stage.program, self._masked(Selection()))

    def scores(self, layer: str) -> Scores:
        """The plan's criterion on a layer, shape ``(channels,)``, higher = keep."""
        self._notice_training()
        return self._score(self.plan, self.program.layer(layer))

    def _notice_training(self) -> None:
        program = self.stage.program
        now = versions(program)
        if self._scored.setdefault(program, now) != now:
            # Somebody has trained it in place: what it scored before is of other weights.
            self._scores.clear()
            self._scored[program] = now

    def _score(self, plan: Plan, layer: Layer) -> Scores:
        program = self.stage.program.without(plan.bypassed)
        held = self._scores.setdefault(program, {})
        key = (plan.criterion, plan.seed, layer.name)
        if key not in held:
            held[key] = scores(program, self.profile, plan.criterion, layer, plan.seed)
        return held[key]

    # Planning ---------------------------------------------

    def set(self, layer: str, **setting: Any) -> None:
        """Change one layer's setting: ``ratio=``, ``std=``, ``remove=``, ``grain=`` or ``locked=``.

        Raises:
            PruneLabError: as :meth:`Plan.set` and :meth:`Plan.resolve`; the plan stays as it was.
        """
        name = self.program.layer(layer).name
        rule = any(setting.get(k) is not None for k in ("ratio", "std", "remove"))
        if rule and self.plan.settings.get(name, Setting()).locked:
            raise PruneLabError(f"Layer {name!r} is locked: unlock it before setting its rule.")
        self.use(self.plan.set(name, **setting))

    def set_all(self, **setting: Any) -> None:
        """The same setting for every layer that is neither pinned nor locked."""
        plan = self.plan
        for layer in self._free():
            plan = plan.set(layer.name, **setting)
        self.use(plan)

    def bypass(self, unit: str) -> None:
        """Remove a whole layer or block of ``program.units``: its input passes through.

        Settings of the layers inside rest, and come back with :meth:`restore`.

        Raises:
            PruneLabError: there is no such unit.
        """
        self.use(self.plan.bypass(unit))

    def restore(self, unit: str) -> None:
        """Bring a bypassed layer or block back, with the settings that it had.

        Raises:
            PruneLabError: the plan does not bypass it.
        """
        self.use(self.plan.restore(unit))

    def repair(self, how: str) -> None:
        """Correct the surviving weights, in the preview and in the commit alike.

        Args:
            how: one of :data:`prunelab.plan.REPAIRS`.

        Raises:
            PruneLabError: there is no such repair; the plan stays as it was.
        """
        self.use(replace(self.plan, repair=how))

    def multiple(self, of: int) -> None:
        """Round the widths that ratios and stds leave up to multiples, see :mod:`prunelab.widths`; 1 for any width.

        Raises:
            PruneLabError: it is no whole number from 1; the plan stays as it was.
        """
        self.use(replace(self.plan, multiple=of))

    def criterion(self, name: str) -> None:
        """Score channels by another criterion."""
        self.use(replace(self.plan, criterion=name))

    def reset(self) -> None:
        """Remove nothing; locks stay."""
        settings = {k: Setting(locked=True) for k, s in self.plan.settings.items() if s.locked}
        self.use(replace(self.plan, settings=settings, bypassed=()))

    def use(self, plan: Plan, *, merge: bool = False) -> None:
        """Take a whole plan, after checking that it fits this network.

        Args:
            merge: the change goes on with the last one (a slider still moving): one step of undo for both.

        Raises:
            PruneLabError: it does not; the plan stays as it was.
        """
        if get(plan.criterion).needs == "statistics" and self.profile is None:
            self.run_profile()
        if not plan.network:
            plan = replace(plan, network=self.stage.program.digest)
        self._resolve(plan)
        # Under the layers' own names, whichever of their modules' paths they were given by.
        settings = {self._own_name(plan, name): setting for name, setting in plan.settings.items()}
        plan = replace(plan, settings=settings)
        if plan == self.plan:
            return
        if merge and self._past and self._past[-1][0] is self.stage:
            self._now = (self.stage, plan)
            self._future.clear()
        else:
            self._move((self.stage, plan))

    def undo(self) -> None:
        """Back to the plan, or the network, before the last change."""
        if self._past:
            self._future.append(self._now)
            self._now = self._past.pop()

    def redo(self) -> None:
        """Forward again."""
        if self._future:
            self._past.append(self._now)
            self._now = self._future.pop()

    @property
    def can_undo(self) -> bool:
        """Whether there is something to undo."""
        return bool(self._past)

    @property
    def can_redo(self) -> bool:
        """Whether there is something to redo."""
        return bool(self._future)

    def _move(self, to: tuple[Stage, Plan]) -> None:
        self._past.append(self._now)
        self._future.clear()
        self._now = to

    def _free(self) -> list[Layer]:
        settings = self.plan.settings.items()
        locked = {layer.name for n, s in settings if s.locked and (layer := in_force(self.program, n))}
        return [layer for layer in self.program.layers if not layer.pinned and layer.name not in locked]

    def _own_name(self, plan: Plan, name: str) -> str:
        program = self.stage.program
        layer = in_force(program.without(plan.bypassed), name)
        return layer.name if layer is not None else program.layer(name).name

    def _resolve(self, plan: Plan) -> Selection:
        self._notice_training()
        return plan.resolve(self.stage.program, self.profile, lambda layer: self._score(plan, layer))

    def _masked(self, selection: Selection) -> Selection:
        """The selection with the masks that earlier commits left."""
        return with_masks(selection, self.stage.masks)

    # Measuring ---------------------------------------------

    def run_profile(self, progress: Progress | bool = True) -> Profile:
        """Profile the current network on the training set; from the cache where it was done before.

        Once more after weights were trained in place: until then the profile is of what they were.
        """
        found = profile(self.stage.program, _in_order(self.train), cache=self.cache, progress=progress)
        old = self.stage
        new = replace(old, profile=found)
        self._now = (new, self.plan)
        # The same network without a profile must not come back by undo.
        self._past = [(new if s is old else s, p) for s, p in self._past]
        self._future = [(new if s is old else s, p) for s, p in self._future]
        self._first = new if self._first is old else self._first
        self._scores.clear()
        return found

    def estimate(self, on_update: Callable[[Estimate], bool | None] | None = None, wanted: Wanted = always) -> Estimate:
        """Quick accuracy of the plan on the probe images, in bfloat16 where the processor is made for it.

        Args:
            on_update: called with every estimate on the way; returning False stops there.
            wanted: asked during the plan's repair whether to go on.

        Raises:
            Stopped: the repair was not wanted any more.
        """
        return self._measured(self._probe, on_update, "auto", wanted)

    def quick_estimate(self, wanted: Wanted = always) -> Estimate | None:
        """A first accuracy with the quick repair in place of the plan's, on the first of the probe images.

        None where the plan's repair is as quick. It is no point of the history.

        Raises:
            Stopped: it was not wanted any more.
        """
        selection, repairer = self._masked(self.selection), self._repairs
        repaired = repairer.quick(selection, self.plan.repair, wanted) if repairer is not None else None
        if repaired is None:
            return None
        estimates = self.stage.preview.estimates(self.selection, n=self._probe, repaired=repaired)
        return next(iter(estimates))

    def measure(self, on_update: Callable[[Estimate], bool | None] | None = None) -> Estimate:
        """Accuracy of the plan on all of ``val``, exactly that of the network that it commits."""
        return self._measured(None, on_update, "float32")

    def latency(self, *, progress: Progress | bool = True, **settings: Any) -> Latency:
        """Time the network that the plan would commit, on this machine, beside the one that the lab began with.

        What it finds stands in :attr:`history`, in the rows of this plan.

        Args: as :func:`prunelab.latency`.

        Raises:
            PruneLabError: nothing has been removed, by the plan or a commit; or as :func:`prunelab.latency`.
        """
        plan, selection = self.plan, self._masked(self.selection)
        if self._is_uncut and not removes_anything(self.program, selection):
            raise PruneLabError("There is nothing to time: neither the plan nor a commit has removed anything.")
        if plan.to_json() not in {point.plan for point in self._points}:
            self.estimate()
        found = latency(self.program, selection, against=self._uncut(), progress=progress, **settings)
        self._timed[plan.to_json()] = found
        return found

    @property
    def timed(self) -> Latency | None:
        """What :meth:`latency` last found for the plan that is here now."""
        return self._timed.get(self.plan.to_json())

    def outcomes(self, *, progress: Progress | bool = False) -> Outcomes:
        """What the plan changes, image by image, on the probe images and in the arithmetic of :meth:`estimate`.

        Raises:
            PruneLabError: the network is no classifier.
            Stopped: ``progress`` said so.
        """
        selection = self.selection
        repaired = self._repair_of(self._masked(selection))
        found = self.stage.preview.outcomes(
            selection, n=self._probe, repaired=repaired, precision="auto", progress=progress
        )
        return replace(found, names=class_names(self.val))

    def image(self, index: int) -> Tensor:
        """A validation image for display, float32 ``(height, width, channels)`` in 0..1.

        Args:
            index: as in :attr:`Outcomes.images`.
        """
        return displayed(self._images[index], self.val)

    def sensitivity(self, **settings: Any) -> Sensitivity:
        """Every free layer alone, ratio after ratio, by the plan's criterion and repair; kept in ``scanned``.

        Args: as :func:`prunelab.sensitivity`.
        """
        if settings.get("repair", self.plan.repair) != "none":
            settings.setdefault("repair_images", labelled(_in_order(self.train), REPAIR_IMAGES)[0])
        return scan(self, **settings)

    def _measured(
        self,
        n: int | None,
        on_update: Callable[[Estimate], bool | None] | None,
        precision: Precision,
        wanted: Wanted = always,
    ) -> Estimate:
        now = self._now
        selection = self.selection
        repaired = self._repair_of(self._masked(selection), wanted)
        found = self.stage.preview.accuracy(selection, n=n, repaired=repaired, on_update=on_update, precision=precision)
        # A hand may have moved on meanwhile: then this accuracy is not that of the plan that is here now. And an
        # estimate that was given up half-way is not worth a point.
        if self._now is now and found.n == min(n or len(self._labels), len(self._labels)):
            self._add_measured(found)
        return found

    @property
    def _repairs(self) -> Repairer | None:
        """What repairs the current network, and knows it from the last time; None where the plan asks for no repair."""
        if self.plan.repair == "none":
            return None
        if self._repairer is None or self._repairer.program is not self.stage.program:
            self._repairer = Repairer(self.stage.program, labelled(_in_order(self.train), REPAIR_IMAGES)[0])
        return self._repairer

    def _repair_of(self, selection: Selection, wanted: Wanted = always) -> Repaired:
        """The plan's repair for a selection, from training images."""
        repairer = self._repairs
        self._repaired = repairer(selection, self.plan.repair, wanted) if repairer is not None else Repaired()
        return self._repaired

    def _add_measured(self, found: Estimate) -> None:
        if removes_anything(self.stage.program, self.selection):
            self._add("plan", found)
        elif self._is_uncut:
            self._add("dense", found)

    @property
    def _is_uncut(self) -> bool:
        """Whether the current network is the one that the lab began with."""
        return self.stage.program is self._first.program and _size(self.dense_cost()) == self._began

    def _add(self, kind: str, found: Estimate) -> None:
        now = self.cost()
        point = Point(
            kind,
            now.params,
            now.nonzero,
            now.flops,
            found.accuracy,
            found.low,
            found.high,
            found.n,
            self.plan.to_json(),
            found.precision,
        )
        if point not in self._points:
            self._points.append(point)

    # Committing and training ---------------------------------------------

    def commit(self) -> nn.Module:
        """Make the plan real: a new, smaller module becomes the current network; the plan starts afresh.

        Raises:
            PruneLabError: the plan removes nothing.
        """
        selection = self.selection
        if not removes_anything(self.stage.program, selection):
            raise PruneLabError("There is nothing to commit: the plan removes no block, layer, channel or weight.")
        masked = self._masked(selection)
        small = commit(self.program, masked, repair=self._repair_of(masked))
        masks = sliced_masks(self.program, masked)
        self._enter(small, masks, "commit")
        return small

    def finetune(
        self,
        *,
        epochs: int = 5,
        lr: float = 0.01,
        progress: Progress | bool = True,
        on_epoch: Callable[[Epoch], None] | None = None,
        **settings: Any,
    ) -> pd.DataFrame:
        """Fine-tune a copy of the current network; it becomes the current network, and undo brings the old one back.

        Weights that a commit zeroed stay zero. The plan starts afresh.

        Args: as :func:`prunelab.finetune`.
        """
        model = copy.deepcopy(self.model)
        table = finetune(
            model, self.train, self.val, epochs=epochs, lr=lr, masks=self.stage.masks, progress=progress,
            on_epoch=on_epoch, **settings,
        )  # fmt: skip
        self._enter(model, self.stage.masks, "finetune")
        return table

    def _enter(self, model: nn.Module, masks: Mapping[str, Tensor], label: str) -> None:
        # Proved again: what was pinned because forward does not follow its cut must stay so.
        stage = self._stage(trace(model, self.stage.program.example), masks)
        plan = replace(self.plan, settings={}, bypassed=(), network=stage.program.digest)
        self._move((stage, plan))
        if get(plan.criterion).needs == "statistics":
            self.run_profile()
        self._add(label, self.stage.preview.accuracy())

    def _stage(self, program: Program, masks: Mapping[str, Tensor]) -> Stage:
        return Stage(program, None, Preview(program, self._images, self._labels, memory=self._memory), dict(masks))

    # Keeping ---------------------------------------------

    def save(self, folder: Path | str) -> None:
        """Write the current network's tensors (safetensors), the plan and all points (JSON) to a folder.

        Raises:
            PruneLabError: the folder cannot be written.
        """
        record = {
            "name": self.name,
            "plan": self.plan.to_json(),
            "began": self._began,
            "points": [vars(point) for point in self._points],
            "times": {plan: to_plain(found) for plan, found in self._timed.items()},
        }
        write_lab(Path(folder), self.model, self.stage.masks, record)

    def export(self, path: Path | str) -> Path:
        """Write the current network to a ``.pt2``, ``.onnx`` or ``.safetensors`` file, as :func:`prunelab.export`."""
        return export(self.model, self.program.example, path)

    @classmethod
    def load(
        cls, folder: Path | str, make_model: Callable[[], nn.Module], train: Any, val: Any, **settings: Any
    ) -> Lab:
        """A lab that :meth:`save` wrote.

        Args:
            make_model: builds the network that was first given; its tensors are replaced by the saved ones, whatever
                their shapes.

        Raises:
            PruneLabError: the folder holds no lab, or the saved tensors are another network's.
        """
        model, masks, record = read_lab(Path(folder), make_model)
        lab = cls(model, train, val, name=record["name"], **settings)
        lab._now = (replace(lab.stage, masks=masks), lab.plan)
        lab._began = record.get("began", lab._began)
        if not lab._is_uncut:
            # Its weights are not in the folder, but how long it takes does not depend on them.
            like = next(model.parameters())
            lab._uncut = lambda: trace(make_model().to(like), lab._first.program.example, prove=False)
        lab._points = [Point(**point) for point in record["points"]]
        lab._timed = {plan: from_plain(found) for plan, found in record.get("times", {}).items()}
        lab.use(Plan.from_json(record["plan"]))
        return lab


def _size(cost: Cost) -> dict[str, int]:
    return {"params": cost.params, "nonzero": cost.nonzero, "flops": cost.flops}


def _in_order(data: Any) -> Any:
    """The data set under a loader: a profile is taken in a fixed order, over all of it."""
    return getattr(data, "dataset", data)
