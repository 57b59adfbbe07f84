"""transformers' layers of experts, computed by `moe_mlp`.

transformers (from version 5 on) keeps a layer's experts in two stacked parameters, and looks up in a registry what
computes them, by a name in the model's configuration. So nothing in the model is exchanged: `moe_mlp` is registered
under a name of its own, and the configuration gets that name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import FLOATS
from . import reference
from .modules import check_option

log = logging.getLogger("effk")

# Of transformers' activations, by the names of their classes.
GATED = {
    "SiLUActivation": "swiglu",
    "SiLU": "swiglu",
    "GELUActivation": "geglu",
    "GELUTanh": "geglu_tanh",
    "NewGELUActivation": "geglu_tanh",
}
UNGATED = {"ReLUSquaredActivation": "relu2"}


def replace_experts_(model: nn.Module, *, gemm: str = "auto") -> list[str]:
    """Lets `effk.moe.mlp` compute the experts of a transformers model, in place.

    Works for the models whose experts transformers (version 5 or newer) can switch: Mixtral, Qwen2-MoE, Qwen3-MoE,
    DeepSeek-V2 and V3, OLMoE, GLM-4-MoE, Nemotron-H and others of the same structure. Routers, shared experts and all
    else stay the model's own; parameters stay where they are, so that a state_dict keeps its names, optimizers go on,
    and `save_pretrained` saves as before. Calling it again changes nothing, but for another `gemm`.
    `model.set_experts_implementation("grouped_mm")` (or "eager") undoes it.

    The choice is kept in the model's configuration, as transformers does it: models that were made with the very same
    configuration object get it too. It is not saved with the model.

    Args:
        model: a transformers model, or any module that holds one.
        gemm: "auto", "grouped" or "dense", see `effk.moe.mlp`.

    Returns:
        Names of the modules that hold the experts.

    Raises:
        ValueError: the model has no such experts, or some that `moe_mlp` can't compute: with biases, transposed,
            interleaved or quantized weights, sharded over devices, or with another activation. The model is as it was.
        ImportError: transformers isn't installed, or is too old.
    """
    check_option("gemm", gemm, reference.GEMMS)
    name = _register()[gemm]
    found = {path: module for path, module in model.named_modules() if _is_experts(module)}
    if not found:
        raise ValueError(f"the model has no experts that transformers can switch{_hint(model)}")
    obstacles = {path: reason for path, module in found.items() if (reason := _obstacle(module))}
    if obstacles:
        path, reason = next(iter(obstacles.items()))
        raise ValueError(
            f"{len(obstacles)} of the model's {len(found)} layers of experts can't be replaced; "
            f"{path or type(found[path]).__name__}: {reason}"
        )
    for module in found.values():
        module.config._experts_implementation = name
    log.info("moe: replaced %d layers of experts", len(found))
    return list(found)


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, gemm: str = "auto"
) -> Tensor:
    """What transformers calls in place of the module's own computation, with the signature that it wants.

    x is cast to the weights' dtype (autocast makes another one of it), and the result back.

    Args:
        module: the experts.
        hidden_states: [T, K].
        top_k_index: [T, k] int32 or int64.
        top_k_weights: [T, k] of any float dtype.

    Raises:
        ValueError: `moe_mlp` can't compute these experts.
    """
    activation = _activation(module)
    w13: Any = module.gate_up_proj if getattr(module, "has_gate", True) else module.up_proj
    w2: Any = module.down_proj
    ids = top_k_index
    if getattr(module, "_is_expert_parallel", False):  # pairs of other devices' experts have numbers past the last
        ids = torch.where(ids < w2.shape[0], ids, -1)
    x = hidden_states.to(w13.dtype)
    y = torch.ops.effk.moe_mlp(x, w13, w2, top_k_weights.float(), ids, activation=activation, gemm=gemm)
    return y.to(hidden_states.dtype)


# By gemm. Made once: compiled code looks at whether they are the same objects.
NAMES = {gemm: "effk" if gemm == "auto" else f"effk_{gemm}" for gemm in reference.GEMMS}
WAYS = {gemm: partial(experts_forward, gemm=gemm) for gemm in reference.GEMMS}


def _register() -> dict[str, str]:
    """Makes them known to transformers, and returns their names there."""
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError(
            "replace_experts_ needs transformers, version 5 or newer: pip install 'transformers>=5'"
        ) from error
    for gemm, name in NAMES.items():
        ExpertsInterface.register(name, WAYS[gemm])
    return NAMES


def _is_experts(module: nn.Module) -> bool:
    """Whether transformers looks up what computes this module."""
    marks = ("config", "has_bias", "is_transposed")
    return hasattr(type(module).forward, "__wrapped__") and all(hasattr(module, mark) for mark in marks)


def _hint(model: nn.Module) -> str:
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and path.rpartition(".")[2] == "experts":
            return f"; {path} holds one module for each expert: version 5 of transformers stacks them when it loads"
    return ""


def _obstacle(module: nn.Module) -> str:
    """Why `moe_mlp` can't take over, or nothing."""
    try:
        _activation(module)
    except ValueError as error:
        return str(error)
    wanted = {"gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"}
    weights = dict(module.named_parameters())
    if weights.keys() != wanted:
        return f"its parameters are {', '.join(weights) or 'none'}; wanted {' and '.join(sorted(wanted))}"
    for name, weight in weights.items():
        if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
            return f"{name} is a {type(weight.data).__name__}, not a plain tensor (sharded, or quantized)"
        if weight.dtype not in FLOATS:
            return f"{name} has dtype {weight.dtype}; wanted {', '.join(map(str, FLOATS))}"
    if len({weight.dtype for weight in weights.values()}) > 1:
        return "its weights have different dtypes"
    return ""


def _activation(module: Any) -> str:
    """moe_mlp's name of what the experts have between their products.

    Raises:
        ValueError: there is none, or they do something else besides.
    """
    if module.has_bias:
        raise ValueError("its experts have biases")
    if module.is_transposed:
        raise ValueError("its weights are transposed, [experts, in, out]")
    if not getattr(module, "is_concatenated", True):
        raise ValueError("its gates and what they multiply are interleaved")
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError("it normalizes what its experts return")
    gated = getattr(module, "has_gate", True)
    if gated and module._apply_gate.__name__ != "_default_apply_gate":
        raise ValueError("it has gates of its own kind")
    function = getattr(module, "act_fn", None)
    name = _activation_name(function, GATED if gated else UNGATED)
    if name is None:
        kind = "gates" if gated else "experts without gates"
        raise ValueError(f"the activation of its {kind} is {function!r}, which moe_mlp doesn't have")
    return name


def _activation_name(function: Callable[..., Any] | None, names: dict[str, str]) -> str | None:
    if names is GATED:
        if function is F.silu:
            return "swiglu"
        if function is F.gelu:
            return "geglu"
        if isinstance(function, nn.GELU):
            return "geglu_tanh" if function.approximate == "tanh" else "geglu"
    return names.get(type(function).__name__)
