"""How often `effk.lora.Selector` is wrong, and what that costs.

For layers of several sizes the selector is calibrated as a bank does it. Apart from that, and after it, both ways are
measured in a model: the time of a switch, and of passes through all layers with adapters merged and token by token. A
case is a size, a number of tokens in each pass, adapters of one rank, and a number of passes until the next switch. Its
regret is the time of the chosen way over that of the better one, minus 1, where the time is what adapters cost: the
switch, or what passes take longer than without them. The same over whole passes, with the layers themselves, is
printed too.

    python examples/lora_selector.py --cases
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from effk.lora import Adapter, AdapterBank, Selector
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STEPS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Sizes:
    shapes: tuple[tuple[int, int, int], ...]  # layers, out features, in features
    tokens: tuple[int, ...]
    sets: tuple[int, ...]
    ranks: tuple[int, ...]
    runs: int


FULL = Sizes(((8, 1024, 1024), (4, 4096, 1024), (4, 2048, 2048)), (1, 2, 4, 8, 16), (1, 2, 3, 4), (8, 16, 32, 64), 7)
QUICK = Sizes(((2, 128, 64), (2, 64, 192)), (1, 4), (1, 2), (4, 8), 3)


@dataclass(frozen=True)
class Case:
    """What was measured, in seconds."""

    shape: tuple[int, int, int]
    tokens: int
    set: int
    rank: int
    switch: float
    merged: float  # a pass
    extra: float  # what a pass takes longer token by token

    def costs(self, steps: int, whole: bool) -> dict[str, float]:
        """Of both ways; of adapters only, or with the layers themselves."""
        layers = steps * self.merged if whole else 0.0
        return {"merged": self.switch + layers, "token": steps * self.extra + layers}


def make_bank(layers: int, rows: int, cols: int, sizes: Sizes, dtype: torch.dtype) -> tuple[nn.ModuleList, AdapterBank]:
    """As many adapters of each rank as the largest set has."""
    model = nn.ModuleList([nn.Linear(cols, rows, bias=False, dtype=dtype) for _ in range(layers)])
    adapters = {
        f"{rank}.{i}": Adapter(
            {str(j): (torch.randn(rank, cols), 0.01 * torch.randn(rows, rank)) for j in range(layers)}, 0.5
        )
        for rank in sizes.ranks
        for i in range(max(sizes.sets))
    }
    return model.requires_grad_(False), AdapterBank(model, adapters, progress=False)


def run_passes(model: nn.ModuleList, x: Tensor, seconds: float = 4e-3) -> float:
    """Seconds of a pass: the least of several, after one that fills caches as they are in use."""
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        for layer in model:
            layer(x)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measure(model: nn.ModuleList, bank: AdapterBank, shape: tuple[int, int, int], sizes: Sizes) -> list[Case]:
    """All cases in turns, in another order each time; medians."""
    cases = [(t, k, r) for t in sizes.tokens for k in sizes.sets for r in sizes.ranks]
    found: dict[tuple[int, int, int], list[tuple[float, float, float]]] = {case: [] for case in cases}
    x = {t: torch.randn(t, shape[2]).to(bank.dtype) for t in sizes.tokens}
    order = random.Random(0)
    for run in range(sizes.runs + 1):
        order.shuffle(cases)
        for tokens, k, rank in cases:
            ids = torch.tensor([bank.names.index(f"{rank}.{i}") for i in range(k)])
            gates = torch.rand(k)
            bank.apply_mode("token")
            bank.route(ids, gates)
            token = run_passes(model, x[tokens])
            bank.unmerge()
            run_passes(model, x[tokens])
            start = time.perf_counter()
            bank.switch(ids, gates)
            switch = time.perf_counter() - start
            merged = run_passes(model, x[tokens])
            if run > 0:
                found[tokens, k, rank].append((switch, merged, token - merged))
    return [
        Case(shape, *case, *(statistics.median(times) for times in zip(*taken, strict=True)))
        for case, taken in found.items()
    ]


def report(cases: Sequence[tuple[Case, int, str]], whole: bool) -> str:
    """Of cases, passes until the next switch, and what the selector chose."""
    costs = [(case.costs(steps, whole), chosen) for case, steps, chosen in cases]
    regrets = [cost[chosen] / max(min(cost.values()), 1e-9) - 1 for cost, chosen in costs]
    by_time = sum(cost[chosen] for cost, chosen in costs) / sum(min(cost.values()) for cost, _ in costs) - 1
    wrong = sum(regret > 0 for regret in regrets)
    return (
        f"mean {statistics.fmean(regrets):.1%}, by time {by_time:.1%}, worst {max(regrets):.1%}; "
        f"{wrong} of {len(regrets)} choices were wrong"
    )


def fixed(cases: Sequence[tuple[Case, int, str]], way: str) -> list[tuple[Case, int, str]]:
    return [(case, steps, way) for case, steps, _ in cases]


def main(argv: Sequence[str] | None = None) -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default bfloat16)")
    parser.add_argument("--cases", action="store_true", help="print each case")
    parser.add_argument("--quick", action="store_true", help="a few tiny layers")
    options = parser.parse_args(argv)
    sizes = QUICK if options.quick else FULL

    torch.manual_seed(0)
    everything: list[tuple[Case, int, str]] = []
    for shape in sizes.shapes:
        model, bank = make_bank(*shape, sizes, DTYPES[options.dtype])
        start = time.perf_counter()
        selector = Selector.calibrate(bank)
        taken = time.perf_counter() - start
        with torch.inference_mode():
            measured = measure(model, bank, shape, sizes)
        cases = [
            (case, steps, selector.choose(case.tokens, steps, [case.rank] * case.set))
            for case in measured
            for steps in STEPS
        ]
        title = f"{shape[0]} layers of {shape[1]}x{shape[2]}, {options.dtype}"
        print(f"{title}: calibrated in {taken:.2f} s; regret {report(cases, False)}")
        everything += cases
    if options.cases or options.quick:
        print("  layers  out   in tokens set rank passes  switch ms   apply ms   chosen   better   regret")
        for case, steps, chosen in everything:
            cost = case.costs(steps, False)
            better = min(cost, key=lambda way: cost[way])
            layers, rows, cols = case.shape
            print(
                f"  {layers:6} {rows:4} {cols:4} {case.tokens:6} {case.set:3} {case.rank:4} {steps:6} "
                f"{1e3 * cost['merged']:10.3f} {1e3 * cost['token']:10.3f} {chosen:>8} {better:>8} "
                f"{cost[chosen] / max(cost[better], 1e-9) - 1:8.1%}"
            )
    print(f"regret: {report(everything, False)}")
    print(f"with the layers' own time: {report(everything, True)}")
    for way in ("merged", "token"):
        print(f"always {way!r}: {report(fixed(everything, way), False)}")


if __name__ == "__main__":
    main()
