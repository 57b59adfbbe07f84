"""Every family once, on every CPU level that is here, against its reference. Needs torch and an installed effk alone.

Prints the levels, the fastest last. For machines and versions of torch that the whole suite doesn't run on.
"""

from __future__ import annotations

import copy
from typing import Any

import effk
import torch
from torch import Tensor


def tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [t for one in found for t in tensors(one)] if isinstance(found, (tuple, list)) else []


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    """The op's result, when all levels agree with the reference on it and on what they write into arguments."""

    def run(backend: str) -> list[Tensor]:
        taken = copy.deepcopy(args)
        return tensors([effk.implementation(name, backend)(*taken, **kwargs), taken])

    expected = run("reference")
    for backend in (b for b in effk.backends(name) if b.startswith("cpu-")):
        for wanted, got in zip(expected, run(backend), strict=True):
            assert wanted.dtype == got.dtype and wanted.shape == got.shape, f"{name} on {backend}"
            if wanted.is_floating_point():
                off = (got - wanted).abs().max() / wanted.abs().max()
                assert off < 1e-5, f"{name} on {backend}: off by {off} of the largest"
            else:
                assert torch.equal(wanted, got), f"{name} on {backend}"
    return getattr(torch.ops.effk, name)(*args, **kwargs)


torch.manual_seed(0)
w, x = torch.randn(48, 96), torch.randn(5, 96)

packed = call("lscd_pack", w * (w > 0))
call("lscd_linear", x, *packed, 48, 96, activation="relu")

packed = call("w4a8_pack", w, torch.arange(48) % 8 == 0, 32)
call("w4a8_linear", x, *packed, 32)

a, b = torch.randn(3, 4, 96), torch.randn(3, 48, 4)
ids, gates = torch.tensor([[0, 2], [1, -1], [2, 1], [0, 1], [-1, -1]]), torch.rand(5, 2)
call("lora_merge_", [w.clone()], [a], [b], ids[0], gates[0])
call("lora_apply", x, a, b, ids, gates)

weights, chosen = call("moe_route", torch.randn(5, 4), 2)
call("moe_mlp", x, torch.randn(4, 64, 96) / 10, torch.randn(4, 96, 32) / 6, weights, chosen)

keys, values, q = torch.randn(1, 2, 100, 32), torch.randn(1, 2, 100, 32), torch.randn(1, 4, 32)
codebook = keys[0, :, :16].reshape(2, 16, 4, 8).transpose(1, 2).contiguous()
codes, lut = call("vq_encode", keys, codebook), call("vq_lut", q, codebook)
call("vq_score", lut, codes)
call("vq_attend", q, keys, values, *torch.ops.effk.vq_topk(lut, codes, 10, sink=2, window=4))

scene, _ = effk.ba.generate("ring", cameras=4, points=60, observations=200)
given = (scene.cameras, scene.points, scene.observations, scene.camera_index, scene.point_index)
call("ba_residual", *given)
call("ba_build", *given)
summary = effk.ba.solve(scene)
assert summary.final_cost < summary.initial_cost

try:
    torch.ops.effk.lscd_linear(x[:, 1:], *call("lscd_pack", w), 48, 96)
except RuntimeError as error:
    assert "x has shape [5, 95]" in str(error)
else:
    raise AssertionError("a wrong shape was taken")
print(*effk.status()["cpu_levels"])
