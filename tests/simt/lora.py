"""lora on the emulated device. As csrc/lora/lora.cu: it checks, chooses and launches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from effk.lora import reference
from torch import Tensor

from . import Device, module, number_of_type

# Of devices that there might be: blocks that take all tiles, some of them, and one each.
NUM_SMS = (1, 3, 132)
# Of shared memory that a block may have: bytes of sm_86, sm_80 and sm_90.
MOST_SHARED = (99 << 10, 163 << 10, 227 << 10)
# Of lora_apply's launches: blocks that take several items, and one each.
MOST_BLOCKS = (3, 1 << 20)

Pairs = tuple[str, Tensor, Tensor, float]  # name, ids, gates, sign


def _indices(device: Device, name: str, t: Tensor | None) -> tuple[int, bool]:
    return (0, False) if t is None else (device.input(name, t.contiguous()), t.dtype == torch.int64)


def _check(
    op: str,
    w: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    lists: reference.Lists,
    base: Sequence[Tensor] | None,
    ranks: Tensor | None,
) -> None:
    reference.check_merge(op, w, a, b, lists, base, ranks)
    reference.check_disjoint(op, w, {"a": a, "b": b, "base": base})


def _merge(
    w: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    lists: list[Pairs],
    base: Sequence[Tensor] | None,
    ranks: Tensor | None,
    scale: float,
) -> None:
    if len(w) == 0:
        return
    with Device() as device:
        layers = []
        for i, t in enumerate(w):
            # With a base, nobody may read w before it is written; but what lies between its rows stays as it is.
            to = device.output if base is not None and t.is_contiguous() else device.inout
            source = None if base is None else base[i]
            addresses = (
                to(f"w[{i}]", t),
                device.input(f"base[{i}]", source),
                device.input(f"a[{i}]", a[i]),
                device.input(f"b[{i}]", b[i]),
            )
            strides = t.stride(0), 0 if source is None else source.stride(0)
            layers.append((*addresses, *t.shape, a[i].shape[1], *strides))
        pairs = [
            (_indices(device, f"{name}ids", ids), device.input(f"{name}gates", gates.contiguous()), ids.shape[0], sign)
            for name, ids, gates, sign in lists
        ]
        sizes = a[0].shape[0], max(t.shape[1] for t in a)
        drawn = sum(t.shape[0] + t.shape[1] for t in w)
        num_sms = NUM_SMS[drawn % len(NUM_SMS)]
        most_shared = MOST_SHARED[drawn // len(NUM_SMS) % len(MOST_SHARED)]
        how = _indices(device, "ranks", ranks), scale, *sizes, num_sms, most_shared
        module().lora_merge(number_of_type(w[0]), layers, pairs, *how)


def lora_merge_(
    w: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ids: Tensor,
    gates: Tensor,
    base: Sequence[Tensor] | None = None,
    ranks: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> None:
    _check("lora_merge_", w, a, b, {"": (ids, gates)}, base, ranks)
    _merge(w, a, b, [("", ids, gates, 1)], base, ranks, scale)


def lora_unmerge_(
    w: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ids: Tensor,
    gates: Tensor,
    base: Sequence[Tensor] | None = None,
    ranks: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> None:
    _check("lora_unmerge_", w, a, b, {"": (ids, gates)}, base, ranks)
    _merge(w, a, b, [("", ids, gates, -1)] if base is None else [], base, ranks, scale)


def lora_switch_(
    w: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    old_ids: Tensor,
    old_gates: Tensor,
    new_ids: Tensor,
    new_gates: Tensor,
    base: Sequence[Tensor] | None = None,
    ranks: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> None:
    _check("lora_switch_", w, a, b, {"old_": (old_ids, old_gates), "new_": (new_ids, new_gates)}, base, ranks)
    old: list[Pairs] = [("old_", old_ids, old_gates, -1)] if base is None else []
    _merge(w, a, b, [*old, ("new_", new_ids, new_gates, 1)], base, ranks, scale)


def lora_apply(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    ids: Tensor,
    gates: Tensor,
    y: Tensor | None = None,
    ranks: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    reference.check_apply(x, a, b, ids, gates, y, ranks)
    tokens, rows = math.prod(x.shape[:-1]), b.shape[1]

    def as_rows(t: Tensor, last: int) -> Tensor:
        flat = t.reshape(tokens, last)
        return flat if last <= 1 or flat.stride(1) == 1 else flat.contiguous()

    out = x.new_empty(*x.shape[:-1], rows)
    flat = as_rows(x, x.shape[-1])
    flat_y = None if y is None else as_rows(y, rows)
    with Device() as device:
        source = tokens, (*a.shape, rows), device.input("x", flat), flat.stride(0)
        adapters = device.input("a", a), device.input("b", b)
        pairs = _indices(device, "ids", ids), device.input("gates", gates.contiguous()), ids.shape[-1]
        to = device.input("y_in", flat_y), 0 if flat_y is None else flat_y.stride(0), device.output("y", out)
        how = _indices(device, "ranks", ranks), scale
        most_blocks = MOST_BLOCKS[(rows + x.shape[-1]) % len(MOST_BLOCKS)]
        module().lora_apply(number_of_type(x), *source, *adapters, *pairs, *how, *to, most_blocks)
    return out


OPS = {
    "lora_merge_": lora_merge_,
    "lora_unmerge_": lora_unmerge_,
    "lora_switch_": lora_switch_,
    "lora_apply": lora_apply,
}
