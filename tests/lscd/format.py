"""docs/formats/lscd.md once more, weight by weight: what packed tensors are compared with. Shares no code with effk."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kit.tensors import bits

PAD = 64
Packed = tuple[Tensor, Tensor, Tensor]  # values, bitmap, offsets


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def sizes(rows: int, cols: int) -> tuple[int, int, int]:
    """strips, sub_cols, tiles"""
    sub_cols = 2 * ceil_div(cols, 16)
    return ceil_div(rows, 16), sub_cols, ceil_div(sub_cols, 32)


def tile_words(rows: int, cols: int) -> Iterator[list[tuple[int, int, int]]]:
    """The indices (s, c, h) of the words of each tile, in the order of offsets."""
    strips, sub_cols, tiles = sizes(rows, cols)
    for s in range(strips):
        for t in range(tiles):
            yield [(s, c, h) for c in range(32 * t, min(32 * t + 32, sub_cols)) for h in range(2)]


def word_weights(s: int, c: int, h: int) -> Iterator[tuple[int, int]]:
    """Row and column of the weights of a word, from bit 0 on."""
    return ((16 * s + 8 * h + r, 8 * c + k) for r in range(8) for k in range(8))


def signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def pack(w: Tensor) -> Packed:
    rows, cols = w.shape
    strips, sub_cols, _ = sizes(rows, cols)
    patterns, nonzero = bits(w).tolist(), (w != 0).tolist()
    bitmap = torch.zeros(strips, sub_cols, 2, dtype=torch.int64)
    values: list[int] = []
    offsets = [0]
    for words in tile_words(rows, cols):
        for s, c, h in words:
            word = 0
            for bit, (row, col) in enumerate(word_weights(s, c, h)):
                if row < rows and col < cols and nonzero[row][col]:
                    word |= 1 << bit
                    values.append(patterns[row][col])
            bitmap[s, c, h] = signed(word)
        values += [0] * (-len(values) % 16)
        offsets.append(len(values))
    return torch.tensor(values + [0] * PAD, dtype=bits(w).dtype).view(w.dtype), bitmap, torch.tensor(offsets)


def unused(packed: Packed) -> Tensor:
    """Flags of the entries of values that hold no weight: gaps and padding."""
    values, bitmap, offsets = packed
    used = torch.zeros(len(values), dtype=torch.bool)
    flags = bitmap.flatten(1).tolist()
    tiles = (len(offsets) - 1) // max(1, len(flags))
    for tile, begin in enumerate(offsets[:-1].tolist()):
        s, t = divmod(tile, tiles)
        ones = sum((word % (1 << 64)).bit_count() for word in flags[s][64 * t : 64 * t + 64])
        used[begin : begin + ones] = True
    return ~used


def is_valid(packed: Packed, rows: int, cols: int) -> bool:
    """Whether contents (of the right shapes) keep what "Untrusted input" asks for."""
    values, bitmap, offsets = packed
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] != len(values) - PAD:
        return False
    for i, words in enumerate(tile_words(rows, cols)):
        ones = 0
        for s, c, h in words:
            word = int(bitmap[s, c, h])
            for bit, (row, col) in enumerate(word_weights(s, c, h)):
                if word >> bit & 1:
                    ones += 1
                    if row >= rows or col >= cols:
                        return False
        if ends[i + 1] - ends[i] != 16 * ceil_div(ones, 16):
            return False
    return True
