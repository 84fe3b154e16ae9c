"""A picture of the traced network: coupled layers share a colour, pinned ones say why. Graphviz lays it out."""

from __future__ import annotations

import hashlib
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import numpy as np
from numpy.typing import NDArray

from prunelab.errors import PruneLabError
from prunelab.program.boxes import Element, elements
from prunelab.program.channels import Layer
from prunelab.program.layout import Places, layout
from prunelab.program.run import kept_index, removed_labels, removes_anything
from prunelab.program.selection import DENSE, Selection

if TYPE_CHECKING:
    from prunelab.program.program import Program

# Told apart on white and on near-black paper; further couplings go round the colour circle by the golden angle.
_PALETTE = ("#3b82c4", "#e0801f", "#37a05b", "#9a68c0", "#d6528f", "#17a0ae", "#a8763e", "#8f9a1c")
_NAME, _TEXT, _SMALL = 12.5, 11.0, 10.0
_MOST_LETTERS = 40
_KEY_WIDTH = 300.0

_STYLE = """
.prunelab-network { --prunelab-ink: #20242a; --prunelab-paper: #ffffff;
  color: var(--jp-content-font-color1, var(--prunelab-ink));
  font-family: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
@media (prefers-color-scheme: dark) {
  .prunelab-network { --prunelab-ink: #e4e7eb; --prunelab-paper: #15181c; } }
.prunelab-network text { fill: currentColor; font-size: 11px; }
.prunelab-network .paper { fill: var(--jp-layout-color0, var(--prunelab-paper)); }
.prunelab-network .head { font-size: 15px; font-weight: 600; }
.prunelab-network .name { font-size: 12.5px; font-weight: 600; }
.prunelab-network .small { font-size: 10px; opacity: 0.75; }
.prunelab-network .middle { text-anchor: middle; }
.prunelab-network .right { text-anchor: end; }
.prunelab-network .stage { fill: currentColor; fill-opacity: 0.045; }
.prunelab-network .frame { fill: currentColor; fill-opacity: 0.02; stroke: currentColor; stroke-opacity: 0.55; }
.prunelab-network .pinned .frame, .prunelab-network .end .frame { stroke-opacity: 0.35; }
.prunelab-network .coupled .frame { fill-opacity: 0.16; stroke-opacity: 1; stroke-width: 1.8; }
.prunelab-network .badge { fill: #ffffff; font-size: 10px; font-weight: 700; text-anchor: middle; }
.prunelab-network .line { fill: none; stroke: currentColor; stroke-opacity: 0.45; stroke-width: 1.2; }
.prunelab-network .tip { fill: currentColor; fill-opacity: 0.55; }
.prunelab-network .coupled.line, .prunelab-network .coupled.tip { stroke-opacity: 0.9; fill-opacity: 0.9; }
.prunelab-network .coupled.line { fill: none; stroke-width: 1.8; }
.prunelab-network .lock { fill: none; stroke: currentColor; stroke-opacity: 0.7; stroke-width: 1.3; }
.prunelab-network .gone { fill: currentColor; fill-opacity: 0.18; }
.prunelab-network .stays { fill: var(--jp-brand-color1, #1976d2); }
"""


@dataclass(frozen=True)
class Drawing:
    """A picture of a network: shown in the notebook, kept as a file.

    Attributes:
        svg: the picture as SVG, with the details of every box as its tooltip.
    """

    svg: str

    def save(self, path: str | Path) -> Path:
        """Write the picture to a file.

        Raises:
            PruneLabError: the name does not end in ``.svg``.
        """
        target = Path(path)
        if target.suffix.lower() != ".svg":
            raise PruneLabError(f"The picture is drawn as SVG: give {target.name!r} a name that ends in '.svg'.")
        target.write_text(self.svg, encoding="utf-8")
        return target

    def _repr_html_(self) -> str:
        return f'<div style="max-height: 80vh; overflow: auto">{self.svg}</div>'

    def __repr__(self) -> str:
        return f"Drawing of {len(self.svg):,} characters; show it in a notebook, or save('network.svg')"


@dataclass(frozen=True)
class _Look:
    """How one element is drawn.

    Attributes:
        couplings: numbers of the couplings that it belongs to, from 1.
        pinned: why none of its channels can be removed, or "".
        reason: the same, in lines short enough for the box; only where weights are.
        kept: channels that the selection keeps and how many there are, or None where that is not shown.
        tooltip: the details.
        width, height: size of its box in points.
    """

    couplings: tuple[int, ...]
    pinned: str
    reason: tuple[str, ...]
    kept: tuple[int, int] | None
    tooltip: str
    width: float
    height: float

    @property
    def coupling(self) -> int:
        """The coupling whose colour it has, or 0: of several, the one that began last."""
        return max(self.couplings, default=0)


def draw(program: Program, selection: Selection = DENSE) -> Drawing:
    """A picture of the network, one box for every operator with weights; see :meth:`Program.draw`."""
    found = elements(program.nodes, program.outputs)
    couplings = _couplings(program, found)
    looks = _looks(program, found, couplings, selection)
    places = layout(found, [(look.width, look.height) for look in looks])
    mark = hashlib.blake2b(repr((program.digest, selection.digest)).encode(), digest_size=4).hexdigest()
    return Drawing(_svg(program, found, looks, couplings, places, f"prunelab-hatch-{mark}"))


def _couplings(program: Program, found: list[Element]) -> dict[str, int]:
    """A number from 1 for every free layer whose channels several boxes make, by its name."""
    makers = Counter(e.weight for e in found if e.weight is not None)
    coupled = [k for k in program.layers if not k.pinned and sum(makers[p] for p in k.producers) > 1]
    return {layer.name: k for k, layer in enumerate(coupled, 1)}


def _layers_of(program: Program, element: Element) -> tuple[Layer, ...]:
    """The layers that an element's channels belong to."""
    structure = program.structure
    dims = structure.values[element.node]
    ids = [i for i in (dims if isinstance(dims, tuple) else ()) if i is not None]
    owners = np.unique(structure.owner[structure.label[np.concatenate(ids)]]) if ids else np.array([], int)
    return tuple(structure.layers[k] for k in owners.tolist() if k >= 0)


def _looks(program: Program, found: list[Element], couplings: Mapping[str, int], selection: Selection) -> list[_Look]:
    costs = _costs(program)
    gone = removed_labels(program, selection) if removes_anything(program, selection) else None
    looks = []
    for element in found:
        layers = _layers_of(program, element)
        numbers = tuple(couplings[layer.name] for layer in layers if layer.name in couplings)
        pinned = "" if any(not k.pinned for k in layers) else next((k.pinned for k in layers), "")
        reason = _wrapped(pinned) if element.weight is not None else ()
        kept = None if gone is None or element.weight is None else _kept(program, *element.weight, gone)
        width, height = max(_letters(element.label, _TEXT) + 18, 26.0), 22.0
        if element.kind == "box":
            bar = kept is not None and not reason
            # The name has a badge, a lock or counts beside it.
            counts = _letters(f"{kept[0]} / {kept[1]}", _TEXT) if kept is not None else 0.0
            title = _letters(_short(element.name), _NAME) + max(56, counts + 34) + 18 * len(numbers)
            reasons = [_letters(line, _SMALL) + 20 for line in reason]
            width, height = max(width + 2, title, *reasons), 38.0 + 13 * len(reason) + 7 * bar
        tooltip = _tooltip(program, element, layers, costs, kept)
        looks.append(_Look(numbers, pinned, reason, kept, tooltip, width, height))
    widest = max((look.width for look, e in zip(looks, found, strict=True) if e.kind == "box"), default=0.0)
    return [replace(look, width=widest) if e.kind == "box" else look for look, e in zip(looks, found, strict=True)]


def _kept(program: Program, state: str, dim: int, gone: NDArray[np.bool_]) -> tuple[int, int]:
    """How many channels of a weight stay, and how many there are."""
    dims, total = program.structure.values[program.state_nodes[state]], program.state(state).shape[dim]
    index = kept_index(dims[dim], program.structure.label, gone) if isinstance(dims, tuple) else None
    return total if index is None else len(index), total


def _costs(program: Program) -> dict[str, tuple[int, int]]:
    """Parameters and FLOPs of every module, and of all under the key "*"."""
    dense = program.widths(DENSE)
    params: Counter[str] = Counter()
    flops: Counter[str] = Counter()
    for term in program.terms.params:
        params[term.name.rpartition(".")[0]] += term(dense)
    for term in program.terms.macs:
        flops[term.name] += 2 * term(dense)
    table = {name: (params[name], flops[name]) for name in {*params, *flops}}
    return {**table, "*": (params.total() or 1, flops.total() or 1)}


def _tooltip(
    program: Program,
    element: Element,
    layers: tuple[Layer, ...],
    costs: Mapping[str, tuple[int, int]],
    kept: tuple[int, int] | None,
) -> str:
    """All there is to say about an element, one fact a line."""
    shape = program.nodes[element.node].shape
    lines = [element.name, element.label, f"value per image: {'×'.join(map(str, shape[1:]))}" if shape else ""]
    for layer in layers:
        lines.append(f"layer {layer.name}: {layer.kind}, {_channels(layer)}")
        if len(layer.members) > 1:
            lines.append(f"made by {', '.join(layer.members)}")
        lines.append(f"pinned: {layer.pinned}" if layer.pinned else "")
    if element.weight is not None and element.name in costs:
        for what, own, total in zip(("parameters", "FLOPs"), costs[element.name], costs["*"], strict=True):
            lines.append(f"{what}: {own:,} ({own / total:.1%} of the network)")
    if kept is not None:
        lines.append(f"kept: {kept[0]} of {kept[1]}")
    return "\n".join(line for line in lines if line)


def _channels(layer: Layer) -> str:
    return f"{layer.channels} channel{'s' * (layer.channels > 1)}"


def _letters(text: str, size: float) -> float:
    """Width of a text, on the generous side: fonts differ."""
    return 0.56 * size * len(text)


def _short(name: str, most: int = 30) -> str:
    """The last parts of a long module path."""
    parts = name.split(".")
    while len(".".join(parts)) > most and len(parts) > 1:
        parts = parts[1:]
    tail = ".".join(parts)
    return tail if tail == name else f"… {tail}"


def _colour(coupling: int) -> str:
    if coupling <= len(_PALETTE):
        return _PALETTE[coupling - 1]
    return f"hsl({coupling * 137.508 % 360:.1f} 50% 50%)"


def _add(parent: ET.Element, tag: str, text: str = "", **attributes: object) -> ET.Element:
    """A new element inside another; numbers are written with one decimal, ``class_`` as ``class``."""
    written = {
        name.rstrip("_").replace("_", "-"): f"{value:.1f}" if isinstance(value, float) else str(value)
        for name, value in attributes.items()
    }
    child = ET.SubElement(parent, tag, written)
    child.text = text or None
    return child


def _svg(
    program: Program,
    found: list[Element],
    looks: list[_Look],
    couplings: Mapping[str, int],
    places: Places,
    hatch: str,
) -> str:
    keys = _keys(program, looks, couplings)
    width = max(places.width + 24, 2 * _KEY_WIDTH + 24)
    columns = max(1, int((width - 24) // _KEY_WIDTH))
    below = 52 + 22 * -(-len(keys) // columns)
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "prunelab-network"})
    height = places.height + below + 24
    root.attrib |= {"width": f"{width:.0f}", "height": f"{height:.0f}", "viewBox": f"0 0 {width:.0f} {height:.0f}"}
    _add(root, "style", _STYLE)
    pattern = _add(_add(root, "defs"), "pattern", id=hatch, width=6, height=6, patternUnits="userSpaceOnUse")
    pattern.set("patternTransform", "rotate(45)")
    _add(pattern, "path", d="M0,0 V6", stroke="currentColor", stroke_opacity=0.14, stroke_width=2.4)
    _add(root, "rect", class_="paper", width="100%", height="100%")
    _add(root, "text", _heading(program), class_="head", x=12, y=26)
    for n, (kind, coupling, text) in enumerate(keys):
        _key(root, kind, coupling, text, 12.0 + _KEY_WIDTH * (n % columns), 42.0 + 22 * (n // columns), hatch)
    across = (width - places.width) / 2
    picture = _add(root, "g", class_="picture", transform=f"translate({across:.1f} {below + 4})")
    for name, (x0, y0, x1, y1) in places.stages.items():
        _add(picture, "rect", class_="stage", x=x0, y=y0, width=x1 - x0, height=y1 - y0, rx=8)
        _add(picture, "text", _short(name, 20), class_="small", x=x0 + 8, y=y0 + 14)
    for source, points in places.lines:
        _line(picture, points, looks[source].coupling)
    for element, look, (x, y) in zip(found, looks, places.centres, strict=True):
        _element(picture, element, look, x - look.width / 2, y - look.height / 2, hatch)
    return ET.tostring(root, encoding="unicode")


def _heading(program: Program) -> str:
    pinned = sum(bool(layer.pinned) for layer in program.layers)
    return f"{type(program.model).__name__} · {len(program.layers)} layers, {pinned} pinned"


def _keys(program: Program, looks: list[_Look], couplings: Mapping[str, int]) -> list[tuple[str, int, str]]:
    """The legend: class, coupling and text of every entry."""
    keys = [("free", 0, "free: not coupled with another")]
    if any(look.pinned for look in looks):
        keys.append(("pinned", 0, "pinned: cannot be removed"))
    for name, number in couplings.items():
        layer = program.layer(name)
        keys.append(("coupled", number, f"{name}: {_channels(layer)}, {len(layer.producers)} boxes"))
    return keys


def _key(parent: ET.Element, kind: str, coupling: int, text: str, x: float, y: float, hatch: str) -> None:
    group = _add(parent, "g", class_=kind)
    _frame(group, x, y, 26.0, 15.0, kind, coupling, hatch)
    if coupling:
        _badge(group, coupling, x + 13, y + 7.5)
    if kind == "pinned":
        _lock(group, x + 13, y + 6)
    _add(group, "text", text, x=x + 34, y=y + 11.5)


def _frame(
    group: ET.Element, x: float, y: float, width: float, height: float, kind: str, coupling: int, hatch: str
) -> None:
    round_ = 6.0 if height > 30 else height / 2
    frame = _add(group, "rect", class_="frame", x=x, y=y, width=width, height=height, rx=round_)
    if coupling:
        frame.set("style", f"fill: {_colour(coupling)}; stroke: {_colour(coupling)}")
    if kind == "pinned":
        frame.set("style", f"fill: url(#{hatch}); fill-opacity: 1")


def _element(parent: ET.Element, element: Element, look: _Look, x: float, y: float, hatch: str) -> None:
    """A box with its texts, or the pill of a join or an end."""
    state = "coupled" if look.coupling else ("pinned" if look.pinned and element.kind == "box" else "free")
    group = _add(parent, "g", class_=f"{element.kind} {state}")
    if element.name:
        group.set("data-module", element.name)
    _add(group, "title", look.tooltip)
    _frame(group, x, y, look.width, look.height, state, look.coupling, hatch)
    if element.kind != "box":
        _add(group, "text", element.label, class_="middle", x=x + look.width / 2, y=y + 15)
        return
    _add(group, "text", _short(element.name), class_="name", x=x + 10, y=y + 16)
    _add(group, "text", element.label, x=x + 10, y=y + 31)
    right = x + look.width - 10
    for coupling in sorted(look.couplings, reverse=True):
        _badge(group, coupling, right - 4, y + 12)
        right -= 18
    if state == "pinned":
        _lock(group, right - 4, y + 12)
        for n, line in enumerate(look.reason):
            _add(group, "text", line, class_="small", x=x + 10, y=y + 44 + 13 * n)
    elif look.kept is not None:
        kept, total = look.kept
        _add(group, "text", f"{kept} / {total}", class_="right", x=right, y=y + 16)
        _bar(group, x + 10, y + look.height - 9, look.width - 20, kept / total, look.coupling)


def _bar(group: ET.Element, x: float, y: float, width: float, share: float, coupling: int) -> None:
    """What stays, in colour, of what there was."""
    _add(group, "rect", class_="gone", x=x, y=y, width=width, height=4, rx=2)
    stays = _add(group, "rect", class_="stays", x=x, y=y, width=width * share, height=4, rx=2)
    if coupling:
        stays.set("style", f"fill: {_colour(coupling)}")


def _badge(group: ET.Element, coupling: int, x: float, y: float) -> None:
    _add(group, "circle", cx=x, cy=y, r=7.5, style=f"fill: {_colour(coupling)}")
    _add(group, "text", str(coupling), class_="badge", x=x, y=y + 3.5)


def _lock(group: ET.Element, x: float, y: float) -> None:
    _add(group, "path", class_="lock", d=f"M{x - 4:.1f},{y:.1f} h8 v6 h-8 z m1.5,0 v-2 a2.5,2.5 0 0 1 5,0 v2")


def _line(parent: ET.Element, points: tuple[tuple[float, float], ...], coupling: int) -> None:
    """A curve with an arrow's tip, in the colour of the channels that flow along it."""
    start, *curve, tip = points
    path = f"M{start[0]:.1f},{start[1]:.1f} C" + " ".join(f"{x:.1f},{y:.1f}" for x, y in curve)
    end = curve[-1]
    dx, dy = tip[0] - end[0], tip[1] - end[1]
    sides = [(end[0] - 0.5 * dy, end[1] + 0.5 * dx), (end[0] + 0.5 * dy, end[1] - 0.5 * dx)]
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*sides, tip])
    line = _add(parent, "path", class_="coupled line" if coupling else "line", d=path)
    head = _add(parent, "polygon", class_="coupled tip" if coupling else "tip", points=corners)
    if coupling:
        line.set("style", f"stroke: {_colour(coupling)}")
        head.set("style", f"fill: {_colour(coupling)}")


def _wrapped(reason: str) -> tuple[str, ...]:
    """A reason in at most two lines; the tooltip has all of it."""
    return tuple(textwrap.wrap(reason, _MOST_LETTERS, max_lines=2, placeholder=" …"))
