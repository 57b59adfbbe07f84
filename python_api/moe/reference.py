"""moe written for reading: what every back end must compute."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import FLOATS, INDICES, MAX_SIDE, check_choice, check_range, check_sides, check_tensor, within

MAX_PAIRS = 2**30  # of a token and an expert
SCORES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid}
GEMMS = ("auto", "grouped", "dense")
TINY = torch.finfo(torch.float32).tiny

# Name -> function of the gates; None: no gates.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": None,
}

# --- Checks that need no look at the contents ------------------------------------------------------------------------


def check_rows(op: str, name: str, t: Tensor, most: int) -> None:
    """At least one dimension; at most so many elements (a number of rows that doesn't overflow)."""
    torch._check(t.dim() >= 1, lambda: f"effk::{op}: {name} has shape []; wanted at least one dimension")
    torch._check(
        within(t.shape[-1], MAX_SIDE),
        lambda: f"effk::{op}: {name} has shape {list(t.shape)}; wanted at most 2^30 columns",
    )
    torch._check(
        within(math.prod(t.shape[:-1]), most // max(1, t.shape[-1])),
        lambda: f"effk::{op}: {name} has shape {list(t.shape)}; wanted at most {most} elements",
    )


def check_weights(op: str, weights: Tensor, like: Tensor) -> None:
    check_tensor(op, "weights", weights, (torch.float32,), tuple(like.shape), like)


def check_sorted(op: str, x: Tensor, offsets: Tensor, gather: Tensor | None) -> int:
    """The number of sorted rows."""
    check_tensor(op, "x", x, FLOATS, (None, None))
    check_sides(op, "x", x)
    check_tensor(op, "offsets", offsets, INDICES, (None,), x)
    check_sides(op, "offsets", offsets)
    if gather is None:
        return x.shape[0]
    check_tensor(op, "gather", gather, INDICES, (None,), x)
    check_sides(op, "gather", gather)
    return gather.shape[0]


def check_grouped_gemm(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    gather: Tensor | None,
    out_dtype: torch.dtype | None,
) -> int:
    op = "moe_grouped_gemm"
    rows = check_sorted(op, x, offsets, gather)
    check_tensor(op, "w", w, (x.dtype,), (None, None, x.shape[1]), x)
    check_sides(op, "w", w)
    check_tensor(op, "offsets", offsets, INDICES, (w.shape[0],))
    if bias is not None:
        check_tensor(op, "bias", bias, (x.dtype,), (w.shape[0], w.shape[1]), x)
    torch._check(
        out_dtype is None or out_dtype in FLOATS,
        lambda: f"effk::{op}: out_dtype is {out_dtype}; wanted {', '.join(map(str, FLOATS))}",
    )
    return rows


def check_grouped_wgrad(grad: Tensor, x: Tensor, offsets: Tensor, gather: Tensor | None) -> None:
    op = "moe_grouped_wgrad"
    rows = check_sorted(op, x, offsets, gather)
    check_tensor(op, "grad", grad, (x.dtype,), (rows, None), x)
    check_sides(op, "grad", grad)


def check_route(logits: Tensor, k: int, bias: Tensor | None, score: str) -> None:
    op = "moe_route"
    check_tensor(op, "logits", logits, FLOATS)
    check_rows(op, "logits", logits, 2**50)
    experts = logits.shape[-1]
    torch._check(k >= 0, lambda: f"effk::{op}: k is {k}; wanted 0 to logits' {experts} experts")
    torch._check(k <= experts, lambda: f"effk::{op}: k is {k}; wanted 0 to logits' {experts} experts")
    torch._check(
        within(math.prod(logits.shape[:-1]), MAX_PAIRS // max(1, k)),
        lambda: f"effk::{op}: logits has shape {list(logits.shape)}; wanted at most 2^30 pairs",
    )
    if bias is not None:
        check_tensor(op, "bias", bias, (torch.float32,), (experts,), logits)
    check_choice(op, "score", score, SCORES)


def check_sort(ids: Tensor, num_experts: int) -> None:
    op = "moe_sort"
    check_tensor(op, "ids", ids, INDICES)
    check_rows(op, "ids", ids, MAX_PAIRS)
    torch._check(num_experts >= 0, lambda: f"effk::{op}: num_experts is {num_experts}; wanted 0 to 2^30")
    torch._check(num_experts <= MAX_SIDE, lambda: f"effk::{op}: num_experts is {num_experts}; wanted 0 to 2^30")


def check_combine(y: Tensor, inverse: Tensor, weights: Tensor) -> None:
    op = "moe_combine"
    check_tensor(op, "y", y, FLOATS, (None, None))
    check_sides(op, "y", y)
    check_tensor(op, "inverse", inverse, INDICES, None, y)
    check_rows(op, "inverse", inverse, MAX_PAIRS)
    check_weights(op, weights, inverse)


def check_mlp(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, activation: str, gemm: str, op: str = "moe_mlp"
) -> None:
    check_choice(op, "activation", activation, ACTIVATIONS)
    check_choice(op, "gemm", gemm, GEMMS)
    check_tensor(op, "x", x, FLOATS)
    check_rows(op, "x", x, 2**50)
    cols = x.shape[-1]
    check_tensor(op, "w2", w2, (x.dtype,), (None, cols, None), x)
    check_sides(op, "w2", w2)
    rows = w2.shape[2] * (1 if ACTIVATIONS[activation] is None else 2)
    check_tensor(op, "w13", w13, (x.dtype,), (w2.shape[0], rows, cols), x)
    check_sides(op, "w13", w13)
    check_tensor(op, "ids", ids, INDICES, None, x)
    check_rows(op, "ids", ids, MAX_PAIRS)
    torch._check(
        ids.dim() == x.dim() and ids.shape[:-1] == x.shape[:-1],
        lambda: f"effk::{op}: ids has shape {list(ids.shape)}; wanted x's leading sizes, x has shape {list(x.shape)}",
    )
    check_weights(op, weights, ids)


def check_mlp_(
    y: Tensor, x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, activation: str, gemm: str
) -> None:
    op = "moe_mlp_"
    check_mlp(x, w13, w2, weights, ids, activation, gemm, op)
    check_tensor(op, "y", y, (torch.float32,), tuple(x.shape), x)
    torch._check(y.is_contiguous(), lambda: f"effk::{op}: y has strides {y.stride()}; wanted it contiguous")


# --- Checks of the contents ------------------------------------------------------------------------------------------


def group_ends(op: str, offsets: Tensor, rows: int) -> list[int]:
    ends = offsets.tolist()
    for e, (before, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if not before <= end <= rows:
            raise RuntimeError(f"effk::{op}: offsets[{e}] is {end}; wanted ascending numbers up to {rows} rows")
    return ends


def sorted_rows(op: str, x: Tensor, gather: Tensor | None) -> Tensor:
    if gather is None:
        return x
    check_range(op, "gather", gather, 0, x.shape[0] - 1)
    return x[gather]


# --- The ops ---------------------------------------------------------------------------------------------------------


def moe_route(
    logits: Tensor, k: int, bias: Tensor | None = None, *, score: str = "softmax", renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    check_route(logits, k, bias, score)
    logits = logits.float()
    scores = SCORES[score](logits)
    by = logits if bias is None else scores + bias
    ids = by.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()
    weights = scores.gather(-1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=TINY)
    return weights, ids


def moe_sort(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    check_sort(ids, num_experts)
    check_range("moe_sort", "ids", ids, -1, num_experts - 1)
    flat = ids.reshape(-1).long()
    flat = torch.where(flat < 0, num_experts, flat)
    perm = flat.argsort(stable=True)
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(len(perm), device=ids.device)
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]
    return perm, inverse.reshape(ids.shape), counts.cumsum(0).int()


def moe_grouped_gemm(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    gather: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    op = "moe_grouped_gemm"
    rows = check_grouped_gemm(x, w, offsets, bias, gather, out_dtype)
    ends = group_ends(op, offsets, rows)
    x = sorted_rows(op, x, gather)
    y = x.new_zeros(rows, w.shape[1], dtype=torch.float32)
    for e, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        y[begin:end] = x[begin:end].float() @ w[e].float().T
        if bias is not None:
            y[begin:end] += bias[e].float()
    return y.to(out_dtype or x.dtype)


def moe_grouped_wgrad(grad: Tensor, x: Tensor, offsets: Tensor, gather: Tensor | None = None) -> Tensor:
    op = "moe_grouped_wgrad"
    check_grouped_wgrad(grad, x, offsets, gather)
    ends = group_ends(op, offsets, grad.shape[0])
    x = sorted_rows(op, x, gather)
    out = x.new_zeros(len(ends), grad.shape[1], x.shape[1])
    for e, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        out[e] = (grad[begin:end].float().T @ x[begin:end].float()).to(x.dtype)
    return out


def moe_combine(y: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    check_combine(y, inverse, weights)
    check_range("moe_combine", "inverse", inverse, -1, y.shape[0] - 1)
    total = y.new_zeros(*inverse.shape[:-1], y.shape[1], dtype=torch.float32)
    nothing = y.new_zeros(1, y.shape[1])  # the row of -1
    for j in range(inverse.shape[-1]):
        place = inverse[..., j].long()
        term = weights[..., j, None] * torch.cat([y, nothing])[place].float()
        total += torch.where(place[..., None] < 0, 0.0, term)
    return total.to(y.dtype)


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
    check_mlp(x, w13, w2, weights, ids, activation, gemm)
    y = torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    add_mlp("moe_mlp", y, x, w13, w2, weights, ids, activation)
    return y.to(x.dtype)


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
    check_mlp_(y, x, w13, w2, weights, ids, activation, gemm)
    add_mlp("moe_mlp_", y, x, w13, w2, weights, ids, activation)


def add_mlp(
    op: str, y: Tensor, x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, activation: str
) -> None:
    """To y, contiguous float32, by ascending expert."""
    check_range(op, "ids", ids, -1, w2.shape[0] - 1)
    tokens = math.prod(x.shape[:-1])
    x2, y2, ids2 = x.reshape(tokens, x.shape[-1]), y.view(tokens, x.shape[-1]), ids.reshape(tokens, ids.shape[-1])
    weights2 = weights.reshape(ids2.shape)
    for e in range(w2.shape[0]):
        for j in range(ids2.shape[1]):  # a token may name an expert twice
            token = (ids2[:, j] == e).nonzero()[:, 0]
            if len(token) == 0:
                continue
            h = activated(x2[token].float() @ w13[e].float().T, activation).to(x.dtype)
            y2[token] += weights2[token, j, None] * (h.float() @ w2[e].float().T)


def activated(z: Tensor, activation: str) -> Tensor:
    """Of products with w13, in float32."""
    function = ACTIVATIONS[activation]
    if function is None:
        return z.relu().square()
    gate, up = z.chunk(2, -1)
    return function(gate) * up
