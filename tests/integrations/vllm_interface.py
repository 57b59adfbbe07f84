"""As much of vLLM's interface as effk's plugin uses, for tests where vLLM isn't installed.

Signatures are those of vLLM 0.32. What a model of vLLM's does while it loads is in `Layer`: one layer for several
weights of the checkpoint, each of whose tensors is given to a parameter's `weight_loader` with the part's name.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

REGISTERED: dict[str, type] = {}


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class LinearMethodBase:
    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        raise NotImplementedError

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        return


class UnquantizedLinearMethod(LinearMethodBase):
    pass


class LinearBase(nn.Module):
    pass


def register_quantization_config(quantization: str) -> Any:
    def wrapper(config: type) -> type:
        assert issubclass(config, QuantizationConfig)
        REGISTERED[quantization] = config
        return config

    return wrapper


class Layer(LinearBase):
    """One layer for weights of these numbers of rows, such as queries, keys and values."""

    def __init__(self, config: Any, prefix: str, cols: int, rows: Mapping[Any, int], dtype: torch.dtype, tp: int = 1):
        super().__init__()
        self.prefix, self.rows, self.tp_size = prefix, dict(rows), tp
        self.quant_method = config.get_quant_method(self, prefix)
        sizes, total = list(rows.values()), sum(rows.values())
        self.quant_method.create_weights(
            self, cols, sizes, cols, total, params_dtype=dtype, weight_loader=self.weight_loader
        )

    def weight_loader(self, param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: Any = None) -> None:
        assert param.output_dim == 0 and param.input_dim == 1  # type: ignore[attr-defined]
        if loaded_shard_id is not None:
            begin = sum(
                n for _, n in zip(range(list(self.rows).index(loaded_shard_id)), self.rows.values(), strict=False)
            )
            param.data[begin : begin + self.rows[loaded_shard_id]].copy_(loaded_weight)
        else:
            param.data.copy_(loaded_weight)

    def load(self, shard: Any, tensors: Mapping[str, Tensor]) -> Layer:
        parameters = dict(self.named_parameters())
        for name, tensor in tensors.items():
            parameters[name].weight_loader(parameters[name], tensor, *([] if shard is None else [shard]))
        return self

    def finish(self) -> Layer:
        self.quant_method.process_weights_after_loading(self)
        return self

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.quant_method.apply(self, x, bias)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes modules of it, in place of a vLLM that may be there."""
    names = {
        "vllm": {},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        "vllm.model_executor.layers.quantization": {"register_quantization_config": register_quantization_config},
        "vllm.model_executor.layers.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
    }
    for name, contents in names.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "effk.integrations.vllm", raising=False)
