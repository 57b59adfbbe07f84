"""moe in Triton.

How many rows each expert has is known on the device alone, so `plan` first makes a list there of blocks of rows: each
is rows of one expert, as many as a tile of the product takes, or fewer at the expert's end. The grid of the product
comes from shapes: there are never more blocks than it has programs for, and those without a block end at once. One
kernel makes all products: gates and what they multiply are columns side by side in its tiles, so that the activation
is at hand where the sums end, and rows that experts choose are gathered where they are read. Nothing is added up
atomically, and nothing waits for the device.

Compiled ahead of time for three architectures, and run in Triton's interpreter and on an H200. The choice of tiles is
untuned.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from effk.moe import reference
from effk.moe.reference import FLOATS
from torch import Tensor

from ..common.triton_aot import Variant, kernel
from ..common.triton_float import dot, narrow, widen
from ..common.triton_rows import in_vectors, multiple, row_at, vector

TINY = tl.constexpr(reference.TINY)
ACTIVATIONS = ("none", *reference.ACTIVATIONS)  # kernels get an index
SWIGLU = tl.constexpr(ACTIVATIONS.index("swiglu"))
GEGLU = tl.constexpr(ACTIVATIONS.index("geglu"))
GEGLU_TANH = tl.constexpr(ACTIVATIONS.index("geglu_tanh"))
RELU2 = tl.constexpr(ACTIVATIONS.index("relu2"))
SOFTMAX = tl.constexpr(tuple(reference.SCORES).index("softmax"))


# --- Routing ---------------------------------------------------------------------------------------------------------


@triton.jit
def load_logits(logits, token, tokens, stride, expert, experts):
    """[tokens, experts] float32, -infinity outside."""
    inside = (token < tokens)[:, None] & (expert < experts)[None, :]
    at = logits + token[:, None] * stride + expert[None, :]
    return tl.where(inside, widen(tl.load(at, mask=inside, other=0)), float("-inf"))


@triton.jit
def score_of(logit, most, sum, score):
    """Of a logit, the largest one and the sum of e^(logit - most)."""
    if score == SOFTMAX:
        above, below = tl.exp(logit - most), sum + tl.zeros_like(logit)
    else:
        above, below = tl.full(logit.shape, 1.0, tl.float32), 1.0 + tl.exp(-logit)
    return above / below


@triton.jit
def rank_of(value, expert):
    """Integers that are the higher the earlier an expert is chosen: NaN first, then large numbers, then low experts."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    order = tl.where(bits < 0, -magnitude, magnitude)  # -0.0 is 0.0
    order = tl.where(magnitude > 0x7F800000, 0x7FFFFFFF, order)
    return (order.to(tl.int64) << 32) | ((1 << 30) - expert)


@kernel()
def route(
    weights,
    ids,
    logits,
    bias,
    stride: tl.int64,
    tokens: tl.int64,
    experts: tl.int64,
    k: tl.int64,
    score: tl.int32,
    has_bias: tl.int32,
    renormalize: tl.int32,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """weights and ids [tokens, k] of some tokens."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    most = tl.full((TOKENS,), float("-inf"), tl.float32)
    for begin in range(0, experts, EXPERTS):
        expert = begin + tl.arange(0, EXPERTS)
        most = tl.maximum(most, tl.max(load_logits(logits, token, tokens, stride, expert, experts), 1))
    sum = tl.zeros((TOKENS,), tl.float32)
    for begin in range(0, experts, EXPERTS):
        expert = begin + tl.arange(0, EXPERTS)
        logit = load_logits(logits, token, tokens, stride, expert, experts)
        sum += tl.sum(tl.where((expert < experts)[None, :], tl.exp(logit - most[:, None]), 0.0), 1)

    total = tl.zeros((TOKENS,), tl.float32)
    last = tl.full((TOKENS,), 2**63 - 1, tl.int64)  # the rank of the expert chosen before
    for j in range(k):
        best = tl.full((TOKENS,), -(2**63), tl.int64)
        for begin in range(0, experts, EXPERTS):
            expert = begin + tl.arange(0, EXPERTS)
            by = load_logits(logits, token, tokens, stride, expert, experts)
            if has_bias != 0:
                addend = tl.load(bias + expert, mask=expert < experts, other=0)
                by = score_of(by, most[:, None], sum[:, None], score) + addend[None, :]
            rank = rank_of(by, expert[None, :])
            rank = tl.where((expert < experts)[None, :] & (rank < last[:, None]), rank, -(2**63))
            best = tl.maximum(best, tl.max(rank, 1))
        last = best
        id = (1 << 30) - (best & 0x7FFFFFFF)
        weight = score_of(widen(tl.load(logits + token * stride + id, mask=inside, other=0)), most, sum, score)
        total += weight
        tl.store(ids + token * k + j, id, mask=inside)
        tl.store(weights + token * k + j, weight, mask=inside)
    if renormalize != 0:
        tl.debug_barrier()  # other threads of the program may have written what a thread reads
        total = tl.where(total < TINY, TINY, total)
        for j in range(k):
            weight = tl.load(weights + token * k + j, mask=inside, other=0)
            tl.store(weights + token * k + j, weight / total, mask=inside)


# --- Sorting ---------------------------------------------------------------------------------------------------------


@triton.jit
def load_ids(ids, pair, pairs, experts):
    """Experts of pairs as int32: those out of range are number `experts`, and pairs that don't exist come after it."""
    id = tl.load(ids + pair, mask=pair < pairs, other=0)
    id = tl.where((id >= 0) & (id < experts), id, experts)
    return tl.where(pair < pairs, id, experts + 1).to(tl.int32)


@kernel()
def sort_few(
    perm,
    inverse,
    offsets,
    ids,
    pairs: tl.int64,
    experts: tl.int64,
    BLOCK: tl.constexpr,
):
    """All of moe_sort: each pair is compared with all. The last programs count pairs for offsets."""
    own = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    blocks = tl.cdiv(pairs, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    if tl.program_id(0) < blocks:
        id = load_ids(ids, own, pairs, experts)
        for begin in range(0, pairs, BLOCK):
            other = begin + tl.arange(0, BLOCK)
            of_other = load_ids(ids, other, pairs, experts)[:, None]
            first = (of_other < id[None, :]) | ((of_other == id[None, :]) & (other[:, None] < own[None, :]))
            before += tl.sum(first.to(tl.int32), 0)
        tl.store(inverse + own, before.to(tl.int64), mask=own < pairs)
        tl.store(perm + before, own, mask=own < pairs)
    else:
        expert = own - blocks * BLOCK
        for begin in range(0, pairs, BLOCK):
            of_other = load_ids(ids, begin + tl.arange(0, BLOCK), pairs, experts)[:, None]
            before += tl.sum((of_other <= expert[None, :]).to(tl.int32), 0)
        tl.store(offsets + expert, before, mask=expert < experts)


@triton.jit
def rank_in_block(ids, begin, pairs, experts, BLOCK: tl.constexpr):
    """Of a block of pairs: the experts, how many earlier ones have the same, and whether no later one has."""
    own = tl.arange(0, BLOCK)
    id = load_ids(ids, begin + own, pairs, experts)
    other = tl.arange(0, BLOCK)
    same = load_ids(ids, begin + other, pairs, experts)[:, None] == id[None, :]
    earlier = tl.sum((same & (other[:, None] < own[None, :])).to(tl.int32), 0)
    later = tl.sum((same & (other[:, None] > own[None, :])).to(tl.int32), 0)
    return id, earlier, later == 0


@kernel()
def count(
    counts,
    ids,
    pairs: tl.int64,
    experts: tl.int64,
    BLOCK: tl.constexpr,
):
    """counts[expert, block] of one block of pairs, where it isn't 0; the last expert is none."""
    blocks = tl.cdiv(pairs, BLOCK)
    block = tl.program_id(0).to(tl.int64)
    own = block * BLOCK + tl.arange(0, BLOCK)
    id, earlier, last = rank_in_block(ids, block * BLOCK, pairs, experts, BLOCK)
    tl.store(counts + id.to(tl.int64) * blocks + block, earlier + 1, mask=last & (own < pairs))


@kernel()
def place(
    perm,
    inverse,
    upto,
    ids,
    pairs: tl.int64,
    experts: tl.int64,
    BLOCK: tl.constexpr,
):
    """perm and inverse of one block of pairs; upto: prefix sums over all of counts."""
    blocks = tl.cdiv(pairs, BLOCK)
    block = tl.program_id(0).to(tl.int64)
    own = block * BLOCK + tl.arange(0, BLOCK)
    id, earlier, _ = rank_in_block(ids, block * BLOCK, pairs, experts, BLOCK)
    entry = id.to(tl.int64) * blocks + block
    before = earlier + tl.load(upto + entry - 1, mask=(own < pairs) & (entry > 0), other=0)
    tl.store(inverse + own, before.to(tl.int64), mask=own < pairs)
    tl.store(perm + before, own, mask=own < pairs)


# --- Products --------------------------------------------------------------------------------------------------------


@triton.jit
def load_end(offsets, expert, experts, rows, rest):
    """Where an expert's rows end, if no earlier expert's end later; `rest` for the one after the last."""
    end = tl.load(offsets + expert, mask=expert < experts, other=0)
    return tl.where(expert == experts, rest, tl.minimum(end, rows)).to(tl.int32)


@kernel()
def plan(
    blocks,
    offsets,
    experts: tl.int64,
    rows: tl.int64,
    rest: tl.int64,
    most: tl.int64,
    tile_rows: tl.int32,
    BLOCKS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """blocks [3, most]: the expert, the first row, and where the expert's rows end; expert -1 where there is no block.

    rest: where the rows of nobody end, which have number `experts`, or 0 to leave them out.
    """
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    number = tl.full((BLOCKS,), -1, tl.int32)
    row = tl.zeros((BLOCKS,), tl.int32)
    end = tl.zeros((BLOCKS,), tl.int32)
    last, first = tl.min(row, 0), tl.min(row, 0)  # rows and blocks of the experts before
    for begin in range(0, experts + 1, EXPERTS):
        expert = begin + tl.arange(0, EXPERTS)
        ends = load_end(offsets, expert, experts, rows, rest)
        other = begin + tl.arange(0, EXPERTS)
        earlier = tl.where(other[:, None] < expert[None, :], load_end(offsets, other, experts, rows, rest)[:, None], 0)
        starts = tl.maximum(tl.max(earlier, 0), last)
        ends = tl.maximum(starts, ends)
        count = tl.cdiv(ends - starts, tile_rows)
        upto = first + tl.cumsum(count, 0)
        within = block[:, None] - (upto - count)[None, :]
        here = (within >= 0) & (within < count[None, :])
        number = tl.maximum(number, tl.max(tl.where(here, expert.to(tl.int32)[None, :], -1), 1))
        row += tl.sum(tl.where(here, starts[None, :] + within * tile_rows, 0), 1)
        end += tl.sum(tl.where(here, ends[None, :], 0), 1)
        last, first = tl.max(ends, 0), first + tl.sum(count, 0)
    tl.store(blocks + block, number, mask=block < most)
    tl.store(blocks + most + block, row, mask=block < most)
    tl.store(blocks + 2 * most + block, end, mask=block < most)


@triton.jit
def source_of(gather, row, taken, limit, has_gather):
    """What gather holds for sorted rows, as int32, and whether that is a number below limit; without it, the rows."""
    given = tl.load(gather + row, mask=taken & (has_gather != 0), other=0)
    given = tl.where(has_gather != 0, given, row)
    taken &= (given >= 0) & (given < limit)
    return tl.where(taken, given, 0).to(tl.int32), taken


@triton.jit
def gated(gate, up, activation):
    if activation == GEGLU:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # x / (1 + e^-x); and (1 + tanh(z)) / 2 is 1 / (1 + e^-2z).
        double = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        gate = gate / (1.0 + tl.exp(-tl.where(activation == SWIGLU, gate, double)))
    return gate * up


@kernel()
def multiply(
    y,
    wide_y,
    x,
    w,
    bias,
    gather,
    blocks,
    x_rows: tl.int64,
    x_stride: tl.int64,
    w_expert: tl.int64,
    w_stride: tl.int64,
    experts: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    most: tl.int64,
    per_row: tl.int64,
    has_bias: tl.int32,
    has_gather: tl.int32,
    wide: tl.int32,
    activation: tl.int32,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A block of sorted rows times some of the rows of its expert's weight [rows, cols].

    y = activation(x w^T + bias), in float32 if `wide`. Sorted row i is row gather[i] // per_row of x. VECTOR: what the
    number of columns of x and y and all strides are multiples of. Where it isn't 1, it is 16 bytes, and tensors begin
    at such multiples.
    """
    is_gated = (activation == SWIGLU) | (activation == GEGLU) | (activation == GEGLU_TANH)
    # Programs that run at the same time have some blocks and some tiles in common.
    tiles = tl.cdiv(rows, TILE_COLS).to(tl.int32)
    program = tl.program_id(0)
    begin = program // (GROUP * tiles) * GROUP
    size = tl.minimum(most.to(tl.int32) - begin, GROUP)
    block = begin + program % (GROUP * tiles) % size
    tile = program % (GROUP * tiles) // size
    expert = tl.load(blocks + block).to(tl.int64)
    if expert >= 0:
        row = tl.load(blocks + most + block).to(tl.int64) + tl.arange(0, TILE_ROWS)
        taken = row < tl.load(blocks + 2 * most + block)
        source, there = source_of(gather, row, taken, x_rows * per_row, has_gather)
        source = (source // per_row.to(tl.int32)).to(tl.int64)
        n = tile * TILE_COLS + tl.arange(0, TILE_COLS)
        # Of gates and what they multiply, one after the other.
        n_w = tl.where(is_gated, n // 2 + n % 2 * (rows // 2).to(tl.int32), n).to(tl.int64)
        cols = multiple(cols, VECTOR)
        x_row = row_at(x, source, x_stride, VECTOR)
        w_row = row_at(row_at(w, expert, w_expert, VECTOR), n_w, w_stride, VECTOR)
        sum = tl.zeros((TILE_ROWS, TILE_COLS), tl.float32)
        for begin_k in range(0, tl.where(expert < experts, cols, 0).to(tl.int32), TILE_K):
            k = begin_k + tl.arange(0, TILE_K)
            x_tile = tl.load(x_row[:, None] + k[None, :], mask=there[:, None] & (k < cols)[None, :], other=0)
            w_tile = tl.load(w_row[:, None] + k[None, :], mask=(n < rows)[:, None] & (k < cols)[None, :], other=0)
            sum = dot(x_tile, tl.trans(w_tile), sum)
        if is_gated:
            gate, up = tl.split(tl.reshape(sum, (TILE_ROWS, TILE_COLS // 2, 2)))
            inner = multiple(rows // 2, VECTOR)
            col = tile * (TILE_COLS // 2) + tl.arange(0, TILE_COLS // 2)
            at = row_at(y, row, inner, VECTOR)[:, None] + col[None, :]
            h = narrow(gated(gate, up, activation), y.dtype.element_ty)
            tl.store(at, h, mask=taken[:, None] & (col < inner)[None, :])
        else:
            rows = multiple(rows, VECTOR)
            addend = tl.load(bias + expert * rows + n, mask=(n < rows) & (has_bias != 0) & (expert < experts), other=0)
            sum += widen(addend)[None, :]
            if activation == RELU2:
                sum = tl.where(sum < 0, 0.0, sum * sum)
            inside = taken[:, None] & (n < rows)[None, :]
            if wide != 0:
                tl.store(row_at(wide_y, row, rows, VECTOR)[:, None] + n[None, :], sum, mask=inside)
            else:
                at = row_at(y, row, rows, VECTOR)[:, None] + n[None, :]
                tl.store(at, narrow(sum, y.dtype.element_ty), mask=inside)


@kernel()
def multiply_rows(
    dw,
    grad,
    x,
    gather,
    offsets,
    grad_stride: tl.int64,
    x_rows: tl.int64,
    x_stride: tl.int64,
    sorted_rows: tl.int64,
    experts: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    has_gather: tl.int32,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    TILE_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A tile of dw [experts, rows, cols] = grad^T x over the expert's sorted rows. VECTOR: as of `multiply`."""
    down, across = tl.cdiv(rows, TILE_ROWS).to(tl.int32), tl.cdiv(cols, TILE_COLS).to(tl.int32)
    program = tl.program_id(0)
    expert = (program // across // down).to(tl.int64)
    n = program // across % down * TILE_ROWS + tl.arange(0, TILE_ROWS)
    col = program % across * TILE_COLS + tl.arange(0, TILE_COLS)
    rows, cols = multiple(rows, VECTOR), multiple(cols, VECTOR)

    start = tl.min(tl.zeros((EXPERTS,), tl.int32), 0)
    for begin in range(0, expert, EXPERTS):
        other = begin + tl.arange(0, EXPERTS)
        ends = load_end(offsets, other, experts, sorted_rows, 0)
        start = tl.maximum(start, tl.max(tl.where(other < expert, ends, 0), 0))
    end = tl.maximum(start, load_end(offsets, expert, experts, sorted_rows, 0))

    sum = tl.zeros((TILE_ROWS, TILE_COLS), tl.float32)
    for begin in range(start, end, TILE_K):
        row = begin + tl.arange(0, TILE_K).to(tl.int64)
        taken = row < end
        source, there = source_of(gather, row, taken, x_rows, has_gather)
        grad_row = row_at(grad, row, grad_stride, VECTOR)
        x_row = row_at(x, source.to(tl.int64), x_stride, VECTOR)
        grad_tile = tl.load(grad_row[:, None] + n[None, :], mask=taken[:, None] & (n < rows)[None, :], other=0)
        x_tile = tl.load(x_row[:, None] + col[None, :], mask=there[:, None] & (col < cols)[None, :], other=0)
        sum = dot(tl.trans(grad_tile), x_tile, sum)
    at = row_at(dw, expert * rows + n, cols, VECTOR)[:, None] + col[None, :]
    tl.store(at, narrow(sum, dw.dtype.element_ty), mask=(n < rows)[:, None] & (col < cols)[None, :])


# --- Combining -------------------------------------------------------------------------------------------------------


@kernel()
def combine(
    out,
    y,
    inverse,
    weights,
    kept,
    y_stride: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    pairs: tl.int64,
    has_kept: tl.int32,
    adds: tl.int32,
    COLS: tl.constexpr,
    PAIRS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Some columns of a token's out = the sum of weight * y over its rows of y, of which *kept may be the number.

    adds: += instead.

    VECTOR: as of `multiply`.
    """
    tiles = tl.cdiv(cols, COLS).to(tl.int32)
    token = (tl.program_id(0) // tiles).to(tl.int64)
    col = tl.program_id(0) % tiles * COLS + tl.arange(0, COLS)
    rows = tl.minimum(rows, tl.load(kept, mask=has_kept != 0, other=0x7FFFFFFF))
    cols = multiple(cols, VECTOR)
    to = row_at(out, token, cols, VECTOR) + col
    total = widen(tl.load(to, mask=(adds != 0) & (col < cols), other=0))
    for begin in range(0, pairs, PAIRS):
        for i in tl.static_range(PAIRS):  # so that the loads of several are under way
            pair = begin + i
            row = tl.load(inverse + token * pairs + pair, mask=pair < pairs, other=-1)
            there = (row >= 0) & (row < rows)
            weight = tl.load(weights + token * pairs + pair, mask=there, other=0)
            at = row_at(y, tl.where(there, row, 0), y_stride, VECTOR) + col
            term = weight * widen(tl.load(at, mask=there & (col < cols), other=0))
            total = tl.where(there, total + term, total)
    tl.store(to, narrow(total, out.dtype.element_ty), mask=col < cols)


# --- Variants --------------------------------------------------------------------------------------------------------


ROUTE = {
    dtype: Variant(
        route,
        {"weights": torch.float32, "ids": torch.int64, "logits": dtype, "bias": torch.float32},
        {"TOKENS": 4, "EXPERTS": 128},
    )
    for dtype in FLOATS
}
SORTED = {"perm": torch.int64, "inverse": torch.int64}
SORT_FEW = Variant(sort_few, {**SORTED, "offsets": torch.int32, "ids": torch.int64}, {"BLOCK": 64})
COUNT = Variant(count, {"counts": torch.int32, "ids": torch.int64}, {"BLOCK": 128})
PLACE = Variant(place, {**SORTED, "upto": torch.int32, "ids": torch.int64}, COUNT.constants)
PLAN = Variant(plan, {"blocks": torch.int32, "offsets": torch.int32}, {"BLOCKS": 32, "EXPERTS": 64})


@dataclass(frozen=True)
class Tile:
    """A program's share of a product, and how many columns it takes at a time."""

    rows: int
    cols: int
    k: int
    warps: int
    stages: int


# By how a product is made: "grouped" for few rows an expert, "dense" for many, "unaligned" where loads of 16 bytes are
# impossible. Larger ones spill registers.
TILES = {
    dtype: {
        "grouped": (Tile(16, 64, 32, 4, 3),),
        "dense": (Tile(64, 64, 16, 4, 3),),
        "unaligned": (Tile(32, 32, 32, 4, 2),),
    }
    if dtype == torch.float32
    else {
        "grouped": (Tile(16, 64, 128, 4, 4), Tile(64, 64, 64, 4, 4)),
        "dense": (Tile(128, 128, 64, 8, 4),),
        "unaligned": (Tile(64, 64, 32, 4, 2),),
    }
    for dtype in FLOATS
}
MULTIPLY = {
    (dtype, tile, name != "unaligned"): Variant(
        multiply,
        {
            "y": dtype,
            "wide_y": torch.float32,
            "x": dtype,
            "w": dtype,
            "bias": dtype,
            "gather": torch.int64,
            "blocks": torch.int32,
        },
        {
            "TILE_ROWS": tile.rows,
            "TILE_COLS": tile.cols,
            "TILE_K": tile.k,
            "GROUP": 8,
            "VECTOR": 1 if name == "unaligned" else vector(dtype),
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    for dtype in FLOATS
    for name, tiles in TILES[dtype].items()
    for tile in tiles
}
MULTIPLY_ROWS = {
    (dtype, aligned): Variant(
        multiply_rows,
        {"dw": dtype, "grad": dtype, "x": dtype, "gather": torch.int64, "offsets": torch.int32},
        {
            "TILE_ROWS": tile.rows,
            "TILE_COLS": tile.cols,
            "TILE_K": tile.k,
            "EXPERTS": 128,
            "VECTOR": vector(dtype) if aligned else 1,
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    for dtype in FLOATS
    for aligned, tile in {
        True: Tile(64, 64, 32, 4, 3) if dtype == torch.float32 else Tile(128, 128, 64, 8, 4),
        False: Tile(32, 32, 32, 4, 2) if dtype == torch.float32 else Tile(64, 64, 32, 4, 2),
    }.items()
}
COMBINE = {
    (y, out, aligned): Variant(
        combine,
        {"out": out, "y": y, "inverse": torch.int64, "weights": torch.float32, "kept": torch.int32},
        {"COLS": 512, "PAIRS": 4, "VECTOR": vector(out) if aligned else 1},
    )
    for y, out in dict.fromkeys((y, out) for out in FLOATS for y in (out, torch.float32))
    for aligned in (False, True)
}


def variants() -> Iterator[Variant]:
    """All that the functions below can launch."""
    yield from (SORT_FEW, COUNT, PLACE, PLAN)
    for table in (ROUTE, MULTIPLY, MULTIPLY_ROWS, COMBINE):
        yield from table.values()


# --- The choice of tiles ---------------------------------------------------------------------------------------------

# Of an H200: what a multiprocessor does in a second with tiles of so many rows, what it reads through the second cache,
# and their number. None of them measured here; the choice between two tiles depends on ratios only.
MULTIPROCESSORS = 132
RATE = {16: 1.5e12, 64: 4e12, 128: 6e12}
FLOAT32_RATE = 0.25e12
BANDWIDTH = 40e9
START = 2e-6  # of a program


def cost(tile: Tile, dtype: torch.dtype, sorted_rows: int, experts: int, rows: int, cols: int) -> float:
    """Seconds that a product takes, if all experts have as many rows."""
    used = max(1, min(experts, sorted_rows))
    blocks = used * triton.cdiv(sorted_rows, used * tile.rows)
    rate = FLOAT32_RATE if dtype == torch.float32 else RATE[tile.rows]
    compute = 2 * tile.rows * tile.cols * cols / rate
    read = (tile.rows + tile.cols) * cols * dtype.itemsize / BANDWIDTH
    waves = triton.cdiv(blocks * triton.cdiv(rows, tile.cols), MULTIPROCESSORS)
    return waves * (START + max(compute, read))


def tile_for(dtype: torch.dtype, gemm: str, sorted_rows: int, experts: int, sizes: Sequence[tuple[int, int]]) -> Tile:
    """The fastest tile for products with experts' weights of these sizes."""
    kinds = ("grouped", "dense") if gemm == "auto" else (gemm,)
    tiles = [tile for kind in kinds for tile in TILES[dtype][kind]]
    return min(tiles, key=lambda tile: sum(cost(tile, dtype, sorted_rows, experts, *size) for size in sizes))


# --- The ops ---------------------------------------------------------------------------------------------------------

FEW_PAIRS = 2048  # so many are sorted by one kernel
ENTRIES = 2**24  # at most, of the table with which more are sorted
PAIRS_AT_ONCE = 2**17  # of moe_mlp: bounds the memory that it takes for what is between its steps


def as_rows(t: Tensor, rows: int, cols: int) -> Tensor:
    """t as rows whose columns follow each other; a copy where they don't."""
    t = t.reshape(rows, cols)
    return t if cols <= 1 or t.stride(1) == 1 else t.contiguous()


def as_weights(w: Tensor) -> Tensor:
    return w if w.shape[2] <= 1 or w.stride(2) == 1 else w.contiguous()


def as_int64(t: Tensor) -> Tensor:
    return t.long().contiguous()


def as_offsets(offsets: Tensor, rows: int) -> Tensor:
    """As int32, in which those that are out of range still are."""
    return (offsets if offsets.dtype == torch.int32 else offsets.clamp(-1, rows).int()).contiguous()


def moe_route(
    logits: Tensor, k: int, bias: Tensor | None = None, *, score: str = "softmax", renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    reference.check_route(logits, k, bias, score)
    experts = logits.shape[-1]
    weights = logits.new_empty((*logits.shape[:-1], k), dtype=torch.float32)
    ids = torch.empty_like(weights, dtype=torch.int64)
    if weights.numel():
        tokens = weights.numel() // k
        variant = ROUTE[logits.dtype]
        logits = as_rows(logits, tokens, experts)
        variant.launch(
            (triton.cdiv(tokens, variant.constants["TOKENS"]),),
            weights=weights,
            ids=ids,
            logits=logits,
            bias=weights if bias is None else bias.contiguous(),
            stride=logits.stride(0),
            tokens=tokens,
            experts=experts,
            k=k,
            score=tuple(reference.SCORES).index(score),
            has_bias=int(bias is not None),
            renormalize=int(renormalize),
        )
    return weights, ids


def moe_sort(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    reference.check_sort(ids, num_experts)
    pairs = ids.numel()
    offsets = ids.new_empty(num_experts, dtype=torch.int32)
    if pairs == 0:
        return ids.new_empty(0, dtype=torch.int64), torch.empty_like(ids, dtype=torch.int64), offsets.zero_()
    ids = as_int64(ids)
    perm, inverse = ids.new_empty(pairs), torch.empty_like(ids)
    given = {"ids": ids, "pairs": pairs, "experts": num_experts}
    block = COUNT.constants["BLOCK"]
    blocks = triton.cdiv(pairs, block)
    if pairs <= FEW_PAIRS:
        block = SORT_FEW.constants["BLOCK"]
        SORT_FEW.launch(
            (triton.cdiv(pairs, block) + triton.cdiv(num_experts, block),),
            perm=perm,
            inverse=inverse,
            offsets=offsets,
            **given,
        )
    elif (num_experts + 1) * blocks <= ENTRIES:
        counts = ids.new_zeros((num_experts + 1, blocks), dtype=torch.int32)
        COUNT.launch((blocks,), counts=counts, **given)
        upto = counts.flatten().cumsum(0, dtype=torch.int32)
        PLACE.launch((blocks,), perm=perm, inverse=inverse, upto=upto, **given)
        offsets.copy_(upto.view_as(counts)[:num_experts, -1])
    else:
        flat = ids.flatten()
        flat = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
        ordered, perm = flat.sort(stable=True)
        inverse.view(-1)[perm] = torch.arange(pairs, device=ids.device)
        experts = torch.arange(num_experts, device=ids.device)
        offsets = torch.searchsorted(ordered, experts, right=True, out_int32=True)
    return perm, inverse, offsets


def planned(offsets: Tensor, rows: int, tile: Tile, *, with_rest: bool) -> Tensor:
    """blocks [3, most] of sorted rows for `multiply`."""
    experts = offsets.shape[0]
    most = rows // tile.rows + min(experts + 1, rows)
    blocks = offsets.new_empty((3, most), dtype=torch.int32)
    PLAN.launch(
        (triton.cdiv(most, PLAN.constants["BLOCKS"]),),
        blocks=blocks,
        offsets=offsets,
        experts=experts,
        rows=rows,
        rest=rows if with_rest else 0,
        most=most,
        tile_rows=tile.rows,
    )
    return blocks


def multiplied(
    y: Tensor,
    x: Tensor,
    w: Tensor,
    blocks: Tensor,
    variant: Variant,
    *,
    bias: Tensor | None = None,
    gather: Tensor | None = None,
    per_row: int = 1,
    activation: str = "none",
) -> None:
    """y [sorted rows, N or I] of x's dtype or float32 = activation(x w^T + bias), for the blocks of a plan."""
    experts, rows, cols = w.shape
    if not y.numel():
        return
    wide = y.dtype == torch.float32
    variant.launch(
        (blocks.shape[1] * triton.cdiv(rows, variant.constants["TILE_COLS"]),),
        y=x if y.dtype != x.dtype else y,
        wide_y=y if wide else y.new_empty(0, dtype=torch.float32),
        x=x,
        w=w,
        bias=x if bias is None else bias,
        gather=blocks.new_empty(0, dtype=torch.int64) if gather is None else gather,
        blocks=blocks,
        x_rows=x.shape[0],
        x_stride=x.stride(0),
        w_expert=w.stride(0),
        w_stride=w.stride(1),
        experts=experts,
        rows=rows,
        cols=cols,
        most=blocks.shape[1],
        per_row=per_row,
        has_bias=int(bias is not None),
        has_gather=int(gather is not None),
        wide=int(wide),
        activation=ACTIVATIONS.index(activation),
    )


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
    experts, n, cols = w.shape
    out_dtype = out_dtype or x.dtype
    # The kernel writes x's dtype or float32, and what is rounded from that is rounded once, too.
    y = x.new_empty((rows, n), dtype=out_dtype if out_dtype == x.dtype else torch.float32)
    if y.numel():
        x, w = as_rows(x, *x.shape), as_weights(w)
        whole = in_vectors(x, w) and n % vector(x.dtype) == 0
        tile = tile_for(x.dtype, "auto" if whole else "unaligned", rows, experts, [(n, cols)])
        blocks = planned(as_offsets(offsets, rows), rows, tile, with_rest=True)
        multiplied(
            y,
            x,
            w,
            blocks,
            MULTIPLY[x.dtype, tile, whole],
            bias=None if bias is None else bias.contiguous(),
            gather=None if gather is None else as_int64(gather),
        )
    return y.to(out_dtype)


def moe_grouped_wgrad(grad: Tensor, x: Tensor, offsets: Tensor, gather: Tensor | None = None) -> Tensor:
    reference.check_grouped_wgrad(grad, x, offsets, gather)
    sorted_rows, rows = grad.shape
    dw = x.new_empty((offsets.shape[0], rows, x.shape[1]))
    if dw.numel():
        grad, x = as_rows(grad, *grad.shape), as_rows(x, *x.shape)
        variant = MULTIPLY_ROWS[x.dtype, in_vectors(grad, x)]
        tile_rows, tile_cols = (
            triton.cdiv(dw.shape[i], variant.constants[f"TILE_{'ROWS' if i == 1 else 'COLS'}"]) for i in (1, 2)
        )
        variant.launch(
            (dw.shape[0] * tile_rows * tile_cols,),
            dw=dw,
            grad=grad,
            x=x,
            gather=offsets.new_empty(0, dtype=torch.int64) if gather is None else as_int64(gather),
            offsets=as_offsets(offsets, sorted_rows),
            grad_stride=grad.stride(0),
            x_rows=x.shape[0],
            x_stride=x.stride(0),
            sorted_rows=sorted_rows,
            experts=offsets.shape[0],
            rows=rows,
            cols=x.shape[1],
            has_gather=int(gather is not None),
        )
    return dw


def combined(out: Tensor, y: Tensor, inverse: Tensor, weights: Tensor, kept: Tensor | None, adds: bool = False) -> None:
    """Fills out [tokens, cols], or adds to it; kept [1]: how many rows of y there are."""
    pairs, cols = inverse.shape[-1], y.shape[1]
    variant = COMBINE[y.dtype, out.dtype, in_vectors(y, out)]
    variant.launch(
        (out.numel() // cols * triton.cdiv(cols, variant.constants["COLS"]),),
        out=out,
        y=y,
        inverse=inverse,
        weights=weights,
        kept=y.new_empty(0, dtype=torch.int32) if kept is None else kept,
        y_stride=y.stride(0),
        rows=y.shape[0],
        cols=cols,
        pairs=pairs,
        has_kept=int(kept is not None),
        adds=int(adds),
    )


def moe_combine(y: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    reference.check_combine(y, inverse, weights)
    out = y.new_empty((*inverse.shape[:-1], y.shape[1]))
    if out.numel():
        combined(out, as_rows(y, *y.shape), as_int64(inverse), weights.contiguous(), None)
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
    out = x.new_empty(x.shape)
    if not out.numel() or not ids.shape[-1] * w2.shape[0] * w2.shape[2]:
        return out.zero_()
    layer(out, x, w13, w2, weights, ids, activation, gemm, adds=False)
    return out


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
    if y.numel() and ids.shape[-1] * w2.shape[0] * w2.shape[2]:
        layer(y, x, w13, w2, weights, ids, activation, gemm, adds=True)


def layer(
    out: Tensor,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    activation: str,
    gemm: str,
    *,
    adds: bool,
) -> None:
    """Fills out, or adds to it; no size is 0."""
    experts, cols, inner = w2.shape
    pairs = ids.shape[-1]
    tokens = out.numel() // cols
    x, w13, w2 = as_rows(x, tokens, cols), as_weights(w13), as_weights(w2)
    ids, weights = as_int64(ids).view(tokens, pairs), weights.contiguous().view(tokens, pairs)
    whole = in_vectors(x, w13, w2)
    step = max(1, PAIRS_AT_ONCE // pairs)
    sorted_rows = min(step, tokens) * pairs
    sizes = [(w13.shape[1], cols), (cols, inner)]
    tile = tile_for(x.dtype, gemm if whole else "unaligned", sorted_rows, experts, sizes)
    variant = MULTIPLY[x.dtype, tile, whole]
    for begin in range(0, tokens, step):
        some = slice(begin, begin + step)
        perm, inverse, offsets = moe_sort(ids[some], experts)
        blocks = planned(offsets, perm.shape[0], tile, with_rest=False)
        h = x.new_empty((perm.shape[0], inner))
        multiplied(h, x[some], w13, blocks, variant, gather=perm, per_row=pairs, activation=activation)
        rows = x.new_empty((perm.shape[0], cols), dtype=torch.float32)
        multiplied(rows, h, w2, blocks, variant)
        combined(out.view(tokens, cols)[some], rows, inverse, weights[some], offsets[-1:], adds)
