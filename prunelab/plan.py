"""The plan: what the user wants removed, as an immutable value with a JSON and a Python form."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunelab.criteria.registry import Scores, get, scores
from prunelab.errors import PruneLabError, unknown
from prunelab.profile.capture import Profile
from prunelab.program.channels import Layer
from prunelab.program.program import Program
from prunelab.program.selection import Selection

GRAINS = ("block", "layer", "channel", "weight")
"""What can be removed, coarse to fine."""

AVAILABLE_GRAINS = ("channel", "weight")

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

    def check(self, layer: str) -> None:
        """Raises PruneLabError for a value that no network could satisfy."""
        given = [n for n in ("ratio", "std", "remove") if getattr(self, n) is not None]
        if len(given) > 1:
            raise PruneLabError(f"Layer {layer!r} is given {' and '.join(given)}: choose one.")
        if self.ratio is not None and not 0 <= self.ratio <= 1:
            raise PruneLabError(f"The ratio of layer {layer!r} must lie in 0 to 1, not {self.ratio}.")
        if self.std is not None and not math.isfinite(self.std):
            raise PruneLabError(f"The std of layer {layer!r} must be a finite number, not {self.std}.")
        if self.grain not in GRAINS:
            raise unknown("grain", self.grain, GRAINS)
        if self.grain not in AVAILABLE_GRAINS:
            raise PruneLabError(f"The grain {self.grain!r} (layer {layer!r}) is not available yet; use 'channel' or 'weight'.")
        if self.grain == "weight" and self.remove is not None:
            raise PruneLabError(f"Layer {layer!r}: single weights are chosen by ratio or std, not by number.")


@dataclass(frozen=True)
class Plan:
    """The settings of all layers. ``set`` and its kin give a new plan; nothing changes in place.

    Attributes:
        criterion: what scores channels.
        settings: by layer name.
        seed: for the criterion ``random``.
        network: digest of the network it was made for ("" for any that has these layers).
    """

    criterion: str = "l1"
    settings: Mapping[str, Setting] = field(default_factory=dict)
    seed: int = 0
    network: str = ""

    def __post_init__(self) -> None:
        get(self.criterion)
        for name, setting in self.settings.items():
            setting.check(name)
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

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
        old = self.settings.get(layer, Setting())
        new = old
        if any(v is not None for v in (ratio, std, remove)):
            channels = None if remove is None else tuple(sorted({int(c) for c in remove}))
            new = replace(old, ratio=None if ratio is None else float(ratio), std=None if std is None else float(std), remove=channels)
        if grain is not None:
            new = replace(new, grain=grain)
        if locked is not None:
            new = replace(new, locked=locked)
        new.check(layer)
        return replace(self, settings={**self.settings, layer: new})

    def clear(self, layer: str) -> Plan:
        """A plan that removes nothing from this layer (its grain and lock stay)."""
        old = self.settings.get(layer, Setting())
        return replace(self, settings={**self.settings, layer: replace(old, ratio=None, std=None, remove=None)})

    def to_json(self) -> str:
        """The plan as JSON text, keys sorted: equal plans have equal text."""
        settings = {
            name: {k: v for k, v in asdict(s).items() if v not in (None, False)} for name, s in self.settings.items()
        }
        return json.dumps(
            {"criterion": self.criterion, "seed": self.seed, "network": self.network, "settings": settings},
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
            settings = {
                str(name): Setting(**{**s, **({"remove": tuple(s["remove"])} if "remove" in s else {})})
                for name, s in raw.get("settings", {}).items()
            }
            return cls(raw.get("criterion", "l1"), settings, int(raw.get("seed", 0)), raw.get("network", ""))
        except PruneLabError:
            raise
        except Exception as error:
            raise PruneLabError(f"This is not a plan in JSON: {error}.") from error

    def to_python(self) -> str:
        """The plan as a Python expression that makes it again."""
        head = [f"criterion={self.criterion!r}"]
        head += [f"seed={self.seed}"] if self.seed else []
        head += [f"network={self.network!r}"] if self.network else []
        lines = [f"pl.Plan({', '.join(head)})"]
        for name, s in self.settings.items():
            given = {k: v for k, v in asdict(s).items() if v is not None and (k, v) not in (("grain", "channel"), ("locked", False))}
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
        """Which channels stay and which single weights are zeroed.

        Args:
            score: gives a layer's scores if they are known already; computed by the plan's criterion unless given.

        Raises:
            PruneLabError: a layer that is unknown, pinned or set twice, a channel that does not exist, a layer's last
                channel, a criterion without its profile, or a plan made for another network.
        """
        if self.network and self.network != program.digest:
            raise PruneLabError("This plan was made for another network; its layers are not those of this one.")
        score = score or (lambda layer: scores(program, profile, self.criterion, layer, self.seed))
        kept: dict[str, tuple[int, ...]] = {}
        masks: dict[str, Tensor] = {}
        seen: dict[str, str] = {}
        for name, setting in self.settings.items():
            layer = program.layer(name)
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
            gone = removed(setting, np.zeros(0) if setting.rule == "manual" else score(layer), layer)
            if gone.size:
                kept[layer.name] = tuple(sorted(set(range(layer.channels)) - set(gone.tolist())))
        return Selection(kept, masks)


def _from_tree(tree: ast.expr) -> Plan:
    if not isinstance(tree, ast.Call):
        raise PruneLabError("This is not a plan in Python: it must read pl.Plan(…).set(…)….")
    values = {k.arg: ast.literal_eval(k.value) for k in tree.keywords if k.arg}
    positional = [ast.literal_eval(a) for a in tree.args]
    called = tree.func
    if isinstance(called, ast.Attribute) and called.attr == "set":
        return _from_tree(called.value).set(*positional, **values)
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    if name != "Plan":
        raise PruneLabError(f"This is not a plan in Python: {name or 'the expression'} is not Plan or set.")
    return Plan(*positional, **values)


def removed(setting: Setting, score: Scores, layer: Layer) -> NDArray[np.int64]:
    """Channels that a setting removes from a layer, ascending.

    Args:
        score: shape ``(channels,)``, higher = keep.
    """
    if setting.ratio is not None:
        return by_ratio(score, setting.ratio)
    if setting.std is not None:
        return by_std(score, setting.std)
    wanted = np.array(setting.remove or (), np.int64)
    if wanted.size and (wanted.min() < 0 or wanted.max() >= layer.channels):
        raise PruneLabError(f"Layer {layer.name!r} has channels 0 to {layer.channels - 1}; {wanted.max()} is not one of them.")
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
    below = np.flatnonzero(score < score.mean() - std * score.std())
    if below.size == score.size:
        below = np.delete(below, int(np.argmax(score)))
    return below


def std_of_ratio(score: Scores, ratio: float) -> float | None:
    """The std that a ratio amounts to: how far the lowest kept score lies below the mean; None when nothing goes."""
    gone = by_ratio(score, ratio)
    sigma = float(score.std())
    if not gone.size or sigma == 0:
        return None
    lowest_kept = np.sort(score)[gone.size]
    return float((score.mean() - lowest_kept) / sigma)


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
