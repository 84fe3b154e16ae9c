"""How ids pass through operators that move values: reshapes, permutations, joins, parts."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from prunelab.program.context import Context, Value, unknown
from prunelab.program.ids import FIXED, Dims, Ids, merge, split
from prunelab.program.nodes import Node, Ref

Group = tuple[list[int], list[int]]
"""Dimensions before a reshape, and those that it makes of them."""
Power = tuple[int, int]
"""A size for one image, and the power of the batch that it is multiplied by."""


def reshape(c: Context) -> Value:
    """View, flatten, unflatten: dimensions merge and split; ids follow their positions."""
    x, source = c.given("self"), c.source()
    out: list[Ids | None] = [None] * c.rank
    groups = regroup(source, c.node)
    if groups is None:
        return unknown(c)
    for group in groups:
        parts = [group] if _one_each(group) else _around_batch(c, x, *group)
        for before, after in parts if parts is not None else ():
            for k, ids in zip(after, _folded(c, x, before, after), strict=True):
                out[k] = ids
        if parts is None:
            for k in group[0]:
                c.ties.pin(x[k], f"{c.node.opname} folds it into the batch")
    return tuple(out)


def _one_each(group: Group) -> bool:
    return len(group[0]) == len(group[1]) == 1


def _folded(c: Context, x: Dims, before: list[int], after: list[int]) -> list[Ids | None]:
    """Ids of the dimensions that a reshape makes of some others."""
    if _one_each((before, after)):
        return [x[before[0]]]
    reason = f"{c.node.opname} folds it together with another removable dimension"
    ids = merge([(c.shape("self")[k], x[k]) for k in before], c.ties, reason)
    if len(after) == 1:
        return [ids]
    axis = c.axes.get(c.node.index)
    return split(ids, [c.result[k] for k in after], after.index(axis) if axis in after else None, c.ties)


def _around_batch(c: Context, x: Dims, before: list[int], after: list[int]) -> list[Group] | None:
    """The groups on either side of the batch, where it stays one factor between them; None where it does not.

    A dimension that the batch is folded into may have it outermost, as heads have, or innermost; only in the first
    case do ids for one image hold for several, repeated.
    """
    source = c.source()
    batched = [[k for k in dims if node.batched[k]] for dims, node in ((before, source), (after, c.node))]
    if not any(batched):
        return [(before, after)]
    if any(len(dims) != 1 for dims in batched):
        return None
    for outer_before, outer_after in ((True, True), (True, False), (False, True), (False, False)):
        i = before.index(batched[0][0]) + (not outer_before)
        j = after.index(batched[1][0]) + (not outer_after)
        halves = [(before[:i], after[:j]), (before[i:], after[j:])]
        if not outer_before and x[batched[0][0]] is not None:
            continue
        found = [_matched([(c.shape("self")[k], 0) for k in b], [(c.result[k], 0) for k in a], b, a) for b, a in halves]
        if all(part is not None for part in found) and (outer_after or not _carries(x, halves[0][0])):
            return [group for part in found if part is not None for group in part]
    return None


def _carries(x: Dims, dims: list[int]) -> bool:
    return any(x[k] is not None for k in dims)


def regroup(source: Node, result: Node) -> list[Group] | None:
    """Match dimensions before and after a reshape into the smallest groups of equal product.

    None where that cannot be told, as when several images become one.
    """
    a, b = _sizes(source), _sizes(result)
    return _matched(a, b, list(range(len(a))), list(range(len(b))))


def _matched(a: list[Power], b: list[Power], dims_a: list[int], dims_b: list[int]) -> list[Group] | None:
    """Groups of the dimensions ``dims_a`` and ``dims_b``, whose sizes are ``a`` and ``b``."""
    groups: list[Group] = []
    i = j = 0
    while i < len(a) or j < len(b):
        start_a, start_b = i, j
        p, q = (a[i] if i < len(a) else (1, 0)), (b[j] if j < len(b) else (1, 0))
        i, j = min(i + 1, len(a)), min(j + 1, len(b))
        while p != q:
            if i >= len(a) and j >= len(b):
                return None
            if ((p[1], p[0]) < (q[1], q[0]) and i < len(a)) or j >= len(b):
                p = (p[0] * a[i][0], p[1] + a[i][1])
                i += 1
            else:
                q = (q[0] * b[j][0], q[1] + b[j][1])
                j += 1
        groups.append((dims_a[start_a:i], dims_b[start_b:j]))
    return groups


def _sizes(node: Node) -> list[Power]:
    """Size and power of the batch of every dimension: comparable although the batch has no size yet."""
    assert node.shape is not None
    return [(n, int(batched)) for n, batched in zip(node.shape, node.batched, strict=True)]


def unsqueeze(c: Context) -> Value:
    """A dimension of size one comes."""
    x = c.given("self")
    axis = int(c.node.args["dim"]) % c.rank
    return (*x[:axis], None, *x[axis:])


def squeeze(c: Context) -> Value:
    """Dimensions of size one go."""
    x, shape, source = c.given("self"), c.shape("self"), c.source()
    given = c.node.args.get("dim")
    axes = range(len(x)) if given is None else (given if isinstance(given, list) else [given])
    named = {a % len(x) for a in axes} if x else set()
    gone = {k for k in named if shape[k] == 1 and not source.batched[k]}
    for k in named - gone:
        c.ties.pin(x[k], "squeeze would drop its dimension if a single channel were left")
    return tuple(ids for k, ids in enumerate(x) if k not in gone)


def permute(c: Context) -> Value:
    """Permute, transpose, t, swapaxes."""
    x, args = c.given("self"), c.node.args
    order = list(range(len(x)))
    if "dims" in args:
        order = [d % len(x) for d in args["dims"]]
    elif len(args) == 3:
        i, j = (int(args[k]) % len(x) for k in list(args)[1:])
        order[i], order[j] = order[j], order[i]
    elif c.node.opname in ("mT", "mH", "adjoint"):
        order[-2:] = order[-1], order[-2]
    else:
        order.reverse()
    return tuple(x[d] for d in order)


def move_dimension(c: Context) -> Value:
    """``movedim``: some dimensions go to named places, the others keep their order."""
    x = c.given("self")
    source, target = (
        [d % len(x) for d in (given if isinstance(given, list) else [given])]
        for given in (c.node.args["source"], c.node.args["destination"])
    )
    placed = dict(zip(target, source, strict=True))
    rest = iter(k for k in range(len(x)) if k not in source)
    return tuple(x[placed[k] if k in placed else next(rest)] for k in range(len(x)))


def flip(c: Context) -> Value:
    """Reversed along some dimensions, ids too."""
    x = c.given("self")
    turned = {d % len(x) for d in c.node.args["dims"]}
    return tuple(ids[::-1] if ids is not None and k in turned else ids for k, ids in enumerate(x))


def roll(c: Context) -> Value:
    """Rolled by a number in the user's code, which a cut would have to change."""
    x = c.given("self")
    axes = {d % len(x) for d in c.node.args["dims"]} or set(range(len(x)))
    for k in axes:
        c.ties.pin(x[k], "your code rolls its channels by a fixed number")
    return x


def expand(c: Context) -> Value:
    """Broadcast to a larger shape: one in the user's code, or that of another value, whose ids it gets."""
    x, shape = c.given("self"), c.shape("self")
    lead = c.rank - len(x)
    out = list(c.dims("other") or [None] * c.rank)
    for k, ids in enumerate(x, start=lead):
        if c.result[k] != shape[k - lead]:
            c.ties.pin(ids, f"{c.node.opname} spreads it over other channels")
        elif out[k] is None:
            out[k] = ids
        else:
            c.tie(out[k], ids)
    return tuple(out)


def cat(c: Context) -> Value:
    """Concatenation: ids follow along the dimension, and meet elementwise in all others."""
    return _concatenation(c, int(c.node.args.get("dim", 0)) % c.rank)


def named_stack(c: Context) -> Value:
    """``vstack``, ``hstack`` and ``dstack``: concatenation along the first, second or third dimension."""
    axis = ("vstack", "hstack", "dstack").index(c.node.opname)
    ranks = [len(c.nodes[r.index].shape or ()) for r in c.node.args["tensors"]]
    return _concatenation(c, axis) if min(ranks) > max(axis, 1) else unknown(c)


def _concatenation(c: Context, axis: int) -> Value:
    parts = [
        (dims, shape)
        for r in c.node.args["tensors"]
        if isinstance(r, Ref)
        and isinstance(dims := c.values[r.index], tuple)
        and (shape := c.nodes[r.index].shape) is not None
        and len(shape) == c.rank  # an empty tensor of one dimension may stand among the parts
    ]
    out: list[Ids | None] = []
    for k in range(c.rank):
        if k == axis:
            out.append(_joined([(dims[k], shape[k]) for dims, shape in parts]))
            continue
        for dims, _ in parts[1:]:
            c.tie(parts[0][0][k], dims[k])
        out.append(parts[0][0][k])
    return tuple(out)


def _joined(pieces: list[tuple[Ids | None, int]]) -> Ids | None:
    joined = np.concatenate([np.full(n, FIXED, np.int64) if ids is None else ids for ids, n in pieces])
    return joined if (joined != FIXED).any() else None


def stack(c: Context) -> Value:
    """A new dimension; all others meet elementwise."""
    parts = [c.values[r.index] for r in c.node.args["tensors"] if isinstance(r, Ref)]
    dims = [p for p in parts if isinstance(p, tuple)]
    for k, ids in enumerate(dims[0]):
        for other in dims[1:]:
            c.tie(ids, other[k])
    axis = int(c.node.args.get("dim", 0)) % c.rank
    return (*dims[0][:axis], None, *dims[0][axis:])


def chunk(c: Context) -> Value:
    """Chunk and split. Equal parts stay equal, since that is what the user's code asks for."""
    x, axis = c.given("self"), c.axis()
    ids = x[axis]
    if ids is None:
        return [x for _ in c.node.shapes]
    sizes = [shape[axis] for shape in c.node.shapes]
    pieces = [ids[a:b] for a, b in pairwise(np.cumsum([0, *sizes]).tolist())]
    if len(set(sizes)) == 1 and "indices" not in c.node.args:
        for piece in pieces[1:]:
            c.tie(pieces[0], piece)
    else:
        c.ties.pin(ids, "your code splits it into parts of unequal, fixed sizes")
    return [tuple(piece if k == axis else v for k, v in enumerate(x)) for piece in pieces]


def unbind(c: Context) -> Value:
    """Every position of one dimension by itself."""
    x, axis = c.given("self"), c.axis()
    c.ties.pin(x[axis], "your code picks it out by its number")
    return [tuple(ids for k, ids in enumerate(x) if k != axis) for _ in c.node.shapes]


def getitem(c: Context) -> Value:
    """One part of a list of tensors."""
    source = c.values[c.node.args["0"].index]
    return source[int(c.node.args["1"])] if isinstance(source, list) else unknown(c)


def take_slice(c: Context) -> Value:
    """``x[a:b:step]`` along one dimension."""
    x, axis = c.given("self"), c.axis()
    ids = x[axis]
    if ids is None:
        return x
    start, end, step = (c.node.args.get(k) for k in ("start", "end", "step"))
    if not all(v is None or isinstance(v, int) for v in (start, end, step)):
        return unknown(c)
    if step not in (None, 1):
        c.ties.pin(ids, "your code takes every n-th of its channels")
    return tuple(ids[slice(start, end, step)] if k == axis else v for k, v in enumerate(x))


def narrow(c: Context) -> Value:
    """``x.narrow(dim, start, length)``: a slice."""
    x, axis, (start, length) = c.given("self"), c.axis(), (c.node.args[k] for k in ("start", "length"))
    ids = x[axis]
    if ids is None:
        return x
    if not (isinstance(start, int) and isinstance(length, int)):
        return unknown(c)
    start %= len(ids)
    return tuple(ids[start : start + length] if k == axis else other for k, other in enumerate(x))


def index_select(c: Context) -> Value:
    """Positions of one dimension, picked out by their numbers."""
    x, axis = c.given("self"), c.axis()
    c.ties.pin(x[axis], "your code picks it out by its number")
    c.pin(c.dims("index"), "it says which positions your code picks out")
    return tuple(None if k == axis else ids for k, ids in enumerate(x))


def gather(c: Context) -> Value:
    """Positions of one dimension, picked out by other numbers for every place."""
    x, index, axis = c.given("self"), c.given("index"), c.axis()
    c.ties.pin(x[axis], "your code picks it out by its number")
    for k, (a, b) in enumerate(zip(x, index, strict=True)):
        if k != axis:
            c.tie(a, b)
    return tuple(ids if k != axis else index[k] for k, ids in enumerate(x))


def repeat(c: Context) -> Value:
    """``repeat`` and ``tile``: what stands there several times goes together."""
    x = c.given("self")
    times = c.node.args.get("repeats", c.node.args.get("dims"))
    lead = (None,) * (c.rank - len(x))
    given = [*([1] * (c.rank - len(times))), *times][len(lead) :]
    if any(ids is not None and not isinstance(n, int) for ids, n in zip(x, given, strict=True)):
        return unknown(c)
    return (*lead, *(np.tile(ids, n) if ids is not None else None for ids, n in zip(x, given, strict=True)))


def repeat_interleave(c: Context) -> Value:
    """Every position of one dimension several times in a row."""
    x, times, dim = c.given("self"), c.node.args["repeats"], c.node.args.get("dim")
    if not isinstance(times, int) or dim is None:
        return unknown(c)
    axis = c.axis()
    return tuple(np.repeat(ids, times) if ids is not None and k == axis else ids for k, ids in enumerate(x))


def select(c: Context) -> Value:
    """``x[:, 3]``: one position of one dimension."""
    x, axis = c.given("self"), c.axis()
    c.ties.pin(x[axis], "your code picks it out by its number")
    return tuple(ids for k, ids in enumerate(x) if k != axis)


def index(c: Context) -> Value:
    """``x[table]``, ``x[:, table]``: dimensions that are looked up in are fixed, the others go along."""
    x, tables = c.given("self"), c.node.args["indices"]
    at = [k for k, table in enumerate(tables) if table is not None]
    looked_up = [c.values[tables[k].index] for k in at]
    if at != list(range(at[0], at[-1] + 1)) or any(c.nodes[tables[k].index].shape is None for k in at):
        return unknown(c)
    for dims in looked_up:
        c.pin(dims if isinstance(dims, tuple) else None, "your code uses it to look up by number")
    for k in at:
        c.ties.pin(x[k], "your code picks it out by its number")
    new = c.rank - (len(x) - len(at))
    return (*x[: at[0]], *([None] * new), *x[at[-1] + 1 :])


def constant_pad(c: Context) -> Value:
    """Padding adds positions that belong to nothing; along channels they are fixed in the user's code."""
    out = list(c.given("self"))
    pad = c.node.args["pad"]
    if not all(isinstance(n, int) for n in pad):
        return unknown(c)
    if c.node.args.get("mode", "constant") != "constant":
        count = len(pad) // 2
        c.pin(tuple(out[-count:]), f"{c.node.opname} mixes it with its neighbours")
        return (*out[:-count], *([None] * count))
    for k in range(len(pad) // 2):
        before, after = pad[2 * k], pad[2 * k + 1]
        ids = out[-1 - k]
        if ids is None or not (before or after):
            continue
        if before < 0 or after < 0:
            return unknown(c)
        out[-1 - k] = np.pad(ids, (before, after), constant_values=FIXED)
    return tuple(out)


def creation(c: Context) -> Value:
    """``zeros_like(x)`` has the channels of x, ``zeros(…)`` has none."""
    return c.given("self") if c.node.opname.endswith("_like") else (None,) * c.rank
