"""Inputs of moe: rows per expert and sides around tile edges, skewed and empty experts, pairs dropped and repeated, any
strides, and every kind of content."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..kit import ranks, tensors
from ..kit.backends import Backend
from ..kit.calls import Call, Invalid
from ..kit.errors import (
    FLUSH,
    GATES,
    OVERFLOW,
    UNDERFLOW,
    Bounded,
    finite_magnitude,
    matmul,
    matmul_of,
    roundings,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INDICES = (torch.int32, torch.int64)
ACTIVATIONS = tuple(GATES)
GEMMS = ("auto", "grouped", "dense")
SCORES = ("softmax", "sigmoid")
TINY = torch.finfo(torch.float32).tiny

COUNTS = (0, 1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 16, 17, 31, 32, 33, 64, 65, 130)  # of an expert's rows
SIDES = (0, 1, 3, 7, 8, 9, 11, 12, 13, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65, 100, 127, 128, 129)
EXPERTS = (1, 2, 3, 5, 8)
TOKENS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 33, 65, 130, 200)
PAIRS = (0, 1, 2, 3, 6)  # of a token
# Of weights [E, N, K]: as they are; every second row of larger ones, or expert; rows that begin at an odd offset;
# [E, K, N] transposed; columns that don't follow each other.
WEIGHT_LAYOUTS = ("contiguous", "rows", "experts", "offset", "transposed", "strided")
LOADS = ("uniform", "skewed", "one")  # how many tokens the experts get
# Of tokens to their experts; sums of a few are exact in float64.
WEIGHTS = (0.0, 1.0, 0.5, 0.25, 0.7, 0.1, -1.3, 3.0, 1e-30)
SEEDS = st.integers(0, 2**20)


def lay_out_weights(t: Tensor, layout: str) -> Tensor:
    """The same contents with other strides; what lies between is NaN."""
    if layout in ("rows", "experts"):
        at = 0 if layout == "experts" else 1
        wide = t.new_full([n * 2 if i == at else n for i, n in enumerate(t.shape)], math.nan)
        view = wide[::2] if at == 0 else wide[:, ::2]
        return view.copy_(t)
    if layout == "transposed":
        return t.mT.contiguous().mT
    return tensors.lay_out(t, layout)


def as_index(numbers: list[int] | Tensor, index: torch.dtype, layout: str = "contiguous") -> Tensor:
    return tensors.lay_out(torch.as_tensor(numbers).to(index), layout)


# moe_route -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    """A call of moe_route."""

    experts: int
    k: int
    lead: tuple[int, ...] = (3,)
    dtype: torch.dtype = torch.float32
    kind: str = "normal"
    layout: str = "contiguous"
    ties: bool = False  # few different numbers
    with_bias: bool = False
    score: str = "softmax"
    renormalize: bool = True
    seed: int = 0

    @functools.cached_property
    def logits(self) -> Tensor:
        kind = "integers" if self.ties else self.kind
        return tensors.lay_out(tensors.values((*self.lead, self.experts), self.dtype, kind, self.seed), self.layout)

    @functools.cached_property
    def bias(self) -> Tensor | None:
        if not self.with_bias:
            return None
        bias = tensors.values((self.experts,), torch.float32, "integers" if self.ties else "normal", self.seed + 1)
        return tensors.lay_out(bias, "strided" if self.layout == "strided" else "contiguous")

    @property
    def tokens(self) -> int:
        return math.prod(self.lead)

    def run(self, backend: Backend, **changed: object) -> tuple[Tensor, Tensor]:
        args = [changed.get(name, getattr(self, name)) for name in ("logits", "k", "bias")]
        options = {name: changed.get(name, getattr(self, name)) for name in ("score", "renormalize")}
        return backend.run("moe_route", *args, **options)

    def scores(self, unit: float) -> Bounded:
        """Of all experts, [T, E], in float64, and what float32 may lose.

        Of the bound:
        - logit - maximum is rounded, and so is its product with log2 e, where 2^x is what there is: relative errors of
          the exponential of twice its argument; the function itself may lose a few units more;
        - a sum of E, and a quotient, which GPUs round less well;
        - what is below the smallest normal number may be 0.
        """
        logits = self.logits.reshape(self.tokens, self.experts).double()
        if self.score == "sigmoid":
            value = logits.sigmoid()
            loss = (2 * logits.abs() + 8) * unit
            loss = loss / (1 - loss).clamp(min=0.5)
            error = (value * (1 - value) * loss).nan_to_num(0, 0, 0) + 4 * unit * value + FLUSH
            return Bounded(value, error, torch.zeros_like(value), unit)
        value = logits.softmax(-1)
        if self.experts == 0:
            return Bounded(value, value, value, unit)
        loss = (2 * (logits - logits.max(-1, keepdim=True).values).abs() + 8) * unit
        loss = loss / (1 - loss).clamp(min=0.5)
        moved = (value * loss).nan_to_num(0, 0, 0)
        of_sum = moved.sum(-1, keepdim=True) + roundings(self.experts + 4, unit) + self.experts * FLUSH
        error = (moved + value * of_sum) / (1 - of_sum) + 2 * FLUSH
        return Bounded(value, error, torch.zeros_like(value), unit)

    def weights_of(self, ids: Tensor, unit: float) -> Bounded:
        """Those of the chosen experts, by intervals, [T, k]."""
        scores = self.scores(unit)
        ids = ids.reshape(self.tokens, self.k)
        value, error = scores.value.gather(-1, ids), scores.error.gather(-1, ids)
        peak = torch.zeros_like(value)
        if not self.renormalize:
            return Bounded(value, error, peak, unit)
        total, of_total = value.sum(-1, keepdim=True), error.sum(-1, keepdim=True)
        of_total = of_total + roundings(self.k, unit) * total
        ends = [
            ((value + sign * error).clamp(min=0) / (total - sign * of_total).clamp(min=TINY)) * (1 + sign * 4 * unit)
            + sign * 2 * FLUSH
            for sign in (-1, 1)
        ]
        exact = value / total.clamp(min=TINY)
        return Bounded(exact, torch.maximum(ends[1] - exact, exact - ends[0]), peak, unit)


# moe_sort ------------------------------------------------------------------------------------------------------------


def draw_ids(
    shape: tuple[int, ...], experts: int, load: str, none: float, seed: int, index: torch.dtype = torch.int64
) -> Tensor:
    """Experts of pairs: any; few of the first much more often; or all the same. Some are -1."""
    g = tensors.generator(seed)
    if load == "uniform":
        ids = torch.randint(0, max(1, experts), shape, generator=g)
    elif load == "skewed":
        ids = (torch.rand(shape, generator=g) ** 4 * experts).long()
    else:
        ids = torch.full(shape, seed % max(1, experts))
    dropped = (torch.rand(shape, generator=g) < none) | (experts == 0)
    return torch.where(dropped, -1, ids).to(index)


@dataclass(frozen=True)
class Sort:
    """A call of moe_sort."""

    experts: int
    shape: tuple[int, ...] = (4, 2)
    index: torch.dtype = torch.int64
    layout: str = "contiguous"
    load: str = "uniform"
    none: float = 0.2
    seed: int = 0

    @functools.cached_property
    def ids(self) -> Tensor:
        ids = draw_ids(self.shape, self.experts, self.load, self.none, self.seed, self.index)
        return tensors.lay_out(ids, self.layout)

    def run(self, backend: Backend) -> tuple[Tensor, Tensor, Tensor]:
        return backend.run("moe_sort", self.ids, self.experts)


# moe_grouped_gemm, moe_grouped_wgrad ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grouped:
    """A call of moe_grouped_gemm, or of moe_grouped_wgrad."""

    counts: tuple[int, ...]  # rows of each expert
    rows: int  # of w
    cols: int
    past: int = 0  # rows behind the last expert's
    gather: str | None = None  # "order" (each row of x once, in another order) or "repeats"
    dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype | None = None
    kind: str = "normal"
    layout: str = "contiguous"
    w_layout: str = "contiguous"
    with_bias: bool = False
    index: torch.dtype = torch.int32
    seed: int = 0

    def _made(self, shape: tuple[int, ...], seed: int) -> Tensor:
        return tensors.values(shape, self.dtype, self.kind, self.seed + seed)

    @property
    def sorted_rows(self) -> int:
        return sum(self.counts) + self.past

    @property
    def experts(self) -> int:
        return len(self.counts)

    @functools.cached_property
    def x(self) -> Tensor:
        rows = max(1, self.sorted_rows // 2) if self.gather == "repeats" else self.sorted_rows
        return tensors.lay_out(self._made((rows, self.cols), 1), self.layout)

    @functools.cached_property
    def w(self) -> Tensor:
        return lay_out_weights(self._made((self.experts, self.rows, self.cols), 2), self.w_layout)

    @functools.cached_property
    def bias(self) -> Tensor | None:
        if not self.with_bias:
            return None
        return tensors.lay_out(self._made((self.experts, self.rows), 3), self.layout)

    @functools.cached_property
    def grad(self) -> Tensor:
        """Of the result, for moe_grouped_wgrad."""
        return tensors.lay_out(self._made((self.sorted_rows, self.rows), 4), self.layout)

    @functools.cached_property
    def offsets(self) -> Tensor:
        ends = torch.tensor([sum(self.counts[: e + 1]) for e in range(self.experts)], dtype=torch.int64)
        return as_index(ends, self.index, "strided" if self.layout == "strided" else "contiguous")

    @functools.cached_property
    def source(self) -> Tensor | None:
        """The argument gather."""
        if self.gather is None:
            return None
        g = tensors.generator(self.seed + 5)
        if self.gather == "order":
            rows = torch.randperm(self.sorted_rows, generator=g)
        else:
            rows = torch.randint(0, len(self.x), (self.sorted_rows,), generator=g)
        return as_index(rows, self.index, "strided" if self.layout == "offset" else "contiguous")

    def groups(self) -> list[tuple[int, slice]]:
        """Experts with rows, and those."""
        ends = [sum(self.counts[: e + 1]) for e in range(self.experts)]
        return [(e, slice(end - n, end)) for e, (n, end) in enumerate(zip(self.counts, ends, strict=True)) if n > 0]

    def x_sorted(self) -> Tensor:
        return self.x if self.source is None else self.x[self.source.long()]

    def run(self, backend: Backend, **changed: Tensor | None) -> Tensor:
        """With other tensors in the place of some."""
        tensors_of = {"x": self.x, "w": self.w, "offsets": self.offsets, "bias": self.bias, "gather": self.source}
        args = [changed.get(name, t) for name, t in tensors_of.items()]
        return backend.run("moe_grouped_gemm", *args, out_dtype=self.out_dtype)

    def wgrad(self, backend: Backend, **changed: Tensor | None) -> Tensor:
        tensors_of = {"grad": self.grad, "x": self.x, "offsets": self.offsets, "gather": self.source}
        args = [changed.get(name, t) for name, t in tensors_of.items()]
        return backend.run("moe_grouped_wgrad", *args)

    def exact(self, unit: float) -> Bounded:
        """Each expert's product and bias, and 0 behind the last row."""
        out = zeros(self.sorted_rows, self.rows, unit=unit)
        x = self.x_sorted()
        for e, rows in self.groups():
            put(out, rows, matmul(x[rows], self.w[e], unit).plus(None if self.bias is None else self.bias[e]))
        return out

    def exact_wgrad(self, unit: float) -> Bounded:
        out = zeros(self.experts, self.rows, self.cols, unit=unit)
        x = self.x_sorted()
        for e, rows in self.groups():
            put(out, e, matmul(self.grad[rows].T, x[rows].T, unit))
        return out


def zeros(*shape: int, unit: float) -> Bounded:
    return Bounded(*(torch.zeros(shape, dtype=torch.float64) for _ in range(3)), unit)


def put(out: Bounded, at: object, part: Bounded) -> None:
    for name in ("value", "error", "peak"):
        getattr(out, name)[at] = getattr(part, name)


def part_of(exact: Bounded, at: object) -> Bounded:
    return Bounded(exact.value[at], exact.error[at], exact.peak[at], exact.unit)


# moe_combine ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Combine:
    """A call of moe_combine."""

    rows: int  # of y
    cols: int
    lead: tuple[int, ...] = (3,)
    pairs: int = 2
    dtype: torch.dtype = torch.float32
    kind: str = "normal"
    layout: str = "contiguous"
    index: torch.dtype = torch.int64
    none: float = 0.2
    seed: int = 0

    @functools.cached_property
    def y(self) -> Tensor:
        return tensors.lay_out(
            tensors.values((self.rows, self.cols), self.dtype, self.kind, self.seed + 1), self.layout
        )

    @functools.cached_property
    def inverse(self) -> Tensor:
        """Any places, some more than once."""
        places = draw_ids((*self.lead, self.pairs), self.rows, "uniform", self.none, self.seed + 2, self.index)
        return tensors.lay_out(places, self.layout)

    @functools.cached_property
    def weights(self) -> Tensor:
        return draw_weights((*self.lead, self.pairs), self.seed + 3, self.layout)

    @property
    def tokens(self) -> int:
        return math.prod(self.lead)

    def run(self, backend: Backend, **changed: Tensor) -> Tensor:
        return backend.run("moe_combine", *(changed.get(n, getattr(self, n)) for n in ("y", "inverse", "weights")))

    def exact(self, unit: float) -> Bounded:
        """Each term is rounded once and goes through at most as many additions as a token has terms."""
        out = zeros(self.tokens, self.cols, unit=unit)
        value, size, peak = out.value, torch.zeros_like(out.value), out.peak
        places = self.inverse.reshape(self.tokens, self.pairs).long()
        weights = self.weights.reshape(self.tokens, self.pairs)
        terms = (places >= 0).sum(-1, keepdim=True).double()
        for j in range(self.pairs):
            kept = places[:, j] >= 0
            rows, weight = self.y[places[kept, j]].double(), weights[kept, j, None].double()
            value[kept] += weight * rows
            size[kept] += (weight * rows).abs()
            peak[kept] += weight.abs() * finite_magnitude(rows)
        error = roundings(terms + 1, unit) * size + terms * UNDERFLOW
        shape = (*self.lead, self.cols)
        return Bounded(value.reshape(shape), error.reshape(shape), peak.reshape(shape), unit)


def draw_weights(shape: tuple[int, ...], seed: int, layout: str) -> Tensor:
    picks = torch.randint(0, len(WEIGHTS), shape, generator=tensors.generator(seed))
    return tensors.lay_out(torch.tensor(WEIGHTS)[picks], layout)


# moe_mlp -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mlp:
    """A call of moe_mlp."""

    cols: int
    inner: int
    experts: int = 3
    lead: tuple[int, ...] = (3,)
    pairs: int = 2
    activation: str = "swiglu"
    gemm: str = "auto"
    dtype: torch.dtype = torch.float32
    kind: str = "normal"
    layout: str = "contiguous"
    w_layout: str = "contiguous"
    index: torch.dtype = torch.int64
    load: str = "uniform"
    none: float = 0.2
    seed: int = 0

    def _made(self, shape: tuple[int, ...], seed: int) -> Tensor:
        return tensors.values(shape, self.dtype, self.kind, self.seed + seed)

    @functools.cached_property
    def x(self) -> Tensor:
        return tensors.lay_out(self._made((*self.lead, self.cols), 1), self.layout)

    @property
    def gated(self) -> bool:
        return GATES[self.activation] is not None

    @functools.cached_property
    def w13(self) -> Tensor:
        rows = self.inner * (2 if self.gated else 1)
        return lay_out_weights(self._made((self.experts, rows, self.cols), 2), self.w_layout)

    @functools.cached_property
    def w2(self) -> Tensor:
        return lay_out_weights(self._made((self.experts, self.cols, self.inner), 3), self.w_layout)

    @functools.cached_property
    def ids(self) -> Tensor:
        ids = draw_ids((*self.lead, self.pairs), self.experts, self.load, self.none, self.seed + 4, self.index)
        return tensors.lay_out(ids, self.layout)

    @functools.cached_property
    def weights(self) -> Tensor:
        return draw_weights((*self.lead, self.pairs), self.seed + 5, self.layout)

    @property
    def tokens(self) -> int:
        return math.prod(self.lead)

    @property
    def flat_ids(self) -> Tensor:
        """[T, k] int64"""
        return self.ids.reshape(self.tokens, self.pairs).long()

    @property
    def used(self) -> list[int]:
        """Experts with tokens."""
        return sorted(set(self.flat_ids.flatten().tolist()) - {-1})

    def run(self, backend: Backend, **changed: object) -> Tensor:
        """With other tensors, or other options, in the place of some."""
        args = [changed.get(name, getattr(self, name)) for name in ("x", "w13", "w2", "weights", "ids")]
        options = {name: changed.get(name, getattr(self, name)) for name in ("activation", "gemm")}
        return backend.run("moe_mlp", *args, **options)

    @functools.cached_property
    def start(self) -> Tensor:
        """What moe_mlp_ adds to."""
        return tensors.values((*self.lead, self.cols), torch.float32, "integers", self.seed + 6)

    def add(self, backend: Backend, y: Tensor, **changed: object) -> Tensor:
        """y, after moe_mlp_."""
        args = [changed.get(name, getattr(self, name)) for name in ("x", "w13", "w2", "weights", "ids")]
        options = {name: changed.get(name, getattr(self, name)) for name in ("activation", "gemm")}
        return backend.run("moe_mlp_", y.clone(), *args, **options)[0]

    def hidden(self, rows: Tensor, e: int, unit: float) -> Bounded:
        """What is between the two products, as it is stored: [rows, inner]."""
        products = (matmul(rows, w, unit) for w in self.w13[e].split(max(1, self.inner)))
        if self.inner == 0:
            return zeros(len(rows), 0, unit=unit)
        first = next(products)
        return first.gated(next(products, None), self.activation).settled().stored(self.dtype)

    def exact(self, unit: float) -> Bounded:
        """The sum over a token's experts of weight * w2 h, in float64, and what float32 may lose.

        Of the bound:
        - h has an error of its own, which w2 and the weight multiply; where it rounds to the same number wherever in
          its bound, there is none;
        - a term weight * w2 * h is rounded twice, in whatever order the three meet, and goes through at most as many
          additions as the token has terms;
        - the first of these products may underflow, and its loss is multiplied by the third number.
        """
        x = self.x.reshape(self.tokens, self.cols)
        out = zeros(self.tokens, self.cols, unit=unit)
        size, terms = torch.zeros_like(out.value), torch.zeros(self.tokens, 1, dtype=torch.float64)
        ids, weights = self.flat_ids, self.weights.reshape(self.tokens, self.pairs).double()
        for e in self.used:
            tokens = (ids == e).any(1).nonzero()[:, 0]
            h, w2 = self.hidden(x[tokens], e, unit), self.w2[e]
            y = matmul_of(h, w2, self.dtype)
            h_size, w2_size = h.value.abs() + h.error, w2.double().abs()
            for j in range(self.pairs):
                here = ids[tokens, j] == e
                at, weight = tokens[here], weights[tokens[here], j, None]
                own = UNDERFLOW * (self.inner * (1 + weight.abs()) + w2_size.sum(-1) + 1)
                if self.dtype == torch.bfloat16:
                    own = own + FLUSH
                out.value[at] += weight * y.value[here]
                out.error[at] += weight.abs() * y.error[here] + own
                size[at] += weight.abs() * (h_size[here] @ w2_size.T)
                # What may be anything stays so, times 0 too.
                of_peak = y.peak[here] * weight.abs().clamp(min=1)
                out.peak[at] += torch.where(y.peak[here] >= OVERFLOW, torch.inf, of_peak)
                terms[at] += self.inner
        out.error += roundings(terms + 2, unit) * size
        shape = (*self.lead, self.cols)
        return Bounded(out.value.reshape(shape), out.error.reshape(shape), out.peak.reshape(shape), unit)

    def exact_added(self, unit: float) -> Bounded:
        """What y holds after moe_mlp_, which rounds the start with each of a token's terms."""
        sums, start = self.exact(unit), self.start.double()
        error = sums.error + roundings(self.pairs * max(1, self.inner) + 2, unit) * start.abs()
        return Bounded(sums.value + start, error, sums.peak + start.abs(), unit)


# Strategies ----------------------------------------------------------------------------------------------------------


def _small(backend: Backend | None) -> bool:
    """Interpreted or emulated: not too large, please."""
    return backend is not None and (backend.slow or backend.name == "simt")


def _sizes(options: tuple[int, ...], backend: Backend | None, limit: int) -> st.SearchStrategy[int]:
    return st.sampled_from([n for n in options if not _small(backend) or n <= limit])


def leads_of(backend: Backend | None, *, least: int = 0, most: int = 200) -> st.SearchStrategy[tuple[int, ...]]:
    """One size, for the most part."""
    one = _sizes(tuple(t for t in TOKENS if least <= t <= most), backend, 17).map(lambda t: (t,))
    return st.one_of(one, one, one, st.tuples(st.sampled_from((1, 2, 3)), st.sampled_from((0, 1, 2, 5))), st.just(()))


@st.composite
def routes(
    draw: st.DrawFn,
    backend: Backend | None = None,
    *,
    kinds: tuple[str, ...] = ("normal", "integers", "extreme"),
    bias: bool | None = None,
) -> Route:
    experts = draw(_sizes((0, 1, 2, 3, 8, 17, 64, 100, 130, 256), backend, 64))
    return Route(
        experts=experts,
        k=draw(st.one_of(st.integers(0, min(8, experts)), st.just(experts))),
        lead=draw(leads_of(backend, most=33)),
        dtype=draw(st.sampled_from(FLOATS)),
        kind=draw(st.sampled_from(kinds)),
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        ties=draw(st.booleans()),
        with_bias=draw(st.booleans()) if bias is None else bias,
        score=draw(st.sampled_from(SCORES)),
        renormalize=draw(st.booleans()),
        seed=draw(SEEDS),
    )


@st.composite
def sorts(draw: st.DrawFn, backend: Backend | None = None) -> Sort:
    lead = draw(
        st.one_of(leads_of(backend), _sizes((513, 1030), backend, 17).map(lambda t: (t,)))
        if not _small(backend)
        else leads_of(backend)
    )
    return Sort(
        experts=draw(_sizes((0, 1, 2, 3, 8, 33, 64, 130, 257), backend, 64)),
        shape=(*lead, draw(st.sampled_from((*PAIRS, 8)))),
        index=draw(st.sampled_from(INDICES)),
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        load=draw(st.sampled_from(LOADS)),
        none=draw(st.sampled_from((0.0, 0.2, 1.0))),
        seed=draw(SEEDS),
    )


@st.composite
def groupeds(
    draw: st.DrawFn,
    backend: Backend | None = None,
    *,
    kinds: tuple[str, ...] = ("normal", "integers", "extreme"),
    gather: bool | None = None,
) -> Grouped:
    """Calls of moe_grouped_gemm. gather: always, never or in some."""
    count = _sizes(COUNTS, backend, 17)
    counts = draw(
        st.one_of(
            st.lists(count, max_size=3 if _small(backend) else 6),
            st.tuples(count, st.integers(0, 7)).map(lambda t: [0] * t[1] + [t[0]] + [0] * (7 - t[1])),  # all to one
        )
    )
    ways = (None, "order", "repeats") if gather is None else ("order", "repeats") if gather else (None,)
    return Grouped(
        counts=tuple(counts),
        rows=draw(_sizes(SIDES, backend, 65)),
        cols=draw(_sizes(SIDES, backend, 65)),
        past=draw(st.sampled_from((0, 0, 1, 5))),
        gather=draw(st.sampled_from(ways)),
        dtype=draw(st.sampled_from(FLOATS)),
        out_dtype=draw(st.sampled_from((None, None, *FLOATS))),
        kind=draw(st.sampled_from(kinds)),
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        w_layout=draw(st.sampled_from(WEIGHT_LAYOUTS)),
        with_bias=draw(st.booleans()),
        index=draw(st.sampled_from(INDICES)),
        seed=draw(SEEDS),
    )


@st.composite
def combines(
    draw: st.DrawFn,
    backend: Backend | None = None,
    *,
    kinds: tuple[str, ...] = ("normal", "integers", "extreme"),
) -> Combine:
    return Combine(
        rows=draw(_sizes((0, 1, 2, 5, 17, 130), backend, 17)),
        cols=draw(_sizes((*SIDES, 258, 1025), backend, 129)),
        lead=draw(leads_of(backend, most=33)),
        pairs=draw(st.sampled_from((*PAIRS, 8))),
        dtype=draw(st.sampled_from(FLOATS)),
        kind=draw(st.sampled_from(kinds)),
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        index=draw(st.sampled_from(INDICES)),
        none=draw(st.sampled_from((0.0, 0.2, 1.0))),
        seed=draw(SEEDS),
    )


@st.composite
def mlps(
    draw: st.DrawFn,
    backend: Backend | None = None,
    *,
    kinds: tuple[str, ...] = ("normal", "integers", "extreme"),
    leads: bool = True,
    least: int = 0,
) -> Mlp:
    """Calls of moe_mlp.

    Args:
        leads: also other leading sizes of x than one.
        least: tokens, where there is one leading size.
    """
    tokens = _sizes(tuple(t for t in TOKENS if t >= least), backend, 17).map(lambda t: (t,))
    return Mlp(
        cols=draw(_sizes(SIDES, backend, 65)),
        inner=draw(_sizes(SIDES, backend, 33)),
        experts=draw(st.sampled_from((0, *EXPERTS))),
        lead=draw(leads_of(backend, least=least) if leads else tokens),
        pairs=draw(st.sampled_from(PAIRS)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        gemm=draw(st.sampled_from(GEMMS)),
        dtype=draw(st.sampled_from(FLOATS)),
        kind=draw(st.sampled_from(kinds)),
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        w_layout=draw(st.sampled_from(WEIGHT_LAYOUTS)),
        index=draw(st.sampled_from(INDICES)),
        load=draw(st.sampled_from(LOADS)),
        none=draw(st.sampled_from((0.0, 0.2, 0.9))),
        seed=draw(SEEDS),
    )


# Contents that nobody may trust --------------------------------------------------------------------------------------

WIDE = (2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**63), -(2**32) + 1)  # some are a right number in 32 bits


def hostile_numbers(index: torch.dtype, most: int) -> st.SearchStrategy[int]:
    """Right ones, ones beside them and ones far away."""
    narrow = (most, most + 1, -1, -2, 2**31 - 1, -(2**31))
    return st.one_of(st.integers(0, max(0, most)), st.sampled_from((*narrow, *(WIDE if index == torch.int64 else ()))))


def clamped_offsets(offsets: list[int], rows: int) -> list[int]:
    """What a GPU takes offsets for: a running maximum, within the rows."""
    ends: list[int] = []
    for end in offsets:
        ends.append(min(rows, max(end, ends[-1] if ends else 0)))
    return ends


@st.composite
def hostile_groupeds(draw: st.DrawFn, backend: Backend | None = None) -> tuple[Grouped, Tensor, Tensor | None]:
    """A call, and its offsets and gather with any numbers."""
    case = draw(groupeds(backend, kinds=("normal",)))
    offsets = draw(
        st.lists(hostile_numbers(case.index, case.sorted_rows), min_size=case.experts, max_size=case.experts)
    )
    source = case.source
    if source is not None:
        source = source.clone()
        for _ in range(min(3, len(source))):
            number = draw(hostile_numbers(case.index, len(case.x) - 1))
            source[draw(st.integers(0, len(source) - 1))] = number
    return case, torch.tensor(offsets, dtype=case.index), source


def spoil(draw: st.DrawFn, numbers: Tensor, most: int) -> Tensor:
    """A few of them changed to any."""
    out = numbers.clone().reshape(-1)
    for _ in range(min(3, len(out))):
        out[draw(st.integers(0, len(out) - 1))] = draw(hostile_numbers(numbers.dtype, most))
    return out.reshape(numbers.shape)


@st.composite
def hostile_sorts(draw: st.DrawFn, backend: Backend | None = None) -> tuple[Sort, Tensor]:
    case = draw(sorts(backend))
    return case, spoil(draw, case.ids, case.experts - 1)


@st.composite
def hostile_combines(draw: st.DrawFn, backend: Backend | None = None) -> tuple[Combine, Tensor]:
    case = draw(combines(backend, kinds=("normal",)))
    return case, spoil(draw, case.inverse, case.rows - 1)


@st.composite
def hostile_mlps(draw: st.DrawFn, backend: Backend | None = None) -> tuple[Mlp, Tensor]:
    case = draw(mlps(backend, kinds=("normal",)))
    return case, spoil(draw, case.ids, case.experts - 1)


# For the walks over all ops ------------------------------------------------------------------------------------------


def _left_out(draw: st.DrawFn, args: tuple[object, ...]) -> tuple[object, ...]:
    """None said or left out."""
    while draw(st.booleans()) and args[-1] is None:
        args = args[:-1]
    return args


def _leaf(t: Tensor | None, grad: bool) -> Tensor | None:
    return None if t is None else t.detach().requires_grad_(grad)


@st.composite
def route_calls(draw: st.DrawFn) -> Call:
    experts = draw(st.sampled_from((1, 5, 17)))
    case = Route(
        experts=experts,
        k=draw(st.sampled_from([k for k in (1, 2, 17) if k <= experts])),
        lead=draw(st.sampled_from(((), (2,), (2, 3)))),
        dtype=draw(st.sampled_from(FLOATS)),
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        with_bias=draw(st.booleans()),
        seed=draw(SEEDS),
    )
    options = {"score": draw(st.sampled_from(SCORES)), "renormalize": draw(st.booleans())}
    args = _left_out(draw, (_leaf(case.logits, draw(st.booleans())), case.k, case.bias))
    return Call("moe_route", args, options if draw(st.booleans()) else {})


@st.composite
def sort_calls(draw: st.DrawFn) -> Call:
    case = Sort(
        experts=draw(st.sampled_from((1, 5))),
        shape=draw(st.sampled_from(((2,), (7, 2), (2, 3, 2)))),
        index=draw(st.sampled_from(INDICES)),
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        seed=draw(SEEDS),
    )
    return Call("moe_sort", (case.ids, case.experts))


@st.composite
def _small_grouped(draw: st.DrawFn) -> Grouped:
    return Grouped(
        counts=draw(st.sampled_from(((3,), (2, 0, 5), (0, 13)))),
        rows=draw(st.sampled_from((1, 17))),
        cols=draw(st.sampled_from((2, 33))),
        past=draw(st.sampled_from((0, 2))),
        gather=draw(st.sampled_from((None, "order", "repeats"))),
        dtype=draw(st.sampled_from(FLOATS)),
        out_dtype=draw(st.sampled_from((None, *FLOATS))),
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        w_layout=draw(st.sampled_from(WEIGHT_LAYOUTS)),
        with_bias=draw(st.booleans()),
        index=draw(st.sampled_from(INDICES)),
        seed=draw(SEEDS),
    )


@st.composite
def grouped_gemm_calls(draw: st.DrawFn) -> Call:
    case, grad = draw(_small_grouped()), draw(st.booleans())
    args = (_leaf(case.x, grad), _leaf(case.w, grad), case.offsets, _leaf(case.bias, grad), case.source)
    return Call(
        "moe_grouped_gemm", _left_out(draw, args), {} if case.out_dtype is None else {"out_dtype": case.out_dtype}
    )


@st.composite
def grouped_wgrad_calls(draw: st.DrawFn) -> Call:
    case = draw(_small_grouped())
    return Call("moe_grouped_wgrad", _left_out(draw, (case.grad, case.x, case.offsets, case.source)))


@st.composite
def combine_calls(draw: st.DrawFn) -> Call:
    case = Combine(
        rows=draw(st.sampled_from((1, 7))),
        cols=draw(st.sampled_from((2, 33))),
        lead=draw(st.sampled_from(((), (2,), (2, 3)))),
        pairs=draw(st.sampled_from((1, 3))),
        dtype=draw(st.sampled_from(FLOATS)),
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        index=draw(st.sampled_from(INDICES)),
        seed=draw(SEEDS),
    )
    grad = draw(st.booleans())
    return Call("moe_combine", (_leaf(case.y, grad), case.inverse, _leaf(case.weights, grad)))


@st.composite
def mlp_calls(draw: st.DrawFn) -> Call:
    case = Mlp(
        cols=draw(st.sampled_from((2, 33))),
        inner=draw(st.sampled_from((1, 17))),
        experts=draw(st.sampled_from((1, 3))),
        lead=draw(st.sampled_from(((), (2,), (2, 3), (30,)))),
        pairs=draw(st.sampled_from((1, 2))),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        dtype=draw(st.sampled_from(FLOATS)),
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        w_layout=draw(st.sampled_from(WEIGHT_LAYOUTS)),
        index=draw(st.sampled_from(INDICES)),
        seed=draw(SEEDS),
    )
    grad = draw(st.booleans())
    args = (*(_leaf(t, grad) for t in (case.x, case.w13, case.w2, case.weights)), case.ids)
    options = {"activation": case.activation, "gemm": draw(st.sampled_from(GEMMS))}
    return Call("moe_mlp", args, {} if case.activation == "swiglu" and draw(st.booleans()) else options)


@st.composite
def adding_mlp_calls(draw: st.DrawFn) -> Call:
    call = draw(mlp_calls())
    args = tuple(t.detach() for t in call.args)
    start = tensors.values(tuple(args[0].shape), torch.float32, "normal", draw(SEEDS))
    return Call("moe_mlp_", (start, *args), call.kwargs)


@st.composite
def ep_calls(draw: st.DrawFn, op: str) -> Call:
    """On a group of this process alone."""
    call = draw(mlp_calls())
    options = {k: v for k, v in call.kwargs.items() if k != "gemm" or op == "moe_mlp_ep"}
    if draw(st.booleans()):
        options["stages"] = draw(st.integers(0, 3))
    args = call.args
    if op == "moe_mlp_ep_backward":
        args = tuple(t.detach() for t in args)
        grad = tensors.values(tuple(args[0].shape), args[0].dtype, "normal", draw(SEEDS))
        args = (grad, *args)
    return Call(op, (*args, ranks.solo()), options)


CALLS = {
    "moe_route": route_calls(),
    "moe_sort": sort_calls(),
    "moe_grouped_gemm": grouped_gemm_calls(),
    "moe_grouped_wgrad": grouped_wgrad_calls(),
    "moe_combine": combine_calls(),
    "moe_mlp": mlp_calls(),
    "moe_mlp_": adding_mlp_calls(),
    **{op: ep_calls(op) for op in ("moe_mlp_ep", "moe_mlp_ep_backward")},
}


def _wrong_dtypes(call: Call, name: str, t: Tensor, where: str | None = None) -> list[Invalid]:
    """Of an argument that is a float or an index. Of one that is elsewhere than the rest, either may be meant."""
    wrong = {"double": torch.float64, "integer": torch.int32, "boolean": torch.bool}
    if not t.is_floating_point():
        wrong = {"float": torch.float32, "16 bits": torch.int16, "unsigned": torch.uint8, "boolean": torch.bool}
    found = [Invalid(f"{name} {what}", call.with_(**{name: t.to(dtype)}), name) for what, dtype in wrong.items()]
    return [*found, Invalid(f"{name} device", call.with_(**{name: t.to("meta")}), where or name)]


def _wrong_shapes(call: Call, name: str, shapes: dict[str, tuple[int, ...]]) -> list[Invalid]:
    dtype = call.args[ARGUMENTS[call.op].index(name)].dtype
    return [
        Invalid(f"{name} {what}", call.with_(**{name: torch.zeros(shape, dtype=dtype)}), name)
        for what, shape in shapes.items()
    ]


ARGUMENTS = {
    "moe_route": ("logits", "k", "bias"),
    "moe_sort": ("ids", "num_experts"),
    "moe_grouped_gemm": ("x", "w", "offsets", "bias", "gather"),
    "moe_grouped_wgrad": ("grad", "x", "offsets", "gather"),
    "moe_combine": ("y", "inverse", "weights"),
    "moe_mlp": ("x", "w13", "w2", "weights", "ids"),
    "moe_mlp_": ("y", "x", "w13", "w2", "weights", "ids"),
    "moe_mlp_ep": ("x", "w13", "w2", "weights", "ids", "group"),
    "moe_mlp_ep_backward": ("grad", "x", "w13", "w2", "weights", "ids", "group"),
}
FAR = 2**30 + 1


def _invalid() -> dict[str, list[Invalid]]:
    r = Route(5, 2, (3,), with_bias=True)
    route = Call("moe_route", (r.logits, 2, r.bias))
    s = Sort(5)
    sort = Call("moe_sort", (s.ids, 5))
    g = Grouped((2, 0, 4), 9, 6, past=1, gather="order", with_bias=True)
    gemm = Call("moe_grouped_gemm", (g.x, g.w, g.offsets, g.bias, g.source))
    wgrad = Call("moe_grouped_wgrad", (g.grad, g.x, g.offsets, g.source))
    c = Combine(7, 5)
    combine = Call("moe_combine", (c.y, c.inverse, c.weights))
    m = Mlp(6, 4)
    mlp = Call("moe_mlp", (m.x, m.w13, m.w2, m.weights, m.ids))
    adding = Call("moe_mlp_", (m.start, *mlp.args))
    shared = Call("moe_mlp_ep", (*mlp.args, ranks.solo()))
    back = Call("moe_mlp_ep_backward", (m.start, *shared.args))
    assert r.bias is not None and g.bias is not None and g.source is not None

    def sorted_by(call: Call, source: Tensor) -> list[Invalid]:
        """What both products refuse of x, offsets and gather."""
        return [
            *_wrong_dtypes(call, "x", g.x, "x|w|grad|offsets|gather"),
            *_wrong_shapes(call, "x", {"vector": (6,), "three dims": (1, 7, 6), "too tall": (FAR, 0)}),
            *_wrong_dtypes(call, "offsets", g.offsets),
            *_wrong_shapes(call, "offsets", {"scalar": (), "matrix": (1, 3)}),
            *_wrong_dtypes(call, "gather", source),
            *_wrong_shapes(call, "gather", {"scalar": (), "matrix": (1, 7)}),
        ]

    def of_layer(mlp: Call) -> list[Invalid]:
        """What both ops of whole layers refuse."""
        return [
            *_wrong_dtypes(mlp, "x", m.x, "x|w13|w2|ids|weights"),
            Invalid("x of another dtype", mlp.with_(x=m.x.half()), "w13|w2"),
            Invalid("x scalar", mlp.with_(x=torch.zeros(())), "x"),
            Invalid("x of other columns", mlp.with_(x=torch.zeros(3, 7)), "w13|w2"),
            Invalid("x of more tokens", mlp.with_(x=torch.zeros(4, 6)), "ids"),
            Invalid("x of other leading sizes", mlp.with_(x=torch.zeros(1, 3, 6)), "ids"),
            *_wrong_dtypes(mlp, "w13", m.w13),
            Invalid("w13 of another dtype", mlp.with_(w13=m.w13.half()), "w13"),
            *_wrong_shapes(
                mlp,
                "w13",
                {
                    "matrix": (8, 6),
                    "four dims": (1, 3, 8, 6),
                    "without gates": (3, 4, 6),
                    "of other columns": (3, 8, 5),
                    "of more experts": (4, 8, 6),
                },
            ),
            Invalid("w13 with gates", mlp.with_(activation="relu2"), "w13"),
            *_wrong_dtypes(mlp, "w2", m.w2),
            Invalid("w2 of another dtype", mlp.with_(w2=m.w2.half()), "w2"),
            *_wrong_shapes(mlp, "w2", {"matrix": (6, 4), "four dims": (1, 3, 6, 4), "of other rows": (3, 5, 4)}),
            Invalid("w2 too wide", mlp.with_(w2=torch.zeros(0, 6, FAR), w13=torch.zeros(0, 2 * FAR, 6)), "w2|w13"),
            Invalid("w2 of other columns", mlp.with_(w2=torch.zeros(3, 6, 5)), "w2|w13"),
            Invalid("w2 of fewer experts", mlp.with_(w2=torch.zeros(2, 6, 4)), "w2|w13"),
            *_wrong_dtypes(mlp, "weights", m.weights),
            Invalid("weights half", mlp.with_(weights=m.weights.half()), "weights"),
            *_wrong_shapes(mlp, "weights", {"short": (3, 1), "of more tokens": (4, 2), "dims": (1, 3, 2)}),
            *_wrong_dtypes(mlp, "ids", m.ids),
            Invalid("ids scalar", mlp.with_(ids=torch.tensor(0), weights=torch.tensor(1.0)), "ids"),
            Invalid("ids of more tokens", mlp.with_(ids=torch.zeros(4, 2, dtype=torch.int64)), "ids"),
            Invalid("activation unknown", mlp.with_(activation="silu"), "activation"),
            Invalid("gemm unknown", mlp.with_(gemm="sparse"), "gemm"),
        ]

    return {
        "moe_route": [
            *_wrong_dtypes(route, "logits", r.logits, "logits|bias"),
            *_wrong_shapes(route, "logits", {"scalar": ()}),
            Invalid("logits too wide", route.with_(logits=torch.zeros(0, FAR), bias=None), "logits"),
            Invalid("logits of too many pairs", route.with_(logits=r.logits[:1].expand(2**30, 5)), "logits"),
            Invalid("k below 0", route.with_(k=-1), "k"),
            Invalid("k above the experts", route.with_(k=6), "k"),
            Invalid("k of no experts", route.with_(logits=torch.zeros(3, 0), bias=torch.zeros(0), k=1), "k"),
            Invalid("bias half", route.with_(bias=r.bias.half()), "bias"),
            *_wrong_dtypes(route, "bias", r.bias, "bias|logits"),
            *_wrong_shapes(route, "bias", {"scalar": (), "short": (4,), "long": (6,), "matrix": (1, 5)}),
            Invalid("score unknown", route.with_(score="tanh"), "score"),
            Invalid("score empty", route.with_(score=""), "score"),
        ],
        "moe_sort": [
            *_wrong_dtypes(sort, "ids", s.ids)[:-1],
            *_wrong_shapes(sort, "ids", {"scalar": ()}),
            Invalid("ids too many", sort.with_(ids=s.ids[:1, :1].expand(2**20, 2**11)), "ids"),
            Invalid("num_experts below 0", sort.with_(num_experts=-1), "num_experts"),
            Invalid("num_experts too many", sort.with_(num_experts=FAR), "num_experts"),
        ],
        "moe_grouped_gemm": [
            *sorted_by(gemm, g.source),
            Invalid("x of another dtype", gemm.with_(x=g.x.half()), "w|x"),
            *_wrong_dtypes(gemm, "w", g.w),
            *_wrong_shapes(gemm, "w", {"matrix": (9, 6), "four dims": (1, 3, 9, 6), "other columns": (3, 9, 7)}),
            Invalid("w of another dtype", gemm.with_(w=g.w.bfloat16()), "w"),
            Invalid("w too tall", gemm.with_(w=torch.zeros(3, FAR, 0), x=torch.zeros(7, 0), bias=None), "w"),
            Invalid("w of more experts", gemm.with_(w=torch.zeros(4, 9, 6)), "offsets|w"),
            Invalid("offsets of more experts", gemm.with_(offsets=torch.zeros(4, dtype=torch.int32)), "offsets|w"),
            Invalid("x of other columns", gemm.with_(x=torch.zeros(7, 5)), "w|x"),
            *_wrong_dtypes(gemm, "bias", g.bias),
            Invalid("bias of another dtype", gemm.with_(bias=g.bias.half()), "bias"),
            *_wrong_shapes(gemm, "bias", {"vector": (9,), "of fewer experts": (2, 9), "of other rows": (3, 8)}),
            Invalid("out_dtype double", gemm.with_(out_dtype=torch.float64), "out_dtype"),
            Invalid("out_dtype integer", gemm.with_(out_dtype=torch.int32), "out_dtype"),
        ],
        "moe_grouped_wgrad": [
            *sorted_by(wgrad, g.source),
            Invalid("x of another dtype", wgrad.with_(x=g.x.half()), "grad|x"),
            *_wrong_dtypes(wgrad, "grad", g.grad, "grad|x"),
            Invalid("grad of another dtype", wgrad.with_(grad=g.grad.half()), "grad"),
            *_wrong_shapes(wgrad, "grad", {"vector": (9,), "three dims": (1, 7, 9), "of other rows": (6, 9)}),
            Invalid("grad too wide", wgrad.with_(grad=torch.zeros(0, FAR), x=torch.zeros(0, 6), gather=None), "grad"),
        ],
        "moe_combine": [
            *_wrong_dtypes(combine, "y", c.y, "y|inverse|weights"),
            *_wrong_shapes(combine, "y", {"vector": (5,), "three dims": (1, 7, 5), "too tall": (FAR, 0)}),
            *_wrong_dtypes(combine, "inverse", c.inverse),
            Invalid("inverse scalar", combine.with_(inverse=torch.tensor(0), weights=torch.tensor(1.0)), "inverse"),
            Invalid(
                "inverse too many",
                combine.with_(
                    inverse=c.inverse[:1, :1].expand(2**20, 2**11), weights=c.weights[:1, :1].expand(2**20, 2**11)
                ),
                "inverse",
            ),
            *_wrong_dtypes(combine, "weights", c.weights),
            Invalid("weights half", combine.with_(weights=c.weights.half()), "weights"),
            *_wrong_shapes(combine, "weights", {"short": (3, 1), "of more tokens": (4, 2), "dims": (1, 3, 2)}),
        ],
        "moe_mlp": of_layer(mlp),
        "moe_mlp_": [
            *of_layer(adding),
            *_wrong_dtypes(adding, "y", m.start),
            Invalid("y of x's dtype", adding.with_(y=m.start.half()), "y"),
            *_wrong_shapes(adding, "y", {"short": (2, 6), "vector": (18,), "of other columns": (3, 7)}),
            Invalid("y transposed", adding.with_(y=torch.zeros(6, 3).T), "y"),
            Invalid("y expanded", adding.with_(y=torch.zeros(1, 6).expand(3, 6)), "y"),
        ],
        "moe_mlp_ep": [*of_layer(shared), Invalid("stages below 0", shared.with_(stages=-1), "stages")],
        "moe_mlp_ep_backward": [
            *(i for i in of_layer(back) if "gemm" not in i.call.kwargs),
            Invalid("stages below 0", back.with_(stages=-1), "stages"),
            *_wrong_dtypes(back, "grad", m.start)[:1],
            *_wrong_shapes(back, "grad", {"short": (2, 6), "vector": (18,), "of other columns": (3, 7)}),
        ],
    }


INVALID = _invalid()


# The ops by dense torch operations, in the dtype of their inputs, for gradients ------------------------------------


def dense_route(
    logits: Tensor, k: int, bias: Tensor | None = None, *, score: str = "softmax", renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    by = logits if bias is None else scores + bias
    ids = by.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    weights = scores.gather(-1, ids)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), ids


def dense_grouped_gemm(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    gather: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Every row times every expert, and then its own picked."""
    if gather is not None:
        x = x[gather.long()]
    y = torch.einsum("mk,enk->emn", x, w)
    if bias is not None:
        y = y + bias[:, None]
    expert = (torch.arange(len(x))[:, None] >= offsets[None, :].to("cpu")).sum(-1).to(x.device)
    padded = torch.cat([y, y.new_zeros(1, *y.shape[1:])])  # rows behind the last
    return padded[expert, torch.arange(len(x), device=x.device)].to(out_dtype or x.dtype)


def dense_grouped_wgrad(grad: Tensor, x: Tensor, offsets: Tensor, gather: Tensor | None = None) -> Tensor:
    if gather is not None:
        x = x[gather.long()]
    expert = (torch.arange(len(x))[:, None] >= offsets[None, :].to("cpu")).sum(-1).to(x.device)
    of_expert = (expert[:, None] == torch.arange(len(offsets), device=x.device)).to(x.dtype)
    return torch.einsum("me,mn,mk->enk", of_expert, grad, x)


def dense_combine(y: Tensor, inverse: Tensor, weights: Tensor) -> Tensor:
    place = inverse.long()
    rows = torch.cat([y, y.new_zeros(1, y.shape[1])])[place]
    return torch.where(place[..., None] < 0, 0.0, rows * weights[..., None].to(y.dtype)).sum(-2)


def dense_mlp(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    activation: str = "swiglu",
    gemm: str = "auto",
) -> Tensor:
    """Every token through every expert, times the sum of the weights with which it has it."""
    z = torch.einsum("...k,enk->...en", x, w13)
    if activation == "relu2":
        h = z.relu().square()
    else:
        gate, up = z.chunk(2, -1)
        functions = {
            "swiglu": torch.nn.functional.silu,
            "geglu": torch.nn.functional.gelu,
            "geglu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
        }
        h = functions[activation](gate) * up
    each = torch.einsum("...ei,eki->...ek", h, w2)
    has = ids[..., None] == torch.arange(len(w2), device=ids.device)  # [..., k, E]
    share = torch.where(has, weights[..., None].to(x.dtype), 0.0).sum(-2)
    return (each * share[..., None]).sum(-2)


def dense_mlp_ep(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    group: str,
    *,
    activation: str = "swiglu",
    stages: int = 0,
    gemm: str = "auto",
) -> Tensor:
    """Of one rank."""
    return dense_mlp(x, w13, w2, weights, ids, activation=activation)


FORMULAS = {
    "moe_route": dense_route,
    "moe_grouped_gemm": dense_grouped_gemm,
    "moe_grouped_wgrad": dense_grouped_wgrad,
    "moe_combine": dense_combine,
    "moe_mlp": dense_mlp,
    "moe_mlp_ep": dense_mlp_ep,
}
