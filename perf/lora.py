"""lora: problems, peers and goals.

Inputs are integers times powers of two, so small that float32 sums are exact in any order, and gates are powers of two.
So effk's result must be the float64 one rounded once to its type, whatever the back end; every entry of it is checked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import effk  # noqa: F401
import torch
from torch import Tensor, nn

from .harness.check import difference, rounding
from .harness.problem import BANDWIDTH, Call, Derived, Goal, Peer, Problem, Work, not_installed, only
from .harness.scenarios import Service

SEED = 0
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
GRID = 2.0**-12  # of weights
PEER_ROUNDINGS = 8  # of a peer that keeps partial sums, or the weight between two steps, in its result's type


def generator(device: torch.device, seed: int = SEED) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def signs(random: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """1 or -1."""
    return (2 * torch.randint(0, 2, shape, generator=random, device=random.device) - 1).to(dtype)


@dataclass
class Layers:
    """Weights with their adapters, and which of these are to be merged instead of which."""

    base: list[Tensor]
    w: list[Tensor]
    a: list[Tensor]
    b: list[Tensor]
    old_ids: Tensor
    new_ids: Tensor
    gates: Tensor  # of old and new alike


LLAMA_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]  # of a decoder layer


def layers(problem: Problem, device: torch.device) -> Layers:
    """The old adapters are merged in w already."""
    size, random = problem.size, generator(device)
    dtype, adapters, rank, pairs = DTYPES[size["dtype"]], 8, size["rank"], size["k"]
    shapes = LLAMA_7B * 32 if size["layers"] == "llama-7b" else [(size["rows"], size["cols"])] * size["layers"]

    def weight(rows: int, cols: int) -> Tensor:
        values = torch.randn(rows, cols, generator=random, device=device).div_(GRID).round_().mul_(GRID)
        return values.to(dtype)

    base = [weight(*shape) for shape in shapes]
    a = [signs(random, dtype, adapters, rank, cols) for _, cols in shapes]
    b = [signs(random, dtype, adapters, rows, rank) for rows, _ in shapes]
    gates = 2.0 ** -torch.arange(1, pairs + 1, device=device)
    old_ids = torch.arange(pairs, device=device)
    return Layers(base, [t.clone() for t in base], a, b, old_ids, old_ids + pairs, gates)


def update(of: Layers, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What adapters add to a weight, and the magnitude of its terms."""
    b = of.b[layer][ids].double() * of.gates[:, None, None].double()
    total = torch.bmm(b, of.a[layer][ids].double()).sum(0)
    return total, torch.full_like(total, float(of.gates.sum()) * b.shape[2])


def private(of: Layers) -> list[Tensor]:
    """A candidate's own weights: others write to theirs."""
    return [t.clone() for t in of.w]


def merge_work(
    of: Layers, problem: Problem, expected: Callable[[int], tuple[Tensor, Tensor]], arguments: Any, rank: int
) -> Work:
    """expected: layer -> the result and the magnitude of its terms."""

    def check(result: Sequence[Tensor], own: bool) -> str:
        for i, w in enumerate(result):
            value, magnitude = expected(i)
            bound = rounding(w.dtype) * (value.abs() if own else PEER_ROUNDINGS * magnitude)
            if found := difference(w, value, bound):
                return f"w[{i}]: {found}"
        return ""

    elements = sum(t.numel() for t in of.base)
    used = len(of.gates) * rank * sum(sum(t.shape) for t in of.base)  # of a and b
    return Work(
        inputs=of,
        arguments=arguments,
        check=check,
        bytes=(2 * elements + used) * of.base[0].element_size(),
        flops=2.0 * elements * len(of.gates) * rank,
        dtype=of.base[0].dtype,
        written=lambda args, kwargs: args[0],
    )


def make_switch(problem: Problem, device: torch.device) -> Work:
    of = layers(problem, device)
    from_base = problem.size["base"]

    def arguments(of: Layers) -> tuple[tuple[Any, ...], dict[str, Any]]:
        lists = of.old_ids, of.gates, of.new_ids, of.gates
        return (private(of), of.a, of.b, *lists, of.base if from_base else None), {}

    def expected(i: int) -> tuple[Tensor, Tensor]:
        value, magnitude = update(of, i, of.new_ids)
        base = of.base[i].double()
        if not from_base:
            value = value - update(of, i, of.old_ids)[0]
        return base + value, base.abs() + 2 * magnitude

    # In place the old ones are computed too.
    return merge_work(of, problem, expected, arguments, problem.size["rank"] * (1 if from_base else 2))


def make_merge(problem: Problem, device: torch.device) -> Work:
    of = layers(problem, device)

    def expected(i: int) -> tuple[Tensor, Tensor]:
        value, magnitude = update(of, i, of.new_ids)
        return of.base[i].double() + value, of.base[i].double().abs() + magnitude

    return merge_work(
        of,
        problem,
        expected,
        lambda of: ((private(of), of.a, of.b, of.new_ids, of.gates, of.base), {}),
        problem.size["rank"],
    )


def make_unmerge(problem: Problem, device: torch.device) -> Work:
    of = layers(problem, device)
    return merge_work(
        of,
        problem,
        lambda i: (of.base[i].double(), of.base[i].double().abs()),
        lambda of: ((private(of), of.a, of.b, of.new_ids, of.gates, of.base), {}),
        0,
    )


def chosen(of: Layers, layer: int, ids: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """b [N, k R] with the gates in it, and a [k R, K]."""
    a, b = of.a[layer], of.b[layer]
    rows = b.index_select(0, ids) * gates.to(b.dtype)[:, None, None]
    return rows.transpose(0, 1).reshape(b.shape[1], -1), a.index_select(0, ids).reshape(-1, a.shape[2])


def addmm(of: Layers) -> Call:
    w = private(of)

    def call() -> list[Tensor]:
        for i in range(len(w)):
            torch.addmm(of.base[i], *chosen(of, i, of.new_ids, of.gates), out=w[i])
        return w

    return call


def addmm_prepared(of: Layers) -> Call:
    w = private(of)
    operands = [tuple(t.contiguous() for t in chosen(of, i, of.new_ids, of.gates)) for i in range(len(w))]

    def call() -> list[Tensor]:
        for i in range(len(w)):
            torch.addmm(of.base[i], *operands[i], out=w[i])
        return w

    return call


def addmm_in_place(of: Layers) -> Call:
    w = private(of)
    ids, gates = torch.cat([of.old_ids, of.new_ids]), torch.cat([-of.gates, of.gates])

    def call() -> list[Tensor]:
        for i in range(len(w)):
            w[i].addmm_(*chosen(of, i, ids, gates))
        return w

    return call


def peft_switch(adapter_dtype: torch.dtype) -> Callable[[Layers], Call]:
    def make(of: Layers) -> Call:
        from peft import LoraConfig, get_peft_model

        model = nn.Module()
        for i, w in enumerate(private(of)):
            linear = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta", dtype=w.dtype)
            linear.weight = nn.Parameter(w, requires_grad=False)
            model.add_module(f"layer{i}", linear)
        rank = of.a[0].shape[1]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[f"layer{i}" for i in range(len(of.w))])
        numbers = [int(e) for e in (*of.old_ids, *of.new_ids)]
        peft_model: Any = get_peft_model(model, config, adapter_name=str(numbers[0]), autocast_adapter_dtype=False)
        for e in numbers[1:]:
            peft_model.add_adapter(str(e), config, autocast_adapter_dtype=False)
        for i in range(len(of.w)):
            layer = getattr(model, f"layer{i}")
            for gate, e in zip((*of.gates, *of.gates), numbers, strict=True):
                layer.lora_A[str(e)].weight = nn.Parameter(of.a[i][e].to(adapter_dtype), requires_grad=False)
                layer.lora_B[str(e)].weight = nn.Parameter(of.b[i][e].to(adapter_dtype), requires_grad=False)
                layer.set_scale(str(e), float(gate))
        old, new = ([str(int(e)) for e in ids] for ids in (of.old_ids, of.new_ids))
        peft_model.merge_adapter(old)

        def call() -> list[Tensor]:
            peft_model.unmerge_adapter()
            peft_model.merge_adapter(new)
            return [getattr(model, f"layer{i}").weight for i in range(len(of.w))]

        return call

    return make


def no_peft(work: Work) -> str:
    return not_installed("peft") or ("too many layers" if len(work.inputs.w) > 8 else "")


def copies(of: Layers) -> Call:
    w = private(of)

    def call() -> list[Tensor]:
        for i in range(len(w)):
            w[i].copy_(of.base[i])
        return w

    return call


is_16_bit = only(lambda of: of.w[0].element_size() == 2, "adapters of the weights' type are float32 ones here")

ADDMM_NOTE = "a loop over the layers, gates multiplied into b"
SWITCH_PEERS = (
    Peer(
        "peft",
        peft_switch(torch.float32),
        "PEFT's unmerge_adapter and merge_adapter (two roundings an adapter), float32 adapters as it loads them",
        no_peft,
        graph=False,
    ),
    Peer(
        "peft-16-bit",
        peft_switch(torch.bfloat16),
        "the same with adapters of the weights' type",
        lambda work: no_peft(work) or is_16_bit(work),
        graph=False,
    ),
    Peer("addmm", addmm, f"torch.addmm(base, b, a, out=w): {ADDMM_NOTE}, the chosen rows of a and b gathered"),
    Peer(
        "addmm-prepared",
        addmm_prepared,
        f"torch.addmm(base, b, a, out=w): {ADDMM_NOTE}, the rows gathered beforehand, which isn't timed",
    ),
)
IN_PLACE_PEERS = (Peer("addmm", addmm_in_place, f"w.addmm_(b, a) of old and new adapters together: {ADDMM_NOTE}"),)
UNMERGE_PEERS = (Peer("copy", copies, "Tensor.copy_, a layer at a time"),)


# --- Token by token ---------------------------------------------------------------------------------------------------


@dataclass
class Tokens:
    x: Tensor
    a: Tensor
    b: Tensor
    ids: Tensor
    gates: Tensor
    y: Tensor
    ranks: Tensor | None


@functools.lru_cache(maxsize=1)  # problems of the same adapters follow each other
def adapters_of(
    adapters: int, rank: int, rows: int, cols: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    random = generator(device)
    return signs(random, dtype, adapters, rank, cols), signs(random, dtype, adapters, rows, rank)


def make_apply(problem: Problem, device: torch.device) -> Work:
    size, random = problem.size, generator(device, SEED + 1)
    dtype, tokens, k, adapters, rank = DTYPES[size["dtype"]], *(size[n] for n in ("tokens", "k", "adapters", "rank"))
    rows, cols = size["rows"], size["cols"]

    def integers(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=random, device=device).to(dtype)

    x, y = integers(tokens, cols), integers(tokens, rows)
    a, b = adapters_of(adapters, rank, rows, cols, dtype, device)
    ids = torch.rand(tokens, adapters, generator=random, device=device).argsort(1)[:, :k].contiguous()
    gates = 2.0 ** -torch.randint(0, 4, (tokens, k), generator=random, device=device)
    ranks = None
    if size.get("ranks") == "mixed":  # the largest and small ones
        ranks = torch.tensor([rank if e % 4 == 0 else max(1, rank // 8) for e in range(adapters)], device=device)
    expected, magnitude = y.double(), y.double().abs()
    used = 0
    for e in range(adapters):
        r = rank if ranks is None else int(ranks[e])
        gate = torch.where(ids == e, gates, 0).sum(1, keepdim=True).double()
        inner = x.double() @ a[e, :r].double().T
        expected = expected + gate * (inner @ b[e, :, :r].double().T)
        magnitude = magnitude + gate * (x.double().abs().sum(1, keepdim=True) * r)
        used += r * int((ids == e).any())
    if magnitude.max() * 8 >= 2**24:
        raise ValueError(f"{problem.name}: these inputs don't sum exactly in float32")

    def check(result: Tensor, own: bool) -> str:
        bound = rounding(dtype) * (expected.abs() if own else PEER_ROUNDINGS * magnitude)
        return difference(result, expected, bound)

    elements = 2 * y.numel() + x.numel() + used * (rows + cols)
    mean_rank = used / max(1, int(ids.unique().numel()))
    return Work(
        inputs=Tokens(x, a, b, ids, gates, y, ranks),
        arguments=lambda of: ((of.x, of.a, of.b, of.ids, of.gates, of.y, of.ranks), {}),
        check=check,
        bytes=elements * x.element_size(),
        flops=2.0 * tokens * k * mean_rank * (rows + cols),
        dtype=dtype,
    )


def bmm(of: Tokens) -> Call:
    tokens, k = of.ids.shape

    def call() -> Tensor:
        pairs = of.ids.flatten()
        inner = torch.bmm(of.a.index_select(0, pairs), of.x.repeat_interleave(k, 0)[:, :, None])
        outer = torch.bmm(of.b.index_select(0, pairs), inner).view(tokens, k, -1)
        return of.y + (outer * of.gates.to(outer.dtype)[:, :, None]).sum(1)

    return call


def dense(of: Tokens) -> Call:
    """b transposed beforehand: it is in no order that a matrix product could take."""
    adapters, rank, cols = of.a.shape
    a = of.a.view(adapters * rank, cols)
    b = of.b.transpose(1, 2).reshape(adapters * rank, -1).contiguous()

    def call() -> Tensor:
        gates = of.x.new_zeros(len(of.x), adapters).scatter_(1, of.ids, of.gates.to(of.x.dtype))
        inner = torch.mm(of.x, a.t()).view(-1, adapters, rank) * gates[:, :, None]
        return torch.addmm(of.y, inner.view(-1, adapters * rank), b)

    return call


def loop(of: Tokens) -> Call:
    ranks = [of.a.shape[1]] * len(of.a) if of.ranks is None else of.ranks.tolist()

    def call() -> Tensor:
        y = of.y.clone()
        for e in of.ids.unique().tolist():
            token, pair = (of.ids == e).nonzero(as_tuple=True)
            inner = of.x[token] @ of.a[e, : ranks[e]].t()
            gates = of.gates[token, pair].to(inner.dtype)
            y.index_add_(0, token, (inner * gates[:, None]) @ of.b[e, :, : ranks[e]].t())
        return y

    return call


has_one_rank = only(lambda of: of.ranks is None, "computes the whole rank for all adapters")

APPLY_PEERS = (
    Peer("bmm", bmm, "index_select of a and b for each pair, two bmm", has_one_rank),
    Peer(
        "dense",
        dense,
        "two dense products over all adapters' rows, the unselected times 0; b transposed beforehand",
        has_one_rank,
    ),
    Peer("loop", loop, "a loop over the adapters in use: two products and index_add_", graph=False),
)

# --- The list ---------------------------------------------------------------------------------------------------------


def on_all_devices(
    op: str,
    size: Mapping[str, Any],
    make: Any,
    peers: Sequence[Peer],
    derived: Sequence[Derived] = (),
    quick: bool = False,
) -> Problem:
    return Problem(op, size, make, dict.fromkeys(("cpu", "cuda"), peers), {"cpu": (), "cuda": derived}, quick)


def merging(
    dtype: str, side: int = 2048, rank: int = 16, base: bool = True, count: int | str = 4, quick: bool = False
) -> Problem:
    shape = {"rows": side, "cols": side} if isinstance(count, int) else {}
    size = {"layers": count, **shape, "rank": rank, "k": 2, "dtype": dtype, "base": base}
    peers = SWITCH_PEERS if base else IN_PLACE_PEERS
    return on_all_devices("lora_switch_", size, make_switch, peers, (BANDWIDTH,), quick)


def others(side: int, quick: bool = False) -> list[Problem]:
    size = {"layers": 4, "rows": side, "cols": side, "rank": 16, "k": 2, "dtype": "bf16"}
    return [
        on_all_devices("lora_merge_", size, make_merge, SWITCH_PEERS[2:], quick=quick),
        on_all_devices("lora_unmerge_", size, make_unmerge, UNMERGE_PEERS, quick=quick),
    ]


def applying(
    tokens: int,
    dtype: str = "bf16",
    k: int = 2,
    adapters: int = 32,
    rank: int = 16,
    side: int = 4096,
    caches: str = "cold",
    ranks: str = "one",
    quick: bool = False,
) -> Problem:
    size = {
        **{"rows": side, "cols": side, "adapters": adapters, "rank": rank, "ranks": ranks, "k": k},
        **{"dtype": dtype, "caches": caches, "tokens": tokens},
    }
    return on_all_devices("lora_apply", size, make_apply, APPLY_PEERS, (BANDWIDTH,), quick)


PROBLEMS = [
    *(merging(dtype) for dtype in DTYPES),
    *(merging("bf16", rank=rank) for rank in (4, 64)),
    merging("bf16", base=False),
    *others(2048),
    *(applying(64, dtype, caches=caches) for dtype in DTYPES for caches in ("cold", "warm")),
    applying(64, ranks="mixed", rank=64),
    *(applying(tokens, adapters=8, rank=64) for tokens in (1, 16)),
    *(applying(tokens) for tokens in (1, 8, 512)),
    # 13 GB of weights, as many of copies, and as many for each candidate.
    replace(merging("bf16", count="llama-7b", rank=64), devices=("cuda",)),
    # For a look, not for a claim.
    *(merging(dtype, 512, quick=True) for dtype in DTYPES),
    merging("bf16", 512, base=False, quick=True),
    *others(512, quick=True),
    *(applying(tokens, side=1024, adapters=8, quick=True) for tokens in (1, 64)),
]

SERVED_BY = ("bmm", "dense")
SERVICES = [
    Service(
        "lora_apply 4096x4096, 2 of 32 adapters",
        lambda n: applying(n, caches="warm"),
        "token",
        {"cpu": 5e-3, "cuda": 1e-3},
        SERVED_BY,
    ),
    Service(
        "lora_apply 1024x1024, 2 of 8 adapters",
        lambda n: applying(n, side=1024, adapters=8, caches="warm", quick=True),
        "token",
        {"cpu": 5e-3, "cuda": 1e-3},
        SERVED_BY,
        largest=8,
        quick=True,
    ),
]

FULL_SWITCH = {"layers": 4, "rows": 2048, "rank": 16, "base": True}
FULL_APPLY = {"rows": 4096, "adapters": 32, "rank": 16, "ranks": "one", "tokens": 64}
GOALS = [
    Goal("lora_switch_", "cpu", "peft", 12.0, {**FULL_SWITCH, "dtype": "bf16"}),
    Goal("lora_switch_", "cpu", "peft-16-bit", 12.0, {**FULL_SWITCH, "dtype": "bf16"}),
    Goal("lora_switch_", "cpu", "addmm", 1.4, {**FULL_SWITCH, "dtype": "bf16"}),
    Goal("lora_switch_", "cpu", "addmm-prepared", 1.4, {**FULL_SWITCH, "dtype": "bf16"}),
    Goal("lora_switch_", "cpu", "peft", 6.0, {**FULL_SWITCH, "dtype": "f32"}),
    Goal("lora_apply", "cpu", "bmm", 3.0, FULL_APPLY),
    Goal("lora_apply", "cpu", "dense", 1.0, FULL_APPLY),
    Goal("lora_apply", "cpu", "loop", 1.0, FULL_APPLY),
    Goal("lora_switch_", "cuda", "bandwidth", 0.85, {"layers": "llama-7b"}),
    Goal("lora_switch_", "cuda", "addmm", 1.2, {"layers": "llama-7b"}),
]
