"""Every op has all its parts: schema, reference, fake, CPU kernels, CUDA, Triton, tests, a benchmark, documentation."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import effk
import pytest
import torch
from effk import _library, _registry
from effk._registry import Op

from .kit.calls import collect, families

ROOT = Path(__file__).parents[1]

every_op = pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in _registry.OPS.items()])
every_op_with_kernels = pytest.mark.parametrize(
    "op", [pytest.param(op, id=name) for name, op in _registry.OPS.items() if not op.composite]
)


def text_of(*patterns: str) -> str:
    files = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return "\n".join(path.read_text() for path in files)


def test_schemas_and_registry_name_the_same_ops() -> None:
    names = {s.name.removeprefix("effk::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("effk::")}
    assert names == set(_registry.OPS)


@every_op
def test_schema_is_in_cpp(op: Op) -> None:
    """So that a process without Python has it."""
    assert re.search(rf'm\.def\(\s*"{op.name}\(', text_of(f"csrc/{op.family}/*.cpp"))


def arguments_of_schema(op: Op) -> list[tuple[str, object, bool]]:
    return [
        (a.name, a.default_value if a.has_default_value() else inspect.Parameter.empty, a.kwarg_only)
        for a in op.overload._schema.arguments
    ]


def arguments_of_function(function: object) -> list[tuple[str, object, bool]]:
    return [
        (p.name, p.default, p.kind is inspect.Parameter.KEYWORD_ONLY)
        for p in inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    ]


@every_op
@pytest.mark.parametrize("part", ["api", "reference", "fake"])
def test_signature_is_the_schema(op: Op, part: str) -> None:
    """The same names, order, defaults and keyword-only arguments."""
    assert arguments_of_function(getattr(op, part)) == arguments_of_schema(op)


@every_op
def test_no_keyword_only_tensor(op: Op) -> None:
    """register_autograd refuses them."""
    assert not [a.name for a in op.overload._schema.arguments if a.kwarg_only and "Tensor" in str(a.type)]


@every_op
def test_fake_is_registered(op: Op) -> None:
    entry = torch._library.simple_registry.singleton.find(f"effk::{op.name}")
    assert entry.fake_impl.kernel is not None


@every_op
def test_fallback_is_registered(op: Op) -> None:
    """The reference answers on devices without a kernel."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel(f"effk::{op.name}", "CompositeExplicitAutograd")


@every_op_with_kernels
def test_cpu_kernel_at_every_level(op: Op) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"effk::{op.name}", "CPU")
    levels = [f"cpu-{level}" for level in _library.supported_cpu_levels(op.family)]
    assert [name for name in effk.backends(op.name) if name.startswith("cpu-")] == levels
    for level in _library.CPU_LEVELS:
        assert list(ROOT.glob(f"kernels/{op.family}/*_{level}.cpp")), f"no kernels/{op.family}/*_{level}.cpp"


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("forced", _library.supported_cpu_levels())
def test_avx512_needs_bf16_in_some_families(family: str, forced: str) -> None:
    """They use AVX2 where it is missing, and nobody is told otherwise."""
    needs = re.search(r"set\(EFFK_BF16_FAMILIES ([\w ]+)\)", text_of("CMakeLists.txt"))
    assert needs
    limited = family in needs[1].split() and not effk.status()["cpu_bf16"]
    with effk.cpu_level(forced):
        wanted = "avx2" if limited and forced == "avx512" else forced
        assert _library.current_cpu_level(family) == wanted and _library.current_cpu_level() == forced
    for op in (name for name, op in _registry.OPS.items() if op.family == family and not op.composite):
        if wanted == forced:
            effk.implementation(op, f"cpu-{forced}")
        else:
            with pytest.raises(RuntimeError, match=f"can't run on 'cpu-{forced}' here"):
                effk.implementation(op, f"cpu-{forced}")


def test_bf16_is_what_the_system_says() -> None:
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    if not flags:
        pytest.skip("Linux on x86 tells the flags")
    levels = _library.supported_cpu_levels()
    assert effk.status()["cpu_bf16"] == ("avx512" in levels and "avx512_bf16" in flags[1].split())


@every_op_with_kernels
def test_cuda_kernel_is_registered(op: Op) -> None:
    sources = text_of(f"csrc/{op.family}/*.cu")
    assert re.search(rf'm\.impl\("{op.name}"', sources), f"csrc/{op.family}/*.cu doesn't register {op.name}"


@pytest.mark.parametrize("name", [name for name, op in _registry.OPS.items() if op.composite])
def test_composite_op_is_its_reference_everywhere(name: str) -> None:
    """And says so."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert not any(has_kernel(f"effk::{name}", key) for key in _registry.DEVICE_KEYS.values())
    assert effk.backends(name) == ("reference",) and _registry.OPS[name].triton is None


@every_op
def test_triton_kernel_is_there_or_declared_absent(op: Op) -> None:
    if op.triton is None:
        return
    module, function = op.triton.split(":")
    source = ROOT / (module.removeprefix("effk.").replace(".", "/") + ".py")
    assert re.search(rf"^def {function}\(", source.read_text(), re.MULTILINE)
    if _registry.has_triton():
        assert arguments_of_function(op.load_triton()) == arguments_of_schema(op)


@every_op
def test_autograd_is_whole(op: Op) -> None:
    assert (op.backward is None) == (op.setup_context is None)
    has_autograd = torch._C._dispatch_has_kernel_for_dispatch_key(f"effk::{op.name}", "Autograd")
    assert has_autograd == (op.backward is not None)


@every_op
@pytest.mark.parametrize("attribute", ["CALLS", "INVALID"])
def test_the_tests_have_inputs(op: Op, attribute: str) -> None:
    assert op.name in collect(attribute), f"tests/{op.family}/strategies.py: {attribute} lacks {op.name}"


@every_op
def test_the_tests_have_a_formula_for_gradients(op: Op) -> None:
    assert (op.name in collect("FORMULAS")) == (op.backward is not None)


@every_op
def test_the_tests_have_properties(op: Op) -> None:
    assert f'"{op.name}"' in text_of(f"tests/{op.family}/test_*.py")


@every_op
def test_benchmark_has_problems(op: Op) -> None:
    """Some of them for the quick run."""
    problems = [p for p in importlib.import_module(f"effk.perf.{op.family}").PROBLEMS if p.op == op.name]
    assert problems and any(p.quick for p in problems)


@every_op
def test_documentation(op: Op) -> None:
    documentation = inspect.getdoc(op.api) or ""
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in documentation, f"{op.name} has no {section}"
    arguments = documentation[documentation.index("Args:") : documentation.index("Returns:")]
    for name, _, _ in arguments_of_schema(op):
        assert re.search(rf"\b{name}\b", arguments), f"{op.name} doesn't document {name}"


@pytest.mark.parametrize("family", families())
def test_family_has_its_rooms(family: str) -> None:
    for path in (
        f"csrc/{family}",
        f"kernels/{family}",
        f"python_api/{family}/ops.py",
        f"python_api/{family}/reference.py",
    ):
        assert (ROOT / path).exists(), path
    assert importlib.util.find_spec(f"effk.{family}") and importlib.util.find_spec(f"effk.kernels.{family}")


def test_status_lists_everything() -> None:
    found = effk.status()
    assert set(found["backends"]) == set(_registry.OPS)
    assert found["cpu_level"] in found["cpu_levels"]
    assert set(found["libraries"]) == {"cpu", "cuda"}


def test_schemas_are_those_of_the_library() -> None:
    """What platforms without one define."""
    command = "python -c 'import effk._registry as r; r.SCHEMAS.write_text(r.schemas())'"
    assert _registry.SCHEMAS.read_text() == _registry.schemas(), f"write them by {command}"
