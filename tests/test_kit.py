"""The error model can fail, and fails where it should; and so do the checks of every call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from effk import _registry

from .kit import tensors
from .kit.backends import Backend
from .kit.errors import ACTIVATIONS, FLUSH, GATES, Bounded, matmul, matmul_of
from .kit.tensors import generator

UNIT = 2.0**-24


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_torch_is_within_the_bound(dtype: torch.dtype, activation: str) -> None:
    """A float32 product rounded once."""
    x, w, bias, scale = (
        normal(5, 300, dtype=dtype),
        normal(40, 300, dtype=dtype, seed=1),
        normal(40),
        normal(40, seed=2),
    )
    y = ACTIVATIONS[activation][0]((x.float() @ w.float().T) * scale + bias)
    matmul(x, w, UNIT).times(scale).plus(bias).activated(activation).assert_holds(y.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_two_roundings_too_many_are_seen(dtype: torch.dtype) -> None:
    """Neighbours of a correctly rounded result of one product are out."""
    x, w = normal(1, 1, dtype=dtype).abs(), normal(1, 1, dtype=dtype, seed=1).abs()
    exact = matmul(x, w, UNIT)
    y = (x.double() @ w.double().T).to(dtype)
    exact.assert_holds(y)
    bits = {2: torch.int16, 4: torch.int32}[y.element_size()]
    with pytest.raises(AssertionError, match="out of bounds"):
        exact.assert_holds((y.view(bits) + 3).view(dtype))


def test_sums_in_half_precision_are_seen() -> None:
    x, w = normal(4, 512, dtype=torch.float16), normal(64, 512, dtype=torch.float16, seed=1)
    y = torch.zeros(4, 64, dtype=torch.float16)
    for k in range(512):
        y += x[:, k, None] * w[None, :, k]
    with pytest.raises(AssertionError, match="out of bounds"):
        matmul(x, w, UNIT).assert_holds(y)


def test_tf32_is_seen() -> None:
    x, w = normal(4, 512), normal(64, 512, seed=1)
    cut = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    with pytest.raises(AssertionError, match="out of bounds"):
        matmul(x, w, UNIT).assert_holds(cut @ w.T)


@pytest.mark.parametrize("wrong", [0.0, float("inf"), -float("inf")])
def test_nan_must_be_nan(wrong: float) -> None:
    w = torch.tensor([[float("nan")]])
    exact = matmul(torch.ones(1, 1), w, UNIT)
    exact.assert_holds(torch.tensor([[float("nan")]]))
    with pytest.raises(AssertionError, match="out of bounds"):
        exact.assert_holds(torch.tensor([[wrong]]))


@pytest.mark.parametrize("wrong", [0.0, float("nan"), -float("inf"), torch.finfo(torch.float32).max])
def test_infinity_must_be_infinity(wrong: float) -> None:
    exact = matmul(torch.ones(1, 2), torch.tensor([[float("inf"), 1.0]]), UNIT)
    exact.assert_holds(torch.tensor([[float("inf")]]))
    with pytest.raises(AssertionError, match="out of bounds"):
        exact.assert_holds(torch.tensor([[wrong]]))


def test_finite_must_be_finite() -> None:
    with pytest.raises(AssertionError, match="out of bounds"):
        matmul(torch.ones(1, 1), torch.ones(1, 1), UNIT).assert_holds(torch.tensor([[float("nan")]]))


def test_shape_must_agree() -> None:
    with pytest.raises(AssertionError, match="shape"):
        matmul(torch.ones(1, 2), torch.ones(3, 2), UNIT).assert_holds(torch.full((3,), 2.0))


def test_rounds_to_infinity_in_half_precision() -> None:
    exact = Bounded(torch.tensor([65519.0, 65521.0]).double(), torch.tensor([0.5, 0.5]), torch.ones(2), UNIT)
    exact.assert_holds(torch.tensor([65504.0, float("inf")], dtype=torch.float16))
    with pytest.raises(AssertionError, match="out of bounds"):
        exact.assert_holds(torch.tensor([65504.0, 65504.0], dtype=torch.float16))


def test_flush_is_for_bfloat16_alone() -> None:
    tiny = torch.tensor([[FLUSH / 2]])
    with pytest.raises(AssertionError, match="out of bounds"):
        matmul(torch.ones(1, 1), tiny, UNIT).assert_holds(torch.zeros(1, 1))
    matmul(torch.ones(1, 1).bfloat16(), tiny.bfloat16(), UNIT).assert_holds(torch.zeros(1, 1).bfloat16())


def test_stored_weights_alone_are_counted() -> None:
    w = torch.zeros(1, 1000)
    w[0, 0] = 1
    assert float(matmul(torch.ones(1, 1000), w, UNIT).error) < 2 * UNIT


# Chains of products ---------------------------------------------------------------------------------------------------

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def gated(gate: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
    function = GATES[name]
    return gate.relu().square() if function is None else ACTIVATIONS[function][0](gate) * up


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_torch_is_within_the_bound_of_a_chain(dtype: torch.dtype, name: str) -> None:
    """Two products with a gated activation between them; and out of it if that isn't rounded, where that shows."""
    x, gate, up, down = (
        normal(9, 100, dtype=dtype),
        normal(31, 100, dtype=dtype, seed=1),
        normal(31, 100, dtype=dtype, seed=2),
        normal(20, 31, dtype=dtype, seed=3),
    )
    h = gated(x.float() @ gate.float().T, x.float() @ up.float().T, name)
    exact = matmul(x, gate, UNIT).gated(matmul(x, up, UNIT), name)
    exact.assert_holds(h)
    chain = matmul_of(exact.stored(dtype), down, dtype)
    chain.assert_holds(h.to(dtype).float() @ down.float().T)
    if dtype != torch.float32:
        with pytest.raises(AssertionError, match="out of bounds"):
            chain.assert_holds(h @ down.float().T)


def bounded(value: float, error: float = 0.0) -> Bounded:
    finite = abs(value) if math.isfinite(value) else 0.0
    return Bounded(*(torch.tensor([v], dtype=torch.float64) for v in (value, error, finite)), UNIT)


@pytest.mark.parametrize("value, error, low, high", [(1.0, 2**-10, 1.0, 1.0), (1 + 2**-8, 2**-10, 1.0, 1 + 2**-7)])
def test_stored_is_one_number_or_its_neighbour(value: float, error: float, low: float, high: float) -> None:
    """Which of them, only where the bound holds the middle between two."""
    exact = bounded(value, error).stored(torch.bfloat16)
    assert float(exact.value - exact.error) == low and float(exact.value + exact.error) == high


def test_stored_beyond_the_largest_number() -> None:
    assert bounded(7e4, 1.0).stored(torch.float16).value.isinf().all()
    unsure = bounded(65520.0, 1.0).stored(torch.float16)  # the middle between the largest number and infinity
    unsure.assert_holds(torch.tensor([torch.nan]))
    certain = bounded(65500.0, 1.0).stored(torch.float16)
    with pytest.raises(AssertionError, match="out of bounds"):
        certain.assert_holds(torch.tensor([torch.inf]))


def test_infinity_times_what_may_be_zero_may_be_anything() -> None:
    for other in (bounded(1e-9, 1e-8), bounded(-1e-9, 1e-8)):
        for product in (other.by(bounded(torch.inf)), bounded(-torch.inf).by(other)):
            product.assert_holds(torch.tensor([torch.nan]))
    product = bounded(1e-7, 1e-8).by(bounded(torch.inf))
    product.assert_holds(torch.tensor([torch.inf]))
    with pytest.raises(AssertionError, match="out of bounds"):
        product.assert_holds(torch.tensor([torch.nan]))
    weight = torch.tensor([[torch.inf]])
    for value, error, sure in ((1e-9, 1e-8, False), (1.0, 1e-8, True), (0.0, 0.0, True)):
        x = bounded(value, error)
        x = Bounded(x.value[None], x.error[None], x.peak[None], UNIT)
        wrong = torch.tensor([[-3.0]])
        if sure:
            with pytest.raises(AssertionError, match="out of bounds"):
                matmul_of(x, weight, torch.float32).assert_holds(wrong)
        else:
            matmul_of(x, weight, torch.float32).assert_holds(wrong)


def test_errors_of_both_factors_count() -> None:
    a, b = bounded(3.0, 0.5), bounded(-5.0, 0.25)
    for x, y in ((3.5, -5.25), (2.5, -4.75), (3.5, -4.75)):
        a.by(b).assert_holds(torch.tensor([x * y]))
    with pytest.raises(AssertionError, match="out of bounds"):
        a.by(b).assert_holds(torch.tensor([-3.5 * 5.25 - 0.01]))


# The checks of every call, by back ends that are broken on purpose ---------------------------------------------------


def rows_of_wider_ones() -> torch.Tensor:
    """[3, 4], with 5 numbers before, between and after them."""
    return tensors.lay_out(normal(3, 4), "offset")


def merge_on(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Any]) -> Any:
    monkeypatch.setitem(_registry.EXTRA_BACKENDS, "broken", {"lora_merge_": kernel})
    w, base = rows_of_wider_ones(), rows_of_wider_ones()
    pairs = (torch.tensor([0]), torch.ones(1))
    kept = [t.clone() for t in (tensors.whole(w), tensors.whole(base))]
    try:
        return Backend("broken").run("lora_merge_", [w], [normal(1, 2, 4)], [normal(1, 3, 2)], *pairs, [base])
    finally:
        assert all(map(torch.equal, kept, (tensors.whole(w), tensors.whole(base))))  # the kernel had copies


def test_written_tensors_are_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(w: list[torch.Tensor], *rest: object) -> None:
        w[0].fill_(7)

    (w,) = merge_on(monkeypatch, kernel)
    assert w.shape == (3, 4) and w.stride() == (9, 1) and bool((w == 7).all())
    reference = _registry.find("lora_merge_").reference
    assert merge_on(monkeypatch, reference)[0].isfinite().all()


@pytest.mark.parametrize("at", [2, 7, 11, 25])
def test_writes_around_what_is_written_are_seen(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Before the first row, right behind it, right before the second, and behind the last."""

    def kernel(w: list[torch.Tensor], *rest: object) -> None:
        w[0].as_strided((27,), (1,), 0)[at] = 1

    with pytest.raises(AssertionError, match="changed an input, or what lies around it"):
        merge_on(monkeypatch, kernel)


@pytest.mark.parametrize("argument", range(1, 6))
def test_writes_to_inputs_are_seen(monkeypatch: pytest.MonkeyPatch, argument: int) -> None:
    """Of one bit."""

    def kernel(*args: Any) -> None:
        wrong = next(tensors.tensors_in(args[argument]))
        tensors.whole(wrong)[wrong.storage_offset() * wrong.element_size()] ^= 1

    with pytest.raises(AssertionError, match="changed an input"):
        merge_on(monkeypatch, kernel)


def test_a_result_that_the_schema_lacks_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="schema"):
        merge_on(monkeypatch, lambda w, *rest: w)


def test_an_alias_of_an_input_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_registry.EXTRA_BACKENDS, "broken", {"lora_apply": lambda *args, **kwargs: args[5][1:]})
    ids = torch.zeros(3, 1, dtype=torch.int64)
    args = (normal(3, 4), normal(1, 2, 4), normal(1, 3, 2), ids, torch.ones(3, 1), normal(3, 3))
    with pytest.raises(AssertionError, match="alias"):
        Backend("broken").run("lora_apply", *args)


def test_copies_share_what_their_originals_share() -> None:
    buffer = normal(20)
    one, two, other = tensors.to_device([buffer[2:10].view(2, 4), buffer[9:12], normal(3)], "cpu")
    assert torch.equal(one, buffer[2:10].view(2, 4)) and one.storage_offset() == 2
    two[0] = 5
    assert one[1, 3] == 5 and buffer[9] != 5
    assert tensors.share_memory(one, two) and not tensors.share_memory(one, other)
