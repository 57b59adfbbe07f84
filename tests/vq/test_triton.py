"""What only Triton has: compilation ahead of time, blocks and shares of keys, and contents that nobody has checked.

Most numbers here are small integers, so that sums are exact in any order: results have the reference's bits. NaN lies
wherever nothing may be read.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from effk.kernels.common.triton_aot import Variant
from effk.kernels.common.triton_rows import vector
from effk.kernels.vq import triton as kernels
from effk.vq import reference

from ..kit import tensors
from ..kit.tensors import same_bits
from ..kit.triton import assert_compiles_without_spills, compiling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = reference.FLOATS
NAN = float("nan")
INFINITY = float("inf")
JUNK = (-1, -(2**63), 2**63 - 1, 2**32, 2**31 - 1, -(2**31))


def test_every_kernel_compiles_without_spills() -> None:
    assert_compiles_without_spills(kernels)


def test_scores_of_8_bit_tables_are_rounded_twice() -> None:
    """No product is fused with a sum, wherever all back ends must agree to the bit."""
    program = (
        "from effk.kernels.vq import triton as k\n"
        "found = [k.QUANTIZE, *(v for (table, *_), v in k.SCORE.items() if table == k.torch.uint8)]\n"
        "print([v.compile(90).asm['ptx'].count('fma.rn.f32') for v in found])"
    )
    done = compiling("-c", program)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.strip("[]\n").split(", ")) == {"0"}, done.stdout


# --- Inputs ----------------------------------------------------------------------------------------------------------


def integers(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensors.values(shape, dtype, "integers", seed)


def amid_nan(t: Tensor, beside: int) -> Tensor:
    """t [B, heads, keys, columns] in a larger tensor with NaN around it."""
    batch, heads, keys, cols = t.shape
    wide = t.new_full((batch, heads, keys + 2, cols + 2 * beside), NAN)
    wide[:, :, 1:-1, beside : beside + cols] = t
    return wide.to(DEVICE)[:, :, 1:-1, beside : beside + cols]


def codes_of(batch: int, heads: int, keys: int, subspaces: int, words: int, pack: bool, seed: int) -> Tensor:
    codes = torch.randint(0, words, (batch, heads, keys, subspaces), generator=tensors.generator(seed))
    if pack:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return codes.to(torch.uint8 if words <= 256 else torch.int16)


def run(name: str, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = tensors.map_tensors(lambda t: t.to(DEVICE), (args, kwargs))
    return tensors.map_tensors(lambda t: t.cpu(), getattr(kernels, name)(*args, **kwargs))


# --- What is launched ------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch) -> list[Variant]:
    """The kernels that are launched."""
    launch, found = Variant.launch, []

    def watched(self: Variant, grid: tuple[int, ...], **args: Any) -> None:
        found.append(self)
        launch(self, grid, **args)

    monkeypatch.setattr(Variant, "launch", watched)
    return found  # type: ignore[return-value]


def test_nothing_waits_for_the_device(monkeypatch) -> None:
    """Tensors without contents refuse all that would look at them."""
    names: list[str] = []
    monkeypatch.setattr(Variant, "launch", lambda self, grid, **args: names.append(self.kernel.__name__))

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    codebook, square = meta(2, 3, 16, 4), meta(2, 12, 12)
    codes = kernels.vq_encode(meta(5, 2, 9, 12), codebook, square)
    lut = kernels.vq_lut(meta(5, 6, 12), codebook, square)
    assert codes.shape == (5, 2, 9, 3) and lut.shape == (5, 6, 3, 16)
    assert names == ["project", "encode", "project", "look_up"]
    for dtype in (torch.int32, torch.int64):
        lens = meta(5, dtype=dtype)
        for table in reference.TABLES:
            names.clear()
            assert kernels.vq_score(lut, codes, lens, table=table).shape == (5, 6, 9)
            idx, count = kernels.vq_topk(lut, codes, 2, lens, sink=1, window=1, table=table)
            assert idx.shape == (5, 2, 8) and count.shape == (5, 2)
            scores = ["score"] if table == "float32" else ["quantize", "score"]
            assert names == [*scores, *scores, *["count_digits"] * 4, "count_ties", "choose", "choose"]
        names.clear()
        out, lse = kernels.vq_attend(
            meta(5, 6, 12), meta(5, 2, 9, 12), meta(5, 2, 9, 7), idx.to(dtype), count.to(dtype)
        )
        assert out.shape == (5, 6, 7) and lse.shape == (5, 6) and names == ["attend", "merge"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernels_get_the_alignment_they_are_compiled_for(launched, monkeypatch, dtype: torch.dtype) -> None:
    size = vector(dtype)
    monkeypatch.setattr(Variant, "launch", lambda self, grid, **args: launched.append(self))

    def widths(k: Tensor, v: Tensor) -> tuple[int, int]:
        launched.clear()
        kernels.vq_attend(torch.ones(1, 2, k.shape[3], dtype=dtype), k, v)
        constants = launched[0].constants
        return constants["VECTOR"], constants["DIM"]

    def ones(cols: int, beyond: int = 0) -> Tensor:
        return torch.ones(1, 2, 3, cols + beyond, dtype=dtype)[..., :cols]

    assert widths(ones(2 * size), ones(size, size)) == (size, 64)
    assert widths(ones(2 * size), ones(72)) == (size, 128)
    for k, v in ((ones(size + 1), ones(size)), (ones(size), ones(size, 1)), (ones(128), ones(1))):
        assert widths(k, v) == (1, 64)
    shifted = torch.ones(2 * 3 * size + 1, dtype=dtype)[1:].view(1, 2, 3, size)
    assert widths(shifted, ones(size)) == widths(ones(size), shifted) == (1, 64)


# --- Codes and tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subspaces, words, width", [(2, 16, 17), (2, 70, 3), (1, 300, 33)])
def test_more_words_and_columns_than_a_tile(monkeypatch, subspaces: int, words: int, width: int) -> None:
    """Keys are taken in parts, too."""
    heads, group, dim = 2, 3, subspaces * width
    monkeypatch.setattr(kernels, "NUMBERS_AT_ONCE", 2 * heads * dim * 20)
    keys, q = integers((2, heads, 41, dim), 1), integers((2, heads * group, dim), 2)
    codebook, matrix = integers((heads, subspaces, words, width), 3), integers((heads, dim, dim), 4).sign()
    keys[0, 1, 3], keys[1, 0, 5, 0] = NAN, INFINITY
    codebook[:, :, words // 2] = codebook[:, :, 1]  # of equals the lower one
    for m in (None, matrix):
        assert same_bits(run("vq_encode", keys, codebook, m), reference.vq_encode(keys, codebook, m))
        assert same_bits(run("vq_lut", q, codebook, m), reference.vq_lut(q, codebook, m))


KINDS = [(1, 300, False), (17, 20, False), (3, 16, False), (18, 16, True)]


@pytest.mark.parametrize("group", [1, 5])
@pytest.mark.parametrize("subspaces, words, pack", KINDS)
def test_scores(subspaces: int, words: int, pack: bool, group: int) -> None:
    """In float32 of integers; and 8-bit tables of any numbers, to the bit."""
    lut, codes = integers((2, 2 * group, subspaces, words), 1), codes_of(2, 2, 70, subspaces, words, pack, 2)
    lens = torch.tensor([70, 33])
    assert same_bits(run("vq_score", lut, codes, lens), reference.vq_score(lut, codes, lens))
    lut = lut + torch.rand(lut.shape, generator=tensors.generator(3))
    tables = lut.flatten(0, 1)
    tables[-1] *= 2.0**-145  # a step that is subnormal
    tables[0] = 7.5  # no step
    for given in (lut, torch.where(torch.arange(2 * group)[:, None, None] == 0, NAN, lut)):
        want = reference.vq_score(given, codes, lens, table="int8")
        assert same_bits(run("vq_score", given, codes, lens, table="int8").nan_to_num(9e9), want.nan_to_num(9e9))


@pytest.mark.parametrize("words, pack", [(9, False), (9, True), (300, False)])
def test_codes_of_strangers_stay_in_the_table(words: int, pack: bool) -> None:
    """Every score is a sum of entries of its own table; others' hold NaN."""
    lut = torch.full((1, 3, 2, words), NAN)
    lut[:, 1] = 1.0
    codes = tensors.values((1, 3, 40, 1 if pack else 2), torch.uint8 if words <= 256 else torch.int16, "bits", 1)
    for table in reference.TABLES:
        assert (run("vq_score", lut, codes, table=table)[:, 1] == 2).all()
        idx, count = run("vq_topk", lut, codes, 4, table=table, sink=0, window=0)
        assert (count == 4).all() and (idx >= 0).all() and (idx < 40).all()


# --- The k best ------------------------------------------------------------------------------------------------------

BLOCK = kernels.CHOOSE.constants["KEYS"]


def listed(scores: Tensor, k: int, **options: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """vq_topk's result and the reference's for these scores [B, H, keys]: one subspace, each key with its own word."""
    batch, _, keys = scores.shape
    lut = scores[:, :, None].contiguous()
    codes = torch.arange(keys).to(torch.int16).view(1, 1, keys, 1).expand(batch, 1, keys, 1)
    return run("vq_topk", lut, codes, k, **options), reference.vq_topk(lut, codes, k, **options)


@pytest.mark.parametrize("k", [0, 1, 300, BLOCK, 3 * BLOCK])
def test_the_k_best_over_several_blocks(k: int) -> None:
    """Scores of all magnitudes, with ties on both sides of where a block ends."""
    keys = 2 * BLOCK + 7
    scores = tensors.values((1, 2, keys), torch.float32, "extreme", 1)
    scores[0, 0, 5:900], scores[0, 0, 1000:1100] = -2.0, 3.0
    scores[0, 0, BLOCK : BLOCK + 2] = torch.tensor([0.0, -0.0])
    scores[0, 1, ::3], scores[0, 1, 1::7], scores[0, 1, 2::90] = NAN, -INFINITY, INFINITY
    for options in ({}, {"sink": 0, "window": 0, "union_group": False}, {"lens": torch.tensor([BLOCK])}):
        have, want = listed(scores, k, **options)
        assert torch.equal(have[0], want[0]) and torch.equal(have[1], want[1])


def test_the_k_best_of_8_bit_tables() -> None:
    """Sums of 8-bit entries, many of them equal; and a table with NaN, whose scores are all equal."""
    scores = tensors.values((1, 3, BLOCK + 9), torch.float32, "normal", 1)
    scores[0, 1, 7] = NAN
    for union in (False, True):
        have, want = listed(scores, 100, union_group=union, table="int8", sink=2, window=5)
        assert torch.equal(have[0], want[0]) and torch.equal(have[1], want[1])


def test_any_lengths() -> None:
    """Those out of range count as the nearest that isn't."""
    scores = tensors.values((len(JUNK), 2, 50), torch.float32, "normal", 1)
    lens = torch.tensor(JUNK)
    for k in (3, 60):
        lut, codes = scores[:, :, None].contiguous(), torch.arange(50).to(torch.uint8).view(1, 1, 50, 1)
        codes = codes.expand(len(JUNK), 1, 50, 1)
        have = run("vq_topk", lut, codes, k, lens, sink=4, window=8)
        want = reference.vq_topk(lut, codes, k, lens.clamp(0, 50), sink=4, window=8)
        assert torch.equal(have[0], want[0]) and torch.equal(have[1], want[1])
        scored = reference.vq_score(lut, codes, lens.clamp(0, 50))
        assert same_bits(run("vq_score", lut, codes, lens), scored)


# --- Attention -------------------------------------------------------------------------------------------------------


def attended(q: Tensor, k: Tensor, v: Tensor, idx: Tensor | None, count: Tensor | None) -> tuple[Tensor, Tensor]:
    """In float64, of keys that are there."""
    batch, heads, dim = q.shape
    group = heads // k.shape[1]
    out = torch.zeros(batch, heads, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads), -INFINITY, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            chosen = torch.arange(k.shape[2])
            if idx is not None:
                at = h * idx.shape[1] // heads
                chosen = idx[b, at] if count is None else idx[b, at, : int(count[b, at].clamp(0, idx.shape[2]))]
            elif count is not None:
                chosen = chosen[: int(count[b].clamp(0, k.shape[2]))]
            chosen = chosen[(chosen >= 0) & (chosen < k.shape[2])]
            scores = k[b, h // group, chosen].double() @ q[b, h].double() * dim**-0.5
            if len(chosen):
                out[b, h] = scores.softmax(0) @ v[b, h // group, chosen].double()
                lse[b, h] = scores.logsumexp(0)
    return out, lse


@pytest.mark.parametrize("dim, value_dim", [(16, 72), (7, 130)], ids=["vectors", ""])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention_in_shares(launched, monkeypatch, dtype: torch.dtype, dim: int, value_dim: int) -> None:
    """Keys in several shares, queries and columns in several tiles, and lists with entries and counts from anywhere."""
    batch, heads, group, keys = 1, 2, 17, 140
    monkeypatch.setattr(kernels, "PROGRAMS", 8 * 12)
    q = tensors.values((batch, heads * group, dim), dtype, "normal", 1)
    k = tensors.values((batch, heads, keys, dim), dtype, "normal", 2)
    v = tensors.values((batch, heads, keys, value_dim), dtype, "normal", 3)
    g = tensors.generator(4)
    listed = torch.randint(0, keys, (batch, heads, 150), generator=g)
    junk = torch.tensor((*JUNK, keys))[torch.randint(0, len(JUNK) + 1, listed.shape, generator=g)]
    listed = torch.where(torch.rand(listed.shape, generator=g) < 0.1, junk, listed)
    for idx, count in (
        (None, None),
        (None, torch.tensor([50])),
        (listed, torch.tensor([[77, 2**40]])),
        (listed[:, :, :9].repeat_interleave(group, 1), torch.arange(heads * group)[None] - 3),
    ):
        out, lse = (
            t.cpu()
            for t in kernels.vq_attend(
                *(q.to(DEVICE), amid_nan(k, vector(dtype)), amid_nan(v, vector(dtype))),
                *tensors.map_tensors(lambda t: t.to(DEVICE), (idx, count)),
            )
        )
        want, want_lse = attended(q, k, v, idx, count)
        # Scores are sums of dim terms, values of as many as there are keys: each is rounded, and so is the result.
        unit = 2.0**-23
        most = q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max() * dim**-0.5
        error = unit * (keys + 4 + 4 * (dim + 4) * most) * v.abs().max() + torch.finfo(dtype).eps * want.abs()
        assert bool(((out.double() - want).abs() <= error).all())
        assert torch.equal(lse.isinf(), want_lse.isinf())
        far = (lse.double() - want_lse).nan_to_num(0, 0, 0).abs()
        assert bool((far <= unit * (keys + 4 + (dim + 4) * most)).all())
    assert len(launched) == 8


def test_infinite_values_reach_only_those_that_attend_to_them() -> None:
    """An infinity stays one, also where tensor cores take weights in three parts."""
    q, k = torch.zeros(1, 2, 16, dtype=torch.float16), torch.zeros(1, 2, 40, 16, dtype=torch.float16)
    v = integers((1, 2, 40, 8), 1, torch.float16)
    v[0, 0, 3, 0], v[0, 0, 7, 1] = INFINITY, -INFINITY
    out, _ = run("vq_attend", q, k, v)
    assert out[0, 0, 0] == INFINITY and out[0, 0, 1] == -INFINITY
    assert out[0, 0, 2:].isfinite().all() and out[0, 1].isfinite().all()
