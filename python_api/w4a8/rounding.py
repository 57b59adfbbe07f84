"""Better than rounding to nearest: clipping by search, and GPTQ's error feedback."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .calibrate import in_4_bits
from .reference import Packed, grouped, ungrouped

SHRINKS = tuple(1 - i / 40 for i in range(21))  # of a group's range; 1 comes first


def clipped(w: Tensor, group_size: int, importance: Tensor | None = None) -> Tensor:
    """The weight with each group clamped to the part of its range that 4 bits represent best.

    Args:
        w: [N, K].
        group_size: as packed.
        importance: [K], how much the squared error of each input feature counts; equally by default.

    Returns:
        [N, K] float32: rounding it to 4 bits makes sum(importance * error^2) of no group larger than rounding w.
    """
    groups = grouped(w, group_size)
    weights = 1.0 if importance is None else grouped(importance, group_size)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    best, least = groups, groups.new_full(low.shape, torch.inf)
    for shrink in SHRINKS:
        tried = groups.clamp(shrink * low, shrink * high)
        rounded = grouped(in_4_bits(ungrouped(tried, w.shape[1]), group_size), group_size)
        error = (weights * (rounded - groups).square()).sum(-1, keepdim=True)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return ungrouped(best, w.shape[1])


def feedback(moments: Tensor, damping: float) -> Tensor:
    """Upper triangular U with U^T U = the inverse of the damped second moments: row k says how to correct after k.

    Once w[k] is off by e, the best correction of the columns after k, which aren't rounded yet, is to take
    e / U[k, k] * U[k, after k] away from them.

    Args:
        moments: [K, K], symmetric, not all zero.
        damping: added to the diagonal, relative to its mean.

    Returns:
        [K, K] float32.

    Raises:
        ValueError: the moments aren't positive definite in spite of the damping.
    """
    h = moments.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype, device=h.device)
    # The factor wanted is that of H = M M^T with M upper triangular, whose inverse is U: a Cholesky decomposition with
    # rows and columns counted from the end.
    lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
    if failed:
        raise ValueError(f"second moments of the inputs are singular with damping {damping}; a larger one helps")
    upper = lower.flip(0, 1)
    return torch.linalg.solve_triangular(upper, torch.eye(len(h), dtype=h.dtype, device=h.device), upper=True).float()


def gptq(
    w: Tensor, moments: Tensor, is8: Tensor, group_size: int, *, clip: bool = False, damping: float = 0.01
) -> Packed:
    """Rounds a weight so that its product with inputs like the calibration's stays close: GPTQ (arXiv:2210.17323).

    Input features are rounded one after the other; each one's error is made up for, as far as inputs are correlated,
    by those that follow. Scales and zero points of a group are set when its turn comes.

    Args:
        w: [N, K], float32, float16 or bfloat16.
        moments: [K, K] float32, the sum of x x^T over inputs x.
        is8: [N] bool.
        group_size: as packed.
        clip: whether 4-bit groups are clipped first, as in `clipped`.
        damping: as in `feedback`.

    Returns:
        The packed weight.

    Raises:
        ValueError: as in `feedback`.
    """
    n, cols = w.shape
    correct = feedback(moments, damping)
    perm, n8 = reference.order(is8, n, w.device)
    n4 = n - n8
    columns = w[perm.long()].float().mT.contiguous()  # [K, N]: corrected as the work proceeds
    is4 = torch.arange(n, device=w.device) < n4
    low, high = torch.where(is4, 0.0, -127.0), torch.where(is4, 15.0, 127.0)
    q = torch.empty_like(columns)
    groups = reference.ceil_div(cols, group_size)
    scales, zeros = columns.new_zeros(2, groups, n)
    for g in range(groups):
        span = slice(g * group_size, min((g + 1) * group_size, cols))
        block, u = columns[span], correct[span, span]
        rows = block.mT
        rows4 = clipped(rows[:n4], group_size, moments.diagonal()[span]) if clip else rows[:n4]
        _, scale4, zero4 = reference.asymmetric(rows4, group_size)
        _, scale8 = reference.symmetric(rows[n4:], group_size)
        scale = scales[g] = torch.cat([scale4, scale8])[:, 0]
        zero = zeros[g] = torch.cat([zero4, torch.zeros_like(scale8)])[:, 0]
        errors = torch.empty_like(block)
        for j, column in enumerate(block):
            rounded = q[span][j] = torch.clamp((column / scale).round() + zero, low, high)
            errors[j] = (column - (rounded - zero) * scale) / u[j, j]
            block[j + 1 :].addr_(u[j, j + 1 :], errors[j], alpha=-1)
        columns[span.stop :] -= correct[span, span.stop :].mT @ errors
    q = q.nan_to_num(nan=0).mT
    scale, zero = scales.mT, zeros.mT
    return reference.pack_integers(q[:n4], scale[:n4], zero[:n4], q[n4:], scale[n4:], perm)
