"""Every property runs on every back end: `every_backend` makes the tests, `Backend.run` makes the calls.

`run` checks on each call what holds for all ops: memory that the schema doesn't mark as written keeps its bits, between
the rows of what is written as well, and outputs share no memory with inputs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import effk
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy

from . import calls, tensors

HAS_GPU = torch.cuda.is_available()

# Hypothesis examples of one property. The others compute in Python and get fewer and smaller ones.
EXAMPLES = {"reference": 30, "cpu-scalar": 60, "cpu-avx2": 60, "cpu-avx512": 60, "cuda": 60, "simt": 60}
SLOW_EXAMPLES = 8
MOST_EXAMPLES = int(os.environ.get("EFFK_TEST_EXAMPLES", "1000"))  # under tools that slow everything down


@dataclass(frozen=True)
class Backend:
    """One back end, by its name in `effk.backends`."""

    name: str

    @property
    def device(self) -> str:
        return "cuda" if self.name == "cuda" or (self.name == "triton" and HAS_GPU) else "cpu"

    @property
    def slow(self) -> bool:
        """Interpreted: wants small shapes."""
        return self.name == "triton" and not HAS_GPU

    @property
    def examples(self) -> int:
        return min(MOST_EXAMPLES, SLOW_EXAMPLES if self.slow else EXAMPLES.get(self.name, SLOW_EXAMPLES))

    @property
    def unit(self) -> float:
        """Unit roundoff of float32 sums: tensor cores cut off where CPUs round to nearest."""
        return 2**-23 if self.name in ("cuda", "triton", "simt") else 2**-24

    @property
    def raises_on_corrupt(self) -> bool:
        """Whether corrupt contents raise. GPU code only stays in bounds."""
        return self.name == "reference" or self.name.startswith("cpu-")

    def run(self, op: str, *args: Any, **kwargs: Any) -> Any:
        """Calls op here with copies of tensors of the CPU, strides and all; results come back to the CPU.

        Results are what the op returns; of one that returns nothing, the tensors that it has written to, in order.
        """
        call = effk.implementation(op, self.name)
        given = (args, kwargs)
        args, kwargs = tensors.to_device(given, self.device)
        out = call(*args, **kwargs)
        results = calls.results(op, out, args, kwargs)
        written = calls.written(op, args, kwargs)
        wanted = tensors.to_device(given, "cpu")
        with torch.no_grad():
            for tensor, result in zip(calls.written(op, *wanted), written, strict=True):
                tensor.copy_(result)  # that much may have changed
        for before, tensor in zip(tensors.tensors_in(wanted), tensors.tensors_in((args, kwargs)), strict=True):
            if tensor.device.type == "meta":
                continue
            same = torch.equal(tensors.whole(before), tensors.whole(tensor).cpu())
            assert same, f"{op} on {self.name} changed an input, or what lies around it in memory"
            for result in tensors.tensors_in(out):
                assert not tensors.share_memory(result, tensor), f"{op} on {self.name} returned an alias of an input"
        return tensors.map_tensors(lambda t: t.cpu(), results)

    def __str__(self) -> str:
        return self.name


def backend_params(*ops: str) -> list[Any]:
    """pytest parameters: the back ends that can run all of the ops."""
    names = [n for n in effk.backends(ops[0]) if all(n in effk.backends(op) for op in ops)]
    return [
        pytest.param(backend, id=backend.name, marks=[pytest.mark.cuda] if backend.device == "cuda" else [])
        for backend in map(Backend, names)
    ]


def on_backends(*ops: str) -> Any:
    """Parametrizes a test by `backend`."""
    return pytest.mark.parametrize("backend", backend_params(*ops))


def every_backend(*ops: str, cases: Callable[[Backend], SearchStrategy[Any]]) -> Callable[..., Any]:
    """Makes a test of `prop(backend, case)`: it runs on each back end of the ops, with cases drawn for it."""

    def decorate(prop: Callable[..., None]) -> Callable[..., None]:
        @on_backends(*ops)
        def test(backend: Backend) -> None:
            drawn = given(case=cases(backend))(prop)
            settings(max_examples=backend.examples)(drawn)(backend=backend)

        test.__name__, test.__doc__, test.__module__ = prop.__name__, prop.__doc__, prop.__module__
        return test

    return decorate


def device_params() -> list[Any]:
    return ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if HAS_GPU else [])]
