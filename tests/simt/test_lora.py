"""Shapes that take lora's kernels through what small ones don't reach, in several orders of threads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ..kit import tensors
from ..kit.backends import Backend
from ..lora.strategies import FLOATS, Apply, Merge
from . import lora, missing, seeded

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SIMT = Backend("simt")

# Layers of one launch: several tiles of 64 x 256 (128 of float32) each way, whole and cut, with one column or row,
# without any; ranks of several steps, cut ones, others that aren't a multiple of what is loaded at once, and 0.
LAYERS = {
    "wide": ((64, 128, 16), (130, 264, 8), (65, 136, 40), (1, 8, 4)),
    "ragged": ((67, 129, 5), (64, 256, 16), (0, 30, 3), (1, 1, 1), (129, 3, 33), (20, 0, 2), (33, 300, 0)),
}
PAIRS = ((2, 0.7), (-1, 1.0), (0, -1.3), (2, 0.25))


@pytest.mark.parametrize("num_sms", [1, 3, 132])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layers", LAYERS)
def test_layers_of_one_launch(layers: str, dtype: torch.dtype, num_sms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks with many tiles of several layers, with one, and with none."""
    monkeypatch.setattr(lora, "NUM_SMS", (num_sms,))
    layout = {1: "contiguous", 3: "offset", 132: "buffer"}[num_sms]
    case = Merge(LAYERS[layers], pairs=PAIRS, dtype=dtype, layout=layout, with_base=num_sms != 3, ranks=(40, 7, 13))
    with seeded(num_sms):
        got = case.merge(SIMT)
    for i, (exact, w) in enumerate(zip(case.exact(SIMT.unit), got, strict=True)):
        exact.assert_holds(w, f"layer {i}")


@pytest.mark.parametrize("most_shared", lora.MOST_SHARED)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_more_ranks_than_shared_memory_has(
    dtype: torch.dtype, most_shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a, which a block then reads for each tile anew; the last layer has few of them."""
    monkeypatch.setattr(lora, "NUM_SMS", (2,))
    monkeypatch.setattr(lora, "MOST_SHARED", (most_shared,))
    pairs = ((2, 0.7), (0, -1.3), (1, 0.25), (3, 1.0))
    case = Merge(((130, 264, 88), (67, 40, 8)), pairs=pairs, adapters=4, ranks=(88, 88, 70, 88), dtype=dtype)
    for i, (exact, w) in enumerate(zip(case.exact(SIMT.unit), case.merge(SIMT), strict=True)):
        exact.assert_holds(w, f"layer {i}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rank", [0, 4, 24])
def test_many_tiles_below_each_other(rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are on their way at a time."""
    monkeypatch.setattr(lora, "NUM_SMS", (1,))
    case = Merge(((64 * 9 + 7, 16, rank), (64 * 5, 8, 16)), pairs=PAIRS, dtype=dtype)
    for i, (exact, w) in enumerate(zip(case.exact(SIMT.unit), case.merge(SIMT), strict=True)):
        exact.assert_holds(w, f"layer {i}")


def test_more_layers_than_one_launch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "NUM_SMS", (1,))
    case = Merge(((1, 8, 4),) * 600, pairs=((1, 0.7),), adapters=2)
    for i, (exact, w) in enumerate(zip(case.exact(SIMT.unit), case.merge(SIMT), strict=True)):
        exact.assert_holds(w, f"layer {i}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_without_adapters_the_base_is_copied(dtype: torch.dtype) -> None:
    """To the bit, whatever the bits."""
    case = Merge(LAYERS["ragged"], pairs=((0, 0.5), (0, -0.5), (1, 1.0)), ranks=(3, 0, 1), dtype=dtype, kind="bits")
    assert all(map(tensors.same_bits, case.merge(SIMT), case.base))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rank", [16, 18])
def test_nothing_behind_a_rank_is_used(rank: int, dtype: torch.dtype) -> None:
    """Nor of other adapters: NaN would show. Loads of several ranks go past those of 1 to 15."""
    for used in range(16):
        ranks = (used, 2, used)
        case = Merge(((35, 40, rank), (20, 136, rank)), pairs=((0, 0.7), (2, 1.5)), ranks=ranks, dtype=dtype)
        token = Apply(35, 40, rank, pairs=1, ranks=ranks, dtype=dtype)
        token.ids[:] = torch.tensor([0, 2, 0])[:, None]
        for adapters in ([*case.a], [token.a]):
            for a in adapters:
                a[1] = torch.nan
                a[:, used:] = torch.nan
        for adapters in ([*case.b], [token.b]):
            for b in adapters:
                b[1] = torch.nan
                b[..., used:] = torch.nan
        assert all(bool(w.isfinite().all()) for w in case.merge(SIMT))
        assert bool(token.run(SIMT).isfinite().all())


def test_as_many_pairs_as_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """1024 in each list, of adapters that come more than once."""
    monkeypatch.setattr(lora, "NUM_SMS", (1,))
    draw = tensors.generator(5)
    old, new = (
        tuple(zip(torch.randint(-1, 40, (1024,), generator=draw).tolist(), gates.tolist(), strict=True))
        for gates in torch.rand(2, 1024, generator=draw) - 0.5
    )
    case = Merge(((3, 8, 1),), adapters=40, pairs=new, with_base=False)
    negative = tuple((e, -g) for e, g in old)
    case.exact(SIMT.unit, (*negative, *new))[0].assert_holds(case.switch(SIMT, old)[0])


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_hostile_indices_count_as_none(index: torch.dtype) -> None:
    """Ids that no adapter has are -1, and ranks end where the tensors do."""
    info = torch.iinfo(index)
    wrong = torch.tensor([info.min, -2, 3, 2**31 - 1, info.max], dtype=index)
    ids = torch.cat([wrong, torch.tensor([1, 2], dtype=index)])
    gates = torch.arange(1.0, 8.0)
    case = Merge(((70, 33, 5), (9, 140, 3)))
    clean = torch.tensor([-1] * 5 + [1, 2], dtype=index)
    hostile = torch.tensor([7, info.min, info.max], dtype=index)
    clamped = torch.tensor([5, 0, 5], dtype=index)
    args = (case.w, case.a, case.b)
    for base in (case.base, None):
        wanted = SIMT.run("lora_merge_", *args, clean, gates, base, clamped)
        got = SIMT.run("lora_merge_", *args, ids, gates, base, hostile)
        assert all(map(tensors.same_bits, got, wanted))
    token = Apply(70, 33, 5)
    rows = [torch.stack([t, t.flip(0), t]) for t in (ids, clean)]
    results = [
        SIMT.run("lora_apply", token.x, token.a, token.b, i, gates.repeat(3, 1), None, ranks)
        for i, ranks in zip(rows, (hostile, clamped), strict=True)
    ]
    assert tensors.same_bits(*results)


def _apply_in_parts(tokens: int, pairs: int, adapters: int, dtype: torch.dtype) -> None:
    """Within the bound, and with the same bits as a part of the tokens has alone."""
    case = Apply(35, 40, 12, adapters=adapters, lead=(tokens,), pairs=pairs, dtype=dtype, with_y=True, none=0.1)
    y = case.run(SIMT)
    case.exact(SIMT.unit).assert_holds(y)
    for part in (slice(0, 1), slice(3, 20), slice(tokens - 9, tokens)):
        names = {name: getattr(case, name)[part] for name in ("x", "ids", "gates", "y")}
        assert tensors.same_bits(case.run(SIMT, **names), y[part])


# tokens, pairs, adapters: units of one token and of 8, one chunk and several, the last one cut; adapters of more tokens
# than a tile has.
BATCHES = {"one chunk": (64, 2, 3), "chunks": (131, 3, 5), "one adapter": (70, 1, 1)}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_apply_to_many_tokens(batch: str, dtype: torch.dtype) -> None:
    _apply_in_parts(*BATCHES[batch], dtype)


def test_apply_with_many_pairs() -> None:
    """Chunks of fewer tokens than 64."""
    _apply_in_parts(75, 40, 3, torch.bfloat16)


# rows, cols, rank: blocks of 128 rows, 8 ranks and, of their warps, 8 times 32 (or 128) columns.
MATRICES = {"wide": (256, 1152, 16), "cut": (130, 648, 20), "ragged": (129, 1035, 19)}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("matrix", MATRICES)
def test_apply_of_large_matrices(matrix: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks that take one item each, and several."""
    case = Apply(*MATRICES[matrix], lead=(5,), dtype=dtype, with_y=True, layout="offset", ranks=(16, 3, 11))
    results = []
    for most_blocks in (1 << 20, 2):
        monkeypatch.setattr(lora, "MOST_BLOCKS", (most_blocks,))
        results.append(case.run(SIMT))
    case.exact(SIMT.unit).assert_holds(results[0])
    assert tensors.same_bits(*results)


def test_apply_with_as_many_pairs_as_there_may_be() -> None:
    case = Apply(5, 8, 3, adapters=20, lead=(3,), pairs=1024, none=0.1)
    case.exact(SIMT.unit).assert_holds(case.run(SIMT))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_report_and_the_same_bits_in_any_order(dtype: torch.dtype) -> None:
    wide = Merge(((65, 136, 12), (10, 24, 4)), pairs=PAIRS, dtype=dtype)
    cases = [wide, replace(wide, shapes=((66, 33, 5),), with_base=False, layout="buffer")]
    token = Apply(20, 33, 5, lead=(70,), dtype=dtype)
    results: list[list[Tensor]] = []
    for seed in range(10):
        with seeded(seed):
            results.append([*(w for case in cases for w in case.merge(SIMT)), token.run(SIMT)])
    assert all(tensors.same_bits(*pair) for r in results for pair in zip(r, results[0], strict=True))
