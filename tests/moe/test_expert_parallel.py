"""moe_mlp_ep on the ranks of gloo groups: the same as moe_mlp of all tokens and all experts, however it is cut."""

from __future__ import annotations

import functools
import itertools
import os
import time
from dataclasses import dataclass
from typing import Any

import effk
import pytest
import torch
from effk.moe import overlap
from torch import Tensor

from ..kit.errors import Bounded, roundings
from ..kit.ranks import LOST, Groups, needs_gloo, on_ranks
from ..kit.tensors import same_bits
from .strategies import Mlp, tensors

pytestmark = [pytest.mark.xdist_group("moe_ep"), needs_gloo]  # of one run
FORWARD, BACKWARD = (getattr(torch.ops.effk, name) for name in ("moe_mlp_ep", "moe_mlp_ep_backward"))
SIZES = (1, 2, 4)
STAGES = (1, 2, 3, 100)


@dataclass(frozen=True)
class Layer:
    """A layer, the same on all ranks but for the tokens."""

    tokens: tuple[int, ...] = (5, 0, 7, 1)  # of each of four ranks; fewer have the first of them
    experts: int = 3  # of a rank
    cols: int = 9
    inner: int = 8
    pairs: int = 3
    activation: str = "swiglu"
    dtype: torch.dtype = torch.float32
    load: str = "uniform"
    none: float = 0.2
    gemm: str = "auto"
    layout: str = "contiguous"
    index: torch.dtype = torch.int64

    def whole(self, ranks: int) -> Mlp:
        """Of all ranks together."""
        return Mlp(
            self.cols,
            self.inner,
            self.experts * ranks,
            (sum(self.tokens[:ranks]),),
            self.pairs,
            self.activation,
            self.gemm,
            self.dtype,
            layout=self.layout,
            index=self.index,
            load=self.load,
            none=self.none,
            seed=11,
        )

    def grad(self, ranks: int) -> Tensor:
        return tensors.values((sum(self.tokens[:ranks]), self.cols), self.dtype, "normal", 5)

    def slices(self, ranks: int) -> list[slice]:
        ends = [0, *itertools.accumulate(self.tokens[:ranks])]
        return [slice(*pair) for pair in itertools.pairwise(ends)]

    def of(self, rank: int, ranks: int) -> tuple[Tensor, ...]:
        """x, w13, w2, weights, ids of a rank."""
        whole, own = self.whole(ranks), self.slices(ranks)[rank]
        experts = slice(rank * self.experts, (rank + 1) * self.experts)
        return whole.x[own], whole.w13[experts], whole.w2[experts], whole.weights[own], whole.ids[own]


LAYERS = {
    "usual": Layer(),
    "half": Layer(dtype=torch.float16, activation="geglu", index=torch.int32),
    "bfloat16": Layer((33, 20, 0, 64), experts=4, cols=40, inner=24, dtype=torch.bfloat16, layout="strided"),
    "transposed": Layer(layout="transposed"),
    "one expert": Layer((6, 9, 3, 4), experts=1, activation="relu2"),
    "all to one": Layer((17, 4, 2, 9), load="one", none=0.0),
    "skewed": Layer((40, 40, 40, 40), experts=5, load="skewed", pairs=6),
    "nothing": Layer((0, 0, 0, 0)),
    "no pairs": Layer((3, 2, 2, 1), pairs=0),
    "all dropped": Layer((3, 2, 2, 1), none=1.0),
    "dense": Layer((70, 90, 10, 50), experts=2, gemm="dense", dtype=torch.bfloat16),
    # More pairs than are taken at a time, so that the order of tokens could matter to the choice of gemm.
    "many": Layer((1500, 1300, 0, 900), experts=4, cols=16, inner=8, pairs=6, load="skewed"),
}


def rank_of_all(rank: int, groups: Groups) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for size, (name, layer) in itertools.product(SIZES, LAYERS.items()):
        if rank >= size:
            continue
        group, options = groups[size].group_name, {"activation": layer.activation}
        given = layer.of(rank, size)
        grad = layer.grad(size)[layer.slices(size)[rank]]
        for stages in STAGES:
            y = FORWARD(*given, group, stages=stages, gemm=layer.gemm, **options)
            found[size, name, stages] = (
                y,
                *BACKWARD(grad, *given, group, stages=stages, **options),
            )
    if rank == 0:
        found["threads"] = of_threads(groups[1].group_name)
    if rank < 2:
        found |= of_two(rank, groups[2])
    return found


def of_threads(name: str) -> list[list[Tensor]]:
    """By one stage and three, with threads that share out elements in parts that end anywhere."""
    layer = Layer((3000, 0, 0, 0), experts=8, cols=16, inner=771, pairs=2, activation="geglu")
    given, grad = layer.of(0, 1), layer.grad(1)
    torch.set_num_threads(2)
    found = []
    for stages in (1, 3):
        options: dict[str, Any] = {"stages": stages, "activation": layer.activation}
        found.append([FORWARD(*given, name, **options), *BACKWARD(grad, *given, name, **options)])
    torch.set_num_threads(1)
    return found


def of_two(rank: int, group: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    name, layer = group.group_name, LAYERS["skewed"]
    given = layer.of(rank, 2)

    def said(function: Any) -> str:
        try:
            function()
        except RuntimeError as error:
            return str(error)
        return ""

    # Ranks that want different numbers of stages take as many.
    found["different stages"] = FORWARD(*given, name, stages=1 + 3 * rank)
    found["known before"] = overlap.known(group, torch.float32, torch.device("cpu"))
    state = torch.get_rng_state()
    found["automatic"] = FORWARD(*given, name), FORWARD(*given, name, stages=0 if rank else 2)
    found["random numbers"] = same_bits(state, torch.get_rng_state())
    found["known"] = overlap.known(group, torch.float32, torch.device("cpu"))

    leaves = [t.clone().requires_grad_() for t in given[:4]]
    y = FORWARD(*leaves, given[4], name, stages=2)
    y.backward(layer.grad(2)[layer.slices(2)[rank]])
    found["autograd"] = [y.detach(), *(t.grad for t in leaves)]
    torch._dynamo.reset()
    again = [t.clone().requires_grad_() for t in given[:4]]
    compiled = torch.compile(
        lambda x, w13, w2, weights: FORWARD(x, w13, w2, weights, given[4], name, stages=2) * 1,
        backend="aot_eager",
        fullgraph=True,
    )
    y = compiled(*again)
    y.backward(layer.grad(2)[layer.slices(2)[rank]])
    found["compiled"] = [y.detach(), *(t.grad for t in again)]

    # Calls that a compiler might leave out: without a use, twice the same, and of no tokens.
    def unused(x: Tensor) -> Tensor:
        y = FORWARD(x, *given[1:], name, stages=1)
        return x * 2 if rank else y

    def twice(x: Tensor, other: Tensor) -> Tensor:
        return FORWARD(x, *given[1:], name, stages=1) + FORWARD(other, *given[1:], name, stages=1)

    def residual(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return x + FORWARD(x, *given[1:3], weights, ids, name, stages=1)

    whole = functools.partial(torch.compile, fullgraph=True)
    with torch.no_grad():
        found["unused"] = whole(unused, backend="aot_eager")(given[0])
        found["twice"] = whole(twice, backend="aot_eager")(given[0], given[0] if rank else given[0] / 2)
        some = slice(0, None if rank else 0)
        found["no tokens"] = whole(residual)(*(t[some] for t in (given[0], *given[3:])))

    # Of a second derivative, and of a call that isn't the others'.
    leaf = given[0].clone().requires_grad_()
    y = FORWARD(leaf, *given[1:], name, stages=1)
    found["second"] = said(lambda: torch.autograd.grad(y.square().sum(), leaf, create_graph=True))
    found["crossed"] = said(lambda: BACKWARD(given[0], *given, name) if rank else FORWARD(*given, name))

    torch.manual_seed(3)
    seeded = effk.moe.MoEMLP(8, 5, 6, 2, group=group)
    torch.manual_seed(3)
    alone = effk.moe.MoEMLP(8, 5, 6, 2)
    found["seeded"] = [
        same_bits(a.data, b.data[3 * rank : 3 * rank + 3])
        for a, b in zip((seeded.w13, seeded.w2), (alone.w13, alone.w2), strict=True)
    ]
    found["routers"] = seeded.router.weight.detach()

    module = effk.moe.MoEMLP(layer.cols, layer.inner, 2 * layer.experts, layer.pairs, router=False, group=group)
    with torch.no_grad():
        module.w13.copy_(given[1])
        module.w2.copy_(given[2])
        found["module"] = module(given[0], given[3], given[4]), repr(module)

    # What one refuses, both do.
    x, w13, w2, weights, ids = given
    wrong = {
        "ids": (x, w13, w2, weights, torch.full_like(ids, 10)),
        "dtype": (x, w13.half(), w2, weights, ids),
        "weights": (x, w13[0, 0], w2, weights, ids),
    }
    for what, args in wrong.items():
        found[f"wrong {what}"] = said(lambda args=args: FORWARD(*(args if rank else given), name))
    other = {
        "columns of x": (x[:, :8], w13[..., :8], w2[:, :8], weights, ids),
        "experts": (x, w13[:4], w2[:4], weights, ids.clamp(max=7)),
        "experts of a token": (x, w13, w2, weights[:, :2], ids[:, :2]),
        "dtype": (x.half(), w13.half(), w2.half(), weights, ids),
    }
    for what, args in other.items():
        found[f"other {what}"] = said(lambda args=args: FORWARD(*(args if rank else given), name))
    found["no group"] = said(lambda: FORWARD(*given, "nobody"))
    found["afterwards"] = FORWARD(*given, name, stages=2)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each rank came to."""
    return on_ranks(rank_of_all, tmp_path_factory.mktemp("ep"), SIZES)


def in_parts(layer: Layer, ranks: int) -> Bounded:
    """The layer in float64, and what may be lost: each rank's sums are rounded, then added up in float32."""
    whole = layer.whole(ranks)
    value, error, peak = (torch.zeros(whole.tokens, whole.cols, dtype=torch.float64) for _ in range(3))
    size = torch.zeros_like(value)
    for rank in range(ranks):
        own = (whole.ids >= rank * layer.experts) & (whole.ids < (rank + 1) * layer.experts)
        part = Mlp(**{f: getattr(whole, f) for f in whole.__dataclass_fields__})
        part.__dict__.update(x=whole.x, w13=whole.w13, w2=whole.w2, weights=whole.weights)
        part.__dict__["ids"] = torch.where(own, whole.ids, -1)
        sums = part.exact(2**-24).stored(layer.dtype)
        value += sums.value
        error += sums.error
        peak = torch.maximum(peak, sums.peak)
        size += sums.value.abs() + sums.error
    return Bounded(value, error + roundings(ranks, 2**-24) * size, peak, 2**-24)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", SIZES)
def test_ranks_are_one_layer(found: list[dict[Any, Any]], size: int, name: str) -> None:
    """In the error model of one process; to the bit with one rank."""
    layer, whole = LAYERS[name], LAYERS[name].whole(size)
    y = torch.cat([found[rank][size, name, 1][0] for rank in range(size)])
    assert y.dtype == layer.dtype and y.shape == (whole.tokens, whole.cols)
    in_parts(layer, size).assert_holds(y)
    if size == 1:
        alone = torch.ops.effk.moe_mlp(
            whole.x, whole.w13, whole.w2, whole.weights, whole.ids, activation=layer.activation, gemm=layer.gemm
        )
        assert same_bits(y, alone)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", SIZES)
def test_stages_change_no_bit(found: list[dict[Any, Any]], size: int, name: str) -> None:
    """Of the result or of a gradient."""
    for rank, stages in itertools.product(range(size), STAGES[1:]):
        for what, a, b in zip(
            ("y", "x", "w13", "w2", "weights"),
            found[rank][size, name, 1],
            found[rank][size, name, stages],
            strict=True,
        ):
            assert same_bits(a, b), f"rank {rank}, {stages} stages: {what}"


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_those_of_one_process(found: list[dict[Any, Any]], size: int, name: str) -> None:
    """Those of the weights, which sum over the tokens of all ranks in their order, to the bit. That of x is the sum of
    the ranks' own, each rounded."""
    layer, whole = LAYERS[name], LAYERS[name].whole(size)
    leaves = [t.detach().clone().requires_grad_() for t in (whole.x, whole.w13, whole.w2, whole.weights)]
    torch.ops.effk.moe_mlp(*leaves, whole.ids, activation=layer.activation).backward(layer.grad(size))
    of_x, of_w13, of_w2, of_weights = (t.grad for t in leaves)
    assert of_x is not None and of_w13 is not None and of_w2 is not None and of_weights is not None
    ranks = [found[rank][size, name, 1] for rank in range(size)]
    for rank, (_, _, w13, w2, _) in enumerate(ranks):
        own = slice(rank * layer.experts, (rank + 1) * layer.experts)
        assert same_bits(w13, of_w13[own].contiguous()) and same_bits(w2, of_w2[own].contiguous())
    assert same_bits(torch.cat([r[4] for r in ranks]), of_weights.contiguous())
    got, wanted = torch.cat([r[1] for r in ranks]).double(), of_x.double()
    unit = torch.finfo(layer.dtype).eps
    # A token's sum, and as many rounded parts of it as it visits ranks, none of them larger than sixteen times the
    # largest gradient here.
    bound = 16 * size * unit * float(wanted.abs().max()) if wanted.numel() else 0.0
    assert got.shape == wanted.shape and bool(((got - wanted).abs() <= bound).all())


def test_least_number_of_stages_is_agreed_on(found: list[dict[Any, Any]]) -> None:
    for rank in range(2):
        assert same_bits(found[rank]["different stages"], found[rank][2, "skewed", 1][0])


def test_automatic_stages(found: list[dict[Any, Any]]) -> None:
    """Measured by the first call without a number; the same costs on all ranks, and the same result."""
    assert all(found[rank]["random numbers"] for rank in range(2))
    assert [found[rank]["known before"] for rank in range(2)] == [None, None]
    assert found[0]["known"] == found[1]["known"] is not None
    for rank, y in itertools.product(range(2), (0, 1)):
        assert same_bits(found[rank]["automatic"][y], found[rank][2, "skewed", 1][0])


@pytest.mark.parametrize("how", ["autograd", "compiled"])
def test_autograd(found: list[dict[Any, Any]], how: str) -> None:
    for rank in range(2):
        for a, b in zip(found[rank][how], found[rank][2, "skewed", 1], strict=True):
            assert same_bits(a, b)


def test_module(found: list[dict[Any, Any]]) -> None:
    for rank in range(2):
        y, text = found[rank]["module"]
        assert same_bits(y, found[rank][2, "skewed", 1][0]) and "rank" in text


@pytest.mark.parametrize(("what", "said"), [("ids", "ids holds 10"), ("dtype", "w13 has dtype"), ("weights", "w13")])
def test_all_refuse_what_one_has(found: list[dict[Any, Any]], what: str, said: str) -> None:
    """And that one says what it is."""
    assert "effk::moe_mlp_ep: rank 1 of the group has refused its arguments" in found[0][f"wrong {what}"]
    assert "effk::moe_mlp_ep" in found[1][f"wrong {what}"] and said in found[1][f"wrong {what}"]


@pytest.mark.parametrize("what", ["columns of x", "experts", "experts of a token", "dtype"])
def test_all_refuse_what_differs(found: list[dict[Any, Any]], what: str) -> None:
    for rank in range(2):
        assert f"rank {1 - rank} of the group has" in found[rank][f"other {what}"]
        assert f"for the {what}" in found[rank][f"other {what}"]


def test_numbers_that_are_exchanged_have_names(found: list[dict[Any, Any]]) -> None:
    assert "has torch.float16 for the dtype, this one torch.float32" in found[0]["other dtype"]


def test_threads_and_stages_change_no_bit(found: list[dict[Any, Any]]) -> None:
    assert all(same_bits(a, b) for a, b in zip(*found[0]["threads"], strict=True))


def test_compilers_keep_all_calls(found: list[dict[Any, Any]]) -> None:
    """Those without a use, equal ones, and those of no tokens: the other rank waits for them."""
    for rank in range(2):
        x, y = LAYERS["skewed"].of(rank, 2)[0], found[rank][2, "skewed", 1][0]
        assert same_bits(found[rank]["unused"], x * 2 if rank else y)
        if rank:
            assert same_bits(found[rank]["twice"], y + y)
            assert found[rank]["no tokens"].shape == x.shape
    assert found[0]["no tokens"].shape == (0, 9)


def test_second_derivatives_are_refused(found: list[dict[Any, Any]]) -> None:
    for rank in range(2):
        assert "no second derivatives" in found[rank]["second"]


def test_another_call(found: list[dict[Any, Any]]) -> None:
    for rank in range(2):
        assert f"rank {1 - rank} of the group is in another call" in found[rank]["crossed"]


def test_experts_of_a_seed(found: list[dict[Any, Any]]) -> None:
    """Are those of one process, shared out."""
    assert [found[rank]["seeded"] for rank in range(2)] == [[True, True]] * 2
    assert same_bits(found[0]["routers"], found[1]["routers"])


def test_group_that_isnt_one() -> None:
    for group in (-100, "0"):
        with pytest.raises(ValueError, match="wanted a process group"):
            effk.moe.MoEMLP(8, 5, 6, 2, group=group)


def test_unknown_group(found: list[dict[Any, Any]]) -> None:
    for rank in range(2):
        assert "effk::moe_mlp_ep: group is 'nobody'" in found[rank]["no group"]


def test_errors_leave_the_group_usable(found: list[dict[Any, Any]]) -> None:
    for rank in range(2):
        assert same_bits(found[rank]["afterwards"], found[rank][2, "skewed", 1][0])


# A rank that is lost -------------------------------------------------------------------------------------------------

TIMEOUT = 5.0


def rank_that_waits(rank: int, groups: Groups, ends: bool) -> tuple[str, float] | None:
    given = LAYERS["skewed"].of(rank, 2)
    name = groups[2].group_name
    FORWARD(*given, name, stages=2)
    start = time.monotonic()
    if rank == 1:
        if ends:
            os._exit(LOST)
        time.sleep(3 * TIMEOUT)
        os._exit(LOST)
    try:
        FORWARD(*given, name, stages=2)
    except RuntimeError as error:
        said = str(error), time.monotonic() - start
        torch.save(said, f"{os.environ['EFFK_TEST_FOLDER']}/0.pt")
        os._exit(LOST)  # the group can't be taken down in order any more
    return None


rank_of_one_that_dies = functools.partial(rank_that_waits, ends=True)
rank_of_one_that_sleeps = functools.partial(rank_that_waits, ends=False)


@pytest.mark.parametrize("work", [rank_of_one_that_dies, rank_of_one_that_sleeps], ids=["dies", "sleeps"])
def test_lost_rank(work: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error within the group's timeout, and never a hang."""
    monkeypatch.setenv("EFFK_TEST_FOLDER", str(tmp_path))
    said, seconds = on_ranks(work, tmp_path, (2,), timeout=TIMEOUT)[0]
    assert said and seconds < 2 * TIMEOUT
