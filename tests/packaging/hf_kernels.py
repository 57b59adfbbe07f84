"""Writes effk as Hugging Face's kernel-builder takes it: `python tests/packaging/hf_kernels.py FOLDER`.

A kernel there is one library and the Python files beside it. Both live under a name that each build makes anew, so that
several versions can be loaded at once: C++ has it as TORCH_EXTENSION_NAME, Python in `_ops`, which the builder writes.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CMAKE = (ROOT / "CMakeLists.txt").read_text()
PROJECT = dict(re.findall(r'^(name|license|description) = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.M))

FLAGS = ["-fvisibility=hidden", "-fvisibility-inlines-hidden"]  # of all; the builder itself sets C++20
# For other packages, or for `python -m`; kernels are neither installed nor found by a name.
LEFT_OUT = ("integrations", "__main__.py")

BINDING = """#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)

#ifdef CUDA_KERNEL
// The builder can't pass --wrap to the linker, which csrc/common/nvrtc.cu wants. So that file knows of no kernel, and
// a GPU that the library has no code for gets an error.
extern "C" void __real___cudaRegisterFunction() {}
#endif
"""

CHECK = """
// torch's macros take the name as it is written.
#define EFFK_LIBRARY_FRAGMENT(name, m) STABLE_TORCH_LIBRARY_FRAGMENT(name, m)
#define EFFK_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)
"""

# At the end of ba/__init__.py: a kernel may import torch and the standard library alone, and these names need NumPy.
LAZY = '''

def __getattr__(name: str) -> Any:
    """What needs NumPy, imported when it is wanted."""
    global {names}
    if name not in __all__:
        raise AttributeError(f"module {{__name__!r}} has no attribute {{name!r}}")
    {imports}
    return globals()[name]
'''

FLAKE = """{
  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs = { self, kernel-builder, ... }: kernel-builder.lib.genKernelFlakeOutputs {
    inherit self;
    path = ./.;
  };
}
"""

CARD = """---
library_name: kernels
license: {{ license }}
---
# effk
%s.

```python
from kernels import get_kernel

effk = get_kernel("{{ repo_id }}", version={{ version }})
```
"""


def cmake(name: str) -> list[str]:
    """The words of a variable of CMakeLists.txt."""
    found = re.search(rf"set\({name} ([^)]*)\)", CMAKE)
    if not found:
        raise SystemExit(f"CMakeLists.txt doesn't set {name}")
    words = found[1].replace('"', "").split(" CACHE ")[0].replace(";", " ").split()
    return [w for word in words for w in (cmake(word[2:-1]) if word.startswith("${") else [word])]


def level(source: Path) -> str:
    """The CPU level that the file is compiled for, by the end of its name; none for what any processor can run."""
    found = re.search(r"_(avx2|avx512)$", source.stem)
    if not found or source.suffix != ".cpp":
        return ""
    family = source.parent.name
    needs_bf16 = family in cmake("EFFK_BF16_FAMILIES") and source.stem == f"{family}_avx512"
    return found[1] + "bf16" * needs_bf16


def level_flags(level: str) -> list[str]:
    return cmake(f"EFFK_FLAGS_{level.removesuffix('bf16')}") + ["-mavx512bf16"] * level.endswith("bf16")


def capability(architecture: str) -> str:
    """CMake's "80" and "90a-real" are "8.0+PTX" and "9.0a"."""
    major, minor, real = re.fullmatch(r"(\d+)(\da?)(-real)?", architecture).groups()  # type: ignore[union-attr]
    return f"{major}.{minor}" + ("" if real else "+PTX")


def toml(tables: dict[str, dict[str, Any]]) -> str:
    """Of strings, numbers and lists, which TOML writes as JSON does."""
    lines = []
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value, indent=2)}" for key, value in table.items())]
    return "\n".join(lines[1:]) + "\n"


def build_toml(sources: list[Path]) -> str:
    by_level: dict[str, list[str]] = defaultdict(list)
    for source in sources:
        by_level["cuda" if source.suffix == ".cu" else level(source)].append(str(source))
    everywhere = {"src": ["torch-ext/torch_binding.cpp", *by_level.pop("")], "cxx-flags": FLAGS}
    # In every section of CUDA: a build declares the GPUs of all its sections, and users of others are refused.
    backends = {"cpu": {}, "cuda": {"cuda-capabilities": [*map(capability, cmake("EFFK_CUDA_ARCHITECTURES"))]}}
    cuda = {"backend": "cuda", "depends": ["torch"], "src": by_level.pop("cuda"), **backends["cuda"]}
    kernels = {
        f"kernel.{backend}-{level}": {
            "backend": backend,
            "depends": ["torch"],
            "src": found,
            "cxx-flags": FLAGS + level_flags(level),
            **more,
        }
        for backend, more in backends.items()  # each builds its own sections only
        for level, found in by_level.items()
    }
    (torch,) = re.findall(r"TORCH_TARGET_VERSION=0x(\w\w)(\w\w)0{12}", CMAKE)
    version = ".".join(str(int(part, 16)) for part in torch)
    general = {"name": PROJECT["name"], "version": 0, "edition": 5, "license": PROJECT["license"]}
    return toml(
        {
            "general": {**general, "backends": [*backends]},
            "torch": everywhere,
            "torch.stable-abi": dict.fromkeys(backends, version),
            **kernels,
            "kernel.cuda": cuda,
        }
    )


def cpp(path: Path, text: str) -> str:
    """A C++ file for the layout."""
    text = re.sub(r"STABLE_TORCH_LIBRARY_(\w+)\(effk,", r"EFFK_LIBRARY_\1(TORCH_EXTENSION_NAME,", text)
    if path == Path("csrc/common/check.h"):
        text += CHECK
    if path == Path("kernels/common/cpu_level.cpp"):  # a flag with quotes wouldn't survive the builder's CMake
        names = ", ".join(f'"{family}"' for family in cmake("EFFK_BF16_FAMILIES"))
        text = f"#define EFFK_BF16_FAMILIES {names}\n{text}"
    return text


def python(path: Path, text: str) -> str:
    """A Python file for the layout; its path is that in the package."""
    package = "." * len(path.parts)
    text = re.sub(r"^( *)from effk\b\.?", rf"\1from {package}", text, flags=re.M)
    text = text.replace('"effk.kernels.', '__package__.rpartition(".")[0] + ".kernels.')
    if "torch.ops.effk" in text:
        text = re.sub(r"^import torch$", f"import torch\nfrom {package} import _ops", text, count=1, flags=re.M)
        text = text.replace("torch.ops.effk", "_ops.ops")
    if path == Path("_library.py"):
        text = text.replace("lib/libeffk_cpu.so", "_effk_*.so").replace("lib/libeffk_cuda.so", "_effk_cuda_*.so")
    if path == Path("ba/__init__.py"):
        lazy = re.findall(r"^from \.(?:problem|scenes|solve) import .+$", text, flags=re.M)
        names = ", ".join(line.partition(" import ")[2] for line in lazy)
        for line in lazy:
            text = text.replace(f"{line}\n", "")
        text = text.replace("from .models", "from typing import Any\n\nfrom .models", 1)
        text += LAZY.format(names=names, imports="\n    ".join(lazy))
    return text


def write(out: Path) -> None:
    """Writes the layout into a new or empty folder."""
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} isn't empty")
    files = {
        "build.toml": "",
        "flake.nix": FLAKE,
        "CARD.md": CARD % PROJECT["description"],
        "LICENSE": (ROOT / "LICENSE").read_text(),
        "torch-ext/torch_binding.cpp": BINDING,
    }
    sources = []
    for folder in ("csrc", "kernels"):
        for file in sorted((ROOT / folder).glob("*/*")):
            if file.suffix in (".cpp", ".cu", ".cuh", ".h"):
                sources.append(file.relative_to(ROOT))
                files[str(sources[-1])] = cpp(sources[-1], file.read_text())
    files["build.toml"] = build_toml(sources)
    for folder, package in (("python_api", Path()), ("kernels", Path("kernels"))):
        for file in sorted((ROOT / folder).rglob("*.py")):
            path = package / file.relative_to(ROOT / folder)
            if not set(path.parts) & set(LEFT_OUT):
                files[f"torch-ext/effk/{path}"] = python(path, file.read_text())
    for name, text in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    write(Path(sys.argv[1]))
