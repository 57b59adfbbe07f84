"""lscd written for reading: what every back end must compute. docs/formats/lscd.md describes the packed tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import FLOATS

SUB = 8  # side of a sub-tile
STRIP_ROWS = 16
TILE_SUB_COLS = 32  # columns of sub-tiles that share an offset
VALUE_ALIGN = 16
VALUE_PAD = 64
MAX_SIDE = 2**31  # bounds what the sizes of a tensor can multiply to

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def sizes(rows: int, cols: int) -> tuple[int, int, int]:
    """Strips, columns of sub-tiles, and tiles in a strip."""
    sub_cols = 2 * ((cols + 2 * SUB - 1) // (2 * SUB))
    return (rows + STRIP_ROWS - 1) // STRIP_ROWS, sub_cols, (sub_cols + TILE_SUB_COLS - 1) // TILE_SUB_COLS


def check_packed(op: str, values: Tensor, bitmap: Tensor, offsets: Tensor, rows: int, cols: int) -> None:
    """The checks that need no look at the contents."""
    torch._check(
        0 <= rows <= MAX_SIDE and 0 <= cols <= MAX_SIDE,
        lambda: f"effk::{op}: rows and cols are {rows} and {cols}; wanted 0 to 2^31",
    )
    strips, sub_cols, tiles = sizes(rows, cols)
    torch._check(
        values.dtype in (*FLOATS, torch.int8),
        lambda: f"effk::{op}: values has dtype {values.dtype}; wanted float32, float16, bfloat16 or int8",
    )
    torch._check(values.dim() == 1, lambda: f"effk::{op}: values has shape {list(values.shape)}; wanted one dimension")
    check_contiguous(op, "values", values)
    check_index(op, "bitmap", bitmap, (strips, sub_cols, 2), values)
    check_index(op, "offsets", offsets, (strips * tiles + 1,), values)
    torch._check(
        values.shape[0] >= VALUE_PAD,
        lambda: f"effk::{op}: values has {values.shape[0]} entries; wanted at least the {VALUE_PAD} of padding",
    )


def check_index(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], values: Tensor) -> None:
    """Of bitmap and offsets."""
    torch._check(tensor.dtype == torch.int64, lambda: f"effk::{op}: {name} has dtype {tensor.dtype}; wanted int64")
    torch._check(
        tensor.dim() == len(shape) and all(a == b for a, b in zip(tensor.shape, shape, strict=True)),
        lambda: f"effk::{op}: {name} has shape {list(tensor.shape)}; wanted {list(shape)}",
    )
    check_contiguous(op, name, tensor)
    check_device(op, name, tensor, values)


def check_contiguous(op: str, name: str, tensor: Tensor) -> None:
    torch._check(tensor.is_contiguous(), lambda: f"effk::{op}: {name} must be contiguous")


def check_device(op: str, name: str, tensor: Tensor, values: Tensor) -> None:
    torch._check(tensor.device == values.device, lambda: f"effk::{op}: {name} and values are on different devices")


def check_pack(w: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the packed values."""
    torch._check(w.dim() == 2, lambda: f"effk::lscd_pack: w has shape {list(w.shape)}; wanted two dimensions")
    torch._check(
        w.shape[0] <= MAX_SIDE and w.shape[1] <= MAX_SIDE,
        lambda: f"effk::lscd_pack: w has shape {list(w.shape)}; wanted at most 2^31 rows and columns",
    )
    torch._check(
        w.dtype in (*FLOATS, torch.int8),
        lambda: f"effk::lscd_pack: w has dtype {w.dtype}; wanted float32, float16, bfloat16 or int8",
    )
    if dtype is None or dtype == w.dtype:
        return w.dtype
    torch._check(
        w.dtype in FLOATS and dtype in FLOATS,
        lambda: f"effk::lscd_pack: dtype is {dtype} for w of {w.dtype}; quantize to int8 before packing",
    )
    return dtype


def check_scale(op: str, scale: Tensor | None, values: Tensor, rows: int) -> None:
    if scale is not None:
        torch._check(
            scale.dtype == torch.float32 and scale.dim() == 1 and scale.shape[0] == rows,
            lambda: f"effk::{op}: scale is {scale.dtype} {list(scale.shape)}; wanted float32 [{rows}]",
        )
        check_contiguous(op, "scale", scale)
        check_device(op, "scale", scale, values)


def check_linear(
    x: Tensor,
    values: Tensor,
    rows: int,
    cols: int,
    bias: Tensor | None,
    scale: Tensor | None,
    activation: str,
) -> None:
    torch._check(
        x.dtype in FLOATS, lambda: f"effk::lscd_linear: x has dtype {x.dtype}; wanted float32, float16 or bfloat16"
    )
    torch._check(
        values.dtype in (x.dtype, torch.int8),
        lambda: f"effk::lscd_linear: values has dtype {values.dtype}; wanted x's {x.dtype} or int8",
    )
    torch._check(
        x.dim() >= 1 and x.shape[-1] == cols,
        lambda: f"effk::lscd_linear: x has shape {list(x.shape)}; wanted the last size to be cols = {cols}",
    )
    check_device("lscd_linear", "x", x, values)
    if bias is not None:
        torch._check(
            bias.dtype == x.dtype and bias.dim() == 1 and bias.shape[0] == rows,
            lambda: f"effk::lscd_linear: bias is {bias.dtype} {list(bias.shape)}; wanted {x.dtype} [{rows}]",
        )
        check_device("lscd_linear", "bias", bias, values)
    check_scale("lscd_linear", scale, values, rows)
    torch._check(
        activation in ACTIVATIONS,
        lambda: f"effk::lscd_linear: activation is {activation!r}; wanted one of {', '.join(ACTIVATIONS)}",
    )


def to_sub_tiles(w: Tensor) -> Tensor:
    """[rows, cols] -> [strips, sub_cols, 2, 64], zero-padded: one row of 64 weights a word of the bitmap."""
    strips, sub_cols, _ = sizes(*w.shape)
    padded = F.pad(w, (0, sub_cols * SUB - w.shape[1], 0, strips * STRIP_ROWS - w.shape[0]))
    return padded.view(strips, 2, SUB, sub_cols, SUB).permute(0, 3, 1, 2, 4).reshape(strips, sub_cols, 2, SUB * SUB)


def from_sub_tiles(blocks: Tensor, rows: int, cols: int) -> Tensor:
    strips, sub_cols = blocks.shape[:2]
    full = blocks.view(strips, sub_cols, 2, SUB, SUB).permute(0, 2, 3, 1, 4)
    return full.reshape(strips * STRIP_ROWS, sub_cols * SUB)[:rows, :cols].contiguous()


def align(n: Tensor) -> Tensor:
    return (n + VALUE_ALIGN - 1) // VALUE_ALIGN * VALUE_ALIGN


def tile_counts(stored: Tensor) -> Tensor:
    """[strips, sub_cols, 2, 64] flags -> [strips, tiles] numbers of values."""
    strips, sub_cols = stored.shape[:2]
    tiles = (sub_cols + TILE_SUB_COLS - 1) // TILE_SUB_COLS
    per_col = F.pad(stored.sum((2, 3)), (0, tiles * TILE_SUB_COLS - sub_cols))
    return per_col.view(strips, tiles, TILE_SUB_COLS).sum(2)


def positions(stored: Tensor, offsets: Tensor) -> Tensor:
    """Where each stored weight is in `values`: the offset of its tile plus the stored weights before it there."""
    strips, sub_cols = stored.shape[:2]
    before = stored.view(strips, sub_cols * 128).cumsum(1) - stored.view(strips, sub_cols * 128).long()
    at_tile_start = before[:, :: TILE_SUB_COLS * 128]
    tile = torch.arange(sub_cols * 128, device=stored.device) // (TILE_SUB_COLS * 128)
    in_tile = before - at_tile_start[:, tile]
    return (offsets[:-1].view(strips, at_tile_start.shape[1])[:, tile] + in_tile).view_as(stored)


def lscd_pack(w: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    w = w.to(check_pack(w, dtype))
    blocks = to_sub_tiles(w)
    stored = blocks != 0  # NaN is; -0.0 is not
    bit = torch.arange(64, device=w.device)
    bitmap = (stored.long() << bit).sum(-1)

    counts = align(tile_counts(stored))
    offsets = F.pad(counts.flatten().cumsum(0), (1, 0))
    values = w.new_zeros(int(offsets[-1]) + VALUE_PAD)
    values.index_copy_(0, positions(stored, offsets)[stored], blocks[stored])
    return values, bitmap, offsets


def dense(op: str, values: Tensor, bitmap: Tensor, offsets: Tensor, rows: int, cols: int) -> Tensor:
    """The weights; op is named in errors."""
    check_packed(op, values, bitmap, offsets, rows, cols)
    stored = (bitmap.unsqueeze(-1) >> torch.arange(64, device=bitmap.device)) & 1 == 1

    counts = tile_counts(stored).flatten()
    inside = stored.new_ones(rows, cols)
    torch._check(
        int(offsets[0]) == 0
        and int(offsets[-1]) == values.numel() - VALUE_PAD
        and bool((offsets.diff() == align(counts)).all())
        and not bool((stored & ~to_sub_tiles(inside)).any()),
        lambda: f"effk::{op}: the packed tensors are corrupt: bitmap, offsets and values disagree",
    )
    # Not `blocks[stored] = ...`: a single element would pass through a scalar, which makes signalling NaNs quiet.
    weights = values[positions(stored, offsets)[stored]]
    return from_sub_tiles(values.new_zeros(stored.shape).masked_scatter(stored, weights), rows, cols)


def lscd_unpack(
    values: Tensor, bitmap: Tensor, offsets: Tensor, rows: int, cols: int, scale: Tensor | None = None
) -> Tensor:
    check_scale("lscd_unpack", scale, values, rows)
    w = dense("lscd_unpack", values, bitmap, offsets, rows, cols)
    if scale is None:
        return w
    out_dtype = torch.float32 if w.dtype == torch.int8 else w.dtype
    return (w.float() * scale[:, None]).to(out_dtype)


def lscd_linear(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    rows: int,
    cols: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    activation: str = "none",
) -> Tensor:
    check_linear(x, values, rows, cols, bias, scale, activation)
    w = dense("lscd_linear", values, bitmap, offsets, rows, cols).double()
    y = x.double() @ w.T
    if scale is not None:
        y = y * scale.double()
    if bias is not None:
        y = y + bias.double()
    return ACTIVATIONS[activation](y).to(x.dtype)
