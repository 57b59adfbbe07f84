"""Every op as torch sees it: schema, fake, autograd, torch.compile, torch.export; and its refusal of bad arguments."""

from __future__ import annotations

import re
from typing import Any

import effk
import pytest
import torch
import torch.fx.experimental.symbolic_shapes
from effk import _registry
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch._subclasses import FakeTensorMode

from .kit import tensors
from .kit.backends import Backend, backend_params, device_params
from .kit.calls import Call, Invalid, collect

CALLS, INVALID, FORMULAS = collect("CALLS"), collect("INVALID"), collect("FORMULAS")

every_op = pytest.mark.parametrize("op", list(_registry.OPS))
every_device = pytest.mark.parametrize("device", device_params())


def on_examples(op: str, number: int, check: Any) -> None:
    """check(call) for some calls of op."""
    run = given(call=CALLS[op])(lambda call: check(call))
    settings(max_examples=number, suppress_health_check=list(HealthCheck))(run)()


def moved(call: Call, device: str) -> Call:
    def move(t: Tensor) -> Tensor:
        return tensors.to_device(t.detach(), device).requires_grad_(t.requires_grad)

    return Call(call.op, *tensors.map_tensors(move, (call.args, call.kwargs)))


def function_of(call: Call) -> tuple[Any, tuple[Any, ...]]:
    """The call as a function of its tensors alone, for tools that trace."""
    places = [i for i, a in enumerate(call.args) if isinstance(a, Tensor)]
    overload = _registry.find(call.op).overload

    def function(*traced: Tensor) -> Any:
        args = list(call.args)
        for i, t in zip(places, traced, strict=True):
            args[i] = t
        return overload(*args, **call.kwargs)

    return function, tuple(call.args[i] for i in places)


def assert_same(a: Any, b: Any) -> None:
    pairs = list(zip(tensors.tensors_in(a), tensors.tensors_in(b), strict=True))
    assert pairs and all(tensors.same_bits(x, y) for x, y in pairs)


@every_device
@every_op
def test_opcheck(op: str, device: str) -> None:
    """torch's own checks: schema, autograd registration, fake against real, AOT dispatch with dynamic shapes."""

    def check(call: Call) -> None:
        call = moved(call, device)
        torch.library.opcheck(_registry.find(op).overload, call.args, call.kwargs)

    on_examples(op, 6, check)


@every_op
def test_fake_agrees_with_every_back_end(op: str) -> None:
    """Sizes (where the arguments tell them), dtypes and contiguity."""

    def check(call: Call) -> None:
        with FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv()) as mode:
            args, kwargs = tensors.map_tensors(mode.from_tensor, (call.args, call.kwargs))
            fakes = list(tensors.tensors_in(_registry.find(op).overload(*args, **kwargs)))
        for name in effk.backends(op):
            reals = list(tensors.tensors_in(Backend(name).run(op, *call.args, **call.kwargs)))
            for fake, real in zip(fakes, reals, strict=True):
                assert fake.dtype == real.dtype and fake.dim() == real.dim() and real.is_contiguous()
                for a, b in zip(fake.shape, real.shape, strict=True):
                    assert not isinstance(a, int) or a == b

    on_examples(op, 10, check)


@pytest.mark.parametrize("dynamic", [True, False])
@every_device
@every_op
def test_compile(op: str, device: str, dynamic: bool) -> None:
    def check(call: Call) -> None:
        torch._dynamo.reset()
        function, args = function_of(moved(call, device))
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        assert_same(compiled(*args), function(*args))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        on_examples(op, 4, check)


@every_device
@every_op
def test_compile_inductor(op: str, device: str) -> None:
    """Once each: what inductor's own code does around the op."""

    def check(call: Call) -> None:
        torch._dynamo.reset()
        function, args = function_of(moved(call, device))
        args = tuple(a.detach() for a in args)
        compiled = torch.compile(function, fullgraph=True)
        assert_same(compiled(*args), function(*args))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        on_examples(op, 1, check)


@every_device
@every_op
def test_export(op: str, device: str) -> None:
    def check(call: Call) -> None:
        function, args = function_of(moved(call, device))
        args = tuple(a.detach() for a in args)

        class Module(torch.nn.Module):
            def forward(self, *args: Tensor) -> Any:
                return function(*args)

        program = torch.export.export(Module(), args)
        assert any(node.target is _registry.find(op).overload for node in program.graph.nodes)
        assert_same(program.module()(*args), function(*args))

    on_examples(op, 3, check)


INVALID_CALLS = [pytest.param(i, id=f"{op}-{i.name}") for op, cases in INVALID.items() for i in cases]


def assert_refused(invalid: Invalid, run: Any) -> None:
    with pytest.raises(RuntimeError) as caught:
        run()
    message = str(caught.value)
    assert f"effk::{invalid.call.op}" in message, message
    assert re.search(rf"\b({invalid.argument})\b", message), message


@pytest.mark.parametrize("invalid", INVALID_CALLS)
def test_invalid_arguments(invalid: Invalid) -> None:
    """Every back end raises RuntimeError, with the names of the op and the argument."""
    op = invalid.call.op
    for name in effk.backends(op):
        assert_refused(invalid, lambda name=name: Backend(name).run(op, *invalid.call.args, **invalid.call.kwargs))


@pytest.mark.parametrize("invalid", INVALID_CALLS)
def test_invalid_arguments_of_the_fake(invalid: Invalid) -> None:
    """So that torch.compile and export refuse them too."""
    call = invalid.call
    if any(t.device.type == "meta" for t in tensors.tensors_in((call.args, call.kwargs))):
        pytest.skip("about devices: all tensors are on one here")
    args, kwargs = tensors.map_tensors(
        lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), (call.args, call.kwargs)
    )
    assert_refused(invalid, lambda: _registry.find(call.op).overload(*args, **kwargs))


@every_op
def test_every_back_end_is_forced_by_name(op: str) -> None:
    with pytest.raises(RuntimeError, match="nonsense"):
        effk.implementation(op, "nonsense")
    for parameter in backend_params(op):
        assert callable(effk.implementation(op, parameter.values[0].name))


@every_op
def test_devices_without_a_kernel_get_the_reference(op: str) -> None:
    """With a warning that names the op."""

    def check(call: Call) -> None:
        fallback = torch._C.DispatchKey.CompositeExplicitAutograd
        with pytest.warns(UserWarning, match=f"effk::{op} has no kernel"):
            out = _registry.find(op).overload._op_dk(fallback, *call.args, **call.kwargs)
        assert_same(out, _registry.find(op).reference(*call.args, **call.kwargs))

    on_examples(op, 3, check)


def test_unknown_op() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        effk.backends("nonsense")
