"""effk as a quantization method of vLLM, for linear layers: a plugin, which vLLM finds by its entry point.

`--quantization effk` packs each layer's weights after they were loaded; of checkpoints that
`effk.integrations.transformers` has packed, the layers' parts are loaded, and checked as those of any stranger.

A layer of vLLM's may hold several of the model's, such as queries, keys and values. Dense weights are packed together;
packed ones stay apart, as they come, and their outputs are put side by side.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from .transformers import METHODS, NAME, EffkConfig, is_left_out

QKV = {"q": 0, "k": 1, "v": 2}  # vLLM's names of parts of a layer; other parts have numbers


def register() -> None:
    """What the entry point names: makes "effk" known to vLLM. It may be called several times."""
    register_quantization_config(NAME)(VllmConfig)


class VllmConfig(QuantizationConfig):  # type: ignore[misc]
    """Which layers are packed, and how. Options are those of `effk.integrations.transformers.EffkConfig`."""

    def __init__(self, config: EffkConfig | None = None):
        super().__init__()
        self.config = EffkConfig() if config is None else config

    @classmethod
    def get_name(cls) -> str:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VllmConfig:
        return cls(EffkConfig.from_dict(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Takes the names that vLLM's model has for layers."""
        self.config = copy.copy(self.config)
        if names := self.config.modules_to_not_convert:
            self.config.modules_to_not_convert = hf_to_vllm_mapper.apply_list(names)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None
        path, _, name = prefix.rpartition(".")
        parts = [f"{path}.{part}".lstrip(".") for part in self.packed_modules_mapping.get(name, [name])]
        dense = {is_left_out(part, self.config.modules_to_not_convert or ()) for part in parts}
        if dense == {True}:
            return UnquantizedLinearMethod()
        if self.config.packed:
            return PackedMethod(self.config)
        if len(dense) > 1:
            raise ValueError(f"{prefix} is one layer in vLLM: effk packs all of {', '.join(parts)}, or none")
        return PackingMethod(self.config)


class LinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Of one layer: multiplies by what lies in its `parts`."""

    def __init__(self, config: EffkConfig):
        self.config = config
        self.method = METHODS[config.method]

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """What vLLM calls before it loads tensors."""
        self.expect(layer, output_partition_sizes, input_size_per_partition, params_dtype, attributes)

    def expect(self, layer: Any, rows: list[int], cols: int, dtype: torch.dtype, attributes: dict[str, Any]) -> None:
        """Gives a layer, whose parts have these rows, the parameters that tensors will be loaded into."""
        raise NotImplementedError

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        outputs = [part(x) for part in layer.parts]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y if bias is None else y + bias


class PackingMethod(LinearMethod):
    """Of dense weights: packs them when they are loaded. Features with 8 bits are chosen within each layer."""

    def expect(self, layer: Any, rows: list[int], cols: int, dtype: torch.dtype, attributes: dict[str, Any]) -> None:
        weight = torch.empty(sum(rows), cols, dtype=dtype)
        layer.weight = _parameter(weight, input_dim=1, output_dim=0, **attributes)

    def process_weights_after_loading(self, layer: Any) -> None:
        rows, cols = layer.weight.shape
        linear = nn.Linear(cols, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
        layer.parts = nn.ModuleList([linear])
        self.method.pack(layer.parts, self.config, progress=False)
        del layer.weight


class PackedMethod(LinearMethod):
    """Of a packed checkpoint: tensors are kept as they come, and checked when all are there. Dense parts stay dense."""

    def expect(self, layer: Any, rows: list[int], cols: int, dtype: torch.dtype, attributes: dict[str, Any]) -> None:
        if getattr(layer, "tp_size", 1) > 1:
            raise ValueError("effk's packed weights can't be cut for tensor parallelism: pack dense ones while loading")
        self.cols, self.rows, self.dtype = cols, list(rows), dtype
        self.tensors: dict[int | None, dict[str, Tensor]] = {}  # by the layer's part, or all in one
        self.names = ("weight", *self.method.module.packed_names)
        for name in self.names:
            setattr(layer, name, _parameter(torch.empty(0), weight_loader=partial(self._keep, name)))

    def _keep(self, name: str, parameter: Tensor, tensor: Tensor, shard: int | str | None = None) -> None:
        """What vLLM calls with a tensor of the checkpoint."""
        if isinstance(shard, str) and shard not in QKV:
            raise ValueError(f"effk doesn't know the part {shard!r} of a layer")
        part = QKV[shard] if isinstance(shard, str) else shard
        self.tensors.setdefault(part, {})[name] = tensor.cpu().clone()  # its memory may be used again

    def process_weights_after_loading(self, layer: Any) -> None:
        rows, tensors, device = self.rows, self.tensors, layer.weight.device
        if tensors.keys() == {None}:  # one layer in the checkpoint, too
            rows, tensors = [sum(rows)], {0: tensors[None]}
        if tensors.keys() != set(range(len(rows))):
            raise ValueError(f"{layer.prefix} has {len(rows)} parts; the checkpoint has {sorted(map(str, tensors))}")
        for name in self.names:
            delattr(layer, name)
        layer.parts = nn.ModuleList()
        for i, n in enumerate(rows):
            box = nn.Sequential(nn.Linear(self.cols, n, bias=False, device="meta", dtype=self.dtype))
            self.method.prepare(box, [f"0.{name}" for name in tensors[i]])
            try:
                box[0].load_state_dict(tensors.pop(i), assign=True)
            except RuntimeError as error:
                raise ValueError(f"part {i} of {layer.prefix} can't be used: {error}") from error
            layer.parts.append(box[0].to(device, self.dtype).requires_grad_(False))


def _parameter(tensor: Tensor, **attributes: Any) -> nn.Parameter:
    """With the attributes by which vLLM loads it."""
    parameter = nn.Parameter(tensor, requires_grad=False)
    vars(parameter).update(attributes)
    return parameter


__all__ = ["VllmConfig", "register"]
