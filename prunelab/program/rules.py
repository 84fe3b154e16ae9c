"""What every operator says about channels: one table of short functions, one for every family of operators.

An operator that is not in the table pins whatever enters it: what is not understood is never pruned.
"""

from __future__ import annotations

from prunelab.program import compute, shaping
from prunelab.program.context import Context, Rule, Value, unknown


def _table(entries: dict[Rule, str]) -> dict[str, Rule]:
    return {name: rule for rule, names in entries.items() for name in names.split()}


RULES: dict[str, Rule] = _table(
    {
        compute.same: """
            relu relu6 hardtanh silu hardswish hardsigmoid sigmoid tanh gelu elu selu celu leaky_relu softplus
            mish hardshrink softshrink tanhshrink threshold log_sigmoid softsign rrelu
            dropout feature_dropout alpha_dropout clone contiguous to _to_copy type_as detach alias lift_fresh
            lift_fresh_copy
            neg exp expm1 log log1p sqrt rsqrt abs clamp clamp_min clamp_max square sin cos erf reciprocal
            sign floor ceil round logical_not bitwise_not nan_to_num isnan fill zero""",
        compute.elementwise: """
            add sub mul div rsub maximum minimum pow where eq ne gt ge lt le logical_and logical_or atan2 fmod
            remainder masked_fill addcmul addcdiv lerp floor_divide copy""",
        compute.convolution: "conv1d conv2d conv3d",
        compute.transposed_convolution: "conv_transpose1d conv_transpose2d conv_transpose3d",
        compute.linear: "linear",
        compute.matmul: "matmul bmm mm",
        compute.einsum: "einsum",
        compute.attention: "scaled_dot_product_attention",
        compute.norm_over_batch: "batch_norm instance_norm",
        compute.group_norm: "group_norm",
        compute.layer_norm: "layer_norm rms_norm",
        compute.spatial: """
            max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d
            adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
            adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool2d_with_indices
            upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d
            upsample_bicubic2d upsample_trilinear3d
            reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d""",
        compute.reduction: "mean sum amax amin std var norm linalg_vector_norm prod logsumexp",
        compute.along: "softmax log_softmax _softmax _log_softmax cumsum",
        compute.prelu: "prelu",
        compute.embedding: "embedding",
        compute.pixel_shuffle: "pixel_shuffle",
        compute.channel_shuffle: "channel_shuffle native_channel_shuffle",
        shaping.reshape: "view reshape flatten unflatten _unsafe_view _reshape_alias",
        shaping.squeeze: "squeeze",
        shaping.unsqueeze: "unsqueeze",
        shaping.permute: "permute transpose t numpy_T swapaxes swapdims",
        shaping.move_dimension: "movedim moveaxis",
        shaping.flip: "flip",
        shaping.roll: "roll",
        shaping.expand: "expand broadcast_to expand_as",
        shaping.repeat: "repeat tile",
        shaping.cat: "cat concat concatenate",
        shaping.stack: "stack",
        shaping.chunk: "chunk split split_with_sizes tensor_split",
        shaping.unbind: "unbind",
        shaping.getitem: "getitem",
        shaping.take_slice: "slice",
        shaping.select: "select",
        shaping.index: "index",
        shaping.constant_pad: "constant_pad_nd pad",
        shaping.creation: """
            zeros ones full empty arange scalar_tensor new_zeros new_ones
            zeros_like ones_like full_like empty_like""",
    }
)


# Operators without a value that ask about sizes and types, never about what a tensor holds.
_SILENT = {"sym_size", "_assert_tensor_metadata", "sym_constrain_range_for_size", "sym_constrain_range"}


def apply(c: Context) -> Value:
    """Ids of a node's value."""
    if c.node.shape is None and not c.node.shapes:
        if hasattr(c.node.op, "_schema") and c.node.opname not in _SILENT:
            # Sizes and arithmetic on sizes say nothing about channels, a number read out of a tensor does.
            unknown(c)
        return None
    return RULES.get(c.node.opname, unknown)(c)
