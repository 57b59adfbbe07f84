"""How good the choice between grouped and dense GEMMs is: its regret over a grid of rows, sizes and skew.

Calibrates the cost model (without keeping it), then times a layer of experts with gemm="auto", "grouped" and "dense"
in turn. The regret is how much longer "auto" takes than the better of the other two; below 0 where a choice for each
expert beats both.

    python examples/moe_selector.py [--dtype bfloat16] [--runs 7]
"""

from __future__ import annotations

import argparse
import statistics
import time

import effk
import torch

SIZES = ((32, 1024, 256), (16, 2048, 768), (8, 1024, 2048), (4, 2048, 4096))  # experts, K, I
QUICK_SIZES = ((8, 256, 96), (4, 128, 256))
ROWS = (2, 8, 16, 24, 32, 40, 48, 64, 96, 160)  # of an expert, in the mean
QUICK_ROWS = (2, 64)
SKEWS = ("uniform", "random", "halves")
GEMMS = ("auto", "grouped", "dense")


def experts_of(tokens: int, experts: int, skew: str) -> torch.Tensor:
    """[tokens, 1]: each token's expert."""
    if skew == "uniform":
        ids = torch.arange(tokens) % experts
    elif skew == "random":
        ids = torch.randint(experts, (tokens,))
    else:  # each expert has half as many as the one before
        ids = (torch.rand(tokens).log2().neg().long()).clamp(max=experts - 1)
    return ids[:, None]


def measure(
    experts: int, cols: int, inner: int, rows: int, skew: str, dtype: torch.dtype, runs: int
) -> dict[str, float]:
    """Seconds of each way: the least of all runs, which take turns."""
    tokens = experts * rows
    x, w13, w2 = (
        torch.randn(s).to(dtype) for s in ((tokens, cols), (experts, 2 * inner, cols), (experts, cols, inner))
    )
    ids, weights = experts_of(tokens, experts, skew), torch.ones(tokens, 1)
    times: dict[str, list[float]] = {gemm: [] for gemm in GEMMS}
    for run in range(runs + 1):
        for i in range(len(GEMMS)):  # each after each other one, whose traces it finds in the caches
            gemm = GEMMS[(i + run) % len(GEMMS)] if run % 2 else GEMMS[(run - i) % len(GEMMS)]
            start = time.perf_counter()
            effk.moe.mlp(x, w13, w2, weights, ids, gemm=gemm)
            times[gemm].append(time.perf_counter() - start)
    return {gemm: min(of_gemm[1:]) for gemm, of_gemm in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--quick", action="store_true", help="two tiny layers, single runs")
    args = parser.parse_args()
    sizes, rows_of_experts, runs = (QUICK_SIZES, QUICK_ROWS, 1) if args.quick else (SIZES, args.rows, args.runs)
    dtype = getattr(torch, args.dtype)
    costs = effk.moe.calibrate([dtype], save=False, runs=1 if args.quick else 5)[args.dtype]
    print("costs:", ", ".join(f"{c:.3g}" for c in costs))
    torch.manual_seed(0)
    regrets = []
    print("experts     K     I   rows  skew       auto ms  grouped ms  dense ms  regret")
    with torch.inference_mode():
        for experts, cols, inner in sizes:
            for rows in rows_of_experts:
                for skew in SKEWS:
                    t = measure(experts, cols, inner, rows, skew, dtype, runs)
                    regrets.append(t["auto"] / min(t["grouped"], t["dense"]) - 1)
                    ms = "  ".join(f"{1e3 * t[gemm]:8.2f}" for gemm in GEMMS)
                    print(f"{experts:7} {cols:5} {inner:5} {rows:6}  {skew:8}  {ms}  {regrets[-1]:7.1%}", flush=True)
    worst = max(regrets)
    print(f"regret over {len(regrets)} cases: {statistics.mean(regrets):.1%} in the mean, {worst:.1%} at worst")


if __name__ == "__main__":
    main()
