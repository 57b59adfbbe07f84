"""w4a8 written for reading: what every back end must compute. docs/formats/w4a8.md describes the packed tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import FLOATS, check_tensor

BLOCK = 16  # output features of a block
CHUNK = 8  # input features in a 32-bit word of q4
GROUP_SIZES = (32, 64, 128, 256)
MAX_SIDE = 2**30  # bounds what the sizes of a tensor can multiply to
TINY = 2.0**-126  # smallest normal float32: no scale is smaller


class Packed(NamedTuple):
    """The six tensors of a packed weight; see docs/formats/w4a8.md."""

    q4: Tensor
    scale4: Tensor
    zero4: Tensor
    q8: Tensor
    scale8: Tensor
    perm: Tensor


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


# --- Checks that need no look at the contents ------------------------------------------------------------------------


def check_group_size(op: str, group_size: int) -> None:
    torch._check(
        group_size in GROUP_SIZES,
        lambda: f"effk::{op}: group_size is {group_size}; wanted one of {', '.join(map(str, GROUP_SIZES))}",
    )


def check_packed(op: str, p: Packed, group_size: int) -> None:
    check_group_size(op, group_size)
    check_tensor(op, "q8", p.q8, (torch.uint8,), (None, None))
    n8, cols = p.q8.shape
    check_tensor(op, "perm", p.perm, (torch.int32,), (None,), p.q8)
    n = p.perm.shape[0]
    torch._check(
        n <= MAX_SIDE and cols <= MAX_SIDE,
        lambda: f"effk::{op}: perm and q8 make a weight of [{n}, {cols}]; wanted at most 2^30 each way",
    )
    torch._check(n8 <= n, lambda: f"effk::{op}: perm has {n} entries; wanted at least q8's {n8} rows")
    blocks4, blocks8, groups = ceil_div(n - n8, BLOCK), ceil_div(n8, BLOCK), ceil_div(cols, group_size)
    check_tensor(op, "q4", p.q4, (torch.uint8,), (blocks4, ceil_div(cols, CHUNK), BLOCK, 4), p.q8)
    check_tensor(op, "scale4", p.scale4, (torch.float32,), (blocks4, groups, BLOCK), p.q8)
    check_tensor(op, "zero4", p.zero4, (torch.uint8,), (blocks4, groups, BLOCK), p.q8)
    check_tensor(op, "scale8", p.scale8, (torch.float32,), (blocks8, groups, BLOCK), p.q8)
    for name, tensor in zip(p._fields, p, strict=True):
        torch._check(tensor.is_contiguous(), lambda name=name: f"effk::{op}: {name} must be contiguous")


def check_perm(op: str, perm: Tensor) -> None:
    """A look at the contents: every output feature once."""
    n = perm.shape[0]
    inside = ((perm >= 0) & (perm < n)).all()
    if not (bool(inside) and torch.equal(perm.sort().values, torch.arange(n, dtype=perm.dtype, device=perm.device))):
        raise RuntimeError(f"effk::{op}: perm is corrupt: it isn't a permutation of 0 to {n - 1}")


def check_quantize(x: Tensor, group_size: int) -> None:
    check_group_size("w4a8_quantize", group_size)
    check_tensor("w4a8_quantize", "x", x, FLOATS)
    torch._check(x.dim() >= 1, lambda: "effk::w4a8_quantize: x has shape []; wanted at least one dimension")


def check_pack(w: Tensor, is8: Tensor | None, group_size: int) -> None:
    check_group_size("w4a8_pack", group_size)
    check_tensor("w4a8_pack", "w", w, FLOATS, (None, None))
    torch._check(
        w.shape[0] <= MAX_SIDE and w.shape[1] <= MAX_SIDE,
        lambda: f"effk::w4a8_pack: w has shape {list(w.shape)}; wanted at most 2^30 each way",
    )
    if is8 is not None:
        check_tensor("w4a8_pack", "is8", is8, (torch.bool,), (w.shape[0],), w)


def check_linear(
    x: Tensor, p: Packed, group_size: int, bias: Tensor | None, out_dtype: torch.dtype | None
) -> torch.dtype:
    """The dtype of the result."""
    op = "w4a8_linear"
    check_packed(op, p, group_size)
    check_tensor(op, "x", x, FLOATS, None, p.q8)
    cols = p.q8.shape[1]
    torch._check(
        x.dim() >= 1 and x.shape[-1] == cols,
        lambda: f"effk::{op}: x has shape {list(x.shape)}; wanted the last size to be q8's {cols}",
    )
    if bias is not None:
        check_tensor(op, "bias", bias, FLOATS, (p.perm.shape[0],), p.q8)
    dtype = x.dtype if out_dtype is None else out_dtype
    torch._check(dtype in FLOATS, lambda: f"effk::{op}: out_dtype is {dtype}; wanted float32, float16 or bfloat16")
    return dtype


def check_accumulate(q: Tensor, p: Packed, group_size: int) -> None:
    check_packed("w4a8_accumulate", p, group_size)
    check_tensor("w4a8_accumulate", "q", q, (torch.int8,), (None, p.q8.shape[1]), p.q8)


def check_salience(grad: Tensor, w: Tensor, w4: Tensor) -> None:
    op = "w4a8_salience"
    check_tensor(op, "w", w, FLOATS, (None, None))
    check_tensor(op, "w4", w4, FLOATS, tuple(w.shape), w)
    check_tensor(op, "grad", grad, FLOATS, None, w)
    torch._check(
        grad.dim() in (2, 3) and grad.shape[-2:] == w.shape,
        lambda: f"effk::{op}: grad has shape {list(grad.shape)}; wanted {list(w.shape)}, or samples of it",
    )


# --- Quantization ----------------------------------------------------------------------------------------------------


def grouped(x: Tensor, group_size: int) -> Tensor:
    """[..., K] -> [..., groups, group_size] in float32, the last group filled up with zeros."""
    cols = x.shape[-1]
    groups = ceil_div(cols, group_size)
    padded = torch.nn.functional.pad(x.float(), (0, groups * group_size - cols))
    return padded.reshape(*x.shape[:-1], groups, group_size)


def ungrouped(x: Tensor, cols: int) -> Tensor:
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])[..., :cols]


def scale_of(size: Tensor, levels: int) -> Tensor:
    """Of groups whose largest magnitude, or range, is `size`: 1 for constant zero, NaN where size isn't finite."""
    scale = (size / levels).clamp(min=TINY)
    return torch.where(size == 0, 1.0, torch.where(size.isfinite(), scale, torch.nan))


def symmetric(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """8-bit integers [..., K] from -127 to 127 (as float32) and scales [..., groups]."""
    groups = grouped(x, group_size)
    scale = scale_of(groups.abs().amax(-1), 127)
    q = (groups / scale[..., None]).round().clamp(-127, 127).nan_to_num(nan=0)
    return ungrouped(q, x.shape[-1]), scale


def asymmetric(w: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """4-bit integers [N, K] from 0 to 15 (as float32), scales and zero points [N, groups]; 0 is in the range."""
    groups = grouped(w, group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = scale_of(high - low, 15)
    zero = (-low / scale).round().clamp(0, 15).nan_to_num(nan=0)
    q = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, 15).nan_to_num(nan=0)
    return ungrouped(q, w.shape[1]), scale, zero


def w4a8_quantize(x: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor]:
    check_quantize(x, group_size)
    q, scale = symmetric(x, group_size)
    return q.to(torch.int8), scale


# --- The packed format -----------------------------------------------------------------------------------------------


def in_blocks(t: Tensor) -> Tensor:
    """[n, groups] -> [blocks, groups, 16], filled up with zeros: the layout of scales and zero points."""
    n, groups = t.shape
    blocks = ceil_div(n, BLOCK)
    return torch.nn.functional.pad(t, (0, 0, 0, blocks * BLOCK - n)).reshape(blocks, BLOCK, groups).mT.contiguous()


def from_blocks(t: Tensor, n: int) -> Tensor:
    return t.mT.reshape(t.shape[0] * BLOCK, t.shape[1])[:n]


def to_q4(q: Tensor) -> Tensor:
    """[n, K] of 0 to 15 -> [blocks, chunks, 16, 4]: of 8 consecutive k, the first four are the low halves."""
    n, cols = q.shape
    blocks, chunks = ceil_div(n, BLOCK), ceil_div(cols, CHUNK)
    padded = torch.nn.functional.pad(q, (0, chunks * CHUNK - cols, 0, blocks * BLOCK - n)).to(torch.uint8)
    low, high = padded.reshape(blocks, BLOCK, chunks, 2, 4).permute(3, 0, 2, 1, 4)
    return (low | high << 4).contiguous()


def from_q4(q4: Tensor, n: int, cols: int) -> Tensor:
    blocks, chunks = q4.shape[:2]
    halves = torch.stack([q4 & 15, q4 >> 4])  # [half, block, chunk, feature, 4]
    return halves.permute(1, 3, 2, 0, 4).reshape(blocks * BLOCK, chunks * CHUNK)[:n, :cols]


def to_q8(q: Tensor) -> Tensor:
    """[n, K] of -127 to 127 -> its bytes, as many: in blocks of 16 rows (the last has the rest), words of 4 k."""
    n, cols = q.shape
    words = cols // 4 * 4
    q8 = (q + 128).to(torch.uint8)
    parts = []
    for block in q8.split(BLOCK):
        rows = block.shape[0]
        parts.append(block[:, :words].reshape(rows, words // 4, 4).transpose(0, 1).flatten())
        parts.append(block[:, words:].flatten())
    return torch.cat(parts).reshape(n, cols) if parts else q8


def from_q8(q8: Tensor) -> Tensor:
    """The bytes as [n, K] in order: 0 to 255, which stand for -128 to 127."""
    cols = q8.shape[1]
    words = cols // 4 * 4
    out = torch.empty_like(q8)
    for to, block in zip(out.split(BLOCK), q8.split(BLOCK), strict=True):
        rows, flat = block.shape[0], block.flatten()
        to[:, :words] = flat[: rows * words].reshape(words // 4, rows, 4).transpose(0, 1).reshape(rows, words)
        to[:, words:] = flat[rows * words :].reshape(rows, cols - words)
    return out


def order(is8: Tensor | None, n: int, device: torch.device) -> tuple[Tensor, int]:
    """The output features with 4-bit ones first, each kind in order, and how many 8-bit ones there are."""
    if is8 is None:
        return torch.arange(n, dtype=torch.int32, device=device), 0
    return is8.int().argsort(stable=True).int(), int(is8.sum())


def pack_integers(q4: Tensor, scale4: Tensor, zero4: Tensor, q8: Tensor, scale8: Tensor, perm: Tensor) -> Packed:
    """Packs weights that something else quantized.

    Args:
        q4: [N4, K] integers from 0 to 15, any dtype; the 4-bit features in the order of perm.
        scale4, zero4: [N4, groups]; weight = scale * (q - zero), zero an integer from 0 to 15.
        q8: [N8, K] integers from -128 to 127.
        scale8: [N8, groups].
        perm: [N4 + N8], which output feature each of these rows is, 4-bit ones first.
    """
    return Packed(
        to_q4(q4),
        in_blocks(scale4.float()),
        in_blocks(zero4.to(torch.uint8)),
        to_q8(q8.to(torch.int16)),
        in_blocks(scale8.float()),
        perm.int().contiguous(),
    )


def w4a8_pack(w: Tensor, is8: Tensor | None = None, group_size: int = 128) -> Packed:
    check_pack(w, is8, group_size)
    perm, n8 = order(is8, w.shape[0], w.device)
    rows = w[perm.long()]
    n4 = w.shape[0] - n8
    q8, scale8 = symmetric(rows[n4:], group_size)
    return pack_integers(*asymmetric(rows[:n4], group_size), q8, scale8, perm)


class Unpacked(NamedTuple):
    """The rows of a packed weight, 4-bit ones first: weight = scale * (q - zero)."""

    q: Tensor  # [N, K], 0 to 15 or 0 to 255
    zero: Tensor  # [N, groups], 128 for 8-bit rows
    scale: Tensor  # [N, groups]


def integers(p: Packed) -> Unpacked:
    n8, cols = p.q8.shape
    n4 = p.perm.shape[0] - n8
    scale8 = from_blocks(p.scale8, n8)
    return Unpacked(
        torch.cat([from_q4(p.q4, n4, cols), from_q8(p.q8)]).long(),
        torch.cat([from_blocks(p.zero4, n4).long(), torch.full_like(scale8, 128, dtype=torch.long)]),
        torch.cat([from_blocks(p.scale4, n4), scale8]),
    )


def in_original_order(rows: Tensor, perm: Tensor) -> Tensor:
    out = torch.empty_like(rows)
    out[perm.long()] = rows
    return out


def w4a8_unpack(
    q4: Tensor, scale4: Tensor, zero4: Tensor, q8: Tensor, scale8: Tensor, perm: Tensor, group_size: int
) -> Tensor:
    p = Packed(q4, scale4, zero4, q8, scale8, perm)
    check_packed("w4a8_unpack", p, group_size)
    check_perm("w4a8_unpack", perm)
    q, zero, scale = integers(p)
    cols = q.shape[1]
    group = torch.arange(cols, device=q.device) // group_size
    return in_original_order((q - zero[:, group]).float() * scale[:, group], perm)


# --- The product -----------------------------------------------------------------------------------------------------


def first_step(q: Tensor, p: Packed, group_size: int) -> Tensor:
    """[T, groups, N] int64, rows of the weight in packed order: sums of x * (q - zero) over each group."""
    w, zero, _ = integers(p)
    cols = w.shape[1]
    ends = range(0, cols, group_size)
    sums = [
        q[:, k : k + group_size].long() @ (w[:, k : k + group_size] - zero[:, i, None]).mT for i, k in enumerate(ends)
    ]
    return torch.stack(sums, 1) if sums else torch.zeros(q.shape[0], 0, w.shape[0], dtype=torch.long, device=q.device)


def w4a8_accumulate(
    q: Tensor, q4: Tensor, scale4: Tensor, zero4: Tensor, q8: Tensor, scale8: Tensor, perm: Tensor, group_size: int
) -> Tensor:
    p = Packed(q4, scale4, zero4, q8, scale8, perm)
    check_accumulate(q, p, group_size)
    check_perm("w4a8_accumulate", perm)
    return in_original_order(first_step(q, p, group_size).permute(2, 0, 1), perm).permute(1, 2, 0).int().contiguous()


def w4a8_linear(
    x: Tensor,
    q4: Tensor,
    scale4: Tensor,
    zero4: Tensor,
    q8: Tensor,
    scale8: Tensor,
    perm: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    p = Packed(q4, scale4, zero4, q8, scale8, perm)
    dtype = check_linear(x, p, group_size, bias, out_dtype)
    check_perm("w4a8_linear", perm)
    n, cols = perm.shape[0], q8.shape[1]
    tokens = x.reshape(x.shape[:-1].numel(), cols)
    q, x_scale = symmetric(tokens, group_size)
    sums = first_step(q.to(torch.int8), p, group_size).float()
    w_scale = integers(p).scale
    y = torch.zeros(tokens.shape[0], n, device=x.device)
    for g in range(sums.shape[1]):
        y = y + sums[:, g] * x_scale[:, g, None] * w_scale[:, g]
    y = in_original_order(y.mT, perm).mT
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype).reshape(*x.shape[:-1], n).contiguous()


def w4a8_salience(grad: Tensor, w: Tensor, w4: Tensor) -> Tensor:
    check_salience(grad, w, w4)
    samples = grad.float().reshape(grad.shape[:-2].numel(), *w.shape)
    change = (samples * (w4.float() - w.float())).sum(-1)
    return (change + change**2 / 2).abs().sum(0)
