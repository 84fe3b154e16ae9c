"""How ids pass through operators that compute: convolutions, products, norms, pooling, arithmetic."""

from __future__ import annotations

import numpy as np

from prunelab.program.context import Context, Value, unknown
from prunelab.program.ids import Dims, Ids
from prunelab.program.nodes import Node, Ref


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
    """Weight is (in, out/groups, …): inputs tie to its dimension 0, every group's outputs are dimension 1."""
    x, w, b = c.given("input"), c.given("weight"), c.dims("bias")
    channel = 1 if c.rank == len(w) else 0
    groups = int(c.node.args.get("groups", 1))
    c.tie(x[channel], w[0])
    out = w[1]
    if groups > 1:
        assert w[0] is not None  # there are at least two groups, hence two inputs
        grid, each = w[0].reshape(groups, -1), c.shape("weight")[1]
        if whole_groups(c.node, c.shape("weight")):
            for k in range(1, grid.shape[1]):
                c.tie(grid[:, 0], grid[:, k])
            c.ties.pin(w[1], "it is one group's output in a grouped convolution")
            out = np.repeat(grid[:, 0], each)
        else:
            for g in range(1, groups):
                c.tie(grid[0], grid[g])
            out = np.tile(w[1], groups) if w[1] is not None else None
    if b is not None:
        c.tie(out, b[0])
    for k, ids in enumerate(x):
        if k != channel:
            c.ties.pin(ids, "it lies along an image dimension of a convolution")
    return tuple(out if k == channel else None for k in range(c.rank))


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


def product_and_sum(c: Context) -> Value:
    """``addmm``: a matrix product, and a bias for every column."""
    a, b, bias = c.given("mat1"), c.given("mat2"), c.given("self")
    if not bias or c.shape("self")[-1] != c.result[-1] or any(ids is not None for ids in bias[:-1]):
        return unknown(c)
    c.tie(a[-1], b[-2])
    c.tie(b[-1], bias[-1])
    return (a[-2], b[-1])


def einsum_letters(node: Node) -> tuple[list[str], str] | None:
    """The letters of every operand and of the result; None for what is not one letter for one dimension."""
    given, arrow, result = node.args["equation"].replace(" ", "").partition("->")
    letters = given.split(",")
    if not arrow:
        result = "".join(sorted(x for x in set(given) - {","} if given.count(x) == 1))
    plain = "." not in given and all(len(set(own)) == len(own) for own in letters)
    return (letters, result) if plain and len(letters) == len(node.args["tensors"]) else None


def einsum(c: Context) -> Value:
    """Dimensions with the same letter go together; those summed over cover the survivors alone."""
    found = einsum_letters(c.node)
    operands = [(c.values[r.index], c.nodes[r.index].shape) for r in c.node.args["tensors"]]
    if found is None or len(operands) != 2:
        return unknown(c)
    letters, result = found
    ids_of: dict[str, Ids | None] = {}
    length: dict[str, int] = {}
    for own, (dims, shape) in zip(letters, operands, strict=True):
        assert isinstance(dims, tuple) and shape is not None
        for letter, ids, size in zip(own, dims, shape, strict=True):
            if letter in length and length[letter] != size:
                c.ties.pin(ids, "einsum spreads it over other channels")
                c.ties.pin(ids_of[letter], "einsum spreads it over other channels")
                ids = None
            elif letter in length:
                c.tie(ids_of[letter], ids)
            ids_of[letter] = ids if ids_of.get(letter) is None else ids_of[letter]
            length[letter] = max(size, length.get(letter, 1))
    return tuple(ids_of[letter] for letter in result)


def einsum_weights(node: Node) -> list[tuple[int, int]]:
    """Operands of an einsum, each with a dimension that only it has and that the result keeps."""
    letters, result = einsum_letters(node) or ([], "")
    return [
        (ref.index, own.index(letter))
        for ref, own in zip(node.args["tensors"], letters, strict=False)
        for letter in own
        if letter in result and sum(letter in other for other in letters) == 1
    ]


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


def gate_of_halves(c: Context) -> Value:
    """``glu``: the first half times the sigmoid of the second, so that both lose the same channels."""
    x, axis = c.given("self"), c.axis()
    ids = x[axis]
    if ids is not None:
        c.tie(ids[: len(ids) // 2], ids[len(ids) // 2 :])
        ids = ids[: len(ids) // 2]
    return tuple(ids if k == axis else other for k, other in enumerate(x))


def weight_norm(c: Context) -> Value:
    """Weight norm: a direction, scaled to a length for every position of one dimension."""
    v, g, axis = c.given("v"), c.given("g"), int(c.node.args["dim"])
    if c.shape("g") != tuple(n if k == axis else 1 for k, n in enumerate(c.result)):
        return unknown(c)
    c.tie(v[axis], g[axis])
    return v


RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def recurrent(c: Context) -> Value:
    """LSTM, GRU and plain recurrence, whole or one step."""
    for i in c.node.inputs:
        value = c.values[i]
        c.pin(value if isinstance(value, tuple) else None, f"its channels are joined by the gates of {c.node.opname}")
    return unknown(c)


def norm_over_batch(c: Context) -> Value:
    """BatchNorm and InstanceNorm: every channel has its own statistics, so a channel goes with its slots."""
    x = c.given("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        slots = c.dims(name)
        if slots is not None:
            c.tie(x[1], slots[0])
    return x


def group_norm(c: Context) -> Value:
    """Groups stay, and each keeps the same number of channels; its statistics then cover the survivors.

    Where every channel is a group, groups go.
    """
    x = c.given("input")
    for name in ("weight", "bias"):
        slots = c.dims(name)
        if slots is not None:
            c.tie(x[1], slots[0])
    groups = int(c.node.args["num_groups"])
    if x[1] is not None and 1 < groups < len(x[1]):
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


def unpooling(c: Context) -> Value:
    """``max_unpool``: values go back to where their maximum was, channel by channel."""
    x, places = c.given("self"), c.given("indices")
    for a, b in zip(x, places, strict=True):
        c.tie(a, b)
    return spatial(c)


def fourier(c: Context) -> Value:
    """Discrete Fourier transforms mix what lies along their own dimensions only."""
    x = c.given("self")
    given = c.node.args.get("dim")
    axes = range(len(x)) if given is None else (given if isinstance(given, list) else [given])
    mixed = {a % len(x) for a in axes}
    for k in mixed:
        c.ties.pin(x[k], f"{c.node.opname} mixes it with its neighbours")
    return tuple(None if k in mixed else ids for k, ids in enumerate(x))


def sampling(c: Context) -> Value:
    """``grid_sample``: the same places of every channel, wherever they are."""
    x = c.given("input")
    c.pin(x[2:], "grid_sample mixes it with its neighbours")
    c.pin(c.dims("grid"), "it says where grid_sample looks")
    return (None, x[1], *([None] * (c.rank - 2)))


def reduction(c: Context) -> Value:
    """Mean, sum, max over dimensions; what survives a cut is reduced alone."""
    x = c.given("self")
    given = c.node.args.get("dim")
    axes = range(len(x)) if given is None or given == [] else (given if isinstance(given, list) else [given])
    gone = {a % len(x) for a in axes} if x else set()
    out = tuple(None if k in gone else ids for k, ids in enumerate(x))
    if not c.node.args.get("keepdim", False):
        out = tuple(ids for k, ids in enumerate(out) if k not in gone)
    return [out for _ in c.node.shapes] if c.node.shapes else out


def extreme(c: Context) -> Value:
    """``max`` and ``min``: of two tensors, of all values, or along a dimension with the places where they are."""
    if "other" in c.node.args:
        return elementwise(c)
    asked = any(n.opname == "getitem" and n.args["0"] == Ref(c.node.index) and n.args["1"] == 1 for n in c.nodes)
    return numbered(c) if asked else reduction(c)


def numbered(c: Context) -> Value:
    """Sorting and the like: what lies along the dimension is known by its number, which a cut would change."""
    x = c.given("self")
    given = c.node.args.get("dim")
    axes = set(range(len(x))) if given is None else {int(given) % len(x)}
    for k in axes:
        c.ties.pin(x[k], f"{c.node.opname} orders or numbers it among the others")
    rank = len(c.node.shapes[0] if c.node.shapes else c.result)
    out = tuple(None if k in axes else ids for k, ids in enumerate(x) if rank == len(x) or k not in axes)
    return [out for _ in c.node.shapes] if c.node.shapes else out


def similarity(c: Context) -> Value:
    """``cosine_similarity``: what survives along the dimension is compared alone."""
    a, b = c.given("x1"), c.given("x2")
    if c.shape("x1") != c.shape("x2"):
        return unknown(c)
    for p, q in zip(a, b, strict=True):
        c.tie(p, q)
    axis = c.axis(of="x1")
    return tuple(p if p is not None else q for k, (p, q) in enumerate(zip(a, b, strict=True)) if k != axis)


def embedding(c: Context) -> Value:
    """Rows are looked up by the user's data, columns are channels."""
    w, index = c.given("weight"), c.given("indices")
    c.ties.pin(w[0], "its entries are chosen by the input data")
    return (*index, w[1])


def bags(c: Context) -> Value:
    """``embedding_bag``: rows are looked up and joined, columns are channels."""
    w = c.given("weight")
    c.ties.pin(w[0], "its entries are chosen by the input data")
    c.pin(c.dims("per_sample_weights"), "it weighs entries that the input data choose")
    return [(*([None] * (len(shape) - 1)), w[1] if len(shape) == 2 else None) for shape in c.node.shapes]


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


def pixel_unshuffle(c: Context) -> Value:
    """Space to depth: the pixels of one channel become r·r channels, which go together."""
    x, by = c.given("self"), int(c.node.args["downscale_factor"]) ** 2
    c.pin(x[-2:], "pixel_unshuffle mixes it with its neighbours")
    return (*x[:-3], np.repeat(x[-3], by) if x[-3] is not None else None, None, None)


def unfolding(c: Context) -> Value:
    """``unfold`` of an image: the places under a kernel become channels, which go together."""
    x, (height, width) = c.given("self"), c.node.args["kernel_size"]
    c.pin(x[-2:], "unfold mixes it with its neighbours")
    return (*x[:-3], np.repeat(x[-3], height * width) if x[-3] is not None else None, None)


def channel_shuffle(c: Context) -> Value:
    """The same position of every group goes together, so that groups stay of equal size."""
    x = c.given("self")
    if x[1] is None:
        return x
    grid = x[1].reshape(int(c.node.args["groups"]), -1)
    for g in range(1, len(grid)):
        c.tie(grid[0], grid[g])
    return (x[0], np.ascontiguousarray(grid.T).reshape(-1), *x[2:])
