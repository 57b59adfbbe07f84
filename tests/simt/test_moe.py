"""Shapes that take moe's kernels through what small ones don't reach, in several orders of threads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ..kit import tensors
from ..kit.backends import Backend
from ..moe.strategies import ACTIVATIONS, FLOATS, Combine, Grouped, Mlp, Route, Sort
from . import missing, moe, seeded

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SIMT = Backend("simt")

# Several tiles each way, cut ones, an expert without rows and rows of no expert, and more steps than there are stages.
# Rows of whole pieces of 16 bytes, tiles of 16, 64 and 128 rows; others.
PRODUCTS = {
    "wide": Grouped((33, 0, 130, 2), 264, 264, past=19),
    "few columns": Grouped((1, 17, 3), 8, 8),
    "ragged": Grouped((65, 0, 3), 67, 101, past=70),
}


@pytest.mark.parametrize("tiling", ["few", "some", "many"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
def test_tiles_of_products(product: str, dtype: torch.dtype, tiling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks with many tiles and with one, which give the same bits."""
    case = replace(PRODUCTS[product], dtype=dtype, gather="repeats", with_bias=True)
    monkeypatch.setattr(moe, "TILINGS", (tiling,))
    results = []
    for num_sms in (1, 132):
        monkeypatch.setattr(moe, "NUM_SMS", (num_sms,) * 3)
        with seeded(num_sms):
            results.append(case.run(SIMT))
    case.exact(SIMT.unit).assert_holds(results[0])
    assert tensors.same_bits(*results)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(136, 264), (67, 129)], ids=["wide", "ragged"])
def test_tiles_of_the_gradient(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of more steps than there are stages, of few rows, and of none."""
    case = Grouped((150, 0, 1, 33), *shape, past=3, dtype=dtype, gather="order")
    results = []
    for num_sms in (1, 132):
        monkeypatch.setattr(moe, "NUM_SMS", (num_sms,) * 3)
        with seeded(num_sms):
            results.append(case.wgrad(SIMT))
    case.exact_wgrad(SIMT.unit).assert_holds(results[0])
    assert tensors.same_bits(*results)


# Warps look at 32 of them at once: runs of empty experts longer than that, at the front, in between and at the end.
MANY = (0,) * 40 + (3, 0, 18) + (0,) * 70 + (1,) * 33 + (0,) * 31 + (5,) + (0,) * 50


@pytest.mark.parametrize("past", [0, 20])
@pytest.mark.parametrize("num_sms", [1, 2])
def test_many_experts(num_sms: int, past: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "NUM_SMS", (num_sms,) * 3)
    case = Grouped(MANY, 9, 16, past=past)
    case.exact(SIMT.unit).assert_holds(case.run(SIMT))
    case.exact_wgrad(SIMT.unit).assert_holds(case.wgrad(SIMT))


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_hostile_offsets_are_a_running_maximum(index: torch.dtype) -> None:
    """Also across the 32 that a warp looks at."""
    info = torch.iinfo(index)
    case = Grouped((1,) * 70, 5, 8, past=0, index=index)
    ends = case.offsets.clone()
    ends[3] = info.min
    ends[10] = 50
    ends[30:34] = torch.tensor([0, -1, 20, 49], dtype=index)
    ends[60] = info.max
    clean = ends.clamp(0, 70).cummax(0).values.to(index)
    for run in (case.run, case.wgrad):
        assert tensors.same_bits(run(SIMT, offsets=ends), run(SIMT, offsets=clean))


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_hostile_indices_count_as_none(index: torch.dtype) -> None:
    info = torch.iinfo(index)
    case = Grouped((5, 4), 6, 16, gather="order", index=index)
    wrong = torch.tensor([info.min, -1, 9, info.max], dtype=index)
    places = torch.tensor([0, 2, 5, 8])
    x = torch.cat([case.x, case.x.new_zeros(1, 16)])
    assert case.source is not None
    hostile, clean = case.source.clone(), case.source.clone()
    hostile[places], clean[places] = wrong, 9
    for run in (case.run, case.wgrad):
        assert tensors.same_bits(run(SIMT, gather=hostile), run(SIMT, x=x, gather=clean))

    mlp = Mlp(8, 16, experts=4, lead=(5,), pairs=2, index=index, none=0.0)
    ids = mlp.ids.clone()
    ids.view(-1)[places] = torch.tensor([info.min, -2, 4, info.max], dtype=index)
    clean = torch.where((ids < 0) | (ids > 3), -1, ids)
    assert tensors.same_bits(mlp.run(SIMT, ids=ids), mlp.run(SIMT, ids=clean))
    for got, wanted in zip(SIMT.run("moe_sort", ids, 4), SIMT.run("moe_sort", clean, 4), strict=True):
        assert torch.equal(got, wanted)

    combine = Combine(7, 12, lead=(5,), pairs=3, index=index)
    inverse = combine.inverse.clone()
    inverse.view(-1)[places] = torch.tensor([info.min, -2, 7, info.max], dtype=index)
    clean = torch.where((inverse < 0) | (inverse > 6), -1, inverse)
    y, weights = combine.y, combine.weights
    assert tensors.same_bits(SIMT.run("moe_combine", y, inverse, weights), SIMT.run("moe_combine", y, clean, weights))


# A chunk is 2048 pairs, and a digit 1024 experts; two digits, of several chunks too.
@pytest.mark.parametrize("load", ["uniform", "skewed"])
@pytest.mark.parametrize(
    ("pairs", "experts"),
    [(2048, 64), (2049, 64), (6200, 7), (70, 1023), (70, 1024), (4100, 1500), (0, 1500), (2100, 0)],
)
def test_sorts_of_several_chunks_and_digits(pairs: int, experts: int, load: str) -> None:
    case = Sort(experts, (pairs,), load=load)
    perm, inverse, offsets = case.run(SIMT)
    key = torch.where(case.ids < 0, experts, case.ids)
    wanted = key.argsort(stable=True)
    assert torch.equal(perm, wanted)
    assert torch.equal(inverse[perm], torch.arange(pairs))
    assert offsets.tolist() == torch.bincount(key, minlength=experts + 1)[:experts].cumsum(0).tolist()


# Up to 512 experts a lane keeps its keys.
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("experts", "k"), [(512, 40), (513, 40), (70, 70), (33, 33)])
def test_routes_to_many_experts(experts: int, k: int, ties: bool) -> None:
    case = Route(experts, k, lead=(9,), ties=ties, with_bias=False)
    weights, ids = case.run(SIMT)
    assert torch.equal(ids, case.logits.sort(dim=-1, descending=True, stable=True).indices[:, :k])
    case.weights_of(ids, SIMT.unit).assert_holds(weights.reshape(9, k))


# Whole tiles of both kinds, more than one each way, whose weights and rows are made of aligned pieces; and others.
MLPS = {
    "wide": Mlp(264, 136, experts=3, lead=(70,), pairs=3),
    "ragged": Mlp(67, 35, experts=3, lead=(70,), pairs=3),
    "one expert": Mlp(72, 136, experts=1, lead=(150,), pairs=1, none=0.0),
}


@pytest.mark.parametrize("gemm", ["grouped", "dense"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mlp", MLPS)
def test_tiles_of_the_mlp(mlp: str, dtype: torch.dtype, gemm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "NUM_SMS", (1,) * 3)
    activation = ACTIVATIONS[(list(MLPS).index(mlp) + FLOATS.index(dtype) + (gemm == "dense")) % len(ACTIVATIONS)]
    case = replace(MLPS[mlp], dtype=dtype, gemm=gemm, activation=activation)
    case.exact(SIMT.unit).assert_holds(case.run(SIMT))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_report_and_the_same_bits_in_any_order(dtype: torch.dtype) -> None:
    grouped = Grouped((3, 0, 20), 24, 136, past=3, dtype=dtype, gather="repeats")
    ragged = replace(grouped, rows=13, cols=33)
    mlp = Mlp(40, 24, lead=(20,), dtype=dtype)
    results: list[list[Tensor]] = []
    for seed in range(6):
        with seeded(seed):
            got = [run(SIMT) for case in (grouped, ragged) for run in (case.run, case.wgrad)]
            results.append([*got, mlp.run(SIMT), *Sort(5, (2100,)).run(SIMT), *Route(40, 5, lead=(7,)).run(SIMT)])
    assert all(tensors.same_bits(*pair) for r in results for pair in zip(r, results[0], strict=True))
