"""What every operator says about channels: how ids pass through it, and what it ties or pins.

One short function per family of operators, in one table. An operator that is not in the table pins whatever enters it:
what is not understood is never pruned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from prunelab.program.ids import FIXED, Dims, Ids, Ties, merge, split
from prunelab.program.nodes import Node, Ref

Value = Dims | list[Dims] | None


@dataclass
class Context:
    """What a rule sees of one node: its arguments' ids and shapes, and the ties to write into."""

    node: Node
    nodes: tuple[Node, ...]
    values: list[Value]
    ties: Ties
    axes: dict[int, int]

    def dims(self, name: str) -> Dims | None:
        """Ids of the tensor argument ``name``; None if it is absent or a number."""
        argument = self.node.args.get(name)
        value = self.values[argument.index] if isinstance(argument, Ref) else None
        return value if isinstance(value, tuple) else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape (for a batch of one) of the tensor argument ``name``."""
        argument = self.node.args[name]
        shape = self.nodes[argument.index].shape
        assert shape is not None
        return shape

    def tie(self, a: Ids | None, b: Ids | None) -> None:
        """Tie, with a reason that names this operator."""
        self.ties.tie(a, b, f"{self.node.opname} joins it with channels that cannot be removed")

    def pin(self, dims: Dims | None, reason: str) -> None:
        for ids in dims or ():
            self.ties.pin(ids, reason)

    @property
    def rank(self) -> int:
        """Number of dimensions of the node's value."""
        assert self.node.shape is not None
        return len(self.node.shape)

    def axis(self, name: str = "dim", of: str = "self") -> int:
        """A dimension argument counted from the front."""
        axis = int(self.node.args[name])
        return axis % len(self.shape(of)) if axis < 0 else axis


Rule = Callable[[Context], Value]


def same(c: Context) -> Value:
    """Elementwise on one tensor."""
    return c.dims(next(iter(c.node.args)))


def elementwise(c: Context) -> Value:
    """Elementwise on several tensors, broadcasting: what meets must go together."""
    tensors = [
        (c.values[i], c.nodes[i].shape)
        for i in c.node.inputs
        if isinstance(c.values[i], tuple) and c.nodes[i].shape is not None
    ]
    out: list[Ids | None] = [None] * c.rank
    size = [1] * c.rank
    fixed_size = [0] * c.rank
    for dims, shape in tensors:
        assert isinstance(dims, tuple) and shape is not None
        for k in range(1, len(shape) + 1):
            if shape[-k] == 1 and c.node.shape is not None and c.node.shape[-k] != 1:
                continue  # broadcast along this dimension
            ids = dims[-k]
            if ids is None:
                fixed_size[-k] = max(fixed_size[-k], shape[-k])
            elif out[-k] is None:
                out[-k] = ids
            else:
                c.tie(out[-k], ids)
            size[-k] = max(size[-k], shape[-k])
    for k, fixed in enumerate(fixed_size):
        if fixed > 1 and out[k] is not None:
            c.ties.pin(out[k], f"{c.node.opname} joins it with a value whose size is fixed")
    return tuple(out)


def convolution(c: Context) -> Value:
    """Input channels tie to weight dimension 1, outputs are weight dimension 0; groups stay of equal size."""
    x, w, b = c.dims("input"), c.dims("weight"), c.dims("bias")
    assert x is not None and w is not None
    groups = int(c.node.args.get("groups", 1))
    channel = 1 if c.rank == len(c.shape("weight")) else 0
    out = w[0]
    if b is not None:
        c.tie(out, b[0])
    if groups == 1:
        c.tie(x[channel], w[1])
    else:
        out = _groups(c, x[channel], w, groups)
    for k, ids in enumerate(x):
        if k != channel:
            c.ties.pin(ids, "it lies along an image dimension of a convolution")
    return tuple(out if k == channel else None for k in range(c.rank))


def _groups(c: Context, x: Ids | None, w: Dims, groups: int) -> Ids | None:
    """Remove whole groups, or the same position in every group: whichever leaves the finer choice."""
    size_in, size_out = c.shape("weight")[1], c.shape("weight")[0] // groups
    out = w[0]
    if out is None:
        c.ties.pin(x, "a grouped convolution with a single output")
        return out
    x_grid = x.reshape(groups, size_in) if x is not None else None
    out_grid = out.reshape(groups, size_out)
    if whole_groups(c.node, c.shape("weight")):
        lead = out_grid[:, 0].copy()
        for k in range(1, size_out):
            c.tie(lead, out_grid[:, k].copy())
        for k in range(size_in):
            c.tie(lead, x_grid[:, k].copy() if x_grid is not None else None)
        c.ties.pin(w[1], "it is one group's input in a grouped convolution")
    else:
        for g in range(groups):
            c.tie(out_grid[0].copy(), out_grid[g].copy())
            c.tie(w[1], x_grid[g].copy() if x_grid is not None else None)
    return out


def whole_groups(node: Node, weight_shape: tuple[int, ...]) -> bool:
    """Whether a grouped convolution loses whole groups (depthwise among them) rather than channels inside each."""
    groups = int(node.args.get("groups", 1))
    return groups > 1 and groups >= min(weight_shape[1], weight_shape[0] // groups)


def transposed_convolution(c: Context) -> Value:
    """Weight is (in, out/groups, ...)."""
    x, w, b = c.dims("input"), c.dims("weight"), c.dims("bias")
    assert x is not None and w is not None
    if int(c.node.args.get("groups", 1)) > 1:
        return unknown(c)
    c.tie(x[1], w[0])
    if b is not None:
        c.tie(w[1], b[0])
    return tuple(w[1] if k == 1 else None for k in range(c.rank))


def linear(c: Context) -> Value:
    """Last dimension of the input ties to weight dimension 1."""
    x, w, b = c.dims("input"), c.dims("weight"), c.dims("bias")
    assert x is not None and w is not None
    c.tie(x[-1], w[1])
    if b is not None:
        c.tie(w[0], b[0])
    return (*x[:-1], w[0])


def matmul(c: Context) -> Value:
    """Batched matrix product: the contracted dimensions tie, leading ones meet elementwise."""
    names = list(c.node.args)
    a, b = c.dims(names[0]), c.dims(names[1])
    assert a is not None and b is not None
    if len(a) < 2 or len(b) < 2:
        return unknown(c)
    c.tie(a[-1], b[-2])
    lead_a, lead_b = a[:-2], b[:-2]
    rank = max(len(lead_a), len(lead_b))
    lead: list[Ids | None] = []
    for k in range(rank):
        p = lead_a[k - rank + len(lead_a)] if k - rank + len(lead_a) >= 0 else None
        q = lead_b[k - rank + len(lead_b)] if k - rank + len(lead_b) >= 0 else None
        if p is not None or q is not None:
            c.tie(p, q)
        lead.append(p if p is not None else q)
    return (*lead, a[-2], b[-1])


def attention(c: Context) -> Value:
    """``scaled_dot_product_attention``: queries and keys share their last dimension, all share the heads."""
    q, k, v = c.dims("query"), c.dims("key"), c.dims("value")
    assert q is not None and k is not None and v is not None
    c.tie(q[-1], k[-1])
    for d in range(len(q) - 2):
        if q[d] is not None or k[d] is not None or v[d] is not None:
            c.tie(q[d], k[d])
            c.tie(q[d], v[d])
    if c.node.args.get("attn_mask") is not None:
        c.pin(c.dims("attn_mask"), "it is an attention mask")
    return (*q[:-1], v[-1])


def prelu(c: Context) -> Value:
    """One slope for every channel, or one for all."""
    x, w = c.dims("self"), c.dims("weight")
    assert x is not None and w is not None
    if c.shape("weight") != (1,):
        c.tie(x[1], w[0])
    return x


def norm_over_batch(c: Context) -> Value:
    """BatchNorm and InstanceNorm: every channel has its own statistics, so a channel can go with its slots."""
    x = c.dims("input")
    assert x is not None
    for name in ("weight", "bias", "running_mean", "running_var"):
        slots = c.dims(name)
        if slots is not None:
            c.tie(x[1], slots[0])
    return x


def group_norm(c: Context) -> Value:
    """Groups stay, and each keeps the same number of channels; its statistics then cover the survivors."""
    x = c.dims("input")
    assert x is not None
    for name in ("weight", "bias"):
        slots = c.dims(name)
        if slots is not None:
            c.tie(x[1], slots[0])
    groups = int(c.node.args["num_groups"])
    if x[1] is not None and groups > 1:
        grid = x[1].reshape(groups, -1)
        for g in range(1, groups):
            c.tie(grid[0].copy(), grid[g].copy())
    return x


def layer_norm(c: Context) -> Value:
    """Statistics cover the surviving channels alone."""
    x = c.dims("input")
    assert x is not None
    count = len(c.node.args["normalized_shape"])
    for name in ("weight", "bias"):
        slots = c.dims(name)
        if slots is not None:
            for k in range(1, count + 1):
                c.tie(x[-k], slots[-k])
    return x


def spatial(c: Context) -> Value:
    """Pooling and resizing: channels stay where they are, positions mix."""
    x = c.dims(next(iter(c.node.args)))
    assert x is not None
    for ids in x[2:]:
        c.ties.pin(ids, f"{c.node.opname} mixes it with its neighbours")
    out = tuple([*x[:2], *([None] * (c.rank - 2))]) if c.node.shape is not None else x
    return [out for _ in c.node.shapes] if c.node.shapes else out


def reduction(c: Context) -> Value:
    """Mean, sum, max over dimensions; what survives a cut is reduced alone."""
    x = c.dims("self")
    assert x is not None
    given = c.node.args.get("dim")
    axes = range(len(x)) if given is None or given == [] else (given if isinstance(given, list) else [given])
    gone = {a % len(x) for a in axes}
    if c.node.args.get("keepdim", False):
        out = tuple(None if k in gone else ids for k, ids in enumerate(x))
    else:
        out = tuple(ids for k, ids in enumerate(x) if k not in gone)
    return [out for _ in c.node.shapes] if c.node.shapes else out


def along(c: Context) -> Value:
    """Softmax, flip, roll and the like along a dimension: nothing moves between channels that a cut would change."""
    return c.dims("self")


def reshape(c: Context) -> Value:
    """View, flatten, unflatten: dimensions merge and split; ids follow their positions."""
    x = c.dims("self")
    assert x is not None and c.node.shape is not None
    source = c.nodes[c.node.args["self"].index]
    assert source.shape is not None
    out: list[Ids | None] = []
    reason = f"{c.node.opname} folds it together with another removable dimension"
    for before, after in regroup(source, c.node):
        sizes = [c.node.shape[k] for k in after]
        if len(before) == 1 and len(after) == 1:
            out.append(x[before[0]])
            continue
        if any(source.batched[k] for k in before) and len(before) > 1:
            # Merging with the batch keeps ids only where the batch stays apart again; not followed.
            for k in before:
                c.ties.pin(x[k], f"{c.node.opname} folds it into the batch")
            out += [None] * len(after)
            continue
        ids = merge([(source.shape[k], x[k]) for k in before], c.ties, reason)
        out += split(ids, sizes, c.axes.get(c.node.index), c.ties) if len(after) != 1 else [ids]
    return tuple(out)


def regroup(source: Node, result: Node) -> list[tuple[list[int], list[int]]]:
    """Match dimensions before and after a reshape into the smallest groups of equal product."""
    a, b = _sizes(source), _sizes(result)
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(a) or j < len(b):
        before, after = ([i] if i < len(a) else []), ([j] if j < len(b) else [])
        p, q = (a[i] if before else (1, 0)), (b[j] if after else (1, 0))
        i, j = i + len(before), j + len(after)
        while p != q:
            if (p[1], p[0]) < (q[1], q[0]) and i < len(a):
                p = (p[0] * a[i][0], p[1] + a[i][1])
                before.append(i)
                i += 1
            elif j < len(b):
                q = (q[0] * b[j][0], q[1] + b[j][1])
                after.append(j)
                j += 1
            else:
                p = (p[0] * a[i][0], p[1] + a[i][1])
                before.append(i)
                i += 1
        groups.append((before, after))
    return groups


def _sizes(node: Node) -> list[tuple[int, int]]:
    """Size and power of the batch of every dimension: comparable although the batch has no size yet."""
    assert node.shape is not None
    return [(n, int(batched)) for n, batched in zip(node.shape, node.batched, strict=True)]


def squeeze(c: Context) -> Value:
    """Squeeze and unsqueeze: dimensions of size one come and go."""
    x = c.dims("self")
    assert x is not None and c.node.shape is not None
    shape = c.shape("self")
    if len(c.node.shape) > len(x):
        axis = int(c.node.args["dim"]) % c.rank
        return (*x[:axis], None, *x[axis:])
    given = c.node.args.get("dim")
    axes = range(len(x)) if given is None else (given if isinstance(given, list) else [given])
    source = c.nodes[c.node.args["self"].index]
    gone = {a % len(x) for a in axes if shape[a] == 1 and not source.batched[a % len(x)]}
    return tuple(ids for k, ids in enumerate(x) if k not in gone)


def permute(c: Context) -> Value:
    """Permute, transpose, t."""
    x = c.dims("self")
    assert x is not None
    order = list(range(len(x)))
    if "dims" in c.node.args:
        order = [d % len(x) for d in c.node.args["dims"]]
    elif "dim0" in c.node.args:
        i, j = (int(c.node.args[k]) % len(x) for k in ("dim0", "dim1"))
        order[i], order[j] = order[j], order[i]
    else:
        order.reverse()
    return tuple(x[d] for d in order)


def expand(c: Context) -> Value:
    """Broadcast to a larger shape."""
    x = c.dims("self")
    assert x is not None
    shape = c.shape("self")
    lead = c.rank - len(x)
    assert c.node.shape is not None
    kept = [ids if c.node.shape[lead + k] == shape[k] else None for k, ids in enumerate(x)]
    return (*([None] * lead), *kept)


def cat(c: Context) -> Value:
    """Concatenation: ids follow along the dimension, and meet elementwise in all others."""
    refs = [r for r in c.node.args["tensors"] if isinstance(r, Ref)]
    parts = [c.values[r.index] for r in refs]
    axis = int(c.node.args.get("dim", 0)) % c.rank
    out: list[Ids | None] = []
    for k in range(c.rank):
        column = [p[k] for p in parts if isinstance(p, tuple)]
        if k == axis:
            shapes = [c.nodes[r.index].shape for r in refs]
            pieces = [
                ids if ids is not None else np.full(shape[k], FIXED, np.int64)
                for ids, shape in zip(column, shapes, strict=True)
                if shape is not None
            ]
            joined = np.concatenate(pieces)
            out.append(joined if (joined != FIXED).any() else None)
        else:
            for ids in column[1:]:
                if ids is not None or column[0] is not None:
                    c.tie(column[0], ids)
            out.append(column[0])
    return tuple(out)


def chunk(c: Context) -> Value:
    """Chunk, split, unbind: parts of the ids. Equal parts stay equal, since that is what the user's code asks for."""
    x = c.dims("self")
    assert x is not None
    axis = int(c.node.args.get("dim", 0)) % len(x)
    ids = x[axis]
    sizes = [shape[axis] for shape in c.node.shapes]
    edges = np.cumsum([0, *sizes])
    pieces = [None if ids is None else ids[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    if len(set(sizes)) == 1:
        for piece in pieces[1:]:
            if piece is not None and pieces[0] is not None:
                c.tie(pieces[0], piece)
    else:
        c.ties.pin(ids, "your code splits it into parts of unequal, fixed sizes")
    return [tuple(piece if k == axis else v for k, v in enumerate(x)) for piece in pieces]


def getitem(c: Context) -> Value:
    """One part of a list of tensors."""
    source = c.values[c.node.args["0"].index]
    return source[int(c.node.args["1"])] if isinstance(source, list) else None


def take_slice(c: Context) -> Value:
    """``x[a:b:step]`` along one dimension."""
    x = c.dims("self")
    assert x is not None
    axis = int(c.node.args.get("dim", 0)) % len(x)
    ids = x[axis]
    if ids is None:
        return x
    start, end, step = (c.node.args.get(k) for k in ("start", "end", "step"))
    if not all(v is None or isinstance(v, int) for v in (start, end, step)):
        return unknown(c)
    if step not in (None, 1):
        c.ties.pin(ids, "your code takes every n-th of its channels")
    return tuple(ids[slice(start, end, step)] if k == axis else v for k, v in enumerate(x))


def select(c: Context) -> Value:
    """``x[:, 3]``: one position of one dimension."""
    x = c.dims("self")
    assert x is not None
    axis = int(c.node.args["dim"]) % len(x)
    c.ties.pin(x[axis], "your code picks it out by its number")
    return tuple(ids for k, ids in enumerate(x) if k != axis)


def constant_pad(c: Context) -> Value:
    """Padding adds positions that belong to nothing; along channels they are fixed in the user's code."""
    x = c.dims("self")
    assert x is not None
    pad = c.node.args["pad"]
    out = list(x)
    for k in range(len(pad) // 2):
        before, after = pad[2 * k], pad[2 * k + 1]
        ids = out[-1 - k]
        if ids is not None and (before or after):
            if before < 0 or after < 0:
                return unknown(c)
            out[-1 - k] = np.pad(ids, (before, after), constant_values=FIXED)
    return tuple(out)


def pixel_shuffle(c: Context) -> Value:
    """Depth to space: the r·r channels that become one channel's pixels go together."""
    x = c.dims("self")
    assert x is not None
    ids = x[-3]
    r = int(c.node.args["upscale_factor"])
    if ids is not None:
        grid = ids.reshape(-1, r * r)
        for k in range(1, r * r):
            c.tie(grid[:, 0].copy(), grid[:, k].copy())
        ids = grid[:, 0].copy()
    return (*x[:-3], ids, None, None)


def embedding(c: Context) -> Value:
    """Rows are looked up by the user's data, columns are channels."""
    w, index = c.dims("weight"), c.dims("indices")
    assert w is not None and index is not None
    c.ties.pin(w[0], "its entries are chosen by the input data")
    return (*index, w[1])


def stack(c: Context) -> Value:
    """A new dimension; all others meet elementwise."""
    parts = [c.values[r.index] for r in c.node.args["tensors"] if isinstance(r, Ref)]
    dims = [p for p in parts if isinstance(p, tuple)]
    for k in range(len(dims[0])):
        for other in dims[1:]:
            if other[k] is not None or dims[0][k] is not None:
                c.tie(dims[0][k], other[k])
    axis = int(c.node.args.get("dim", 0)) % c.rank
    return (*dims[0][:axis], None, *dims[0][axis:])


def creation(c: Context) -> Value:
    """``zeros_like(x)`` has the channels of x, ``zeros(...)`` has none."""
    x = c.dims("self") if c.node.opname.endswith("_like") else None
    return x if x is not None else (None,) * c.rank if c.node.shape is not None else None


def unknown(c: Context) -> Value:
    """Anything else pins what enters it, and gives back sizes that are fixed."""
    for i in c.node.inputs:
        value = c.values[i]
        for dims in value if isinstance(value, list) else [value]:
            c.pin(dims, f"the operator {c.node.opname} is not one whose channels can be followed")
    if c.node.shape is not None:
        return (None,) * len(c.node.shape)
    return [(None,) * len(shape) for shape in c.node.shapes]


def _table(entries: dict[Rule, str]) -> dict[str, Rule]:
    return {name: rule for rule, names in entries.items() for name in names.split()}


RULES: dict[str, Rule] = _table(
    {
        same: """relu relu6 hardtanh silu hardswish hardsigmoid sigmoid tanh gelu elu selu celu leaky_relu softplus mish
            dropout feature_dropout alpha_dropout clone contiguous to _to_copy type_as neg exp expm1 log log1p sqrt rsqrt
            abs clamp clamp_min clamp_max detach alias lift_fresh_copy square sin cos erf reciprocal sign floor ceil round
            logical_not bitwise_not nan_to_num hardshrink softshrink tanhshrink threshold log_sigmoid softsign isnan
            lift_fresh detach_ _assert_tensor_metadata rrelu""",
        elementwise: """add sub mul div rsub maximum minimum pow where eq ne gt ge lt le logical_and logical_or atan2
            fmod remainder masked_fill addcmul addcdiv lerp prelu_ floor_divide""",
        convolution: "conv1d conv2d conv3d",
        transposed_convolution: "conv_transpose1d conv_transpose2d conv_transpose3d",
        linear: "linear",
        matmul: "matmul bmm mm",
        attention: "scaled_dot_product_attention",
        norm_over_batch: "batch_norm instance_norm",
        group_norm: "group_norm",
        layer_norm: "layer_norm rms_norm",
        spatial: """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
            adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
            max_pool2d_with_indices upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d
            upsample_bicubic2d upsample_linear1d upsample_trilinear3d lp_pool2d reflection_pad1d reflection_pad2d
            replication_pad1d replication_pad2d""",
        reduction: "mean sum amax amin std var norm linalg_vector_norm prod logsumexp",
        along: "softmax log_softmax _softmax _log_softmax flip roll cumsum",
        reshape: "view reshape flatten unflatten _unsafe_view _reshape_alias",
        squeeze: "squeeze unsqueeze",
        permute: "permute transpose t swapaxes numpy_T",
        expand: "expand broadcast_to expand_as",
        cat: "cat concat",
        stack: "stack",
        chunk: "chunk split split_with_sizes tensor_split",
        getitem: "getitem",
        take_slice: "slice",
        select: "select",
        constant_pad: "constant_pad_nd pad",
        pixel_shuffle: "pixel_shuffle",
        embedding: "embedding",
        creation: "zeros ones full empty arange zeros_like ones_like full_like empty_like new_zeros new_ones scalar_tensor",
        prelu: "prelu",
    }
)


def apply(c: Context) -> Value:
    """Ids of a node's value."""
    if c.node.shape is None and not c.node.shapes:
        # A number: sizes and arithmetic on sizes say nothing about channels, a number read out of a tensor does.
        return None if c.node.opname == "sym_size" or not hasattr(c.node.op, "_schema") else unknown(c) and None
    return RULES.get(c.node.opname, unknown)(c)
