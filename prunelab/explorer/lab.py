"""The lab: the one mutable thing. It holds the current network, the plan and its history, and every point measured.

No widget is needed for it: the explorer only calls what is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from prunelab.commit import commit
from prunelab.datasets import class_names, displayed
from prunelab.errors import PruneLabError
from prunelab.explorer.best_planning import take_best_plan
from prunelab.explorer.planning import Planning
from prunelab.explorer.scanning import Scanned, scan
from prunelab.explorer.stage import Point, Stage, weights_of
from prunelab.explorer.timed import columns, from_plain, to_plain
from prunelab.explorer.training import Course, Training
from prunelab.latency import Latency, latency
from prunelab.outcomes import Outcomes
from prunelab.plan import Plan
from prunelab.preview import Estimate, Precision, Preview, labelled
from prunelab.program.cache import Cache
from prunelab.program.cost import Cost
from prunelab.program.program import Program, cost, sliced_masks, trace
from prunelab.program.run import removes_anything
from prunelab.program.selection import Selection, with_masks
from prunelab.progress import Progress, Stopped
from prunelab.repair import Repaired, Repairer, sample_of
from prunelab.repair.values import Wanted, always
from prunelab.saving import export
from prunelab.search import Best
from prunelab.sensitivity import Sensitivity
from prunelab.train.csgd import Squeezed
from prunelab.train.keeping import Kept, read_lab, write_lab
from prunelab.train.position import Epoch
from prunelab.train.recipe import Recipe
from prunelab.train.runfile import RunFile

if TYPE_CHECKING:
    import pandas as pd


class Lab(Planning):
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
        self.val = val
        self.name = name or type(model).__name__
        self._images, self._labels = labelled(val)
        self._probe = min(probe, len(self._labels))
        self._memory = Cache(memory)
        first = example if example is not None else self._images[:2]
        stage = self._stage(trace(model, first), {})
        super().__init__(stage, Plan(criterion=criterion, network=stage.program.digest), train, cache)
        # Of the network that everything is compared with, and how to come by it: not the first one after a load.
        self._began, self._origin = _size(cost(stage.program)), weights_of(stage.program)
        # Whether that network is here: a lab that was loaded has what became of it.
        self.knows_unpruned = True
        self._uncut: Callable[[], Program] = lambda: self._first.program
        self._points: list[Point] = []
        self._timed: dict[str, Latency] = {}
        self._repairer: Repairer | None = None
        self._repaired = Repaired()
        # The last sensitivity scan, of whichever network was current then.
        self.scanned: Scanned | None = None
        # How the last training goes, or went: its losses and epochs.
        self.training: Course | None = None

    # What is there now ---------------------------------------------

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
            frame = frame.drop(columns="weights").join(columns([self._timed.get(p.key) for p in self._points]))
        return frame

    @property
    def repaired(self) -> Repaired:
        """What the repair of the plan last measured or committed has corrected, and in ``left`` what it has not."""
        return self._repaired

    # Measuring ---------------------------------------------

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
        # Read once: a hand may move on meanwhile.
        stage, plan = self._now
        selection, repairer = self._resolve(stage, plan), self._repairer_of(stage, plan)
        masked = with_masks(selection, stage.masks)
        repaired = repairer.quick(masked, plan.repair, wanted) if repairer is not None else None
        if repaired is None:
            return None
        return next(iter(stage.preview.estimates(selection, n=self._probe, repaired=repaired)))

    def measure(self, on_update: Callable[[Estimate], bool | None] | None = None, wanted: Wanted = always) -> Estimate:
        """Accuracy of the plan on all of ``val``, exactly that of the network that it commits.

        Args and errors: as for :meth:`estimate`.
        """
        return self._measured(None, on_update, "float32", wanted)

    def latency(self, *, progress: Progress | bool = True, **settings: Any) -> Latency:
        """Time the network that the plan would commit, on this machine, beside the one that the lab began with.

        What it finds stands in :attr:`history`, in the rows of this plan.

        Args: as :func:`prunelab.latency`.

        Raises:
            PruneLabError: nothing has been removed, by the plan or a commit; or as :func:`prunelab.latency`.
        """
        # Read once: a hand may move on meanwhile.
        stage, plan = self._now
        program, selection = stage.program.without(plan.bypassed), with_masks(self._resolve(stage, plan), stage.masks)
        if self._is_uncut and not removes_anything(program, selection):
            raise PruneLabError("There is nothing to time: neither the plan nor a commit has removed anything.")
        key = stage.key(plan)
        if key not in {point.key for point in self._points}:
            self.estimate()
        found = self._timed[key] = latency(program, selection, against=self._uncut(), progress=progress, **settings)
        return found

    @property
    def timed(self) -> Latency | None:
        """What :meth:`latency` last found for the plan that is here now."""
        return self._timed.get(self.stage.key(self.plan))

    def outcomes(self, *, progress: Progress | bool = False) -> Outcomes:
        """What the plan changes, image by image, on the probe images and in the arithmetic of :meth:`estimate`.

        Raises:
            PruneLabError: the network is no classifier.
            Stopped: ``progress`` said so.
        """
        stage, plan = self._now
        selection = self._resolve(stage, plan)
        repaired = self._repair(stage, plan, selection)
        found = stage.preview.outcomes(selection, n=self._probe, repaired=repaired, precision="auto", progress=progress)
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
            settings.setdefault("repair_images", sample_of(self.train))
        return scan(self, **settings)

    def best_plan(self, **settings: Any) -> Best:
        """Search for the best plan by this one's criterion and repair, and take it: one step of undo.

        Locked settings, removed blocks and layers, and the multiple stay. It chooses by images of ``val``: test what
        comes out on others.

        Args: as :func:`prunelab.best_plan`, for example ``flops=0.5``, ``params=0.3`` or ``drop=0.01``.

        Raises:
            PruneLabError: as there; the plan stays as it was.
            Stopped: ``progress`` said so; the plan stays as it was.
        """
        settings.setdefault("n_found", self._probe)
        if settings.get("repair", self.plan.repair) != "none":
            settings.setdefault("repair_images", sample_of(self.train))
        return take_best_plan(self, **settings)

    def _measured(
        self,
        n: int | None,
        on_update: Callable[[Estimate], bool | None] | None,
        precision: Precision,
        wanted: Wanted = always,
    ) -> Estimate:
        # Read once: a hand may move on meanwhile.
        now = self._now
        stage, plan = now
        selection = self._resolve(stage, plan)
        repaired = self._repair(stage, plan, selection, wanted)
        found = stage.preview.accuracy(selection, n=n, repaired=repaired, on_update=on_update, precision=precision)
        # If it has, this accuracy is not that of the plan that is here now. And an estimate that was given up half-way
        # is not worth a point.
        if self._now is now and found.n == min(n or len(self._labels), len(self._labels)):
            if removes_anything(stage.program, selection):
                self._add("plan", found, stage, plan, selection)
            elif self._is_uncut:
                self._add("dense", found, stage, plan, selection)
        return found

    def _repairer_of(self, stage: Stage, plan: Plan) -> Repairer | None:
        """What repairs a network, and knows it from the last time; None where the plan asks for no repair."""
        if plan.repair == "none":
            return None
        if self._repairer is None or self._repairer.program is not stage.program:
            self._repairer = Repairer(stage.program, sample_of(self.train))
        return self._repairer

    def _repair(self, stage: Stage, plan: Plan, selection: Selection, wanted: Wanted = always) -> Repaired:
        """The plan's repair for a selection, from training images."""
        repairer = self._repairer_of(stage, plan)
        masked = with_masks(selection, stage.masks)
        self._repaired = repairer(masked, plan.repair, wanted) if repairer is not None else Repaired()
        return self._repaired

    @property
    def _is_uncut(self) -> bool:
        """Whether the current network is the one that the lab began with."""
        return self.stage.program is self._first.program and _size(self.dense_cost()) == self._began

    def _add(self, kind: str, found: Estimate, stage: Stage, plan: Plan, selection: Selection) -> None:
        now = cost(stage.program.without(plan.bypassed), with_masks(selection, stage.masks))
        point = Point(
            kind,
            now.params,
            now.nonzero,
            now.flops,
            found.accuracy,
            found.low,
            found.high,
            found.n,
            plan.to_json(),
            found.precision,
            weights_of(stage.program),
        )
        if point not in self._points:
            self._points.append(point)

    # Committing and training ---------------------------------------------

    def commit(self, wanted: Wanted = always) -> nn.Module:
        """Make the plan real: a new, smaller module becomes the current network; the plan starts afresh.

        Args:
            wanted: asked during the plan's repair and after it whether to go on.

        Raises:
            PruneLabError: the plan removes nothing.
            Stopped: it was not wanted any more; everything is as it was.
        """
        selection = self.selection
        if not removes_anything(self.stage.program, selection):
            raise PruneLabError("There is nothing to commit: the plan removes no block, layer, channel or weight.")
        masked = self._masked(selection)
        small = commit(self.program, masked, repair=self._repair(*self._now, selection, wanted))
        masks = sliced_masks(self.program, masked)
        if not wanted():
            raise Stopped("commit")
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

        Weights that a commit zeroed stay zero. The plan starts afresh. Where the training fails in a later epoch, the
        best one before is entered all the same.

        Args: as :func:`prunelab.finetune`.
        """
        training = Training(self, "finetune", {"epochs": epochs, "lr": lr, **settings})
        try:
            table = training.run(progress, on_epoch)
        except Exception:
            if training.gained:
                self.enter(training)
            raise
        self.enter(training)
        return table

    def squeeze(
        self,
        widths: Any = 0.625,
        *,
        epochs: int = 30,
        lr: float = 0.03,
        progress: Progress | bool = True,
        on_epoch: Callable[[Epoch], None] | None = None,
        **settings: Any,
    ) -> Squeezed:
        """Train a copy of the current network by Centripetal SGD until channels are equal, and plan to merge those.

        It becomes the current network, as wide as before; :meth:`commit` trims it.

        Args: as :func:`prunelab.train.csgd.csgd`.
        """
        training = Training(self, "squeeze", {"epochs": epochs, "lr": lr, **settings}, widths)
        training.run(progress, on_epoch)
        self.enter(training)
        assert training.squeezed is not None
        return training.squeezed

    def enter(self, training: Training, *, keep_plan: bool = False) -> None:
        """Make a trained copy the current network; undo brings back the one that was, with its plan.

        Args:
            keep_plan: take the plan along that was made meanwhile for the network that was trained.
        """
        same = self.stage.program is training.stage.program
        plan = training.plan(self.plan) or (self.plan if keep_plan and same else None)
        self._enter(training.model, training.stage.masks, training.course.kind, plan)

    def _enter(self, model: nn.Module, masks: Mapping[str, Tensor], label: str, keep: Plan | None = None) -> None:
        # Proved again: what was pinned because forward does not follow its cut must stay so.
        stage = self._stage(trace(model, self.stage.program.example), masks)
        plan = replace(self.plan, settings={}, bypassed=(), network=stage.program.digest)
        with self._or_as_before():
            self._move((stage, plan))
            self.prepare(plan.criterion)
            found = stage.preview.accuracy()
            if keep is not None:
                # No step of its own for undo: it came with the network.
                self._now = (self.stage, self._fitting(replace(keep, network=stage.program.digest)))
        self._add(label, found, stage, plan, Selection())

    def _stage(self, program: Program, masks: Mapping[str, Tensor]) -> Stage:
        return Stage(program, None, Preview(program, self._images, self._labels, memory=self._memory), dict(masks))

    # Keeping ---------------------------------------------

    def save(
        self, folder: Path | str, *, make_model: Any = None, train: Any = None, val: Any = None,
        recipe: Recipe | None = None,
    ) -> None:  # fmt: skip
        """Write the current network's tensors (safetensors), the plan and all points (JSON) to a folder.

        With ``make_model``, ``train`` and ``val``, ``prunelab finetune FOLDER`` commits the plan and fine-tunes, on
        this machine or on many. They are functions by import path, ``"package.module:function"``, or a path and a dict
        of arguments; whoever trains from the folder runs that code.

        Args:
            make_model: of the function that gives the network which was first given, its tensors do not matter.
            train, val: of the functions that give the training and the validation set, each a Dataset or DataLoader.
            recipe: how to train; plain values and an :class:`prunelab.Augment` only.

        Raises:
            PruneLabError: the folder cannot be written, a function cannot be imported, or the recipe needs pickle.
        """
        run = RunFile.of(make_model, train, val, recipe)
        # Read once: a hand may move on meanwhile.
        stage, plan = self._now
        record = {
            **(run.to_record() if run is not None else {}),
            "name": self.name,
            "plan": plan.to_json(),
            "began": self._began,
            "origin": self._origin,
            "points": [vars(point) for point in self._points],
            "times": {key: to_plain(found) for key, found in self._timed.items()},
        }
        write_lab(Path(folder), Kept(stage.program.model, stage.masks, self._resolve(stage, plan), record))

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
        kept = read_lab(Path(folder), lambda _: make_model)
        record = kept.record
        lab = cls(kept.model, train, val, name=record["name"], **settings)
        lab._now = (replace(lab.stage, masks=kept.masks), lab.plan)
        origin = record.get("origin", "")
        lab.knows_unpruned = lab._origin == origin
        lab._began, lab._origin = record.get("began", lab._began), origin
        if not lab._is_uncut:
            # Its weights are not in the folder, but how long it takes does not depend on them.
            like = next(kept.model.parameters())
            lab._uncut = lambda: trace(make_model().to(like), lab._first.program.example, prove=False)
        lab._points = [Point(**point) for point in record["points"]]
        lab._timed = {key: from_plain(found) for key, found in record.get("times", {}).items()}
        lab.use(Plan.from_json(record["plan"]))
        return lab


def _size(cost: Cost) -> dict[str, int]:
    return {"params": cost.params, "nonzero": cost.nonzero, "flops": cost.flops}
