"""moe on the emulated device. As csrc/moe/moe.cu: it checks, allocates and launches."""

from __future__ import annotations

import math

import torch
from effk.moe import reference
from torch import Tensor

from . import Device, module, number_of_type

# Of devices that there might be: blocks that take all tiles, some of them, and one each.
NUM_SMS = (1, 2, 132)
# Of moe_grouped_gemm, which has no such argument: what is chosen, and each of the three.
TILINGS = ("auto", "few", "some", "many")

Matrix = tuple[int, int, int, int]
Weights = tuple[int, int, int, int, int]


def _indices(device: Device, name: str, t: Tensor | None) -> tuple[int, bool]:
    return (0, False) if t is None else (device.input(name, t.contiguous()), t.dtype == torch.int64)


def _matrix(device: Device, name: str, t: Tensor) -> Matrix:
    """Any tensor as rows of its last dimension, copied only if its columns don't follow each other."""
    rows, cols = math.prod(t.shape[:-1]), t.shape[-1]
    flat = t if t.dim() == 2 else t.reshape(rows, cols)
    if cols > 1 and flat.stride(1) != 1:
        flat = flat.contiguous()
    return rows, cols, device.input(name, flat), flat.stride(0)


def _weights(device: Device, name: str, w: Tensor) -> Weights:
    if w.shape[2] > 1 and w.stride(2) != 1:
        w = w.contiguous()
    return w.shape[0], w.shape[1], device.input(name, w), w.stride(0), w.stride(1)


def _num_sms(*tensors: Tensor) -> int:
    return NUM_SMS[sum(sum(t.shape) for t in tensors) % len(NUM_SMS)]


def _gemm(name: str) -> int:
    return reference.GEMMS.index(name) - 1


def _tiling(name: str) -> int:
    return ("auto", "few", "some", "many").index(name) - 1


def moe_route(
    logits: Tensor, k: int, bias: Tensor | None = None, *, score: str = "softmax", renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    reference.check_route(logits, k, bias, score)
    shape = (*logits.shape[:-1], k)
    weights, ids = logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)
    with Device() as device:
        tokens, experts, address, stride = _matrix(device, "logits", logits)
        module().moe_route(
            number_of_type(logits),
            tokens,
            experts,
            k,
            address,
            stride,
            device.input("bias", None if bias is None else bias.contiguous()),
            list(reference.SCORES).index(score),
            renormalize,
            device.output("weights", weights),
            device.output("ids", ids),
            _num_sms(logits),
        )
    return weights, ids


def moe_sort(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    reference.check_sort(ids, num_experts)
    perm = ids.new_empty(ids.numel(), dtype=torch.int64)
    inverse = ids.new_empty(ids.shape, dtype=torch.int64)
    offsets = ids.new_empty(num_experts, dtype=torch.int32)
    with Device() as device:
        results = [device.output(n, t) for n, t in (("perm", perm), ("inverse", inverse), ("offsets", offsets))]
        module().moe_sort(_indices(device, "ids", ids), ids.numel(), num_experts, *results)
    return perm, inverse, offsets


def moe_grouped_gemm(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    gather: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    rows = reference.check_grouped_gemm(x, w, offsets, bias, gather, out_dtype)
    y = x.new_empty(rows, w.shape[1], dtype=out_dtype or x.dtype)
    with Device() as device:
        module().moe_grouped_gemm(
            number_of_type(x),
            _matrix(device, "x", x),
            _weights(device, "w", w),
            _indices(device, "offsets", offsets),
            rows,
            _indices(device, "gather", gather),
            device.input("bias", None if bias is None else bias.contiguous()),
            number_of_type(y),
            device.output("y", y),
            _tiling(TILINGS[(rows + sum(w.shape)) % len(TILINGS)]),
            _num_sms(x, w),
        )
    return y


def moe_grouped_wgrad(grad: Tensor, x: Tensor, offsets: Tensor, gather: Tensor | None = None) -> Tensor:
    reference.check_grouped_wgrad(grad, x, offsets, gather)
    dw = x.new_empty(offsets.shape[0], grad.shape[1], x.shape[1])
    with Device() as device:
        module().moe_grouped_wgrad(
            number_of_type(x),
            _matrix(device, "grad", grad),
            _matrix(device, "x", x),
            _indices(device, "offsets", offsets),
            offsets.shape[0],
            _indices(device, "gather", gather),
            device.output("dw", dw),
            _num_sms(grad, x),
        )
    return dw


def moe_combine(y: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    reference.check_combine(y, inverse, weights)
    out = y.new_empty(*inverse.shape[:-1], y.shape[1])
    with Device() as device:
        module().moe_combine(
            number_of_type(y),
            _matrix(device, "y", y),
            math.prod(inverse.shape[:-1]),
            inverse.shape[-1],
            _indices(device, "inverse", inverse),
            device.input("weights", weights.contiguous()),
            device.output("out", out),
        )
    return out


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
    reference.check_mlp(x, w13, w2, weights, ids, activation, gemm)
    y = x.new_empty(x.shape)
    _mlp(y, False, x, w13, w2, weights, ids, activation, gemm)
    return y


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
    reference.check_mlp_(y, x, w13, w2, weights, ids, activation, gemm)
    _mlp(y, True, x, w13, w2, weights, ids, activation, gemm)


def _mlp(
    y: Tensor,
    adds: bool,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    activation: str,
    gemm: str,
) -> None:
    with Device() as device:
        module().moe_mlp(
            number_of_type(x),
            _matrix(device, "x", x),
            _weights(device, "w13", w13),
            _weights(device, "w2", w2),
            ids.shape[-1],
            _indices(device, "ids", ids),
            device.input("weights", weights.contiguous()),
            list(reference.ACTIVATIONS).index(activation),
            _gemm(gemm),
            device.inout("y", y) if adds else device.output("y", y),
            adds,
            _num_sms(x, w13),
        )


OPS = {
    "moe_route": moe_route,
    "moe_sort": moe_sort,
    "moe_grouped_gemm": moe_grouped_gemm,
    "moe_grouped_wgrad": moe_grouped_wgrad,
    "moe_combine": moe_combine,
    "moe_mlp": moe_mlp,
    "moe_mlp_": moe_mlp_,
}
