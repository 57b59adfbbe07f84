"""Making, comparing and moving tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# What inputs may hold: `values` below makes them.
KINDS = ("normal", "integers", "extreme", "special", "bits")
LAYOUTS = ("contiguous", "transposed", "strided", "offset")


def map_tensors(f: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return tree_map_only(Tensor, f, tree)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def whole(t: Tensor) -> Tensor:
    """All bytes of the memory that t lies in, [n] uint8."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


def to_device(tree: Any, device: str | None = None) -> Any:
    """Copies on a device (by default where they are), as leaves for autograd.

    Strides, offsets and what lies between elements stay, and tensors that share memory share it in the copies, too.
    Tensors without contents are kept.
    """
    copies: dict[int, Tensor] = {}

    def copy(t: Tensor) -> Tensor:
        if t.device.type == "meta":
            return t
        memory = t.untyped_storage()._cdata
        if memory not in copies:
            copies[memory] = whole(t).to(device or t.device, copy=True)
        made = torch.empty(0, dtype=t.dtype, device=copies[memory].device)
        made.set_(copies[memory].untyped_storage(), t.storage_offset(), t.shape, t.stride())
        return made.requires_grad_(t.requires_grad)

    return map_tensors(copy, tree)


def bits(t: Tensor) -> Tensor:
    """The bits as integers: NaN equals itself and -0.0 differs from 0.0."""
    return t.contiguous().view(INTS[t.element_size()]) if t.is_floating_point() else t


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def share_memory(a: Tensor, b: Tensor) -> bool:
    return a.numel() > 0 and b.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(shape: tuple[int, ...], dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    """Random contents, none of them zero by intent.

    Args:
        kind: "normal"; "integers" (-4 to 4 without 0: sums are exact); "extreme" (also the largest and smallest
            numbers, subnormals and -0.0); "special" (also NaN and infinities); "bits" (any pattern).
    """
    g = generator(seed)
    if kind == "bits" or (not dtype.is_floating_point and kind != "integers"):
        item = torch.iinfo(INTS[dtype.itemsize])
        return torch.randint(item.min, item.max, shape, generator=g, dtype=INTS[dtype.itemsize]).view(dtype)
    if kind == "integers":
        magnitude = torch.randint(1, 5, shape, generator=g)
        return (magnitude * (1 - 2 * torch.randint(0, 2, shape, generator=g))).to(dtype)
    out = torch.randn(shape, generator=g).to(dtype)
    if kind == "normal":
        return out
    info = torch.finfo(dtype)
    pool = {
        "extreme": [info.max, -info.max, info.tiny, -info.smallest_normal / 4, 3 * info.smallest_normal / 8, -0.0, 1.0],
        "special": [float("nan"), float("inf"), -float("inf"), 1.0],
    }[kind]
    picks = torch.tensor(pool, dtype=torch.float64).to(dtype)[torch.randint(0, len(pool), shape, generator=g)]
    # Few enough that not every sum of the result holds one.
    rare = torch.rand(shape, generator=g) < 0.02
    return torch.where(rare, picks, out)


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The same contents with other strides; what lies between is NaN, or -1 for integers."""
    if layout == "contiguous" or t.dim() == 0:
        return t.contiguous()
    if layout == "transposed":
        return t.transpose(-1, 0).contiguous().transpose(-1, 0)
    *lead, last = t.shape
    filler = float("nan") if t.is_floating_point() else -1
    if layout == "strided":
        wide = t.new_full((*lead, 2 * last), filler)
        view = wide[..., ::2]
    else:  # at an odd offset inside of larger rows
        wide = t.new_full((*lead, last + 5), filler)
        view = wide[..., 3 : 3 + last]
    view.copy_(t)
    return view
