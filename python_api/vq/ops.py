"""The ops of vq as documented functions, with what torch needs to know of them beside the kernels.

Letters: B batch, H query heads, HK key heads, G = H / HK, D head size, S keys, m subspaces, C words of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._registry import op
from .._sums import sum_rows
from . import reference

TRITON = "effk.kernels.vq.triton"


# --- Shapes ----------------------------------------------------------------------------------------------------------


def _fake_metric(q: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    reference.check_metric(q, eps)
    shape = (q.shape[0], q.shape[2], q.shape[2])
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


def _fake_train(
    keys: Tensor,
    num_codes: int,
    chol: Tensor | None = None,
    *,
    num_subspaces: int = 1,
    iters: int = 20,
    seed: int = 0,
) -> Tensor:
    reference.check_train(keys, num_codes, chol, num_subspaces, iters)
    shape = (keys.shape[0], num_subspaces, num_codes, keys.shape[2] // num_subspaces)
    return keys.new_empty(shape, dtype=torch.float32)


def _fake_encode(keys: Tensor, codebook: Tensor, chol: Tensor | None = None, *, pack: bool = False) -> Tensor:
    last, dtype = reference.check_encode(keys, codebook, chol, pack)
    return keys.new_empty(*keys.shape[:3], last, dtype=dtype)


def _fake_lut(q: Tensor, codebook: Tensor, inv: Tensor | None = None) -> Tensor:
    _, subspaces, words = reference.check_lut(q, codebook, inv)
    return q.new_empty(q.shape[0], q.shape[1], subspaces, words, dtype=torch.float32)


def _fake_score(lut: Tensor, codes: Tensor, lens: Tensor | None = None, *, table: str = "float32") -> Tensor:
    reference.check_score(lut, codes, lens, table)
    return lut.new_empty(lut.shape[0], lut.shape[1], codes.shape[2])


def _fake_topk(
    lut: Tensor,
    codes: Tensor,
    k: int,
    lens: Tensor | None = None,
    *,
    sink: int = 8,
    window: int = 64,
    union_group: bool = True,
    table: str = "float32",
) -> tuple[Tensor, Tensor]:
    _, _, lists, cap = reference.check_topk(lut, codes, k, lens, sink, window, union_group, table)
    return lut.new_empty(lut.shape[0], lists, cap, dtype=torch.int64), lut.new_empty(
        lut.shape[0], lists, dtype=torch.int64
    )


def _fake_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor | None = None,
    count: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    reference.check_attend(q, k, v, idx, count)
    return q.new_empty(*q.shape[:2], v.shape[3]), q.new_empty(*q.shape[:2], dtype=torch.float32)


def _fake_wrope(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    reference.check_wrope(q, cos, sin)
    return q.new_empty(q.shape)


# --- Gradients -------------------------------------------------------------------------------------------------------


def _attend_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    q, k, v, *rest = inputs
    idx, count = (*rest, None, None)[:2]
    ctx.num_inputs, ctx.scale = len(inputs), keyword_only_inputs["scale"]
    ctx.save_for_backward(q, k, v, idx, count, output[1])


def _attend_backward(ctx: Any, of_out: Tensor, of_lse: Tensor) -> tuple[Tensor | None, ...]:
    """The weights are made again from lse; keys that weren't attended to stay out, whatever they hold."""
    q, k, v, idx, count, lse = ctx.saved_tensors
    batch, key_heads, keys = k.shape[:3]
    scale = q.shape[2] ** -0.5 if ctx.scale is None else ctx.scale
    lists, cap = (key_heads, keys) if idx is None else idx.shape[1:]
    ends = cap if count is None else count[:, None, None] if idx is None else count[..., None]
    there = (torch.arange(cap, device=q.device) < ends).expand(batch, lists, cap)
    if idx is not None:
        there = there & (idx >= 0) & (idx < keys)
        place = torch.where(there, idx, 0).long()

    def rows(t: Tensor) -> Tensor:
        """[B, lists, cap, n] float32 on q's device, 0 where there is no key."""
        if idx is not None:
            t = t.repeat_interleave(lists // key_heads, 1) if lists > key_heads else t
            t = torch.take_along_dim(t, place.to(t.device)[..., None], 2)
        return torch.where(there[..., None], t.to(q.device).float(), 0.0)

    def back(of_rows: Tensor, like: Tensor) -> Tensor:
        """The gradient of k or v, from that of their rows."""
        if idx is not None:
            head = torch.arange(batch * lists, device=q.device) * key_heads // lists  # b * HK + its key head
            flat = (head.reshape(batch, lists, 1) * keys + place).masked_fill(~there, -1)
            summed = sum_rows(of_rows.flatten(0, 2), flat.flatten(), batch * key_heads * keys)
            of_rows = summed.reshape(batch, key_heads, keys, like.shape[3])
        return of_rows.to(like.device, like.dtype)

    def by_list(t: Tensor) -> Tensor:
        """[B, H, ...] as [B, lists, heads of one, ...] float32"""
        return t.float().unflatten(1, (lists, t.shape[1] // lists))

    q_rows, k_rows, of_out, of_lse = by_list(q), rows(k), by_list(of_out), by_list(of_lse)
    scores = scale * (q_rows @ k_rows.mT)
    seen = there[:, :, None] & (scores > -torch.inf)
    weights = torch.where(seen, scores - by_list(lse)[..., None], -torch.inf).exp()
    of_weights = of_out @ rows(v).mT
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True) + of_lse[..., None])
    of_scores = torch.where(seen, of_scores, 0.0)  # of_lse may be infinite where lse is
    grad_q = grad_k = grad_v = None
    if ctx.needs_input_grad[0]:
        grad_q = (scale * (of_scores @ k_rows)).flatten(1, 2).to(q.dtype)
    if ctx.needs_input_grad[1]:
        grad_k = back(scale * (of_scores.mT @ q_rows), k)
    if ctx.needs_input_grad[2]:
        grad_v = back(weights.mT @ of_out, v)
    return (grad_q, grad_k, grad_v, None, None)[: ctx.num_inputs]


# --- The ops ---------------------------------------------------------------------------------------------------------


@op(reference=reference.vq_metric, fake=_fake_metric, triton=None, composite=True)
def vq_metric(q: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """How much each direction of a key counts for the queries that will meet it (A²ATS, arXiv:2502.12665).

    A code c in the place of a key k changes the score of a query by q (k - c)^T, whose mean square over queries is
    (k - c) H (k - c)^T with H = q^T q, here divided by the root of the mean square of its entries. With H + eps I =
    L L^T that is |k L - c L|^2: codebooks are trained on k L, and a query meets them as q L^-T. Computed in float64.

    Args:
        q: [HK, n, D], float32, float16 or bfloat16: sample queries of each key head, those of its whole group.
        eps: what the metric gets in its diagonal, more than 0.

    Returns:
        chol [HK, D, D], L, and inv [HK, D, D], L^-T, float32. Both are the identity for a head whose queries are all
        zero, or that has none: plain vector quantization.

    Raises:
        RuntimeError: wrong dtypes or shapes; on a CPU also NaN or infinity in q, and an eps too small for float64. On
            a GPU these make the result NaN.
    """
    return torch.ops.effk.vq_metric(q, eps=eps)


@op(reference=reference.vq_train, fake=_fake_train, triton=None, composite=True)
def vq_train(
    keys: Tensor,
    num_codes: int,
    chol: Tensor | None = None,
    *,
    num_subspaces: int = 1,
    iters: int = 20,
    seed: int = 0,
) -> Tensor:
    """Codebooks of keys by k-means on k L, a codebook for each slice of D / m (A²ATS, arXiv:2502.12665).

    Starts from k-means++ (Arthur and Vassilvitskii, 2007) and makes Lloyd's steps; a word that no key is nearest to
    stays where it is. The same bits for the same seed and device.

    Args:
        keys: [HK, n, D], float32, float16 or bfloat16: sample keys, before RoPE.
        num_codes: C, the words of a codebook, up to n and 32768.
        chol: [HK, D, D] float32, L of `vq_metric`; None: the identity.
        num_subspaces: m, a divisor of D: how many slices a key is cut into.
        iters: Lloyd's steps.
        seed: of the random start.

    Returns:
        [HK, m, C, D / m] float32, words in the space of k L.

    Raises:
        RuntimeError: wrong dtypes or shapes; fewer keys than num_codes; on a CPU also NaN or infinity in keys. On a GPU
            these spoil their head's words.
    """
    return torch.ops.effk.vq_train(keys, num_codes, chol, num_subspaces=num_subspaces, iters=iters, seed=seed)


@op(reference=reference.vq_encode, fake=_fake_encode, triton=f"{TRITON}:vq_encode")
def vq_encode(keys: Tensor, codebook: Tensor, chol: Tensor | None = None, *, pack: bool = False) -> Tensor:
    """The nearest word of each slice of k L (A²ATS, arXiv:2502.12665).

    Nearest by |c|^2 - 2 x.c in float32, the lower code of equals; where float32 can't tell two distances, back ends may
    differ. A distance that is NaN is none, and a slice without any gets code 0.

    Args:
        keys: [B, HK, S, D], float32, float16 or bfloat16; copied first if its last dimension isn't contiguous.
        codebook: [HK, m, C, D / m] float32, as `vq_train` makes it, C up to 32768.
        chol: [HK, D, D] float32, L of `vq_metric`; None: the identity.
        pack: two codes in a byte, that of the even slice in the low half; for at most 16 words, and even m.

    Returns:
        [B, HK, S, m], uint8 up to 256 words, else int16; packed [B, HK, S, m / 2] uint8.

    Raises:
        RuntimeError: wrong dtypes or shapes; a codebook that can't be packed.
    """
    return torch.ops.effk.vq_encode(keys, codebook, chol, pack=pack)


@op(reference=reference.vq_lut, fake=_fake_lut, triton=f"{TRITON}:vq_lut")
def vq_lut(q: Tensor, codebook: Tensor, inv: Tensor | None = None) -> Tensor:
    """The dot products of each slice of q L^-T with its words: what `vq_score` adds up (A²ATS, arXiv:2502.12665).

    Args:
        q: [B, H, D], float32, float16 or bfloat16, any strides. For keys before RoPE: rotated by `vq_wrope`.
        codebook: [HK, m, C, D / m] float32, as `vq_train` makes it.
        inv: [HK, D, D] float32, L^-T of `vq_metric`; None: the identity.

    Returns:
        [B, H, m, C] float32.

    Raises:
        RuntimeError: wrong dtypes or shapes; H no multiple of HK.
    """
    return torch.ops.effk.vq_lut(q, codebook, inv)


@op(reference=reference.vq_score, fake=_fake_score, triton=f"{TRITON}:vq_score")
def vq_score(lut: Tensor, codes: Tensor, lens: Tensor | None = None, *, table: str = "float32") -> Tensor:
    """Approximate scores of all keys: for each the sum of the table entries that its codes name.

    With table="int8" a head's table is rounded to 8 bits first, with one step for all of it: low_j is the least entry
    of slice j, step = max_j(max_c lut[j, c] - low_j) / 255, t = round((lut - low_j) / step), half to even and at most
    255, and score = step * sum t + sum_j low_j, float32 operations as written, so that all back ends agree to the bit.
    A step of 0 makes all t 0. A score is off by at most m step / 2, beside what float32 loses. A table that holds NaN
    or infinity, or whose step is infinite, gives NaN.

    Args:
        lut: [B, H, m, C] float32, as `vq_lut` makes it.
        codes: [B, HK, S, m], or [B, HK, S, m / 2] for packed ones, as `vq_encode` makes them.
        lens: [B] int32 or int64: how many keys there are; codes behind them may be anything. None: S.
        table: "float32" or "int8" (m up to 256).

    Returns:
        [B, H, S] float32, -infinity from lens on.

    Raises:
        RuntimeError: wrong dtypes or shapes; on a CPU also lens and codes out of range. On a GPU these are clamped or
            masked.
    """
    return torch.ops.effk.vq_score(lut, codes, lens, table=table)


@op(reference=reference.vq_topk, fake=_fake_topk, triton=f"{TRITON}:vq_topk")
def vq_topk(
    lut: Tensor,
    codes: Tensor,
    k: int,
    lens: Tensor | None = None,
    *,
    sink: int = 8,
    window: int = 64,
    union_group: bool = True,
    table: str = "float32",
) -> tuple[Tensor, Tensor]:
    """The keys to attend to: the first, the last, and those between with the best scores (A²ATS, arXiv:2502.12665).

    Of equal scores the lower positions are taken, and NaN comes after all numbers. With table="int8" keys are ordered
    by the sums of 8-bit entries (see `vq_score`); where the scores of a head are NaN, all its keys are equal.

    Args:
        lut: [B, H, m, C] float32, as `vq_lut` makes it.
        codes: [B, HK, S, m], or [B, HK, S, m / 2] for packed ones, as `vq_encode` makes them.
        k: how many each head takes of the keys between sinks and window.
        lens: [B] int32 or int64: how many keys there are; codes behind them may be anything. None: S.
        sink: so many first keys are always taken.
        window: so many last keys before lens, too.
        union_group: one list for the heads that share keys, of what any of them takes; or else a list for each head.
        table: "float32" or "int8" (m up to 256), as in `vq_score`.

    Returns:
        idx [B, HK or H, cap] int64, ascending, no key twice, -1 from count on, where cap = min(S, sink + window + k G),
        without G for a list of one head; and count [B, HK or H] int64.

    Raises:
        RuntimeError: wrong dtypes or shapes; k, sink or window below 0; on a CPU also lens out of range, and codes of
            keys that have to be compared. On a GPU these are clamped or masked.
    """
    return torch.ops.effk.vq_topk(lut, codes, k, lens, sink=sink, window=window, union_group=union_group, table=table)


@op(
    reference=reference.vq_attend,
    fake=_fake_attend,
    triton=f"{TRITON}:vq_attend",
    setup_context=_attend_context,
    backward=_attend_backward,
)
def vq_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor | None = None,
    count: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention of one query a head over the chosen keys, or over all: softmax(scale q k^T) v.

    Sums are kept in float32. A key whose score is -infinity has no weight, and without any key out is 0 and lse
    -infinity; a score that is NaN or infinity makes both NaN. Results over parts of the keys join by their lse.
    Differentiable in q, k and v, by lse as well.

    Args:
        q: [B, H, D], float32, float16 or bfloat16, any strides.
        k: [B, HK, S, D] of q's dtype; copied first if its last dimension isn't contiguous. For a q on a GPU, k and v
            may be in pinned memory of the CPU.
        v: [B, HK, S, Dv], likewise.
        idx: [B, HK, cap] (one list for the heads of a group) or [B, H, cap], int32 or int64: the keys, as `vq_topk`
            gives them. One that is there twice counts twice. None: all keys.
        count: [B, HK or H], as idx, int32 or int64: how many of idx count (None: cap); without idx [B]: how many keys
            there are (None: S).
        scale: of the scores; D^-0.5 by default.

    Returns:
        out [B, H, Dv] of q's dtype, and lse [B, H] float32, the natural logarithm of the sum of e^score.

    Raises:
        RuntimeError: wrong dtypes or shapes; k in unpinned memory for a q on a GPU; on a CPU also idx and count out of
            range. On a GPU such entries are left out, and count is clamped.
    """
    return torch.ops.effk.vq_attend(q, k, v, idx, count, scale=scale)


@op(reference=reference.vq_wrope, fake=_fake_wrope, triton=f"{TRITON}:vq_wrope")
def vq_wrope(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Windowed RoPE: all queries rotated by one angle, for keys that aren't rotated at all (A²ATS, arXiv:2502.12665).

    The two halves (a, b) of the last dimension become (a cos - b sin, b cos + a sin), in float32, rounded once. With
    cos and sin of a constant distance, the scores of a rotated query with keys before RoPE are those that RoPE gives
    at that distance: codes of a key needn't know where it is.

    Args:
        q: [..., D], float32, float16 or bfloat16, any strides, even D.
        cos: [D / 2] float32 or of q's dtype.
        sin: likewise.

    Returns:
        Shaped as q, of its dtype.

    Raises:
        RuntimeError: wrong dtypes or shapes.
    """
    return torch.ops.effk.vq_wrope(q, cos, sin)
