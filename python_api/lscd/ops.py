"""The ops of lscd as documented functions, with what torch needs to know of them beside the kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._registry import op
from . import reference

TRITON = "effk.kernels.lscd.triton"


def _fake_pack(w: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    value_dtype = reference.check_pack(w, dtype)
    strips, sub_cols, tiles = reference.sizes(*w.shape)
    num_values = torch.library.get_ctx().new_dynamic_size(min=reference.VALUE_PAD)
    return (
        w.new_empty(num_values, dtype=value_dtype),
        w.new_empty((strips, sub_cols, 2), dtype=torch.int64),
        w.new_empty(strips * tiles + 1, dtype=torch.int64),
    )


def _fake_unpack(
    values: Tensor, bitmap: Tensor, offsets: Tensor, rows: int, cols: int, scale: Tensor | None = None
) -> Tensor:
    reference.check_packed("lscd_unpack", values, bitmap, offsets, rows, cols)
    reference.check_scale("lscd_unpack", scale, values, rows)
    dtype = torch.float32 if scale is not None and values.dtype == torch.int8 else values.dtype
    return values.new_empty((rows, cols), dtype=dtype)


def _fake_linear(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    rows: int,
    cols: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    activation: str = "none",
) -> Tensor:
    reference.check_packed("lscd_linear", values, bitmap, offsets, rows, cols)
    reference.check_linear(x, values, rows, cols, bias, scale, activation)
    return x.new_empty((*x.shape[:-1], rows))


def _linear_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    x, values, bitmap, offsets, rows, cols, bias, scale = inputs
    ctx.size = rows, cols
    ctx.activation = keyword_only_inputs["activation"]
    # The sum before the activation is computed again; without an activation, x isn't needed.
    ctx.save_for_backward(x if ctx.activation != "none" else None, values, bitmap, offsets, bias, scale)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, bitmap, offsets, bias, scale = ctx.saved_tensors
    rows, cols = ctx.size
    # Arguments left at their defaults have no entry.
    wanted = dict(zip(("x", "values", "", "", "", "", "bias", "scale"), ctx.needs_input_grad, strict=False))
    for name in ("values", "scale"):
        if wanted.get(name):
            raise RuntimeError(f"effk::lscd_linear: {name} requires grad; gradients exist for x and bias only")
    if ctx.activation != "none":
        before = lscd_linear(x, values, bitmap, offsets, rows, cols, bias, scale)
        again = torch.is_grad_enabled()  # create_graph: the gradient will be differentiated too
        with torch.enable_grad():
            leaf = before if again else before.detach().requires_grad_()
            after = reference.ACTIVATIONS[ctx.activation](leaf)
        (grad,) = torch.autograd.grad(after, leaf, grad, create_graph=again)
    grad_x = grad_bias = None
    if wanted["x"]:
        w = lscd_unpack(values, bitmap, offsets, rows, cols)
        scaled = grad if scale is None else (grad * scale).to(grad.dtype)
        grad_x = scaled @ w.to(grad.dtype)
    if wanted.get("bias"):
        grad_bias = grad.reshape(math.prod(grad.shape[:-1]), rows).sum(0)
    return grad_x, None, None, None, None, None, grad_bias, None


@op(reference=reference.lscd_pack, fake=_fake_pack, triton=f"{TRITON}:lscd_pack")
def lscd_pack(w: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Packs a pruned weight matrix: its nonzeros, a bitmap of where they are, and offsets.

    NaN and infinities are kept; -0.0 counts as pruned and comes back as +0.0. The format is in
    docs/formats/lscd.md and is the same on every device. On a GPU this waits for the device, since the size of
    `values` depends on the weights.

    Args:
        w: [rows, cols], float32, float16, bfloat16 or int8, any strides.
        dtype: of the packed values, a float type; w is rounded to it first. By default w's.

    Returns:
        values [stored + padding], bitmap [ceil(rows/16), 2*ceil(cols/16), 2] int64 and offsets int64.

    Raises:
        RuntimeError: wrong dtype or number of dimensions.
    """
    return torch.ops.effk.lscd_pack(w, dtype=dtype)


@op(reference=reference.lscd_unpack, fake=_fake_unpack, triton=f"{TRITON}:lscd_unpack")
def lscd_unpack(
    values: Tensor, bitmap: Tensor, offsets: Tensor, rows: int, cols: int, scale: Tensor | None = None
) -> Tensor:
    """The dense matrix that `lscd_pack` packed, bit for bit (but for -0.0).

    Args:
        values, bitmap, offsets: as `lscd_pack` returns them.
        rows, cols: size of the matrix.
        scale: [rows] float32; multiplies the rows. int8 values with a scale give float32.

    Returns:
        [rows, cols] of the dtype of values (float32 for int8 with a scale).

    Raises:
        RuntimeError: wrong shapes or dtypes; on a CPU also packed tensors whose contents disagree.
    """
    return torch.ops.effk.lscd_unpack(values, bitmap, offsets, rows, cols, scale)


@op(
    reference=reference.lscd_linear,
    fake=_fake_linear,
    triton=f"{TRITON}:lscd_linear",
    setup_context=_linear_context,
    backward=_linear_backward,
)
def lscd_linear(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    rows: int,
    cols: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    activation: str = "none",
) -> Tensor:
    """F.linear with a packed weight: activation(scale * (x @ w.T) + bias).

    The method is Flash-LLM's (Xia et al., VLDB 2023): the weight is read in its compressed form, expanded on the
    chip and multiplied as a dense one. Sums, scale, bias and activation are in float32, rounded once in the end. A
    pruned weight counts as zero, so an infinity or NaN in x gives NaN as in F.linear. Differentiable in x and bias.

    Args:
        x: [..., cols], float32, float16 or bfloat16, any strides.
        values, bitmap, offsets: as `lscd_pack` returns them; values of x's dtype, or int8.
        rows, cols: size of the weight matrix (output and input features).
        bias: [rows] of x's dtype.
        scale: [rows] float32, multiplies the outputs; meant for int8 values.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu".

    Returns:
        [..., rows] of x's dtype.

    Raises:
        RuntimeError: wrong shapes or dtypes; on a CPU also packed tensors whose contents disagree.
    """
    return torch.ops.effk.lscd_linear(x, values, bitmap, offsets, rows, cols, bias, scale, activation=activation)
