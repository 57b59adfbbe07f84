"""w4a8 in Triton. docs/formats/w4a8.md describes the packed tensors.

A program multiplies a tile of output features, all of one kind, by a tile of tokens: group by group on integer tensor
cores, and each group's sums are scaled and added up in float32. Groups follow each other in one program, whatever the
number of tokens, so that this changes no bit. Activations are quantized before, into rows that are filled up with
zeros: what the weights hold beyond the last input feature, in checkpoints from anywhere, meets those. Output features
that a corrupt perm sends outside are not written.

Compiled ahead of time for three architectures, and run in Triton's interpreter and on an H200. The choice of tiles is
untuned.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from effk.w4a8 import reference
from effk.w4a8.reference import FLOATS, GROUP_SIZES, Packed, ceil_div
from torch import Tensor

from ..common.triton_aot import Variant, kernel
from ..common.triton_float import is_finite, narrow, nearest, widen

BLOCK = tl.constexpr(reference.BLOCK)
CHUNK = tl.constexpr(reference.CHUNK)
WORD = tl.constexpr(4)  # input features in a word of q8
TINY = tl.constexpr(reference.TINY)
VECTOR = 16  # activations are read in aligned vectors of so many


# --- Quantization ----------------------------------------------------------------------------------------------------


@triton.jit
def scale_of(size, levels, finite):
    """Of groups whose largest magnitude, or range, is `size`; `finite` says whether all their values are."""
    scale = tl.maximum(tl.div_rn(size, levels), TINY)
    return tl.where(finite & is_finite(size), tl.where(size == 0, 1.0, scale), float("nan"))


@triton.jit
def divided(v, scale):
    return nearest(tl.div_rn(v, scale[:, None]))


@triton.jit
def all_finite(v):
    """Of each row."""
    return tl.min(is_finite(v).to(tl.int32), 1) != 0


@triton.jit
def symmetric(v):
    """Of float32 rows: integers from -127 to 127, as int32, and scales."""
    scale = scale_of(tl.max(tl.abs(v), 1), 127.0, all_finite(v))
    q = tl.minimum(tl.maximum(divided(v, scale), -127.0), 127.0)
    return tl.where((scale == scale)[:, None], q, 0.0).to(tl.int32), scale


@triton.jit
def asymmetric(v):
    """Of float32 rows: integers from 0 to 15, as int32, scales and zero points (int32)."""
    low, high = tl.minimum(tl.min(v, 1), 0.0), tl.maximum(tl.max(v, 1), 0.0)
    scale = scale_of(high - low, 15.0, all_finite(v))
    zero = tl.minimum(tl.maximum(nearest(tl.div_rn(-low, scale)), 0.0), 15.0)
    q = tl.minimum(tl.maximum(divided(v, scale) + zero[:, None], 0.0), 15.0)
    number = scale == scale
    return tl.where(number[:, None], q, 0.0).to(tl.int32), scale, tl.where(number, zero, 0.0).to(tl.int32)


@kernel(aligned=("x", "x_stride", "q", "cols"))
def quantize(
    x,
    q,
    scale,
    sums,
    x_stride: tl.int64,
    tokens: tl.int64,
    cols: tl.int64,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """q [tokens, cols], scale and sums [groups, tokens] of x [tokens, cols], for one group."""
    groups = tl.cdiv(cols, GROUP)
    program = tl.program_id(0).to(tl.int64)
    group = program % groups
    token = program // groups * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, GROUP) + group * GROUP
    inside = (token < tokens)[:, None] & (k < cols)[None, :]
    integers, factor = symmetric(widen(tl.load(x + token[:, None] * x_stride + k[None, :], mask=inside, other=0)))
    tl.store(q + token[:, None] * cols + k[None, :], integers.to(tl.int8), mask=inside)
    tl.store(scale + group * tokens + token, factor, mask=token < tokens)
    tl.store(sums + group * tokens + token, tl.sum(integers, 1), mask=token < tokens)


# --- The packed format -----------------------------------------------------------------------------------------------


@triton.jit
def group_at(row, groups, group):
    """Where scale and zero point of (row, group) are, in the arrays of row's kind."""
    return (row // BLOCK * groups + group) * BLOCK + row % BLOCK


@triton.jit
def weights4(q4, n4, cols, block, group, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Integers [ROWS, GROUP] int8 of a group, from a block on; anything where there are none."""
    BLOCKS: tl.constexpr = ROWS // BLOCK
    CHUNKS: tl.constexpr = GROUP // CHUNK
    blocks, chunks = tl.cdiv(n4, BLOCK), tl.cdiv(cols, CHUNK)
    block += tl.arange(0, BLOCKS)
    byte = tl.arange(0, CHUNKS * BLOCK * 4)
    at = (block * chunks + group * CHUNKS)[:, None] * (BLOCK * 4) + byte[None, :]
    inside = (block < blocks)[:, None] & (byte // (BLOCK * 4) + group * CHUNKS < chunks)[None, :]
    pair = tl.load(q4 + at, mask=inside, other=0)
    w = tl.reshape(tl.join(pair & 15, pair >> 4), (BLOCKS, CHUNKS, BLOCK, 4, 2))
    return tl.reshape(tl.permute(w, (0, 2, 1, 4, 3)), (ROWS, GROUP)).to(tl.int8)


@triton.jit
def load_rest(begin, rows, rest):
    """The `rest` bytes that are left of each row as a word of q8 [blocks, 64]; begin and rows [blocks, 1]."""
    at = tl.arange(0, BLOCK * WORD)[None, :]
    row, byte = at // WORD, at % WORD
    return tl.load(begin + row * rest + byte, mask=(row < rows) & (byte < rest), other=0)


@triton.jit
def weights8(q8, n8, cols, block, group, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Integers [ROWS, GROUP] int8 of a group, from a block on; anything where there are none."""
    BLOCKS: tl.constexpr = ROWS // BLOCK
    WORDS: tl.constexpr = GROUP // WORD
    words, rest = cols // WORD, cols % WORD
    block = (block + tl.arange(0, BLOCKS))[:, None]
    rows = tl.minimum(n8 - block * BLOCK, BLOCK).to(tl.int32)
    begin = q8 + block * BLOCK * cols
    at = tl.arange(0, WORDS * BLOCK * WORD)[None, :]
    word, row = at // (BLOCK * WORD), at // WORD % BLOCK
    inside = (row < rows) & (word < words - group * WORDS)
    w = tl.load(begin + group * GROUP * rows + (word * rows + row) * WORD + at % WORD, mask=inside, other=0)
    w = tl.reshape(w, (BLOCKS, WORDS, BLOCK * WORD))
    if rest != 0 and (group + 1) * GROUP > cols:
        last = (tl.arange(0, WORDS) == words - group * WORDS)[None, :, None]
        w = tl.where(last, load_rest(begin + words * WORD * rows, rows, rest)[:, None, :], w)
    w = tl.permute(tl.reshape(w, (BLOCKS, WORDS, BLOCK, WORD)), (0, 2, 1, 3))
    return tl.reshape(w ^ 128, (ROWS, GROUP)).to(tl.int8, bitcast=True)


@triton.jit
def output_feature(perm, row, first, rows, features):
    """Where perm sends the rows of a kind, the `rows` from number `first` on; -1 where that isn't inside."""
    feature = tl.load(perm + first + row, mask=row < rows, other=-1).to(tl.int64)
    return tl.where(feature < features, feature, -1)


@triton.jit
def load_rows(w, perm, row_stride, col_stride, first, rows, cols, block, group, GROUP: tl.constexpr):
    """Float32 [16, GROUP] of a block and group of the `rows` rows from first on, 0 outside."""
    row = block * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, GROUP) + group * GROUP
    feature = tl.load(perm + first + row, mask=row < rows, other=0).to(tl.int64)
    inside = (row < rows)[:, None] & (k < cols)[None, :]
    return widen(tl.load(w + feature[:, None] * row_stride + k[None, :] * col_stride, mask=inside, other=0))


@kernel()
def pack4(
    w,
    perm,
    q4,
    scale4,
    zero4,
    row_stride: tl.int64,
    col_stride: tl.int64,
    n4: tl.int64,
    cols: tl.int64,
    GROUP: tl.constexpr,
):
    """A block and group of the 4-bit output features."""
    CHUNKS: tl.constexpr = GROUP // CHUNK
    groups, chunks = tl.cdiv(cols, GROUP), tl.cdiv(cols, CHUNK)
    block, group = tl.program_id(0).to(tl.int64) // groups, tl.program_id(0).to(tl.int64) % groups
    v = load_rows(w, perm, row_stride, col_stride, 0, n4, cols, block, group, GROUP)
    q, scale, zero = asymmetric(v)
    row, k = tl.arange(0, BLOCK), tl.arange(0, GROUP) + group * GROUP
    inside = block * BLOCK + row < n4
    at = group_at(block * BLOCK + row, groups, group)
    tl.store(scale4 + at, tl.where(inside, scale, 0.0))
    tl.store(zero4 + at, tl.where(inside, zero, 0).to(tl.uint8))

    q = tl.where(inside[:, None] & (k < cols)[None, :], q, 0)
    low, high = tl.split(tl.permute(tl.reshape(q, (BLOCK, CHUNKS, 2, 4)), (0, 1, 3, 2)))
    chunk = group * CHUNKS + tl.arange(0, CHUNKS)[None, :, None]
    to = q4 + ((block * chunks + chunk) * BLOCK + row[:, None, None]) * 4 + tl.arange(0, 4)[None, None, :]
    tl.store(to, (low | (high << 4)).to(tl.uint8), mask=chunk < chunks)


@kernel()
def pack8(
    w,
    perm,
    q8,
    scale8,
    row_stride: tl.int64,
    col_stride: tl.int64,
    n4: tl.int64,
    n8: tl.int64,
    cols: tl.int64,
    GROUP: tl.constexpr,
):
    """A block and group of the 8-bit output features."""
    groups, words = tl.cdiv(cols, GROUP), cols // WORD
    block, group = tl.program_id(0).to(tl.int64) // groups, tl.program_id(0).to(tl.int64) % groups
    q, scale = symmetric(load_rows(w, perm, row_stride, col_stride, n4, n8, cols, block, group, GROUP))
    row, k = tl.arange(0, BLOCK)[:, None], tl.arange(0, GROUP)[None, :] + group * GROUP
    rows = tl.minimum(n8 - block * BLOCK, BLOCK)
    at = group_at(block * BLOCK + tl.arange(0, BLOCK), groups, group)
    tl.store(scale8 + at, tl.where(tl.arange(0, BLOCK) < rows, scale, 0.0))

    whole = (k // WORD * rows + row) * WORD
    left = words * rows * WORD + row * (cols % WORD)  # where a row's last bytes begin
    to = q8 + block * BLOCK * cols + tl.where(k < words * WORD, whole, left) + k % WORD
    tl.store(to, (q + 128).to(tl.uint8), mask=(row < rows) & (k < cols))


@kernel(aligned=("q4", "q8"))
def unpack(
    w,
    q4,
    scale4,
    zero4,
    q8,
    scale8,
    perm,
    n4: tl.int64,
    n8: tl.int64,
    cols: tl.int64,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """w [n4 + n8, cols], for one tile and group."""
    groups, tiles4 = tl.cdiv(cols, GROUP), tl.cdiv(n4, ROWS)
    tile, group = tl.program_id(0).to(tl.int64) // groups, tl.program_id(0).to(tl.int64) % groups
    if tile < tiles4:
        row = tile * ROWS + tl.arange(0, ROWS)
        integers = weights4(q4, n4, cols, tile * (ROWS // BLOCK), group, ROWS, GROUP).to(tl.int32)
        at = group_at(row, groups, group)
        integers -= tl.load(zero4 + at, mask=row < n4, other=0).to(tl.int32)[:, None]
        scale = tl.load(scale4 + at, mask=row < n4, other=0)
        feature = output_feature(perm, row, 0, n4, n4 + n8)
    else:
        row = (tile - tiles4) * ROWS + tl.arange(0, ROWS)
        integers = weights8(q8, n8, cols, (tile - tiles4) * (ROWS // BLOCK), group, ROWS, GROUP).to(tl.int32)
        scale = tl.load(scale8 + group_at(row, groups, group), mask=row < n8, other=0)
        feature = output_feature(perm, row, n4, n8, n4 + n8)
    k = tl.arange(0, GROUP) + group * GROUP
    inside = (feature >= 0)[:, None] & (k < cols)[None, :]
    tl.store(w + feature[:, None] * cols + k[None, :], integers.to(tl.float32) * scale[:, None], mask=inside)


# --- The product -----------------------------------------------------------------------------------------------------


@triton.jit
def load_x(q, q_cols, tokens, token, group, GROUP: tl.constexpr):
    """[GROUP, tokens], 0 outside."""
    k = tl.arange(0, GROUP) + group * GROUP
    inside = (token < tokens)[None, :] & (k < q_cols)[:, None]
    return tl.load(q + token[None, :] * q_cols + k[:, None], mask=inside, other=0)


@triton.jit
def first_step4(
    q,
    sums,
    q4,
    zero4,
    q_cols,
    tokens,
    n4,
    cols,
    tile,
    token,
    group,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Sums of x * (q - zero) over a group, int32 [ROWS, tokens], for a tile of the 4-bit rows."""
    row = tile * ROWS + tl.arange(0, ROWS)
    zero = tl.load(zero4 + group_at(row, tl.cdiv(cols, GROUP), group), mask=row < n4, other=0).to(tl.int32)
    total = tl.load(sums + group * tokens + token, mask=token < tokens, other=0)
    w = weights4(q4, n4, cols, tile * (ROWS // BLOCK), group, ROWS, GROUP)
    x = load_x(q, q_cols, tokens, token, group, GROUP)
    return tl.dot(w, x, out_dtype=tl.int32) - zero[:, None] * total[None, :]


@triton.jit
def first_step8(q, q8, q_cols, tokens, n8, cols, tile, token, group, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """As first_step4, of 8-bit rows. Their zero is already taken off."""
    w = weights8(q8, n8, cols, tile * (ROWS // BLOCK), group, ROWS, GROUP)
    return tl.dot(w, load_x(q, q_cols, tokens, token, group, GROUP), out_dtype=tl.int32)


@triton.jit
def load_scales(w_scale, x_scale, n, groups, tokens, tile, token, group, ROWS: tl.constexpr):
    """Of a group: [ROWS, 1] of a tile's rows and [1, tokens]."""
    row = tile * ROWS + tl.arange(0, ROWS)
    of_w = tl.load(w_scale + group_at(row, groups, group), mask=row < n, other=0)
    of_x = tl.load(x_scale + group * tokens + token, mask=token < tokens, other=0)
    return of_w[:, None], of_x[None, :]


@triton.jit
def second_step(acc, first, of_w, of_x):
    """acc + first * of_x * of_w. Fused by intent: left to choose, the compiler might fuse here and not there."""
    return tl.fma(first.to(tl.float32) * of_x, tl.broadcast_to(of_w, acc.shape), acc)


@kernel(aligned=("q", "q_cols", "q4", "q8"))
def multiply(
    y,
    q,
    x_scale,
    sums,
    q4,
    scale4,
    zero4,
    q8,
    scale8,
    perm,
    bias,
    q_cols: tl.int64,
    tokens: tl.int64,
    n4: tl.int64,
    n8: tl.int64,
    cols: tl.int64,
    has_bias: tl.int32,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """y [tokens, n4 + n8] of q [tokens, q_cols], for a tile of rows and one of tokens."""
    groups, tiles4, tiles = tl.cdiv(cols, GROUP), tl.cdiv(n4, ROWS), tl.cdiv(n4, ROWS) + tl.cdiv(n8, ROWS)
    tile = tl.program_id(0).to(tl.int64) % tiles
    token = tl.program_id(0).to(tl.int64) // tiles * TOKENS + tl.arange(0, TOKENS)

    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    if tile < tiles4:
        for group in range(groups):
            # Before the product, so that they arrive meanwhile.
            of_w, of_x = load_scales(scale4, x_scale, n4, groups, tokens, tile, token, group, ROWS)
            first = first_step4(q, sums, q4, zero4, q_cols, tokens, n4, cols, tile, token, group, ROWS, GROUP)
            acc = second_step(acc, first, of_w, of_x)
        feature = output_feature(perm, tile * ROWS + tl.arange(0, ROWS), 0, n4, n4 + n8)
    else:
        tile -= tiles4
        for group in range(groups):
            of_w, of_x = load_scales(scale8, x_scale, n8, groups, tokens, tile, token, group, ROWS)
            first = first_step8(q, q8, q_cols, tokens, n8, cols, tile, token, group, ROWS, GROUP)
            acc = second_step(acc, first, of_w, of_x)
        feature = output_feature(perm, tile * ROWS + tl.arange(0, ROWS), n4, n8, n4 + n8)

    inside = feature >= 0
    acc += tl.load(bias + feature, mask=inside & (has_bias != 0), other=0)[:, None]
    to = y + token[None, :] * (n4 + n8) + feature[:, None]
    tl.store(to, narrow(acc, y.dtype.element_ty), mask=inside[:, None] & (token < tokens)[None, :])


@kernel(aligned=("q", "q_cols", "q4", "q8"))
def accumulate(
    out,
    q,
    sums,
    q4,
    zero4,
    q8,
    perm,
    q_cols: tl.int64,
    tokens: tl.int64,
    n4: tl.int64,
    n8: tl.int64,
    cols: tl.int64,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """out [tokens, groups, n4 + n8], for a tile of rows, a group and a tile of tokens."""
    groups, tiles4, tiles = tl.cdiv(cols, GROUP), tl.cdiv(n4, ROWS), tl.cdiv(n4, ROWS) + tl.cdiv(n8, ROWS)
    program = tl.program_id(0).to(tl.int64)
    tile, group = program % tiles, program // tiles % groups
    token = program // tiles // groups * TOKENS + tl.arange(0, TOKENS)
    if tile < tiles4:
        first = first_step4(q, sums, q4, zero4, q_cols, tokens, n4, cols, tile, token, group, ROWS, GROUP)
        feature = output_feature(perm, tile * ROWS + tl.arange(0, ROWS), 0, n4, n4 + n8)
    else:
        tile -= tiles4
        first = first_step8(q, q8, q_cols, tokens, n8, cols, tile, token, group, ROWS, GROUP)
        feature = output_feature(perm, tile * ROWS + tl.arange(0, ROWS), n4, n8, n4 + n8)
    to = out + (token[None, :] * groups + group) * (n4 + n8) + feature[:, None]
    tl.store(to, first, mask=(feature >= 0)[:, None] & (token < tokens)[None, :])


# --- Salience --------------------------------------------------------------------------------------------------------


@kernel()
def salience(
    out,
    grad,
    change,
    samples: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    BLOCK_COLS: tl.constexpr,
):
    """out of one row, from what each weight changes by."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((1,), tl.float32)
    for sample in range(samples):
        acc = tl.zeros((BLOCK_COLS,), tl.float32)
        for begin in range(0, cols, BLOCK_COLS):
            col = begin + tl.arange(0, BLOCK_COLS)
            g = tl.load(grad + (sample * rows + row) * cols + col, mask=col < cols, other=0)
            acc += widen(g) * tl.load(change + row * cols + col, mask=col < cols, other=0)
        d = tl.sum(acc, 0)
        total += tl.abs(d + d * d / 2)
    tl.store(out + row + tl.arange(0, 1), total)


# --- What can be launched --------------------------------------------------------------------------------------------

PACKED = {
    "q4": torch.uint8,
    "scale4": torch.float32,
    "zero4": torch.uint8,
    "q8": torch.uint8,
    "scale8": torch.float32,
    "perm": torch.int32,
}
QUANTIZED = {"q": torch.int8, "scale": torch.float32, "sums": torch.int32}
QUANTIZE = {
    (x, group): Variant(quantize, {"x": x, **QUANTIZED}, {"GROUP": group, "TOKENS": 2048 // group})
    for x in FLOATS
    for group in GROUP_SIZES
}
PACK4 = {
    group: Variant(
        pack4,
        {"w": torch.float32, "perm": torch.int32, "q4": torch.uint8, "scale4": torch.float32, "zero4": torch.uint8},
        {"GROUP": group},
    )
    for group in GROUP_SIZES
}
PACK8 = {
    group: Variant(
        pack8,
        {"w": torch.float32, "perm": torch.int32, "q8": torch.uint8, "scale8": torch.float32},
        {"GROUP": group},
    )
    for group in GROUP_SIZES
}
UNPACK = {group: Variant(unpack, {"w": torch.float32, **PACKED}, {"ROWS": 32, "GROUP": group}) for group in GROUP_SIZES}


@dataclass(frozen=True)
class Tile:
    """A program's share of the product."""

    tokens: int
    rows: int
    num_warps: int
    num_stages: int


# For each group size, the fewest tokens first. Weights are expanded once for each tile of tokens, so large ones pay
# where there are many; more spill registers.
TILES = {
    group: (Tile(16, 32, 4, 4), Tile(64, 32, 4, 3), Tile(128, 64, 8, 3))
    if group < 256
    else (Tile(16, 32, 4, 4), Tile(64, 64, 8, 3))
    for group in GROUP_SIZES
}
MULTIPLY = {
    (y, group): [
        Variant(
            multiply,
            {
                "y": y,
                "q": torch.int8,
                "x_scale": torch.float32,
                "sums": torch.int32,
                **PACKED,
                "bias": torch.float32,
            },
            {"GROUP": group, "ROWS": tile.rows, "TOKENS": tile.tokens},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        for tile in TILES[group]
    ]
    for y in FLOATS
    for group in GROUP_SIZES
}
ACCUMULATE = {
    group: Variant(
        accumulate,
        {
            "out": torch.int32,
            "q": torch.int8,
            "sums": torch.int32,
            **{k: PACKED[k] for k in ("q4", "zero4", "q8", "perm")},
        },
        {"GROUP": group, "ROWS": 32, "TOKENS": 16},
    )
    for group in GROUP_SIZES
}
SALIENCE = {
    grad: Variant(salience, {"out": torch.float32, "grad": grad, "change": torch.float32}, {"BLOCK_COLS": 1024})
    for grad in FLOATS
}


def variants() -> Iterator[Variant]:
    """All that the functions below can launch."""
    for table in (QUANTIZE, PACK4, PACK8, UNPACK, ACCUMULATE, SALIENCE):
        yield from table.values()
    for choices in MULTIPLY.values():
        yield from choices


# --- The ops ---------------------------------------------------------------------------------------------------------


def aligned(t: Tensor) -> Tensor:
    """t, or a copy where it doesn't begin at a multiple of 16 bytes."""
    return t if t.data_ptr() % 16 == 0 else t.clone()


def whole_vectors(x: Tensor) -> Tensor:
    """x [tokens, cols], or a copy filled up with zeros to rows of aligned vectors."""
    tokens, cols = x.shape
    if x.stride(1) == 1 and x.stride(0) % VECTOR == 0 and cols % VECTOR == 0 and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros(tokens, ceil_div(cols, VECTOR) * VECTOR)
    padded[:, :cols] = x
    return padded


class Quantized(NamedTuple):
    """Activations as the product wants them."""

    q: Tensor  # [tokens, cols] int8, cols a multiple of 16
    scale: Tensor  # [groups, tokens]
    sums: Tensor  # [groups, tokens] int32: of q


def quantized(x: Tensor, group_size: int) -> Quantized:
    x = whole_vectors(x)
    tokens, cols = x.shape
    groups = ceil_div(cols, group_size)
    out = Quantized(
        x.new_empty((tokens, cols), dtype=torch.int8),
        x.new_empty((groups, tokens), dtype=torch.float32),
        x.new_empty((groups, tokens), dtype=torch.int32),
    )
    if x.numel():
        variant = QUANTIZE[x.dtype, group_size]
        grid = (groups * ceil_div(tokens, variant.constants["TOKENS"]),)
        variant.launch(grid, x=x, **out._asdict(), x_stride=x.stride(0), tokens=tokens, cols=cols)
    return out


def w4a8_quantize(x: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor]:
    reference.check_quantize(x, group_size)
    cols = x.shape[-1]
    q, scale, _ = quantized(x.reshape(x.shape[:-1].numel(), cols), group_size)
    lead = x.shape[:-1]
    return q[:, :cols].reshape(x.shape).contiguous(), scale.T.reshape(*lead, scale.shape[0]).contiguous()


def w4a8_pack(w: Tensor, is8: Tensor | None = None, group_size: int = 128) -> Packed:
    reference.check_pack(w, is8, group_size)
    w = w.float()
    n, cols = w.shape
    perm, n8 = reference.order(is8, n, w.device)
    n4 = n - n8
    block = reference.BLOCK
    blocks4, blocks8, groups = ceil_div(n4, block), ceil_div(n8, block), ceil_div(cols, group_size)
    p = Packed(
        w.new_empty((blocks4, ceil_div(cols, reference.CHUNK), block, 4), dtype=torch.uint8),
        w.new_empty((blocks4, groups, block), dtype=torch.float32),
        w.new_empty((blocks4, groups, block), dtype=torch.uint8),
        w.new_empty((n8, cols), dtype=torch.uint8),
        w.new_empty((blocks8, groups, block), dtype=torch.float32),
        perm,
    )
    size = {"row_stride": w.stride(0), "col_stride": w.stride(1), "n4": n4, "cols": cols}
    if p.q4.numel():
        PACK4[group_size].launch((blocks4 * groups,), w=w, perm=perm, q4=p.q4, scale4=p.scale4, zero4=p.zero4, **size)
    if p.q8.numel():
        PACK8[group_size].launch((blocks8 * groups,), w=w, perm=perm, q8=p.q8, scale8=p.scale8, n8=n8, **size)
    return p


def prepared(p: Packed) -> tuple[dict[str, Tensor], dict[str, int]]:
    """A packed weight as kernels take it: tensors and sizes."""
    n8, cols = p.q8.shape
    p = p._replace(q4=aligned(p.q4), q8=aligned(p.q8))
    return p._asdict(), {"n4": p.perm.shape[0] - n8, "n8": n8, "cols": cols}


def tiles(sizes: dict[str, int], rows: int) -> int:
    return ceil_div(sizes["n4"], rows) + ceil_div(sizes["n8"], rows)


def w4a8_unpack(
    q4: Tensor, scale4: Tensor, zero4: Tensor, q8: Tensor, scale8: Tensor, perm: Tensor, group_size: int
) -> Tensor:
    p = Packed(q4, scale4, zero4, q8, scale8, perm)
    reference.check_packed("w4a8_unpack", p, group_size)
    packed, sizes = prepared(p)
    # Zeros, here and below: a corrupt perm may leave out output features.
    w = q8.new_zeros((perm.shape[0], q8.shape[1]), dtype=torch.float32)
    if w.numel():
        variant = UNPACK[group_size]
        grid = (tiles(sizes, variant.constants["ROWS"]) * ceil_div(sizes["cols"], group_size),)
        variant.launch(grid, w=w, **packed, **sizes)
    return w


def w4a8_accumulate(
    q: Tensor, q4: Tensor, scale4: Tensor, zero4: Tensor, q8: Tensor, scale8: Tensor, perm: Tensor, group_size: int
) -> Tensor:
    p = Packed(q4, scale4, zero4, q8, scale8, perm)
    reference.check_accumulate(q, p, group_size)
    packed, sizes = prepared(p)
    tokens, cols = q.shape
    groups = ceil_div(cols, group_size)
    out = q.new_zeros((tokens, groups, perm.shape[0]), dtype=torch.int32)
    if out.numel():
        whole = torch.nn.functional.pad(q, (0, groups * group_size - cols))
        variant = ACCUMULATE[group_size]
        q = whole_vectors(q)
        variant.launch(
            (tiles(sizes, variant.constants["ROWS"]) * groups * ceil_div(tokens, variant.constants["TOKENS"]),),
            out=out,
            q=q,
            sums=whole.reshape(tokens, groups, group_size).sum(-1, dtype=torch.int32).T.contiguous(),
            **{name: packed[name] for name in ("q4", "zero4", "q8", "perm")},
            q_cols=q.shape[1],
            tokens=tokens,
            **sizes,
        )
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
    packed, sizes = prepared(p)
    n = perm.shape[0]
    y = x.new_zeros((*x.shape[:-1], n), dtype=dtype)
    if y.numel():
        tokens = y.numel() // n
        q, x_scale, sums = quantized(x.reshape(tokens, sizes["cols"]), group_size)
        choices = MULTIPLY[dtype, group_size]
        variant = next((v for v in choices if tokens <= v.constants["TOKENS"]), choices[-1])
        variant.launch(
            (tiles(sizes, variant.constants["ROWS"]) * ceil_div(tokens, variant.constants["TOKENS"]),),
            y=y,
            q=q,
            x_scale=x_scale,
            sums=sums,
            **packed,
            bias=x_scale if bias is None else bias.float().contiguous(),
            q_cols=q.shape[1],
            tokens=tokens,
            has_bias=int(bias is not None),
            **sizes,
        )
    return y


def w4a8_salience(grad: Tensor, w: Tensor, w4: Tensor) -> Tensor:
    reference.check_salience(grad, w, w4)
    rows, cols = w.shape
    out = w.new_empty(rows, dtype=torch.float32)
    if rows:
        SALIENCE[grad.dtype].launch(
            (rows,),
            out=out,
            grad=grad.contiguous(),
            change=(w4.float() - w.float()).contiguous(),
            samples=grad.shape[:-2].numel(),
            rows=rows,
            cols=cols,
        )
    return out
