"""A result against its float64 reference."""

from __future__ import annotations

import torch
from torch import Tensor


def rounding(dtype: torch.dtype) -> float:
    """Largest relative error of rounding once to a float type."""
    return torch.finfo(dtype).eps / 2


def difference(result: Tensor, expected: Tensor, bound: Tensor) -> str:
    """ "" where |result - expected| <= bound everywhere (NaN never is), else what is worst and where."""
    if result.shape != expected.shape:
        return f"shape {list(result.shape)}; wanted {list(expected.shape)}"
    error = (result.double() - expected).abs()
    bad = ~(error <= bound)
    if not bad.any():
        return ""
    excess = torch.where(bad, (error - bound).nan_to_num(float("inf")), -1.0)
    at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    return f"{int(bad.sum())} of {bad.numel()} entries are off; at {at} {result[at]:.7g} is not {expected[at]:.7g}"


def inequality(names: tuple[str, ...], results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str:
    """ "" where all tensors are equal bit for bit (dtype and shape too), else the name of the first that isn't."""
    for name, a, b in zip(names, results, expected, strict=True):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
            return f"{name} differs"
    return ""
