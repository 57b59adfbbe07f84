"""Every op as torch sees it: schema, fake, autograd, torch.compile, torch.export; and its refusal of bad arguments."""

from __future__ import annotations

import functools
import itertools
import re
import warnings
from pathlib import Path
from typing import Any

import effk
import pytest
import torch
import torch.fx.experimental.symbolic_shapes
from effk import _registry
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .kit import tensors
from .kit.backends import Backend, backend_params, device_params
from .kit.calls import Call, Invalid, collect, results, written

CALLS, INVALID, FORMULAS = collect("CALLS"), collect("INVALID"), collect("FORMULAS")

every_op = pytest.mark.parametrize("op", list(_registry.OPS))
every_device = pytest.mark.parametrize("device", device_params())


def on_examples(op: str, number: int, check: Any) -> None:
    """check(call) for some calls of op."""
    run = given(call=CALLS[op])(lambda call: check(call))
    settings(max_examples=number, suppress_health_check=list(HealthCheck))(run)()


def moved(call: Call, device: str) -> Call:
    return Call(call.op, *tensors.to_device((call.args, call.kwargs), device))


def function_of(call: Call, *, grad: bool = True) -> tuple[Any, list[Tensor]]:
    """The call as a function of its tensors alone, those in lists too, for tools that trace; and those tensors."""
    leaves, structure = tree_flatten((call.args, call.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    overload = _registry.find(call.op).overload

    def function(*traced: Tensor) -> Any:
        filled = list(leaves)
        for i, t in zip(places, traced, strict=True):
            filled[i] = t
        args, kwargs = tree_unflatten(filled, structure)
        return overload(*args, **kwargs)

    inputs = [leaves[i] for i in places]
    return function, inputs if grad else [t.detach() for t in inputs]


def effects(function: Any, inputs: Any) -> Any:
    """What the function returns, and what it leaves of copies of its inputs."""
    inputs = tensors.to_device(inputs)
    return function(*inputs), inputs


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
            out = _registry.find(op).overload(*args, **kwargs)
            returned = len(list(tensors.tensors_in(out)))
            fakes = list(tensors.tensors_in(results(op, out, args, kwargs)))
        for name in effk.backends(op):
            reals = list(tensors.tensors_in(Backend(name).run(op, *call.args, **call.kwargs)))
            assert all(real.is_contiguous() for real in reals[:returned])
            for fake, real in zip(fakes, reals, strict=True):
                assert fake.dtype == real.dtype and fake.dim() == real.dim()
                for a, b in zip(fake.shape, real.shape, strict=True):
                    assert not isinstance(a, int) or a == b

    on_examples(op, 10, check)


@pytest.mark.parametrize("dynamic", [True, False])
@every_device
@every_op
def test_compile(op: str, device: str, dynamic: bool) -> None:
    def check(call: Call) -> None:
        torch._dynamo.reset()
        function, inputs = function_of(moved(call, device))
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        assert_same(effects(compiled, inputs), effects(function, inputs))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        on_examples(op, 4, check)


@every_device
@every_op
def test_compile_inductor(op: str, device: str) -> None:
    """Once each: what inductor's own code does around the op."""

    def check(call: Call) -> None:
        torch._dynamo.reset()
        function, inputs = function_of(moved(call, device), grad=False)
        compiled = torch.compile(function, fullgraph=True)
        assert_same(effects(compiled, inputs), effects(function, inputs))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        on_examples(op, 1, check)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@every_device
@pytest.mark.parametrize("op", [op.name for op in _registry.OPS.values() if op.overload._schema.is_mutable])
def test_compiled_writes_keep_their_place(op: str, device: str, compiler: str) -> None:
    """What is read before them is old, what is read after them is new, and the caller has it as well."""

    def check(call: Call) -> None:
        torch._dynamo.reset()
        call = moved(call, device)
        function, inputs = function_of(call)
        changed = written(op, call.args, call.kwargs)
        places = [i for i, t in enumerate(inputs) if any(t is w for w in changed)]

        def around(*traced: Tensor) -> Any:
            before = [traced[i] * 2 for i in places]
            function(*traced)
            return before, [traced[i] * 2 for i in places]

        compiled = torch.compile(around, fullgraph=True, backend=compiler)
        (before, after), left = effects(compiled, inputs)
        assume(not all(map(torch.equal, before, after)))
        assert_same((before, after), ([t * 2 for t in changed], [left[i] * 2 for i in places]))
        assert_same(left, effects(function, inputs)[1])

    on_examples(op, {"aot_eager": 4, "inductor": 1}[compiler], check)


@every_device
@every_op
def test_export(op: str, device: str) -> None:
    def check(call: Call) -> None:
        function, inputs = function_of(moved(call, device), grad=False)

        class Module(torch.nn.Module):
            def forward(self, *args: Tensor) -> Any:
                return function(*args)

        program = torch.export.export(Module(), tuple(tensors.to_device(inputs)))
        assert any(node.target is _registry.find(op).overload for node in program.graph.nodes)
        assert_same(effects(program.module(), inputs), effects(function, inputs))

    on_examples(op, 3, check)


def test_aot_inductor(tmp_path: Path) -> None:
    """All ops in one compiled package, which needs no Python to run (tests/packaging/test_cpp.py)."""

    def check(calls: dict[str, Call]) -> None:
        parts: list[tuple[Any, list[bool]]] = []
        inputs: list[Tensor] = []
        for op, call in calls.items():
            if _registry.find(op).collective:  # torch 2.13 leaves out an int at its default where an op has effects
                call = call.with_(stages=1)
            function, own = function_of(call, grad=False)
            changed = [any(t.data_ptr() == w.data_ptr() for w in written(op, call.args, call.kwargs)) for t in own]
            parts.append((function, changed))
            inputs += [t.clone(memory_format=torch.contiguous_format) for t in own]

        class Module(torch.nn.Module):
            def forward(self, *args: Tensor) -> Any:
                outs, left = [], iter(args)
                for function, changed in parts:
                    own = [next(left).clone() if change else next(left) for change in changed]
                    outs += [function(*own), list(itertools.compress(own, changed))]
                return outs

        program = torch.export.export(Module(), tuple(tensors.to_device(inputs)))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "ops.pt2"))
        assert_same(torch._inductor.aoti_load_package(package)(*tensors.to_device(inputs)), Module()(*inputs))

    run = given(calls=st.fixed_dictionaries(CALLS))(lambda calls: check(calls))
    settings(max_examples=2, phases=[Phase.generate], suppress_health_check=list(HealthCheck))(run)()


INVALID_CALLS = [pytest.param(i, id=f"{op}-{i.name}") for op, cases in INVALID.items() for i in cases]


def assert_refused(invalid: Invalid, run: Any) -> None:
    with pytest.raises(RuntimeError) as caught:
        run()
    message = str(caught.value)
    assert f"effk::{invalid.call.op}" in message, message
    assert re.search(rf"(?<!\w)({invalid.argument})(?!\w)", message), message


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
    """With a warning that names the op, unless it is no more than its reference on any device."""
    found, fallback = _registry.find(op), torch._C.DispatchKey.CompositeExplicitAutograd

    def check(call: Call) -> None:

        def run(function: Any) -> Any:
            args, kwargs = tensors.to_device((call.args, call.kwargs))
            return function(*args, **kwargs), args, kwargs

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            through_the_dispatcher = run(functools.partial(found.overload._op_dk, fallback))
        said = [str(w.message) for w in caught if str(w.message).startswith("effk::")]
        assert all(f"effk::{op} has no kernel" in text for text in said) and bool(said) != found.composite
        assert_same(through_the_dispatcher, run(found.reference))

    on_examples(op, 3, check)


def test_unknown_op() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        effk.backends("nonsense")
