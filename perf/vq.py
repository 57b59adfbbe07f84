"""vq: problems, peers and goals.

Keys and queries are drawn with a falling spectrum, as real ones have: scores of codes mean something then, and each
problem that ranks keys reports the recall of the true best ones beside its times. It is that of these keys and of small
codebooks trained in passing; it says which configurations may be compared, not what a model would get.

Exact results are compared to the bit (8-bit tables, codes) or within the bound of their sums; a list of chosen keys has
to hold each key whose score is surely among the best, and none whose score surely isn't.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import effk  # noqa: F401
import torch
import torch.nn.functional as F
from effk.vq import reference
from torch import Tensor

from .harness.check import difference, inequality, rounding
from .harness.problem import BANDWIDTH, Call, Goal, Peer, Problem, Work, not_installed, only
from .harness.scenarios import Service

SEED = 0
TYPE = torch.bfloat16  # of queries, keys and values
EPS = rounding(torch.float32)
CODES = {"16x4": (16, 16), "32x4": (32, 16), "8x8": (8, 256), "1x12": (1, 4096)}  # subspaces, words
SINK, WINDOW = 8, 64
TRAINED = 4096  # keys a codebook is made from
PEER_ROUNDINGS = 8  # of a peer that rounds scores, weights and sums to its type on the way
FAISS_RECALL = (
    0.5  # least share of effk's recall that makes a FAISS result count as right: keys found by chance have 0.01
)


# --- Keys and queries -------------------------------------------------------------------------------------------------


@dataclass
class Cache:
    """One layer's keys, values and query, and the metric of other queries."""

    q: Tensor  # [B, H, D]
    keys: Tensor  # [B, HK, S, D]
    values: Tensor
    chol: Tensor
    inv: Tensor


@functools.lru_cache(maxsize=2)
def cache(batch: int, heads: int, key_heads: int, dim: int, keys: int, device: torch.device) -> Cache:
    random = torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    spectrum = torch.arange(1, dim + 1, device=device) ** -0.5
    basis = torch.linalg.qr(normal(key_heads, dim, dim)).Q * (spectrum / spectrum.square().mean().sqrt())[:, None]
    chol, inv = torch.ops.effk.vq_metric(normal(key_heads, 2048, dim) @ basis)  # first: whatever the batch
    k = torch.empty(batch, key_heads, keys, dim, dtype=TYPE, device=device)
    for of_batch in k:
        of_batch.copy_(normal(key_heads, keys, dim) @ basis)
    q = (normal(batch, key_heads, heads // key_heads, dim) @ basis).flatten(1, 2).to(TYPE)
    v = torch.empty_like(k).normal_(generator=random)
    return Cache(q, k, v, chol, inv)


def cache_of(size: Mapping[str, Any], device: torch.device) -> Cache:
    return cache(size["batch"], size["H"], size["HK"], size["D"], size["S"], device)


@functools.lru_cache(maxsize=8)
def codebook_of(of: str, heads: int, key_heads: int, dim: int, keys: int, device: torch.device) -> Tensor:
    """Trained, or of very many words some of the keys: k-means++ takes its time."""
    subspaces, words = CODES[of]
    full = cache(1, heads, key_heads, dim, keys, device)
    if words > 256:
        return (full.keys[0, :, :: max(1, keys // words)][:, :words].float() @ full.chol)[:, None].contiguous()
    sample = full.keys[0, :, :: max(1, keys // TRAINED)]
    return torch.ops.effk.vq_train(sample, words, full.chol, num_subspaces=subspaces, iters=5)


def codebook(size: Mapping[str, Any], device: torch.device) -> Tensor:
    return codebook_of(size["codes"], size["H"], size["HK"], size["D"], size["S"], device)


@functools.lru_cache(maxsize=8)
def codes_of(of: str, heads: int, key_heads: int, dim: int, keys: int, device: torch.device) -> Tensor:
    """Of one sequence, packed where they can be."""
    words = codebook_of(of, heads, key_heads, dim, keys, device)
    one = cache(1, heads, key_heads, dim, keys, device)
    return torch.ops.effk.vq_encode(one.keys, words, one.chol, pack=words.shape[2] <= 16)


@dataclass
class Coded:
    """A query's tables and the keys' codes, of `keys` for the first of the batch."""

    cache: Cache
    codebook: Tensor
    lut: Tensor
    codes: Tensor

    def __deepcopy__(self, memo: Any) -> Coded:
        """Of what the ops read."""
        return Coded(self.cache, self.codebook, self.lut.clone(), self.codes.clone())

    @property
    def group(self) -> int:
        return self.lut.shape[1] // self.codes.shape[1]

    def unpacked(self) -> Tensor:
        """[B, HK, S, m] int64"""
        return reference.unpack(self.codes, self.codes.shape[3] != self.lut.shape[2])

    def scores(self) -> Tensor:
        """[B, H, S] in float64."""
        return gathering(self)(self.lut.double())

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the 8-bit table, in float64, which is exact: [B, H, S]; and its step and base, [B, H, 1]."""
        entries, step, base = reference.quantized(self.lut)
        return gathering(self)(entries.double()), step, base

    def bound(self) -> Tensor:
        """[B, H, 1]: of a float32 sum of the table's entries in any order."""
        return self.lut.shape[2] * EPS * self.lut.double().abs().amax(-1).sum(-1, keepdim=True)

    def recall(self, scores: Tensor, k: int) -> float:
        """Of the first of the batch: the share of each head's k best keys that the scores' k best are."""
        if k > scores.shape[-1]:
            return 1.0
        found = scores[0].topk(k).indices
        true = (self.cache.q[0].float().unflatten(0, (-1, self.group)) @ self.cache.keys[0].float().mT).flatten(0, 1)
        best = torch.zeros_like(true, dtype=torch.bool).scatter_(1, true.topk(k).indices, True)
        return float(best.gather(1, found).float().mean())


def coded(size: Mapping[str, Any], device: torch.device) -> Coded:
    """Of a batch, the codes of one sequence turned round: what they are makes no difference to the time."""
    words = codebook(size, device)
    one = cache_of({**size, "batch": 1}, device)
    codes = codes_of(size["codes"], size["H"], size["HK"], size["D"], size["S"], device)
    codes = torch.cat([codes.roll(997 * b, 2) for b in range(size["batch"])])
    lut = torch.ops.effk.vq_lut(one.q, words, one.inv)
    lut = torch.cat([lut.roll(b, 1) if b else lut for b in range(size["batch"])]).contiguous()
    return Coded(one, words, lut, codes)


# --- Scores and choices -----------------------------------------------------------------------------------------------


def make_score(problem: Problem, device: torch.device) -> Work:
    size = problem.size
    of, table = coded(size, device), size["table"]
    exact, k = of.scores(), best_of(size)
    expected = None
    if table == "int8":
        sums, step, base = of.sums()
        expected = step * sums.float() + base

    def check(result: Tensor | Found, own: bool) -> str:
        if isinstance(result, Found):
            return result.difference(of, exact)
        if own and expected is not None:
            return inequality(("the scores",), (result,), (expected,))
        return difference(result, exact, of.bound().expand_as(exact))

    return Work(
        inputs=of,
        arguments=lambda of: ((of.lut, of.codes), {"table": table}),
        check=check,
        bytes=of.codes.nbytes + of.lut.nbytes + 4 * exact.numel(),
        flops=float(exact.numel() * of.lut.shape[2]),
        dtype=torch.float32,
        quality={f"recall@{k}": of.recall(exact if expected is None else expected, k)},
    )


def best_of(size: Mapping[str, Any]) -> int:
    """3% of the keys, if not said otherwise."""
    return size.get("k", round(0.03 * size["S"]))


def chosen(idx: Tensor, count: Tensor | None, key_heads: int, keys: int) -> tuple[Tensor, str]:
    """[B, HK, S]: the keys that are on a list of the group; and what is wrong with the lists."""
    batch, lists, cap = idx.shape
    count = torch.full((batch, lists), cap, device=idx.device) if count is None else count
    used = torch.arange(cap, device=idx.device) < count[..., None]
    if bool((used & ((idx < 0) | (idx >= keys))).any()):
        return torch.empty(0), "an entry is out of range"
    on = torch.zeros(batch, lists, keys + 1, dtype=torch.bool, device=idx.device)
    on.scatter_(2, torch.where(used, idx.long(), keys), True)
    on = on[..., :keys]
    if not torch.equal(on.sum(-1), count.long()):
        return on, "a key is on a list twice"
    return on.unflatten(1, (key_heads, -1)).any(2), ""


def choice_difference(on: Tensor, scores: Tensor, slack: Tensor | float, k: int, both_ends: bool = True) -> str:
    """ "" where the keys are the first, the last, and the k best between them of each head, as far as scores tell.

    Args:
        on: [B, HK, S].
        scores: [B, H, S].
        slack: what a score may be off by.
        both_ends: False where the first and the last ones aren't included.
    """
    keys = scores.shape[-1]
    between = torch.zeros(keys, dtype=torch.bool, device=on.device)
    between[SINK : max(SINK, keys - WINDOW)] = True
    least = scores.masked_fill(~between, -math.inf).topk(min(k, int(between.sum())), -1).values[..., -1:]
    groups = on.shape[1]
    must = (between & (scores > least + slack)).unflatten(1, (groups, -1)).any(2)
    may = (between & (scores >= least - slack)).unflatten(1, (groups, -1)).any(2)
    if both_ends:
        must, may = must | ~between, may | ~between
    missed, extra = int((must & ~on).sum()), int((on & ~may).sum())
    return f"{missed} of the best keys are missed, {extra} others are taken" if missed or extra else ""


def make_topk(problem: Problem, device: torch.device) -> Work:
    size = problem.size
    of, table, k = coded(size, device), size["table"], best_of(size)
    exact, key_heads = of.scores(), of.codes.shape[1]
    ranks, slack = exact, of.bound()
    if table == "int8":
        ranks, slack = of.sums()[0], torch.zeros_like(slack)

    def check(result: Any, own: bool) -> str:
        if isinstance(result, Found):
            return result.difference(of, exact)
        idx, count = result
        on, wrong = chosen(idx, count, key_heads, exact.shape[2])
        if wrong:
            return wrong
        if count is None:
            return choice_difference(on, exact, of.bound(), k, both_ends=False)
        return choice_difference(on, ranks, slack, k)

    cap = min(size["S"], SINK + WINDOW + k * of.group)
    return Work(
        inputs=of,
        arguments=lambda of: ((of.lut, of.codes, k), {"sink": SINK, "window": WINDOW, "table": table}),
        check=check,
        bytes=of.codes.nbytes + of.lut.nbytes + 8 * size["batch"] * key_heads * cap,
        flops=float(exact.numel() * of.lut.shape[2]),
        dtype=torch.float32,
        quality={f"recall@{k}": of.recall(ranks, k)},
    )


def gathering(of: Coded) -> Callable[[Tensor], Tensor]:
    """Scores of a table. Codes are int64 already, as gather wants them; heads of a group share them."""
    groups = of.codes.shape[1]
    codes = [c.contiguous()[:, :, None].expand(-1, -1, of.group, -1) for c in of.unpacked().unbind(3)]

    def scores(lut: Tensor) -> Tensor:
        lut = lut.unflatten(1, (groups, -1))
        out = lut[:, :, :, 0].gather(-1, codes[0])
        for j in range(1, len(codes)):
            out += lut[:, :, :, j].gather(-1, codes[j])
        return out.flatten(1, 2)

    return scores


def gathered(of: Coded) -> Call:
    scores = gathering(of)
    return lambda: scores(of.lut)


def bagged(of: Coded) -> Call:
    """All heads of a group in one row of the table."""
    groups, (batch, _, subspaces, words) = of.codes.shape[1], of.lut.shape
    first = torch.arange(batch * groups * subspaces, device=of.lut.device).view(batch, groups, 1, subspaces) * words
    codes = (of.unpacked() + first).flatten(0, 2)

    def call() -> Tensor:
        rows = of.lut.unflatten(1, (groups, -1)).permute(0, 1, 3, 4, 2).reshape(-1, of.group)
        return F.embedding_bag(codes, rows, mode="sum")

    return call


def of_bags(heads: int, batch: int) -> Callable[[Tensor], Tensor]:
    def view(result: Tensor) -> Tensor:
        return result.unflatten(0, (batch, -1)).unflatten(1, (heads // result.shape[1], -1)).mT.flatten(1, 2)

    return view


def gathered_topk(k: int) -> Callable[[Coded], Call]:
    def make(of: Coded) -> Call:
        scores = gathering(of)
        # As little as is right: the keys between the first and the last.
        return lambda: (scores(of.lut)[..., SINK:-WINDOW].topk(k).indices, None)

    return make


def with_offset(result: tuple[Tensor, None]) -> tuple[Tensor, None]:
    return result[0] + SINK, None


@dataclass
class Found:
    """What FAISS found: of each query head its best keys, with codebooks of its own."""

    idx: Tensor  # [H, k]

    def difference(self, of: Coded, scores: Tensor) -> str:
        k = self.idx.shape[1]
        marks = torch.zeros_like(scores[:1]).scatter_(2, self.idx[None], 1.0)
        own, theirs = of.recall(scores, k), of.recall(marks, k)
        return "" if theirs >= FAISS_RECALL * own else f"recall@{k} is {theirs:.3f}, of the same codes here {own:.3f}"


def faiss(k: int) -> Callable[[Coded], Call]:
    def make(of: Coded) -> Call:
        import faiss

        keys = (of.cache.keys[0].float() @ of.cache.chol).numpy()
        queries = (of.cache.q[0].float().unflatten(0, (-1, of.group)) @ of.cache.inv).numpy()
        indices = []
        for x in keys:
            index = faiss.IndexPQFastScan(x.shape[1], of.lut.shape[2], 4, faiss.METRIC_INNER_PRODUCT)
            index.train(x[:: max(1, len(x) // TRAINED)])
            index.add(x)
            indices.append(index)
        threads = max(1, min(torch.get_num_threads(), len(indices)))
        # Its own threads gain nothing on few queries. Said in the pool's threads: it would hold for torch in this one.
        pool = ThreadPoolExecutor(threads, initializer=lambda: faiss.omp_set_num_threads(1))

        def search(part: range) -> list[Any]:
            return [indices[i].search(queries[i], k)[1] for i in part]

        def call() -> list[list[Any]]:
            return list(pool.map(search, (range(len(indices))[t::threads] for t in range(threads))))

        return call

    return make


def of_faiss(parts: list[list[Any]]) -> Found:
    heads = [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]
    return Found(torch.cat([torch.from_numpy(h) for h in heads]))


def no_faiss(work: Work) -> str:
    fits = work.inputs.lut.shape[3] == 16 and len(work.inputs.lut) == 1
    return not_installed("faiss") or ("" if fits else "has 4-bit codes; measured with a batch of 1")


def with_lut(k: int, table: str) -> Callable[[Coded], Call]:
    def make(of: Coded) -> Call:
        ops, q, inv = torch.ops.effk, of.cache.q, of.cache.inv
        return lambda: ops.vq_topk(ops.vq_lut(q, of.codebook, inv), of.codes, k, sink=SINK, window=WINDOW, table=table)

    return make


FAISS_NOTE = (
    "FAISS IndexPQFastScan with 4-bit codes, inner product, an index of the same keys for each key head, heads shared "
    "out to as many threads as torch's. It makes tables within the time, keeps the k best keys (100 beside vq_score) "
    "and writes no scores"
)


def faiss_peer(k: int) -> Peer:
    return Peer("faiss", faiss(k), FAISS_NOTE, no_faiss, view=of_faiss, own_threads=True)


def score_peers(heads: int, batch: int) -> Mapping[str, Sequence[Peer]]:
    gather = Peer(
        "torch-gather", gathered, "gathers of float32 tables, summed; codes turned into int64 indices beforehand"
    )
    bags = Peer(
        "embedding_bag",
        bagged,
        "F.embedding_bag with the heads of a group in one row; indices made beforehand",
        only(lambda of: of.lut.shape[2] > 1, "a sum of one subspace is a gather"),
        view=of_bags(heads, batch),
    )
    return {"cpu": (gather, bags, faiss_peer(100)), "cuda": (gather, bags)}


def topk_peers(k: int, table: str) -> Mapping[str, Sequence[Peer]]:
    note = "torch-gather and torch.topk of each head; no union over the group, no first and last keys"
    best = Peer("torch-topk", gathered_topk(k), note, view=with_offset)
    whole = Peer(
        "effk-with-lut",
        with_lut(k, table),
        "effk itself, vq_lut and vq_topk: with tables made, as FAISS does",
        only(lambda of: len(of.lut) == 1, "measured with a batch of 1"),
    )
    return {"cpu": (best, faiss_peer(k), whole), "cuda": (best, whole)}


# --- Attention --------------------------------------------------------------------------------------------------------


@dataclass
class Attention:
    cache: Cache
    idx: Tensor | None = None


@dataclass
class Exact:
    """Attention of some keys in float64, of some heads [HK, G]."""

    out: Tensor
    magnitude: Tensor  # of the weighted values
    lse: Tensor
    scores: Tensor  # bound of a score's float32 sum


def exactly(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one key head: out, the magnitude of its terms, lse, and the bound of a score. q [G, D], k and v [n, D]."""
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[1] ** -0.5
    scores = scale * q @ k.T
    weights = scores.softmax(-1)
    off = (q.shape[1] + 4) * EPS * scale * (q.abs() @ k.abs().T).amax(-1, keepdim=True)
    return weights @ v, weights @ v.abs(), scores.logsumexp(-1), off


def attention_difference(
    of: Cache, out: Tensor, lse: Tensor | None, idx: Tensor | None, count: Tensor | None, roundings: int
) -> str:
    """ "" where they are the attention to the keys on the lists, or to all."""
    batch, key_heads = of.keys.shape[:2]
    group = of.q.shape[1] // key_heads
    if out.shape != (*of.q.shape[:2], of.values.shape[3]):
        return f"shape {list(out.shape)}"
    lists = 0 if idx is None else idx.shape[1] // key_heads  # of a key head
    for b in range(batch):
        for h in range(key_heads):
            for part in range(max(1, lists)):
                each = group // max(1, lists)
                first = h * group + part * each
                at: slice | Tensor = slice(None)
                if idx is not None:
                    at = idx[b, h * lists + part, : None if count is None else count[b, h * lists + part]].long()
                heads = slice(first, first + each)
                expected, magnitude, norm, off = exactly(of.q[b, heads], of.keys[b, h, at], of.values[b, h, at])
                # Each weight is off by twice what a score may be, by its own rounding, and by that of the sums.
                sums = 2 * off + (of.keys[b, h, at].shape[0] + 8) * EPS
                bound = roundings * rounding(TYPE) * (expected.abs() + magnitude) + sums * magnitude
                if found := difference(out[b, heads], expected, bound):
                    return f"heads {first} to {first + each - 1} of {b}: {found}"
                if lse is not None and (
                    found := difference(lse[b, heads], norm, (off + sums)[:, 0] + EPS * norm.abs())
                ):
                    return f"lse of heads {first} to {first + each - 1} of {b}: {found}"
    return ""


def make_attend(problem: Problem, device: torch.device) -> Work:
    size, of = problem.size, cache_of(problem.size, device)
    batch, key_heads, keys, dim = of.keys.shape
    idx = None
    if size["keys"] == "random":
        random = torch.Generator(device).manual_seed(SEED)
        draws = torch.rand(batch, key_heads, keys, generator=random, device=device)
        idx = draws.topk(best_of(size)).indices.sort().values
    used = keys if idx is None else idx.shape[2]

    def check(result: Any, own: bool) -> str:
        out, lse = result if own else (result, None)
        return attention_difference(of, out, lse, idx, None, 2 if own else PEER_ROUNDINGS)

    return Work(
        inputs=Attention(of, idx),
        arguments=lambda of: ((of.cache.q, of.cache.keys, of.cache.values, of.idx), {}),
        check=check,
        bytes=2 * 2 * batch * key_heads * used * dim + (0 if idx is None else idx.nbytes) + 2 * 2 * of.q.numel(),
        flops=4.0 * of.q.numel() * used,
        dtype=TYPE,
    )


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A group's heads as the queries of one: each key is read once."""
    return F.scaled_dot_product_attention(q.unflatten(1, (k.shape[1], -1)), k, v).flatten(1, 2)


def enable_gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def sdpa(form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Attention | Step], Call]:
    def make(of: Attention | Step) -> Call:
        q, k, v = of.cache.q, of.cache.keys, of.cache.values
        if of.idx is None:
            return lambda: form(q, k, v)
        idx = of.idx

        def call() -> Tensor:
            rows = idx[..., None].expand(-1, -1, -1, k.shape[3])
            return form(q, k.gather(2, rows), v.gather(2, rows))

        return call

    return make


SDPA_FOLDED = Peer(
    "sdpa-folded",
    sdpa(folded),
    "F.scaled_dot_product_attention with a group's heads as queries of one head; chosen keys are gathered",
)
SDPA_GQA = Peer("sdpa-gqa", sdpa(enable_gqa), "F.scaled_dot_product_attention(enable_gqa=True)")

# --- A decode step: tables, choice, attention to the chosen keys ------------------------------------------------------


@dataclass
class Step:
    cache: Cache
    coded: Coded
    idx: None = None  # of sdpa: all keys


def make_step(problem: Problem, device: torch.device) -> Work:
    """vq_attend after vq_lut and vq_topk, whose times count; dense attention is another result."""
    size, k = problem.size, best_of(problem.size)
    of = Step(cache_of(size, device), coded(size, device))
    batch, key_heads, keys, dim = of.cache.keys.shape
    if batch > 1:  # tables of the queries that are here
        of.coded.lut = torch.ops.effk.vq_lut(of.cache.q, of.coded.codebook, of.cache.inv)
    exact = of.coded.scores()
    _, step, _ = reference.quantized(of.coded.lut)
    slack = 2 * dim * EPS * of.coded.lut.double().abs().amax(-1).sum(-1, keepdim=True)
    if size["table"] == "int8":
        slack = slack + of.coded.lut.shape[2] * step.double()

    def check(result: Any, own: bool) -> str:
        if isinstance(result, Tensor):
            return attention_difference(of.cache, result, None, None, None, PEER_ROUNDINGS)
        out, lse, idx, count = result
        on, wrong = chosen(idx, count, key_heads, keys)
        return (
            wrong
            or choice_difference(on, exact, slack, k)
            or attention_difference(of.cache, out, lse, idx, count, 2 if own else PEER_ROUNDINGS)
        )

    def steps(op: Callable[[str], Callable[..., Any]], of: Step) -> Call:
        lut, topk, attend = (op(name) for name in ("vq_lut", "vq_topk", "vq_attend"))
        cache, codebook, codes = of.cache, of.coded.codebook, of.coded.codes

        def call() -> tuple[Tensor, ...]:
            table = lut(cache.q, codebook, cache.inv)
            idx, count = topk(table, codes, k, sink=SINK, window=WINDOW, table=size["table"])
            return *attend(cache.q, cache.keys, cache.values, idx, count), idx, count

        return call

    chosen_keys = int(torch.ops.effk.vq_topk(of.coded.lut, of.coded.codes, k, sink=SINK, window=WINDOW)[1].sum())
    return Work(
        inputs=of,
        arguments=lambda of: ((of.cache.q, of.cache.keys, of.cache.values), {}),
        check=check,
        bytes=of.coded.codes.nbytes + of.coded.codebook.nbytes + 2 * 2 * chosen_keys * dim + 2 * 2 * of.cache.q.numel(),
        flops=4.0 * dim * chosen_keys * of.coded.group,
        dtype=TYPE,
        steps=steps,
        quality={f"recall@{k}": of.coded.recall(exact, k), "keys read": chosen_keys / (batch * key_heads * keys)},
    )


def torch_step(k: int) -> Callable[[Step], Call]:
    def make(of: Step) -> Call:
        cache, coded = of.cache, of.coded
        batch, heads, _ = cache.q.shape
        keys = cache.keys.shape[2]
        device = cache.q.device
        ends = torch.cat([torch.arange(SINK, device=device), torch.arange(keys - WINDOW, keys, device=device)])
        ends = ends.expand(batch, heads, -1)
        # Rows of every query head's own keys, from its key head.
        first = (torch.arange(heads, device=device) // coded.group)[None, :, None] * keys
        first = first + torch.arange(batch, device=device)[:, None, None] * keys * cache.keys.shape[1]
        rows, values = cache.keys.flatten(0, 2), cache.values.flatten(0, 2)
        scores = gathering(coded)

        def call() -> tuple[Any, ...]:
            lut = torch_lut(cache.q, coded.codebook, cache.inv)
            idx = scores(lut)[..., SINK:-WINDOW].topk(k).indices + SINK
            idx = torch.cat([idx, ends], -1)
            at = (first + idx).flatten()
            k_, v_ = (t[at].unflatten(0, (batch, heads, -1)) for t in (rows, values))
            out = F.scaled_dot_product_attention(cache.q[:, :, None], k_, v_)[:, :, 0]
            return out, None, idx, None

        return call

    return make


# --- The other ops ----------------------------------------------------------------------------------------------------


def torch_lut(q: Tensor, codebook: Tensor, inv: Tensor) -> Tensor:
    x = (q.to(inv.dtype).unflatten(1, (len(codebook), -1)) @ inv).unflatten(-1, (codebook.shape[1], -1))
    return (x.transpose(2, 3) @ codebook.mT).transpose(2, 3).flatten(1, 2)


def make_lut(problem: Problem, device: torch.device) -> Work:
    size = problem.size
    of, words = cache_of(size, device), codebook(size, device)
    expected = torch_lut(of.q, words.double(), of.inv.double())
    bound = 2 * size["D"] * EPS * torch_lut(of.q.abs(), words.double().abs(), of.inv.double().abs())
    return Work(
        inputs=(of.q, words, of.inv),
        arguments=lambda inputs: (inputs, {}),
        check=lambda result, own: difference(result, expected, bound),
        bytes=words.nbytes + of.inv.nbytes + of.q.nbytes + 4 * expected.numel(),
        flops=2.0 * of.q.numel() * (size["D"] + words.shape[2]),
        dtype=torch.float32,
    )


def make_encode(problem: Problem, device: torch.device) -> Work:
    size = problem.size
    of, words = cache_of(size, device), codebook(size, device)
    _, subspaces, count, part = words.shape
    pack = count <= 16
    x = reference.split((of.keys[0].double() @ of.chol.double()).float(), subspaces)

    def distances(codes: Tensor) -> Tensor:
        """Of the keys' sub-vectors, [HK, m, S], to these words."""
        at = codes[0].transpose(1, 2)[..., None].expand(-1, -1, -1, part)
        return (x - words.gather(2, at)).double().square().sum(-1)

    least = distances(reference.nearest(x, words).transpose(1, 2)[None])
    # What is compared, |c|^2 - 2 k.c, has terms larger than what is left of them.
    length = (of.keys[0].double().abs() @ of.chol.double().abs()).unflatten(-1, (subspaces, -1)).transpose(1, 2)
    bound = 8 * (size["D"] + 4) * EPS * (length + words.double().abs().amax(2)[:, :, None]).square().sum(-1)

    def check(result: Tensor, own: bool) -> str:
        return difference(distances(reference.unpack(result, pack and own)).clamp(min=least), least, bound)

    codes = of.keys[..., 0].numel() * (subspaces // 2 if pack else subspaces * (1 if count <= 256 else 2))
    return Work(
        inputs=(of.keys, words, of.chol),
        arguments=lambda inputs: (inputs, {"pack": pack}),
        check=check,
        bytes=of.keys.nbytes + words.nbytes + of.chol.nbytes + codes,
        flops=2.0 * of.keys.numel() * (size["D"] + count),
        dtype=torch.float32,
    )


def torch_encode(inputs: tuple[Tensor, Tensor, Tensor]) -> Call:
    keys, words, chol = inputs
    heads, subspaces, count, _ = words.shape
    step = max(1, (1 << 23) // (heads * subspaces * count))
    flat = words.flatten(0, 1)

    def call() -> Tensor:
        norms = flat.square().sum(-1)[:, None]
        x = reference.split(keys[0].float() @ chol, subspaces).flatten(0, 1)
        codes = [torch.baddbmm(norms, rows, flat.mT, alpha=-2).argmin(-1) for rows in x.split(step, 1)]
        return torch.cat(codes, 1).unflatten(0, (heads, subspaces)).transpose(1, 2)[None]

    return call


def make_wrope(problem: Problem, device: torch.device) -> Work:
    size, random = problem.size, torch.Generator(device).manual_seed(SEED)
    q = torch.randn(size["batch"], size["H"], size["D"], generator=random, device=device).to(TYPE)
    angle = 2048 / 10000 ** (torch.arange(size["D"] // 2, device=device) * 2 / size["D"])
    cos, sin = angle.cos(), angle.sin()
    expected = torch.cat(halves(q.double(), cos.double(), sin.double()), -1)
    first, second = q.double().abs().chunk(2, -1)
    cosine, sine = cos.double().abs(), sin.double().abs()
    magnitude = torch.cat((first * cosine + second * sine, second * cosine + first * sine), -1)

    def check(result: Tensor, own: bool) -> str:
        roundings = 1 if own else PEER_ROUNDINGS
        return difference(result, expected, roundings * rounding(TYPE) * expected.abs() + 4 * EPS * magnitude)

    return Work(
        inputs=(q, cos, sin),
        arguments=lambda inputs: (inputs, {}),
        check=check,
        bytes=2 * q.nbytes,
        flops=3.0 * q.numel(),
        dtype=torch.float32,
    )


def halves(q: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    a, b = q.chunk(2, -1)
    return a * cos - b * sin, b * cos + a * sin


def torch_wrope(inputs: tuple[Tensor, Tensor, Tensor]) -> Call:
    q, cos, sin = inputs
    return lambda: torch.cat(halves(q.float(), cos, sin), -1).to(q.dtype)


def queries(size: Mapping[str, Any], device: torch.device) -> Tensor:
    random = torch.Generator(device).manual_seed(SEED)
    return torch.randn(size["HK"], size["n"], size["D"], generator=random, device=device)


def make_metric(problem: Problem, device: torch.device) -> Work:
    size, q = problem.size, queries(problem.size, device)
    gram = q.double().mT @ q.double()
    eye = torch.eye(size["D"], dtype=torch.float64, device=device)
    metric = gram / gram.square().mean((1, 2), keepdim=True).sqrt() + 1e-6 * eye

    def check(result: tuple[Tensor, Tensor], own: bool) -> str:
        chol, inv = (t.double() for t in result)
        bound = 4 * EPS * chol.abs() @ chol.abs().mT  # its entries are rounded once, and to where that leads
        if found := difference(chol @ chol.mT, metric, bound):
            return f"chol: {found}"
        found = difference(chol.mT @ inv, eye.expand_as(chol), 4 * EPS * chol.mT.abs() @ inv.abs())
        return f"inv: {found}" if found else ""

    return Work(
        inputs=q,
        arguments=lambda q: ((q,), {}),
        check=check,
        bytes=q.nbytes + 8 * gram.numel(),
        flops=2.0 * q.numel() * size["D"],
        dtype=torch.float32,
        graph=False,
    )


def make_train(problem: Problem, device: torch.device) -> Work:
    size, keys = problem.size, queries(problem.size, device)
    subspaces, words = CODES[size["codes"]]
    options = {"num_subspaces": subspaces, "iters": size["iters"]}
    x = reference.split(keys, subspaces)

    def objective(codebook: Tensor) -> float:
        codes = reference.nearest(x, codebook)[..., None].expand(-1, -1, -1, x.shape[3])
        return float((x - codebook.gather(2, codes)).double().square().sum())

    seeds = objective(reference.vq_train(keys, words, num_subspaces=subspaces, iters=0))

    def check(result: Tensor, own: bool) -> str:
        shape = (size["HK"], subspaces, words, size["D"] // subspaces)
        if result.shape != shape:
            return f"shape {list(result.shape)}; wanted {list(shape)}"
        return "" if objective(result) <= seeds else "farther from the keys than its seeds"

    return Work(
        inputs=keys,
        arguments=lambda keys: ((keys, words), options),
        check=check,
        bytes=keys.nbytes + 4 * size["HK"] * words * size["D"],
        flops=2.0 * keys.numel() * words * (size["iters"] + 1),
        dtype=torch.float32,
        graph=False,
    )


# --- The list ---------------------------------------------------------------------------------------------------------

FULL = {"H": 32, "HK": 8, "D": 128, "batch": 1, "S": 32768}
LONG = {**FULL, "S": 131072}
SHORT = {**FULL, "S": 4096}
LARGE = {**LONG, "batch": 8}  # of a GPU
SMALL = {"H": 8, "HK": 2, "D": 64, "batch": 1, "S": 2048}
BOTH = ("cpu", "cuda")


def problem(
    op: str,
    size: Mapping[str, Any],
    make: Callable[[Problem, torch.device], Work],
    peers: Mapping[str, Sequence[Peer]] | Sequence[Peer] = (),
    quick: bool = False,
    devices: Sequence[str] = BOTH,
) -> Problem:
    by_device = peers if isinstance(peers, Mapping) else dict.fromkeys(BOTH, peers)
    return Problem(op, size, make, by_device, dict.fromkeys(BOTH, (BANDWIDTH,)), quick, devices)


def scoring(
    of: Mapping[str, Any], codes: str, table: str, quick: bool = False, devices: Sequence[str] = BOTH
) -> Problem:
    size = {**of, "codes": codes, "table": table}
    return problem("vq_score", size, make_score, score_peers(of["H"], of["batch"]), quick, devices)


def choosing(
    of: Mapping[str, Any], codes: str, table: str, k: int = 0, quick: bool = False, devices: Sequence[str] = BOTH
) -> Problem:
    size = {**of, "codes": codes, "table": table, "k": k or best_of(of)}
    return problem("vq_topk", size, make_topk, topk_peers(size["k"], table), quick, devices)


def attending(of: Mapping[str, Any], keys: str, quick: bool = False, devices: Sequence[str] = BOTH) -> Problem:
    peers = (SDPA_FOLDED, SDPA_GQA) if keys == "all" else (SDPA_FOLDED,)
    return problem("vq_attend", {**of, "keys": keys}, make_attend, peers, quick, devices)


def stepping(
    of: Mapping[str, Any], codes: str, table: str, quick: bool = False, devices: Sequence[str] = BOTH
) -> Problem:
    size = {**of, "keys": "chosen", "codes": codes, "table": table, "k": best_of(of)}
    whole = Peer("torch-step", torch_step(size["k"]), TORCH_STEP)
    return problem("vq_attend", size, make_step, (SDPA_FOLDED, whole), quick, devices)


TORCH_STEP = (
    "a whole decode step by torch: products with codebooks, gathers, topk, and F.scaled_dot_product_attention of each "
    "query head's own keys, gathered. sdpa-folded beside it attends to all keys"
)
LUT = Peer("torch-matmul", lambda inputs: lambda: torch_lut(*inputs), "two batched matmul in float32")
ENCODE = Peer("torch-argmin", torch_encode, "product with chol, |c|^2 - 2 k.c by baddbmm in chunks, argmin; not packed")
WROPE = Peer("torch-eager", torch_wrope, "in float32: halves, products, sums, cat, conversion")


def others(of: Mapping[str, Any], keys: int, train: int, quick: bool = False) -> list[Problem]:
    """Tables of all kinds of codes, encoding of some keys (a prompt's part), and what makes codebooks."""
    part, training = {**of, "S": keys}, {"HK": of["HK"], "D": of["D"], "n": train}
    return [
        *(
            problem("vq_lut", {**of, "codes": codes}, make_lut, (LUT,), quick)
            for codes in ("16x4", "8x8", "1x12")[: 1 if quick else 3]
        ),
        *(
            problem("vq_encode", {**part, "codes": codes}, make_encode, (ENCODE,), quick)
            for codes in ("16x4", "8x8", "1x12")[: 2 if quick else 3]
        ),
        problem("vq_wrope", {"H": of["H"], "D": of["D"], "batch": 64}, make_wrope, (WROPE,), quick),
        problem("vq_metric", training, make_metric, (), quick),
        problem("vq_train", {**training, "codes": "16x4", "iters": 5}, make_train, (), quick),
    ]


PROBLEMS = [
    *(
        scoring(FULL, codes, table)
        for codes, table in (
            ("16x4", "int8"),
            ("32x4", "int8"),
            ("8x8", "int8"),
            ("16x4", "float32"),
            ("8x8", "float32"),
            ("1x12", "float32"),
        )
    ),
    scoring(SHORT, "16x4", "int8"),
    *(scoring(LONG, codes, "int8", devices=("cpu",)) for codes in ("16x4", "32x4")),
    *(scoring(LARGE, codes, table, devices=("cuda",)) for codes, table in (("16x4", "int8"), ("1x12", "float32"))),
    *(choosing(FULL, codes, table) for codes, table in (("16x4", "int8"), ("16x4", "float32"), ("1x12", "float32"))),
    *(choosing(of, "16x4", "int8", 100, devices=("cpu",)) for of in (SHORT, FULL)),
    *(choosing(LONG, codes, "int8", 100, devices=("cpu",)) for codes in ("16x4", "32x4")),
    *(choosing(LARGE, codes, table, devices=("cuda",)) for codes, table in (("16x4", "int8"), ("1x12", "float32"))),
    *(attending(FULL, keys) for keys in ("all", "random")),
    *(attending(of, "all", devices=("cpu",)) for of in (SHORT, LONG)),
    *(attending(LARGE, keys, devices=("cuda",)) for keys in ("all", "random")),
    *(stepping(FULL, codes, table) for codes, table in (("16x4", "int8"), ("1x12", "float32"))),
    *(stepping(of, "16x4", "int8", devices=("cpu",)) for of in (SHORT, LONG)),
    stepping(LARGE, "16x4", "int8", devices=("cuda",)),
    *others(FULL, 4096, 4096),
    # For a look, not for a claim.
    *(scoring(SMALL, codes, table, quick=True) for codes, table in (("16x4", "int8"), ("8x8", "float32"))),
    choosing(SMALL, "16x4", "int8", quick=True),
    *(attending(SMALL, keys, quick=True) for keys in ("all", "random")),
    stepping(SMALL, "16x4", "int8", quick=True),
    *others(SMALL, 512, 1024, quick=True),
]

SERVED_BY = ("sdpa-folded", "torch-step")
SERVICES = [
    Service(
        "decode step, 3% of 32768 keys",
        lambda n: stepping({**FULL, "batch": n}, "16x4", "int8"),
        "step",
        {"cpu": 50e-3, "cuda": 5e-3},
        SERVED_BY,
        largest=8,  # each sequence has keys and values of its own, 128 MiB
    ),
    Service(
        "decode step, 3% of 2048 keys",
        lambda n: stepping({**SMALL, "batch": n}, "16x4", "int8", quick=True),
        "step",
        {"cpu": 5e-3, "cuda": 1e-3},
        SERVED_BY,
        largest=8,
        quick=True,
    ),
]

GOALS = [
    *(Goal("vq_score", "cpu", "faiss", 1.5, {**LONG, "codes": codes, "table": "int8"}) for codes in ("16x4", "32x4")),
    Goal("vq_score", "cpu", "torch-gather", 2.5, {**FULL, "codes": "1x12"}),
    Goal("vq_topk", "cpu", "torch-topk", 8.0, FULL),
    Goal("vq_attend", "cpu", "sdpa-folded", 2.0, {**FULL, "keys": "all"}),
    Goal("vq_attend", "cpu", "sdpa-folded", 5.0, {**FULL, "keys": "chosen"}),
    Goal("vq_topk", "cuda", "bandwidth", 0.6, LARGE),
    Goal("vq_attend", "cuda", "sdpa-folded", 5.0, {**LARGE, "keys": "chosen"}),
]
