"""Gradients of w4a8_linear against autograd of the dense formula: straight through, as if x weren't rounded."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from ..kit import tensors
from ..kit.backends import device_params
from ..kit.errors import UNDERFLOW, Bounded, roundings
from . import format
from .format import Packed
from .strategies import FLOATS, Linear, Stored, dense_linear, linears

UNIT = 2**-23 if torch.cuda.is_available() else 2**-24

every_device = pytest.mark.parametrize("device", device_params())


def packed_on(case: Linear, device: str) -> tuple[Tensor, ...]:
    return tuple(t.to(device) for t in case.w.packed)


def linear(case: Linear, device: str, *inputs: Tensor) -> Tensor:
    """w4a8_linear as a function of x and, if there, bias."""
    x, bias = (*inputs, None)[:2]
    packed = packed_on(case, device)
    return torch.ops.effk.w4a8_linear(x, *packed, case.w.group_size, bias, out_dtype=case.out_dtype)


def inputs_of(case: Linear, device: str) -> list[Tensor]:
    given = [case.x] if case.bias_tensor is None else [case.x, case.bias_tensor]
    return [tensors.to_device(t, device).requires_grad_() for t in given]


def exact_gradients(case: Linear, grad: Tensor) -> list[Bounded]:
    """By the dense formula in float64, with what the backward of w4a8_linear may lose:

    - the gradient and the weights are rounded to x's type (the weights by unpack to float32 before);
    - sums over features or tokens are in float32.
    """
    info = torch.finfo(case.dtype)
    unit = info.eps / 2
    tokens = grad.shape[:-1].numel()
    g, w = grad.double().reshape(tokens, case.w.rows), format.unpack(case.w.packed, case.w.group_size).double()
    peak = g.abs() @ w.abs()
    # Relative to each product: one rounding of g, one of w, and those of the sum. What the two lose where they are
    # subnormal in x's type is absolute.
    rounded = peak * (2 * unit + unit**2 + roundings(case.w.rows, UNIT))
    lost = info.smallest_normal * info.eps * (g.abs().sum(-1, keepdim=True) + w.abs().sum(0) + case.w.rows)
    grad_x = Bounded(g @ w, rounded + lost, peak, UNIT)
    total = g.abs().sum(0)
    grad_bias = Bounded(g.sum(0), roundings(tokens, UNIT) * total + UNDERFLOW, total, UNIT)
    return [grad_x, grad_bias]


def check_gradients(case: Linear, device: str) -> None:
    inputs = inputs_of(case, device)
    y = linear(case, device, *inputs)
    # Not contiguous, as gradients may come from above.
    grad = tensors.lay_out(tensors.values(tuple(y.shape), case.y_dtype, "normal", case.seed), "strided")
    got = torch.autograd.grad(y, inputs, tensors.to_device(grad, device))
    for name, a, b, of in zip(("x", "bias"), got, exact_gradients(case, grad), inputs, strict=False):
        assert a.shape == of.shape and a.dtype == of.dtype
        b.assert_holds(a.reshape(b.value.shape).cpu(), f"gradient of {name}")


@every_device
def test_gradients_are_those_of_the_dense_formula(device: str) -> None:
    cases = linears(kinds=("normal",), scales=("normal", "integers"))
    settings(max_examples=150)(given(case=cases)(check_gradients))(device=device)


def test_the_formula_itself() -> None:
    """exact_gradients against autograd through F.linear."""
    case = Linear(Stored(20, 9, 70, 32), 3, bias=torch.float32)
    x, bias = (t.double().requires_grad_() for t in (case.x, case.bias_tensor))
    y = dense_linear(x, *case.w.packed, 32, bias)
    grad = tensors.values((3, 29), torch.float64, "normal", 1)
    for a, b in zip(torch.autograd.grad(y, (x, bias), grad), exact_gradients(case, grad), strict=True):
        torch.testing.assert_close(a, b.value, rtol=1e-12, atol=1e-12)


# Rounding makes the op a staircase in x, whose differences say nothing of the gradient. But where x is integers and
# each group holds 127, its scale is 1 and no integer moves: there the op is linear, and differences over steps of 1 are
# exact.


def on_the_stairs(case: Linear, device: str) -> tuple[Any, list[Tensor]]:
    """The op of x but for one 127 in each group, and of bias; and integer inputs for it."""
    pinned = torch.arange(case.w.cols, device=device) % case.w.group_size == 0

    def function(x: Tensor, *bias: Tensor) -> Tensor:
        return linear(case, device, torch.where(pinned, 127.0, x), *bias)

    inputs = [tensors.values((2, case.w.cols), torch.float32, "integers", 1).to(device).requires_grad_()]
    if case.bias:
        inputs.append(tensors.values((case.w.rows,), torch.float32, "integers", 2).to(device).requires_grad_())
    return function, inputs


def integer_case(**options: Any) -> Linear:
    return Linear(Stored(5, 4, 35, 32, scales="integers"), 2, **options)


@every_device
def test_the_stairs_are_where_the_formula_says(device: str) -> None:
    """There the dense formula gives the results too."""
    case = integer_case(bias=torch.float32)
    function, (x, bias) = on_the_stairs(case, device)
    pinned = torch.arange(case.w.cols, device=device) % case.w.group_size == 0
    wanted = dense_linear(torch.where(pinned, 127.0, x).cpu(), *case.w.packed, 32, bias.cpu())
    assert torch.equal(function(x, bias).cpu(), wanted)


def checked(check: Any, function: Any, inputs: list[Tensor], **options: Any) -> None:
    with pytest.warns(UserWarning, match="not a double precision"):  # true, and harmless here
        assert check(function, inputs, eps=1.0, atol=0, rtol=0, **options)


@every_device
@pytest.mark.parametrize("bias", [None, torch.float32], ids=str)
def test_gradcheck_is_exact(device: str, bias: torch.dtype | None) -> None:
    checked(torch.autograd.gradcheck, *on_the_stairs(integer_case(bias=bias), device))


@every_device
def test_gradgradcheck_is_exact(device: str) -> None:
    grad = tensors.values((2, 9), torch.float32, "integers", 5).to(device).requires_grad_()
    function, inputs = on_the_stairs(integer_case(bias=torch.float32), device)
    checked(torch.autograd.gradgradcheck, function, inputs, grad_outputs=[grad])


@every_device
@pytest.mark.parametrize("wanted", ["x", "bias"])
def test_one_gradient_without_the_other(device: str, wanted: str) -> None:
    """The same bits as of both."""
    case = Linear(Stored(20, 9, 70, 32), 3, torch.bfloat16, bias=torch.float16)
    both = inputs_of(case, device)
    at = ("x", "bias").index(wanted)
    grad = torch.ones(3, 29, dtype=torch.bfloat16, device=device)
    one = [t.detach().requires_grad_(i == at) for i, t in enumerate(both)]
    (alone,) = torch.autograd.grad(linear(case, device, *one), one[at], grad)
    together = torch.autograd.grad(linear(case, device, *both), both, grad)
    assert tensors.same_bits(alone, together[at])


@every_device
@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
def test_second_derivative(device: str, out_dtype: torch.dtype) -> None:
    """Of a gradient penalty: the gradient of x moves with the gradient from above, not with x."""
    case = Linear(Stored(5, 4, 35, 32, scales="integers"), 2, out_dtype=out_dtype)
    (x,) = inputs_of(case, device)
    factor = torch.ones(9, device=device, requires_grad=True)
    (first,) = torch.autograd.grad((linear(case, device, x).float() * factor).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), factor)
    w = format.unpack(case.w.packed, 32)
    # Integers are exact, but for the rounding to the type of the gradient from above, for each of the two tokens.
    assert torch.equal(second.cpu(), 2 * w.sum(1).to(out_dtype).float())
    assert torch.equal(first.detach().cpu(), w.sum(0).expand(2, -1))


@pytest.mark.parametrize("name", ["scale4", "scale8"])
def test_scales_have_no_gradient(name: str) -> None:
    """Asked for one, backward says so; silence would look like a scale that doesn't matter."""
    case = Linear(Stored(16, 16, 64, 32), 2)
    packed = Packed(*(t.clone() for t in case.w.packed))
    getattr(packed, name).requires_grad_()
    y = torch.ops.effk.w4a8_linear(case.x, *packed, 32)
    with pytest.raises(RuntimeError, match=f"w4a8_linear: {name} requires grad"):
        y.sum().backward()


def test_no_tokens_and_no_features() -> None:
    for n4, n8, tokens in ((0, 0, 2), (17, 3, 0)):
        case = Linear(Stored(n4, n8, 40, 32), tokens, bias=torch.float32)
        inputs = inputs_of(case, "cpu")
        y = linear(case, "cpu", *inputs)
        for a, b in zip(torch.autograd.grad(y, inputs, torch.ones_like(y)), inputs, strict=True):
            assert torch.equal(a, torch.zeros_like(b))


def test_leading_sizes() -> None:
    case = Linear(Stored(5, 4, 35, 32), (2, 3), bias=torch.float32)
    function = functools.partial(linear, case, "cpu")
    x, bias = inputs_of(case, "cpu")
    flat = x.detach().reshape(6, 35).requires_grad_()
    for a, b in zip(
        torch.autograd.grad(function(x, bias).sum(), (x, bias)),
        torch.autograd.grad(function(flat, bias).sum(), (flat, bias)),
        strict=True,
    ):
        assert tensors.same_bits(a.reshape(b.shape), b)
