"""Where the boxes and lines of a picture go: Graphviz decides, in the process, without its programs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prunelab.errors import PruneLabError
from prunelab.program.boxes import Element

Point = tuple[float, float]
_POINTS_PER_INCH = 72
# Room for a stage's name, in a form for which Graphviz needs no font.
_ROOM = '<<TABLE BORDER="0" FIXEDSIZE="TRUE" WIDTH="60" HEIGHT="10"><TR><TD></TD></TR></TABLE>>'


@dataclass(frozen=True)
class Places:
    """Where everything is, in points from the upper left corner.

    Attributes:
        centres: of every element.
        lines: for every connection its source and the points of its Bézier curve, the tip of the arrow last.
        stages: upper left and lower right corner of every stage, by name.
    """

    centres: tuple[Point, ...]
    lines: tuple[tuple[int, tuple[Point, ...]], ...]
    stages: Mapping[str, tuple[float, float, float, float]]
    width: float
    height: float


def layout(found: Sequence[Element], sizes: Sequence[Point]) -> Places:
    """Graphviz's layered layout, ``dot``, from top to bottom.

    Args:
        sizes: width and height of every element in points.

    Raises:
        PruneLabError: pygraphviz is not installed.
    """
    try:
        import pygraphviz
    except ImportError as error:
        raise PruneLabError(f"A picture needs the package pygraphviz: pip install pygraphviz ({error}).") from None
    graph = pygraphviz.AGraph(directed=True, strict=False, ranksep="0.22", nodesep="0.25")
    for k, (width, height) in enumerate(sizes):
        size = {"width": width / _POINTS_PER_INCH, "height": height / _POINTS_PER_INCH}
        graph.add_node(k, shape="box", label="", fixedsize=True, **size)
    for (source, k), weight in _weights(found).items():
        graph.add_edge(source, k, weight=weight, arrowsize=0.5)
    stages = _stages(found)
    for n, members in enumerate(stages.values()):
        graph.add_subgraph(members, name=f"cluster_{n}", label=_ROOM, margin=10)
    graph.layout("dot")
    left, bottom, right, top = _numbers(graph.graph_attr["bb"])

    def place(text: str) -> Point:
        x, y = _numbers(text)
        return x - left, top - y

    frames = {}
    for n, name in enumerate(stages):
        x0, y0, x1, y1 = _numbers(graph.get_subgraph(f"cluster_{n}").graph_attr["bb"])
        frames[name] = (x0 - left, top - y1, x1 - left, top - y0)
    lines = []
    for edge in graph.edges():
        tip, *points = edge.attr["pos"].removeprefix("e,").split()
        lines.append((int(edge[0]), (*map(place, points), place(tip))))
    centres = tuple(place(graph.get_node(k).attr["pos"]) for k in range(len(found)))
    return Places(centres, tuple(lines), frames, right - left, top - bottom)


def _weights(found: Sequence[Element]) -> dict[tuple[int, int], int]:
    """How straight every connection should be, by source and reader: the longest way is the trunk."""
    above, below = [0] * len(found), [0] * len(found)
    for k, element in enumerate(found):
        above[k] = max((above[s] + 1 for s in element.sources), default=0)
    for k in reversed(range(len(found))):
        for source in found[k].sources:
            below[source] = max(below[source], below[k] + 1)
    weights = {}
    for k, element in enumerate(found):
        for source in element.sources:
            longest = (above[source] + 1 == above[k], below[source] == below[k] + 1)
            weights[source, k] = 20 if all(longest) else 1 + sum(longest)
    return weights


def _stages(found: Sequence[Element]) -> dict[str, list[int]]:
    """The elements of every stage that has several boxes."""
    stages: dict[str, list[int]] = {}
    for k, element in enumerate(found):
        if name := _stage(element):
            stages.setdefault(name, []).append(k)
    return {name: members for name, members in stages.items() if sum(found[k].kind == "box" for k in members) > 1}


def _stage(element: Element) -> str:
    """The module path up to its first part with a number, a block or a stage in most networks; or ""."""
    parts = element.name.split(".")
    parts = parts[:-1] if element.kind == "box" else parts
    first = next((k for k, part in enumerate(parts) if re.search(r"\d", part)), None)
    return "" if first is None else ".".join(parts[: first + 1])


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]
