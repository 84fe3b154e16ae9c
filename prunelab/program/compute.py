"""How ids pass through operators that compute: convolutions, products, norms, pooling, arithmetic."""

from __future__ import annotations

import numpy as np

from prunelab.program.context import Context, Value, unknown
from prunelab.program.ids import Dims, Ids
from prunelab.program.nodes import Node


def same(c: Context) -> Value:
    """Elementwise on one tensor."""
    return c.first()


def along(c: Context) -> Value:
    """Softmax, cumulative sum and the like along a dimension: they cover the survivors alone."""
    return c.first()


def elementwise(c: Context) -> Value:
    """Elementwise on several tensors, broadcasting: what meets must go together."""
    tensors = [
        (dims, shape)
        for i in c.node.inputs
        if isinstance(dims := c.values[i], tuple) and (shape := c.nodes[i].shape) is not None
    ]
    out: list[Ids | None] = [None] * c.rank
    fixed = [False] * c.rank
    for dims, shape in tensors:
        for k in range(1, len(shape) + 1):
            ids = dims[-k]
            if shape[-k] == 1 and c.result[-k] != 1:
                c.ties.pin(ids, f"{c.node.opname} spreads it over other channels")
            elif ids is None:
                fixed[-k] |= shape[-k] > 1
            elif out[-k] is None:
                out[-k] = ids
            else:
                c.tie(out[-k], ids)
    for ids, meets_fixed in zip(out, fixed, strict=True):
        if meets_fixed:
            c.ties.pin(ids, f"{c.node.opname} joins it with a value whose size is fixed")
    return tuple(out)


def convolution(c: Context) -> Value:
    """Input channels tie to weight dimension 1, outputs are weight dimension 0; groups stay of equal size."""
    x, w, b = c.given("input"), c.given("weight"), c.dims("bias")
    groups = int(c.node.args.get("groups", 1))
    channel = 1 if c.rank == len(w) else 0
    if b is not None:
        c.tie(w[0], b[0])
    if groups == 1:
        c.tie(x[channel], w[1])
    else:
        _tie_groups(c, x[channel], w, groups)
    for k, ids in enumerate(x):
        if k != channel:
            c.ties.pin(ids, "it lies along an image dimension of a convolution")
    return tuple(w[0] if k == channel else None for k in range(c.rank))


def _tie_groups(c: Context, x: Ids | None, w: Dims, groups: int) -> None:
    """Remove whole groups, or the same position in every group: whichever leaves the finer choice."""
    size_in, size_out = c.shape("weight")[1], c.shape("weight")[0] // groups
    assert w[0] is not None  # there are at least two groups, hence two outputs
    x_grid = x.reshape(groups, size_in) if x is not None else None
    out_grid = w[0].reshape(groups, size_out)
    if whole_groups(c.node, c.shape("weight")):
        for k in range(1, size_out):
            c.tie(out_grid[:, 0], out_grid[:, k])
        for k in range(size_in):
            c.tie(out_grid[:, 0], x_grid[:, k] if x_grid is not None else None)
        c.ties.pin(w[1], "it is one group's input in a grouped convolution")
        return
    for g in range(groups):
        c.tie(out_grid[0], out_grid[g])
        c.tie(w[1], x_grid[g] if x_grid is not None else None)


def whole_groups(node: Node, weight_shape: tuple[int, ...]) -> bool:
    """Whether a grouped convolution loses whole groups (depthwise among them), not channels in each."""
    groups = int(node.args.get("groups", 1))
    return groups > 1 and groups >= min(weight_shape[1], weight_shape[0] // groups)


def transposed_convolution(c: Context) -> Value:
    """Weight is (in, out/groups, …)."""
    x, w, b = c.given("input"), c.given("weight"), c.dims("bias")
    channel = 1 if c.rank == len(w) else 0
    if int(c.node.args.get("groups", 1)) > 1:
        return unknown(c)
    c.tie(x[channel], w[0])
    if b is not None:
        c.tie(w[1], b[0])
    for k, ids in enumerate(x):
        if k != channel:
            c.ties.pin(ids, "it lies along an image dimension of a convolution")
    return tuple(w[1] if k == channel else None for k in range(c.rank))


def linear(c: Context) -> Value:
    """Last dimension of the input ties to weight dimension 1."""
    x, w, b = c.given("input"), c.given("weight"), c.dims("bias")
    if len(w) != 2:
        return unknown(c)
    c.tie(x[-1], w[1])
    if b is not None:
        c.tie(w[0], b[0])
    return (*x[:-1], w[0])


def matmul(c: Context) -> Value:
    """Batched matrix product: the contracted dimensions tie, leading ones meet elementwise."""
    a, b = (c.given(name) for name in list(c.node.args)[:2])
    if len(a) < 2 or len(b) < 2:
        return unknown(c)
    c.tie(a[-1], b[-2])
    rank = max(len(a), len(b)) - 2
    lead_a = (*([None] * (rank + 2 - len(a))), *a[:-2])
    lead_b = (*([None] * (rank + 2 - len(b))), *b[:-2])
    for p, q in zip(lead_a, lead_b, strict=True):
        c.tie(p, q)
    return (*(q if p is None else p for p, q in zip(lead_a, lead_b, strict=True)), a[-2], b[-1])


def letters(node: Node) -> tuple[list[str], str] | None:
    """What an ``einsum`` names the dimensions of each operand and of its result; None where it leaves some out."""
    operands, arrow, result = str(node.args["equation"]).replace(" ", "").partition("->")
    return None if not arrow or "." in operands else (operands.split(","), result)


def einsum(c: Context) -> Value:
    """A sum of products: dimensions of the same letter go together."""
    named = letters(c.node)
    if named is None or any(len(set(word)) < len(word) for word in named[0]):
        return unknown(c)
    met: dict[str, Ids | None] = {}
    for word, operand in zip(named[0], c.node.args["tensors"], strict=True):
        dims = c.values[operand.index]
        assert isinstance(dims, tuple)
        for letter, ids in zip(word, dims, strict=True):
            c.tie(met.setdefault(letter, ids), ids)
    return tuple(met[letter] for letter in named[1])


def attention(c: Context) -> Value:
    """``scaled_dot_product_attention``: queries and keys share their last dimension, all share the heads."""
    q, k, v = c.given("query"), c.given("key"), c.given("value")
    c.tie(q[-1], k[-1])
    c.tie(k[-2], v[-2])
    for d in range(len(q) - 2):
        c.tie(q[d], k[d])
        c.tie(q[d], v[d])
    c.pin(c.dims("attn_mask"), "it is an attention mask")
    return (*q[:-1], v[-1])


def prelu(c: Context) -> Value:
    """One slope for every channel, or one for all."""
    x, w = c.given("self"), c.given("weight")
    if c.shape("weight") != (1,):
        c.tie(x[1], w[0])
    return x


def norm_over_batch(c: Context) -> Value:
    """BatchNorm and InstanceNorm: every channel has its own statistics, so a channel goes with its slots."""
    x = c.given("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        slots = c.dims(name)
        if slots is not None:
            c.tie(x[1], slots[0])
    return x


def group_norm(c: Context) -> Value:
    """Groups stay, and each keeps the same number of channels; its statistics then cover the survivors."""
    x = c.given("input")
    for name in ("weight", "bias"):
        slots = c.dims(name)
        if slots is not None:
            c.tie(x[1], slots[0])
    groups = int(c.node.args["num_groups"])
    if x[1] is not None and groups > 1:
        grid = x[1].reshape(groups, -1)
        for g in range(1, groups):
            c.tie(grid[0], grid[g])
    return x


def layer_norm(c: Context) -> Value:
    """Statistics cover the surviving channels alone."""
    x = c.given("input")
    count = len(c.node.args["normalized_shape"])
    for name in ("weight", "bias"):
        slots = c.dims(name)
        if slots is not None:
            for k in range(1, count + 1):
                c.tie(x[-k], slots[-k])
    return x


def spatial(c: Context) -> Value:
    """Pooling, resizing, reflecting: channels stay where they are, positions mix."""
    x = c.first()
    # The operator's name ends in the number of its image dimensions: avg_pool2d, upsample_nearest1d.
    count = next(int(character) for character in c.node.opname if character.isdigit())
    c.pin(x[-count:], f"{c.node.opname} mixes it with its neighbours")
    out = (*x[:-count], *([None] * count))
    return [out for _ in c.node.shapes] if c.node.shapes else out


def reduction(c: Context) -> Value:
    """Mean, sum, max over dimensions; what survives a cut is reduced alone."""
    x = c.given("self")
    given = c.node.args.get("dim")
    axes = range(len(x)) if given is None or given == [] else (given if isinstance(given, list) else [given])
    gone = {a % len(x) for a in axes} if x else set()
    if c.node.args.get("keepdim", False):
        return tuple(None if k in gone else ids for k, ids in enumerate(x))
    return tuple(ids for k, ids in enumerate(x) if k not in gone)


def embedding(c: Context) -> Value:
    """Rows are looked up by the user's data, columns are channels."""
    w, index = c.given("weight"), c.given("indices")
    c.ties.pin(w[0], "its entries are chosen by the input data")
    return (*index, w[1])


def pixel_shuffle(c: Context) -> Value:
    """Depth to space: the r·r channels that become one channel's pixels go together."""
    x = c.given("self")
    ids = x[-3]
    if ids is not None:
        grid = ids.reshape(-1, int(c.node.args["upscale_factor"]) ** 2)
        for k in range(1, grid.shape[1]):
            c.tie(grid[:, 0], grid[:, k])
        ids = grid[:, 0]
    c.pin(x[-2:], "pixel_shuffle mixes it with its neighbours")
    return (*x[:-3], ids, None, None)


def channel_shuffle(c: Context) -> Value:
    """The same position of every group goes together, so that groups stay of equal size."""
    x = c.given("self")
    if x[1] is None:
        return x
    grid = x[1].reshape(int(c.node.args["groups"]), -1)
    for g in range(1, len(grid)):
        c.tie(grid[0], grid[g])
    return (x[0], np.ascontiguousarray(grid.T).reshape(-1), *x[2:])
