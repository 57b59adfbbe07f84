"""The plugin for vLLM, against a stand-in for vLLM's interface; and, where vLLM is installed, in vLLM itself."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kit.tensors import same_bits

pytest.importorskip("transformers", minversion="5")

from effk import lscd, w4a8
from effk.integrations.transformers import EffkConfig

from . import vllm_interface
from .test_transformers import METHODS, every_method
from .vllm_interface import REGISTERED, Layer, UnquantizedLinearMethod

COLS, ROWS = 96, {"q": 64, "k": 33, "v": 32}
ATTENTION, MLP = "model.layers.3.self_attn.qkv_proj", "model.layers.3.mlp.gate_up_proj"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with monkeypatch.context() as patch:
        vllm_interface.install(patch)
        yield importlib.import_module("effk.integrations.vllm")
    sys.modules.pop("effk.integrations.vllm", None)


def config_of(plugin: Any, **options: Any) -> Any:
    plugin.register()
    config = REGISTERED["effk"].from_config({"quant_method": "effk", **options})  # type: ignore[attr-defined]
    config.packed_modules_mapping = FUSED
    return config


def weights(dtype: torch.dtype = torch.float32, rows: dict[Any, int] = ROWS) -> dict[Any, Tensor]:
    """Six of ten are zeros."""
    g = torch.Generator().manual_seed(0)
    return {
        part: (torch.randn(n, COLS, generator=g) * (torch.rand(n, COLS, generator=g) > 0.6)).to(dtype)
        for part, n in rows.items()
    }


def packed(weight: Tensor, name: str) -> w4a8.Linear | lscd.SparseLinear:
    linear = nn.Linear(*weight.shape[::-1], bias=False)
    linear.weight = nn.Parameter(weight)
    if name == "w4a8":
        return w4a8.Linear.from_linear(linear, torch.arange(len(weight)) % 7 == 3, 32)
    return lscd.SparseLinear.from_linear(linear, dtype=torch.int8 if "int8" in name else None)


def x_of(dtype: torch.dtype) -> Tensor:
    return torch.randn(5, COLS, generator=torch.Generator().manual_seed(1)).to(dtype)


def dense(module: Any) -> Tensor:
    return module.to_linear().weight.detach()


# ---- weights that are packed while loading


@every_method
@pytest.mark.parametrize("dtype", FLOATS)
def test_dense_weights_are_packed(plugin: Any, name: str, dtype: torch.dtype) -> None:
    layer = Layer(config_of(plugin, **METHODS[name]), ATTENTION, COLS, ROWS, dtype)
    for part, weight in weights(dtype).items():
        layer.load(part, {"weight": weight})
    layer.finish()
    (module,) = layer.parts
    assert type(module) is (w4a8.Linear if name == "w4a8" else lscd.SparseLinear)
    assert [n for n, _ in layer.named_parameters()] == []  # the dense weight is gone
    close = 0.02 if name == "lscd, int8" or dtype != torch.float32 else 1e-6
    whole, x, bias = torch.cat(list(weights(dtype).values())), x_of(dtype), torch.arange(129).to(dtype)
    if name != "w4a8":
        torch.testing.assert_close(dense(module).to(dtype), whole, atol=close, rtol=close)
    assert same_bits(layer(x), module(x))
    want = F.linear(x.double(), dense(module).double())
    error = (layer(x).double() - want).norm() / want.norm()
    assert error < (0.02 if name == "w4a8" else close)
    assert same_bits(layer(x, bias), module(x) + bias)


def test_few_zeros_stay_dense(plugin: Any) -> None:
    layer = Layer(config_of(plugin, method="lscd", min_sparsity=0.9), "a.o_proj", COLS, {None: 64}, torch.float32)
    weight = weights()["q"]
    layer.load(None, {"weight": weight}).finish()
    assert same_bits(layer(x_of(torch.float32)), F.linear(x_of(torch.float32), weight))


# ---- packed checkpoints


@every_method
@pytest.mark.parametrize("dtype", FLOATS)
def test_packed_parts_of_one_layer(plugin: Any, name: str, dtype: torch.dtype) -> None:
    """Parts may come in any order, and one of them may be dense."""
    config = config_of(plugin, **METHODS[name], packed=True, modules_to_not_convert=["v_proj", "lm_head"])
    layer = Layer(config, ATTENTION, COLS, ROWS, dtype)
    own = weights(dtype)
    modules = {part: packed(own[part], name) for part in "qk"}
    layer.load("v", {"weight": own["v"]})
    for part in "kq":
        layer.load(part, modules[part].state_dict())
    layer.finish()
    x = x_of(dtype)
    want = torch.cat([modules["q"](x), modules["k"](x), F.linear(x, own["v"])], -1)
    assert same_bits(layer(x), want)
    exact = F.linear(x.double(), torch.cat([dense(modules["q"]), dense(modules["k"]), own["v"]]).double())
    assert (layer(x).double() - exact).norm() / exact.norm() < 0.02
    assert not [n for n, t in layer.state_dict().items() if t.numel() == 0 and n.count(".") == 0]


def test_parts_by_number_and_whole_layers(plugin: Any) -> None:
    config, x = config_of(plugin, packed=True), x_of(torch.float32)
    gate, up = (packed(w, "w4a8") for w in weights(rows={0: 64, 1: 64}).values())
    layer = Layer(config, MLP, COLS, {0: 64, 1: 64}, torch.float32)
    layer.load(1, up.state_dict()).load(0, gate.state_dict()).finish()
    assert same_bits(layer(x), torch.cat([gate(x), up(x)], -1))
    both = packed(torch.cat(list(weights(rows={0: 64, 1: 64}).values())), "w4a8")
    for prefix, rows in ((MLP, {0: 64, 1: 64}), ("model.layers.0.mlp.down_proj", {None: 128})):
        layer = Layer(config, prefix, COLS, rows, torch.float32).load(None, both.state_dict()).finish()
        assert same_bits(layer(x), both(x))


def test_tensors_are_copied(plugin: Any) -> None:
    """Readers may use their memory for the next file."""
    module, x = packed(weights()["q"], "w4a8"), x_of(torch.float32)
    want, state = module(x), module.state_dict()
    layer = Layer(config_of(plugin, packed=True), "a.o_proj", COLS, {None: 64}, torch.float32).load(None, state)
    for t in state.values():
        t.zero_()
    assert same_bits(layer.finish()(x), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"perm": s["perm"] * 0}, "perm"),
        (lambda s: s | {"q8": s["q8"][:, :-1].clone()}, "q8 has shape"),
        (lambda s: {k: v for k, v in s.items() if k != "zero4"}, "lacks zero4"),
        (lambda s: {k: v for k, v in s.items() if k != "q4"}, "Missing key"),
        (lambda s: s | {"weight": torch.zeros(64, COLS)}, "Unexpected key"),
    ],
)
def test_corrupt_weights_are_refused(plugin: Any, change: Any, message: str) -> None:
    layer = Layer(config_of(plugin, packed=True), ATTENTION, COLS, ROWS, torch.float32)
    for part, weight in weights().items():
        state = packed(weight, "w4a8").state_dict()
        layer.load(part, change(state) if part == "q" else state)
    with pytest.raises(ValueError, match=f"part 0 of {ATTENTION} can't be used") as error:
        layer.finish()
    assert message in str(error.value)


def test_missing_parts_are_refused(plugin: Any) -> None:
    layer = Layer(config_of(plugin, packed=True), ATTENTION, COLS, ROWS, torch.float32)
    layer.load("q", packed(weights()["q"], "w4a8").state_dict())
    with pytest.raises(ValueError, match=r"has 3 parts; the checkpoint has \['0'\]"):
        layer.finish()


# ---- the configuration


def test_which_layers(plugin: Any) -> None:
    config = config_of(plugin, modules_to_not_convert=["model.layers.3.self_attn", "up_proj"])
    layer = vllm_interface.LinearBase()
    assert isinstance(config.get_quant_method(layer, ATTENTION), UnquantizedLinearMethod)
    assert isinstance(config.get_quant_method(layer, ATTENTION.replace("3", "4")), plugin.PackingMethod)
    assert config.get_quant_method(nn.Embedding(1, 1), "lm_head") is None
    with pytest.raises(ValueError, match="gate_up_proj is one layer in vLLM: effk packs all of"):
        config.get_quant_method(layer, MLP)
    assert isinstance(config_of(plugin, packed=True).get_quant_method(layer, MLP), plugin.PackedMethod)
    assert plugin.VllmConfig().config.to_dict() == EffkConfig().to_dict()
    with pytest.raises(ValueError, match="no option 'bits'"):
        config_of(plugin, bits=4)


def test_names_become_vllms(plugin: Any) -> None:
    class Mapper:
        def apply_list(self, names: list[str]) -> list[str]:
            return [f"language.{name}" for name in names]

    config = config_of(plugin, modules_to_not_convert=["a.b"])
    config.apply_vllm_mapper(Mapper())
    assert config.config.modules_to_not_convert == ["language.a.b"]


def test_packed_weights_arent_cut(plugin: Any) -> None:
    with pytest.raises(ValueError, match="can't be cut for tensor parallelism"):
        Layer(config_of(plugin, packed=True), ATTENTION, COLS, ROWS, torch.float32, tp=2)
    Layer(config_of(plugin), ATTENTION, COLS, ROWS, torch.float32, tp=2)


def test_entry_point(plugin: Any) -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    group = '[project.entry-points."vllm.general_plugins"]'
    assert f'{group}\neffk = "{plugin.__name__}:{plugin.register.__name__}"\n' in text


# ---- vLLM itself

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    small = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 1, "enforce_eager": True}
    llm = LLM(folder, skip_tokenizer_init=True, **small, **options)
    greedy = SamplingParams(temperature=0, max_tokens=8, detokenize=False, ignore_eos=True)
    print("tokens", llm.generate([{"prompt_token_ids": [5, 17, 42]}], greedy)[0].outputs[0].token_ids)
"""


@pytest.mark.slow
@pytest.mark.parametrize("packed_before", [True, False])
def test_vllm_generates_what_transformers_does(tmp_path: Path, packed_before: bool) -> None:
    """lscd, as its weights are the same whether packed together or apart."""
    pytest.importorskip("vllm")
    from .test_transformers import build, load

    build(head_dim=64, initializer_range=0.2).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", EffkConfig("lscd"))
    model.save_pretrained(tmp_path / "packed")
    wanted = model.generate(torch.tensor([[5, 17, 42]]), max_new_tokens=8, do_sample=False)[0, 3:]
    online = {"quantization": "effk", "hf_overrides": {"quantization_config": EffkConfig("lscd").to_dict()}}
    folder, options = (tmp_path / "packed", {}) if packed_before else (tmp_path / "dense", online)
    (tmp_path / "run.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, tmp_path / "run.py", folder, json.dumps(options)], capture_output=True, text=True, timeout=600
    )
    assert f"tokens {wanted.tolist()}" in done.stdout, done.stdout + done.stderr
