"""nn.Linear with a 4/8-bit weight and 8-bit activations, and the ways to put it into a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _modules
from .._modules import LinearWeight, PackedModule, linear_at, linear_weights, replace_
from .._progress import progress_bar
from . import calibrate, reference, rounding
from .reference import BLOCK, CHUNK, Packed, ceil_div

log = logging.getLogger("effk")

METHODS = ("rtn", "gptq")
BUDGETS = ("features", "parameters")
MOMENT_BYTES = 2**32  # of calibration statistics held at a time; more are gathered in further passes


class Linear(PackedModule):
    """nn.Linear for inference, x @ w.T + bias: most output features of w in 4 bits, some in 8, x rounded to 8 bits.

    The weight is frozen; x and the bias get gradients. Built directly, all weights are 4-bit zeros: fill it by
    `load_state_dict`, or make it from a dense layer by `from_linear`.

    The state_dict has `q4`, `scale4`, `zero4`, `q8`, `scale8`, `perm` (docs/formats/w4a8.md) and `bias` (if any).
    Sizes and group size become the checkpoint's. As checkpoints are untrusted, `load_state_dict` checks them first; a
    bad one is reported as an error and leaves the module as it was.

    `.to(dtype)` casts the bias only; x may have any of the float types.

    Args:
        in_features, out_features: size of the weight, [out_features, in_features].
        bias: whether there is one.
        group_size: input features that share a scale: 32, 64, 128 or 256.
        device: of all tensors.
        dtype: of the bias: float32, float16 or bfloat16. By default torch's.

    Raises:
        ValueError: another group size.
    """

    packed_names = Packed._fields

    q4: Tensor
    scale4: Tensor
    zero4: Tensor
    q8: Tensor
    scale8: Tensor
    perm: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_group_size(group_size)
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        blocks, groups = ceil_div(out_features, BLOCK), ceil_div(in_features, group_size)
        chunks = ceil_div(in_features, CHUNK)
        self.register_buffer("q4", torch.zeros(blocks, chunks, BLOCK, 4, dtype=torch.uint8, device=device))
        self.register_buffer("scale4", torch.ones(blocks, groups, BLOCK, dtype=torch.float32, device=device))
        self.register_buffer("zero4", torch.zeros(blocks, groups, BLOCK, dtype=torch.uint8, device=device))
        self.register_buffer("q8", torch.zeros(0, in_features, dtype=torch.uint8, device=device))
        self.register_buffer("scale8", torch.ones(0, groups, BLOCK, dtype=torch.float32, device=device))
        self.register_buffer("perm", torch.arange(out_features, dtype=torch.int32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, is8: Tensor | None = None, group_size: int = 128) -> Linear:
        """Rounds the weight of a dense layer to nearest and packs it. The bias stays the same parameter.

        Args:
            linear: its weight is float32, float16 or bfloat16. NaN or infinities make an output feature NaN.
            is8: [out_features] bool, which output features get 8 bits; none by default.
            group_size: as in the constructor.

        Raises:
            ValueError: another group size, or the weight is on the meta device.
            RuntimeError: wrong dtypes or shapes.
        """
        _check_group_size(group_size)
        weight = linear.weight.detach()
        if weight.is_meta:
            raise ValueError("the weight is on the meta device: there is nothing to pack")
        with torch.inference_mode(False), torch.no_grad():  # tensors of that mode couldn't be used outside of it
            packed = torch.ops.effk.w4a8_pack(weight, is8, group_size)
        return cls.from_packed(packed, group_size, linear.bias).train(linear.training)

    @classmethod
    def from_packed(cls, packed: Iterable[Tensor], group_size: int = 128, bias: nn.Parameter | None = None) -> Linear:
        """Wraps what `effk.w4a8.pack` or, for weights that something else quantized, `pack_integers` returned.

        Args:
            packed: q4, scale4, zero4, q8, scale8 and perm; kept as they are.
            group_size: as packed.
            bias: [out_features], if any.

        Raises:
            ValueError: another group size.
        """
        p = Packed(*packed)
        module = cls(p.q8.shape[1], p.perm.shape[0], bias=False, group_size=group_size, device="meta")
        for name, tensor in zip(p._fields, p, strict=True):
            setattr(module, name, tensor)
        module.bias = bias
        return module

    def to_linear(self) -> nn.Linear:
        """The dense layer: weights as packed, in the dtype of the bias, or float32 without one."""
        weight = torch.ops.effk.w4a8_unpack(*self._packed().values(), self.group_size)
        return self._dense(weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], of x's dtype."""
        return torch.ops.effk.w4a8_linear(
            x,
            self.q4,
            self.scale4,
            self.zero4,
            self.q8,
            self.scale8,
            self.perm,
            self.group_size,
            self.bias,
        )

    @property
    def features8(self) -> int:
        """Number of output features in 8 bits."""
        return self.q8.shape[0]

    @property
    def bits(self) -> float:
        """Bits a weight takes, with scales, zero points, order and padding."""
        return 8 * self.nbytes / max(1, self.in_features * self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}, features8={self.features8}, bits={self.bits:.2f}"
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.group_size = self._group_size_of(self.scale4)

    def _group_size_of(self, scale4: Tensor) -> int:
        """What group size tensors were packed with: the number of groups tells, since one group is as good as another.

        Raises:
            RuntimeError: no group size makes as many groups.
        """
        groups = scale4.shape[1] if scale4.dim() == 3 else -1
        for size in (self.group_size, *reference.GROUP_SIZES):
            if ceil_div(self.in_features, size) == groups:
                return size
        raise RuntimeError(
            f"scale4 has shape {list(scale4.shape)}; no group size makes that of {self.in_features} input features"
        )

    def _try_packed(self, packed: Mapping[str, Tensor]) -> None:
        q8, perm = packed["q8"], packed["perm"]
        if q8.dim() != 2 or q8.shape[1] != self.in_features:
            raise RuntimeError(f"q8 has shape {list(q8.shape)}; wanted [*, {self.in_features}]")
        if perm.dim() != 1 or perm.shape[0] != self.out_features:
            raise RuntimeError(f"perm has shape {list(perm.shape)}; wanted [{self.out_features}]")
        x = torch.zeros(1, self.in_features, device=q8.device)
        # Checks shapes, dtypes and that perm is a permutation; the other tensors may hold anything.
        torch.ops.effk.w4a8_linear(x, *packed.values(), self._group_size_of(packed["scale4"]))


def _check_group_size(group_size: int) -> None:
    if group_size not in reference.GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}; wanted one of {', '.join(map(str, reference.GROUP_SIZES))}")


@dataclass(frozen=True)
class Record:
    """What became of one weight.

    Attributes:
        names: paths of the nn.Linear modules that had it; several where they are tied.
        shape: of the weight, [out features, in features].
        features8: number of output features in 8 bits.
        bytes_before, bytes_after: of the weight, dense and as it is now.
        skipped: why it stayed dense, or "" where it was quantized.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    features8: int
    bytes_before: int
    bytes_after: int
    skipped: str = ""

    @property
    def share8(self) -> float:
        """Share of the output features in 8 bits."""
        return self.features8 / max(1, self.shape[0])

    @property
    def bits(self) -> float:
        """Bits a weight takes now, with scales, zero points, order and padding."""
        return 8 * self.bytes_after / max(1, self.shape[0] * self.shape[1])


def quantize_(
    model: nn.Module,
    ratio8: float = 0.1,
    calibration: Iterable[Any] | None = None,
    *,
    group_size: int = 128,
    method: str = "rtn",
    clip: bool = False,
    damping: float = 0.01,
    budget: str = "features",
    scores: Mapping[str, Tensor] | None = None,
    loss: calibrate.Loss | None = None,
    filter: Callable[[str, nn.Linear], bool] | None = None,
    progress: bool = True,
) -> list[Record]:
    """Replaces each nn.Linear of a model by a `Linear` with a 4/8-bit weight, in place.

    Which output features get 8 bits is decided over the whole model (MixLLM, arXiv:2412.14590): all features of all
    layers are sorted by a score, and the best take 8 bits. The score is, in this order,
    - `scores`, where given;
    - `measure_salience` on the calibration batches;
    - without those, what the feature adds to the squared error of its layer's output, relative to that output's
      square, for inputs that are white noise: |w4 - w|^2 / |W|^2, w4 the row in 4 bits and W the layer's weight.

    Left dense, and said so in the result, are subclasses of nn.Linear, weights tied to something else (an embedding,
    say), layers with hooks, and layers whose parent reads their weight itself (nn.TransformerEncoderLayer). Linears
    that share a weight come to share a `Linear`. The model changes in the end, all at once: an interrupted call leaves
    it as it was.

    Args:
        model: holds the layers; it may not be an nn.Linear itself (see `Linear.from_linear`).
        ratio8: share of 8-bit features, from 0 to 1.
        calibration: batches: a mapping gives keyword arguments of the model, a tuple or list positional ones, anything
            else is the only argument. Each is one sample of `measure_salience`.
        group_size: 32, 64, 128 or 256.
        method: "rtn" rounds to nearest; "gptq" (arXiv:2210.17323) lets later input features of a row make up for the
            error of earlier ones, by the inputs that layers get from the calibration batches in the dense model.
        clip: tries for each 4-bit group to clip its largest weights, and keeps what makes the squared error smallest;
            input features count by their mean square in the calibration batches, equally without.
        damping: of "gptq": added to the diagonal of the inputs' second moments, relative to its mean.
        budget: what ratio8 is a share of: "features", as in the paper, or "parameters", where a feature's score is
            divided by its number of weights, since that is what its bits cost.
        scores: for each layer's path (one of them, where tied) [out features], higher for features that need 8 bits.
        loss: as in `measure_salience`.
        filter: called with a layer's path and the layer; False leaves it dense.
        progress: shows bars, where rich is installed and stderr is a terminal.

    Returns:
        A record for each weight of an nn.Linear.

    Raises:
        ValueError: a wrong option, or one that needs calibration; the model is an nn.Linear; scores that aren't
            finite, are missing or have a wrong shape; calibration inputs that aren't finite.
    """
    _check_group_size(group_size)
    if not 0 <= ratio8 <= 1:
        raise ValueError(f"ratio8 is {ratio8}; wanted a number from 0 to 1")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; wanted one of {', '.join(METHODS)}")
    if budget not in BUDGETS:
        raise ValueError(f"budget is {budget!r}; wanted one of {', '.join(BUDGETS)}")
    batches = None if calibration is None else list(calibration)
    if batches == []:
        raise ValueError("calibration has no batches (an iterator that was used up?)")
    if method == "gptq" and not batches:
        raise ValueError("method 'gptq' needs calibration batches")

    weights = linear_weights(model)
    skipped = {w: next(calibrate.obstacles(model, w, filter), "") for w in weights}
    chosen = [w for w in weights if not skipped[w]]
    if scores is None and 0 < ratio8 < 1 and chosen:
        if batches:
            scores = calibrate.measure_salience(
                model, batches, loss, group_size=group_size, filter=filter, progress=progress
            )
        else:
            scores = {w.names[0]: _relative_error(_weight(model, w), group_size) for w in chosen}
    is8 = _select(model, chosen, scores, ratio8, budget)

    modules: dict[LinearWeight, Linear] = {}
    for part, moments in _with_moments(model, chosen, batches, method, clip, progress):
        with progress_bar("Quantizing weights", len(part), progress) as advance:
            for w in part:
                linear, name = linear_at(model, w.names[0]), w.names[0]
                with torch.inference_mode(False), torch.no_grad():  # as in from_linear
                    weight = linear.weight.detach()
                    packed = _quantized(name, weight, is8[w], group_size, clip, moments.get(name), damping)
                modules[w] = Linear.from_packed(packed, group_size, linear.bias).train(linear.training)
                advance()

    records = []
    for w in weights:
        weight = _weight(model, w)
        shape, before = (weight.shape[0], weight.shape[1]), weight.nbytes
        if skipped[w]:
            log.debug("w4a8: %s stays dense: %s", ", ".join(w.names), skipped[w])
            records.append(Record(w.names, shape, 0, before, before, skipped[w]))
        else:
            records.append(Record(w.names, shape, modules[w].features8, before, modules[w].nbytes))
    for w, module in modules.items():
        replace_(model, w, module)
    done = [r for r in records if not r.skipped]
    log.info(
        "w4a8: quantized %d of %d weights, %d bytes -> %d; %d of %d output features in 8 bits",
        len(done),
        len(records),
        sum(r.bytes_before for r in done),
        sum(r.bytes_after for r in done),
        sum(r.features8 for r in done),
        sum(r.shape[0] for r in done),
    )
    return records


def _weight(model: nn.Module, weight: LinearWeight) -> Tensor:
    return linear_at(model, weight.names[0]).weight.detach()


def _relative_error(weight: Tensor, group_size: int) -> Tensor:
    """[N]: what 4 bits add to the squared error of the output, relative to its square, for white inputs."""
    w = weight.double()
    error = (calibrate.in_4_bits(weight, group_size) - w).square().sum(1)
    size = w.square().sum()
    return error / torch.where(size == 0, 1, size)


def _select(
    model: nn.Module,
    weights: list[LinearWeight],
    scores: Mapping[str, Tensor] | None,
    ratio8: float,
    budget: str,
) -> dict[LinearWeight, Tensor]:
    """Which output features of each weight get 8 bits, on the weight's device."""
    shapes = [_weight(model, w).shape for w in weights]
    if scores is None:  # none or all of them
        flat = torch.zeros(sum(n for n, _ in shapes))
    else:
        found = [_scores_of(w, n, scores) for w, (n, _) in zip(weights, shapes, strict=True)]
        flat = torch.cat([torch.zeros(0), *found])
    costs = torch.cat([torch.zeros(0, dtype=torch.long), *(torch.full((n,), k) for n, k in shapes)])
    if budget == "features":
        costs = torch.ones_like(costs)
    best = (flat.double() / costs.clamp(min=1)).argsort(descending=True, stable=True)
    spent = costs[best].cumsum(0)
    flags = torch.zeros(len(flat), dtype=torch.bool)
    flags[best[spent <= round(ratio8 * int(costs.sum()))]] = True
    parts = flags.split([n for n, _ in shapes])
    return {w: part.to(_weight(model, w).device) for w, part in zip(weights, parts, strict=True)}


def _scores_of(weight: LinearWeight, features: int, scores: Mapping[str, Tensor]) -> Tensor:
    name = next((n for n in weight.names if n in scores), None)
    if name is None:
        raise ValueError(f"scores lack {' or '.join(weight.names)}")
    found = scores[name].detach().cpu().float()
    if found.shape != (features,):
        raise ValueError(f"scores of {name} have shape {list(found.shape)}; wanted [{features}]")
    if not found.isfinite().all():
        raise ValueError(f"scores of {name} aren't finite: it holds such weights, or gradients overflowed")
    return found


def _with_moments(
    model: nn.Module,
    weights: list[LinearWeight],
    batches: list[Any] | None,
    method: str,
    clip: bool,
    progress: bool,
) -> Iterator[tuple[list[LinearWeight], dict[str, Tensor]]]:
    """Parts of the weights with what rounding wants to know of their inputs; as much at a time as memory allows."""
    full = method == "gptq"
    if not batches or not (full or clip):
        yield weights, {}
        return
    part: list[LinearWeight] = []
    size = 0
    for w in weights:
        k = _weight(model, w).shape[1]
        needed = 4 * k * (k if full else 1)
        if part and size + needed > MOMENT_BYTES:
            yield part, calibrate.second_moments(model, part, batches, full, progress)
            part, size = [], 0
        part.append(w)
        size += needed
    yield part, calibrate.second_moments(model, part, batches, full, progress)


def _quantized(
    name: str,
    weight: Tensor,
    is8: Tensor,
    group_size: int,
    clip: bool,
    moments: Tensor | None,
    damping: float,
) -> Iterable[Tensor]:
    """The packed tensors of a weight. moments: of its inputs, [K, K] or only the diagonal, or none."""
    if moments is not None:
        if not moments.isfinite().all():
            raise ValueError(f"calibration inputs of {name} hold NaN, infinities or numbers too large to square")
        if not moments.any():
            log.warning("w4a8: the calibration inputs of %s are zero, or it isn't called: rounded to nearest", name)
            moments = None
    if moments is not None and moments.dim() == 2:
        try:
            return rounding.gptq(weight, moments, is8, group_size, clip=clip, damping=damping)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if clip:
        weight = weight.float().masked_scatter(~is8[:, None], rounding.clipped(weight[~is8], group_size, moments))
    return torch.ops.effk.w4a8_pack(weight, is8, group_size)


def prepare_(model: nn.Module, keys: Collection[str]) -> None:
    """Makes a dense model ready for the state_dict of a quantized one: layers packed there become empty `Linear`s.

    Args:
        model: has nn.Linear layers where the quantized model has `Linear`s.
        keys: of the state_dict (or the state_dict itself, or what safetensors' `keys()` lists).

    Raises:
        ValueError: a layer that is packed in the checkpoint can't be replaced here; the model is unchanged.
    """

    def empty(linear: nn.Linear, names: tuple[str, ...]) -> Linear:
        return Linear(linear.in_features, linear.out_features, bias=False, device=linear.weight.device)

    _modules.prepare_(model, keys, "q4", empty)
