"""Ops on arrays of other libraries: the same results as on tensors, in the same memory."""

from __future__ import annotations

import inspect
from typing import Any

import effk
import ml_dtypes
import numpy as np
import pytest
import torch
from effk import _registry
from effk.integrations import arrays
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..kit import tensors
from ..kit.calls import Call, collect, results
from ..kit.needs import need

CALLS = collect("CALLS")

W = np.array([[1.0, 0, -2], [0, 0, 0.5]], dtype=np.float32)


def to_numpy(t: Tensor) -> Any:
    t = t.detach()
    return t.numpy() if t.dtype != torch.bfloat16 else t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def to_torch(array: Any) -> Tensor:
    is_bf16 = array.dtype == ml_dtypes.bfloat16
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if is_bf16 else torch.from_numpy(array)


@pytest.mark.parametrize("op", list(_registry.OPS))
def test_every_op_on_numpy(op: str) -> None:
    def check(made: Call) -> None:
        given_tensors, given_arrays = (tensors.to_device((made.args, made.kwargs)) for _ in range(2))
        args, kwargs = tensors.map_tensors(to_numpy, given_arrays)  # the same memory
        with torch.no_grad():
            expected = results(op, _registry.find(op).overload(*given_tensors[0], **given_tensors[1]), *given_tensors)
        out = getattr(arrays, op)(*args, **kwargs)
        assert out is None or all(isinstance(leaf, np.ndarray) for leaf in tree_leaves(out))
        found = list(tensors.tensors_in(results(op, tree_map_only(np.ndarray, to_torch, out), *given_arrays)))
        wanted = list(tensors.tensors_in(expected))
        assert len(found) == len(wanted) > 0
        assert all(tensors.same_bits(x.detach(), y.detach()) for x, y in zip(found, wanted, strict=True))

    settings(max_examples=8, suppress_health_check=list(HealthCheck))(given(made=CALLS[op])(check))()


def test_memory_is_shared() -> None:
    base = np.zeros((4, 6), dtype=np.float32)
    a, b = np.ones((1, 2, 6), dtype=np.float32), np.ones((1, 4, 2), dtype=np.float32)
    arrays.lora_merge_([base], [a], [b], np.array([0]), np.array([0.5], dtype=np.float32))
    assert (base == 1).all()
    values, *_ = arrays.lscd_pack(W)
    assert values.base is not None and values.flags.writeable  # a view of the tensor's memory


def test_dtypes_by_the_librarys_names() -> None:
    for dtype in (np.float16, "float16", np.dtype("float16"), torch.float16):
        assert arrays.lscd_pack(W, dtype=dtype)[0].dtype == np.float16
    assert arrays.lscd_pack(W, dtype=ml_dtypes.bfloat16)[0].dtype == ml_dtypes.bfloat16
    with pytest.raises(ValueError, match=r"effk::lscd_pack: dtype is .*U3.*wanted a dtype"):
        arrays.lscd_pack(W, dtype=np.dtype("U3"))


def test_tensors_may_stand_among_arrays() -> None:
    packed = torch.ops.effk.lscd_pack(torch.from_numpy(W))
    y = arrays.lscd_linear(np.ones((1, 3), dtype=np.float32), *packed, 2, 3)
    assert isinstance(y, np.ndarray) and y.tolist() == [[-1.0, 0.5]]
    bias = torch.nn.Parameter(torch.ones(2))
    y = arrays.lscd_linear(np.ones((1, 3), dtype=np.float32), *packed, 2, 3, bias=bias)
    assert y.tolist() == [[0.0, 1.5]]


def test_strange_arrays_are_refused_by_name() -> None:
    packed = arrays.lscd_pack(W)
    for x in (W[:, ::-1], W.astype(">f4"), np.array([[object()] * 3]), np.array([["a"] * 3])):
        with pytest.raises(ValueError, match="effk::lscd_linear: x can't be shared"):
            arrays.lscd_linear(x, *packed, 2, 3)
    with pytest.raises(RuntimeError, match=r"effk::lscd_linear.*x has shape"):
        arrays.lscd_linear(np.ones((1, 4), dtype=np.float32), *packed, 2, 3)
    with pytest.raises(ValueError, match=r"x can't be shared.*mask"):
        arrays.lscd_linear(np.ma.masked_equal(np.ones((1, 3), dtype=np.float32), 0), *packed, 2, 3)
    with pytest.raises(TypeError, match="no array"):
        arrays.lscd_pack([[1.0]])
    with pytest.raises(ValueError, match="lscd_pack: dtype is"):
        arrays.lscd_pack(W, W, W)
    with pytest.raises((RuntimeError, TypeError), match="lscd_pack"):
        arrays.lscd_pack(W, nonsense=1)


def test_what_is_written_to_must_be_writable() -> None:
    fixed = np.zeros((4, 6), dtype=np.float32)
    fixed.flags.writeable = False
    rest = [np.ones((1, 2, 6), dtype=np.float32)], [np.ones((1, 4, 2), dtype=np.float32)]
    with pytest.raises(ValueError, match="effk::lora_merge_: w is written to"):
        arrays.lora_merge_([fixed], *rest, np.array([0]), np.array([1.0], dtype=np.float32))
    assert (fixed == 0).all()
    assert arrays.lscd_pack(np.broadcast_to(np.float32(1), (2, 3)))[0][0] == 1  # what is read needn't be


def test_the_namespace() -> None:
    assert dir(arrays) == sorted(_registry.OPS)
    assert arrays.lscd_linear.__doc__ == effk.lscd.ops.lscd_linear.__doc__
    assert inspect.signature(arrays.lscd_linear) == inspect.signature(effk.lscd.ops.lscd_linear)
    with pytest.raises(AttributeError, match="nonsense"):
        arrays.nonsense  # noqa: B018


class Foreign:
    """An array of a library that speaks DLPack and has the array API's way to find the library."""

    def __init__(self, t: Tensor):
        self.t = t

    def __dlpack__(self, **options: Any) -> Any:
        return self.t.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.t.__dlpack_device__()

    @property
    def dtype(self) -> torch.dtype:
        return self.t.dtype

    def __array_namespace__(self) -> Any:
        return type("namespace", (), {"from_dlpack": staticmethod(Foreign)})


def test_any_library_that_speaks_dlpack() -> None:
    packed = arrays.lscd_pack(Foreign(torch.from_numpy(W)))
    y = arrays.lscd_linear(Foreign(torch.ones(1, 3)), *packed, 2, 3)
    assert isinstance(y, Foreign) and y.t.tolist() == [[-1.0, 0.5]]
    with pytest.raises(ValueError, match="w is written to"):
        arrays.lora_merge_([Foreign(torch.zeros(4, 6))], [], [], np.array([0]), np.array([1.0]))


def test_jax() -> None:
    need("jax")
    import jax
    import jax.numpy as jnp

    w, x = jnp.asarray(W, dtype=jnp.bfloat16), jnp.ones((16, 3), dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=r"lscd_pack gives torch.int64, of which jaxlib makes int32"):
        arrays.lscd_pack(w)
    y = arrays.lscd_linear(x, *torch.ops.effk.lscd_pack(torch.from_dlpack(w)), 2, 3)
    assert type(y) is type(x) and y.dtype == jnp.bfloat16 and y[0].tolist() == [-1.0, 0.5]
    assert torch.from_dlpack(x).data_ptr() == x.unsafe_buffer_pointer()
    with pytest.raises(ValueError, match="w is written to"):
        arrays.lora_merge_([w], [], [], jnp.zeros(1, jnp.int32), jnp.ones(1))
    with pytest.raises(ValueError, match="w4a8_quantize: x can't be shared"):
        jax.jit(arrays.w4a8_quantize)(x)


@pytest.mark.cuda
@pytest.mark.parametrize("own", [True, False])
def test_cupy_on_its_own_stream(own: bool) -> None:
    need("cupy")
    import cupy

    with cupy.cuda.Stream(non_blocking=True) if own else cupy.cuda.Stream.null:
        x = cupy.ones((16, 3), dtype=cupy.float16)
        packed = arrays.lscd_pack(cupy.asarray(W, dtype=cupy.float16))
        y = arrays.lscd_linear(x, *packed, 2, 3)
        assert isinstance(y, cupy.ndarray) and y[0].tolist() == [-1.0, 0.5]
        base = cupy.zeros((4, 6), dtype=cupy.float32)
        a, b = cupy.ones((1, 2, 6), dtype=cupy.float32), cupy.ones((1, 4, 2), dtype=cupy.float32)
        arrays.lora_merge_([base], [a], [b], cupy.array([0]), cupy.array([0.5], dtype=cupy.float32))
        assert bool((base == 1).all())
