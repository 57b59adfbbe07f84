"""Memory that a solve takes above the process that holds its scene: effk's or Ceres', each in a process of its own.

python -m effk.perf.peers.ba_memory aerial effk
python -m effk.perf.peers.ba_memory aerial ceres-iterative
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import ba


def resident() -> int:
    """Bytes of this process in memory, as Linux tells."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak(call: Callable[[], Any]) -> tuple[int, float, Any]:
    """The most bytes above those before, sampled; seconds; the result."""
    before, most, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.005):
            most = max(most, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return max(most, resident()) - before, seconds, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scene", choices=["aerial", "ring", "street"])
    parser.add_argument("solver", choices=["effk", *ba.CERES])
    args = parser.parse_args()
    cpu = torch.device("cpu")
    scene = ba.scene(args.scene, *(ba.RING[key] for key in ("C", "P", "O")), cpu)[0]
    start = ba.Start(scene, {"max_iterations": 200})
    small = ba.Start(ba.scene("ring", ba.SMALL["C"], ba.SMALL["P"], ba.SMALL["O"], cpu)[0], start.options)

    def solve(given: ba.Start) -> Any:
        if args.solver == "effk":
            return ba._run(lambda name: getattr(torch.ops.effk, name), "ba_solve", given)()
        return ba.CeresProblem(given, ba.CERES[args.solver])()  # built here, as its memory is the solver's

    with torch.inference_mode():
        solve(small)  # code and threads
        most, seconds, (cameras, points) = peak(lambda: solve(start))
        cost = float(torch.ops.effk.ba_cost(cameras, points, *ba.given(scene)[2:]))
    print(f"{args.scene}, {args.solver}: {most / 1e6:.0f} MB more, {seconds:.1f} s, cost {cost:.6g}")


if __name__ == "__main__":
    main()
