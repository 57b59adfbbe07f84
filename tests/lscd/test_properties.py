"""What must hold of lscd on every back end."""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from ..kit import tensors
from ..kit.backends import Backend, every_backend, on_backends
from ..kit.errors import ACTIVATIONS
from . import format, strategies
from .strategies import FLOATS, Linear, Weights, linears, weights
from .test_format import assert_same

plain_linears = functools.partial(linears, plain=True)
special_linears = functools.partial(linears, kinds=("special",))


def popcount(words: torch.Tensor) -> int:
    return sum((word % (1 << 64)).bit_count() for word in words.flatten().tolist())


def cleared(w: torch.Tensor) -> torch.Tensor:
    """Negative zeros made positive, every other bit kept."""
    return w.masked_fill(w == 0, 0)


# Packing ----------------------------------------------------------------------------------------------------------


@every_backend("lscd_pack", cases=weights)
def test_pack_follows_the_format(backend: Backend, case: Weights) -> None:
    packed = backend.run("lscd_pack", case.dense)
    assert_same(packed, case.packed)
    assert popcount(packed[1]) == int(case.dense.count_nonzero())


@every_backend("lscd_pack", "lscd_unpack", cases=weights)
def test_unpack_inverts_pack(backend: Backend, case: Weights) -> None:
    w = backend.run("lscd_unpack", *backend.run("lscd_pack", case.dense), *case.size)
    assert tensors.same_bits(w, cleared(case.dense))


@every_backend("lscd_unpack", cases=weights)
def test_unpack_reads_the_format(backend: Backend, case: Weights) -> None:
    assert tensors.same_bits(backend.run("lscd_unpack", *case.packed, *case.size), cleared(case.dense))


@every_backend("lscd_unpack", cases=functools.partial(weights, kinds=("normal", "integers", "special")))
def test_unpack_scales_rows(backend: Backend, case: Weights) -> None:
    scale = tensors.values((case.rows,), torch.float32, "normal", case.seed)
    w = backend.run("lscd_unpack", *case.packed, *case.size, scale)
    dtype = torch.float32 if case.dtype == torch.int8 else case.dtype
    # Equal by value: 0 * -1 is -0.0, and NaN has no one pattern.
    wanted = (case.dense.float() * scale[:, None]).to(dtype)
    assert w.dtype == dtype
    assert torch.equal(w.nan_to_num(7), wanted.nan_to_num(7)) and torch.equal(w.isnan(), wanted.isnan())


def _rounded_cases(backend: Backend) -> st.SearchStrategy:
    kinds = ("normal", "extreme", "special")
    return st.tuples(weights(backend, dtypes=FLOATS, kinds=kinds), st.sampled_from(FLOATS))


@every_backend("lscd_pack", cases=_rounded_cases)
def test_pack_rounds_to_dtype_first(backend: Backend, case: tuple[Weights, torch.dtype]) -> None:
    """So what rounds to zero isn't stored. Which bits a rounded NaN has is the device's own."""

    def with_one_nan(values: Tensor, *rest: Tensor) -> format.Packed:
        return torch.where(values.isnan(), torch.nan, values), *rest

    w, dtype = case
    packed, wanted = backend.run("lscd_pack", w.dense, dtype=dtype), format.pack(w.dense.to(dtype))
    assert_same(with_one_nan(*packed), with_one_nan(*wanted))


# The product ------------------------------------------------------------------------------------------------------


@every_backend("lscd_linear", cases=linears)
def test_linear_is_within_the_bound(backend: Backend, case: Linear) -> None:
    y = case.run(backend)
    assert y.dtype == case.dtype and y.is_contiguous()
    case.exact(backend.unit).assert_holds(y)


@every_backend("lscd_linear", cases=special_linears)
def test_nan_and_infinity_as_in_dense(backend: Backend, case: Linear) -> None:
    """In the weights they survive; in x a pruned weight counts as zero, so the result is NaN."""
    case.exact(backend.unit).assert_holds(case.run(backend))


@pytest.mark.parametrize("tokens", [0, 1, 7, 1000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_backends("lscd_linear")
def test_token_counts(backend: Backend, dtype: torch.dtype, tokens: int) -> None:
    if backend.slow and tokens > 100:
        pytest.skip("1000 tokens take minutes in an emulator")
    case = Linear(Weights(24, 300, dtype, sparsity=0.7), tokens, dtype, bias=True)
    case.exact(backend.unit).assert_holds(case.run(backend))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
@on_backends("lscd_linear")
def test_sparsity(backend: Backend, dtype: torch.dtype, sparsity: float) -> None:
    """From a tile with all of its 4096 weights to one with none."""
    x_dtype = torch.float16 if dtype == torch.int8 else dtype
    case = Linear(Weights(32, 512, dtype, sparsity), 3, x_dtype, scale=dtype == torch.int8)
    case.exact(backend.unit).assert_holds(case.run(backend))


@pytest.mark.parametrize("kind", ["normal", "special"])
@pytest.mark.parametrize("tokens", [32, 257])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
@on_backends("lscd_linear")
def test_many_rows_and_tokens(backend: Backend, dtype: torch.dtype, tokens: int, kind: str) -> None:
    """Enough of both for kernels that share work among strips and among hundreds of tokens, or that skip zeros; where
    zeros are skipped, NaN and infinities in x must still be what they are in a dense product."""
    if backend.slow:
        pytest.skip("takes minutes in an emulator")
    x_dtype = torch.bfloat16 if dtype == torch.int8 else dtype
    for sparsity in (0.5, 0.99):
        case = Linear(Weights(530, 300, dtype, sparsity), tokens, x_dtype, kind, bias=True)
        case.exact(backend.unit).assert_holds(case.run(backend))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@on_backends("lscd_linear")
def test_activation(backend: Backend, activation: str) -> None:
    """Around zero, where the curves bend, and far out, where they are lines: the weights are the identity."""
    points = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 1e30, -1e30])])
    case = Linear(Weights(16, 16), activation=activation)
    eye = torch.eye(16)
    x = points[:, None].expand(-1, 16).contiguous()
    y = backend.run("lscd_linear", x, *format.pack(eye), 16, 16, activation=activation)
    case.exact(backend.unit, x, eye).assert_holds(y)


@every_backend("lscd_linear", cases=functools.partial(linears, plain=True, kinds=("integers",)))
def test_sums_of_integers_are_exact(backend: Backend, case: Linear) -> None:
    """Each sum fits in float32, so only the rounding in the end is left."""
    wanted = (case.x.double() @ case.w.dense.double().T).float().to(case.dtype)
    assert torch.equal(case.run(backend), wanted)


@every_backend("lscd_linear", cases=functools.partial(linears, plain=True, kinds=("normal",)))
def test_scaling_x_by_a_power_of_two_is_exact(backend: Backend, case: Linear) -> None:
    y = case.run(backend)
    assume(bool((y == 0).logical_or(y.abs() > 2**-10).all()))  # no subnormal result among them
    assert torch.equal(case.run(backend, case.x * 4), y * 4)


@every_backend("lscd_linear", cases=functools.partial(linears, plain=True, kinds=("normal",)))
def test_linear_in_x(backend: Backend, case: Linear) -> None:
    """f(x) + f(x') = f(x + x') up to the bounds of the three."""
    other = case.x.flip(0).roll(1, -1)
    added = (case.x.double() + other.double()).to(case.dtype)
    rounding = added.double() - case.x.double() - other.double()
    correction = rounding @ case.w.dense.double().T
    unit = torch.finfo(case.dtype).eps / 2
    whole, parts = case.exact(backend.unit, added), [case.exact(backend.unit, x) for x in (case.x, other)]
    got = case.run(backend, added).double() - case.run(backend).double() - case.run(backend, other).double()
    allowed = sum(b.error + unit * (b.value.abs() + b.error) for b in (whole, *parts)) + torch.finfo(case.dtype).tiny
    assert bool(((got - correction).abs() <= allowed).all())


@every_backend("lscd_linear", cases=plain_linears)
def test_permuting_rows_permutes_y(backend: Backend, case: Linear) -> None:
    order = torch.randperm(case.w.rows, generator=tensors.generator(case.seed))
    y = case.run(backend, packed=format.pack(case.w.dense[order]))
    exact = case.exact(backend.unit)
    replace(exact, value=exact.value[:, order], error=exact.error[:, order], peak=exact.peak[:, order]).assert_holds(y)


@every_backend("lscd_linear", cases=plain_linears)
def test_permuting_columns_with_x_changes_nothing(backend: Backend, case: Linear) -> None:
    order = torch.randperm(case.w.cols, generator=tensors.generator(case.seed))
    y = case.run(backend, case.x[:, order], format.pack(case.w.dense[:, order]))
    case.exact(backend.unit).assert_holds(y)


@every_backend("lscd_linear", cases=functools.partial(linears, plain=True, kinds=("normal",)))
def test_a_token_is_alone_in_its_batch(backend: Backend, case: Linear) -> None:
    """Its result is within its own bound whatever the others hold, be it NaN."""
    assume(case.tokens > 0)
    at = case.seed % case.tokens
    x = torch.full_like(case.x, float("nan"))
    x[at] = case.x[at]
    y = case.run(backend, x)
    case.exact(backend.unit, case.x[at : at + 1]).assert_holds(y[at : at + 1])
    case.exact(backend.unit, case.x[at : at + 1]).assert_holds(case.run(backend, case.x[at : at + 1]))


@every_backend("lscd_linear", "lscd_unpack", cases=linears)
def test_gaps_and_padding_are_ignored(backend: Backend, case: Linear) -> None:
    values, bitmap, offsets = case.w.packed
    filler = -1 if values.dtype == torch.int8 else float("nan")
    dirty = values.masked_fill(format.unused(case.w.packed), filler), bitmap, offsets
    assert tensors.same_bits(backend.run("lscd_unpack", *dirty, *case.w.size), cleared(case.w.dense))
    assert tensors.same_bits(case.run(backend, packed=dirty), case.run(backend))


@every_backend("lscd_linear", cases=linears)
def test_same_bits_twice(backend: Backend, case: Linear) -> None:
    assert tensors.same_bits(case.run(backend), case.run(backend))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [1, 8, 100])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_backends("lscd_pack", "lscd_unpack", "lscd_linear")
def test_threads_change_no_bit(backend: Backend, dtype: torch.dtype, tokens: int, threads) -> None:
    if backend.device != "cpu" or backend.slow:
        pytest.skip("has no CPU threads")
    case = Linear(Weights(200, 700, dtype, sparsity=0.6), tokens, dtype, bias=True, activation="silu")
    results = []
    for n in (1, 2, 3):
        threads(n)
        packed = backend.run("lscd_pack", case.w.dense)
        results.append((*packed, backend.run("lscd_unpack", *packed, *case.w.size), case.run(backend, packed=packed)))
    for other in results[1:]:
        assert all(map(tensors.same_bits, results[0], other))


# Untrusted packed tensors -----------------------------------------------------------------------------------------


@every_backend("lscd_unpack", "lscd_linear", cases=strategies.damaged)
def test_corrupt_contents(backend: Backend, case: tuple[Weights, format.Packed]) -> None:
    """CPU code raises exactly when the format is violated; GPU code may give anything, but ends."""
    w, packed = case
    x = torch.ones(2, w.cols, dtype=torch.float32 if w.dtype == torch.int8 else w.dtype)
    valid = format.is_valid(packed, *w.size)
    for op, args in (("lscd_unpack", (*packed, *w.size)), ("lscd_linear", (x, *packed, *w.size))):
        try:
            backend.run(op, *args)
            raised = ""
        except RuntimeError as error:
            raised = str(error)
        if valid:
            assert not raised
        elif backend.raises_on_corrupt:
            assert f"effk::{op}" in raised and "corrupt" in raised


def _move_bit(bitmap: torch.Tensor, word: tuple[int, int, int], bit: int) -> None:
    """Sets a bit, and clears another of the same word so that no count changes."""
    old = int(bitmap[word])
    inside = next(i for i in range(64) if old >> i & 1)
    bitmap[word] = format.signed((old & ~(1 << inside) | 1 << bit) % 2**64)


def _thin_out(bitmap: torch.Tensor) -> None:
    """Sixteen ones fewer in the first tile."""
    word = int(bitmap[0, 0, 0])
    kept = [i for i in range(64) if word >> i & 1][16:]
    bitmap[0, 0, 0] = format.signed(sum(1 << i for i in kept))


# Of "Untrusted input" in the page of the format, one by one: name -> what breaks it, in place. The matrix is 35 x 525
# with 5 of 8 columns in its last words and 3 of 16 rows in its last strip, and has 9 tiles.
RULES = {
    "offsets start at 0": lambda b, o: o[0].add_(16),
    "offsets start at 0, not below": lambda b, o: o[0].sub_(16),
    "offsets never fall": lambda b, o: o[4].copy_(o[3] - 16),
    "offsets aren't negative": lambda b, o: o[4].fill_(-16),
    "offsets stay below the end": lambda b, o: o[4].fill_(o[-1] + 16),
    "offsets are far from overflow": lambda b, o: o[4].fill_(2**63 - 1),
    "offsets end with values, not before": lambda b, o: o[-1].sub_(16),
    "offsets end with values, not after": lambda b, o: o[-1].add_(16),
    "a tile has no more ones than its offsets allow": lambda b, o: b[0, :16].fill_(-1),
    "a tile has no fewer ones": lambda b, o: _thin_out(b),
    "a tile doesn't take from the next": lambda b, o: o[1].add_(16),
    "no bit right of the matrix": lambda b, o: _move_bit(b, (0, 65, 0), 5),
    "no bit right of the matrix, lower half": lambda b, o: _move_bit(b, (1, 65, 1), 63),
    "no bit below the matrix": lambda b, o: _move_bit(b, (2, 3, 0), 24),
}


@pytest.mark.parametrize("rule", RULES)
@on_backends("lscd_unpack", "lscd_linear")
def test_rules_of_the_format(backend: Backend, rule: str) -> None:
    if not backend.raises_on_corrupt:
        pytest.skip("can't raise without waiting for the device")
    w = Weights(35, 525, torch.bfloat16, sparsity=0.2)
    values, bitmap, offsets = w.packed
    broken = bitmap.clone(), offsets.clone()
    RULES[rule](*broken)
    assert not format.is_valid((values, *broken), *w.size)
    x = torch.ones(1, w.cols, dtype=w.dtype)
    for op, args in (("lscd_unpack", ()), ("lscd_linear", (x,))):
        backend.run(op, *args, *w.packed, *w.size)
        with pytest.raises(RuntimeError, match=f"effk::{op}: .*corrupt"):
            backend.run(op, *args, values, *broken, *w.size)


@on_backends("lscd_linear")
def test_bound_is_tight_enough_to_see_one_weight(backend: Backend) -> None:
    """The bound would be no test if leaving out one weight of average size stayed within it."""
    case = Linear(Weights(16, 512, torch.float32, sparsity=0.5), 2)
    w = case.w.dense.clone()
    w[3, int(w[3].nonzero()[0])] = 0
    with pytest.raises(AssertionError, match="out of bounds"):
        case.exact(backend.unit, w=w).assert_holds(case.run(backend))
