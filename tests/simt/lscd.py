"""lscd on the emulated device. As csrc/lscd/lscd.cu: it checks, chooses and launches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from effk.lscd import reference
from torch import Tensor

from . import Device, module, number_of_type

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
MOST_SPARSE_TOKENS = 64
# Of devices that there might be: one that large matrices fill, and one that asks for splitting small ones.
NUM_SMS = (1, 8, 132)


@contextlib.contextmanager
def _for_contents(packed: tuple[Tensor, Tensor, Tensor], rows: int, cols: int) -> Iterator[None]:
    """Corrupt packed tensors may make kernels read what nobody wrote, and do nothing worse."""
    try:
        torch.ops.effk.lscd_unpack(*packed, rows, cols)
        corrupt = False
    except RuntimeError:
        corrupt = True
    module().allow_uninitialised(corrupt)
    try:
        yield
    finally:
        module().allow_uninitialised(False)


def _packed(device: Device, values: Tensor, bitmap: Tensor, offsets: Tensor) -> tuple[int, ...]:
    """Type, values, their number, bitmap and offsets."""
    return (
        number_of_type(values),
        device.input("values", values),
        values.numel(),
        device.input("bitmap", bitmap),
        device.input("offsets", offsets),
    )


def lscd_pack(w: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    w = w.to(reference.check_pack(w, dtype))
    strips, sub_cols, tiles = reference.sizes(*w.shape)
    bitmap = torch.empty(strips, sub_cols, 2, dtype=torch.int64)
    sizes = torch.empty(strips * tiles, dtype=torch.int64)
    with Device() as device:
        dense = number_of_type(w), device.input("w", w), *w.stride()
        module().lscd_count(*w.shape, *dense, device.output("bitmap", bitmap), device.output("sizes", sizes))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    values = torch.empty(int(offsets[-1]) + reference.VALUE_PAD, dtype=w.dtype)
    with Device() as device:
        dense = number_of_type(w), device.input("w", w), *w.stride()
        module().lscd_fill(
            *w.shape,
            *dense,
            device.output("values", values),
            values.numel(),
            device.input("bitmap", bitmap),
            device.input("offsets", offsets),
        )
    return values, bitmap, offsets


def _unpack(packed: tuple[Tensor, ...], rows: int, cols: int, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = torch.empty(rows, cols, dtype=dtype)
    with Device() as device:
        arguments = _packed(device, *packed)
        to = device.output("out", out), number_of_type(out)
        module().lscd_unpack(rows, cols, *arguments, device.input("scale", scale), *to)
    return out


def lscd_unpack(
    values: Tensor, bitmap: Tensor, offsets: Tensor, rows: int, cols: int, scale: Tensor | None = None
) -> Tensor:
    reference.check_packed("lscd_unpack", values, bitmap, offsets, rows, cols)
    reference.check_scale("lscd_unpack", scale, values, rows)
    dtype = torch.float32 if scale is not None and values.dtype == torch.int8 else values.dtype
    packed = values, bitmap, offsets
    with _for_contents(packed, rows, cols):
        return _unpack(packed, rows, cols, scale, dtype)


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
    reference.check_packed("lscd_linear", values, bitmap, offsets, rows, cols)
    reference.check_linear(x, values, rows, cols, bias, scale, activation)
    packed = values, bitmap, offsets
    tokens = math.prod(x.shape[:-1])
    flat = x if x.dim() == 2 else x.reshape(tokens, cols)
    y = torch.empty(*x.shape[:-1], rows, dtype=x.dtype)
    bias = None if bias is None else bias.contiguous()
    with _for_contents(packed, rows, cols), Device() as device:
        last = device.input("bias", bias), device.input("scale", scale), ACTIVATIONS.index(activation)
        to = device.output("y", y)
        if cols > 0 and tokens <= MOST_SPARSE_TOKENS:
            source = number_of_type(x), tokens, device.input("x", flat), *flat.stride()
            num_sms = NUM_SMS[(rows + cols) % len(NUM_SMS)]
            module().lscd_linear(rows, cols, *_packed(device, *packed), *source, to, *last, num_sms)
            return y
        # A dense product, which on the device is torch's too.
        w = _unpack(packed, rows, cols, None, x.dtype) if cols > 0 else torch.zeros(rows, 0)
        sums = (flat.double() @ w.double().T).float()
        splits = 1 if cols > 0 else 0
        module().lscd_finish(rows, tokens, number_of_type(x), device.input("sums", sums), splits, to, *last)
    return y


OPS = {"lscd_pack": lscd_pack, "lscd_unpack": lscd_unpack, "lscd_linear": lscd_linear}
