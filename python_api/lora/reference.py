"""lora written for reading: what every back end must compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import FLOATS, check_tensor

MAX_PAIRS = 1024  # of an adapter's number and its gate, in one list
MAX_SIDE = 2**30  # bounds what the sizes of a tensor can multiply to
INDICES = (torch.int32, torch.int64)

# ids and gates of a merge by the prefix of their names: "" alone, or "old_" and "new_".
Lists = dict[str, tuple[Tensor, Tensor]]

# --- Checks that need no look at the contents ------------------------------------------------------------------------


def check_pairs(op: str, ids_name: str, ids: Tensor, gates_name: str, gates: Tensor) -> None:
    """Adapters' numbers and gates: [k], or [..., k] for tokens."""
    check_tensor(op, ids_name, ids, INDICES)
    torch._check(
        ids.dim() >= 1 and ids.shape[-1] <= MAX_PAIRS,
        lambda: f"effk::{op}: {ids_name} has shape {list(ids.shape)}; wanted at most {MAX_PAIRS} pairs",
    )
    check_tensor(op, gates_name, gates, (torch.float32,), tuple(ids.shape), ids)


def check_adapters(op: str, a_name: str, a: Tensor, b_name: str, b: Tensor, like: Tensor, rows: int, cols: int) -> None:
    """a [E, R, K] and b [E, N, R]."""
    check_tensor(op, a_name, a, (like.dtype,), (None, None, cols), like)
    check_tensor(op, b_name, b, (like.dtype,), (a.shape[0], rows, a.shape[1]), like)
    torch._check(
        a.shape[0] <= MAX_SIDE and a.shape[1] <= MAX_SIDE,
        lambda: f"effk::{op}: {a_name} has shape {list(a.shape)}; wanted at most 2^30 adapters and ranks",
    )
    for name, tensor in ((a_name, a), (b_name, b)):
        torch._check(tensor.is_contiguous(), lambda name=name: f"effk::{op}: {name} must be contiguous")


def check_ranks(op: str, ranks: Tensor | None, adapters: int, ids: Tensor) -> None:
    if ranks is not None:
        check_tensor(op, "ranks", ranks, INDICES, (adapters,), ids)


def check_weight(op: str, name: str, w: Tensor) -> None:
    check_tensor(op, name, w, FLOATS, (None, None))
    rows, cols = w.shape
    torch._check(
        rows <= MAX_SIDE and cols <= MAX_SIDE,
        lambda: f"effk::{op}: {name} has shape {list(w.shape)}; wanted at most 2^30 rows and columns",
    )
    torch._check(
        (cols <= 1 or w.stride(1) == 1) and (rows <= 1 or w.stride(0) >= cols),
        lambda: f"effk::{op}: {name} has strides {list(w.stride())}; wanted rows that are contiguous and don't overlap",
    )


def check_merge(
    op: str,
    w: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    lists: Lists,
    base: Sequence[Tensor] | None,
    ranks: Tensor | None,
) -> None:
    first = next(iter(lists.values()))[0]
    for prefix, (ids, gates) in lists.items():
        check_tensor(op, f"{prefix}ids", ids, INDICES, (None,))
        check_pairs(op, f"{prefix}ids", ids, f"{prefix}gates", gates)
        check_tensor(op, f"{prefix}ids", ids, INDICES, None, first)
    for name, tensors in (("a", a), ("b", b), *([] if base is None else [("base", base)])):
        torch._check(
            len(tensors) == len(w),
            lambda name=name, tensors=tensors: f"effk::{op}: {name} has {len(tensors)} tensors; wanted w's {len(w)}",
        )
    for i, tensor in enumerate(w):
        check_weight(op, f"w[{i}]", tensor)
        check_tensor(op, f"w[{i}]", tensor, (w[0].dtype,), None, first)
        check_adapters(op, f"a[{i}]", a[i], f"b[{i}]", b[i], tensor, *tensor.shape)
        torch._check(
            a[i].shape[0] == a[0].shape[0],
            lambda i=i: f"effk::{op}: a[{i}] has shape {list(a[i].shape)}; wanted a[0]'s {a[0].shape[0]} adapters",
        )
        if base is not None:
            check_weight(op, f"base[{i}]", base[i])
            check_tensor(op, f"base[{i}]", base[i], (tensor.dtype,), tuple(tensor.shape), tensor)
    if len(w) > 0:
        check_ranks(op, ranks, a[0].shape[0], first)


def check_apply(
    x: Tensor, a: Tensor, b: Tensor, ids: Tensor, gates: Tensor, y: Tensor | None, ranks: Tensor | None
) -> None:
    op = "lora_apply"
    check_tensor(op, "x", x, FLOATS)
    torch._check(x.dim() >= 1, lambda: f"effk::{op}: x has shape []; wanted at least one dimension")
    check_tensor(op, "b", b, (x.dtype,), (None, None, None))
    rows, cols = b.shape[1], x.shape[-1]
    check_adapters(op, "a", a, "b", b, x, rows, cols)
    torch._check(
        rows <= MAX_SIDE and cols <= MAX_SIDE,
        lambda: f"effk::{op}: b and x make a weight of [{rows}, {cols}]; wanted at most 2^30 each way",
    )
    check_pairs(op, "ids", ids, "gates", gates)
    check_tensor(op, "ids", ids, INDICES, (*x.shape[:-1], None), x)
    check_ranks(op, ranks, a.shape[0], ids)
    if y is not None:
        check_tensor(op, "y", y, (x.dtype,), (*x.shape[:-1], rows), x)


# --- Looks at the contents -------------------------------------------------------------------------------------------


def check_disjoint(op: str, w: Sequence[Tensor], others: dict[str, Sequence[Tensor] | Tensor | None]) -> None:
    """No tensor of w shares memory with another one."""

    def extents(name: str, tensors: Sequence[Tensor] | Tensor | None) -> list[tuple[int, int, str]]:
        if isinstance(tensors, Tensor):
            named = [(name, tensors)]
        else:
            named = [(f"{name}[{i}]", t) for i, t in enumerate(tensors or ())]
        found = []
        for each, t in named:
            if t.numel() > 0:
                last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
                found.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size(), each))
        return found

    written = extents("w", w)
    everything = written + [e for name, tensors in others.items() for e in extents(name, tensors)]
    for begin, end, name in written:
        for other_begin, other_end, other in everything:
            if name != other and begin < other_end and other_begin < end:
                raise RuntimeError(f"effk::{op}: {name} and {other} share memory; wanted tensors of their own")


def check_ids(op: str, name: str, ids: Tensor, adapters: int) -> None:
    wrong = (ids < -1) | (ids >= adapters)
    if bool(wrong.any()):
        raise RuntimeError(f"effk::{op}: {name} holds {int(ids[wrong][0])}; wanted -1 to {adapters - 1}")


def check_contents(
    op: str,
    w: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    lists: Lists,
    base: Sequence[Tensor] | None,
    ranks: Tensor | None,
) -> None:
    """Of the lists, and where all tensors are."""
    named = {
        f"{prefix}{name}": t for prefix, pair in lists.items() for name, t in zip(("ids", "gates"), pair, strict=True)
    }
    check_disjoint(op, w, {"a": a, "b": b, "base": base, **named, "ranks": ranks})
    if len(w) > 0:
        for prefix, (ids, _) in lists.items():
            check_ids(op, f"{prefix}ids", ids, a[0].shape[0])


def added(
    base: Sequence[Tensor] | None, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The pairs that make new ones of old ones: added to the base, which has none, or to w, which has the old ones."""
    if base is not None:
        return new
    return torch.cat([old[0].long(), new[0].long()]), torch.cat([-old[1], new[1]])


def used_ranks(op: str, ranks: Tensor | None, adapters: int, rank: int) -> list[int]:
    """How much of the rank each adapter uses."""
    if ranks is None:
        return [rank] * adapters
    used = ranks.tolist()
    for i, r in enumerate(used):
        if not 0 <= r <= rank:
            raise RuntimeError(f"effk::{op}: ranks[{i}] is {r}; wanted 0 to {rank}")
    return used


def factors(ids: Tensor, gates: Tensor, scale: float, adapters: int) -> Tensor:
    """[..., E] float32: the gates of each adapter summed up in float64, times scale. ids and gates are [..., k]."""
    sums = torch.zeros(*ids.shape[:-1], adapters + 1, dtype=torch.float64, device=ids.device)
    at = torch.where(ids < 0, adapters, ids).long()  # -1 adds up beyond the last
    listed = torch.zeros_like(sums, dtype=torch.bool).scatter_(-1, at, True)
    sums = torch.where(listed, sums.scatter_add(-1, at, gates.double()) * scale, 0.0)
    return sums[..., :adapters].float()


# --- The ops ---------------------------------------------------------------------------------------------------------


def merge(
    op: str,
    w: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ids: Tensor,
    gates: Tensor,
    base: Sequence[Tensor] | None,
    ranks: Tensor | None,
    scale: float,
) -> None:
    """w = base + the adapters' updates, or w = w + them."""
    if len(w) == 0:
        return
    adapters = a[0].shape[0]
    ranks_used = used_ranks(op, ranks, adapters, max(t.shape[1] for t in a))
    factor = factors(ids, gates, scale, adapters)
    active = [e for e in range(adapters) if factor[e] != 0 and ranks_used[e] > 0]  # of the others nothing is read
    for i, target in enumerate(w):
        source = target if base is None else base[i]
        if active and a[i].shape[1] > 0:
            total = source.float()
            for e in active:
                r = ranks_used[e]
                total = total + factor[e] * (b[i][e, :, :r].float() @ a[i][e, :r].float())
            target.copy_(total)
        elif base is not None:
            target.copy_(source)


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
    lists = {"": (ids, gates)}
    check_merge("lora_merge_", w, a, b, lists, base, ranks)
    check_contents("lora_merge_", w, a, b, lists, base, ranks)
    merge("lora_merge_", w, a, b, ids, gates, base, ranks, scale)


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
    lists = {"": (ids, gates)}
    check_merge("lora_unmerge_", w, a, b, lists, base, ranks)
    check_contents("lora_unmerge_", w, a, b, lists, base, ranks)
    merge("lora_unmerge_", w, a, b, *added(base, (ids, gates), (ids[:0], gates[:0])), base, ranks, scale)


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
    lists = {"old_": (old_ids, old_gates), "new_": (new_ids, new_gates)}
    check_merge("lora_switch_", w, a, b, lists, base, ranks)
    check_contents("lora_switch_", w, a, b, lists, base, ranks)
    merge("lora_switch_", w, a, b, *added(base, *lists.values()), base, ranks, scale)


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
    check_apply(x, a, b, ids, gates, y, ranks)
    adapters, rank, _ = a.shape
    check_ids("lora_apply", "ids", ids, adapters)
    ranks_used = used_ranks("lora_apply", ranks, adapters, rank)
    factor = factors(ids, gates, scale, adapters)
    total = (
        x.new_zeros((*x.shape[:-1], b.shape[1]), dtype=torch.float32) if y is None else y.to(torch.float32, copy=True)
    )
    for e, r in enumerate(ranks_used):
        update = (x.float() @ a[e, :r].float().T) @ b[e, :, :r].float().T
        f = factor[..., e, None]
        total = torch.where((f != 0) & (r > 0), total + f * update, total)
    return total.to(x.dtype).contiguous()
