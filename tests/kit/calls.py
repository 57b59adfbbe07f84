"""What a family's strategies.py hands to the walks over all ops (test_ops.py, test_registry.py).

It defines
- `CALLS`: op -> strategy of `Call`, small valid calls with every optional argument there in some and absent in others;
- `INVALID`: op -> list of `Invalid`;
- `FORMULAS`: op -> the same function of dense torch ops, for ops with gradients.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from effk import _registry
from torch import Tensor

from . import tensors


@dataclass(frozen=True)
class Call:
    """Arguments of an op; tensors on the CPU."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def with_(self, **changed: Any) -> Call:
        """The same call with some arguments, by name, replaced."""
        names = [a.name for a in _registry.find(self.op).overload._schema.arguments]
        args, kwargs = list(self.args), dict(self.kwargs)
        for name, value in changed.items():
            if name in names[: len(args)]:
                args[names.index(name)] = value
            else:
                kwargs[name] = value
        return replace(self, args=tuple(args), kwargs=kwargs)

    def __repr__(self) -> str:
        def brief(a: Any) -> str:
            if isinstance(a, list | tuple):
                return f"[{', '.join(map(brief, a))}]"
            if not isinstance(a, Tensor):
                return repr(a)
            grad = ", grad" if a.requires_grad else ""
            return f"<{a.dtype} {list(a.shape)} strides {list(a.stride())}{grad}>"

        parts = [*map(brief, self.args), *(f"{k}={brief(v)}" for k, v in self.kwargs.items())]
        return f"{self.op}({', '.join(parts)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For hypothesis, which would print whole tensors."""
        printer.text(repr(self))


@dataclass(frozen=True)
class Invalid:
    """A call that every back end, and the fake, must refuse, naming the op and the argument.

    argument: its name; "a|b" where either is as good.
    """

    name: str
    call: Call
    argument: str


def written(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments that op writes to, by its schema."""
    found: list[Tensor] = []
    for i, argument in enumerate(_registry.find(op).overload._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors.tensors_in(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


def results(op: str, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call of op came to: what it returned, or the tensors that it wrote to, or both."""
    changed = written(op, args, kwargs)
    returns = len(_registry.find(op).overload._schema.returns)
    assert returns or out is None, f"{op} returned what its schema doesn't have"
    return (out, changed) if changed and returns else out if returns else changed


def families() -> list[str]:
    return sorted({op.family for op in _registry.OPS.values()})


def strategies_of(family: str) -> ModuleType:
    return importlib.import_module(f"tests.{family}.strategies")


def collect(attribute: str) -> dict[str, Any]:
    """One of the attributes named above, of all families."""
    found: dict[str, Any] = {}
    for family in families():
        found |= getattr(strategies_of(family), attribute)
    return found
