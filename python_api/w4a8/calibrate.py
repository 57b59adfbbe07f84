"""What running a model on calibration batches tells: salience of output features, second moments of inputs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import _modules
from .._modules import LinearWeight, linear_at, linear_weights
from .._progress import progress_bar

log = logging.getLogger("effk")

Loss = Callable[[nn.Module, Any], Tensor]


def in_4_bits(weight: Tensor, group_size: int) -> Tensor:
    """The weight rounded to 4 bits, in float32."""
    return torch.ops.effk.w4a8_unpack(*torch.ops.effk.w4a8_pack(weight, None, group_size), group_size)


def obstacles(
    model: nn.Module, weight: LinearWeight, filter: Callable[[str, nn.Linear], bool] | None = None
) -> Iterator[str]:
    """Why a weight can't be quantized."""
    yield from _modules.obstacles(model, weight, filter)
    if linear_at(model, weight.names[0]).weight.is_meta:
        yield "its weight is on the meta device"


def call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def default_loss() -> Loss:
    """The model's own loss where it returns one, else its output along a random direction.

    For random signs r, the mean of (gradient of r.y times D)^2 is the squared length by which a small change D of a
    weight moves the output y: without labels, what counts is how far outputs move. Comparing the output with itself
    would not do, since the gradient is zero at its minimum. Each call draws new signs, the same in each run.
    """
    generator = torch.Generator().manual_seed(0)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        y = call(model, batch)
        own = y.get("loss") if isinstance(y, Mapping) else getattr(y, "loss", None)
        if isinstance(own, Tensor):
            return own
        if not isinstance(y, Tensor):
            raise ValueError(f"the model returns a {type(y).__name__} without a loss: give a loss(model, batch)")
        signs = 1 - 2 * torch.randint(0, 2, y.shape, generator=generator)
        return (y.float() * signs.to(y.device)).sum() / math.sqrt(max(1, y.numel()))

    return loss


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside of the block."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def measure_salience(
    model: nn.Module,
    calibration: Iterable[Any],
    loss: Loss | None = None,
    *,
    group_size: int = 128,
    filter: Callable[[str, nn.Linear], bool] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """How much 4 bits for each output feature of a model's Linears change the loss, by MixLLM's estimate.

    Each batch is one sample: its loss is differentiated, and `effk.w4a8.salience` of the gradient added up. A gradient
    is used and freed as soon as the backward pass has it, so that at most a few are in memory. The model runs in eval
    mode and stays as it is, its gradients too.

    Args:
        model: with differentiable layers.
        calibration: batches as in `quantize_`.
        loss: called with the model and a batch, returns a scalar. By default the `loss` that the model returns or,
            where it returns a tensor instead, that tensor's sum with random signs, so that the score says how far
            the output moves.
        group_size: of the 4-bit weights.
        filter: as in `quantize_`.
        progress: shows a bar, where rich is installed and stderr is a terminal.

    Returns:
        For the (first) path of each weight that `quantize_` would replace, [out features] float32.

    Raises:
        ValueError: no loss was given and the model has none, or the loss doesn't depend on any of the weights.
    """
    batches = list(calibration)
    loss = loss or default_loss()
    weights = {
        w.names[0]: linear_at(model, w.names[0]).weight
        for w in linear_weights(model)
        if not next(obstacles(model, w, filter), "")
    }
    scores = {name: torch.zeros(w.shape[0], device=w.device) for name, w in weights.items()}
    if not weights:
        return scores

    def hook_for(name: str) -> Callable[[Tensor], None]:
        def add_salience(weight: Tensor) -> None:
            grad, weight.grad = weight.grad, None
            w = weight.detach()
            scores[name] += torch.ops.effk.w4a8_salience(grad, w, in_4_bits(w, group_size))

        return add_salience

    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    hooks = []
    try:
        for p, _, _ in before:
            p.requires_grad_(False)
            p.grad = None
        for name, weight in weights.items():
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(hook_for(name)))
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            evaluating(model),
            progress_bar("Measuring salience", len(batches), progress) as advance,
        ):
            for batch in batches:
                value = loss(model, batch)
                if not value.requires_grad:
                    raise ValueError("the loss doesn't depend on any of the weights")
                value.backward()
                advance()
    finally:
        for hook in hooks:
            hook.remove()
        for p, requires_grad, grad in before:
            p.grad = None
            p.requires_grad_(requires_grad)
            p.grad = grad
    for name, score in scores.items():
        if not score.any():
            log.warning("w4a8: the loss doesn't depend on %s: its salience is zero", name)
    return scores


def second_moments(
    model: nn.Module, weights: Iterable[LinearWeight], batches: list[Any], full: bool, progress: bool
) -> dict[str, Tensor]:
    """Sums over all tokens of x x^T (full) or only its diagonal, x the inputs of the Linears with each weight.

    Returns:
        For each weight's first path, [K, K] or [K] float32.
    """
    moments: dict[str, Tensor] = {}
    hooks = []

    def hook_for(name: str) -> Callable[..., None]:
        def add_moments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else kwargs["input"]).detach().float()
            x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
            moments[name] += x.mT @ x if full else x.square().sum(0)

        return add_moments

    try:
        for w in weights:
            weight = linear_at(model, w.names[0]).weight
            k = weight.shape[1]
            moments[w.names[0]] = torch.zeros((k, k) if full else (k,), device=weight.device)
            for module in {linear_at(model, name) for name in w.names}:
                hooks.append(module.register_forward_pre_hook(hook_for(w.names[0]), with_kwargs=True))
        with (
            torch.no_grad(),
            evaluating(model),
            progress_bar("Gathering inputs", len(batches), progress) as advance,
        ):
            for batch in batches:
                call(model, batch)
                advance()
    finally:
        for hook in hooks:
            hook.remove()
    return moments
