"""effk as a quantization method of transformers: `from_pretrained` packs weights, or loads packed ones.

Importing this module adds "effk" to transformers' registry of such methods, by which a checkpoint's config.json names
it. transformers looks for no plugins: without the import it would warn that it doesn't know the method, and load
nothing into the packed layers.

Checkpoints are untrusted. transformers assigns their tensors to modules directly, so each packed layer is checked by
its own `load_state_dict` afterwards.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import lscd, moe, vq, w4a8
from .._modules import PackedModule
from ..w4a8.reference import GROUP_SIZES

try:
    from safetensors import safe_open
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import get_module_from_name
    from transformers.utils import cached_file
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(
        "effk.integrations.transformers needs transformers, version 5.19 or newer: pip install effk[transformers]"
    ) from error

__all__ = ["EffkConfig", "EffkQuantizer", "attach", "key_cache"]

log = logging.getLogger("effk")

NAME = "effk"
INSIDE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)  # no way out of a folder


class Method(NamedTuple):
    """A family whose layers take the place of nn.Linear.

    Attributes:
        module: what they are.
        mark: of their tensors, the one that `prepare` looks for.
        prepare: makes those empty that keys of a checkpoint name.
        pack: makes them of a dense model's, as a configuration says; with the `filter` and `progress` of both families.
    """

    module: type[PackedModule]
    mark: str
    prepare: Callable[[nn.Module, Collection[str]], None]
    pack: Callable[..., Any]


def _quantize(model: nn.Module, config: EffkConfig, **options: Any) -> Any:
    return w4a8.quantize_(model, config.ratio8, group_size=config.group_size, **options)


def _sparsify(model: nn.Module, config: EffkConfig, **options: Any) -> Any:
    dtype = None if config.value_dtype is None else getattr(torch, config.value_dtype)
    return lscd.sparsify_(model, config.min_sparsity, dtype=dtype, **options)


METHODS = {
    "w4a8": Method(w4a8.Linear, "q4", w4a8.prepare_, _quantize),
    "lscd": Method(lscd.SparseLinear, "bitmap", lscd.prepare_, _sparsify),
}


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


# Of each option whether a value will do, and what is wanted. They come from config.json, so from anybody.
OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "method": (lambda v: isinstance(v, str) and v in METHODS, f"one of {', '.join(METHODS)}"),
    "ratio8": (_is_share, "a number from 0 to 1"),
    "group_size": (lambda v: type(v) is int and v in GROUP_SIZES, f"one of {', '.join(map(str, GROUP_SIZES))}"),
    "min_sparsity": (_is_share, "a number from 0 to 1"),
    "value_dtype": (lambda v: v in (None, "int8"), "None (the model's) or 'int8'"),
    "modules_to_not_convert": (
        lambda v: v is None or (isinstance(v, list) and all(isinstance(name, str) for name in v)),
        "None or a list of names",
    ),
    "experts": (lambda v: isinstance(v, bool), "True or False"),
    "codebooks": (
        lambda v: v is None or (isinstance(v, str) and INSIDE.fullmatch(v) is not None),
        "None or a path within the checkpoint's folder",
    ),
    "packed": (lambda v: isinstance(v, bool), "True or False"),
}


@register_quantization_config(NAME)
class EffkConfig(QuantizationConfigMixin):
    """How `from_pretrained` packs a model's nn.Linear layers; a part of the config.json of what was packed.

    Args:
        method: "w4a8" for `effk.w4a8.Linear`, as `effk.w4a8.quantize_` makes them without calibration, or "lscd" for
            `effk.lscd.SparseLinear`, as `effk.lscd.sparsify_` makes them of pruned weights.
        ratio8, group_size: of w4a8, see `quantize_`.
        min_sparsity: of lscd, see `sparsify_`.
        value_dtype: of lscd: "int8", or None for the model's dtype, which values must share with activations.
        modules_to_not_convert: layers that stay dense: paths, beginnings of paths or ends of them. By default those
            that transformers leaves out, output embeddings above all. Tied weights stay dense in any case. A packed
            model's configuration lists all its dense nn.Linear layers here.
        experts: whether `effk.moe.mlp` computes the model's experts, if it has some that `replace_experts_` can serve.
            Their weights stay dense.
        codebooks: folder in the checkpoint's with the codebooks of `effk.vq.fit_codebooks`, for `key_cache`.
        packed: whether the checkpoint's weights are packed already, which saving notes.

    Raises:
        ValueError: an unknown option, or a wrong value.
    """

    method: str
    ratio8: float
    group_size: int
    min_sparsity: float
    value_dtype: str | None
    modules_to_not_convert: list[str] | None
    experts: bool
    codebooks: str | None
    packed: bool

    def __init__(
        self,
        /,
        method: str = "w4a8",
        *,
        ratio8: float = 0.1,
        group_size: int = 128,
        min_sparsity: float = 0.45,
        value_dtype: str | None = None,
        modules_to_not_convert: list[str] | None = None,
        experts: bool = True,
        codebooks: str | None = None,
        packed: bool = False,
        quant_method: str = NAME,
        **unknown: Any,
    ):
        given = locals()
        if unknown or quant_method != NAME:
            odd = ", ".join(map(repr, unknown)) or f"quant_method {quant_method!r}"
            raise ValueError(f"EffkConfig has no option {odd}; there are {', '.join(OPTIONS)}")
        self.quant_method: Any = NAME
        for name, (is_right, wanted) in OPTIONS.items():
            if not is_right(given[name]):
                raise ValueError(f"{name} is {given[name]!r}; wanted {wanted}")
            setattr(self, name, given[name])


def is_left_out(path: str, names: Iterable[str]) -> bool:
    """Whether one of the names means the layer at this path, by all of it, its beginning or its end."""
    return any(path == n or path.startswith(f"{n}.") or path.endswith(f".{n}") for n in names)


@register_quantizer(NAME)
class EffkQuantizer(HfQuantizer):
    """What transformers calls while it loads a model with an `EffkConfig`, and when it saves or dequantizes it."""

    quantization_config: EffkConfig

    def __init__(self, quantization_config: EffkConfig, **kwargs: Any):
        super().__init__(copy.copy(quantization_config), **kwargs)  # the caller may use his for another model
        self.pre_quantized &= quantization_config.packed

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError("effk's packed layers can't be sharded over devices")
        if self.pre_quantized:
            method = METHODS[self.quantization_config.method]
            names = _names_here(model, checkpoint_files or [], method)
            # A layer that lacks just its mark is no dense one, but corrupt.
            parts = (name.rpartition(".") for name in names)
            marks = {f"{path}.{method.mark}" for path, _, part in parts if part in method.module.packed_names}
            method.prepare(model, names | marks)
            _check_ties(model)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor may have other sizes than the model has for it, which is all that this decides here."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, PackedModule) and name in module.packed_names

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Casts floats to floats only: the rest is checked as it is in the file."""
        dtype = super().get_new_dtype(converter, param, dtype)
        return dtype if dtype is not None and dtype.is_floating_point else None

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        if self.pre_quantized:
            for path, module in _packed(model).items():
                _check_loaded(path, module)
            _check_dense(model)
        else:
            self._pack(model)
        config.packed, config.modules_to_not_convert = True, _dense(model)
        if config.experts:
            try:
                moe.replace_experts_(model)
            except ValueError as error:
                log.debug("moe: experts stay transformers': %s", error)
        return model

    def _pack(self, model: PreTrainedModel) -> None:
        config = self.quantization_config
        if len(set(getattr(model, "hf_device_map", {"": ""}).values())) > 1:
            raise ValueError("weights can't be packed on several devices: pack on one, save, and load that")
        names = self.get_modules_to_not_convert(model, config.modules_to_not_convert) + sorted(_tied(model))
        METHODS[config.method].pack(model, config, filter=lambda path, linear: not is_left_out(path, names))
        if not _packed(model):
            log.warning("%s: no layer was packed; the logger 'effk' says why at level DEBUG", config.method)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for path, module in _packed(model).items():
            model.set_submodule(path, module.to_linear().to(dtype))  # type: ignore[operator]
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: PreTrainedModel, *, codebooks: str | None = None) -> EffkConfig:
    """Lets `save_pretrained` write a checkpoint of a model that `quantize_` or `sparsify_` has packed.

    That way weights are packed with calibration, or layer by layer as you like.

    Args:
        model: has layers of one of the two families.
        codebooks: see `EffkConfig`.

    Returns:
        The configuration that the model has got.

    Raises:
        ValueError: it has layers of neither family or both, or tied weights were packed.
    """
    packed = _packed(model)
    found = [name for name, method in METHODS.items() if any(isinstance(m, method.module) for m in packed.values())]
    if len(found) != 1:
        raise ValueError(f"the model has packed layers of {' and '.join(found) or 'neither family'}; wanted one")
    _check_ties(model)
    options: dict[str, Any] = {}
    if layers := [m for m in packed.values() if isinstance(m, w4a8.Linear)]:
        features = sum(m.out_features for m in layers)
        options = {"ratio8": sum(m.features8 for m in layers) / features, "group_size": layers[0].group_size}
    elif any(isinstance(m, lscd.SparseLinear) and m.scale is not None for m in packed.values()):
        options = {"value_dtype": "int8"}
    config = EffkConfig(found[0], modules_to_not_convert=_dense(model), codebooks=codebooks, packed=True, **options)
    loaded: Any = model
    loaded.hf_quantizer, loaded.quantization_method, loaded.is_quantized = EffkQuantizer(config), NAME, True
    loaded.config.quantization_config = config
    return config


def key_cache(model: PreTrainedModel, **options: Any) -> vq.QuantizedKeyCache:
    """A cache for `generate` from the codebooks that lie beside a checkpoint.

    Args:
        model: loaded from it, with `codebooks` in its `EffkConfig`.
        options: of `effk.vq.QuantizedKeyCache`.

    Raises:
        ValueError: the configuration names no codebooks, or one doesn't fit or is damaged.
        OSError: a file is missing.
    """
    folder = getattr(getattr(model.config, "quantization_config", None), "codebooks", None)
    if folder is None:
        raise ValueError("the model's EffkConfig has no codebooks")
    of = getattr(model.config, "_commit_hash", None)
    layers = range(model.config.get_text_config(decoder=True).num_hidden_layers)
    files = (cached_file(str(model.name_or_path), f"{folder}/layer_{i:03}.safetensors", revision=of) for i in layers)
    return vq.QuantizedKeyCache(model, [vq.Codebook.load(file) for file in files if file is not None], **options)


# ---- inside


def _packed(model: nn.Module) -> dict[str, PackedModule]:
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedModule)}


def _dense(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]


def _tied(model: PreTrainedModel) -> set[str]:
    """Paths of modules whose weights transformers ties to others."""
    keys = model.all_tied_weights_keys
    return {key.removesuffix(".weight") for key in (*keys, *keys.values())}


def _check_ties(model: PreTrainedModel) -> None:
    """That no packed weight has to be that of another module, too: transformers saves and loads just one of them."""
    if tied := _packed(model).keys() & _tied(model):
        raise ValueError(f"{', '.join(sorted(tied))}: packed, but tied to another weight of the model")


def _names_here(model: PreTrainedModel, files: list[str], method: Method) -> set[str]:
    """A checkpoint's names of tensors, as the model that has nn.Linear for its packed layers calls them."""
    if not files or not all(file.endswith(".safetensors") for file in files):
        raise ValueError("packed weights are read from .safetensors files only")
    names: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names.update(opened.keys())
    # As transformers will rename them when the layers are there.
    there = {f"{path}.{part}": part for path in _dense(model) for part in method.module.packed_names}
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    renamed = {rename_source_key(n, renamings, converters, model.base_model_prefix, there)[0] for n in names}
    return names | renamed


def _check_dense(model: PreTrainedModel) -> None:
    """That no layer of the base model is missing, which transformers would leave random; a head may be new."""
    inside = {id(module) for module in model.base_model.modules()}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear) or id(module) not in inside:
            continue
        if not getattr(module.weight, "_is_hf_initialized", False):
            raise ValueError(f"{path} of the checkpoint can't be used: it has neither a packed nor a dense weight")


def _check_loaded(path: str, module: PackedModule) -> None:
    """Takes what transformers put there, as if it came in a state_dict.

    Raises:
        ValueError: something is missing or corrupt.
    """
    tensors: dict[str, Tensor] = module.state_dict(keep_vars=True)
    # transformers marks what it read; the rest it made up.
    read = {name: t for name, t in tensors.items() if getattr(t, "_is_hf_initialized", False)}
    if any(t.is_meta for t in read.values()):
        raise ValueError(f"{path}: packed weights can't be offloaded")
    try:
        module.load_state_dict(read, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} of the checkpoint can't be used: {error}") from error
