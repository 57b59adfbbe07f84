"""The wrappers of kernels/common/device.cuh mean here what the PTX manual says. The kernels are in wrappers.cpp."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..kit.tensors import generator
from . import Device, missing, module

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def run(name: str, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    with Device() as device:
        module().wrappers(name, device.input("a", a), device.input("b", b), device.output("c", c))
    return c


@pytest.mark.parametrize(
    ("name", "dtype", "depth"),
    [
        ("float16", torch.float16, 16),
        ("bfloat16", torch.bfloat16, 16),
        ("tf32", torch.float32, 8),
        ("int8", torch.int8, 32),
    ],
)
def test_tensor_cores(name: str, dtype: torch.dtype, depth: int) -> None:
    """Small integers, so that the products are exact in every type."""
    g = generator(depth)
    a, b = (torch.randint(-100, 100, (n, depth), generator=g) for n in (16, 8))
    c = torch.empty(16, 8, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    assert torch.equal(run(name, a.to(dtype), b.to(dtype), c).long(), a @ b.T)


def test_tf32_drops_low_bits() -> None:
    a, b = torch.eye(16, 8), torch.zeros(8, 8)
    b[0] = 1 + 2**-10 + 2**-11
    assert torch.equal(run("tf32", a, b, torch.empty(16, 8))[:8, 0], torch.full((8,), 1 + 2**-10))


def test_words_that_move() -> None:
    a, b = (torch.randint(0, 2**24, (32,), generator=generator(seed)) for seed in (1, 2))
    c = run("moves", a.int(), b.int(), torch.empty(9, 32, dtype=torch.int32)).long() % 2**32
    lane = torch.arange(32)

    def byte(t: Tensor, i: int) -> Tensor:
        return t >> 8 * i & 255

    wanted = {
        "shuffle": a[lane * 7 % 32],
        "shuffle_up": torch.where(lane >= 3, a[(lane - 3) % 32], a),
        "shuffle_xor": a[lane ^ 5],
        "vote": (a % 2 << lane).sum().expand(32),
        "popcount": torch.tensor([int(v).bit_count() for v in a]),
        # Selector 0x3715: from the lowest on, bytes 5, 1, 7 and 3 of eight.
        "permute_bytes": byte(b, 1) | byte(a, 1) << 8 | byte(b, 3) << 16 | byte(a, 3) << 24,
        "join_halves": a % 2**16 | b % 2**16 << 16,
        "atomic_add": a.sum().expand(32),
        "its old value is a part of the sum": torch.ones(32, dtype=torch.int64),
    }
    for (name, values), got in zip(wanted.items(), c, strict=True):
        assert torch.equal(got, values), name


def test_copies_and_stores() -> None:
    a, b = (torch.randint(0, 2**24, (32,), generator=generator(seed)).int() for seed in (1, 2))
    c = run("copies", a, b, torch.empty(65, dtype=torch.int32))
    assert torch.equal(c[:32], a.flip(0))
    assert torch.equal(c[32:64], b[[3, 0]].repeat(16))
    assert c[64] in range(32)
