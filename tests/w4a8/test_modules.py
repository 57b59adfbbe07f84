"""Linear and its state. Weights and activations lie on the grid where results are compared bit by bit."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import effk
import pytest
import torch
from effk.w4a8 import Linear, prepare_, quantize_
from torch import nn

from ..kit.tensors import same_bits
from ..lscd.test_modules import same_state

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
COLS, ROWS, GROUP = 70, 37, 32  # ragged: the last group has 6 columns, the last block 5 rows
IS8 = torch.arange(ROWS) % 7 == 3
NONE, ALL = torch.zeros(ROWS, dtype=torch.bool), torch.ones(ROWS, dtype=torch.bool)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def on_grid(is8: torch.Tensor = IS8, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Integers, and each group spans -7 to 8 or reaches 127: all scales are 1."""
    linear = nn.Linear(COLS, ROWS, bias=bias, dtype=dtype)
    w4, w8 = integers(-7, 8, ROWS, COLS), integers(-127, 127, ROWS, COLS, seed=1)
    w4[:, ::GROUP], w4[:, 1::GROUP], w8[:, 2::GROUP] = -7, 8, -127
    with torch.no_grad():
        linear.weight.copy_(torch.where(is8[:, None], w8, w4))
        if bias:
            linear.bias.copy_(integers(-9, 9, ROWS))
    return linear


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Integers, and each group reaches 127: x is its own 8-bit form. Sums stay below 2^24."""
    x = integers(-127, 127, *shape, COLS)
    x[..., ::GROUP] = 127
    return x.to(dtype)


def packed(is8: torch.Tensor | None = IS8, **options: Any) -> Linear:
    return Linear.from_linear(on_grid(NONE if is8 is None else is8, **options), is8, GROUP)


# ---- the layer


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is8", [None, NONE, IS8, ALL])
def test_forward_is_the_dense_layer(is8: torch.Tensor | None, bias: bool, dtype: torch.dtype) -> None:
    linear = on_grid(NONE if is8 is None else is8, bias=bias, dtype=dtype)
    x = tokens(2, 3, dtype=dtype)
    wanted = copy.deepcopy(linear).double()(x.double())  # exact
    assert same_bits(Linear.from_linear(linear, is8, GROUP)(x), wanted.float().to(dtype))


def test_dtypes_of_x_and_the_layer_are_independent() -> None:
    module = packed(dtype=torch.bfloat16)
    assert module(tokens(2)).dtype == torch.float32 and module(tokens(2).half()).dtype == torch.float16


def test_gradients_are_those_of_the_dense_layer() -> None:
    linear = on_grid()
    module = Linear.from_linear(copy.deepcopy(linear), IS8, GROUP)
    grads = []
    for m in (linear, module):
        x = tokens(5).requires_grad_()
        m(x).backward(integers(-3, 3, 5, ROWS, seed=3))
        grads.append((x.grad, m.bias.grad))
    assert all(same_bits(a, b) for a, b in zip(*grads, strict=True))
    assert [name for name, _ in module.named_parameters()] == ["bias"]


@pytest.mark.parametrize("dtype", FLOATS)
def test_to_linear_gives_the_same_weight_back(dtype: torch.dtype) -> None:
    linear = on_grid(dtype=dtype)
    assert same_state(Linear.from_linear(linear, IS8, GROUP).eval().to_linear(), linear)
    assert packed(bias=False, dtype=dtype).to_linear().weight.dtype == torch.float32


def test_from_linear_keeps_the_bias_parameter_and_mode() -> None:
    linear = on_grid().eval()
    module = Linear.from_linear(linear)
    assert module.bias is linear.bias and not module.training


def test_from_packed_keeps_the_tensors() -> None:
    tensors = effk.w4a8.pack(on_grid().weight, IS8, GROUP)
    module = Linear.from_packed(tensors, GROUP)
    assert all(a is b for a, b in zip(tensors, (v for _, v in module.named_buffers()), strict=True))
    assert (module.in_features, module.out_features, module.bias) == (COLS, ROWS, None)


def test_sizes_and_repr() -> None:
    module = packed()
    n8 = int(IS8.sum())
    blocks4, blocks8, groups, chunks = -(-(ROWS - n8) // 16), -(-n8 // 16), 3, 9
    wanted = blocks4 * chunks * 64 + blocks4 * groups * 16 * 5 + n8 * COLS + blocks8 * groups * 16 * 4 + ROWS * 4
    assert module.features8 == n8 and module.nbytes == wanted
    assert module.bits == 8 * wanted / (ROWS * COLS)
    assert f"group_size=32, features8={n8}, bits={module.bits:.2f}" in repr(module)
    assert "features8=0" in repr(Linear(4, 4, device="meta"))


def test_a_fresh_module_is_zero() -> None:
    module = Linear(COLS, ROWS, group_size=GROUP)
    assert same_bits(module(tokens(3)), torch.zeros(3, ROWS)) and not module.to_linear().weight.any()


@pytest.mark.parametrize("cols, rows", [(0, 5), (5, 0), (0, 0)])
def test_empty_weights(cols: int, rows: int) -> None:
    linear = nn.utils.skip_init(nn.Linear, cols, rows)
    nn.init.ones_(linear.bias)
    module = Linear.from_linear(linear)
    assert same_bits(module(torch.ones(2, cols)), torch.ones(2, rows)) and module.bits >= 0
    fresh = Linear(cols, rows)
    fresh.load_state_dict(module.state_dict())
    assert same_state(fresh, module)


def test_wrong_arguments() -> None:
    for make in (lambda: Linear(4, 4, group_size=48), lambda: Linear.from_linear(on_grid(), group_size=0)):
        with pytest.raises(ValueError, match="group_size"):
            make()
    with pytest.raises(ValueError, match="meta"):
        Linear.from_linear(nn.Linear(4, 4, device="meta"))
    with pytest.raises(RuntimeError, match="is8"):
        Linear.from_linear(on_grid(), IS8[:-1])


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.type(torch.half)])
def test_casts_leave_the_weight(cast: Callable[[nn.Module], nn.Module]) -> None:
    module, before = packed(), packed()
    cast(module)
    assert module.bias.dtype != torch.float32
    module.bias = before.bias
    assert same_state(module, before)


def test_moves() -> None:
    module = packed().to("meta", torch.float16)
    assert all(t.is_meta for t in module.state_dict().values())
    assert module.scale4.dtype == module.scale8.dtype == torch.float32 and module.bias.dtype == torch.float16
    assert module(torch.empty(2, COLS, device="meta")).shape == (2, ROWS)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copy_of: Callable[[Linear], Linear]) -> None:
    module = packed()
    again = copy_of(module)
    assert same_state(again, module) and again.q4.data_ptr() != module.q4.data_ptr()
    assert same_bits(again(tokens(2)), module(tokens(2)))


def test_compile_and_export() -> None:
    model = nn.Sequential(packed(), nn.ReLU()).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    exported = torch.export.export(
        model, (tokens(3),), dynamic_shapes=({0: torch.export.Dim("tokens")},), strict=True
    ).module()
    for n in (2, 7):
        x = tokens(n)
        assert same_bits(compiled(x), model(x)) and same_bits(exported(x), model(x))


# ---- state_dict


@pytest.mark.parametrize("is8", [NONE, IS8, ALL])
@pytest.mark.parametrize("device, assign", [("cpu", False), ("cpu", True), ("meta", True)])
def test_load_takes_any_number_of_8_bit_features(is8: torch.Tensor, device: str, assign: bool) -> None:
    module = packed(is8)
    assert sorted(module.state_dict()) == ["bias", "perm", "q4", "q8", "scale4", "scale8", "zero4"]
    for other in (Linear(COLS, ROWS, group_size=GROUP, device=device), packed(~is8).to(device)):
        other.load_state_dict(module.state_dict(), assign=assign)
        assert same_state(other, module) and same_bits(other(tokens(2)), module(tokens(2)))
        assert (other.perm.data_ptr() == module.perm.data_ptr()) == assign


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("built", [32, 256])
@pytest.mark.parametrize("cols", [1, 32, 33, 70, 257])
def test_load_takes_any_group_size(cols: int, built: int, group_size: int) -> None:
    module = Linear.from_linear(nn.Linear(cols, 20), torch.arange(20) < 3, group_size)
    other = Linear(cols, 20, group_size=built)
    other.load_state_dict(module.state_dict())
    x = torch.randn(3, cols, generator=torch.Generator().manual_seed(0))
    assert same_bits(other(x), module(x))


def test_to_empty_then_load() -> None:
    module = packed()
    empty = Linear(COLS, ROWS, device="meta").to_empty(device="cpu")
    empty.load_state_dict(module.state_dict())
    assert same_state(empty, module)


def test_load_reuses_memory_where_sizes_allow() -> None:
    """Captured graphs hold on to addresses."""
    module = packed()
    address = module.q4.data_ptr()
    module.load_state_dict(packed().state_dict())
    assert module.q4.data_ptr() == address


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {**state, name: change(state[name].clone())}


CORRUPT = {
    "no zero4": (lambda s: {k: v for k, v in s.items() if k != "zero4"}, "lacks zero4"),
    "not a tensor": (lambda s: {**s, "q4": 1.0}, "should be a tensor"),
    "q4 shape": (changed("q4", lambda t: t[:, :-1].contiguous()), "q4"),
    "q4 dtype": (changed("q4", lambda t: t.int()), "q4"),
    "q4 strides": (changed("q4", lambda t: t.mT.contiguous().mT), "q4"),
    "q8 columns": (changed("q8", lambda t: t[:, :-1].contiguous()), "q8"),
    "q8 dimensions": (changed("q8", lambda t: t.flatten()), "q8"),
    "q8 rows": (changed("q8", lambda t: t[:-1]), "q4|scale8|perm"),
    "scale4 dtype": (changed("scale4", lambda t: t.half()), "scale4"),
    "scale4 groups": (changed("scale4", lambda t: t[:, :-1].contiguous()), "scale4|zero4"),
    "scale4 dimensions": (changed("scale4", lambda t: t[0]), "scale4"),
    "no groups": (changed("scale4", lambda t: t[:, :0]), "scale4"),
    "zero4 shape": (changed("zero4", lambda t: t[:-1]), "zero4"),
    "scale8 shape": (changed("scale8", lambda t: t[:0]), "scale8"),
    "perm length": (changed("perm", lambda t: t[:-1]), "perm"),
    "perm twice": (changed("perm", lambda t: t.index_fill(0, torch.tensor([1]), int(t[0]))), "perm"),
    "perm outside": (changed("perm", lambda t: t + 1), "perm"),
    "perm negative": (changed("perm", lambda t: t.index_fill(0, torch.tensor([1]), -(2**31))), "perm"),
    "bias shape": (changed("bias", lambda t: t[:-1]), "bias"),
    "meta": (changed("q8", lambda t: t.to("meta")), "device"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_checkpoint_changes_nothing(case: str, assign: bool, strict: bool) -> None:
    corrupt, message = CORRUPT[case]
    model = nn.Sequential(Linear.from_linear(nn.Linear(COLS, ROWS), None, 64))
    before = copy.deepcopy(model)
    state = {f"0.{name}": t for name, t in corrupt(dict(packed().state_dict())).items()}
    with pytest.raises(RuntimeError, match=rf"0: .*({message})"):
        model.load_state_dict(state, strict=strict, assign=assign)
    assert same_state(model, before) and model[0].group_size == 64


def test_every_level_rejects_a_corrupt_checkpoint() -> None:
    """What loads under one CPU level must be safe under the others."""
    corrupt, message = CORRUPT["perm outside"]
    state = corrupt(dict(packed().state_dict()))
    for level in effk.status()["cpu_levels"]:
        with effk.cpu_level(level), pytest.raises(RuntimeError, match=message):
            Linear(COLS, ROWS).load_state_dict(state)


def test_missing_module_is_a_missing_key() -> None:
    missing = nn.Sequential(Linear(4, 4)).load_state_dict({}, strict=False).missing_keys
    assert set(missing) == {f"0.{name}" for name in ("q4", "scale4", "zero4", "q8", "scale8", "perm", "bias")}


# ---- quantized checkpoints


def dense_model() -> nn.Module:
    return nn.Sequential(nn.Linear(COLS, ROWS), nn.LayerNorm(ROWS), nn.Linear(ROWS, 20, bias=False)).eval()


@pytest.mark.parametrize("ratio8", [0.0, 0.2, 1.0])
def test_prepare_makes_room_for_a_quantized_checkpoint(ratio8: float) -> None:
    model, fresh = dense_model(), dense_model()
    quantize_(model, ratio8, group_size=64)
    prepare_(fresh, model.state_dict())
    assert not fresh[0].training
    fresh.load_state_dict(model.state_dict())
    assert same_state(fresh, model) and same_bits(fresh(tokens(3)), model(tokens(3)))


def test_prepare_on_meta_takes_a_checkpoint_without_copies() -> None:
    model = dense_model()
    quantize_(model)
    with torch.device("meta"):
        fresh = dense_model()
    prepare_(fresh, model.state_dict())
    fresh.load_state_dict(model.state_dict(), assign=True)
    assert same_state(fresh, model) and same_bits(fresh(tokens(3)), model(tokens(3)))


def test_prepare_changes_nothing_where_it_fails() -> None:
    model = dense_model()
    model[2].register_forward_hook(lambda module, args, y: y + 1)
    before = list(model.modules())
    with pytest.raises(ValueError, match=r"2 is packed.*hooks"):
        prepare_(model, ["0.q4", "2.q4"])
    assert list(model.modules()) == before


@pytest.mark.parametrize("ratio8", [0.0, 0.2, 1.0])
def test_safetensors(ratio8: float, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, fresh = dense_model(), dense_model()
    quantize_(model, ratio8, group_size=32)
    safetensors.save_model(model, tmp_path / "model.safetensors")
    prepare_(fresh, safetensors.load_file(tmp_path / "model.safetensors"))
    safetensors.load_model(fresh, tmp_path / "model.safetensors")
    assert same_state(fresh, model) and same_bits(fresh(tokens(3)), model(tokens(3)))


@pytest.mark.parametrize("bias", [torch.zeros(20, device="meta"), torch.zeros(20, dtype=torch.float64)], ids=str)
def test_a_bias_that_cannot_be_used_is_refused(bias: torch.Tensor) -> None:
    """Also where the checkpoint's own tensors are taken."""
    layer = Linear.from_linear(nn.Linear(33, 20))
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="bias is"):
        layer.load_state_dict({**before, "bias": bias}, assign=True)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
