"""The ops of w4a8 as documented functions, with what torch needs to know of them beside the kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._registry import op
from . import reference
from .reference import BLOCK, CHUNK, Packed, ceil_div

TRITON = "effk.kernels.w4a8.triton"


def _fake_quantize(x: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor]:
    reference.check_quantize(x, group_size)
    groups = ceil_div(x.shape[-1], group_size)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)


def _fake_pack(w: Tensor, is8: Tensor | None = None, group_size: int = 128) -> Packed:
    reference.check_pack(w, is8, group_size)
    n, cols = w.shape
    n8: Any = 0 if is8 is None else torch.library.get_ctx().new_dynamic_size(min=0)
    if is8 is not None:
        torch._check(n8 <= n)
    blocks4, blocks8, groups = ceil_div(n - n8, BLOCK), ceil_div(n8, BLOCK), ceil_div(cols, group_size)
    return Packed(
        w.new_empty((blocks4, ceil_div(cols, CHUNK), BLOCK, 4), dtype=torch.uint8),
        w.new_empty((blocks4, groups, BLOCK), dtype=torch.float32),
        w.new_empty((blocks4, groups, BLOCK), dtype=torch.uint8),
        w.new_empty((n8, cols), dtype=torch.uint8),
        w.new_empty((blocks8, groups, BLOCK), dtype=torch.float32),
        w.new_empty(n, dtype=torch.int32),
    )


def _fake_unpack(
    q4: Tensor, scale4: Tensor, zero4: Tensor, q8: Tensor, scale8: Tensor, perm: Tensor, group_size: int
) -> Tensor:
    reference.check_packed("w4a8_unpack", Packed(q4, scale4, zero4, q8, scale8, perm), group_size)
    return q8.new_empty((perm.shape[0], q8.shape[1]), dtype=torch.float32)


def _fake_accumulate(
    q: Tensor, q4: Tensor, scale4: Tensor, zero4: Tensor, q8: Tensor, scale8: Tensor, perm: Tensor, group_size: int
) -> Tensor:
    reference.check_accumulate(q, Packed(q4, scale4, zero4, q8, scale8, perm), group_size)
    return q.new_empty((q.shape[0], ceil_div(q.shape[1], group_size), perm.shape[0]), dtype=torch.int32)


def _fake_linear(
    x: Tensor,
    q4: Tensor,
    scale4: Tensor,
    zero4: Tensor,
    q8: Tensor,
    scale8: Tensor,
    perm: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    p = Packed(q4, scale4, zero4, q8, scale8, perm)
    dtype = reference.check_linear(x, p, group_size, bias, out_dtype)
    return x.new_empty((*x.shape[:-1], perm.shape[0]), dtype=dtype)


def _fake_salience(grad: Tensor, w: Tensor, w4: Tensor) -> Tensor:
    reference.check_salience(grad, w, w4)
    return w.new_empty(w.shape[0], dtype=torch.float32)


def _linear_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    x, *packed, group_size = inputs[:8]
    bias = inputs[8] if len(inputs) > 8 else None
    ctx.x_dtype, ctx.group_size = x.dtype, group_size
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*packed)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    names = ("x", *Packed._fields, "group_size", "bias")
    wanted = dict(zip(names, ctx.needs_input_grad, strict=False))  # arguments left at their defaults have no entry
    for name in ("scale4", "scale8"):
        if wanted.get(name):
            raise RuntimeError(f"effk::w4a8_linear: {name} requires grad; gradients exist for x and bias only")
    grad_x = grad_bias = None
    if wanted["x"]:
        w = w4a8_unpack(*ctx.saved_tensors, ctx.group_size)
        grad_x = (grad.to(ctx.x_dtype) @ w.to(ctx.x_dtype)).to(ctx.x_dtype)
    if wanted.get("bias"):
        rows = grad.shape[-1]
        grad_bias = grad.reshape(math.prod(grad.shape[:-1]), rows).float().sum(0).to(ctx.bias_dtype)
    return grad_x, *[None] * len(Packed._fields), None, grad_bias


@op(reference=reference.w4a8_quantize, fake=_fake_quantize, triton=f"{TRITON}:w4a8_quantize")
def w4a8_quantize(x: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor]:
    """Activations as 8-bit integers with a scale for each token's group of input features.

    scale = max |x| / 127 of the group (1 where all of it is zero, at least 2^-126), q = round(x / scale), ties to
    even. A group that holds NaN or an infinity gets q = 0 and scale = NaN.

    Args:
        x: [..., K], float32, float16 or bfloat16, any strides.
        group_size: 32, 64, 128 or 256; the last group has what is left.

    Returns:
        q [..., K] int8 from -127 to 127, and scale [..., ceil(K / group_size)] float32.

    Raises:
        RuntimeError: wrong dtype or group size.
    """
    return torch.ops.effk.w4a8_quantize(x, group_size)


@op(reference=reference.w4a8_pack, fake=_fake_pack, triton=f"{TRITON}:w4a8_pack")
def w4a8_pack(w: Tensor, is8: Tensor | None = None, group_size: int = 128) -> Packed:
    """Quantizes a weight matrix to the nearest integers and packs it: most output features to 4 bits, some to 8.

    4 bits are asymmetric: the range of a group, with 0 taken into it, becomes 0 to 15 around an integer zero point.
    8 bits are symmetric. A constant-zero group has scale 1; one that holds NaN or an infinity, or whose range
    float32 can't hold, gets scale NaN, so that its outputs are NaN. The format is in docs/formats/w4a8.md and is the
    same on every device. On a GPU, with is8, this waits for the device, since sizes depend on it.

    Args:
        w: [N, K], float32, float16 or bfloat16, any strides.
        is8: [N] bool, which output features get 8 bits; none by default.
        group_size: input features that share a scale: 32, 64, 128 or 256; the last group has what is left.

    Returns:
        q4, scale4, zero4, q8, scale8 and perm. q8 is [N8, K]; perm [N] int32.

    Raises:
        RuntimeError: wrong dtypes, shapes or group size.
    """
    return Packed(*torch.ops.effk.w4a8_pack(w, is8, group_size))


@op(reference=reference.w4a8_unpack, fake=_fake_unpack, triton=f"{TRITON}:w4a8_unpack")
def w4a8_unpack(
    q4: Tensor, scale4: Tensor, zero4: Tensor, q8: Tensor, scale8: Tensor, perm: Tensor, group_size: int
) -> Tensor:
    """The weight that the packed tensors stand for: scale * (q - zero), output features in their own order.

    Args:
        q4, scale4, zero4, q8, scale8, perm: as `w4a8_pack` returns them.
        group_size: as packed.

    Returns:
        [N, K] float32.

    Raises:
        RuntimeError: wrong shapes, dtypes or group size; on a CPU also a perm that isn't a permutation.
    """
    return torch.ops.effk.w4a8_unpack(q4, scale4, zero4, q8, scale8, perm, group_size)


@op(reference=reference.w4a8_accumulate, fake=_fake_accumulate, triton=f"{TRITON}:w4a8_accumulate")
def w4a8_accumulate(
    q: Tensor, q4: Tensor, scale4: Tensor, zero4: Tensor, q8: Tensor, scale8: Tensor, perm: Tensor, group_size: int
) -> Tensor:
    """The first step of `w4a8_linear` alone, for tests and tools: integer sums over each group, exact.

    Args:
        q: [T, K] int8, all values allowed.
        q4, scale4, zero4, q8, scale8, perm: as `w4a8_pack` returns them.
        group_size: as packed.

    Returns:
        [T, groups, N] int32: sum over the group's k of q[t, k] * (w[n, k] - zero[n, group]).

    Raises:
        RuntimeError: wrong shapes, dtypes or group size; on a CPU also a perm that isn't a permutation.
    """
    return torch.ops.effk.w4a8_accumulate(q, q4, scale4, zero4, q8, scale8, perm, group_size)


@op(
    reference=reference.w4a8_linear,
    fake=_fake_linear,
    triton=f"{TRITON}:w4a8_linear",
    setup_context=_linear_context,
    backward=_linear_backward,
)
def w4a8_linear(
    x: Tensor,
    q4: Tensor,
    scale4: Tensor,
    zero4: Tensor,
    q8: Tensor,
    scale8: Tensor,
    perm: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """F.linear with a packed 4/8-bit weight and activations quantized to 8 bits on the way.

    The method is MixLLM's (Zheng et al., 2024, arXiv:2412.14590): each group is summed in integers, then scaled and
    added up in float32, groups in ascending order; bias is added and the result rounded once in the end. A NaN or
    infinity in a token makes all its outputs NaN. Differentiable in x (as if x weren't rounded) and bias.

    Args:
        x: [..., K], float32, float16 or bfloat16, any strides.
        q4, scale4, zero4, q8, scale8, perm: as `w4a8_pack` returns them. Scales may have any sign.
        group_size: as packed; x is quantized with it too.
        bias: [N], float32, float16 or bfloat16.
        out_dtype: of the result, a float type; by default x's.

    Returns:
        [..., N].

    Raises:
        RuntimeError: wrong shapes, dtypes or group size; on a CPU also a perm that isn't a permutation.
    """
    return torch.ops.effk.w4a8_linear(x, q4, scale4, zero4, q8, scale8, perm, group_size, bias, out_dtype=out_dtype)


@op(reference=reference.w4a8_salience, fake=_fake_salience, triton=f"{TRITON}:w4a8_salience")
def w4a8_salience(grad: Tensor, w: Tensor, w4: Tensor) -> Tensor:
    """How much quantizing each output feature changes the loss: MixLLM's estimate by a second-order expansion.

    Sum over samples of |d + d^2 / 2| with d = sum over k of grad * (w4 - w), in float32.

    Args:
        grad: [N, K], or [S, N, K] for S samples: the loss's gradient with respect to w, one sample each.
        w, w4: [N, K], the weight and what quantizing makes of it. Each of the three float32, float16 or bfloat16.

    Returns:
        [N] float32.

    Raises:
        RuntimeError: wrong dtypes or shapes.
    """
    return torch.ops.effk.w4a8_salience(grad, w, w4)
