"""Inputs of w4a8: shapes around words (4), chunks (8), blocks (16) and groups, and every kind of content."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..kit import tensors
from ..kit.backends import Backend
from ..kit.calls import Call, Invalid
from ..kit.errors import UNDERFLOW, Bounded, finite_magnitude, roundings
from . import format
from .format import Packed, Rows

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
GROUP_SIZES = (32, 64, 128, 256)
# Of float32 sums. Integer sums are exact everywhere, so no back end has less than this.
UNIT = 2.0**-24

ROWS = (0, 1, 2, 15, 16, 17, 31, 33, 47, 64, 65)
COLS = (0, 1, 3, 4, 7, 8, 9, 31, 32, 33, 63, 65, 100, 127, 128, 129, 255, 256, 257, 300, 515)
# CPU kernels take tokens several at a time, how many depends on the level.
TOKENS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 31, 40)
# Which output features get 8 bits, by the flags that draw_is8 makes.
MIXES = ("none given", "none", "few", "half", "all but one", "all")
# What groups of a weight hold, beside its kind.
PATTERNS = ("random", "positive", "negative", "constant", "some zero", "all zero", "ties")
SEEDS = st.integers(0, 2**20)


def draw_is8(rows: int, mix: str, seed: int) -> Tensor | None:
    if mix == "none given":
        return None
    chance = {"none": 0.0, "few": 0.15, "half": 0.5, "all but one": 1.0, "all": 1.0}[mix]
    flags = torch.rand(rows, generator=tensors.generator(seed + 7)) < chance
    if mix == "all but one" and rows:
        flags[seed % rows] = False
    return flags


@dataclass(frozen=True)
class Weights:
    """A weight to pack."""

    rows: int
    cols: int
    group_size: int = 128
    dtype: torch.dtype = torch.float32
    mix: str = "few"
    pattern: str = "random"
    kind: str = "normal"
    layout: str = "contiguous"
    seed: int = 0

    @functools.cached_property
    def dense(self) -> Tensor:
        w = tensors.values((self.rows, self.cols), self.dtype, self.kind, self.seed)
        group = torch.arange(self.cols) // self.group_size
        if self.pattern in ("positive", "negative"):
            w = w.abs() if self.pattern == "positive" else -w.abs()
        elif self.pattern == "constant" and self.cols:
            w = w[:, group * self.group_size].clone()
        elif self.pattern == "some zero":
            w = w.masked_fill((group + torch.arange(self.rows)[:, None]) % 2 == 0, 0)
        elif self.pattern == "all zero":
            w = torch.zeros_like(w)
        elif self.pattern == "ties":  # halves of a scale of 1, where the largest is there
            halves = torch.randint(-15, 16, w.shape, generator=tensors.generator(self.seed + 1)) / 2
            w = halves.to(self.dtype)
            w[:, :: self.group_size] = 7.5
            w[:, 1 :: self.group_size] = -7.5
        return tensors.lay_out(w, self.layout)

    @functools.cached_property
    def is8(self) -> Tensor | None:
        return draw_is8(self.rows, self.mix, self.seed)

    @functools.cached_property
    def packed(self) -> Packed:
        """By the tests' own packer: what is tested is never its own input."""
        return format.pack(self.dense, self.is8, self.group_size)


@dataclass(frozen=True)
class Stored:
    """A packed weight of any contents that the format allows: all integers, zero points to 255, scales of any sign."""

    n4: int
    n8: int
    cols: int
    group_size: int = 128
    scales: str = "normal"  # a kind of tensors.values
    zeros: int = 255  # the largest zero point
    seed: int = 0

    @functools.cached_property
    def as_rows(self) -> Rows:
        g = tensors.generator(self.seed)
        n, groups = self.rows, format.ceil_div(self.cols, self.group_size)
        most = torch.where(torch.arange(n) < self.n4, 15, 255)[:, None]
        q = torch.randint(0, 2**30, (n, self.cols), generator=g) % (most + 1)
        # The ends are where products and sums overflow first.
        ends = torch.rand(q.shape, generator=g) < (torch.rand(n, generator=g) < 0.3)[:, None]
        q = torch.where(ends, torch.where(q > most // 2, most, 0), q)
        zero = torch.randint(0, self.zeros + 1, (n, groups), generator=g)
        zero[self.n4 :] = 128
        scale = tensors.values((n, groups), torch.float32, self.scales, self.seed + 1)
        return Rows(q, zero, scale, torch.randperm(n, generator=g), self.n4, self.group_size)

    @functools.cached_property
    def packed(self) -> Packed:
        return format.soiled(format.encode(self.as_rows), self.seed)

    @property
    def rows(self) -> int:
        return self.n4 + self.n8


@dataclass(frozen=True)
class Linear:
    """A call of w4a8_linear."""

    w: Stored | Weights
    tokens: int | tuple[int, ...] = 1
    dtype: torch.dtype = torch.float32
    kind: str = "normal"
    layout: str = "contiguous"
    bias: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    seed: int = 0

    @functools.cached_property
    def x(self) -> Tensor:
        lead = self.tokens if isinstance(self.tokens, tuple) else (self.tokens,)
        return tensors.lay_out(tensors.values((*lead, self.w.cols), self.dtype, self.kind, self.seed + 2), self.layout)

    @functools.cached_property
    def bias_tensor(self) -> Tensor | None:
        if self.bias is None:
            return None
        return tensors.lay_out(tensors.values((self.w.rows,), self.bias, "normal", self.seed + 3), self.layout)

    @property
    def y_dtype(self) -> torch.dtype:
        return self.out_dtype or self.dtype

    def run(self, backend: Backend, x: Tensor | None = None, packed: Packed | None = None) -> Tensor:
        return backend.run(
            "w4a8_linear",
            self.x if x is None else x,
            *(packed or self.w.packed),
            self.w.group_size,
            self.bias_tensor,
            out_dtype=self.out_dtype,
        )

    def exact(self, x: Tensor | None = None, packed: Packed | None = None) -> Bounded:
        """The result by the formula of the method, with its bound."""
        y = second_step(self.x if x is None else x, packed or self.w.packed, self.w.group_size)
        return y.plus(self.bias_tensor)


def first_step(q: Tensor, rows: Rows) -> Tensor:
    """[T, groups, N] int64 in the order of output features: sums of q * (weight - zero) over each group."""
    parts = zip(q.long().split(rows.group_size, -1), rows.integers.split(rows.group_size, -1), strict=True)
    sums = [a @ b.T for a, b in parts] if q.shape[-1] else []
    stacked = torch.stack(sums, -2) if sums else q.new_zeros((*q.shape[:-1], 0, len(rows.perm)), dtype=torch.long)
    return format.in_features(stacked, rows.perm)


def second_step(x: Tensor, packed: Packed, group_size: int) -> Bounded:
    """Sum over groups of x_scale * w_scale * (the integer sum), in float64, and what float32 may lose.

    The integer sums are below 2^24, so they are exact as float32. Of the bound:
    - each group's product has two roundings, in whatever order its three factors meet;
    - the first of the two may underflow, and its loss is multiplied by the third factor;
    - adding up the groups takes one addition each, which may be fused with the second product.
    """
    rows = format.decode(packed, group_size)
    q, x_scale = format.quantize(x, group_size)
    sums = first_step(q, rows).double()
    a = x_scale.double()[..., None]
    b = format.in_features(rows.scale.double().T, rows.perm)
    terms = sums * a * b
    groups = sums.shape[-2]
    third = torch.maximum(torch.maximum(sums.abs(), a), b.abs()) + 1
    error = (roundings(groups + 2, UNIT) * terms.abs() + 2 * UNDERFLOW * third).sum(-2)
    m, n, k = finite_magnitude(sums), finite_magnitude(a), finite_magnitude(b)
    peak = torch.stack(torch.broadcast_tensors(m * n * k, m * n, m * k, n * k)).amax(0).sum(-2)
    return Bounded(terms.sum(-2), error, peak, UNIT)


def _sizes(options: tuple[int, ...], backend: Backend | None, limit: int) -> st.SearchStrategy[int]:
    return st.sampled_from([n for n in options if n <= limit] if backend and backend.slow else options)


def weights(
    backend: Backend | None = None,
    *,
    kinds: tuple[str, ...] = tensors.KINDS,
    patterns: tuple[str, ...] = PATTERNS,
    mixes: tuple[str, ...] = MIXES,
) -> st.SearchStrategy[Weights]:
    return st.builds(
        Weights,
        rows=_sizes(ROWS, backend, 33),
        cols=_sizes(COLS, backend, 257),
        group_size=st.sampled_from(GROUP_SIZES),
        dtype=st.sampled_from(FLOATS),
        mix=st.sampled_from(mixes),
        pattern=st.sampled_from(patterns),
        kind=st.sampled_from(kinds),
        layout=st.sampled_from(tensors.LAYOUTS),
        seed=SEEDS,
    )


def stored(
    backend: Backend | None = None, *, scales: tuple[str, ...] = ("normal", "integers", "extreme"), zeros: int = 255
) -> st.SearchStrategy[Stored]:
    return st.builds(
        Stored,
        n4=_sizes(ROWS, backend, 33),
        n8=_sizes(ROWS, backend, 17),
        cols=_sizes(COLS, backend, 257),
        group_size=st.sampled_from(GROUP_SIZES),
        scales=st.sampled_from(scales),
        zeros=st.sampled_from((15, zeros)),
        seed=SEEDS,
    )


@st.composite
def linears(
    draw: st.DrawFn,
    backend: Backend | None = None,
    *,
    kinds: tuple[str, ...] = ("normal", "integers", "extreme"),
    scales: tuple[str, ...] = ("normal", "integers", "extreme"),
    plain: bool = False,
    leads: bool = True,
    least: int = 0,
) -> Linear:
    """Calls of w4a8_linear, of stored weights.

    Args:
        plain: neither bias nor out_dtype.
        leads: also other leading sizes of x than one.
        least: tokens, where there is one leading size.
    """
    tokens = _sizes(tuple(t for t in TOKENS if t >= least), backend, 17)
    lead = st.tuples(st.sampled_from((1, 2, 3)), st.sampled_from((0, 1, 2, 5)))
    maybe = st.sampled_from((None, *FLOATS))
    return Linear(
        w=draw(stored(backend, scales=scales)),
        tokens=draw(st.one_of(tokens, lead, st.just(())) if leads else tokens),
        dtype=draw(st.sampled_from(FLOATS)),
        kind=draw(st.sampled_from(kinds)),
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        bias=None if plain else draw(maybe),
        out_dtype=None if plain else draw(maybe),
        seed=draw(SEEDS),
    )


@dataclass(frozen=True)
class Activations:
    """A call of w4a8_quantize."""

    lead: tuple[int, ...]
    cols: int
    group_size: int
    dtype: torch.dtype
    kind: str
    layout: str
    seed: int

    @functools.cached_property
    def x(self) -> Tensor:
        values = tensors.values((*self.lead, self.cols), self.dtype, self.kind, self.seed)
        if self.seed % 3 == 0:  # some groups of zeros
            values = values.masked_fill(torch.arange(self.cols) // self.group_size % 2 == 0, 0)
        return tensors.lay_out(values, self.layout)


def activations(
    backend: Backend | None = None, *, kinds: tuple[str, ...] = tensors.KINDS
) -> st.SearchStrategy[Activations]:
    return st.builds(
        Activations,
        lead=st.sampled_from(((), (0,), (1,), (2,), (17,), (3, 5), (2, 0, 3))),
        cols=_sizes(COLS, backend, 257),
        group_size=st.sampled_from(GROUP_SIZES),
        dtype=st.sampled_from(FLOATS),
        kind=st.sampled_from(kinds),
        layout=st.sampled_from(tensors.LAYOUTS),
        seed=SEEDS,
    )


@dataclass(frozen=True)
class Salience:
    """A call of w4a8_salience."""

    samples: int | None
    rows: int
    cols: int
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (torch.float32,) * 3
    kind: str = "normal"
    layout: str = "contiguous"
    seed: int = 0

    @functools.cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """grad, w, w4"""
        shape = (self.rows, self.cols)
        shapes = (shape if self.samples is None else (self.samples, *shape), shape, shape)
        made = (
            tensors.lay_out(tensors.values(s, dtype, self.kind, self.seed + i), self.layout)
            for i, (s, dtype) in enumerate(zip(shapes, self.dtypes, strict=True))
        )
        grad, w, w4 = made
        return grad, w, w4

    def exact(self) -> Bounded:
        """|d + d^2 / 2| summed over samples, with its bound.

        Of the bound: each of the K products has two roundings (of w4 - w and its own) and goes through at most K - 1
        additions; d^2 / 2 moves by as much as d does, times |d| and a little; then there are the roundings of the
        square, of the addition to d and of the sum over samples. Products may underflow.
        """
        grad, w, w4 = (t.double() for t in self.tensors)
        change = w4 - w
        products = grad.reshape(-1, *w.shape) * change if w.numel() else grad.new_zeros(self.samples or 1, *w.shape)
        d, size = products.sum(-1), products.abs().sum(-1)
        d_error = roundings(self.cols + 1, UNIT) * size + self.cols * UNDERFLOW
        step = d + d**2 / 2
        error = d_error * (1 + d.abs() + d_error)
        error = error + roundings(3, UNIT) * (d.abs() + d_error + (d.abs() + d_error) ** 2) + 2 * UNDERFLOW
        total = (step.abs() + error).sum(0)
        # w4 - w may overflow alone, as may everything later on.
        wide = torch.maximum(finite_magnitude(w4) + finite_magnitude(w), finite_magnitude(products))
        peak = (wide.sum(-1) + size**2).sum(0)
        samples = step.shape[0]
        return Bounded(step.abs().sum(0), error.sum(0) + roundings(samples, UNIT) * total, peak, UNIT)


def saliences(
    backend: Backend | None = None, *, kinds: tuple[str, ...] = ("normal", "integers", "extreme")
) -> st.SearchStrategy[Salience]:
    return st.builds(
        Salience,
        samples=st.sampled_from((None, 0, 1, 2, 5)),
        rows=_sizes((0, 1, 2, 16, 17, 33), backend, 17),
        cols=_sizes((0, 1, 7, 8, 15, 16, 17, 100, 255, 256, 257, 300), backend, 100),
        dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 3),
        kind=st.sampled_from(kinds),
        layout=st.sampled_from(tensors.LAYOUTS),
        seed=SEEDS,
    )


# For the walks over all ops ------------------------------------------------------------------------------------------

SMALL = st.builds(
    Weights,
    rows=st.sampled_from((1, 16, 21)),
    cols=st.sampled_from((1, 8, 33, 130)),
    group_size=st.sampled_from((32, 128)),
    dtype=st.sampled_from(FLOATS),
    mix=st.sampled_from(("none given", "few", "half", "all")),
    layout=st.sampled_from(tensors.LAYOUTS),
    seed=SEEDS,
)


@st.composite
def quantize_calls(draw: st.DrawFn) -> Call:
    w = draw(SMALL)
    x = tensors.lay_out(w.dense[None], w.layout) if draw(st.booleans()) else w.dense
    return Call("w4a8_quantize", (x, w.group_size) if draw(st.booleans()) else (x,))


@st.composite
def pack_calls(draw: st.DrawFn) -> Call:
    w = draw(SMALL)
    return Call("w4a8_pack", (w.dense, w.is8, w.group_size))


@st.composite
def unpack_calls(draw: st.DrawFn) -> Call:
    w = draw(SMALL)
    return Call("w4a8_unpack", (*w.packed, w.group_size))


@st.composite
def accumulate_calls(draw: st.DrawFn) -> Call:
    w = draw(SMALL)
    q = tensors.values((draw(st.sampled_from((1, 3))), w.cols), torch.int8, "bits", w.seed)
    return Call("w4a8_accumulate", (tensors.lay_out(q, w.layout), *w.packed, w.group_size))


@st.composite
def linear_calls(draw: st.DrawFn) -> Call:
    w = draw(SMALL)
    maybe = st.sampled_from((None, *FLOATS))
    case = Linear(
        w,
        tokens=draw(st.sampled_from(((), 2, (2, 3)))),
        dtype=draw(st.sampled_from(FLOATS)),
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        bias=draw(maybe),
        seed=draw(SEEDS),
    )
    grad = draw(st.booleans())
    bias = None if case.bias_tensor is None else case.bias_tensor.detach().requires_grad_(grad)
    x = case.x.detach().requires_grad_(grad)
    return Call("w4a8_linear", (x, *w.packed, w.group_size, bias), {"out_dtype": draw(maybe)})


@st.composite
def salience_calls(draw: st.DrawFn) -> Call:
    dtypes = draw(st.tuples(*[st.sampled_from(FLOATS)] * 3))
    samples = draw(st.sampled_from((None, 1, 3)))
    case = Salience(samples, 17, 33, dtypes, layout=draw(st.sampled_from(tensors.LAYOUTS)), seed=draw(SEEDS))
    return Call("w4a8_salience", case.tensors)


CALLS = {
    "w4a8_quantize": quantize_calls(),
    "w4a8_pack": pack_calls(),
    "w4a8_unpack": unpack_calls(),
    "w4a8_accumulate": accumulate_calls(),
    "w4a8_linear": linear_calls(),
    "w4a8_salience": salience_calls(),
}


def _strided(t: Tensor) -> Tensor:
    """The same contents, not contiguous."""
    return torch.stack([t, t], -1)[..., 0]


def _invalid() -> dict[str, list[Invalid]]:
    # 40 rows, 18 of them of 8 bits: blocks4 = 2, blocks8 = 2; 70 columns: 9 chunks, 3 groups of 32.
    w = Stored(22, 18, 70, 32, zeros=15)
    p = w.packed
    quantize = Call("w4a8_quantize", (torch.zeros(2, 70), 32))
    pack = Call("w4a8_pack", (torch.zeros(40, 70), torch.zeros(40, dtype=torch.bool), 32))
    unpack = Call("w4a8_unpack", (*p, 32))
    accumulate = Call("w4a8_accumulate", (torch.zeros(2, 70, dtype=torch.int8), *p, 32))
    linear = Call("w4a8_linear", (torch.zeros(2, 70), *p, 32, None))
    salience = Call("w4a8_salience", (torch.zeros(2, 40, 70), torch.zeros(40, 70), torch.zeros(40, 70)))
    bias = torch.zeros(40)

    def group_sizes(call: Call) -> list[Invalid]:
        wrong = {"zero": 0, "negative": -32, "odd": 48, "too small": 16, "too large": 512, "huge": 2**40}
        return [Invalid(f"group_size {k}", call.with_(group_size=v), "group_size") for k, v in wrong.items()]

    def packed(call: Call) -> list[Invalid]:
        """What unpack, accumulate and linear refuse alike."""
        found = group_sizes(call)
        for name, t in zip(Packed._fields, p, strict=True):
            other = t.int() if t.dtype != torch.int32 else t.long()
            found += [
                Invalid(f"{name} dtype", call.with_(**{name: other}), name),
                Invalid(f"{name} dims", call.with_(**{name: t[None]}), name),
                Invalid(f"{name} strided", call.with_(**{name: _strided(t)}), name),
                # Where one of several is elsewhere, either may be meant.
                Invalid(
                    f"{name} device", call.with_(**{name: t.to("meta")}), "|".join({name, "q8", "q4", "perm", "x", "q"})
                ),
            ]
        return [
            *found,
            Invalid("q4 short of a block", call.with_(q4=p.q4[:1]), "q4"),
            Invalid("q4 with a block more", call.with_(q4=torch.cat([p.q4, p.q4[:1]])), "q4"),
            Invalid("q4 short of a chunk", call.with_(q4=p.q4[:, :8].contiguous()), "q4"),
            Invalid("q4 with narrow blocks", call.with_(q4=p.q4[:, :, :8].contiguous()), "q4"),
            Invalid("q4 with narrow words", call.with_(q4=p.q4[..., :2].contiguous()), "q4"),
            Invalid("scale4 short of a block", call.with_(scale4=p.scale4[:1]), "scale4"),
            Invalid("scale4 short of a group", call.with_(scale4=p.scale4[:, :2].contiguous()), "scale4"),
            Invalid("scale4 double", call.with_(scale4=p.scale4.double()), "scale4"),
            Invalid("zero4 short of a block", call.with_(zero4=p.zero4[:1]), "zero4"),
            Invalid("zero4 short of a group", call.with_(zero4=p.zero4[:, :2].contiguous()), "zero4"),
            Invalid("zero4 signed", call.with_(zero4=p.zero4.to(torch.int8)), "zero4"),
            Invalid("q8 signed", call.with_(q8=p.q8.to(torch.int8)), "q8"),
            Invalid("q8 of other columns", call.with_(q8=p.q8[:, :60].contiguous()), "q4|x|q"),
            Invalid("q8 of more rows than perm", call.with_(q8=torch.cat([p.q8] * 3)), "perm|q8"),
            Invalid("scale8 short of a block", call.with_(scale8=p.scale8[:1]), "scale8"),
            Invalid("scale8 with a group more", call.with_(scale8=torch.cat([p.scale8] * 2, 1)), "scale8"),
            Invalid("perm of more rows", call.with_(perm=torch.arange(60, dtype=torch.int32)), "q4"),
            Invalid("of another group size", call.with_(group_size=128), "scale4"),
        ]

    return {
        "w4a8_quantize": [
            *group_sizes(quantize),
            Invalid("x double", quantize.with_(x=torch.zeros(2, 70).double()), "x"),
            Invalid("x integer", quantize.with_(x=torch.zeros(2, 70, dtype=torch.int8)), "x"),
            Invalid("x scalar", quantize.with_(x=torch.zeros(())), "x"),
        ],
        "w4a8_pack": [
            *group_sizes(pack),
            Invalid("w double", pack.with_(w=torch.zeros(40, 70).double()), "w"),
            Invalid("w integer", pack.with_(w=torch.zeros(40, 70, dtype=torch.int8)), "w"),
            Invalid("w vector", pack.with_(w=torch.zeros(40)), "w"),
            Invalid("w three dims", pack.with_(w=torch.zeros(1, 40, 70)), "w"),
            Invalid("w too tall", pack.with_(w=torch.zeros(2**30 + 1, 0), is8=None), "w"),
            Invalid("w too wide", pack.with_(w=torch.zeros(0, 2**30 + 1), is8=None), "w"),
            Invalid("is8 dtype", pack.with_(is8=torch.zeros(40, dtype=torch.uint8)), "is8"),
            Invalid("is8 short", pack.with_(is8=torch.zeros(39, dtype=torch.bool)), "is8"),
            Invalid("is8 dims", pack.with_(is8=torch.zeros(40, 1, dtype=torch.bool)), "is8"),
            Invalid("is8 device", pack.with_(is8=torch.zeros(40, dtype=torch.bool, device="meta")), "is8"),
        ],
        "w4a8_unpack": packed(unpack),
        "w4a8_accumulate": [
            *packed(accumulate),
            Invalid("q unsigned", accumulate.with_(q=torch.zeros(2, 70, dtype=torch.uint8)), "q"),
            Invalid("q float", accumulate.with_(q=torch.zeros(2, 70)), "q"),
            Invalid("q width", accumulate.with_(q=torch.zeros(2, 72, dtype=torch.int8)), "q"),
            Invalid("q vector", accumulate.with_(q=torch.zeros(70, dtype=torch.int8)), "q"),
            Invalid("q device", accumulate.with_(q=torch.zeros(2, 70, dtype=torch.int8, device="meta")), "q|q4|q8"),
        ],
        "w4a8_linear": [
            *packed(linear),
            Invalid("x double", linear.with_(x=torch.zeros(2, 70).double()), "x"),
            Invalid("x integer", linear.with_(x=torch.zeros(2, 70, dtype=torch.int8)), "x"),
            Invalid("x width", linear.with_(x=torch.zeros(2, 69)), "x"),
            Invalid("x scalar", linear.with_(x=torch.zeros(())), "x"),
            Invalid("x device", linear.with_(x=torch.zeros(2, 70, device="meta")), "x|q4|q8"),
            Invalid("bias double", linear.with_(bias=bias.double()), "bias"),
            Invalid("bias integer", linear.with_(bias=bias.int()), "bias"),
            Invalid("bias short", linear.with_(bias=bias[:39]), "bias"),
            Invalid("bias dims", linear.with_(bias=bias[None]), "bias"),
            Invalid("bias device", linear.with_(bias=bias.to("meta")), "bias"),
            Invalid("out_dtype double", linear.with_(out_dtype=torch.float64), "out_dtype"),
            Invalid("out_dtype integer", linear.with_(out_dtype=torch.int8), "out_dtype"),
        ],
        "w4a8_salience": [
            *(
                Invalid(f"{name} {what}", salience.with_(**{name: change(t)}), name)
                for name, t in zip(("grad", "w", "w4"), salience.args, strict=True)
                for what, change in {
                    "double": Tensor.double,
                    "integer": Tensor.int,
                    "vector": lambda t: t.flatten(),
                    "four dims": lambda t: t[None, None],
                }.items()
            ),
            Invalid("grad of other rows", salience.with_(grad=torch.zeros(2, 39, 70)), "grad"),
            Invalid("grad of other columns", salience.with_(grad=torch.zeros(40, 1)), "grad"),
            Invalid("grad device", salience.with_(grad=salience.args[0].to("meta")), "grad"),
            Invalid("w4 of other rows", salience.with_(w4=torch.zeros(1, 70)), "w4"),
            Invalid("w4 device", salience.with_(w4=salience.args[2].to("meta")), "w4"),
        ],
    }


INVALID = _invalid()


def dense_linear(
    x: Tensor,
    q4: Tensor,
    scale4: Tensor,
    zero4: Tensor,
    q8: Tensor,
    scale8: Tensor,
    perm: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """w4a8_linear by dense torch operations, in the dtype of x, and without rounding x to integers.

    The op counts that rounding as the identity where it has a gradient. So this has the gradients of the op, but not
    its results, unless x is its own quantization.
    """
    w = format.unpack(Packed(q4, scale4, zero4, q8, scale8, perm), group_size).to(x.dtype)
    y = torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))
    return y.to(out_dtype or x.dtype)


FORMULAS = {"w4a8_linear": dense_linear}
