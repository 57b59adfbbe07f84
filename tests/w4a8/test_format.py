"""Golden bytes, worked out by hand from docs/formats/w4a8.md, and the tests' own packer against them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kit.backends import Backend, on_backends
from ..kit.tensors import same_bits
from . import format
from .format import Packed

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Golden:
    """A weight [N, K] and its packed tensors. Bytes are hexadecimal, and zeros where nothing is said.

    is8: the 8-bit features.
    q4: {(block, chunk): the words of its first rows}.
    group4: {(block, group): scales and zero points of its first rows}.
    q8: all of it. group8: {(block, group): scales of its first rows}.
    """

    group_size: int
    w: Tensor
    is8: tuple[int, ...]
    perm: list[int]
    q4: dict[tuple[int, int], str] = field(default_factory=dict)
    group4: dict[tuple[int, int], tuple[list[float], list[int]]] = field(default_factory=dict)
    q8: str = ""
    group8: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    @property
    def flags(self) -> Tensor:
        return torch.tensor([i in self.is8 for i in range(self.w.shape[0])], dtype=torch.bool)

    @property
    def packed(self) -> Packed:
        (n, k), n8 = self.w.shape, len(self.is8)
        blocks4, blocks8, groups = -(-(n - n8) // 16), -(-n8 // 16), -(-k // self.group_size)
        q4 = torch.zeros(blocks4, -(-k // 8), 16, 4, dtype=torch.uint8)
        scale4, scale8 = torch.zeros(blocks4, groups, 16), torch.zeros(blocks8, groups, 16)
        zero4 = torch.zeros(blocks4, groups, 16, dtype=torch.uint8)
        for at, text in self.q4.items():
            bytes_ = bytes.fromhex(text)
            q4[at].view(-1)[: len(bytes_)] = torch.tensor(list(bytes_), dtype=torch.uint8)
        for at, (scales, zeros) in self.group4.items():
            scale4[at][: len(scales)] = torch.tensor(scales)
            zero4[at][: len(zeros)] = torch.tensor(zeros, dtype=torch.uint8)
        for at, scales in self.group8.items():
            scale8[at][: len(scales)] = torch.tensor(scales)
        q8 = torch.tensor(list(bytes.fromhex(self.q8)), dtype=torch.uint8).reshape(n8, k)
        return Packed(q4, scale4, zero4, q8, scale8, torch.tensor(self.perm, dtype=torch.int32))


def sparse(n: int, k: int, weights: dict[tuple[int, int], float], dtype: torch.dtype = torch.float32) -> Tensor:
    w = torch.zeros(n, k, dtype=dtype)
    for at, weight in weights.items():
        w[at] = weight
    return w


GOLDEN = {
    "the example of the page": Golden(
        32,
        torch.tensor(
            [
                [0.0, 1, 2, 3, 4, 5, 6, 7, 8, 15],
                [-127, 0, 1, 2, 3, 4, 5, 6, 7, 8],
                [-8, -8, 0, 0, 7, 7, 1, 1, 2, -1],
            ]
        ),
        is8=(1,),
        perm=[0, 2, 1],
        q4={(0, 0): "40516273 f0f09898", (0, 1): "080f0000 0a070000"},
        group4={(0, 0): ([1, 1], [0, 8])},
        q8="0180818283848586 8788",
        group8={(0, 0): [1]},
    ),
    # 17 rows: a second block with one. Groups begin at 32 and 64; the last has one column. Zeros have scale 1.
    "ragged rows and groups": Golden(
        32,
        sparse(17, 65, {(0, 0): 7.5, (0, 36): -30.0, (15, 7): -15.0, (16, 63): 3.75, (16, 64): -3.75}, torch.float16),
        is8=(),
        perm=list(range(17)),
        q4={
            (0, 0): "0f000000" + "00000000" * 14 + "ffffff0f",  # row 15: zero 15, but q = 0 at k = 7
            (0, 1): "00000000" * 15 + "ffffffff",
            (0, 2): "00000000" * 15 + "ffffffff",
            (0, 3): "00000000" * 15 + "ffffffff",
            (0, 4): "0fffffff",  # zero 15, but q = 0 at k = 36
            (0, 5): "ffffffff",
            (0, 6): "ffffffff",
            (0, 7): "ffffffff",
            (1, 7): "000000f0",  # k = 63
            (1, 8): "00000000",  # zero 15, q = 0; k = 65 to 71 are padding
        },
        group4={
            (0, 0): ([0.5] + [1] * 14 + [1], [0] * 15 + [15]),
            (0, 1): ([2] + [1] * 15, [15]),
            (0, 2): ([1] * 16, []),
            (1, 0): ([1], [0]),
            (1, 1): ([0.25], [0]),
            (1, 2): ([0.25], [15]),
        },
    ),
    # 18 rows of 8 bits: blocks of 16 and 2. K = 6: a word and 2 columns that are left. Features 0 and 19 have 4 bits.
    "words of 8 bits and what is left": Golden(
        64,
        torch.cat(
            [
                torch.zeros(1, 6),
                # 127, then the number of the row at k = 1 and 4, and their negatives at k = 3 and 5.
                torch.tensor([[127.0, i, 0, -i, i, -i] for i in range(1, 19)]),
                torch.zeros(1, 6),
            ]
        ).bfloat16(),
        is8=tuple(range(1, 19)),
        perm=[0, 19, *range(1, 19)],
        group4={(0, 0): ([1, 1], [])},
        q8="".join(f"ff{128 + i:02x}80{128 - i:02x}" for i in range(1, 17))
        + "".join(f"{128 + i:02x}{128 - i:02x}" for i in range(1, 17))
        + "ff91806f ff92806e 916f 926e",
        group8={(0, 0): [1] * 16, (1, 0): [1, 1]},
    ),
    # Ties go to even: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, both ways; and -low / scale = 7.5 -> 8, after which the largest,
    # 7.5 -> 8, would be 16.
    "ties": Golden(
        32,
        torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5], [7.5, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -7.5]]),
        is8=(0,),
        perm=[1, 0],
        # 8 + (8, 0, 2, 2), cut to 15; 8 + (0, -2, -2, -8)
        q4={(0, 0): "8f686a0a"},
        group4={(0, 0): ([1], [8])},
        q8="ff808282 807e7efe",
        group8={(0, 0): [1]},
    ),
    "NaN, infinities, and a range that overflows": Golden(
        32,
        torch.tensor([[NAN, 1.0], [INF, 1.0], [-INF, 1.0], [3e38, -3e38], [1.0, NAN], [-INF, 2.0], [127.0, -127.0]]),
        is8=(4, 5, 6),
        perm=list(range(7)),
        group4={(0, 0): ([NAN] * 4, [])},
        q8="8080 8080 ff01",
        group8={(0, 0): [NAN, NAN, 1.0]},
    ),
    # The largest is 1.5 * 2^-126; 2^-126 is the smallest scale, so it becomes 2 (a tie).
    "scales have a smallest": Golden(
        32,
        torch.tensor([[1.5 * 2.0**-126, -(2.0**-149)], [-1.5 * 2.0**-126, 2.0**-126]]),
        is8=(0,),
        perm=[1, 0],
        q4={(0, 0): "00030000"},  # zero 2: 2 - 2, 2 + 1
        group4={(0, 0): ([2.0**-126], [2])},
        q8="8280",
        group8={(0, 0): [2.0**-126]},
    ),
    "no rows": Golden(128, torch.zeros(0, 20), (), []),
    "no columns": Golden(128, torch.zeros(17, 0), (0,), [*range(1, 17), 0]),
}


def assert_same(packed: Packed, wanted: Packed) -> None:
    """NaN has no one pattern."""
    for name, a, b in zip(Packed._fields, packed, wanted, strict=True):
        if a.is_floating_point():
            assert a.shape == b.shape and torch.equal(a.isnan(), b.isnan()), f"{name}: {a.tolist()}, not {b.tolist()}"
            a, b = a.nan_to_num(0.125), b.nan_to_num(0.125)
        assert same_bits(a, b), f"{name}: {a.tolist()}, wanted {b.tolist()}"


def test_the_tests_own_packer() -> None:
    for case in GOLDEN.values():
        assert_same(format.pack(case.w, case.flags, case.group_size), case.packed)
        again = format.encode(format.decode(case.packed, case.group_size))
        assert_same(again, case.packed)


@on_backends("w4a8_pack")
def test_golden_bytes(backend: Backend) -> None:
    for case in GOLDEN.values():
        assert_same(backend.run("w4a8_pack", case.w, case.flags, case.group_size), case.packed)


# Not on the grid: what is rounded comes back as what it was rounded to.
ROUNDED = {
    "ties": [[127.0, 0, 2, 2, 0, -2, -2, 126], [7, 0, 2, 2, 0, -2, -2, -8]],
    "NaN, infinities, and a range that overflows": [*[[NAN] * 2] * 6, [127.0, -127.0]],
    "scales have a smallest": [[2.0**-125, 0], [-(2.0**-125), 2.0**-126]],
}


@on_backends("w4a8_unpack")
def test_golden_bytes_unpack(backend: Backend) -> None:
    for name, case in GOLDEN.items():
        wanted = torch.tensor(ROUNDED[name]) if name in ROUNDED else case.w.float()
        got = backend.run("w4a8_unpack", *case.packed, case.group_size)
        assert torch.equal(got.isnan(), wanted.isnan()), name
        assert same_bits(got.nan_to_num(0.125), wanted.nan_to_num(0.125)), name


@on_backends("w4a8_quantize")
def test_golden_integers(backend: Backend) -> None:
    """127 goes with -127 (never -128), ties to even, groups of 32 with one left, zeros, NaN."""
    x = torch.zeros(3, 33)
    x[0, :5] = torch.tensor([-127, 2.5, -3.5, 126.5, 0.5])
    x[0, 32] = -(2.0**-140)
    x[1, 32] = 254
    x[2, 31] = INF
    wanted = torch.zeros(3, 33, dtype=torch.int8)
    wanted[0, :5] = torch.tensor([-127, 2, -4, 126, 0])
    wanted[1, 32] = 127
    q, scale = backend.run("w4a8_quantize", x, 32)
    assert same_bits(q, wanted)
    assert scale[2, 0].isnan()
    assert scale.nan_to_num(0).tolist() == [[1, 2.0**-126], [1, 2], [0, 1]]
