"""The ops of lora as documented functions, with what torch needs to know of them beside the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._registry import op
from . import reference

TRITON = "effk.kernels.lora.triton"


def _fake_of(op: str) -> Callable[..., None]:
    """Of lora_merge_ and lora_unmerge_."""

    def fake(
        w: Sequence[Tensor],
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        ids: Tensor,
        gates: Tensor,
        base: Sequence[Tensor] | None = None,
        ranks: Tensor | None = None,
        *,
        scale: float = 1.0,
    ) -> None:
        reference.check_merge(op, w, a, b, {"": (ids, gates)}, base, ranks)

    return fake


def _fake_switch_(
    w: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    old_ids: Tensor,
    old_gates: Tensor,
    new_ids: Tensor,
    new_gates: Tensor,
    base: Sequence[Tensor] | None = None,
    ranks: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> None:
    lists = {"old_": (old_ids, old_gates), "new_": (new_ids, new_gates)}
    reference.check_merge("lora_switch_", w, a, b, lists, base, ranks)


def _fake_apply(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    ids: Tensor,
    gates: Tensor,
    y: Tensor | None = None,
    ranks: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    reference.check_apply(x, a, b, ids, gates, y, ranks)
    return x.new_empty((*x.shape[:-1], b.shape[1]))


def _apply_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    x, a, b, ids, gates, *rest = inputs
    y, ranks = (*rest, None, None)[:2]
    ctx.scale, ctx.num_inputs = keyword_only_inputs["scale"], len(inputs)
    ctx.has_y = y is not None
    ctx.save_for_backward(x, a, b, ids, gates, ranks)


def _apply_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """All adapters' rows at once, those that a token doesn't use times 0: no wait for the device, whatever the ids."""
    x, a, b, ids, gates, ranks = ctx.saved_tensors
    wanted = (*ctx.needs_input_grad, False, False)
    adapters, rank, cols = a.shape
    rows = b.shape[1]
    tokens, pairs = math.prod(x.shape[:-1]), ids.shape[-1]
    x2, grad2 = x.reshape(tokens, cols), grad.reshape(tokens, rows).to(x.dtype)
    gates2 = gates.reshape(tokens, pairs)
    ids2 = ids.reshape(tokens, pairs)
    ids2 = torch.where((ids2 >= 0) & (ids2 < adapters), ids2, -1)  # a GPU takes what is out of range for -1
    used = torch.ones(adapters, rank, dtype=torch.bool, device=x.device)
    if ranks is not None:
        used = torch.arange(rank, device=x.device) < ranks[:, None]
    factor = reference.factors(ids2, gates2, ctx.scale, adapters)
    factor = (factor[..., None] * used).reshape(tokens, adapters * rank)  # [T, E R]
    selected = factor != 0
    a2, b2 = a.reshape(adapters * rank, cols), b.transpose(1, 2).reshape(adapters * rank, rows)
    of_b = grad2.float() @ b2.float().T
    inner_grad = torch.where(selected, of_b * factor, 0.0)
    grad_x = grad_a = grad_b = grad_gates = None
    if wanted[0]:
        somewhere = selected.any(0)[:, None]  # what no token uses may hold NaN
        grad_x = (inner_grad @ torch.where(somewhere, a2, 0.0).float()).to(x.dtype).reshape(x.shape)
    # Likewise tokens that use nothing: padding.
    active = selected.any(1, keepdim=True)
    if wanted[1]:
        grad_a = (inner_grad.T @ torch.where(active, x2, 0.0).float()).to(a.dtype).reshape(a.shape)
    if wanted[2] or wanted[4]:
        inner = x2.float() @ a2.float().T
        if wanted[2]:
            inner_used = torch.where(selected, inner * factor, 0.0)
            grad_b = inner_used.T @ torch.where(active, grad2, 0.0).float()
            grad_b = grad_b.to(b.dtype).reshape(adapters, rank, rows).transpose(1, 2)
        if wanted[4]:
            # A gate of 0 has a gradient too, so nothing but a token's own pairs is asked what it selects.
            products = (inner * of_b).reshape(tokens, adapters, rank)
            of_adapter = torch.where(used, products, 0.0).sum(-1) * ctx.scale
            of_adapter = torch.nn.functional.pad(of_adapter, (0, 1))  # of -1
            grad_gates = of_adapter.gather(1, torch.where(ids2 < 0, adapters, ids2).long()).reshape(gates.shape)
    grad_y = grad.to(x.dtype) if ctx.has_y and wanted[5] else None
    return (grad_x, grad_a, grad_b, None, grad_gates, grad_y, None)[: ctx.num_inputs]


@op(reference=reference.lora_merge_, fake=_fake_of("lora_merge_"), triton=f"{TRITON}:lora_merge_")
def lora_merge_(
    w: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ids: Tensor,
    gates: Tensor,
    base: Sequence[Tensor] | None = None,
    ranks: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> None:
    """Merges adapters into the weights of all layers: w = base + scale * sum over pairs of gate * B A, in one call.

    The method is LoRA-Switch's (Kong et al., 2024, arXiv:2405.17741); `base` is an addition of effk's: with it
    nothing drifts, whatever was merged before. The sum is made in float32 and rounded once. Gates of the same adapter
    add up first (in float64); of adapters whose gates add up to 0 nothing is read. Adapters are added by ascending
    number, so the order of pairs matters to the rounding of such sums only. Products of three numbers may overflow or
    vanish on the way, in an order that depends on the back end. No gradients: for autograd w is changed in place. On a
    GPU ids and gates are read there, without waiting for the device, so that a CUDA graph can hold the call.

    Args:
        w: the layers' weights, changed in place: [N, K], float32, float16 or bfloat16, all of one dtype, rows
            contiguous. N and K may differ between layers. None may share memory with any other tensor of the call.
            On a GPU rows begin less than 2^32 elements apart.
        a: for each layer [E, R, K], contiguous, of w's dtype: E adapters' first factors. R may differ between layers.
        b: for each layer [E, N, R], likewise: the second factors.
        ids: [k] int32 or int64, k <= 1024: the adapters to merge, -1 for none; one may come more than once.
        gates: [k] float32.
        base: the weights without adapters, each like its w; w itself by default.
        ranks: [E] int32 or int64, how much of R each adapter uses, in all layers (where R is smaller, all of it).
        scale: a factor of all gates.

    Returns:
        Nothing.

    Raises:
        RuntimeError: wrong dtypes, shapes or strides, shared memory; on a CPU also ids or ranks out of range. On a GPU
            such ids count as -1 and ranks are clamped.
    """
    torch.ops.effk.lora_merge_(w, a, b, ids, gates, base, ranks, scale=scale)


@op(reference=reference.lora_unmerge_, fake=_fake_of("lora_unmerge_"), triton=f"{TRITON}:lora_unmerge_")
def lora_unmerge_(
    w: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ids: Tensor,
    gates: Tensor,
    base: Sequence[Tensor] | None = None,
    ranks: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> None:
    """Takes adapters out of the weights again: with `base` a copy of it, without it w - scale * sum of gate * B A.

    Without `base` the weights come back with the rounding errors of both ways.

    Args:
        w, a, b, base, ranks, scale: as of `lora_merge_`.
        ids, gates: what was merged.

    Returns:
        Nothing.

    Raises:
        RuntimeError: as `lora_merge_`.
    """
    torch.ops.effk.lora_unmerge_(w, a, b, ids, gates, base, ranks, scale=scale)


@op(reference=reference.lora_switch_, fake=_fake_switch_, triton=f"{TRITON}:lora_switch_")
def lora_switch_(
    w: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    old_ids: Tensor,
    old_gates: Tensor,
    new_ids: Tensor,
    new_gates: Tensor,
    base: Sequence[Tensor] | None = None,
    ranks: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> None:
    """Exchanges merged adapters for others in one pass over the weights of all layers.

    With `base`, w = base + scale * sum of new gates * B A, the same bits as one merge, whatever happened before.
    Without it, in place as in LoRA-Switch (arXiv:2405.17741): w + scale * (sum over new - sum over old), where
    adapters that keep their gates aren't touched. Each such switch rounds w once, and the errors add up: in bfloat16
    they are half as large as the update itself after about a thousand switches.

    Args:
        w, a, b, base, ranks, scale: as of `lora_merge_`.
        old_ids, old_gates: [k] each, what was merged; without effect where base is given.
        new_ids, new_gates: [k'] each, what is to be merged, as ids and gates of `lora_merge_`.

    Returns:
        Nothing.

    Raises:
        RuntimeError: as `lora_merge_`.
    """
    torch.ops.effk.lora_switch_(w, a, b, old_ids, old_gates, new_ids, new_gates, base, ranks, scale=scale)


@op(
    reference=reference.lora_apply,
    fake=_fake_apply,
    triton=f"{TRITON}:lora_apply",
    setup_context=_apply_context,
    backward=_apply_backward,
)
def lora_apply(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    ids: Tensor,
    gates: Tensor,
    y: Tensor | None = None,
    ranks: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    """Every token through adapters of its own, not merged: y + scale * sum over its pairs of gate * B (A x).

    Tokens are grouped by adapter inside, so that each adapter is read once. Sums, and A x, are kept in float32; the
    result is rounded once. Gates of a token's same adapter add up first (in float64); adapters whose gates add up to 0
    have no part in it, whatever they hold. Differentiable in x, a, b, gates and y; there, NaN in an adapter or token
    that is used may reach all tokens of the call.

    Args:
        x: [..., K], float32, float16 or bfloat16, any strides.
        a: [E, R, K], contiguous, of x's dtype: E adapters' first factors.
        b: [E, N, R], likewise: the second factors.
        ids: [..., k] int32 or int64, k <= 1024: each token's adapters, -1 for none; one may come more than once.
        gates: [..., k] float32.
        y: [..., N] of x's dtype, any strides: what the result is added to, and isn't changed; zeros by default.
        ranks: [E] int32 or int64, how much of R each adapter uses.
        scale: a factor of all gates.

    Returns:
        [..., N] of x's dtype.

    Raises:
        RuntimeError: wrong dtypes, shapes or strides; on a CPU also ids or ranks out of range. On a GPU such ids count
            as -1 and ranks are clamped.
    """
    return torch.ops.effk.lora_apply(x, a, b, ids, gates, y, ranks, scale=scale)
