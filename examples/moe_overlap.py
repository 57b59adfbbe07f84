"""How long a layer of experts over ranks takes, by its number of stages: measured here, or predicted for a cluster.

Without ranks it predicts, by `effk.moe.overlap` and the figures of a network and a GPU that are given:

    python examples/moe_overlap.py [--bandwidth 160e9] [--stage 40e-6] [--flops 500e12] ...

and compares gains with those that EPS-MoE's paper reports. With ranks it measures layers here, with the costs that the
library measures for itself, and tells how far its predictions are off:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/moe_overlap.py [--tokens 1 8 64 512]
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable

import effk
import torch
import torch.distributed as dist
from effk.moe.overlap import Costs, Load, best_stages, predict
from rich.console import Console
from rich.table import Table

# Name, load of all ranks together: tokens, ranks, experts, pairs, K, I; the gain that is reported, and of what.
PAPER = (
    ("DeepSeek-V2, 8 H800, 1K tokens", Load(1024 / 8, 8, 160, 6, 5120, 1536), "21.8% of prefill, with kernels chosen"),
    ("DeepSeek-V2, 8 H800, 8K tokens", Load(8192 / 8, 8, 160, 6, 5120, 1536), "12.8% of prefill, with kernels chosen"),
    ("Mixtral 8x7B, 8 H800, 4K tokens", Load(4096 / 8, 8, 8, 2, 4096, 14336), "4.8% of time to the first token"),
)


def cluster(args: argparse.Namespace) -> Costs:
    return Costs.of_limits(args.call, args.stage, 1 / args.bandwidth, args.hidden, args.flops, args.memory)


def show(table: Table) -> None:
    Console(width=110).print(table)


def simulate(args: argparse.Namespace) -> None:
    costs = cluster(args)
    table = Table(
        "ranks", "tokens of a rank", "1 stage", "best", "stages", "gain", "hidden", title="A layer, predicted"
    )
    for ranks in (8, 16, 32, 64, 128, 256, 512, 1024):
        for tokens in args.tokens or (128, 1024, 8192):
            experts = max(args.experts or 256, ranks)
            load = Load(tokens, ranks, experts, args.pairs, args.cols, args.inner)
            stages = best_stages(load, costs)
            one, best = predict(load, costs, 1), predict(load, costs, stages)
            table.add_row(
                str(ranks),
                str(tokens),
                f"{one.total * 1e3:.3f} ms",
                f"{best.total * 1e3:.3f} ms",
                str(stages),
                f"{one.total / best.total - 1:.1%}",
                f"{best.hidden:.0%}",
            )
    show(table)
    table = Table("", "1 stage", "best", "stages", "gain of the layer", "reported", title="Beside the paper's")
    for name, load, reported in PAPER:
        stages = best_stages(load, costs)
        one, best = predict(load, costs, 1), predict(load, costs, stages)
        gain = f"{one.total / best.total - 1:.1%}"
        table.add_row(name, f"{one.total * 1e3:.3f} ms", f"{best.total * 1e3:.3f} ms", str(stages), gain, reported)
    show(table)
    print(
        "Assumed of a rank: "
        f"{args.bandwidth / 1e9:g} GB/s to others, {args.flops / 1e12:g} Tflop/s, {args.memory / 1e12:g} TB/s, "
        f"{args.call * 1e6:g} us a call and {args.stage * 1e6:g} us a stage more, {args.hidden:.0%} of exchanges "
        "free for products. A reported gain is of a whole model, with its attention; these are of a layer of experts, "
        "in which every token's row goes to a rank once."
    )


def timed(group: dist.ProcessGroup, *calls: Callable[[], object], runs: int) -> list[float]:
    """Median seconds of each, in turns; of the slowest rank in each run."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(runs + 1):
        for call, found in zip(calls, seconds, strict=True):
            dist.barrier(group)
            start = time.perf_counter()
            call()
            spent = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
            dist.all_reduce(spent, dist.ReduceOp.MAX, group=group)
            found.append(float(spent))
    return [statistics.median(found[1:]) for found in seconds]


def measure(args: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    ranks, rank = group.size(), group.rank()
    torch.set_num_threads(args.threads)
    args.experts = args.experts or 64
    dtype = getattr(torch, args.dtype)
    experts = args.experts // ranks
    draw = torch.Generator().manual_seed(rank)
    with torch.inference_mode():
        w13 = (torch.randn(experts, 2 * args.inner, args.cols, generator=draw) * args.cols**-0.5).to(dtype)
        w2 = (torch.randn(experts, args.cols, args.inner, generator=draw) * args.inner**-0.5).to(dtype)
        costs = effk.moe.overlap.calibrate(group, dtype, runs=9)
        table = Table(
            "tokens", "stages", "measured", "products alone", "hidden", "predicted", "off", "gain predicted",
            title=f"{ranks} ranks, {args.threads} thread(s) each, {args.dtype}, E={args.experts} K={args.cols} "
            f"I={args.inner}, {args.pairs} experts a token",
        )  # fmt: skip
        for tokens in args.tokens or (1, 8, 64, 512):
            x = torch.randn(tokens, args.cols, generator=draw).to(dtype)
            weights = torch.rand(tokens, args.pairs, generator=draw)
            ids = torch.rand(tokens, args.experts, generator=draw).topk(args.pairs).indices
            visitors = gathered(group, x, weights, ids, experts)
            y = torch.zeros_like(visitors[0], dtype=torch.float32)
            load = Load(tokens, ranks, args.experts, args.pairs, args.cols, args.inner, element=dtype.itemsize)
            chosen = best_stages(load, costs)
            numbers = sorted({1, 2, 4, 8, chosen} & set(range(1, experts + 1)))

            given, group_name = (x, w13, w2, weights, ids), group.group_name
            layers = [functools.partial(effk.moe.mlp_ep, *given, group_name, stages=n) for n in numbers]
            products = functools.partial(effk.moe.mlp_, y, visitors[0], w13, w2, *visitors[1:])
            alone, *times = timed(group, products, *layers, runs=args.runs)
            one = predict(load, costs, 1)
            for stages, seconds in zip(numbers, times, strict=True):
                told = predict(load, costs, stages)
                hidden = 1 - (seconds - alone) / max(times[0] - alone, 1e-9)
                table.add_row(
                    str(tokens),
                    f"{stages}{' (chosen)' if stages == chosen else ''}",
                    f"{seconds * 1e3:.2f} ms",
                    f"{alone * 1e3:.2f} ms",
                    f"{hidden:.0%}" if stages > 1 else "",
                    f"{told.total * 1e3:.2f} ms",
                    f"{told.total / seconds - 1:+.1%}",
                    f"{one.total / told.total - 1:+.1%}",
                )
        if rank == 0:
            show(table)
            print(costs)
    dist.destroy_process_group()


def gathered(
    group: dist.ProcessGroup, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, experts: int
) -> list[torch.Tensor]:
    """x, weights and ids of the tokens that have experts here."""
    everyone: list[list[torch.Tensor]] = [[] for _ in range(group.size())]
    dist.all_gather_object(everyone, [x, weights, ids])
    all_x, all_weights, all_ids = (torch.cat(parts) for parts in zip(*everyone, strict=True))
    local = all_ids - group.rank() * experts
    local = torch.where((local >= 0) & (local < experts), local, -1)
    here = (local >= 0).any(-1)
    return [all_x[here], all_weights[here], local[here]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="*", help="of a rank")
    parser.add_argument("--experts", type=int, help="64, or 256 without ranks and at least one a rank")
    parser.add_argument("--pairs", type=int, default=8, help="experts of a token")
    parser.add_argument("--cols", type=int, default=2048, help="K")
    parser.add_argument("--inner", type=int, default=768, help="I")
    ranks = parser.add_argument_group("with ranks")
    ranks.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    ranks.add_argument("--runs", type=int, default=9)
    ranks.add_argument("--threads", type=int, default=1, help="of a rank")
    assumed = parser.add_argument_group("assumed of a rank, without; an H800 by default")
    assumed.add_argument("--bandwidth", type=float, default=160e9, help="bytes a second to others")
    assumed.add_argument("--call", type=float, default=100e-6, help="seconds of a call, with four exchanges")
    assumed.add_argument("--flops", type=float, default=500e12, help="of grouped GEMMs, a second")
    assumed.add_argument("--memory", type=float, default=2.6e12, help="bytes a second")
    assumed.add_argument("--stage", type=float, default=40e-6, help="seconds of a stage more, with two exchanges")
    assumed.add_argument("--hidden", type=float, default=0.88, help="of an exchange: 116 of 132 multiprocessors go on")
    args = parser.parse_args()
    (measure if "RANK" in os.environ else simulate)(args)


if __name__ == "__main__":
    main()
