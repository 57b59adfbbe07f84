"""vq written for reading: what every back end must compute. Letters as in ops.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import FLOATS, INDICES, check_choice, check_range, check_sides, check_tensor, within
from .._sums import sum_rows

MAX_ELEMENTS = 2**50  # of a result: a number that doesn't overflow
MAX_WORDS = 2**15
MAX_SUBSPACES = 2**16  # of a score
MAX_SUBSPACES_INT8 = 256  # so many entries of 8 bits add up to 16 bits
TABLES = ("float32", "int8")
CHUNK = 2**24  # distances at a time

# --- Checks that need no look at the contents ------------------------------------------------------------------------


def check_keys(op: str, name: str, keys: Tensor, dims: int) -> None:
    check_tensor(op, name, keys, FLOATS, (None,) * dims)
    check_sides(op, name, keys)


def check_result(op: str, name: str, *sizes: int) -> None:
    torch._check(
        within(math.prod(sizes), MAX_ELEMENTS),
        lambda: f"effk::{op}: with {name}, the result has {math.prod(sizes)} elements; wanted at most 2^50",
    )


def check_codebook(op: str, codebook: Tensor, heads: int, dim: int, like: Tensor) -> tuple[int, int]:
    """m and C."""
    check_tensor(op, "codebook", codebook, (torch.float32,), (None, None, None, None), like)
    check_sides(op, "codebook", codebook)
    subspaces, words = codebook.shape[1], codebook.shape[2]
    torch._check(
        codebook.shape[0] == heads and subspaces * codebook.shape[3] == dim and dim >= 1 and 1 <= words <= MAX_WORDS,
        lambda: (
            f"effk::{op}: codebook has shape {list(codebook.shape)}; wanted [{heads}, m, C, D / m] of D = "
            f"{dim}, C from 1 to {MAX_WORDS}"
        ),
    )
    return subspaces, words


def check_groups(op: str, name: str, queries: Tensor, heads: int) -> int:
    """The query heads (queries' second size) that share a key head."""
    torch._check(
        heads >= 1 and queries.shape[1] >= 1 and queries.shape[1] % max(1, heads) == 0,
        lambda: f"effk::{op}: {name} has {queries.shape[1]} heads; wanted a multiple of the keys' {heads}",
    )
    return queries.shape[1] // max(1, heads)


def check_square(op: str, name: str, t: Tensor | None, heads: int, dim: int, like: Tensor) -> None:
    if t is not None:
        check_tensor(op, name, t, (torch.float32,), (heads, dim, dim), like)


def check_metric(q: Tensor, eps: float) -> None:
    check_keys("vq_metric", "q", q, 3)
    torch._check(eps > 0, lambda: f"effk::vq_metric: eps is {eps}; wanted more than 0")


def check_train(keys: Tensor, num_codes: int, chol: Tensor | None, num_subspaces: int, iters: int) -> None:
    op = "vq_train"
    check_keys(op, "keys", keys, 3)
    heads, n, dim = keys.shape
    check_square(op, "chol", chol, heads, dim, keys)
    torch._check(1 <= num_codes <= MAX_WORDS, lambda: f"effk::{op}: num_codes is {num_codes}; wanted 1 to {MAX_WORDS}")
    torch._check(num_codes <= n, lambda: f"effk::{op}: keys has {n} of a head; wanted at least num_codes, {num_codes}")
    torch._check(
        1 <= num_subspaces <= dim and dim % max(1, num_subspaces) == 0,
        lambda: f"effk::{op}: num_subspaces is {num_subspaces}; wanted a divisor of keys' last size, {dim}",
    )
    torch._check(iters >= 0, lambda: f"effk::{op}: iters is {iters}; wanted 0 or more")


def check_encode(keys: Tensor, codebook: Tensor, chol: Tensor | None, pack: bool) -> tuple[int, torch.dtype]:
    """Codes of a key, or bytes of packed ones, and their type."""
    op = "vq_encode"
    check_keys(op, "keys", keys, 4)
    _, heads, _, dim = keys.shape
    subspaces, words = check_codebook(op, codebook, heads, dim, keys)
    check_square(op, "chol", chol, heads, dim, keys)
    check_result(op, "keys", *keys.shape)
    if not pack:
        return subspaces, torch.uint8 if words <= 256 else torch.int16
    torch._check(
        words <= 16 and subspaces % 2 == 0,
        lambda: (
            f"effk::{op}: pack with a codebook of {subspaces} subspaces of {words} words; wanted an even number of at "
            "most 16 words"
        ),
    )
    return subspaces // 2, torch.uint8


def check_lut(q: Tensor, codebook: Tensor, inv: Tensor | None) -> tuple[int, int, int]:
    """G, m and C."""
    op = "vq_lut"
    check_keys(op, "q", q, 3)
    subspaces, words = check_codebook(op, codebook, codebook.shape[0] if codebook.dim() > 0 else 0, q.shape[2], q)
    group = check_groups(op, "q", q, codebook.shape[0])
    check_square(op, "inv", inv, codebook.shape[0], q.shape[2], q)
    check_result(op, "q", q.shape[0], q.shape[1], subspaces, words)
    return group, subspaces, words


def check_codes(op: str, lut: Tensor, codes: Tensor, lens: Tensor | None, table: str) -> tuple[int, bool]:
    """G, and whether two codes share a byte."""
    check_tensor(op, "lut", lut, (torch.float32,), (None, None, None, None))
    check_sides(op, "lut", lut)
    batch, heads, subspaces, words = lut.shape
    torch._check(
        1 <= subspaces <= MAX_SUBSPACES and 1 <= words <= MAX_WORDS,
        lambda: (
            f"effk::{op}: lut has shape {list(lut.shape)}; wanted [B, H, m, C], 1 to {MAX_SUBSPACES} of m, 1 to "
            f"{MAX_WORDS} of C"
        ),
    )
    check_tensor(op, "codes", codes, (torch.uint8 if words <= 256 else torch.int16,), (batch, None, None, None), lut)
    check_sides(op, "codes", codes)
    packed = words <= 16 and subspaces % 2 == 0 and codes.shape[3] == subspaces // 2
    torch._check(
        packed or codes.shape[3] == subspaces,
        lambda: (
            f"effk::{op}: codes has shape {list(codes.shape)}; wanted lut's {subspaces} subspaces as the last size, or "
            "half of them where 16 words of an even number are packed"
        ),
    )
    group = check_groups(op, "lut", lut, codes.shape[1])
    if lens is not None:
        check_tensor(op, "lens", lens, INDICES, (batch,), lut)
    check_choice(op, "table", table, TABLES)
    torch._check(
        table != "int8" or subspaces <= MAX_SUBSPACES_INT8,
        lambda: f"effk::{op}: lut has {subspaces} subspaces; wanted at most {MAX_SUBSPACES_INT8} with table='int8'",
    )
    check_result(op, "codes", batch, heads, codes.shape[2])
    return group, packed


def check_score(lut: Tensor, codes: Tensor, lens: Tensor | None, table: str) -> tuple[int, bool]:
    return check_codes("vq_score", lut, codes, lens, table)


def check_topk(
    lut: Tensor,
    codes: Tensor,
    k: int,
    lens: Tensor | None,
    sink: int,
    window: int,
    union_group: bool,
    table: str,
) -> tuple[int, bool, int, int]:
    """G, whether codes are packed, and the size of the lists: how many of a batch, and their entries."""
    op = "vq_topk"
    group, packed = check_codes(op, lut, codes, lens, table)
    torch._check(k >= 0, lambda: f"effk::{op}: k is {k}; wanted 0 or more")
    torch._check(sink >= 0, lambda: f"effk::{op}: sink is {sink}; wanted 0 or more")
    torch._check(window >= 0, lambda: f"effk::{op}: window is {window}; wanted 0 or more")
    cap = torch.sym_min(codes.shape[2], sink + window + k * (group if union_group else 1))
    return group, packed, codes.shape[1] if union_group else lut.shape[1], cap


def check_attend(q: Tensor, k: Tensor, v: Tensor, idx: Tensor | None, count: Tensor | None) -> int:
    """G. For a q on a GPU, k and v may be on the CPU: in memory that the GPU sees, or so the CUDA side checks."""
    op = "vq_attend"
    check_keys(op, "q", q, 3)
    away = q.device.type == "cuda" and k.device.type == "cpu"
    check_tensor(op, "k", k, (q.dtype,), (q.shape[0], None, None, q.shape[2]), None if away else q)
    check_sides(op, "k", k)
    torch._check(
        q.shape[2] >= 1, lambda: f"effk::{op}: q has shape {list(q.shape)}; wanted at least 1 as the last size"
    )
    check_tensor(op, "v", v, (q.dtype,), (q.shape[0], k.shape[1], k.shape[2], None), k)
    check_sides(op, "v", v)
    group = check_groups(op, "q", q, k.shape[1])
    check_result(op, "v", q.shape[0], q.shape[1], v.shape[3])
    if idx is not None:
        check_tensor(op, "idx", idx, INDICES, (q.shape[0], None, None), q)
        check_sides(op, "idx", idx)
        torch._check(
            idx.shape[1] == k.shape[1] or idx.shape[1] == q.shape[1],
            lambda: (
                f"effk::{op}: idx has shape {list(idx.shape)}; wanted {k.shape[1]} or {q.shape[1]} lists, one "
                "of each key head or query head"
            ),
        )
    if count is not None:
        check_tensor(op, "count", count, INDICES, (q.shape[0],) if idx is None else tuple(idx.shape[:2]), q)
    return group


def check_wrope(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    op = "vq_wrope"
    check_tensor(op, "q", q, FLOATS)
    torch._check(
        q.dim() >= 1 and q.shape[-1] % 2 == 0,
        lambda: f"effk::{op}: q has shape {list(q.shape)}; wanted an even last size",
    )
    check_sides(op, "q", q)
    for name, t in (("cos", cos), ("sin", sin)):
        check_tensor(op, name, t, (torch.float32, q.dtype), (q.shape[-1] // 2,), q)


# --- Checks of the contents ------------------------------------------------------------------------------------------


def lengths(op: str, lens: Tensor | None, batch: int, keys: int, device: torch.device) -> Tensor:
    """[B] int64"""
    if lens is None:
        return torch.full((batch,), keys, device=device)
    check_range(op, "lens", lens, 0, keys)
    return lens.long()


def unpack(codes: Tensor, packed: bool) -> Tensor:
    """[B, HK, S, m] int64"""
    if packed:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return codes.long()


# --- Codebooks -------------------------------------------------------------------------------------------------------


def check_finite(op: str, name: str, t: Tensor) -> None:
    if t.device.type == "cpu" and not bool(t.isfinite().all()):
        raise RuntimeError(f"effk::{op}: {name} holds NaN or infinity; wanted finite numbers")


def vq_metric(q: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    check_metric(q, eps)
    heads, n, dim = q.shape
    check_finite("vq_metric", "q", q)
    gram = q.new_zeros(heads, dim, dim, dtype=torch.float64)
    rows = max(1, CHUNK // max(1, heads * dim))
    for begin in range(0, n, rows):
        part = q[:, begin : begin + rows].double()
        gram += part.mT @ part
    rms = gram.square().mean((1, 2), keepdim=True).sqrt()
    eye = torch.eye(dim, dtype=torch.float64, device=q.device)
    metric = torch.where(rms == 0, eye, gram / torch.where(rms == 0, 1.0, rms) + eps * eye)
    chol, failed = torch.linalg.cholesky_ex(metric)
    chol = torch.where((failed == 0)[:, None, None], chol, torch.nan)
    if q.device.type == "cpu" and bool(failed.any()):
        raise RuntimeError(f"effk::vq_metric: eps is {eps}, too small to invert the metric of q; wanted more")
    inv = torch.linalg.solve_triangular(chol, eye.expand_as(chol), upper=False).mT
    return chol.float().contiguous(), inv.float().contiguous()


def nearest(x: Tensor, words: Tensor) -> Tensor:
    """Of each vector the nearest word, the first of equals, by |c|^2 - 2 x.c: x [..., n, d], words [..., C, d].

    A distance that is NaN is none, and without any the word is 0.
    """
    norms = words.square().sum(-1)[..., None, :]
    step = max(1, CHUNK // max(1, math.prod(words.shape[:-1])))
    parts = [
        (norms - 2 * (part @ words.mT)).nan_to_num(torch.inf, torch.inf, -torch.inf).argmin(-1)
        for part in x.split(step, -2)
    ]
    return torch.cat(parts, -1)


def split(x: Tensor, subspaces: int) -> Tensor:
    """[HK, n, D] as [HK, m, n, D / m]."""
    return x.unflatten(-1, (subspaces, -1)).transpose(1, 2)


def transformed(keys: Tensor, chol: Tensor | None) -> Tensor:
    """k L in float32: keys [..., HK, n, D], chol [HK, D, D]."""
    return keys.float() if chol is None else keys.float() @ chol


def vq_train(
    keys: Tensor,
    num_codes: int,
    chol: Tensor | None = None,
    *,
    num_subspaces: int = 1,
    iters: int = 20,
    seed: int = 0,
) -> Tensor:
    check_train(keys, num_codes, chol, num_subspaces, iters)
    check_finite("vq_train", "keys", keys)
    x = split(transformed(keys, chol), num_subspaces)
    x = x.reshape(-1, *x.shape[2:]).contiguous()  # [HK m, n, d]
    words = seeds(x, num_codes, torch.Generator(keys.device).manual_seed(seed))
    for _ in range(iters):
        codes = nearest(x, words)
        words = torch.where((counts := count(codes, num_codes)) > 0, means(x, codes, counts), words)
    return words.reshape(keys.shape[0], num_subspaces, *words.shape[1:])


def seeds(x: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """k-means++: each word is a vector, drawn with a chance proportional to its squared distance to the nearest word.

    By a race of exponential clocks, whose rates are these chances.
    """
    far = torch.ones(x.shape[:2], device=x.device)
    norms = x.square().sum(-1)
    words: list[Tensor] = []
    for _ in range(num_codes):
        clocks = torch.empty_like(far).exponential_(generator=generator).clamp(min=1e-30)
        word = x.gather(1, (clocks / far).argmin(-1)[:, None, None].expand(-1, 1, x.shape[2]))
        distance = norms - 2 * (x @ word.mT)[..., 0] + word.square().sum(-1)
        far = distance.clamp(min=0) if not words else torch.minimum(far, distance.clamp(min=0))
        words.append(word)
    return torch.cat(words, 1)


def count(codes: Tensor, num_codes: int) -> Tensor:
    """[HK m, C, 1]: the vectors of each word."""
    ones = torch.ones_like(codes, dtype=torch.float64)
    return ones.new_zeros(codes.shape[0], num_codes).scatter_add(1, codes, ones)[..., None]


def means(x: Tensor, codes: Tensor, counts: Tensor) -> Tensor:
    """[HK m, C, d]: of the vectors of each word."""
    num_codes = counts.shape[1]
    place = codes + num_codes * torch.arange(len(codes), device=codes.device)[:, None]
    sums = sum_rows(x.flatten(0, 1).double(), place.flatten(), len(codes) * num_codes)
    return (sums.unflatten(0, (len(codes), num_codes)) / counts.clamp(min=1)).float()


# --- The ops ---------------------------------------------------------------------------------------------------------


def vq_encode(keys: Tensor, codebook: Tensor, chol: Tensor | None = None, *, pack: bool = False) -> Tensor:
    _, dtype = check_encode(keys, codebook, chol, pack)
    subspaces = codebook.shape[1]
    out = torch.empty(*keys.shape[:3], subspaces, dtype=torch.int64, device=keys.device)
    for b in range(len(keys)):
        x = split(transformed(keys[b], chol), subspaces)  # [HK, m, S, d]
        out[b] = nearest(x, codebook).transpose(1, 2)
    if pack:
        out = out[..., ::2] | out[..., 1::2] << 4
    return out.to(dtype)


def vq_lut(q: Tensor, codebook: Tensor, inv: Tensor | None = None) -> Tensor:
    group, subspaces, _ = check_lut(q, codebook, inv)
    x = q.float().unflatten(1, (-1, group))  # [B, HK, G, D]
    if inv is not None:
        x = x @ inv
    x = x.unflatten(-1, (subspaces, -1)).transpose(2, 3)  # [B, HK, m, G, d]
    return (x @ codebook.mT).transpose(2, 3).flatten(1, 2).contiguous()


def quantized(lut: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tables of 8 bits [B, H, m, C] int64, and each one's step and base [B, H, 1], in float32 arithmetic as written.

    A table with NaN or infinity, or a range that is infinite, has a step and a base of NaN.
    """
    low = lut.amin(-1, keepdim=True)
    most = lut.new_full((), 255)  # by a number, CUDA would multiply with its reciprocal instead
    step = (lut.amax(-1, keepdim=True) - low).amax(-2, keepdim=True) / most
    base = torch.zeros_like(step[..., 0])
    for j in range(lut.shape[2]):
        base = base + low[:, :, j]
    entries = torch.where(step > 0, (lut - low) / step, 0.0).round().nan_to_num(0, 0).clamp(max=255)
    finite = lut.isfinite().flatten(2).all(-1, keepdim=True) & step[..., 0].isfinite()
    step, base = (torch.where(finite, t, torch.nan) for t in (step[..., 0], base))
    return entries.long(), step, base


def sums(op: str, lut: Tensor, codes: Tensor, lens: Tensor, group: int, packed: bool) -> Tensor:
    """[B, H, S], of the entries that the codes name; codes past lens name any."""
    codes = unpack(codes, packed)
    past = torch.arange(codes.shape[2], device=codes.device) >= lens[:, None]  # [B, S]
    codes = torch.where(past[:, None, :, None], 0, codes)
    check_range(op, "codes", codes, 0, lut.shape[3] - 1)
    out = lut.new_zeros(*lut.shape[:2], codes.shape[2])
    for j in range(lut.shape[2]):
        out = out + lut[:, :, j].gather(-1, codes[..., j].repeat_interleave(group, 1))
    return out


def vq_score(lut: Tensor, codes: Tensor, lens: Tensor | None = None, *, table: str = "float32") -> Tensor:
    op = "vq_score"
    group, packed = check_score(lut, codes, lens, table)
    length = lengths(op, lens, lut.shape[0], codes.shape[2], lut.device)
    if table == "int8":
        entries, step, base = quantized(lut)
        out = step * sums(op, entries, codes, length, group, packed) + base
    else:
        out = sums(op, lut, codes, length, group, packed)
    past = torch.arange(codes.shape[2], device=lut.device) >= length[:, None]
    return torch.where(past[:, None], -torch.inf, out)


def vq_topk(
    lut: Tensor,
    codes: Tensor,
    k: int,
    lens: Tensor | None = None,
    *,
    sink: int = 8,
    window: int = 64,
    union_group: bool = True,
    table: str = "float32",
) -> tuple[Tensor, Tensor]:
    op = "vq_topk"
    group, packed, lists, cap = check_topk(lut, codes, k, lens, sink, window, union_group, table)
    batch, heads, keys = lut.shape[0], lut.shape[1], codes.shape[2]
    length = lengths(op, lens, batch, keys, lut.device)
    if table == "int8":
        # The sums of the 8-bit table, which the scores are a rounded line of; without a step all scores are equal.
        entries, step, _ = quantized(lut)
        by = torch.where(step > 0, sums(op, entries, codes, length, group, packed), 0)
    else:
        by = sums(op, lut, codes, length, group, packed)
    idx = torch.full((batch, lists, cap), -1, device=lut.device)
    count = torch.zeros(batch, lists, dtype=torch.int64, device=lut.device)
    for b, end in enumerate(length.tolist()):
        first, last = min(sink, end), max(min(sink, end), end - window)  # of those to choose from
        for i in range(lists):
            taken = torch.ones(end, dtype=torch.bool, device=lut.device)
            taken[first:last] = False
            for h in range(i * (heads // lists), (i + 1) * (heads // lists)):
                taken[first + best(by[b, h, first:last], k)] = True
            found = taken.nonzero()[:, 0]
            idx[b, i, : len(found)] = found
            count[b, i] = len(found)
    return idx, count


def best(scores: Tensor, k: int) -> Tensor:
    """Where the k largest are: the first of equals, NaN after all numbers."""
    low = scores.isnan()
    order = torch.where(low, -torch.inf, scores).argsort(descending=True, stable=True)
    order = order[low[order].argsort(stable=True)]
    return order[:k]


def vq_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor | None = None,
    count: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    op = "vq_attend"
    group = check_attend(q, k, v, idx, count)
    batch, heads, dim = q.shape
    keys = k.shape[2]
    scale = dim**-0.5 if scale is None else scale
    lists, cap = (1, keys) if idx is None else idx.shape[1:]
    if count is not None:
        check_range(op, "count", count, 0, cap)
    ends = torch.full((batch, lists), cap) if count is None else count.reshape(batch, lists)
    out = q.new_zeros(batch, heads, v.shape[3], dtype=torch.float32)
    lse = q.new_full((batch, heads), -torch.inf, dtype=torch.float32)
    for b in range(batch):
        for h in range(heads):
            at = h * lists // heads
            chosen: slice | Tensor = slice(int(ends[b, at]))
            if idx is not None:
                chosen = idx[b, at, chosen].long().to(k.device)
                check_range(op, "idx", chosen, 0, keys - 1)
            rows, values = (t[b, h // group, chosen].to(q.device).float() for t in (k, v))
            scores = scale * (rows @ q[b, h].float())
            if len(scores) == 0:
                continue
            most = scores.max()
            weights = torch.where(scores == -torch.inf, 0.0, (scores - most).exp())
            total = weights.sum()
            if total == 0:  # all scores are -infinity
                continue
            out[b, h] = weights @ values / total
            lse[b, h] = most + total.log()
    return out.to(q.dtype), lse


def vq_wrope(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    check_wrope(q, cos, sin)
    a, b = q.float().chunk(2, -1)
    cos, sin = cos.float(), sin.float()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(q.dtype)
