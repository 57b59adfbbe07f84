"""vq on the emulated device. As csrc/vq/vq.cu: it checks, allocates and launches."""

from __future__ import annotations

import math

import torch
from effk.vq import reference
from torch import Tensor

from . import Device, module, number_of_type
from .moe import _indices, _num_sms

# As in the enum Codes.
PACKED, BYTES, WORDS = 0, 1, 2


def _unit_last(t: Tensor) -> Tensor:
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def _rows(device: Device, name: str, t: Tensor) -> tuple[int, list[int]]:
    t = _unit_last(t)
    return device.input(name, t), list(t.stride()[:-1])


def _floats(device: Device, name: str, t: Tensor | None) -> int:
    return device.input(name, None if t is None else t.contiguous())


def vq_encode(keys: Tensor, codebook: Tensor, chol: Tensor | None = None, *, pack: bool = False) -> Tensor:
    last, dtype = reference.check_encode(keys, codebook, chol, pack)
    codes = keys.new_empty(*keys.shape[:3], last, dtype=dtype)
    with Device() as device:
        address, strides = _rows(device, "keys", keys)
        module().vq_encode(
            number_of_type(keys),
            [*keys.shape, *codebook.shape[1:3]],
            address,
            strides,
            _floats(device, "codebook", codebook),
            _floats(device, "chol", chol),
            PACKED if pack else BYTES if dtype == torch.uint8 else WORDS,
            device.output("codes", codes),
        )
    return codes


def vq_lut(q: Tensor, codebook: Tensor, inv: Tensor | None = None) -> Tensor:
    group, subspaces, words = reference.check_lut(q, codebook, inv)
    out = q.new_empty(*q.shape[:2], subspaces, words, dtype=torch.float32)
    with Device() as device:
        address, strides = _rows(device, "q", q)
        module().vq_lut(
            number_of_type(q),
            [*q.shape[:2], group, q.shape[2], subspaces, words],
            address,
            strides,
            _floats(device, "codebook", codebook),
            _floats(device, "inv", inv),
            device.output("out", out),
        )
    return out


def _scores(
    device: Device, lut: Tensor, codes: Tensor, lens: Tensor | None, table: str, group: int, packed: bool
) -> tuple[object, ...]:
    batch, heads, subspaces, words = lut.shape
    keys, last = codes.shape[2:]
    if not ((last == 1 or codes.stride(3) == 1) and (keys <= 1 or codes.stride(2) == last)):
        codes = codes.contiguous()
    return (
        [batch, heads, group, keys, subspaces, words],
        _floats(device, "lut", lut),
        PACKED if packed else BYTES if words <= 256 else WORDS,
        device.input("codes", codes),
        list(codes.stride()[:2]),
        _indices(device, "lens", lens),
        table == "int8",
    )


def vq_score(lut: Tensor, codes: Tensor, lens: Tensor | None = None, *, table: str = "float32") -> Tensor:
    group, packed = reference.check_score(lut, codes, lens, table)
    out = lut.new_empty(*lut.shape[:2], codes.shape[2])
    with Device() as device:
        scores = _scores(device, lut, codes, lens, table, group, packed)
        module().vq_score(scores, device.output("out", out), _num_sms(lut, codes))
    return out


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
    group, packed, lists, cap = reference.check_topk(lut, codes, k, lens, sink, window, union_group, table)
    idx = lut.new_empty(lut.shape[0], lists, cap, dtype=torch.int64)
    count = lut.new_empty(lut.shape[0], lists, dtype=torch.int64)
    keys = codes.shape[2]
    with Device() as device:
        module().vq_topk(
            _scores(device, lut, codes, lens, table, group, packed),
            min(k, keys),
            min(sink, keys),
            min(window, keys),
            union_group,
            cap,
            device.output("idx", idx),
            device.output("count", count),
            _num_sms(lut, codes),
        )
    return idx, count


def vq_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor | None = None,
    count: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    group = reference.check_attend(q, k, v, idx, count)
    out = q.new_empty(*q.shape[:2], v.shape[3])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    lists, cap = k.shape[1:3] if idx is None else idx.shape[1:]
    with Device() as device:
        module().vq_attend(
            number_of_type(q),
            [*q.shape[:2], group, k.shape[2], q.shape[2], v.shape[3], lists, cap],
            _rows(device, "q", q),
            _rows(device, "k", k),
            _rows(device, "v", v),
            _indices(device, "idx", idx),
            _indices(device, "count", count),
            q.shape[2] ** -0.5 if scale is None else scale,
            device.output("out", out),
            device.output("lse", lse),
            _num_sms(q, k),
        )
    return out, lse


def vq_wrope(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    reference.check_wrope(q, cos, sin)
    out = q.new_empty(q.shape)
    rows = q.reshape(math.prod(q.shape[:-1]), q.shape[-1])
    with Device() as device:
        address, strides = _rows(device, "q", rows)
        module().vq_wrope(
            number_of_type(q),
            *rows.shape,
            address,
            *strides,
            _floats(device, "cos", cos),
            cos.dtype == torch.float32,
            _floats(device, "sin", sin),
            sin.dtype == torch.float32,
            device.output("out", out),
        )
    return out


OPS = {
    "vq_encode": vq_encode,
    "vq_lut": vq_lut,
    "vq_score": vq_score,
    "vq_topk": vq_topk,
    "vq_attend": vq_attend,
    "vq_wrope": vq_wrope,
}
