"""Argument checks of all families, for references and fakes: none but the last looks at the contents of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INDICES = (torch.int32, torch.int64)
MAX_SIDE = 2**30  # of a tensor: bounds what sizes can multiply to


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...] | None = None,
    like: Tensor | None = None,
) -> None:
    """dtype, shape (None matches every size) and device."""
    torch._check(
        tensor.dtype in dtypes,
        lambda: f"effk::{op}: {name} has dtype {tensor.dtype}; wanted {', '.join(map(str, dtypes))}",
    )
    if shape is not None:
        torch._check(
            tensor.dim() == len(shape)
            and all(want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)),
            lambda: (
                f"effk::{op}: {name} has shape {list(tensor.shape)}; "
                f"wanted [{', '.join('*' if s is None else str(s) for s in shape)}]"
            ),
        )
    if like is not None:
        torch._check(
            tensor.device == like.device, lambda: f"effk::{op}: {name} is on {tensor.device}; wanted {like.device}"
        )


def within(size: int, limit: int) -> bool:
    """Sizes that torch.export leaves open pass, since they would get limits of their own: the op checks them."""
    return not isinstance(size, int) or size <= limit


def check_sides(op: str, name: str, t: Tensor) -> None:
    torch._check(
        all(within(size, MAX_SIDE) for size in t.shape),
        lambda: f"effk::{op}: {name} has shape {list(t.shape)}; wanted at most 2^30 each way",
    )


def check_choice(op: str, name: str, value: str, choices: object) -> None:
    names = [str(c) for c in choices]  # type: ignore[attr-defined]
    torch._check(value in names, lambda: f"effk::{op}: {name} is {value!r}; wanted one of {', '.join(names)}")


def check_range(op: str, name: str, t: Tensor, least: int, most: int) -> None:
    wrong = t[(t < least) | (t > most)]
    if wrong.numel() > 0:
        raise RuntimeError(f"effk::{op}: {name} holds {int(wrong[0])}; wanted {least} to {most}")
