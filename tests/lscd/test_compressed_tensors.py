"""Import of sparse-bitmask checkpoints: from bytes as the format says, and as the real package writes them."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from effk.integrations.compressed_tensors import load_into, load_sparse_bitmask
from effk.lscd import SparseLinear
from torch import Tensor, nn

from ..kit.tensors import same_bits

# 2 x 10: rows of two bytes; the last six bits of the second are past the end.
WEIGHT = [[1, 0, -2, 0, 0, 0, 0, 3, 0, 4], [0, 0, 0.5, 0, 0, 0, 0, 0, 5, 0]]
PARTS = {
    "shape": torch.tensor([2, 10]),
    "compressed": torch.tensor([1, -2, 3, 4, 0.5, 5]),
    "bitmask": torch.tensor([[0b10000101, 0b10], [0b100, 0b1]], dtype=torch.uint8),
    "row_offsets": torch.tensor([0, 4]),
}


def checkpoint(prefix: str = "fc", **changes: Tensor) -> dict[str, Tensor]:
    return {f"{prefix}.{part}": t for part, t in {**PARTS, **changes}.items()}


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    pytest.importorskip("safetensors.torch").save_file(tensors, path)
    return path


class Model(nn.Module):
    """A head tied to the embedding, two Linears tied to each other, and a buffer."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.up = nn.Linear(width, 30)
        self.down = nn.Linear(30, width)
        self.again = nn.Linear(width, 30, bias=False)
        self.twin = nn.Linear(width, 30, bias=False)
        self.twin.weight = self.again.weight
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.down(self.up(self.embed(ids)).relu()))
        return self.head(x) + (self.again(x) * self.twin(x)).sum(1, keepdim=True)


def pruned_model() -> Model:
    model = Model().eval()
    with torch.no_grad():
        for module in (model.up, model.down, model.again):
            module.weight.masked_fill_(torch.rand_like(module.weight) < 0.7, 0)
    return model


def write(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict as the real package compresses it: every weight, of norms and embeddings too."""
    package = pytest.importorskip("compressed_tensors", reason="the package that writes the format isn't installed")
    if not hasattr(package, "BitmaskCompressor"):
        pytest.skip("this version of compressed-tensors no longer writes sparse-bitmask")
    state = {k: t for k, t in model.state_dict().items() if not k.startswith(("twin", "head"))}
    return package.BitmaskCompressor(package.BitmaskConfig(format="sparse-bitmask")).compress(state)


@pytest.mark.parametrize("prefix", ["fc", "fc.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_literal_bytes(prefix: str, dtype: torch.dtype) -> None:
    other = torch.ones(3)
    found = load_sparse_bitmask(checkpoint(prefix, compressed=PARTS["compressed"].to(dtype)) | {"other": other})
    assert found.keys() == {"fc.weight", "other"} and found["other"] is other
    assert same_bits(found["fc.weight"], torch.tensor(WEIGHT, dtype=dtype))


def test_special_values_survive() -> None:
    special = torch.tensor([float("nan"), float("inf"), -1e-45, 4, 0.5, 5])
    (weight,) = load_sparse_bitmask(checkpoint(compressed=special)).values()
    assert same_bits(weight[weight != 0], special)


EMPTY = torch.tensor([], dtype=torch.int64)
CORRUPT = {
    "sparse_24": (lambda c: c.pop("fc.row_offsets"), "lacks row_offsets"),
    "no compressed": (lambda c: c.pop("fc.compressed"), "lacks compressed"),
    "twice": (lambda c: c.update({"fc.weight": torch.ones(2, 10)}), "fc.weight twice"),
    "both names": (lambda c: c.update(checkpoint("fc.weight")), "fc.weight twice"),
    "fp8": (lambda c: c.update({"fc.compressed": torch.ones(6).to(torch.float8_e4m3fn)}), "quantized"),
    "shape": (lambda c: c.update({"fc.shape": torch.tensor([2, 17])}), "bitmask is"),
    "huge shape": (lambda c: c.update({"fc.shape": torch.tensor([2**62, 2**62])}), "bitmask is"),
    "negative shape": (lambda c: c.update({"fc.shape": torch.tensor([-2, 10])}), "shape holds"),
    "float shape": (lambda c: c.update({"fc.shape": torch.tensor([2.0, 10.0])}), "shape is"),
    "no shape": (lambda c: c.update({"fc.shape": EMPTY}), "shape is"),
    "bitmask dtype": (lambda c: c.update({"fc.bitmask": PARTS["bitmask"].int()}), "bitmask is"),
    "bitmask rows": (lambda c: c.update({"fc.bitmask": PARTS["bitmask"][:1]}), "bitmask is"),
    "past the end": (lambda c: c["fc.bitmask"].add_(128), "after the end of a row"),
    "one more bit": (lambda c: c["fc.bitmask"][0, 0].add_(2), "compressed has"),
    "values short": (lambda c: c.update({"fc.compressed": torch.ones(5)}), "compressed has"),
    "values 2-D": (lambda c: c.update({"fc.compressed": torch.ones(6, 1)}), "compressed has"),
    "row_offsets": (lambda c: c["fc.row_offsets"].add_(1), "row_offsets"),
    "row_offsets short": (lambda c: c.update({"fc.row_offsets": torch.tensor([0])}), "row_offsets"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_tensors_are_errors(case: str) -> None:
    corrupt: Callable[[dict[str, Tensor]], object]
    corrupt, message = CORRUPT[case]
    tensors = {name: t.clone() for name, t in checkpoint().items()}
    corrupt(tensors)
    with pytest.raises(ValueError, match=message):
        load_sparse_bitmask(tensors)


def test_the_real_package_agrees() -> None:
    model = pruned_model()
    found, wanted = load_sparse_bitmask(write(model)), model.state_dict()
    assert found.keys() == {k for k in wanted if not k.startswith(("twin", "head"))}
    assert all(same_bits(t, wanted[name]) for name, t in found.items())


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_load_into(device: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = pruned_model()
    path = save(write(model), tmp_path / "model.safetensors")
    with torch.device(device):
        fresh = Model().eval()
    with caplog.at_level(logging.WARNING, logger="effk"):
        records = load_into(fresh, path, progress=False)
    assert not caplog.text  # nothing is left on the meta device
    assert {r.names for r in records if not r.skipped} == {("up",), ("down",), ("again", "twin")}
    assert isinstance(fresh.up, SparseLinear) and fresh.again is fresh.twin
    assert fresh.head.weight is fresh.embed.weight
    for name in ("up", "down", "again"):
        assert same_bits(getattr(fresh, name).to_linear().weight, getattr(model, name).weight)
        assert (bias := getattr(model, name).bias) is None or same_bits(getattr(fresh, name).bias, bias)
    assert same_bits(fresh.embed.weight, model.embed.weight)
    norm = model.norm.state_dict()
    assert all(same_bits(t, norm[name]) for name, t in fresh.norm.state_dict().items())
    assert fresh(torch.arange(11)).isfinite().all()


def test_tied_weights_may_be_there_twice() -> None:
    model = nn.ModuleDict({"a": nn.Linear(10, 2, bias=False), "b": nn.Linear(10, 2, bias=False)})
    model["b"].weight = model["a"].weight
    (record,) = load_into(model, checkpoint("a") | checkpoint("b"))
    assert record.names == ("a", "b") and isinstance(model["a"], SparseLinear) and model["a"] is model["b"]


def test_load_into_takes_the_models_dtype() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(10, 2, bias=False, dtype=torch.bfloat16)})
    load_into(model, checkpoint())
    assert same_bits(model["fc"].to_linear().weight, torch.tensor(WEIGHT, dtype=torch.bfloat16))


def test_dense_enough_stays_dense() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(10, 2, bias=False)})
    (record,) = load_into(model, checkpoint(), min_sparsity=0.75)  # it is 14/20 sparse
    assert "below" in record.skipped and same_bits(model["fc"].weight, torch.tensor(WEIGHT))


def test_names_are_checked_before_anything_is_loaded() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(10, 2), "other": nn.Linear(2, 2)})
    before = copy.deepcopy(model.state_dict())
    tensors = checkpoint() | {"fc.bias": torch.ones(2), "extra": torch.ones(1)}
    with pytest.raises(ValueError, match=r"lacks \['other.weight', 'other.bias'\].*\['extra'\]"):
        load_into(model, tensors)
    assert all(same_bits(t, before[name]) for name, t in model.state_dict().items())
    load_into(model, tensors, strict=False)
    assert isinstance(model["fc"], SparseLinear) and same_bits(model["fc"].bias, torch.ones(2))


def test_wrong_shape_names_the_tensor() -> None:
    with pytest.raises(ValueError, match=r"fc.weight has shape \[2, 10\].*wanted \[3, 10\]"):
        load_into(nn.ModuleDict({"fc": nn.Linear(10, 3, bias=False)}), checkpoint())


def test_what_stays_on_meta_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(10, 2, bias=False, device="meta")})
    model.register_buffer("angles", torch.ones(3, device="meta"), persistent=False)
    with caplog.at_level(logging.WARNING, logger="effk"):
        load_into(model, checkpoint())
    assert "angles" in caplog.text and "fc" not in caplog.text


def test_folders(tmp_path: Path) -> None:
    """All .safetensors files of a folder, or those of its index; a weight's parts may lie in different ones."""
    with pytest.raises(FileNotFoundError):
        load_sparse_bitmask(tmp_path)
    tensors = checkpoint()
    first = {"fc.shape": tensors.pop("fc.shape")}
    save(first, tmp_path / "a.safetensors")
    save(tensors, tmp_path / "b.safetensors")
    assert same_bits(load_sparse_bitmask(tmp_path)["fc.weight"], torch.tensor(WEIGHT))

    save(first, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"fc.shape is in several files"):
        load_sparse_bitmask(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    names = dict.fromkeys(tensors, "b.safetensors") | {"fc.shape": "a.safetensors"}
    index.write_text(json.dumps({"weight_map": names}))
    assert same_bits(load_sparse_bitmask(str(tmp_path))["fc.weight"], torch.tensor(WEIGHT))


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"weight_map": {"fc.shape": "../model.safetensors"}}', "outside of its folder"),
        ('{"weight_map": {"fc.shape": 3}}', "not an index"),
        ('{"weight_map": []}', "not an index"),
        ("{}", "not an index"),
        ("no json", "not an index"),
    ],
)
def test_bad_index(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_sparse_bitmask(tmp_path)
