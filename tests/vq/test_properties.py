"""What must hold of vq on every back end."""

from __future__ import annotations

import functools
import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from effk.vq import reference
from hypothesis import assume
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from ..kit import tensors
from ..kit.backends import Backend, every_backend, on_backends
from ..kit.errors import Bounded
from ..kit.tensors import same_bits
from .strategies import (
    FLOATS,
    INDICES,
    TABLES,
    WIDE,
    Attend,
    Book,
    Table,
    Wrope,
    attends,
    books,
    expandable,
    hostile_codes,
    hostile_lens,
    hostile_lists,
    lay_out_cache,
    part_of,
    quantized,
    tables,
    wropes,
)

ALL_KINDS = ("normal", "integers", "extreme", "special")
EXACT_KINDS = ("integers", "marked")  # of a float32 table: sums are exact in any order
nan_books = functools.partial(books, kinds=("normal", "special"))
float_tables = functools.partial(tables, names=("float32",))
int8_tables = functools.partial(tables, names=("int8",), kinds=(*ALL_KINDS, "marked", "bits"))


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """The same bits, but for the pattern of NaN and the sign of 0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(0.125), b.nan_to_num(0.125))


def of_dtypes(*ops: str):
    def decorate(test):
        return pytest.mark.parametrize("dtype", FLOATS, ids=str)(on_backends(*ops)(test))

    return decorate


def is_large(backend: Backend) -> bool:
    """Whether to skip what would take it long."""
    return backend.slow or backend.name == "simt"


def skip_large(backend: Backend) -> None:
    if is_large(backend):
        pytest.skip("large")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensors.values(shape, dtype, "normal", seed)


# The metric and codebooks --------------------------------------------------------------------------------------------


def metric_of(q: Tensor, eps: float) -> Tensor:
    gram = q.double().mT @ q.double()
    return gram / gram.square().mean((1, 2), keepdim=True).sqrt() + eps * torch.eye(q.shape[2]).double()


@of_dtypes("vq_metric")
def test_metric_measures_what_a_code_does_to_scores(backend: Backend, dtype: torch.dtype) -> None:
    """|(k - c) L|^2 = (k - c) H (k - c)^T, up to the rounding of L's entries; and inv is L's inverse, transposed."""
    for dim, n in ((1, 1), (5, 3), (16, 200), (33, 40)):
        q = normal(3, n, dim, seed=dim, dtype=dtype)
        eps = 1e-2
        chol, inv = backend.run("vq_metric", q, eps=eps)
        assert chol.dtype == inv.dtype == torch.float32
        metric, wide = metric_of(q, eps), chol.double()
        # Each entry of L is rounded once, and so twice in each product of L L^T.
        loss = 2.1 * 2**-24 * (wide.abs() @ wide.abs().mT) + 1e-12 * metric.abs().amax()
        assert bool(((wide @ wide.mT - metric).abs() <= loss).all())
        assert bool((chol.triu(1) == 0).all()) and bool((inv.tril(-1) == 0).all())
        moved = 2.1 * 2**-24 * (wide.abs() @ inv.double().abs().mT.mT) if dim == 1 else None
        product = inv.double().mT @ wide
        loss = moved if moved is not None else 2.1 * 2**-24 * (inv.double().abs().mT @ wide.abs()) + 1e-12
        assert bool(((product - torch.eye(dim)).abs() <= loss).all())
        difference = normal(3, 7, dim, seed=1).double()
        direct = torch.einsum("hnd,hde,hne->hn", difference, metric, difference)
        torch.testing.assert_close((difference @ wide).square().sum(-1), direct, rtol=1e-5, atol=0)


@on_backends("vq_metric")
def test_metric_of_nothing_is_the_identity(backend: Backend) -> None:
    """No queries, or all zero: so codes are those of plain quantization."""
    eye = torch.eye(4).expand(2, 4, 4)
    for q in (torch.zeros(2, 0, 4), torch.zeros(2, 5, 4)):
        assert all(torch.equal(t, eye) for t in backend.run("vq_metric", q))
    q = torch.cat([torch.zeros(1, 5, 4), normal(1, 5, 4)])  # and of one head alone
    chol, inv = backend.run("vq_metric", q)
    assert torch.equal(chol[0], eye[0]) and torch.equal(inv[0], eye[0]) and not torch.equal(chol[1], eye[0])


@on_backends("vq_metric")
def test_metric_has_no_scale(backend: Backend) -> None:
    """To the bit, for factors that are powers of 2."""
    q = normal(2, 30, 6)
    assert all(map(same_bits, backend.run("vq_metric", q), backend.run("vq_metric", 64 * q)))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@on_backends("vq_train")
def test_training_on_nan_is_refused(backend: Backend, number: float) -> None:
    keys = normal(2, 30, 6)
    keys[1, 17, 3] = number
    with pytest.raises(RuntimeError, match="effk::vq_train: keys holds NaN or infinity"):
        backend.run("vq_train", keys, 4)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@on_backends("vq_metric")
def test_metric_of_nan_is_refused(backend: Backend, number: float) -> None:
    q = normal(2, 30, 6)
    q[1, 17, 3] = number
    with pytest.raises(RuntimeError, match="effk::vq_metric: q holds NaN or infinity"):
        backend.run("vq_metric", q)


@on_backends("vq_metric")
def test_metric_with_an_eps_too_small(backend: Backend) -> None:
    q = torch.ones(1, 3, 6)  # of rank 1
    with pytest.raises(RuntimeError, match="effk::vq_metric: eps is 1e-300"):
        backend.run("vq_metric", q, eps=1e-300)


def objective(x: Tensor, words: Tensor) -> Tensor:
    """The sum of squared distances to the nearest words: x [HK, n, D], words [HK, m, C, d]."""
    x = x.double().unflatten(-1, (words.shape[1], -1)).transpose(1, 2)
    return torch.cdist(x, words.double(), compute_mode="donot_use_mm_for_euclid_dist").square().amin(-1).sum((1, 2))


@pytest.mark.parametrize("subspaces", [1, 2, 3])
@on_backends("vq_train")
def test_the_objective_never_rises(backend: Backend, subspaces: int) -> None:
    """By more than float32 loses: a mean is rounded, and near-ties are told apart by rounded distances."""
    keys, chol = normal(2, 150, 6), normal(2, 6, 6, seed=1).tril()
    x = keys @ chol
    steps = [
        objective(x, backend.run("vq_train", keys, 9, chol, num_subspaces=subspaces, iters=iters, seed=3))
        for iters in (0, 1, 2, 3, 5, 8, 20)
    ]
    for before, after in itertools.pairwise(steps):
        assert bool((after <= before + 64 * 2**-24 * x.double().square().sum((1, 2))).all())
    assert bool((steps[-1] < 0.95 * steps[0]).all())


@on_backends("vq_train")
def test_k_means_finds_the_words_that_keys_are_drawn_from(backend: Backend) -> None:
    """Well apart, each with its copies: k-means++ takes none twice. As many distinct keys as words, too."""
    words = normal(2, 8, 4) * 10
    keys = words[:, torch.arange(40) % 8]
    for iters in (0, 4):
        book = backend.run("vq_train", keys, 8, iters=iters)
        order = [torch.cdist(book[h, 0], words[h]).argmin(-1) for h in range(2)]
        for h in range(2):
            assert sorted(order[h].tolist()) == list(range(8))
            torch.testing.assert_close(book[h, 0], words[h][order[h]], rtol=1e-6, atol=0)


@on_backends("vq_train")
def test_an_empty_word_stays(backend: Backend) -> None:
    """Of keys that are all equal: every word is that key, and no mean of nothing is taken."""
    keys = normal(1, 1, 4).expand(1, 6, 4)
    book = backend.run("vq_train", keys, 3, iters=3)
    assert torch.equal(book, keys[:, None, :3])


@on_backends("vq_train")
def test_training_is_told_by_its_seed(backend: Backend) -> None:
    keys = normal(2, 50, 6)
    first, again, other = (backend.run("vq_train", keys, 7, num_subspaces=2, seed=seed) for seed in (1, 1, 2))
    assert same_bits(first, again) and not torch.equal(first, other)


# Encoding ------------------------------------------------------------------------------------------------------------


def codes_of(case: Book, stored: Tensor) -> Tensor:
    """[B, HK, S, m] int64"""
    return reference.unpack(stored, case.pack)


def check_nearest(backend: Backend, case: Book, stored: Tensor) -> None:
    """The word's distance is the least, but for what float32 may lose of both; where nothing is lost, the first."""
    codes = codes_of(case, stored)
    assert bool(((codes >= 0) & (codes < case.words)).all())
    exact_sums = case.kind == "integers" and not case.with_metric
    for b in range(case.batch):
        for head in range(case.heads):
            for j, distance in enumerate(case.distances(b, head, backend.unit)):
                code = codes[b, head, :, j, None]
                if exact_sums:
                    assert torch.equal(code[:, 0], first_least(distance.value))
                own, loss = distance.value.gather(1, code), distance.error.gather(1, code)
                bound = (distance.value + distance.error).amin(-1, keepdim=True)
                assert bool((own - loss <= bound).all())


def first_least(t: Tensor) -> Tensor:
    """Where the first of the least numbers is, by rows."""
    last = t.shape[1]
    places = torch.where(t == t.amin(-1, keepdim=True), torch.arange(last), last)
    return places.amin(-1)


@every_backend("vq_encode", cases=books)
def test_codes_name_the_nearest_words(backend: Backend, case: Book) -> None:
    stored = case.encode(backend)
    last = case.subspaces // (2 if case.pack else 1)
    assert stored.shape == (case.batch, case.heads, case.keys, last) and stored.is_contiguous()
    assert stored.dtype == (torch.uint8 if case.words <= 256 else torch.int16)
    check_nearest(backend, case, stored)


@on_backends("vq_encode")
def test_every_number_of_words_and_keys(backend: Backend) -> None:
    """From 1 to 40: kernels for several meet with all remainders. The first of equals is among them."""
    for n in (1, 5, 17) if backend.slow else range(1, 41, 3) if backend.name == "simt" else range(1, 41):
        for case in (
            Book(2, n, 3, keys=9, kind="integers", seed=n),
            Book(2, 9, 3, keys=n, kind="integers", seed=n),
            Book(1, 9, n, keys=5, with_metric=True, seed=n),
            Book(n, 9, 1, keys=5, dtype=torch.bfloat16, kind="integers", seed=n),
        ):
            check_nearest(backend, case, case.encode(backend))


@of_dtypes("vq_encode")
def test_encoding_with_large_codebooks(backend: Backend, dtype: torch.dtype) -> None:
    skip_large(backend)
    for case in (
        Book(1, 4096, 128, 1, keys=140, batch=1, with_metric=True, dtype=dtype),
        Book(16, 16, 8, 2, keys=300, batch=1, with_metric=True, pack=True, dtype=dtype),
        Book(4, 256, 32, 1, keys=300, batch=1, with_metric=True, dtype=dtype),
    ):
        check_nearest(backend, case, case.encode(backend))


@every_backend("vq_encode", cases=functools.partial(books, kinds=("normal",), metric=False))
def test_a_word_encodes_to_itself(backend: Backend, case: Book) -> None:
    """Words well apart: at the corners of a cube."""
    words = min(case.words, 2**case.size, 64)
    corners = torch.arange(words)[:, None] >> torch.arange(case.size) & 1
    codebook = (8.0 * corners - 4).expand(case.heads, case.subspaces, -1, -1)
    wanted = torch.randint(
        0, words, (case.batch, case.heads, case.keys, case.subspaces), generator=tensors.generator(case.seed)
    )
    wanted = expandable(wanted, case.layout)
    keys = torch.stack([codebook[:, j][:, wanted[..., j]][0] for j in range(case.subspaces)], -2).flatten(-2)
    got = case.encode(backend, k=lay_out_cache(keys.to(case.dtype), case.layout), codebook=codebook, pack=False)
    assert torch.equal(got.long(), wanted)


@on_backends("vq_encode")
def test_words_of_a_metric_encode_to_themselves(backend: Backend) -> None:
    """c L^-1 is a key whose code is c's."""
    chol, inv = reference.vq_metric(normal(2, 50, 8), eps=0.1)
    codebook = normal(2, 1, 20, 8)
    keys = codebook[:, 0] @ inv.mT  # L^-1 = inv^T
    assert backend.run("vq_encode", keys[None], codebook, chol)[0, :, :, 0].tolist() == [list(range(20))] * 2


@every_backend("vq_encode", cases=functools.partial(books, metric=False))
def test_the_identity_is_plain_quantization(backend: Backend, case: Book) -> None:
    eye = torch.eye(case.dim).expand(case.heads, -1, -1)
    assert torch.equal(case.encode(backend, chol=eye), case.encode(backend))


def packable_books(backend: Backend) -> SearchStrategy[Book]:
    return books(backend).map(lambda b: replace(b, words=min(b.words, 16), subspaces=b.subspaces + b.subspaces % 2))


@every_backend("vq_encode", cases=packable_books)
def test_packing_changes_no_code(backend: Backend, case: Book) -> None:
    one, packed = case.encode(backend, pack=False), case.encode(backend, pack=True)
    assert torch.equal(one[..., ::2], packed & 15) and torch.equal(one[..., 1::2], packed >> 4)


@every_backend("vq_encode", cases=nan_books)
def test_a_key_of_nan_spoils_itself_alone(backend: Backend, case: Book) -> None:
    """It gets code 0 where no distance is a number; and none is out of range."""
    assume(case.keys > 0 and case.layout != "expanded")
    codes = codes_of(case, case.encode(backend))
    assert bool(((codes >= 0) & (codes < case.words)).all())
    k = tensors.to_device(case.k)
    at = case.seed % case.keys
    k[:, :, at] = torch.nan
    spoiled = codes_of(case, case.encode(backend, k=k))
    others = torch.arange(case.keys) != at
    assert torch.equal(spoiled[:, :, others], codes[:, :, others])
    assert not bool(spoiled[:, :, at].any())


@every_backend("vq_encode", cases=books)
def test_strides_change_no_code(backend: Backend, case: Book) -> None:
    """Neither do other keys and batches, on a CPU."""
    plain = case.encode(backend, k=case.k.contiguous(), codebook=case.codebook.contiguous())
    if backend.name.startswith("cpu-"):
        assert torch.equal(plain, case.encode(backend))
        for s in range(min(3, case.keys)):
            assert torch.equal(case.encode(backend, k=case.k[:, :, s : s + 1]), plain[:, :, s : s + 1])
    check_nearest(backend, case, plain)


# Tables --------------------------------------------------------------------------------------------------------------


@every_backend("vq_lut", cases=books)
def test_lut_is_within_the_bound(backend: Backend, case: Book) -> None:
    out = case.lut(backend)
    assert out.dtype == torch.float32 and out.is_contiguous()
    case.exact_lut(backend.unit).assert_holds(out)


@every_backend("vq_lut", cases=functools.partial(books, kinds=("special",), metric=False))
def test_lut_of_nan_and_infinity(backend: Backend, case: Book) -> None:
    case.exact_lut(backend.unit).assert_holds(case.lut(backend))


@on_backends("vq_lut")
def test_every_size_of_a_table(backend: Backend) -> None:
    for n in (1, 5, 17) if backend.slow else range(1, 41, 3) if backend.name == "simt" else range(1, 41):
        for case in (Book(2, n, 3, seed=n), Book(n, 3, 2, seed=n), Book(1, 5, n, with_metric=True, seed=n)):
            case.exact_lut(backend.unit).assert_holds(case.lut(backend), f"size {n}")
    for group in (1, 2, 3, 5, 8, 17):
        case = Book(2, 5, 3, group=group, with_metric=True)
        case.exact_lut(backend.unit).assert_holds(case.lut(backend), f"group of {group}")


@of_dtypes("vq_lut")
def test_lut_of_large_codebooks(backend: Backend, dtype: torch.dtype) -> None:
    skip_large(backend)
    for case in (
        Book(1, 4096, 128, 2, 4, with_metric=True, dtype=dtype),
        Book(16, 16, 8, 8, 4, batch=3, with_metric=True, dtype=dtype),
        Book(32, 256, 4, 2, 5, with_metric=True, dtype=dtype),
    ):
        case.exact_lut(backend.unit).assert_holds(case.lut(backend))


@of_dtypes("vq_lut")
def test_lut_bound_sees_one_number(backend: Backend, dtype: torch.dtype) -> None:
    case = Book(3, 7, 5, with_metric=True, dtype=dtype)
    out = case.lut(backend)
    for t in (case.codebook[1, 2, 3], case.q[0, 3], case.inv[1, 0] if case.inv is not None else case.q[0, 0]):
        before = t.clone()
        t += 0.25
        with pytest.raises(AssertionError, match="out of bounds"):
            case.exact_lut(backend.unit).assert_holds(out)
        t.copy_(before)


# Scores --------------------------------------------------------------------------------------------------------------


@every_backend("vq_score", cases=functools.partial(float_tables, kinds=(*ALL_KINDS, "marked")))
def test_scores_are_within_the_bound(backend: Backend, case: Table) -> None:
    """And those of NaN and infinity are; -infinity from lens on."""
    out = case.run(backend)
    assert out.dtype == torch.float32 and out.is_contiguous()
    case.exact(backend.unit).assert_holds(out)


@every_backend("vq_score", cases=int8_tables)
def test_scores_of_8_bits_are_the_same_bits_everywhere(backend: Backend, case: Table) -> None:
    """As numpy's. Of any tables: subnormal, infinite, NaN."""
    assert same_numbers(case.run(backend), case.exact8())


@every_backend("vq_score", cases=functools.partial(int8_tables, kinds=("normal", "integers")))
def test_scores_of_8_bits_are_near(backend: Backend, case: Table) -> None:
    """Half a step for each subspace, and what float32 loses: of the entries, the product and the base."""
    out = case.run(backend).double()
    exact = case.exact(backend.unit).value
    step = quantized(case.lut)[1]
    size = case.lut.double().abs().amax((-1, -2)) * 3
    loss = torch.from_numpy(step).double() * case.subspaces * 0.5 + 2**-24 * (2 * case.subspaces + 4) * (
        case.subspaces * size
    )
    near = (out - exact).abs() <= loss[..., None]
    assert bool((near | (out == exact)).all())


@pytest.mark.parametrize("table", TABLES)
@on_backends("vq_score")
def test_every_number_of_subspaces_words_and_keys(backend: Backend, table: str) -> None:
    """From 1 to 70, codes packed where they can be."""
    sizes = (1, 2, 5, 17) if backend.slow else range(1, 71, 5) if backend.name == "simt" else range(1, 71)
    for n in sizes:
        for case in (
            Table(n, 9, 5, table=table, packed=n % 2 == 0, seed=n),
            Table(n, 16, 5, table=table, packed=n % 2 == 0, kind="integers", seed=n),
            Table(3, n, 5, table=table, seed=n),
            Table(8, 16, n, table=table, packed=True, seed=n),
            Table(16, 16, n, table=table, packed=True, seed=n),
            Table(4, 256, n, table=table, seed=n),
            Table(1, 300, n, table=table, seed=n),
            Table(4, 16, 7, group=n % 12 + 1, table=table, packed=n % 2 == 0, seed=n),
        ):
            if table == "int8":
                assert same_numbers(case.run(backend), case.exact8())
            else:
                case.exact(backend.unit).assert_holds(case.run(backend))


@pytest.mark.parametrize("table", TABLES)
@on_backends("vq_score")
def test_scores_of_many(backend: Backend, table: str) -> None:
    """Of more keys than a thread takes at a time, and of the largest tables."""
    skip_large(backend)
    for case in (
        Table(16, 16, 5000, group=4, packed=True, ragged=True, table=table),
        Table(32, 16, 3000, group=5, packed=True, table=table),
        Table(64, 16, 700, packed=True, table=table),
        Table(256, 16, 300, packed=True, table=table),
        Table(8, 256, 2500, table=table, seed=2),
        Table(17, 200, 2500, table=table, seed=2),
        Table(1, 4096, 5000, group=4, table=table),
        Table(1, 300, 1999, group=5, ragged=True, table=table),  # enough keys for tables of four heads side by side
        Table(3, 21, 700, group=8, table=table),
        Table(2, 32768, 300, table=table),
    ):
        if table == "int8":
            assert same_numbers(case.run(backend), case.exact8())
        else:
            case.exact(backend.unit).assert_holds(case.run(backend))


@on_backends("vq_score")
def test_score_bound_sees_one_entry(backend: Backend) -> None:
    case = Table(5, 7, 30)
    out = case.run(backend)
    case.lut[1, 2, 3, int(case.codes[1, 1, 11, 3])] += 0.01
    with pytest.raises(AssertionError, match="out of bounds"):
        case.exact(backend.unit).assert_holds(out)


@every_backend("vq_score", cases=tables)
def test_codes_behind_lens_are_not_read(backend: Backend, case: Table) -> None:
    """They may be out of range."""
    case = replace(case, ragged=True)
    stored = tensors.to_device(case.stored.contiguous())
    for b, end in enumerate(case.lengths):
        stored[b, :, end:] = torch.iinfo(stored.dtype).max
    assert same_bits(case.run(backend, stored=stored), case.run(backend))


@every_backend("vq_score", cases=tables)
def test_ways_to_the_same_scores(backend: Backend, case: Table) -> None:
    """Packed codes or not, any strides, lens of either type or none: no bit changes on a CPU, or of 8 bits."""
    out = case.run(backend)
    ways = [
        {"stored": replace(case, packed=False).store(case.codes), "lut": case.lut.contiguous()},
        {"stored": case.store(case.codes).contiguous()},
        {"lens": torch.tensor(case.lengths, dtype=torch.int32 if case.index == torch.int64 else torch.int64)},
    ]
    for way in ways:
        got = case.run(backend, **way)
        if case.table == "int8" or backend.name.startswith("cpu-"):
            assert same_numbers(got, out)
        else:
            case.exact(backend.unit).assert_holds(got)


@on_backends("vq_lut", "vq_score", "vq_encode")
def test_keys_made_of_words_have_exact_scores(backend: Backend) -> None:
    """So the best of them are found: recall is 1. With the metric, too, since q L^-T meets k L."""
    for case in (Book(1, 12, 8, keys=20, batch=1), Book(4, 12, 3, keys=20, batch=1)):
        words = torch.randint(0, 12, (1, 2, 20, case.subspaces), generator=tensors.generator(1))
        for pick in (False, True):
            chol, inv = reference.vq_metric(normal(2, 60, case.dim), eps=0.1) if pick else (None, None)
            parts = [case.codebook[torch.arange(2)[:, None], j, words[0, :, :, j]] for j in range(case.subspaces)]
            keys = torch.cat(parts, -1)[None]
            if pick:
                assert inv is not None
                keys = keys @ inv.mT
            codes = backend.run("vq_encode", keys, case.codebook, chol)
            lut = backend.run("vq_lut", case.q[:1], case.codebook, inv)
            scores = backend.run("vq_score", lut, codes)
            exact = torch.einsum("bhd,bhsd->bhs", case.q[:1].double(), keys.double().repeat_interleave(2, 1))
            assert torch.equal(codes.long(), words)
            torch.testing.assert_close(scores.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
            assert torch.equal(scores.topk(5).indices, exact.topk(5).indices)  # recall is 1


# The best ------------------------------------------------------------------------------------------------------------


def check_list(case: Table, idx: Tensor, count: Tensor) -> list[tuple[int, int, list[int]]]:
    """Lists are ascending, without repeats, and -1 follows. Gives batch, list and what's in it."""
    lists = case.heads_of_lists()
    assert idx.shape == (case.batch, len(lists), case.cap) and count.shape == (case.batch, len(lists))
    assert idx.dtype == count.dtype == torch.int64 and idx.is_contiguous() and count.is_contiguous()
    out = []
    for b in range(case.batch):
        for i in range(len(lists)):
            n = int(count[b, i])
            found = idx[b, i].tolist()
            assert found[n:] == [-1] * (case.cap - n)
            assert found[:n] == sorted(set(found[:n])) and all(0 <= s < case.lengths[b] for s in found[:n])
            out.append((b, i, found[:n]))
    return out


def check_exact_topk(case: Table, idx: Tensor, count: Tensor) -> None:
    """To the last key, where sums are exact."""
    lists = case.heads_of_lists()
    for b, i, found in check_list(case, idx, count):
        assert found == case.listed(b, [case.choice(b, h) for h in lists[i]])


@every_backend("vq_topk", cases=functools.partial(float_tables, kinds=EXACT_KINDS))
def test_topk_takes_the_best_of_exact_scores(backend: Backend, case: Table) -> None:
    """Ties, infinities and NaN, too."""
    check_exact_topk(case, *case.topk(backend))


@every_backend("vq_topk", cases=int8_tables)
def test_topk_takes_the_best_of_8_bits(backend: Backend, case: Table) -> None:
    check_exact_topk(case, *case.topk(backend))


@every_backend("vq_topk", cases=functools.partial(float_tables, kinds=("normal", "extreme")))
def test_topk_takes_the_best_of_scores(backend: Backend, case: Table) -> None:
    """Nothing that is left is better than what is taken, but for what float32 may lose of both."""
    case = replace(case, union_group=False)
    exact = case.exact(backend.unit)
    for b, h, found in check_list(case, *case.topk(backend)):
        first, last = case.middle(b)
        assert set(found) >= {*range(first), *range(last, case.lengths[b])}
        taken = [s for s in found if first <= s < last]
        assert len(taken) == min(case.k, last - first)
        left = sorted(set(range(first, last)) - set(taken))
        if not taken or not left or bool((exact.peak[b, h] >= 2.0**126).any()):
            continue
        value, error = exact.value[b, h], exact.error[b, h]
        assert float((value + error)[taken].min()) >= float((value - error)[left].max())


@every_backend("vq_topk", cases=functools.partial(tables, kinds=("normal", "integers")))
def test_a_groups_list_is_the_union_of_its_heads(backend: Backend, case: Table) -> None:
    each = {(b, h): found for b, h, found in check_list(*_topk(backend, replace(case, union_group=False)))}
    lists = replace(case, union_group=True).heads_of_lists()
    for b, i, found in check_list(*_topk(backend, replace(case, union_group=True))):
        assert found == sorted(set().union(*(each[b, h] for h in lists[i])))


def _topk(backend: Backend, case: Table) -> tuple[Table, Tensor, Tensor]:
    return case, *case.topk(backend)


@every_backend("vq_topk", "vq_score", cases=functools.partial(tables, kinds=("normal", "integers")))
def test_topk_ranks_by_the_scores(backend: Backend, case: Table) -> None:
    """The sorted scores of what is taken are those of torch.topk; to the bit on CPUs, whose sums are the same."""
    assume(backend.name.startswith("cpu-") or case.kind == "integers" or case.table == "int8")
    case = replace(case, union_group=False, sink=0, window=0)
    scores = case.run(backend)
    for b, h, found in check_list(*_topk(backend, case)):
        wanted = scores[b, h, : case.lengths[b]].topk(len(found)).values
        assert same_numbers(scores[b, h, found].sort(descending=True).values, wanted)


@pytest.mark.parametrize("table", TABLES)
@on_backends("vq_topk")
def test_every_k_and_every_number_of_keys(backend: Backend, table: str) -> None:
    sizes = (1, 17) if backend.slow else range(1, 70, 6) if backend.name == "simt" else range(1, 70)
    for n in sizes:
        for case in (
            Table(4, 16, n, table=table, packed=True, k=n // 3, kind="integers", seed=n),
            Table(
                4, 16, 70, table=table, packed=True, k=n, sink=0, window=0, union_group=False, kind="integers", seed=n
            ),
            Table(1, 300, 70, table=table, k=n, sink=n // 4, window=n // 5, kind="integers", group=3, seed=n),
        ):
            check_exact_topk(case, *case.topk(backend))


@pytest.mark.parametrize("table", TABLES)
@on_backends("vq_topk")
def test_topk_of_many(backend: Backend, table: str) -> None:
    """Of more keys than a block of threads has, with few and with many different scores."""
    skip_large(backend)
    for union_group in (True, False):
        for case in (
            Table(16, 16, 9000, 1, 4, packed=True, ragged=True, k=270, kind="integers"),
            Table(1, 4096, 9000, 1, 4, batch=1, k=270, kind="integers"),
            Table(8, 256, 9000, 1, 4, batch=1, k=2000, kind="integers"),
            Table(2, 2, 9000, 1, 2, batch=1, packed=True, k=500, kind="integers"),
            Table(16, 16, 70000, 1, 1, batch=1, packed=True, k=2100, kind="integers"),
        ):
            case = replace(case, table=table, union_group=union_group)
            check_exact_topk(case, *case.topk(backend))


@on_backends("vq_topk")
def test_zeros_of_both_signs_are_equal(backend: Backend) -> None:
    case = Table(1, 2, 8, 1, 1, 1, k=3, sink=0, window=0)
    case.__dict__.update(lut=torch.tensor([0.0, -0.0]).reshape(1, 1, 1, 2))
    for codes in ([0, 1] * 4, [1, 0] * 4):
        stored = torch.tensor(codes, dtype=torch.uint8).reshape(1, 1, 8, 1)
        assert case.topk(backend, stored=stored)[0].tolist() == [[[0, 1, 2]]]


@on_backends("vq_topk")
def test_topk_of_scores_that_are_no_numbers(backend: Backend) -> None:
    """NaN after -infinity; of tables of 8 bits none is better than another."""
    case = Table(1, 6, 6, 1, 1, 1, sink=0, window=0)
    nan, inf = math.nan, math.inf
    case.__dict__.update(lut=torch.tensor([nan, -inf, 1.0, inf, -nan, -3.0]).reshape(1, 1, 1, 6))
    stored = torch.arange(6, dtype=torch.uint8).reshape(1, 1, 6, 1)
    for k, wanted in ((1, [3]), (2, [2, 3]), (3, [2, 3, 5]), (4, [1, 2, 3, 5]), (5, [0, 1, 2, 3, 5])):
        assert case.topk(backend, stored=stored, k=k)[0].tolist() == [[wanted]]
        got = case.topk(backend, stored=stored, k=k, table="int8")[0].tolist()
        assert got == [[list(range(k))]]


@every_backend("vq_topk", cases=tables)
def test_topk_of_all_keys(backend: Backend, case: Table) -> None:
    """Where k, or sinks and window, reach all."""
    for change in ({"k": case.keys}, {"k": 2**40}, {"sink": 2**40}, {"window": 2**40}):
        wide = replace(case, **change)
        for b, _, found in check_list(*_topk(backend, wide)):
            assert found == list(range(case.lengths[b]))


@every_backend("vq_topk", cases=tables)
def test_strides_and_codes_behind_lens_change_no_list(backend: Backend, case: Table) -> None:
    stored = tensors.to_device(case.stored.contiguous())
    for b, end in enumerate(case.lengths):
        stored[b, :, end:] = torch.iinfo(stored.dtype).max
    got = case.topk(
        backend, stored=stored, lut=case.lut.contiguous(), lens=torch.tensor(case.lengths, dtype=torch.int64)
    )
    if backend.name.startswith("cpu-") or case.kind == "integers" or case.table == "int8":
        assert all(map(torch.equal, got, case.topk(backend)))
    else:
        check_list(case, *got)


# Attention -----------------------------------------------------------------------------------------------------------


def check_attend(backend: Backend, case: Attend, got: tuple[Tensor, Tensor], what: str = "") -> None:
    out, lse = case.exact(backend.unit)
    out.assert_holds(got[0], f"out {what}")
    lse.assert_holds(got[1], f"lse {what}")


@every_backend("vq_attend", cases=attends)
def test_attention_is_within_the_bound(backend: Backend, case: Attend) -> None:
    """Over chosen keys, some of them twice, and over all; without any, 0 and -infinity."""
    got = case.run(backend)
    assert got[0].dtype == case.dtype and got[1].dtype == torch.float32
    assert all(t.is_contiguous() for t in got)
    check_attend(backend, case, got)


@of_dtypes("vq_attend")
def test_every_size_of_a_head_and_number_of_keys(backend: Backend, dtype: torch.dtype) -> None:
    """From 1 to 70, and groups of 1 to 9."""
    sizes = (1, 5, 17) if backend.slow else range(1, 70, 7) if backend.name == "simt" else range(1, 70)
    for n in sizes:
        for case in (
            Attend(9, n, 5, dtype=dtype, seed=n),
            Attend(9, 5, n, lists="group", dtype=dtype, seed=n),
            Attend(n, 8, 8, dtype=dtype, seed=n),
            Attend(n, 16, 16, group=n % 9 + 1, lists="head", cap=n, repeats=True, dtype=dtype, seed=n),
        ):
            check_attend(backend, case, case.run(backend), f"{n}")


@of_dtypes("vq_attend")
def test_attention_over_many_keys(backend: Backend, dtype: torch.dtype) -> None:
    """More than a thread takes at a time."""
    skip_large(backend)
    for case in (
        Attend(3000, 128, 128, 1, 4, 1, dtype=dtype),
        Attend(3000, 128, 128, 2, 4, 1, lists="group", cap=1500, ragged=True, dtype=dtype),
        Attend(2100, 64, 80, 1, 8, 2, lists="head", cap=1100, dtype=dtype),
        Attend(1025, 80, 64, 2, 5, 2, ragged=True, dtype=dtype, layout="transposed"),
        Attend(2500, 128, 128, 1, 1, 1, dtype=dtype, scale=2.0),
    ):
        check_attend(backend, case, case.run(backend))


@of_dtypes("vq_attend")
def test_attention_bound_sees_one_number(backend: Backend, dtype: torch.dtype) -> None:
    case = Attend(12, 17, 9, lists="group", cap=9, dtype=dtype)
    got = case.run(backend)
    at = int(case.chosen(1, 2)[3])
    for t, names in ((case.k[1, 1, at], "out|lse"), (case.v[1, 1, at], "out"), (case.q[1, 2], "out|lse")):
        before = t.clone()
        t += 0.5
        with pytest.raises(AssertionError, match=f"({names}).*out of bounds"):
            check_attend(backend, case, got)
        t.copy_(before)


@every_backend("vq_attend", cases=functools.partial(attends, lists=("group", "head")))
def test_a_list_of_all_keys_is_dense(backend: Backend, case: Attend) -> None:
    """In any order."""
    assert case.idx is not None
    g = tensors.generator(case.seed)
    everything = torch.rand((case.batch, case.num_lists, case.keys), generator=g).argsort(-1).to(case.index)
    dense = replace(case, lists=None, ragged=False)
    dense.__dict__.update(q=case.q, k=case.k, v=case.v)
    for idx, count in ((everything, None), (None, None)):
        check_attend(backend, dense, dense.run(backend, idx=idx, count=count))


@every_backend("vq_attend", cases=functools.partial(attends, lists=("group",)))
def test_a_groups_list_is_its_heads(backend: Backend, case: Attend) -> None:
    assert case.idx is not None
    count = None if case.count is None else case.count.repeat_interleave(case.group, 1)
    check_attend(backend, case, case.run(backend, idx=case.idx.repeat_interleave(case.group, 1), count=count))


@every_backend("vq_topk", "vq_attend", cases=functools.partial(attends, lists=("group",)))
def test_attention_takes_what_topk_gives(backend: Backend, case: Attend) -> None:
    """With k = S that is dense attention."""
    table = Table(2, 5, case.keys, case.heads, case.group, case.batch, ragged=True, k=case.keys, seed=case.seed)
    idx, count = table.topk(backend)
    dense = replace(case, lists=None)
    dense.__dict__.update(q=case.q, k=case.k, v=case.v, count=table.lens)
    check_attend(backend, dense, case.run(backend, idx=idx, count=count))


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """In float64: parts of the keys by their lse."""
    lses = torch.stack([lse.double() for _, lse in parts])
    lse = lses.logsumexp(0)
    weights = torch.where(lses == -torch.inf, 0.0, (lses - lse).exp())
    return (weights[..., None] * torch.stack([out.double() for out, _ in parts])).sum(0), lse


@every_backend("vq_attend", cases=functools.partial(attends, lists=("group", "head")))
def test_parts_join_by_their_lse(backend: Backend, case: Attend) -> None:
    """However they are grouped, to what attention over all of them gives."""
    assert case.idx is not None
    cuts = sorted(torch.randint(0, case.entries + 1, (2,), generator=tensors.generator(case.seed)).tolist())
    ends = torch.full((case.batch, case.num_lists), case.entries) if case.count is None else case.count.long()
    parts, bounds = [], []
    for begin, end in zip([0, *cuts], [*cuts, case.entries], strict=True):
        one = replace(case, ragged=True)
        one.__dict__.update(
            q=case.q, k=case.k, v=case.v, idx=case.idx[..., begin:end], count=(ends - begin).clamp(0, end - begin)
        )
        parts.append(one.run(backend))
        bounds.append(one.exact(backend.unit))
    together, (first, second) = merged(parts), (merged(parts[:2]), merged(parts[1:]))
    for other in (merged([first, parts[2]]), merged([parts[0], second])):
        for a, b in zip(together, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    out, lse = case.exact(backend.unit)
    # A part's out is rounded, and its weight is off by as much as its lse; there are no more than three.
    size = (
        case.v.double().abs().amax((2,)) if case.keys else torch.zeros(case.batch, case.heads, case.value_dim)
    ).double()
    size = size.repeat_interleave(case.group, 1)
    rounding = torch.finfo(case.dtype).eps * size + 2**-14 * (case.dtype == torch.float16) * 2**-10
    of_lse = sum(torch.where(b[1].value.isfinite(), b[1].error, 0.0).expm1() for b in bounds) + 3 * 2**-24 * (
        torch.where(lse.value.isfinite(), lse.value.abs(), 0.0) + 8
    )
    of_out = sum(b[0].error for b in bounds) + rounding + 2 * of_lse[..., None] * size
    near = (together[0] - out.value).abs() <= of_out + out.error
    assert bool((near | (out.peak == torch.inf)).all())
    Bounded(lse.value, lse.error + of_lse, lse.peak, lse.unit).assert_holds(together[1].float())


@every_backend("vq_attend", cases=functools.partial(attends, kinds=("normal", "integers", "special")))
def test_keys_that_are_not_chosen_are_not_read(backend: Backend, case: Attend) -> None:
    """Nor what a list has from count on, which may be out of range."""
    assume(case.layout != "expanded")
    k, v, idx = tensors.to_device((case.k, case.v, case.idx))
    for b in range(case.batch):
        for head in range(case.heads):
            own = range(head * case.group, (head + 1) * case.group)
            used = torch.cat([case.chosen(b, h) for h in own])
            never = ~torch.isin(torch.arange(case.keys), used)
            k[b, head, never], v[b, head, never] = torch.nan, torch.inf
    if idx is not None and case.count is not None:
        idx[torch.arange(case.entries) >= case.count[..., None]] = torch.iinfo(idx.dtype).min
    got = case.run(backend, k=k, v=v, idx=idx)
    assert all(map(same_numbers, got, case.run(backend)))


@every_backend("vq_attend", cases=attends)
def test_strides_of_caches_change_no_bit(backend: Backend, case: Attend) -> None:
    """On a CPU; nor do the types of indices, or count where it says all."""
    plain = {name: getattr(case, name).contiguous() for name in ("q", "k", "v")}
    if case.idx is not None:
        plain["idx"] = case.idx.contiguous().to(torch.int32 if case.index == torch.int64 else torch.int64)
    if case.count is None:
        plain["count"] = torch.full((case.batch, case.num_lists)[: 1 if case.lists is None else 2], case.entries)
    got = case.run(backend, **plain)
    if backend.name.startswith("cpu-"):
        assert all(map(same_bits, got, case.run(backend)))
    check_attend(backend, case, got)


@every_backend("vq_attend", cases=functools.partial(attends, kinds=("normal",)))
def test_a_query_is_alone(backend: Backend, case: Attend) -> None:
    """One that isn't a number spoils itself alone, and entirely, if it has keys."""
    assume(case.batch > 0)
    b, h = case.seed % case.batch, case.seed % (case.heads * case.group)
    q = tensors.to_device(case.q)
    q[b, h, case.seed % case.dim] = torch.nan
    clean, spoiled = case.run(backend), case.run(backend, q=q)
    others = torch.ones(case.q.shape[:2], dtype=torch.bool)
    others[b, h] = False
    for a, c in zip(spoiled, clean, strict=True):
        assert same_numbers(a[others], c[others])
        assert bool(a[b, h].isnan().all()) if len(case.chosen(b, h)) else same_bits(a[b, h], c[b, h])


@pytest.mark.parametrize("keys", [4, 40])
@on_backends("vq_attend")
def test_scores_that_are_no_numbers(backend: Backend, keys: int) -> None:
    """-infinity has no weight, whatever its value is a part of; NaN and infinity make all NaN."""
    q, v = torch.ones(1, 1, 1), torch.arange(keys).float().reshape(1, 1, keys, 1)
    for special, place in ((-math.inf, 0), (-math.inf, keys - 1), (math.inf, 1), (math.nan, 0), (math.nan, keys - 1)):
        k = torch.zeros(1, 1, keys, 1)
        k[0, 0, place] = special
        out, lse = backend.run("vq_attend", q, k, v, scale=1.0)
        if special == -math.inf:
            case = Attend(keys, 1, 1, 1, 1, 1, lists="group", cap=keys - 1, scale=1.0)
            others = [s for s in range(keys) if s != place]
            case.__dict__.update(q=q, k=k, v=v, idx=torch.tensor(others).reshape(1, 1, keys - 1))
            check_attend(backend, case, (out, lse))
        else:
            assert bool(out.isnan().all()) and bool(lse.isnan().all()), (special, place)
    out, lse = backend.run("vq_attend", q, torch.full((1, 1, keys, 1), -math.inf), v, scale=1.0)
    assert out.item() == 0 and lse.item() == -math.inf


@on_backends("vq_attend")
def test_large_scores_do_not_overflow(backend: Backend) -> None:
    """One key has all the weight, others a little more or less."""
    for scale in (1e3, 1e30, -1e30):
        case = Attend(40, 8, 8, scale=scale, kind="integers")
        check_attend(backend, case, case.run(backend))


# Rotation ------------------------------------------------------------------------------------------------------------


@every_backend("vq_wrope", cases=functools.partial(wropes, kinds=ALL_KINDS))
def test_rotation_is_within_the_bound(backend: Backend, case: Wrope) -> None:
    out = case.run(backend)
    assert out.dtype == case.dtype and out.shape == case.q.shape and out.is_contiguous()
    case.exact(backend.unit).assert_holds(out)


@every_backend("vq_wrope", cases=functools.partial(wropes, kinds=("normal",)))
def test_rotation_preserves_norms(backend: Backend, case: Wrope) -> None:
    """Up to what cos^2 + sin^2 differs from 1, and the rounding of results."""
    out = case.run(backend).double().square().sum(-1)
    before = case.q.double().square().sum(-1)
    of_factors = torch.finfo(torch.float32 if not case.own_type else case.dtype).eps
    assert bool(((out - before).abs() <= 4 * (of_factors + torch.finfo(case.dtype).eps) * before + 1e-6).all())


@every_backend("vq_wrope", cases=functools.partial(wropes, kinds=("normal", "integers")))
def test_rotation_by_nothing_changes_no_number(backend: Backend, case: Wrope) -> None:
    one, none = torch.ones(case.half), torch.zeros(case.half)
    assert same_numbers(case.run(backend, cos=one, sin=none), case.q.contiguous())
    quarter = case.run(backend, cos=none, sin=one)  # (a, b) -> (-b, a)
    a, b = case.q.chunk(2, -1)
    assert same_numbers(quarter, torch.cat([-b, a], -1))


@every_backend("vq_wrope", cases=functools.partial(wropes, kinds=("normal",)))
def test_rotating_a_query_is_rope_at_one_distance(backend: Backend, case: Wrope) -> None:
    """RoPE of both at p and p - b gives the score of the query rotated by b with the key as it is."""
    case = replace(case, dtype=torch.float32, own_type=False)
    k = tensors.values(tuple(case.q.shape), torch.float32, "normal", case.seed + 9)
    base = torch.rand(case.half, generator=tensors.generator(case.seed + 2)).double()

    def rotated(t: Tensor, angle: Tensor) -> Tensor:
        return backend.run("vq_wrope", t, angle.cos().float(), angle.sin().float()).double()

    both = (rotated(case.q, 7 * base) * rotated(k, 7 * base - case.angles)).sum(-1)
    one = (rotated(case.q, case.angles) * k.double()).sum(-1)
    size = case.q.double().norm(dim=-1) * k.double().norm(dim=-1)
    # Each of three rotations has factors and results rounded: a few units of each number's size.
    assert bool(((both - one).abs() <= 32 * 2**-23 * size + 1e-30).all())


# Determinism ---------------------------------------------------------------------------------------------------------


@every_backend("vq_encode", "vq_lut", cases=books)
def test_codebooks_give_the_same_bits_twice(backend: Backend, case: Book) -> None:
    assert same_bits(case.encode(backend), case.encode(backend)) and same_bits(case.lut(backend), case.lut(backend))


@every_backend("vq_score", "vq_topk", cases=tables)
def test_tables_give_the_same_bits_twice(backend: Backend, case: Table) -> None:
    assert same_bits(case.run(backend), case.run(backend))
    assert all(map(same_bits, case.topk(backend), case.topk(backend)))


@every_backend("vq_attend", cases=attends)
def test_attention_gives_the_same_bits_twice(backend: Backend, case: Attend) -> None:
    assert all(map(same_bits, case.run(backend), case.run(backend)))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@of_dtypes("vq_encode", "vq_lut", "vq_score", "vq_topk", "vq_attend", "vq_wrope")
def test_threads_change_no_bit(backend: Backend, dtype: torch.dtype, threads) -> None:
    if not backend.name.startswith("cpu-"):
        pytest.skip("has no CPU threads")
    book = Book(4, 300, 8, keys=700, with_metric=True, dtype=dtype)
    scored = [Table(16, 16, 6000, group=4, packed=True, table=table) for table in TABLES]
    attended = [
        Attend(2600, 64, 64, dtype=dtype),
        Attend(2600, 64, 64, lists="group", cap=1500, ragged=True, dtype=dtype),
        Attend(300, 64, 64, lists="head", cap=200, dtype=dtype),
    ]
    results = []
    for n in (1, 2, 3):
        threads(n)
        got = [book.encode(backend), book.lut(backend), Wrope(32, (700,), dtype).run(backend)]
        got += [t.run(backend) for t in scored] + [x for t in scored for x in t.topk(backend)]
        results.append([*got, *(x for a in attended for x in a.run(backend))])
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


# Untrusted numbers ---------------------------------------------------------------------------------------------------


def check_refused(op: str, argument: str, run) -> None:
    with pytest.raises(RuntimeError, match=rf"effk::{op}: ({argument})(?!\w)"):
        run()


@every_backend("vq_score", "vq_topk", cases=hostile_lens)
def test_any_lens(backend: Backend, case: tuple[Table, Tensor]) -> None:
    """A CPU raises; a GPU clamps them."""
    table, lens = case
    clamped = lens.long().clamp(0, table.keys)
    if backend.raises_on_corrupt and not torch.equal(lens.long(), clamped):
        check_refused("vq_score", "lens", lambda: table.run(backend, lens=lens))
        check_refused("vq_topk", "lens", lambda: table.topk(backend, lens=lens))
        return
    taken = replace(table)
    taken.__dict__.update(lut=table.lut, codes=table.codes, lens=clamped)
    scores = table.run(backend, lens=lens)
    if table.table == "int8":
        assert same_numbers(scores, taken.exact8())
    else:
        taken.exact(backend.unit).assert_holds(scores)
    check_exact_topk(taken, *table.topk(backend, lens=lens))


@every_backend("vq_score", "vq_topk", cases=hostile_codes)
def test_any_codes(backend: Backend, case: tuple[Table, Tensor]) -> None:
    """A CPU raises; a GPU stays in bounds, and other keys have their scores."""
    table, stored = case
    codes = reference.unpack(stored, table.packed)
    past = torch.arange(table.keys) >= torch.tensor(table.lengths, dtype=torch.int64)[:, None]
    wrong = (((codes < 0) | (codes >= table.words)).any(-1) & ~past[:, None]).repeat_interleave(table.group, 1)
    if backend.raises_on_corrupt and bool(wrong.any()):
        check_refused("vq_score", "codes", lambda: table.run(backend, stored=stored))
        try:  # which needn't look at keys that it takes anyway
            check_list(table, *table.topk(backend, stored=stored))
        except RuntimeError as error:
            assert re.search(r"effk::vq_topk: codes holds", str(error))
        return
    scores, lists = table.run(backend, stored=stored), table.topk(backend, stored=stored)
    taken = replace(table)
    taken.__dict__.update(lut=table.lut, codes=codes.clamp(0, table.words - 1), lens=table.lens)
    if table.table == "int8":
        assert same_numbers(scores[~wrong], taken.exact8()[~wrong])
    else:
        part_of(taken.exact(backend.unit), ~wrong).assert_holds(scores[~wrong])
    check_list(table, *lists)
    if not bool(wrong.any()):
        check_exact_topk(taken, *lists)


@on_backends("vq_topk")
def test_topk_refuses_codes_that_it_must_compare(backend: Backend) -> None:
    if not backend.raises_on_corrupt:
        pytest.skip("stays in bounds, and says nothing")
    for table in TABLES:
        for words, packed in ((5, True), (5, False), (200, False), (300, False)):
            case = Table(2, words, 40, packed=packed, table=table)
            for place in (3, 20, 34):
                codes = case.codes.clone()
                codes[1, 1, place, 1] = words
                check_refused(
                    "vq_topk",
                    f"codes holds {words};",
                    lambda codes=codes, case=case: case.topk(backend, stored=case.store(codes)),
                )


@every_backend("vq_attend", cases=hostile_lists)
def test_any_lists(backend: Backend, case: tuple[Attend, Tensor | None, Tensor]) -> None:
    """A CPU raises; a GPU clamps count and leaves out keys that aren't there."""
    attend, idx, count = case
    clamped = count.long().clamp(0, attend.entries)
    wrong = [] if torch.equal(count.long(), clamped) else ["count"]
    if idx is not None:
        there = torch.arange(attend.entries) < clamped[..., None]
        out = there & ((idx < 0) | (idx >= attend.keys))
        wrong += ["idx"] if bool(out.any()) else []
    if backend.raises_on_corrupt and wrong:
        check_refused("vq_attend", "|".join(wrong), lambda: attend.run(backend, idx=idx, count=count))
        return
    got = attend.run(backend, idx=idx, count=count)
    taken = replace(attend)
    taken.__dict__.update(q=attend.q, k=attend.k, v=attend.v, idx=idx, count=clamped)
    whole = taken.chosen
    object.__setattr__(taken, "chosen", lambda b, h: (s := whole(b, h))[(s >= 0) & (s < attend.keys)])
    check_attend(backend, taken, got)


@pytest.mark.parametrize("index", INDICES, ids=str)
@on_backends("vq_score", "vq_topk", "vq_attend")
def test_every_number_out_of_range_is_seen(backend: Backend, index: torch.dtype) -> None:
    """By CPUs, with its name; it's the last of its tensor."""
    if not backend.raises_on_corrupt:
        pytest.skip("stays in bounds, and says nothing")
    table = Table(2, 5, 9, ragged=True, index=index)
    attend = Attend(9, 4, lists="head", cap=5, ragged=True, index=index)
    assert table.lens is not None and attend.idx is not None and attend.count is not None
    attend.count.fill_(5)
    for number in (-1, 10, 2**31 - 1, -(2**31), *(WIDE if index == torch.int64 else ())):

        def last(t: Tensor, number: int = number) -> Tensor:
            t = t.clone()
            t.view(-1)[-1] = number
            return t

        lens, idx, count = last(table.lens), last(attend.idx), last(attend.count)
        said = f"holds {number}; wanted"
        check_refused("vq_score", f"lens {said}", lambda lens=lens: table.run(backend, lens=lens))
        check_refused("vq_topk", f"lens {said}", lambda lens=lens: table.topk(backend, lens=lens))
        check_refused("vq_attend", f"idx {said}", lambda idx=idx: attend.run(backend, idx=idx))
        check_refused("vq_attend", f"count {said}", lambda count=count: attend.run(backend, count=count))
