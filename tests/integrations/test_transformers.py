"""transformers' from_pretrained and save_pretrained with effk's layers: tiny models with random weights, no network."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import effk
import pytest
import torch
from effk.lscd import SparseLinear, sparsify_
from effk.w4a8 import Linear, quantize_
from torch import Tensor, nn

from ..kit.tensors import same_bits
from ..lscd.test_modules import same_state

pytest.importorskip("transformers", minversion="5")

import transformers
from effk.integrations.transformers import EffkConfig, EffkQuantizer, attach, is_left_out, key_cache
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

VOCABULARY, COLS, EXPERTS = 64, 64, 4
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": COLS,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
OWN: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True},
    "Mixtral": {"num_local_experts": EXPERTS},
    "Qwen2Moe": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
}
METHODS: dict[str, dict[str, Any]] = {
    "w4a8": {"method": "w4a8", "ratio8": 0.2, "group_size": 32},
    "lscd": {"method": "lscd"},
    "lscd, int8": {"method": "lscd", "value_dtype": "int8", "min_sparsity": 0.5},
}
every_method = pytest.mark.parametrize("name", METHODS)
IDS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


def build(kind: str = "Llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Six of ten weights are zeros; biases aren't."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **OWN[kind], **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(torch.rand_like(module.weight) > 0.6)
                if module.bias is not None:
                    module.bias.normal_()
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a dense model, made once."""
    made: dict[str, Path] = {}

    def of(kind: str = "Llama", **options: Any) -> Path:
        key = f"{kind}{options}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(kind)
            build(kind, **options).save_pretrained(made[key])
        return made[key]

    return of


def load(folder: Path, config: EffkConfig | None = None, **options: Any) -> Any:
    if config is not None:  # given as None it would make transformers forget the checkpoint's
        options["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def directly(model: Any, name: str) -> Any:
    """The same by effk's own functions."""
    options = {k: v for k, v in METHODS[name].items() if k not in ("method", "value_dtype")}
    pack: Any = quantize_ if name == "w4a8" else sparsify_
    if "int8" in name:
        options["dtype"] = torch.int8
    pack(model, filter=lambda path, _: path != "lm_head", **options)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def kinds(model: nn.Module) -> dict[str, str]:
    wanted = (nn.Linear, Linear, SparseLinear)
    return {path: type(m).__qualname__ for path, m in model.named_modules() if isinstance(m, wanted)}


# ---- packing and loading


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_from_pretrained_packs_as_effk_does(folder: Any, name: str, dtype: torch.dtype) -> None:
    model = load(folder(), EffkConfig(**METHODS[name]), dtype=dtype)
    wanted = directly(load(folder(), dtype=dtype), name)
    assert kinds(model) == kinds(wanted) and same_state(model, wanted)
    assert list(kinds(model).values()).count("Linear" if name == "w4a8" else "SparseLinear") >= 14
    assert same_bits(logits(model), logits(wanted))
    assert model.config.quantization_config.modules_to_not_convert == ["lm_head"]


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_checkpoint_comes_back_bit_by_bit(
    folder: Any, tmp_path: Path, name: str, dtype: torch.dtype, shard: str
) -> None:
    model = load(folder(), EffkConfig(**METHODS[name]), dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "20KB")
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".json"}
    again = load(tmp_path, dtype="auto", device_map="cpu")
    assert same_state(again, model) and kinds(again) == kinds(model)
    assert same_bits(logits(again), logits(model))
    assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    assert again.generate(IDS, max_new_tokens=3).equal(model.generate(IDS, max_new_tokens=3))


def test_dense_weights_are_never_there(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a packed checkpoint nothing but the packed layers is given memory."""
    load(folder(), EffkConfig(**METHODS["w4a8"])).save_pretrained(tmp_path)
    made = []
    init = nn.Linear.__init__

    def noted(self: nn.Linear, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(self.weight.device.type)

    monkeypatch.setattr(nn.Linear, "__init__", noted)
    model = load(tmp_path)
    assert len(made) == 15 and set(made) == {"meta"}
    assert not [name for name, t in model.state_dict().items() if t.is_meta]


@every_method
def test_dtype_of_loading_casts_what_may_be_cast(folder: Any, tmp_path: Path, name: str) -> None:
    load(folder(), EffkConfig(**METHODS[name])).save_pretrained(tmp_path)
    model = load(tmp_path, dtype=torch.bfloat16)
    fixed = {"w4a8": torch.float32, "lscd": torch.bfloat16, "lscd, int8": torch.int8}
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.bias.dtype == torch.bfloat16
    assert (layer.scale4 if name == "w4a8" else layer.values).dtype == fixed[name]
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe"])
@pytest.mark.parametrize("experts", [True, False])
def test_experts(folder: Any, tmp_path: Path, kind: str, experts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their computation is effk's, or transformers'; their weights stay what they are."""
    model = load(folder(kind), EffkConfig(**METHODS["w4a8"], experts=experts))
    wanted = directly(load(folder(kind)), "w4a8")
    if experts:
        effk.moe.replace_experts_(wanted)
    assert same_state(model, wanted)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert same_state(again, model)
    for one in (wanted, model, again):
        assert (one.config._experts_implementation == "effk") == experts
    assert same_bits(logits(model), logits(wanted)) and same_bits(logits(again), logits(wanted))


def test_layers_stay_dense_by_name(folder: Any, tmp_path: Path) -> None:
    names = ["model.layers.0", "o_proj", "model.layers.1.mlp.up_proj"]
    model = load(folder(), EffkConfig(group_size=32, modules_to_not_convert=names))
    model.save_pretrained(tmp_path)
    for one in (model, load(tmp_path)):
        dense = {path for path, m in one.named_modules() if isinstance(m, nn.Linear)}
        assert {path.removeprefix("model.layers.") for path in dense} == {
            *(f"0.self_attn.{x}_proj" for x in "qkvo"),
            *(f"0.mlp.{x}_proj" for x in ("gate", "up", "down")),
            "1.self_attn.o_proj",
            "1.mlp.up_proj",
        }
    assert isinstance(model.lm_head, Linear)  # which only the default leaves out


def test_names_end_where_parts_of_paths_do() -> None:
    assert is_left_out("model.layers.1.q", ["model.layers.1"]) and is_left_out("a.b.q", ["b.q"])
    assert not is_left_out("model.layers.11.q", ["model.layers.1"]) and not is_left_out("a.bq", ["q"])
    assert not is_left_out("aXb", ["a.b"]) and not is_left_out("a", [".*"])  # no regular expressions


@every_method
def test_tied_embeddings_stay_dense(folder: Any, tmp_path: Path, name: str) -> None:
    config = EffkConfig(**METHODS[name], modules_to_not_convert=[])
    model = load(folder(tie_word_embeddings=True), config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight and same_bits(logits(again), logits(model))


def test_tied_layers_stay_dense(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that transformers ties, whatever the options say."""
    monkeypatch.setattr("effk.integrations.transformers._tied", lambda model: {"model.layers.0.mlp.up_proj"})
    model = load(folder(), EffkConfig(modules_to_not_convert=[]))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear and isinstance(model.lm_head, Linear)


def test_model_without_head_and_back(folder: Any, tmp_path: Path) -> None:
    """transformers adds or takes away the prefix of names."""
    model = load(folder(), EffkConfig(group_size=32))
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    assert same_state(base, model.model)
    base.save_pretrained(tmp_path / "base")
    again = load(tmp_path / "base")
    assert same_state(again.model, model.model) and type(again.lm_head) is nn.Linear


def test_calibrated_model(tmp_path: Path) -> None:
    model = build()
    batches = [{"input_ids": IDS, "labels": IDS}]
    quantize_(model, 0.3, batches, group_size=32, filter=lambda path, _: "up_proj" not in path, progress=False)
    with pytest.raises(ValueError, match="has packed layers of neither family"):
        attach(build())
    config = attach(model)
    assert config.method == "w4a8" and config.group_size == 32 and 0.25 < config.ratio8 < 0.31
    assert config.modules_to_not_convert == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert isinstance(again.lm_head, Linear)
    assert same_state(again, model) and same_bits(logits(again), logits(model))


def test_pruned_model_with_int8(tmp_path: Path) -> None:
    model = build()
    sparsify_(model, dtype=torch.int8, progress=False)
    assert attach(model).value_dtype == "int8"
    model.save_pretrained(tmp_path)
    assert same_state(load(tmp_path), model)
    quantize_(model := build(), filter=lambda path, _: "up_proj" in path, progress=False)
    sparsify_(model, progress=False)
    with pytest.raises(ValueError, match="has packed layers of w4a8 and lscd; wanted one"):
        attach(model)


@every_method
def test_dequantize(folder: Any, name: str) -> None:
    model = load(folder(), EffkConfig(**METHODS[name]), dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    wanted = layer.to_linear().weight.to(torch.bfloat16)
    model.dequantize()
    assert set(kinds(model).values()) == {"Linear"} and all(
        type(model.get_submodule(p)) is nn.Linear for p in kinds(model)
    )
    assert same_bits(model.model.layers[0].mlp.up_proj.weight, wanted)
    assert not hasattr(model.config, "quantization_config") and logits(model).dtype == torch.bfloat16


def test_automatic_device_map(folder: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = load(folder(), EffkConfig(group_size=32), device_map="auto")
    model.save_pretrained(tmp_path)
    assert same_state(load(tmp_path, device_map="auto"), model)


def test_compiled_model(folder: Any) -> None:
    model = load(folder(), EffkConfig(group_size=32))
    compiled = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="eager")
    x = torch.randn(3, COLS)
    assert same_bits(compiled(x), model.model.layers[0].mlp(x))


def test_key_cache(folder: Any, tmp_path: Path) -> None:
    model = load(folder(), EffkConfig(group_size=32, codebooks="books"))
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, VOCABULARY, (1, 200))
    options = {"num_codes": 16, "num_subspaces": 4, "iters": 2, "samples": 200, "progress": False}
    effk.vq.fit_codebooks(model, [ids], folder=tmp_path / "books", **options)
    model = load(tmp_path)
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False)
    cache = key_cache(model, budget=1.0)
    assert model.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=cache).equal(wanted)
    assert cache.retrieved == 2 * 3  # layers and tokens, of which the first is the prompt's
    (tmp_path / "books" / "layer_001.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="layer_001"):
        key_cache(model)
    with pytest.raises(ValueError, match="no codebooks"):
        key_cache(load(folder(), EffkConfig()))


# ---- the configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gptq"}, "method is 'gptq'; wanted one of w4a8, lscd"),
        ({"method": ["w4a8"]}, "method is"),
        ({"ratio8": 1.5}, "ratio8 is 1.5; wanted a number from 0 to 1"),
        ({"ratio8": True}, "ratio8 is True"),
        ({"ratio8": float("nan")}, "ratio8 is nan"),
        ({"group_size": 48}, "group_size is 48; wanted one of 32, 64, 128, 256"),
        ({"min_sparsity": "0.5"}, "min_sparsity is '0.5'"),
        ({"value_dtype": "float16"}, "value_dtype is 'float16'; wanted None"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'"),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert is"),
        ({"experts": None}, "experts is None"),
        ({"codebooks": "../books"}, "codebooks is '../books'; wanted None or a path within"),
        ({"codebooks": "/books"}, "codebooks is '/books'"),
        ({"codebooks": "a/../../b"}, "codebooks is"),
        ({"codebooks": "C:\\books"}, "codebooks is"),
        ({"packed": 1}, "packed is 1"),
        ({"bits": 4}, "has no option 'bits'; there are method, "),
        ({"quant_method": "awq"}, "no option quant_method 'awq'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        EffkConfig(**options)
    assert message in str(error.value)


def test_configuration_as_json(folder: Any, tmp_path: Path) -> None:
    config = EffkConfig("lscd", value_dtype="int8", modules_to_not_convert=["a"], experts=False, codebooks="b/c")
    as_json = json.loads(config.to_json_string())
    assert as_json["quant_method"] == "effk"
    assert EffkConfig.from_dict(as_json).to_dict() == config.to_dict() == pickle.loads(pickle.dumps(config)).to_dict()
    before = config.to_dict()
    transformers.LlamaForCausalLM.from_pretrained(folder(), quantization_config=config)
    assert config.to_dict() == before  # it may serve for another model


def test_unknown_option_in_a_checkpoint(folder: Any, tmp_path: Path) -> None:
    load(folder(), EffkConfig()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["bits"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no option 'bits'"):
        load(tmp_path)


def test_import_of_effk_doesnt_import_transformers() -> None:
    code = "import effk, sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_to_pack_is_said(folder: Any, caplog: pytest.LogCaptureFixture) -> None:
    load(folder(), EffkConfig("lscd", min_sparsity=0.99))
    assert "lscd: no layer was packed" in caplog.text


# ---- checkpoints from strangers

LAYER = "model.layers.1.self_attn.k_proj"


def replaced(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def edit(state: dict[str, Tensor]) -> None:
        state[f"{LAYER}.{part}"] = change(state[f"{LAYER}.{part}"]).clone()

    return edit


def without(*parts: str) -> Callable[[dict[str, Tensor]], None]:
    def edit(state: dict[str, Tensor]) -> None:
        for part in parts:
            del state[f"{LAYER}.{part}"]

    return edit


HOSTILE: dict[str, list[tuple[Callable[[dict[str, Tensor]], None], str]]] = {
    "w4a8": [
        (replaced("perm", lambda t: t * 0), "perm"),
        (replaced("perm", lambda t: t + 2**30), "perm"),
        (replaced("perm", lambda t: t[:-1]), "perm has shape"),
        (replaced("q4", lambda t: t[:, :-1]), "q4"),
        (replaced("q4", lambda t: t.float()), "q4"),
        (replaced("q8", lambda t: t[:, :-1]), "q8 has shape"),
        (replaced("scale4", lambda t: t[:, :0]), "scale4 has shape"),
        (replaced("scale4", lambda t: t[None]), "scale4 has shape"),
        (replaced("zero4", lambda t: t[:0]), "zero4"),
        (without("q4", "zero4"), "lacks q4, zero4"),
        (without(*Linear.packed_names[1:]), "lacks "),
        (without("zero4"), "lacks zero4"),
        (without("bias"), "bias"),
        (without(*Linear.packed_names, "bias"), "neither a packed nor a dense weight"),
    ],
    "lscd": [
        (replaced("offsets", lambda t: t + 2**40), "offsets"),
        (replaced("offsets", lambda t: t.flip(0)), "offsets"),
        (replaced("offsets", lambda t: t[:-1]), "offsets"),
        (replaced("bitmap", lambda t: ~t), "lscd_linear"),
        (replaced("bitmap", lambda t: t[:, :-1]), "bitmap"),
        (replaced("values", lambda t: t[: len(t) // 2]), "values"),
        (replaced("values", lambda t: t.to(torch.int8)), "values"),
        (without("values"), "lacks values"),
    ],
}
HOSTILE["lscd, int8"] = [
    *HOSTILE["lscd"][:-2],
    (replaced("values", lambda t: t.float()), "values"),
    (replaced("scale", lambda t: t[:-1]), "scale"),
    (without("scale"), "values has dtype torch.int8"),
]


@pytest.fixture(scope="module")
def packed_folder(folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("packed")
            load(folder(), EffkConfig(**METHODS[name])).save_pretrained(made[name])
        return made[name]

    return of


def edited(folder: Path, to: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, to / "model.safetensors", {"format": "pt"})
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


@pytest.mark.parametrize(
    ("name", "edit", "message"), [(name, *case) for name, cases in HOSTILE.items() for case in cases]
)
def test_corrupt_packed_weights_are_refused(
    packed_folder: Any, tmp_path: Path, name: str, edit: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        load(edited(packed_folder(name), tmp_path, edit))
    assert f"{LAYER} of the checkpoint can't be used" in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(("name", "other"), [("w4a8", "lscd"), ("lscd", "w4a8")])
def test_packed_weights_of_another_method_are_refused(
    packed_folder: Any, tmp_path: Path, name: str, other: str
) -> None:
    edited(packed_folder(name), tmp_path, lambda state: None)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["method"] = other
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="neither a packed nor a dense weight"):
        load(tmp_path)


def test_layer_that_cant_be_packed_is_refused(packed_folder: Any, tmp_path: Path) -> None:
    def tie(state: dict[str, Tensor]) -> None:
        del state["lm_head.weight"]
        state.update({f"lm_head.{name}": state[f"{LAYER}.{name}"].clone() for name in Linear.packed_names})

    edited(packed_folder("w4a8"), tmp_path, tie)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match="lm_head: packed, but tied"):
        load(tmp_path)


def test_pickle_files_are_refused(packed_folder: Any, tmp_path: Path) -> None:
    source = packed_folder("w4a8")
    torch.save(load_file(source / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(ValueError, match=r"read from \.safetensors files only"):
        load(tmp_path)


def test_two_devices_are_refused(folder: Any) -> None:
    model = load(folder())
    model.hf_device_map = {"model": "cpu", "lm_head": 0}
    with pytest.raises(ValueError, match="can't be packed on several devices"):
        EffkQuantizer(EffkConfig(), pre_quantized=False).postprocess_model(model)
    assert kinds(model) == kinds(build())
