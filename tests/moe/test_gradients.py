"""Gradients of moe against the dense formulas in float64, with what their backward may lose in float32 and where it
rounds to the inputs' type."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import effk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ..kit import tensors
from ..kit.backends import device_params
from ..kit.errors import UNDERFLOW, Bounded, finite_magnitude, matmul, matmul_of, roundings
from .strategies import (
    ACTIVATIONS,
    FLOATS,
    FORMULAS,
    Combine,
    Grouped,
    Mlp,
    Route,
    combines,
    dense_combine,
    dense_grouped_gemm,
    dense_grouped_wgrad,
    dense_mlp,
    groupeds,
    mlps,
    part_of,
    put,
    routes,
    zeros,
)

UNIT = 2**-23 if torch.cuda.is_available() else 2**-24
Case = Route | Grouped | Combine | Mlp
# Case -> op, names of the inputs that have gradients.
OPS: dict[type, tuple[str, tuple[str, ...]]] = {
    Route: ("moe_route", ("logits",)),
    Grouped: ("moe_grouped_gemm", ("x", "w", "bias")),
    Combine: ("moe_combine", ("y", "weights")),
    Mlp: ("moe_mlp", ("x", "w13", "w2", "weights")),
}

every_device = pytest.mark.parametrize("device", device_params())
on_every_op = pytest.mark.parametrize("kind", list(OPS), ids=lambda kind: OPS[kind][0])


def inputs_of(case: Case, device: str = "cpu") -> dict[str, Tensor]:
    given = {name: getattr(case, name) for name in OPS[type(case)][1]}
    return {k: tensors.to_device(t, device).requires_grad_() for k, t in given.items() if t is not None}


def caller(case: Case, device: str, function: Any = None) -> Callable[[dict[str, Tensor]], Tensor]:
    """The op, or its formula, as a function of those inputs that have gradients; of moe_route the weights."""
    function = function or getattr(torch.ops.effk, OPS[type(case)][0])

    def there(t: Tensor | None) -> Tensor | None:
        return None if t is None else tensors.to_device(t, device)

    if isinstance(case, Route):
        k, bias = case.k, there(case.bias)
        options = {"score": case.score, "renormalize": case.renormalize}
        return lambda given: function(given["logits"], k, bias, **options)[0]
    if isinstance(case, Grouped):
        offsets, source, out_dtype = there(case.offsets), there(case.source), case.out_dtype
        return lambda given: function(given["x"], given["w"], offsets, given.get("bias"), source, out_dtype=out_dtype)
    if isinstance(case, Combine):
        inverse = there(case.inverse)
        return lambda given: function(given["y"], inverse, given["weights"])
    ids, options = there(case.ids), {"activation": case.activation, "gemm": case.gemm}
    return lambda given: function(given["x"], given["w13"], given["w2"], given["weights"], ids, **options)


def call(case: Case, inputs: dict[str, Tensor], function: Any = None) -> Tensor:
    return caller(case, next(iter(inputs.values())).device.type, function)(inputs)


# What a backward pass may lose ---------------------------------------------------------------------------------------


def given_exactly(t: Tensor) -> Bounded:
    return Bounded(t.double(), torch.zeros_like(t, dtype=torch.float64), finite_magnitude(t), UNIT)


def transposed(b: Bounded) -> Bounded:
    return Bounded(b.value.mT, b.error.mT, b.peak.mT, b.unit)


def stored(b: Bounded, dtype: torch.dtype) -> Bounded:
    """In a tensor of dtype; not at all rounded for float64, which is for the formulas themselves."""
    return b if dtype == torch.float64 else b.stored(dtype)


def summed(b: Bounded, dim: int = -1) -> Bounded:
    """In float32, in any order."""
    n = b.value.shape[dim]
    error = b.error + roundings(n, UNIT) * (b.value.abs() + b.error) + UNDERFLOW
    return Bounded(b.value.sum(dim, True), error.sum(dim, True), b.peak.sum(dim, True), UNIT)


def added(a: Bounded, b: Bounded, sign: int = 1) -> Bounded:
    value, error = a.value + sign * b.value, a.error + b.error
    return Bounded(value, error + UNIT * (value.abs() + error) + UNDERFLOW, a.peak + b.peak, UNIT)


def inverted(b: Bounded) -> Bounded:
    """1 / b, of positive numbers, as GPUs divide."""
    least = b.value - b.error
    error = b.error / (b.value * least) + 4 * UNIT / least
    return Bounded(1 / b.value, error, 1 / least, UNIT)


def into(out: Bounded, at: object, part: Bounded) -> None:
    """Added to what is there, exactly."""
    for name in ("value", "error", "peak"):
        getattr(out, name).index_put_((at,), getattr(part, name), accumulate=True)


def scattered(terms: Bounded, places: Tensor, size: int) -> Bounded:
    """The sum of those terms whose place is each number, in float32."""
    out = zeros(size, terms.value.shape[1], unit=UNIT)
    count = torch.bincount(places, minlength=size)[places].double()[:, None]
    error = terms.error + roundings(count, UNIT) * (terms.value.abs() + terms.error)
    into(out, places, Bounded(terms.value, error, terms.peak, UNIT))
    return out


def gradients_of_route(case: Route, grad: Tensor, dtype: torch.dtype) -> dict[str, Bounded]:
    """softmax: s (g - sum g s); sigmoid: g s (1 - s); renormalized: g' = (g - sum g w) / sum of the chosen s."""
    scores = case.scores(UNIT)
    logits = case.logits.reshape(case.tokens, case.experts)
    with torch.no_grad():
        by = logits.float() if case.bias is None else scores.value + case.bias.double()
    ids = by.sort(dim=-1, descending=True, stable=True).indices[:, : case.k]
    of_chosen = given_exactly(grad.reshape(case.tokens, case.k))
    chosen = Bounded(*(t.gather(-1, ids) for t in (scores.value, scores.error, scores.peak)), UNIT)
    chosen.peak = chosen.value + 1
    if case.renormalize and case.k > 0:
        over_total = inverted(summed(chosen))
        moved = summed(of_chosen.by(chosen.by(over_total)))
        of_chosen = added(of_chosen, moved, -1).by(over_total)
    of_scores = zeros(case.tokens, case.experts, unit=UNIT)
    for name in ("value", "error", "peak"):
        getattr(of_scores, name).scatter_(-1, ids, getattr(of_chosen, name))
    scores.peak = scores.value + 1
    if case.score == "softmax":
        out = scores.by(added(of_scores, summed(of_scores.by(scores)), -1))
    else:
        one = given_exactly(torch.ones_like(scores.value))
        out = of_scores.by(scores).by(added(one, scores, -1))
    return {"logits": out}


def gradients_of_grouped(case: Grouped, grad: Tensor, dtype: torch.dtype) -> dict[str, Bounded]:
    rows = zeros(case.sorted_rows, case.cols, unit=UNIT)
    of_w = zeros(case.experts, case.rows, case.cols, unit=UNIT)
    of_bias = zeros(case.experts, case.rows, unit=UNIT)
    x, ones = case.x_sorted(), torch.ones(case.sorted_rows, 1)
    for e, at in case.groups():
        put(rows, at, matmul(grad[at], case.w[e].T, UNIT))
        put(of_w, e, matmul(grad[at].T, x[at].T, UNIT))
        put(of_bias, e, matmul(ones[at].T.to(grad.dtype), grad[at].T, UNIT))
    last = sum(case.counts)
    of_x = (
        rows if case.source is None else scattered(part_of(rows, slice(last)), case.source[:last].long(), len(case.x))
    )
    return {"x": of_x, "w": of_w, "bias": of_bias}


def gradients_of_combine(case: Combine, grad: Tensor, dtype: torch.dtype) -> dict[str, Bounded]:
    places, weights = case.inverse.flatten().long(), given_exactly(case.weights.reshape(-1, 1))
    g = given_exactly(grad.reshape(case.tokens, case.cols).repeat_interleave(case.pairs, 0))
    there = places >= 0
    of_y = scattered(part_of(weights.by(g), there), places[there], case.rows)
    of_weights = zeros(case.tokens * case.pairs, 1, unit=UNIT)
    put(of_weights, there, summed(part_of(g, there).by(given_exactly(case.y[places[there]]))))
    return {"y": of_y, "weights": of_weights}


# The largest slope of an activation's own slope, rounded up.
CURVATURE = {"swiglu": 0.51, "geglu": 0.8, "geglu_tanh": 0.82}


def slope(gate: Bounded, activation: str) -> Bounded:
    """The derivative, which is a sum of few terms, each of size up to 1 + |gate|, of functions as good as those of the
    activation itself."""
    name = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}[activation]
    backward = {
        "silu": torch.ops.aten.silu_backward,
        "gelu": torch.ops.aten.gelu_backward,
        "gelu_tanh": functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    }[name]
    error = CURVATURE[activation] * gate.error + 16 * UNIT * (1 + gate.value.abs() + gate.error)
    return Bounded(backward(torch.ones_like(gate.value), gate.value), error, torch.ones_like(gate.peak) * 1.13, UNIT)


def gradients_of_mlp(case: Mlp, grad: Tensor, dtype: torch.dtype) -> dict[str, Bounded]:
    """By the chain rule. h, the gradient of what is before the activation, and weight * grad are rounded to dtype."""
    tokens, k, inner = case.tokens, case.pairs, case.inner
    x, g = case.x.reshape(tokens, case.cols), grad.reshape(tokens, case.cols)
    ids, weights = case.flat_ids.flatten(), case.weights.reshape(-1, 1)
    token = torch.arange(tokens).repeat_interleave(k)
    rows = zeros(tokens * k, case.cols, unit=UNIT)  # of x, for each pair
    of_w13, of_w2 = (zeros(*w.shape, unit=UNIT) for w in (case.w13, case.w2))
    of_weights = zeros(tokens * k, 1, unit=UNIT)
    for e in case.used if inner > 0 else []:
        pairs = (ids == e).nonzero()[:, 0]
        own_x, own_g, weight = x[token[pairs]], g[token[pairs]], weights[pairs]
        z = [matmul(own_x, w, UNIT) for w in case.w13[e].split(inner)]
        gate, up = z[0], z[-1]
        h = stored(gate.gated(up, case.activation), dtype)
        of_h = matmul(own_g, case.w2[e].T, UNIT)
        put(of_weights, pairs, summed(h.by(of_h)))
        weighted = stored(given_exactly(own_g).times(weight), dtype)
        put(of_w2, e, matmul_of(transposed(weighted), transposed(h), dtype))
        of_h = of_h.times(weight)
        if case.activation == "relu2":
            parts = [of_h.by(gate.activated("relu")).times(torch.tensor(2.0))]
        else:
            function = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}[case.activation]
            parts = [of_h.by(up).by(slope(gate, case.activation)), of_h.by(gate.activated(function))]
        joined = (torch.cat([getattr(p, name) for p in parts], -1) for name in ("value", "error", "peak"))
        of_z = stored(Bounded(*joined, UNIT), dtype)
        put(of_w13, e, matmul_of(transposed(of_z), given_exactly(own_x.T), dtype))
        put(rows, pairs, matmul_of(of_z, case.w13[e].T, dtype))
    return {"x": scattered(rows, token, tokens), "w13": of_w13, "w2": of_w2, "weights": of_weights}


GRADIENTS: dict[type, Callable[[Any, Tensor, torch.dtype], dict[str, Bounded]]] = {
    Route: gradients_of_route,
    Grouped: gradients_of_grouped,
    Combine: gradients_of_combine,
    Mlp: gradients_of_mlp,
}


def exact_gradients(case: Case, grad: Tensor, dtype: torch.dtype) -> dict[str, Bounded]:
    """dtype: that of the inputs, or float64 for what is exact."""
    return GRADIENTS[type(case)](case, grad, dtype)


def check_gradients(case: Case, device: str) -> None:
    inputs = inputs_of(case, device)
    out = call(case, inputs)
    # Not contiguous, as gradients may come from above.
    grad = tensors.lay_out(tensors.values(tuple(out.shape), out.dtype, "normal", case.seed), "strided")
    got = torch.autograd.grad(out, list(inputs.values()), tensors.to_device(grad, device))
    wanted = exact_gradients(case, grad.to(case.dtype) if isinstance(case, Grouped) else grad, case.dtype)
    for (name, of), result in zip(inputs.items(), got, strict=True):
        assert result.shape == of.shape and result.dtype == of.dtype, name
        exact = wanted[name]
        exact.assert_holds(result.reshape(exact.value.shape).cpu(), f"gradient of {name}")


def _clear(case: Route) -> bool:
    """Whether nothing float32 may lose changes the choice."""
    if case.bias is None:
        return True
    by = (case.scores(UNIT).value + case.bias.double()).sort(-1).values
    return bool(((by[:, 1:] - by[:, :-1]) > 1e-4).all())


STRATEGIES: dict[type, st.SearchStrategy[Any]] = {
    Route: routes(kinds=("normal",)).map(lambda c: replace(c, ties=False)).filter(_clear),
    Grouped: groupeds(kinds=("normal",)),
    Combine: combines(kinds=("normal",)),
    Mlp: mlps(kinds=("normal",)),
}


@every_device
@on_every_op
def test_gradients_are_those_of_the_dense_formula(kind: type, device: str) -> None:
    """With experts twice or not at all, dropped pairs, rows gathered often or never, and rows past the last."""
    settings(max_examples=100)(given(case=STRATEGIES[kind])(check_gradients))(device=device)


def cases_of(kind: type, dtype: torch.dtype = torch.float32, contents: str = "normal") -> list[Any]:
    """Of everything a little."""
    if kind is Route:
        return [
            Route(7, 3, (4,), dtype, contents, with_bias=bias, score=score, renormalize=renormalize)
            for bias in (False, True)
            for score in ("softmax", "sigmoid")
            for renormalize in (False, True)
        ]
    if kind is Grouped:
        return [
            Grouped((2, 0, 5), 4, 3, past=2, gather=gather, dtype=dtype, kind=contents, with_bias=True)
            for gather in (None, "order", "repeats")
        ]
    if kind is Combine:
        return [Combine(5, 3, (4,), 3, dtype, contents)]
    return [
        Mlp(5, 4, 4, (6,), 3, activation, dtype=dtype, kind=contents, seed=i)
        for i, activation in enumerate(ACTIVATIONS)
    ]


@on_every_op
def test_the_bounds_are_about_the_formulas(kind: type) -> None:
    """exact_gradients against autograd through the dense formulas."""
    for case in cases_of(kind):
        inputs = {k: t.detach().double().requires_grad_() for k, t in inputs_of(case).items()}
        out = call(case, inputs, FORMULAS[OPS[kind][0]])
        grad = tensors.values(tuple(out.shape), torch.float64, "integers", 1)
        got = torch.autograd.grad(out, list(inputs.values()), grad)
        exact = exact_gradients(case, grad, torch.float64)
        for name, result in zip(inputs, got, strict=True):
            wanted = exact[name].value
            torch.testing.assert_close(result.reshape(wanted.shape), wanted, rtol=1e-11, atol=1e-13, msg=name)


@every_device
@pytest.mark.parametrize("kind", [Grouped, Combine], ids=lambda kind: OPS[kind][0])
def test_gradcheck_is_exact(kind: type, device: str) -> None:
    """These are linear in each of their inputs, so differences over steps of 1 are exact."""
    for case in cases_of(kind, contents="integers"):
        if isinstance(case, Combine):
            case.weights.copy_(tensors.values(tuple(case.weights.shape), torch.float32, "integers", 7))
        inputs = inputs_of(case, device)

        def function(*values: Tensor, case: Any = case, inputs: dict[str, Tensor] = inputs) -> Tensor:
            return call(case, dict(zip(inputs, values, strict=True)))

        with pytest.warns(UserWarning, match="not a double precision"):  # true, and harmless here
            assert torch.autograd.gradcheck(function, list(inputs.values()), eps=1.0, atol=0, rtol=0)


@every_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_every_op
def test_one_gradient_without_the_others(kind: type, dtype: torch.dtype, device: str) -> None:
    """The same bits as of all."""
    for case in cases_of(kind, dtype):
        all_of = inputs_of(case, device)
        out = call(case, all_of)
        together = torch.autograd.grad(out.sum(), list(all_of.values()))
        for i, wanted in enumerate(all_of):
            one = {name: t.detach().requires_grad_(name == wanted) for name, t in all_of.items()}
            (alone,) = torch.autograd.grad(call(case, one).sum(), one[wanted])
            assert tensors.same_bits(alone, together[i]), wanted


def check_spoiled(
    clean: Case, spoiled: dict[str, Tensor], idle: dict[str, Tensor], grad: Tensor, spoiled_grad: Tensor
) -> None:
    """The same gradients with NaN where nothing should look; they are 0 there."""
    inputs = inputs_of(clean)
    wanted = torch.autograd.grad(call(clean, inputs), list(inputs.values()), grad)
    changed = {name: spoiled.get(name, t).detach().requires_grad_() for name, t in inputs.items()}
    got = torch.autograd.grad(call(clean, changed), list(changed.values()), spoiled_grad)
    for name, a, b in zip(inputs, got, wanted, strict=True):
        assert tensors.same_bits(a, b), name
        if name in idle:
            assert bool((a[idle[name]] == 0).all()), name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_products_idle_experts_and_rows_leak_no_nan(dtype: torch.dtype) -> None:
    for gather in (None, "repeats"):
        case = Grouped((2, 0, 5, 0), 4, 3, past=3, gather=gather, dtype=dtype, with_bias=True)
        assert case.bias is not None
        idle = torch.tensor([1, 3])
        w, bias, x = case.w.clone(), case.bias.clone(), case.x.clone()
        w[idle], bias[idle] = torch.nan, torch.nan
        rows = torch.arange(7) if case.source is None else case.source[:7].long()
        never = ~torch.isin(torch.arange(len(x)), rows)
        x[never] = torch.nan
        grad = tensors.values((10, 4), dtype, "normal", 3)
        spoiled_grad = grad.clone()
        spoiled_grad[7:] = torch.nan
        where = {"w": idle, "bias": idle, "x": never}
        check_spoiled(case, {"w": w, "bias": bias, "x": x}, where, grad, spoiled_grad)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_isnt_combined_leaks_no_nan(dtype: torch.dtype) -> None:
    """Rows that no token names, weights beside -1, and the gradient of a token without rows."""
    case = Combine(6, 3, (4,), 3, dtype, none=0.4)
    case.inverse[2] = -1
    never = ~torch.isin(torch.arange(6), case.inverse.flatten())
    y, weights = case.y.clone(), case.weights.clone()
    y[never], weights[case.inverse < 0] = torch.nan, torch.nan
    grad = tensors.values((4, 3), dtype, "normal", 3)
    spoiled_grad = grad.clone()
    spoiled_grad[2] = torch.nan
    where = {"y": never, "weights": case.inverse < 0}
    check_spoiled(case, {"y": y, "weights": weights}, where, grad, spoiled_grad)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_takes_no_part_in_an_mlp_leaks_no_nan(dtype: torch.dtype, activation: str) -> None:
    """Experts without tokens, tokens without experts (padding) and their gradients, and weights of dropped pairs."""
    case = Mlp(5, 4, 5, (6,), 2, activation, dtype=dtype)
    case.ids.copy_(torch.tensor([[0, 2], [2, 2], [-1, -1], [-1, 0], [4, -1], [0, 4]]))
    w13, w2, x, weights = (t.clone() for t in (case.w13, case.w2, case.x, case.weights))
    unused = torch.tensor([1, 3])
    w13[unused], w2[unused], x[2], weights[case.ids < 0] = (torch.nan,) * 4
    grad = tensors.values((6, 5), dtype, "normal", 3)
    spoiled_grad = grad.clone()
    spoiled_grad[2] = torch.nan
    where = {"w13": unused, "w2": unused, "x": torch.tensor([2]), "weights": case.ids < 0}
    check_spoiled(case, {"w13": w13, "w2": w2, "x": x, "weights": weights}, where, grad, spoiled_grad)


@every_device
def test_nothing_to_do(device: str) -> None:
    """No tokens, experts, pairs, rows or columns."""
    cases: list[Case] = [
        *(replace(Route(5, 2, (3,)), **change) for change in ({"lead": (0,)}, {"k": 0}, {"experts": 0, "k": 0})),
        *(
            replace(Grouped((2, 3), 4, 3, with_bias=True), **change)
            for change in ({"counts": ()}, {"counts": (0, 0)}, {"rows": 0}, {"cols": 0}, {"counts": (), "past": 3})
        ),
        Grouped((), 4, 3, gather="order"),
        *(
            replace(Combine(5, 3, (4,), 2), **change)
            for change in ({"lead": (0,)}, {"rows": 0}, {"cols": 0}, {"pairs": 0}, {"lead": ()})
        ),
        *(
            replace(Mlp(5, 4), activation=activation, **change)
            for activation in ACTIVATIONS
            for change in (
                {"lead": (0,)},
                {"cols": 0},
                {"inner": 0},
                {"experts": 0},
                {"pairs": 0},
                {"none": 1.0},
                {"lead": ()},
            )
        ),
    ]
    for case in cases:
        check_gradients(case, device)


def test_sums_too_small_to_divide_by() -> None:
    """Where the weights' sum is below the least that they are divided by, that is a constant."""
    logit = -88.2  # sigmoid gives a subnormal number
    logits = torch.full((1, 3), logit, requires_grad=True)
    weights, _ = torch.ops.effk.moe_route(logits, 2, score="sigmoid")
    (grad,) = torch.autograd.grad(weights.sum(), logits)
    exact = math.exp(logit) / 2**-126  # of each of the two that are chosen
    for got, wanted in zip(grad[0].tolist(), (exact, exact, 0.0), strict=True):
        # The exponential's argument is rounded, and its result is a multiple of the smallest number.
        assert abs(got - wanted) <= (2 * abs(logit) + 16) * UNIT * wanted + (wanted > 0) * 2.0**-149 / 2**-126


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_every_op
def test_gradients_are_the_same_bits_twice(kind: type, dtype: torch.dtype) -> None:
    for case in cases_of(kind, dtype):
        twice = []
        for _ in range(2):
            inputs = inputs_of(case)
            twice.append(torch.autograd.grad(call(case, inputs).sum(), list(inputs.values())))
        assert all(map(tensors.same_bits, *twice))


@pytest.mark.parametrize("dynamic", [True, False])
@on_every_op
def test_compiled(kind: type, dynamic: bool) -> None:
    """The same gradients, to the bit."""
    torch._dynamo.reset()
    case = cases_of(kind)[-1]
    inputs, run = inputs_of(case), caller(case, "cpu")
    names = list(inputs)

    def function(*values: Tensor) -> Tensor:
        return run({name: v * 2 for name, v in zip(names, values, strict=True)}).square()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    values = list(inputs.values())
    gradients = [torch.autograd.grad(f(*values).sum(), values) for f in (compiled, function)]
    assert all(map(tensors.same_bits, *gradients))


# Second derivatives, and open sizes ---------------------------------------------------------------------------------


def second(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of a penalty on gradients."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = function(*inputs)
    first = torch.autograd.grad((out * out).sum(), inputs, create_graph=True)
    return list(torch.autograd.grad(sum((g * g).sum() for g in first), inputs))


def integers(*shape: int) -> Tensor:
    return torch.randint(-1, 2, shape).float()


OFFSETS, GATHER = torch.tensor([2, 2, 5]), torch.tensor([3, 0, 0, 2, 1, 2])


@pytest.mark.parametrize("gather", [None, GATHER])
def test_second_derivatives_of_products(gather: Tensor | None) -> None:
    """Of integers so small that all is exact."""
    x, w, bias = integers(6 if gather is None else 4, 3), integers(3, 2, 3), integers(3, 2)
    gemm = [functools.partial(f, offsets=OFFSETS) for f in (effk.moe.grouped_gemm, dense_grouped_gemm)]
    found, wanted = (second(lambda x, w, b, f=f: f(x, w, bias=b, gather=gather), [x, w, bias]) for f in gemm)
    assert any(bool(t.any()) for t in wanted) and all(map(torch.equal, found, wanted))
    grad = integers(6, 2)
    found, wanted = (
        second(lambda g, x, f=f: f(g, x, OFFSETS, gather), [grad, x])
        for f in (effk.moe.grouped_wgrad, dense_grouped_wgrad)
    )
    assert any(bool(t.any()) for t in wanted) and all(map(torch.equal, found, wanted))


def test_second_derivatives_of_combine() -> None:
    inverse = torch.tensor([[0, 3], [2, -1], [2, 1]])
    inputs = [integers(4, 3), integers(3, 2)]
    found, wanted = (second(lambda y, w, f=f: f(y, inverse, w), inputs) for f in (effk.moe.combine, dense_combine))
    assert any(bool(t.any()) for t in wanted) and all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives_of_mlp(activation: str) -> None:
    """As far from float64 as the dense formula in float32 is, some times over; exact where all are integers."""
    torch.manual_seed(0)
    make = integers if activation == "relu2" else torch.randn
    inputs = [make(5, 3), make(3, 4 if activation == "relu2" else 8, 3), make(3, 3, 4), make(5, 2)]
    ids = torch.tensor([[0, 2], [2, -1], [0, 0], [2, 0], [-1, -1]])

    def of(f: Any, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        call = lambda x, w13, w2, weights: f(x, w13, w2, weights, ids, activation=activation)  # noqa: E731
        return second(call, [t.to(dtype) for t in inputs])

    exact = of(dense_mlp, torch.float64)
    for found, plain, wanted in zip(of(effk.moe.mlp), of(dense_mlp), exact, strict=True):
        error, usual = ((t - wanted).abs().max() for t in (found, plain))
        room = 0.0 if activation == "relu2" else 16 * 2.0**-24 * float(wanted.abs().max())
        assert error <= 4 * usual + room


def test_compiled_for_any_number_of_tokens() -> None:
    """Forward and backward, with a few variants for all."""
    torch._dynamo.reset()
    w13, w2 = torch.randn(4, 10, 6, requires_grad=True), torch.randn(4, 6, 5, requires_grad=True)

    def layer(x: Tensor, logits: Tensor) -> Tensor:
        weights, ids = effk.moe.route(logits, 2)
        perm, inverse, offsets = effk.moe.sort(ids, 4)
        rows = effk.moe.grouped_gemm(x, w2.transpose(1, 2)[:, :, :6], offsets, gather=perm // 2)
        return effk.moe.mlp(x, w13, w2, weights, ids) + effk.moe.combine(rows, inverse, weights).sum()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=3):
        for tokens in range(2, 12):
            x, logits = (torch.randn(tokens, n, requires_grad=True) for n in (6, 4))
            compiled(x, logits).sum().backward()
            assert x.grad is not None and logits.grad is not None
