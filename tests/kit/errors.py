"""How far from the exact result a float32 computation may be: a running error analysis (Higham, ch. 3).

A `Bounded` holds the exact value in float64 and a bound on |computed - exact| that grows with each operation by what
that operation can lose. Nothing is tuned: each term is a rounding that the kernels are allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FLUSH = 2.0**-126  # smallest normal float32: what flushing to zero can lose
UNDERFLOW = 2.0**-149  # smallest subnormal float32: what rounding a tiny result can lose
OVERFLOW = 2.0**127  # float32 sums of such terms may reach infinity in one order and not in another

# Name -> function, Lipschitz constant (the largest slope, rounded up).
ACTIVATIONS = {
    "none": (lambda v: v, 1.0),
    "relu": (F.relu, 1.0),
    "gelu": (F.gelu, 1.13),
    "gelu_tanh": (lambda v: F.gelu(v, approximate="tanh"), 1.13),
    "silu": (F.silu, 1.10),
}
# Name -> activation of the gates; None: relu(up)^2, without gates.
GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "relu2": None}
# Roundings inside an activation, each relative to at most the magnitude of its argument (1 + erf cancels, so the
# error of a result near zero is relative to the argument, not to the result).
ACTIVATION_ROUNDINGS = 8


def roundings(n: Tensor | float, unit: float) -> Tensor | float:
    """gamma_n: the relative error of n roundings one after the other."""
    return n * unit / (1 - n * unit)


@dataclass
class Bounded:
    """value: exact, float64. error: bound of what float32 may lose. peak: bound of every finite intermediate."""

    value: Tensor
    error: Tensor
    peak: Tensor
    unit: float

    def _rounded(self, value: Tensor, error: Tensor, peak: Tensor) -> Bounded:
        """One more float32 operation: its result is rounded once."""
        return Bounded(value, error + self.unit * (value.abs() + error) + UNDERFLOW, peak, self.unit)

    def times(self, factor: Tensor | None) -> Bounded:
        if factor is None:
            return self
        f = factor.double()
        peak = torch.maximum(self.peak, self.peak * finite_magnitude(f))
        return self._rounded(self.value * f, self.error * f.abs(), peak)

    def plus(self, term: Tensor | None) -> Bounded:
        if term is None:
            return self
        t = term.double()
        return self._rounded(self.value + t, self.error, self.peak + finite_magnitude(t))

    def activated(self, name: str) -> Bounded:
        function, slope = ACTIVATIONS[name]
        error = slope * self.error
        if name not in ("none", "relu"):  # those two are exact
            error = error + ACTIVATION_ROUNDINGS * self.unit * (self.value.abs() + self.error) + UNDERFLOW
        return Bounded(function(self.value), error, self.peak, self.unit)

    def by(self, other: Bounded) -> Bounded:
        """The product of two computed numbers. An infinity times what may or may not be 0 may be anything."""
        a, b = self.value.abs(), other.value.abs()
        error = self.error * b + (a + self.error) * other.error
        peak = torch.maximum(torch.maximum(self.peak, other.peak), self.peak * other.peak)
        unknown = (self.may_vanish() & b.isinf()) | (other.may_vanish() & a.isinf())
        return self._rounded(self.value * other.value, error, torch.where(unknown, torch.inf, peak))

    def gated(self, up: Bounded | None, name: str) -> Bounded:
        """activation(self) * up, or relu(self)^2 for the one without gates."""
        function = GATES[name]
        if function is None:
            positive = self.settled().activated("relu")
            return positive.by(positive)
        assert up is not None
        return self.settled().activated(function).settled().by(up.settled()).settled()

    def settled(self) -> Bounded:
        """Without an error where the value is no finite number, since then it is what it is."""
        return Bounded(self.value, torch.where(self.value.isfinite(), self.error, 0.0), self.peak, self.unit)

    def may_vanish(self) -> Tensor:
        """Whether 0 is within the bound and isn't the exact value for sure."""
        return (self.value.abs() <= self.error) & (self.error > 0)

    def stored(self, dtype: torch.dtype) -> Bounded:
        """Rounded once more, to the type of a tensor. Wherever both ends round to the same number, that is exact."""
        low, high = ((self.value + sign * self.error).float().to(dtype).double() for sign in (-1, 1))
        sure = (low == high) | ~self.value.isfinite()
        ends = low.isfinite() & high.isfinite()
        value = torch.where(sure, torch.where(self.value.isfinite(), low, self.value), (low + high) / 2)
        error = torch.where(sure, 0.0, (high - low) / 2)
        peak = torch.where(sure | ends, self.peak, torch.inf)  # infinite or not: what follows may be anything
        return Bounded(torch.where(sure | ends, value, self.value), error.nan_to_num(0, 0, 0), peak, self.unit)

    def assert_holds(self, y: Tensor, what: str = "") -> None:
        """y is a float32 number within the bound, rounded once to y's dtype.

        NaN and infinities of the exact value must be there. Where finite terms come near the largest float32, the
        sum may overflow in one order and not in another, and anything is accepted.
        """
        assert y.shape == self.value.shape, f"{what}: shape {list(y.shape)}, wanted {list(self.value.shape)}"
        low = (self.value - self.error).float().to(y.dtype)  # rounding is monotone, so the ends round too
        high = (self.value + self.error).float().to(y.dtype)
        finite = self.value.isfinite()
        inside = torch.where(finite, (low <= y) & (y <= high), y.double() == self.value)
        inside |= self.value.isnan() & y.isnan()
        inside |= self.peak >= OVERFLOW
        if not bool(inside.all()):
            at = tuple((~inside).nonzero()[0].tolist())
            raise AssertionError(
                f"{what}: {int((~inside).sum())} of {y.numel()} out of bounds, first at {at}: {y[at].item()!r}, exact "
                f"{self.value[at].item()!r}, wanted {low[at].item()!r} to {high[at].item()!r}"
            )


def finite_magnitude(t: Tensor) -> Tensor:
    return t.double().abs().nan_to_num(0, 0, 0)


def matmul(x: Tensor, w: Tensor, unit: float) -> Bounded:
    """x @ w.T, summed in float32 in any order, with or without fused multiply-add; zeros of w add nothing.

    Args:
        x: [..., K].
        w: [N, K].
        unit: unit roundoff of the sums.


    The terms of the bound:
    - each of the n = nnz(row) products is rounded once and goes through at most n - 1 additions that round, whatever
      the order: n roundings relative to |x| |w|^T;
    - a product or sum that underflows loses at most UNDERFLOW;
    - bfloat16 dot instructions (AVX512_BF16) take subnormal inputs for zero and flush subnormal results: each input
      may lose FLUSH, times its partner, and each result FLUSH.
    """
    x64, w64 = x.double(), w.double()
    nnz = (w64 != 0).sum(-1).double()
    error = roundings(nnz, unit) * (x64.abs() @ w64.abs().T) + nnz * UNDERFLOW
    if torch.bfloat16 in (x.dtype, w.dtype):
        stored = (w64 != 0).double()
        error = error + FLUSH * (x64.abs() @ stored.T + w64.abs().sum(-1) + 2 * nnz)
    return Bounded(x64 @ w64.T, error, finite_magnitude(x) @ finite_magnitude(w).T, unit)


def matmul_of(x: Bounded, w: Tensor | Bounded, dtype: torch.dtype) -> Bounded:
    """x @ w.T as `matmul`, of numbers that are results themselves, held in tensors of dtype."""
    other = w if isinstance(w, Bounded) else Bounded(w.double(), torch.zeros_like(w.double()), finite_magnitude(w), 0)
    terms = x.value.shape[-1]
    x_size, w_size = x.value.abs() + x.error, other.value.abs() + other.error
    moved = x.error @ w_size.T + x_size @ other.error.T
    error = moved + roundings(terms, x.unit) * (x_size @ w_size.T) + terms * UNDERFLOW
    x_zero, w_zero = x.may_vanish(), other.may_vanish()
    if dtype == torch.bfloat16:
        error = error + FLUSH * (x_size.sum(-1, keepdim=True) + w_size.sum(-1) + 2 * terms)
        x_zero, w_zero = x_zero | (x_size < FLUSH) & (x_size > 0), w_zero | (w_size < FLUSH) & (w_size > 0)
    unknown = x_zero.double() @ other.value.isinf().double().T + x.value.isinf().double() @ w_zero.double().T
    unknown += (x.peak >= OVERFLOW).double().sum(-1, keepdim=True) + (other.peak >= OVERFLOW).double().sum(-1)
    peak = (finite_magnitude(x.value) + x.error) @ (finite_magnitude(other.value) + other.error).T
    return Bounded(x.value @ other.value.T, error, torch.where(unknown > 0, torch.inf, peak), x.unit)
