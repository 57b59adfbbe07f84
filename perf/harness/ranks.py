"""Other processes for ops that several have to call together: ranks of a gloo group that do what this one announces."""

from __future__ import annotations

import atexit
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, its default arguments would keep a group, whose threads outlive Python
import torch.multiprocessing

from .problem import Call
from .timing import torch_threads

END, LEARN, FORGET = -1, -2, -3  # announced, beside the number of a call

GROUP = "0"  # the name of the group that a process initializes first
Make = Callable[..., Call]  # make(group's name, rank, ...), of a module's top level


def world() -> dist.ProcessGroup:
    """The group that this process is in."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _announced(number: int = 0) -> int:
    what = torch.tensor([number])
    dist.broadcast(what, 0)
    return int(what)


def _follow(rank: int, size: int, file: str) -> None:
    """One thread, as the first rank has in a call."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    calls: list[Call] = []
    with torch.inference_mode():
        while (number := _announced()) != END:
            if number == FORGET:
                calls.clear()
            elif number == LEARN:
                learnt: list[Any] = [None]
                dist.broadcast_object_list(learnt, 0)
                make, args = learnt[0]
                calls.append(make(GROUP, rank, *args))
                dist.barrier()
            else:
                calls[number]()
    dist.destroy_process_group()


class Ranks:
    """This process as the first of so many, one thread each."""

    def __init__(self, size: int):
        self.size, self.known = size, 0
        self.folder = tempfile.TemporaryDirectory(prefix="effk-ranks-")
        file = str(Path(self.folder.name) / "init")
        spawn = torch.multiprocessing.get_context("spawn")
        self.others = [spawn.Process(target=_follow, args=(r, size, file), daemon=True) for r in range(1, size)]
        for process in self.others:
            process.start()
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=size)
        atexit.register(self.end)

    def call(self, make: Make, *args: Any) -> Call:
        """A call that all ranks make together."""
        _announced(LEARN)
        dist.broadcast_object_list([(make, args)], 0)
        with torch_threads(1):
            own = make(GROUP, 0, *args)
            dist.barrier()  # making may take longer than calling
        number, self.known = self.known, self.known + 1

        def call() -> Any:
            with torch_threads(1):
                _announced(number)
                return own()

        return call

    def forget(self) -> None:
        """All calls so far."""
        _announced(FORGET)
        self.known = 0

    def end(self) -> None:
        _announced(END)
        for process in self.others:
            process.join(10)
        dist.destroy_process_group()
        self.folder.cleanup()


@functools.cache
def ranks(size: int) -> Ranks:
    return Ranks(size)
