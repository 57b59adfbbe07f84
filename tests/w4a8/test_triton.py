"""What only Triton has: compilation ahead of time, the choice of tiles, and stores that may not leave the result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from effk.kernels.common.triton_aot import Variant
from effk.kernels.w4a8 import triton as kernels

from ..kit import tensors
from ..kit.triton import assert_compiles_without_spills, compiling
from .strategies import FLOATS, GROUP_SIZES, Stored

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_every_kernel_compiles_without_spills() -> None:
    assert_compiles_without_spills(kernels)


def test_quantization_divides_and_rounds_as_ieee_says() -> None:
    """The code for a GPU holds no approximate or flushing instruction, and one addition each way for every division.

    Two divisions a group are beside those of its values: of scales and of zero points.
    """
    script = """
from effk.kernels.w4a8 import triton as kernels
import torch
for variant in kernels.QUANTIZE[torch.float32, 128], kernels.PACK4[128], kernels.PACK8[128]:
    print(variant.compile(90).asm["ptx"])
"""
    done = compiling("-c", script)
    assert done.returncode == 0, done.stderr
    for ptx in done.stdout.split(".version")[1:]:
        lines = [line.split()[0] for line in ptx.splitlines() if line.strip()]
        floats = {i for i in lines if i.endswith("f32")}
        assert "div.rn.f32" in floats
        assert not [i for i in floats if any(word in i for word in ("ftz", "approx", "full", "fma"))], floats
        magic = [line for line in ptx.splitlines() if "0f4B400000" in line or "0fCB400000" in line]
        assert len(magic) % 2 == 0 and len(magic) >= 2 * (lines.count("div.rn.f32") - 2) > 0


# The promises of the kernels' decorators.
ALIGNED = {
    kernels.quantize: ("x", "x_stride", "q", "cols"),
    kernels.multiply: ("q", "q_cols", "q4", "q8"),
    kernels.accumulate: ("q", "q_cols", "q4", "q8"),
    kernels.unpack: ("q4", "q8"),
}


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("cols", [1, 48, 100])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernels_get_the_alignment_they_are_compiled_for(monkeypatch, dtype, cols, tokens) -> None:
    seen = []

    def launch(self: Variant, grid: tuple[int, ...], **args) -> None:
        seen.append(self.kernel)
        for name in ALIGNED[self.kernel]:
            value = args[name]
            assert (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0, f"{self}: {name}"
        if self.kernel is kernels.quantize:
            assert args["x"].stride(1) == 1 and args["x"].shape[1] == args["cols"]

    monkeypatch.setattr(Variant, "launch", launch)

    def shifted(t: Tensor) -> Tensor:
        """t, not where an allocation begins."""
        room = t.new_empty(t.numel() + 1)[1:].view(t.shape)
        return room.copy_(t)

    packed = [shifted(t) for t in Stored(5, 18, cols).packed]
    wide = torch.ones(2 * tokens, cols + 17, dtype=dtype)
    views = wide[:tokens, :cols], wide[:tokens, 1 : cols + 1], wide[::2, 16 : cols + 16], wide.T[:cols, :tokens].T
    for x in (*views, torch.ones(cols, tokens, dtype=dtype).T):
        kernels.w4a8_linear(x, *packed, 128)
        kernels.w4a8_accumulate(x.to(torch.int8), *packed, 128)
    kernels.w4a8_unpack(*packed, 128)
    assert seen == [kernels.quantize, kernels.multiply, kernels.accumulate] * 5 + [kernels.unpack]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_tiles_change_no_bit(group_size: int) -> None:
    """Numbers of tokens on both sides of each tile's."""
    w = Stored(n4=20, n8=18, cols=140, group_size=group_size)
    packed = [t.to(DEVICE) for t in w.packed]
    x = tensors.values((130, w.cols), torch.float32, "normal", 1).to(DEVICE)
    y = kernels.w4a8_linear(x, *packed, group_size)
    sizes = [tile.tokens for tile in kernels.TILES[group_size]]
    assert sizes == sorted(sizes)
    for tokens in {1, *sizes, *(size + 1 for size in sizes)}:
        assert tensors.same_bits(kernels.w4a8_linear(x[:tokens], *packed, group_size), y[:tokens]), tokens


WILD = (-(2**31), -(2**30), -65, -1, 65, 66, 2**30, 2**31 - 1)  # of 65 output features


@pytest.mark.parametrize("seed", range(6))
def test_a_corrupt_perm_stays_inside(monkeypatch, seed: int) -> None:
    """What perm sends outside is written nowhere; features that nothing is sent to are 0; the others are right."""
    room = 1000
    results = {kernels.multiply: "y", kernels.accumulate: "out", kernels.unpack: "w"}
    launch = Variant.launch
    launched = []

    def guarded(self: Variant, grid: tuple[int, ...], **args) -> None:
        """Runs with the result amid other memory."""
        if self.kernel in results:
            name = results[self.kernel]
            result = args[name]
            flat = torch.full((result.numel() + 2 * room,), 77, dtype=result.dtype, device=result.device)
            inner = flat[room:-room].view(result.shape)
            launch(self, grid, **{**args, name: inner.copy_(result)})
            assert bool((flat[:room] == 77).all() and (flat[-room:] == 77).all()), f"{self} wrote outside"
            result.copy_(inner)
            launched.append(self.kernel)
        else:
            launch(self, grid, **args)

    monkeypatch.setattr(Variant, "launch", guarded)
    w = Stored(n4=40, n8=25, cols=100, group_size=64, seed=seed)
    g = tensors.generator(seed)
    perm = w.packed.perm.clone()
    hit = torch.rand(perm.shape, generator=g) < 0.4
    choices = torch.tensor([*WILD, *range(5)], dtype=torch.int32)  # the last five make duplicates
    perm[hit] = choices[torch.randint(len(choices), perm.shape, generator=g)][hit]

    # NaN lies on both sides of the bias. It was meant for nobody.
    bias = torch.full((w.rows + 2 * room,), float("nan"))
    bias[room:-room] = torch.randn(w.rows, generator=g)
    bias = bias.to(DEVICE)[room:-room]
    x = tensors.values((3, w.cols), torch.float32, "normal", seed).to(DEVICE)
    q = tensors.values((3, w.cols), torch.int8, "bits", seed).to(DEVICE)
    calls = {
        kernels.w4a8_linear: lambda p, bias: kernels.w4a8_linear(x, *p, w.group_size, bias),
        kernels.w4a8_accumulate: lambda p, bias: kernels.w4a8_accumulate(q, *p, w.group_size),
        kernels.w4a8_unpack: lambda p, bias: kernels.w4a8_unpack(*p, w.group_size).T,
    }
    for op, call in calls.items():
        rows = w.packed._replace(perm=torch.arange(w.rows, dtype=torch.int32))
        want = call([t.to(DEVICE) for t in rows], None).cpu()  # in the order of rows
        have = call([t.to(DEVICE) for t in w.packed._replace(perm=perm)], bias).cpu()
        for feature in range(w.rows):
            sent = (perm == feature).nonzero().flatten().tolist()
            options = [want[..., row] for row in sent] or [torch.zeros_like(want[..., 0])]
            if sent and op is kernels.w4a8_linear:
                options = [option + bias[feature].cpu() for option in options]
            assert any(tensors.same_bits(have[..., feature], option) for option in options), (op.__name__, feature)
    assert set(launched) == set(results)
