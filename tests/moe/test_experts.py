"""transformers' experts by moe_mlp: models with random weights, built from configurations, against their own code."""

import copy
import logging
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from effk.moe import MoEMLP, replace_experts_
from effk.moe.experts import experts_forward
from torch import Tensor, nn

from ..kit.tensors import generator, same_bits
from .test_modules import UNIT, case_of

transformers = pytest.importorskip("transformers", minversion="5")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
VOCABULARY, COLS, INNER, EXPERTS = 64, 32, 20, 8

SIZES = {"vocab_size": VOCABULARY, "hidden_size": COLS, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
COMMON = {**SIZES, **NO_TOKENS, "num_key_value_heads": 2}
INSIDE = {"intermediate_size": 40, "moe_intermediate_size": INNER}
QWEN = {**COMMON, **INSIDE, "num_experts": EXPERTS, "num_experts_per_tok": 3}
DEEPSEEK = {
    **SIZES,
    **NO_TOKENS,
    **INSIDE,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 0,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
# Of a model that takes images too, only the part with text is called.
TEXT = {**QWEN, "head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
TEXT["rope_parameters"]["rope_theta"] = 1e4
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": COLS,
    "deepstack_visual_indexes": [0],
}

# Name -> what the model and its configuration are called, the options, and the activation.
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**COMMON, "intermediate_size": INNER, "num_local_experts": EXPERTS},
        "swiglu",
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**QWEN, "shared_expert_intermediate_size": 16},
        "swiglu",
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**QWEN, "head_dim": 8}, "swiglu"),
    "qwen3_moe, gelu": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**QWEN, "head_dim": 8, "hidden_act": "gelu", "norm_topk_prob": True},
        "geglu",
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {"text_config": TEXT, "vision_config": VISION},
        "swiglu",
    ),
    "olmoe": (
        "OlmoeForCausalLM",
        "OlmoeConfig",
        {**COMMON, "intermediate_size": INNER, "num_experts": EXPERTS, "num_experts_per_tok": 3},
        "swiglu",
    ),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {**DEEPSEEK, "topk_method": "group_limited_greedy", "hidden_act": "gelu_pytorch_tanh"},
        "geglu_tanh",
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK, "swiglu"),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {**DEEPSEEK, "num_key_value_heads": 2, "head_dim": 8, "first_k_dense_replace": 1},
        "swiglu",
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **COMMON,
            **INSIDE,
            "moe_shared_expert_intermediate_size": 16,
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "layers_block_type": ["moe", "attention"],
            "head_dim": 8,
        },
        "relu2",
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def config_of(name: str = "mixtral", **options: Any) -> Any:
    _, config, own, _ = MODELS[name]
    return getattr(transformers, config)(**copy.deepcopy({**own, **options}))


def build(name: str = "mixtral", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """With weights large enough that experts matter, computed by the model's own code."""
    torch.manual_seed(0)
    model = getattr(transformers, MODELS[name][0])(config_of(name, **options))
    with torch.no_grad():
        for module in experts_of(model).values():
            for w in module.parameters():
                w.normal_(std=w.shape[2] ** -0.5)
    model.set_experts_implementation("eager")
    return model.to(dtype).eval()


def experts_of(model: nn.Module) -> dict[str, Any]:
    return {path: m for path, m in model.named_modules() if hasattr(m, "is_transposed")}


def replaced(model: Any, **options: Any) -> Any:
    again = copy.deepcopy(model)
    replace_experts_(again, **options)
    return again


def prompt(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, shape or (2, 13), generator=generator(seed))


def relative(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


# Of results that are rounded to the same dtype in the end, and at the same places before or fewer. A rounding error is
# sqrt(3) times its root mean square at most: that much, and a little for other orders of sums, may be chance.
CHANCE = 2.0
# Errors of the models' own code are smaller than so many roundings; otherwise comparing with them would say little.
SMALL = 64


def errors(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [relative(y, wanted) for y, wanted in zip(results, exact, strict=True)]


@dataclass
class Seen:
    """What a layer of experts got, and what it made of it."""

    module: Any
    x: Tensor
    ids: Tensor
    weights: Tensor
    y: Tensor


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Seen]]:
    seen: list[Seen] = []
    handles = [
        module.register_forward_hook(lambda m, args, y: seen.append(Seen(m, *(t.detach() for t in (*args, y)))))
        for module in experts_of(model).values()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def own_code(module: Any, dtype: torch.dtype) -> Any:
    """A copy, computed as the model's own code does."""
    again = copy.deepcopy(module).to(dtype)
    again.config._experts_implementation = "eager"
    return again


# ---- the same results


@every_model
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_outputs_are_within_the_bound(dtype: torch.dtype, name: str) -> None:
    model = build(name, dtype)
    assert replace_experts_(model) == list(experts_of(model))
    with watched(model) as seen, torch.no_grad():
        model(input_ids=prompt())
    assert len(seen) == len(experts_of(model)) > 0
    for s in seen:
        w13, w2 = (w.detach() for w in s.module.parameters())
        assert s.y.dtype == dtype and s.y.any() and len(s.ids.unique()) > 2
        case_of(s.x, w13, w2, s.weights.float(), s.ids, MODELS[name][3]).exact(UNIT).assert_holds(s.y)


@every_model
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_experts_are_as_exact_as_their_own_code(dtype: torch.dtype, name: str) -> None:
    """Outputs and all gradients, on what the layers really get."""
    model = build(name, dtype)
    replace_experts_(model)
    with watched(model) as seen, torch.no_grad():
        model(input_ids=prompt())
    for s in seen:
        grad = torch.randn(s.y.shape, generator=generator(5)).to(dtype)
        results = []
        for module in (s.module, own_code(s.module, dtype), own_code(s.module, torch.float64)):
            kind = next(module.parameters()).dtype
            x = s.x.to(kind, copy=True).requires_grad_()
            weights = (s.weights if kind == dtype else s.weights.double()).clone().requires_grad_()
            module.zero_grad()
            y = module(x, s.ids, weights)
            y.backward(grad.to(kind))
            results.append([y.detach(), x.grad, weights.grad, *(w.grad for w in module.parameters())])
        assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
        unit = torch.finfo(dtype).eps
        for ours, own in zip(errors(results[0], results[2]), errors(results[1], results[2]), strict=True):
            assert own < SMALL * unit and ours <= CHANCE * own + unit


@every_model
@pytest.mark.parametrize("training", [True, False])
def test_models_are_as_exact_as_their_own_code(name: str, training: bool) -> None:
    """In float32, where no token comes to other experts; logits and, in training, gradients of all parameters."""
    model = build(name).train(training)
    results = []
    for m in (replaced(model), model, copy.deepcopy(model).double()):
        logits = m(input_ids=prompt()).logits
        found = [logits.detach()]
        if training:
            nn.functional.cross_entropy(logits.flatten(0, 1), prompt(seed=1).flatten()).backward()
            grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
            assert any(n.endswith(("gate_up_proj", "up_proj")) for n in grads)
            found += [g for g in grads.values() if g.any()]
        results.append(found)
    ours, own = errors(results[0], results[2]), errors(results[1], results[2])
    assert max(own) < SMALL * 2 * UNIT and max(ours) <= CHANCE * max(own)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_generation_with_a_cache(name: str) -> None:
    model = build(name)
    other = replaced(model)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    tokens = other.generate(prompt(2, 5), use_cache=True, **options)
    assert tokens.shape == (2, 17) and len(tokens[:, 5:].unique()) > 3
    assert torch.equal(tokens, model.generate(prompt(2, 5), use_cache=True, **options))
    assert torch.equal(tokens, other.generate(prompt(2, 5), use_cache=False, **options))


@pytest.mark.parametrize("gemm", ["auto", "grouped", "dense"])
def test_gemm_is_handed_on(gemm: str) -> None:
    model = replaced(build(), gemm=gemm)
    with watched(model) as seen, torch.no_grad():
        model(input_ids=prompt())
    for s in seen:
        w13, w2 = s.module.parameters()
        wanted = torch.ops.effk.moe_mlp(s.x, w13, w2, s.weights.float(), s.ids, gemm=gemm)
        assert same_bits(s.y, wanted)
    assert model.config._experts_implementation == ("effk" if gemm == "auto" else f"effk_{gemm}")


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_routing_weights_of_any_dtype(dtype: torch.dtype) -> None:
    module = next(iter(experts_of(replaced(build())).values()))
    x, ids = torch.randn(5, COLS, generator=generator(1)), torch.tensor([[0, 3]] * 5)
    weights = torch.tensor([[0.5, 0.25]] * 5)
    y = module(x, ids, weights)
    leaf = weights.to(dtype).requires_grad_()
    again = module(x, ids.int(), leaf)
    again.sum().backward()
    assert same_bits(again, y) and leaf.grad is not None and leaf.grad.dtype == dtype and leaf.grad.any()


def test_no_tokens() -> None:
    module = next(iter(experts_of(replaced(build())).values()))
    y = module(torch.zeros(0, COLS), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert y.shape == (0, COLS)


def test_pairs_of_other_devices_add_nothing() -> None:
    """transformers' expert parallelism gives them the number after the last expert."""
    module = next(iter(experts_of(replaced(build())).values()))
    own = own_code(module, torch.float64)
    x, weights = torch.randn(3, COLS, generator=generator(1)), torch.rand(3, 2, generator=generator(2))
    ids = torch.tensor([[0, EXPERTS], [EXPERTS, EXPERTS], [3, 1]])
    module._is_expert_parallel = True
    y = module(x, ids, weights)
    assert not y[1].any()
    assert relative(y, own(x.double(), ids, weights.double())) < SMALL * UNIT


# ---- beside other things


def test_compile() -> None:
    """A whole graph, with the same bits where torch's own kernels stay what they are."""
    model = replaced(build("qwen3_moe", num_hidden_layers=1)).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for m in (compiled, model):
        model.zero_grad()
        logits = m(input_ids=prompt()).logits
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_compiled_code_follows_the_switch() -> None:
    model = build(num_hidden_layers=1)
    model.set_experts_implementation("grouped_mm")
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        before = compiled(input_ids=prompt()).logits
        replace_experts_(model)
        after = compiled(input_ids=prompt()).logits
        assert same_bits(after, model(input_ids=prompt()).logits)
        model.set_experts_implementation("grouped_mm")
        assert same_bits(compiled(input_ids=prompt()).logits, before)


def test_checkpointed_activations() -> None:
    model = replaced(build()).train()
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(input_ids=prompt(), use_cache=False).logits.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        model.activation_checkpointing_enable()
    assert all(same_bits(a, b) for a, b in zip(*grads, strict=True))


def test_autocast() -> None:
    """x comes in autocast's dtype; the experts compute in that of their weights."""
    model = replaced(build())
    with watched(model) as seen, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=prompt()).logits
    assert logits.isfinite().all()
    module = seen[0].module
    x = seen[0].x.bfloat16()
    y = module(x, seen[0].ids, seen[0].weights)
    assert y.dtype == torch.bfloat16
    assert same_bits(y, module(x.float(), seen[0].ids, seen[0].weights).bfloat16())


def test_hooks_of_accelerate() -> None:
    """They wrap the modules' forward, and bring weights when they are needed."""
    accelerate = pytest.importorskip("accelerate")
    model = replaced(build())
    with torch.no_grad():
        wanted = model(input_ids=prompt()).logits
        accelerate.cpu_offload(model, torch.device("cpu"))
        assert all(p.is_meta for m in experts_of(model).values() for p in m.parameters())
        assert replace_experts_(model)
        assert same_bits(model(input_ids=prompt()).logits, wanted)


def test_adapters_of_peft() -> None:
    """PEFT computes the experts' weights anew in each pass."""
    peft = pytest.importorskip("peft")
    model = build()
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    wrapped = peft.get_peft_model(model, config)
    for n, p in wrapped.named_parameters():
        if "lora_" in n:
            nn.init.normal_(p, std=0.3)
    results = []
    for _ in range(2):
        wrapped.zero_grad()
        logits = wrapped(input_ids=prompt()).logits
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for p in wrapped.parameters() if p.requires_grad)])
        assert len(replace_experts_(wrapped)) == 2
    assert len(results[0]) == 9
    for a, b in zip(*results, strict=True):
        assert 0 < relative(a, b.double()) < SMALL * UNIT  # something else computed it, and the same


# ---- what stays


def test_the_state_dict_stays(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    addresses = [p.data_ptr() for p in model.parameters()]
    replace_experts_(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(same_bits(after[n], before[n]) for n in before)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    fresh = replaced(build("qwen3_moe"))
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    fresh.load_state_dict(after)
    with torch.no_grad():
        wanted = model(input_ids=prompt()).logits
        assert same_bits(fresh(input_ids=prompt()).logits, wanted)
        model.save_pretrained(tmp_path)
        assert "effk" not in (tmp_path / "config.json").read_text()
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert loaded.config._experts_implementation != "effk"
        replace_experts_(loaded)
        assert same_bits(loaded(input_ids=prompt()).logits, wanted)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copy_of: Callable[[Any], Any]) -> None:
    model = replaced(build())
    again = copy_of(model)
    with torch.no_grad():
        assert same_bits(again(input_ids=prompt()).logits, model(input_ids=prompt()).logits)
        model.set_experts_implementation("eager")
    assert again.config._experts_implementation == "effk"


def test_replacing_twice_and_taking_it_back(caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    with torch.no_grad():
        before = model(input_ids=prompt()).logits
        with caplog.at_level(logging.INFO, "effk"):
            names = replace_experts_(model)
        assert "replaced 2 layers" in caplog.text
        once = model(input_ids=prompt()).logits
        assert replace_experts_(model) == names == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
        assert same_bits(model(input_ids=prompt()).logits, once) and not same_bits(once, before)
        model.set_experts_implementation("eager")
        assert same_bits(model(input_ids=prompt()).logits, before)


def test_inside_of_something_else() -> None:
    outer = nn.ModuleDict({"llm": build(), "head": nn.Linear(3, 3)})
    assert replace_experts_(outer) == [f"llm.model.layers.{i}.mlp.experts" for i in range(2)]
    assert replace_experts_(experts_of(outer["llm"])["model.layers.0.mlp.experts"]) == [""]


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config_of())
    replace_experts_(model)
    assert model(input_ids=prompt().to("meta")).logits.shape == (2, 13, VOCABULARY)


def test_other_models_keep_their_own() -> None:
    model, other = build(), build()
    replace_experts_(model)
    assert other.config._experts_implementation == "eager"


# ---- refusals


def experts(family: str, name: str, config: Any) -> Any:
    module = getattr(transformers.models, family)
    return getattr(__import__(f"{module.__name__}.modeling_{family}", fromlist=[name]), name)(config)


def gpt_oss() -> Any:
    return experts("gpt_oss", "GptOssExperts", transformers.GptOssConfig(hidden_size=8, intermediate_size=8))


def aria() -> Any:
    return experts("aria", "AriaExperts", transformers.AriaTextConfig(hidden_size=32, intermediate_size=8))


def changed(change: Callable[[Any], None]) -> Callable[[], Any]:
    """A model whose second layer differs."""

    def make() -> Any:
        model = build()
        change(list(experts_of(model).values())[1])
        return model

    return make


def other_gates(module: Any) -> None:
    class Clamped(type(module)):
        def _apply_gate(self, z: Tensor) -> Tensor:
            gate, up = z.clamp(max=1).chunk(2, -1)
            return self.act_fn(gate) * up

    module.__class__ = Clamped


def set_weight(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        weight = getattr(module, name)
        delattr(module, name)
        setattr(module, name, make(weight.detach()))

    return change


class Odd(torch.Tensor):
    """A tensor of another kind, as sharded and quantized ones are."""


def odd(w: Tensor) -> nn.Parameter:
    return nn.Parameter(w.as_subclass(Odd), requires_grad=False)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "biases": (gpt_oss, "GptOssExperts: its experts have biases"),
    "transposed": (aria, "transposed"),
    "interleaved": (changed(lambda m: setattr(m, "is_concatenated", False)), "interleaved"),
    "norm": (changed(lambda m: setattr(m, "has_post_expert_norm", True)), "normalizes"),
    "gates": (changed(other_gates), "gates of its own kind"),
    "activation": (changed(lambda m: setattr(m, "act_fn", nn.ReLU())), r"activation of its gates is ReLU\(\)"),
    "no activation": (changed(lambda m: delattr(m, "act_fn")), "is None"),
    "not gated": (changed(lambda m: setattr(m, "has_gate", False)), "of its experts without gates is SiLU"),
    "more": (changed(lambda m: m.register_parameter("s", nn.Parameter(torch.ones(1)))), "parameters are .*, s; wanted"),
    "buffer": (changed(set_weight("down_proj", lambda w: w)), "parameters are gate_up_proj; wanted"),
    "integers": (changed(set_weight("down_proj", lambda w: nn.Parameter(w.to(torch.int8), False))), "torch.int8"),
    "float64": (changed(lambda m: m.double()), "has dtype torch.float64"),
    "mixed": (changed(set_weight("down_proj", lambda w: nn.Parameter(w.half()))), "different dtypes"),
    "sharded": (changed(set_weight("down_proj", odd)), "down_proj is a Odd, not a plain tensor"),
    "none": (lambda: nn.Linear(3, 3), "no experts that transformers can switch$"),
    "own": (lambda: MoEMLP(3, 3, 2), "no experts that transformers can switch$"),
    "dense": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**COMMON, "intermediate_size": 8})),
        "no experts",
    ),
    "list": (
        lambda: nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(3, 3)])}),
        "experts holds one module for each expert: version 5",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_change_nothing(case: str) -> None:
    make, message = REFUSED[case]
    model = make()
    with pytest.raises(ValueError, match=message):
        replace_experts_(model)
    assert not any("effk" in str(m.config._experts_implementation) for m in experts_of(model).values())
    if len(experts_of(model)) == 2:
        with pytest.raises(ValueError, match=r"1 of the model's 2 .*model\.layers\.1\.mlp\.experts"):
            replace_experts_(model)


@pytest.mark.parametrize("case", ["biases", "transposed", "gates", "activation"])
def test_what_is_switched_by_name_is_checked_too(case: str) -> None:
    """transformers lets anybody set the name that replace_experts_ registers."""
    replaced(build())
    module = list(experts_of(REFUSED[case][0]()).values())[-1]
    module.config._experts_implementation = "effk"
    tokens = module.down_proj.shape[2 if case == "transposed" else 1]
    with pytest.raises(ValueError, match=REFUSED[case][1].rpartition(": ")[2]):
        module(torch.zeros(1, tokens), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))


def test_wrong_gemm() -> None:
    with pytest.raises(ValueError, match="gemm is 'fast'; wanted one of auto, grouped, dense"):
        replace_experts_(build(), gemm="fast")


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or with an old one: importing what isn't there is the same error."""
    model = build()
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(ImportError, match="transformers>=5"):
        replace_experts_(model)


def test_experts_with_wrong_ids_raise() -> None:
    module = next(iter(experts_of(replaced(build())).values()))
    with pytest.raises(RuntimeError, match="effk::moe_mlp: ids holds 8"):
        experts_forward(module, torch.zeros(1, COLS), torch.tensor([[EXPERTS]]), torch.ones(1, 1))
