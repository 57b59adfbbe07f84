"""lora in Triton.

A merge is one launch for all layers. A table in device memory says where the layers are and how large, and each program
finds the one that its tile belongs to. Which adapters take part is only known on the device, so a program before the
merge makes a list of them: doing that in each program would repeat a sum over all pairs for every tile.

Token-wise application has three steps. Each pair of a token gets its final factor, that of all pairs of the same
adapter; `shrink` multiplies A with tokens grouped by adapter, and `expand` multiplies B with the results and adds up,
for a few tokens at a time, over the adapters that these have. The work is shared out by the sizes of the weights alone,
not by the other tokens. Nothing is added up atomically, and nothing waits for the device.

Compiled ahead of time for three architectures, and run in Triton's interpreter and on an H200. The choice of tiles is
untuned.
"""

import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from effk.lora import reference
from effk.lora.reference import FLOATS
from torch import Tensor

from ..common.triton_aot import Variant, kernel
from ..common.triton_float import dot, narrow, widen

NOTHING = tl.constexpr(-1)  # no adapter


@triton.jit
def used_rank(ranks, adapter, rank, has_ranks):
    """How much of the rank an adapter uses; nothing where this isn't positive."""
    given = tl.load(ranks + adapter, mask=has_ranks != 0, other=rank)
    return tl.minimum(given, rank)


@triton.jit
def factor_of(sum, scale):
    """Float32; scale is the bits of a float64, since Triton passes numbers as float32."""
    return (sum * scale.to(tl.int64).to(tl.float64, bitcast=True)).to(tl.float32)


@triton.jit
def find(first, index, count, steps):
    """The i in [0, count) with first[i] <= index < first[i + 1]; of index < first[count]. steps: log2 of count."""
    low = count * 0
    high = count
    for _ in range(steps):
        middle = (low + high) // 2
        before = tl.load(first + middle) <= index
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


# --- Merging ---------------------------------------------------------------------------------------------------------

# The rows of the table of layers; each has a number for every layer. Pointers and, last, the number of the first tile.
FIELDS = ("w", "base", "a", "b", "rows", "cols", "rank", "w_stride", "base_stride", "first")
W, BASE, A, B, ROWS, COLS, RANK, W_STRIDE, BASE_STRIDE, FIRST = (tl.constexpr(i) for i in range(len(FIELDS)))


@kernel()
def write_layer(
    table,
    layers: tl.int64,
    layer: tl.int64,
    w: tl.int64,
    base: tl.int64,
    a: tl.int64,
    b: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    rank: tl.int64,
    w_stride: tl.int64,
    base_stride: tl.int64,
    first: tl.int64,
):
    """A layer of the table."""
    at = table + layer
    tl.store(at + W * layers, w)
    tl.store(at + BASE * layers, base)
    tl.store(at + A * layers, a)
    tl.store(at + B * layers, b)
    tl.store(at + ROWS * layers, rows)
    tl.store(at + COLS * layers, cols)
    tl.store(at + RANK * layers, rank)
    tl.store(at + W_STRIDE * layers, w_stride)
    tl.store(at + BASE_STRIDE * layers, base_stride)
    tl.store(at + FIRST * layers, first)


@kernel()
def activate(
    active,
    factors,
    ids,
    gates,
    ranks,
    scale: tl.int64,
    pairs: tl.int64,
    adapters: tl.int64,
    rank: tl.int64,
    has_ranks: tl.int32,
    PAIRS: tl.constexpr,
):
    """The adapters that take part, by ascending number: how many, then (number, rank) of each, and their factors.

    One program. It takes the smallest number that it hasn't had yet, and sums up its gates.
    """
    at = tl.arange(0, PAIRS)
    id = tl.load(ids + at, mask=at < pairs, other=NOTHING)
    id = tl.where((id >= 0) & (id < adapters), id, adapters)  # nothing comes last
    gate = tl.load(gates + at, mask=at < pairs, other=0).to(tl.float64)
    count = pairs * 0
    adapter = tl.min(id, 0)
    while adapter < adapters:
        factor = factor_of(tl.sum(tl.where(id == adapter, gate, 0), 0), scale)
        used = used_rank(ranks, adapter, rank, has_ranks)
        if (factor != 0) & (used > 0):
            tl.store(active + 1 + 2 * count, adapter)
            tl.store(active + 2 + 2 * count, used)
            tl.store(factors + count, factor)
            count += 1
        adapter = tl.min(tl.where(id > adapter, id, adapters), 0)
    tl.store(active, count)


@triton.jit
def field(table, FIELD, layer, layers):
    return tl.load(table + FIELD * layers + layer)


@triton.jit
def multiple(number, OF: tl.constexpr):
    """A number that is one already, for the compiler to know."""
    return number // OF * OF


@triton.jit
def address(number, like, ALIGNED: tl.constexpr):
    """A number as a pointer of like's type; ALIGNED: a multiple of 16."""
    pointer = number.to(like.dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@kernel()
def merge(
    like,
    table,
    active,
    factors,
    layers: tl.int64,
    steps: tl.int64,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    TILE_RANK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A tile of w = base + sum of factor * B A.

    VECTOR: what all sizes and strides of all layers are multiples of. Where it isn't 1, it is 16 bytes, and tensors
    begin at such multiples.
    """
    ALIGNED: tl.constexpr = VECTOR > 1
    index = tl.program_id(0).to(tl.int64)
    layer = find(table + FIRST * layers, index, layers, steps)
    count = tl.load(active)
    w = address(field(table, W, layer, layers), like, ALIGNED)
    base = address(field(table, BASE, layer, layers), like, ALIGNED)
    a = address(field(table, A, layer, layers), like, ALIGNED)
    b = address(field(table, B, layer, layers), like, ALIGNED)
    rows = field(table, ROWS, layer, layers)
    cols = multiple(field(table, COLS, layer, layers), VECTOR)
    rank = multiple(field(table, RANK, layer, layers), VECTOR)
    count = tl.where(rank > 0, count, 0)  # without rank nothing takes part, to the bit
    w_stride = multiple(field(table, W_STRIDE, layer, layers), VECTOR)
    base_stride = multiple(field(table, BASE_STRIDE, layer, layers), VECTOR)

    tile = index - field(table, FIRST, layer, layers)
    tiles = tl.cdiv(cols, TILE_COLS)
    row = tile // tiles * TILE_ROWS + tl.arange(0, TILE_ROWS)
    col = tile % tiles * TILE_COLS + tl.arange(0, TILE_COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    out = w + row[:, None] * w_stride + col[None, :]
    start = base + row[:, None] * base_stride + col[None, :]
    if count == 0:
        if field(table, W, layer, layers) != field(table, BASE, layer, layers):
            tl.store(out, tl.load(start, mask=inside, other=0), mask=inside)
    else:
        total = widen(tl.load(start, mask=inside, other=0))
        for i in range(count):
            adapter = tl.load(active + 1 + 2 * i)
            used = tl.minimum(tl.load(active + 2 + 2 * i), rank)
            sum = tl.zeros((TILE_ROWS, TILE_COLS), tl.float32)
            for begin in range(0, used, TILE_RANK):
                r = begin + tl.arange(0, TILE_RANK)
                b_at = b + (adapter * rows + row)[:, None] * rank + r[None, :]
                a_at = a + (adapter * rank + r)[:, None] * cols + col[None, :]
                b_tile = tl.load(b_at, mask=(row < rows)[:, None] & (r < used)[None, :], other=0)
                a_tile = tl.load(a_at, mask=(r < used)[:, None] & (col < cols)[None, :], other=0)
                sum = dot(b_tile, a_tile, sum)
            total += tl.load(factors + i) * sum
        tl.store(out, narrow(total, like.dtype.element_ty), mask=inside)


# --- Token-wise application ------------------------------------------------------------------------------------------


@kernel()
def join(
    keys,
    factors,
    ids,
    gates,
    ranks,
    scale: tl.int64,
    entries: tl.int64,
    pairs: tl.int64,
    adapters: tl.int64,
    rank: tl.int64,
    has_ranks: tl.int32,
    BLOCK: tl.constexpr,
):
    """For each pair [tokens * pairs] its adapter and the factor of all pairs of this token and adapter.

    The first of such pairs stands for all. The others, and those without effect, have the number `adapters`.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < entries
    id = tl.load(ids + at, mask=inside, other=NOTHING)
    known = (id >= 0) & (id < adapters)
    first = at // pairs * pairs
    sum = tl.zeros((BLOCK,), tl.float64)
    earlier = tl.zeros((BLOCK,), tl.int32)  # pairs of the same adapter
    for i in range(pairs):
        same = (tl.load(ids + first + i, mask=inside, other=NOTHING) == id) & inside
        sum += tl.where(same, tl.load(gates + first + i, mask=same, other=0).to(tl.float64), 0)
        earlier += (same & (first + i < at)).to(tl.int32)
    factor = factor_of(sum, scale)
    used = used_rank(ranks, tl.where(known, id, 0), rank, has_ranks & known.to(tl.int32))
    takes_part = known & (earlier == 0) & (factor != 0) & (used > 0)
    tl.store(keys + at, tl.where(takes_part, id, adapters).to(tl.int32), mask=inside)
    tl.store(factors + at, factor, mask=inside)


@kernel()
def shrink(
    inner,
    x,
    a,
    ranks,
    order,
    offsets,
    blocks,
    x_stride: tl.int64,
    entries: tl.int64,
    pairs: tl.int64,
    adapters: tl.int64,
    steps: tl.int64,
    rank: tl.int64,
    cols: tl.int64,
    has_ranks: tl.int32,
    TOKENS: tl.constexpr,
    TILE_RANK: tl.constexpr,
    TILE_COLS: tl.constexpr,
    SPLIT_COLS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """inner[split, pair, r] = A x over the columns of a split, for some pairs of the same adapter.

    order: the pairs by adapter, of which number e has offsets[e] to offsets[e + 1], in blocks[e] to blocks[e + 1].
    VECTOR: as of `merge`.
    """
    splits = tl.cdiv(cols, SPLIT_COLS)
    tiles = tl.cdiv(rank, TILE_RANK)
    program = tl.program_id(0).to(tl.int64)
    split, tile, block = program % splits, program // splits % tiles, program // splits // tiles
    if block < tl.load(blocks + adapters):
        adapter = find(blocks, block, adapters, steps)
        used = used_rank(ranks, adapter, rank, has_ranks)
        r = tile * TILE_RANK + tl.arange(0, TILE_RANK)
        if tile * TILE_RANK < used:
            cols = multiple(cols, VECTOR)
            at = tl.load(offsets + adapter) + (block - tl.load(blocks + adapter)) * TOKENS + tl.arange(0, TOKENS)
            taken = at < tl.load(offsets + adapter + 1)
            pair = tl.load(order + at, mask=taken, other=0)
            x_row, a_row = x + pair // pairs * multiple(x_stride, VECTOR), a + (adapter * rank + r) * cols
            if VECTOR > 1:
                x_row, a_row = tl.multiple_of(x_row, 16), tl.multiple_of(a_row, 16)
            sum = tl.zeros((TOKENS, TILE_RANK), tl.float32)
            for begin in range(split * SPLIT_COLS, tl.minimum(cols, (split + 1) * SPLIT_COLS), TILE_COLS):
                col = begin + tl.arange(0, TILE_COLS)
                x_tile = tl.load(x_row[:, None] + col[None, :], mask=taken[:, None] & (col < cols)[None, :], other=0)
                a_tile = tl.load(
                    a_row[:, None] + col[None, :], mask=(r < used)[:, None] & (col < cols)[None, :], other=0
                )
                sum = dot(x_tile, tl.trans(a_tile), sum)
            inner += split * entries * rank
            tl.store(inner + pair[:, None] * rank + r[None, :], sum, mask=taken[:, None] & (r < used)[None, :])


@triton.jit
def next_adapter(keys, token, tokens, pairs, adapter, adapters, PAIRS: tl.constexpr):
    """The smallest number above `adapter` that one of the tokens has; `adapters` where there is none."""
    lowest = adapters
    for begin in range(0, pairs, PAIRS):
        i = begin + tl.arange(0, PAIRS)
        inside = (token < tokens)[:, None] & (i < pairs)[None, :]
        key = tl.load(keys + token[:, None] * pairs + i[None, :], mask=inside, other=NOTHING).to(tl.int64)
        lowest = tl.minimum(lowest, tl.min(tl.min(tl.where(key > adapter, key, adapters), 1), 0))
    return lowest


@triton.jit
def pair_of(keys, token, tokens, pairs, adapter, PAIRS: tl.constexpr):
    """Which pair of each token has the adapter; -1 where none has."""
    found = token * 0 - 1
    for begin in range(0, pairs, PAIRS):
        i = begin + tl.arange(0, PAIRS)
        inside = (token < tokens)[:, None] & (i < pairs)[None, :]
        key = tl.load(keys + token[:, None] * pairs + i[None, :], mask=inside, other=NOTHING).to(tl.int64)
        found = tl.maximum(found, tl.max(tl.where(key == adapter, token[:, None] * pairs + i[None, :], -1), 1))
    return found


@kernel()
def expand(
    y,
    y_in,
    b,
    inner,
    ranks,
    keys,
    factors,
    row_stride: tl.int64,
    col_stride: tl.int64,
    tokens: tl.int64,
    rows: tl.int64,
    pairs: tl.int64,
    adapters: tl.int64,
    rank: tl.int64,
    splits: tl.int64,
    has_ranks: tl.int32,
    has_y: tl.int32,
    TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_RANK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """y = y_in + sum over each token's adapters of factor * B inner, for some tokens and rows of B."""
    tiles = tl.cdiv(rows, TILE_ROWS)
    program = tl.program_id(0).to(tl.int64)
    token = program // tiles * TOKENS + tl.arange(0, TOKENS)
    row = program % tiles * TILE_ROWS + tl.arange(0, TILE_ROWS)
    inside = (token < tokens)[:, None] & (row < rows)[None, :]
    y_at = y_in + token[:, None] * row_stride + row[None, :] * col_stride
    total = widen(tl.load(y_at, mask=inside & (has_y != 0), other=0))
    adapter = next_adapter(keys, token, tokens, pairs, adapters * 0 - 1, adapters, PAIRS)
    while adapter < adapters:
        pair = pair_of(keys, token, tokens, pairs, adapter, PAIRS)
        factor = tl.load(factors + pair, mask=pair >= 0, other=0)
        used = used_rank(ranks, adapter, rank, has_ranks)
        sum = tl.zeros((TOKENS, TILE_ROWS), tl.float32)
        for begin in range(0, used, TILE_RANK):
            r = begin + tl.arange(0, TILE_RANK)
            at = inner + pair[:, None] * rank + r[None, :]
            left = tl.zeros((TOKENS, TILE_RANK), tl.float32)
            for split in range(splits):
                taken = (pair >= 0)[:, None] & (r < used)[None, :]
                left += tl.load(at + split * tokens * pairs * rank, mask=taken, other=0)
            b_at = b + (adapter * rows + row)[:, None] * rank + r[None, :]
            b_tile = widen(tl.load(b_at, mask=(row < rows)[:, None] & (r < used)[None, :], other=0))
            sum = dot(left, tl.trans(b_tile), sum)  # without tensor cores, which would round `left`
        # Others must not meet an infinity or NaN of this adapter, even times 0.
        total = tl.where((pair >= 0)[:, None], total + factor[:, None] * sum, total)
        adapter = next_adapter(keys, token, tokens, pairs, adapter, adapters, PAIRS)
    tl.store(y + token[:, None] * rows + row[None, :], narrow(total, y.dtype.element_ty), mask=inside)


# --- Variants --------------------------------------------------------------------------------------------------------


def vector(dtype: torch.dtype) -> int:
    """Numbers in 16 bytes."""
    return 16 // dtype.itemsize


WRITE_LAYER = Variant(write_layer, {"table": torch.int64}, num_warps=1)
ACTIVATE = Variant(
    activate,
    {
        "active": torch.int64,
        "factors": torch.float32,
        "ids": torch.int64,
        "gates": torch.float32,
        "ranks": torch.int64,
    },
    {"PAIRS": 2 * reference.MAX_PAIRS},  # the old and the new ones
)


@dataclass(frozen=True)
class Tile:
    """A program's share of a merge, and how many ranks it takes at a time."""

    rows: int
    cols: int
    rank: int
    warps: int

    def count(self, rows: int, cols: int) -> int:
        return triton.cdiv(rows, self.rows) * triton.cdiv(cols, self.cols)


# Larger ones spill registers: float32 multiplies without tensor cores, and single loads need an address each.
MERGE_TILES = {
    (dtype, aligned): (Tile(64, 64, 16, 4) if aligned else Tile(32, 32, 16, 4))
    if dtype == torch.float32
    else (Tile(64, 128, 16, 8) if aligned else Tile(64, 64, 32, 8))
    for dtype in FLOATS
    for aligned in (False, True)
}
MERGE = {
    (dtype, aligned): Variant(
        merge,
        {"like": dtype, "table": torch.int64, "active": torch.int64, "factors": torch.float32},
        {
            "TILE_ROWS": tile.rows,
            "TILE_COLS": tile.cols,
            "TILE_RANK": tile.rank,
            "VECTOR": vector(dtype) if aligned else 1,
        },
        num_warps=tile.warps,
    )
    for (dtype, aligned), tile in MERGE_TILES.items()
}
JOIN = Variant(
    join,
    {
        "keys": torch.int32,
        "factors": torch.float32,
        "ids": torch.int64,
        "gates": torch.float32,
        "ranks": torch.int64,
    },
    {"BLOCK": 128},
)
SHRINK = {
    (dtype, aligned): Variant(
        shrink,
        {
            "inner": torch.float32,
            "x": dtype,
            "a": dtype,
            "ranks": torch.int64,
            "order": torch.int64,
            "offsets": torch.int64,
            "blocks": torch.int64,
        },
        {
            "TOKENS": 16,
            "TILE_RANK": 32,
            "TILE_COLS": 64 if dtype == torch.float32 else 128,
            "SPLIT_COLS": 2048,
            "VECTOR": vector(dtype) if aligned else 1,
        },
    )
    for dtype in FLOATS
    for aligned in (False, True)
}
EXPAND = {
    dtype: Variant(
        expand,
        {
            "y": dtype,
            "y_in": dtype,
            "b": dtype,
            "inner": torch.float32,
            "ranks": torch.int64,
            "keys": torch.int32,
            "factors": torch.float32,
        },
        {"TOKENS": 16, "TILE_ROWS": 64, "TILE_RANK": 16, "PAIRS": 8},
    )
    for dtype in FLOATS
}


def variants() -> Iterator[Variant]:
    """All that the functions below can launch."""
    yield from (WRITE_LAYER, ACTIVATE, JOIN)
    for table in (MERGE, SHRINK, EXPAND):
        yield from table.values()


# --- The ops ---------------------------------------------------------------------------------------------------------


def search_steps(count: int) -> int:
    """Of `find`."""
    return max(0, count - 1).bit_length()


def float64_bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def as_int64(ranks: Tensor | None, like: Tensor) -> dict[str, Any]:
    """ranks as kernels take them; like: any int64 tensor of the device."""
    return {"ranks": like if ranks is None else ranks.long().contiguous(), "has_ranks": int(ranks is not None)}


class Table(NamedTuple):
    """The layers of a merge, in device memory."""

    layers: Tensor  # [FIELDS, layers] int64
    tiles: int
    aligned: bool


# Tables of the lists of layers that came last. A CUDA graph goes on reading the tables that it captured, so those are
# never dropped; each takes 80 bytes a layer.
TABLES = 64
_tables: OrderedDict[Any, Table] = OrderedDict()
_captured: dict[Any, Table] = {}
_lock = threading.Lock()


def capturing(like: Tensor) -> bool:
    """Whether a CUDA graph is being made of what like's device gets to do."""
    with torch.cuda.device_of(like):
        return like.is_cuda and torch.cuda.is_current_stream_capturing()


def table_of(
    op: str, w: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], base: Sequence[Tensor] | None
) -> Table:
    """The table of layers that are right but for shared memory, which is looked for when it is a new table."""
    device, dtype, adapters = w[0].device, w[0].dtype, a[0].shape[0]
    layers = tuple(
        (
            target.data_ptr(),
            source.data_ptr(),
            a[i].data_ptr(),
            b[i].data_ptr(),
            *target.shape,
            a[i].shape[1],
            target.stride(0),
            source.stride(0),
        )
        for i, (target, source) in enumerate(zip(w, w if base is None else base, strict=True))
    )
    key = (device, dtype, adapters, base is None, layers)  # tells apart all that the checks and the table depend on
    in_graph = capturing(w[0])
    with _lock:
        table = _tables.get(key) or _captured.get(key)
        if table is not None:
            if key in _tables:
                _tables.move_to_end(key)
            if in_graph:
                _captured[key] = table
    if table is None:
        reference.check_disjoint(op, w, {"a": a, "b": b, "base": base})
        table = new_table(w[0], layers)
        # The kernels that fill a table during a capture become part of the graph, and so does the memory. There is
        # nothing in it before the graph runs, so nobody else may have it.
        if not in_graph:
            with _lock:
                _tables[key] = table
                while len(_tables) > TABLES:
                    _tables.popitem(last=False)
    if device.type == "cuda" and not in_graph:
        table.layers.record_stream(torch.cuda.current_stream(device))  # may be another than it was made on
    return table


def new_table(like: Tensor, layers: Sequence[tuple[int, ...]]) -> Table:
    """Filled by kernels, whose arguments carry the numbers: a copy from the host would wait, and break a capture."""
    numbers = [dict(zip(FIELDS, layer, strict=False)) for layer in layers]  # without the first tile
    aligned = all(
        all(layer[name] % 16 == 0 for name in ("w", "base", "a", "b"))
        and all(layer[name] % vector(like.dtype) == 0 for name in ("cols", "rank", "w_stride", "base_stride"))
        for layer in numbers
    )
    tile = MERGE_TILES[like.dtype, aligned]
    table = like.new_empty((len(FIELDS), len(layers)), dtype=torch.int64)
    tiles = 0
    for i, layer in enumerate(numbers):
        WRITE_LAYER.launch((1,), table=table, layers=len(layers), layer=i, **layer, first=tiles)
        tiles += tile.count(layer["rows"], layer["cols"])
    return Table(table, tiles, aligned)


def merged(
    op: str,
    w: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ids: Tensor,
    gates: Tensor,
    base: Sequence[Tensor] | None,
    ranks: Tensor | None,
    scale: float,
) -> None:
    """w = base + the adapters' updates, or w = w + them; of arguments that are right but for shared memory."""
    if len(w) == 0:
        return
    table = table_of(op, w, a, b, base)
    if table.tiles == 0:
        return
    pairs, layers = ids.shape[0], len(w)
    active = ids.new_empty(1 + 2 * pairs, dtype=torch.int64)
    factors = gates.new_empty(pairs)
    ACTIVATE.launch(
        (1,),
        active=active,
        factors=factors,
        ids=ids.long().contiguous(),
        gates=gates.contiguous(),
        scale=float64_bits(scale),
        pairs=pairs,
        adapters=a[0].shape[0],
        rank=max(t.shape[1] for t in a),
        **as_int64(ranks, active),
    )
    MERGE[w[0].dtype, table.aligned].launch(
        (table.tiles,),
        like=w[0],
        table=table.layers,
        active=active,
        factors=factors,
        layers=layers,
        steps=search_steps(layers),
    )


def lora_merge_(
    w: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ids: Tensor,
    gates: Tensor,
    base: Sequence[Tensor] | None = None,
    ranks: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> None:
    reference.check_merge("lora_merge_", w, a, b, {"": (ids, gates)}, base, ranks)
    merged("lora_merge_", w, a, b, ids, gates, base, ranks, scale)


def lora_unmerge_(
    w: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ids: Tensor,
    gates: Tensor,
    base: Sequence[Tensor] | None = None,
    ranks: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> None:
    reference.check_merge("lora_unmerge_", w, a, b, {"": (ids, gates)}, base, ranks)
    merged("lora_unmerge_", w, a, b, *reference.added(base, (ids, gates), (ids[:0], gates[:0])), base, ranks, scale)


def lora_switch_(
    w: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    old_ids: Tensor,
    old_gates: Tensor,
    new_ids: Tensor,
    new_gates: Tensor,
    base: Sequence[Tensor] | None = None,
    ranks: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> None:
    lists = {"old_": (old_ids, old_gates), "new_": (new_ids, new_gates)}
    reference.check_merge("lora_switch_", w, a, b, lists, base, ranks)
    merged("lora_switch_", w, a, b, *reference.added(base, *lists.values()), base, ranks, scale)


def lora_apply(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    ids: Tensor,
    gates: Tensor,
    y: Tensor | None = None,
    ranks: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    reference.check_apply(x, a, b, ids, gates, y, ranks)
    adapters, rank, cols = a.shape
    rows, pairs = b.shape[1], ids.shape[-1]
    out = x.new_empty((*x.shape[:-1], rows))
    if not out.numel():
        return out
    tokens = out.numel() // rows
    entries = tokens * pairs
    if not entries * adapters * rank:
        return out.zero_() if y is None else out.copy_(y)

    keys = ids.new_empty(entries, dtype=torch.int32)
    factors = gates.new_empty(entries)
    ids = ids.long().contiguous()
    used = as_int64(ranks, ids)
    JOIN.launch(
        (triton.cdiv(entries, JOIN.constants["BLOCK"]),),
        keys=keys,
        factors=factors,
        ids=ids,
        gates=gates.contiguous(),
        scale=float64_bits(scale),
        entries=entries,
        pairs=pairs,
        adapters=adapters,
        rank=rank,
        **used,
    )
    inner = shrunk(x.reshape(tokens, cols), a, keys, pairs, used)
    y_in = out.reshape(tokens, rows) if y is None else y.reshape(tokens, rows)
    variant = EXPAND[x.dtype]
    variant.launch(
        (triton.cdiv(tokens, variant.constants["TOKENS"]) * triton.cdiv(rows, variant.constants["TILE_ROWS"]),),
        y=out,
        y_in=y_in,
        b=b,
        inner=inner,
        keys=keys,
        factors=factors,
        row_stride=y_in.stride(0),
        col_stride=y_in.stride(1),
        tokens=tokens,
        rows=rows,
        pairs=pairs,
        adapters=adapters,
        rank=rank,
        splits=inner.shape[0],
        has_y=int(y is not None),
        **used,
    )
    return out


def shrunk(x: Tensor, a: Tensor, keys: Tensor, pairs: int, used: dict[str, Any]) -> Tensor:
    """A x for all pairs [tokens * pairs] whose key is an adapter, as summands [splits, tokens * pairs, R]."""
    adapters, rank, cols = a.shape
    entries = keys.shape[0]
    aligned = cols % vector(a.dtype) == 0 and a.data_ptr() % 16 == 0
    if x.stride(1) != 1 or (aligned and (x.stride(0) % vector(a.dtype) != 0 or x.data_ptr() % 16 != 0)):
        x = x.clone(memory_format=torch.contiguous_format)
    variant = SHRINK[x.dtype, aligned]
    tokens = variant.constants["TOKENS"]
    splits = triton.cdiv(cols, variant.constants["SPLIT_COLS"])
    inner = x.new_empty((splits, entries, rank), dtype=torch.float32)
    if not inner.numel():
        return inner
    ordered, order = keys.sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(adapters + 1, dtype=torch.int32, device=a.device))
    blocks = F.pad(((offsets.diff() + (tokens - 1)) // tokens).cumsum(0), (1, 0))
    # How many blocks there are is only known on the device. There are never more than these.
    most = entries // tokens + min(adapters, entries)
    variant.launch(
        (most * triton.cdiv(rank, variant.constants["TILE_RANK"]) * splits,),
        inner=inner,
        x=x,
        a=a,
        order=order,
        offsets=offsets,
        blocks=blocks,
        x_stride=x.stride(0),
        entries=entries,
        pairs=pairs,
        adapters=adapters,
        steps=search_steps(adapters),
        rank=rank,
        cols=cols,
        **used,
    )
    return inner
