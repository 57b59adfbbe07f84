"""w4a8 on the emulated device. As csrc/w4a8/w4a8.cu: it checks, chooses and launches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from effk.w4a8 import reference
from effk.w4a8.reference import BLOCK, CHUNK, Packed, ceil_div
from torch import Tensor

from . import Device, module, number_of_type

# Of devices that there might be: one that a small matrix fills, and one that it doesn't.
NUM_SMS = (1, 8, 132)
# As in the kernels' enum, or -1: what plan_linear says.
STREAM, SMALL_TILES, LARGE_TILES, PLANNED = 0, 1, 2, -1
kernel = PLANNED


@contextlib.contextmanager
def _for_contents(perm: Tensor) -> Iterator[None]:
    """Where perm is no permutation, kernels look up features that no row has, and do nothing worse."""
    corrupt = not torch.equal(perm.sort().values, torch.arange(perm.shape[0], dtype=torch.int32))
    module().allow_uninitialised(corrupt)
    try:
        yield
    finally:
        module().allow_uninitialised(False)


def _packed(device: Device, p: Packed, group_size: int) -> tuple[int, ...]:
    """Sizes and addresses."""
    n8, cols = p.q8.shape
    # Kernels want them aligned as new tensors are; views get copied.
    addresses = (device.input(name, t.clone()) for name, t in zip(p._fields, p, strict=True))
    return (p.perm.shape[0] - n8, n8, cols, group_size, *addresses)


def w4a8_quantize(x: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor]:
    reference.check_quantize(x, group_size)
    cols = x.shape[-1]
    flat = x.reshape(math.prod(x.shape[:-1]), cols)
    q = torch.empty(x.shape, dtype=torch.int8)
    scale = torch.empty(*x.shape[:-1], ceil_div(cols, group_size))
    with Device() as device:
        source = device.input("x", flat), *flat.stride()
        to = device.output("q", q), device.output("scale", scale)
        module().w4a8_quantize(number_of_type(x), flat.shape[0], cols, group_size, *source, *to)
    return q, scale


def w4a8_pack(w: Tensor, is8: Tensor | None = None, group_size: int = 128) -> Packed:
    reference.check_pack(w, is8, group_size)
    n, cols = w.shape
    perm = torch.empty(n, dtype=torch.int32)
    ends = None if is8 is None else is8.cumsum(0)
    with Device() as device:
        module().w4a8_order(device.input("ends", ends), n, device.output("perm", perm))
    n8 = 0 if ends is None or n == 0 else int(ends[-1])
    blocks4, blocks8, groups = ceil_div(n - n8, BLOCK), ceil_div(n8, BLOCK), ceil_div(cols, group_size)
    p = Packed(
        torch.empty(blocks4, ceil_div(cols, CHUNK), BLOCK, 4, dtype=torch.uint8),
        torch.empty(blocks4, groups, BLOCK),
        torch.empty(blocks4, groups, BLOCK, dtype=torch.uint8),
        torch.empty(n8, cols, dtype=torch.uint8),
        torch.empty(blocks8, groups, BLOCK),
        perm,
    )
    with Device() as device:
        addresses = [device.output(name, t) for name, t in zip(p._fields[:-1], p, strict=False)]
        to = n - n8, n8, cols, group_size, *addresses, device.input("perm", perm)
        module().w4a8_pack(to, number_of_type(w), device.input("w", w), *w.stride())
    return p


def w4a8_unpack(
    q4: Tensor, scale4: Tensor, zero4: Tensor, q8: Tensor, scale8: Tensor, perm: Tensor, group_size: int
) -> Tensor:
    p = Packed(q4, scale4, zero4, q8, scale8, perm)
    reference.check_packed("w4a8_unpack", p, group_size)
    out = torch.empty(perm.shape[0], q8.shape[1])
    with _for_contents(perm), Device() as device:
        module().w4a8_unpack(_packed(device, p, group_size), device.output("out", out))
    return out


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
    p = Packed(q4, scale4, zero4, q8, scale8, perm)
    dtype = reference.check_linear(x, p, group_size, bias, out_dtype)
    n, cols = perm.shape[0], q8.shape[1]
    flat = x.reshape(math.prod(x.shape[:-1]), cols)
    y = torch.empty(*x.shape[:-1], n, dtype=dtype)
    bias = None if bias is None else bias.float().contiguous()
    with _for_contents(perm), Device() as device:
        source = number_of_type(x), flat.shape[0], device.input("x", flat), *flat.stride()
        to = device.output("y", y), number_of_type(y), device.input("bias", bias)
        how = NUM_SMS[(n + cols) % len(NUM_SMS)], kernel
        module().w4a8_linear(_packed(device, p, group_size), *source, *to, *how)
    return y


def w4a8_accumulate(
    q: Tensor, q4: Tensor, scale4: Tensor, zero4: Tensor, q8: Tensor, scale8: Tensor, perm: Tensor, group_size: int
) -> Tensor:
    p = Packed(q4, scale4, zero4, q8, scale8, perm)
    reference.check_accumulate(q, p, group_size)
    out = torch.empty(q.shape[0], ceil_div(q.shape[1], group_size), perm.shape[0], dtype=torch.int32)
    with _for_contents(perm), Device() as device:
        source = q.shape[0], device.input("q", q), *q.stride()
        module().w4a8_accumulate(_packed(device, p, group_size), *source, device.output("out", out))
    return out


def w4a8_salience(grad: Tensor, w: Tensor, w4: Tensor) -> Tensor:
    reference.check_salience(grad, w, w4)
    out = torch.empty(w.shape[0])
    samples = grad.shape[0] if grad.dim() == 3 else 1
    with Device() as device:
        arguments = []
        for name, t in (("grad", grad), ("w", w), ("w4", w4)):
            arguments += [number_of_type(t), device.input(name, t.contiguous())]
        module().w4a8_salience(samples, *w.shape, *arguments, device.output("out", out))
    return out


OPS = {
    "w4a8_quantize": w4a8_quantize,
    "w4a8_pack": w4a8_pack,
    "w4a8_unpack": w4a8_unpack,
    "w4a8_linear": w4a8_linear,
    "w4a8_accumulate": w4a8_accumulate,
    "w4a8_salience": w4a8_salience,
}
