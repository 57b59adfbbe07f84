"""Processes that are the ranks of a gloo group, for tests of ops that take one."""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, its default arguments would keep a group, whose threads outlive Python

SECONDS = 120  # for all that ranks do
Groups = dict[int, Any]  # number of ranks -> the group of the first so many

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


def solo() -> str:
    """The name of a group of this process alone, beside whatever else it initializes."""
    return _solo().group_name


@functools.cache  # which keeps the group: it is known by its name as long as it lives
def _solo() -> Any:
    name, store = "effk_solo", dist.HashStore()
    group = dist.ProcessGroup(store, 0, 1)
    backend = dist.ProcessGroupGloo(store, 0, 1, datetime.timedelta(seconds=SECONDS))
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    group._set_group_name(name)
    torch._C._distributed_c10d._register_process_group(name, group)
    return group


def _rank(rank: int, folder: str, sizes: Sequence[int], seconds: float, work: Callable[[int, Groups], Any]) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=seconds)
    file = f"file://{folder}/init"
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=max(sizes), timeout=limit)
    groups = {size: dist.new_group(list(range(size)), timeout=limit) for size in sizes}
    torch.save(work(rank, groups), f"{folder}/{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def on_ranks(
    work: Callable[[int, Groups], Any],
    folder: Path,
    sizes: Sequence[int],
    seconds: float = SECONDS,
    timeout: float | None = None,
) -> list[Any]:
    """What work(rank, groups) returns in each process; None where one has ended on its own.

    Args:
        work: of a module's top level.
        sizes: of groups; there are as many processes as the largest has.
        seconds: that all may take.
        timeout: seconds of the groups; as many by default.
    """
    spawn = torch.multiprocessing.get_context("spawn")
    args = (str(folder), sizes, seconds if timeout is None else timeout, work)
    ranks = [spawn.Process(target=_rank, args=(rank, *args), daemon=True) for rank in range(max(sizes))]
    for process in ranks:
        process.start()
    end = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        if process.is_alive():
            process.kill()
            process.join()
    assert all(code in (0, LOST) for code in codes), f"exit codes {codes}; None is one that hung"
    files = [folder / f"{rank}.pt" for rank in range(max(sizes))]
    return [torch.load(f, weights_only=False) if f.exists() else None for f in files]


LOST = 77  # the exit code of a rank that a test loses
