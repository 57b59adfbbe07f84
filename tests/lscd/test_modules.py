"""SparseLinear and what puts it into models. Data are small integers where results are compared bit by bit."""

import copy
import io
import logging
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import effk
import pytest
import torch
from effk.lscd import SparseLinear, prepare_, sparsify_
from torch import nn
from torch.nn.utils import prune

from ..kit.tensors import same_bits

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
COLS, ROWS = 70, 37  # ragged: neither is a multiple of a sub-tile


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """-1, 0 and 1: sums of fewer than 256 products are exact in every dtype."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pruned_linear(
    cols: int = COLS, rows: int = ROWS, *, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Linear:
    """About 2/3 of the weights are zero."""
    linear = nn.Linear(cols, rows, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(integers(rows, cols, seed=seed) * integers(rows, cols, seed=seed + 1).abs())
        if bias:
            linear.bias.copy_(integers(rows, seed=seed + 2))
    return linear


def same_state(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(same_bits(x[k], y[k]) for k in x)


# ---- SparseLinear


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_dense_layer(dtype: torch.dtype, bias: bool) -> None:
    linear = pruned_linear(bias=bias, dtype=dtype)
    x = integers(2, 3, COLS, dtype=dtype)
    assert same_bits(SparseLinear.from_linear(linear)(x), linear(x))


def test_activation() -> None:
    linear, x = pruned_linear(), integers(5, COLS)
    assert same_bits(SparseLinear.from_linear(linear, activation="relu")(x), linear(x).relu())


def test_gradients_are_those_of_the_dense_layer() -> None:
    linear = pruned_linear()
    sparse = SparseLinear.from_linear(copy.deepcopy(linear))
    grads = []
    for module in (linear, sparse):
        x = integers(5, COLS).requires_grad_()
        module(x).backward(integers(5, ROWS, seed=3))
        grads.append((x.grad, module.bias.grad))
    assert all(same_bits(a, b) for a, b in zip(*grads, strict=True))
    assert [name for name, _ in sparse.named_parameters()] == ["bias"]


@pytest.mark.parametrize("dtype", FLOATS)
def test_to_linear_gives_the_same_bits_back(dtype: torch.dtype) -> None:
    linear = pruned_linear(dtype=dtype)
    with torch.no_grad():
        linear.weight[0, :3] = torch.tensor([math.nan, math.inf, -0.0])
    back = SparseLinear.from_linear(linear).to_linear()
    with torch.no_grad():
        linear.weight[0, 2] = 0.0  # -0.0 counts as pruned
        linear.weight[linear.weight == 0] = 0.0
    assert same_state(back, linear)


def test_to_linear_refuses_an_activation() -> None:
    with pytest.raises(ValueError, match="silu"):
        SparseLinear.from_linear(pruned_linear(), activation="silu").to_linear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_from_linear_casts(dtype: torch.dtype) -> None:
    linear = nn.Linear(COLS, ROWS)
    sparse = SparseLinear.from_linear(linear, dtype=dtype)
    assert same_state(sparse.to_linear(), copy.deepcopy(linear).to(dtype))


def test_from_linear_keeps_the_bias_parameter_and_mode() -> None:
    linear = pruned_linear().eval()
    linear.bias.requires_grad_(False)
    sparse = SparseLinear.from_linear(linear)
    assert sparse.bias is linear.bias and not sparse.training
    assert not SparseLinear.from_linear(linear, dtype=torch.float16).bias.requires_grad


def test_int8_rounds_to_nearest_even() -> None:
    # The scale of the first row is 127 / 127 = 1, of the second 254 / 127 = 2; the third is empty.
    weight = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5], [-254, 1, 3, 5, 0, -3], [0, 0, 0, 0, 0, -0.0]])
    linear = nn.Linear(6, 3, bias=False)
    linear.weight = nn.Parameter(weight)
    sparse = SparseLinear.from_linear(linear, dtype=torch.int8)
    assert sparse.values.dtype == torch.int8 and same_bits(sparse.scale, torch.tensor([1.0, 2.0, 1.0]))
    wanted = torch.tensor([[127.0, 0, 2, 2, 0, -2], [-254, 0, 4, 4, 0, -4], [0] * 6])
    assert torch.equal(sparse.to_linear().weight, wanted)
    assert sparse.nnz == int(wanted.count_nonzero())


def test_int8_error_is_half_a_step() -> None:
    linear = nn.Linear(COLS, ROWS, bias=False, dtype=torch.bfloat16)
    sparse = SparseLinear.from_linear(linear, dtype=torch.int8)
    w, scale = linear.weight.double(), sparse.scale.double()[:, None]
    assert ((w.abs().amax(1, keepdim=True) / 127 - scale).abs() <= 2**-23 * scale).all()  # one float32 division
    # The quotient is rounded in float32 before it is rounded to an integer: up to 127 * 2^-24 beside a half.
    q = torch.ops.effk.lscd_unpack(sparse.values, sparse.bitmap, sparse.offsets, ROWS, COLS).double()
    assert ((w / scale - q).abs() <= 0.5 + 127 * 2**-23).all()
    assert (q.abs().amax(1) == 127).all()


def test_int8_of_tiny_weights() -> None:
    """The quotient of a subnormal row by 127 is zero in float32."""
    linear = nn.Linear(4, 1, bias=False)
    nn.init.constant_(linear.weight, 2.0**-149)
    sparse = SparseLinear.from_linear(linear, dtype=torch.int8)
    assert sparse.scale.item() == 1 and sparse.nnz == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_int8_refuses_what_has_no_scale(bad: float) -> None:
    linear = pruned_linear()
    with torch.no_grad():
        linear.weight[3, 4] = bad
    with pytest.raises(ValueError, match="NaN or infinities"):
        SparseLinear.from_linear(linear, dtype=torch.int8)


def test_sizes() -> None:
    linear = pruned_linear()
    sparse = SparseLinear.from_linear(linear)
    nnz = int(linear.weight.count_nonzero())
    assert sparse.nnz == nnz and sparse.sparsity == 1 - nnz / (ROWS * COLS)
    assert sparse.nbytes == sum(t.nbytes for name, t in sparse.state_dict().items() if name != "bias")
    assert f"in_features={COLS}, out_features={ROWS}, bias=True" in repr(sparse) and f"nnz={nnz}" in repr(sparse)


def test_full_and_empty_weights() -> None:
    full = nn.Linear(300, 20)
    assert SparseLinear.from_linear(full).nnz == 6000
    empty = SparseLinear(300, 20)
    assert empty.nnz == 0 and empty(torch.ones(2, 300)).count_nonzero() == 0
    assert SparseLinear.from_linear(nn.Linear(0, 5, bias=False), dtype=torch.int8)(torch.ones(2, 0)).shape == (2, 5)


@pytest.mark.parametrize("name, value", [("activation", "tanh"), ("dtype", torch.float64), ("dtype", torch.int16)])
def test_unknown_arguments(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        SparseLinear(4, 4, **{name: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16])
def test_casts_leave_the_structure_alone(dtype: torch.dtype, cast: torch.dtype) -> None:
    sparse = SparseLinear.from_linear(pruned_linear(), dtype=dtype)
    before = copy.deepcopy(sparse)
    sparse.to(cast)
    assert sparse.bias.dtype == cast
    assert sparse.values.dtype == (cast if dtype.is_floating_point else torch.int8)
    for name in ("bitmap", "offsets", "scale"):
        a, b = getattr(sparse, name), getattr(before, name)
        assert (a is None and b is None) or same_bits(a, b)
    x = integers(3, COLS, dtype=cast)
    if dtype == torch.float32:
        assert same_bits(sparse(x), before(x.float()).to(cast))  # exact sums: one rounding
    assert sparse(x).dtype == cast


def test_a_cast_that_underflows_keeps_the_weight_stored() -> None:
    linear = nn.Linear(8, 8, bias=False)
    nn.init.constant_(linear.weight, 2.0**-40)
    sparse = SparseLinear.from_linear(linear).half()
    assert sparse.nnz == 64 and sparse.to_linear().weight.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_copies(dtype: torch.dtype) -> None:
    sparse = SparseLinear.from_linear(pruned_linear(), dtype=dtype)
    file = io.BytesIO()
    torch.save(sparse, file)
    file.seek(0)
    x = integers(3, COLS)
    for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse)), torch.load(file, weights_only=False)):
        assert same_state(twin, sparse) and same_bits(twin(x), sparse(x))
        assert twin.values.data_ptr() != sparse.values.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_compile_and_export(dtype: torch.dtype) -> None:
    model = nn.Sequential(SparseLinear.from_linear(pruned_linear(), dtype=dtype), nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    tokens = torch.export.Dim("tokens")
    exported = torch.export.export(model, (integers(4, COLS),), dynamic_shapes=({0: tokens},)).module()
    for n in (2, 7):
        x = integers(n, COLS, seed=n)
        assert same_bits(compiled(x), model(x)) and same_bits(exported(x), model(x))


# ---- state_dict


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
@pytest.mark.parametrize("device, assign", [("cpu", False), ("cpu", True), ("meta", True)])
def test_load_into_an_empty_module(dtype: torch.dtype, device: str, assign: bool) -> None:
    sparse = SparseLinear.from_linear(pruned_linear(), dtype=dtype)
    keys = ["bias", "bitmap", "offsets", "values"] + (["scale"] if dtype == torch.int8 else [])
    assert sorted(sparse.state_dict()) == sorted(keys)
    empty = SparseLinear(COLS, ROWS, dtype=dtype, device=device)
    empty.load_state_dict(sparse.state_dict(), assign=assign)
    assert same_state(empty, sparse)
    assert (empty.values.data_ptr() == sparse.values.data_ptr()) == assign


def test_to_empty_then_load() -> None:
    sparse = SparseLinear.from_linear(pruned_linear())
    empty = SparseLinear(COLS, ROWS, device="meta").to_empty(device="cpu")
    empty.load_state_dict(sparse.state_dict())
    assert same_state(empty, sparse)


def test_load_casts_as_other_modules_do() -> None:
    sparse = SparseLinear.from_linear(pruned_linear(dtype=torch.bfloat16))
    kept, taken = SparseLinear(COLS, ROWS), SparseLinear(COLS, ROWS)
    kept.load_state_dict(sparse.state_dict())
    taken.load_state_dict(sparse.state_dict(), assign=True)
    assert same_state(kept, copy.deepcopy(sparse).float()) and same_state(taken, sparse)


def test_load_reuses_memory_where_sizes_allow() -> None:
    """Captured graphs hold on to addresses."""
    sparse = SparseLinear.from_linear(pruned_linear())
    address = sparse.values.data_ptr()
    sparse.load_state_dict(copy.deepcopy(sparse).state_dict())
    assert sparse.values.data_ptr() == address


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {**state, name: change(state[name].clone())}


CORRUPT = {
    "no bitmap": (lambda s: {k: v for k, v in s.items() if k != "bitmap"}, "lacks bitmap"),
    "not a tensor": (lambda s: {**s, "values": [1.0]}, "should be a tensor"),
    "bitmap shape": (changed("bitmap", lambda t: t[:, :-1]), "bitmap"),
    "bitmap dtype": (changed("bitmap", lambda t: t.int()), "bitmap"),
    "bitmap bits": (changed("bitmap", torch.bitwise_not), "corrupt"),
    "offsets shape": (changed("offsets", lambda t: t[:-1]), "offsets"),
    "offsets start": (changed("offsets", lambda t: t + 16), "corrupt"),
    "offsets fall": (changed("offsets", lambda t: t.index_fill(0, torch.tensor([1]), -(2**60))), "corrupt"),
    "values short": (changed("values", lambda t: t[:-1]), "corrupt"),
    "values of no length": (changed("values", lambda t: t[:0]), "padding"),
    "values dtype": (changed("values", lambda t: t.double()), "float64"),
    "int8 values": (changed("values", lambda t: t.char()), "int8"),
    "bias shape": (changed("bias", lambda t: t[:-1]), "bias"),
    "meta": (changed("values", lambda t: t.to("meta")), "device"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_checkpoint_changes_nothing(case: str, assign: bool, strict: bool) -> None:
    corrupt, message = CORRUPT[case]
    model = nn.Sequential(SparseLinear.from_linear(pruned_linear(seed=5)))
    before = copy.deepcopy(model)
    state = SparseLinear.from_linear(pruned_linear()).state_dict()
    state = {f"0.{name}": t for name, t in corrupt(dict(state)).items()}
    with pytest.raises(RuntimeError, match=rf"0: .*{message}"):
        model.load_state_dict(state, strict=strict, assign=assign)
    assert same_state(model, before)


def test_missing_module_is_a_missing_key() -> None:
    missing = nn.Sequential(SparseLinear(4, 4)).load_state_dict({}, strict=False).missing_keys
    assert set(missing) == {"0.values", "0.bitmap", "0.offsets", "0.bias"}


# ---- models


class Tied(nn.Module):
    """Two Linears share a weight, and so do an embedding and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(ROWS, COLS)
        self.first = pruned_linear(COLS, COLS, bias=False)
        self.second = nn.Linear(COLS, COLS, bias=False)
        self.second.weight = self.first.weight
        self.head = pruned_linear(bias=False, seed=7)
        self.embed.weight = self.head.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(self.embed(ids)).sign()).sign())


IDS = torch.arange(ROWS)


def test_sparsify_packs_what_is_sparse() -> None:
    dense = nn.Linear(ROWS, ROWS)
    model = nn.Sequential(pruned_linear(), nn.ReLU(), nn.ModuleDict({"inner": dense})["inner"]).eval()
    x = integers(4, COLS)
    wanted = model(x)
    packed, left = sparsify_(model, progress=False)
    assert isinstance(model[0], SparseLinear) and model[2] is dense and not model[0].training
    assert same_bits(model(x), wanted)
    assert packed.names == ("0",) and packed.shape == (ROWS, COLS) and not packed.skipped
    assert packed.sparsity == model[0].sparsity
    assert packed.bytes_before == ROWS * COLS * 4 and packed.bytes_after == model[0].nbytes
    assert left.names == ("2",) and left.bytes_after == left.bytes_before and "0.45" in left.skipped


def test_sparsify_to_another_dtype() -> None:
    model = nn.Sequential(pruned_linear())
    sparsify_(model, dtype=torch.int8)
    assert model[0].values.dtype == torch.int8 and model[0].bias.dtype == torch.float32


def test_sparsify_keeps_ties() -> None:
    model = Tied()
    wanted = model(IDS)
    records = {r.names: r for r in sparsify_(model)}
    assert model.first is model.second and isinstance(model.first, SparseLinear)
    assert model.embed.weight is model.head.weight and "embed.weight" in records["head",].skipped
    assert not records["first", "second"].skipped
    assert same_bits(model(IDS), wanted)


def test_a_module_used_twice_is_packed_once() -> None:
    linear = pruned_linear(COLS, COLS)
    model = nn.Sequential(linear, nn.ReLU(), linear)
    (record,) = sparsify_(model)
    assert record.names == ("0", "2") and model[0] is model[2] and isinstance(model[0], SparseLinear)


def with_other_bias() -> nn.Module:
    model = nn.Sequential(pruned_linear(), pruned_linear())
    model[1].weight = model[0].weight
    return model


def with_hook() -> nn.Module:
    model = nn.Sequential(pruned_linear())
    model[0].register_forward_hook(lambda module, args, y: y + 1)
    return model


def with_prune() -> nn.Module:
    model = nn.Sequential(nn.Linear(COLS, ROWS))
    prune.l1_unstructured(model[0], "weight", 0.6)
    return model


def with_zeros(model: nn.Module) -> nn.Module:
    """All weights of Linears are zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
    return model.eval()


def encoder_layer() -> nn.Module:
    layer = with_zeros(nn.TransformerEncoderLayer(8, 2, 16))
    del layer.self_attn  # left dense for another reason
    return layer


LEFT_DENSE = {
    "its bias": with_other_bias,
    "hooks": with_hook,
    "prune.remove": with_prune,
    "NonDynamicallyQuantizableLinear": lambda: with_zeros(nn.MultiheadAttention(8, 2)),
    "nn.TransformerEncoderLayer": encoder_layer,
    "float64": lambda: nn.Sequential(pruned_linear(dtype=torch.float64)),
    "meta device": lambda: nn.Sequential(nn.Linear(4, 4, device="meta")),
    "filter": lambda: nn.Sequential(pruned_linear()),
}


@pytest.mark.parametrize("reason", LEFT_DENSE)
def test_sparsify_leaves_dense_and_says_why(reason: str) -> None:
    model = LEFT_DENSE[reason]()
    before = list(model.modules())
    records = sparsify_(model, filter=(lambda name, linear: False) if reason == "filter" else None)
    assert list(model.modules()) == before
    assert records and all(reason in r.skipped and r.bytes_after == r.bytes_before for r in records)


def test_transformer_encoder_still_runs() -> None:
    model = with_zeros(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2))
    x = torch.randn(2, 3, 8)
    wanted = model(x)
    sparsify_(model)
    assert same_bits(model(x), wanted)


def test_filter_sees_paths() -> None:
    model = nn.ModuleDict({"keep": pruned_linear(), "pack": pruned_linear()})
    sparsify_(model, filter=lambda name, linear: name == "pack" and linear is model["pack"])
    assert type(model["keep"]) is nn.Linear and type(model["pack"]) is SparseLinear


def test_sparsify_refuses_a_bare_linear_and_odd_dtypes() -> None:
    with pytest.raises(ValueError, match="from_linear"):
        sparsify_(pruned_linear())
    with pytest.raises(ValueError, match="float64"):
        sparsify_(nn.Sequential(pruned_linear()), dtype=torch.float64)


def test_interruption_leaves_a_model_that_works() -> None:
    model = nn.Sequential(*(pruned_linear(COLS, COLS, seed=i) for i in range(3)))
    x = integers(2, COLS)
    wanted = model(x)

    def interrupt(name: str, linear: nn.Linear) -> bool:
        if name == "1":
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        sparsify_(model, filter=interrupt)
    assert [type(m) for m in model] == [SparseLinear, nn.Linear, nn.Linear]
    assert torch.equal(model(x), wanted)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("progress", [True, False])
def test_progress_and_log(progress: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with caplog.at_level(logging.INFO, logger="effk"):
        sparsify_(nn.Sequential(pruned_linear()), progress=progress)
    assert ("Packing weights" in sys.stderr.getvalue()) == progress
    assert "packed 1 of 1 weights" in caplog.text


# ---- packed checkpoints


@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_prepare_makes_room_for_a_packed_checkpoint(dtype: torch.dtype | None) -> None:
    model = nn.Sequential(pruned_linear(), nn.LayerNorm(ROWS), nn.Linear(ROWS, 3))
    sparsify_(model, dtype=dtype)
    state = model.state_dict()
    fresh = nn.Sequential(nn.Linear(COLS, ROWS), nn.LayerNorm(ROWS), nn.Linear(ROWS, 3)).eval()
    prepare_(fresh, state)
    assert not fresh[0].training
    fresh.load_state_dict(state)
    assert same_state(fresh, model)


def test_prepare_on_meta_takes_a_checkpoint_without_copies() -> None:
    model = nn.Sequential(pruned_linear())
    sparsify_(model)
    with torch.device("meta"):
        fresh = nn.Sequential(nn.Linear(COLS, ROWS))
    prepare_(fresh, model.state_dict())
    fresh.load_state_dict(model.state_dict(), assign=True)
    assert same_state(fresh, model)


def test_prepare_changes_nothing_where_it_fails() -> None:
    model = nn.Sequential(pruned_linear(), with_hook())
    before = list(model.modules())
    with pytest.raises(ValueError, match=r"1\.0 is packed.*hooks"):
        prepare_(model, ["0.bitmap", "1.0.bitmap"])
    assert list(model.modules()) == before


@pytest.mark.parametrize("whole_model", [True, False])
def test_safetensors(whole_model: bool, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    file = tmp_path / "model.safetensors"
    model = Tied()
    sparsify_(model)
    if whole_model:
        safetensors.save_model(model, file)
    else:
        kept = {name: t for name, t in model.state_dict().items() if not name.startswith(("second", "embed"))}
        safetensors.save_file(kept, file)
    state = safetensors.load_file(file)

    fresh = Tied()
    prepare_(fresh, state)
    if whole_model:
        safetensors.load_model(fresh, file)
    else:
        missing, unexpected = fresh.load_state_dict(state, strict=False)
        assert not unexpected and all(name.startswith(("second", "embed")) for name in missing)
    assert fresh.first is fresh.second and same_state(fresh, model)
    assert same_bits(fresh(IDS), model(IDS))


def test_every_level_rejects_a_corrupt_checkpoint() -> None:
    """What loads under one CPU level must be safe under the others."""
    corrupt, message = CORRUPT["bitmap bits"]
    state = corrupt(dict(SparseLinear.from_linear(pruned_linear()).state_dict()))
    for level in effk.status()["cpu_levels"]:
        with effk.cpu_level(level), pytest.raises(RuntimeError, match=message):
            SparseLinear(COLS, ROWS).load_state_dict(state)
