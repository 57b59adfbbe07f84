"""Every op of effk with its parts, and the back ends that can run it.

A family's ops.py declares its ops with `@op(...)`; everything else (the fallback on devices without a kernel,
`effk.backends`, the tests' and the benchmarks' walks) reads this registry.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import _library

log = logging.getLogger("effk")

NAMESPACE = torch.ops.effk.name  # tests/packaging/hf_kernels.py puts the whole package into another one
DEVICE_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        name: as in torch.ops.effk.
        api: the documented Python function.
        reference: the slow, readable implementation.
        fake: output shapes and dtypes.
        triton: "module:function" of the Triton implementation, or None where the op declares none.
        composite: the reference, made of torch's own kernels, is the implementation on every device.
        setup_context, backward: of autograd, or None for an op without gradients.
        collective: other processes wait for each call.
    """

    name: str
    api: Callable[..., Any]
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    triton: str | None
    composite: bool = False
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None
    collective: bool = False

    @property
    def family(self) -> str:
        """The package that declares it: effk.<family>.ops."""
        return self.api.__module__.split(".")[1]

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.effk, self.name).default

    @property
    def written(self) -> list[int]:
        """Numbers of the arguments that it writes to."""
        arguments = self.overload._schema.arguments
        return [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]

    def load_triton(self) -> Callable[..., Any]:
        if self.triton is None:
            raise RuntimeError(f"effk::{self.name} has no Triton kernel")
        module, function = self.triton.split(":")
        return getattr(importlib.import_module(module), function)


OPS: dict[str, Op] = {}
# Back ends that something outside the package adds (the CUDA emulation of the tests): name -> op -> callable.
EXTRA_BACKENDS: dict[str, dict[str, Callable[..., Any]]] = {}

_library_impl = torch.library.Library(NAMESPACE, "IMPL")

SCHEMAS = Path(__file__).parent / "schemas.txt"  # as the C++ libraries define them, for platforms that have none
if not _library.cpu.loaded:
    _definitions = torch.library.Library(NAMESPACE, "FRAGMENT")
    for schema in SCHEMAS.read_text().splitlines():
        _definitions.define(schema)


def schemas() -> str:
    """What SCHEMAS should be."""
    return "".join(f"{op.overload._schema}".removeprefix(f"{NAMESPACE}::") + "\n" for op in OPS.values())


def op(**parts: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declares the op that the decorated function documents and calls; its parts are `Op`'s attributes."""

    def declare(api: Callable[..., Any]) -> Callable[..., Any]:
        declared = Op(name=api.__name__, api=api, **parts)
        OPS[declared.name] = declared
        _register(declared)
        return api

    return declare


def _register(op: Op) -> None:
    qualified = f"{NAMESPACE}::{op.name}"
    torch.library.register_fake(qualified, op.fake)
    if op.backward is not None:
        torch.library.register_autograd(qualified, op.backward, setup_context=op.setup_context)
    _library_impl.impl(op.name, op.reference if op.composite else _with_warning(op), "CompositeExplicitAutograd")
    if op.written:
        _library_impl.impl(op.name, _counting_versions(op), "ADInplaceOrView", with_keyset=True)
    if op.collective:  # so that compilers keep all calls: also those of no use here, and equal ones
        effects = torch._higher_order_ops.effects
        effects._register_effectful_op(op.overload, effects._EffectType.ORDERED)

    forced = os.environ.get("EFFK_BACKEND", "")
    if forced == "reference":
        for key in DEVICE_KEYS.values():
            _library_impl.impl(op.name, op.reference, key, allow_override=True)
    elif op.triton and has_triton() and (forced == "triton" or not _library.cuda.loaded):
        _library_impl.impl(op.name, _lazy_triton(op), "CUDA", allow_override=True)


def _counting_versions(op: Op) -> Callable[..., Any]:
    """So that autograd notices that what it saved was overwritten."""

    def call(keys: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            out = op.overload.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)
        for i in op.written:
            written = args[i] if isinstance(args[i], list | tuple) else [args[i]]
            torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])
        return out

    return call


def _with_warning(op: Op) -> Callable[..., Any]:
    """The reference as the fallback for devices without a kernel."""

    @functools.wraps(op.reference)
    def fallback(*args: Any, **kwargs: Any) -> Any:
        device = next((a.device for a in args if isinstance(a, torch.Tensor)), "this device")
        warnings.warn(f"effk::{op.name} has no kernel for {device}; its slow reference runs", stacklevel=2)
        return op.reference(*args, **kwargs)

    return fallback


def _lazy_triton(op: Op) -> Callable[..., Any]:
    """Imports Triton at the first call, not with the package."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return op.load_triton()(*args, **kwargs)

    return call


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def check_forced_backend() -> None:
    """Applies EFFK_BACKEND; one that can't run here raises."""
    forced = os.environ.get("EFFK_BACKEND", "")
    if not forced:
        return
    known = all_backends()
    if forced not in known:
        raise RuntimeError(f"effk: EFFK_BACKEND is {forced!r}; this machine has {', '.join(known)}")
    if forced == "triton" and not torch.cuda.is_available():
        raise RuntimeError("effk: EFFK_BACKEND is 'triton', which replaces the CUDA kernels, but there is no GPU")
    if forced.startswith("cpu-"):
        _library.set_cpu_level(forced.removeprefix("cpu-"))


def all_backends() -> tuple[str, ...]:
    """The back ends of this machine, whatever the op."""
    levels = _library.supported_cpu_levels() if _library.cpu.loaded else ()
    names = ["reference", *(f"cpu-{level}" for level in levels)]
    if _library.cuda.loaded and torch.cuda.is_available():
        names.append("cuda")
    if has_triton() and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        names.append("triton")
    return (*names, *EXTRA_BACKENDS)


def find(op: str) -> Op:
    if op not in OPS:
        raise ValueError(f"effk has no op {op!r}; it has {', '.join(sorted(OPS))}")
    return OPS[op]


def backends(op: str) -> tuple[str, ...]:
    """Names of the back ends that can run an op on this machine.

    Args:
        op: name of the op, such as "lscd_linear".

    Returns:
        Of "reference", "cpu-scalar", "cpu-avx2", "cpu-avx512", "cuda", "triton" (and "simt" in effk's own tests),
        those that are here.
    """
    found = find(op)

    def can_run(name: str) -> bool:
        if found.composite:
            return name == "reference"
        if name.startswith("cpu-"):
            return name.removeprefix("cpu-") in _library.supported_cpu_levels(found.family)
        return (name != "triton" or found.triton is not None) and op in EXTRA_BACKENDS.get(name, (op,))

    return tuple(name for name in all_backends() if can_run(name))


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """One back end of an op as a function with the op's signature, without autograd for those not in torch.ops.

    Args:
        op: name of the op.
        backend: one of `backends(op)`.

    Raises:
        RuntimeError: the back end can't run here.
    """
    found = find(op)
    if backend not in backends(op):
        raise RuntimeError(f"effk: {op} can't run on {backend!r} here; it can on {', '.join(backends(op))}")
    if backend == "reference":
        return found.reference
    if backend == "triton":
        return found.load_triton()
    if backend == "cuda":
        return found.overload
    if backend in EXTRA_BACKENDS:
        return EXTRA_BACKENDS[backend][op]
    level = backend.removeprefix("cpu-")

    def call(*args: Any, **kwargs: Any) -> Any:
        with _library.cpu_level(level):
            return found.overload(*args, **kwargs)

    return call
