"""What must hold of lora on every back end."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import effk
import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from ..kit import tensors
from ..kit.backends import Backend, every_backend, on_backends
from ..kit.errors import Bounded
from ..kit.tensors import same_bits
from . import strategies
from .strategies import FLOATS, Apply, Merge, Pairs, applies, merges, negative, pairs_of

with_base = functools.partial(merges, base=True)
in_place = functools.partial(merges, base=False)
flat_applies = functools.partial(applies, leads=False)


def all_hold(exact: list[Bounded], got: list[Tensor]) -> None:
    for i, (bound, w) in enumerate(zip(exact, got, strict=True)):
        bound.assert_holds(w, f"layer {i}")


def all_same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(same_bits, a, b)) and len(a) == len(b)


# Merging -------------------------------------------------------------------------------------------------------------


@every_backend("lora_merge_", cases=merges)
def test_merge_is_within_the_bound(backend: Backend, case: Merge) -> None:
    all_hold(case.exact(backend.unit), case.merge(backend))


@every_backend("lora_unmerge_", cases=in_place)
def test_unmerge_in_place_is_within_the_bound(backend: Backend, case: Merge) -> None:
    all_hold(case.exact(backend.unit, negative(case.pairs)), case.unmerge(backend))


def _switches(
    backend: Backend, *, kinds: tuple[str, ...] = ("normal", "integers", "extreme"), base: bool | None = None
) -> st.SearchStrategy[tuple[Merge, Pairs]]:
    """With the pairs that are merged before."""
    return merges(backend, kinds=kinds, base=base).flatmap(
        lambda case: st.tuples(st.just(case), pairs_of(case.adapters))
    )


@every_backend("lora_switch_", cases=_switches)
def test_switch_is_within_the_bound(backend: Backend, case: tuple[Merge, Pairs]) -> None:
    """What both lists have is exchanged for nothing: neither its rounding nor its size is in the bound."""
    merge, old = case
    change = merge.pairs if merge.with_base else (*negative(old), *merge.pairs)
    all_hold(merge.exact(backend.unit, change), merge.switch(backend, old))


@every_backend("lora_merge_", cases=functools.partial(merges, kinds=("special",)))
def test_merge_of_nan_and_infinity(backend: Backend, case: Merge) -> None:
    """Of weights, base and the selected adapters."""
    all_hold(case.exact(backend.unit), case.merge(backend))


@pytest.mark.parametrize("gate", [torch.nan, torch.inf, -torch.inf])
@on_backends("lora_merge_")
def test_gates_of_nan_and_infinity(backend: Backend, gate: float) -> None:
    """Infinities of gates that cancel are NaN; a scale of 0 doesn't save them."""
    for pairs, scale in ((((0, gate),), 1.0), (((1, 1.0), (0, gate), (0, -gate)), 1.0), (((0, gate),), 0.0)):
        case = Merge(((17, 33, 3),), pairs=pairs, scale=scale, kind="integers")
        assert not bool(case.merge(backend)[0].isfinite().any())


@on_backends("lora_merge_")
def test_bound_is_tight_enough_to_see_one_rank(backend: Backend) -> None:
    """The bound would be no test if one number of an adapter could be another."""
    for dtype in FLOATS:
        case = Merge(((33, 65, 16),), pairs=((0, 0.7), (2, -1.3)), dtype=dtype, layout="offset")
        got = case.merge(backend)
        case.exact(backend.unit)[0].assert_holds(got[0])
        case.a[0][2, 7, 11] *= 1.25
        with pytest.raises(AssertionError, match="out of bounds"):
            case.exact(backend.unit)[0].assert_holds(got[0])


# There and back ------------------------------------------------------------------------------------------------------


@every_backend("lora_merge_", "lora_unmerge_", cases=functools.partial(with_base, kinds=tensors.KINDS))
def test_unmerge_gives_the_base_back(backend: Backend, case: Merge) -> None:
    """To the bit, NaN's own bits too."""
    assert all_same(case.unmerge(backend, case.merge(backend)), case.base)


@every_backend("lora_merge_", "lora_unmerge_", cases=functools.partial(in_place, kinds=("normal", "integers")))
def test_unmerge_in_place_gives_nearly_the_same_back(backend: Backend, case: Merge) -> None:
    """But for what both sums lose, and the rounding between them."""
    there = case.merge(backend)
    back = case.unmerge(backend, there)
    info = torch.finfo(case.dtype)
    away, home = case.exact(backend.unit), case.exact(backend.unit, negative(case.pairs), there)
    for w, middle, first, second, result in zip(case.w, there, away, home, back, strict=True):
        rounding = info.eps / 2 * (middle.double().abs() * (1 + info.eps)) + info.tiny * info.eps
        error = first.error + second.error + torch.where(first.error > 0, rounding, 0.0)
        peak = torch.maximum(first.peak, second.peak)
        # Of the largest float16 numbers, too many to be added.
        peak = torch.where(middle.isfinite(), peak, torch.inf)
        Bounded(w.double(), error, peak, backend.unit).assert_holds(result)


def _chains(backend: Backend) -> st.SearchStrategy[tuple[Merge, list[Pairs]]]:
    return merges(backend, kinds=("normal", "extreme"), base=True, layers=2).flatmap(
        lambda case: st.tuples(st.just(case), st.lists(pairs_of(case.adapters), min_size=1, max_size=5))
    )


@every_backend("lora_merge_", "lora_switch_", cases=_chains)
def test_switches_from_a_base_end_as_one_merge(backend: Backend, case: tuple[Merge, list[Pairs]]) -> None:
    merge, chain = case
    w, before = merge.w, merge.pairs
    for pairs in chain:
        w, before = merge.switch(backend, before, pairs, w), pairs
    assert all_same(w, replace(merge, pairs=before).merge(backend))


def fastest_cpu() -> Backend:
    return Backend([name for name in effk.backends("lora_switch_") if name.startswith("cpu-")][-1])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_thousand_switches_from_a_base(dtype: torch.dtype) -> None:
    """End to the bit as one merge. In place they drift, which is why there is a base."""
    backend = fastest_cpu()
    draw = tensors.generator(1)
    w: list[Tensor] | None = None
    drifted: list[Tensor] | None = None
    before: Pairs = ()
    case = Merge(((33, 65, 8), (16, 31, 3)), adapters=8, dtype=dtype, scale=0.5)
    in_place = replace(case, with_base=False)
    drifted = case.base
    for _ in range(1000):
        ids = torch.randperm(8, generator=draw)[:2].tolist()
        gates = torch.rand(2, generator=draw).tolist()
        pairs = tuple(zip(ids, gates, strict=True))
        w = case.switch(backend, before, pairs, w)
        drifted = in_place.switch(backend, before, pairs, drifted)
        before = pairs
    assert w is not None
    direct = replace(case, pairs=before).merge(backend)
    assert all_same(w, direct)
    assert not all_same(drifted, direct)  # else the test says nothing


def _order(case: Merge) -> Pairs:
    """The pairs in another order."""
    return tuple(case.pairs[i] for i in torch.randperm(len(case.pairs), generator=tensors.generator(case.seed)))


@every_backend("lora_switch_", cases=functools.partial(in_place, kinds=tensors.KINDS))
def test_switching_to_the_same_is_nothing(backend: Backend, case: Merge) -> None:
    """To the bit, in any order, without a base. (With one, it is a merge.)"""
    assert all_same(case.switch(backend, _order(case)), case.w)


@every_backend("lora_switch_", "lora_merge_", "lora_unmerge_", cases=in_place)
def test_merging_is_switching_from_nothing(backend: Backend, case: Merge) -> None:
    assert all_same(case.switch(backend, ()), case.merge(backend))
    assert all_same(case.switch(backend, case.pairs, ()), case.unmerge(backend))


# Pairs ---------------------------------------------------------------------------------------------------------------


def spoiled(case: Merge) -> Merge:
    """The same with NaN in all that its pairs don't read: adapters, and ranks from those used on."""
    copy = replace(case)
    for a, b in zip(copy.a, copy.b, strict=True):
        for e in range(case.adapters):
            used = case.used[e] if e in case.active() else 0
            a[e, used:] = torch.nan
            b[e, :, used:] = torch.nan
    return copy


@every_backend("lora_merge_", cases=merges)
def test_what_takes_no_part_is_not_read(backend: Backend, case: Merge) -> None:
    """Adapters that aren't named, whose gates add up to 0, whose rank is 0, and ranks beyond those used."""
    assert all_same(spoiled(case).merge(backend), case.merge(backend))


def _idle(backend: Backend, *, base: bool | None = None) -> st.SearchStrategy[Merge]:
    """Merges of nothing, in many words."""

    def idle(case: Merge, way: str) -> Merge:
        if way == "gates":
            return replace(case, pairs=tuple((e, 0.0) for e, _ in case.pairs))
        if way == "cancelled":
            return replace(case, pairs=(*case.pairs, *negative(case.pairs)))
        if way == "ids":
            return replace(case, pairs=tuple((-1, g) for _, g in case.pairs))
        if way == "ranks":
            return replace(case, ranks=(0,) * case.adapters)
        if way == "rank":
            return replace(case, shapes=tuple((n, k, 0) for n, k, _ in case.shapes), ranks=None)
        return replace(case, **{"scale": {"scale": 0.0}, "nothing": {"pairs": ()}}[way])

    ways = ("gates", "cancelled", "ids", "ranks", "rank", "scale", "nothing")
    return st.builds(idle, merges(backend, kinds=tensors.KINDS, base=base), st.sampled_from(ways))


@every_backend("lora_merge_", "lora_unmerge_", cases=_idle)
def test_nothing_to_merge(backend: Backend, case: Merge) -> None:
    """Gates of 0, ids of -1, ranks of 0: the base, or what was there, to the bit, and no adapter is read."""
    wanted = case.base if case.with_base else case.w
    case = spoiled(case)
    assert all_same(case.merge(backend), wanted)
    assert all_same(case.unmerge(backend), wanted)


def distinct(case: Merge) -> Merge:
    """The last of the pairs of each adapter."""
    return replace(case, pairs=tuple(dict(case.pairs).items()))


@every_backend("lora_merge_", cases=merges)
def test_order_of_pairs_changes_no_bit(backend: Backend, case: Merge) -> None:
    case = distinct(case)
    assert all_same(replace(case, pairs=_order(case)).merge(backend), case.merge(backend))


@every_backend("lora_merge_", cases=merges)
def test_a_duplicate_is_the_sum_of_its_gates(backend: Backend, case: Merge) -> None:
    """To the bit: a half in each of two pairs is exact."""
    halves = tuple((e, g / 2) for e, g in case.pairs)
    assert all_same(
        replace(case, pairs=(*halves, *_order(replace(case, pairs=halves)))).merge(backend), case.merge(backend)
    )


@every_backend("lora_merge_", cases=merges)
def test_scale_is_a_factor_of_gates(backend: Backend, case: Merge) -> None:
    """To the bit, for a power of two."""
    case = replace(case, scale=-0.25)
    other = replace(case, scale=1.0, pairs=tuple((e, -0.25 * g) for e, g in case.pairs))
    assert all_same(case.merge(backend), other.merge(backend))


# Ranks ---------------------------------------------------------------------------------------------------------------


def with_adapters(case: Merge, a: list[Tensor], b: list[Tensor], **changed: object) -> Merge:
    """The case with other adapters."""
    copy = replace(case, **changed)  # type: ignore[arg-type]
    copy.__dict__.update(a=a, b=b, w=case.w, base=case.base)  # where cached properties are
    return copy


@every_backend("lora_merge_", cases=functools.partial(merges, kinds=("normal", "integers")))
def test_ranks_are_slices_of_the_adapters(backend: Backend, case: Merge) -> None:
    """Where all use as much, adapters may as well have no more; where they don't, zeros say the same."""
    most = 1 + case.seed % 17
    sliced = with_adapters(
        case,
        [a[:, :most].contiguous() for a in case.a],
        [b[..., :most].contiguous() for b in case.b],
        ranks=None,
    )
    ranked = replace(case, ranks=(min(most, max((r for _, _, r in case.shapes), default=0)),) * case.adapters)
    exact = ranked.exact(backend.unit)
    all_hold(exact, sliced.merge(backend))
    all_hold(exact, ranked.merge(backend))

    beyond = torch.arange(max((r for _, _, r in case.shapes), default=0)) >= torch.tensor(case.used).reshape(-1, 1)
    zeroed = with_adapters(
        case,
        [a.masked_fill(beyond[:, : a.shape[1], None], 0) for a in case.a],
        [b.masked_fill(beyond[:, None, : b.shape[2]], 0) for b in case.b],
        ranks=None,
    )
    all_hold(zeroed.exact(backend.unit), case.merge(backend))


@every_backend("lora_merge_", cases=functools.partial(merges, kinds=("normal", "integers")))
def test_zeros_for_more_rank_are_neutral(backend: Backend, case: Merge) -> None:
    more = 1 + case.seed % 20
    padded = with_adapters(
        case,
        [torch.nn.functional.pad(a, (0, 0, 0, more)) for a in case.a],
        [torch.nn.functional.pad(b, (0, more)) for b in case.b],
    )
    all_hold(case.exact(backend.unit), padded.merge(backend))


# Layers and memory ---------------------------------------------------------------------------------------------------


@every_backend("lora_merge_", cases=functools.partial(merges, kinds=("normal", "integers", "extreme", "special")))
def test_layers_do_not_meet(backend: Backend, case: Merge) -> None:
    """Each as if it were alone; one without columns between others changes nothing of them."""
    together = case.merge(backend)
    for i, shape in enumerate(case.shapes):
        alone = replace(
            case, shapes=(shape,), ranks=None if case.ranks is None else tuple(min(r, shape[2]) for r in case.ranks)
        )
        alone.__dict__.update(w=case.w[i : i + 1], base=case.base[i : i + 1], a=case.a[i : i + 1], b=case.b[i : i + 1])
        (w,) = alone.merge(backend)
        if exact_batches(backend):
            assert same_bits(w, together[i])
        else:
            all_hold(alone.exact(backend.unit), [w])


@on_backends("lora_merge_")
def test_a_layer_without_rank_beside_others(backend: Backend) -> None:
    """For it nothing takes part, to the bit, and not as a factor times 0."""
    for dtype in FLOATS:
        for gate in (0.7, torch.inf):
            for base in (True, False):
                case = Merge(((5, 8, 2), (9, 33, 0), (3, 8, 1)), 2, ((1, gate),), dtype, "bits", with_base=base, seed=1)
                assert same_bits(case.merge(backend)[1], (case.base if base else case.w)[1])


def exact_batches(backend: Backend) -> bool:
    """Whether results are the same to the bit whatever else is in the call."""
    return backend.name.startswith("cpu-")


MERGES = ("lora_merge_", "lora_unmerge_", "lora_switch_")
ADJACENT = 160  # numbers of a layer of 20 x 8


def in_one_buffer(**at: dict[int, int]) -> dict[str, list[Tensor]]:
    """Two layers of 20 x 8 and rank 2: at[name][layer] is where that tensor begins in one buffer; others are apart."""
    buffer = tensors.values((2000,), torch.float32, "normal", 1)
    shapes = {"w": (20, 8), "base": (20, 8), "a": (3, 2, 8), "b": (3, 20, 2)}
    made = {}
    for name, shape in shapes.items():
        made[name] = [tensors.values(shape, torch.float32, "normal", 2 + i) for i in (0, 1)]
        for layer, begin in at.get(name, {}).items():
            made[name][layer] = buffer[begin : begin + made[name][layer].numel()].view(shape)
    return made


def wide_columns() -> dict[str, list[Tensor]]:
    """w[0] and w[1] are columns of one matrix: rows of one lie between rows of the other."""
    wide = tensors.values((20, 16), torch.float32, "normal", 1)
    return in_one_buffer() | {"w": [wide[:, :8], wide[:, 8:]]}


def run_merge(
    backend: Backend, op: str, w: list[Tensor], base: object, a: list[Tensor], b: list[Tensor]
) -> list[Tensor]:
    pairs = (torch.tensor([0, 2]), torch.tensor([1.0, 0.5]))
    return backend.run(op, w, a, b, *pairs * (2 if op == "lora_switch_" else 1), base)


# What shares memory, and between which tensors.
OVERLAPS = {
    "twice": (in_one_buffer(w={0: 0, 1: 0}), "w[0]", "w[1]"),
    "one number": (in_one_buffer(w={0: 0, 1: ADJACENT - 1}), "w[0]", "w[1]"),
    "one number, from behind": (in_one_buffer(w={0: ADJACENT - 1, 1: 0}), "w[0]", "w[1]"),
    "columns": (wide_columns(), "w[0]", "w[1]"),
    "base": (in_one_buffer(w={0: 0}, base={0: 0}), "w[0]", "base[0]"),
    "a row of the base of another layer": (in_one_buffer(w={1: 0}, base={0: ADJACENT - 8}), "w[1]", "base[0]"),
    "the end of a": (in_one_buffer(w={1: 47}, a={1: 0}), "w[1]", "a[1]"),
    "b inside": (in_one_buffer(w={0: 0}, b={1: 16}), "w[0]", "b[1]"),
}


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("op", MERGES)
@on_backends(*MERGES)
def test_shared_memory_is_refused(backend: Backend, op: str, overlap: str) -> None:
    made, *names = OVERLAPS[overlap]
    with pytest.raises(RuntimeError, match=f"effk::{op}: .*share memory") as caught:
        run_merge(backend, op, **made)
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize("op", MERGES)
@on_backends(*MERGES)
def test_lists_in_the_memory_of_a_weight_are_refused(backend: Backend, op: str) -> None:
    """ids, gates and ranks are read while weights are written."""
    if not backend.raises_on_corrupt:
        pytest.skip("its kernels get copies of these")
    w = torch.zeros(20, 8)
    rest = [torch.zeros(3, 2, 8)], [torch.zeros(3, 20, 2)]
    apart = {"ids": torch.zeros(2, dtype=torch.int32), "gates": torch.zeros(2), "ranks": torch.full((3,), 2)}
    prefixes = ("old_", "new_") if op == "lora_switch_" else ("",)
    inside = {
        "ids": w.view(-1)[100:102].view(torch.int32),
        "gates": w.view(-1)[158:],
        "ranks": w.view(-1)[:6].view(torch.int64),
    }
    for name, tensor in inside.items():
        for prefix in prefixes:
            pairs = [tensor if (p, n) == (prefix, name) else apart[n] for p in prefixes for n in ("ids", "gates")]
            with pytest.raises(RuntimeError, match=f"effk::{op}: .*share memory") as caught:
                backend.run(op, [w], *rest, *pairs, None, tensor if name == "ranks" else apart["ranks"])
            assert re.search(rf"\b{'' if name == 'ranks' else prefix}{name}\b", str(caught.value))


@pytest.mark.parametrize("op", MERGES)
@on_backends(*MERGES)
def test_slices_of_one_buffer(backend: Backend, op: str) -> None:
    """Side by side they are as good as any; what is only read may share memory as it likes."""
    sliced = in_one_buffer(
        w={0: 0, 1: ADJACENT}, base={0: 2 * ADJACENT, 1: 2 * ADJACENT}, a={0: 500, 1: 500}, b={0: 510, 1: 530}
    )
    alone = {name: [t.clone() for t in made] for name, made in sliced.items()}
    for base in (True, False):
        if not base:
            sliced["base"] = alone["base"] = None  # type: ignore[assignment]
        assert all_same(run_merge(backend, op, **sliced), run_merge(backend, op, **alone))


@on_backends(*MERGES)
def test_no_layers_and_empty_layers(backend: Backend) -> None:
    """Nothing to write, beside one layer that has something; no adapters at all; no rank."""
    empty = [(0, 8, 2), (3, 0, 2), (0, 0, 0), (20, 8, 0), (20, 8, 2)]
    for shapes in ([], *([shape] for shape in empty), empty, empty[::-1]):
        for adapters, pairs in ((3, ((1, 0.5), (2, 0.7))), (3, ()), (0, ((-1, 1.0),)), (0, ())):
            for base in (True, False):
                case = Merge(tuple(shapes), adapters, pairs, with_base=base)
                all_hold(case.exact(backend.unit), case.merge(backend))
                all_hold(case.exact(backend.unit), case.switch(backend, ()))
                if base:
                    assert all_same(case.unmerge(backend), case.base)


# Shapes for kernels that take rows, columns and ranks by the hundred.
LARGE = {
    "many rows": ((517, 65, 20),),
    "many columns": ((33, 4130, 20),),
    "much rank": ((65, 130, 300),),
    "square": ((260, 515, 70), (130, 260, 64)),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", LARGE)
@on_backends("lora_merge_", "lora_apply")
def test_large(backend: Backend, shape: str, dtype: torch.dtype) -> None:
    if backend.slow or backend.name == "simt":
        pytest.skip("takes minutes in an emulator")
    for base in (True, False):
        merge = Merge(LARGE[shape], pairs=((2, 0.7), (0, -1.3)), dtype=dtype, layout="buffer", with_base=base)
        all_hold(merge.exact(backend.unit), merge.merge(backend))
    apply = Apply(*LARGE[shape][0], lead=(50,), dtype=dtype, with_y=True)
    apply.exact(backend.unit).assert_holds(apply.run(backend))


# Token by token ------------------------------------------------------------------------------------------------------


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """The same bits, but for the pattern of NaN."""
    if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    return same_bits(a.nan_to_num(0.125, torch.inf, -torch.inf), b.nan_to_num(0.125, torch.inf, -torch.inf))


def part_of(exact: Bounded, tokens: Tensor | slice) -> Bounded:
    return Bounded(exact.value[tokens], exact.error[tokens], exact.peak[tokens], exact.unit)


def agree(backend: Backend, exact: Bounded, a: Tensor, b: Tensor) -> None:
    """Two ways to the same result."""
    if exact_batches(backend):
        assert same_numbers(a, b)
    exact.assert_holds(a)
    exact.assert_holds(b)


@every_backend("lora_apply", cases=applies)
def test_apply_is_within_the_bound(backend: Backend, case: Apply) -> None:
    y = case.run(backend)
    assert y.dtype == case.dtype and y.is_contiguous()
    case.exact(backend.unit).assert_holds(y)


@every_backend("lora_apply", cases=functools.partial(applies, kinds=("special",)))
def test_apply_of_nan_and_infinity(backend: Backend, case: Apply) -> None:
    """Of tokens, y and the adapters that a token has."""
    case.exact(backend.unit).assert_holds(case.run(backend))


@every_backend("lora_apply", cases=functools.partial(flat_applies, least=2))
def test_a_token_is_alone_in_its_batch(backend: Backend, case: Apply) -> None:
    """One that isn't a number spoils itself alone; and so do adapters that it alone has."""
    assume(case.cols > 0)
    at = case.seed % case.lead[0]
    x = tensors.to_device(case.x)
    x[at, case.seed // 5 % case.cols] = (torch.nan, torch.inf, -torch.inf)[case.seed % 3]
    others = torch.arange(case.lead[0]) != at
    agree(backend, part_of(case.exact(backend.unit), others), case.run(backend, x=x)[others], case.run(backend)[others])


@every_backend("lora_apply", cases=flat_applies)
def test_splitting_tokens(backend: Backend, case: Apply) -> None:
    """What a token gives doesn't depend on which others there are, or on how they are ordered."""
    (tokens,) = case.lead
    y = case.run(backend)
    order = torch.randperm(tokens, generator=tensors.generator(case.seed))
    cut = case.seed % (tokens + 1)
    parts = [order[:cut], order[cut:], *order[: 1 if backend.slow else 4].split(1)]
    for part in parts:
        tensors_of = {name: getattr(case, name)[part] for name in ("x", "ids", "gates")}
        got = case.run(backend, **tensors_of, y=None if case.y is None else case.y[part])
        agree(backend, part_of(case.exact(backend.unit), part), got, y[part])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_backends("lora_apply")
def test_every_number_of_tokens(backend: Backend, dtype: torch.dtype) -> None:
    """Of one adapter, from 1 to 40 at once: kernels for several tokens meet with all remainders."""
    most = 3 if backend.slow else 9 if backend.name == "simt" else 40
    case = Apply(21, 37, 5, adapters=2, lead=(most,), pairs=1, none=0.0, dtype=dtype, with_y=True)
    case.ids.fill_(1)
    case.gates.copy_(torch.linspace(0.5, 1.5, most)[:, None])
    whole = case.exact(backend.unit)
    alone = None
    for tokens in range(1, most + 1):
        assert case.y is not None
        first = {name: getattr(case, name)[:tokens] for name in ("x", "ids", "gates", "y")}
        y = case.run(backend, **first)
        part_of(whole, slice(tokens)).assert_holds(y)
        alone = y if alone is None else alone
        agree(backend, part_of(whole, slice(1)), y[:1], alone)


@every_backend("lora_apply", cases=applies)
def test_strides_and_leading_sizes_change_no_bit(backend: Backend, case: Apply) -> None:
    flat = {
        name: getattr(case, name).reshape(case.tokens, size).contiguous()
        for name, size in (("x", case.cols), ("ids", case.pairs), ("gates", case.pairs))
    }
    y = None if case.y is None else case.y.reshape(case.tokens, case.rows).contiguous()
    got = case.run(backend, **flat, y=y).reshape(*case.lead, case.rows)
    agree(backend, case.exact(backend.unit), got, case.run(backend))


def spoiled_apply(case: Apply) -> dict[str, Tensor]:
    """The adapters, with NaN in what no token has."""
    factor = case.factor()
    a, b = case.a.clone(), case.b.clone()
    for e, r in enumerate(case.used):
        r = r if bool((factor[:, e] != 0).any()) else 0
        a[e, r:] = torch.nan
        b[e, :, r:] = torch.nan
    return {"a": a, "b": b}


@every_backend("lora_apply", cases=applies)
def test_what_no_token_has_is_not_read(backend: Backend, case: Apply) -> None:
    assert same_numbers(case.run(backend, **spoiled_apply(case)), case.run(backend))


@every_backend("lora_apply", cases=functools.partial(flat_applies, kinds=("normal", "integers", "extreme", "special")))
def test_an_adapter_of_nan_spoils_its_tokens_alone(backend: Backend, case: Apply) -> None:
    """Not even as 0 * NaN, and tokens without adapters are y."""
    assume(case.adapters > 0)
    e = case.seed % case.adapters
    a, b = case.a.clone(), case.b.clone()
    a[e], b[e] = torch.nan, torch.nan
    without = case.factor()[:, e] == 0
    y, spoiled = case.run(backend), case.run(backend, a=a, b=b)
    if exact_batches(backend):
        assert same_numbers(spoiled[without], y[without])
    replaced = replace(case)
    replaced.__dict__.update(a=a, b=b)
    replaced.exact(backend.unit).assert_holds(spoiled)
    idle = (case.factor()[:, : case.adapters] * (torch.tensor(case.used) > 0) == 0).all(1)
    before = torch.zeros(case.tokens, case.rows, dtype=case.dtype) if case.y is None else case.y
    assert same_numbers(spoiled[idle], before[idle])


@every_backend("lora_apply", cases=functools.partial(applies, kinds=tensors.KINDS))
def test_nothing_to_apply(backend: Backend, case: Apply) -> None:
    """Gates of 0, ids of -1, ranks of 0, no pairs, a scale of 0: y, and no adapter is read."""
    wanted = torch.zeros(*case.lead, case.rows, dtype=case.dtype) if case.y is None else case.y
    nan = {"a": torch.full_like(case.a, torch.nan), "b": torch.full_like(case.b, torch.nan)}
    index = case.index
    for changed in (
        {"gates": torch.zeros_like(case.gates)},
        {"ids": torch.full_like(case.ids, -1)},
        {"ranks": torch.zeros(case.adapters, dtype=index)},
        {"ids": case.ids[..., :0], "gates": case.gates[..., :0]},
        {"ids": torch.cat([case.ids] * 2, -1), "gates": torch.cat([case.gates, -case.gates], -1)},
    ):
        assert same_numbers(case.run(backend, **nan, **changed), wanted)
    assert same_numbers(replace(case, scale=0.0).run(backend, **nan), wanted)


@every_backend("lora_apply", cases=applies)
def test_pairs_of_a_token(backend: Backend, case: Apply) -> None:
    """A duplicate is the sum of its gates, and their order doesn't matter, to the bit where sums are exact."""
    y = case.run(backend)
    halves = {"ids": torch.cat([case.ids, case.ids], -1), "gates": torch.cat([case.gates / 2, case.gates / 2], -1)}
    assert same_numbers(case.run(backend, **halves), y)
    assert same_numbers(case.run(backend, ids=case.ids.flip(-1), gates=case.gates.flip(-1)), y)
    scaled = replace(case, scale=-0.5)
    assert same_numbers(scaled.run(backend), replace(case, scale=1.0).run(backend, gates=case.gates * -0.5))


@every_backend("lora_apply", cases=functools.partial(applies, kinds=("normal", "integers")))
def test_ranks_of_adapters(backend: Backend, case: Apply) -> None:
    """Ranks beyond those used are as good as zeros, or as not there."""
    exact = case.exact(backend.unit)
    beyond = torch.arange(case.rank) >= torch.tensor(case.used).reshape(-1, 1)
    a, b = case.a.masked_fill(beyond[..., None], 0), case.b.masked_fill(beyond[:, None], 0)
    more = 1 + case.seed % 20
    a, b = torch.nn.functional.pad(a, (0, 0, 0, more)), torch.nn.functional.pad(b, (0, more))
    exact.assert_holds(case.run(backend, a=a, b=b, ranks=None))
    most = max(case.used, default=0)
    exact.assert_holds(case.run(backend, a=a[:, :most].contiguous(), b=b[..., :most].contiguous()))


@every_backend("lora_apply", cases=applies)
def test_no_y_is_a_y_of_zeros(backend: Backend, case: Apply) -> None:
    zeros = torch.zeros(*case.lead, case.rows, dtype=case.dtype)
    a, b = case.run(backend, y=zeros), case.run(backend, y=None)
    assert torch.equal(a.nan_to_num(0.125, torch.inf, -torch.inf), b.nan_to_num(0.125, torch.inf, -torch.inf))


def _merged_and_not(backend: Backend) -> st.SearchStrategy[tuple[Apply, Pairs]]:
    return applies(backend, kinds=("normal", "integers")).flatmap(
        lambda case: st.tuples(st.just(case), pairs_of(case.adapters))
    )


@every_backend("lora_merge_", "lora_apply", cases=_merged_and_not)
def test_merged_is_the_same_as_not(backend: Backend, case: tuple[Apply, Pairs]) -> None:
    """x W'^T = x W^T + lora_apply(x): only the two ops and products in float64 are compared."""
    apply, pairs = case
    merge = Merge(
        ((apply.rows, apply.cols, apply.rank),),
        apply.adapters,
        pairs,
        apply.dtype,
        ranks=apply.ranks,
        index=apply.index,
        scale=apply.scale,
        seed=apply.seed,
    )
    merge.__dict__.update(a=[apply.a], b=[apply.b])
    ids = merge.ids().expand(*apply.lead, -1)
    gates = merge.gates().expand(*apply.lead, -1)
    apply = replace(apply, with_y=False, pairs=len(pairs))
    apply.__dict__.update(ids=ids, gates=gates)
    (w,), (bound,) = merge.merge(backend), merge.exact(backend.unit)
    info = torch.finfo(apply.dtype)
    moved = torch.where(bound.error > 0, bound.error + info.eps / 2 * w.double().abs() + info.tiny * info.eps, 0.0)
    x = apply.x.double()
    difference = x @ (w.double() - merge.base[0].double()).T
    exact = apply.exact(backend.unit)
    peak = torch.where(w.isfinite().all(), exact.peak, torch.inf)  # the merged weight may be too large for its type
    error = exact.error + x.abs() @ moved.T
    Bounded(difference, error, peak, backend.unit).assert_holds(apply.run(backend))


# Determinism ---------------------------------------------------------------------------------------------------------


@every_backend("lora_merge_", cases=merges)
def test_merging_gives_the_same_bits_twice(backend: Backend, case: Merge) -> None:
    assert all_same(case.merge(backend), case.merge(backend))


@every_backend("lora_apply", cases=applies)
def test_applying_gives_the_same_bits_twice(backend: Backend, case: Apply) -> None:
    assert same_bits(case.run(backend), case.run(backend))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_backends("lora_merge_", "lora_apply")
def test_threads_change_no_bit(backend: Backend, dtype: torch.dtype, threads) -> None:
    if not backend.name.startswith("cpu-"):
        pytest.skip("has no CPU threads")
    merge = Merge(((300, 500, 9), (1, 70, 33), (150, 33, 2)), pairs=((0, 0.7), (2, 1.0)), dtype=dtype, layout="buffer")
    apply = Apply(300, 500, 20, lead=(60,), pairs=3, dtype=dtype, with_y=True)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append([*merge.merge(backend), *replace(merge, with_base=False).merge(backend), apply.run(backend)])
    for other in results[1:]:
        assert all_same(results[0], other)


# Untrusted numbers ---------------------------------------------------------------------------------------------------

CORRUPT_IDS = (3, 4, -2, 2**31 - 1, -(2**31))
WIDE_IDS = (2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**63), -(2**32) + 1)  # some are an adapter's in 32 bits
CORRUPT_RANKS = (5, -1, 2**31 - 1, -(2**31))
WIDE_RANKS = (2**32 + 1, 2**63 - 1, -(2**63), -(2**32) + 1)


def numbers(backend: Backend, narrow: tuple[int, ...], wide: tuple[int, ...]) -> list[tuple[int, torch.dtype]]:
    found = [(n, dtype) for dtype in strategies.INDICES for n in (*narrow, *(wide if dtype == torch.int64 else ()))]
    return found[:: 4 if backend.slow else 1]


def check_corrupt(backend: Backend, op: str, name: str, wrong: tuple[object, ...], right: tuple[object, ...]) -> None:
    """A CPU raises and has written nothing; a GPU takes what is wrong for what is right."""
    if not backend.raises_on_corrupt:
        got, wanted = (list(tensors.tensors_in(backend.run(op, *args))) for args in (wrong, right))
        assert all_same(got, wanted)
        return
    args = tensors.to_device(wrong)
    with pytest.raises(RuntimeError, match=rf"effk::{op}: {name}"):
        effk.implementation(op, backend.name)(*args)
    assert all_same(list(tensors.tensors_in(args)), list(tensors.tensors_in(wrong)))


@pytest.mark.parametrize("op", MERGES)
@on_backends(*MERGES)
def test_corrupt_ids_of_merges(backend: Backend, op: str) -> None:
    for number, dtype in numbers(backend, CORRUPT_IDS, WIDE_IDS):
        for base in (True, False):
            case = Merge(
                ((17, 33, 4),), pairs=((0, 0.7), (1, 0.5), (2, 1.0)), with_base=base, index=dtype, kind="integers"
            )
            wrong, right = case.ids(), case.ids()
            wrong[1], right[1] = number, -1
            switch = op == "lora_switch_"
            for name in ("old_ids", "new_ids") if switch else ("ids",):

                def call(ids: Tensor, name: str = name, case: Merge = case) -> tuple[object, ...]:
                    lists = (ids, case.gates())
                    if op == "lora_switch_":
                        other = (case.ids(((2, 0.5),)), case.gates(((2, 0.5),)))
                        lists = (*lists, *other) if name == "old_ids" else (*other, *lists)
                    return case.w, case.a, case.b, *lists, case.base if case.with_base else None

                check_corrupt(backend, op, f"{name} holds {number}", call(wrong), call(right))


@pytest.mark.parametrize("op", MERGES)
@on_backends(*MERGES)
def test_corrupt_ranks_of_merges(backend: Backend, op: str) -> None:
    """Clamped to those of the layer with the largest."""
    for number, dtype in numbers(backend, CORRUPT_RANKS, WIDE_RANKS):
        case = Merge(((17, 33, 2), (9, 16, 4)), pairs=((0, 0.7), (1, 0.5)), with_base=op != "lora_merge_", index=dtype)

        def call(rank: int, case: Merge = case) -> tuple[object, ...]:
            lists = (case.ids(), case.gates())
            ranks = torch.tensor([1, rank, 3], dtype=case.index)
            base = case.base if case.with_base else None
            return case.w, case.a, case.b, *lists * (2 if op == "lora_switch_" else 1), base, ranks

        check_corrupt(backend, op, rf"ranks\[1\] is {number}", call(number), call(4 if number > 4 else 0))


@on_backends("lora_apply")
def test_corrupt_apply(backend: Backend) -> None:
    def call(number: int, rank: int, dtype: torch.dtype) -> tuple[object, ...]:
        case = Apply(5, 9, 4, lead=(3,), index=dtype, none=0.0, with_y=True)
        case.ids[1, 1] = number
        ranks = torch.tensor([1, rank, 3], dtype=dtype)
        return case.x, case.a, case.b, case.ids, case.gates, case.y, ranks

    for number, dtype in numbers(backend, CORRUPT_IDS, WIDE_IDS):
        check_corrupt(backend, "lora_apply", f"ids holds {number}", call(number, 2, dtype), call(-1, 2, dtype))
    for number, dtype in numbers(backend, CORRUPT_RANKS, WIDE_RANKS):
        right = call(0, 4 if number > 4 else 0, dtype)
        check_corrupt(backend, "lora_apply", rf"ranks\[1\] is {number}", call(0, number, dtype), right)
