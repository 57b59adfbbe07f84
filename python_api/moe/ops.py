"""The ops of moe as documented functions, with what torch needs to know of them beside the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import op
from . import expert_parallel, gradients, reference

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


def _fake_mlp_ep(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    group: str,
    *,
    activation: str = "swiglu",
    stages: int = 0,
    gemm: str = "auto",
) -> Tensor:
    expert_parallel.check_mlp_ep("moe_mlp_ep", x, w13, w2, weights, ids, activation, stages, gemm)
    return x.new_empty(x.shape)


def _fake_mlp_ep_backward(
    grad: Tensor,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    group: str,
    *,
    activation: str = "swiglu",
    stages: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    expert_parallel.check_mlp_ep_backward(grad, x, w13, w2, weights, ids, activation, stages)
    return x.new_empty(x.shape), w13.new_empty(w13.shape), w2.new_empty(w2.shape), weights.new_empty(weights.shape)


# --- The ops ---------------------------------------------------------------------------------------------------------


@op(
    reference=reference.moe_route,
    fake=_fake_route,
    triton=f"{TRITON}:moe_route",
    setup_context=gradients.route_context,
    backward=gradients.route_backward,
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
    setup_context=gradients.grouped_gemm_context,
    backward=gradients.grouped_gemm_backward,
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
    setup_context=gradients.grouped_wgrad_context,
    backward=gradients.grouped_wgrad_backward,
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
    setup_context=gradients.combine_context,
    backward=gradients.combine_backward,
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
    setup_context=gradients.mlp_context,
    backward=gradients.mlp_backward,
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


@op(
    reference=expert_parallel.moe_mlp_ep,
    fake=_fake_mlp_ep,
    triton=None,
    composite=True,
    setup_context=gradients.mlp_ep_context,
    backward=gradients.mlp_ep_backward,
    collective=True,
)
def moe_mlp_ep(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    group: str,
    *,
    activation: str = "swiglu",
    stages: int = 0,
    gemm: str = "auto",
) -> Tensor:
    """`moe_mlp` with its experts shared out over the ranks of a process group, each rank with tokens of its own.

    Rank r of W has experts r E/W to (r + 1) E/W. A token goes once to each rank that has experts of it, and one sum
    comes back from there. With more stages than one, a rank's experts are cut into as many parts: while those of one
    compute, tokens of the next are under way, and sums of tokens that are through. This is EPS-MoE's pipeline (Qian et
    al., 2024, arXiv:2410.12247); their choice of the number of stages is here `effk.moe.overlap`. Exchanges are
    torch.distributed's `all_to_all_single`, whatever the group's backend. Waits for the device, since numbers of rows
    are needed there. Differentiable in x, w13, w2 and weights.

    All ranks have to call this, with the same sizes but for the number of tokens, which may be 0; where results are
    differentiated, all ranks have to.

    Args:
        x: [..., K], this rank's tokens: float32, float16 or bfloat16, any strides.
        w13, w2: this rank's experts, as of `moe_mlp`; as many on each rank.
        weights: [..., k] float32.
        ids: [..., k] int32 or int64: numbers of experts among those of all ranks, -1 for none.
        group: the `group_name` of a process group of torch.distributed.
        activation, gemm: as of `moe_mlp`.
        stages: how many; at most the rank's experts count, and of ranks that want different numbers the least. 0: what
            takes least time by a model of costs, which the group's first call measures, in some seconds. A result has
            the same bits whatever their number, on a CPU.

    Returns:
        Shape and dtype of x. Sums of a rank's experts are rounded to x's dtype before they are added up.

    Raises:
        RuntimeError: wrong dtypes, shapes or names, and on a CPU ids out of range, of this rank or of another, which
            all ranks raise; sizes that differ between ranks; no such group; whatever torch.distributed raises when a
            rank is lost or doesn't call within the group's timeout.
    """
    return torch.ops.effk.moe_mlp_ep(x, w13, w2, weights, ids, group, activation=activation, stages=stages, gemm=gemm)


@op(
    reference=expert_parallel.moe_mlp_ep_backward,
    fake=_fake_mlp_ep_backward,
    triton=None,
    composite=True,
    collective=True,
)
def moe_mlp_ep_backward(
    grad: Tensor,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    group: str,
    *,
    activation: str = "swiglu",
    stages: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `moe_mlp_ep`: tokens go to the ranks of their experts once more, with their gradients.

    Nothing is kept of the forward pass but its inputs. All ranks have to call this. Not differentiable.

    Args:
        grad: of the result, shaped as x, any float dtype.
        x, w13, w2, weights, ids, group, activation, stages: as of `moe_mlp_ep`.

    Returns:
        Those of x, w13, w2 and weights.

    Raises:
        RuntimeError: as `moe_mlp_ep`.
    """
    return torch.ops.effk.moe_mlp_ep_backward(
        grad, x, w13, w2, weights, ids, group, activation=activation, stages=stages
    )
