"""The ops of moe as documented functions, with what torch needs to know of them beside the kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._registry import op
from .._sums import sum_rows
from . import reference

TRITON = "effk.kernels.moe.triton"


# --- Shapes ----------------------------------------------------------------------------------------------------------


def _fake_route(
    logits: Tensor, k: int, bias: Tensor | None = None, *, score: str = "softmax", renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    reference.check_route(logits, k, bias, score)
    shape = (*logits.shape[:-1], k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


def _fake_sort(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    reference.check_sort(ids, num_experts)
    return (
        ids.new_empty(ids.numel(), dtype=torch.int64),
        ids.new_empty(ids.shape, dtype=torch.int64),
        ids.new_empty(num_experts, dtype=torch.int32),
    )


def _fake_grouped_gemm(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    gather: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    rows = reference.check_grouped_gemm(x, w, offsets, bias, gather, out_dtype)
    return x.new_empty(rows, w.shape[1], dtype=out_dtype or x.dtype)


def _fake_grouped_wgrad(grad: Tensor, x: Tensor, offsets: Tensor, gather: Tensor | None = None) -> Tensor:
    reference.check_grouped_wgrad(grad, x, offsets, gather)
    return x.new_empty(offsets.shape[0], grad.shape[1], x.shape[1])


def _fake_combine(y: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    reference.check_combine(y, inverse, weights)
    return y.new_empty(*inverse.shape[:-1], y.shape[1])


def _fake_mlp(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    activation: str = "swiglu",
    gemm: str = "auto",
) -> Tensor:
    reference.check_mlp(x, w13, w2, weights, ids, activation, gemm)
    return x.new_empty(x.shape)


def _fake_mlp_(
    y: Tensor,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    activation: str = "swiglu",
    gemm: str = "auto",
) -> None:
    reference.check_mlp_(y, x, w13, w2, weights, ids, activation, gemm)


# --- Gradients -------------------------------------------------------------------------------------------------------
# All are made of the ops themselves, so none waits for the device, and rows or experts that take no part stay out of
# them, whatever they hold.


def _route_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.score, ctx.renormalize = keyword_only_inputs["score"], keyword_only_inputs["renormalize"]
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(inputs[0], *output)
    ctx.mark_non_differentiable(output[1])


def _route_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    logits, weights, ids = ctx.saved_tensors
    scores = reference.SCORES[ctx.score](logits.float())
    if ctx.renormalize:
        total = scores.gather(-1, ids).sum(-1, keepdim=True)
        moves = total >= reference.TINY  # below, what is divided by is a constant
        grad = (grad - torch.where(moves, (grad * weights).sum(-1, keepdim=True), 0.0)) / total.clamp(reference.TINY)
    of_scores = torch.zeros_like(scores).scatter_add(-1, ids, grad)
    if ctx.score == "softmax":
        of_logits = scores * (of_scores - (of_scores * scores).sum(-1, keepdim=True))
    else:
        of_logits = of_scores * scores * (1 - scores)
    return (of_logits.to(logits.dtype), None, None)[: ctx.num_inputs]


def _kept(offsets: Tensor, rows: int) -> Tensor:
    """[rows, 1]: whether the sorted row belongs to an expert."""
    last = offsets[-1:] if offsets.shape[0] > 0 else offsets.new_zeros(1)
    return (torch.arange(rows, device=offsets.device) < last)[:, None]


def _summed(rows: Tensor, place: Tensor, there: Tensor, size: int) -> Tensor:
    """[size, K] float32: the sum of the rows that go to each place; of those that aren't `there`, nothing."""
    return sum_rows(rows.float(), torch.where(there, place, -1), size)


def _grad_of_x(grad: Tensor, w: Tensor, offsets: Tensor, gather: Tensor | None, x: Tensor) -> Tensor:
    """grad w for each expert, summed up where rows of x were gathered more than once."""
    if gather is None:
        return moe_grouped_gemm(grad, w.transpose(1, 2), offsets)
    rows = moe_grouped_gemm(grad, w.transpose(1, 2), offsets, out_dtype=torch.float32)
    return _summed(rows, gather, _kept(offsets, grad.shape[0])[:, 0], x.shape[0]).to(x.dtype)


def _grouped_gemm_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    x, w, offsets, *rest = inputs
    bias, gather = (*rest, None, None)[:2]
    ctx.num_inputs, ctx.has_bias = len(inputs), bias is not None
    ctx.save_for_backward(x, w, offsets, gather)


def _grouped_gemm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, w, offsets, gather = ctx.saved_tensors
    wanted = (*ctx.needs_input_grad, False, False)
    grad = grad.to(x.dtype)
    grad_x = grad_w = grad_bias = None
    if wanted[0]:
        grad_x = _grad_of_x(grad, w, offsets, gather, x)
    if wanted[1]:
        grad_w = moe_grouped_wgrad(grad, x, offsets, gather)
    if ctx.has_bias and wanted[3]:
        ones = grad.new_ones(grad.shape[0], 1)
        grad_bias = moe_grouped_wgrad(ones, grad, offsets)[:, 0]
    return (grad_x, grad_w, None, grad_bias, None)[: ctx.num_inputs]


def _grouped_wgrad_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, x, offsets, *rest = inputs
    gather = (*rest, None)[0]
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(grad, x, offsets, gather)


def _grouped_wgrad_backward(ctx: Any, of_w: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, offsets, gather = ctx.saved_tensors
    of_w = of_w.to(x.dtype)
    of_grad = of_x = None
    if ctx.needs_input_grad[0]:
        of_grad = moe_grouped_gemm(x, of_w, offsets, gather=gather)
    if ctx.needs_input_grad[1]:
        of_x = _grad_of_x(grad, of_w, offsets, gather, x)
    return (of_grad, of_x, None, None)[: ctx.num_inputs]


def _combine_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, inverse, weights = ctx.saved_tensors
    k, rows = inverse.shape[-1], y.shape[0]
    place = inverse.reshape(-1).long()
    there = (place >= 0) & (place < rows)
    tokens = math.prod(inverse.shape[:-1])
    grad2 = grad.reshape(tokens, y.shape[1]).float().repeat_interleave(k, 0)  # [T k, K]
    grad_y = grad_weights = None
    if ctx.needs_input_grad[0]:
        grad_y = _summed(weights.reshape(-1, 1) * grad2, place, there, rows).to(y.dtype)
    if ctx.needs_input_grad[2]:
        padded = torch.nn.functional.pad(y, (0, 0, 0, 1))  # of -1: a row past the last
        of_pair = (padded[torch.where(there, place, rows)].float() * grad2).sum(-1)
        grad_weights = torch.where(there, of_pair, 0.0).reshape(weights.shape)
    return grad_y, None, grad_weights


def _mlp_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.activation = keyword_only_inputs["activation"]
    ctx.save_for_backward(*inputs)


def _mlp_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The forward pass is made again, up to what is between the two products."""
    x, w13, w2, weights, ids = ctx.saved_tensors
    k, shape = ids.shape[-1], (math.prod(x.shape[:-1]), x.shape[-1])
    x2, grad2 = x.reshape(shape), grad.reshape(shape).to(x.dtype)
    perm, inverse, offsets = moe_sort(ids, w2.shape[0])
    token, weight = perm // max(1, k), weights.reshape(-1)[perm][:, None]
    kept = _kept(offsets, perm.shape[0])
    z = moe_grouped_gemm(x2, w13, offsets, gather=token, out_dtype=torch.float32)
    h = reference.activated(z, ctx.activation).to(x.dtype)
    # Of h, if all weights were 1.
    of_h = moe_grouped_gemm(grad2, w2.transpose(1, 2), offsets, gather=token, out_dtype=torch.float32)
    grad_x = grad_w13 = grad_w2 = grad_weights = None
    if ctx.needs_input_grad[3]:
        of_weight = torch.where(kept[:, 0], (h.float() * of_h).sum(-1), 0.0)
        grad_weights = of_weight[inverse.reshape(-1)].reshape(weights.shape)
    if ctx.needs_input_grad[2]:
        weighted = (torch.where(kept, weight, 0.0) * grad2[token].float()).to(x.dtype)
        grad_w2 = moe_grouped_wgrad(weighted, h, offsets)
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        of_z = _activation_backward(torch.where(kept, weight, 0.0) * of_h, z, ctx.activation).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_w13 = moe_grouped_wgrad(of_z, x2, offsets, token)
        if ctx.needs_input_grad[0]:
            rows = moe_grouped_gemm(of_z, w13.transpose(1, 2), offsets, out_dtype=torch.float32)
            grad_x = moe_combine(rows, inverse, torch.ones_like(weights)).to(x.dtype).reshape(x.shape)
    return grad_x, grad_w13, grad_w2, grad_weights, None


def _activation_backward(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    if activation == "relu2":
        return grad * 2 * z.relu()
    gate, up = z.chunk(2, -1)
    function = reference.ACTIVATIONS[activation]
    assert function is not None
    if activation == "swiglu":
        sigmoid = gate.sigmoid()  # and not silu_backward, which has no derivative
        of_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    else:
        approximate = "tanh" if activation == "geglu_tanh" else "none"
        of_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate=approximate)
    return torch.cat([of_gate, grad * function(gate)], -1)


# --- The ops ---------------------------------------------------------------------------------------------------------


@op(
    reference=reference.moe_route,
    fake=_fake_route,
    triton=f"{TRITON}:moe_route",
    setup_context=_route_context,
    backward=_route_backward,
)
def moe_route(
    logits: Tensor, k: int, bias: Tensor | None = None, *, score: str = "softmax", renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Each token's k best experts and their weights.

    Without a bias experts are chosen by their logits, with one by score + bias, as in loss-free balancing (Wang et
    al., 2024, arXiv:2408.15664), in float32; of equals the lower number comes first, and NaN comes before all numbers.
    The bias has no part in the weights. Differentiable in logits.

    Args:
        logits: [..., E], float32, float16 or bfloat16, any strides.
        k: how many experts, up to E.
        bias: [E] float32, added for the choice alone.
        score: "softmax" over all experts or "sigmoid".
        renormalize: whether a token's weights are divided by their sum (by 2^-126 at least), so that they add up to 1.

    Returns:
        weights [..., k] float32 and ids [..., k] int64, best first.

    Raises:
        RuntimeError: wrong dtypes, shapes or names; k above E.
    """
    return torch.ops.effk.moe_route(logits, k, bias, score=score, renormalize=renormalize)


@op(reference=reference.moe_sort, fake=_fake_sort, triton=f"{TRITON}:moe_sort")
def moe_sort(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts pairs of a token and an expert by expert; pairs of one expert stay in order.

    Args:
        ids: [..., k] int32 or int64, the experts, -1 for none: such pairs come last.
        num_experts: E.

    Returns:
        perm [n] int64, the pair at each place, where pair t * k + j is token t's j-th; so perm // k are the tokens
        (`gather` of `moe_grouped_gemm`). inverse, shaped as ids, int64: the place of each pair. offsets [E] int32:
        where each expert's places end, as `offs` of `torch.nn.functional.grouped_mm`.

    Raises:
        RuntimeError: wrong dtypes or shapes; on a CPU also ids out of range. On a GPU such ids count as -1.
    """
    return torch.ops.effk.moe_sort(ids, num_experts)


@op(
    reference=reference.moe_grouped_gemm,
    fake=_fake_grouped_gemm,
    triton=f"{TRITON}:moe_grouped_gemm",
    setup_context=_grouped_gemm_context,
    backward=_grouped_gemm_backward,
)
def moe_grouped_gemm(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    gather: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows sorted by expert times their expert's weight: y[i] = x[i] w[e]^T + bias[e].

    No size or address needs to be a multiple of anything. Sums are kept in float32, the bias is added there, and the
    result is rounded once. Rows past the last offset are 0. An expert without rows is never read. Differentiable in x,
    w and bias.

    Args:
        x: [M, K], float32, float16 or bfloat16, any strides.
        w: [E, N, K] of x's dtype, as nn.Linear; copied first if its last dimension isn't contiguous.
        offsets: [E] int32 or int64, where each expert's rows end, ascending.
        bias: [E, N] of x's dtype.
        gather: [G] int32 or int64: the rows of x that are multiplied; offsets count these.
        out_dtype: float32, float16 or bfloat16; x's by default.

    Returns:
        [M or G, N].

    Raises:
        RuntimeError: wrong dtypes or shapes; on a CPU also offsets that descend or pass the last row, and numbers in
            gather out of range. On a GPU such offsets are clamped, and such rows count as zeros.
    """
    return torch.ops.effk.moe_grouped_gemm(x, w, offsets, bias, gather, out_dtype=out_dtype)


@op(
    reference=reference.moe_grouped_wgrad,
    fake=_fake_grouped_wgrad,
    triton=f"{TRITON}:moe_grouped_wgrad",
    setup_context=_grouped_wgrad_context,
    backward=_grouped_wgrad_backward,
)
def moe_grouped_wgrad(grad: Tensor, x: Tensor, offsets: Tensor, gather: Tensor | None = None) -> Tensor:
    """The gradient of `moe_grouped_gemm` for its weights: dw[e] = grad^T x over the expert's rows, 0 where it has none.

    Sums are kept in float32 and rounded once. Differentiable in grad and x, so that second derivatives are right.

    Args:
        grad: [M or G, N] of x's dtype, any strides.
        x, offsets, gather: as of `moe_grouped_gemm`.

    Returns:
        [E, N, K] of x's dtype.

    Raises:
        RuntimeError: as `moe_grouped_gemm`.
    """
    return torch.ops.effk.moe_grouped_wgrad(grad, x, offsets, gather)


@op(
    reference=reference.moe_combine,
    fake=_fake_combine,
    triton=f"{TRITON}:moe_combine",
    setup_context=_combine_context,
    backward=_combine_backward,
)
def moe_combine(y: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    """Adds up each token's rows: out[t] = sum over j of weights[t, j] * y[inverse[t, j]].

    In float32 by ascending j, rounded once. Differentiable in y and weights.

    Args:
        y: [M, K], float32, float16 or bfloat16, any strides: rows in `moe_sort`'s order.
        inverse: [..., k] int32 or int64: places of the token's rows; -1 adds nothing.
        weights: [..., k] float32.

    Returns:
        [..., K] of y's dtype.

    Raises:
        RuntimeError: wrong dtypes or shapes; on a CPU also places out of range. On a GPU such places count as -1.
    """
    return torch.ops.effk.moe_combine(y, inverse, weights)


@op(
    reference=reference.moe_mlp,
    fake=_fake_mlp,
    triton=f"{TRITON}:moe_mlp",
    setup_context=_mlp_context,
    backward=_mlp_backward,
)
def moe_mlp(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    activation: str = "swiglu",
    gemm: str = "auto",
) -> Tensor:
    """A layer of experts: y[t] = sum over j of weights[t, j] * w2[e] activation(w13[e] x[t]), e being ids[t, j].

    Tokens are sorted by expert and gathered inside the first product, the activation is its end, and the weighted sum
    the end of the second: only used experts are read. Products and sums are kept in float32; what is between the two
    products is rounded to x's dtype, the result once more. A result has the same bits in every run. The choice between
    grouped and dense GEMMs is EPS-MoE's (Qian et al., 2024, arXiv:2410.12247); here it is made for each expert, by the
    number of its rows and the weight's sizes. Differentiable in x, w13, w2 and weights.

    Args:
        x: [..., K], float32, float16 or bfloat16, any strides.
        w13: [E, 2I, K] of x's dtype: rows of the gates and then those they multiply; [E, I, K] for "relu2".
        w2: [E, K, I], likewise. Both are copied first if their last dimension isn't contiguous.
        weights: [..., k] float32.
        ids: [..., k] int32 or int64: the token's experts, -1 for none; one may come more than once.
        activation: "swiglu": silu(gate) * up; "geglu" and "geglu_tanh": gelu(gate) * up, the latter with tanh;
            "relu2": relu(up)^2 without gates.
        gemm: "auto", "grouped" (weights are read as they lie: for few rows an expert) or "dense" (blocks are laid out
            anew: for many). Results may differ in their rounding.

    Returns:
        Shape and dtype of x.

    Raises:
        RuntimeError: wrong dtypes, shapes or names; on a CPU also ids out of range. On a GPU such ids count as -1.
    """
    return torch.ops.effk.moe_mlp(x, w13, w2, weights, ids, activation=activation, gemm=gemm)


@op(reference=reference.moe_mlp_, fake=_fake_mlp_, triton=f"{TRITON}:moe_mlp_")
def moe_mlp_(
    y: Tensor,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    activation: str = "swiglu",
    gemm: str = "auto",
) -> None:
    """Adds what `moe_mlp` computes to y, in float32 and term by term: for experts that come a few at a time.

    Given the experts in ascending parts, and each token's ids ascending, y has the same bits after the last part
    whatever the parts were: a CPU adds a token's terms by ascending expert, a GPU by ascending j. Not differentiable.

    Args:
        y: [..., K] float32, contiguous; what it holds is the start of each sum. Tokens without experts aren't touched.
        x, w13, w2, weights, ids, activation, gemm: as of `moe_mlp`.

    Returns:
        Nothing.

    Raises:
        RuntimeError: as `moe_mlp`; y isn't what is wanted. After ids out of range y holds some of the sums.
    """
    torch.ops.effk.moe_mlp_(y, x, w13, w2, weights, ids, activation=activation, gemm=gemm)
