"""Rows in memory that kernels may read 16 bytes at a time, where their strides and addresses allow it."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def multiple(number, OF: tl.constexpr):
    """A number that is one already, for the compiler to know."""
    return number // OF * OF


@triton.jit
def row_at(base, row, stride, VECTOR: tl.constexpr):
    """Where rows begin. VECTOR: what the stride is a multiple of; where it isn't 1, rows begin at multiples of 16."""
    pointer = base + row * multiple(stride, VECTOR)
    if VECTOR > 1:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


def vector(dtype: torch.dtype) -> int:
    """Numbers in 16 bytes."""
    return 16 // dtype.itemsize


def in_vectors(*tensors: Tensor) -> bool:
    """Whether the rows of all tensors begin and end at multiples of 16 bytes."""
    return all(
        t.data_ptr() % 16 == 0 and all(n % vector(t.dtype) == 0 for n in (t.shape[-1], *t.stride()[:-1]))
        for t in tensors
    )
