"""Golden bytes, worked out by hand from docs/formats/lscd.md, and the tests' own packer against them."""

import torch

from ..kit.backends import Backend, on_backends
from ..kit.tensors import bits, same_bits
from . import format

N = 1 << 63  # bit 63


def golden(rows: int, cols: int, dtype: torch.dtype, weights: dict, bitmap: dict, offsets: list, values: dict):
    """A case: w, and its packed tensors from the nonzero words {(s, c, h): word} and values {position: bits}."""
    w = torch.zeros(rows, cols, dtype=dtype)
    for at, weight in weights.items():
        w[at] = weight
    strips, sub_cols, _ = format.sizes(rows, cols)
    words = torch.zeros(strips, sub_cols, 2, dtype=torch.int64)
    for at, word in bitmap.items():
        words[at] = format.signed(word)
    stored = torch.zeros(offsets[-1] + 64, dtype=bits(w).dtype)
    for at, pattern in values.items():
        stored[at] = pattern
    return w, (stored.view(dtype), words, torch.tensor(offsets))


NAN, INF = float("nan"), float("inf")

GOLDEN = {
    "the example of the page": golden(
        2,
        3,
        torch.bfloat16,
        {(0, 0): 1.0, (0, 2): -2.0, (1, 2): 0.5},
        {(0, 0, 0): 0x0405},
        [0, 16],
        {0: 0x3F80, 1: 0xC000 - 0x10000, 2: 0x3F00},
    ),
    # 17 rows: a second strip with one row. Row 8 is the first of the lower half; column 8 of the second sub-column.
    "ragged rows and columns": golden(
        17,
        10,
        torch.float16,
        {(0, 9): 1.0, (7, 0): 2.0, (7, 7): -1.0, (8, 0): 0.5, (15, 9): 4.0, (16, 8): -0.5},
        {
            (0, 0, 0): 1 << 56 | N,  # (7, 0), (7, 7)
            (0, 0, 1): 1,  # (8, 0)
            (0, 1, 0): 1 << 1,  # (0, 9)
            (0, 1, 1): 1 << 57,  # (15, 9)
            (1, 1, 0): 1,  # (16, 8)
        },
        [0, 16, 32],
        {0: 0x4000, 1: 0xBC00 - 0x10000, 2: 0x3800, 3: 0x3C00, 4: 0x4400, 16: 0xB800 - 0x10000},
    ),
    # Columns 0 to 255 are tile 0, column 256 on is tile 1; sub_cols = 2 * ceil(258, 16) = 34. The first tile is empty
    # in the second strip.
    "two tiles, two strips": golden(
        18,
        258,
        torch.float32,
        {(0, 255): 1.0, (9, 255): 2.0, (0, 256): -1.0, (2, 257): 0.5, (17, 256): 3.0},
        {
            (0, 31, 0): 1 << 7,
            (0, 31, 1): 1 << 15,
            (0, 32, 0): 1 << 0 | 1 << 17,
            (1, 32, 0): 1 << 8,
        },
        [0, 16, 32, 32, 48],
        {
            0: 0x3F800000,
            1: 0x40000000,
            16: 0xBF800000 - (1 << 32),
            17: 0x3F000000,
            32: 0x40400000,
        },
    ),
    # Words go down the strip first: the weight of row 8 comes before the one of column 8, which is in row 0.
    "integers, lower half before the next column": golden(
        16,
        16,
        torch.int8,
        {(8, 0): -128, (0, 8): 127, (15, 15): -1},
        {(0, 0, 1): 1, (0, 1, 0): 1, (0, 1, 1): N},
        [0, 16],
        {0: -128, 1: 127, 2: -1},
    ),
    "seventeen in a row take two groups of sixteen": golden(
        1,
        17,
        torch.int8,
        {(0, k): k + 1 for k in range(17)},
        {(0, 0, 0): 0xFF, (0, 1, 0): 0xFF, (0, 2, 0): 1},
        [0, 32],
        {k: k + 1 for k in range(17)},
    ),
    "NaN and infinities are stored, negative zero is not": golden(
        1,
        4,
        torch.bfloat16,
        {(0, 0): NAN, (0, 1): -0.0, (0, 2): INF, (0, 3): -INF},
        {(0, 0, 0): 0b1101},
        [0, 16],
        {0: 0x7FC0, 1: 0x7F80, 2: 0xFF80 - 0x10000},
    ),
    "nothing stored": golden(3, 5, torch.float32, {}, {}, [0, 0], {}),
    "no rows": golden(0, 20, torch.float16, {}, {}, [0], {}),
    "no columns": golden(20, 0, torch.float16, {}, {}, [0], {}),
}


def assert_same(packed: format.Packed, wanted: format.Packed) -> None:
    for name, a, b in zip(("values", "bitmap", "offsets"), packed, wanted, strict=True):
        assert same_bits(a, b), f"{name}: {bits(a).tolist()}, wanted {bits(b).tolist()}"


def test_the_tests_own_packer() -> None:
    for w, packed in GOLDEN.values():
        assert_same(format.pack(w), packed)
        assert format.is_valid(packed, *w.shape)


@on_backends("lscd_pack")
def test_golden_bytes(backend: Backend) -> None:
    for w, packed in GOLDEN.values():
        assert_same(backend.run("lscd_pack", w), packed)


@on_backends("lscd_unpack")
def test_golden_bytes_unpack(backend: Backend) -> None:
    for w, packed in GOLDEN.values():
        assert same_bits(backend.run("lscd_unpack", *packed, *w.shape), w + 0)  # + 0: no negative zeros
