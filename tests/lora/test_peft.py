"""Adapters that are taken out of a PeftModel, against what PEFT computes with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effk.lora import Adapter, AdapterBank
from torch import nn

pytest.importorskip("peft")

import peft

from ..kit.tensors import same_bits
from .test_bank import CHOICES, CONFIGS, Net, assert_close, exact, save_with_peft, set_peft, tokens


def taken(wrapped: Any) -> dict[str, Adapter]:
    return {name: Adapter.from_peft(wrapped, name) for name in wrapped.peft_config}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["merged", "token"])
@torch.no_grad()
def test_outputs_are_those_of_peft(tmp_path: Any, dtype: torch.dtype, mode: str) -> None:
    """One adapter at a time and weighted sums, on the model that PEFT gives back."""
    plain, wrapped, _ = save_with_peft(tmp_path, dtype)
    adapters, x = taken(wrapped), tokens(7).to(dtype)
    wanted, theirs = [], []
    for choice in CHOICES:
        set_peft(wrapped, choice)
        wanted.append(exact(wrapped, choice, x))
        theirs.append(wrapped(x))
    bank = AdapterBank(model := wrapped.unload(), adapters, mode=mode, progress=False)
    for choice, value, their in zip(CHOICES, wanted, theirs, strict=True):
        bank.route(list(choice), list(choice.values()))
        assert (bank.merged is not None) == (mode == "merged")
        y = model(x)
        assert_close(y, value, 3, str(choice))
        assert torch.allclose(y.float(), their.float(), rtol=0.05, atol=0.05 * their.abs().max().item())
        assert not torch.allclose(y.float(), plain(x).float(), rtol=0.05)
    bank.remove()
    assert same_bits(model(x), plain(x)) and type(model.q) is nn.Linear


def test_folder_and_model_give_the_same(tmp_path: Any) -> None:
    _, wrapped, folders = save_with_peft(tmp_path, torch.float32)
    for name, one in taken(wrapped).items():
        saved = Adapter.from_folder(folders[name])
        assert one.layers.keys() == saved.layers.keys() and one.scaling == saved.scaling
        for path, factors in one.layers.items():
            assert all(same_bits(a, b) for a, b in zip(factors, saved.layers[path], strict=True))


def test_scalings_are_those_that_are_set(tmp_path: Any) -> None:
    _, wrapped, _ = save_with_peft(tmp_path, torch.float32)
    set_peft(wrapped, {"plain": 0.25})
    assert set(taken(wrapped)["plain"].scaling.values()) == {0.25 * 6 / 4}  # type: ignore[union-attr]


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.q, self.head = (
            nn.Embedding(8, 6),
            nn.Conv1d(6, 6, 1),
            nn.Linear(6, 6),
            nn.Linear(6, 2),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q"], "use_dora": True}, "use_dora is True, which is not supported"),
        ({"target_modules": ["q"], "bias": "lora_only"}, "bias is 'lora_only'"),
        ({"target_modules": ["q"], "lora_bias": True}, "lora_bias is True"),
        ({"target_modules": ["q"], "modules_to_save": ["head"]}, r"modules_to_save is \['head'\]"),
        ({"target_modules": ["q"], "init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"target_modules": ["q", "embed"]}, "layer embed has an adapter of an embedding"),
        ({"target_modules": ["q", "conv"]}, "layer conv has a kind of LoRA other than"),
        ({"target_modules": ["q"], "target_parameters": ["head.weight"]}, "target_parameters is"),
    ],
)
def test_other_kinds_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adapter.from_peft(peft.get_peft_model(Other(), peft.LoraConfig(r=2, **options)))


def test_what_isnt_an_adapter_is_refused(tmp_path: Any) -> None:
    with pytest.raises(TypeError, match="the model is a Net; wanted a PeftModel"):
        Adapter.from_peft(Net(torch.float32))
    with pytest.raises(ValueError, match="peft_type is"):
        Adapter.from_peft(peft.get_peft_model(Other(), peft.LoHaConfig(r=2, target_modules=["q"])))
    _, wrapped, _ = save_with_peft(tmp_path, torch.float32)
    with pytest.raises(ValueError, match=f"there is no adapter 'x'; there are {', '.join(CONFIGS)}"):
        Adapter.from_peft(wrapped, "x")
    wrapped.merge_adapter()
    with pytest.raises(ValueError, match=r"has adapters merged into its weight: call unmerge_adapter\(\) first"):
        Adapter.from_peft(wrapped, "rslora")
    wrapped.unmerge_adapter()
    assert Adapter.from_peft(wrapped, "rslora").layers
