"""What must hold of moe on every back end."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
from effk.moe import reference
from hypothesis import assume
from torch import Tensor

from ..kit import tensors
from ..kit.backends import Backend, every_backend, on_backends
from ..kit.errors import Bounded
from ..kit.tensors import same_bits
from .strategies import (
    ACTIVATIONS,
    FLOATS,
    GEMMS,
    INDICES,
    SCORES,
    Combine,
    Grouped,
    Mlp,
    Route,
    Sort,
    clamped_offsets,
    combines,
    groupeds,
    hostile_combines,
    hostile_groupeds,
    hostile_mlps,
    hostile_sorts,
    mlps,
    part_of,
    routes,
    sorts,
)

SPECIAL = ("special",)
ALL_KINDS = ("normal", "integers", "extreme", "special")
flat_mlps = functools.partial(mlps, leads=False)


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """The same bits, but for the pattern of NaN."""
    if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    return same_bits(a.nan_to_num(0.125, torch.inf, -torch.inf), b.nan_to_num(0.125, torch.inf, -torch.inf))


def exact_batches(backend: Backend) -> bool:
    """Whether a row's result is the same to the bit wherever it is among as many others."""
    return backend.name.startswith("cpu-")


def agree(backend: Backend, exact: Bounded, a: Tensor, b: Tensor) -> None:
    """Two ways to the same result."""
    if exact_batches(backend):
        assert same_numbers(a, b)
    exact.assert_holds(a)
    exact.assert_holds(b)


def order_of(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=tensors.generator(seed))


def is_zero(t: Tensor) -> bool:
    """All +0.0."""
    return not bool(tensors.bits(t).any())


# Routing -------------------------------------------------------------------------------------------------------------


def best(numbers: list[float], k: int) -> list[int]:
    """NaN first, then by size; of equals the lower number."""
    return sorted(range(len(numbers)), key=lambda e: (not math.isnan(numbers[e]), -numbers[e], e))[:k]


@every_backend("moe_route", cases=functools.partial(routes, kinds=(*ALL_KINDS, "bits"), bias=False))
def test_route_takes_the_largest_logits(backend: Backend, case: Route) -> None:
    """To the last id: NaN, infinities, ties and -0.0 too."""
    weights, ids = case.run(backend)
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    assert ids.shape == weights.shape == (*case.lead, case.k)
    assert ids.is_contiguous() and weights.is_contiguous()
    rows = case.logits.reshape(case.tokens, case.experts).tolist()
    assert ids.reshape(case.tokens, case.k).tolist() == [best(row, case.k) for row in rows]


@every_backend("moe_route", cases=functools.partial(routes, kinds=ALL_KINDS))
def test_route_weights_are_within_the_bound(backend: Backend, case: Route) -> None:
    """Of the scores alone: the bias is no part of them."""
    weights, ids = case.run(backend)
    case.weights_of(ids, backend.unit).assert_holds(weights.reshape(case.tokens, case.k))


def check_choice(backend: Backend, case: Route) -> None:
    """Nothing that is left is better than what is taken, but for what float32 may lose."""
    weights, ids = case.run(backend)
    scores, bias = case.scores(backend.unit), case.bias
    assert bias is not None
    by = scores.value + bias.double()
    error = scores.error + backend.unit * (by.abs() + scores.error)
    error = torch.where(by.isfinite(), error, 0.0)
    logits = case.logits.reshape(case.tokens, case.experts).tolist()
    for t, chosen in enumerate(ids.reshape(case.tokens, case.k).tolist()):
        nan = by[t].isnan().nonzero()[:, 0].tolist()
        assert chosen[: len(nan)] == nan[: case.k]
        left = [e for e in range(case.experts) if e not in nan]
        for e in chosen[len(nan) :]:
            assert e in left, "twice, or out of range"
            assert float(by[t, e] + error[t, e]) >= float((by[t, left] - error[t, left]).max())
            # What is equal for sure is taken in order.
            equals = [o for o in left if logits[t][o] == logits[t][e] and float(bias[o]) == float(bias[e])]
            assert e == equals[0]
            left.remove(e)
    case.weights_of(ids, backend.unit).assert_holds(weights.reshape(case.tokens, case.k))


@every_backend("moe_route", cases=functools.partial(routes, kinds=ALL_KINDS, bias=True))
def test_route_with_a_bias_takes_the_best(backend: Backend, case: Route) -> None:
    check_choice(backend, case)


@pytest.mark.parametrize("score", SCORES)
@on_backends("moe_route")
def test_bias_and_scores_of_like_size(backend: Backend, score: str) -> None:
    """So that both decide."""
    case = Route(64, 8, (8 if backend.slow else 40,), with_bias=True, score=score)
    assert case.bias is not None
    case.bias.mul_(0.1 if score == "sigmoid" else 0.01)
    check_choice(backend, case)


@every_backend("moe_route", cases=functools.partial(routes, kinds=("normal", "integers", "extreme")))
def test_renormalized_weights_add_up_to_one(backend: Backend, case: Route) -> None:
    assume(case.k > 0)
    weights, _ = case.run(backend, renormalize=True)
    scores, ids = case.run(backend, renormalize=False)
    assert torch.equal(ids, case.run(backend, renormalize=True)[1])
    much = scores.double().sum(-1) > 2**-100
    loss = (case.k + 4) * 2 * backend.unit
    assert bool(((weights.double().sum(-1) - 1).abs() <= loss)[much].all())


@every_backend("moe_route", cases=functools.partial(routes, kinds=(*ALL_KINDS, "bits")))
def test_routed_experts_are_there_and_differ(backend: Backend, case: Route) -> None:
    """Whatever the logits are."""
    _, ids = case.run(backend)
    for chosen in ids.reshape(case.tokens, case.k).tolist():
        assert len(set(chosen)) == case.k and all(0 <= e < case.experts for e in chosen)


@every_backend("moe_route", cases=functools.partial(routes, kinds=ALL_KINDS))
def test_a_token_is_routed_alone(backend: Backend, case: Route) -> None:
    """Neither strides nor other tokens change a bit."""
    weights, ids = case.run(backend)
    flat = case.logits.reshape(case.tokens, case.experts).contiguous()
    bias = None if case.bias is None else case.bias.contiguous()
    order = order_of(case.tokens, case.seed)
    got = case.run(backend, logits=flat[order].contiguous(), bias=bias)
    if backend.name != "reference":  # torch's softmax rounds as strides let it
        for a, b in zip(got, (weights, ids), strict=True):
            assert same_numbers(a, b.reshape(case.tokens, case.k)[order])
    other = replace(case, lead=(case.tokens,))
    other.__dict__.update(logits=flat[order])
    other.weights_of(got[1], backend.unit).assert_holds(got[0])


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 3e38, 0.0])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@on_backends("moe_route")
def test_route_of_equal_logits(backend: Backend, score: str, number: float) -> None:
    """The first k, with the scores that the formula has."""
    for bias in (False, True):
        case = Route(9, 4, (2,), with_bias=bias, score=score)
        case.__dict__.update(logits=torch.full((2, 9), number), bias=torch.ones(9) if bias else None)
        weights, ids = case.run(backend)
        assert ids.tolist() == [[0, 1, 2, 3]] * 2
        case.weights_of(ids, backend.unit).assert_holds(weights)


@on_backends("moe_route")
def test_a_bias_of_infinity_bars_or_forces_an_expert(backend: Backend) -> None:
    case = Route(6, 3, (5,), with_bias=True, score="sigmoid")
    case.__dict__.update(bias=torch.tensor([0.0, -torch.inf, 0.0, torch.inf, 0.0, -torch.inf]))
    weights, ids = case.run(backend)
    assert ids[:, 0].tolist() == [3] * 5 and not bool(((ids == 1) | (ids == 5)).any())
    case.weights_of(ids, backend.unit).assert_holds(weights)


# Sorting -------------------------------------------------------------------------------------------------------------


def check_sorted(case: Sort, got: tuple[Tensor, Tensor, Tensor]) -> None:
    """Against Python's; -1 comes last."""
    perm, inverse, offsets = got
    assert perm.dtype == inverse.dtype == torch.int64 and offsets.dtype == torch.int32
    flat = case.ids.flatten().tolist()
    assert perm.tolist() == sorted(range(len(flat)), key=lambda i: (flat[i] < 0, flat[i]))
    assert inverse.shape == case.ids.shape
    assert torch.equal(inverse.flatten()[perm], torch.arange(len(flat)))
    counts = torch.bincount(torch.tensor([i for i in flat if i >= 0], dtype=torch.int64), minlength=case.experts)
    assert offsets.tolist() == counts.cumsum(0).tolist()


@every_backend("moe_sort", cases=sorts)
def test_sort_is_stable(backend: Backend, case: Sort) -> None:
    check_sorted(case, case.run(backend))


@pytest.mark.parametrize("load", ["uniform", "skewed", "one"])
@on_backends("moe_sort")
def test_sort_of_many(backend: Backend, load: str) -> None:
    """Of more pairs and experts than one block of threads has."""
    tokens = 150 if backend.slow else 300 if backend.name == "simt" else 5000
    case = Sort(300, (tokens, 8), load=load, none=0.1, seed=3)
    check_sorted(case, case.run(backend))


# Products ------------------------------------------------------------------------------------------------------------


@every_backend("moe_grouped_gemm", cases=groupeds)
def test_grouped_gemm_is_within_the_bound(backend: Backend, case: Grouped) -> None:
    y = case.run(backend)
    assert y.dtype == (case.out_dtype or case.dtype) and y.is_contiguous()
    case.exact(backend.unit).assert_holds(y)


@every_backend("moe_grouped_gemm", cases=functools.partial(groupeds, kinds=SPECIAL))
def test_grouped_gemm_of_nan_and_infinity(backend: Backend, case: Grouped) -> None:
    case.exact(backend.unit).assert_holds(case.run(backend))


def of_dtypes(*ops: str):
    def decorate(test):
        return pytest.mark.parametrize("dtype", FLOATS, ids=str)(on_backends(*ops)(test))

    return decorate


@of_dtypes("moe_grouped_gemm")
def test_bound_is_tight_enough_to_see_one_number(backend: Backend, dtype: torch.dtype) -> None:
    """The bound would be no test if one number of a weight could be another."""
    case = Grouped((5, 0, 13), 17, 33, dtype=dtype, w_layout="offset", with_bias=True)
    y = case.run(backend)
    case.exact(backend.unit).assert_holds(y)
    case.w[2, 7, 11] *= 1.5
    with pytest.raises(AssertionError, match="out of bounds"):
        case.exact(backend.unit).assert_holds(y)


@of_dtypes("moe_grouped_gemm", "moe_grouped_wgrad")
def test_every_number_of_rows(backend: Backend, dtype: torch.dtype) -> None:
    """Of an expert from 1 to 70: kernels for several rows meet with all remainders."""
    for rows in (1, 3, 6) if backend.slow else range(1, 20) if backend.name == "simt" else range(1, 71):
        case = Grouped((2, rows, 1), 19, 37, dtype=dtype, with_bias=True, seed=rows)
        case.exact(backend.unit).assert_holds(case.run(backend), f"{rows} rows")
        case.exact_wgrad(backend.unit).assert_holds(case.wgrad(backend), f"{rows} rows")


@of_dtypes("moe_grouped_gemm", "moe_grouped_wgrad")
def test_every_side_of_a_weight(backend: Backend, dtype: torch.dtype) -> None:
    """From 1 to 70 rows and columns, for few rows of x and for many."""
    for side in (1, 5) if backend.slow else range(1, 35, 3) if backend.name == "simt" else range(1, 71):
        for case in (
            Grouped((2, 29), side, 21, dtype=dtype, seed=side),
            Grouped((2, 29), 21, side, dtype=dtype, seed=side),
        ):
            case.exact(backend.unit).assert_holds(case.run(backend), f"side {side}")
            case.exact_wgrad(backend.unit).assert_holds(case.wgrad(backend), f"side {side}")


@of_dtypes("moe_grouped_gemm", "moe_grouped_wgrad")
def test_deep_and_wide_products(backend: Backend, dtype: torch.dtype) -> None:
    """More columns, rows and rows of x than a kernel takes at a time."""
    if backend.slow or backend.name == "simt":
        pytest.skip("large")
    for case in (
        Grouped((3, 40), 70, 1100, dtype=dtype, out_dtype=torch.float32),
        Grouped((3, 40), 600, 70, dtype=dtype, with_bias=True),
        Grouped((600, 3, 530), 33, 40, dtype=dtype, gather="repeats"),
    ):
        case.exact(backend.unit).assert_holds(case.run(backend))
        case.exact_wgrad(backend.unit).assert_holds(case.wgrad(backend))


def spoiled(case: Grouped) -> dict[str, Tensor | None]:
    """The weights, with NaN in those of experts without rows."""
    w, bias = tensors.to_device((case.w, case.bias))
    for e, count in enumerate(case.counts):
        if count == 0:
            w[e] = torch.nan
            if bias is not None:
                bias[e] = torch.nan
    return {"w": w, "bias": bias}


@every_backend("moe_grouped_gemm", cases=functools.partial(groupeds, kinds=ALL_KINDS))
def test_an_expert_without_rows_is_not_read(backend: Backend, case: Grouped) -> None:
    assert same_bits(case.run(backend, **spoiled(case)), case.run(backend))


@every_backend("moe_grouped_gemm", "moe_grouped_wgrad", cases=functools.partial(groupeds, gather=False))
def test_rows_past_the_last_offset(backend: Backend, case: Grouped) -> None:
    """Are +0.0 and take no part, whatever they hold."""
    case = replace(case, past=case.past + 3)
    last = sum(case.counts)
    y, dw = case.run(backend), case.wgrad(backend)
    assert is_zero(y[last:])
    x, grad = tensors.to_device((case.x, case.grad))
    x[last:], grad[last:] = torch.nan, torch.inf
    assert same_bits(case.run(backend, x=x), y)
    assert same_numbers(case.wgrad(backend, x=x, grad=grad), dw)


@every_backend("moe_grouped_gemm", cases=groupeds)
def test_strides_of_products_change_no_bit(backend: Backend, case: Grouped) -> None:
    plain = {
        "x": case.x.contiguous(),
        "w": case.w.contiguous(),
        "offsets": case.offsets.contiguous().long(),
        "bias": None if case.bias is None else case.bias.contiguous(),
        "gather": None if case.source is None else case.source.contiguous().int(),
    }
    agree(backend, case.exact(backend.unit), case.run(backend, **plain), case.run(backend))


@every_backend("moe_grouped_gemm", "moe_grouped_wgrad", cases=functools.partial(groupeds, gather=True))
def test_gather_is_an_index_of_x(backend: Backend, case: Grouped) -> None:
    """With rows that come more than once, or not at all; those may hold anything."""
    assert case.source is not None
    x = tensors.to_device(case.x)
    x[~torch.isin(torch.arange(len(x)), case.source.flatten())] = torch.nan
    rows = case.x[case.source.long()]
    agree(backend, case.exact(backend.unit), case.run(backend, x=rows, gather=None), case.run(backend, x=x))
    got = case.wgrad(backend, x=rows, gather=None), case.wgrad(backend, x=x)
    agree(backend, case.exact_wgrad(backend.unit), *got)


def _others(case: Grouped, at: int) -> Tensor:
    return torch.arange(case.sorted_rows) != at


@every_backend("moe_grouped_gemm", cases=functools.partial(groupeds, gather=False))
def test_a_row_is_alone_in_its_group(backend: Backend, case: Grouped) -> None:
    """One that isn't a number spoils itself alone."""
    assume(case.sorted_rows > 0 and case.cols > 0)
    at = case.seed % case.sorted_rows
    x = tensors.to_device(case.x)
    x[at, case.seed // 5 % case.cols] = (torch.nan, torch.inf, -torch.inf)[case.seed % 3]
    others = _others(case, at)
    assert same_numbers(case.run(backend, x=x)[others], case.run(backend)[others])


@every_backend("moe_grouped_gemm", cases=functools.partial(groupeds, gather=False))
def test_order_of_an_experts_rows(backend: Backend, case: Grouped) -> None:
    order = torch.arange(case.sorted_rows)
    for e, rows in case.groups():
        order[rows] = order[rows][order_of(rows.stop - rows.start, case.seed + e)]
    exact, y = case.exact(backend.unit), case.run(backend)
    agree(backend, part_of(exact, order), case.run(backend, x=case.x[order]), y[order])


@every_backend("moe_grouped_gemm", "moe_grouped_wgrad", cases=functools.partial(groupeds, gather=False))
def test_names_of_experts_do_not_matter(backend: Backend, case: Grouped) -> None:
    """With other numbers, they are elsewhere and give the same."""
    names = order_of(case.experts, case.seed).tolist()  # new expert i was names[i]
    where = dict(case.groups())
    rows = [torch.arange(case.sorted_rows)[where[e]] for e in names if e in where]
    past = torch.arange(sum(case.counts), case.sorted_rows)
    order = torch.cat([*rows, past])
    other = replace(case, counts=tuple(case.counts[e] for e in names))
    other.__dict__.update(
        x=case.x[order], w=case.w[names], bias=None if case.bias is None else case.bias[names], grad=case.grad[order]
    )
    agree(backend, other.exact(backend.unit), other.run(backend), case.run(backend)[order])
    agree(backend, other.exact_wgrad(backend.unit), other.wgrad(backend), case.wgrad(backend)[names])


@every_backend("moe_grouped_gemm", cases=functools.partial(groupeds, gather=False))
def test_grouped_is_a_loop_of_one_expert(backend: Backend, case: Grouped) -> None:
    exact, y = case.exact(backend.unit), case.run(backend)
    for e, rows in case.groups():
        x, bias = case.x[rows], None if case.bias is None else case.bias[e : e + 1]
        got = case.run(backend, x=x, w=case.w[e : e + 1], bias=bias, offsets=torch.tensor([len(x)]))
        agree(backend, part_of(exact, rows), got, y[rows])


@every_backend("moe_grouped_gemm", cases=functools.partial(groupeds, gather=False))
def test_grouped_is_padded(backend: Backend, case: Grouped) -> None:
    """Each group filled up with NaN to the size of the largest."""
    most = max((*case.counts, 1))
    x = torch.full((case.experts * most, case.cols), torch.nan, dtype=case.dtype)
    places = torch.zeros(case.sorted_rows, dtype=torch.int64)
    for e, rows in case.groups():
        count = rows.stop - rows.start
        places[rows] = e * most + torch.arange(count)
        x[e * most : e * most + count] = case.x[rows]
    y = case.run(backend, x=x, offsets=most * torch.arange(1, case.experts + 1))
    last = sum(case.counts)
    part_of(case.exact(backend.unit), slice(last)).assert_holds(y[places[:last]])


@every_backend("moe_grouped_gemm", cases=groupeds)
def test_out_dtype_rounds_once(backend: Backend, case: Grouped) -> None:
    """What float32 gives, rounded."""
    full = replace(case, out_dtype=torch.float32).run(backend)
    agree(backend, case.exact(backend.unit), full.to(case.out_dtype or case.dtype), case.run(backend))


@every_backend("moe_grouped_wgrad", cases=groupeds)
def test_wgrad_is_within_the_bound(backend: Backend, case: Grouped) -> None:
    """And +0.0 for an expert without rows."""
    dw = case.wgrad(backend)
    assert dw.dtype == case.dtype and dw.is_contiguous()
    case.exact_wgrad(backend.unit).assert_holds(dw)
    for e, count in enumerate(case.counts):
        assert count > 0 or is_zero(dw[e])


@every_backend("moe_grouped_wgrad", cases=functools.partial(groupeds, kinds=SPECIAL))
def test_wgrad_of_nan_and_infinity(backend: Backend, case: Grouped) -> None:
    """Of one expert's rows are in its gradient alone."""
    case.exact_wgrad(backend.unit).assert_holds(case.wgrad(backend))


@every_backend("moe_grouped_wgrad", cases=groupeds)
def test_strides_of_wgrad_change_no_bit(backend: Backend, case: Grouped) -> None:
    plain = {
        "x": case.x.contiguous(),
        "grad": case.grad.contiguous(),
        "offsets": case.offsets.contiguous().long(),
        "gather": None if case.source is None else case.source.contiguous().int(),
    }
    agree(backend, case.exact_wgrad(backend.unit), case.wgrad(backend, **plain), case.wgrad(backend))


# Combining -----------------------------------------------------------------------------------------------------------


@every_backend("moe_combine", cases=combines)
def test_combine_is_within_the_bound(backend: Backend, case: Combine) -> None:
    out = case.run(backend)
    assert out.dtype == case.dtype and out.shape == (*case.lead, case.cols) and out.is_contiguous()
    case.exact(backend.unit).assert_holds(out)


@every_backend("moe_combine", cases=functools.partial(combines, kinds=SPECIAL))
def test_combine_of_nan_and_infinity(backend: Backend, case: Combine) -> None:
    case.exact(backend.unit).assert_holds(case.run(backend))


@every_backend("moe_combine", cases=functools.partial(combines, kinds=ALL_KINDS))
def test_what_no_token_names_is_not_combined(backend: Backend, case: Combine) -> None:
    """Rows of y, and weights beside -1; tokens with nothing are +0.0."""
    y, weights = tensors.to_device((case.y, case.weights))
    y[~torch.isin(torch.arange(case.rows), case.inverse.flatten())] = torch.nan
    weights[case.inverse < 0] = torch.nan
    out = case.run(backend, y=y, weights=weights)
    assert same_bits(out, case.run(backend))
    assert is_zero(out[(case.inverse < 0).all(-1)])


@every_backend("moe_combine", cases=functools.partial(combines, kinds=ALL_KINDS))
def test_strides_and_order_of_tokens_combine_the_same(backend: Backend, case: Combine) -> None:
    order = order_of(case.tokens, case.seed)
    flat = [t.reshape(case.tokens, case.pairs)[order].contiguous() for t in (case.inverse, case.weights)]
    got = case.run(backend, y=case.y.contiguous(), inverse=flat[0], weights=flat[1])
    assert same_numbers(got, case.run(backend).reshape(case.tokens, case.cols)[order])


@every_backend("moe_combine", cases=combines)
def test_places_that_add_nothing_may_be_left_out(backend: Backend, case: Combine) -> None:
    """-1 anywhere among a token's places changes no bit."""
    none = torch.full((*case.lead, 1), -1, dtype=case.index)
    nan = torch.full((*case.lead, 1), torch.nan)
    half = case.pairs // 2
    more = [
        torch.cat([t[..., :half], filler, t[..., half:], filler], -1)
        for t, filler in ((case.inverse, none), (case.weights, nan))
    ]
    assert same_bits(case.run(backend, inverse=more[0], weights=more[1]), case.run(backend))


# The whole layer -----------------------------------------------------------------------------------------------------


@every_backend("moe_mlp", cases=mlps)
def test_mlp_is_within_the_bound(backend: Backend, case: Mlp) -> None:
    y = case.run(backend)
    assert y.dtype == case.dtype and y.shape == case.x.shape and y.is_contiguous()
    case.exact(backend.unit).assert_holds(y)


@every_backend("moe_mlp", cases=functools.partial(mlps, kinds=SPECIAL))
def test_mlp_of_nan_and_infinity(backend: Backend, case: Mlp) -> None:
    case.exact(backend.unit).assert_holds(case.run(backend))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@of_dtypes("moe_mlp")
def test_mlp_bound_sees_one_number(backend: Backend, dtype: torch.dtype, activation: str) -> None:
    case = Mlp(33, 17, lead=(9,), dtype=dtype, activation=activation, none=0.0)
    case.weights.fill_(0.7)
    case.x.abs_(), case.w13.abs_()  # no gate is shut
    y = case.run(backend)
    case.exact(backend.unit).assert_holds(y)
    for name in ("w13", "w2"):
        changed, weight = replace(case), getattr(case, name).clone()
        weight[case.used[0], 5, 3] += 30
        changed.__dict__.update({"x": case.x, "w13": case.w13, "weights": case.weights, name: weight})
        with pytest.raises(AssertionError, match="out of bounds"):
            changed.exact(backend.unit).assert_holds(y)


@pytest.mark.parametrize("gemm", GEMMS)
@of_dtypes("moe_mlp")
def test_every_number_of_tokens(backend: Backend, dtype: torch.dtype, gemm: str) -> None:
    """Of one expert, from 1 to 70, by every activation."""
    for tokens in (1, 5) if backend.slow else (1, 2, 8, 17) if backend.name == "simt" else range(1, 71):
        activation = ACTIVATIONS[tokens % len(ACTIVATIONS)]
        case = Mlp(21, 19, 2, (tokens,), 1, activation, gemm, dtype, load="one", none=0.0, seed=2 * tokens)
        case.exact(backend.unit).assert_holds(case.run(backend), f"{tokens} tokens")


@of_dtypes("moe_mlp")
def test_mlp_of_larger_sides(backend: Backend, dtype: torch.dtype) -> None:
    """Than a kernel takes at a time."""
    if backend.slow or backend.name == "simt":
        pytest.skip("large")
    for gemm in GEMMS:
        for case in (
            Mlp(600, 70, lead=(40,), gemm=gemm, dtype=dtype),
            Mlp(70, 530, lead=(40,), gemm=gemm, dtype=dtype, activation="relu2"),
            Mlp(1100, 300, 2, (2,), gemm=gemm, dtype=dtype, activation="geglu"),
            Mlp(40, 33, 2, (1300,), 1, gemm=gemm, dtype=dtype, activation="geglu_tanh"),
        ):
            case.exact(backend.unit).assert_holds(case.run(backend))


@of_dtypes("moe_mlp")
def test_more_pairs_than_are_sorted_at_a_time(backend: Backend, dtype: torch.dtype) -> None:
    if backend.slow or backend.name == "simt":
        pytest.skip("large")
    case = Mlp(9, 8, 5, (1100,), 16, dtype=dtype)
    case.exact(backend.unit).assert_holds(case.run(backend))


@every_backend("moe_mlp_", "moe_mlp", cases=mlps)
def test_adding_to_nothing_is_the_layer(backend: Backend, case: Mlp) -> None:
    """To the bit, once it is rounded; -0.0 is 0.0."""
    y = case.add(backend, torch.zeros_like(case.start))
    assert same_numbers(y.to(case.dtype), case.run(backend))


@every_backend("moe_mlp_", cases=mlps)
def test_adding_is_within_the_bound(backend: Backend, case: Mlp) -> None:
    """Each of a token's terms rounds what is there once more. Where there is none, y keeps its bits."""
    y = case.add(backend, case.start)
    case.exact_added(backend.unit).assert_holds(y)
    idle = (case.ids < 0).all(-1)
    assert same_bits(y[idle], case.start[idle])


@every_backend("moe_mlp_", cases=flat_mlps)
def test_adding_part_by_part(backend: Backend, case: Mlp) -> None:
    """Of ascending experts, with ids ascending: no bit of the sum depends on where the parts begin."""
    order = case.ids.long().argsort(dim=-1, stable=True)
    given = {"ids": case.ids.gather(-1, order), "weights": case.weights.gather(-1, order)}
    whole = case.add(backend, case.start, **given)
    ends = sorted({0, case.experts, case.seed % (case.experts + 1), case.seed // 7 % (case.experts + 1)})
    y = case.start
    for begin, end in itertools.pairwise(ends):
        inside = (given["ids"] >= begin) & (given["ids"] < end)
        ids = torch.where(inside, given["ids"] - begin, -1)
        weights = {"w13": case.w13[begin:end], "w2": case.w2[begin:end]}
        y = case.add(backend, y, ids=ids, weights=given["weights"], **weights)
    agree(backend, case.exact_added(backend.unit), y, whole)  # GPUs choose tiles by the number of experts


@every_backend("moe_mlp", cases=mlps)
def test_every_gemm_is_within_the_bound(backend: Backend, case: Mlp) -> None:
    exact = case.exact(backend.unit)
    for gemm in GEMMS:
        exact.assert_holds(case.run(backend, gemm=gemm), gemm)


@every_backend(
    "moe_mlp",
    "moe_sort",
    "moe_grouped_gemm",
    "moe_combine",
    cases=functools.partial(flat_mlps, kinds=("normal", "integers")),
)
def test_mlp_is_made_of_the_other_ops(backend: Backend, case: Mlp) -> None:
    perm, inverse, offsets = backend.run("moe_sort", case.ids, case.experts)
    token = perm // max(1, case.pairs)
    z = backend.run("moe_grouped_gemm", case.x, case.w13, offsets, None, token, out_dtype=torch.float32)
    h = reference.activated(z, case.activation).to(case.dtype)
    y = backend.run("moe_grouped_gemm", h, case.w2, offsets, out_dtype=torch.float32)
    out = backend.run("moe_combine", y, torch.where(case.ids < 0, -1, inverse), case.weights).to(case.dtype)
    exact = case.exact(backend.unit)
    exact.assert_holds(out)
    exact.assert_holds(case.run(backend))


@every_backend("moe_mlp", cases=functools.partial(mlps, kinds=ALL_KINDS))
def test_what_takes_no_part_is_not_read(backend: Backend, case: Mlp) -> None:
    """Experts without tokens, tokens without experts and weights beside -1; tokens without experts are +0.0."""
    w13, w2, weights, x = tensors.to_device((case.w13, case.w2, case.weights, case.x))
    for e in set(range(case.experts)) - set(case.used):
        w13[e], w2[e] = torch.nan, torch.nan
    idle = (case.ids < 0).all(-1)
    weights[case.ids < 0] = torch.nan
    x[idle] = torch.nan
    y = case.run(backend, w13=w13, w2=w2, weights=weights, x=x)
    assert same_numbers(y, case.run(backend))
    assert is_zero(y[idle])


@every_backend("moe_mlp", cases=functools.partial(flat_mlps, least=2))
def test_a_token_is_alone_in_its_batch(backend: Backend, case: Mlp) -> None:
    """One that isn't a number spoils itself alone; and so does a weight."""
    assume(case.cols > 0 and case.pairs > 0)
    at = case.seed % case.lead[0]
    x, weights = tensors.to_device((case.x, case.weights))
    x[at, case.seed // 5 % case.cols] = (torch.nan, torch.inf, -torch.inf)[case.seed % 3]
    weights[at] = torch.nan
    others = torch.arange(case.lead[0]) != at
    assert same_numbers(case.run(backend, x=x, weights=weights)[others], case.run(backend)[others])


@every_backend("moe_mlp", cases=functools.partial(flat_mlps, least=1))
def test_an_expert_of_nan_spoils_its_tokens_alone(backend: Backend, case: Mlp) -> None:
    assume(case.used)
    e = case.used[case.seed % len(case.used)]
    w13, w2 = tensors.to_device((case.w13, case.w2))
    w13[e], w2[e] = torch.nan, torch.nan
    without = ~(case.flat_ids == e).any(-1)
    spoiled = case.run(backend, w13=w13, w2=w2)
    assert same_numbers(spoiled[without], case.run(backend)[without])
    assert case.inner == 0 or bool(spoiled[~without].isnan().all())


@every_backend("moe_mlp", cases=flat_mlps)
def test_order_of_tokens(backend: Backend, case: Mlp) -> None:
    order = order_of(case.tokens, case.seed)
    exact, y = case.exact(backend.unit), case.run(backend)
    got = case.run(backend, x=case.x[order], weights=case.weights[order], ids=case.ids[order])
    agree(backend, part_of(exact, order), got, y[order])


@every_backend("moe_mlp", cases=flat_mlps)
def test_splitting_tokens(backend: Backend, case: Mlp) -> None:
    """Within the bound: fewer rows of an expert may take another way."""
    exact = case.exact(backend.unit)
    cut = case.seed % (case.tokens + 1)
    for part in (slice(cut), slice(cut, None), slice(cut, cut + 1)):
        got = case.run(backend, x=case.x[part], weights=case.weights[part], ids=case.ids[part])
        part_of(exact, part).assert_holds(got)


@every_backend("moe_mlp", cases=mlps)
def test_order_of_pairs_and_names_of_experts(backend: Backend, case: Mlp) -> None:
    """Neither matters, but for rounding."""
    exact = case.exact(backend.unit)
    exact.assert_holds(case.run(backend, ids=case.ids.flip(-1), weights=case.weights.flip(-1)))
    names = order_of(case.experts, case.seed)
    number = torch.cat([names.argsort(), torch.tensor([-1])]).to(case.index)  # and -1 stays
    got = case.run(backend, w13=case.w13[names], w2=case.w2[names], ids=number[case.ids.long()])
    exact.assert_holds(got)


@every_backend("moe_mlp", cases=functools.partial(mlps, kinds=("normal", "integers")))
def test_a_duplicate_is_the_sum_of_its_weights(backend: Backend, case: Mlp) -> None:
    ids, weights = torch.cat([case.ids, case.ids], -1), torch.cat([case.weights / 2, case.weights / 2], -1)
    doubled = replace(case, pairs=2 * case.pairs)
    doubled.__dict__.update(ids=ids, weights=weights)
    y = doubled.run(backend)
    doubled.exact(backend.unit).assert_holds(y)


@every_backend("moe_mlp", cases=mlps)
def test_strides_and_leading_sizes_change_no_bit(backend: Backend, case: Mlp) -> None:
    flat = {
        name: getattr(case, name).reshape(case.tokens, size).contiguous()
        for name, size in (("x", case.cols), ("weights", case.pairs), ("ids", case.pairs))
    }
    flat["ids"] = flat["ids"].long() if case.index == torch.int32 else flat["ids"].int()
    got = case.run(backend, **flat, w13=case.w13.contiguous(), w2=case.w2.contiguous()).reshape(case.x.shape)
    agree(backend, case.exact(backend.unit), got, case.run(backend))


# Determinism ---------------------------------------------------------------------------------------------------------


@every_backend("moe_grouped_gemm", "moe_grouped_wgrad", cases=groupeds)
def test_products_give_the_same_bits_twice(backend: Backend, case: Grouped) -> None:
    assert same_bits(case.run(backend), case.run(backend))
    assert same_bits(case.wgrad(backend), case.wgrad(backend))


@every_backend("moe_mlp", cases=mlps)
def test_mlp_gives_the_same_bits_twice(backend: Backend, case: Mlp) -> None:
    assert same_bits(case.run(backend), case.run(backend))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@of_dtypes("moe_route", "moe_sort", "moe_grouped_gemm", "moe_grouped_wgrad", "moe_combine", "moe_mlp")
def test_threads_change_no_bit(backend: Backend, dtype: torch.dtype, threads) -> None:
    if not backend.name.startswith("cpu-"):
        pytest.skip("has no CPU threads")
    route = Route(65, 6, (900,), dtype, with_bias=True)
    gemm = Grouped((600, 0, 5, 70), 150, 130, past=9, gather="repeats", dtype=dtype, with_bias=True)
    combine = Combine(500, 130, (700,), 6, dtype)
    mlps_of = [Mlp(130, 70, 5, (200,), 3, gemm=g, dtype=dtype, load="skewed") for g in GEMMS]
    results = []
    for n in (1, 2, 3):
        threads(n)
        got = [*route.run(backend), gemm.run(backend), gemm.wgrad(backend), combine.run(backend)]
        results.append([*got, *(m.run(backend) for m in mlps_of)])
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


# Untrusted numbers ---------------------------------------------------------------------------------------------------


def check_refused(backend: Backend, op: str, argument: str, run) -> None:
    with pytest.raises(RuntimeError, match=rf"effk::{op}: ({argument})(?!\w)"):
        run()


@every_backend("moe_sort", cases=hostile_sorts)
def test_sort_of_any_ids(backend: Backend, case: tuple[Sort, Tensor]) -> None:
    """A CPU raises; a GPU takes those out of range for -1."""
    sort, ids = case
    wrong = (ids < -1) | (ids >= sort.experts)
    taken = replace(sort)
    taken.__dict__.update(ids=ids)
    if backend.raises_on_corrupt and bool(wrong.any()):
        check_refused(backend, "moe_sort", "ids", lambda: taken.run(backend))
        return
    got = taken.run(backend)
    taken.__dict__.update(ids=torch.where(wrong, -1, ids))
    check_sorted(taken, got)


@every_backend("moe_grouped_gemm", "moe_grouped_wgrad", cases=hostile_groupeds)
def test_products_of_any_offsets_and_gather(backend: Backend, case: tuple[Grouped, Tensor, Tensor | None]) -> None:
    """A CPU raises; a GPU takes offsets for a running maximum within the rows, and gathers zeros for no row."""
    grouped, offsets, source = case
    ends = clamped_offsets(offsets.tolist(), grouped.sorted_rows)
    nowhere = torch.zeros(0) if source is None else (source < 0) | (source >= len(grouped.x))
    wrong = [*(["offsets"] if ends != offsets.tolist() else []), *(["gather"] if bool(nowhere.any()) else [])]
    changed = {"offsets": offsets, "gather": source}
    if backend.raises_on_corrupt and wrong:
        for run, op in ((grouped.run, "moe_grouped_gemm"), (grouped.wgrad, "moe_grouped_wgrad")):
            check_refused(backend, op, "|".join(wrong), lambda run=run: run(backend, **changed))
        return
    y, dw = grouped.run(backend, **changed), grouped.wgrad(backend, **changed)
    counts = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    taken = replace(grouped, counts=tuple(counts), past=grouped.sorted_rows - sum(counts))
    x = grouped.x
    if source is not None:
        x = torch.cat([x, torch.zeros(1, grouped.cols, dtype=x.dtype)])
        source = torch.where(nowhere, len(x) - 1, source)
    taken.__dict__.update(x=x, source=source, w=grouped.w, bias=grouped.bias, grad=grouped.grad)
    taken.exact(backend.unit).assert_holds(y)
    taken.exact_wgrad(backend.unit).assert_holds(dw)


@every_backend("moe_combine", cases=hostile_combines)
def test_combine_of_any_places(backend: Backend, case: tuple[Combine, Tensor]) -> None:
    """A CPU raises; a GPU takes those out of range for -1."""
    combine, inverse = case
    wrong = (inverse < -1) | (inverse >= combine.rows)
    if backend.raises_on_corrupt and bool(wrong.any()):
        check_refused(backend, "moe_combine", "inverse", lambda: combine.run(backend, inverse=inverse))
        return
    taken = replace(combine)
    taken.__dict__.update(y=combine.y, weights=combine.weights, inverse=torch.where(wrong, -1, inverse))
    taken.exact(backend.unit).assert_holds(combine.run(backend, inverse=inverse))


@every_backend("moe_mlp", cases=hostile_mlps)
def test_mlp_of_any_ids(backend: Backend, case: tuple[Mlp, Tensor]) -> None:
    """A CPU raises; a GPU takes those out of range for -1."""
    mlp, ids = case
    wrong = (ids < -1) | (ids >= mlp.experts)
    if backend.raises_on_corrupt and bool(wrong.any()):
        check_refused(backend, "moe_mlp", "ids", lambda: mlp.run(backend, ids=ids))
        return
    taken = replace(mlp)
    taken.__dict__.update(ids=torch.where(wrong, -1, ids))
    taken.exact(backend.unit).assert_holds(mlp.run(backend, ids=ids))


NUMBERS = (5, 6, -2, 2**31 - 1, -(2**31))
WIDE_NUMBERS = (2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**63), -(2**32) + 1)  # some are right in 32 bits


@pytest.mark.parametrize("index", INDICES, ids=str)
@on_backends("moe_sort", "moe_grouped_gemm", "moe_grouped_wgrad", "moe_combine", "moe_mlp")
def test_every_number_out_of_range_is_seen(backend: Backend, index: torch.dtype) -> None:
    """By CPUs, with its name; it's the last of its tensor."""
    if not backend.raises_on_corrupt:
        pytest.skip("stays in bounds, and says nothing")
    sort, combine, mlp = Sort(5, index=index), Combine(5, 3, index=index), Mlp(3, 2, 5, index=index)
    gemm = Grouped((2, 0, 3), 4, 3, gather="order", index=index)
    for number in (*NUMBERS, *(WIDE_NUMBERS if index == torch.int64 else ())):

        def last(t: Tensor, number: int = number) -> Tensor:
            t = t.clone()
            t.view(-1)[-1] = number
            return t

        said = f"holds {number}; wanted"
        assert gemm.source is not None
        check_refused(backend, "moe_sort", f"ids {said}", lambda: backend.run("moe_sort", last(sort.ids), 5))
        check_refused(
            backend, "moe_combine", f"inverse {said}", lambda: combine.run(backend, inverse=last(combine.inverse))
        )
        check_refused(backend, "moe_mlp", f"ids {said}", lambda: mlp.run(backend, ids=last(mlp.ids)))
        for run, op in ((gemm.run, "moe_grouped_gemm"), (gemm.wgrad, "moe_grouped_wgrad")):
            wrong = last(gemm.source)
            check_refused(
                backend,
                op,
                rf"gather(\[4\] is| holds) {number}; wanted",
                lambda run=run, wrong=wrong: run(backend, gather=wrong),
            )
            ends = last(gemm.offsets)
            if number != 5:  # rows there are
                check_refused(
                    backend,
                    op,
                    rf"offsets\[2\] is {number}; wanted",
                    lambda run=run, ends=ends: run(backend, offsets=ends),
                )
