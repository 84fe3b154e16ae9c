"""The network as a student draws it: a box for every operator with weights, small nodes where values meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from prunelab.program.channels import ACTIVATIONS, NORMS, PRODUCERS, module_of, users_of, weights_of
from prunelab.program.compute import RECURRENT
from prunelab.program.nodes import Node, Ref

_POOLS = {"mean", "sum", "amax", "amin", "max_pool", "avg_pool", "lp_pool", "adaptive_avg_pool", "adaptive_max_pool"}
_PRODUCTS = {"matmul", "bmm", "mm", "einsum", "baddbmm", "addbmm"}
_SIGNS = {"add": "+", "sub": "−", "mul": "×", "div": "÷", "concat": "cat", "concatenate": "cat"}
_SIGNS |= dict.fromkeys(_PRODUCTS, "·")
_PARTING = {"chunk", "split", "split_with_sizes", "tensor_split"}
# Tensors made from sizes alone, be it the sizes of another tensor.
_CREATION = ("new_", "zeros", "ones", "full", "empty", "arange")
_WEIGHTED = {*PRODUCERS, *RECURRENT, "scaled_dot_product_attention"} - _PRODUCTS


@dataclass
class Element:
    """A box, a join or an end of the picture, while it is put together.

    Attributes:
        kind: ``box`` (has weights, or is attention), ``join`` (values meet, part or are pooled), ``end`` (an input
            or output of the network).
        name: module path of a box's weights, or of the module that a join stands in.
        text: what it does: "conv 3×3, 64 → 128", "+".
        node: the node whose value it gives.
        weight: state name and dimension of the weights that make its channels, or None.
        before: norms and activations that precede it, and ``after`` those that follow it, in order.
        sources: the elements that it reads, by index.
    """

    kind: Literal["box", "join", "end"]
    name: str
    text: str
    node: int
    weight: tuple[str, int] | None = None
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What it does, with the norms and activations folded into it."""
        return " · ".join([*self.before, self.text, *self.after])


def elements(nodes: tuple[Node, ...], outputs: tuple[object, ...]) -> list[Element]:
    """Boxes, joins and ends, in order of execution."""
    readers = {i: [u for u in found if _carries(nodes[u])] for i, found in users_of(nodes).items()}
    builder = _Builder(nodes, readers, attentions(nodes))
    for node in nodes:
        builder.visit(node)
    for output in outputs:
        if isinstance(output, Ref) and (source := builder.at.get(output.index)) is not None:
            last = nodes[output.index]
            builder.found.append(Element("end", "", f"output {_size(last)}", output.index, sources=[source]))
    return _without_idle_joins(builder.found)


@dataclass
class _Builder:
    """Walks through the program once.

    Attributes:
        at: the element from which a node's value comes; absent for values that depend on weights alone.
        alone: nodes whose value is all that anybody reads of its element.
    """

    nodes: tuple[Node, ...]
    users: Mapping[int, list[int]]
    attentions: Mapping[int, int]
    found: list[Element] = field(default_factory=list)
    at: dict[int, int] = field(default_factory=dict)
    alone: set[int] = field(default_factory=set)
    ahead: dict[int, list[str]] = field(default_factory=dict)
    joined: dict[tuple[int, ...], int] = field(default_factory=dict)

    def visit(self, node: Node) -> None:
        """Make an element of a node, or fold it into the one whose value it reads."""
        if not _carries(node):
            return
        sources = list(dict.fromkeys(self.at[i] for i in node.inputs if i in self.at))
        if node.kind == "input":
            self.add(node, Element("end", "", f"input {_size(node)}", node.index))
        elif is_box(node, self.nodes):
            self.add(node, self.box(node, sources))
        elif node.index in self.attentions.values():
            self.add(node, Element("box", node.module, "attention", node.index, sources=sources))
        elif node.index in self.attentions:
            self.close_attention(node, sources)
        elif node.kind == "op" and (len(sources) > 1 or (sources and _is_join(node))):
            self.join(node, sources)
        elif sources:
            self.fold(node, sources[0])

    def add(self, node: Node, element: Element) -> None:
        """A new element, which the node's value comes from."""
        self.at[node.index] = len(self.found)
        self.alone.add(node.index)
        self.found.append(element)

    def box(self, node: Node, sources: list[int]) -> Element:
        """The box of an operator with weights."""
        places = [(self.nodes[i].target, dim % len(self.nodes[i].shape or (0,))) for i, dim in weights_of(node)]
        place = next((place for place in places if place[0]), None)
        held = [self.nodes[i].target for i in node.inputs if self.nodes[i].kind == "state"]
        name = module_of(place[0] if place else held[0]) if place or held else node.module
        before = self.ahead.get(node.index, [])
        return Element("box", name, describe(node, self.nodes), node.index, place, before, sources=sources)

    def close_attention(self, node: Node, sources: list[int]) -> None:
        """The second product of an attention written out: the box began at the first one."""
        at = self.at[self.attentions[node.index]]
        box = self.found[at]
        box.node, box.text = node.index, _attention(node)
        box.sources += [s for s in sources if s != at and s not in box.sources]
        self.at[node.index] = at
        self.alone.add(node.index)

    def join(self, node: Node, sources: list[int]) -> None:
        """Values meet, part, or are pooled. What is concatenated again and again grows from join to join."""
        text = _SIGNS.get(node.opname, "pool" if _is_pool(node) else node.opname.replace("_", " "))
        if text == "cat":
            whole = tuple(sources)
            for end in range(len(whole) - 1, 1, -1):
                if whole[:end] in self.joined:
                    sources = [self.joined[whole[:end]], *whole[end:]]
                    break
            self.joined[whole] = len(self.found)
        elif node.opname in _PARTING:
            text = "split"
        self.add(node, Element("join", node.module, text, node.index, sources=sources))

    def fold(self, node: Node, source: int) -> None:
        """A value of one element: norms and activations are written down, everything else passes."""
        self.at[node.index] = source
        if node.inputs[0] in self.alone and len(self.users.get(node.inputs[0], ())) == 1:
            self.alone.add(node.index)
        name = "norm" if node.opname in NORMS else _activation(node)
        if node.opname not in NORMS | ACTIVATIONS | {"softmax", "log_softmax", "prelu"}:
            return
        if source in {self.at.get(k) for k in self.attentions.values()} and self.found[source].text == "attention":
            return
        element, following = self.found[source], self.leads_to(node)
        if following is not None and not (element.kind == "box" and node.index in self.alone):
            self.ahead.setdefault(following, []).append(name)
        else:
            element.after.append(name)

    def leads_to(self, node: Node) -> int | None:
        """The box that alone reads a node's value, be it through norms, activations and reshapes."""
        while len(self.users.get(node.index, ())) == 1:
            node = self.nodes[self.users[node.index][0]]
            if is_box(node, self.nodes):
                return node.index
            if _is_join(node) or len([i for i in node.inputs if i in self.at]) > 1:
                return None
        return None


def _carries(node: Node) -> bool:
    """Whether a node's value depends on what the tensors before it hold, and not on their sizes alone."""
    return (node.shape is not None or bool(node.shapes)) and not node.opname.startswith(_CREATION)


def is_box(node: Node, nodes: tuple[Node, ...]) -> bool:
    """Whether an operator computes with weights, or is attention."""
    with_state = any(nodes[i].kind == "state" for i in node.inputs)
    return node.opname in _WEIGHTED or (node.opname in _PRODUCTS and with_state)


def attentions(nodes: tuple[Node, ...]) -> dict[int, int]:
    """Attention written out as product, softmax, product: the first product, by the second."""
    users = users_of(nodes)
    found: dict[int, int] = {}
    for node in nodes:
        if node.opname not in ("softmax", "_softmax"):
            continue
        first, second = node, node
        while first.opname not in _PRODUCTS and first.inputs:
            first = nodes[first.inputs[0]]
        while second.opname not in _PRODUCTS and len(users[second.index]) == 1:
            second = nodes[users[second.index][0]]
        if first.opname in _PRODUCTS and second.opname in _PRODUCTS:
            found[second.index] = first.index
    return found


def describe(node: Node, nodes: tuple[Node, ...]) -> str:
    """What an operator with weights does, as in "conv 3×3, 64 → 128, stride 2"."""
    argument = node.args.get("weight")
    shape = nodes[argument.index].shape if isinstance(argument, Ref) else None
    if node.opname == "scaled_dot_product_attention":
        return _attention(node)
    if shape is not None and node.opname.startswith("conv"):
        return _convolution(node, shape)
    if shape is not None and node.opname in ("linear", "embedding"):
        sizes = shape[::-1] if node.opname == "linear" else shape
        return f"{node.opname} {' → '.join(map(str, sizes))}"
    made = node.shape or (node.shapes[0] if node.shapes else ())
    return f"{node.opname.replace('_', ' ')} → {'×'.join(map(str, made[1:]))}"


def _convolution(node: Node, shape: tuple[int, ...]) -> str:
    transposed, groups = "transpose" in node.opname, int(node.args.get("groups", 1))
    inner, outer = (shape[0], shape[1] * groups) if transposed else (shape[1] * groups, shape[0])
    kernel = "×".join(map(str, shape[2:]))
    stride = node.args.get("stride", 1)
    steps = list(stride) if isinstance(stride, list | tuple) else [stride]
    text = f"{'transposed ' * transposed}conv {kernel}, {inner} → {outer}"
    if groups > 1 and groups == inner:
        text = f"depthwise {kernel}, {inner}" + f" → {outer}" * (inner != outer)
    elif groups > 1:
        text += f", {groups} groups"
    if any(s != 1 for s in steps):
        text += f", stride {steps[0] if len(set(steps)) == 1 else '×'.join(map(str, steps))}"
    return text


def _attention(node: Node) -> str:
    heads = node.shape[-3] if node.shape is not None and len(node.shape) > 3 else 1
    return f"attention, {heads} heads" if heads > 1 else "attention"


def _activation(node: Node) -> str:
    if node.opname == "hardtanh" and (node.args.get("min_val"), node.args.get("max_val")) == (0, 6):
        return "relu6"
    return node.opname.strip("_").replace("_", " ")


def _is_pool(node: Node) -> bool:
    return node.opname.removesuffix("_with_indices").rstrip("123d") in _POOLS


def _is_join(node: Node) -> bool:
    return _is_pool(node) or node.opname in _PARTING


def _size(node: Node) -> str:
    """The size of one image's value."""
    return "×".join(map(str, (node.shape or ())[1:]))


def _without_idle_joins(found: list[Element]) -> list[Element]:
    """The elements without joins at which nothing meets or parts, and with their sources renumbered."""
    readers: dict[int, set[int]] = {k: set() for k in range(len(found))}
    for k, element in enumerate(found):
        for source in element.sources:
            readers[source].add(k)
    stands: dict[int, int] = {}
    kept: list[Element] = []
    for k, element in enumerate(found):
        element.sources = list(dict.fromkeys(stands[s] for s in element.sources if s in stands))
        idle = element.kind == "join" and element.text != "pool" and not element.after
        if idle and len(element.sources) == 1 and len(readers[k]) == 1:
            stands[k] = element.sources[0]
            continue
        stands[k] = len(kept)
        kept.append(element)
    return kept
