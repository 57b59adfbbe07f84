"""Bugs of the kernels before us, each as a test, by the numbers of their issues."""

from __future__ import annotations

import effk
import pytest
import torch

from ..kit import tensors
from ..kit.backends import Backend, on_backends
from . import format
from .format import Rows
from .strategies import Linear, Stored


@on_backends("w4a8_pack", "w4a8_linear")
def test_a_group_size_that_isnt_there_is_refused(backend: Backend) -> None:
    """onnxruntime#28551: block size 512 gave zeros, silently. As wide a matrix in groups that there are is right."""
    w, x = tensors.values((20, 512), torch.float32, "normal", 1), tensors.values((2, 512), torch.float32, "normal", 2)
    with pytest.raises(RuntimeError, match="group_size is 512"):
        backend.run("w4a8_pack", w, None, 512)
    for group_size in (256,) if backend.slow else (32, 64, 128, 256):
        packed = backend.run("w4a8_pack", w, None, group_size)
        with pytest.raises(RuntimeError, match="group_size is 512"):
            backend.run("w4a8_linear", x, *packed, 512)
        assert bool((backend.run("w4a8_linear", x, *packed, group_size) != 0).all())


@on_backends("w4a8_linear", "w4a8_unpack")
def test_negative_scales(backend: Backend) -> None:
    """vllm#48905: the sign of a group's scale was lost. One feature in each kind, sign by sign."""
    w = Stored(17, 17, 130, 64)
    rows = w.as_rows
    signs = torch.tensor([1.0, -1, 1]) * torch.tensor([[1.0], [-1]])[torch.arange(34) % 2]
    packed = format.encode(rows._replace(scale=rows.scale.abs() * signs))
    case = Linear(w, 2)
    case.exact(packed=packed).assert_holds(case.run(backend, packed=packed))
    assert torch.equal(backend.run("w4a8_unpack", *packed, 64), format.unpack(packed, 64))


@pytest.mark.parametrize("shape", [(7, 65), (100, 63), (1, 1), (17, 200), (33, 191), (16, 64)], ids=str)
@on_backends("w4a8_pack", "w4a8_linear")
def test_awkward_shapes_in_groups_of_64(backend: Backend, shape: tuple[int, int]) -> None:
    """llm-compressor#1489: only some sizes went with groups of 64."""
    dense = tensors.values(shape, torch.float32, "normal", 3)
    is8 = torch.arange(shape[0]) % 3 == 0
    packed = format.Packed(*backend.run("w4a8_pack", dense, is8, 64))
    case = Linear(Stored(0, shape[0], shape[1], 64), 3, torch.bfloat16)
    case.exact(packed=packed).assert_holds(case.run(backend, packed=packed))


@on_backends("w4a8_linear", "w4a8_accumulate")
def test_pairs_of_products_beyond_16_bits(backend: Backend) -> None:
    """vpmaddubsw adds two products in 16 bits and saturates: 255 * 127 + 255 * 127 became 32767."""
    rows = Rows(
        torch.full((17, 64), 255),
        torch.full((17, 2), 128),
        torch.ones(17, 2),
        torch.arange(17),
        0,
        32,
    )
    packed = format.encode(rows)
    for x in (127.0, -127.0):
        tokens = torch.full((5, 64), x)
        sums = backend.run("w4a8_accumulate", tokens.to(torch.int8), *packed, 32)
        assert torch.equal(sums, torch.full((5, 2, 17), int(32 * 127 * x), dtype=torch.int32))
        assert torch.equal(backend.run("w4a8_linear", tokens, *packed, 32), torch.full((5, 17), 64 * 127 * x))


@on_backends("w4a8_linear")
def test_integers_beyond_22_bits(backend: Backend) -> None:
    """An integer sum read as a float by adding 1.5 * 2^23 is right below 2^22 alone; zero points above 15, which a
    checkpoint may hold, go to 2^23."""
    for zero in (15, 130, 255):
        rows = Rows(
            torch.zeros(17, 256).long(), torch.full((17, 1), zero), torch.ones(17, 1), torch.arange(17), 17, 256
        )
        y = backend.run("w4a8_linear", torch.full((3, 256), 127.0), *format.encode(rows), 256)
        assert torch.equal(y, torch.full((3, 17), -256.0 * 127 * zero))


@on_backends("w4a8_pack", "w4a8_unpack")
def test_groups_on_one_side_of_zero(backend: Backend) -> None:
    """Without 0 in the range, a group far from zero has a zero point beyond its 4 bits, which was cut to them."""
    for sign in (1.0, -1.0):
        w = sign * (10 + torch.linspace(0, 1, 32)[None].expand(16, -1))
        packed = backend.run("w4a8_pack", w, None, 32)
        error = (backend.run("w4a8_unpack", *packed, 32) - w).abs().max()
        assert float(error) <= 11 / 15 / 2 * (1 + 2**-18)


@on_backends("w4a8_pack")
def test_groups_of_256(backend: Backend) -> None:
    """Ours: packing cleared 8 bytes past a buffer of 256."""
    w = tensors.values((3, 256), torch.float32, "normal", 4)
    packed = format.Packed(*backend.run("w4a8_pack", w, None, 256))
    assert torch.equal(packed.q4, format.pack(w, None, 256).q4)


@on_backends("w4a8_linear")
def test_subnormal_results_are_rounded_not_flushed(backend: Backend) -> None:
    """vcvtneps2bf16 takes subnormal numbers for zero: results depended on where perm put them."""
    w = torch.full((40, 1), 2.0**-10)
    x = torch.tensor([[2.0**-120]])
    packed = effk.w4a8.pack(w, torch.ones(40, dtype=torch.bool), 32)
    exact = 2.0**-130  # but for the roundings of two scales
    for perm in (packed.perm, packed.perm.flip(0)):
        moved = packed._replace(perm=perm.contiguous())
        y = backend.run("w4a8_linear", x, *moved, 32, out_dtype=torch.bfloat16)
        assert bool(((y.double() - exact).abs() <= 2.0**-133).all())  # a step of subnormal bfloat16 numbers
