"""Inputs of lscd: shapes around the edges of sub-tiles (8), strips (16) and tiles (256), and every kind of content."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..kit import tensors
from ..kit.backends import Backend
from ..kit.calls import Call, Invalid
from ..kit.errors import ACTIVATIONS, Bounded, matmul
from . import format

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.int8)

ROWS = (0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 40)
COLS = (0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 100, 255, 256, 257, 272, 513)
TOKENS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 64, 65, 130)
SPARSITY = (0.0, 0.05, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0)
# Where zeros are, beside those of the sparsity.
PATTERNS = ("random", "empty tile", "full tile", "empty rows", "one a row")


@dataclass(frozen=True)
class Weights:
    rows: int
    cols: int
    dtype: torch.dtype = torch.float32
    sparsity: float = 0.5
    pattern: str = "random"
    kind: str = "normal"
    layout: str = "contiguous"
    seed: int = 0

    @functools.cached_property
    def dense(self) -> Tensor:
        shape = self.rows, self.cols
        w = tensors.values(shape, self.dtype, self.kind, self.seed)
        keep = torch.rand(shape, generator=tensors.generator(self.seed + 1)) >= self.sparsity
        if self.pattern == "empty tile":
            keep[-16:, :256] = False
        elif self.pattern == "full tile":
            keep[:16, :256] = True
        elif self.pattern == "empty rows":
            keep[::3] = False
        elif self.pattern == "one a row" and self.cols:
            keep[:] = False
            keep[torch.arange(self.rows), torch.arange(self.rows) * 37 % self.cols] = True
        return tensors.lay_out(w.masked_fill(~keep, 0), self.layout)

    @functools.cached_property
    def packed(self) -> format.Packed:
        """By the tests' own packer: what is tested is never its own input."""
        return format.pack(self.dense)

    @property
    def size(self) -> tuple[int, int]:
        return self.rows, self.cols


@dataclass(frozen=True)
class Linear:
    """A call of lscd_linear."""

    w: Weights
    tokens: int | tuple[int, ...] = 1
    dtype: torch.dtype = torch.float32
    kind: str = "normal"
    layout: str = "contiguous"
    bias: bool = False
    scale: bool = False
    activation: str = "none"
    seed: int = 0

    @functools.cached_property
    def x(self) -> Tensor:
        lead = self.tokens if isinstance(self.tokens, tuple) else (self.tokens,)
        return tensors.lay_out(tensors.values((*lead, self.w.cols), self.dtype, self.kind, self.seed + 2), self.layout)

    @property
    def _plain_kind(self) -> str:
        return "integers" if self.kind == "integers" else "normal"

    @functools.cached_property
    def bias_tensor(self) -> Tensor | None:
        return tensors.values((self.w.rows,), self.dtype, self._plain_kind, self.seed + 3) if self.bias else None

    @functools.cached_property
    def scale_tensor(self) -> Tensor | None:
        return tensors.values((self.w.rows,), torch.float32, self._plain_kind, self.seed + 4) if self.scale else None

    def run(self, backend: Backend, x: Tensor | None = None, packed: format.Packed | None = None) -> Tensor:
        return backend.run(
            "lscd_linear",
            self.x if x is None else x,
            *(packed or self.w.packed),
            *self.w.size,
            self.bias_tensor,
            self.scale_tensor,
            activation=self.activation,
        )

    def exact(self, unit: float, x: Tensor | None = None, w: Tensor | None = None) -> Bounded:
        """The result by F.linear's formula on the dense matrix, with its bound."""
        b = matmul(self.x if x is None else x, self.w.dense if w is None else w, unit)
        return b.times(self.scale_tensor).plus(self.bias_tensor).activated(self.activation)


def _sizes(options: tuple[int, ...], backend: Backend | None, limit: int) -> st.SearchStrategy[int]:
    return st.sampled_from([n for n in options if n <= limit] if backend and backend.slow else options)


SEEDS = st.integers(0, 2**20)


def weights(
    backend: Backend | None = None,
    *,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    kinds: tuple[str, ...] = tensors.KINDS,
    layouts: tuple[str, ...] = tensors.LAYOUTS,
) -> st.SearchStrategy[Weights]:
    return st.builds(
        Weights,
        rows=_sizes(ROWS, backend, 33),
        cols=_sizes(COLS, backend, 272),
        dtype=st.sampled_from(dtypes),
        sparsity=st.sampled_from(SPARSITY),
        pattern=st.sampled_from(PATTERNS),
        kind=st.sampled_from(kinds),
        layout=st.sampled_from(layouts),
        seed=SEEDS,
    )


@st.composite
def linears(
    draw: st.DrawFn,
    backend: Backend | None = None,
    *,
    kinds: tuple[str, ...] = ("normal", "integers", "extreme"),
    activations: tuple[str, ...] = tuple(ACTIVATIONS),
    plain: bool = False,
) -> Linear:
    """Calls of lscd_linear; plain ones have no bias, scale or activation."""
    dtype = draw(st.sampled_from(FLOATS))
    tokens = _sizes(TOKENS, backend, 17)
    lead = st.tuples(st.sampled_from((1, 2, 3)), st.sampled_from((0, 1, 2, 5)))
    return Linear(
        w=draw(weights(backend, dtypes=(dtype, torch.int8), kinds=kinds, layouts=("contiguous",))),
        tokens=draw(tokens if plain else st.one_of(tokens, lead, st.just(()))),
        dtype=dtype,
        kind=draw(st.sampled_from(kinds)),
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        bias=not plain and draw(st.booleans()),
        scale=not plain and draw(st.booleans()),
        activation="none" if plain else draw(st.sampled_from(activations)),
        seed=draw(SEEDS),
    )


# Corrupt contents of packed tensors of the right shapes -----------------------------------------------------------

BAD_OFFSETS = (-1, 1, 15, -16, 16, 4096, -(2**63), 2**63 - 1, 2**31, 2**60)


def _flip_bits(draw: st.DrawFn, packed: format.Packed) -> format.Packed:
    values, bitmap, offsets = packed
    words = bitmap.clone().view(-1)
    for _ in range(draw(st.integers(1, 3))):
        words[draw(st.integers(0, len(words) - 1))] ^= format.signed(1 << draw(st.integers(0, 63)))
    return values, words.view_as(bitmap), offsets


def _fill_word(draw: st.DrawFn, packed: format.Packed) -> format.Packed:
    values, bitmap, offsets = packed
    words = bitmap.clone().view(-1)
    words[draw(st.integers(0, len(words) - 1))] = draw(st.sampled_from((0, -1)))
    return values, words.view_as(bitmap), offsets


def _move_offset(draw: st.DrawFn, packed: format.Packed) -> format.Packed:
    values, bitmap, offsets = packed
    moved = offsets.clone()
    at = draw(st.integers(0, len(moved) - 1))
    by = draw(st.sampled_from(BAD_OFFSETS))
    moved[at] = draw(st.sampled_from((by, format.signed((int(moved[at]) + by) % 2**64))))
    return values, bitmap, moved


def _cut_values(draw: st.DrawFn, packed: format.Packed) -> format.Packed:
    """Shortens values, with or without the last offset."""
    values, bitmap, offsets = packed
    cut = draw(st.integers(1, max(1, len(values) - format.PAD)))
    short, moved = values[: max(format.PAD, len(values) - cut)].clone(), offsets.clone()
    if draw(st.booleans()):
        moved[-1] = len(short) - format.PAD
    return short, bitmap, moved


@st.composite
def damaged(draw: st.DrawFn, backend: Backend | None = None) -> tuple[Weights, format.Packed]:
    """Weights and their packed tensors after some damage (that may have done no harm)."""
    rows = draw(st.sampled_from((1, 8, 15, 16, 17, 40)))
    cols = draw(st.sampled_from((1, 9, 16, 200, 256, 257, 520)))
    w = Weights(rows, cols, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SPARSITY)), seed=draw(SEEDS))
    packed = w.packed
    for damage in draw(st.lists(st.sampled_from((_flip_bits, _fill_word, _move_offset, _cut_values)), max_size=3)):
        packed = damage(draw, packed)
    return w, packed


# For the walks over all ops ---------------------------------------------------------------------------------------

SMALL = st.builds(
    Weights,
    rows=st.sampled_from((1, 8, 17)),
    cols=st.sampled_from((1, 16, 33, 257)),
    dtype=st.sampled_from(DTYPES),
    sparsity=st.sampled_from((0.0, 0.6, 1.0)),
    layout=st.sampled_from(tensors.LAYOUTS),
    kind=st.sampled_from(("normal", "integers")),
    seed=SEEDS,
)


@st.composite
def pack_calls(draw: st.DrawFn) -> Call:
    w = draw(SMALL)
    dtype = draw(st.sampled_from((None, *FLOATS))) if w.dtype in FLOATS else None
    return Call("lscd_pack", (w.dense,), {"dtype": dtype})


@st.composite
def unpack_calls(draw: st.DrawFn) -> Call:
    w = draw(SMALL)
    scale = torch.rand(w.rows) if draw(st.booleans()) else None
    return Call("lscd_unpack", (*w.packed, *w.size, scale))


@st.composite
def linear_calls(draw: st.DrawFn) -> Call:
    w = draw(SMALL)
    case = Linear(
        w,
        tokens=draw(st.sampled_from(((), 2, (2, 3)))),
        dtype=draw(st.sampled_from(FLOATS)) if w.dtype == torch.int8 else w.dtype,
        kind="normal",
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        bias=draw(st.booleans()),
        scale=draw(st.booleans()),
        activation=draw(st.sampled_from(tuple(ACTIVATIONS))),
    )
    grad = draw(st.booleans())
    x = case.x.detach().requires_grad_(grad)
    bias = None if case.bias_tensor is None else case.bias_tensor.requires_grad_(grad)
    args = (x, *w.packed, *w.size, bias, case.scale_tensor)
    return Call("lscd_linear", args, {"activation": case.activation})


CALLS = {"lscd_pack": pack_calls(), "lscd_unpack": unpack_calls(), "lscd_linear": linear_calls()}


def _invalid() -> dict[str, list[Invalid]]:
    w = Weights(17, 33, torch.bfloat16)
    values, bitmap, offsets = w.packed
    ints = Weights(17, 33, torch.int8, kind="integers")
    pack = Call("lscd_pack", (w.dense,))
    unpack = Call("lscd_unpack", (*w.packed, *w.size, None))
    linear = Call("lscd_linear", (torch.zeros(2, 33, dtype=torch.bfloat16), *w.packed, *w.size, None, None))
    scale, bias = torch.ones(17), torch.ones(17, dtype=torch.bfloat16)

    def packed(call: Call) -> list[Invalid]:
        """What lscd_unpack and lscd_linear refuse alike."""
        return [
            Invalid("values dtype", call.with_(values=values.double()), "values"),
            Invalid("values dims", call.with_(values=values[None]), "values"),
            Invalid("values short", call.with_(values=values[:63]), "values"),
            Invalid("bitmap dtype", call.with_(bitmap=bitmap.int()), "bitmap"),
            Invalid("bitmap dims", call.with_(bitmap=bitmap.flatten()), "bitmap"),
            Invalid("bitmap shape", call.with_(bitmap=bitmap[:1]), "bitmap"),
            Invalid("bitmap of more columns", call.with_(cols=49), "bitmap|x"),
            Invalid("values strided", call.with_(values=torch.stack([values, values], 1)[:, 0]), "values"),
            Invalid("bitmap strided", call.with_(bitmap=bitmap.transpose(0, 2).contiguous().transpose(0, 2)), "bitmap"),
            Invalid("offsets strided", call.with_(offsets=torch.stack([offsets, offsets], 1)[:, 0]), "offsets"),
            Invalid("bitmap device", call.with_(bitmap=bitmap.to("meta")), "bitmap"),
            Invalid("offsets dtype", call.with_(offsets=offsets.float()), "offsets"),
            Invalid("offsets shape", call.with_(offsets=offsets[:-1]), "offsets"),
            Invalid("offsets device", call.with_(offsets=offsets.to("meta")), "offsets"),
            Invalid("rows negative", call.with_(rows=-1), "rows"),
            Invalid("cols negative", call.with_(cols=-1), "cols"),
            Invalid("rows too many", call.with_(rows=2**62), "rows"),
            Invalid("scale dtype", call.with_(scale=scale.half()), "scale"),
            Invalid("scale shape", call.with_(scale=scale[:-1]), "scale"),
            Invalid("scale dims", call.with_(scale=scale[None]), "scale"),
            Invalid("scale strided", call.with_(scale=scale[:1].expand(17)), "scale"),
            Invalid("scale device", call.with_(scale=scale.to("meta")), "scale"),
        ]

    return {
        "lscd_pack": [
            Invalid("w dtype", pack.with_(w=w.dense.double()), "w"),
            Invalid("w integer", pack.with_(w=w.dense.int()), "w"),
            Invalid("w vector", pack.with_(w=w.dense[0]), "w"),
            Invalid("w three dims", pack.with_(w=w.dense[None]), "w"),
            Invalid("w too tall", pack.with_(w=w.dense.new_empty(2**31 + 1, 0)), "w"),
            Invalid("w too wide", pack.with_(w=w.dense.new_empty(0, 2**31 + 1)), "w"),
            Invalid("dtype integer", pack.with_(dtype=torch.int8), "dtype"),
            Invalid("dtype double", pack.with_(dtype=torch.float64), "dtype"),
            Invalid("dtype of integers", pack.with_(w=ints.dense, dtype=torch.float32), "dtype"),
        ],
        "lscd_unpack": packed(unpack),
        "lscd_linear": [
            *packed(linear),
            Invalid("x dtype", linear.with_(x=torch.zeros(2, 33, dtype=torch.float64)), "x"),
            Invalid("x integer", linear.with_(x=torch.zeros(2, 33, dtype=torch.int8)), "x"),
            Invalid("x of another float", linear.with_(x=torch.zeros(2, 33)), "values"),
            Invalid("x width", linear.with_(x=torch.zeros(2, 32, dtype=torch.bfloat16)), "x"),
            Invalid("x scalar", linear.with_(x=torch.zeros((), dtype=torch.bfloat16)), "x"),
            Invalid("x device", linear.with_(x=torch.zeros(2, 33, dtype=torch.bfloat16, device="meta")), "x"),
            Invalid("bias dtype", linear.with_(bias=bias.float()), "bias"),
            Invalid("bias shape", linear.with_(bias=bias[:1]), "bias"),
            Invalid("bias dims", linear.with_(bias=bias[None]), "bias"),
            Invalid("bias device", linear.with_(bias=bias.to("meta")), "bias"),
            Invalid("activation unknown", linear.with_(activation="tanh"), "activation"),
            Invalid("activation empty", linear.with_(activation=""), "activation"),
        ],
    }


INVALID = _invalid()


def dense_linear(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    rows: int,
    cols: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    activation: str = "none",
) -> Tensor:
    """lscd_linear by dense torch operations, in the dtype of x."""
    w = torch.ops.effk.lscd_unpack(values, bitmap, offsets, rows, cols).to(x.dtype)
    y = torch.nn.functional.linear(x, w)
    if scale is not None:
        y = y * scale.to(x.dtype)
    if bias is not None:
        y = y + bias
    return ACTIVATIONS[activation][0](y)


FORMULAS = {"lscd_linear": dense_linear}
