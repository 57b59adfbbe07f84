"""Inputs of lora: layers of shapes around tiles (16, 32, 64), any ranks, lists of adapters with all that may be in
them, and every kind of content."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..kit import tensors
from ..kit.backends import Backend
from ..kit.calls import Call, Invalid
from ..kit.errors import FLUSH, UNDERFLOW, Bounded, finite_magnitude, matmul, roundings

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INDICES = (torch.int32, torch.int64)

ROWS = (0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 130)
COLS = (0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 100, 127, 129, 258)
RANKS = (0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 33)
ADAPTERS = (0, 1, 2, 5)
TOKENS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33)
# Sums of a few of them, in any order, are exact in float64; some sums are 0.
GATES = (0.0, 1.0, -1.0, 0.5, -0.5, 0.7, -0.7, -1.3, 3.0)
SCALES = (1.0, 1.0, 0.0, -1.0, 2.0, 0.3)
# contiguous; rows with something between them; all tensors slices of one
LAYOUTS = ("contiguous", "offset", "buffer")
SEEDS = st.integers(0, 2**20)

Pairs = tuple[tuple[int, float], ...]  # of adapters' numbers and gates


def pack(made: list[Tensor], layout: str) -> list[Tensor]:
    """The same contents: each on its own, as rows of wider ones, or all as slices of one buffer, at odd offsets."""
    if layout != "buffer":
        return [tensors.lay_out(t, layout) for t in made]
    dtype = made[0].dtype if made else torch.float32
    buffer = torch.full((sum(t.numel() + 1 for t in made) + 1,), torch.nan, dtype=dtype)
    views, at = [], 1
    for t in made:
        views.append(buffer[at : at + t.numel()].view(t.shape).copy_(t))
        at += t.numel() + 1
    return views


def as_ids(ids: list[int], index: torch.dtype, layout: str) -> Tensor:
    return tensors.lay_out(torch.tensor(ids, dtype=index), "strided" if layout == "offset" else "contiguous")


def factors(pairs: Pairs, scale: float) -> dict[int, float]:
    """Of each adapter that takes part: its gates' sum times scale, as float32."""
    sums: dict[int, float] = {}
    for adapter, gate in pairs:
        if adapter >= 0:
            sums[adapter] = sums.get(adapter, 0.0) + float(torch.tensor(gate, dtype=torch.float32))
    rounded = {e: float(torch.tensor(total * scale, dtype=torch.float32)) for e, total in sorted(sums.items())}
    return {e: f for e, f in rounded.items() if f != 0}


def merged(source: Tensor, a: Tensor, b: Tensor, factor: dict[int, float], ranks: list[int], unit: float) -> Bounded:
    """source + sum over adapters of factor * b a, in float64, and what float32 may lose.

    Of the bound:
    - a term factor * b * a is rounded twice, in whatever order the three meet, or once with the sum of its adapter;
    - a tree of n terms and the source has n additions, whatever its form, and each leaf goes through at most all;
    - the first of the two products may underflow, and its loss is multiplied by the third number;
    - bfloat16 dot instructions take subnormal inputs for zero and flush subnormal results: each number may lose FLUSH,
      times its partners, and each result FLUSH, before the factor or after it.
    Unscaled sums may overflow where scaled ones don't.
    """
    value = source.double()
    size, peak = value.abs(), finite_magnitude(source)
    lost, terms = torch.zeros_like(value), 0
    for e, f in factor.items():
        r = min(ranks[e], a.shape[1])
        a64, b64, g = a[e, :r].double(), b[e, :, :r].double(), abs(f)
        value = value + f * (b64 @ a64)
        size = size + g * (b64.abs() @ a64.abs())
        a_sum, b_sum = a64.abs().sum(0), b64.abs().sum(1, keepdim=True)
        lost = lost + UNDERFLOW * (r * (1 + g) + a_sum)
        if source.dtype == torch.bfloat16:
            lost = lost + FLUSH * (g * (a_sum + b_sum + 2 * r) + 2 * r + 1)
        finite = max(1.0, g) if math.isfinite(g) else 1.0
        peak = peak + finite * (finite_magnitude(b[e, :, :r]) @ finite_magnitude(a[e, :r]).clamp(min=1))
        terms += r
    if terms == 0:
        return Bounded(value, torch.zeros_like(value), torch.zeros_like(value), unit)
    return Bounded(value, roundings(terms + 2, unit) * size + lost, peak, unit)


@dataclass(frozen=True)
class Merge:
    """A call of lora_merge_, lora_unmerge_ or, with other pairs beside its own, lora_switch_."""

    shapes: tuple[tuple[int, int, int], ...]  # of layers: rows, cols, rank
    adapters: int = 3
    pairs: Pairs = ()
    dtype: torch.dtype = torch.float32
    kind: str = "normal"
    layout: str = "contiguous"
    with_base: bool = True
    ranks: tuple[int, ...] | None = None
    index: torch.dtype = torch.int64
    scale: float = 1.0
    seed: int = 0

    def _made(self, shapes: list[tuple[int, ...]], seed: int) -> list[Tensor]:
        return [tensors.values(s, self.dtype, self.kind, self.seed + seed + 16 * i) for i, s in enumerate(shapes)]

    @functools.cached_property
    def w(self) -> list[Tensor]:
        return pack(self._made([(n, k) for n, k, _ in self.shapes], 1), self.layout)

    @functools.cached_property
    def base(self) -> list[Tensor]:
        """What w is made from where with_base; there whether used or not."""
        return pack(self._made([(n, k) for n, k, _ in self.shapes], 2), self.layout)

    @functools.cached_property
    def a(self) -> list[Tensor]:
        made = self._made([(self.adapters, r, k) for _, k, r in self.shapes], 3)
        return pack(made, "buffer" if self.layout == "buffer" else "contiguous")

    @functools.cached_property
    def b(self) -> list[Tensor]:
        made = self._made([(self.adapters, n, r) for n, _, r in self.shapes], 4)
        return pack(made, "buffer" if self.layout == "buffer" else "contiguous")

    def ids(self, pairs: Pairs | None = None) -> Tensor:
        return as_ids([e for e, _ in (self.pairs if pairs is None else pairs)], self.index, self.layout)

    def gates(self, pairs: Pairs | None = None) -> Tensor:
        gates = torch.tensor([g for _, g in (self.pairs if pairs is None else pairs)], dtype=torch.float32)
        return tensors.lay_out(gates, "strided" if self.layout == "offset" else "contiguous")

    @property
    def ranks_tensor(self) -> Tensor | None:
        return None if self.ranks is None else as_ids(list(self.ranks), self.index, self.layout)

    @property
    def used(self) -> list[int]:
        return [2**30] * self.adapters if self.ranks is None else list(self.ranks)

    @property
    def size(self) -> int:
        return sum(n * k for n, k, _ in self.shapes)

    def active(self, pairs: Pairs | None = None) -> dict[int, float]:
        found = factors(self.pairs if pairs is None else pairs, self.scale)
        return {e: f for e, f in found.items() if self.used[e] > 0}

    def _rest(self, with_base: bool | None) -> tuple[list[Tensor] | None, Tensor | None]:
        return (self.base if (self.with_base if with_base is None else with_base) else None), self.ranks_tensor

    def merge(self, backend: Backend, w: list[Tensor] | None = None, *, undo: bool = False) -> list[Tensor]:
        op = "lora_unmerge_" if undo else "lora_merge_"
        w = self.w if w is None else w
        rest = self._rest(None)
        return backend.run(op, w, self.a, self.b, self.ids(), self.gates(), *rest, scale=self.scale)

    def unmerge(self, backend: Backend, w: list[Tensor] | None = None) -> list[Tensor]:
        return self.merge(backend, w, undo=True)

    def switch(
        self, backend: Backend, old: Pairs, new: Pairs | None = None, w: list[Tensor] | None = None
    ) -> list[Tensor]:
        """From old to new; to the pairs of this by default."""
        lists = (self.ids(old), self.gates(old), self.ids(new), self.gates(new))
        w = self.w if w is None else w
        return backend.run("lora_switch_", w, self.a, self.b, *lists, *self._rest(None), scale=self.scale)

    def exact(
        self, unit: float, pairs: Pairs | None = None, w: list[Tensor] | None = None, *, with_base: bool | None = None
    ) -> list[Bounded]:
        """What w becomes by merging pairs, for each layer."""
        use_base = self.with_base if with_base is None else with_base
        sources = self.base if use_base else (self.w if w is None else w)
        factor = self.active(pairs)
        return [merged(s, a, b, factor, self.used, unit) for s, a, b in zip(sources, self.a, self.b, strict=True)]


def negative(pairs: Pairs) -> Pairs:
    return tuple((e, -g) for e, g in pairs)


@dataclass(frozen=True)
class Apply:
    """A call of lora_apply."""

    rows: int
    cols: int
    rank: int
    adapters: int = 3
    lead: tuple[int, ...] = (3,)
    pairs: int = 2  # of a token
    dtype: torch.dtype = torch.float32
    kind: str = "normal"
    layout: str = "contiguous"
    with_y: bool = False
    ranks: tuple[int, ...] | None = None
    index: torch.dtype = torch.int64
    scale: float = 1.0
    none: float = 0.2  # the chance of -1
    seed: int = 0

    def _made(self, shape: tuple[int, ...], seed: int, layout: str) -> Tensor:
        return tensors.lay_out(tensors.values(shape, self.dtype, self.kind, self.seed + seed), layout)

    @functools.cached_property
    def x(self) -> Tensor:
        return self._made((*self.lead, self.cols), 1, self.layout)

    @functools.cached_property
    def y(self) -> Tensor | None:
        return self._made((*self.lead, self.rows), 2, self.layout) if self.with_y else None

    @functools.cached_property
    def a(self) -> Tensor:
        return self._made((self.adapters, self.rank, self.cols), 3, "contiguous")

    @functools.cached_property
    def b(self) -> Tensor:
        return self._made((self.adapters, self.rows, self.rank), 4, "contiguous")

    @functools.cached_property
    def ids(self) -> Tensor:
        g, shape = tensors.generator(self.seed + 5), (*self.lead, self.pairs)
        ids = torch.randint(0, max(1, self.adapters), shape, generator=g)
        none = (torch.rand(shape, generator=g) < self.none) | (self.adapters == 0)
        return tensors.lay_out(torch.where(none, -1, ids).to(self.index), self.layout)

    @functools.cached_property
    def gates(self) -> Tensor:
        picks = torch.randint(0, len(GATES), (*self.lead, self.pairs), generator=tensors.generator(self.seed + 6))
        return tensors.lay_out(torch.tensor(GATES)[picks], self.layout)

    @property
    def ranks_tensor(self) -> Tensor | None:
        return None if self.ranks is None else as_ids(list(self.ranks), self.index, self.layout)

    @property
    def used(self) -> list[int]:
        return [self.rank] * self.adapters if self.ranks is None else [min(r, self.rank) for r in self.ranks]

    @property
    def tokens(self) -> int:
        return math.prod(self.lead)

    def run(self, backend: Backend, **changed: Tensor | None) -> Tensor:
        """With other tensors in the place of some."""
        names = ("x", "a", "b", "ids", "gates", "y")
        args = [changed.get(name, getattr(self, name)) for name in names]
        return backend.run("lora_apply", *args, changed.get("ranks", self.ranks_tensor), scale=self.scale)

    def exact(self, unit: float) -> Bounded:
        """y + sum over adapters of factor * b (a x), in float64, and what float32 may lose.

        Of the bound:
        - a x is a product with an error of its own, which b and the factor multiply;
        - a term factor * b * (a x) is rounded twice, and goes through at most as many additions as there are terms;
        - the first of the two products may underflow, and its loss is multiplied by the third number.
        """
        x = self.x.reshape(self.tokens, self.cols)
        y = torch.zeros(self.tokens, self.rows) if self.y is None else self.y.reshape(self.tokens, self.rows)
        factor = self.factor()
        value = y.double()
        size, peak = value.abs(), finite_magnitude(y)
        error = torch.zeros_like(value)
        terms = torch.zeros(self.tokens, 1, dtype=torch.float64)
        for e, r in enumerate(self.used):
            inner = matmul(x, self.a[e, :r], unit)
            b = self.b[e, :, :r].double()
            f, g = factor[:, e, None], factor[:, e, None].abs()
            active = (f != 0) & (r > 0)
            lost = UNDERFLOW * (r * (1 + g) + b.abs().sum(1))
            inner_size = inner.value.abs() + inner.error
            of_peak = inner.peak @ finite_magnitude(b).clamp(min=1).T * g.clamp(min=1)
            value = torch.where(active, value + f * (inner.value @ b.T), value)
            size = torch.where(active, size + g * (inner_size @ b.abs().T), size)
            error = torch.where(active, error + g * (inner.error @ b.abs().T) + lost, error)
            peak = torch.where(active, peak + of_peak, peak)
            terms = torch.where(active, terms + r, terms)
        error = torch.where(terms > 0, error + roundings(terms + 2, unit) * size, 0.0)
        peak = torch.where(terms > 0, peak, 0.0)  # nothing is computed
        shape = (*self.lead, self.rows)
        return Bounded(value.reshape(shape), error.reshape(shape), peak.reshape(shape), unit)

    def factor(self) -> Tensor:
        """[T, E] of float32 as float64."""
        out = torch.zeros(self.tokens, max(1, self.adapters), dtype=torch.float64)
        ids, gates = (t.reshape(self.tokens, self.pairs).tolist() for t in (self.ids, self.gates))
        for t, pairs in enumerate(zip(ids, gates, strict=True)):
            for e, f in factors(tuple(zip(*pairs, strict=True)), self.scale).items():
                out[t, e] = f
        return out


def _sizes(options: tuple[int, ...], backend: Backend | None, limit: int) -> st.SearchStrategy[int]:
    """Those that aren't too large for an interpreter or an emulator."""
    small = backend is not None and (backend.slow or backend.name == "simt")
    return st.sampled_from([n for n in options if not small or n <= limit])


def pairs_of(adapters: int, most: int = 6) -> st.SearchStrategy[Pairs]:
    """Adapters may come more than once, cancel, or be none."""
    ids = st.integers(-1, adapters - 1)
    return st.lists(st.tuples(ids, st.sampled_from(GATES)), max_size=most).map(tuple)


def ranks_of(adapters: int, rank: int) -> st.SearchStrategy[tuple[int, ...] | None]:
    return st.one_of(st.none(), st.tuples(*[st.integers(0, rank)] * adapters))


@st.composite
def merges(
    draw: st.DrawFn,
    backend: Backend | None = None,
    *,
    kinds: tuple[str, ...] = ("normal", "integers", "extreme"),
    base: bool | None = None,
    layers: int = 4,
) -> Merge:
    shape = st.tuples(_sizes(ROWS, backend, 33), _sizes(COLS, backend, 65), _sizes(RANKS, backend, 17))
    shapes = tuple(draw(st.lists(shape, max_size=min(layers, 2) if backend and backend.slow else layers)))
    adapters = draw(st.sampled_from(ADAPTERS))
    return Merge(
        shapes=shapes,
        adapters=adapters,
        pairs=draw(pairs_of(adapters)),
        dtype=draw(st.sampled_from(FLOATS)),
        kind=draw(st.sampled_from(kinds)),
        layout=draw(st.sampled_from(LAYOUTS)),
        with_base=draw(st.booleans()) if base is None else base,
        ranks=draw(ranks_of(adapters, max((r for _, _, r in shapes), default=0))),
        index=draw(st.sampled_from(INDICES)),
        scale=draw(st.sampled_from(SCALES)),
        seed=draw(SEEDS),
    )


@st.composite
def applies(
    draw: st.DrawFn,
    backend: Backend | None = None,
    *,
    kinds: tuple[str, ...] = ("normal", "integers", "extreme"),
    leads: bool = True,
    least: int = 0,
) -> Apply:
    """Calls of lora_apply.

    Args:
        leads: also other leading sizes of x than one.
        least: tokens, where there is one leading size.
    """
    tokens = _sizes(tuple(t for t in TOKENS if t >= least), backend, 9).map(lambda t: (t,))
    lead = st.tuples(st.sampled_from((1, 2, 3)), st.sampled_from((0, 1, 2, 5)))
    rank, adapters = draw(_sizes(RANKS, backend, 17)), draw(st.sampled_from(ADAPTERS))
    return Apply(
        rows=draw(_sizes(ROWS, backend, 33)),
        cols=draw(_sizes(COLS, backend, 65)),
        rank=rank,
        adapters=adapters,
        lead=draw(st.one_of(tokens, lead, st.just(())) if leads else tokens),
        pairs=draw(st.sampled_from((0, 1, 2, 3, 6))),
        dtype=draw(st.sampled_from(FLOATS)),
        kind=draw(st.sampled_from(kinds)),
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        with_y=draw(st.booleans()),
        ranks=draw(ranks_of(adapters, rank)),
        index=draw(st.sampled_from(INDICES)),
        scale=draw(st.sampled_from(SCALES)),
        none=draw(st.sampled_from((0.0, 0.2, 0.9))),
        seed=draw(SEEDS),
    )


# For the walks over all ops ------------------------------------------------------------------------------------------


@st.composite
def _small(draw: st.DrawFn) -> Merge:
    shape = st.tuples(st.sampled_from((1, 17, 20)), st.sampled_from((1, 16, 33)), st.sampled_from((1, 2, 5)))
    adapters = draw(st.sampled_from((1, 3)))
    return Merge(
        shapes=tuple(draw(st.lists(shape, min_size=1, max_size=3))),
        adapters=adapters,
        pairs=((0, 0.7), *draw(pairs_of(adapters, 2))),
        dtype=draw(st.sampled_from(FLOATS)),
        layout=draw(st.sampled_from(LAYOUTS)),
        with_base=draw(st.booleans()),
        ranks=draw(ranks_of(adapters, 1)),
        index=draw(st.sampled_from(INDICES)),
        scale=draw(st.sampled_from((1.0, -0.3))),
        seed=draw(SEEDS),
    )


@st.composite
def merge_calls(draw: st.DrawFn, op: str) -> Call:
    case = draw(_small())
    lists: tuple[Tensor, ...] = (case.ids(), case.gates())
    if op == "lora_switch_":
        old = draw(pairs_of(case.adapters, 2))
        lists = (case.ids(old), case.gates(old), *lists)
    args = (case.w, case.a, case.b, *lists, case.base if case.with_base else None, case.ranks_tensor)
    while draw(st.booleans()) and args[-1] is None:  # said or left out
        args = args[:-1]
    return Call(op, args, {} if case.scale == 1 else {"scale": case.scale})


@st.composite
def apply_calls(draw: st.DrawFn) -> Call:
    adapters = draw(st.sampled_from((1, 3)))
    case = Apply(
        rows=draw(st.sampled_from((1, 17))),
        cols=draw(st.sampled_from((1, 33))),
        rank=draw(st.sampled_from((1, 5))),
        adapters=adapters,
        lead=draw(st.sampled_from(((), (2,), (2, 3)))),
        pairs=draw(st.sampled_from((1, 2))),
        dtype=draw(st.sampled_from(FLOATS)),
        layout=draw(st.sampled_from(tensors.LAYOUTS)),
        with_y=draw(st.booleans()),
        ranks=draw(ranks_of(adapters, 1)),
        index=draw(st.sampled_from(INDICES)),
        seed=draw(SEEDS),
    )
    grad = draw(st.booleans())
    x, a, b, gates, y = (
        None if t is None else t.detach().requires_grad_(grad) for t in (case.x, case.a, case.b, case.gates, case.y)
    )
    return Call(
        "lora_apply", (x, a, b, case.ids, gates, y, case.ranks_tensor), {"scale": draw(st.sampled_from((1, 0.3)))}
    )


CALLS = {
    "lora_merge_": merge_calls("lora_merge_"),
    "lora_unmerge_": merge_calls("lora_unmerge_"),
    "lora_switch_": merge_calls("lora_switch_"),
    "lora_apply": apply_calls(),
}


def _in_list(call: Call, name: str, t: Tensor, at: int = 1) -> Call:
    """Another tensor in one of the lists of a call."""
    names = ("w", "a", "b")
    given = call.args[names.index(name)] if name in names else call.kwargs[name]
    return call.with_(**{name: [t if i == at else old for i, old in enumerate(given)]})


def _invalid() -> dict[str, list[Invalid]]:
    case = Merge(((20, 33, 4), (17, 16, 6)), 3, ((0, 1.0), (2, 0.5)), ranks=(4, 0, 2))
    layers, pairs = (case.w, case.a, case.b), (case.ids(), case.gates())
    rest = {"base": case.base, "ranks": case.ranks_tensor}
    token = Apply(20, 33, 4, 3, (2,), with_y=True, ranks=(4, 0, 2))
    apply = Call(
        "lora_apply", (token.x, token.a, token.b, token.ids, token.gates), {"y": token.y, "ranks": token.ranks_tensor}
    )

    def lists(call: Call, ids: str, gates: str, shape: tuple[int, ...]) -> list[Invalid]:
        """What all refuse of ids and gates. Of one that is elsewhere than the rest, either may be meant."""
        good_ids, good_gates = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
        many = torch.zeros(*shape[:-1], 1025)
        elsewhere = "|".join({ids, gates, "old_ids", "new_ids", "x", "ids", "ranks", r"w\[0\]"})
        return [
            Invalid(f"{ids} float", call.with_(**{ids: good_ids.float()}), ids),
            Invalid(f"{ids} of 16 bits", call.with_(**{ids: good_ids.short()}), ids),
            Invalid(f"{ids} scalar", call.with_(**{ids: torch.tensor(0), gates: torch.tensor(0.0)}), ids),
            Invalid(f"{ids} dims", call.with_(**{ids: good_ids[None], gates: good_gates[None]}), ids),
            Invalid(f"{ids} too many", call.with_(**{ids: many.long(), gates: many}), ids),
            Invalid(f"{ids} device", call.with_(**{ids: good_ids.to("meta")}), elsewhere),
            Invalid(f"{gates} double", call.with_(**{gates: good_gates.double()}), gates),
            Invalid(f"{gates} half", call.with_(**{gates: good_gates.half()}), gates),
            Invalid(f"{gates} short", call.with_(**{gates: good_gates[..., 1:]}), gates),
            Invalid(f"{gates} dims", call.with_(**{gates: good_gates[None]}), gates),
            Invalid(f"{gates} device", call.with_(**{gates: good_gates.to("meta")}), elsewhere),
        ]

    def ranks(call: Call) -> list[Invalid]:
        good = torch.zeros(3, dtype=torch.int64)
        return [
            Invalid("ranks float", call.with_(ranks=good.float()), "ranks"),
            Invalid("ranks of 8 bits", call.with_(ranks=good.to(torch.uint8)), "ranks"),
            Invalid("ranks short", call.with_(ranks=good[:2]), "ranks"),
            Invalid("ranks dims", call.with_(ranks=good[None]), "ranks"),
            Invalid("ranks device", call.with_(ranks=good.to("meta")), "ranks|ids"),
        ]

    def merge(op: str) -> list[Invalid]:
        switch = op == "lora_switch_"
        call = Call(op, (*layers, *pairs, *(pairs if switch else ())), rest)
        w, a, b = (part[1] for part in layers)
        wide = torch.zeros(17, 32)
        return [
            *(
                [*lists(call, "old_ids", "old_gates", (2,)), *lists(call, "new_ids", "new_gates", (2,))]
                if switch
                else lists(call, "ids", "gates", (2,))
            ),
            *ranks(call),
            Invalid("a short", call.with_(a=case.a[:1]), "a"),
            Invalid("b long", call.with_(b=[*case.b, case.b[0]]), "b"),
            Invalid("base short", call.with_(base=case.base[:1]), "base"),
            Invalid("base empty", call.with_(base=[]), "base"),
            Invalid("w double", _in_list(call, "w", w.double()), r"w\[1\]"),
            Invalid("w of another dtype", _in_list(call, "w", w.half()), r"w\[1\]"),
            Invalid("w integer", _in_list(call, "w", w.int(), 0), r"w\[0\]"),
            Invalid("w vector", _in_list(call, "w", w[0]), r"w\[1\]"),
            Invalid("w three dims", _in_list(call, "w", w[None]), r"w\[1\]"),
            Invalid("w transposed", _in_list(call, "w", torch.zeros(16, 17).T), r"w\[1\]"),
            Invalid("w every other column", _in_list(call, "w", wide[:, ::2]), r"w\[1\]"),
            Invalid("w of rows that overlap", _in_list(call, "w", torch.zeros(400).as_strided((17, 16), (15, 1))), "w"),
            Invalid("w of one row", _in_list(call, "w", torch.zeros(16).expand(17, 16)), r"w\[1\]"),
            Invalid("w device", _in_list(call, "w", w.to("meta")), r"w\[1\]|a\[1\]"),
            Invalid("w of other rows", _in_list(call, "w", torch.zeros(18, 16)), r"b\[1\]"),
            Invalid("w of other columns", _in_list(call, "w", torch.zeros(17, 15)), r"a\[1\]"),
            Invalid("w too tall", _in_list(call, "w", torch.zeros(2**30 + 1, 0)), r"w\[1\]"),
            Invalid("w too wide", _in_list(call, "w", torch.zeros(0, 2**30 + 1)), r"w\[1\]"),
            *(
                Invalid(f"{name} {what}", _in_list(call, name, change(t)), rf"{name}\[1\]")
                for name, t in (("a", a), ("b", b))
                for what, change in {
                    "double": Tensor.double,
                    "of another dtype": Tensor.bfloat16,
                    "integer": Tensor.int,
                    "matrix": lambda t: t[0],
                    "four dims": lambda t: t[None],
                    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
                    "transposed": lambda t: t.mT.contiguous().mT,
                }.items()
            ),
            Invalid("a device", _in_list(call, "a", a.to("meta")), r"a\[1\]"),
            Invalid("b device", _in_list(call, "b", b.to("meta")), r"b\[1\]"),
            Invalid("a of other columns", _in_list(call, "a", torch.zeros(3, 6, 15)), r"a\[1\]"),
            Invalid("b of other rows", _in_list(call, "b", torch.zeros(3, 18, 6)), r"b\[1\]"),
            Invalid("b of another rank", _in_list(call, "b", torch.zeros(3, 17, 5)), r"b\[1\]"),
            Invalid("b of more adapters", _in_list(call, "b", torch.zeros(4, 17, 6)), r"b\[1\]"),
            Invalid(
                "a and b of more adapters than the first",
                _in_list(_in_list(call, "a", torch.zeros(4, 6, 16)), "b", torch.zeros(4, 17, 6)),
                r"a\[1\]",
            ),
            Invalid("base of another dtype", _in_list(call, "base", w.half()), r"base\[1\]"),
            Invalid("base integer", _in_list(call, "base", w.int()), r"base\[1\]"),
            Invalid("base of other rows", _in_list(call, "base", torch.zeros(18, 16)), r"base\[1\]"),
            Invalid("base of other columns", _in_list(call, "base", torch.zeros(17, 17)), r"base\[1\]"),
            Invalid("base vector", _in_list(call, "base", w[0]), r"base\[1\]"),
            Invalid("base transposed", _in_list(call, "base", torch.zeros(16, 17).T), r"base\[1\]"),
            Invalid("base of one row", _in_list(call, "base", torch.zeros(16).expand(17, 16)), r"base\[1\]"),
            Invalid("base device", _in_list(call, "base", w.to("meta")), r"base\[1\]"),
        ]

    x, a, b, y = token.x, token.a, token.b, token.y
    assert y is not None
    return {
        **{op: merge(op) for op in ("lora_merge_", "lora_unmerge_", "lora_switch_")},
        "lora_apply": [
            *lists(apply, "ids", "gates", (2, 2)),
            *ranks(apply),
            Invalid("x double", apply.with_(x=x.double()), "x"),
            Invalid("x integer", apply.with_(x=x.int()), "x"),
            Invalid("x of another dtype", apply.with_(x=x.half()), "a|b"),
            Invalid("x scalar", apply.with_(x=torch.zeros(())), "x"),
            Invalid("x width", apply.with_(x=torch.zeros(2, 32)), "a"),
            Invalid("x of more tokens", apply.with_(x=torch.zeros(3, 33)), "ids"),
            Invalid("x of other leading sizes", apply.with_(x=torch.zeros(1, 2, 33)), "ids"),
            Invalid("x device", apply.with_(x=x.to("meta")), "a|b|ids"),
            *(
                Invalid(f"{name} {what}", apply.with_(**{name: change(t)}), name)
                for name, t in (("a", a), ("b", b))
                for what, change in {
                    "double": Tensor.double,
                    "of another dtype": Tensor.bfloat16,
                    "integer": Tensor.int,
                    "matrix": lambda t: t[0],
                    "four dims": lambda t: t[None],
                    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
                    "transposed": lambda t: t.mT.contiguous().mT,
                    "device": lambda t: t.to("meta"),
                }.items()
            ),
            Invalid("b of another rank", apply.with_(b=torch.zeros(3, 20, 5)), "b"),
            Invalid("b of more adapters", apply.with_(b=torch.zeros(4, 20, 4)), "b"),
            Invalid("b too tall", apply.with_(b=torch.zeros(3, 2**30 + 1, 0), a=torch.zeros(3, 0, 33), y=None), "b"),
            Invalid("y of another dtype", apply.with_(y=y.half()), "y"),
            Invalid("y double", apply.with_(y=y.double()), "y"),
            Invalid("y width", apply.with_(y=y[:, 1:]), "y"),
            Invalid("y of more tokens", apply.with_(y=torch.zeros(3, 20)), "y"),
            Invalid("y of other leading sizes", apply.with_(y=y[None]), "y"),
            Invalid("y device", apply.with_(y=y.to("meta")), "y"),
        ],
    }


INVALID = _invalid()


def dense_apply(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    ids: Tensor,
    gates: Tensor,
    y: Tensor | None = None,
    ranks: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    """lora_apply by dense torch operations, in the dtype of x: each pair's adapter, one after the other."""
    out = x.new_zeros((*x.shape[:-1], b.shape[1])) if y is None else y
    if ranks is not None:
        kept = torch.arange(a.shape[1], device=x.device) < ranks[:, None]
        a = torch.where(kept[..., None], a, 0.0)
        b = torch.where(kept[:, None], b, 0.0)
    for i in range(ids.shape[-1] if a.shape[0] else 0):
        one, gate = ids[..., i].long(), gates[..., i, None].to(x.dtype)
        inner = torch.einsum("...rk,...k->...r", a[one.clamp(min=0)], x)
        update = torch.einsum("...nr,...r->...n", b[one.clamp(min=0)], inner)
        out = out + torch.where(one[..., None] >= 0, scale * gate * update, 0.0)
    return out


FORMULAS = {"lora_apply": dense_apply}
