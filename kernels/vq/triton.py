"""vq in Triton.

Rows of keys or queries are multiplied by their head's matrix first, into float32; the nearest words and the tables are
products of such rows with the codebook. Scores are written out, and `vq_topk` looks for the k-th best of them digit by
digit: each pass counts the next 8 bits of those scores that share the digits before, and what those counts say is
worked out again by every program of the next pass. Prefix sums over blocks of keys then give each chosen key its
place. `vq_attend` shares out the keys among programs, and a second kernel merges their results in order. Only integers
are added up atomically, and nothing waits for the device.

Compiled ahead of time for three architectures, and run in Triton's interpreter and on an H200. The choice of tiles is
untuned.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from effk.vq import reference
from effk.vq.reference import FLOATS
from torch import Tensor

from ..common.triton_aot import Variant, kernel
from ..common.triton_float import dot, is_finite, narrow, nearest, widen
from ..common.triton_rows import in_vectors, multiple, row_at, vector

INFINITY = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)

# --- Rotation --------------------------------------------------------------------------------------------------------


@kernel()
def rotate(
    out,
    q,
    cos,
    sin,
    q_stride: tl.int64,
    rows: tl.int64,
    half: tl.int64,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """(a, b) -> (a cos - b sin, b cos + a sin) of the halves of some rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for begin in range(0, half, COLS):
        col = begin + tl.arange(0, COLS)
        inside = (row < rows)[:, None] & (col < half)[None, :]
        at = q + row[:, None] * q_stride + col[None, :]
        a, b = widen(tl.load(at, mask=inside, other=0)), widen(tl.load(at + half, mask=inside, other=0))
        c = widen(tl.load(cos + col, mask=col < half, other=0))[None, :]
        s = widen(tl.load(sin + col, mask=col < half, other=0))[None, :]
        to = out + row[:, None] * (2 * half) + col[None, :]
        tl.store(to, narrow(a * c - b * s, out.dtype.element_ty), mask=inside)
        tl.store(to + half, narrow(b * c + a * s, out.dtype.element_ty), mask=inside)


# --- Products with matrices and codebooks ----------------------------------------------------------------------------


@kernel()
def project(
    out,
    x,
    matrix,
    x_batch: tl.int64,
    x_head: tl.int64,
    x_row: tl.int64,
    rows: tl.int64,
    keys: tl.int64,
    dim: tl.int64,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """out [heads, rows, dim] = x matrix, of x [batch, heads, keys, dim] and matrix [heads, dim, dim]."""
    tiles = tl.cdiv(dim, COLS)
    blocks = tl.cdiv(rows, ROWS)
    program = tl.program_id(0).to(tl.int64)
    n = program % tiles * COLS + tl.arange(0, COLS)
    row = program // tiles % blocks * ROWS + tl.arange(0, ROWS)
    head = program // tiles // blocks
    start = x + head * x_head + row // keys * x_batch + row % keys * x_row
    sum = tl.zeros((ROWS, COLS), tl.float32)
    for begin in range(0, dim, TILE_K):
        k = begin + tl.arange(0, TILE_K)
        x_tile = tl.load(start[:, None] + k[None, :], mask=(row < rows)[:, None] & (k < dim)[None, :], other=0)
        at = matrix + (head * dim + k)[:, None] * dim + n[None, :]
        sum = dot(widen(x_tile), tl.load(at, mask=(k < dim)[:, None] & (n < dim)[None, :], other=0), sum)
    tl.store(
        out + (head * rows + row)[:, None] * dim + n[None, :], sum, mask=(row < rows)[:, None] & (n < dim)[None, :]
    )


@triton.jit
def products(x, codebook, row, rows, word, words, subspace, subspaces, head, width, TILE_K: tl.constexpr):
    """Dot products [rows, words] of parts of rows of x [heads, rows, dim] with words."""
    sum = tl.zeros((row.shape[0], word.shape[0]), tl.float32)
    start = x + (head * rows + row) * (width * subspaces) + subspace * width
    first = codebook + ((head * subspaces + subspace) * words + word) * width
    for begin in range(0, width, TILE_K):
        k = begin + tl.arange(0, TILE_K)
        x_tile = tl.load(start[:, None] + k[None, :], mask=(row < rows)[:, None] & (k < width)[None, :], other=0)
        tile = tl.load(first[:, None] + k[None, :], mask=(word < words)[:, None] & (k < width)[None, :], other=0)
        sum = dot(x_tile, tl.trans(tile), sum)
    return sum


@kernel()
def encode(
    codes,
    x,
    codebook,
    norms,
    codes_batch: tl.int64,
    codes_head: tl.int64,
    codes_row: tl.int64,
    rows: tl.int64,
    keys: tl.int64,
    subspaces: tl.int64,
    words: tl.int64,
    width: tl.int64,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """The nearest words of parts of rows of x [heads, rows, dim]: the lowest of equals, 0 for NaN.

    norms [heads, subspaces, words]: |words|^2.
    """
    blocks = tl.cdiv(rows, ROWS)
    program = tl.program_id(0).to(tl.int64)
    subspace = program % subspaces
    row = program // subspaces % blocks * ROWS + tl.arange(0, ROWS)
    head = program // subspaces // blocks
    best = tl.full((ROWS,), float("inf"), tl.float32)
    code = tl.zeros((ROWS,), tl.int32)
    for begin in range(0, words, WORDS):
        word = begin + tl.arange(0, WORDS)
        norm = tl.load(norms + (head * subspaces + subspace) * words + word, mask=word < words, other=0)
        sum = products(x, codebook, row, rows, word, words, subspace, subspaces, head, width, TILE_K)
        far = norm[None, :] - 2.0 * sum
        far = tl.where((word < words)[None, :] & (far == far), far, float("inf"))
        least = tl.min(far, 1)
        number = tl.where(far == least[:, None], word.to(tl.int32)[None, :], HIGHEST)
        code = tl.where(least < best, tl.min(number, 1), code)
        best = tl.minimum(best, least)
    at = codes + row // keys * codes_batch + head * codes_head + row % keys * codes_row + subspace
    tl.store(at, code.to(codes.dtype.element_ty), mask=row < rows)


@kernel()
def look_up(
    lut,
    x,
    codebook,
    rows: tl.int64,
    group: tl.int64,
    heads: tl.int64,
    subspaces: tl.int64,
    words: tl.int64,
    width: tl.int64,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """lut [batch, heads * group, subspaces, words] of x [heads, batch * group, dim]."""
    blocks = tl.cdiv(rows, ROWS)
    tiles = tl.cdiv(words, WORDS)
    program = tl.program_id(0).to(tl.int64)
    row = program % blocks * ROWS + tl.arange(0, ROWS)
    word = program // blocks % tiles * WORDS + tl.arange(0, WORDS)
    subspace = program // blocks // tiles % subspaces
    head = program // blocks // tiles // subspaces
    sum = products(x, codebook, row, rows, word, words, subspace, subspaces, head, width, TILE_K)
    table = (row // group * heads + head) * group + row % group
    at = lut + (table * subspaces + subspace)[:, None] * words + word[None, :]
    tl.store(at, sum, mask=(row < rows)[:, None] & (word < words)[None, :])


# --- Scores ----------------------------------------------------------------------------------------------------------


@kernel()
def quantize(
    table,
    step_base,
    lut,
    subspaces: tl.int64,
    words: tl.int64,
    WORDS: tl.constexpr,
):
    """table [tables, subspaces, words] uint8 and step_base [tables, 2] of one table: lut is about step * table + lo_j.

    base: the sum of lo_j. Both are NaN where an entry isn't finite.
    """
    number = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, WORDS)
    widest = tl.min(tl.zeros((WORDS,), tl.float32), 0)
    base, finite = widest, widest == 0
    for j in range(subspaces):
        row = lut + (number * subspaces + j) * words
        low, high = tl.full((WORDS,), float("inf"), tl.float32), tl.full((WORDS,), -float("inf"), tl.float32)
        for begin in range(0, words, WORDS):
            entry = tl.load(row + begin + word, mask=begin + word < words, other=0)
            there = begin + word < words
            finite &= tl.min(is_finite(entry).to(tl.int32), 0) != 0
            low, high = tl.minimum(low, tl.where(there, entry, low)), tl.maximum(high, tl.where(there, entry, high))
        least = tl.min(low, 0)
        base += least
        widest = tl.maximum(widest, tl.max(high, 0) - least)
    step = tl.div_rn(widest, 255.0)
    finite &= is_finite(step)
    for j in range(subspaces):
        row = (number * subspaces + j) * words
        low = tl.full((WORDS,), float("inf"), tl.float32)
        for begin in range(0, words, WORDS):
            there = begin + word < words
            low = tl.minimum(low, tl.load(lut + row + begin + word, mask=there, other=float("inf")))
        least = tl.min(low, 0)
        for begin in range(0, words, WORDS):
            there = begin + word < words
            entry = tl.load(lut + row + begin + word, mask=there, other=0)
            steps = tl.div_rn(entry - least, tl.where(step > 0, step, 1.0))
            # Of a step that is subnormal, and so not precise, there may be more.
            steps = nearest(tl.minimum(steps, 255.0))
            steps = tl.where(finite & (step > 0), steps, 0.0)
            tl.store(table + row + begin + word, steps.to(tl.int32).to(tl.uint8), mask=there)
    tl.store(step_base + 2 * number, tl.where(finite, step, float("nan")))
    tl.store(step_base + 2 * number + 1, tl.where(finite, base, float("nan")))


@triton.jit
def entries(table, code, row, words, mask):
    """Of rows [heads, 1] of tables, the entries [heads, keys] that codes [keys] name, 0 where the mask isn't."""
    # Codes of strangers stay inside of the table.
    code = tl.where((code >= 0) & (code < words), code, 0).to(tl.int64)
    return tl.load(table + row * words + code[None, :], mask=mask, other=0)


@kernel()
def score(
    scores,
    table,
    step_base,
    codes,
    lens,
    codes_batch: tl.int64,
    codes_head: tl.int64,
    codes_row: tl.int64,
    heads: tl.int64,
    group: tl.int64,
    keys: tl.int64,
    subspaces: tl.int64,
    words: tl.int64,
    has_lens: tl.int32,
    raw: tl.int32,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """scores [batch, heads * group, keys] of some heads of a group and some keys.

    raw: sums of table's entries, whatever they mean. A byte or an int16 of codes at a time: as compiled by Triton 3.6,
    16 of them at once, summed by tl.sum, gave wrong scores on an H200 where there were fewer.
    """
    tiles = tl.cdiv(keys, KEYS)
    parts = tl.cdiv(group, HEADS)
    program = tl.program_id(0).to(tl.int64)
    key = program % tiles * KEYS + tl.arange(0, KEYS)
    program = program // tiles
    member = program % parts * HEADS + tl.arange(0, HEADS)
    program = program // parts
    batch, head = program // heads, program % heads
    first = program * group  # the group's first table
    length = keys
    if has_lens != 0:
        length = tl.load(lens + batch)
    there = (key < keys) & (key < length)
    start = batch * codes_batch + head * codes_head + key * codes_row
    if table.dtype.element_ty == tl.uint8:
        total = tl.zeros((HEADS, KEYS), tl.int32)
    else:
        total = tl.zeros((HEADS, KEYS), tl.float32)
    places = subspaces
    if PACKED:
        places = subspaces // 2
    mask = there[None, :] & (member < group)[:, None]
    rows = ((first + member) * subspaces)[:, None]
    for j in range(places):
        code = tl.load(codes + start + j, mask=there, other=0).to(tl.int32)
        if PACKED:
            total += entries(table, code & 15, rows + 2 * j, words, mask).to(total.dtype)
            total += entries(table, code >> 4, rows + 2 * j + 1, words, mask).to(total.dtype)
        else:
            total += entries(table, code, rows + j, words, mask).to(total.dtype)
    if table.dtype.element_ty == tl.uint8:
        row = first + tl.minimum(member, group - 1)
        step, base = tl.load(step_base + 2 * row), tl.load(step_base + 2 * row + 1)
        sums = total.to(tl.float32)
        total = tl.where(raw != 0, sums, step[:, None] * sums + base[:, None])
    total = tl.where(there[None, :], total, -float("inf"))
    at = scores + (first + member)[:, None] * keys + key[None, :]
    tl.store(at, total, mask=(member < group)[:, None] & (key < keys)[None, :])


# --- The k best ------------------------------------------------------------------------------------------------------


@triton.jit
def middle(lens, batch, keys, sink, window, has_lens):
    """Where the keys to choose from begin and end, and the length."""
    length = keys
    if has_lens != 0:
        length = tl.minimum(tl.maximum(tl.load(lens + batch), 0), keys)
    begin = tl.minimum(sink, length)
    return begin, tl.maximum(begin, length - window), length


@triton.jit
def ranks(scores, row, key, keys, begin, end):
    """Integers in the order of scores: NaN is the lowest, and -0.0 is 0.0. And which keys are chosen from."""
    inside = (key >= begin) & (key < end)
    bits = tl.load(scores + row * keys + key, mask=inside, other=0).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rank = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > 0x7F800000, LOWEST, rank), inside


@triton.jit
def next_digit(counts, prefix, need):
    """Of counts [256]: `prefix` with the digit at which the need-th highest is, and how many are needed there."""
    digit = tl.arange(0, 256)
    count = tl.load(counts + digit)
    upto = tl.cumsum(count, 0)
    above = tl.sum(count, 0) - upto
    here = (above < need) & (need <= above + count)
    found = tl.sum(tl.where(here, digit, 0), 0)
    return prefix * 256 + found, need - tl.sum(tl.where(here, above, 0), 0)


@triton.jit
def narrowed(state, counts, step, row, rows):
    """The digits known after `step` passes, and how many scores are needed of those that have them."""
    before = ((step - 1) * rows + row) * 2
    prefix, need = next_digit(
        counts + ((step - 1) * rows + row) * 256, tl.load(state + before), tl.load(state + before + 1)
    )
    return tl.where(step == 1, prefix - 128, prefix), need  # the first digit has the sign


@kernel()
def count_digits(
    counts,
    state,
    scores,
    lens,
    heads: tl.int64,
    keys: tl.int64,
    rows: tl.int64,
    k: tl.int64,
    sink: tl.int64,
    window: tl.int64,
    step: tl.int64,
    has_lens: tl.int32,
    KEYS: tl.constexpr,
):
    """Adds to counts [4, rows, 256]: the digit `step` of those of some scores that share the digits before.

    state [5, rows, 2]: the digits before a step and how many are needed of them, for the next one.
    """
    tiles = tl.cdiv(keys, KEYS)
    program = tl.program_id(0).to(tl.int64)
    row, tile = program // tiles, program % tiles
    begin, end, _ = middle(lens, row // heads, keys, sink, window, has_lens)
    prefix, need = tl.min(tl.zeros((KEYS,), tl.int32), 0), tl.minimum(k, end - begin).to(tl.int32)
    if step > 0:
        prefix, need = narrowed(state, counts, step, row, rows)
    if tile == 0:
        tl.store(state + (step * rows + row) * 2, prefix)
        tl.store(state + (step * rows + row) * 2 + 1, need)
    key = tile * KEYS + tl.arange(0, KEYS)
    rank, inside = ranks(scores, row, key, keys, begin, end)
    shift = (24 - 8 * step).to(tl.int32)
    same = inside & ((step == 0) | ((rank >> tl.minimum(shift + 8, 31)) == prefix))
    digit = ((rank >> shift) + tl.where(step == 0, 128, 0)) & 255
    found = tl.histogram(digit, 256, mask=same)
    at = counts + (step * rows + row) * 256 + tl.arange(0, 256)
    tl.atomic_add(at, found, mask=found > 0, sem="relaxed")


@kernel()
def count_ties(
    ties,
    state,
    counts,
    scores,
    lens,
    heads: tl.int64,
    keys: tl.int64,
    rows: tl.int64,
    k: tl.int64,
    sink: tl.int64,
    window: tl.int64,
    has_lens: tl.int32,
    KEYS: tl.constexpr,
):
    """ties [rows, tiles]: scores equal to the k-th highest. The end of `state` gets that one, as a rank."""
    tiles = tl.cdiv(keys, KEYS)
    program = tl.program_id(0).to(tl.int64)
    row, tile = program // tiles, program % tiles
    begin, end, _ = middle(lens, row // heads, keys, sink, window, has_lens)
    least, need = narrowed(state, counts, 4, row, rows)
    least = tl.where(tl.minimum(k, end - begin) > 0, least, HIGHEST)
    if tile == 0:
        tl.store(state + (4 * rows + row) * 2, least)
        tl.store(state + (4 * rows + row) * 2 + 1, need)
    rank, inside = ranks(scores, row, tile * KEYS + tl.arange(0, KEYS), keys, begin, end)
    tl.store(ties + row * tiles + tile, tl.sum((inside & (rank == least)).to(tl.int32), 0))


@kernel()
def choose(
    places,
    idx,
    upto,
    tied,
    state,
    scores,
    lens,
    lists: tl.int64,
    members: tl.int64,
    keys: tl.int64,
    rows: tl.int64,
    sink: tl.int64,
    window: tl.int64,
    cap: tl.int64,
    has_lens: tl.int32,
    writes: tl.int32,
    KEYS: tl.constexpr,
):
    """Which keys of a block are chosen by any of a list's members: how many (places), or, if `writes`, idx itself.

    tied [rows, tiles] and upto [lists, tiles]: prefix sums of ties and of places, this block's included.
    """
    tiles = tl.cdiv(keys, KEYS)
    program = tl.program_id(0).to(tl.int64)
    number, tile = program // tiles, program % tiles
    begin, end, length = middle(lens, number // lists, keys, sink, window, has_lens)
    key = tile * KEYS + tl.arange(0, KEYS)
    chosen = (key < begin) | ((key >= end) & (key < length))
    for member in range(members):
        row = number * members + member
        rank, inside = ranks(scores, row, key, keys, begin, end)
        least = tl.load(state + (4 * rows + row) * 2)
        need = tl.load(state + (4 * rows + row) * 2 + 1)
        tie = (inside & (rank == least)).to(tl.int32)
        before = tl.load(tied + row * tiles + tile) - tl.sum(tie, 0)
        earlier = before + tl.cumsum(tie, 0) - tie
        chosen = chosen | (inside & ((rank > least) | ((tie != 0) & (earlier < need))))
    found = chosen.to(tl.int32)
    if writes == 0:
        tl.store(places + number * tiles + tile, tl.sum(found, 0))
    else:
        place = tl.load(upto + number * tiles + tile) - tl.sum(found, 0) + tl.cumsum(found, 0) - 1
        tl.store(idx + number * cap + place, key, mask=chosen & (place < cap))


# --- Attention -------------------------------------------------------------------------------------------------------


@triton.jit
def cut(x):
    """x to the 11 bits that tensor cores take, and the rest."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def weighted(p, v, sum):
    """sum + p v for float32 p, all of its bits, and v of any type."""
    if v.dtype == tl.float32:
        return tl.dot(p, v, sum, input_precision="ieee")
    v = widen(v)  # which has no more than 11 bits
    high, rest = cut(p)
    middle, low = cut(rest)
    finite = tl.where(is_finite(v), v, 0.0)  # 0 times infinity would be NaN
    sum = tl.dot(low, finite, sum, input_precision="tf32")
    sum = tl.dot(middle, finite, sum, input_precision="tf32")
    return tl.dot(high, v, sum, input_precision="tf32")


@triton.jit
def reached(most):
    """What scores are taken relative to: 0 where there is none."""
    return tl.where(most == -float("inf"), 0.0, most)


@kernel()
def attend(
    part,
    most_total,
    q,
    k,
    v,
    idx,
    count,
    q_batch: tl.int64,
    q_head: tl.int64,
    k_batch: tl.int64,
    k_head: tl.int64,
    k_row: tl.int64,
    v_batch: tl.int64,
    v_head: tl.int64,
    v_row: tl.int64,
    heads: tl.int64,
    group: tl.int64,
    lists: tl.int64,
    keys: tl.int64,
    dim: tl.int64,
    value_dim: tl.int64,
    cap: tl.int64,
    splits: tl.int64,
    scale: tl.float32,
    has_idx: tl.int32,
    has_count: tl.int32,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One share of the keys, for some heads and some columns of v.

    part [batch, heads, splits, value_dim]: sums of v e^(score - most); most_total [batch, heads, splits, 2].
    VECTOR: what k's and v's strides and numbers of columns are multiples of, see `row_at`.
    """
    members = heads // lists  # of a list
    blocks = tl.cdiv(members, HEADS)
    tiles = tl.maximum(tl.cdiv(value_dim, DIM), 1)
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    program = program // splits
    tile = program % tiles
    program = program // tiles
    member = program % blocks * HEADS + tl.arange(0, HEADS)
    program = program // blocks
    number, batch = program % lists, program // lists
    head = number * members + member
    key_head = number * members // group
    counter, limit = batch, keys
    if has_idx != 0:
        counter, limit = batch * lists + number, cap
    entries = limit
    if has_count != 0:
        entries = tl.minimum(tl.maximum(tl.load(count + counter), 0), limit)
    share = tl.cdiv(tl.cdiv(entries, splits), KEYS) * KEYS
    begin = split * share
    end = tl.minimum(entries, begin + share)

    used = member < members
    q_row = q + batch * q_batch + head * q_head
    k_base = row_at(row_at(k, batch, k_batch, VECTOR), key_head, k_head, VECTOR)
    v_base = row_at(row_at(v, batch, v_batch, VECTOR), key_head, v_head, VECTOR)
    dim, value_dim = multiple(dim, VECTOR), multiple(value_dim, VECTOR)
    n = tile * DIM + tl.arange(0, DIM)
    sum = tl.zeros((HEADS, DIM), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    most = tl.full((HEADS,), float("-inf"), tl.float32)
    for at in range(begin, end, KEYS):
        entry = at + tl.arange(0, KEYS)
        there = entry < end
        key = tl.load(idx + (batch * lists + number) * cap + entry, mask=there & (has_idx != 0), other=0)
        key = tl.where(has_idx != 0, key, entry)
        there &= (key >= 0) & (key < keys)
        key = tl.where(there, key, 0)
        k_row_at, v_row_at = row_at(k_base, key, k_row, VECTOR), row_at(v_base, key, v_row, VECTOR)
        scores = tl.zeros((HEADS, KEYS), tl.float32)
        for begin_d in range(0, dim, DIM):
            d = begin_d + tl.arange(0, DIM)
            q_tile = tl.load(q_row[:, None] + d[None, :], mask=used[:, None] & (d < dim)[None, :], other=0)
            k_tile = tl.load(k_row_at[:, None] + d[None, :], mask=there[:, None] & (d < dim)[None, :], other=0)
            scores = dot(q_tile, tl.trans(k_tile), scores)
        scores = tl.where(there[None, :], scores * scale, float("-inf"))
        above = tl.maximum(most, tl.max(scores, 1))
        p = tl.exp(scores - reached(above)[:, None])
        kept = tl.exp(most - reached(above))
        total = total * kept + tl.sum(p, 1)
        v_tile = tl.load(v_row_at[:, None] + n[None, :], mask=there[:, None] & (n < value_dim)[None, :], other=0)
        sum = weighted(p, v_tile, sum * kept[:, None])
        most = above
    row = (batch * heads + head) * splits + split
    tl.store(part + row[:, None] * value_dim + n[None, :], sum, mask=used[:, None] & (n < value_dim)[None, :])
    if tile == 0:
        tl.store(most_total + 2 * row, most, mask=used)
        tl.store(most_total + 2 * row + 1, total, mask=used)


@kernel()
def merge(
    out,
    lse,
    part,
    most_total,
    value_dim: tl.int64,
    splits: tl.int64,
    COLS: tl.constexpr,
):
    """out [rows, value_dim] and lse [rows] of the shares of one head, in their order."""
    tiles = tl.maximum(tl.cdiv(value_dim, COLS), 1)  # lse is wanted of no columns too
    program = tl.program_id(0).to(tl.int64)
    row, tile = program // tiles, program % tiles
    col = tile * COLS + tl.arange(0, COLS)
    first = row * splits
    most = tl.load(most_total + 2 * first)
    for split in range(1, splits):
        most = tl.maximum(most, tl.load(most_total + 2 * (first + split)))
    above = reached(most)
    sum = tl.zeros((COLS,), tl.float32)
    total = tl.min(sum, 0)
    for split in range(splits):
        kept = tl.exp(tl.load(most_total + 2 * (first + split)) - above)
        total += kept * tl.load(most_total + 2 * (first + split) + 1)
        sum += kept * tl.load(part + (first + split) * value_dim + col, mask=col < value_dim, other=0)
    result = tl.where(total == 0, 0.0, sum / tl.where(total == 0, 1.0, total))
    tl.store(out + row * value_dim + col, narrow(result, out.dtype.element_ty), mask=col < value_dim)
    if tile == 0:
        tl.store(lse + row, above + tl.log(total))


# --- Variants --------------------------------------------------------------------------------------------------------

ROTATE = {
    (dtype, angles): Variant(rotate, {"out": dtype, "q": dtype, "cos": angles, "sin": angles}, {"ROWS": 8, "COLS": 64})
    for dtype, angles in dict.fromkeys((dtype, angles) for dtype in FLOATS for angles in (torch.float32, dtype))
}
PROJECT = {
    dtype: Variant(
        project,
        {"out": torch.float32, "x": dtype, "matrix": torch.float32},
        {"ROWS": 32, "COLS": 64, "TILE_K": 32},
    )
    for dtype in FLOATS
}
# By the type of codes and whether there are at most 16 words.
ENCODE = {
    (codes, few): Variant(
        encode,
        {"codes": codes, "x": torch.float32, "codebook": torch.float32, "norms": torch.float32},
        {"ROWS": 64 if few else 32, "WORDS": 16 if few else 64, "TILE_K": 16},
    )
    for codes, few in ((torch.uint8, True), (torch.uint8, False), (torch.int16, False))
}
LOOK_UP = Variant(
    look_up,
    {"lut": torch.float32, "x": torch.float32, "codebook": torch.float32},
    {"ROWS": 16, "WORDS": 64, "TILE_K": 16},
)
QUANTIZE = Variant(
    quantize,
    {"table": torch.uint8, "step_base": torch.float32, "lut": torch.float32},
    {"WORDS": 128},
    fused=False,
)
# By the types of tables and codes, whether codes are packed, and the heads that share loaded codes.
SCORE = {
    (table, codes, packed, heads): Variant(
        score,
        {"scores": torch.float32, "table": table, "step_base": torch.float32, "codes": codes, "lens": torch.int64},
        {"KEYS": 128, "HEADS": heads, "PACKED": packed},
        fused=False,
    )
    for table in (torch.float32, torch.uint8)
    for codes, packed in ((torch.uint8, True), (torch.uint8, False), (torch.int16, False))
    for heads in (1, 4)
}
RANKED = {"scores": torch.float32, "lens": torch.int64}
COUNT_DIGITS = Variant(count_digits, {"counts": torch.int32, "state": torch.int32, **RANKED}, {"KEYS": 1024})
COUNT_TIES = Variant(
    count_ties, {"ties": torch.int32, "state": torch.int32, "counts": torch.int32, **RANKED}, {"KEYS": 1024}
)
CHOOSE = Variant(
    choose,
    {
        "places": torch.int32,
        "idx": torch.int64,
        "upto": torch.int32,
        "tied": torch.int32,
        "state": torch.int32,
        **RANKED,
    },
    {"KEYS": 1024},
)
ATTEND = {
    (dtype, dim, aligned): Variant(
        attend,
        {
            "part": torch.float32,
            "most_total": torch.float32,
            "q": dtype,
            "k": dtype,
            "v": dtype,
            "idx": torch.int64,
            "count": torch.int64,
        },
        {"HEADS": 16, "KEYS": 32, "DIM": dim, "VECTOR": vector(dtype) if aligned else 1},
        # As many as keep all in registers on every architecture.
        num_warps=8 if dtype == torch.float32 and (dim > 64 or not aligned) else 4,
        num_stages=4 if dtype == torch.float32 and dim == 64 and aligned else 3,
    )
    for dtype in FLOATS
    for dim, aligned in ((64, True), (128, True), (64, False))
}
MERGE = {
    dtype: Variant(
        merge,
        {"out": dtype, "lse": torch.float32, "part": torch.float32, "most_total": torch.float32},
        {"COLS": 128},
    )
    for dtype in FLOATS
}


def variants() -> Iterator[Variant]:
    """All that the functions below can launch."""
    yield from (LOOK_UP, QUANTIZE, COUNT_DIGITS, COUNT_TIES, CHOOSE)
    for table in (ROTATE, PROJECT, ENCODE, SCORE, ATTEND, MERGE):
        yield from table.values()


# --- The ops ---------------------------------------------------------------------------------------------------------

NUMBERS_AT_ONCE = 2**26  # of vq_encode: bounds the memory that it takes for keys in float32
PROGRAMS = 264  # that keys are shared out among: two for each multiprocessor of an H200, not measured
MOST_SPLITS = 64


def as_lines(t: Tensor) -> Tensor:
    """t with its last dimension contiguous; a copy where it isn't."""
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def as_int64(t: Tensor | None, like: Tensor) -> Tensor:
    """For kernels, which want a pointer also where there is nothing."""
    return like.new_empty(0, dtype=torch.int64) if t is None else t.long().contiguous()


def projected(x: Tensor, matrix: Tensor | None) -> Tensor:
    """x [batch, heads, keys, dim] times matrix [heads, dim, dim]: [heads, batch * keys, dim] float32."""
    batch, heads, keys, dim = x.shape
    if matrix is None:
        return x.transpose(0, 1).reshape(heads, batch * keys, dim).float().contiguous()
    out = x.new_empty((heads, batch * keys, dim), dtype=torch.float32)
    variant, x = PROJECT[x.dtype], as_lines(x)
    tiles = triton.cdiv(batch * keys, variant.constants["ROWS"]) * triton.cdiv(dim, variant.constants["COLS"])
    variant.launch(
        (heads * tiles,),
        out=out,
        x=x,
        matrix=matrix.contiguous(),
        x_batch=x.stride(0),
        x_head=x.stride(1),
        x_row=x.stride(2),
        rows=batch * keys,
        keys=keys,
        dim=dim,
    )
    return out


def vq_encode(keys: Tensor, codebook: Tensor, chol: Tensor | None = None, *, pack: bool = False) -> Tensor:
    reference.check_encode(keys, codebook, chol, pack)
    batch, heads, length, dim = keys.shape
    _, subspaces, words, width = codebook.shape
    dtype = torch.uint8 if words <= 256 else torch.int16
    codes = keys.new_empty((batch, heads, length, subspaces), dtype=dtype)
    if codes.numel():
        variant = ENCODE[dtype, words <= 16]
        codebook = codebook.contiguous()
        norms = codebook.square().sum(-1)
        step = max(1, NUMBERS_AT_ONCE // (batch * heads * max(1, dim)))
        for begin in range(0, length, step):
            x = projected(keys[:, :, begin : begin + step], chol)
            some = codes[:, :, begin : begin + step]
            variant.launch(
                (heads * subspaces * triton.cdiv(x.shape[1], variant.constants["ROWS"]),),
                codes=some,
                x=x,
                codebook=codebook,
                norms=norms,
                codes_batch=some.stride(0),
                codes_head=some.stride(1),
                codes_row=some.stride(2),
                rows=x.shape[1],
                keys=some.shape[2],
                subspaces=subspaces,
                words=words,
                width=width,
            )
    return codes[..., 0::2] | codes[..., 1::2] << 4 if pack else codes


def vq_lut(q: Tensor, codebook: Tensor, inv: Tensor | None = None) -> Tensor:
    reference.check_lut(q, codebook, inv)
    batch, all_heads, _ = q.shape
    heads, subspaces, words, width = codebook.shape
    lut = q.new_empty((batch, all_heads, subspaces, words), dtype=torch.float32)
    if lut.numel():
        group = all_heads // heads
        x = projected(q.unflatten(1, (heads, group)), inv)
        blocks = triton.cdiv(batch * group, LOOK_UP.constants["ROWS"])
        LOOK_UP.launch(
            (heads * subspaces * triton.cdiv(words, LOOK_UP.constants["WORDS"]) * blocks,),
            lut=lut,
            x=x,
            codebook=codebook.contiguous(),
            rows=batch * group,
            group=group,
            heads=heads,
            subspaces=subspaces,
            words=words,
            width=width,
        )
    return lut


def scored(lut: Tensor, codes: Tensor, lens: Tensor, has_lens: bool, table: str, *, raw: bool) -> Tensor:
    """[B, H, S] of tensors that aren't empty. raw: of 8-bit tables, the sums of entries."""
    batch, all_heads, subspaces, words = lut.shape
    heads, keys = codes.shape[1:3]
    group = all_heads // heads
    scores = lut.new_empty((batch, all_heads, keys))
    lut, codes = lut.contiguous(), as_lines(codes)
    step_base = lut.new_empty((batch, all_heads, 2))
    if table == "int8":
        wide, lut = lut, torch.empty_like(lut, dtype=torch.uint8)
        QUANTIZE.launch(
            (batch * all_heads,), table=lut, step_base=step_base, lut=wide, subspaces=subspaces, words=words
        )
    variant = SCORE[lut.dtype, codes.dtype, codes.shape[3] != subspaces, 1 if group == 1 else 4]
    parts = triton.cdiv(group, variant.constants["HEADS"])
    variant.launch(
        (batch * heads * parts * triton.cdiv(keys, variant.constants["KEYS"]),),
        scores=scores,
        table=lut,
        step_base=step_base,
        codes=codes,
        lens=lens,
        codes_batch=codes.stride(0),
        codes_head=codes.stride(1),
        codes_row=codes.stride(2),
        heads=heads,
        group=group,
        keys=keys,
        subspaces=subspaces,
        words=words,
        has_lens=int(has_lens),
        raw=int(raw),
    )
    return scores


def vq_score(lut: Tensor, codes: Tensor, lens: Tensor | None = None, *, table: str = "float32") -> Tensor:
    reference.check_score(lut, codes, lens, table)
    if not lut.shape[0] * lut.shape[1] * codes.shape[2]:
        return lut.new_empty((*lut.shape[:2], codes.shape[2]))
    return scored(lut, codes, as_int64(lens, lut), lens is not None, table, raw=False)


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
    _, _, lists, cap = reference.check_topk(lut, codes, k, lens, sink, window, union_group, table)
    batch, all_heads = lut.shape[:2]
    keys = codes.shape[2]
    idx = lut.new_full((batch, lists, cap), -1, dtype=torch.int64)
    if not batch * lists * keys:
        return idx, lut.new_zeros((batch, lists), dtype=torch.int64)
    rows = batch * all_heads
    given = {
        "scores": scored(lut, codes, as_int64(lens, lut), lens is not None, table, raw=True),
        "lens": as_int64(lens, lut),
        "has_lens": int(lens is not None),
        "keys": keys,
        "rows": rows,
        "sink": sink,
        "window": window,
    }
    tiles = triton.cdiv(keys, COUNT_DIGITS.constants["KEYS"])
    counts = idx.new_zeros((4, rows, 256), dtype=torch.int32)
    state = counts.new_empty((5, rows, 2))
    search = {"counts": counts, "state": state, "heads": all_heads, "k": min(k, keys), **given}
    for step in range(4):
        COUNT_DIGITS.launch((rows * tiles,), step=step, **search)
    ties = counts.new_empty((rows, tiles))
    COUNT_TIES.launch((rows * tiles,), ties=ties, **search)
    places = counts.new_empty((batch * lists, tiles))
    choice = {
        "idx": idx,
        "tied": ties.cumsum(1, dtype=torch.int32),
        "state": state,
        "lists": lists,
        "members": all_heads // lists,
        "cap": cap,
        **given,
    }
    grid = (batch * lists * tiles,)
    CHOOSE.launch(grid, places=places, upto=places, writes=0, **choice)
    upto = places.cumsum(1, dtype=torch.int32)
    CHOOSE.launch(grid, places=places, upto=upto, writes=1, **choice)
    return idx, upto[:, -1].long().view(batch, lists)


def vq_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor | None = None,
    count: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    reference.check_attend(q, k, v, idx, count)
    for name, t in (("k", k), ("v", v)):
        torch._check(
            t.device == q.device or t.is_pinned(),
            lambda name=name: (
                f"effk::vq_attend: {name} is in memory of the CPU that isn't pinned; wanted {q.device}, or pinned"
            ),
        )
    batch, all_heads, dim = q.shape
    heads, keys, value_dim = k.shape[1], k.shape[2], v.shape[3]
    out, lse = q.new_empty((batch, all_heads, value_dim)), q.new_empty((batch, all_heads), dtype=torch.float32)
    if not lse.numel():
        return out, lse
    cap = keys if idx is None else idx.shape[2]
    if not keys * cap:
        return out.zero_(), lse.fill_(-float("inf"))
    lists = heads if idx is None else idx.shape[1]
    q, k, v = as_lines(q), as_lines(k), as_lines(v)
    whole = in_vectors(k, v)
    variant = ATTEND[q.dtype, 128 if whole and max(dim, value_dim) > 64 else 64, whole]
    tiles = max(1, triton.cdiv(value_dim, variant.constants["DIM"]))
    programs = batch * lists * triton.cdiv(all_heads // lists, variant.constants["HEADS"]) * tiles
    splits = min(MOST_SPLITS, triton.cdiv(cap, 2 * variant.constants["KEYS"]), triton.cdiv(PROGRAMS, programs))
    part = lse.new_empty((batch, all_heads, splits, value_dim))
    most_total = lse.new_empty((batch, all_heads, splits, 2))
    variant.launch(
        (programs * splits,),
        part=part,
        most_total=most_total,
        q=q,
        k=k,
        v=v,
        idx=as_int64(idx, q),
        count=as_int64(count, q),
        q_batch=q.stride(0),
        q_head=q.stride(1),
        k_batch=k.stride(0),
        k_head=k.stride(1),
        k_row=k.stride(2),
        v_batch=v.stride(0),
        v_head=v.stride(1),
        v_row=v.stride(2),
        heads=all_heads,
        group=all_heads // heads,
        lists=lists,
        keys=keys,
        dim=dim,
        value_dim=value_dim,
        cap=cap,
        splits=splits,
        scale=dim**-0.5 if scale is None else scale,
        has_idx=int(idx is not None),
        has_count=int(count is not None),
    )
    merging = MERGE[q.dtype]
    merging.launch(
        (batch * all_heads * max(1, triton.cdiv(value_dim, merging.constants["COLS"])),),
        out=out,
        lse=lse,
        part=part,
        most_total=most_total,
        value_dim=value_dim,
        splits=splits,
    )
    return out, lse


def vq_wrope(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    reference.check_wrope(q, cos, sin)
    out = q.new_empty(q.shape)
    if out.numel():
        rows = q.numel() // q.shape[-1]
        q = as_lines(q.reshape(rows, q.shape[-1]))
        if cos.dtype != sin.dtype:
            cos, sin = cos.float(), sin.float()
        variant = ROTATE[q.dtype, cos.dtype]
        variant.launch(
            (triton.cdiv(rows, variant.constants["ROWS"]),),
            out=out,
            q=q,
            cos=cos.contiguous(),
            sin=sin.contiguous(),
            q_stride=q.stride(0),
            rows=rows,
            half=q.shape[-1] // 2,
        )
    return out
