"""Shapes that take vq's kernels through what small ones don't reach, in several orders of threads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ..kit import tensors
from ..kit.backends import Backend
from ..vq.strategies import FLOATS, Attend, Book, Table
from . import missing, moe, seeded

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SIMT = Backend("simt")


def assert_nearest(case: Book, codes: Tensor) -> None:
    """No word is nearer than the one that was taken, but for rounding."""
    if case.pack:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    for b in range(case.batch):
        for head in range(case.heads):
            for j, exact in enumerate(case.distances(b, head, SIMT.unit)):
                taken = codes[b, head, :, j, None].long()
                least = (exact.value - exact.error).gather(-1, taken)[:, 0]
                assert (least <= (exact.value + exact.error).amin(-1)).all()


# Tiles of 64 and of 16 keys, cut ones; sub-vectors that share a step of words and words of many steps; rows that aren't
# whole quads.
BOOKS = {
    "packed": Book(16, 16, 4, keys=67, batch=1, heads=1, pack=True, with_metric=True, dtype=torch.bfloat16),
    "one": Book(1, 140, 136, keys=5, batch=1, heads=1, with_metric=True, dtype=torch.float16),
    "wide": Book(2, 5, 160, keys=19, batch=1, heads=1, with_metric=True),
    "ragged": Book(3, 40, 37, keys=65, batch=1, heads=2),
    "thin": Book(33, 17, 1, keys=3, batch=2, heads=1, with_metric=True),
}


@pytest.mark.parametrize("book", BOOKS)
def test_tiles_of_keys(book: str) -> None:
    case = BOOKS[book]
    assert_nearest(case, case.encode(SIMT))
    case.exact_lut(SIMT.unit).assert_holds(case.lut(SIMT))


# A block has 2048 keys or more. Loads of two keys at once, of pieces of a key, of single codes; ranks of 12, 13, 16 and
# 32 bits.
TABLES = {
    "pairs": Table(16, 16, 4100, packed=True, heads=1, group=2, batch=1, table="int8"),
    "pairs of bytes": Table(8, 100, 2050, heads=1, group=5, batch=1, table="int8"),
    "pieces": Table(32, 9, 301, packed=True, heads=1, group=3, batch=1, table="int8"),
    "many": Table(256, 5, 70, heads=1, group=1, batch=1, table="int8"),
    "words": Table(3, 1000, 2100, heads=1, group=1, batch=1, table="int8"),
    "floats": Table(16, 16, 2100, packed=True, heads=1, group=2, batch=1, kind="integers"),
    "float words": Table(1, 4000, 2100, heads=1, group=1, batch=1, kind="integers"),
    "marked": Table(4, 16, 700, packed=True, heads=1, group=3, batch=1, kind="marked"),
    "large": Table(70, 257, 40, heads=1, group=2, batch=1, kind="integers"),
}


@pytest.mark.parametrize("table", TABLES)
def test_chunks_of_keys(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores, and lists of a few and of most of the keys, whether blocks have many keys or few."""
    case = replace(TABLES[table], ragged=True, index=torch.int32)
    for num_sms in (1, 132):
        monkeypatch.setattr(moe, "NUM_SMS", (num_sms,) * 3)
        with seeded(num_sms):
            scores = case.run(SIMT)
            if case.table == "int8":
                assert tensors.same_bits(scores, case.exact8())
            else:
                case.exact(SIMT.unit).assert_holds(scores)
            assert_listed(replace(case, k=40 if num_sms == 1 else case.keys - 30))


def assert_listed(case: Table) -> None:
    idx, count = case.topk(SIMT)
    for b in range(case.batch):
        for i, heads in enumerate(case.heads_of_lists()):
            wanted = case.listed(b, [case.choice(b, h) for h in heads])
            assert count[b, i] == len(wanted)
            assert idx[b, i].tolist() == wanted + [-1] * (case.cap - len(wanted))


def test_more_words_of_a_list_than_threads() -> None:
    assert_listed(Table(1, 3, 17000, heads=1, group=1, batch=1, k=5000, table="int8"))


def test_hostile_codes_and_lengths() -> None:
    """Codes of no word stand for some word or for 0, and lengths for the nearest that can be."""
    for case in (Table(4, 3, 40, packed=True), Table(3, 100, 40), Table(2, 300, 40)):
        codes = torch.randint(-(2**15), 2**15, case.stored.shape, generator=tensors.generator(1))
        codes = codes.to(case.stored.dtype)
        for table in ("float32", "int8"):
            assert case.run(SIMT, stored=codes, table=table).shape == (2, 4, 40)
            idx, count = case.topk(SIMT, stored=codes, table=table)
            assert (count == (idx >= 0).sum(-1)).all() and (idx < 40).all()
        for index in (torch.int32, torch.int64):
            lens = torch.tensor([torch.iinfo(index).min, torch.iinfo(index).max], dtype=index)
            clean = torch.tensor([0, 40])
            assert tensors.same_bits(case.run(SIMT, lens=lens), case.run(SIMT, lens=clean))
            for got, wanted in zip(case.topk(SIMT, lens=lens), case.topk(SIMT, lens=clean), strict=True):
                assert torch.equal(got, wanted)


# Lists that are split, keys of several pieces for a lane, values of several slices, queries of several tiles, and keys
# whose rows can't be loaded in pieces.
ATTENDS = {
    "split": Attend(700, 16, 16, batch=1, heads=1, group=4),
    "chosen": Attend(400, 64, 64, batch=1, heads=1, group=8, lists="group", cap=390, repeats=True),
    "wide": Attend(40, 300, 270, batch=1, heads=1, group=2),
    "many queries": Attend(30, 128, 128, batch=1, heads=1, group=11, lists="group", cap=20),
    "ragged": Attend(70, 33, 21, heads=2, group=3, lists="head", cap=60),
}


@pytest.mark.parametrize("attend", ATTENDS)
def test_splits_and_tiles_of_attention(attend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for num_sms, dtype in zip((1, 132, 64), FLOATS, strict=True):
        case = replace(ATTENDS[attend], dtype=dtype, ragged=True)
        monkeypatch.setattr(moe, "NUM_SMS", (num_sms,) * 3)
        with seeded(num_sms):
            for got, wanted in zip(case.run(SIMT), case.exact(SIMT.unit), strict=True):
                wanted.assert_holds(got)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_hostile_lists_are_passed_over(index: torch.dtype) -> None:
    """An entry of no key is none, and a count stands for the nearest that can be."""
    info = torch.iinfo(index)
    case = Attend(20, 16, 8, batch=1, heads=2, lists="group", cap=9, index=index)
    assert case.idx is not None
    idx, hostile = case.idx.clone(), case.idx.clone()
    hostile[0, 0, [0, 3, 8]] = torch.tensor([info.min, -1, info.max], dtype=index)
    hostile[0, 1, 4] = 20
    got = case.run(SIMT, idx=hostile)
    for i in range(2):
        left = idx[:, i : i + 1][:, :, (hostile[0, i] >= 0) & (hostile[0, i] < 20)]
        own = slice(2 * i, 2 * i + 2)
        wanted = case.run(SIMT, q=case.q[:, own], k=case.k[:, i : i + 1], v=case.v[:, i : i + 1], idx=left)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a[:, own], b)
    for count, clean in ((info.min, 0), (-1, 0), (10, 9), (info.max, 9)):
        counts = [torch.full((1, 2), n, dtype=index) for n in (count, clean)]
        for a, b in zip(*(case.run(SIMT, count=n) for n in counts), strict=True):
            assert tensors.same_bits(a, b)
