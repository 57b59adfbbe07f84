"""A problem of the benchmark that takes no time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from effk.perf.harness.check import difference
from effk.perf.harness.problem import Derived, Peer, Problem, Work

W = torch.ones(16, 24)


def unpack_problem(
    peers: Sequence[Peer] = (), derived: Sequence[Derived] = (), wanted: float = 0.0, **size: int
) -> Problem:
    """lscd_unpack of W, to whose expected result `wanted` is added."""

    def make(problem: Problem, device: torch.device) -> Work:
        packed = torch.ops.effk.lscd_pack(W)
        expected = (W + wanted).double()
        return Work(
            inputs=W,
            arguments=lambda w: ((*packed, 16, 24), {}),
            check=lambda y, own: difference(y, expected, torch.zeros_like(expected)),
            bytes=1000,
            flops=0.0,
            dtype=torch.float32,
        )

    return Problem("lscd_unpack", {"rows": 16, **size}, make, {"cpu": peers}, {"cpu": derived})
