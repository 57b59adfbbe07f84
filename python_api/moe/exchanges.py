"""How rows travel between the ranks of a group: by its own collectives, or through symmetric memory."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Waits(Protocol):
    def wait(self) -> object: ...


Exchange = Callable[[Tensor, Tensor, list[int], list[int]], Waits]  # received, sent; rows of them by rank


def exchange(
    group: ProcessGroup, received: Tensor, sent: Tensor, received_rows: list[int], sent_rows: list[int]
) -> Waits:
    """Rows by rank, both ways; either tensor has to stay until the work is waited for."""
    return dist.all_to_all_single(received, sent, received_rows, sent_rows, group=group, async_op=True)


def usable(group: ProcessGroup, device: torch.device) -> bool:
    """Whether this process has NVSHMEM for torch's symmetric memory, and the group is one that Symmetric takes."""
    if device.type != "cuda" or torch.version.hip or os.environ.get("TORCH_SYMMMEM_NBLOCKS"):
        return False
    import torch.distributed._symmetric_memory as memory

    ranks = group.size()  # all there are, since NVSHMEM's memory is made and freed by all together
    return (
        ranks.bit_count() == 1
        and ranks == dist.get_world_size()
        and memory.get_backend(device) == "NVSHMEM"
        and memory.is_nvshmem_available()
    )


def through(group: ProcessGroup, device: torch.device, symmetric: bool, most: int) -> Exchange:
    """Exchanges that all ranks make in the same order.

    Args:
        symmetric: whether all ranks have found it `usable`.
        most: rows that one may send, or be sent, the same on all ranks.
    """
    if not symmetric:
        return functools.partial(exchange, group)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    of_group = _known.setdefault(group, {})
    if device not in of_group:
        of_group[device] = Symmetric(group.size(), device)
    return functools.partial(of_group[device].exchange, group, most)


class Symmetric:
    """Exchanges in which each rank reads what others have for it from their memory, by torch's all_to_all_vdev.

    They are made one after the other, beside what else the device does. Each begins with all ranks in step, and so
    after all have read what was in the one before: a buffer that others read from, or write their numbers of rows to,
    may be used again in the second exchange after. There are two of them, in turn.

    all_to_all_vdev cuts what a rank has for another into as many pieces as it has blocks of threads, 64 / ranks or
    16 / ranks for buffers of 4 MiB and more, and stops the device where they aren't even. They are even where ranks are
    a power of two and a row a multiple of 64 bytes; other rows go by the group's collectives.

    On a CPU, where tests stand in for all_to_all_vdev, there is no stream.
    """

    def __init__(self, ranks: int, device: torch.device):
        self.ranks, self.device = ranks, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.rows: list[Tensor] = []
        self.arrived = torch.empty(0)
        self.turn = itertools.cycle(range(2))

    def exchange(
        self,
        group: ProcessGroup,
        most: int,
        received: Tensor,
        sent: Tensor,
        received_rows: list[int],
        sent_rows: list[int],
    ) -> Waits:
        width = sent.shape[1] * sent.element_size()
        if width % 64 or not width:
            return exchange(group, received, sent, received_rows, sent_rows)
        self.reserve(group, most * width)
        turn = next(self.turn)
        whole = len(self.arrived) // width * width
        rows, arrived = (b[:whole].view(-1, width) for b in (self.rows[turn], self.arrived))
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            rows[: len(sent)] = sent.view(torch.uint8)
            self.splits.copy_(torch.tensor(sent_rows), non_blocking=True)
            torch.ops.symm_mem.all_to_all_vdev(rows, arrived, self.splits, self.found[turn], group.group_name)
            received.view(torch.uint8).copy_(arrived[: len(received)])
        if not self.stream:
            return Arrival(None, self.device)
        for t in (received, sent):
            t.record_stream(self.stream)
        return Arrival(self.stream.record_event(), self.device)

    def reserve(self, group: ProcessGroup, nbytes: int) -> None:
        """Buffers of so many bytes or more; all ranks ask for the same."""
        if self.rows and nbytes <= len(self.arrived):
            return
        import torch.distributed._symmetric_memory as memory

        if self.rows:  # until no rank reads the ones before
            if self.stream:
                self.stream.synchronize()
            dist.barrier(group)
            self.rows, self.arrived = [], torch.empty(0)
        size = max(8 << 20, 1 << max(0, nbytes - 1).bit_length())
        empty = functools.partial(memory.empty, device=self.device)
        self.arrived = empty(size, dtype=torch.uint8)
        self.splits = empty(self.ranks, dtype=torch.int64)
        self.found = [empty(2, self.ranks, dtype=torch.int64) for _ in range(2)]
        self.rows = [empty(size, dtype=torch.uint8) for _ in range(2)]  # last: there are none if one fails


@dataclass(frozen=True)
class Arrival:
    event: torch.cuda.Event | None
    device: torch.device

    def wait(self) -> None:
        """Until then the current stream does nothing further."""
        if self.event:
            torch.cuda.current_stream(self.device).wait_event(self.event)


_known: WeakKeyDictionary[ProcessGroup, dict[torch.device, Symmetric]] = WeakKeyDictionary()
