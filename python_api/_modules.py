"""What the families' modules share: packed weights from checkpoints, and finding and replacing nn.Linear in a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ._checks import FLOATS

Self = TypeVar("Self", bound="PackedModule")


class PackedModule(nn.Module):
    """A layer with a frozen weight, packed into several buffers, and maybe a bias.

    Buffers take the sizes of a checkpoint, as those may depend on contents. As checkpoints are untrusted,
    `load_state_dict` checks them first; a bad one is reported as an error and leaves the module as it was.
    """

    packed_names: ClassVar[tuple[str, ...]]  # the buffers; one that is None isn't there
    cast_names: ClassVar[tuple[str, ...]] = ()  # those that `.to(dtype)` casts; the rest isn't plain numbers

    bias: nn.Parameter | None

    def _try_packed(self, packed: Mapping[str, Tensor]) -> None:
        """Uses the packed tensors of a checkpoint, all on the CPU or on the meta device, as this module would.

        Raises:
            RuntimeError: says what is wrong with them.
        """
        raise NotImplementedError

    def _packed(self) -> dict[str, Tensor]:
        return {name: t for name in self.packed_names if (t := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight, without the bias."""
        return sum(t.nbytes for t in self._packed().values())

    def _dense(self, weight: Tensor) -> nn.Linear:
        """A dense layer with this unpacked weight, in the dtype of the bias if there is one, and with the bias."""
        if self.bias is not None:
            weight = weight.to(self.bias.dtype)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts, as `.to()` and its like ask."""
        fixed = {name: t for name, t in self._packed().items() if name not in self.cast_names}
        super()._apply(fn, recurse)
        for name, before in fixed.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = {name: state_dict[prefix + name] for name in self.state_dict() if prefix + name in state_dict}
        assign = local_metadata.get("assign_to_params_buffers", False)
        if not found.keys().isdisjoint(self._packed()):
            if error := self._checkpoint_error(found, assign):
                error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
                return
            for name, t in self._packed().items():
                if found[name].shape != t.shape:
                    # torch's loader wants equal shapes, also where it puts the checkpoint's tensor here.
                    with torch.inference_mode(False):  # whose tensors couldn't be used outside of it
                        setattr(self, name, t.new_empty(found[name].shape, device="meta" if assign else None))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _checkpoint_error(self, found: dict[str, Any], assign: bool) -> str:
        """What is wrong with the tensors of a checkpoint, or nothing."""
        if lacking := self._packed().keys() - found:
            return f"the checkpoint lacks {', '.join(sorted(lacking))} of the packed weight"
        if odd := [name for name, t in found.items() if not isinstance(t, Tensor)]:
            return f"{', '.join(odd)} of the checkpoint should be a tensor"
        if not assign and any(t.is_meta for t in found.values()):
            return "the checkpoint is on the meta device"
        packed = {name: found[name] for name in self._packed()}
        if len({t.device for t in packed.values()}) > 1:
            return "the packed weight of the checkpoint is on several devices"
        if self.bias is not None and (bias := found.get("bias")) is not None:
            if bias.shape != self.bias.shape:
                return f"bias has shape {list(bias.shape)}; wanted {list(self.bias.shape)}"
            if bias.dtype not in FLOATS or bias.layout != torch.strided:
                return f"bias is {bias.dtype}, {bias.layout}; wanted float32, float16 or bfloat16, strided"
            if assign and any(t.device != bias.device for t in packed.values()):
                return f"bias is on {bias.device}, the packed weight isn't"
        try:
            self._try_packed({name: t if t.is_meta else t.cpu() for name, t in packed.items()})
        except RuntimeError as error:
            return str(error)
        return ""


@dataclass(frozen=True)
class LinearWeight:
    """Paths of the nn.Linear modules that share a weight, and names of the parameters elsewhere that are the same."""

    names: tuple[str, ...]
    tied: tuple[str, ...]


def linear_weights(model: nn.Module) -> list[LinearWeight]:
    """The weights of all nn.Linear modules of a model.

    Raises:
        ValueError: the model is an nn.Linear itself: it can't be replaced in place.
    """
    if isinstance(model, nn.Linear):
        raise ValueError("the model is an nn.Linear itself, which can't be replaced in place: use from_linear")
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            weight = module._parameters.get("weight")
            paths.setdefault(id(module if weight is None else weight), []).append(path)
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in (f"{path}.weight" for path in paths.get(id(parameter), ())):
            tied.setdefault(id(parameter), []).append(name)
    return [LinearWeight(tuple(names), tuple(tied.get(key, ()))) for key, names in paths.items()]


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def replace_(model: nn.Module, weight: LinearWeight, module: nn.Module) -> None:
    """Puts a module where the Linears with a weight are."""
    for name in weight.names:
        model.set_submodule(name, module)


def obstacles(
    model: nn.Module, weight: LinearWeight, filter: Callable[[str, nn.Linear], bool] | None = None
) -> Iterator[str]:
    """Why the Linears with a weight can't be replaced."""
    first = linear_at(model, weight.names[0])
    for name in weight.names:
        linear = linear_at(model, name)
        if type(linear) is not nn.Linear:
            yield f"is a {type(linear).__name__}, not just nn.Linear"
        if "weight" not in linear._parameters:
            yield "its weight is not a plain parameter (after torch.nn.utils.prune, call prune.remove)"
        if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
            yield "has hooks"
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
            yield "nn.TransformerEncoderLayer reads its weight"
        if linear.bias is not first.bias:
            yield f"shares its weight with {weight.names[0]} but not its bias"
        if filter is not None and not filter(name, linear):
            yield "left out by the filter"
    if weight.tied:
        yield f"its weight is tied to {', '.join(weight.tied)}"
    if first.weight.dtype not in FLOATS:
        yield f"its weight has dtype {first.weight.dtype}"


def prepare_(
    model: nn.Module,
    keys: Collection[str],
    part: str,
    make: Callable[[nn.Linear, tuple[str, ...]], PackedModule],
) -> None:
    """Makes a dense model ready for the state_dict of a packed one: layers packed there become empty packed modules.

    Args:
        model: has nn.Linear layers where the packed model has packed ones.
        keys: of the state_dict.
        part: the name of a tensor that only packed layers of this kind have.
        make: called with a layer and all its paths; returns what takes its place, to which its bias is given.

    Raises:
        ValueError: a layer that is packed in the checkpoint can't be replaced here; the model is unchanged.
    """
    keys = set(keys)
    packed = [w for w in linear_weights(model) if any(f"{name}.{part}" in keys for name in w.names)]
    for weight in packed:
        if reason := next(obstacles(model, weight), ""):
            raise ValueError(f"{', '.join(weight.names)} is packed in the checkpoint, but can't be here: {reason}")
    for weight in packed:
        linear = linear_at(model, weight.names[0])
        module = make(linear, weight.names)
        module.bias = linear.bias
        replace_(model, weight, module.train(linear.training))
