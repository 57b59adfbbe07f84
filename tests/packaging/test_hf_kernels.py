"""The layout for Hugging Face's kernel-builder: complete, and usable under any name."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from effk import _library, _registry

ROOT = Path(__file__).parents[2]
SCRIPT, SMOKE = Path(__file__).parent / "hf_kernels.py", Path(__file__).parent / "smoke.py"

# Of edition 5 of build.toml, whose reader refuses all others.
KERNEL = {"backend", "cxx-flags", "depends", "include", "src"}
KEYS = {
    "general": {
        *("backends", "cuda", "edition", "hub", "kernel-depends", "license", "name", "neuron", "python-depends"),
        *("source", "tpu", "upstream", "version", "xpu"),
    },
    "torch": {"cxx-flags", "include", "maxver", "minver", "pyext", "src", "stable-abi"},
    "cpu": KERNEL,
    "cuda": KERNEL | {"cuda-capabilities", "cuda-flags", "cuda-minver"},
}

# Imports the kernel as the `kernels` package does, and puts it in place of effk for smoke.py.
USE = """
import importlib.util, sys
from pathlib import Path
import torch

folder, name, smoke, *beside = sys.argv[1:]
if beside:
    import effk as installed
absent = ["cupy", "effk", "matplotlib", "numpy", "rich", "safetensors", "transformers", "triton"]
before = {one: sys.modules.get(one) for one in absent}
sys.modules.update(dict.fromkeys(absent))  # so that importing one is an error
spec = importlib.util.spec_from_file_location(name, f"{folder}/__init__.py")
sys.modules[name] = kernel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
for one, module in before.items():
    sys.modules.pop(one)
    sys.modules.update({one: module} if module else {})

if importlib.util.find_spec("triton"):
    for op in kernel._registry.OPS.values():
        assert op.triton is None or op.load_triton().__module__.startswith(f"{name}.kernels."), op.name
sys.modules["effk"] = kernel
exec(Path(smoke).read_text().replace("torch.ops.effk", f"torch.ops.{kernel._registry.NAMESPACE}"))
assert not hasattr(kernel.ba, "nothing")
if beside:
    ours, theirs = kernel._registry.OPS["lscd_pack"].overload, installed._registry.OPS["lscd_pack"].overload
    assert (ours.namespace, theirs.namespace) == (name, "effk")
    torch.testing.assert_close(ours(w), theirs(w))
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "new"
    subprocess.run([sys.executable, SCRIPT, folder], check=True)
    return folder


@pytest.fixture(scope="module")
def build(layout: Path) -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((layout / "build.toml").read_text())


def sections(build: dict[str, Any], backend: str) -> list[dict[str, Any]]:
    """Those that a variant is built from."""
    return [build["torch"], *(kernel for kernel in build["kernel"].values() if kernel["backend"] == backend)]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True)
    assert done.returncode != 0 and "isn't empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_builder_knows_every_key(build: dict[str, Any]) -> None:
    assert build.keys() == {"general", "torch", "kernel"}
    assert build["general"].keys() <= KEYS["general"] and build["torch"].keys() <= KEYS["torch"]
    for kernel in build["kernel"].values():
        assert kernel.keys() <= KEYS[kernel["backend"]] and {"depends", "src"} <= kernel.keys()
    assert build["general"]["edition"] == 5 and build["general"]["backends"] == ["cpu", "cuda"]
    assert build["torch"]["stable-abi"] == {"cpu": "2.10", "cuda": "2.10"}
    gpus = [kernel["cuda-capabilities"] for kernel in build["kernel"].values() if kernel["backend"] == "cuda"]
    assert all(capabilities == ["8.0+PTX", "9.0a", "10.0a"] for capabilities in gpus)


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_every_file_is_listed_once(layout: Path, build: dict[str, Any], backend: str) -> None:
    """Headers, too: the builder copies only what is listed."""
    listed = Counter(name for section in sections(build, backend) for name in section["src"])
    found = {str(p.relative_to(ROOT)) for folder in ("csrc", "kernels") for p in (ROOT / folder).glob("*/*.*")}
    wanted = {name for name in found if name.endswith((".cpp", ".h", ".cuh", ".cu" if backend == "cuda" else ".cpp"))}
    assert wanted and listed == Counter(wanted | {"torch-ext/torch_binding.cpp"})
    assert all((layout / name).is_file() for name in listed)


def test_flags_are_those_of_cmake(layout: Path, build: dict[str, Any], tmp_path: Path) -> None:
    """What CMake adds for some files, compared with what has no flags of its own."""
    options = ["-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", f"-DEFFK_TORCH_DIR={Path(torch.__file__).parent}"]
    subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *options], check=True, capture_output=True)
    commands: dict[str, list[str]] = {}
    for entry in json.loads((tmp_path / "compile_commands.json").read_text()):
        words = shlex.split(entry["command"])
        commands[str(Path(entry["file"]).relative_to(ROOT))] = words[: words.index("-o")]
    plain = commands["csrc/common/glibc.cpp"]
    expected = {name: [word for word in words if word not in plain] for name, words in commands.items()}
    (families,) = (word.partition("=")[2] for word in expected.pop("kernels/common/cpu_level.cpp"))
    expected["kernels/common/cpu_level.cpp"] = []
    define = (layout / "kernels/common/cpu_level.cpp").read_text().splitlines()[0]
    assert define.replace(", ", ",") == f"#define EFFK_BF16_FAMILIES {families}"
    assert any("-mavx512bf16" in flags for flags in expected.values())

    common = build["torch"]["cxx-flags"]
    assert set(common) <= set(plain)
    for backend in ("cpu", "cuda"):
        found = {
            name: [flag for flag in section["cxx-flags"] if flag not in common]
            for section in sections(build, backend)
            for name in section["src"]
            if name.endswith(".cpp") and not name.startswith("torch-ext/")
        }
        assert found == expected


def test_the_library_registers_in_the_namespace_of_the_build(layout: Path) -> None:
    texts = {path: path.read_text() for path in layout.glob("csrc/*/*.c*")}
    registered = [n for text in texts.values() for n in re.findall(r"LIBRARY_(?:FRAGMENT|IMPL)\((\w+)", text)]
    in_sources = [
        n for path in texts for n in re.findall(r"_LIBRARY_\w+\(effk", (ROOT / path.relative_to(layout)).read_text())
    ]
    assert in_sources and registered == ["TORCH_EXTENSION_NAME"] * len(in_sources)


def test_python_names_the_package_nowhere(layout: Path) -> None:
    files = list(layout.glob("torch-ext/effk/**/*.py"))
    families = {op.family for op in _registry.OPS.values()}
    assert families <= {path.parent.name for path in files if path.name == "ops.py"}
    for path in files:
        text = path.read_text()
        assert "torch.ops.effk" not in text, path
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert "effk" not in [name.partition(".")[0] for name in names], f"{path}:{node.lineno}"


def use(folder: Path, name: str, namespace: str, *beside: str) -> str:
    """Runs smoke.py with the layout's package under a name; gives the CPU levels that it ran on."""
    (folder / "_ops.py").write_text(f"import torch\n\nops = torch.ops.{namespace}\n")
    command = [sys.executable, "-c", USE, folder, name, SMOKE, *beside]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def copy(layout: Path, folder: Path) -> Path:
    for path in layout.glob("torch-ext/effk/**/*.py"):
        copied = folder / path.relative_to(layout / "torch-ext" / "effk")
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_text(path.read_text())
    return folder


def test_another_name_for_the_package(layout: Path, tmp_path: Path) -> None:
    """With the library of this build, whose ops are in effk's own namespace."""
    folder = copy(layout, tmp_path)
    (folder / "_effk_cpu_1.abi3.so").symlink_to(_library.cpu.path)
    assert use(folder, "_effk_cpu_1", "effk").split() == [*_library.supported_cpu_levels()]


def test_another_namespace_beside_effk(layout: Path, tmp_path: Path) -> None:
    """Without a library, as that one would have to be built for it: references answer."""
    folder = copy(layout, tmp_path)
    (folder / "schemas.txt").write_text(_registry.SCHEMAS.read_text())
    assert use(folder, "_effk_cpu_2", "_effk_cpu_2", "beside").strip() == ""
