"""Shapes that take lscd's kernels through what small ones don't reach, in several orders of threads."""

from __future__ import annotations

import pytest
import torch

from ..kit import tensors
from ..kit.backends import Backend
from ..lscd.strategies import DTYPES, Linear, Weights
from . import lscd, missing, seeded

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SIMT = Backend("simt")

# rows, cols, sparsity: what a warp copies goes round its ring several times; few values and many tiles; blocks that
# share strips, with a second kernel for the sums; more strips than a block has warps.
WIDE = {
    "dense": (48, 776, 0.0),
    "half": (20, 5000, 0.5),
    "dense and wide": (16, 9000, 0.0),
    "sparse and wide": (17, 20007, 0.95),
    "many rows": (150, 264, 0.3),
    "empty": (40, 2304, 1.0),
}


@pytest.mark.parametrize("num_sms", [1, 132])
@pytest.mark.parametrize("shape", WIDE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype: torch.dtype, shape: str, num_sms: int, monkeypatch) -> None:
    monkeypatch.setattr(lscd, "NUM_SMS", (num_sms,))
    w = Weights(*WIDE[shape][:2], dtype, WIDE[shape][2])
    for seed, tokens in enumerate((1, 9)):
        x_dtype = torch.bfloat16 if dtype == torch.int8 else dtype
        case = Linear(w, tokens, x_dtype, bias=True, layout=("contiguous", "offset")[seed])
        with seeded(seed):
            case.exact(SIMT.unit).assert_holds(case.run(SIMT))


@pytest.mark.parametrize("shape", WIDE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack_and_unpack(dtype: torch.dtype, shape: str) -> None:
    w = Weights(*WIDE[shape][:2], dtype, WIDE[shape][2])
    packed = SIMT.run("lscd_pack", w.dense)
    assert all(map(tensors.same_bits, packed, w.packed))
    assert tensors.same_bits(SIMT.run("lscd_unpack", *packed, *w.size), w.dense)


@pytest.mark.parametrize("tokens", [8, 17, 33, 64])
def test_every_number_of_tokens_of_a_pass(tokens: int) -> None:
    for dtype in (torch.float16, torch.float32):
        case = Linear(Weights(33, 520, dtype, 0.6), tokens, dtype, activation="silu", scale=True)
        case.exact(SIMT.unit).assert_holds(case.run(SIMT))


def test_no_report_and_the_same_bits_in_any_order() -> None:
    case = Linear(Weights(33, 1032, torch.float16, 0.6), 9, torch.float16, bias=True)
    results = []
    for seed in range(50):
        with seeded(seed):
            results.append(case.run(SIMT))
    assert all(tensors.same_bits(r, results[0]) for r in results)


@pytest.mark.parametrize("ends", [(0, 20000), (20000, 20000), (0, 0), (16, 0), (2**62, -(2**62)), (7, 19999)], ids=str)
@pytest.mark.parametrize("bits", [0, 1, -1], ids=["no ones", "some ones", "all ones"])
def test_offsets_and_bitmap_that_disagree(ends: tuple[int, int], bits: int) -> None:
    """More values than ones, fewer, or none at all: kernels stay in bounds and leave no copy behind."""
    rows, cols = 16, 1024
    values = torch.ones(20000 + 64, dtype=torch.float16)
    bitmap = torch.full((1, 128, 2), bits)
    offsets = torch.tensor([ends[0], *[10000] * 3, ends[1]])
    lscd.lscd_unpack(values, bitmap, offsets, rows, cols)
    lscd.lscd_linear(torch.ones(3, cols, dtype=torch.float16), values, bitmap, offsets, rows, cols)
