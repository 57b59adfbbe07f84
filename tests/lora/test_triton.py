"""What only Triton has: compilation ahead of time, the table of layers, and contents that are looked at on the device.

Numbers here are small integers and binary fractions, so that sums are exact in any order: results have the reference's
bits. NaN lies wherever nothing may be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from effk.kernels.common.triton_aot import Variant
from effk.kernels.lora import triton as kernels
from effk.lora import reference

from ..kit import tensors
from ..kit.triton import assert_compiles_without_spills

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = reference.FLOATS
NAN = float("nan")


def test_every_kernel_compiles_without_spills() -> None:
    assert_compiles_without_spills(kernels)


# --- Inputs ----------------------------------------------------------------------------------------------------------

ADAPTERS = 6
# Adapter 0 has a sum of 0, 4 is nobody's, 5 has a rank of 0; the others take part, 1 with two pairs.
IDS = (3, 0, -1, 1, 5, 2, ADAPTERS, 0, -2, 1, -(2**63), 2**32 + 1)
GATES = (0.5, 1.0, NAN, -1.0, 2.0, 0.25, NAN, -1.0, NAN, 1.25, NAN, NAN)
TAKE_PART = (1, 2, 3)
RANKS = (1, 2**30, 3, 9, 4, -(2**30))


def known(ids: Tensor) -> Tensor:
    """What a GPU takes ids for."""
    return torch.where((ids < 0) | (ids >= ADAPTERS), -1, ids)


def integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return tensors.values(shape, dtype, "integers", seed)


def adapters(rows: int, cols: int, rank: int, dtype: torch.dtype, ranks: Tensor | None, seed: int) -> list[Tensor]:
    """a and b, with NaN in what doesn't take part."""
    a, b = integers((ADAPTERS, rank, cols), dtype, seed), integers((ADAPTERS, rows, rank), dtype, seed + 1)
    used = torch.arange(rank) < (torch.full((ADAPTERS,), rank) if ranks is None else ranks)[:, None]
    used &= torch.isin(torch.arange(ADAPTERS), torch.tensor(TAKE_PART))[:, None]
    a[~used] = NAN
    b.transpose(1, 2)[~used] = NAN
    return [a, b]


def amid_nan(t: Tensor, beside: int) -> Tensor:
    """t in larger rows with NaN around them."""
    rows, cols = t.shape
    wide = torch.full((rows + 2, cols + 2 * beside), NAN, dtype=t.dtype)
    wide[1:-1, beside : beside + cols] = t
    return wide.to(DEVICE)[1:-1, beside : beside + cols]


def surroundings(t: Tensor) -> Tensor:
    """What `amid_nan` put around t, as a copy."""
    flat = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage()).clone()
    flat.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(NAN)
    return flat


def on_device(values: Any) -> Any:
    return tensors.map_tensors(lambda t: t.to(DEVICE), values)


# --- Merging ---------------------------------------------------------------------------------------------------------

# rows, cols, rank: on both sides of the tiles' edges, and nothing at all among them.
RAGGED = ((65, 129, 20), (0, 7, 3), (7, 0, 3), (1, 1, 1), (33, 31, 0), (32, 66, 17), (4, 5, 33), (2, 0, 1))
VECTORS = ((65, 136, 24), (0, 8, 8), (64, 128, 8), (8, 264, 16), (3, 8, 40))


@pytest.mark.parametrize("with_base", [False, True], ids=["in place", "base"])
@pytest.mark.parametrize("with_ranks", [False, True], ids=["", "ranks"])
@pytest.mark.parametrize("shapes", [RAGGED, VECTORS, VECTORS[:1]], ids=["ragged", "vectors", "one layer"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_merge_reads_what_takes_part_and_nothing_else(dtype, shapes, with_ranks, with_base) -> None:
    most = max(rank for *_, rank in shapes)
    ranks = torch.tensor(RANKS) if with_ranks else None
    gates = torch.tensor(GATES)
    if not with_ranks:
        gates[IDS.index(5)] = 0.0  # what has no rank otherwise
    clamped = None if ranks is None else ranks.clamp(0, most)
    beside = 8 if shapes is not RAGGED else 1
    w = [amid_nan(integers((rows, cols), dtype, i), beside) for i, (rows, cols, _) in enumerate(shapes)]
    base = [amid_nan(integers((rows, cols), dtype, 50 + i), 2 * beside) for i, (rows, cols, _) in enumerate(shapes)]
    factors = [adapters(*shape, dtype, clamped, 100 + 2 * i) for i, shape in enumerate(shapes)]
    a, b = ([pair[i].to(DEVICE) for pair in factors] for i in range(2))
    start = [t.cpu().clone() for t in (base if with_base else w)]
    want = [t.cpu().clone() for t in w]
    from_base = [t.cpu() for t in base] if with_base else None
    lists = known(torch.tensor(IDS)), gates
    host = [t.cpu() for t in a], [t.cpu() for t in b]
    reference.lora_merge_(want, *host, *lists, from_base, clamped, scale=0.5)
    before = [surroundings(t) for t in w]

    lists = on_device((torch.tensor(IDS), gates))
    kernels.lora_merge_(w, a, b, *lists, base if with_base else None, on_device(ranks), scale=0.5)
    assert list(kernels._tables.values())[-1].aligned == (shapes is not RAGGED)
    for i, (rows, cols, rank) in enumerate(shapes):
        assert tensors.same_bits(w[i].cpu(), want[i]), i
        assert tensors.same_bits(surroundings(w[i]), before[i]), f"{i}: wrote outside"
        assert torch.equal(want[i], start[i]) == (rows * cols * rank == 0), i


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_without_adapters_the_base_is_copied_to_the_bit(dtype: torch.dtype) -> None:
    base = [tensors.values(shape, dtype, "bits", 1).to(DEVICE) for shape in ((65, 129), (3, 8))]
    a = [torch.full((2, 3, t.shape[1]), NAN, dtype=dtype, device=DEVICE) for t in base]
    b = [torch.full((2, t.shape[0], 3), NAN, dtype=dtype, device=DEVICE) for t in base]
    ids, gates = on_device((torch.tensor([0, -1, 0]), torch.tensor([1.0, 1.0, -1.0])))
    for call in (kernels.lora_merge_, kernels.lora_unmerge_):
        w = [torch.zeros_like(t) for t in base]
        call(w, a, b, ids, gates, base)
        assert all(tensors.same_bits(t, wanted) for t, wanted in zip(w, base, strict=True)), call
    w = [t.clone() for t in base]
    kernels.lora_merge_(w, a, b, ids, gates)
    assert all(tensors.same_bits(t, wanted) for t, wanted in zip(w, base, strict=True))


def test_as_many_pairs_as_can_be() -> None:
    """Old and new ones, in float64: in float32 their sum would lose all but the large ones."""
    pairs = reference.MAX_PAIRS
    old_ids, new_ids = torch.arange(pairs) % 3, torch.arange(pairs, dtype=torch.int32) % 3
    old_gates, new_gates = torch.full((pairs,), 2.0**40), torch.full((pairs,), 2.0**40)
    new_gates[:3] = 2.0**40 + 2.0**17  # one step of float32
    new_gates[3:6] = torch.tensor([2.0**40, 2.0**40 - 2.0**16, 2.0**40])
    w = [torch.ones(2, 3)]
    a, b = [integers((3, 1, 3), torch.float32, 1)], [integers((3, 2, 1), torch.float32, 2)]
    want = [w[0].clone()]
    lists = old_ids, old_gates, new_ids, new_gates
    reference.lora_switch_(want, a, b, *lists, scale=2.0**-17)
    w, a, b, lists = on_device((w, a, b, lists))
    kernels.lora_switch_(w, a, b, *lists, scale=2.0**-17)
    assert tensors.same_bits(w[0].cpu(), want[0])
    assert not torch.equal(want[0], torch.ones(2, 3))


# --- The table of layers ---------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """The kernels that would be launched, with their arguments; none is. Starts without tables."""
    calls: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(Variant, "launch", lambda self, grid, **args: calls.append((self, args)))
    monkeypatch.setattr(kernels, "_tables", type(kernels._tables)())
    monkeypatch.setattr(kernels, "_captured", {})
    yield calls


def names(calls: list[tuple[Any, dict[str, Any]]]) -> list[str]:
    found = [variant.kernel.__name__ for variant, _ in calls]
    calls.clear()
    return found


def a_list(layers: int = 3) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return tuple([torch.ones(shape) for _ in range(layers)] for shape in ((5, 8), (2, 4, 8), (2, 5, 4)))


PAIRS = torch.tensor([1, 0]), torch.tensor([1.0, 2.0])
ONCE = ["activate", "merge"]
NEW = ["write_layer"] * 3 + ONCE


def test_one_launch_merges_all_layers_and_a_table_is_made_once(launched) -> None:
    layers = a_list()
    kernels.lora_merge_(*layers, *PAIRS)
    assert names(launched) == NEW
    for call in (kernels.lora_merge_, kernels.lora_unmerge_):
        call(*layers, *PAIRS)
        assert names(launched) == ONCE
    kernels.lora_switch_(*layers, *PAIRS, *PAIRS)
    assert names(launched) == ONCE
    base = a_list()[0]
    kernels.lora_switch_(*layers, *PAIRS, *PAIRS, base)
    assert names(launched) == NEW
    w, a, b = layers
    kernels.lora_merge_([w[1], w[0], w[2]], a, b, *PAIRS)
    assert names(launched) == NEW


def test_shared_memory_is_refused_every_time(launched) -> None:
    w, a, b = a_list()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"lora_merge_: w\[0\] and w\[2\] share memory"):
            kernels.lora_merge_([w[0], w[1], w[0]], a, b, *PAIRS)
        with pytest.raises(RuntimeError, match=r"lora_unmerge_: w\[0\] and base\[0\] share memory"):
            kernels.lora_unmerge_(w, a, b, *PAIRS, w)
        kernels.lora_merge_(w, a, b, *PAIRS)
    assert names(launched) == NEW + ONCE


def test_tables_that_a_graph_reads_are_kept_and_others_are_not(launched, monkeypatch) -> None:
    def capturing(yes: bool) -> None:
        monkeypatch.setattr(kernels, "capturing", lambda like: yes)

    read, unread, made = a_list(), a_list(), a_list()
    kernels.lora_merge_(*read, *PAIRS)
    kernels.lora_merge_(*unread, *PAIRS)
    capturing(True)
    names(launched)
    kernels.lora_merge_(*read, *PAIRS)
    assert names(launched) == ONCE
    for _ in range(2):  # nothing is in such a table before the graph runs
        kernels.lora_merge_(*made, *PAIRS)
        assert names(launched) == NEW
    capturing(False)
    kernels.lora_merge_(*made, *PAIRS)
    assert names(launched) == NEW
    others = [a_list(1) for _ in range(kernels.TABLES)]
    for other in others:
        kernels.lora_merge_(*other, *PAIRS)
    assert len(kernels._tables) == kernels.TABLES
    names(launched)
    kernels.lora_merge_(*read, *PAIRS)
    assert names(launched) == ONCE
    kernels.lora_merge_(*unread, *PAIRS)
    assert names(launched) == NEW


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_merge_gets_the_alignment_it_is_compiled_for(launched, dtype: torch.dtype) -> None:
    vector = kernels.vector(dtype)

    def shifted(t: Tensor) -> Tensor:
        """t, not where an allocation begins."""
        return t.new_empty(t.numel() + 1)[1:].view(t.shape)

    def layer(rows: int, cols: int, rank: int) -> list[Tensor]:
        shapes = (rows, cols), (rows, cols), (2, rank, cols), (2, rows, rank)
        return [torch.empty(shape, dtype=dtype) for shape in shapes]

    def aligned(*layers: list[Tensor], with_base: bool = True) -> bool:
        """Which kernel runs; and what it asks for holds."""
        launched.clear()
        w, base, a, b = (list(parts) for parts in zip(*layers, strict=True))
        kernels.lora_merge_(w, a, b, *PAIRS, base if with_base else None)
        *written, _, (variant, _) = launched
        size = variant.constants["VECTOR"]
        assert len(written) == len(layers) and size in (1, vector)
        for _, args in written:
            assert all(args[name] % size == 0 for name in ("cols", "rank", "w_stride", "base_stride"))
            assert size == 1 or all(args[name] % 16 == 0 for name in ("w", "base", "a", "b"))
        return size > 1

    good = layer(3, 2 * vector, vector)
    assert aligned(good) and aligned(good, layer(1, vector, 3 * vector))
    assert not aligned(good, layer(3, vector + 1, vector))
    assert not aligned(good, layer(3, vector, vector + 1))
    for i in range(4):
        assert not aligned(good, [shifted(t) if i == j else t for j, t in enumerate(layer(3, vector, vector))]), i
    for i in range(2):
        strided = layer(3, vector, vector)
        strided[i] = torch.empty(3, vector + 1, dtype=dtype)[:, :vector]
        assert not aligned(good, strided), i
        if i == 1:
            assert aligned(good, strided, with_base=False)


@pytest.mark.parametrize("with_base", [False, True], ids=["in place", "base"])
def test_nothing_waits_for_the_device(launched, monkeypatch, with_base: bool) -> None:
    """Tensors without contents refuse all that would look at them."""
    monkeypatch.setattr(reference, "check_disjoint", lambda *args: None)  # they have no addresses either

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    w, a, b = [meta(5, 8), meta(9, 7)], [meta(4, 3, 8), meta(4, 2, 7)], [meta(4, 5, 3), meta(4, 9, 2)]
    base = w if with_base else None
    for dtype in reference.INDICES:
        ids, gates, ranks = meta(6, dtype=dtype), meta(6), meta(4, dtype=dtype)
        kernels.lora_merge_(w, a, b, ids, gates, base, ranks)
        kernels.lora_unmerge_(w, a, b, ids, gates, base, ranks)
        kernels.lora_switch_(w, a, b, ids, gates, ids[:3], gates[:3], base, ranks)
        y = meta(2, 3, 5) if with_base else None
        out = kernels.lora_apply(meta(2, 3, 8), a[0], b[0], meta(2, 3, 6, dtype=dtype), meta(2, 3, 6), y, ranks)
        assert out.shape == (2, 3, 5)
    applied = ["join", "shrink", "expand"]
    assert names(launched) == [*["write_layer"] * 2, *ONCE * 3, *applied, *ONCE * 3, *applied]


# --- Token-wise application ------------------------------------------------------------------------------------------


def token_pairs(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """For each token the pairs of IDS in an order of its own, and some of them only."""
    g = tensors.generator(seed)
    order = torch.stack([torch.randperm(len(IDS), generator=g) for _ in range(tokens)])
    ids, gates = torch.tensor(IDS)[order], torch.tensor(GATES)[order]
    gone = (torch.rand(tokens, ADAPTERS, generator=g) < 0.4)[torch.arange(tokens)[:, None], known(ids)]
    gone |= (torch.arange(tokens) % 7 == 3)[:, None]
    return torch.where(gone, -1, ids), gates


# tokens, cols, rows, rank
APPLIED = ((1, 8, 3, 9), (17, 129, 65, 20), (35, 136, 64, 17), (3, 1, 1, 1), (4, 2100, 5, 2), (16, 0, 70, 5))


@pytest.mark.parametrize("with_ranks", [False, True], ids=["", "ranks"])
@pytest.mark.parametrize("shape", APPLIED, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_apply_reads_what_takes_part_and_nothing_else(dtype, shape, with_ranks) -> None:
    tokens, cols, rows, rank = shape
    ranks = torch.tensor(RANKS) if with_ranks else None
    clamped = None if ranks is None else ranks.clamp(0, rank)
    ids, gates = token_pairs(tokens, 3)
    if not with_ranks:
        gates[ids == 5] = 0.0
    a, b = adapters(rows, cols, rank, dtype, clamped, 1)
    x, y = integers((tokens, cols), dtype, 3), integers((tokens, rows), dtype, 4)
    device = on_device((a, b, ids, gates))
    for y_in in (None, y):
        want = reference.lora_apply(x, a, b, known(ids), gates, y_in, clamped, scale=0.5)
        assert want.isfinite().all() or cols == 0
        x_in = amid_nan(x, 1) if y_in is None else amid_nan(x.T, 1).T
        y_at = None if y_in is None else amid_nan(y_in.T, 3).T
        have = kernels.lora_apply(x_in, *device, y_at, on_device(ranks), scale=0.5)
        assert tensors.same_bits(have.cpu(), want)


def test_shrink_writes_what_takes_part_and_nothing_else(monkeypatch) -> None:
    """Programs for different adapters run in any order, so none may touch another's results, not even to begin with."""
    tokens, cols, rank = 37, 8, 5
    launch = Variant.launch
    written = []

    def watched(self: Variant, grid: tuple[int, ...], **args) -> None:
        if self.kernel is kernels.shrink:
            args["inner"].fill_(NAN)
        launch(self, grid, **args)
        if self.kernel is kernels.shrink:
            written.append(~args["inner"].isnan().any(0).cpu())

    monkeypatch.setattr(Variant, "launch", watched)
    ids, gates = token_pairs(tokens, 1)
    a, b = adapters(3, cols, rank, torch.float32, torch.tensor(RANKS).clamp(0, rank), 1)
    x = integers((tokens, cols), torch.float32, 3)
    kernels.lora_apply(*on_device((x, a, b, ids, gates)), None, on_device(torch.tensor(RANKS)))
    takes_part = torch.isin(ids, torch.tensor(TAKE_PART))
    # Of an adapter's two pairs, the first stands for both.
    takes_part &= ~((ids == 1) & ((ids == 1).cumsum(1) > 1))
    used = torch.tensor(RANKS).clamp(0, rank)[torch.where(takes_part, ids, 5)]
    want = torch.arange(rank) < used.flatten()[:, None]
    assert len(written) == 1 and torch.equal(written[0], want)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # of the interpreter
def test_an_adapter_that_breaks_breaks_its_own_tokens_only() -> None:
    """Tokens of different adapters are multiplied together, with what they don't use masked out."""
    tokens, rank = 20, 3
    x, a, b = torch.ones(tokens, 8), torch.ones(4, rank, 8), torch.ones(4, 5, rank)
    a[1], b[2], b[3] = float("inf"), NAN, float("inf")
    ids = (torch.arange(tokens) % 4)[:, None]
    y = kernels.lora_apply(*on_device((x, a, b, ids, torch.ones(tokens, 1)))).cpu()
    assert (y[::4] == 8.0 * rank).all()
    assert y[1::4].isinf().all() and y[2::4].isnan().all() and y[3::4].isinf().all()


def test_factors_are_float64_until_the_end() -> None:
    tokens, scale = 200, 0.1
    gates = torch.randn(tokens, 3, generator=tensors.generator(1))
    gates[:, 1] = -gates[:, 0] * 3 * 2**20  # sums that cancel
    gates[:, 2] = gates[:, 0] * 3 * 2**20
    ids = torch.zeros(tokens, 3, dtype=torch.int32)
    one = torch.ones(1, 1, 1)
    y = kernels.lora_apply(*on_device((torch.ones(tokens, 1), one, one, ids, gates)), scale=scale)
    want = reference.factors(ids, gates, scale, 1)
    assert tensors.same_bits(y.cpu(), want)
    sums = gates.double().sum(-1, keepdim=True)
    rounded = torch.tensor(scale).double()  # as float32
    assert not torch.equal((sums * rounded).float(), want) and not torch.equal(sums.float() * scale, want)


@pytest.mark.parametrize("nothing", range(6))
def test_apply_of_nothing(nothing: int) -> None:
    """Without tokens, columns, rows, pairs, adapters or ranks."""
    tokens, cols, rows, pairs, count, rank = (0 if i == nothing else 3 for i in range(6))
    a, b = torch.ones(count, rank, cols), torch.ones(count, rows, rank)
    ids = torch.full((2, tokens, pairs), min(count, 2) - 1)
    x, y = torch.ones(2, tokens, cols), integers((rows, tokens, 2), torch.float32, 1).permute(2, 1, 0)
    for y_in in (None, y):
        inputs = x, a, b, ids, torch.ones(2, tokens, pairs), y_in
        want = reference.lora_apply(*inputs)
        assert tensors.same_bits(kernels.lora_apply(*on_device(inputs)).cpu(), want)


@pytest.mark.parametrize("pairs", [7, 8, 9, 33])
def test_any_number_of_pairs(pairs: int) -> None:
    """On both sides of what `expand` looks at in one go; all of them twice."""
    tokens, count = 2, (pairs + 1) // 2
    ids = torch.arange(pairs).repeat(tokens, 1) % count
    gates = integers((tokens, pairs), torch.float32, 1)
    x, a, b = (integers(shape, torch.float32, i) for i, shape in enumerate(((tokens, 2), (count, 1, 2), (count, 3, 1))))
    inputs = x, a, b, ids, gates
    have = kernels.lora_apply(*on_device(inputs)).cpu()
    assert tensors.same_bits(have, reference.lora_apply(*inputs))


@pytest.mark.parametrize("cols", [1, 8, 12, 100])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_shrink_gets_the_alignment_it_is_compiled_for(launched, dtype: torch.dtype, cols: int) -> None:
    vector = kernels.vector(dtype)
    wide = torch.ones(8, cols + 17, dtype=dtype)
    views = wide[:4, :cols], wide[:4, 1 : cols + 1], wide[::2, 16 : cols + 16], torch.ones(cols, 4, dtype=dtype).T
    a = torch.ones(2 * 3 * cols + 1, dtype=dtype)
    for begin in (0, 1):
        at = a[begin : begin + 6 * cols].view(2, 3, cols)
        for x in views:
            launched.clear()
            kernels.lora_apply(x, at, torch.ones(2, 5, 3, dtype=dtype), torch.zeros(4, 1).long(), torch.ones(4, 1))
            variant, args = next(call for call in launched if call[0].kernel is kernels.shrink)
            size = variant.constants["VECTOR"]
            assert size == (vector if cols % vector == 0 and begin == 0 else 1)
            assert args["x"].stride(1) == 1 and args["x_stride"] == args["x"].stride(0)
            assert args["cols"] % size == 0 and args["x_stride"] % size == 0
            assert size == 1 or (args["x"].data_ptr() % 16 == 0 and args["a"].data_ptr() % 16 == 0)
