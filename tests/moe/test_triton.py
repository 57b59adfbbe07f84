"""What only Triton has: compilation ahead of time, the list of blocks, tiles, and contents that nobody has checked.

Most numbers here are small integers and binary fractions, so that sums are exact in any order: results have the
reference's bits. NaN lies wherever nothing may be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from effk.kernels.common.triton_aot import Variant
from effk.kernels.moe import triton as kernels
from effk.moe import reference

from ..kit import tensors
from ..kit.tensors import same_bits
from ..kit.triton import assert_compiles_without_spills

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = reference.FLOATS
NAN = float("nan")


def test_every_kernel_compiles_without_spills() -> None:
    assert_compiles_without_spills(kernels)


# --- Inputs ----------------------------------------------------------------------------------------------------------


def integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return tensors.values(shape, dtype, "integers", seed)


def signs(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return integers(shape, dtype, seed).sign()


def amid_nan(t: Tensor, beside: int) -> Tensor:
    """t in larger rows with NaN around them."""
    rows, cols = t.shape
    wide = torch.full((rows + 2, cols + 2 * beside), NAN, dtype=t.dtype)
    wide[1:-1, beside : beside + cols] = t
    return wide.to(DEVICE)[1:-1, beside : beside + cols]


def on_device(values: Any) -> Any:
    return tensors.map_tensors(lambda t: t.to(DEVICE), values)


def ends_of(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor(counts, dtype=torch.int64).cumsum(0).int()


def running(offsets: Tensor, rows: int) -> Tensor:
    """What a GPU takes offsets for."""
    return offsets.long().cummax(0).values.clamp(0, rows)


WEIGHTS = torch.tensor([1.0, -0.5, 0.25, 2.0, 0.5])


def pairs_of(tokens: int, k: int, experts: int, seed: int) -> tuple[Tensor, Tensor]:
    """weights and ids, some of them -1 and with a weight of NaN."""
    g = tensors.generator(seed)
    ids = torch.randint(-1, experts, (tokens, k), generator=g)
    weights = WEIGHTS[torch.randint(0, len(WEIGHTS), (tokens, k), generator=g)]
    return torch.where(ids < 0, NAN, weights), ids


# --- What is launched ------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """The kernels that would be launched, with their arguments; none is."""
    calls: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(Variant, "launch", lambda self, grid, **args: calls.append((self, args)))
    yield calls


@pytest.fixture
def launched_too(monkeypatch) -> list[Variant]:
    """The kernels that are launched."""
    launch, found = Variant.launch, []

    def watched(self: Variant, grid: tuple[int, ...], **args: Any) -> None:
        found.append(self)
        launch(self, grid, **args)

    monkeypatch.setattr(Variant, "launch", watched)
    return found  # type: ignore[return-value]


def names(calls: list[tuple[Any, dict[str, Any]]]) -> list[str]:
    found = [variant.kernel.__name__ for variant, _ in calls]
    calls.clear()
    return found


FEW = ["sort_few"]
MANY = ["count", "place"]
PRODUCTS = ["plan", "multiply", "multiply", "combine"]


def test_nothing_waits_for_the_device(launched, monkeypatch) -> None:
    """Tensors without contents refuse all that would look at them."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for dtype in reference.INDICES:
        weights, ids = kernels.moe_route(meta(2, 3, 6), 4, meta(6))
        assert names(launched) == ["route"]
        ids = ids.to(dtype)
        for limits, sorts in (((2048, 2**24), FEW), ((0, 2**24), MANY), ((0, 0), [])):
            monkeypatch.setattr(kernels, "FEW_PAIRS", limits[0])
            monkeypatch.setattr(kernels, "ENTRIES", limits[1])
            perm, inverse, offsets = kernels.moe_sort(ids, 6)
            assert (perm.shape, inverse.shape, offsets.shape) == ((24,), ids.shape, (6,))
            assert names(launched) == sorts
            out = kernels.moe_mlp(meta(2, 3, 8), meta(6, 10, 8), meta(6, 8, 5), weights, ids)
            assert out.shape == (2, 3, 8) and names(launched) == [*sorts, *PRODUCTS]
        x, w, gather = meta(7, 8), meta(6, 5, 8), meta(24, dtype=dtype)
        y = kernels.moe_grouped_gemm(x, w, offsets.to(dtype), meta(6, 5), gather, out_dtype=torch.bfloat16)
        assert (y.shape, y.dtype) == ((24, 5), torch.bfloat16) and names(launched) == PRODUCTS[:2]
        assert kernels.moe_grouped_wgrad(y.float(), x, offsets.to(dtype), gather).shape == w.shape
        assert names(launched) == ["multiply_rows"]
        assert kernels.moe_combine(y, inverse.to(dtype), weights).shape == (2, 3, 5)
        assert names(launched) == PRODUCTS[-1:]


def shifted(t: Tensor) -> Tensor:
    """t, not where an allocation begins."""
    return t.new_empty(t.numel() + 1)[1:].view(t.shape)


def vectors_hold(calls: list[tuple[Any, dict[str, Any]]]) -> bool:
    """Whether kernels that read 16 bytes at a time run; and what they ask for holds."""
    sizes = set()
    for variant, args in calls:
        size = variant.constants.get("VECTOR")
        if size is None:
            continue
        sizes.add(size > 1)
        if size == 1:
            continue
        name = variant.kernel.__name__
        numbers = {
            "multiply": ("x_stride", "w_expert", "w_stride", "cols", "rows"),
            "multiply_rows": ("grad_stride", "x_stride", "cols", "rows"),
            "combine": ("y_stride", "cols"),
        }[name]
        read = {"multiply": ("x", "w"), "multiply_rows": ("grad", "x", "dw"), "combine": ("y", "out")}[name]
        assert all(args[n] % size == 0 for n in numbers), (name, args)
        assert all(args[n].data_ptr() % 16 == 0 and size * args[n].itemsize >= 16 for n in read), (name, args)
        gated = name == "multiply" and args["activation"] not in map(kernels.ACTIVATIONS.index, ("none", "relu2"))
        assert not gated or args["rows"] // 2 % size == 0
    calls.clear()
    assert len(sizes) == 1
    return sizes.pop()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernels_get_the_alignment_they_are_compiled_for(launched, dtype: torch.dtype) -> None:
    size = kernels.vector(dtype)

    def gemm(n: int = 2 * size, k: int = size, *, wrong: int | None = None, stride: int = 0) -> bool:
        wide = torch.ones(3, 4, k + stride, dtype=dtype)
        given = [wide[0, :, :k], torch.ones(2, n, k + stride, dtype=dtype)[..., :k]]
        given = [shifted(t) if i == wrong else t for i, t in enumerate(given)]
        kernels.moe_grouped_gemm(*given, ends_of((1, 2)))
        return vectors_hold(launched)

    assert gemm() and gemm(stride=size)
    assert not any((gemm(n=size + 1), gemm(k=size - 1), gemm(wrong=0), gemm(wrong=1), gemm(stride=1)))

    def wgrad(n: int = size, k: int = 2 * size, *, wrong: int | None = None) -> bool:
        given = [torch.ones(4, n, dtype=dtype), torch.ones(4, k, dtype=dtype)]
        kernels.moe_grouped_wgrad(*(shifted(t) if i == wrong else t for i, t in enumerate(given)), ends_of((1, 2)))
        return vectors_hold(launched)

    assert wgrad()
    assert not any((wgrad(n=size + 1), wgrad(k=1), wgrad(wrong=0), wgrad(wrong=1)))

    def combine(k: int, *, wrong: bool = False) -> bool:
        y = torch.ones(4, k, dtype=dtype)
        kernels.moe_combine(shifted(y) if wrong else y, torch.zeros(3, 2).long(), torch.ones(3, 2))
        return vectors_hold(launched)

    assert combine(3 * size)
    assert not combine(size + 2) and not combine(size, wrong=True)

    def mlp(k: int, inner: int, activation: str, *, wrong: int | None = None) -> set[bool]:
        """Of the products; what the last step reads is made here and not given."""
        gated = 1 if activation == "relu2" else 2
        given = [torch.ones(shape, dtype=dtype) for shape in ((3, k), (2, gated * inner, k), (2, k, inner))]
        given = [shifted(t) if i == wrong else t for i, t in enumerate(given)]
        kernels.moe_mlp(*given, torch.ones(3, 1), torch.zeros(3, 1).long(), activation=activation)
        products = [call for call in launched if call[0].kernel.__name__ == "multiply"]
        assert len(products) == 2
        launched[:] = [call for call in launched if call[0].kernel.__name__ == "combine"]
        assert vectors_hold(launched) == (k % size == 0)
        return {vectors_hold([call]) for call in products}

    for activation in ("swiglu", "relu2"):
        assert mlp(size, 3 * size, activation) == {True}
        # Half of w13's rows in whole vectors isn't enough: h has rows, too.
        wrong = [mlp(2 * size, size // 2, activation), mlp(size + 1, size, activation)]
        assert [*wrong, *(mlp(size, size, activation, wrong=i) for i in range(3))] == [{False}] * 5


def test_the_choice_of_tiles(launched) -> None:
    sizes = [(1536, 2048), (2048, 768)]
    for dtype in FLOATS:
        for kind in ("grouped", "dense"):
            for rows in (1, 64, 10**6):
                assert kernels.tile_for(dtype, kind, rows, 64, sizes) in kernels.TILES[dtype][kind]
        small, *_ = kernels.TILES[dtype]["grouped"]
        assert kernels.tile_for(dtype, "auto", 8, 64, sizes) == small
        assert kernels.tile_for(dtype, "auto", 64 * 1024, 64, sizes) in kernels.TILES[dtype]["dense"]
    x, ids = torch.ones(4, 16, dtype=torch.float16), torch.zeros(4, 2).long()
    w13, w2 = x.new_ones(3, 32, 16), x.new_ones(3, 16, 16)
    for kind in ("grouped", "dense"):
        kernels.moe_mlp(x, w13, w2, torch.ones(4, 2), ids, gemm=kind)
        rows = {v.constants["TILE_ROWS"] for v, _ in launched if v.kernel.__name__ == "multiply"}
        assert rows <= {tile.rows for tile in kernels.TILES[torch.float16][kind]} and len(rows) == 1
        launched.clear()


# --- Blocks ----------------------------------------------------------------------------------------------------------


def listed(ends: list[int], tile_rows: int, rest: int | None) -> list[list[int]]:
    """What `plan` is to write of experts' rows, and of those behind them up to `rest`."""
    found = []
    for expert, (start, end) in enumerate(zip([0, *ends], [*ends, rest or 0], strict=True)):
        found += [[expert, row, end] for row in range(start, end, tile_rows)]
    return found


@pytest.mark.parametrize("with_rest", [False, True], ids=["", "rest"])
@pytest.mark.parametrize("tile", kernels.TILES[torch.float16]["grouped"], ids=str)
@pytest.mark.parametrize("experts", [0, 1, 63, 64, 65, 150])
def test_blocks_are_all_rows_once(experts: int, tile: kernels.Tile, with_rest: bool) -> None:
    g = tensors.generator(experts)
    for most in (1, 3 * tile.rows):  # of an expert's rows
        counts = torch.randint(0, most + 1, (experts,), generator=g) * (torch.rand(experts, generator=g) < 0.7)
        ends = counts.cumsum(0)
        kept = int(counts.sum())
        for rows in (kept, kept + 2 * tile.rows + 1):
            if not rows:
                continue
            # Wrong ones among them, which must count as the nearest that is right.
            given = torch.where((torch.rand(experts, generator=g) < 0.1), -(2**31), ends)
            if experts:
                given[-1] = ends[-1] if rows > kept else 2**31 - 1
            wanted = listed(running(given, rows).tolist(), tile.rows, rows if with_rest else None)
            have = kernels.planned(given.int().to(DEVICE), rows, tile, with_rest=with_rest).cpu()
            assert have[:, : len(wanted)].T.tolist() == wanted
            assert (have[0, len(wanted) :] == -1).all()


# --- Sorting ---------------------------------------------------------------------------------------------------------

WAYS = {"few": (2**30, 2**24), "many": (0, 2**24), "torch": (0, 0)}
JUNK = (-1, -2, -(2**63), 2**63 - 1, 2**32, 2**31 - 1)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> str:
    few, entries = WAYS[request.param]
    monkeypatch.setattr(kernels, "FEW_PAIRS", few)
    monkeypatch.setattr(kernels, "ENTRIES", entries)
    return request.param


@pytest.mark.parametrize("experts", [0, 1, 5, 130])
@pytest.mark.parametrize("pairs", [0, 1, 63, 64, 129, 300])
def test_sort_of_anything(way: str, pairs: int, experts: int) -> None:
    g = tensors.generator(pairs)
    for load in ("many", "two"):
        ids = torch.randint(0, max(1, experts), (pairs, 2), generator=g)
        ids = ids if load == "many" else torch.where(ids % 2 == 0, min(3, experts), experts)
        junk = torch.tensor((*JUNK, experts))[torch.randint(0, len(JUNK) + 1, ids.shape, generator=g)]
        ids = torch.where((torch.rand(ids.shape, generator=g) < 0.2) | (ids >= experts), junk, ids)
        wanted = reference.moe_sort(torch.where((ids < 0) | (ids >= experts), -1, ids), experts)
        have = kernels.moe_sort(ids.to(DEVICE), experts)
        assert all(same_bits(a.cpu(), b) for a, b in zip(have, wanted, strict=True))


# --- Routing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("experts", [127, 128, 129, 300])
def test_route_among_more_experts_than_fit_at_once(experts: int, with_bias: bool) -> None:
    """Ties, zeros of both signs, infinities and NaN, on both sides of where a program starts anew."""
    tokens, k = 6, 9
    logits = integers((tokens, experts), torch.float32, 1)
    logits[:, 100:130:3], logits[:, 101:130:4] = 0.0, -0.0
    logits[0] = torch.where(logits[0].abs() > 0, -7.0, logits[0])  # zeros are the best
    if not with_bias:  # of one with them, all scores are NaN
        logits[1, 126:], logits[2, 3], logits[2, -2:], logits[3] = NAN, -NAN, NAN, float("inf")
        logits[4] = -float("inf")
    bias = torch.full((experts,), 64.0) if with_bias else None  # scores vanish, and leave ties
    if bias is not None:
        bias[::7], bias[5], bias[-1] = -64.0, NAN, float("inf")
    want = reference.moe_route(logits, k, bias, score="sigmoid", renormalize=False)
    have = kernels.moe_route(*on_device((logits, k, bias)), score="sigmoid", renormalize=False)
    same = torch.equal(have[1].cpu(), want[1])
    if bias is None:
        assert same
        return
    # Scores that are rounded otherwise may break a tie, but never put a worse one first.
    by = logits.sigmoid() + bias
    first, second = (by.gather(-1, ids.cpu()) for ids in (have[1], want[1]))
    assert torch.equal(have[1][:, :2].cpu(), want[1][:, :2])
    assert same or bool(((first - second)[:, 2:].abs() <= 2.0**-17).all())


# --- Products --------------------------------------------------------------------------------------------------------

TILES = [
    pytest.param(dtype, kind, tile, id=f"{dtype}-{kind}-{tile.rows}x{tile.cols}")
    for dtype in FLOATS
    for kind, tiles in kernels.TILES[dtype].items()
    for tile in tiles
]


def sides(tile: kernels.Tile, kind: str, dtype: torch.dtype) -> tuple[int, int]:
    """Columns and rows of a weight beyond one tile, which kernels of this kind can have."""
    beyond = 1 if kind == "unaligned" else kernels.vector(dtype)
    return tile.cols + beyond, tile.k + beyond


@pytest.mark.parametrize("dtype, kind, tile", TILES)
def test_every_tile(launched_too, monkeypatch, dtype: torch.dtype, kind: str, tile: kernels.Tile) -> None:
    """Rows, columns and sums beyond one tile, with NaN around x and in the weights of an expert without rows."""
    n, k = sides(tile, kind, dtype)
    monkeypatch.setattr(kernels, "tile_for", lambda *args: tile)
    beside = kernels.vector(dtype)
    counts = (1, 0, tile.rows + 1, 0, tile.rows)
    rows = sum(counts) + 3
    x = integers((9, k), dtype, 1)
    gather = torch.randint(0, 9, (rows,), generator=tensors.generator(2))
    w, bias = integers((len(counts), n, k), dtype, 3), integers((len(counts), n), dtype, 4)
    w[1], w[3], bias[1], bias[3] = NAN, NAN, NAN, NAN
    offsets = ends_of(counts)
    for out_dtype in FLOATS:
        want = reference.moe_grouped_gemm(x, w, offsets, bias, gather, out_dtype=out_dtype)
        given = on_device((w, offsets, bias, gather))
        have = kernels.moe_grouped_gemm(amid_nan(x, beside), *given, out_dtype=out_dtype)
        assert same_bits(have.cpu(), want)
    assert [v for v in launched_too if v.kernel is kernels.multiply] == [
        kernels.MULTIPLY[dtype, tile, kind != "unaligned"]
    ] * 3


@pytest.mark.parametrize("dtype, kind, tile", TILES)
def test_mlp_with_every_tile(monkeypatch, dtype: torch.dtype, kind: str, tile: kernels.Tile) -> None:
    """relu2 has the reference's bits. Of the others, gates must meet their own: each row of w2 picks one of h."""
    monkeypatch.setattr(kernels, "tile_for", lambda *args: tile)
    beyond = 1 if kind == "unaligned" else kernels.vector(dtype)
    tokens, experts, k, inner = tile.rows + 3, 3, kernels.vector(dtype) * 3 + beyond, tile.cols // 2 + beyond
    x = signs((tokens, k), dtype, 1)
    weights, ids = pairs_of(tokens, 2, experts, 2)
    ids[ids == 1] = 0
    w13, w2 = signs((experts, 2 * inner, k), dtype, 3) / 4, integers((experts, k, inner), dtype, 4)
    w13[1], w2[1] = NAN, NAN
    given = x, 4 * w13[:, :inner], w2, weights, ids
    want = reference.moe_mlp(*given, activation="relu2")
    assert same_bits(kernels.moe_mlp(*on_device(given), activation="relu2").cpu(), want)

    picked = (torch.arange(k) * 7 + 1) % inner
    w2 = torch.nn.functional.one_hot(picked, inner).to(dtype).expand(experts, k, inner).contiguous()
    w2[1] = NAN
    for activation in ("swiglu", "geglu", "geglu_tanh"):
        wide = (t.double() for t in (x, w13, w2, weights))
        exact = formula(*wide, ids, activation)
        have = kernels.moe_mlp(*on_device((x, w13, w2, weights, ids)), activation=activation).cpu().double()
        # |gate|, |up| <= k / 4 and the weights of a token add up to 4 at most. h is rounded to dtype, and so is y.
        most = 4 * (k / 4) ** 2
        assert bool(((have - exact).abs() <= most * (torch.finfo(dtype).eps + 16 * 2.0**-23)).all())


def formula(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, activation: str) -> Tensor:
    there = ids >= 0
    of_pairs = w13[ids], w2[ids]
    h = reference.activated(torch.einsum("tjnk,tk->tjn", of_pairs[0], x), activation)
    terms = weights[..., None] * torch.einsum("tjkn,tjn->tjk", of_pairs[1], h)
    return torch.where(there[..., None], terms, 0.0).sum(1)


@pytest.mark.parametrize("in_vectors", [False, True], ids=["", "vectors"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_wgrad_beyond_one_tile(launched_too, dtype: torch.dtype, in_vectors: bool) -> None:
    variant = kernels.MULTIPLY_ROWS[dtype, in_vectors]
    beyond = kernels.vector(dtype) if in_vectors else 1
    n, k = (variant.constants[name] + beyond for name in ("TILE_ROWS", "TILE_COLS"))
    counts = (variant.constants["TILE_K"] + 1, 0, 2)
    rows = sum(counts) + 2
    gather = torch.randint(0, 9, (rows,), generator=tensors.generator(2))
    grad, x, offsets = integers((rows, n), dtype, 1), integers((9, k), dtype, 3), ends_of(counts)
    want = reference.moe_grouped_wgrad(grad, x, offsets, gather)
    grad[-2:] = NAN
    beside = kernels.vector(dtype)
    given = amid_nan(grad, beside), amid_nan(x, beside), *on_device((offsets, gather))
    assert same_bits(kernels.moe_grouped_wgrad(*given).cpu(), want)
    assert launched_too == [variant]


def test_wgrad_of_more_experts_than_are_looked_at_at_once() -> None:
    """Offsets that descend again: the largest is among the first."""
    experts, rows = 2 * kernels.MULTIPLY_ROWS[torch.float32, False].constants["EXPERTS"] + 3, 6
    ends = torch.randint(0, rows - 1, (experts,), generator=tensors.generator(1)).int()
    ends[9], ends[-1] = rows - 1, rows
    grad, x = integers((rows, 1), torch.float32, 2), integers((rows, 2), torch.float32, 3)
    want = reference.moe_grouped_wgrad(grad, x, running(ends, rows))
    assert int((want != 0).any(-1).sum()) > 2
    assert same_bits(kernels.moe_grouped_wgrad(*on_device((grad, x, ends))).cpu(), want)


def test_mlp_in_parts_has_the_same_bits(monkeypatch) -> None:
    tokens, experts, k, inner = 9, 3, 9, 7
    x = tensors.values((tokens, k), torch.bfloat16, "normal", 1)
    w13 = tensors.values((experts, 2 * inner, k), torch.bfloat16, "normal", 2)
    w2 = tensors.values((experts, k, inner), torch.bfloat16, "normal", 3)
    weights, ids = pairs_of(tokens, 2, experts, 4)
    given = on_device((x, w13, w2, weights, ids))
    whole = kernels.moe_mlp(*given)
    assert bool(whole.isfinite().all()) and bool((whole != 0).any())
    for at_once in (1, 7, 18):
        monkeypatch.setattr(kernels, "PAIRS_AT_ONCE", at_once)
        assert same_bits(kernels.moe_mlp(*given), whole)


# --- Contents out of range -------------------------------------------------------------------------------------------

WRONG = (0, -1, -(2**31), 2**31 - 1, 5)
FAR_OFF = (*WRONG, 2**40, -(2**63), 2**32 + 1)


@pytest.mark.parametrize("index", reference.INDICES, ids=str)
@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_offsets_that_nobody_checked(dtype: torch.dtype, side: int, index: torch.dtype) -> None:
    """They count as the largest so far, within the rows; x and grad lie amid NaN."""
    rows, experts = 37, 7
    x, w = integers((rows, side), dtype, 1), integers((experts, side, side), dtype, 2)
    grad = integers((rows, side), dtype, 3)
    g = tensors.generator(4)
    pool = torch.tensor([*(FAR_OFF if index == torch.int64 else WRONG), *range(0, rows + 5, 6)])
    x_in, grad_in, w_in = amid_nan(x, 8), amid_nan(grad, 8), w.to(DEVICE)
    for _ in range(4):
        offsets = pool[torch.randint(0, len(pool), (experts,), generator=g)].to(index)
        counted = running(offsets, rows)
        have = kernels.moe_grouped_gemm(x_in, w_in, offsets.to(DEVICE))
        assert same_bits(have.cpu(), reference.moe_grouped_gemm(x, w, counted))
        have = kernels.moe_grouped_wgrad(grad_in, x_in, offsets.to(DEVICE))
        assert same_bits(have.cpu(), reference.moe_grouped_wgrad(grad, x, counted))


def out_of(size: int, numbers: Tensor) -> Tensor:
    return (numbers < 0) | (numbers >= size)


def some_wrong(good: Tensor, size: int, index: torch.dtype, seed: int) -> Tensor:
    """Numbers below `size`, some of them made wrong."""
    g = tensors.generator(seed)
    wrong = [-1, -2, -(2**31), 2**31 - 1, size, size + 1]
    pool = torch.tensor(wrong if index == torch.int32 else [*wrong, 2**32, 2**62, -(2**63), 2**63 - 1])
    drawn = pool[torch.randint(0, len(pool), good.shape, generator=g)]
    return torch.where(torch.rand(good.shape, generator=g) < 0.4, drawn, good).to(index)


@pytest.mark.parametrize("index", reference.INDICES, ids=str)
@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gather_that_nobody_checked(dtype: torch.dtype, side: int, index: torch.dtype) -> None:
    """Such rows count as zeros."""
    rows, offsets = 41, ends_of((20, 0, 19))
    x, w, grad = integers((5, side), dtype, 1), integers((3, side, side), dtype, 2), integers((rows, side), dtype, 3)
    bias = integers((3, side), dtype, 4)
    gather = some_wrong(torch.randint(0, 5, (rows,), generator=tensors.generator(5)), 5, index, 6)
    padded = torch.cat([x, torch.zeros(1, side, dtype=dtype)])
    counted = torch.where(out_of(5, gather), 5, gather.long())
    assert 5 < int((counted == 5).sum()) < rows - 5
    given = on_device((w, offsets, bias, gather))
    have = kernels.moe_grouped_gemm(amid_nan(x, 8), *given)
    assert same_bits(have.cpu(), reference.moe_grouped_gemm(padded, w, offsets, bias, counted))
    have = kernels.moe_grouped_wgrad(*on_device((grad,)), amid_nan(x, 8), *on_device((offsets, gather)))
    assert same_bits(have.cpu(), reference.moe_grouped_wgrad(grad, padded, offsets, counted))


@pytest.mark.parametrize("index", reference.INDICES, ids=str)
@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_places_that_nobody_checked(dtype: torch.dtype, side: int, index: torch.dtype) -> None:
    """They count as -1, and their weights, NaN here, take no part."""
    y = integers((7, side), dtype, 1)
    inverse = some_wrong(torch.randint(0, 7, (9, 5), generator=tensors.generator(2)), 7, index, 3)
    counted = torch.where(out_of(7, inverse), -1, inverse.long())
    weights = torch.where(counted < 0, NAN, WEIGHTS.expand(9, 5))
    want = reference.moe_combine(y, counted, weights)
    assert bool(want.isfinite().all()) and bool((counted < 0).any())
    have = kernels.moe_combine(amid_nan(y, 8), *on_device((inverse, weights)))
    assert same_bits(have.cpu(), want)


@pytest.mark.parametrize("index", reference.INDICES, ids=str)
@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_experts_that_nobody_checked(way: str, dtype: torch.dtype, side: int, index: torch.dtype) -> None:
    """They count as -1 for the whole layer; their weights of NaN take no part."""
    tokens, experts = 11, 3
    x = signs((tokens, side), dtype, 1)
    w13, w2 = signs((experts, side, side), dtype, 2), integers((experts, side, side), dtype, 3)
    ids = some_wrong(torch.randint(0, experts, (tokens, 3), generator=tensors.generator(4)), experts, index, 5)
    counted = torch.where(out_of(experts, ids), -1, ids.long())
    weights = torch.where(counted < 0, NAN, WEIGHTS[:3].expand(tokens, 3))
    want = reference.moe_mlp(x, w13, w2, weights, counted, activation="relu2")
    assert bool(want.isfinite().all())
    given = on_device((w13, w2, weights, ids))
    have = kernels.moe_mlp(amid_nan(x, 8), *given, activation="relu2")
    assert same_bits(have.cpu(), want)


# --- Nothing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", range(5))
def test_of_nothing(nothing: int) -> None:
    """Without tokens, columns, what is between the products, pairs or experts."""
    tokens, cols, inner, k, experts = (0 if i == nothing else 3 for i in range(5))
    x, w13, w2 = torch.ones(2, tokens, cols), torch.ones(experts, 2 * inner, cols), torch.ones(experts, cols, inner)
    ids = torch.full((2, tokens, k), min(experts, 2) - 1)
    weights = torch.ones(2, tokens, k)

    def compare(op: str, *args: Any) -> Any:
        want, have = getattr(reference, op)(*args), getattr(kernels, op)(*on_device(args))
        assert all(
            same_bits(a.cpu(), b)
            for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (have, want)), strict=True)
        ), op
        return want

    compare("moe_mlp", x, w13, w2, weights, ids)
    perm, inverse, offsets = compare("moe_sort", ids, experts)
    gather, x = perm // max(1, k), x.reshape(2 * tokens, cols)
    rows = compare("moe_grouped_gemm", x, w13, offsets, torch.ones(experts, 2 * inner), gather)
    compare("moe_grouped_wgrad", rows, x, offsets, gather)
    compare("moe_combine", rows, inverse, weights)
    if k <= experts:
        compare("moe_route", torch.zeros(2, tokens, experts), k)
