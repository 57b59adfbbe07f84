"""Gradients of vq_attend against the dense formula in float64, with what their backward may lose in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import effk
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from ..kit import tensors
from ..kit.backends import device_params
from ..kit.errors import FLUSH, UNDERFLOW, Bounded, matmul, roundings
from .strategies import FLOATS, Attend, attends, attention, dense_attend, zeros

UNIT = 2**-23 if torch.cuda.is_available() else 2**-24
NAMES = ("q", "k", "v")

every_device = pytest.mark.parametrize("device", device_params())


def inputs_of(case: Attend, device: str = "cpu") -> dict[str, Tensor]:
    return {name: tensors.to_device(getattr(case, name), device).requires_grad_() for name in NAMES}


def call(case: Attend, inputs: dict[str, Tensor], function: Any = None) -> tuple[Tensor, Tensor]:
    device = inputs["q"].device
    idx, count = (None if t is None else t.to(device) for t in (case.idx, case.count))
    return (function or torch.ops.effk.vq_attend)(*(inputs[name] for name in NAMES), idx, count, scale=case.scale)


def gradients_from_above(case: Attend, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Of out and lse; not contiguous, as they may come."""
    shape = (case.batch, case.heads * case.group)
    of_out = tensors.values((*shape, case.value_dim), dtype or case.dtype, "normal", case.seed + 7)
    of_lse = tensors.values(shape, dtype or torch.float32, "normal", case.seed + 8)
    return tensors.lay_out(of_out, "strided"), tensors.lay_out(of_lse, "strided")


def gradients(case: Attend, of: tuple[Tensor, Tensor], function: Any = None, device: str = "cpu") -> dict[str, Tensor]:
    inputs = inputs_of(case, device)
    out = call(case, inputs, function)
    got = torch.autograd.grad(out, list(inputs.values()), [tensors.to_device(t, device) for t in of])
    return dict(zip(NAMES, got, strict=True))


def exact_gradients(case: Attend, of: tuple[Tensor, Tensor]) -> dict[str, Bounded]:
    """With p the weights, g the gradient of out and l that of lse:

    s = p (v g - sum p (v g) + l) is that of the scores; then q gets scale s k, k scale s q, and v p g. The weights are
    made from lse, which has an error of its own; and where a head names a key twice, or several heads do, sums of
    float32 go on.
    """
    out = {name: zeros(*getattr(case, name).shape, unit=UNIT) for name in NAMES}
    scale = case.dim**-0.5 if case.scale is None else case.scale
    for b in range(case.batch):
        for h in range(case.heads * case.group):
            chosen, head = case.chosen(b, h), h // case.group
            n, more = len(chosen), roundings(max(1, case.entries * case.group) + 4, UNIT)
            if n == 0:
                continue
            q, rows, values = case.q[b, h], case.k[b, head, chosen], case.v[b, head, chosen]
            g, of_lse = of[0][b, h], of[1][b, h].double()
            lse = attention(q, rows, values.double(), case.scale, UNIT)[1]
            dots = matmul(q[None], rows, UNIT)
            score = scale * dots.value[0]
            off = abs(scale) * dots.error[0] + UNIT * (5 * score.abs() + 2 * lse.value.abs() + 8) + lse.error
            p = (score - lse.value).exp()
            p_off = p * off.expm1() + FLUSH
            moved = matmul(g[None].to(values.dtype), values, UNIT)
            dp, dp_off = moved.value[0], moved.error[0]
            mean = (p * dp).sum()
            mean_off = (p_off * dp.abs() + (p + p_off) * dp_off).sum()
            mean_off = mean_off + more * ((p + p_off) * (dp.abs() + dp_off)).sum()
            inner = dp - mean + of_lse
            inner_off = dp_off + mean_off
            inner_off = inner_off + 3 * UNIT * (dp.abs() + mean.abs() + of_lse.abs() + inner_off)
            s = p * inner
            s_off = p_off * inner.abs() + (p + p_off) * inner_off
            s_off = s_off + 2 * UNIT * (s.abs() + s_off)
            q64, k64, g64 = q.double(), rows.double(), g.double()
            out["q"].value[b, h] = scale * (s @ k64)
            out["q"].error[b, h] = abs(scale) * ((s_off + more * (s.abs() + s_off)) @ k64.abs()) + n * UNDERFLOW
            for name, value, error in (
                ("k", scale * s[:, None] * q64, abs(scale) * (s_off + more * (s.abs() + s_off))[:, None] * q64.abs()),
                ("v", p[:, None] * g64, (p_off + more * (p + p_off))[:, None] * g64.abs()),
            ):
                out[name].value[b, head].index_add_(0, chosen, value)
                out[name].error[b, head].index_add_(0, chosen, error + UNDERFLOW)
    return out


@every_device
def test_gradients_are_those_of_the_dense_formula(device: str) -> None:
    """With keys twice or not at all, lists of groups and of heads, ragged, and all keys."""

    def check(case: Attend) -> None:
        of = gradients_from_above(case)
        got = gradients(case, of, device=device)
        for name, exact in exact_gradients(case, of).items():
            assert got[name].dtype == case.dtype
            exact.assert_holds(got[name].cpu(), f"gradient of {name}")

    settings(max_examples=60)(given(case=attends(kinds=("normal",)))(check))()


def cases_of(dtype: torch.dtype = torch.float32) -> list[Attend]:
    """Of everything a little; no list is empty."""
    cases = [
        Attend(9, 6, 5, 2, 3, 2, lists, cap=7, ragged=ragged, repeats=repeats, dtype=dtype, seed=i)
        for i, (lists, ragged, repeats) in enumerate(
            [
                (None, False, False),
                (None, True, False),
                ("group", True, True),
                ("group", False, False),
                ("head", True, True),
            ]
        )
    ]
    for case in cases:
        if case.count is not None:
            case.count.clamp_(min=1)
    return cases


def test_the_bounds_are_about_the_formula() -> None:
    """exact_gradients against autograd through dense_attend."""
    for case in cases_of():
        inputs = {name: getattr(case, name).double().requires_grad_() for name in NAMES}
        of = gradients_from_above(case, torch.float32)
        got = torch.autograd.grad(call(case, inputs, dense_attend), list(inputs.values()), [t.double() for t in of])
        for name, result in zip(NAMES, got, strict=True):
            exact = exact_gradients(case, of)[name].value
            torch.testing.assert_close(result, exact, rtol=1e-11, atol=1e-13, msg=name)


@every_device
def test_the_bound_sees_one_number(device: str) -> None:
    for case in cases_of():
        if case.ragged:
            continue  # with one key, its weight is 1 whatever comes from above
        of = gradients_from_above(case)
        got = gradients(case, of, device=device)
        of[0][1, 2, 3] += 1
        for name, exact in exact_gradients(case, of).items():
            with pytest.raises(AssertionError, match="out of bounds"):
                exact.assert_holds(got[name].cpu())


@every_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_gradient_without_the_others(dtype: torch.dtype, device: str) -> None:
    """The same bits as of all, and the same bits twice; of out alone, or of lse."""
    for case in cases_of(dtype):
        of = gradients_from_above(case)
        together = gradients(case, of, device=device)
        for name in NAMES:
            inputs = {n: t.detach().requires_grad_(n == name) for n, t in inputs_of(case, device).items()}
            out = call(case, inputs)
            (alone,) = torch.autograd.grad(out, inputs[name], [t.to(device) for t in of])
            assert tensors.same_bits(alone, together[name]), name
        inputs = inputs_of(case, device)
        one = torch.autograd.grad(call(case, inputs)[0].sum(), list(inputs.values()))
        ones = (torch.ones_like(of[0]).contiguous(), torch.zeros_like(of[1]).contiguous())
        for name, got in zip(NAMES, one, strict=True):
            assert tensors.same_bits(got, gradients(case, ones, device=device)[name]), name


@every_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_keys_that_are_not_attended_to_leak_no_nan(dtype: torch.dtype, device: str) -> None:
    """Their gradients are 0; what a list holds from count on may be out of range."""
    for case in cases_of(dtype):
        of = gradients_from_above(case)
        wanted = gradients(case, of, device=device)
        k, v = case.k.clone(), case.v.clone()
        never = torch.ones(k.shape[:3], dtype=torch.bool)
        for b in range(case.batch):
            for h in range(case.heads * case.group):
                never[b, h // case.group, case.chosen(b, h)] = False
        k[never], v[never] = torch.nan, torch.inf
        spoiled = replace(case)
        idx = case.idx
        if idx is not None and case.count is not None:
            idx = torch.where(torch.arange(case.entries) < case.count[..., None], idx, -(2**40))
        spoiled.__dict__.update(q=case.q, k=k, v=v, idx=idx, count=case.count)
        got = gradients(spoiled, of, device=device)
        for name in NAMES:
            assert tensors.same_bits(got[name], wanted[name]), name
        assert not bool(got["k"][never].any()) and not bool(got["v"][never].any())


@every_device
def test_nothing_to_do(device: str) -> None:
    """No batches, keys, entries, values, or none that count."""
    for change in ({"batch": 0}, {"keys": 0}, {"cap": 0}, {"value_dim": 0}):
        for case in cases_of():
            case = replace(case, **change)
            of = gradients_from_above(case)
            got = gradients(case, of, device=device)
            for name, exact in exact_gradients(case, of).items():
                exact.assert_holds(got[name].cpu(), f"{change} {name}")
    case = cases_of()[2]
    assert case.count is not None
    case.count.zero_()
    assert not any(bool(g.any()) for g in gradients(case, gradients_from_above(case), device=device).values())


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled(dynamic: bool) -> None:
    """The same gradients, to the bit."""
    torch._dynamo.reset()
    case = cases_of()[2]
    idx, count = case.idx, case.count

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = torch.ops.effk.vq_attend(q * 2, k * 2, v * 2, idx, count)
        return out.square().sum() + lse.square().sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    values = list(inputs_of(case).values())
    both = [torch.autograd.grad(f(*values), values) for f in (compiled, function)]
    assert all(map(tensors.same_bits, *both))


def second(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of a penalty on gradients."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out, lse = function(*inputs)
    first = torch.autograd.grad((out * out).sum() + (lse * lse).sum(), inputs, create_graph=True)
    return list(torch.autograd.grad(sum((g * g).sum() for g in first), inputs))


@pytest.mark.parametrize("number", range(5))
def test_second_derivatives(number: int) -> None:
    """As far from float64 as the dense formula in float32 is, some times over."""
    case = cases_of()[number]

    def of(f: Any, dtype: torch.dtype) -> list[Tensor]:
        inputs = [getattr(case, name).to(dtype) for name in NAMES]
        return second(lambda q, k, v: f(q, k, v, case.idx, case.count), inputs)

    exact = of(dense_attend, torch.float64)
    found, plain = of(effk.vq.attend, torch.float32), of(dense_attend, torch.float32)
    for got, usual, wanted in zip(found, plain, exact, strict=True):
        error, other = ((t - wanted).abs().max() for t in (got, usual))
        assert error <= 16 * other + 64 * 2.0**-24 * float(wanted.abs().max())
