"""lscd in Triton. docs/formats/lscd.md describes the packed tensors.

A byte of the bitmap is a row of eight weights, and bytes are in the order of the values. So the kernels see the
bitmap as bytes: a prefix sum of their ones finds the first value of each row, and counting on along the row the
others. Packed tensors are untrusted: weights that would not come from inside of `values` count as zeros.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from effk.lscd import reference
from effk.lscd.reference import FLOATS
from torch import Tensor

from ..common.triton_aot import Variant, kernel
from ..common.triton_float import dot, narrow, widen

SUB = tl.constexpr(reference.SUB)
STRIP_ROWS = tl.constexpr(reference.STRIP_ROWS)
TILE_SUB_COLS = tl.constexpr(reference.TILE_SUB_COLS)
TILE_COLS = tl.constexpr(reference.TILE_SUB_COLS * reference.SUB)
TILE_BYTES = tl.constexpr(reference.TILE_SUB_COLS * reference.STRIP_ROWS)  # of the bitmap: one for eight weights

# Each block of tokens expands the weight for itself. With more tokens than this, it costs less to expand it once,
# write it to memory and have it multiplied as a dense one.
FUSED_TOKENS = 64
BLOCKS_PER_MULTIPROCESSOR = 4  # that splitting K aims at


@triton.jit
def count_ones(byte):
    byte -= (byte >> 1) & 0x55
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0xF


@triton.jit
def load_bits(bitmap, strip, strips, sub_cols, first, BYTES: tl.constexpr):
    """Bytes [S, BYTES] from number `first` on of strips [S], 0 where there are none."""
    strip_bytes = sub_cols * STRIP_ROWS
    byte = first + tl.arange(0, BYTES)
    inside = (strip < strips)[:, None] & (byte < strip_bytes)[None, :]
    return tl.load(bitmap + strip[:, None] * strip_bytes + byte[None, :], mask=inside, other=0).to(tl.int32)


@triton.jit
def expand(values, num_values, bits, base):
    """Weights [16 * S, B / 2] of bytes [S, B] of the bitmap whose values start at base [S]; and where these end."""
    S: tl.constexpr = bits.shape[0]
    BYTES: tl.constexpr = bits.shape[1]
    SUB_COLS: tl.constexpr = BYTES // STRIP_ROWS
    ones = count_ones(bits)
    before = tl.cumsum(ones, 1) - ones
    total = tl.sum(ones, 1)
    inside = (base >= 0) & (base <= num_values - total)
    # Flat, since scattered loads of two dimensions make Triton change the layout of their pointers first.
    value = tl.reshape(values + tl.where(inside, base, 0)[:, None] + before, (S * BYTES,))
    bits = tl.reshape(tl.where(inside[:, None], bits, 0), (S * BYTES,))

    w0 = tl.load(value, mask=(bits & 1) != 0, other=0)
    value += bits & 1
    w1 = tl.load(value, mask=(bits & 2) != 0, other=0)
    value += (bits >> 1) & 1
    w2 = tl.load(value, mask=(bits & 4) != 0, other=0)
    value += (bits >> 2) & 1
    w3 = tl.load(value, mask=(bits & 8) != 0, other=0)
    value += (bits >> 3) & 1
    w4 = tl.load(value, mask=(bits & 16) != 0, other=0)
    value += (bits >> 4) & 1
    w5 = tl.load(value, mask=(bits & 32) != 0, other=0)
    value += (bits >> 5) & 1
    w6 = tl.load(value, mask=(bits & 64) != 0, other=0)
    value += (bits >> 6) & 1
    w7 = tl.load(value, mask=(bits & 128) != 0, other=0)

    # Each join appends a dimension of two. The three are the bits of the column, the highest first.
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    w = tl.reshape(tl.join(even, odd), (S, SUB_COLS, STRIP_ROWS, SUB))
    return tl.reshape(tl.permute(w, (0, 2, 1, 3)), (S * STRIP_ROWS, SUB_COLS * SUB)), base + total


@kernel(aligned=("x", "x_stride"))
def multiply(
    x,
    x_stride: tl.int64,
    partial,
    values,
    bitmap,
    offsets,
    num_values: tl.int64,
    tokens: tl.int64,
    rows: tl.int64,
    sub_cols: tl.int64,
    tiles_per_split: tl.int64,
    TOKENS: tl.constexpr,
    STRIPS: tl.constexpr,
    COLS: tl.constexpr,
):
    """partial[split, token, row] = x @ w.T over the tiles of the split."""
    strips = tl.cdiv(rows, STRIP_ROWS)
    tiles = tl.cdiv(sub_cols, TILE_SUB_COLS)
    strip = tl.program_id(0).to(tl.int64) * STRIPS + tl.arange(0, STRIPS)
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(2).to(tl.int64)
    k = tl.arange(0, COLS)
    x_row = x + token[:, None] * x_stride + k[None, :]

    acc = tl.zeros((STRIPS * STRIP_ROWS, TOKENS), tl.float32)
    for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tiles)):
        base = tl.load(offsets + strip * tiles + tile, mask=strip < strips, other=0)
        for begin in tl.static_range(0, TILE_COLS, COLS):
            col = tile * TILE_COLS + begin
            bits = load_bits(bitmap, strip, strips, sub_cols, col * 2, COLS * 2)
            w, base = expand(values, num_values, bits, base)
            inside = (token < tokens)[:, None] & (k < sub_cols * SUB - col)[None, :]
            acc = dot(w, tl.trans(tl.load(x_row + col, mask=inside, other=0)), acc)

    row = tl.program_id(0).to(tl.int64) * STRIPS * STRIP_ROWS + tl.arange(0, STRIPS * STRIP_ROWS)
    out = partial + (split * tokens + token)[None, :] * rows + row[:, None]
    tl.store(out, acc, mask=(row < rows)[:, None] & (token < tokens)[None, :])


ACTIVATIONS = tuple(reference.ACTIVATIONS)  # the kernel gets an index
RELU = tl.constexpr(ACTIVATIONS.index("relu"))
GELU = tl.constexpr(ACTIVATIONS.index("gelu"))
GELU_TANH = tl.constexpr(ACTIVATIONS.index("gelu_tanh"))
SILU = tl.constexpr(ACTIVATIONS.index("silu"))


@triton.jit
def activate(y, activation):
    if activation == RELU:
        y = tl.where(y < 0, 0.0, y)  # keeps NaN
    elif activation == GELU:
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif activation == GELU_TANH:
        # (1 + tanh(z)) / 2 is sigmoid(2 z).
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif activation == SILU:
        y = y * tl.sigmoid(y)
    return y


@kernel()
def finish(
    y,
    partial,
    bias,
    scale,
    tokens: tl.int64,
    rows: tl.int64,
    splits: tl.int64,
    has_bias: tl.int32,
    has_scale: tl.int32,
    activation: tl.int32,
    BLOCK: tl.constexpr,
):
    """y = activation(scale * (partial summed over the splits) + bias), rounded once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tokens * rows
    row = at % rows

    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        acc += tl.load(partial + split * tokens * rows + at, mask=inside, other=0)
    factor = tl.load(scale + row, mask=inside & (has_scale != 0), other=1)
    addend = tl.load(bias + row, mask=inside & (has_bias != 0), other=0)
    acc = activate(acc * factor + widen(addend), activation)
    tl.store(y + at, narrow(acc, y.dtype.element_ty), mask=inside)


@kernel()
def unpack(
    w,
    values,
    bitmap,
    offsets,
    scale,
    num_values: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    sub_cols: tl.int64,
    HAS_SCALE: tl.constexpr,
):
    """One tile of w [rows, cols]."""
    tiles = tl.cdiv(sub_cols, TILE_SUB_COLS)
    index = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    strip, tile = tl.program_id(0).to(tl.int64) // tiles, tl.program_id(0).to(tl.int64) % tiles
    bits = load_bits(bitmap, index // tiles, strip + 1, sub_cols, tile * TILE_BYTES, TILE_BYTES)
    block, _ = expand(values, num_values, bits, tl.load(offsets + index))

    row = strip * STRIP_ROWS + tl.arange(0, STRIP_ROWS)
    col = tile * TILE_COLS + tl.arange(0, TILE_COLS)
    if HAS_SCALE:
        factor = tl.load(scale + row, mask=row < rows, other=0)
        block = narrow(widen(block) * factor[:, None], w.dtype.element_ty)
    tl.store(w + row[:, None] * cols + col[None, :], block, mask=(row < rows)[:, None] & (col < cols)[None, :])


@triton.jit
def load_weights(w, row_stride, col_stride, rows, cols, strip, tile):
    """Weights [512, 8] of a tile: a row for each byte of the bitmap."""
    byte = tl.arange(0, TILE_BYTES)
    row = (strip * STRIP_ROWS + byte % STRIP_ROWS)[:, None]
    col = (tile * TILE_COLS + byte // STRIP_ROWS * SUB)[:, None] + tl.arange(0, SUB)[None, :]
    return tl.load(w + row * row_stride + col * col_stride, mask=(row < rows) & (col < cols), other=0)


@kernel()
def pack_bitmap(
    w,
    bitmap,
    counts,
    row_stride: tl.int64,
    col_stride: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    sub_cols: tl.int64,
):
    """The bitmap and the number of ones of a tile."""
    tiles = tl.cdiv(sub_cols, TILE_SUB_COLS)
    index = tl.program_id(0).to(tl.int64)
    strip, tile = index // tiles, index % tiles
    weights = widen(load_weights(w, row_stride, col_stride, rows, cols, strip, tile))
    bits = tl.sum((weights != 0).to(tl.int32) << tl.arange(0, SUB)[None, :], 1)
    byte = tile * TILE_BYTES + tl.arange(0, TILE_BYTES)
    strip_bytes = sub_cols * STRIP_ROWS
    tl.store(bitmap + strip * strip_bytes + byte, bits.to(tl.uint8), mask=byte < strip_bytes)
    tl.store(counts + index, tl.sum(count_ones(bits), 0).to(tl.int64))


@kernel()
def pack_values(
    w,
    values,
    bitmap,
    offsets,
    row_stride: tl.int64,
    col_stride: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    sub_cols: tl.int64,
):
    """The values of a tile."""
    tiles = tl.cdiv(sub_cols, TILE_SUB_COLS)
    index = tl.program_id(0).to(tl.int64)
    strip, tile = index // tiles, index % tiles
    byte = tile * TILE_BYTES + tl.arange(0, TILE_BYTES)
    strip_bytes = sub_cols * STRIP_ROWS
    bits = tl.load(bitmap + strip * strip_bytes + byte, mask=byte < strip_bytes, other=0).to(tl.int32)
    ones = count_ones(bits)
    stored = (bits[:, None] >> tl.arange(0, SUB)[None, :]) & 1
    before = (tl.cumsum(ones, 0) - ones)[:, None] + tl.cumsum(stored, 1) - stored
    weights = load_weights(w, row_stride, col_stride, rows, cols, strip, tile)
    tl.store(values + tl.load(offsets + index) + before, weights, mask=stored != 0)


def unpacked_dtype(values: torch.dtype, has_scale: bool) -> torch.dtype:
    return torch.float32 if has_scale and values == torch.int8 else values


# A block's share. More spills registers; float32 multiplies without tensor cores and takes twice the room.
TOKENS = (16, 32)
STRIPS = {torch.float32: 2, torch.float16: 4, torch.bfloat16: 4}
PACKED = {"bitmap": torch.uint8, "offsets": torch.int64}
MULTIPLY = {
    (x, values): [
        Variant(
            multiply,
            {"x": x, "partial": torch.float32, "values": values, **PACKED},
            {"TOKENS": tokens, "STRIPS": STRIPS[x], "COLS": 128},
        )
        for tokens in TOKENS
    ]
    for x in FLOATS
    for values in (x, torch.int8)
}
FINISH = {
    y: Variant(finish, {"y": y, "partial": torch.float32, "bias": y, "scale": torch.float32}, {"BLOCK": 512})
    for y in FLOATS
}
UNPACK = {
    (values, has_scale): Variant(
        unpack,
        {"w": unpacked_dtype(values, has_scale), "values": values, **PACKED, "scale": torch.float32},
        {"HAS_SCALE": has_scale},
    )
    for values in (*FLOATS, torch.int8)
    for has_scale in (False, True)
}
PACK_BITMAP = {
    w: Variant(pack_bitmap, {"w": w, "bitmap": torch.uint8, "counts": torch.int64}) for w in (*FLOATS, torch.int8)
}
PACK_VALUES = {w: Variant(pack_values, {"w": w, "values": w, **PACKED}) for w in (*FLOATS, torch.int8)}


def variants() -> Iterator[Variant]:
    """All that the functions below can launch."""
    for sizes in MULTIPLY.values():
        yield from sizes
    for table in (FINISH, UNPACK, PACK_BITMAP, PACK_VALUES):
        yield from table.values()


def lscd_pack(w: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    w = w.to(reference.check_pack(w, dtype))
    rows, cols = w.shape
    strips, sub_cols, tiles = reference.sizes(rows, cols)
    bitmap = w.new_empty((strips, sub_cols, 2), dtype=torch.int64)
    counts = w.new_empty(strips * tiles, dtype=torch.int64)
    size = {"row_stride": w.stride(0), "col_stride": w.stride(1), "rows": rows, "cols": cols, "sub_cols": sub_cols}
    grid = (strips * tiles,)
    if counts.numel():
        PACK_BITMAP[w.dtype].launch(grid, w=w, bitmap=as_bytes(bitmap), counts=counts, **size)
    offsets = F.pad(reference.align(counts).cumsum(0), (1, 0))
    values = w.new_zeros(int(offsets[-1]) + reference.VALUE_PAD)
    if counts.numel():
        PACK_VALUES[w.dtype].launch(grid, w=w, values=values, bitmap=as_bytes(bitmap), offsets=offsets, **size)
    return values, bitmap, offsets


def lscd_unpack(
    values: Tensor, bitmap: Tensor, offsets: Tensor, rows: int, cols: int, scale: Tensor | None = None
) -> Tensor:
    reference.check_packed("lscd_unpack", values, bitmap, offsets, rows, cols)
    reference.check_scale("lscd_unpack", scale, values, rows)
    strips, sub_cols, tiles = reference.sizes(rows, cols)
    w = values.new_empty((rows, cols), dtype=unpacked_dtype(values.dtype, scale is not None))
    if w.numel():
        UNPACK[values.dtype, scale is not None].launch(
            (strips * tiles,),
            w=w,
            values=values.contiguous(),
            bitmap=as_bytes(bitmap),
            offsets=offsets.contiguous(),
            scale=w.new_empty(0, dtype=torch.float32) if scale is None else scale.contiguous(),
            num_values=values.numel(),
            rows=rows,
            cols=cols,
            sub_cols=sub_cols,
        )
    return w


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
    y = x.new_empty((*x.shape[:-1], rows))
    if not y.numel():
        return y
    tokens = y.numel() // rows
    product = multiply_fused if tokens <= FUSED_TOKENS else multiply_unpacked
    partial = product(x.reshape(tokens, cols), values, bitmap, offsets, rows, cols)

    finisher = FINISH[x.dtype]
    finisher.launch(
        (triton.cdiv(y.numel(), finisher.constants["BLOCK"]),),
        y=y,
        partial=partial,
        bias=y if bias is None else bias.contiguous(),
        scale=partial if scale is None else scale.contiguous(),
        tokens=tokens,
        rows=rows,
        splits=partial.shape[0],
        has_bias=int(bias is not None),
        has_scale=int(scale is not None),
        activation=ACTIVATIONS.index(activation),
    )
    return y


def multiply_fused(x: Tensor, values: Tensor, bitmap: Tensor, offsets: Tensor, rows: int, cols: int) -> Tensor:
    """x @ w.T in float32 as summands [splits, tokens, rows], expanding w on the chip."""
    tokens = x.shape[0]
    strips, sub_cols, tiles = reference.sizes(rows, cols)
    choices = MULTIPLY[x.dtype, values.dtype]
    variant = next((v for v in choices if tokens <= v.constants["TOKENS"]), choices[-1])
    blocks = triton.cdiv(strips, variant.constants["STRIPS"]), triton.cdiv(tokens, variant.constants["TOKENS"])

    # K is split for the blocks to fill the device, and into whole tiles, since only those have offsets.
    splits = triton.cdiv(BLOCKS_PER_MULTIPROCESSOR * multiprocessors(x.device), math.prod(blocks))
    tiles_per_split = max(1, triton.cdiv(tiles, splits))
    splits = triton.cdiv(tiles, tiles_per_split)
    partial = x.new_empty((splits, tokens, rows), dtype=torch.float32)
    if splits:
        x = whole_vectors(x)
        variant.launch(
            (*blocks, splits),
            x=x,
            x_stride=x.stride(0),
            partial=partial,
            values=values.contiguous(),
            bitmap=as_bytes(bitmap),
            offsets=offsets.contiguous(),
            num_values=values.numel(),
            tokens=tokens,
            rows=rows,
            sub_cols=sub_cols,
            tiles_per_split=tiles_per_split,
        )
    return partial


def multiply_unpacked(x: Tensor, values: Tensor, bitmap: Tensor, offsets: Tensor, rows: int, cols: int) -> Tensor:
    """x @ w.T in float32 [1, tokens, rows] by torch."""
    w = lscd_unpack(values, bitmap, offsets, rows, cols).to(x.dtype)
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, w.T, out_dtype=torch.float32)[None]
    return (x.float() @ w.float().T)[None]


def whole_vectors(x: Tensor) -> Tensor:
    """x [tokens, cols] or a copy with rows padded to what the kernel loads: aligned multiples of 16."""
    tokens, cols = x.shape
    if x.stride(1) == 1 and x.stride(0) % 16 == 0 and cols % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros(tokens, triton.cdiv(cols, 16) * 16)
    padded[:, :cols] = x
    return padded


def as_bytes(bitmap: Tensor) -> Tensor:
    return bitmap.contiguous().view(torch.uint8)


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; in the interpreter few, as programs run one after the other there."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
