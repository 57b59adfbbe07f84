"""Adapters as PEFT saves them, adapter_config.json beside adapter_model.safetensors, read without PEFT.

Both files are untrusted: tensors come from safetensors alone, the configuration is checked, and whatever would need
more than a factor A, a factor B and a scaling is refused by name rather than left out.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Of the configuration: what says where the tensors are and how they were trained, so that the tensors tell the rest.
NEUTRAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
READ = {"peft_type", "bias", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"}
# Initial values that are taken out of the weight they belong to: the adapter fits a changed weight only.
CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

SUFFIX = re.compile(r"(?P<path>.*)\.lora_(?P<factor>[AB])\.weight")
PREFIX = "base_model.model."
# What the other tensors of such files are.
FOREIGN = (
    ("lora_embedding_", "an adapter of an embedding"),
    ("lora_magnitude_vector", "DoRA"),
    ("lora_A.bias", "a bias of an adapter"),
    ("lora_B.bias", "a bias of an adapter"),
    ("lora_", "a kind of LoRA other than a factor A and a factor B"),
    ("modules_to_save", "a whole layer (modules_to_save)"),
    ("trainable_tokens", "trained tokens"),
    ("", "a whole tensor of the model"),
)

MAX_CONFIG_BYTES = 2**24


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: what it adds to layers of a model.

    Attributes:
        layers: for the path of each layer a [rank, in features] and b [out features, rank], of any float dtype; the
            layer gets x (scaling b a)^T added. Ranks may differ.
        scaling: one for all layers, or one for each path.
    """

    layers: Mapping[str, tuple[Tensor, Tensor]]
    scaling: float | Mapping[str, float] = 1.0

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Adapter:
        """Reads what PEFT's `save_pretrained` wrote: adapter_config.json and adapter_model.safetensors.

        Plain LoRA is supported, with rsLoRA, rank_pattern and alpha_pattern. Paths are those of the model that PEFT
        wrapped. Dropout isn't part of an adapter in use.

        Args:
            folder: has the two files, which are untrusted.

        Raises:
            ValueError: the files are damaged or contradict each other, or the adapter needs something else, such as
                DoRA, biases, embeddings or layers saved as a whole.
            OSError: a file can't be read.
            ImportError: safetensors isn't installed.
        """
        folder = Path(folder)
        config = _read_config(folder / "adapter_config.json")
        layers = _read_layers(folder / "adapter_model.safetensors")
        return cls(layers, {path: _scaling(config, path, a.shape[0]) for path, (a, _) in layers.items()})


# ---- the configuration


@dataclass(frozen=True)
class _Config:
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: list[tuple[_Pattern, int]]
    alpha_pattern: list[tuple[_Pattern, float]]


def _read_config(file: Path) -> _Config:
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{file.name} has {file.stat().st_size} bytes; wanted at most {MAX_CONFIG_BYTES}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} holds a {type(found).__name__}; wanted an object")
    if found.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {found.get('peft_type')!r}; only 'LORA' is supported")
    if found.get("bias", "none") != "none":
        raise ValueError(f"bias is {found['bias']!r}; only 'none' is supported")
    init = found.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(CHANGING_INITS):
        raise ValueError(
            f"init_lora_weights is {init!r}, which changes the model's weights: convert the adapter to a plain one "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for name, value in found.items():
        # What other versions added and this adapter doesn't use is empty.
        if name not in READ | NEUTRAL and value:
            raise ValueError(f"{name} is {_short(value)}, which is not supported")
    rslora = found.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise ValueError(f"use_rslora is {_short(rslora)}; wanted true or false")
    return _Config(
        _rank("r", found.get("r", 8)),
        _number("lora_alpha", found.get("lora_alpha", 8)),
        rslora,
        [(p, _rank(f"rank_pattern[{p.text!r}]", v)) for p, v in _patterns(found, "rank_pattern")],
        [(p, _number(f"alpha_pattern[{p.text!r}]", v)) for p, v in _patterns(found, "alpha_pattern")],
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _rank(name: str, value: Any) -> int:
    if type(value) is not int or value <= 0:
        raise ValueError(f"{name} is {_short(value)}; wanted a positive integer")
    return value


def _number(name: str, value: Any) -> float:
    try:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise ValueError(f"{name} is {_short(value)}; wanted a number")


class _Pattern:
    """A path or its end, as PEFT matches the regular expressions of a configuration.

    They come from a file, and a regular expression can take exponential time: here a dot may be any character, there
    may be ^, $ and escaped dots, and nothing else that has a meaning.
    """

    def __init__(self, name: str, text: str):
        if not re.fullmatch(r"\^?(?:[\w.\-]|\\\.)*\$?", text):
            raise ValueError(
                f"{name} has the pattern {_short(text)}; only paths and ends of paths are supported, no other regular "
                "expressions"
            )
        self.text = text
        self.pattern = re.compile(rf"(?:.*\.)?(?:{text})$")
        self.last = re.split(r"\\?\.", text.strip("^$"))[-1]  # a quick look decides most cases

    def matches(self, path: str) -> bool:
        return path.endswith(self.last) and self.pattern.match(path) is not None


def _patterns(found: dict[str, Any], name: str) -> list[tuple[_Pattern, Any]]:
    value = found.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {_short(value)}; wanted an object")
    return [(_Pattern(name, key), v) for key, v in value.items()]


def _scaling(config: _Config, path: str, rank: int) -> float:
    """Of a layer, whose tensors have this rank."""
    wanted = next((r for pattern, r in config.rank_pattern if pattern.matches(path)), config.rank)
    if rank != wanted:
        raise ValueError(f"layer {path} has rank {rank}; wanted {wanted} by adapter_config.json")
    alpha = next((v for pattern, v in config.alpha_pattern if pattern.matches(path)), config.alpha)
    return alpha / math.sqrt(rank) if config.rslora else alpha / rank


# ---- the tensors


def _read_layers(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError("reading adapters needs safetensors: pip install effk[safetensors]") from error
    if not file.exists():
        raise FileNotFoundError(f"{file} doesn't exist (adapters in pickle files, .bin or .pt, are not supported)")
    try:
        tensors = load_file(file)
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{file.name} is not a safetensors file that torch can read: {error}") from error
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = SUFFIX.fullmatch(key)
        if match is None:
            what = next(what for part, what in FOREIGN if part in key)
            raise ValueError(f"the tensor {key} is {what}, which is not supported")
        path, factor = match["path"].removeprefix(PREFIX), match["factor"]
        if factor in factors.setdefault(path, {}):
            raise ValueError(f"layer {path} has its lora_{factor} twice")
        factors[path][factor] = tensor
    for path, found in factors.items():
        if lacking := [f"lora_{factor}" for factor in "AB" if factor not in found]:
            raise ValueError(f"layer {path} lacks {lacking[0]}")
        for factor, tensor in found.items():
            if tensor.dim() != 2:
                raise ValueError(f"layer {path}: lora_{factor} has shape {list(tensor.shape)}; wanted two sizes")
    return {path: (found["A"], found["B"]) for path, found in factors.items()}


def check_layer(path: str, a: Any, b: Any, cols: int, rows: int) -> None:
    """That a and b fit a layer.

    Raises:
        ValueError: says which doesn't.
    """
    for name, tensor in (("lora_A", a), ("lora_B", b)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"layer {path}: {name} is a {type(tensor).__name__}; wanted a tensor")
        if tensor.dtype not in FLOATS or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(
                f"layer {path}: {name} is {tensor.dtype}, {tensor.layout} on {tensor.device}; wanted float64, float32, "
                "float16 or bfloat16, strided, with contents"
            )
    if a.dim() != 2 or a.shape[1] != cols:
        raise ValueError(f"layer {path}: lora_A has shape {list(a.shape)}; wanted [rank, {cols}]")
    if list(b.shape) != [rows, a.shape[0]]:
        raise ValueError(f"layer {path}: lora_B has shape {list(b.shape)}; wanted {[rows, a.shape[0]]}")
