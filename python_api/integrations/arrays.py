"""The ops on arrays of NumPy, CuPy, JAX, and other libraries that speak DLPack.

Each op is a function here: `arrays.lscd_linear(x, values, bitmap, offsets, rows, cols)` is what
`torch.ops.effk.lscd_linear` is for tensors, documented with `effk.lscd`. Arrays are shared both ways, not copied, and
ops run where the arrays are. Results are of the library that the first array is of. There are no gradients.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .._registry import OPS, Op, find

KDL_CUDA = 2  # DLPack's number of the kind of device


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    op = find(name)

    @functools.wraps(op.api)
    def on_arrays(*args: Any, **kwargs: Any) -> Any:
        return call(op, args, kwargs)

    return on_arrays


def __dir__() -> list[str]:
    return sorted(OPS)


def call(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    schema = op.overload._schema.arguments
    arrays = [leaf for leaf in tree_leaves((args, kwargs)) if _is_array(leaf)]
    if not arrays:
        raise TypeError(f"effk::{op.name}: there is no array among the arguments")
    types = {a.name: (str(a.type), a.alias_info is not None and a.alias_info.is_write) for a in schema}

    def converted(name: str, value: Any) -> Any:
        kind, written = types.get(name, ("", False))
        if "Tensor" not in kind:
            return _dtype(op, name, value) if name.endswith("dtype") else value
        if isinstance(value, (list, tuple)):
            return [converted(name, one) for one in value]
        return _to_torch(op, name, value, written) if _is_array(value) else value

    with torch.no_grad():
        out = op.overload(
            *(converted(a.name, value) for a, value in zip(schema, args, strict=False)),
            *args[len(schema) :],  # too many: the op says so
            **{name: converted(name, value) for name, value in kwargs.items()},
        )
    _let_wait(arrays)
    return tree_map_only(Tensor, functools.partial(_from_torch, op, arrays[0]), out)


def _is_array(value: Any) -> bool:
    return hasattr(value, "__dlpack__")


def _library(array: Any) -> str:
    return type(array).__module__.partition(".")[0]


def _is_bf16(array: Any) -> bool:
    """Of ml_dtypes, which NumPy takes for plain bytes when it exports an array."""
    return isinstance(array, np.ndarray) and array.dtype.name == "bfloat16"


def _to_torch(op: Op, name: str, array: Any, written: bool) -> Tensor:
    if isinstance(array, Tensor):
        return array
    if written and not (array.flags.writeable if isinstance(array, np.ndarray) else _library(array) == "cupy"):
        raise ValueError(
            f"effk::{op.name}: {name} is written to; wanted a writable array of NumPy or CuPy, or a tensor"
        )
    try:
        if isinstance(array, np.ma.MaskedArray):
            raise ValueError("a mask would be lost")
        if any(stride < 0 for stride in getattr(array, "strides", None) or ()):
            raise ValueError("a stride is negative")  # of which torch's reader makes an invalid tensor
        if _is_bf16(array):
            return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_dlpack(array)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"effk::{op.name}: {name} can't be shared through DLPack: {error}") from error


def _from_torch(op: Op, like: Any, t: Tensor) -> Any:
    if isinstance(like, Tensor):
        return t
    if not isinstance(like, np.ndarray):
        space = like.__array_namespace__() if hasattr(like, "__array_namespace__") else None
        array = (space or importlib.import_module(_library(like))).from_dlpack(t)
        if array.dtype.itemsize != t.itemsize:  # JAX cuts 64 bits to 32, but for jax.config's jax_enable_x64
            raise ValueError(f"effk::{op.name} gives {t.dtype}, of which {_library(like)} makes {array.dtype}")
        return array
    if t.dtype != torch.bfloat16:
        return t.numpy()
    try:
        from ml_dtypes import bfloat16
    except ImportError as error:
        raise ImportError(f"effk::{op.name} gives bfloat16, which NumPy has through ml_dtypes alone") from error
    return t.view(torch.int16).numpy().view(bfloat16)


def _dtype(op: Op, name: str, dtype: Any) -> torch.dtype | None:
    """torch's dtype, of what any array library calls so."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    try:
        found = getattr(torch, np.dtype(dtype).name, None)
    except TypeError:
        found = None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"effk::{op.name}: {name} is {dtype!r}; wanted a dtype that torch has")
    return found


def _let_wait(arrays: list[Any]) -> None:
    """Their memory may be read, or used again, when the call is over: lets CuPy's stream wait for the op, or waits."""
    foreign = [a for a in arrays if not isinstance(a, (Tensor, np.ndarray)) and a.__dlpack_device__()[0] == KDL_CUDA]
    for library, device in {(_library(a), a.__dlpack_device__()[1]) for a in foreign}:
        ours = torch.cuda.current_stream(device)
        if library != "cupy":
            ours.synchronize()
            continue
        pointer = importlib.import_module("cupy").cuda.get_current_stream().ptr
        theirs = torch.cuda.ExternalStream(pointer, device) if pointer else torch.cuda.default_stream(device)
        theirs.wait_stream(ours)
