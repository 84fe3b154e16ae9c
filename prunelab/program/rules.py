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
            neg exp exp2 expm1 log log2 log10 log1p sqrt rsqrt abs square sin cos tan asin acos atan sinh cosh
            asinh acosh atanh erf erfc sinc logit reciprocal sign floor ceil round trunc frac
            logical_not bitwise_not nan_to_num isnan isinf isfinite fill zero
            real imag angle conj _conj resolve_conj""",
        compute.elementwise: """
            add sub mul div rsub maximum minimum pow where eq ne gt ge lt le logical_and logical_or atan2 fmod
            remainder masked_fill addcmul addcdiv lerp floor_divide copy clamp clamp_min clamp_max fmax fmin
            logical_xor bitwise_and bitwise_or bitwise_xor logaddexp hypot xlogy heaviside complex polar""",
        compute.convolution: "conv1d conv2d conv3d",
        compute.transposed_convolution: "conv_transpose1d conv_transpose2d conv_transpose3d",
        compute.linear: "linear",
        compute.matmul: "matmul bmm mm",
        compute.product_and_sum: "addmm",
        compute.einsum: "einsum",
        compute.attention: "scaled_dot_product_attention",
        compute.weight_norm: "_weight_norm",
        compute.recurrent: "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
        compute.norm_over_batch: "batch_norm instance_norm",
        compute.group_norm: "group_norm",
        compute.layer_norm: "layer_norm rms_norm",
        compute.spatial: """
            max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d
            adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
            adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool2d_with_indices
            upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d
            upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
            _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
            reflection_pad1d reflection_pad2d reflection_pad3d
            replication_pad1d replication_pad2d replication_pad3d""",
        compute.unpooling: "max_unpool2d max_unpool3d",
        compute.fourier: """
            fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2
            fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_fftshift fft_ifftshift""",
        compute.sampling: "grid_sampler",
        compute.reduction: """
            mean sum amax amin std var std_mean var_mean norm linalg_vector_norm prod logsumexp nansum nanmean
            any all count_nonzero""",
        compute.extreme: "max min",
        compute.numbered: "argmax argmin sort argsort topk median nanmedian kthvalue mode cummax cummin",
        compute.similarity: "cosine_similarity",
        compute.along: "softmax log_softmax _softmax _log_softmax cumsum cumprod logcumsumexp",
        compute.gate_of_halves: "glu",
        compute.prelu: "prelu",
        compute.embedding: "embedding",
        compute.bags: "embedding_bag",
        compute.pixel_shuffle: "pixel_shuffle",
        compute.pixel_unshuffle: "pixel_unshuffle",
        compute.unfolding: "im2col",
        compute.channel_shuffle: "channel_shuffle native_channel_shuffle",
        shaping.reshape: "view reshape flatten unflatten _unsafe_view _reshape_alias",
        shaping.squeeze: "squeeze",
        shaping.unsqueeze: "unsqueeze",
        shaping.permute: "permute transpose t numpy_T mT mH adjoint swapaxes swapdims",
        shaping.move_dimension: "movedim moveaxis",
        shaping.flip: "flip",
        shaping.roll: "roll",
        shaping.expand: "expand broadcast_to expand_as",
        shaping.cat: "cat concat concatenate",
        shaping.stack: "stack",
        shaping.named_stack: "vstack hstack dstack",
        shaping.chunk: "chunk split split_with_sizes tensor_split",
        shaping.unbind: "unbind",
        shaping.getitem: "getitem",
        shaping.take_slice: "slice",
        shaping.narrow: "narrow",
        shaping.index_select: "index_select",
        shaping.gather: "gather",
        shaping.repeat: "repeat tile",
        shaping.repeat_interleave: "repeat_interleave",
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
