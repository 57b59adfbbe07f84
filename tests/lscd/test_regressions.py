"""Bugs of the kernels before us, each as a test: Flash-LLM and SpInfer, by the numbers of their issues."""

from __future__ import annotations

import pytest
import torch

from ..kit import tensors
from ..kit.backends import Backend, on_backends
from . import format
from .strategies import FLOATS, Linear, Weights


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_backends("lscd_pack", "lscd_unpack", "lscd_linear")
def test_full_tile(backend: Backend, dtype: torch.dtype) -> None:
    """flash-llm#14: more than 4096 nonzeros in a tile overran registers. Here 4096 is a full tile; two of them."""
    case = Linear(Weights(16, 512, dtype, sparsity=0.0, kind="integers"), 2, dtype)
    packed = backend.run("lscd_pack", case.w.dense)
    assert packed[2].tolist() == [0, 4096, 8192]
    assert tensors.same_bits(backend.run("lscd_unpack", *packed, *case.w.size), case.w.dense)
    case.exact(backend.unit).assert_holds(case.run(backend, packed=packed))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_backends("lscd_pack", "lscd_linear")
def test_nan_weight(backend: Backend, dtype: torch.dtype) -> None:
    """flash-llm: `fabs(v) > 0` is false for NaN, so a broken model looked sound."""
    w = torch.zeros(3, 20, dtype=dtype)
    w[1, 5] = float("nan")
    packed = backend.run("lscd_pack", w)
    assert packed[1].count_nonzero() == 1
    y = backend.run("lscd_linear", torch.ones(1, 20, dtype=dtype), *packed, 3, 20)
    assert y.isnan().tolist() == [[False, True, False]]


@on_backends("lscd_pack", "lscd_linear")
def test_low_sparsity_needs_no_reserve(backend: Backend) -> None:
    """SpInfer_EuroSys25#1: a fixed room for a tile's values overflowed where few weights were pruned."""
    for sparsity in (0.0, 0.01, 0.1):
        case = Linear(Weights(48, 272, torch.float16, sparsity), 4, torch.float16)
        packed = backend.run("lscd_pack", case.w.dense)
        case.exact(backend.unit).assert_holds(case.run(backend, packed=packed))


@on_backends("lscd_linear")
def test_many_columns_for_few_rows(backend: Backend) -> None:
    """flash-llm#15, SpInfer_EuroSys25#2: splitting 4096 columns unevenly read past the end."""
    for cols in (4096, 4096 + 16, 4096 - 8):
        case = Linear(Weights(16, cols, torch.float16, 0.9), 8, torch.float16)
        case.exact(backend.unit).assert_holds(case.run(backend))


@on_backends("lscd_linear")
def test_one_wrong_element_is_seen(backend: Backend) -> None:
    """flash-llm#9: a summed error hid wrong elements. Two swapped results have the same sum."""
    case = Linear(Weights(16, 64), 4)
    y, exact = case.run(backend), case.exact(backend.unit)
    exact.assert_holds(y)
    swapped = y.clone()
    swapped[2, 3], swapped[2, 4] = y[2, 4], y[2, 3]
    with pytest.raises(AssertionError, match=r"2 of 64 out of bounds, first at \(2, 3\)"):
        exact.assert_holds(swapped)


@on_backends("lscd_unpack", "lscd_linear")
def test_single_signalling_nan(backend: Backend) -> None:
    """Ours: a matrix of one weight went through a scalar, which made its NaN quiet."""
    w = torch.tensor([[0x7C01]], dtype=torch.int16).view(torch.float16)
    assert tensors.same_bits(backend.run("lscd_unpack", *format.pack(w), 1, 1), w)


def test_gradient_of_bias_without_rows() -> None:
    """Ours: reshape(-1, 0) raises."""
    case = Linear(Weights(0, 8), 2, bias=True)
    bias = case.bias_tensor.requires_grad_()
    y = torch.ops.effk.lscd_linear(case.x, *case.w.packed, 0, 8, bias)
    (grad,) = torch.autograd.grad(y, bias, torch.ones(2, 0))
    assert grad.shape == (0,)
