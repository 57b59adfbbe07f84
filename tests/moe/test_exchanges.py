"""Exchanges through symmetric memory, on CPUs: files that ranks map stand in for NVSHMEM's memory, and what is known of
torch's all_to_all_vdev is done by hand, as slowly as it may be. That torch's own does so on GPUs is unverified.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from effk.moe import exchanges, overlap
from torch import Tensor

from ..kit.ranks import Groups, needs_gloo, on_ranks
from ..kit.tensors import same_bits
from .test_expert_parallel import BACKWARD, FORWARD, Layer

pytestmark = [pytest.mark.xdist_group("moe_ep"), needs_gloo]  # no two of these at a time

LAYERS = {
    "nothing": Layer((0, 0, 0, 0), cols=32),  # the first of all
    "float32": Layer(cols=32),
    "bfloat16": Layer((33, 20, 0, 64), experts=4, cols=32, dtype=torch.bfloat16),
    "more than the buffers hold": Layer((6000, 10, 20, 5000), cols=256),
    "as little as before": Layer((3, 2, 2, 1), cols=64),
    "odd rows": Layer(cols=9),
}


class Shared:
    """Symmetric memory of ranks on one machine."""

    def __init__(self, rank: int, group: Any, folder: Path):
        self.rank, self.group, self.folder = rank, group, folder
        self.numbers: dict[int, int] = {}  # of what was allocated, by its address
        self.kept: list[Tensor] = []
        self.calls = 0

    def file(self, rank: int, number: int, size: int, dtype: torch.dtype) -> Tensor:
        return torch.from_file(str(self.folder / f"{rank}-{number}"), shared=True, size=size, dtype=dtype)

    def empty(self, *size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        assert device.type == "cpu"
        made = self.file(self.rank, len(self.kept), math.prod(size), dtype).view(size)
        self.numbers[made.data_ptr()] = len(self.kept)
        self.kept.append(made)
        dist.barrier(self.group)  # which rendezvous has
        return made

    def of(self, rank: int, t: Tensor) -> Tensor:
        """The same place of another rank's memory."""
        return self.file(rank, self.numbers[t.data_ptr()], t.numel(), t.dtype).view(t.shape)

    def all_to_all_vdev(self, rows: Tensor, out: Tensor, splits: Tensor, found: Tensor, group_name: str) -> None:
        assert group_name == self.group.group_name
        self.calls += 1
        ranks = len(splits)
        begins = splits.cumsum(0) - splits
        for r in range(ranks):
            theirs = self.of(r, found)
            theirs[0, self.rank], theirs[1, self.rank] = splits[r], begins[r]
        dist.barrier(self.group)
        if (self.calls + self.rank) % ranks == 0:
            time.sleep(0.02)  # the others are through by then, and on their way to the next
        assert rows.nbytes >= 63 << 16, "fewer blocks than 64 for both are another number of pieces"
        for blocks in (16, 64):
            assert not (found[0] * rows.stride(0) % max(1, blocks // ranks)).any(), "stops the device"
        at = 0
        for r, (count, begin) in enumerate(found.T.tolist()):
            out[at : at + count] = self.of(r, rows)[begin : begin + count]
            at += count
        found[1] = found[0].cumsum(0) - found[0]


def rank_of_all(rank: int, groups: Groups, folder: Path, first: str) -> dict[str, Any]:
    """Of each layer, its results by collectives and through symmetric memory, and how often that was used."""
    ((ranks, group),) = groups.items()
    shared = Shared(rank, group, folder)
    found: dict[str, Any] = {}

    @contextlib.contextmanager
    def memory(usable: bool) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exchanges, "usable", lambda group, device: usable)
            patch.setattr(symmetric_memory, "empty", shared.empty)
            yield

    def results(layer: Layer, usable: bool) -> list[Tensor]:
        given, grad = layer.of(rank, ranks), layer.grad(ranks)[layer.slices(ranks)[rank]]
        with memory(usable):
            of_stages = [FORWARD(*given, group.group_name, stages=stages) for stages in (1, 3)]
            return [*of_stages, *BACKWARD(grad, *given, group.group_name, stages=2)]

    with torch.library._scoped_library("symm_mem", "IMPL") as library:
        library.impl("all_to_all_vdev", shared.all_to_all_vdev, "CPU")
        if first == "calibration":
            with memory(True):
                found["costs"] = overlap.calibrate(group, torch.float32, runs=1)
            found["calibrated"] = shared.calls
        found["calls"] = shared.calls
        for name, layer in LAYERS.items():
            expected = results(layer, False)
            assert shared.calls == found["calls"]
            got = results(layer, True)
            found[name] = (expected, got, shared.calls - found["calls"])
            found["calls"] = shared.calls
        results(LAYERS["float32"], rank > 0)  # not on all ranks
        found["not on all"] = shared.calls - found["calls"]
    return found


@pytest.mark.parametrize("first", ("layers", "calibration"))
@pytest.mark.parametrize("ranks", (1, 2, 4))
def test_symmetric_memory_changes_no_bit(ranks: int, first: str, tmp_path: Path) -> None:
    results = on_ranks(functools.partial(rank_of_all, folder=tmp_path, first=first), tmp_path, (ranks,))
    for found in results:
        for name in LAYERS:
            expected, got, calls = found[name]
            assert all(same_bits(a, b) for a, b in zip(expected, got, strict=True)), name
            # Rows and sums of each stage there and back; announcements where they are long.
            assert calls == 0 if name == "odd rows" else calls >= 2 * (1 + min(3, LAYERS[name].experts) + 2), name
        assert found["not on all"] == 0
        if first == "calibration":
            assert found["costs"] == results[0]["costs"] and found["calibrated"] > 0


def test_usable_with_nvshmem_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else torch's symmetric memory is made of can't take numbers of rows on the device."""
    group, gpu = SimpleNamespace(size=lambda: 4), torch.device("cuda", 0)
    monkeypatch.setattr(symmetric_memory, "is_nvshmem_available", lambda: True)
    for backend, size, world, wanted in (
        ("NVSHMEM", 4, 4, True),
        ("CUDA", 4, 4, False),
        (None, 4, 4, False),
        ("NVSHMEM", 6, 6, False),
        ("NVSHMEM", 4, 8, False),
    ):
        monkeypatch.setattr(symmetric_memory, "get_backend", lambda device, backend=backend: backend)
        monkeypatch.setattr(group, "size", lambda size=size: size)
        monkeypatch.setattr(dist, "get_world_size", lambda world=world: world)
        assert exchanges.usable(group, gpu) is wanted  # type: ignore[arg-type]
        assert not exchanges.usable(group, torch.device("cpu"))  # type: ignore[arg-type]
    monkeypatch.setattr(symmetric_memory, "get_backend", lambda device: "NVSHMEM")
    monkeypatch.setattr(group, "size", lambda: 4)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    assert exchanges.usable(group, gpu)  # type: ignore[arg-type]
    monkeypatch.setattr(symmetric_memory, "is_nvshmem_available", lambda: False)
    assert not exchanges.usable(group, gpu)  # type: ignore[arg-type]
