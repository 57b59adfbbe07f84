"""What must hold of w4a8 on every back end."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from ..kit import tensors
from ..kit.backends import Backend, every_backend, on_backends
from ..kit.tensors import same_bits
from . import format, strategies
from .format import Packed, Rows
from .strategies import (
    FLOATS,
    GROUP_SIZES,
    UNIT,
    Activations,
    Linear,
    Salience,
    Stored,
    Weights,
    activations,
    linears,
    saliences,
    stored,
    weights,
)
from .test_format import assert_same

flat_linears = functools.partial(linears, leads=False)
plain_linears = functools.partial(linears, plain=True, leads=False)


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """The same bits, but for the pattern of NaN."""
    if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    return same_bits(a.nan_to_num(0.125, torch.inf, -torch.inf), b.nan_to_num(0.125, torch.inf, -torch.inf))


def group_of(cols: int, group_size: int) -> Tensor:
    return torch.arange(cols) // group_size


# Activations to integers --------------------------------------------------------------------------------------------


@every_backend("w4a8_quantize", cases=activations)
def test_quantize_follows_the_format(backend: Backend, case: Activations) -> None:
    q, scale = backend.run("w4a8_quantize", case.x, case.group_size)
    wanted_q, wanted_scale = format.quantize(case.x, case.group_size)
    assert same_numbers(scale, wanted_scale)
    assert same_bits(q, wanted_q)


@every_backend("w4a8_quantize", cases=functools.partial(activations, kinds=("normal", "integers", "extreme")))
def test_quantize_moves_by_half_a_scale(backend: Backend, case: Activations) -> None:
    """Beside it, x / scale is rounded once, and is at most 127."""
    q, scale = backend.run("w4a8_quantize", case.x, case.group_size)
    s = scale.double()[..., group_of(case.cols, case.group_size)]
    assert bool(((case.x.double() - q.double() * s).abs() <= s * (0.5 + 128 * UNIT)).all())
    assert int(q.min() if q.numel() else 0) >= -127


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_backends("w4a8_quantize")
def test_saturation(backend: Backend, dtype: torch.dtype) -> None:
    """The largest of a group becomes 127 or -127, whatever it is."""
    info = torch.finfo(dtype)
    largest = torch.cat([torch.logspace(-30, 30, 301, base=2.0), torch.tensor([info.max, 3e-3, 1 / 3, 254 / 255])])
    largest = largest.clamp(info.tiny, info.max).to(dtype)[:, None]
    x = torch.cat([largest, -largest, largest / 2], -1)
    q, _ = backend.run("w4a8_quantize", x, 32)
    assert q[:, 0].tolist() == [127] * len(x) and q[:, 1].tolist() == [-127] * len(x)


# Packing -------------------------------------------------------------------------------------------------------------


@every_backend("w4a8_pack", cases=weights)
def test_pack_follows_the_format(backend: Backend, case: Weights) -> None:
    assert_same(backend.run("w4a8_pack", case.dense, case.is8, case.group_size), case.packed)


@every_backend("w4a8_pack", cases=functools.partial(weights, mixes=("few", "half")))
def test_strided_flags(backend: Backend, case: Weights) -> None:
    flags = torch.zeros(case.rows, 3, dtype=torch.bool)
    flags[:, 1] = case.is8
    packed = backend.run("w4a8_pack", case.dense, flags[:, 1], case.group_size)
    assert_same(packed, case.packed)


@every_backend("w4a8_unpack", cases=functools.partial(stored, scales=("normal", "integers", "extreme", "bits")))
def test_unpack_reads_the_format(backend: Backend, case: Stored) -> None:
    w = backend.run("w4a8_unpack", *case.packed, case.group_size)
    assert same_numbers(w, format.unpack(case.packed, case.group_size))


@every_backend("w4a8_pack", "w4a8_unpack", cases=functools.partial(weights, kinds=("normal", "integers", "extreme")))
def test_weights_move_by_half_a_scale(backend: Backend, case: Weights) -> None:
    """And zeros not at all. Beside it there is the rounding of the range, of the scale, of w / scale and of the
    product in the end, each relative to at most 16 or 128 scales."""
    packed = Packed(*backend.run("w4a8_pack", case.dense, case.is8, case.group_size))
    w = backend.run("w4a8_unpack", *packed, case.group_size).double()
    rows = format.decode(packed, case.group_size)
    scale = format.in_features(rows.scale.double().T, rows.perm).T[:, group_of(case.cols, case.group_size)]
    levels = torch.full((case.rows, 1), 128.0).double()
    levels[rows.perm[: rows.n4]] = 16
    fits = scale.isfinite()  # a range may overflow
    inside = (w - case.dense.double()).abs() <= scale * (0.5 + 4 * levels * UNIT)
    # So may the product in the end, of a weight as near to the largest number as the roundings go.
    inside |= w.isinf() & (case.dense.double() * w.sign() >= (1 - 2**-20) * torch.finfo(torch.float32).max)
    assert bool((inside | ~fits).all())
    assert not bool((w[(case.dense == 0) & fits]).any())


def on_grid(n4: int, n8: int, cols: int, group_size: int, dtype: torch.dtype, seed: int) -> Rows:
    """Integers and scales that packing finds again, since products and ranges are exact: each group reaches both ends
    of its range, and scales have few bits."""
    g = tensors.generator(seed)
    n, groups = n4 + n8, format.ceil_div(cols, group_size)
    q = torch.cat([torch.randint(0, 16, (n4, cols), generator=g), torch.randint(1, 256, (n8, cols), generator=g)])
    zero = torch.cat([torch.randint(0, 16, (n4, groups), generator=g), torch.full((n8, groups), 128)])
    for i in range(groups):
        k = i * group_size
        wide = min(group_size, cols - k)
        a, b = torch.randperm(wide, generator=g)[:2].tolist() if wide > 1 else (0, 0)
        q[:n4, k + a] = 0
        q[:n4, k + b] = 15
        if wide == 1:  # 0 is the other end
            zero[:n4, i] = torch.randint(0, 2, (n4,), generator=g) * 15
            q[:n4, k] = 15 - zero[:n4, i]
        q[n4:, k + b] = torch.where(torch.rand(n8, generator=g) < 0.5, 1, 255)
    bits = {torch.float32: 16, torch.float16: 4, torch.bfloat16: 1}[dtype]  # times 7 bits is what dtype can hold
    exponent = torch.randint(-12, 2, (n, groups), generator=g)
    scale = torch.ldexp(torch.randint(2 ** (bits - 1), 2**bits, (n, groups), generator=g).float(), exponent - bits)
    order = torch.randperm(n, generator=g)  # each kind ascends, as pack makes it
    perm = torch.cat([order[:n4].sort().values, order[n4:].sort().values])
    return Rows(q, zero, scale, perm, n4, group_size)


def _grids(backend: Backend) -> st.SearchStrategy[Rows]:
    few = [n for n in strategies.ROWS if n <= (17 if backend.slow else 65)]
    return st.builds(
        on_grid,
        n4=st.sampled_from(few),
        n8=st.sampled_from(few),
        cols=st.sampled_from([k for k in strategies.COLS if k <= (257 if backend.slow else 515)]),
        group_size=st.sampled_from(GROUP_SIZES),
        dtype=st.just(torch.float32),
        seed=strategies.SEEDS,
    )


def check_grid(backend: Backend, rows: Rows, dtype: torch.dtype) -> None:
    packed = format.encode(rows)
    is8 = torch.zeros(len(rows.perm), dtype=torch.bool)
    is8[rows.perm[rows.n4 :]] = True
    w = backend.run("w4a8_unpack", *packed, rows.group_size)
    again = backend.run("w4a8_pack", w.to(dtype), is8, rows.group_size)
    assert torch.equal(w.to(dtype).float(), w)
    assert_same(again, packed)
    assert same_bits(backend.run("w4a8_unpack", *again, rows.group_size), w)


@every_backend("w4a8_pack", "w4a8_unpack", cases=_grids)
def test_weights_on_the_grid_come_back(backend: Backend, case: Rows) -> None:
    check_grid(backend, case, torch.float32)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_backends("w4a8_pack", "w4a8_unpack")
def test_weights_on_the_grid_come_back_in_every_dtype(backend: Backend, dtype: torch.dtype) -> None:
    for group_size in GROUP_SIZES:
        check_grid(backend, on_grid(18, 17, 2 * group_size + 1, group_size, dtype, group_size), dtype)


@every_backend("w4a8_pack", "w4a8_linear", cases=functools.partial(weights, kinds=("normal",), patterns=("random",)))
def test_a_weight_that_is_no_number_spoils_its_feature_alone(backend: Backend, case: Weights) -> None:
    assume(case.rows > 0 and case.cols > 0)
    x = tensors.values((3, case.cols), torch.float32, "normal", case.seed)
    at = case.seed % case.rows
    broken = case.dense.clone()
    broken[at, case.seed // 7 % case.cols] = (float("nan"), float("inf"), -float("inf"))[case.seed % 3]
    good, bad = (
        backend.run("w4a8_linear", x, *backend.run("w4a8_pack", w, case.is8, case.group_size), case.group_size)
        for w in (case.dense, broken)
    )
    others = torch.arange(case.rows) != at
    assert bool(bad[:, at].isnan().all())
    assert same_bits(bad[:, others], good[:, others])


# The integer step ----------------------------------------------------------------------------------------------------


def integers_of(case: Stored, tokens: int) -> Tensor:
    """[tokens, K] int8, -128 and long runs of the ends included."""
    q = tensors.values((tokens, case.cols), torch.int8, "bits", case.seed + 5)
    ends = torch.tensor([-128, 127, -127], dtype=torch.int8)[torch.arange(tokens) % 3]
    return torch.where((torch.arange(tokens) % 4 == 0)[:, None], ends[:, None], q)


def _accumulations(backend: Backend) -> st.SearchStrategy[tuple[Stored, int, str]]:
    tokens = [t for t in strategies.TOKENS if t <= (9 if backend.slow else 40)]
    return st.tuples(stored(backend), st.sampled_from(tokens), st.sampled_from(tensors.LAYOUTS))


@every_backend("w4a8_accumulate", cases=_accumulations)
def test_integer_step_is_exact(backend: Backend, case: tuple[Stored, int, str]) -> None:
    w, tokens, layout = case
    q = tensors.lay_out(integers_of(w, tokens), layout)
    got = backend.run("w4a8_accumulate", q, *w.packed, w.group_size)
    wanted = strategies.first_step(q, w.as_rows)
    assert got.dtype == torch.int32 and got.is_contiguous()
    assert torch.equal(got.long(), wanted)


# Weight, zero point and activation, each at an end: what overflows 8, 16 or 22 bits on its way.
ENDS = [(q, zero, x) for q in (0, 15) for zero in (0, 15, 255) for x in (-128, -127, 127)]
ENDS8 = [(q, 128, x) for q in (0, 1, 255) for x in (-128, -127, 127)]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@on_backends("w4a8_accumulate")
def test_integer_step_at_the_ends(backend: Backend, group_size: int) -> None:
    cols = group_size + 5
    for ends, is8 in ((ENDS, False), (ENDS8, True)):
        q, zero, x = (torch.tensor(part) for part in zip(*ends, strict=True))
        n = len(ends)
        rows = Rows(
            q[:, None].expand(n, cols),
            zero[:, None].expand(n, 2),
            torch.ones(n, 2),
            torch.arange(n),
            0 if is8 else n,
            group_size,
        )
        tokens = x.to(torch.int8)[:, None].expand(n, cols)
        got = backend.run("w4a8_accumulate", tokens, *format.encode(rows), group_size)
        one = x[:, None] * (q - zero)
        assert torch.equal(got.long(), torch.stack([one * group_size, one * 5], 1))


# The product ---------------------------------------------------------------------------------------------------------


@every_backend("w4a8_linear", cases=linears)
def test_linear_is_within_the_bound(backend: Backend, case: Linear) -> None:
    y = case.run(backend)
    assert y.dtype == case.y_dtype and y.is_contiguous()
    case.exact().assert_holds(y)


def _whole(backend: Backend) -> st.SearchStrategy[tuple[Weights, int, torch.dtype]]:
    tokens = st.sampled_from([t for t in strategies.TOKENS if t <= (9 if backend.slow else 40)])
    return st.tuples(weights(backend, kinds=("normal", "integers")), tokens, st.sampled_from(FLOATS))


@every_backend("w4a8_pack", "w4a8_unpack", "w4a8_linear", cases=_whole)
def test_linear_is_near_the_product_with_what_unpack_gives(
    backend: Backend, case: tuple[Weights, int, torch.dtype]
) -> None:
    """As near as |x - x^| <= scale / 2 makes it: only the ops themselves and a product in float64 are compared."""
    w, tokens, dtype = case
    x = tensors.values((tokens, w.cols), dtype, "normal", w.seed + 2)
    packed = backend.run("w4a8_pack", w.dense, w.is8, w.group_size)
    unpacked = backend.run("w4a8_unpack", *packed, w.group_size).double()
    y = backend.run("w4a8_linear", x, *packed, w.group_size, out_dtype=torch.float32).double()
    scale = x.double().abs()
    for part in scale.split(w.group_size, -1) if w.cols else ():
        part[:] = part.amax(-1, keepdim=True) / 127
    moved = scale * (0.5 + 128 * UNIT) @ unpacked.abs().T
    rounding = strategies.second_step(x, Packed(*packed), w.group_size).error
    # What unpack rounds.
    rounding = rounding + UNIT * (x.double().abs() @ unpacked.abs().T)
    assert bool(((y - x.double() @ unpacked.T).abs() <= moved + 2 * rounding).all())


@every_backend("w4a8_linear", cases=functools.partial(linears, kinds=("special",), scales=("special", "normal")))
def test_nan_and_infinity(backend: Backend, case: Linear) -> None:
    """Of activations and of scales."""
    case.exact().assert_holds(case.run(backend))


@every_backend("w4a8_linear", cases=functools.partial(flat_linears, least=2))
def test_a_token_is_alone_in_its_batch(backend: Backend, case: Linear) -> None:
    """One that isn't a number has NaN for all its outputs, and no bit of the others changes."""
    assume(case.w.cols > 0)
    at = case.seed % case.tokens
    x = case.x.clone()
    x[at, case.seed // 5 % case.w.cols] = (float("nan"), float("inf"), -float("inf"))[case.seed % 3]
    good, bad = case.run(backend), case.run(backend, x)
    others = torch.arange(case.tokens) != at
    assert bool(bad[at].isnan().all())
    assert same_numbers(bad[others], good[others])


@every_backend("w4a8_linear", "w4a8_accumulate", cases=flat_linears)
def test_splitting_tokens_changes_no_bit(backend: Backend, case: Linear) -> None:
    """So what a token gives doesn't depend on how many there are, or on which kernel serves so many."""
    y = case.run(backend)
    q = integers_of(case.w, case.tokens)
    sums = backend.run("w4a8_accumulate", q, *case.w.packed, case.w.group_size)
    for size in (1, 1 + case.seed % 9):
        parts = case.x.split(size) if case.tokens else [case.x]
        if backend.slow:
            parts = parts[:2]
        joined = torch.cat([case.run(backend, x) for x in parts])
        assert same_numbers(joined, y[: len(joined)])
    cut = case.seed % (case.tokens + 1)
    halves = [backend.run("w4a8_accumulate", part, *case.w.packed, case.w.group_size) for part in (q[:cut], q[cut:])]
    assert torch.equal(torch.cat(halves), sums)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@on_backends("w4a8_linear")
def test_every_number_of_tokens(backend: Backend, group_size: int) -> None:
    """From 1 to 40 at once and each alone, the same bits: kernels for several tokens meet with all remainders."""
    w = Stored(37, 21, group_size + 9, group_size, seed=3)
    most = 5 if backend.slow else 40
    case = Linear(w, most, torch.bfloat16, bias=torch.float32, out_dtype=torch.float32)
    y = torch.cat([case.run(backend, x) for x in case.x.split(1)])
    case.exact().assert_holds(y)
    for tokens in range(2, most + 1):
        assert same_bits(case.run(backend, case.x[:tokens]), y[:tokens]), tokens


# n4, n8, cols, group_size: kernels take rows by the hundred, and columns by the thousand; the last of each are few.
LARGE = {
    "many rows": (270, 150, 100, 32),
    "many rows, words left": (150, 290, 131, 64),
    "many columns": (131, 17, 8250, 256),
    "many columns of 8 bits": (16, 145, 4131, 32),
}


@pytest.mark.parametrize("tokens", [9, 50, 101])
@pytest.mark.parametrize("shape", LARGE)
@on_backends("w4a8_linear")
def test_large(backend: Backend, shape: str, tokens: int) -> None:
    """Within the bound, and one token more or less changes no bit of the others."""
    if backend.slow or (backend.name == "simt" and tokens > 9):
        pytest.skip("takes minutes in an emulator")
    case = Linear(Stored(*LARGE[shape], seed=tokens), tokens, bias=torch.float32)
    y = case.run(backend)
    case.exact().assert_holds(y)
    for part in (slice(0, 1), slice(1, 4), slice(tokens // 2, tokens)):
        assert same_bits(case.run(backend, case.x[part]), y[part])


def permuted(rows: Rows, order: Tensor, perm: Tensor | None = None) -> Rows:
    """The rows of each kind in another order; perm goes along unless another is given."""
    return rows._replace(
        q=rows.q[order],
        zero=rows.zero[order],
        scale=rows.scale[order],
        perm=rows.perm[order] if perm is None else perm,
    )


def _order(case: Linear) -> Tensor:
    """A random order that keeps kinds apart."""
    g = tensors.generator(case.seed)
    return torch.cat([torch.randperm(case.w.n4, generator=g), case.w.n4 + torch.randperm(case.w.n8, generator=g)])


@every_backend("w4a8_linear", cases=plain_linears)
def test_permuting_features_permutes_y(backend: Backend, case: Linear) -> None:
    """Bit for bit: stored in another order, the same weight gives the same; so do the same rows for other features."""
    rows, y = case.w.as_rows, case.run(backend)
    moved = format.encode(permuted(rows, _order(case)))
    assert same_numbers(case.run(backend, packed=moved), y)
    identity = format.encode(rows._replace(perm=torch.arange(case.w.rows)))
    assert same_numbers(case.run(backend, packed=identity), y[:, rows.perm])


@every_backend("w4a8_pack", "w4a8_unpack", "w4a8_linear", cases=functools.partial(weights, mixes=("few", "half")))
def test_kinds_do_not_meet(backend: Backend, case: Weights) -> None:
    """A feature's results are those of a weight that has its kind alone, and no flags are flags of nothing."""
    x = tensors.values((5, case.cols), torch.float32, "normal", case.seed)

    def results(is8: Tensor | None) -> tuple[Tensor, Tensor]:
        packed = backend.run("w4a8_pack", case.dense, is8, case.group_size)
        y = backend.run("w4a8_linear", x, *packed, case.group_size)
        return y, backend.run("w4a8_unpack", *packed, case.group_size).T

    flags = case.is8
    none = torch.zeros_like(flags)
    for mixed, four, eight, default in zip(results(flags), results(none), results(~none), results(None), strict=True):
        assert same_numbers(mixed, torch.where(flags, eight, four))
        assert same_numbers(default, four)


@every_backend("w4a8_linear", "w4a8_unpack", cases=functools.partial(plain_linears, kinds=("normal", "extreme")))
def test_negative_scales(backend: Backend, case: Linear) -> None:
    """(-scale, -q) is (scale, q): 8-bit integers negated, 4-bit ones and their zero points taken from 15."""
    rows, n4 = case.w.as_rows, case.w.n4
    q, zero = rows.q.clone(), rows.zero % 16
    q[n4:] = q[n4:].clamp(min=1)  # -128 has no negative
    zero[n4:] = 128
    rows = rows._replace(q=q, zero=zero)
    q, zero = q.clone(), zero.clone()
    q[:n4], zero[:n4] = 15 - q[:n4], 15 - zero[:n4]
    q[n4:] = 256 - q[n4:]
    packed, other = format.encode(rows), format.encode(rows._replace(q=q, zero=zero, scale=-rows.scale))
    for a, b in (
        (case.run(backend, packed=packed), case.run(backend, packed=other)),
        *[tuple(backend.run("w4a8_unpack", *p, rows.group_size) for p in (packed, other))],
    ):
        # By value: 0 * -1 is -0.
        assert torch.equal(a.nan_to_num(0.125, torch.inf, -torch.inf), b.nan_to_num(0.125, torch.inf, -torch.inf))


@every_backend("w4a8_linear", "w4a8_unpack", "w4a8_accumulate", cases=flat_linears)
def test_padding_is_ignored(backend: Backend, case: Linear) -> None:
    clean = format.encode(case.w.as_rows)
    assert same_numbers(case.run(backend, packed=clean), case.run(backend))
    w, q = case.w, integers_of(case.w, case.tokens)
    for op, first in (("w4a8_unpack", ()), ("w4a8_accumulate", (q,))):
        a, b = (backend.run(op, *first, *packed, w.group_size) for packed in (clean, w.packed))
        assert same_numbers(a, b)


@every_backend("w4a8_linear", cases=linears)
def test_strides_and_leading_sizes_change_no_bit(backend: Backend, case: Linear) -> None:
    y = case.run(backend)
    assert y.shape == (*case.x.shape[:-1], case.w.rows)
    flat = case.x.reshape(y.shape[:-1].numel(), case.w.cols).contiguous()
    assert same_numbers(case.run(backend, flat), y.flatten(0, -2) if y.dim() > 1 else y[None])


@every_backend("w4a8_linear", cases=linears)
def test_the_result_is_rounded_once(backend: Backend, case: Linear) -> None:
    """After bias, from float32; types of x and bias don't matter beside what they hold."""
    wide = replace(case, out_dtype=torch.float32).run(backend)
    assert same_numbers(case.run(backend), wide.to(case.y_dtype))
    bias = None if case.bias_tensor is None else case.bias_tensor.float()
    args = (case.x.float(), *case.w.packed, case.w.group_size, bias)
    assert same_numbers(backend.run("w4a8_linear", *args), wide)


@every_backend("w4a8_linear", cases=functools.partial(plain_linears, kinds=("normal",), scales=("normal",)))
def test_scaling_by_a_power_of_two_is_exact(backend: Backend, case: Linear) -> None:
    """Of x, and of the weight's scales: nothing is absolute."""
    case = replace(case, out_dtype=torch.float32)
    y = case.run(backend)
    assume(bool((y == 0).logical_or(y.abs() > 2**-60).all()))  # no subnormal number on the way
    rows = case.w.as_rows
    halved = format.encode(rows._replace(scale=rows.scale / 2))
    assert torch.equal(case.run(backend, case.x * 4, halved), y * 2)


@on_backends("w4a8_linear", "w4a8_unpack", "w4a8_accumulate")
def test_nothing_to_do(backend: Backend) -> None:
    """No tokens, no features, no columns; without columns the result is the bias."""
    for n4, n8 in ((0, 0), (3, 0), (0, 3), (17, 16)):
        for cols in (0, 33):
            for tokens in (0, 2):
                case = Linear(Stored(n4, n8, cols, 32), tokens, bias=torch.float16)
                y = case.run(backend)
                assert y.shape == (tokens, n4 + n8)
                case.exact().assert_holds(y)
                if not cols:
                    assert torch.equal(y, case.bias_tensor.float().expand(tokens, -1))
                assert backend.run("w4a8_unpack", *case.w.packed, 32).shape == (n4 + n8, cols)
                q = torch.ones(tokens, cols, dtype=torch.int8)
                sums = backend.run("w4a8_accumulate", q, *case.w.packed, 32)
                assert sums.shape == (tokens, cols // 32 + (cols > 0), n4 + n8)


@on_backends("w4a8_linear")
def test_bound_is_tight_enough_to_see_one_step(backend: Backend) -> None:
    """The bound would be no test if one integer of one weight could be another."""
    w = Stored(16, 16, 512, 128)
    case = Linear(w, 3)
    y = case.run(backend)
    case.exact().assert_holds(y)
    for row in (5, 21):
        q = w.as_rows.q.clone()
        q[row, 77] += 1 if q[row, 77] < 15 else -1
        with pytest.raises(AssertionError, match="out of bounds"):
            case.exact(packed=format.encode(w.as_rows._replace(q=q))).assert_holds(y)


# Determinism ---------------------------------------------------------------------------------------------------------


@every_backend("w4a8_linear", cases=linears)
def test_same_bits_twice(backend: Backend, case: Linear) -> None:
    assert same_bits(case.run(backend), case.run(backend))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [1, 8, 50])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_backends(*(f"w4a8_{op}" for op in ("quantize", "pack", "unpack", "accumulate", "linear", "salience")))
def test_threads_change_no_bit(backend: Backend, dtype: torch.dtype, tokens: int, threads) -> None:
    if backend.device != "cpu" or backend.slow:
        pytest.skip("has no CPU threads")
    if backend.name == "simt" and tokens > 8:
        pytest.skip("takes long in an emulator")
    w = Weights(500, 700, 128, dtype, mix="half")
    case = Linear(w, tokens, dtype, bias=torch.float32)
    results = []
    for n in (1, 2, 3):
        threads(n)
        packed = backend.run("w4a8_pack", w.dense, w.is8, 128)
        unpacked = backend.run("w4a8_unpack", *packed, 128)
        quantized = backend.run("w4a8_quantize", case.x, 128)
        results.append(
            (
                *packed,
                unpacked,
                *quantized,
                backend.run("w4a8_accumulate", quantized[0], *packed, 128),
                backend.run("w4a8_salience", w.dense, w.dense, unpacked),
                case.run(backend, packed=Packed(*packed)),
            )
        )
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


# Salience ------------------------------------------------------------------------------------------------------------


@every_backend("w4a8_salience", cases=saliences)
def test_salience_is_within_the_bound(backend: Backend, case: Salience) -> None:
    got = backend.run("w4a8_salience", *case.tensors)
    assert got.dtype == torch.float32
    case.exact().assert_holds(got)


@every_backend("w4a8_salience", cases=functools.partial(saliences, kinds=("normal",)))
def test_salience_of_a_feature_is_its_own(backend: Backend, case: Salience) -> None:
    """NaN stays in its row; one sample is the same with and without a dimension for it."""
    assume(case.rows > 0 and case.cols > 0 and case.samples != 0)
    good = backend.run("w4a8_salience", *case.tensors)
    grad, w, w4 = case.tensors
    broken = w.clone()
    at = case.seed % case.rows
    broken[at, case.seed // 3 % case.cols] = float("nan")
    bad = backend.run("w4a8_salience", grad, broken, w4)
    others = torch.arange(case.rows) != at
    assert bool(bad[at].isnan()) and same_bits(bad[others], good[others])
    if case.samples is None:
        assert same_bits(backend.run("w4a8_salience", grad[None], w, w4), good)


def test_salience_by_hand() -> None:
    """d = 1 * 2 - 3 * 1 = -1: |-1 + 1/2| = 1/2; d = 4: 4 + 8 = 12. Samples don't cancel."""
    grad = torch.tensor([[[1.0, 3.0]], [[2.0, 0.0]]])
    w, w4 = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 0.0]])
    for name in ("reference", "cpu-scalar"):
        assert Backend(name).run("w4a8_salience", grad, w, w4).tolist() == [12.5]


# Untrusted perm ------------------------------------------------------------------------------------------------------

# What breaks a permutation of 0 to n - 1, in place.
CORRUPT = {
    "past the end": lambda p: p[3].fill_(len(p)),
    "far past the end": lambda p: p[3].fill_(2**31 - 1),
    "negative": lambda p: p[3].fill_(-1),
    "most negative": lambda p: p[3].fill_(-(2**31)),
    "a duplicate": lambda p: p[3].copy_(p[30]),
    "a duplicate in the last row": lambda p: p[-1].copy_(p[0]),
    "all the same": lambda p: p.fill_(5),
    "all outside": lambda p: p.add_(len(p)),
    "wraps around": lambda p: p[0].sub_(2**31),
}


@pytest.mark.parametrize("damage", CORRUPT)
@on_backends("w4a8_unpack", "w4a8_accumulate", "w4a8_linear")
def test_corrupt_perm(backend: Backend, damage: str) -> None:
    """CPU code raises; GPU code may give anything, but stays inside and ends."""
    w = Stored(20, 18, 70, 32)
    perm = w.packed.perm.clone()
    CORRUPT[damage](perm)
    packed = w.packed._replace(perm=perm)
    x = torch.ones(3, 70)
    for op, first in (("w4a8_unpack", ()), ("w4a8_accumulate", (x.to(torch.int8),)), ("w4a8_linear", (x,))):
        backend.run(op, *first, *w.packed, 32)
        if backend.raises_on_corrupt:
            with pytest.raises(RuntimeError, match=f"effk::{op}: perm is corrupt"):
                backend.run(op, *first, *packed, 32)
        else:
            backend.run(op, *first, *packed, 32)


@pytest.mark.parametrize("n", [1, 16, 38])
@on_backends("w4a8_linear")
def test_any_permutation_is_taken(backend: Backend, n: int) -> None:
    """Also those that mix kinds in any order: nothing but a permutation is asked for."""
    rows = Stored(n - n // 2, n // 2, 40, 32).as_rows
    for seed in range(5):
        perm = torch.randperm(n, generator=tensors.generator(seed))
        case = Linear(Stored(n - n // 2, n // 2, 40, 32), 2)
        packed = format.encode(rows._replace(perm=perm))
        case.exact(packed=packed).assert_holds(case.run(backend, packed=packed))
