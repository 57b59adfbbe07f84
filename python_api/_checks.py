"""Argument checks of all families, for references and fakes: none looks at the contents of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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
