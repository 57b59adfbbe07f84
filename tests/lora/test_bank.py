"""AdapterBank beside PEFT, exact arithmetic and damaged files.

Where results are compared bit by bit, weights, factors and inputs are small integers and scalings powers of two.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from effk.lora import Adapter, AdapterBank, Router, Selector
from effk.lora.adapters import MAX_PATTERN, _Patterns
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from ..kit.tensors import same_bits

peft = pytest.importorskip("peft")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # unit roundoff
COLS = 19
ROWS = {"q": 12, "v": 7, "block.up": 10}


class Net(nn.Module):
    """Layers side by side, so that an error bound of a layer is that of the model; -> [..., sum of ROWS]."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.q = nn.Linear(COLS, ROWS["q"], dtype=dtype)
        self.v = nn.Linear(COLS, ROWS["v"], bias=False, dtype=dtype)
        self.block = nn.Sequential()
        self.block.up = nn.Linear(COLS, ROWS["block.up"], dtype=dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.cat([self.get_submodule(path)(hidden_states) for path in ROWS], -1)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def on_grid(dtype: torch.dtype = torch.float32) -> Net:
    model = Net(dtype)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(integers(-8, 8, *p.shape, seed=i))
    return model


def tokens(*lead: int) -> Tensor:
    return integers(-3, 3, *lead, COLS, seed=9)


def adapter(seed: int, paths: Sequence[str] = tuple(ROWS), rank: int = 3, scaling: Any = 0.5) -> Adapter:
    """Merged sums of a few of them are exact in all dtypes."""
    return Adapter(
        {
            path: (integers(-2, 2, rank, COLS, seed=seed), integers(-2, 2, ROWS[path], rank, seed=seed + 1))
            for path in paths
        },
        scaling,
    )


def adapters() -> dict[str, Adapter]:
    return {
        "plain": adapter(10),
        "small": adapter(20, rank=1, scaling=2),
        "partial": adapter(30, ["v", "block.up"], rank=5),
        "mixed": adapter(40, scaling={"q": 1, "v": 4, "block.up": 1}),
    }


def merged_by_hand(model: Net, named: dict[str, Adapter], choice: dict[str, float]) -> dict[str, Tensor]:
    """Weights in float64."""
    weights = {path: model.get_submodule(path).weight.detach().double() for path in ROWS}
    for name, gate in choice.items():
        one = named[name]
        for path, (a, b) in one.layers.items():
            scaling = one.scaling[path] if isinstance(one.scaling, dict) else one.scaling
            weights[path] = weights[path] + gate * scaling * b.double() @ a.double()
    return weights


def forward_by_hand(model: Net, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    out = []
    for path, weight in weights.items():
        bias = model.get_submodule(path).bias
        out.append(x.double() @ weight.T + (0 if bias is None else bias.detach().double()))
    return torch.cat(out, -1)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(t.is_meta or same_bits(now[name], t) for name, t in before.items())


def hooks(model: nn.Module) -> list[Any]:
    return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


class Calls(TorchDispatchMode):
    """Names of effk's ops that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "effk":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


# ---- against PEFT


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 5, "lora_alpha": 7, "use_rslora": True},
    "patterns": {"r": 3, "rank_pattern": {"up": 2, "^v$": 6}, "alpha_pattern": {"q": 11, "v": 22, r"block\.up": 5}},
    "partial": {"r": 2, "target_modules": ["q"]},
}


def save_with_peft(folder: Path, dtype: torch.dtype, seed: int = 0) -> tuple[Net, Any, dict[str, Path]]:
    """A model, the same under PEFT, and the folders of its adapters, whose factors are all random."""
    torch.manual_seed(seed)
    model = Net(dtype)
    wrapped = None
    for name, options in CONFIGS.items():
        config = peft.LoraConfig(**{"target_modules": ["q", "v", "up"], "init_lora_weights": False, **options})
        if wrapped is None:
            wrapped = peft.get_peft_model(copy.deepcopy(model), config, name, autocast_adapter_dtype=False)
        else:
            wrapped.add_adapter(name, config, autocast_adapter_dtype=False)
    assert wrapped is not None
    wrapped.save_pretrained(folder)
    return model, wrapped.eval(), {name: folder / name for name in CONFIGS}


def set_peft(wrapped: Any, choice: dict[str, float]) -> None:
    wrapped.base_model.set_adapter(list(choice))
    for module in wrapped.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            for name, gate in choice.items():
                module.set_scale(name, gate)


def exact(wrapped: Any, choice: dict[str, float], x: Tensor) -> tuple[Tensor, Tensor, int]:
    """What the outputs are in float64, the magnitude of their terms, and the number of those of a sum."""
    values, magnitudes, rank = [], [], 0
    for path in ROWS:
        module = wrapped.base_model.model.get_submodule(path)
        linear = module.base_layer
        weight = linear.weight.detach().double()
        size = weight.abs()
        for name, gate in choice.items():
            if name in module.lora_A:
                a, b = (f[name].weight.detach().double() for f in (module.lora_A, module.lora_B))
                alpha, r = module.lora_alpha[name], module.r[name]
                scaling = alpha / r**0.5 if module.use_rslora[name] else alpha / r
                weight, size = weight + gate * scaling * b @ a, size + abs(gate * scaling) * b.abs() @ a.abs()
                rank = max(rank, sum(m.r.get(n, 0) for n in choice for m in [module]))
        bias = torch.zeros(()) if linear.bias is None else linear.bias.detach()
        values.append(x.double() @ weight.T + bias.double())
        magnitudes.append(x.double().abs() @ size.T + bias.double().abs())
    return torch.cat(values, -1), torch.cat(magnitudes, -1), COLS + rank


def assert_close(y: Tensor, wanted: tuple[Tensor, Tensor, int], coarse: int, what: str) -> None:
    """A term goes through at most (sum + 8) roundings to float32 and `coarse` to the dtype."""
    value, magnitude, terms = wanted
    bound = magnitude * ((1 + 2.0**-24) ** (terms + 8) * (1 + UNIT[y.dtype]) ** coarse - 1)
    worst = ((y.double() - value).abs() / bound).max().item()
    assert worst <= 1, f"{what}: {worst:.3g} times the bound"


CHOICES: list[dict[str, float]] = [
    {"plain": 1.0},
    {"rslora": -0.75},
    {"patterns": 1.0},
    {"partial": 1.0, "patterns": 0.3},
    dict.fromkeys(CONFIGS, 0.4),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_outputs_are_those_of_peft(dtype: torch.dtype, tmp_path: Path) -> None:
    model, wrapped, folders = save_with_peft(tmp_path, dtype)
    bank = AdapterBank(model, folders)
    x = torch.randn(2, 5, COLS).to(dtype)
    for choice in CHOICES:
        set_peft(wrapped, choice)
        wanted = exact(wrapped, choice, x)
        adapters = len(choice)
        # PEFT rounds A x, B of it, the scaling, and a sum for each adapter, or a product, a scaling, a sum and a dtype.
        assert_close(wrapped(x), wanted, 5 + adapters, "PEFT unmerged")
        wrapped.merge_adapter()
        assert_close(wrapped(x), wanted, 5 + adapters, "PEFT merged")
        wrapped.unmerge_adapter()
        # B where a layer's scaling is another one, the weight, the result.
        bank.switch(list(choice), list(choice.values()))
        assert_close(model(x), wanted, 3, f"{choice} merged")
        bank.apply_mode("token")
        bank.route(list(choice), list(choice.values()))
        assert bank.merged is None and bank.chosen
        assert_close(model(x), wanted, 3, f"{choice} token by token")
        bank.apply_mode("merged")


def test_a_bank_holds_what_the_files_hold(tmp_path: Path) -> None:
    model, wrapped, folders = save_with_peft(tmp_path, torch.float32)
    bank = AdapterBank(model, list(folders.values()))
    assert bank.names == tuple(CONFIGS) and [layer.path for layer in bank.layers] == list(ROWS)
    for layer in bank.layers:
        module = wrapped.base_model.model.get_submodule(layer.path)
        used = [module.r.get(name, 0) for name in CONFIGS]
        assert layer.a.shape == (4, max(used), COLS) and layer.ranks is not None and layer.ranks.tolist() == used
        for i, (name, r) in enumerate(zip(CONFIGS, used, strict=True)):
            assert not layer.a[i, r:].any() and not layer.b[i, :, r:].any()
            if r > 0:
                assert same_bits(layer.a[i, :r], module.lora_A[name].weight.detach())
                # "patterns" has 11 / 3 everywhere but there.
                ratio = 2.5 / (11 / 3) if (name, layer.path) == ("patterns", "block.up") else 1.0
                assert same_bits(layer.b[i, :, :r], module.lora_B[name].weight.detach() * ratio)
    assert bank.scaling.tolist() == [1.5, pytest.approx(7 / 5**0.5), pytest.approx(11 / 3), 4.0]
    assert bank.ranks is not None and bank.ranks.tolist() == [4, 5, 6, 2]


def test_conv1d_is_adapted(tmp_path: Path) -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(6, 5))
    with torch.no_grad():
        model[0].weight.copy_(integers(-8, 8, 5, 6))
    wrapped = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=1, target_modules=["0"], fan_in_fan_out=True)
    )
    layer = wrapped.base_model.model[0]
    a, b = (factors["default"].weight for factors in (layer.lora_A, layer.lora_B))
    with torch.no_grad():
        a.copy_(integers(-2, 2, 2, 5))
        b.copy_(integers(-2, 2, 6, 2))
    wrapped.save_pretrained(tmp_path)
    x = integers(-3, 3, 4, 5)
    before, wanted = model(x), wrapped(x)
    assert not torch.equal(before, wanted)
    bank = AdapterBank(model, [tmp_path])
    bank.switch(0)
    assert same_bits(model(x), wanted)
    bank.apply_mode("token")
    bank.route([0])
    assert same_bits(model(x), wanted)
    bank.unmerge()
    assert same_bits(model(x), before)


# ---- merging


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_chains_of_switches_are_one_merge(dtype: torch.dtype, keep_base: bool) -> None:
    """Also without copies, as everything is exact here."""
    model, named = on_grid(dtype), adapters()
    before = state(model)
    original = copy.deepcopy(model)
    bank = AdapterBank(model, named, keep_base=keep_base)
    chain: list[dict[str, float]] = [
        {"plain": 1},
        {"small": 0.5, "partial": 2},
        {"mixed": 1, "plain": -1},
        {"partial": 1},
        {"partial": 1},
        {},
        {"small": 1, "plain": 0},
    ]
    for choice in chain:
        bank.switch(list(choice), list(choice.values()))
        for path, weight in merged_by_hand(original, named, choice).items():
            assert same_bits(model.get_submodule(path).weight.detach(), weight.to(dtype)), (choice, path)
    assert bank.merged == [("small", 2.0), ("plain", 0.0)]
    bank.unmerge()
    assert same_state(model, before) and bank.merged is None


@pytest.mark.parametrize("dtype", FLOATS)
def test_with_copies_nothing_drifts(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Net(dtype)
    before, fresh = state(model), copy.deepcopy(model)
    named = {
        str(i): Adapter({path: (torch.randn(4, COLS), torch.randn(rows, 4)) for path, rows in ROWS.items()}, 0.3)
        for i in range(5)
    }
    bank = AdapterBank(model, named)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        bank.switch(torch.randint(-1, 5, (2,), generator=generator), torch.rand(2, generator=generator))
    bank.switch([3, 1], [0.3, 0.7])
    AdapterBank(fresh, named).switch([3, 1], [0.3, 0.7])
    assert same_state(model, state(fresh)) and not same_state(model, before)
    bank.unmerge()
    assert same_state(model, before)


def test_without_copies_errors_add_up() -> None:
    """As the documentation says, so that a copy is worth its memory."""
    torch.manual_seed(0)
    rank, scaling = 4, 0.02
    errors = {}
    for keep_base in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 48, dtype=torch.bfloat16))
        before = model[0].weight.detach().double()
        named = {str(i): Adapter({"0": (torch.randn(rank, 48), torch.randn(48, rank))}, scaling) for i in range(4)}
        bank = AdapterBank(model, named, keep_base=keep_base)
        for i in range(300):
            bank.switch([i % 4, (i + 1) % 4])
        bank.switch([2])
        layer = bank.layers[0]
        update = scaling * layer.b[2].double() @ layer.a[2].double()
        errors[keep_base] = ((model[0].weight.detach() - before - update).norm() / update.norm()).item()
    # One rounding of w moves it by at most 2^-8 |w|: with copies that is all.
    bound = 2**-8 * (before + update).norm() / update.norm()
    assert errors[True] <= bound < errors[False]


def test_a_switch_is_one_call() -> None:
    model = on_grid()
    bank = AdapterBank(model, adapters())
    with Calls() as calls:
        bank.switch(["plain", 2])
        bank.switch(["plain", 2])  # there already
        bank.switch("small", 0.5)
        bank.unmerge()
        bank.unmerge()
    assert calls.names == ["lora_switch_", "lora_switch_", "lora_unmerge_"]


def test_what_was_merged_is_remembered_and_not_the_callers_memory() -> None:
    model = on_grid()
    before = state(model)
    bank = AdapterBank(model, {"a": adapter(1, scaling=1), "b": adapter(2, scaling=1)}, keep_base=False)
    ids, gates = torch.tensor([0]), torch.tensor([2.0])
    bank.switch(ids, gates)
    ids.fill_(1)
    gates.fill_(7.0)
    assert bank.merged == [("a", 2.0)]
    bank.unmerge()
    assert same_state(model, before)


def test_parameters_may_want_gradients_and_stay_the_same() -> None:
    model = on_grid()
    parameters = list(model.parameters())
    bank = AdapterBank(model, adapters())
    bank.switch(["plain"])
    assert all(
        a is b and a.requires_grad and a.grad_fn is None for a, b in zip(parameters, model.parameters(), strict=True)
    )
    model(tokens(2)).sum().backward()
    assert model.q.weight.grad is not None


def test_gradients_through_weights_that_were_switched_are_an_error() -> None:
    model = on_grid()
    bank = AdapterBank(model, adapters())
    for change in (lambda: bank.switch(["plain"]), bank.unmerge):
        y = model(tokens(2).requires_grad_())
        change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_models_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = on_grid()
        before = state(model)
    bank = AdapterBank(model, adapters())
    bank.switch(["plain"])
    bank.unmerge()
    with torch.inference_mode():
        bank.switch(["small"])
    bank.apply_mode("token")
    bank.route(["small"])
    with torch.inference_mode():
        model(tokens(2))
    bank.remove()
    assert same_state(model, before)


def test_nan_is_an_adapters_own_matter() -> None:
    model = on_grid()
    before = state(model)
    bad = adapter(5)
    bad.layers["q"][0][0, 0] = torch.nan
    bank = AdapterBank(model, {"bad": bad, "good": adapter(6)})
    bank.switch(["bad", "good"], [0, 1])
    assert all(p.isfinite().all() for p in model.parameters())
    bank.switch(["bad"])
    assert model.q.weight.isnan().any()
    bank.unmerge()
    assert same_state(model, before)


# ---- token by token


def test_each_token_has_its_own_adapters() -> None:
    model, named = on_grid(), adapters()
    bank = AdapterBank(model, named, mode="token")
    original = copy.deepcopy(on_grid())
    x = tokens(2, 3)
    ids = torch.tensor([[[0, 1], [2, -1], [-1, -1]], [[3, 3], [1, 0], [2, 3]]], dtype=torch.int32)
    gates = integers(-2, 2, 2, 3, 2, seed=3)
    bank.route(ids, gates)
    y = model(x)
    for b in range(2):
        for t in range(3):
            choice: dict[str, float] = {}
            for i, g in zip(ids[b, t].tolist(), gates[b, t].tolist(), strict=True):
                if i >= 0:
                    choice[bank.names[i]] = choice.get(bank.names[i], 0) + g
            wanted = forward_by_hand(original, merged_by_hand(original, named, choice), x[b, t])
            assert same_bits(y[b, t].detach(), wanted.float()), (b, t)
    flat = model(x.reshape(6, COLS))  # layers that get tokens as rows
    assert same_bits(flat, y.reshape(6, -1))


def test_a_set_for_all_tokens_fits_any_number_of_them() -> None:
    model, named = on_grid(), adapters()
    bank = AdapterBank(model, named, mode="token")
    wanted = merged_by_hand(on_grid(), named, {"plain": 2, "partial": 1})
    bank.route(["plain", "partial"], [2, 1])
    for lead in [(), (4,), (2, 3), (0,)]:
        x = tokens(*lead)
        assert same_bits(model(x).detach(), forward_by_hand(on_grid(), wanted, x).float())


def test_tokens_of_other_sizes_are_an_error() -> None:
    model = on_grid()
    bank = AdapterBank(model, adapters(), mode="token")
    bank.route(torch.zeros(2, 3, 1, dtype=torch.int64))
    for lead in [(3, 2), (2,), (1, 6), (2, 3, 1)]:
        with pytest.raises(RuntimeError, match=r"layer q got tokens of sizes .* chosen for tokens of sizes \[2, 3\]"):
            model(tokens(*lead))
    model(tokens(6))


def test_modes() -> None:
    model = on_grid()
    bank = AdapterBank(model, adapters())
    one, several = torch.tensor([[[0, 1]]]), torch.tensor([[[0, 1], [2, 1]]])
    bank.route(one)
    assert bank.merged == [("plain", 0.5), ("small", 2.0)] and not bank.chosen
    bank.route(several)  # nothing to merge
    assert bank.merged is None and bank.chosen
    bank.route(["small"])
    assert bank.merged == [("small", 2.0)] and not bank.chosen
    bank.apply_mode("token")
    assert bank.mode == "token" and bank.merged is not None  # until the next choice
    bank.route(["small"])
    assert bank.merged is None and bank.chosen
    bank.switch(["small"])  # merges in all modes
    assert bank.merged is not None and not bank.chosen
    bank.unmerge()
    assert bank.merged is None and not bank.chosen
    for make in (lambda: bank.apply_mode("both"), lambda: AdapterBank(model, adapters(), mode="both")):
        with pytest.raises(ValueError, match="mode is 'both'; wanted one of merged, token, auto"):
            make()


def test_auto_asks_the_selector() -> None:
    # A switch costs 10 and a pass with adapters 1 a token, whatever their rank.
    selector = Selector(((0, 10.0), (9, 10.0)), {1: ((0, 1.0), (9, 1.0)), 2: ((0, 2.0), (9, 2.0))})
    model, named = on_grid(), adapters()
    bank = AdapterBank(model, named, mode="auto", selector=selector)
    bank.route(["plain"])
    assert bank.chosen
    bank.route(["plain"], steps=11)
    assert bank.merged is not None and not bank.chosen
    bank.route(["plain"])  # is there, and costs nothing
    assert bank.merged is not None
    bank.route(["small"], steps=5, tokens=1)  # 10 to switch; 10 to unmerge and 5 to apply
    assert bank.merged == [("small", 2.0)]
    bank.unmerge()
    bank.route(["small"], steps=9)
    assert bank.chosen
    bank.route(["small"], steps=9, tokens=2)
    assert bank.merged is not None
    bank.route(torch.tensor([[0], [1]]), steps=1000)
    assert bank.chosen and bank.merged is None


def test_autocast() -> None:
    model = on_grid()
    bank = AdapterBank(model, adapters(), mode="token")
    bank.route(["plain"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(tokens(3))
    assert y.dtype == torch.bfloat16
    layer, x = bank.layers[0], tokens(3)
    inner = (x @ layer.w.T + model.q.bias).bfloat16().float() + 0.5 * x @ layer.a[0].T @ layer.b[0].T
    assert same_bits(y[:, : ROWS["q"]], inner.bfloat16())


def test_layers_called_by_keyword() -> None:
    model = on_grid()
    AdapterBank(model, adapters(), mode="token").route(["plain"])
    assert same_bits(model.q(input=tokens(2)), model.q(tokens(2)))


# ---- routers


def test_router_gives_the_largest_scores() -> None:
    router = Router(COLS, 5, 2)
    x = tokens(3, 4)
    ids, gates = router(x)
    scores = x @ router.scores.weight.T
    assert ids.shape == gates.shape == (3, 4, 2) and gates.dtype == torch.float32
    rest = scores.scatter(-1, ids, -torch.inf)
    assert (scores.gather(-1, ids).min(-1).values >= rest.max(-1).values).all()
    chosen = scores.gather(-1, ids).double().exp()
    torch.testing.assert_close(gates, (chosen / chosen.sum(-1, keepdim=True)).float())
    assert "k=2" in repr(router) and router.bfloat16()(x.bfloat16())[1].dtype == torch.float32
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k is {k}; wanted 1 to 5"):
            Router(COLS, 5, k)


@pytest.mark.parametrize("by_path", [True, False])
@pytest.mark.parametrize("keyword", [True, False])
def test_a_router_chooses_in_each_pass(by_path: bool, keyword: bool) -> None:
    model = nn.ModuleDict({"first": on_grid()})
    first = model["first"]
    named = {name: adapter for name, adapter in adapters().items() if name != "mixed"}
    bank = AdapterBank(first, named, mode="merged")
    seen = []

    def router(hidden: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(hidden)
        ids = (hidden.abs().sum(-1, keepdim=True) % 3).long()
        return ids, torch.full(ids.shape, 2.0)

    bank.attach_router("" if by_path else first, router)
    with pytest.raises(ValueError, match="there is a router already"):
        bank.attach_router("", router)
    for lead in [(2, 3), (1, 1), (1, 1), (2, 1)]:
        x = tokens(*lead) + len(seen)
        y = first(hidden_states=x) if keyword else first(x)
        assert seen[-1] is x and bank.chosen == (x.numel() > COLS)
        for at in torch.cartesian_prod(*map(torch.arange, lead)):
            token = x[tuple(at)]
            name = bank.names[int(token.abs().sum() % 3)]
            wanted = forward_by_hand(on_grid(), merged_by_hand(on_grid(), named, {name: 2}), token)
            assert same_bits(y[tuple(at)].detach(), wanted.float())
    assert bank.chosen
    bank.detach_router()
    bank.detach_router()
    assert same_bits(first(tokens(3)), on_grid()(tokens(3))) and len(seen) == 4


def test_a_router_learns() -> None:
    model = on_grid()
    bank = AdapterBank(model, adapters(), mode="token")
    router = Router(COLS, 4, 2)
    bank.attach_router("", router)
    model(tokens(2, 3)).square().sum().backward()
    assert router.scores.weight.grad is not None and router.scores.weight.grad.abs().sum() > 0


def test_routers_that_cannot_be() -> None:
    model = on_grid()
    bank = AdapterBank(model, adapters())
    with pytest.raises(ValueError, match="the model has no module 'nowhere'"):
        bank.attach_router("nowhere", Router(COLS, 4))
    with pytest.raises(ValueError, match="not in the model"):
        bank.attach_router(on_grid(), Router(COLS, 4))
    bank.attach_router("", Router(COLS, 4))
    with pytest.raises(RuntimeError, match="got no hidden states"):
        model("words")


# ---- torch.compile


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiled_models_follow_the_bank() -> None:
    model = on_grid()
    bank = AdapterBank(model, adapters())
    whole = nn.Sequential(model)  # the router's place isn't what is compiled
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    x = tokens(2, 3)

    def check() -> None:
        assert same_bits(compiled(x), model(x))

    check()
    for name in ("plain", "small"):
        bank.switch(name)
        check()
    bank.apply_mode("token")
    for names in (["plain"], ["small"], ["partial", "mixed"]):
        bank.route(names)
        check()
    bank.route(torch.tensor([[[0], [1], [2]], [[3], [-1], [0]]]))
    check()
    before = compiled(x)
    bank.attach_router("", Router(COLS, 4))
    assert not torch.equal(compiled(x), before)
    check()
    bank.remove()
    check()
    assert same_bits(compiled(x), on_grid()(x))


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_routers_that_merge_break_graphs() -> None:
    model = on_grid()
    bank = AdapterBank(model, adapters())
    bank.attach_router("", lambda x: ((x.sum(-1, keepdim=True) % 4).long(), torch.ones(*x.shape[:-1], 1)))
    compiled = torch.compile(model, backend="aot_eager")
    for i in range(3):
        x = tokens(1, 1) + i
        assert same_bits(compiled(x), model(x)) and bank.merged is not None


# ---- arguments


def test_names_numbers_and_tensors_are_the_same() -> None:
    model = on_grid()
    bank = AdapterBank(model, adapters())
    bank.switch(["small", "partial"], [1, 2])
    wanted = state(model)
    for ids in (["small", 2], (1, "partial"), torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32)):
        bank.unmerge()
        bank.switch(ids, torch.tensor([1, 2], dtype=torch.float64))
        assert same_state(model, wanted)
    bank.unmerge()
    bank.switch("small")
    assert bank.merged == [("small", 2.0)]
    bank.switch([-1, 1])
    assert bank.merged == [("small", 2.0)]
    bank.switch([])
    assert bank.merged == []


@pytest.mark.parametrize(
    "ids, gates, error, message",
    [
        (["plain", "other"], None, ValueError, "no adapter 'other'; there are plain, small"),
        ([4], None, ValueError, "ids holds 4; wanted -1 to 3"),
        ([-2], None, ValueError, "ids holds -2"),
        (torch.tensor([4]), None, RuntimeError, "ids holds 4; wanted -1 to 3"),
        ([0.5], None, ValueError, "ids holds 0.5; wanted names or whole numbers"),
        ([1.0], None, ValueError, "ids holds 1.0; wanted names or whole numbers"),
        (1.0, None, ValueError, "ids holds 1.0"),
        ([[0]], None, ValueError, r"ids holds \[0\]; wanted names or whole numbers"),
        ([None], None, ValueError, "ids holds None"),
        (None, None, ValueError, "ids holds None"),
        ({"plain": 0.5}, None, ValueError, "ids is a dict; wanted a sequence"),
        ([0], "1", ValueError, "gates holds '1'; wanted numbers"),
        ([0], ["1"], ValueError, "gates holds '1'; wanted numbers"),
        ([0], [None], ValueError, "gates holds None; wanted numbers"),
        ([0], [[1.0]], ValueError, r"gates holds \[1.0\]; wanted numbers"),
        ([0], torch.tensor([1j]), ValueError, "gates has dtype torch.complex64; wanted real numbers"),
        (torch.tensor([0.0]), None, ValueError, "ids has dtype torch.float32"),
        (torch.tensor(0), None, ValueError, r"ids has shape \[\]"),
        (torch.zeros(1025, dtype=torch.int64), None, ValueError, "k at most 1024"),
        ([0, 1], [1.0], ValueError, r"gates has shape \[1\]; wanted that of ids, \[2\]"),
        (torch.zeros(3, 1, dtype=torch.int64), None, ValueError, r"ids has shape \[3, 1\]; wanted \[k\]"),
    ],
)
def test_wrong_choices(ids: Any, gates: Any, error: type[Exception], message: str) -> None:
    model = on_grid()
    bank = AdapterBank(model, adapters())
    bank.switch(["plain"])
    before = state(model)
    with pytest.raises(error, match=message):
        bank.switch(ids, gates)
    assert same_state(model, before) and bank.merged == [("plain", 0.5)]


def test_wrong_amounts_and_selectors() -> None:
    model = on_grid()
    bank = AdapterBank(model, adapters(), mode="token")
    wrong: list[Any] = [-1, -0.5, float("nan"), float("inf"), "1", None]
    for value in wrong:
        for use in (
            lambda: bank.route([0], steps=value),  # noqa: B023
            lambda: bank.attach_router("", Router(COLS, 4), steps=value),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=f"steps is {value!r}; wanted a number that is not negative"):
                use()
        with pytest.raises(ValueError, match=f"tokens is {value!r}; wanted a number that is not negative"):
            bank.route([0], tokens=value)
    assert not bank.chosen
    bank.remove()
    for wrong_selector in (1, Selector):
        with pytest.raises(TypeError, match=r"selector is a (int|type); wanted a Selector"):
            AdapterBank(model, adapters(), selector=wrong_selector)  # type: ignore[arg-type]
    assert not hooks(model)


def test_a_choice_is_not_the_callers_memory() -> None:
    model = on_grid()
    named = {"a": adapter(1, scaling=1), "b": adapter(2, scaling=1)}  # gates need no scaling
    bank = AdapterBank(model, named, mode="token")
    ids, gates = torch.tensor([0]), torch.tensor([2.0])
    bank.route(ids, gates)
    wanted = model(tokens(2))
    ids.fill_(1)
    gates.fill_(7.0)
    assert same_bits(model(tokens(2)), wanted)
    bank.route(ids, gates)
    assert not torch.equal(model(tokens(2)), wanted)


# ---- copies


@pytest.mark.parametrize("use", [copy.copy, copy.deepcopy, pickle.dumps])
def test_banks_cannot_be_copied(use: Callable[[Any], Any]) -> None:
    bank = AdapterBank(on_grid(), adapters())
    with pytest.raises(TypeError, match="an AdapterBank can't be copied"):
        use(bank)


@pytest.mark.parametrize("use", [copy.deepcopy, pickle.dumps])
def test_models_cannot_be_copied_while_they_have_a_bank(use: Callable[[Any], Any]) -> None:
    model = nn.Sequential(on_grid(), nn.ReLU())
    before = state(model)
    bank = AdapterBank(model[0], adapters())
    bank.attach_router(model[0].block, Router(COLS, 4))
    for part in (model, model[0].q, model[0].block):
        with pytest.raises(TypeError, match=r"a model with an AdapterBank can't be copied or pickled: .* remove\(\)"):
            use(part)
    use(model[1])
    bank.switch(["plain"])  # it still works
    bank.remove()
    use(model)
    assert same_state(copy.deepcopy(model), before) and same_state(pickle.loads(pickle.dumps(model)), before)


def test_a_router_alone_keeps_a_module_from_being_copied() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(COLS, ROWS["q"]))
    bank = AdapterBank(model, {"a": Adapter({"1": adapter(1).layers["q"]})})
    bank.attach_router("0", Router(COLS, 1, 1))
    with pytest.raises(TypeError, match="a model with an AdapterBank"):
        copy.deepcopy(model[0])


def test_an_interrupt_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_grid()

    def interrupted(*args: Any, **kwargs: Any) -> None:
        assert len(hooks(model)) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(model.block.up, "register_forward_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        AdapterBank(model, adapters())
    assert not hooks(model)


def test_repr_and_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "effk"):
        bank = AdapterBank(on_grid(), adapters())
    assert "4 adapters of rank 1/3/5 for 3 layers" in caplog.text and len(bank) == 4
    assert repr(bank) == "AdapterBank(4 adapters, 3 layers, mode='merged', keep_base=True, torch.float32, cpu)"


# ---- the model afterwards


def test_remove_leaves_the_model_as_it_was() -> None:
    model = on_grid()
    before = state(model)
    bank = AdapterBank(model, adapters())
    bank.attach_router("", Router(COLS, 4))
    model(tokens(1))
    bank.remove()
    bank.remove()
    assert same_state(model, before) and not hooks(model)
    for use in (lambda: bank.switch([0]), lambda: bank.route([0]), bank.unmerge, lambda: bank.apply_mode("token")):
        with pytest.raises(RuntimeError, match="the bank was removed"):
            use()
    AdapterBank(model, adapters()).switch([1])


def test_remove_may_leave_what_is_merged() -> None:
    model = on_grid()
    bank = AdapterBank(model, adapters())
    bank.switch(["plain"])
    merged = state(model)
    bank.remove(unmerge=False)
    assert same_state(model, merged) and not hooks(model)


def replace_weight(model: Net) -> None:
    model.v.weight = nn.Parameter(model.v.weight.detach().clone())


CHANGES: dict[str, tuple[Callable[[Net], Any], str]] = {
    "cast": (lambda m: m.bfloat16(), "the weight of q was moved or replaced"),
    "assigned": (lambda m: m.load_state_dict(state(m), assign=True), "the weight of q was moved or replaced"),
    "replaced": (replace_weight, "the weight of v was moved or replaced"),
    "loaded": (lambda m: m.load_state_dict(state(m)), "the weight of q was changed"),
    "trained": (lambda m: m.block.up.weight.mul_(2), "the weight of block.up was changed"),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_weights_that_changed_are_noticed(change: str) -> None:
    model = on_grid()
    bank = AdapterBank(model, adapters())
    bank.switch(["plain"])
    do, message = CHANGES[change]
    do(model)
    before = state(model)
    for use in (lambda: bank.switch(["small"]), lambda: bank.switch(["plain"]), bank.unmerge, bank.remove):
        with pytest.raises(RuntimeError, match=message):
            use()
    assert same_state(model, before)
    bank.remove(unmerge=False)
    assert same_state(model, before) and not hooks(model)


# ---- layers that can't be adapted


def test_a_layer_with_two_paths_is_one() -> None:
    model = on_grid()
    model.again = model.v
    named = {"first": adapter(1, ["v"]), "second": Adapter({"again": adapter(1, ["v"]).layers["v"]}, 0.5)}
    bank = AdapterBank(model, named)
    assert [layer.path for layer in bank.layers] == ["v"]
    bank.switch(["first"])
    first = state(model)
    bank.switch(["second"])
    assert same_state(model, first)
    bank.remove()
    both = Adapter({**named["first"].layers, **named["second"].layers})
    with pytest.raises(ValueError, match="adapter both: layer again is the same as v"):
        AdapterBank(model, {"both": both})
    assert not hooks(model)


class Special(nn.Linear):
    pass


def tie(model: Net) -> None:
    model.embedding = nn.Embedding(ROWS["v"], COLS)
    model.embedding.weight = model.v.weight


def share(model: Net) -> None:
    model.other = nn.Linear(COLS, ROWS["v"], bias=False)
    model.other.weight = model.v.weight


def prune_v(model: Net) -> None:
    prune.identity(model.v, "weight")


def set_weight(make: Callable[[Tensor], Tensor]) -> Callable[[Net], None]:
    def change(model: Net) -> None:
        model.v.weight = nn.Parameter(make(model.v.weight.detach()), requires_grad=False)

    return change


def overlap(model: Net) -> None:
    buffer = torch.zeros(20, COLS)
    model.v.weight, model.q.weight = nn.Parameter(buffer[:7]), nn.Parameter(buffer[5:17])


def share_data(model: Net) -> None:
    model.embedding = nn.Embedding(ROWS["v"], COLS)
    model.v.weight.data = model.embedding.weight.data


def share_layers(model: Net) -> None:
    model.other = nn.Linear(COLS, ROWS["v"], bias=False)
    model.other.weight.data = model.v.weight.data


def share_buffer(model: Net) -> None:
    model.register_buffer("part", torch.zeros(ROWS["v"], COLS), persistent=False)
    model.v.weight.data = model.part


def share_end(model: Net) -> None:
    model.register_buffer("part", model.v.weight.data.view(-1)[-1:])


OBSTACLES: dict[str, tuple[Callable[[Net], None], str]] = {
    "tied": (tie, "adapter a: layer v can't be adapted: its weight is tied to embedding.weight"),
    "shared": (share, "its weight is tied to other.weight"),
    "subclass": (lambda m: setattr(m, "v", Special(COLS, ROWS["v"])), "is a Special; only nn.Linear"),
    "norm": (lambda m: setattr(m, "v", nn.LayerNorm(COLS)), "is a LayerNorm; only nn.Linear"),
    "pruned": (prune_v, "torch.nn.utils.prune"),
    "int8": (set_weight(lambda w: w.to(torch.int8)), "its weight is torch.int8"),
    "float64": (set_weight(lambda w: w.double()), "its weight is torch.float64"),
    "meta": (set_weight(lambda w: w.to("meta")), "is on the meta device"),
    "strides": (set_weight(lambda w: w.T.contiguous().T), "has strides"),
    "dtypes": (set_weight(lambda w: w.half()), "layer v has a weight of torch.float16 on cpu; wanted that of q"),
    "absent": (lambda m: delattr(m, "v"), "adapter a: the model has no layer v"),
    "overlap": (overlap, "overlap in memory, and can't be adapted: v.weight and q.weight"),
    "data of an embedding": (share_data, "overlap in memory, and can't be adapted: .*(embedding|v).weight and"),
    "data of a layer": (share_layers, "overlap in memory, and can't be adapted: .*(v|other).weight and"),
    "data of a buffer": (share_buffer, "overlap in memory, and can't be adapted: .*(v.weight|part) and"),
    "data of the end": (share_end, "overlap in memory, and can't be adapted: v.weight and part"),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_layers_that_cannot_be_adapted(obstacle: str) -> None:
    model = on_grid()
    change, message = OBSTACLES[obstacle]
    change(model)
    before = state(model)
    had = hooks(model)
    with pytest.raises(ValueError, match=message):
        AdapterBank(model, {"a": adapter(1, ["q", "v"])})
    assert same_state(model, before) and hooks(model) == had


@pytest.mark.parametrize(
    "wrong, message",
    [
        (Adapter({}), "has no layers"),
        (Adapter({"q": (torch.ones(2, COLS + 1), torch.ones(ROWS["q"], 2))}), r"lora_A has shape \[2, 20\]; wanted"),
        (
            Adapter({"q": (torch.ones(2, COLS), torch.ones(ROWS["q"], 3))}),
            r"lora_B has shape \[12, 3\]; wanted \[12, 2",
        ),
        (Adapter({"q": (torch.ones(COLS), torch.ones(ROWS["q"], 2))}), r"lora_A has shape \[19\]"),
        (Adapter({"q": (torch.ones(2, COLS).int(), torch.ones(ROWS["q"], 2))}), "lora_A is torch.int32"),
        (Adapter({"q": (torch.ones(2, COLS), None)}), "lora_B is a NoneType"),
        (adapter(1, ["q"], scaling=float("inf")), "layer q: scaling is inf"),
        (adapter(1, ["q", "v"], scaling={"q": 1.0}), "layer v: scaling is None"),
    ],
)
def test_adapters_that_do_not_fit(wrong: Any, message: str) -> None:
    model = on_grid()
    with pytest.raises(ValueError, match=f"adapter wrong: .*{message}"):
        AdapterBank(model, {"good": adapter(1), "wrong": wrong})
    assert not hooks(model)


def test_numbers_that_the_dtype_cannot_hold() -> None:
    huge = Adapter({"q": (torch.full((1, COLS), 1e6), torch.ones(ROWS["q"], 1))})
    with pytest.raises(ValueError, match=r"layer q: numbers of torch\.float32 are too large"):
        AdapterBank(on_grid(torch.float16), {"huge": huge})
    AdapterBank(on_grid(torch.bfloat16), {"huge": huge})
    huge.layers["q"][0][0, 0] = torch.inf
    huge.layers["q"][0][0, 1:] = 1
    AdapterBank(on_grid(torch.float16), {"infinite": huge})


def test_memory_side_by_side_is_not_shared() -> None:
    """Slices of one buffer, beside others of it that no adapter is for."""
    model = on_grid()
    buffer = torch.zeros(12 + 7 + 1, COLS)
    model.q.weight.data, model.v.weight.data = buffer[:12], buffer[12:19]
    model.register_buffer("part", buffer[19:])
    model.register_buffer("twice", buffer[19:].view(-1)[3:])  # of others among themselves
    bank = AdapterBank(model, adapters())
    bank.switch(["plain"])
    assert buffer[:12].any() and buffer[12:19].any() and not buffer[19:].any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "scaling, message",
    [
        # Each fits, but not the ratio: B would become infinite, or 0.
        ({"q": 1e-30, "v": 1e30}, "layer v: scaling is 1e.30; that of most layers is 1e-30, and float32 does not hold"),
        ({"q": 1e30, "v": 1e-30}, "layer v: scaling is 1e-30; that of most layers is 1e.30, and float32 does not hold"),
        # The ratio fits, but not what it is multiplied to.
        ({"q": 1.0, "v": 2.0**127}, r"layer v: numbers of torch\.float32, times a ratio .* are too large"),
        (1e39, "layer q: scaling is 1e.39; wanted a number that float32 holds"),
        (1e-50, "layer q: scaling is 1e-50; wanted a number that float32 holds"),
        (10**400, "layer q: scaling is 10*; wanted a number that float32 holds"),
        (float("nan"), "layer q: scaling is nan; wanted a number that float32 holds"),
        ({"q": 1.0, "v": -1e-50}, "layer v: scaling is -1e-50; wanted a number that float32 holds"),
    ],
)
def test_scalings_that_float32_does_not_hold(scaling: Any, message: str, dtype: torch.dtype) -> None:
    layers = {path: (torch.ones(1, COLS), torch.full((ROWS[path], 1), 3.0)) for path in ("q", "v")}
    with pytest.raises(ValueError, match=message):
        AdapterBank(on_grid(dtype), {"far": Adapter(layers, scaling)})


def test_scalings_of_zero() -> None:
    model = on_grid()
    before = state(model)
    bank = AdapterBank(
        model, {"none": adapter(1, scaling=0), "some": adapter(2, scaling={"q": 0, "v": 1, "block.up": 0})}
    )
    bank.switch(["none"])
    assert same_state(model, before)
    bank.switch(["some"])
    assert [name for name, t in model.state_dict().items() if not same_bits(t, before[name])] == ["v.weight"]


def test_no_adapters() -> None:
    for nothing in ({}, []):
        with pytest.raises(ValueError, match="there are no adapters"):
            AdapterBank(on_grid(), nothing)
    with pytest.raises(ValueError, match="a single path"):
        AdapterBank(on_grid(), "folder")
    with pytest.raises(ValueError, match="two folders are named same"):
        AdapterBank(on_grid(), ["a/same", "b/same"])


# ---- untrusted files


def write(folder: Path) -> None:
    """A valid adapter of q and v, without PEFT."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "v"]}
    folder.joinpath("adapter_config.json").write_text(json.dumps(config))
    save(folder, {})


def save(folder: Path, changes: dict[str, Tensor | None]) -> None:
    tensors: dict[str, Tensor | None] = {}
    for path in ("q", "v"):
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.ones(2, COLS)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.ones(ROWS[path], 2)
    tensors |= changes
    save_file({k: t for k, t in tensors.items() if t is not None}, folder / "adapter_model.safetensors")


def configure(**changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def store(**changes: Tensor | None) -> Callable[[Path], Any]:
    return lambda folder: save(folder, {f"base_model.model.{k.replace('__', '.')}": t for k, t in changes.items()})


def text(content: str | bytes, name: str = "adapter_config.json") -> Callable[[Path], Any]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: folder.joinpath(name).write_bytes(data)


def truncate(at: int) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:at])

    return change


def header(entry: dict[str, Any]) -> bytes:
    """A file of one tensor with this entry and 8 bytes."""
    head = json.dumps({"base_model.model.q.lora_A.weight": entry}).encode()
    return len(head).to_bytes(8, "little") + head + bytes(8)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate(-1), "not a safetensors file"),
    "header cut": (truncate(20), "not a safetensors file"),
    "empty": (truncate(0), "not a safetensors file"),
    "pickle": (text(b"\x80\x04\x95" + bytes(50), "adapter_model.safetensors"), "not a safetensors file"),
    "beyond the end": (
        text(header({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}), "adapter_model.safetensors"),
        "not a safetensors file",
    ),
    "negative size": (
        text(header({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}), "adapter_model.safetensors"),
        "not a safetensors file",
    ),
    "unknown dtype": (
        text(header({"dtype": "F7", "shape": [2], "data_offsets": [0, 8]}), "adapter_model.safetensors"),
        "not a safetensors file",
    ),
    "no factor": (store(q__lora_B__weight=None), "layer q lacks lora_B"),
    "int factor": (store(q__lora_A__weight=torch.ones(2, COLS).int()), "layer q: lora_A is torch.int32"),
    "flat factor": (store(q__lora_A__weight=torch.ones(2)), r"layer q: lora_A has shape \[2\]"),
    "scalar factor": (store(q__lora_A__weight=torch.ones(())), r"layer q: lora_A has shape \[\]"),
    "wide factor": (store(q__lora_A__weight=torch.ones(2, COLS + 1)), r"layer q: lora_A has shape \[2, 20\]"),
    "other rank": (store(q__lora_A__weight=torch.ones(3, COLS)), "layer q has rank 3; wanted 2"),
    "ranks differ": (store(q__lora_B__weight=torch.ones(ROWS["q"], 3)), r"layer q: lora_B has shape \[12, 3\]"),
    "unknown layer": (
        store(z__lora_A__weight=torch.ones(2, COLS), z__lora_B__weight=torch.ones(2, 2)),
        "the model has no layer z",
    ),
    "a block": (
        store(block__lora_A__weight=torch.ones(2, COLS), block__lora_B__weight=torch.ones(2, 2)),
        "layer block can't be adapted: is a Sequential",
    ),
    "embedding": (store(e__lora_embedding_A=torch.ones(2, 3)), "e.lora_embedding_A is an adapter of an embedding"),
    "DoRA": (store(q__lora_magnitude_vector=torch.ones(2)), "DoRA"),
    "bias": (store(q__lora_B__bias=torch.ones(2)), "a bias of an adapter"),
    "whole layer": (store(q__modules_to_save__weight=torch.ones(2)), "modules_to_save"),
    "whole tensor": (store(lm_head__weight=torch.ones(2)), "lm_head.weight is a whole tensor"),
    "twice": (lambda f: save(f, {"q.lora_A.weight": torch.ones(2, COLS)}), "layer q has its lora_A twice"),
    "not JSON": (text("{"), "adapter_config.json is not JSON"),
    "not UTF-8": (text(b"\xff\xfe"), "adapter_config.json is not JSON"),
    "deep JSON": (text("[" * 100_000), "adapter_config.json is not JSON"),
    "a list": (text("[]"), "adapter_config.json holds a list"),
    "other method": (configure(peft_type="IA3"), "peft_type is 'IA3'; only 'LORA'"),
    "no method": (text("{}"), "peft_type is None"),
    "trained biases": (configure(bias="all"), "bias is 'all'"),
    "dora": (configure(use_dora=True), "use_dora is True, which is not supported"),
    "saved modules": (configure(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\]"),
    "lora_bias": (configure(lora_bias=True), "lora_bias is True"),
    "unknown option": (configure(use_tomorrow={"x": 1}), "use_tomorrow is {'x': 1}, which is not supported"),
    "pissa": (configure(init_lora_weights="pissa_niter_4"), "changes the model's weights"),
    "alpha NaN": (configure(lora_alpha=float("nan")), "lora_alpha is nan; wanted a number"),
    "alpha huge": (configure(lora_alpha=10**400), "lora_alpha is 1000.*; wanted a number"),
    "alpha text": (configure(lora_alpha="4"), "lora_alpha is '4'"),
    "alpha true": (configure(lora_alpha=True), "lora_alpha is True"),
    "rank 0": (configure(r=0), "r is 0; wanted a positive integer"),
    "rank 1.5": (configure(r=1.5), "r is 1.5"),
    "rslora": (configure(use_rslora="yes"), "use_rslora is 'yes'"),
    "patterns": (configure(rank_pattern=[1]), r"rank_pattern is \[1\]; wanted an object"),
    "pattern's rank": (configure(rank_pattern={"q": -1}), r"rank_pattern\['q'\] is -1"),
    "pattern's alpha": (configure(alpha_pattern={"q": None}), r"alpha_pattern\['q'\] is None"),
    "endless pattern": (configure(alpha_pattern={"(a+)+$": 1}), "only paths and ends of paths are supported"),
}


LONG = "x" * 100_000
PATTERN_LENGTHS = {"a" * (MAX_PATTERN + 1): 1}
DAMAGE |= {
    "long method": (configure(peft_type=LONG), "peft_type is 'xxx"),
    "long bias": (configure(bias=LONG), "bias is 'xxx"),
    "long init": (configure(init_lora_weights="pissa" + LONG), "init_lora_weights is 'pissaxxx"),
    "long option": (configure(**{LONG: LONG}), "xxx.* is 'xxx.*, which is not supported"),
    "long rank": (configure(r=LONG), "r is 'xxx"),
    "long number": (configure(r=-(10**4000)), "r is -1000"),
    "large rank": (configure(r=10**4000), "layer q has rank 2; wanted 1000"),
    "long alpha": (configure(lora_alpha=LONG), "lora_alpha is 'xxx"),
    "long name": (store(**{LONG: torch.ones(1)}), "the tensor base_model.model.xxx.* has a name of 100017 characters"),
    "long file": (text(b" " * (2**20 - 1) + b"{}"), "adapter_config.json has more than 1048576 bytes"),
    "long pattern": (configure(alpha_pattern=PATTERN_LENGTHS), "a pattern of 513 characters; wanted at most 512"),
    "many patterns": (
        configure(rank_pattern={f"a{i}": 1 for i in range(4097)}),
        "rank_pattern has 4097 patterns; wanted at most 4096",
    ),
    "many layouts": (
        configure(rank_pattern={"a" * i + "." + "a" * (300 - i): 1 for i in range(257)}),
        "rank_pattern has dots in more than 256 ways",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(damage: str, tmp_path: Path) -> None:
    write(tmp_path)
    change, message = DAMAGE[damage]
    change(tmp_path)
    model = on_grid()
    before = state(model)
    with pytest.raises(ValueError, match=f"adapter hostile: .*{message}") as raised:
        AdapterBank(model, {"good": adapter(1), "hostile": tmp_path})
    assert len(str(raised.value)) < 400
    assert same_state(model, before) and not hooks(model)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        AdapterBank(on_grid(), [tmp_path])
    write(tmp_path)
    tmp_path.joinpath("adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="pickle"):
        Adapter.from_folder(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files here")
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["endless", "waiting", "folder"])
def test_files_that_are_not_regular(name: str, kind: str, tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / name
    file.unlink()
    if kind == "endless":
        file.symlink_to("/dev/zero")
    elif kind == "waiting":
        os.mkfifo(file)
    else:
        file.mkdir()
    with pytest.raises(ValueError, match=f"{name} is not a regular file"):
        Adapter.from_folder(tmp_path)


def test_files_may_be_links(tmp_path: Path) -> None:
    """As the Hugging Face hub's cache has them."""
    write(tmp_path)
    folder = tmp_path / "links"
    folder.mkdir()
    for file in list(tmp_path.glob("adapter_*")):
        (folder / file.name).symlink_to(file)
    assert set(Adapter.from_folder(folder).layers) == {"q", "v"}


def test_a_configuration_of_the_largest_size(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_bytes(file.read_bytes().ljust(2**20))
    assert set(Adapter.from_folder(tmp_path).layers) == {"q", "v"}


def test_undamaged_files(tmp_path: Path) -> None:
    write(tmp_path)
    configure(use_tomorrow=None, rank_pattern=None, use_dora=False, lora_dropout=0.1, task_type="CAUSAL_LM")(tmp_path)
    read = Adapter.from_folder(tmp_path)
    assert read.scaling == {"q": 2.0, "v": 2.0} and set(read.layers) == {"q", "v"}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {k.removeprefix("base_model.model."): t for k, t in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    assert set(Adapter.from_folder(tmp_path).layers) == {"q", "v"}  # as get_peft_model_state_dict names them


GIVEN = ["q", "self.q", "self_q", "xq", "q.x", "a.self.q", "self.q.self_q", "", "a.", ".q"]


@pytest.mark.parametrize(
    "patterns, paths",
    [
        (["q"], {"q", "self.q", "a.self.q", ".q"}),
        (["^q"], {"q"}),
        ([r"self\.q$"], {"self.q", "a.self.q"}),
        (["self.q"], {"self.q", "self_q", "a.self.q", "self.q.self_q"}),
        (["^self.q"], {"self.q", "self_q"}),
        (["elf.q"], set()),
        ([""], {"", "a."}),
        (["."], {"q", "self.q", "q.x", "a.self.q", ".q"}),
        ([".."], {"xq", ".q", "a."}),
        (["self_q", "self.q", "q"], {"q", "self.q", "self_q", "a.self.q", "self.q.self_q", ".q"}),
        (["q", "self.q"], {"q", "self.q", "self_q", "a.self.q", "self.q.self_q", ".q"}),
        (["x.q", "^q.x$", r"a\.self.q"], {"q.x", "a.self.q"}),
    ],
)
def test_patterns_match_as_in_peft(patterns: list[str], paths: set[str]) -> None:
    """The first that fits counts."""
    from peft.utils.other import get_pattern_key

    ours = _Patterns("rank_pattern", {p: p for p in patterns}, lambda _, value: value)
    found = {path: ours.get(path, "none") for path in GIVEN}
    assert {path for path, pattern in found.items() if pattern != "none"} == paths
    for path, pattern in found.items():
        if pattern != "none":
            assert get_pattern_key(patterns, path) == pattern
        else:
            assert get_pattern_key(patterns, path) == path  # its answer where none fits


def test_many_patterns_are_looked_up_not_tried() -> None:
    """A path looks into one table for each of its ends that has the length of a pattern, however many those are."""
    patterns = _Patterns("rank_pattern", {f"layers.{i}.q": i for i in range(1000, 5000)}, lambda _, value: value)
    tables = [table for tables in patterns.tables.values() for table in tables.values()]
    assert len(tables) == 1 and len(tables[0]) == 4000
    assert [patterns.get(f"model.layers.{i}.q", -1) for i in (1000, 4999, 5000, 99)] == [1000, 4999, -1, -1]
