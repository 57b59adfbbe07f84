"""Bugs of the kernels before us, each as a test, by the numbers of their issues; and bugs of ours."""

from __future__ import annotations

import math

import pytest
import torch

from ..kit import tensors
from ..kit.backends import Backend, on_backends
from .strategies import FLOATS, Apply, Merge


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_backends("lora_merge_", "lora_unmerge_")
def test_merging_and_unmerging_again_and_again(backend: Backend, dtype: torch.dtype) -> None:
    """LyCORIS#264, trl#6688: each round left its rounding errors in the weight."""
    case = Merge(((17, 33, 4),), pairs=((0, 0.7), (2, -1.3)), dtype=dtype)
    w, once = case.w, case.merge(backend)
    for _ in range(3 if backend.slow else 20):
        w = case.merge(backend, w)
        assert tensors.same_bits(w[0], once[0])
        w = case.unmerge(backend, w)
        assert tensors.same_bits(w[0], case.base[0])


@on_backends("lora_merge_", "lora_apply")
def test_small_and_mixed_ranks(backend: Backend) -> None:
    """punica#17, lorax#241: ranks below 8, odd ones, and different ones in a batch."""
    for ranks in ((1, 3, 5), (2, 16, 7), (0, 1, 16)):
        apply = Apply(33, 40, 16, lead=(7,), pairs=3, ranks=ranks, none=0.0, dtype=torch.bfloat16)
        apply.exact(backend.unit).assert_holds(apply.run(backend))
        pairs = ((0, 0.7), (1, -1.3), (2, 1.0))
        merge = Merge(((33, 40, 16), (16, 9, 3), (20, 17, 1)), pairs=pairs, ranks=ranks, dtype=torch.bfloat16)
        for exact, w in zip(merge.exact(backend.unit), merge.merge(backend), strict=True):
            exact.assert_holds(w)


@on_backends("lora_apply")
def test_several_scaled_adapters_for_a_token(backend: Backend) -> None:
    """vllm#51940, lorax#159: one adapter a request was all there was. Integers, by hand."""
    x, a = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 1.0]]])
    b = torch.tensor([[[1.0]], [[10.0]], [[100.0]]])
    ids, gates = torch.tensor([[0, 1, 2], [2, -1, 0]]), torch.tensor([[1.0, 2.0, 3.0], [0.5, 7.0, -1.0]])
    # 1 * 1 + 2 * 20 + 3 * 300, and 0.5 * 300 - 3; both times 2, and added to y.
    y = backend.run("lora_apply", x, a, b, ids, gates, torch.tensor([[1000.0], [0.0]]), scale=2.0)
    assert y.tolist() == [[1000 + 2 * 941.0], [2 * 147.0]]


@pytest.mark.parametrize("first", [(0, 8, 2), (8, 0, 2)], ids=str)
@on_backends("lora_merge_", "lora_unmerge_")
def test_an_empty_layer_before_others(backend: Backend, first: tuple[int, int, int]) -> None:
    """Ours: whether there is a base was asked of the first layer, and an empty tensor has no address."""
    case = Merge((first, (17, 33, 4)), pairs=((0, 0.7),))
    assert tensors.same_bits(case.unmerge(backend)[1], case.base[1])
    case.exact(backend.unit)[1].assert_holds(case.merge(backend)[1])


@on_backends("lora_apply")
def test_no_adapters_give_a_copy_of_y(backend: Backend) -> None:
    """Ours: the reference gave y itself. (That results are no aliases is checked of every call.)"""
    for adapters, rank in ((0, 2), (2, 0)):
        case = Apply(5, 6, rank, adapters, with_y=True, none=1.0)
        assert case.y is not None and tensors.same_bits(case.run(backend), case.y)


@on_backends("lora_merge_")
def test_subnormal_weights_are_kept(backend: Backend) -> None:
    """Instructions that round to bfloat16 or multiply it take subnormal numbers for zero; a weight beside which there
    is only an update of zeros is still what it was."""
    for dtype in FLOATS:
        smallest = torch.finfo(dtype).smallest_normal
        case = Merge(((17, 33, 4),), pairs=((0, 1.0),), dtype=dtype)
        case.base[0].copy_(torch.linspace(-1, 1, 17 * 33).view(17, 33) * smallest)
        case.b[0].zero_()
        assert torch.equal(case.merge(backend)[0], case.base[0])


@pytest.mark.parametrize("scale", [math.inf, math.nan])
@on_backends("lora_merge_", "lora_apply")
def test_a_scale_that_is_not_finite_is_for_listed_adapters_only(backend: Backend, scale: float) -> None:
    """0 * inf made all the others take part."""
    w, a, b = torch.ones(3, 4), torch.ones(2, 1, 4), torch.ones(2, 3, 1)
    for ids in (torch.zeros(0, dtype=torch.int64), torch.tensor([-1, -1])):
        (out,) = backend.run("lora_merge_", [w], [a], [b], ids, torch.ones(len(ids)), scale=scale)
        assert tensors.same_bits(out, w)
    y = backend.run("lora_apply", torch.ones(2, 4), a, b, torch.tensor([[-1], [0]]), torch.ones(2, 1), scale=scale)
    assert torch.equal(y[0], torch.zeros(3)) and not y[1].isfinite().any()


def test_more_tokens_than_anybody_can_count() -> None:
    """Expanded, they take no memory; without pairs there is nothing to do for them."""
    many = 2**40
    ids = torch.zeros(1, 0, dtype=torch.int64).expand(many, 0)
    x = torch.ones(1, 1).expand(many, 1)
    y = torch.ops.effk.lora_apply(x, torch.ones(1, 1, 1), torch.ones(1, 0, 1), ids, ids.float())
    assert y.shape == (many, 0)
