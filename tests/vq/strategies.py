"""Inputs of vq: subspaces and words around the sizes that tables have, keys around tile edges, ragged and empty, few
and many heads of a group, ties, any strides, and every kind of content."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from ..kit import tensors
from ..kit.backends import Backend
from ..kit.calls import Call, Invalid
from ..kit.errors import FLUSH, UNDERFLOW, Bounded, finite_magnitude, matmul, matmul_of, roundings

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INDICES = (torch.int32, torch.int64)
TABLES = ("float32", "int8")

KEYS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 200)
SUBSPACES = (1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 32)
WORDS = (1, 2, 3, 15, 16, 17, 100, 255, 256, 257, 1000)
SIZES = (1, 2, 3, 4, 7, 8, 16, 17)  # D / m
DIMS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 80, 128, 129)
GROUPS = (1, 1, 2, 3, 4, 5, 8)
SEEDS = st.integers(0, 2**20)
# Of [B, HK, S, n]: as they are; a part of longer ones; [B, S, HK, n] transposed; the same for all batches; rows within
# longer ones; a last dimension that isn't contiguous.
CACHES = ("contiguous", "longer", "transposed", "expanded", "offset", "strided")


def lay_out_cache(t: Tensor, layout: str) -> Tensor:
    """The same contents with other strides; what lies between is NaN, or -1."""
    if layout == "expanded":  # batches beyond the first hold what that holds: see `expandable`
        return t[:1].contiguous().expand_as(t)
    if layout == "longer":
        filler = math.nan if t.is_floating_point() else torch.iinfo(t.dtype).max
        wide = t.new_full((*t.shape[:2], t.shape[2] + 5, t.shape[3]), filler)
        view = wide[:, :, : t.shape[2]]
        return view.copy_(t)
    if layout == "transposed":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if t.dtype == torch.uint8:
        return tensors.lay_out(t.view(torch.int8), layout).view(torch.uint8)  # which has a -1
    return tensors.lay_out(t, layout)


def expandable(t: Tensor, layout: str) -> Tensor:
    """Contents that every layout can have."""
    return t[:1].expand_as(t) if layout == "expanded" else t


def zeros(*shape: int, unit: float) -> Bounded:
    return Bounded(*(torch.zeros(shape, dtype=torch.float64) for _ in range(3)), unit)


def put(out: Bounded, at: object, part: Bounded) -> None:
    for name in ("value", "error", "peak"):
        getattr(out, name)[at] = getattr(part, name)


def part_of(b: Bounded, at: object) -> Bounded:
    return Bounded(b.value[at], b.error[at], b.peak[at], b.unit)


# Codebooks: vq_encode, vq_lut ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Book:
    """A codebook and its metric, and a call of vq_encode and of vq_lut with it."""

    subspaces: int
    words: int
    size: int = 4  # of a word
    heads: int = 2
    group: int = 2
    batch: int = 2
    keys: int = 5
    with_metric: bool = False
    pack: bool = False
    dtype: torch.dtype = torch.float32
    kind: str = "normal"
    layout: str = "contiguous"
    seed: int = 0

    @property
    def dim(self) -> int:
        return self.subspaces * self.size

    def _made(self, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
        return tensors.values(shape, dtype, self.kind, self.seed + seed)

    @functools.cached_property
    def codebook(self) -> Tensor:
        book = self._made((self.heads, self.subspaces, self.words, self.size), torch.float32, 1)
        return tensors.lay_out(book, self.layout) if self.layout in tensors.LAYOUTS else book

    def _triangle(self, seed: int) -> Tensor | None:
        if not self.with_metric:
            return None
        return self._made((self.heads, self.dim, self.dim), torch.float32, seed).tril()

    @functools.cached_property
    def chol(self) -> Tensor | None:
        return self._triangle(2)

    @functools.cached_property
    def inv(self) -> Tensor | None:
        triangle = self._triangle(3)
        return None if triangle is None else triangle.mT  # not contiguous

    @functools.cached_property
    def k(self) -> Tensor:
        k = self._made((self.batch, self.heads, self.keys, self.dim), self.dtype, 4)
        return lay_out_cache(expandable(k, self.layout), self.layout)

    @functools.cached_property
    def q(self) -> Tensor:
        q = self._made((self.batch, self.heads * self.group, self.dim), self.dtype, 5)
        return tensors.lay_out(q, self.layout) if self.layout in tensors.LAYOUTS else q

    def encode(self, backend: Backend, **changed: object) -> Tensor:
        args = [changed.get(name, getattr(self, name)) for name in ("k", "codebook", "chol")]
        return backend.run("vq_encode", *args, pack=changed.get("pack", self.pack))

    def lut(self, backend: Backend, **changed: object) -> Tensor:
        return backend.run("vq_lut", *(changed.get(name, getattr(self, name)) for name in ("q", "codebook", "inv")))

    def _sliced(self, x: Tensor, matrix: Tensor | None, head: int, unit: float) -> list[Bounded]:
        """x m by subspaces, x [n, D]."""
        if matrix is None:
            whole = Bounded(x.double(), torch.zeros_like(x, dtype=torch.float64), finite_magnitude(x), unit)
        else:
            whole = matmul(x, matrix[head].mT, unit)
        return [part_of(whole, (..., slice(j * self.size, (j + 1) * self.size))) for j in range(self.subspaces)]

    def distances(self, b: int, head: int, unit: float) -> list[Bounded]:
        """|c|^2 - 2 x.c of each subspace, [S, C]."""
        out = []
        for j, x in enumerate(self._sliced(self.k[b, head], self.chol, head, unit)):
            words = self.codebook[head, j]
            norms = matmul(words, words, unit)
            norms = Bounded(*(getattr(norms, n).diagonal() for n in ("value", "error", "peak")), unit)
            dots = matmul_of(x, words, self.dtype)
            value, error = norms.value - 2 * dots.value, norms.error + 2 * dots.error
            # The sum of both in any order: its parts are never larger than this.
            size = norms.value + 2 * (x.value.abs() @ words.double().abs().mT)
            peak = norms.peak + 2 * dots.peak
            out.append(Bounded(value, error + roundings(self.size + 2, unit) * (size + error), peak, unit))
        return out

    def exact_lut(self, unit: float) -> Bounded:
        out = zeros(self.batch, self.heads * self.group, self.subspaces, self.words, unit=unit)
        for head in range(self.heads):
            own = slice(head * self.group, (head + 1) * self.group)
            queries = self.q[:, own].reshape(-1, self.dim)
            for j, x in enumerate(self._sliced(queries, self.inv, head, unit)):
                dots = matmul_of(x, self.codebook[head, j], self.dtype)
                for name in ("value", "error", "peak"):
                    shaped = getattr(dots, name).reshape(self.batch, self.group, self.words)
                    getattr(out, name)[:, own, j] = shaped
        return out


# Tables: vq_score, vq_topk -------------------------------------------------------------------------------------------


def quantized(lut: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tables of 8 bits [B, H, m, C] as integers, and step and base [B, H]: numpy's float32 operations, one by one."""
    with np.errstate(all="ignore"):
        t = lut.numpy()
        low, high = t.min(-1, keepdims=True), t.max(-1, keepdims=True)
        step = (high - low).max(-2, keepdims=True) / np.float32(255)
        base = np.zeros(t.shape[:2], np.float32)
        for j in range(t.shape[2]):
            base = base + low[:, :, j, 0]
        right = np.isfinite(t).all((2, 3)) & np.isfinite(step[:, :, 0, 0])
        entries = np.where(step > 0, np.rint((t - low) / step), np.float32(0))
        entries = np.minimum(np.where(right[:, :, None, None], entries, 0), 255).astype(np.int64)
        step, base = (np.where(right, x, np.float32(np.nan)) for x in (step[:, :, 0, 0], base))
    return entries, step, base


@dataclass(frozen=True)
class Table:
    """A call of vq_score, and of vq_topk."""

    subspaces: int
    words: int
    keys: int
    heads: int = 2
    group: int = 2
    batch: int = 2
    packed: bool = False
    ragged: bool = False
    table: str = "float32"
    k: int = 3
    sink: int = 2
    window: int = 4
    union_group: bool = True
    kind: str = "normal"  # of the table; "marked": small integers, NaN and infinities
    layout: str = "contiguous"
    index: torch.dtype = torch.int64
    seed: int = 0

    @functools.cached_property
    def lut(self) -> Tensor:
        shape = (self.batch, self.heads * self.group, self.subspaces, self.words)
        if self.kind != "marked":
            t = tensors.values(shape, torch.float32, self.kind, self.seed + 1)
        else:
            t = tensors.values(shape, torch.float32, "integers", self.seed + 1)
            rare = torch.rand(shape, generator=tensors.generator(self.seed + 2)) < 0.05
            t = torch.where(rare, tensors.values(shape, torch.float32, "special", self.seed + 3), t)
            t = torch.where(t.isfinite(), t.round(), t)
        return tensors.lay_out(t, self.layout) if self.layout in tensors.LAYOUTS else t

    @functools.cached_property
    def codes(self) -> Tensor:
        """As numbers, [B, HK, S, m] int64; anything within the type from lens on."""
        shape = (self.batch, self.heads, self.keys, self.subspaces)
        codes = torch.randint(0, self.words, shape, generator=tensors.generator(self.seed + 4))
        return expandable(codes, self.layout)

    @functools.cached_property
    def stored(self) -> Tensor:
        """The codes as the argument."""
        return lay_out_cache(self.store(self.codes), self.layout)

    def store(self, codes: Tensor) -> Tensor:
        if self.packed:
            codes = codes[..., ::2] | codes[..., 1::2] << 4
        return codes.to(torch.uint8 if self.words <= 256 else torch.int16)

    @functools.cached_property
    def lens(self) -> Tensor | None:
        if not self.ragged:
            return None
        lens = torch.randint(0, self.keys + 1, (self.batch,), generator=tensors.generator(self.seed + 5))
        return tensors.lay_out(lens.to(self.index), "strided" if self.layout == "strided" else "contiguous")

    @property
    def lengths(self) -> list[int]:
        return [self.keys] * self.batch if self.lens is None else self.lens.tolist()

    @property
    def queries(self) -> list[tuple[int, int]]:
        return [(b, h) for b in range(self.batch) for h in range(self.heads * self.group)]

    def run(self, backend: Backend, **changed: object) -> Tensor:
        args = [changed.get(name, getattr(self, name)) for name in ("lut", "stored", "lens")]
        return backend.run("vq_score", *args, table=changed.get("table", self.table))

    def topk(self, backend: Backend, **changed: object) -> tuple[Tensor, Tensor]:
        args = [changed.get(name, getattr(self, name)) for name in ("lut", "stored", "k", "lens")]
        names = ("sink", "window", "union_group", "table")
        return backend.run("vq_topk", *args, **{name: changed.get(name, getattr(self, name)) for name in names})

    @property
    def cap(self) -> int:
        return min(self.keys, self.sink + self.window + self.k * (self.group if self.union_group else 1))

    def named(self, b: int, h: int, table: Tensor | np.ndarray) -> Tensor:
        """[len, m]: the entries that a head's keys name."""
        codes = self.codes[b, h // self.group, : self.lengths[b]]
        return torch.as_tensor(table[b, h])[torch.arange(self.subspaces), codes]

    def exact(self, unit: float) -> Bounded:
        """Of a float32 table: each term goes through at most m - 1 additions. -infinity from lens on."""
        out = zeros(self.batch, self.heads * self.group, self.keys, unit=unit)
        out.value.fill_(-torch.inf)
        for b, h in self.queries:
            terms = self.named(b, h, self.lut).double()
            size = finite_magnitude(terms).sum(-1)
            own = Bounded(terms.sum(-1), roundings(self.subspaces, unit) * size, size, unit)
            put(out, (b, h, slice(len(terms))), own)
        return out

    def exact8(self) -> Tensor:
        """Of an 8-bit table, to the bit."""
        entries, step, base = quantized(self.lut)
        out = torch.full((self.batch, self.heads * self.group, self.keys), -torch.inf)
        with np.errstate(all="ignore"):
            for b, h in self.queries:
                sums = self.named(b, h, entries).sum(-1).numpy().astype(np.float32)
                out[b, h, : len(sums)] = torch.from_numpy(step[b, h] * sums + base[b, h])
        return out

    def ranked(self, b: int, h: int) -> list[float]:
        """What a head's keys are compared by, where that is exact: an 8-bit table, or small integers."""
        if self.table == "float32":
            return self.named(b, h, self.lut).double().sum(-1).tolist()
        entries, step, _ = quantized(self.lut)
        sums = self.named(b, h, entries).sum(-1).tolist()
        return sums if step[b, h] > 0 else [0] * len(sums)

    def middle(self, b: int) -> tuple[int, int]:
        """Where the keys begin and end that are chosen from."""
        first = min(self.sink, self.lengths[b])
        return first, max(first, self.lengths[b] - self.window)

    def listed(self, b: int, chosen: list[set[int]]) -> list[int]:
        """A list, from what each of its heads chooses."""
        first, last = self.middle(b)
        return sorted({*range(first), *range(last, self.lengths[b])}.union(*chosen))

    def choice(self, b: int, h: int) -> set[int]:
        """The best of a head: NaN last, the first of equals."""
        first, last = self.middle(b)
        by = self.ranked(b, h)
        order = sorted(range(first, last), key=lambda s: (math.isnan(by[s]), 0 if math.isnan(by[s]) else -by[s], s))
        return set(order[: self.k])

    def heads_of_lists(self) -> list[list[int]]:
        heads = range(self.heads * self.group)
        if not self.union_group:
            return [[h] for h in heads]
        return [[h for h in heads if h // self.group == head] for head in range(self.heads)]


# vq_attend -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attend:
    """A call of vq_attend."""

    keys: int
    dim: int
    value_dim: int = 5
    heads: int = 2
    group: int = 2
    batch: int = 2
    lists: str | None = None  # "group" or "head"
    cap: int = 4
    ragged: bool = False
    repeats: bool = False  # keys more than once, in any order
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    kind: str = "normal"
    layout: str = "contiguous"
    index: torch.dtype = torch.int64
    seed: int = 0

    def _made(self, shape: tuple[int, ...], seed: int) -> Tensor:
        return tensors.values(shape, self.dtype, self.kind, self.seed + seed)

    @functools.cached_property
    def q(self) -> Tensor:
        q = self._made((self.batch, self.heads * self.group, self.dim), 1)
        return tensors.lay_out(q, self.layout) if self.layout in tensors.LAYOUTS else q

    def _cache(self, size: int, seed: int) -> Tensor:
        t = self._made((self.batch, self.heads, self.keys, size), seed)
        return lay_out_cache(expandable(t, self.layout), self.layout)

    @functools.cached_property
    def k(self) -> Tensor:
        return self._cache(self.dim, 2)

    @functools.cached_property
    def v(self) -> Tensor:
        return self._cache(self.value_dim, 3)

    @property
    def num_lists(self) -> int:
        return self.heads * (self.group if self.lists == "head" else 1)

    @property
    def entries(self) -> int:
        """Of a list."""
        if self.lists is None:
            return self.keys
        return self.cap if self.repeats and self.keys else min(self.cap, self.keys)

    @functools.cached_property
    def idx(self) -> Tensor | None:
        if self.lists is None:
            return None
        g = tensors.generator(self.seed + 4)
        shape = (self.batch, self.num_lists, self.entries)
        if self.repeats:
            idx = torch.randint(0, max(1, self.keys), shape, generator=g)
        else:
            order = torch.rand((*shape[:2], self.keys), generator=g).argsort(-1)
            idx = order[..., : self.entries].sort(-1).values
        return tensors.lay_out(idx.to(self.index), "strided" if self.layout == "strided" else "contiguous")

    @functools.cached_property
    def count(self) -> Tensor | None:
        if not self.ragged:
            return None
        shape = (self.batch,) if self.lists is None else (self.batch, self.num_lists)
        count = torch.randint(0, self.entries + 1, shape, generator=tensors.generator(self.seed + 5))
        return tensors.lay_out(count.to(self.index), "strided" if self.layout == "strided" else "contiguous")

    def run(self, backend: Backend, **changed: object) -> tuple[Tensor, Tensor]:
        args = [changed.get(name, getattr(self, name)) for name in ("q", "k", "v", "idx", "count")]
        return backend.run("vq_attend", *args, scale=changed.get("scale", self.scale))

    def chosen(self, b: int, h: int) -> Tensor:
        """The keys of a head."""
        at = h if self.lists == "head" else h // self.group
        end = self.entries
        if self.count is not None:
            end = int(self.count[b] if self.lists is None else self.count[b, at])
        return torch.arange(end) if self.idx is None else self.idx[b, at, :end].long()

    def exact(self, unit: float) -> tuple[Bounded, Bounded]:
        """out and lse. Of the bound:

        - a score is a sum of D products and meets the scale, which is rounded itself; it may be multiplied by log2 e;
        - the exponential's argument, as a difference of numbers of the size of scores, and of the largest; the function
          may lose a few units more. Parts of the keys may be joined later, by factors of the same kind;
        - what a weight is off by relative to the others moves the sums, and these are quotients.
        """
        outs = zeros(self.batch, self.heads * self.group, self.value_dim, unit=unit)
        lses = zeros(self.batch, self.heads * self.group, unit=unit)
        for b in range(self.batch):
            for h in range(self.heads * self.group):
                chosen = self.chosen(b, h)
                rows = self.k[b, h // self.group, chosen], self.v[b, h // self.group, chosen].double()
                out, lse = attention(self.q[b, h], *rows, self.scale, unit)
                put(outs, (b, h), out)
                put(lses, (b, h), lse)
        return outs, lses


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, unit: float) -> tuple[Bounded, Bounded]:
    """Of one query: q [D], k [n, D], v [n, Dv] float64."""
    n = len(k)
    if n == 0:
        nothing = zeros(v.shape[1], unit=unit)
        return nothing, Bounded(torch.tensor(-torch.inf).double(), *torch.zeros(2).double(), unit)
    scale = len(q) ** -0.5 if scale is None else scale
    dots = matmul(q[None], k, unit)
    scores = scale * dots.value[0]
    most = scores.max()
    moved = abs(scale) * dots.error[0] + 4 * unit * scores.abs()
    moved = moved + unit * (4 * (scores.abs() + most.abs()) + 16)
    weights = (scores - most).exp()
    loss = (scores - most + moved).exp() - weights
    total = weights.sum()
    sums = roundings(n + 8, unit)
    of_total = loss.sum() + sums * (weights + loss).sum() + n * FLUSH
    of_sum = loss @ v.abs() + sums * ((weights + loss) @ v.abs()) + FLUSH * (v.abs().sum(0) + 1)
    value = weights @ v / total
    error = (of_sum + value.abs() * of_total) / (total - of_total).clamp(min=1e-30) + 4 * unit * value.abs() + UNDERFLOW
    peak = torch.where(total > 2 * of_total, v.abs().sum(0), torch.inf)
    lse = most + total.log()
    of_lse = (of_total / (total - of_total).clamp(min=1e-30)).clamp(max=moved.max() + math.log(n))
    of_lse = of_lse + unit * (4 * most.abs() + 4 * total.log().abs() + 8) + UNDERFLOW
    return Bounded(value, error, peak, unit), Bounded(lse, of_lse, torch.zeros_like(lse), unit)


# vq_wrope ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrope:
    """A call of vq_wrope."""

    half: int
    lead: tuple[int, ...] = (3,)
    dtype: torch.dtype = torch.float32
    own_type: bool = False  # cos and sin have q's
    kind: str = "normal"
    layout: str = "contiguous"
    seed: int = 0

    @functools.cached_property
    def q(self) -> Tensor:
        q = tensors.values((*self.lead, 2 * self.half), self.dtype, self.kind, self.seed)
        return tensors.lay_out(q, self.layout)

    @functools.cached_property
    def angles(self) -> Tensor:
        return 6.3 * torch.rand(self.half, generator=tensors.generator(self.seed + 1)).double()

    def _of_angles(self, function: str) -> Tensor:
        t = getattr(self.angles, function)().to(self.dtype if self.own_type else torch.float32)
        return tensors.lay_out(t, "strided" if self.layout == "strided" else "contiguous")

    @functools.cached_property
    def cos(self) -> Tensor:
        return self._of_angles("cos")

    @functools.cached_property
    def sin(self) -> Tensor:
        return self._of_angles("sin")

    def run(self, backend: Backend, **changed: Tensor) -> Tensor:
        return backend.run("vq_wrope", *(changed.get(name, getattr(self, name)) for name in ("q", "cos", "sin")))

    def exact(self, unit: float) -> Bounded:
        """Two products and their sum, with or without fused multiply-add."""
        (a, b), c, s = self.q.double().chunk(2, -1), self.cos.double(), self.sin.double()
        pairs = [(a * c, -b * s), (b * c, a * s)]
        value = torch.cat([x + y for x, y in pairs], -1)
        size = torch.cat([x.abs() + y.abs() for x, y in pairs], -1)
        error = roundings(2, unit) * torch.where(size.isfinite(), size, 0.0) + 2 * UNDERFLOW
        return Bounded(value, error, finite_magnitude(size), unit)


# Strategies ----------------------------------------------------------------------------------------------------------


def _small(backend: Backend | None) -> bool:
    """Interpreted or emulated: not too large, please."""
    return backend is not None and (backend.slow or backend.name == "simt")


def _sizes(options: tuple[int, ...], backend: Backend | None, limit: int) -> st.SearchStrategy[int]:
    return st.sampled_from([n for n in options if not _small(backend) or n <= limit])


@st.composite
def books(
    draw: st.DrawFn,
    backend: Backend | None = None,
    *,
    kinds: tuple[str, ...] = ("normal", "integers"),
    metric: bool | None = None,
) -> Book:
    words = draw(_sizes(WORDS, backend, 17))
    subspaces = draw(_sizes(SUBSPACES, backend, 8))
    return Book(
        subspaces=subspaces,
        words=words,
        size=draw(_sizes(SIZES, backend, 8)),
        heads=draw(st.sampled_from((1, 2, 3))),
        group=draw(_sizes(GROUPS, backend, 3)),
        batch=draw(st.sampled_from((0, 1, 2))),
        keys=draw(_sizes(KEYS, backend, 9)),
        with_metric=draw(st.booleans()) if metric is None else metric,
        pack=words <= 16 and subspaces % 2 == 0 and draw(st.booleans()),
        dtype=draw(st.sampled_from(FLOATS)),
        kind=draw(st.sampled_from(kinds)),
        layout=draw(st.sampled_from(CACHES)),
        seed=draw(SEEDS),
    )


@st.composite
def tables(
    draw: st.DrawFn,
    backend: Backend | None = None,
    *,
    kinds: tuple[str, ...] = ("normal", "integers", "extreme"),
    names: tuple[str, ...] = TABLES,
) -> Table:
    words = draw(_sizes(WORDS, backend, 17))
    subspaces = draw(_sizes(SUBSPACES, backend, 8))
    return Table(
        subspaces=subspaces,
        words=words,
        keys=draw(_sizes(KEYS, backend, 33)),
        heads=draw(st.sampled_from((1, 2, 3))),
        group=draw(_sizes(GROUPS, backend, 3)),
        batch=draw(st.sampled_from((0, 1, 2, 3))),
        packed=words <= 16 and subspaces % 2 == 0 and draw(st.booleans()),
        ragged=draw(st.booleans()),
        table=draw(st.sampled_from(names)),
        k=draw(st.sampled_from((0, 1, 2, 3, 8, 20, 300))),
        sink=draw(st.sampled_from((0, 1, 2, 8, 300))),
        window=draw(st.sampled_from((0, 1, 4, 20, 64, 300))),
        union_group=draw(st.booleans()),
        kind=draw(st.sampled_from(kinds)),
        layout=draw(st.sampled_from(CACHES)),
        index=draw(st.sampled_from(INDICES)),
        seed=draw(SEEDS),
    )


@st.composite
def attends(
    draw: st.DrawFn,
    backend: Backend | None = None,
    *,
    kinds: tuple[str, ...] = ("normal", "integers"),
    lists: tuple[str | None, ...] = (None, "group", "head"),
    least: int = 0,
) -> Attend:
    """least: keys, and entries of a list."""
    return Attend(
        keys=draw(_sizes(tuple(n for n in KEYS if n >= least), backend, 33)),
        dim=draw(_sizes(DIMS, backend, 17)),
        value_dim=draw(_sizes((0, *DIMS), backend, 17)),
        heads=draw(st.sampled_from((1, 2, 3))),
        group=draw(_sizes(GROUPS, backend, 3)),
        batch=draw(st.sampled_from((0, 1, 2))),
        lists=draw(st.sampled_from(lists)),
        cap=draw(_sizes(tuple(n for n in KEYS if n >= least), backend, 33)),
        ragged=draw(st.booleans()),
        repeats=draw(st.booleans()),
        scale=draw(st.sampled_from((None, None, 1.0, 0.0, -0.3, 3.0))),
        dtype=draw(st.sampled_from(FLOATS)),
        kind=draw(st.sampled_from(kinds)),
        layout=draw(st.sampled_from(CACHES)),
        index=draw(st.sampled_from(INDICES)),
        seed=draw(SEEDS),
    )


@st.composite
def wropes(
    draw: st.DrawFn, backend: Backend | None = None, *, kinds: tuple[str, ...] = ("normal", "integers", "extreme")
) -> Wrope:
    return Wrope(
        half=draw(_sizes((0, 1, 2, 3, 8, 15, 16, 17, 32, 33, 64, 100), backend, 17)),
        lead=draw(st.sampled_from(((), (0,), (1,), (5,), (2, 3), (2, 0, 3), (17,)))),
        dtype=draw(st.sampled_from(FLOATS)),
        own_type=draw(st.booleans()),
        kind=draw(st.sampled_from(kinds)),
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        seed=draw(SEEDS),
    )


# Contents that nobody may trust --------------------------------------------------------------------------------------

WIDE = (2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**63), -(2**32) + 1)  # some are a right number in 32 bits


def hostile_numbers(index: torch.dtype, most: int) -> st.SearchStrategy[int]:
    """Right ones, ones beside them and ones far away."""
    narrow = (most, most + 1, -1, -2, 2**31 - 1, -(2**31))
    return st.one_of(st.integers(0, max(0, most)), st.sampled_from((*narrow, *(WIDE if index == torch.int64 else ()))))


def spoil(draw: st.DrawFn, numbers: Tensor, most: int) -> Tensor:
    """A few of them changed to any."""
    out = numbers.clone().reshape(-1)
    for _ in range(min(3, len(out))):
        out[draw(st.integers(0, len(out) - 1))] = draw(hostile_numbers(numbers.dtype, most))
    return out.reshape(numbers.shape)


@st.composite
def hostile_lens(draw: st.DrawFn, backend: Backend | None = None) -> tuple[Table, Tensor]:
    """A call, and its lens with any numbers."""
    case = replace(draw(tables(backend, kinds=("integers",))), ragged=True)
    assert case.lens is not None
    return case, spoil(draw, case.lens, case.keys)


@st.composite
def hostile_codes(draw: st.DrawFn, backend: Backend | None = None) -> tuple[Table, Tensor]:
    """A call, and its stored codes with any bits."""
    case = draw(tables(backend, kinds=("integers",)))
    stored = case.stored.clone()
    flat = stored.reshape(-1)
    info = torch.iinfo(stored.dtype)
    for _ in range(min(3, flat.numel())):
        number = draw(st.one_of(st.integers(info.min, info.max), st.sampled_from((info.min, info.max))))
        flat[draw(st.integers(0, flat.numel() - 1))] = number
    return case, flat.reshape(stored.shape)


@st.composite
def hostile_lists(draw: st.DrawFn, backend: Backend | None = None) -> tuple[Attend, Tensor | None, Tensor]:
    """A call, and its idx and count with any numbers."""
    case = replace(draw(attends(backend, kinds=("normal",))), ragged=True)
    assert case.count is not None
    idx = None if case.idx is None else spoil(draw, case.idx, case.keys - 1)
    count = spoil(draw, case.count, case.entries) if draw(st.booleans()) else case.count
    return case, idx, count


# For the walks over all ops ------------------------------------------------------------------------------------------


def _left_out(draw: st.DrawFn, args: tuple[object, ...]) -> tuple[object, ...]:
    """None said or left out."""
    while draw(st.booleans()) and args[-1] is None:
        args = args[:-1]
    return args


def _leaf(t: Tensor, grad: bool) -> Tensor:
    return t.detach().requires_grad_(grad)


@st.composite
def _small_book(draw: st.DrawFn) -> Book:
    words = draw(st.sampled_from((5, 16, 300)))
    return Book(
        subspaces=draw(st.sampled_from((2, 4))),
        words=words,
        size=draw(st.sampled_from((2, 3))),
        group=draw(st.sampled_from((1, 3))),
        with_metric=draw(st.booleans()),
        pack=words <= 16 and draw(st.booleans()),
        dtype=draw(st.sampled_from(FLOATS)),
        layout=draw(st.sampled_from(CACHES)),
        seed=draw(SEEDS),
    )


@st.composite
def metric_calls(draw: st.DrawFn) -> Call:
    shape = (draw(st.sampled_from((1, 2))), draw(st.sampled_from((1, 9))), draw(st.sampled_from((2, 5))))
    q = tensors.values(shape, draw(st.sampled_from(FLOATS)), "normal", draw(SEEDS))
    q = tensors.lay_out(q, draw(st.sampled_from(tensors.LAYOUTS)))
    return Call("vq_metric", (q,), {"eps": 1e-3} if draw(st.booleans()) else {})


@st.composite
def train_calls(draw: st.DrawFn) -> Call:
    subspaces, words = draw(st.sampled_from((1, 2))), draw(st.sampled_from((2, 5)))
    keys = tensors.values((2, draw(st.sampled_from((5, 11))), 6), draw(st.sampled_from(FLOATS)), "normal", draw(SEEDS))
    chol = torch.randn(2, 6, 6).tril() if draw(st.booleans()) else None
    args = _left_out(draw, (tensors.lay_out(keys, draw(st.sampled_from(tensors.LAYOUTS))), words, chol))
    options = {"num_subspaces": subspaces, "iters": draw(st.sampled_from((0, 3))), "seed": draw(st.integers(0, 5))}
    return Call("vq_train", args, options if subspaces > 1 or draw(st.booleans()) else {})


@st.composite
def encode_calls(draw: st.DrawFn) -> Call:
    case = draw(_small_book())
    args = _left_out(draw, (case.k, case.codebook, case.chol))
    return Call("vq_encode", args, {"pack": case.pack} if case.pack or draw(st.booleans()) else {})


@st.composite
def lut_calls(draw: st.DrawFn) -> Call:
    case = draw(_small_book())
    return Call("vq_lut", _left_out(draw, (case.q, case.codebook, case.inv)))


@st.composite
def _small_table(draw: st.DrawFn) -> Table:
    words = draw(st.sampled_from((5, 16, 300)))
    return Table(
        subspaces=draw(st.sampled_from((2, 4))),
        words=words,
        keys=draw(st.sampled_from((3, 19))),
        group=draw(st.sampled_from((1, 3))),
        packed=words <= 16 and draw(st.booleans()),
        ragged=draw(st.booleans()),
        table=draw(st.sampled_from(TABLES)),
        union_group=draw(st.booleans()),
        layout=draw(st.sampled_from(CACHES)),
        index=draw(st.sampled_from(INDICES)),
        seed=draw(SEEDS),
    )


@st.composite
def score_calls(draw: st.DrawFn) -> Call:
    case = draw(_small_table())
    args = _left_out(draw, (case.lut, case.stored, case.lens))
    return Call("vq_score", args, {} if case.table == "float32" and draw(st.booleans()) else {"table": case.table})


@st.composite
def topk_calls(draw: st.DrawFn) -> Call:
    case = draw(_small_table())
    args = _left_out(draw, (case.lut, case.stored, case.k, case.lens))
    options = {"sink": 1, "window": 3, "union_group": case.union_group, "table": case.table}
    return Call("vq_topk", args, options if draw(st.booleans()) else {})


@st.composite
def attend_calls(draw: st.DrawFn) -> Call:
    case = Attend(
        keys=draw(st.sampled_from((5, 33))),
        dim=draw(st.sampled_from((2, 17))),
        value_dim=draw(st.sampled_from((1, 5))),
        group=draw(st.sampled_from((1, 3))),
        lists=draw(st.sampled_from((None, "group", "head"))),
        ragged=draw(st.booleans()),
        repeats=draw(st.booleans()),
        dtype=draw(st.sampled_from(FLOATS)),
        layout=draw(st.sampled_from(tuple(c for c in CACHES if c != "expanded"))),
        index=draw(st.sampled_from(INDICES)),
        seed=draw(SEEDS),
    )
    grad = draw(st.booleans())
    args = _left_out(draw, (*(_leaf(t, grad) for t in (case.q, case.k, case.v)), case.idx, case.count))
    return Call("vq_attend", args, {"scale": 0.7} if draw(st.booleans()) else {})


@st.composite
def wrope_calls(draw: st.DrawFn) -> Call:
    case = Wrope(
        half=draw(st.sampled_from((1, 8))),
        lead=draw(st.sampled_from(((), (2,), (2, 3)))),
        dtype=draw(st.sampled_from(FLOATS)),
        own_type=draw(st.booleans()),
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        seed=draw(SEEDS),
    )
    return Call("vq_wrope", (case.q, case.cos, case.sin))


CALLS = {
    "vq_metric": metric_calls(),
    "vq_train": train_calls(),
    "vq_encode": encode_calls(),
    "vq_lut": lut_calls(),
    "vq_score": score_calls(),
    "vq_topk": topk_calls(),
    "vq_attend": attend_calls(),
    "vq_wrope": wrope_calls(),
}

ARGUMENTS = {
    "vq_metric": ("q",),
    "vq_train": ("keys", "num_codes", "chol"),
    "vq_encode": ("keys", "codebook", "chol"),
    "vq_lut": ("q", "codebook", "inv"),
    "vq_score": ("lut", "codes", "lens"),
    "vq_topk": ("lut", "codes", "k", "lens"),
    "vq_attend": ("q", "k", "v", "idx", "count"),
    "vq_wrope": ("q", "cos", "sin"),
}
FAR = 2**30 + 1


def _wrong_dtypes(call: Call, name: str, where: str | None = None) -> list[Invalid]:
    """Of an argument that is a float or an index. Of one that is elsewhere than the rest, either may be meant."""
    t = call.args[ARGUMENTS[call.op].index(name)]
    wrong = {"double": torch.float64, "integer": torch.int32, "boolean": torch.bool}
    if not t.is_floating_point():
        wrong = {"float": torch.float32, "int8": torch.int8, "boolean": torch.bool}
    found = [Invalid(f"{name} {what}", call.with_(**{name: t.to(dtype)}), name) for what, dtype in wrong.items()]
    return [*found, Invalid(f"{name} device", call.with_(**{name: t.to("meta")}), where or name)]


def _wrong_shapes(
    call: Call, name: str, shapes: dict[str, tuple[int, ...]], argument: str | None = None
) -> list[Invalid]:
    dtype = call.args[ARGUMENTS[call.op].index(name)].dtype
    return [
        Invalid(f"{name} {what}", call.with_(**{name: torch.zeros(shape, dtype=dtype)}), argument or name)
        for what, shape in shapes.items()
    ]


def _half(call: Call, name: str, argument: str | None = None) -> Invalid:
    """In another float type."""
    t = call.args[ARGUMENTS[call.op].index(name)]
    return Invalid(f"{name} half", call.with_(**{name: t.half()}), argument or name)


def _invalid() -> dict[str, list[Invalid]]:
    book = Book(2, 5, 3, heads=2, group=2, batch=2, keys=4, with_metric=True)  # D = 6
    metric = Call("vq_metric", (torch.randn(2, 7, 6),))
    train = Call("vq_train", (torch.randn(2, 7, 6), 5, book.chol), {"num_subspaces": 2})
    encode = Call("vq_encode", (book.k, book.codebook, book.chol))
    lut = Call("vq_lut", (book.q, book.codebook, book.inv))
    wide = torch.zeros(2, 2, 300, 3)
    t = Table(4, 16, 9, ragged=True)  # B = 2, H = 4, HK = 2
    score = Call("vq_score", (t.lut, t.stored, t.lens))
    topk = Call("vq_topk", (t.lut, t.stored, 3, t.lens))
    a = Attend(9, 6, 5, lists="group", ragged=True)
    attend = Call("vq_attend", (a.q, a.k, a.v, a.idx, a.count))
    w = Wrope(4)
    wrope = Call("vq_wrope", (w.q, w.cos, w.sin))

    def of_codebook(call: Call) -> list[Invalid]:
        shapes = {
            "three dims": (2, 5, 6),
            "of more heads": (3, 2, 5, 3),
            "of another D": (2, 2, 5, 4),
            "without words": (2, 2, 0, 3),
            "of too many words": (2, 2, 2**15 + 1, 3),
            "without subspaces": (2, 0, 5, 3),
        }
        return [
            *_wrong_dtypes(call, "codebook", "codebook|keys|q"),
            _half(call, "codebook"),
            *_wrong_shapes(call, "codebook", shapes, "codebook|q"),
        ]

    def of_square(call: Call, name: str) -> list[Invalid]:
        shapes = {"matrix": (6, 6), "of more heads": (3, 6, 6), "of another D": (2, 5, 5), "not square": (2, 6, 5)}
        return [*_wrong_dtypes(call, name), _half(call, name), *_wrong_shapes(call, name, shapes)]

    def of_codes(call: Call) -> list[Invalid]:
        """What both ops that read codes refuse."""
        int8 = call.with_(table="int8")
        return [
            *_wrong_dtypes(call, "lut", "lut|codes|lens"),
            _half(call, "lut"),
            *_wrong_shapes(call, "lut", {"three dims": (4, 4, 16), "without words": (2, 4, 4, 0)}),
            *_wrong_shapes(call, "lut", {"of too many words": (2, 4, 4, 2**15 + 1)}, "lut"),
            *_wrong_shapes(call, "lut", {"without subspaces": (2, 4, 0, 16), "of odd heads": (2, 3, 4, 16)}, "lut"),
            *_wrong_shapes(call, "lut", {"of more subspaces than there may be": (2, 4, 2**16 + 1, 1)}, "lut"),
            *_wrong_shapes(
                call, "lut", {"of more batches": (3, 4, 4, 16), "of more subspaces": (2, 4, 5, 16)}, "codes"
            ),
            *_wrong_shapes(call, "lut", {"of more words": (2, 4, 4, 257)}, "codes"),
            Invalid("lut too tall", call.with_(lut=torch.zeros(0, FAR, 4, 16)), "lut"),
            Invalid(
                "lut of too many subspaces",
                int8.with_(lut=torch.zeros(2, 4, 257, 16), codes=torch.zeros(2, 2, 9, 257, dtype=torch.uint8)),
                "lut",
            ),
            *_wrong_dtypes(call, "codes", "codes|lens|lut"),
            Invalid("codes of 16 bits", call.with_(codes=t.stored.short()), "codes"),
            *_wrong_shapes(
                call, "codes", {"three dims": (2, 9, 4), "of more batches": (3, 2, 9, 4), "of a third": (2, 2, 9, 3)}
            ),
            *_wrong_shapes(call, "codes", {"without heads": (2, 0, 9, 4), "of three heads": (2, 3, 9, 4)}, "lut"),
            Invalid(
                "codes packed for 17 words",
                call.with_(lut=torch.zeros(2, 4, 4, 17), codes=t.stored[..., :2]),
                "codes",
            ),
            Invalid("codes too long", call.with_(codes=t.stored[:, :, :1].expand(2, 2, FAR, 4)), "codes"),
            *_wrong_dtypes(call, "lens"),
            *_wrong_shapes(call, "lens", {"scalar": (), "matrix": (2, 1), "long": (3,)}),
            Invalid("table unknown", call.with_(table="int4"), "table"),
            Invalid("table empty", call.with_(table=""), "table"),
        ]

    return {
        "vq_metric": [
            *_wrong_dtypes(metric, "q")[:-1],
            *_wrong_shapes(metric, "q", {"matrix": (7, 6), "four dims": (1, 2, 7, 6), "too tall": (0, FAR, 6)}),
            Invalid("eps of 0", metric.with_(eps=0.0), "eps"),
            Invalid("eps below 0", metric.with_(eps=-1.0), "eps"),
            Invalid("eps NaN", metric.with_(eps=math.nan), "eps"),
        ],
        "vq_train": [
            *_wrong_dtypes(train, "keys", "keys|chol"),
            *_wrong_shapes(train, "keys", {"matrix": (7, 6), "four dims": (1, 2, 7, 6), "too tall": (0, FAR, 6)}),
            *_wrong_shapes(train, "keys", {"too few": (2, 4, 6)}, "keys"),
            *_wrong_shapes(train, "keys", {"of another D": (2, 7, 8)}, "chol"),
            Invalid("num_codes of 0", train.with_(num_codes=0), "num_codes"),
            Invalid("num_codes too many", train.with_(num_codes=2**15 + 1), "num_codes"),
            Invalid("num_codes above the keys", train.with_(num_codes=8), "keys"),
            *of_square(train, "chol"),
            Invalid("num_subspaces of 0", train.with_(num_subspaces=0), "num_subspaces"),
            Invalid("num_subspaces no divisor", train.with_(num_subspaces=4), "num_subspaces"),
            Invalid("num_subspaces too many", train.with_(num_subspaces=12), "num_subspaces"),
            Invalid("iters below 0", train.with_(iters=-1), "iters"),
        ],
        "vq_encode": [
            *_wrong_dtypes(encode, "keys", "keys|codebook|chol"),
            *_wrong_shapes(encode, "keys", {"three dims": (2, 4, 6), "five dims": (1, 2, 2, 4, 6)}),
            *_wrong_shapes(encode, "keys", {"of more heads": (2, 3, 4, 6), "of another D": (2, 2, 4, 8)}, "codebook"),
            *_wrong_shapes(encode, "keys", {"too tall": (0, 2, FAR, 6)}),
            *of_codebook(encode),
            *of_square(encode, "chol"),
            Invalid("pack of many words", encode.with_(codebook=wide, pack=True), "pack"),
            Invalid(
                "pack of odd subspaces",
                encode.with_(codebook=torch.zeros(2, 3, 5, 2), pack=True),
                "pack",
            ),
        ],
        "vq_lut": [
            *_wrong_dtypes(lut, "q", "q|codebook|inv"),
            *_wrong_shapes(lut, "q", {"matrix": (4, 6), "four dims": (1, 2, 4, 6), "too tall": (FAR, 0, 6)}),
            *_wrong_shapes(lut, "q", {"of odd heads": (2, 3, 6), "without heads": (2, 0, 6)}),
            *_wrong_shapes(lut, "q", {"of another D": (2, 4, 8)}, "codebook"),
            *of_codebook(lut),
            *of_square(lut, "inv"),
        ],
        "vq_score": of_codes(score),
        "vq_topk": [
            *of_codes(topk),
            Invalid("k below 0", topk.with_(k=-1), "k"),
            Invalid("sink below 0", topk.with_(sink=-1), "sink"),
            Invalid("window below 0", topk.with_(window=-1), "window"),
        ],
        "vq_attend": [
            *_wrong_dtypes(attend, "q", "q|k|v|idx|count"),
            _half(attend, "q", "k|v"),
            *_wrong_shapes(attend, "q", {"matrix": (4, 6), "four dims": (1, 2, 4, 6), "too tall": (FAR, 0, 6)}),
            *_wrong_shapes(attend, "q", {"of odd heads": (2, 3, 6), "without heads": (2, 0, 6)}),
            *_wrong_shapes(attend, "q", {"of another D": (2, 4, 5), "of more batches": (3, 4, 6)}, "k"),
            Invalid("q without D", attend.with_(q=torch.zeros(2, 4, 0), k=torch.zeros(2, 2, 9, 0)), "q"),
            *_wrong_dtypes(attend, "k", "k|v"),
            _half(attend, "k"),
            *_wrong_shapes(attend, "k", {"three dims": (2, 9, 6), "of another D": (2, 2, 9, 5)}),
            *_wrong_shapes(attend, "k", {"of more keys": (2, 2, 10, 6)}, "v"),
            *_wrong_shapes(attend, "k", {"of more heads": (2, 3, 9, 6)}, "v"),
            Invalid(
                "k without heads",
                attend.with_(k=torch.zeros(2, 0, 9, 6), v=torch.zeros(2, 0, 9, 5), idx=None, count=None),
                "q",
            ),
            *_wrong_dtypes(attend, "v", "k|v"),
            _half(attend, "v"),
            *_wrong_shapes(attend, "v", {"three dims": (2, 9, 5), "of fewer keys": (2, 2, 8, 5)}),
            *_wrong_dtypes(attend, "idx"),
            *_wrong_shapes(
                attend, "idx", {"matrix": (2, 4), "of three lists": (2, 3, 4), "of more batches": (3, 2, 4)}
            ),
            *_wrong_dtypes(attend, "count"),
            *_wrong_shapes(attend, "count", {"vector": (2,), "of more lists": (2, 4), "three dims": (2, 2, 1)}),
            Invalid("count of lists without any", attend.with_(idx=None), "count"),
        ],
        "vq_wrope": [
            *_wrong_dtypes(wrope, "q", "q|cos|sin"),
            *_wrong_shapes(wrope, "q", {"scalar": (), "odd": (3, 7), "too tall": (FAR, 0)}),
            *_wrong_shapes(wrope, "q", {"of another D": (3, 6)}, "cos"),
            *_wrong_dtypes(wrope, "cos"),
            _half(wrope, "cos"),
            *_wrong_shapes(wrope, "cos", {"long": (8,), "matrix": (1, 4)}),
            *_wrong_dtypes(wrope, "sin"),
            _half(wrope, "sin"),
            *_wrong_shapes(wrope, "sin", {"long": (8,), "matrix": (1, 4)}),
        ],
    }


INVALID = _invalid()


# The op by dense torch operations, in the dtype of its inputs, for gradients -----------------------------------------


def dense_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor | None = None,
    count: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Every query against every key, with the logarithm of how often its list has it added to the score."""
    heads, keys = q.shape[1], k.shape[2]
    group = heads // k.shape[1]
    if idx is None:
        ends = torch.full((len(q),), keys, device=q.device) if count is None else count
        times = (torch.arange(keys, device=q.device) < ends[:, None])[:, None].expand(-1, heads, -1).to(q.dtype)
    else:
        ends = torch.full(idx.shape[:2], idx.shape[2], device=q.device) if count is None else count
        there = torch.arange(idx.shape[2], device=q.device) < ends[..., None]
        times = torch.zeros(*idx.shape[:2], keys + 1, dtype=q.dtype, device=q.device)
        times = times.scatter_add(-1, torch.where(there, idx, keys).long(), there.to(q.dtype))[..., :-1]
        times = times.repeat_interleave(heads // idx.shape[1], 1)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    wide_k, wide_v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = scale * torch.einsum("bhd,bhsd->bhs", q, wide_k)
    scores = torch.where(times > 0, scores + torch.where(times > 0, times, 1.0).log(), -torch.inf)
    some = (times > 0).any(-1, keepdim=True)
    weights = torch.where(some, torch.where(some, scores, 0.0).softmax(-1), 0.0)
    return torch.einsum("bhs,bhsd->bhd", weights, wide_v), scores.logsumexp(-1)


FORMULAS = {"vq_attend": dense_attend}
