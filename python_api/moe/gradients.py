"""The gradients of moe's ops.

All are made of the ops themselves, so that those of one device never wait for it, and rows or experts that take no part
stay out of them, whatever they hold.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._sums import sum_rows
from . import reference


def route_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.score, ctx.renormalize = keyword_only_inputs["score"], keyword_only_inputs["renormalize"]
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(inputs[0], *output)
    ctx.mark_non_differentiable(output[1])


def route_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
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


def kept_rows(offsets: Tensor, rows: int) -> Tensor:
    """[rows, 1]: whether the sorted row belongs to an expert."""
    last = offsets[-1:] if offsets.shape[0] > 0 else offsets.new_zeros(1)
    return (torch.arange(rows, device=offsets.device) < last)[:, None]


def summed(rows: Tensor, place: Tensor, there: Tensor, size: int) -> Tensor:
    """[size, K] float32: the sum of the rows that go to each place; of those that aren't `there`, nothing."""
    return sum_rows(rows.float(), torch.where(there, place, -1), size)


def grad_of_x(grad: Tensor, w: Tensor, offsets: Tensor, gather: Tensor | None, x: Tensor) -> Tensor:
    """grad w for each expert, summed up where rows of x were gathered more than once."""
    if gather is None:
        return torch.ops.effk.moe_grouped_gemm(grad, w.transpose(1, 2), offsets)
    rows = torch.ops.effk.moe_grouped_gemm(grad, w.transpose(1, 2), offsets, out_dtype=torch.float32)
    return summed(rows, gather, kept_rows(offsets, grad.shape[0])[:, 0], x.shape[0]).to(x.dtype)


def grouped_gemm_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    x, w, offsets, *rest = inputs
    bias, gather = (*rest, None, None)[:2]
    ctx.num_inputs, ctx.has_bias = len(inputs), bias is not None
    ctx.save_for_backward(x, w, offsets, gather)


def grouped_gemm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, w, offsets, gather = ctx.saved_tensors
    wanted = (*ctx.needs_input_grad, False, False)
    grad = grad.to(x.dtype)
    grad_x = grad_w = grad_bias = None
    if wanted[0]:
        grad_x = grad_of_x(grad, w, offsets, gather, x)
    if wanted[1]:
        grad_w = torch.ops.effk.moe_grouped_wgrad(grad, x, offsets, gather)
    if ctx.has_bias and wanted[3]:
        ones = grad.new_ones(grad.shape[0], 1)
        grad_bias = torch.ops.effk.moe_grouped_wgrad(ones, grad, offsets)[:, 0]
    return (grad_x, grad_w, None, grad_bias, None)[: ctx.num_inputs]


def grouped_wgrad_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, x, offsets, *rest = inputs
    gather = (*rest, None)[0]
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(grad, x, offsets, gather)


def grouped_wgrad_backward(ctx: Any, of_w: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, offsets, gather = ctx.saved_tensors
    of_w = of_w.to(x.dtype)
    of_grad = of_x = None
    if ctx.needs_input_grad[0]:
        of_grad = torch.ops.effk.moe_grouped_gemm(x, of_w, offsets, gather=gather)
    if ctx.needs_input_grad[1]:
        of_x = grad_of_x(grad, of_w, offsets, gather, x)
    return (of_grad, of_x, None, None)[: ctx.num_inputs]


def combine_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, inverse, weights = ctx.saved_tensors
    k, rows = inverse.shape[-1], y.shape[0]
    place = inverse.reshape(-1).long()
    there = (place >= 0) & (place < rows)
    tokens = math.prod(inverse.shape[:-1])
    grad2 = grad.reshape(tokens, y.shape[1]).float().repeat_interleave(k, 0)  # [T k, K]
    grad_y = grad_weights = None
    if ctx.needs_input_grad[0]:
        grad_y = summed(weights.reshape(-1, 1) * grad2, place, there, rows).to(y.dtype)
    if ctx.needs_input_grad[2]:
        padded = torch.nn.functional.pad(y, (0, 0, 0, 1))  # of -1: a row past the last
        of_pair = (padded[torch.where(there, place, rows)].float() * grad2).sum(-1)
        grad_weights = torch.where(there, of_pair, 0.0).reshape(weights.shape)
    return grad_y, None, grad_weights


def mlp_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.activation = keyword_only_inputs["activation"]
    ctx.save_for_backward(*inputs)


def mlp_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The forward pass is made again, up to what is between the two products."""
    x, w13, w2, weights, ids = ctx.saved_tensors
    k, shape = ids.shape[-1], (math.prod(x.shape[:-1]), x.shape[-1])
    perm, inverse, offsets = torch.ops.effk.moe_sort(ids, w2.shape[0])
    of_x, of_w13, of_w2, of_weight = of_layer(
        x.reshape(shape),
        grad.reshape(shape).to(x.dtype),
        w13,
        w2,
        weights.reshape(-1)[perm],
        perm // max(1, k),
        offsets,
        ctx.activation,
        ctx.needs_input_grad,
    )
    if of_weight is not None:
        of_weight = of_weight[inverse.reshape(-1)].reshape(weights.shape)
    if of_x is not None:
        of_x = torch.ops.effk.moe_combine(of_x, inverse, torch.ones_like(weights)).to(x.dtype).reshape(x.shape)
    return of_x, of_w13, of_w2, of_weight, None


def of_layer(
    x: Tensor,
    grad: Tensor,
    w13: Tensor,
    w2: Tensor,
    weight: Tensor,
    token: Tensor,
    offsets: Tensor,
    activation: str,
    wanted: tuple[bool, ...] = (True,) * 4,
) -> tuple[Tensor | None, ...]:
    """Of pairs sorted by expert.

    Args:
        x, grad: [T, K], a layer's input and the gradient of its result, in x's dtype.
        weight, token: [n] of each pair.
        wanted: which of the results.

    Returns:
        [n, K] float32 of each pair's x, those of w13 and w2, and [n] float32 of weights.
    """
    kept = kept_rows(offsets, token.shape[0])
    weight = torch.where(kept, weight[:, None], 0.0)
    z = torch.ops.effk.moe_grouped_gemm(x, w13, offsets, gather=token, out_dtype=torch.float32)
    h = reference.activated(z, activation).to(x.dtype)
    # Of h, if all weights were 1.
    of_h = torch.ops.effk.moe_grouped_gemm(grad, w2.transpose(1, 2), offsets, gather=token, out_dtype=torch.float32)
    of_x = of_w13 = of_w2 = of_weight = None
    if wanted[3]:
        of_weight = torch.where(kept[:, 0], (h.float() * of_h).sum(-1), 0.0)
    if wanted[2]:
        of_w2 = torch.ops.effk.moe_grouped_wgrad((weight * grad[token].float()).to(x.dtype), h, offsets)
    if wanted[0] or wanted[1]:
        of_z = activation_backward(weight * of_h, z, activation).to(x.dtype)
        if wanted[1]:
            of_w13 = torch.ops.effk.moe_grouped_wgrad(of_z, x, offsets, token)
        if wanted[0]:
            of_x = torch.ops.effk.moe_grouped_gemm(of_z, w13.transpose(1, 2), offsets, out_dtype=torch.float32)
    return of_x, of_w13, of_w2, of_weight


def activation_backward(grad: Tensor, z: Tensor, activation: str) -> Tensor:
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


def mlp_ep_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.options = {name: keyword_only_inputs[name] for name in ("activation", "stages")}
    *tensors, ctx.group = inputs
    ctx.save_for_backward(*tensors)


def mlp_ep_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("effk::moe_mlp_ep has no second derivatives: differentiate without create_graph")
    found = torch.ops.effk.moe_mlp_ep_backward(grad, *ctx.saved_tensors, ctx.group, **ctx.options)
    return (*found, None, None)
