"""The words a family's file is written in, and where such files are found."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .machine import Limits
    from .scenarios import Service

Call = Callable[[], Any]


def nothing_missing(work: Work) -> str:
    return ""


def unchanged(result: Any) -> Any:
    return result


@dataclass(frozen=True)
class Peer:
    """Other people's code for the same work.

    Attributes:
        name: short, with the type it computes in where that differs.
        make: inputs -> the call to time; what it prepares before (layouts, copies) isn't timed.
        note: which configuration this is, and what to know of it when comparing.
        missing: work -> why the peer can't run there, or "".
        view: brings the call's result into the shape of `Work.expected`; not timed.
        graph: whether a CUDA graph can capture the call.
        own_threads: whether it computes on CPU threads that aren't torch's.
    """

    name: str
    make: Callable[[Any], Call]
    note: str
    missing: Callable[[Work], str] = nothing_missing
    view: Callable[[Any], Any] = unchanged
    graph: bool = True
    own_threads: bool = False


@dataclass(frozen=True)
class Derived:
    """A yardstick computed from what was measured: seconds(times by peer, work, limits), or None.

    `of` names the peers that it is computed from: where one of them isn't wanted, neither is this.
    """

    name: str
    of: Sequence[str]
    seconds: Callable[[Mapping[str, float], Work, Limits], float | None]
    note: str


@dataclass
class Work:
    """A problem with its inputs.

    Attributes:
        inputs: whatever `arguments` and the peers' `make` take; copied deeply where copies rotate.
        arguments: inputs -> positional and keyword arguments of effk's op.
        check: (result, whether it's effk's) -> "" or what is wrong. A peer may round more often.
        bytes: read and written at least, weights in their packed format.
        flops: that the result needs at least; 0 where only moving counts.
        dtype: of the arithmetic, which picks the machine's rate.
        graph: whether a CUDA graph can capture effk's op.
        written: of an op that returns nothing: its arguments -> what it has written.
        steps: of work that takes several ops: (name of an op -> that op on the back end, inputs) -> the call. Back ends
            are those of the problem's op, which the others need to have as well; `arguments` isn't asked then.
        quality: what the result is worth where that isn't "right": recall and the like, shown beside the times.
    """

    inputs: Any
    arguments: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]
    check: Callable[[Any, bool], str]
    bytes: int
    flops: float
    dtype: torch.dtype
    graph: bool = True
    written: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None = None
    steps: Callable[[Callable[[str], Callable[..., Any]], Any], Call] | None = None
    quality: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """One op at one size. `size` names it and is what goals are matched with; a quick problem is --quick's alone.

    Calls that take seconds are timed `once`, when their result is checked; others in many rounds.

    Where `size` says caches="warm", the inputs are in the caches when a call is timed; else they are not. Of a problem
    on some devices only, `devices` names their types.
    """

    op: str
    size: Mapping[str, Any]
    make: Callable[[Problem, torch.device], Work]
    peers: Mapping[str, Sequence[Peer]]  # by type of device, as are derived
    derived: Mapping[str, Sequence[Derived]]
    quick: bool = False
    devices: Collection[str] = ("cpu", "cuda")
    once: bool = False

    @property
    def warm(self) -> bool:
        return self.size.get("caches") == "warm"

    @property
    def name(self) -> str:
        return " ".join([self.op, *(f"{key}={value}" for key, value in self.size.items())])


def only(condition: Callable[[Any], bool], reason: str) -> Callable[[Work], str]:
    """A peer's `missing`, by the inputs."""
    return lambda work: "" if condition(work.inputs) else reason


def at_bandwidth(times: Mapping[str, float], work: Work, limits: Limits) -> float:
    return limits.memory_seconds(work.bytes)


def not_installed(*modules: str, get: str = "pip install 'effk[peers]'") -> str:
    """What a peer's `missing` says where modules are absent, with the line that gets them, or ""."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed ({get})" if absent else ""


BANDWIDTH = Derived("bandwidth", (), at_bandwidth, "everything moved once at the measured bandwidth")


@dataclass(frozen=True)
class Goal:
    """effk is wanted to be `ratio` times as fast as a peer, at problems whose size has these entries."""

    op: str
    device: str
    peer: str
    ratio: float
    size: Mapping[str, Any]

    def applies(self, problem: Problem, device: str) -> bool:
        return (self.op, self.device) == (problem.op, device) and self.size.items() <= problem.size.items()


@dataclass(frozen=True)
class Family:
    """`check` tells a reader how results were checked; `services` are for scenarios."""

    name: str
    problems: Sequence[Problem]
    goals: Sequence[Goal]
    services: Sequence[Service] = ()
    check: str = ""


def families() -> dict[str, Family]:
    """Every module beside the harness is a family: it has PROBLEMS and GOALS, SERVICES if its ops are served, and its
    docstring tells of its checks."""
    package = importlib.import_module("effk.perf")
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.ispkg and not m.name.startswith("_")]
    modules = {name: importlib.import_module(f"effk.perf.{name}") for name in names}
    return {
        name: Family(name, m.PROBLEMS, m.GOALS, getattr(m, "SERVICES", ()), _after_title(m))
        for name, m in modules.items()
    }


def _after_title(module: ModuleType) -> str:
    """Its docstring's paragraphs after the first, a line each."""
    paragraphs = (inspect.getdoc(module) or "").split("\n\n")[1:]
    return "\n".join(" ".join(p.split()) for p in paragraphs)
