"""The plan: what the user wants removed, as an immutable value with a JSON and a Python form."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunelab.criteria.combining import COMBINES
from prunelab.criteria.registry import Scores, get, scores
from prunelab.errors import PruneLabError, unknown
from prunelab.profile.capture import Profile
from prunelab.program.channels import Layer
from prunelab.program.program import Program
from prunelab.program.selection import Selection
from prunelab.widths import rounded, step_of

REPAIRS: Mapping[str, str] = MappingProxyType(
    {
        "none": "the surviving weights stay as they are",
        "bias": "what the outputs have lost on average goes into the next bias, or into the next norm's running mean",
        "norm": "batch norms take their statistics anew from the cut network",
        "least-squares": "the next layers' weights are chosen anew: their outputs come nearest to what they were",
        "least-squares+norm": "least squares, and new statistics for the norms that it has not fitted",
        "merge": "what read a removed channel reads the one most like it in its place: exact for equal filters",
    }
)
"""How surviving weights can be corrected, by name, each in words; formulas and sources: :mod:`prunelab.repair`."""

GRAINS = ("channel", "weight")
"""What a setting can remove of a layer. Whole layers and blocks are units: :meth:`Plan.bypass` removes them."""

Rule = Literal["none", "ratio", "std", "manual"]


@dataclass(frozen=True)
class Setting:
    """What is wanted of one layer: one rule at most, its grain, and whether it is locked.

    Attributes:
        ratio: remove the lowest ``⌊ratio · channels⌋``, 0 to 1; at least one stays.
        std: remove what scores more than this many standard deviations below the layer's mean.
        remove: remove exactly these channels.
        grain: ``channel``, or ``weight`` for single weights of the smallest magnitude.
        locked: rules for all layers at once leave it alone.
    """

    ratio: float | None = None
    std: float | None = None
    remove: tuple[int, ...] | None = None
    grain: str = "channel"
    locked: bool = False

    @property
    def rule(self) -> Rule:
        """Which rule is set."""
        if self.ratio is not None:
            return "ratio"
        if self.std is not None:
            return "std"
        return "manual" if self.remove is not None else "none"

    def checked(self, layer: str) -> Setting:
        """The same with plain Python values, so that equal settings have equal text.

        Raises:
            PruneLabError: a value that no network could satisfy.
        """
        given = [n for n in ("ratio", "std", "remove") if getattr(self, n) is not None]
        if len(given) > 1:
            raise PruneLabError(f"Layer {layer!r} is given {' and '.join(given)}: choose one.")
        ratio, std = _number(self.ratio, "ratio", layer), _number(self.std, "std", layer)
        if ratio is not None and not 0 <= ratio <= 1:
            raise PruneLabError(f"The ratio of layer {layer!r} must lie in 0 to 1, not {self.ratio}.")
        if self.grain not in GRAINS:
            raise unknown("grain", str(self.grain), GRAINS)
        if self.grain == "weight" and self.remove is not None:
            raise PruneLabError(f"Layer {layer!r}: single weights are chosen by ratio or std, not by number.")
        return Setting(ratio, std, _channels(self.remove, layer), self.grain, bool(self.locked))


def _number(value: Any, what: str, layer: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise PruneLabError(f"The {what} of layer {layer!r} must be a finite number, not {value!r}.")
    # Minus zero equals zero but reads differently.
    return float(value) + 0.0


def _channels(value: Any, layer: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    listed = list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(c, Integral) and not isinstance(c, bool) for c in listed):
        raise PruneLabError(f"The channels to remove from layer {layer!r} must be whole numbers, not {value!r}.")
    return tuple(sorted({int(c) for c in listed}))


@dataclass(frozen=True)
class Plan:
    """The settings of all layers. ``set`` and its kin give a new plan; nothing changes in place.

    Attributes:
        criterion: what scores channels.
        settings: by layer name.
        seed: for the criterion ``random``.
        network: digest of the network it was made for ("" for any that has these layers).
        repair: how the surviving weights are corrected, one of :data:`REPAIRS`.
        bypassed: names of the layers and blocks that are removed whole, sorted; see ``program.units``.
        multiple: widths that a ratio or std leaves are rounded up to a multiple of this, see :mod:`prunelab.widths`;
            channels removed by hand and single weights are as they were set.
        combine: how a row with several members, as a residual stream, gets its scores from theirs, one of
            :data:`prunelab.criteria.COMBINES`; see :func:`prunelab.criteria.combining.combined`.
    """

    criterion: str = "l1"
    settings: Mapping[str, Setting] = field(default_factory=dict)
    seed: int = 0
    network: str = ""
    repair: str = "none"
    bypassed: tuple[str, ...] = ()
    multiple: int = 1
    combine: str = "mean"

    def __post_init__(self) -> None:
        get(self.criterion)
        if self.repair not in REPAIRS:
            raise unknown("repair", str(self.repair), REPAIRS)
        if self.combine not in COMBINES:
            raise unknown("way to combine", str(self.combine), COMBINES)
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral) or self.seed < 0:
            raise PruneLabError(f"The seed of a plan must be a whole number from 0, not {self.seed!r}.")
        if isinstance(self.multiple, bool) or not isinstance(self.multiple, Integral) or self.multiple < 1:
            raise PruneLabError(f"The multiple of a plan must be a whole number from 1, not {self.multiple!r}.")
        if not isinstance(self.bypassed, list | tuple) or not all(isinstance(unit, str) for unit in self.bypassed):
            raise PruneLabError(f"A plan's bypassed units must be a list of their names, not {self.bypassed!r}.")
        checked = {str(name): setting.checked(name) for name, setting in self.settings.items()}
        # A setting that says nothing is no setting: a plan that was cleared equals one that was never set.
        settings = {name: setting for name, setting in checked.items() if setting != Setting()}
        object.__setattr__(self, "seed", int(self.seed))
        object.__setattr__(self, "multiple", int(self.multiple))
        object.__setattr__(self, "settings", MappingProxyType(settings))
        object.__setattr__(self, "bypassed", tuple(sorted(set(self.bypassed))))

    def __hash__(self) -> int:
        return hash(self.to_json())

    def set(
        self,
        layer: str,
        *,
        ratio: float | None = None,
        std: float | None = None,
        remove: Any = None,
        grain: str | None = None,
        locked: bool | None = None,
    ) -> Plan:
        """A plan with one layer's setting changed; a new rule replaces the layer's old one.

        Raises:
            PruneLabError: a value outside its range, more than one rule, or an unknown grain.
        """
        new = self.settings.get(layer, Setting())
        if any(v is not None for v in (ratio, std, remove)):
            new = replace(new, ratio=ratio, std=std, remove=remove)
        if grain is not None:
            new = replace(new, grain=grain)
        if locked is not None:
            new = replace(new, locked=locked)
        return replace(self, settings={**self.settings, layer: new})

    def clear(self, layer: str) -> Plan:
        """A plan that removes nothing from this layer (its grain and lock stay)."""
        old = self.settings.get(layer, Setting())
        return replace(self, settings={**self.settings, layer: replace(old, ratio=None, std=None, remove=None)})

    def bypass(self, unit: str) -> Plan:
        """A plan that removes a whole layer or block: its input passes through. Names are those of ``program.units``.

        Settings of the layers inside rest until it is restored.
        """
        return replace(self, bypassed=(*self.bypassed, unit))

    def restore(self, unit: str) -> Plan:
        """A plan in which a bypassed layer or block is back, with the settings that it had.

        Raises:
            PruneLabError: the plan does not bypass it.
        """
        if unit not in self.bypassed:
            listed = ", ".join(repr(name) for name in self.bypassed)
            raise PruneLabError(f"The plan does not bypass {unit!r}; it bypasses {listed or 'nothing'}.")
        return replace(self, bypassed=tuple(name for name in self.bypassed if name != unit))

    def to_json(self) -> str:
        """The plan as JSON text, keys sorted: equal plans have equal text."""
        settings = {
            name: {k: v for k, v in asdict(s).items() if v is not None and v is not False}
            for name, s in self.settings.items()
        }
        return json.dumps(
            {
                "criterion": self.criterion,
                "seed": self.seed,
                "network": self.network,
                "repair": self.repair,
                "bypassed": self.bypassed,
                "multiple": self.multiple,
                "combine": self.combine,
                "settings": settings,
            },
            indent=1,
            sort_keys=True,
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The reverse of :meth:`to_json`.

        Raises:
            PruneLabError: the text is not a plan.
        """
        try:
            raw = json.loads(text)
            if not isinstance(raw, dict) or not {"criterion", "settings"} <= raw.keys() <= _KEYS:
                raise PruneLabError("This is not a plan in JSON: it must hold a criterion and settings.")
            return cls(**{**raw, "settings": {name: Setting(**s) for name, s in raw["settings"].items()}})
        except PruneLabError:
            raise
        except Exception as error:
            raise PruneLabError(f"This is not a plan in JSON: {error}.") from error

    def to_python(self) -> str:
        """The plan as a Python expression that makes it again."""
        head = [f"criterion={self.criterion!r}"]
        head += [f"seed={self.seed}"] if self.seed else []
        head += [f"network={self.network!r}"] if self.network else []
        head += [f"repair={self.repair!r}"] if self.repair != "none" else []
        head += [f"multiple={self.multiple}"] if self.multiple != 1 else []
        head += [f"combine={self.combine!r}"] if self.combine != "mean" else []
        lines = [f"pl.Plan({', '.join(head)})", *(f"    .bypass({unit!r})" for unit in self.bypassed)]
        for name, s in self.settings.items():
            given = {
                k: v
                for k, v in asdict(s).items()
                if v is not None and (k, v) not in (("grain", "channel"), ("locked", False))
            }
            if given:
                lines.append(f"    .set({name!r}, {', '.join(f'{k}={v!r}' for k, v in given.items())})")
        return lines[0] if len(lines) == 1 else "(\n    " + lines[0] + "\n" + "\n".join(lines[1:]) + "\n)"

    @classmethod
    def from_python(cls, text: str) -> Plan:
        """The reverse of :meth:`to_python`. Only that form is read; nothing is executed.

        Raises:
            PruneLabError: the text is something else.
        """
        try:
            return _from_tree(ast.parse(text.strip(), mode="eval").body)
        except PruneLabError:
            raise
        except Exception as error:
            raise PruneLabError(f"This is not a plan in Python: {error}.") from error

    def resolve(
        self, program: Program, profile: Profile | None = None, score: Callable[[Layer], Scores] | None = None
    ) -> Selection:
        """Which units are bypassed, which channels stay and which single weights are zeroed: coarse to fine.

        Settings are read for the network that the bypasses leave. A setting of a layer within a bypassed unit, of
        one that a bypass couples to an earlier layer, or of one that a bypass pins, rests while it is so.

        Args:
            score: gives a layer's scores if they are known already; computed by the plan's criterion unless
                given.

        Raises:
            PruneLabError: a layer or unit that is unknown, a layer that is pinned or set twice, a channel that does
                not exist, a layer's last channel, a criterion without its profile, or a plan made for another network.
        """
        if self.network and self.network != program.base.digest:
            raise PruneLabError("This plan was made for another network; its layers are not those of this one.")
        program = program.without(self.bypassed)
        score = score or (lambda layer: scores(program, profile, self.criterion, layer, self.seed, self.combine))
        kept: dict[str, tuple[int, ...]] = {}
        masks: dict[str, Tensor] = {}
        seen: dict[str, str] = {}
        for name, setting in self.settings.items():
            layer = in_force(program, name)
            if layer is None:
                continue
            if layer.name in seen:
                raise PruneLabError(f"The plan sets layer {layer.name!r} twice, as {seen[layer.name]!r} and {name!r}.")
            seen[layer.name] = name
            if setting.rule == "none":
                continue
            if layer.pinned:
                raise PruneLabError(f"Layer {name!r} cannot be pruned: {layer.pinned}.")
            if setting.grain == "weight":
                masks.update(_weight_masks(program, layer, setting))
                continue
            ranked = np.zeros(0) if setting.rule == "manual" else score(layer)
            gone = removed(setting, ranked, layer, self.multiple)
            if gone.size:
                kept[layer.name] = tuple(sorted(set(range(layer.channels)) - set(gone.tolist())))
        return Selection(kept, masks, program.bypassed)


def in_force(program: Program, name: str) -> Layer | None:
    """The layer with this name, or None where its setting rests: a bypass removed it, pinned it or tied it to another.

    Raises:
        PruneLabError: there is no such layer in the whole network either, with the nearest names.
    """
    named = {layer.name: layer for layer in program.structure.layers}
    layer = named.get(name) or named.get(program.base.layer(name).name)
    pinned_now = layer is not None and layer.pinned and not program.base.layer(name).pinned
    return None if pinned_now else layer


_KEYS = {f.name for f in fields(Plan)}
_CHANGES = ("set", "bypass")


def _from_tree(tree: ast.expr) -> Plan:
    changes: list[ast.Call] = []
    while isinstance(tree, ast.Call) and isinstance(tree.func, ast.Attribute) and tree.func.attr in _CHANGES:
        changes.append(tree)
        tree = tree.func.value
    if not isinstance(tree, ast.Call) or ast.unparse(tree.func) not in ("pl.Plan", "prunelab.Plan", "Plan"):
        raise PruneLabError("This is not a plan in Python: it must read pl.Plan(…).set(…)….")
    plan = Plan(*_values(tree), **_named_values(tree))
    for change in reversed(changes):
        assert isinstance(change.func, ast.Attribute)
        plan = getattr(plan, change.func.attr)(*_values(change), **_named_values(change))
    return plan


def _values(call: ast.Call) -> list[Any]:
    return [ast.literal_eval(value) for value in call.args]


def _named_values(call: ast.Call) -> dict[str, Any]:
    if any(keyword.arg is None for keyword in call.keywords):
        raise PruneLabError("This is not a plan in Python: it unpacks keywords.")
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}


def removed(setting: Setting, score: Scores, layer: Layer, multiple: int = 1) -> NDArray[np.int64]:
    """Channels that a setting removes from a layer, ascending.

    Args:
        score: shape ``(channels,)``, higher = keep.
        multiple: of the plan; what a hand has chosen is not rounded.
    """
    if setting.ratio is not None:
        return rounded(by_ratio(score, setting.ratio), score, step_of(layer, multiple))
    if setting.std is not None:
        return rounded(by_std(score, setting.std), score, step_of(layer, multiple))
    wanted = np.array(setting.remove or (), np.int64)
    if wanted.size and (wanted.min() < 0 or wanted.max() >= layer.channels):
        wrong = next(c for c in wanted.tolist() if not 0 <= c < layer.channels)
        raise PruneLabError(f"Layer {layer.name!r} has channels 0 to {layer.channels - 1}; {wrong} is not one of them.")
    if wanted.size == layer.channels:
        raise PruneLabError(f"Layer {layer.name!r} would lose its last channel: at least one must stay.")
    return wanted


def by_ratio(score: NDArray[Any], ratio: float) -> NDArray[np.int64]:
    """The lowest ``⌊ratio · n⌋`` units, at most all but one; equal scores go in order of index.

    The product is rounded at 1e-9, since 0.3 · 10 is 2.9999999999999996 in binary and a person means 3.
    """
    count = min(math.floor(ratio * score.size + 1e-9), score.size - 1)
    return np.sort(np.argsort(score, kind="stable")[:count])


def by_std(score: NDArray[Any], std: float) -> NDArray[np.int64]:
    """Units that score below ``mean − std · σ`` (population σ), at most all but the best one."""
    mean, sigma = spread(score)
    below = np.flatnonzero(score < mean - std * sigma)
    if below.size == score.size:
        below = np.delete(below, int(np.argmax(score)))
    return below


def spread(score: NDArray[Any]) -> tuple[float, float]:
    """Mean and population standard deviation; exactly the score and 0 where all are equal.

    Rounding could else put the mean of equal scores above them all, and a rule would remove all but one.
    """
    if score.min() == score.max():
        return float(score[0]), 0.0
    return float(score.mean()), float(score.std())


def std_of_ratio(score: Scores, ratio: float) -> float | None:
    """The std that a ratio amounts to, or None when nothing goes.

    It is how far the lowest kept score lies below the mean, in standard deviations.
    """
    gone = by_ratio(score, ratio)
    mean, sigma = spread(score)
    if not gone.size or sigma == 0:
        return None
    return float((mean - np.sort(score)[gone.size]) / sigma)


def ratio_of_std(score: Scores, std: float) -> float:
    """The ratio that a std amounts to."""
    return by_std(score, std).size / score.size


def _weight_masks(program: Program, layer: Layer, setting: Setting) -> dict[str, Tensor]:
    """Single weights of a layer's producers, smallest magnitude first, over all producers together."""
    states = list(dict.fromkeys(state for state, _ in layer.producers))
    sizes = [program.state(s).shape for s in states]
    magnitude = torch.cat([program.state(s).abs().double().flatten().cpu() for s in states]).numpy()
    gone = by_ratio(magnitude, setting.ratio) if setting.ratio is not None else by_std(magnitude, setting.std or 0.0)
    stays = torch.ones(magnitude.size, dtype=torch.bool)
    stays[torch.from_numpy(gone)] = False
    parts = torch.split(stays, [s.numel() for s in sizes])
    return {state: part.reshape(size) for state, part, size in zip(states, parts, sizes, strict=True)}
