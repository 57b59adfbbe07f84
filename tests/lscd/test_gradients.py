"""Gradients of lscd_linear against autograd of the dense formula in float64."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from ..kit import tensors
from ..kit.backends import device_params
from ..kit.errors import ACTIVATION_ROUNDINGS, ACTIVATIONS, Bounded, matmul, roundings
from .strategies import Linear, Weights, dense_linear, linears

UNIT = 2**-23 if torch.cuda.is_available() else 2**-24
# Largest second derivatives, rounded up; relu has a kink instead.
CURVATURE = {"none": 0.0, "relu": 0.0, "gelu": 0.8, "gelu_tanh": 0.81, "silu": 0.5}

every_device = pytest.mark.parametrize("device", device_params())


def linear(case: Linear, device: str, *inputs: Tensor) -> Tensor:
    """lscd_linear as a function of x and, if there, bias."""
    x, bias = (*inputs, None)[:2]
    packed = (t.to(device) for t in case.w.packed)
    scale = None if case.scale_tensor is None else case.scale_tensor.to(device)
    return torch.ops.effk.lscd_linear(x, *packed, *case.w.size, bias, scale, activation=case.activation)


def inputs_of(case: Linear, device: str) -> list[Tensor]:
    given = [case.x] if case.bias_tensor is None else [case.x, case.bias_tensor]
    return [tensors.to_device(t, device).requires_grad_() for t in given]


def exact_gradients(case: Linear, grad: Tensor) -> list[Bounded]:
    """By the dense formula, with what the backward of lscd_linear may lose:

    - the sum before the activation is computed again and rounded to x's type, which moves the slope by as much as the
      activation is curved (and may take relu to the other side of its kink);
    - the gradient is rounded to x's type after the activation, and after the scale;
    - sums over rows or tokens are in float32.
    """
    dtype_unit = torch.finfo(case.dtype).eps / 2
    tokens = grad.shape[:-1].numel()
    x, g = case.x.reshape(tokens, case.w.cols), grad.double().reshape(tokens, case.w.rows)
    before = matmul(x, case.w.dense, UNIT).times(case.scale_tensor).plus(case.bias_tensor)
    moved = before.error + dtype_unit * (before.value.abs() + before.error) + torch.finfo(case.dtype).tiny

    leaf = before.value.clone().requires_grad_()
    (after,) = torch.autograd.grad(ACTIVATIONS[case.activation][0](leaf), leaf, g)
    error = torch.zeros_like(g)
    if case.activation == "relu":
        error = g.abs() * (before.value.abs() <= moved)
    elif case.activation != "none":
        slope_error = CURVATURE[case.activation] * moved + ACTIVATION_ROUNDINGS * UNIT * (1 + before.value.abs())
        error = g.abs() * slope_error
        error = error + dtype_unit * (after.abs() + error) + torch.finfo(case.dtype).tiny

    w = case.w.dense.double()
    factor = torch.ones(case.w.rows) if case.scale_tensor is None else case.scale_tensor.double()
    scaled, scaled_error = after * factor, error * factor.abs()
    if case.scale_tensor is not None:
        scaled_error = scaled_error + 2 * dtype_unit * (scaled.abs() + scaled_error) + torch.finfo(case.dtype).tiny
    peak = scaled.abs() @ w.abs()
    grad_x = Bounded(scaled @ w, scaled_error @ w.abs() + roundings(case.w.rows, UNIT) * peak, peak, UNIT)
    total = after.abs().sum(0)
    grad_bias = Bounded(after.sum(0), error.sum(0) + roundings(tokens, UNIT) * total, total, UNIT)
    return [grad_x, grad_bias]


def check_gradients(case: Linear, device: str) -> None:
    inputs = inputs_of(case, device)
    y = linear(case, device, *inputs)
    # Not contiguous, as gradients may come from above.
    grad = tensors.lay_out(tensors.values(tuple(y.shape), case.dtype, "normal", case.seed), "strided")
    got = torch.autograd.grad(y, inputs, tensors.to_device(grad, device))
    for name, a, b in zip(("x", "bias"), got, exact_gradients(case, grad), strict=False):
        if name == "x":
            assert a.shape == case.x.shape
            a = a.reshape(b.value.shape)
        assert a.dtype == case.dtype
        b.assert_holds(a.cpu(), f"gradient of {name}")


@every_device
def test_gradients_are_those_of_the_dense_formula(device: str) -> None:
    check = given(case=linears(kinds=("normal",)))(check_gradients)
    settings(max_examples=150)(check)(device=device)


def test_the_formula_itself() -> None:
    """exact_gradients against autograd through F.linear."""
    for activation in ACTIVATIONS:
        case = Linear(Weights(9, 20), 3, bias=True, scale=True, activation=activation)
        x, bias = (t.double().requires_grad_() for t in (case.x, case.bias_tensor))
        y = dense_linear(x, *case.w.packed, *case.w.size, bias, case.scale_tensor, activation=activation)
        grad = torch.ones_like(y)
        for a, b in zip(torch.autograd.grad(y, (x, bias), grad), exact_gradients(case, grad), strict=True):
            torch.testing.assert_close(a, b.value, rtol=1e-12, atol=1e-12)


def integer_case(**options: Any) -> Linear:
    """Small integers: float32 differences over a step of 1 are exact."""
    return Linear(Weights(9, 20, kind="integers"), 2, kind="integers", **options)


def checked(check: Any, case: Linear, device: str, **options: Any) -> None:
    inputs = inputs_of(case, device)
    with pytest.warns(UserWarning, match="not a double precision"):  # true, and harmless here
        assert check(functools.partial(linear, case, device), inputs, eps=1.0, atol=0, rtol=0, **options)


@every_device
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_is_exact(device: str, bias: bool) -> None:
    checked(torch.autograd.gradcheck, integer_case(bias=bias), device)


@every_device
def test_gradgradcheck_is_exact(device: str) -> None:
    grad = tensors.values((2, 9), torch.float32, "integers", 5).to(device).requires_grad_()
    checked(torch.autograd.gradgradcheck, integer_case(), device, grad_outputs=[grad])


@every_device
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a not in ("none", "relu")])
def test_second_derivative(device: str, activation: str) -> None:
    """Beside one another with the first, as in a gradient penalty."""
    case = Linear(Weights(9, 20), 2, bias=True, activation=activation)

    def gradients(y: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(y.sum(), inputs[:1], create_graph=True)
        return torch.autograd.grad(y.sum() + first.square().sum(), inputs)

    inputs = inputs_of(case, device)
    got = gradients(linear(case, device, *inputs), inputs)
    doubles = [t.detach().cpu().double().requires_grad_() for t in inputs]
    x, bias = doubles
    y = dense_linear(x, *case.w.packed, *case.w.size, bias, activation=activation)
    rounding = 128 * torch.finfo(torch.float32).eps  # sums of 20 and 9 terms, in each other
    for a, b in zip(got, gradients(y, doubles), strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=rounding, atol=rounding)


def test_weights_have_no_gradient() -> None:
    """Asked for one, backward says so; silence would look like a weight that doesn't matter."""
    case = Linear(Weights(16, 16))
    values, bitmap, offsets = case.w.packed
    y = torch.ops.effk.lscd_linear(case.x, values.requires_grad_(), bitmap, offsets, 16, 16)
    with pytest.raises(RuntimeError, match="values requires grad"):
        y.sum().backward()
