"""Shapes that take w4a8's kernels through what small ones don't reach, in several orders of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..kit import tensors
from ..kit.backends import Backend
from ..w4a8 import format
from ..w4a8.strategies import GROUP_SIZES, Linear, Stored, first_step
from . import missing, seeded, w4a8
from .w4a8 import LARGE_TILES, SMALL_TILES, STREAM

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SIMT = Backend("simt")
KERNELS = {"stream": STREAM, "small tiles": SMALL_TILES, "large tiles": LARGE_TILES}

# n4, n8, cols: whole pairs of blocks, more steps than a warp reads ahead and than a ring has stages; blocks with fewer
# than 16 rows; columns that don't fill words, chunks and steps; fewer groups than pieces, and pairs of one block; more
# tiles than one.
SHAPES = {
    "whole": (32, 32, 1600),
    "cut blocks": (40, 23, 1100),
    "cut words": (17, 41, 1187),
    "few groups": (48, 16, 260),
    "one column": (3, 18, 1),
    "many rows": (150, 33, 300),
    "4 bits": (70, 0, 520),
    "8 bits": (0, 49, 520),
}


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kernel_gives_the_same_bits(shape: str, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of several blocks, the last of them cut."""
    case = Linear(Stored(*SHAPES[shape], group_size), 69, bias=torch.float32)
    results = {}
    for seed, (name, number) in enumerate(KERNELS.items()):
        monkeypatch.setattr(w4a8, "kernel", number)
        with seeded(seed):
            results[name] = case.run(SIMT)
        case.exact().assert_holds(results[name], name)
    assert all(tensors.same_bits(y, results["stream"]) for y in results.values())


@pytest.mark.parametrize("num_sms", [1, 3, 132])
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 33])
def test_streams_of_any_plan(tokens: int, num_sms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warps that share a pair in every way: blocks of 4, 2 and 1 pairs."""
    monkeypatch.setattr(w4a8, "kernel", STREAM)
    case = Linear(Stored(70, 60, 1187, 64), tokens)
    monkeypatch.setattr(w4a8, "NUM_SMS", (num_sms,))
    y = case.run(SIMT)
    case.exact().assert_holds(y)
    monkeypatch.setattr(w4a8, "NUM_SMS", (10**6,))
    assert tensors.same_bits(y, case.run(SIMT))


@pytest.mark.parametrize("tokens", [65, 97, 130])
def test_splitting_tokens_over_kernels_changes_no_bit(tokens: int) -> None:
    """Few tokens go to another kernel than many."""
    case = Linear(Stored(20, 40, 700, 32), tokens, dtype=torch.bfloat16)
    y = case.run(SIMT)
    case.exact().assert_holds(y)
    for part in (1, 9, 20):
        assert tensors.same_bits(case.run(SIMT, case.x[:part]), y[:part])
        assert tensors.same_bits(case.run(SIMT, case.x[-part:]), y[-part:])


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_report_and_the_same_bits_in_any_order(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w4a8, "kernel", KERNELS[kernel])
    case = Linear(Stored(20, 23, 515, 64), 9)
    results = []
    for seed in range(20):
        with seeded(seed):
            results.append(case.run(SIMT))
    assert all(tensors.same_bits(r, results[0]) for r in results)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accumulate(shape: str, group_size: int) -> None:
    w = Stored(*SHAPES[shape], group_size)
    q = torch.randint(-128, 128, (11, w.cols), generator=tensors.generator(1), dtype=torch.int8)
    q[0] = -128
    sums = SIMT.run("w4a8_accumulate", q, *w.packed, group_size)
    assert torch.equal(sums.long(), first_step(q, format.decode(w.packed, group_size)))


def _corrupt(n: int) -> dict[str, Tensor]:
    perm = torch.randperm(n, generator=tensors.generator(3)).int()
    outside = perm.clone()
    outside[::7] = torch.tensor([-1, n, 2**31 - 1, -(2**31)], dtype=torch.int32).repeat(n)[: len(outside[::7])]
    twice = perm.clone()
    twice[::5] = perm[1]
    return {"outside": outside, "twice": twice, "all the same": torch.full_like(perm, n - 1)}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("damage", ["outside", "twice", "all the same"])
def test_corrupt_perm_leaves_nothing_unwritten(damage: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A feature of several rows is one of them, a feature of none is 0: never what was in memory before."""
    monkeypatch.setattr(w4a8, "kernel", KERNELS[kernel])
    w = Stored(50, 21, 200, 64)
    perm = _corrupt(w.rows)[damage]
    straight = w.packed._replace(perm=torch.arange(w.rows, dtype=torch.int32))
    x = torch.randn(5, w.cols, generator=tensors.generator(2))
    q = torch.randint(-128, 128, (5, w.cols), generator=tensors.generator(2), dtype=torch.int8)
    for op, first in (("w4a8_linear", x), ("w4a8_accumulate", q), ("w4a8_unpack", None)):
        inputs = () if first is None else (first,)
        rows = SIMT.run(op, *inputs, *straight, 64)
        out = SIMT.run(op, *inputs, *straight._replace(perm=perm), 64)
        if first is None:
            rows, out = rows.T, out.T
        for feature in range(w.rows):
            candidates = (perm == feature).nonzero()[:, 0].tolist()
            wanted = [rows[..., row] for row in candidates] or [torch.zeros_like(rows[..., 0])]
            assert any(torch.equal(out[..., feature], values) for values in wanted), (op, feature)
