"""Codebook: what it finds, keeps and refuses; and decode_attention, the ops in a row."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from effk import vq
from effk.vq import Codebook, reference
from effk.vq.codebook import balancing
from torch import Tensor

from ..kit import tensors
from ..kit.tensors import same_bits

HEADS, DIM, GROUP = 2, 16, 3


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensors.values(shape, dtype, "normal", seed)


def skewed(*shape: int, seed: int = 0) -> Tensor:
    """Numbers whose last dimension has a spectrum that falls, as keys' and queries' do."""
    turn = torch.linalg.qr(normal(shape[-1], shape[-1], seed=7)).Q
    return normal(*shape, seed=seed) * 0.7 ** torch.arange(shape[-1]) @ turn


def fitted(**options: Any) -> Codebook:
    keys = skewed(HEADS, 400, DIM)
    return Codebook.fit(keys, **{"num_codes": 16, "num_subspaces": 4, "iters": 5, "progress": False, **options})


@pytest.fixture(scope="module")
def book() -> Codebook:
    return fitted(queries=normal(HEADS, 300, DIM, seed=1))


# --- Training --------------------------------------------------------------------------------------------------------


def test_sizes(book: Codebook) -> None:
    assert (book.heads, book.head_dim, book.num_subspaces, book.num_codes, book.bits) == (HEADS, DIM, 4, 16, 16)
    assert book.packed and book.encode(normal(1, HEADS, 5, DIM)).shape == (1, HEADS, 5, 2)
    wide = Codebook(HEADS, DIM)
    assert wide.bits == 12 and not wide.packed and wide.encode(normal(1, HEADS, 5, DIM)).dtype == torch.int16
    assert "num_codes=16, num_subspaces=4, transformed=True, bits=16" in repr(book)


def test_words_encode_to_themselves(book: Codebook) -> None:
    """As keys that are stood for exactly, they also come back."""
    plain = fitted(balance=False)
    codes = torch.arange(16).expand(1, HEADS, 4, 16).transpose(2, 3)  # [1, HEADS, 16, 4]
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
    found = plain.decode(packed)
    assert same_bits(found[0, :, :, :4], plain.words[:, 0])
    distinct = plain.words.flatten(0, 1).unique(dim=1).shape[1] == 16
    assert not distinct or torch.equal(plain.encode(found), packed)
    # Through L and back, a key is had to rounding.
    again = book.decode(book.encode(book.decode(packed)))
    assert torch.allclose(again, book.decode(packed), rtol=1e-3, atol=1e-3)


def test_query_aware_words_serve_queries_better() -> None:
    """At equal bits: the mean error of q k^T is lower, and not the keys' own."""
    keys, queries = normal(HEADS, 2000, DIM), 3 * skewed(HEADS, 2000, DIM, seed=1)
    errors = []
    for given in (queries, None):
        book = Codebook.fit(keys, given, num_codes=64, num_subspaces=2, iters=10, progress=False)
        wrong = keys[None] - book.decode(book.encode(keys[None]))
        errors.append((queries[None] @ wrong.mT).square().mean().item())
    assert errors[0] < 0.8 * errors[1]


def test_balanced_parts() -> None:
    """Rotations, after which the parts vary alike; and words that fit better."""
    keys = skewed(HEADS, 2000, DIM)
    chol, _ = vq.metric(normal(HEADS, 300, DIM, seed=1))
    for given in (None, chol):
        turn = balancing(keys, given, 4)
        assert torch.allclose(turn @ turn.mT, torch.eye(DIM).expand(HEADS, -1, -1), atol=1e-5)
        x = keys if given is None else keys @ given
        logs = (x @ turn).unflatten(-1, (4, -1)).var(1).log().sum(-1)
        # No more apart than the one that a largest variance can make.
        assert (logs.amax(1) - logs.amin(1) < (x @ turn).var(1).log().amax(1) - (x @ turn).var(1).log().amin(1)).all()
    error = [
        (keys[None] - book.decode(book.encode(keys[None]))).square().mean()
        for book in (
            Codebook.fit(keys, num_codes=16, num_subspaces=4, balance=b, progress=False) for b in (True, False)
        )
    ]
    assert error[0] < error[1]
    book = Codebook.fit(keys, normal(HEADS, 300, DIM, seed=1), num_codes=4, num_subspaces=2, progress=False)
    assert book.chol is not None and book.inv is not None
    assert torch.allclose(book.chol @ book.inv.mT, torch.eye(DIM).expand(HEADS, -1, -1), atol=1e-3)


def test_same_seed_same_words() -> None:
    one, two, other = fitted(), fitted(), fitted(seed=1)
    assert same_bits(one.words, two.words) and not torch.equal(one.words, other.words)
    few = fitted(samples=40)
    assert same_bits(few.words, fitted(samples=40).words) and not torch.equal(few.words, one.words)


def test_heads_have_codebooks_of_their_own() -> None:
    keys = skewed(HEADS, 400, DIM)
    options = {"num_codes": 8, "iters": 3, "progress": False}
    both, second = Codebook.fit(keys, **options), Codebook.fit(keys[1:], **options)
    assert same_bits(both.words[1:], second.words)


def test_fitting_is_logged_and_can_be_interrupted(caplog, monkeypatch) -> None:
    with caplog.at_level(logging.INFO, "effk"):
        fitted()
    assert "2 codebooks of 4 x 16 words, 16 bits a key" in caplog.text

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("effk.vq.codebook.log.debug", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fitted()


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"num_codes": 0}, ValueError, "num_codes is 0"),
        ({"num_codes": 2**15 + 1}, ValueError, "wanted 1 to 32768"),
        ({"num_codes": 500}, RuntimeError, "keys has 400"),
        ({"num_subspaces": 3}, ValueError, "a divisor of head_dim, 16"),
        ({"iters": -1}, RuntimeError, "iters is -1"),
        ({"queries": torch.zeros(1, 4, DIM)}, ValueError, "wanted .2, any, 16."),
        ({"queries": torch.full((HEADS, 4, DIM), torch.nan)}, RuntimeError, "vq_metric: q"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fitted(**options)


def test_wrong_keys() -> None:
    with pytest.raises(ValueError, match="heads is 0"):
        Codebook(0, 4)
    with pytest.raises(ValueError, match=r"wanted \[heads, n, head_dim\]"):
        Codebook.fit(normal(4, 4))


# --- Keeping it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query_aware", [False, True], ids=["plain", "query-aware"])
def test_saved_and_loaded(tmp_path: Path, query_aware: bool) -> None:
    pytest.importorskip("safetensors")
    book = fitted(queries=normal(HEADS, 300, DIM, seed=1) if query_aware else None, balance=query_aware)
    book.save(tmp_path / "book")
    again = Codebook.load(tmp_path / "book")
    keys, q = normal(1, HEADS, 50, DIM, seed=3), normal(1, HEADS * GROUP, DIM, seed=4)
    assert list(again.state_dict()) == (["words", "chol", "inv"] if query_aware else ["words"])
    assert torch.equal(again.encode(keys), book.encode(keys)) and same_bits(again.lut(q), book.lut(q))


def write(path: Path, meta: dict[str, str] | None = None, **tensors: Tensor) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, {"format": "effk.vq.codebook", "version": "1"} if meta is None else meta)


def test_damaged_files(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    words, eye = torch.zeros(HEADS, 4, 16, 4), torch.zeros(HEADS, DIM, DIM)
    path = tmp_path / "book"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"words": words, "meta": {}}, "isn't a codebook"),
        ({"words": words, "meta": {"format": "effk.vq.codebook", "version": "2"}}, "isn't a codebook"),
        ({"word": words}, "has tensors"),
        ({"words": words, "chol": eye}, "has tensors"),
        ({"words": words[0]}, r"wanted \[heads, m, C, d\]"),
        ({"words": words.half()}, "words is torch.float16"),
        ({"words": words[:, :, :0]}, "num_codes is 0"),
        ({"words": words[:, :0]}, "head_dim 0"),
        ({"words": words, "chol": eye, "inv": eye[:1].clone()}, "inv is"),
    ]
    for given, message in cases:
        write(path, **given)
        with pytest.raises(ValueError, match=message):
            Codebook.load(path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="can't be read"):
        Codebook.load(path)
    with pytest.raises(OSError):
        Codebook.load(tmp_path / "none")


def test_casts_and_copies(book: Codebook) -> None:
    other = copy.deepcopy(book).to(torch.bfloat16)
    for name, t in book.named_buffers():
        assert same_bits(getattr(other, name), t)
    empty = Codebook(HEADS, DIM, 16, 4, transformed=True)
    empty.load_state_dict(book.state_dict())
    assert same_bits(empty.words, book.words)
    assert copy.deepcopy(book).to("meta").words.is_meta


# --- decode_attention ------------------------------------------------------------------------------------------------


def problem(book: Codebook, keys: int = 90, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    q, k = normal(2, HEADS * GROUP, DIM, seed=1, dtype=dtype), skewed(2, HEADS, keys, DIM, seed=2).to(dtype)
    return q, k, normal(2, HEADS, keys, 8, seed=3, dtype=dtype), book.encode(k)


@pytest.mark.parametrize("table", reference.TABLES)
@pytest.mark.parametrize("dtype", reference.FLOATS, ids=str)
def test_decode_attention_is_its_ops(book: Codebook, dtype: torch.dtype, table: str) -> None:
    q, k, v, codes = problem(book, dtype=dtype)
    cos, sin = torch.linspace(0, 1, DIM // 2).cos(), torch.linspace(0, 1, DIM // 2).sin()
    lens = torch.tensor([90, 40])
    options = {"sink": 2, "window": 5, "union_group": False}
    have = vq.decode_attention(
        q, k, v, codes, book, 7, lens=lens, table=table, scale=0.5, rotation=(cos, sin), **options
    )
    idx, count = vq.topk(book.lut(vq.wrope(q, cos, sin)), codes, 7, lens, table=table, **options)
    assert same_bits(have, vq.attend(q, k, v, idx, count, scale=0.5)[0])
    assert (count == torch.tensor([14, 14])[:, None]).all()


def test_all_keys_are_dense_attention(book: Codebook) -> None:
    q, k, v, codes = problem(book)
    have = vq.decode_attention(q, k, v, codes, book, 90)
    assert same_bits(have, vq.attend(q, k, v, torch.arange(90).expand(2, HEADS, 90))[0])


def test_keys_that_are_words_have_recall_1(book: Codebook) -> None:
    """Scores are those of q k^T then, and the choice is the exact one."""
    codes = torch.randint(0, 256, (1, HEADS, 200, 2), generator=tensors.generator(1)).to(torch.uint8)
    k, q = book.decode(codes), normal(1, HEADS * GROUP, DIM, seed=2)
    idx, _ = vq.topk(book.lut(q), codes, 10, sink=0, window=0, union_group=False)
    exact = torch.einsum("bhgd,bhsd->bhgs", q.unflatten(1, (HEADS, GROUP)), k).flatten(1, 2)
    least = exact.gather(-1, idx).amin(-1)
    tenth = exact.topk(10).values[..., -1]
    assert torch.allclose(least, tenth, rtol=1e-4, atol=1e-4)


def test_recall_of_other_keys(book: Codebook) -> None:
    """Of 400 keys with 16 bits each, 40 hold far more of the 10 best than by chance."""
    k, q = skewed(1, HEADS, 400, DIM, seed=5), normal(1, HEADS * GROUP, DIM, seed=6)
    idx, _ = vq.topk(book.lut(q), book.encode(k), 40, sink=0, window=0, union_group=False)
    best = torch.einsum("bhgd,bhsd->bhgs", q.unflatten(1, (HEADS, GROUP)), k).flatten(1, 2).topk(10).indices
    recall = (best[..., None] == idx[..., None, :]).any(-1).double().mean().item()
    assert recall > 0.6


def test_compile(book: Codebook) -> None:
    compiled = torch.compile(vq.decode_attention, fullgraph=True, dynamic=True)
    for keys in (70, 90):
        q, k, v, codes = problem(book, keys)
        options = {"sink": 2, "window": 5, "lens": torch.tensor([keys, 40])}
        assert same_bits(
            compiled(q, k, v, codes, book, 7, **options), vq.decode_attention(q, k, v, codes, book, 7, **options)
        )
