"""Adapters as PEFT saves them, adapter_config.json beside adapter_model.safetensors, read without PEFT; or out of it.

Both files are untrusted: tensors come from safetensors alone, the configuration is checked, and whatever would need
more than a factor A, a factor B and a scaling is refused by name rather than left out.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import torch
from torch import Tensor, nn

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

MAX_CONFIG_BYTES = 2**20
MAX_PATTERNS = 4096
MAX_PATTERN = 512  # characters
MAX_LAYOUTS = 256
MAX_NAME = 1024  # characters of a tensor's name

T = TypeVar("T")


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

    @classmethod
    def from_peft(cls, model: Any, name: str = "default") -> Adapter:
        """Takes an adapter out of a PeftModel in memory, for an `AdapterBank` on the model that it wraps.

        What is supported is as in `from_folder`. Scalings are those that are set now, and factors the PeftModel's own.

        Args:
            model: a PeftModel, which stays as it is. `model.unload()` then gives the model without PEFT's layers.
            name: of the adapter.

        Raises:
            TypeError: it isn't a PeftModel.
            ValueError: there is no such adapter, adapters are merged into the weights, or this one needs something
                else than a factor A, a factor B and a scaling for linear layers.
        """
        if not hasattr(model, "get_base_model") or not isinstance(getattr(model, "peft_config", None), Mapping):
            raise TypeError(f"the model is a {type(model).__name__}; wanted a PeftModel")
        if name not in model.peft_config:
            raise ValueError(f"there is no adapter {name!r}; there are {', '.join(model.peft_config)}")
        _checked(model.peft_config[name].to_dict())
        found = {
            path: m
            for path, m in model.get_base_model().named_modules()
            if hasattr(m, "lora_A") and hasattr(m, "base_layer")
        }
        for path, module in found.items():
            if module.merged:
                raise ValueError(f"layer {path} has adapters merged into its weight: call unmerge_adapter() first")
            if isinstance(module.get_base_layer(), nn.MultiheadAttention):
                raise ValueError(f"layer {path} is a MultiheadAttention, whose adapters are not supported")
            if name in module.lora_embedding_A:
                raise ValueError(f"layer {path} has an adapter of an embedding, which is not supported")
            variants = getattr(module, "lora_variant", ())
            if name in module.lora_A and (type(module.lora_A[name]) is not nn.Linear or name in variants):
                raise ValueError(f"layer {path} has a kind of LoRA other than a factor A and a factor B")
        layers = {path: m for path, m in found.items() if name in m.lora_A}
        return cls(
            {path: (m.lora_A[name].weight.detach(), m.lora_B[name].weight.detach()) for path, m in layers.items()},
            {path: m.scaling[name] for path, m in layers.items()},
        )


# ---- the configuration


@dataclass(frozen=True)
class _Config:
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: _Patterns[int]
    alpha_pattern: _Patterns[float]


def _open(file: Path) -> BinaryIO:
    """A regular file, or a link to one. Others may have no end, or wait for somebody to write."""
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{file.name} is not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _read_config(file: Path) -> _Config:
    with _open(file) as opened:
        data = opened.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise ValueError(f"{file.name} has more than {MAX_CONFIG_BYTES} bytes")
    try:
        found = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} holds a {type(found).__name__}; wanted an object")
    return _checked(found)


def _checked(found: dict[str, Any]) -> _Config:
    """What adapter_config.json holds, as far as it is supported."""
    if found.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {_short(found.get('peft_type'))}; only 'LORA' is supported")
    if found.get("bias", "none") != "none":
        raise ValueError(f"bias is {_short(found['bias'])}; only 'none' is supported")
    init = found.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(CHANGING_INITS):
        raise ValueError(
            f"init_lora_weights is {_short(init)}, which changes the model's weights: convert the adapter to a plain "
            "one (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for name, value in found.items():
        # What other versions added and this adapter doesn't use is empty.
        if name not in READ | NEUTRAL and value:
            raise ValueError(f"{_cut(name)} is {_short(value)}, which is not supported")
    rslora = found.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise ValueError(f"use_rslora is {_short(rslora)}; wanted true or false")
    return _Config(
        _rank("r", found.get("r", 8)),
        _number("lora_alpha", found.get("lora_alpha", 8)),
        rslora,
        _Patterns("rank_pattern", found.get("rank_pattern") or {}, _rank),
        _Patterns("alpha_pattern", found.get("alpha_pattern") or {}, _number),
    )


def _short(value: Any) -> str:
    try:
        return _cut(repr(value))
    except (RecursionError, ValueError):  # lists in lists, or more digits than Python prints
        return f"a {type(value).__name__}"


def _cut(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


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


class _Patterns(Generic[T]):
    """Values for paths and ends of paths, of which the first that fits counts, as PEFT matches regular expressions.

    They come from a file, and a regular expression can take exponential time: here a dot may be any character, there
    may be ^, $ and escaped dots, and nothing else that has a meaning. Such a pattern fits ends of its own length that
    have its characters where it has no dot, so that patterns with dots in the same places share a table.
    """

    def __init__(self, name: str, found: Any, check: Callable[[str, Any], T]):
        if not isinstance(found, dict):
            raise ValueError(f"{name} is {_short(found)}; wanted an object")
        if len(found) > MAX_PATTERNS:
            raise ValueError(f"{name} has {len(found)} patterns; wanted at most {MAX_PATTERNS}")
        # By length; by whether only whole paths fit and the parts between dots; by the text of those parts.
        self.tables: dict[int, dict[tuple[bool, tuple[tuple[int, int], ...]], dict[str, tuple[int, T]]]] = {}
        layouts: dict[tuple[bool, tuple[int, ...]], tuple[tuple[int, int], ...]] = {}
        for i, (text, value) in enumerate(found.items()):
            plain, dots = _parse(name, text)
            bounds = (-1, *dots, len(plain))
            parts = layouts.setdefault(
                (text.startswith("^"), bounds), tuple((a + 1, b) for a, b in itertools.pairwise(bounds))
            )
            if len(layouts) > MAX_LAYOUTS:
                raise ValueError(f"{name} has dots in more than {MAX_LAYOUTS} ways")
            tables = self.tables.setdefault(len(plain), {})
            table = tables.setdefault((text.startswith("^"), parts), {})
            table.setdefault("".join([plain[a:b] for a, b in parts]), (i, check(f"{name}[{_short(text)}]", value)))

    def get(self, path: str, default: T) -> T:
        fits = []
        starts = [0, *(i + 1 for i, c in enumerate(path) if c == ".")]
        for start in starts:
            for (whole, parts), table in self.tables.get(len(path) - start, {}).items():
                if start == 0 or not whole:
                    end = path[start:]
                    if (fit := table.get("".join([end[a:b] for a, b in parts]))) is not None:
                        fits.append(fit)
        return min(fits, key=lambda fit: fit[0])[1] if fits else default


def _parse(name: str, text: str) -> tuple[str, list[int]]:
    """A pattern without ^, $ and backslashes, and where its dots that may be any character are."""
    if len(text) > MAX_PATTERN:
        raise ValueError(f"{name} has a pattern of {len(text)} characters; wanted at most {MAX_PATTERN}")
    pieces = text.removeprefix("^").removesuffix("$").split("\\.")
    dots, at = [], 0
    for piece in pieces:
        if not all(c.isalnum() or c in "_-." for c in piece):
            raise ValueError(
                f"{name} has the pattern {_short(text)}; only paths and ends of paths are supported, no other regular "
                "expressions"
            )
        dots += [at + i for i, c in enumerate(piece) if c == "."]
        at += len(piece) + 1
    return ".".join(pieces), dots


def _scaling(config: _Config, path: str, rank: int) -> float:
    """Of a layer, whose tensors have this rank."""
    wanted = config.rank_pattern.get(path, config.rank)
    if rank != wanted:
        raise ValueError(f"layer {path} has rank {rank}; wanted {_short(wanted)} by adapter_config.json")
    alpha = config.alpha_pattern.get(path, config.alpha)
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
    _open(file).close()
    try:
        tensors = load_file(file)
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        reason = _cut(str(error), 200)
        raise ValueError(f"{file.name} is not a safetensors file that torch can read: {reason}") from error
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if len(key) > MAX_NAME:
            raise ValueError(f"the tensor {_cut(key)} has a name of {len(key)} characters; wanted at most {MAX_NAME}")
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
