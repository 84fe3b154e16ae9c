"""How much memory a run needs at its fullest moment."""

from __future__ import annotations

from math import prod

from prunelab.program.nodes import Node
from prunelab.program.program import Program


def working_bytes(program: Program) -> int:
    """Bytes of the values under way at the fullest moment of a run of the uncut network, for one image.

    Every operator's value counts as new memory, an image as it is given and as it is converted, and what a
    convolution reads and makes once more: its kernels may copy both into a layout of their own.
    """
    item = max((program.state(name).element_size() for name in program.state_nodes), default=4)
    live = most = 0
    for node in program.nodes:
        live += _numbers(node)
        inside = (node.index, *node.inputs) if node.opname.startswith("conv") else ()
        most = max(most, live + sum(_numbers(program.nodes[k]) for k in inside))
        live -= sum(_numbers(program.nodes[dead]) for dead in program.last_used[node.index])
    return item * most


def _numbers(node: Node) -> int:
    """How many numbers a node's value holds, for one image."""
    if node.kind == "input":
        return 2 * prod(node.shape or ())
    shapes = node.shapes or ((node.shape,) if node.shape is not None else ())
    return sum(prod(shape) for shape in shapes) if node.kind == "op" else 0
