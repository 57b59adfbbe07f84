"""The error model can fail, and fails where it should."""

from __future__ import annotations

import pytest
import torch

from .kit.errors import ACTIVATIONS, FLUSH, Bounded, matmul
from .kit.tensors import generator

UNIT = 2.0**-24


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_torch_is_within_the_bound(dtype: torch.dtype, activation: str) -> None:
    """A float32 product rounded once."""
    x, w, bias, scale = (
        normal(5, 300, dtype=dtype),
        normal(40, 300, dtype=dtype, seed=1),
        normal(40),
        normal(40, seed=2),
    )
    y = ACTIVATIONS[activation][0]((x.float() @ w.float().T) * scale + bias)
    matmul(x, w, UNIT).times(scale).plus(bias).activated(activation).assert_holds(y.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_two_roundings_too_many_are_seen(dtype: torch.dtype) -> None:
    """Neighbours of a correctly rounded result of one product are out."""
    x, w = normal(1, 1, dtype=dtype).abs(), normal(1, 1, dtype=dtype, seed=1).abs()
    exact = matmul(x, w, UNIT)
    y = (x.double() @ w.double().T).to(dtype)
    exact.assert_holds(y)
    bits = {2: torch.int16, 4: torch.int32}[y.element_size()]
    with pytest.raises(AssertionError, match="out of bounds"):
        exact.assert_holds((y.view(bits) + 3).view(dtype))


def test_sums_in_half_precision_are_seen() -> None:
    x, w = normal(4, 512, dtype=torch.float16), normal(64, 512, dtype=torch.float16, seed=1)
    y = torch.zeros(4, 64, dtype=torch.float16)
    for k in range(512):
        y += x[:, k, None] * w[None, :, k]
    with pytest.raises(AssertionError, match="out of bounds"):
        matmul(x, w, UNIT).assert_holds(y)


def test_tf32_is_seen() -> None:
    x, w = normal(4, 512), normal(64, 512, seed=1)
    cut = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    with pytest.raises(AssertionError, match="out of bounds"):
        matmul(x, w, UNIT).assert_holds(cut @ w.T)


@pytest.mark.parametrize("wrong", [0.0, float("inf"), -float("inf")])
def test_nan_must_be_nan(wrong: float) -> None:
    w = torch.tensor([[float("nan")]])
    exact = matmul(torch.ones(1, 1), w, UNIT)
    exact.assert_holds(torch.tensor([[float("nan")]]))
    with pytest.raises(AssertionError, match="out of bounds"):
        exact.assert_holds(torch.tensor([[wrong]]))


@pytest.mark.parametrize("wrong", [0.0, float("nan"), -float("inf"), torch.finfo(torch.float32).max])
def test_infinity_must_be_infinity(wrong: float) -> None:
    exact = matmul(torch.ones(1, 2), torch.tensor([[float("inf"), 1.0]]), UNIT)
    exact.assert_holds(torch.tensor([[float("inf")]]))
    with pytest.raises(AssertionError, match="out of bounds"):
        exact.assert_holds(torch.tensor([[wrong]]))


def test_finite_must_be_finite() -> None:
    with pytest.raises(AssertionError, match="out of bounds"):
        matmul(torch.ones(1, 1), torch.ones(1, 1), UNIT).assert_holds(torch.tensor([[float("nan")]]))


def test_shape_must_agree() -> None:
    with pytest.raises(AssertionError, match="shape"):
        matmul(torch.ones(1, 2), torch.ones(3, 2), UNIT).assert_holds(torch.full((3,), 2.0))


def test_rounds_to_infinity_in_half_precision() -> None:
    exact = Bounded(torch.tensor([65519.0, 65521.0]).double(), torch.tensor([0.5, 0.5]), torch.ones(2), UNIT)
    exact.assert_holds(torch.tensor([65504.0, float("inf")], dtype=torch.float16))
    with pytest.raises(AssertionError, match="out of bounds"):
        exact.assert_holds(torch.tensor([65504.0, 65504.0], dtype=torch.float16))


def test_flush_is_for_bfloat16_alone() -> None:
    tiny = torch.tensor([[FLUSH / 2]])
    with pytest.raises(AssertionError, match="out of bounds"):
        matmul(torch.ones(1, 1), tiny, UNIT).assert_holds(torch.zeros(1, 1))
    matmul(torch.ones(1, 1).bfloat16(), tiny.bfloat16(), UNIT).assert_holds(torch.zeros(1, 1).bfloat16())


def test_stored_weights_alone_are_counted() -> None:
    w = torch.zeros(1, 1000)
    w[0, 0] = 1
    assert float(matmul(torch.ones(1, 1000), w, UNIT).error) < 2 * UNIT
