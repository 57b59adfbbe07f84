"""What only Triton has: compilation ahead of time, its float conversions, and loads that may not leave `values`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from effk.kernels.common.triton_aot import Variant  # noqa: E402
from effk.kernels.common.triton_float import narrow, widen  # noqa: E402
from effk.kernels.lscd import triton as kernels  # noqa: E402

from ..kit import tensors  # noqa: E402
from ..kit.triton import assert_compiles_without_spills  # noqa: E402
from . import format  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def test_every_kernel_compiles_without_spills() -> None:
    assert_compiles_without_spills(kernels)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("cols", [1, 48, 100])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernels_get_the_alignment_they_are_compiled_for(monkeypatch, dtype, cols, tokens) -> None:
    seen = []

    def launch(self: Variant, grid: tuple[int, ...], **args) -> None:
        if self.kernel is kernels.multiply:
            seen.append((args["x"].data_ptr() % 16, args["x_stride"] % 16, args["x"].stride(1)))

    monkeypatch.setattr(Variant, "launch", launch)
    packed = format.pack(torch.ones(3, cols, dtype=dtype))
    wide = torch.ones(2 * tokens, cols + 17, dtype=dtype)
    for x in (wide[:tokens, :cols], wide[:tokens, 1 : cols + 1], wide[::2, 16 : cols + 16], wide.T[:cols, :tokens].T):
        kernels.lscd_linear(x, *packed, 3, cols)
    transposed = torch.ones(cols, tokens, dtype=dtype).T
    kernels.lscd_linear(transposed, *packed, 3, cols)
    assert seen == [(0, 0, 1)] * 5


@triton.jit
def convert(f32, bf16, widened, narrowed, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(widened + i, widen(tl.load(bf16 + i)))
    tl.store(narrowed + i, narrow(tl.load(f32 + i), tl.bfloat16))


def test_bfloat16_conversions() -> None:
    """All bfloat16 numbers, and float32 ones next to them and half-way between them."""
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=DEVICE)
    bf16 = high.to(torch.int16).view(torch.bfloat16)
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        f32 = ((high << 16) | low).view(torch.float32)
        widened, narrowed = torch.empty_like(f32), torch.empty_like(bf16)
        convert[1,](f32, bf16, widened, narrowed, BLOCK=2**16)
        assert tensors.same_bits(widened, bf16.float())
        assert torch.equal(narrowed.isnan(), f32.isnan())
        number = ~f32.isnan()
        assert tensors.same_bits(narrowed[number], f32.to(torch.bfloat16)[number])


def damage(packed: format.Packed, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Corrupt offsets, bitmap or both, and NaN on both sides of `values` in memory."""
    g = torch.Generator().manual_seed(seed)
    values, bitmap, offsets = (t.clone() for t in packed)
    n = values.numel()
    wild = torch.tensor([-(2**63), -(2**40), -n, -1, 0, 1, n - 64, n - 1, n, n + 1, 2**31, 2**40, 2**63 - 1])
    if seed % 3 != 0:
        hit = torch.rand(offsets.shape, generator=g) < 0.5
        offsets[hit] = wild[torch.randint(len(wild), offsets.shape, generator=g)][hit]
    if seed % 3 != 1:
        bitmap |= torch.randint(-(2**63), 2**63 - 1, bitmap.shape, generator=g)
    guard = torch.full((n + 2 * 8192,), float("nan"), dtype=values.dtype)
    guard[8192 : 8192 + n] = values
    return guard.to(DEVICE)[8192 : 8192 + n], bitmap.to(DEVICE), offsets.to(DEVICE)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_load_leaves_values(dtype: torch.dtype, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    rows, cols = 40, 530
    w = torch.randn(rows, cols, generator=g) * (torch.rand(rows, cols, generator=g) < 0.3)
    packed = damage(format.pack(w.to(dtype)), seed)
    x = torch.randn(2, cols, generator=g).to(DEVICE, dtype)
    assert kernels.lscd_unpack(*packed, rows, cols).isfinite().all()
    assert kernels.lscd_linear(x, *packed, rows, cols).isfinite().all()
