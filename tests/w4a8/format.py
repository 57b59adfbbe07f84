"""docs/formats/w4a8.md once more, byte by byte: what packed tensors are compared with. Shares no code with effk.

Floats are worked out in float64 and rounded to float32: for quotients of two float32 numbers, and for products of one
with a small integer, that is the same as rounding once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..kit import tensors

SMALLEST = 2.0**-126
UNIT = 2.0**-24  # of float32


class Packed(NamedTuple):
    q4: Tensor
    scale4: Tensor
    zero4: Tensor
    q8: Tensor
    scale8: Tensor
    perm: Tensor


class Rows(NamedTuple):
    """What packed tensors say, row by row, 4-bit ones first: weight = scale * (q - zero), perm says whose it is."""

    q: Tensor  # [N, K] int64
    zero: Tensor  # [N, groups] int64, 128 for 8 bits
    scale: Tensor  # [N, groups] float32
    perm: Tensor  # [N] int64
    n4: int
    group_size: int

    @property
    def group_of(self) -> Tensor:
        """[K]: the group of each input feature."""
        return torch.arange(self.q.shape[1]) // self.group_size

    @property
    def integers(self) -> Tensor:
        """[N, K]: q - zero."""
        return self.q - self.zero[:, self.group_of]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# Where things are ---------------------------------------------------------------------------------------------------


def grid(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Every row beside every column, as index arrays that broadcast."""
    return torch.arange(rows)[:, None], torch.arange(cols)[None]


def q4_index(rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the byte of each weight."""
    r, k = grid(rows, cols)
    return r // 16, k // 8, r % 16, k % 4


def q4_shift(cols: int) -> Tensor:
    """0 or 4: the lowest bit of each weight in its byte."""
    return torch.arange(cols) % 8 // 4 * 4


def q8_index(rows: int, cols: int) -> Tensor:
    """Of the byte of each weight, counted from the tensor's first."""
    r, k = grid(rows, cols)
    block, i, words = r // 16, r % 16, cols // 4
    in_block = (rows - 16 * block).clamp(max=16)
    whole = 16 * block * cols + (k // 4 * in_block + i) * 4 + k % 4
    rest = 16 * block * cols + 4 * words * in_block + i * (cols % 4) + k % 4
    return torch.where(k < 4 * words, whole, rest)


def group_index(rows: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row's and group's scale and zero point."""
    r, g = grid(rows, groups)
    return r // 16, g, r % 16


# To and from bytes ---------------------------------------------------------------------------------------------------


def encode(rows: Rows) -> Packed:
    n, cols = rows.q.shape
    n4, n8, groups = rows.n4, n - rows.n4, ceil_div(cols, rows.group_size)
    blocks4, blocks8 = ceil_div(n4, 16), ceil_div(n8, 16)
    packed = Packed(
        torch.zeros(blocks4, ceil_div(cols, 8), 16, 4, dtype=torch.uint8),
        torch.zeros(blocks4, groups, 16),
        torch.zeros(blocks4, groups, 16, dtype=torch.uint8),
        torch.zeros(n8, cols, dtype=torch.uint8),
        torch.zeros(blocks8, groups, 16),
        rows.perm.int(),
    )
    nibbles = (rows.q[:n4] << q4_shift(cols)).to(torch.uint8)
    packed.q4.index_put_(q4_index(n4, cols), nibbles, accumulate=True)  # two weights a byte
    packed.q8.view(-1)[q8_index(n8, cols)] = rows.q[n4:].to(torch.uint8)
    packed.scale4[group_index(n4, groups)] = rows.scale[:n4]
    packed.zero4[group_index(n4, groups)] = rows.zero[:n4].to(torch.uint8)
    packed.scale8[group_index(n8, groups)] = rows.scale[n4:]
    return packed


def decode(packed: Packed, group_size: int) -> Rows:
    n, (n8, cols) = len(packed.perm), packed.q8.shape
    n4, groups = n - n8, ceil_div(cols, group_size)
    q4 = packed.q4[q4_index(n4, cols)].long() >> q4_shift(cols) & 15
    q8 = packed.q8.view(-1)[q8_index(n8, cols)].long()
    zero4 = packed.zero4[group_index(n4, groups)].long()
    return Rows(
        torch.cat([q4, q8]),
        torch.cat([zero4, torch.full((n8, groups), 128)]),
        torch.cat([packed.scale4[group_index(n4, groups)], packed.scale8[group_index(n8, groups)]]),
        packed.perm.long(),
        n4,
        group_size,
    )


def padding(packed: Packed) -> Packed:
    """Flags of the bits (of q4) and entries that hold nothing, in tensors of packed's shapes."""
    n, (n8, cols) = len(packed.perm), packed.q8.shape
    n4, groups = n - n8, packed.scale4.shape[1]
    free = [torch.full_like(t, 255 if t is packed.q4 else 1, dtype=torch.uint8) for t in packed]
    used = (15 << q4_shift(cols)).to(torch.uint8).expand(n4, cols)
    taken = torch.zeros_like(free[0]).index_put_(q4_index(n4, cols), used, accumulate=True)
    free[0] -= taken
    free[1][group_index(n4, groups)] = 0
    free[2][group_index(n4, groups)] = 0
    free[3][:] = 0
    free[4][group_index(n8, groups)] = 0
    free[5][:] = 0
    return Packed(*free)


def soiled(packed: Packed, seed: int) -> Packed:
    """The same matrix with other padding: random bits, and NaN for scales."""
    free = padding(packed)
    noise = torch.randint(0, 256, packed.q4.shape, generator=tensors.generator(seed), dtype=torch.uint8)
    return packed._replace(
        q4=packed.q4 & ~free.q4 | noise & free.q4,
        scale4=packed.scale4.masked_fill(free.scale4.bool(), float("nan")),
        zero4=packed.zero4.masked_fill(free.zero4.bool(), 199),
        scale8=packed.scale8.masked_fill(free.scale8.bool(), float("nan")),
    )


def in_features(t: Tensor, perm: Tensor) -> Tensor:
    """From the order of rows to that of output features, along the last dimension."""
    out = torch.empty_like(t)
    out[..., perm] = t
    return out


def unpack(packed: Packed, group_size: int) -> Tensor:
    rows = decode(packed, group_size)
    w = (rows.integers.double() * rows.scale.double()[:, rows.group_of]).float()
    return in_features(w.T, rows.perm).T


# To integers ---------------------------------------------------------------------------------------------------------


def by_group(t: Tensor, group_size: int, one: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
    """one(values of a group, in float64) for each, side by side: what it gives by value, and what it gives by group."""
    parts = [one(part.double()) for part in t.split(group_size, -1)] if t.shape[-1] else []
    if not parts:
        q, *rest = one(t.new_zeros((*t.shape[:-1], 1), dtype=torch.float64))
        return [q[..., :0], *(r[..., :0] for r in rest)]
    return [torch.cat(column, -1) for column in zip(*parts, strict=True)]


def scale_of(size: Tensor, levels: int, part: Tensor) -> Tensor:
    """Of groups [..., k], as float64 that float32 can hold."""
    size = size.float().double()  # a difference is rounded too
    scale = (size / levels).float().double().clamp(min=SMALLEST)
    scale = scale.masked_fill(size == 0, 1.0)
    broken = ~part.isfinite().all(-1, keepdim=True) | ~size.isfinite()
    return scale.masked_fill(broken, float("nan"))


def nearest(value: Tensor, scale: Tensor) -> Tensor:
    """round(value / scale), 0 where scale is NaN."""
    return torch.where(scale.isnan(), 0.0, (value / scale).float().double().round())


def symmetric(part: Tensor) -> tuple[Tensor, Tensor]:
    scale = scale_of(part.abs().amax(-1, keepdim=True), 127, part)
    return nearest(part, scale).clamp(-127, 127).long(), scale.float()


def asymmetric(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = part.amin(-1, keepdim=True).clamp(max=0), part.amax(-1, keepdim=True).clamp(min=0)
    scale = scale_of(high - low, 15, part)
    zero = nearest(-low, scale).clamp(0, 15)
    return (nearest(part, scale) + zero).clamp(0, 15).long(), zero.long(), scale.float()


def quantize(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Activations: q [..., K] int8 and scale [..., groups]."""
    q, scale = by_group(x, group_size, symmetric)
    return q.to(torch.int8), scale


def pack(w: Tensor, is8: Tensor | None, group_size: int) -> Packed:
    flags = [False] * w.shape[0] if is8 is None else is8.tolist()
    four, eight = ([i for i, flag in enumerate(flags) if flag == kind] for kind in (False, True))
    q4, zero4, scale4 = by_group(w[four], group_size, asymmetric)
    q8, scale8 = by_group(w[eight], group_size, symmetric)
    zero8 = torch.full(scale8.shape, 128)
    perm = torch.tensor(four + eight, dtype=torch.long)
    q, zero, scale = torch.cat([q4, q8 + 128]), torch.cat([zero4, zero8]), torch.cat([scale4, scale8])
    return encode(Rows(q, zero, scale, perm, len(four), group_size))
