"""Gradients of lora_apply against autograd of the dense formula in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from ..kit import tensors
from ..kit.backends import device_params
from ..kit.errors import UNDERFLOW, Bounded, matmul, roundings
from .strategies import FLOATS, Apply, applies, dense_apply

UNIT = 2**-23 if torch.cuda.is_available() else 2**-24
NAMES = ("x", "a", "b", "gates", "y")

every_device = pytest.mark.parametrize("device", device_params())


def inputs_of(case: Apply, device: str) -> dict[str, Tensor]:
    """x, a, b, gates and, if there, y."""
    given = {name: getattr(case, name) for name in NAMES}
    return {k: tensors.to_device(t, device).requires_grad_() for k, t in given.items() if t is not None}


def apply(case: Apply, inputs: dict[str, Tensor], function: Any = torch.ops.effk.lora_apply) -> Tensor:
    """lora_apply as a function of those of its inputs that have gradients."""
    x, ranks = inputs["x"], case.ranks_tensor
    ids = tensors.to_device(case.ids, x.device.type)
    ranks = None if ranks is None else ranks.to(x.device)
    rest = (ids, inputs["gates"], inputs.get("y"), ranks)
    return function(x, inputs["a"], inputs["b"], *rest, scale=case.scale)


def exact_gradients(case: Apply, grad: Tensor) -> dict[str, Bounded]:
    """By the dense formula, with what the backward of lora_apply may lose in float32.

    inner = a x and h = b^T grad are products with errors of their own. Then
    - of x: sum over an adapter's ranks of factor * h * a; of a: over tokens of factor * h * x; of b: over tokens of
      factor * inner * grad: each term is rounded twice and goes through at most one addition for each;
    - of a gate: scale * sum over ranks of inner * h, where scale may be rounded to float32 before;
    - of y: grad itself.
    """
    tokens, x = case.tokens, case.x.reshape(case.tokens, case.cols).float()
    g = grad.reshape(tokens, case.rows).float()
    factor = case.factor()
    of_x, x_size, x_error = (torch.zeros(tokens, case.cols, dtype=torch.float64) for _ in range(3))
    of_a = Bounded(*(torch.zeros(case.a.shape, dtype=torch.float64) for _ in range(3)), UNIT)
    of_b = Bounded(*(torch.zeros(case.b.shape, dtype=torch.float64) for _ in range(3)), UNIT)
    of_gate = Bounded(
        *(torch.zeros(tokens, case.adapters + 1, dtype=torch.float64) for _ in range(3)), UNIT
    )  # -1: last
    terms = torch.zeros(tokens, 1, dtype=torch.float64)
    for e, r in enumerate(case.used):
        a, b, f = case.a[e, :r].float(), case.b[e, :, :r].float(), factor[:, e, None]
        inner, h = matmul(x, a, UNIT), matmul(g, b.T, UNIT)
        inner_size, h_size = inner.value.abs() + inner.error, h.value.abs() + h.error
        lost = UNDERFLOW * (1 + f.abs())

        of_x += (f * h.value) @ a.double()
        x_size += (f.abs() * h_size) @ a.double().abs()
        x_error += (f.abs() * h.error + lost) @ a.double().abs() + r * lost
        terms += r * (f != 0)

        of_a.value[e, :r] = (f * h.value).T @ x.double()
        size = (f.abs() * h_size).T @ x.double().abs()
        of_a.error[e, :r] = (f.abs() * h.error + lost).T @ x.double().abs() + roundings(tokens + 2, UNIT) * size
        of_a.error[e, :r] += lost.sum()

        of_b.value[e, :, :r] = g.double().T @ (f * inner.value)
        size = g.double().abs().T @ (f.abs() * inner_size)
        of_b.error[e, :, :r] = g.double().abs().T @ (f.abs() * inner.error + lost) + roundings(tokens + 2, UNIT) * size
        of_b.error[e, :, :r] += lost.sum()

        scale = abs(case.scale)
        of_gate.value[:, e] = case.scale * (inner.value * h.value).sum(1)
        moved = inner_size * h_size - inner.value.abs() * h.value.abs()
        of_gate.error[:, e] = scale * (moved + roundings(r + 3, UNIT) * inner_size * h_size + 2 * UNDERFLOW).sum(1)
    peak = torch.zeros(())  # nothing is extreme here
    error = x_error + roundings(terms + 2, UNIT) * x_size
    ids = torch.where(case.ids < 0, case.adapters, case.ids).reshape(tokens, case.pairs).long()
    found = {
        "x": Bounded(of_x, error, peak, UNIT),
        "a": of_a,
        "b": of_b,
        "gates": Bounded(of_gate.value.gather(1, ids), of_gate.error.gather(1, ids), peak, UNIT),
    }
    if case.with_y:
        found["y"] = Bounded(g.double(), torch.zeros(()), peak, UNIT)
    return found


def check_gradients(case: Apply, device: str) -> None:
    inputs = inputs_of(case, device)
    out = apply(case, inputs)
    # Not contiguous, as gradients may come from above.
    grad = tensors.lay_out(tensors.values(tuple(out.shape), case.dtype, "normal", case.seed), "strided")
    got = torch.autograd.grad(out, list(inputs.values()), tensors.to_device(grad, device))
    wanted = exact_gradients(case, grad)
    for (name, of), result in zip(inputs.items(), got, strict=True):
        assert result.shape == of.shape and result.dtype == of.dtype, name
        exact = wanted[name]
        exact.assert_holds(result.reshape(exact.value.shape).cpu(), f"gradient of {name}")


@every_device
def test_gradients_are_those_of_the_dense_formula(device: str) -> None:
    """Of adapters that come twice or not at all, gates of 0, -1, and ranks beyond those used."""
    settings(max_examples=200)(given(case=applies(kinds=("normal",)))(check_gradients))(device=device)


def case_of(**options: Any) -> Apply:
    """Each token has an adapter twice, one alone and a -1; small integers, so that float32 is exact."""
    case = Apply(5, 6, 3, **{"kind": "integers", "lead": (2,), "pairs": 4, "with_y": True, "scale": 0.5} | options)
    case.ids.copy_(torch.tensor([[1, 0, 1, -1], [2, -1, 0, 2]]))
    case.gates.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0], [-1.0, 2.0, -2.0, -1.0]]))
    return case


def test_the_formula_itself() -> None:
    """exact_gradients against autograd through dense_apply."""
    for ranks in (None, (3, 0, 2)):
        case = case_of(ranks=ranks, kind="normal")
        inputs = {k: t.detach().double().requires_grad_() for k, t in inputs_of(case, "cpu").items()}
        grad = tensors.values((2, 5), torch.float64, "integers", 1)
        got = torch.autograd.grad(apply(case, inputs, dense_apply), list(inputs.values()), grad)
        for (name, exact), result in zip(exact_gradients(case, grad).items(), got, strict=True):
            torch.testing.assert_close(result.reshape(exact.value.shape), exact.value, rtol=1e-12, atol=1e-12, msg=name)


def checked(check: Any, case: Apply, device: str, **options: Any) -> None:
    """The op is linear in each of its inputs, so differences over steps of 1 are exact."""
    inputs = inputs_of(case, device)

    def function(*values: Tensor) -> Tensor:
        return apply(case, dict(zip(inputs, values, strict=True)))

    with pytest.warns(UserWarning, match="not a double precision"):  # true, and harmless here
        assert check(function, list(inputs.values()), eps=1.0, atol=0, rtol=0, **options)


@every_device
@pytest.mark.parametrize("ranks", [None, (3, 0, 2)], ids=["all", "ranks"])
@pytest.mark.parametrize("with_y", [False, True])
def test_gradcheck_is_exact(device: str, with_y: bool, ranks: tuple[int, ...] | None) -> None:
    checked(torch.autograd.gradcheck, case_of(with_y=with_y, ranks=ranks), device)


@every_device
def test_gradgradcheck_is_exact(device: str) -> None:
    grad = tensors.values((2, 5), torch.float32, "integers", 5).to(device).requires_grad_()
    checked(torch.autograd.gradgradcheck, case_of(), device, grad_outputs=[grad])


@every_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_without_the_others(device: str, wanted: str, dtype: torch.dtype) -> None:
    """The same bits as of all."""
    case = case_of(dtype=dtype, kind="normal")
    all_of = inputs_of(case, device)
    grad = torch.ones(2, 5, dtype=dtype, device=device)
    one = {name: t.detach().requires_grad_(name == wanted) for name, t in all_of.items()}
    (alone,) = torch.autograd.grad(apply(case, one), one[wanted], grad)
    together = torch.autograd.grad(apply(case, all_of), list(all_of.values()), grad)
    assert tensors.same_bits(alone, together[list(all_of).index(wanted)])


@every_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_no_token_has_leaks_no_nan(device: str, dtype: torch.dtype) -> None:
    """Of an adapter without tokens, and of ranks beyond those used; their own gradients are 0."""
    case = replace(case_of(dtype=dtype, kind="normal", ranks=(3, 2, 3)), adapters=3)
    case.ids.copy_(torch.tensor([[1, 0, 1, -1], [1, -1, 0, 0]]))
    clean = inputs_of(case, device)
    spoiled = {name: t.detach().clone() for name, t in clean.items()}
    for e, r in ((2, 0), (1, 2)):
        spoiled["a"][e, r:] = torch.nan
        spoiled["b"][e, :, r:] = torch.nan
    spoiled = {name: t.requires_grad_() for name, t in spoiled.items()}
    grad = torch.ones(2, 5, dtype=dtype, device=device)
    wanted = torch.autograd.grad(apply(case, clean), list(clean.values()), grad)
    for name, a, b in zip(
        clean, torch.autograd.grad(apply(case, spoiled), list(spoiled.values()), grad), wanted, strict=True
    ):
        assert tensors.same_bits(a, b), name
        assert name not in ("a", "b") or not bool(a[2].any())


@every_device
@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_the_gradient_of_a_gate_is_its_tokens_own(device: str, gate: float) -> None:
    """Of a gate of 0 too, from which it could move; whether other tokens have the adapter doesn't matter."""
    case = case_of(ranks=(3, 2, 3))
    case.gates[0, 0] = gate
    case.gates[0, 2] = 0
    inputs = inputs_of(case, device)
    (wanted,) = torch.autograd.grad(apply(case, inputs, dense_apply).sum(), inputs["gates"])
    (got,) = torch.autograd.grad(apply(case, inputs).sum(), inputs["gates"])
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("adapters", [0, 3])
def test_nothing_to_do(adapters: int) -> None:
    """No tokens, outputs, columns, ranks, pairs or adapters."""
    whole = Apply(5, 6, 3, adapters, (2,), 2, with_y=True, none=1.0 if adapters == 0 else 0.2)
    for changed in ({}, {"lead": (0,)}, {"rows": 0}, {"cols": 0}, {"rank": 0}, {"pairs": 0}, {"lead": ()}):
        check_gradients(replace(whole, **changed), "cpu")


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled(dynamic: bool) -> None:
    """The same gradients, to the bit."""
    torch._dynamo.reset()
    case = case_of(kind="normal", ranks=(3, 1, 2))

    def function(*values: Tensor) -> Tensor:
        x, a, b, gates, y = values
        return torch.ops.effk.lora_apply(x * 2, a, b, case.ids, gates, y, case.ranks_tensor, scale=0.5).square()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    inputs = list(inputs_of(case, "cpu").values())
    gradients = [torch.autograd.grad(f(*inputs).sum(), inputs) for f in (compiled, function)]
    assert all(map(tensors.same_bits, *gradients))


def test_padding_tokens_leak_no_nan() -> None:
    """They have no adapters, and anything in them."""
    x = torch.randn(3, 4)
    x[1] = math.nan
    a, b = torch.randn(2, 2, 4, requires_grad=True), torch.randn(2, 3, 2, requires_grad=True)
    ids = torch.tensor([[0], [-1], [1]])
    y = torch.ops.effk.lora_apply(x, a, b, ids, torch.ones(3, 1))
    grad = torch.randn(3, 3)
    grad[1] = math.nan
    y.backward(grad)
    kept = [0, 2]
    for leaf in (a, b):
        assert leaf.grad is not None and leaf.grad.isfinite().all()
    again = [t.detach().requires_grad_() for t in (a, b)]
    torch.ops.effk.lora_apply(x[kept], *again, ids[kept], torch.ones(2, 1)).backward(grad[kept])
    for leaf, other in zip((a, b), again, strict=True):
        assert leaf.grad is not None and other.grad is not None
        torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.parametrize("op", ["lora_merge_", "lora_unmerge_", "lora_switch_"])
def test_autograd_notices_that_a_weight_was_overwritten(op: str) -> None:
    """What it saved for a backward pass isn't there any more."""
    w = torch.randn(3, 4, requires_grad=True)
    x = torch.randn(2, 4, requires_grad=True)
    y = x @ w.T
    pairs = (torch.tensor([0]), torch.ones(1)) * (2 if op == "lora_switch_" else 1)
    before = w._version
    getattr(torch.ops.effk, op)([w], [torch.randn(1, 2, 4)], [torch.randn(1, 3, 2)], *pairs)
    assert w._version == before + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
