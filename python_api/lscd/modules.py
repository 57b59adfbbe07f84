"""nn.Linear with a packed weight, and the ways to put it into a model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _modules
from .._modules import LinearWeight, PackedModule, linear_at, linear_weights, obstacles, replace_
from .._progress import progress_bar
from . import reference

log = logging.getLogger("effk")

VALUE_DTYPES = (*reference.FLOATS, torch.int8)


class SparseLinear(PackedModule):
    """nn.Linear for inference with a pruned weight: activation(x @ w.T + bias), w packed as docs/formats/lscd.md says.

    The weight is frozen; x and the bias get gradients. Built directly, all weights are pruned: fill it by
    `load_state_dict`, or make it from a dense layer by `from_linear`.

    The state_dict has `values`, `bitmap`, `offsets`, `scale` (int8 only) and `bias` (if any). `values` takes the
    checkpoint's length. As checkpoints are untrusted, `load_state_dict` checks them first; a bad one is reported as an
    error and leaves the module as it was.

    `.to(dtype)` casts float values and the bias; a weight that becomes zero stays stored. int8 values, their float32
    scale, bitmap and offsets keep their dtypes.

    Args:
        in_features, out_features: size of the weight, [out_features, in_features].
        bias: whether there is one.
        activation: "none", "relu", "gelu", "gelu_tanh" or "silu".
        device: of all tensors.
        dtype: of the values: float32, float16, bfloat16 (and then also of x and the bias), or int8 (and then x and
            the bias share any of the float types). By default torch's.

    Raises:
        ValueError: unknown activation or dtype.
    """

    packed_names = ("values", "bitmap", "offsets", "scale")
    cast_names = ("values",)

    values: Tensor
    bitmap: Tensor
    offsets: Tensor
    scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        if activation not in reference.ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; wanted one of {', '.join(reference.ACTIVATIONS)}")
        if dtype not in VALUE_DTYPES:
            raise ValueError(f"dtype is {dtype}; wanted one of {', '.join(map(str, VALUE_DTYPES))}")
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        strips, sub_cols, tiles = reference.sizes(out_features, in_features)
        quantized = dtype == torch.int8
        self.register_buffer("values", torch.zeros(reference.VALUE_PAD, dtype=dtype, device=device))
        self.register_buffer("bitmap", torch.zeros(strips, sub_cols, 2, dtype=torch.int64, device=device))
        self.register_buffer("offsets", torch.zeros(strips * tiles + 1, dtype=torch.int64, device=device))
        scale = torch.ones(out_features, dtype=torch.float32, device=device) if quantized else None
        self.register_buffer("scale", scale)
        bias_dtype = None if quantized else dtype
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=bias_dtype, device=device)) if bias else None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, dtype: torch.dtype | None = None, activation: str = "none"
    ) -> SparseLinear:
        """Packs the weight of a dense layer. The bias stays the same parameter, unless its dtype changes.

        Args:
            linear: its weight is float32, float16 or bfloat16; zeros (-0.0 too) are pruned, all else is kept.
            dtype: of the values. A float type rounds the weight; torch.int8 quantizes each row to multiples of its
                scale, the row's largest magnitude / 127, and prunes what rounds to zero.
            activation: applied after the bias.

        Raises:
            ValueError: int8 was asked for a weight with NaN or infinities, or the weight is on the meta device.
        """
        weight, bias, scale = linear.weight.detach(), linear.bias, None
        if weight.is_meta:
            raise ValueError("the weight is on the meta device: there is nothing to pack")
        dtype = dtype or weight.dtype
        module = cls(
            linear.in_features, linear.out_features, bias=False, activation=activation, dtype=dtype, device="meta"
        )
        if dtype == torch.int8:
            weight, scale = _quantize_rows(weight)
        elif bias is not None and bias.dtype != dtype:
            bias = nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)
        module.values, module.bitmap, module.offsets = torch.ops.effk.lscd_pack(weight, dtype=dtype)
        module.scale, module.bias = scale, bias
        return module.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The dense layer: weights as packed, int8 ones multiplied by their scale and in the dtype of the bias.

        Raises:
            ValueError: the module has an activation, which nn.Linear lacks.
        """
        if self.activation != "none":
            raise ValueError(f"nn.Linear has no activation; this module has {self.activation!r}")
        weight = torch.ops.effk.lscd_unpack(
            self.values, self.bitmap, self.offsets, self.out_features, self.in_features, self.scale
        )
        return self._dense(weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], of x's dtype."""
        return torch.ops.effk.lscd_linear(
            x,
            self.values,
            self.bitmap,
            self.offsets,
            self.out_features,
            self.in_features,
            self.bias,
            self.scale,
            activation=self.activation,
        )

    @property
    def nnz(self) -> int:
        """Number of stored weights. Waits for the device."""
        ones_of_byte = torch.tensor([byte.bit_count() for byte in range(256)], device=self.bitmap.device)
        return int((torch.bincount(self.bitmap.view(torch.uint8).flatten(), minlength=256) * ones_of_byte).sum())

    @property
    def sparsity(self) -> float:
        """Share of the weights that are pruned. Waits for the device."""
        return 1 - self.nnz / max(1, self.in_features * self.out_features)

    def extra_repr(self) -> str:
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}",
            f"activation={self.activation!r}, dtype={self.values.dtype}",
        ]
        if not self.values.is_meta:
            parts.append(f"nnz={self.nnz}, sparsity={self.sparsity:.3f}, nbytes={self.nbytes}")
        return ", ".join(parts)

    def _try_packed(self, packed: Mapping[str, Tensor]) -> None:
        values = packed["values"]
        if values.dtype not in VALUE_DTYPES or (values.dtype == torch.int8) != (self.scale is not None):
            raise RuntimeError(f"values has dtype {values.dtype}; this module was built for {self.values.dtype}")
        x_dtype = torch.float32 if values.dtype == torch.int8 else values.dtype
        x = torch.zeros(1, self.in_features, dtype=x_dtype, device=values.device)
        # A product with one token reads every tile, and raises where shapes or contents are wrong.
        torch.ops.effk.lscd_linear(
            x,
            values,
            packed["bitmap"],
            packed["offsets"],
            self.out_features,
            self.in_features,
            None,
            packed.get("scale"),
        )


def _quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, cols] floats -> int8 in [-127, 127], rounded to nearest even, and float32 scales [rows]."""
    w = weight.float()
    if not w.isfinite().all():
        raise ValueError("a weight with NaN or infinities can't be quantized to int8")
    amax = w.abs().amax(1) if w.shape[1] else w.new_zeros(w.shape[0])
    scale = amax / 127
    scale[scale == 0] = 1  # also where amax is so small that the quotient underflows
    return (w / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


@dataclass(frozen=True)
class Record:
    """What became of one weight.

    Attributes:
        names: paths of the nn.Linear modules that had it; several where they are tied.
        shape: of the weight.
        sparsity: share of zeros; NaN where it can't be known.
        bytes_before, bytes_after: of the weight, dense and as it is now.
        skipped: why it stayed dense, or "" where it was packed.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    sparsity: float
    bytes_before: int
    bytes_after: int
    skipped: str = ""


def sparsify_(
    model: nn.Module,
    min_sparsity: float = 0.45,
    *,
    dtype: torch.dtype | None = None,
    filter: Callable[[str, nn.Linear], bool] | None = None,
    progress: bool = True,
) -> list[Record]:
    """Replaces each nn.Linear of a model whose weight is sparse enough by a `SparseLinear`, in place.

    Linears that share a weight come to share a SparseLinear. Left dense, and said so in the result, are subclasses of
    nn.Linear, weights tied to something else (an embedding, say), layers with hooks, and layers whose parent reads
    their weight itself (nn.TransformerEncoderLayer). Modules are replaced one by one, so that an interrupted call
    leaves a model that works.

    Args:
        model: holds the layers; it may not be an nn.Linear itself (see `SparseLinear.from_linear`).
        min_sparsity: weights with a smaller share of zeros stay dense.
        dtype: of the packed values, as in `SparseLinear.from_linear`; by default each weight's own.
        filter: called with a layer's path and the layer; False leaves it dense.
        progress: shows a bar, where rich is installed and stderr is a terminal.

    Returns:
        A record for each weight of an nn.Linear.

    Raises:
        ValueError: wrong dtype; the model is an nn.Linear; int8 was asked for a weight with NaN or infinities.
    """
    if dtype is not None and dtype not in VALUE_DTYPES:
        raise ValueError(f"dtype is {dtype}; wanted one of {', '.join(map(str, VALUE_DTYPES))}")
    weights = linear_weights(model)
    records = []
    with progress_bar("Packing weights", len(weights), progress) as advance:
        for weight in weights:
            records.append(sparsify_weight_(model, weight, min_sparsity, dtype=dtype, filter=filter))
            advance()
    packed = [r for r in records if not r.skipped]
    log.info(
        "lscd: packed %d of %d weights, %d bytes -> %d",
        len(packed),
        len(records),
        sum(r.bytes_before for r in packed),
        sum(r.bytes_after for r in packed),
    )
    return records


def sparsify_weight_(
    model: nn.Module,
    weight: LinearWeight,
    min_sparsity: float,
    *,
    dtype: torch.dtype | None = None,
    filter: Callable[[str, nn.Linear], bool] | None = None,
) -> Record:
    """Does what `sparsify_` does for one weight."""
    linear = linear_at(model, weight.names[0])
    dense = linear.weight.detach()
    sparsity = math.nan if dense.is_meta else 1 - int(dense.count_nonzero()) / max(1, dense.numel())
    skipped = next(obstacles(model, weight, filter), "")
    if not skipped and dense.is_meta:
        skipped = "its weight is on the meta device"
    if not skipped and sparsity < min_sparsity:
        skipped = f"its sparsity {sparsity:.3f} is below {min_sparsity}"
    bytes_before = bytes_after = dense.nbytes
    if skipped:
        log.debug("lscd: %s stays dense: %s", ", ".join(weight.names), skipped)
    else:
        module = SparseLinear.from_linear(linear, dtype=dtype)
        bytes_after = module.nbytes
        replace_(model, weight, module)
        log.debug("lscd: packed %s", ", ".join(weight.names))
    return Record(weight.names, (linear.out_features, linear.in_features), sparsity, bytes_before, bytes_after, skipped)


def prepare_(model: nn.Module, keys: Collection[str]) -> None:
    """Makes a dense model ready for the state_dict of a packed one: layers packed there become empty SparseLinears.

    Args:
        model: has nn.Linear layers where the packed model has SparseLinears.
        keys: of the state_dict (or the state_dict itself, or what safetensors' `keys()` lists).

    Raises:
        ValueError: a layer that is packed in the checkpoint can't be replaced here; the model is unchanged.
    """
    keys = set(keys)

    def empty(linear: nn.Linear, names: tuple[str, ...]) -> SparseLinear:
        return SparseLinear(
            linear.in_features,
            linear.out_features,
            bias=False,
            dtype=torch.int8 if any(f"{name}.scale" in keys for name in names) else linear.weight.dtype,
            device=linear.weight.device,
        )

    _modules.prepare_(model, keys, "bitmap", empty)
