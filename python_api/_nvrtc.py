"""Kernels that NVRTC compiles at first use, from the package's own sources, for a GPU that the library has no code for.

csrc/common/nvrtc.cu asks for them and launches them; docs/nvrtc.md tells the rest. CuPy brings NVRTC to Python, and
is imported only when a kernel is wanted.
"""

from __future__ import annotations

import _thread
import ctypes
import functools
import hashlib
import os
import re
import tempfile
import threading
from pathlib import Path
from typing import Any

from . import kernels

SOURCES = Path(kernels.__path__[0])
# Of the headers that kernels include NVRTC has none: common/nvrtc_std.h answers for all.
HEADERS = ("cmath", "cstddef", "cstdint", "cstring", "cuda_runtime.h", "limits", "math.h", "type_traits")
OPTIONS = (f"-I{SOURCES}", "-std=c++20", "-default-device", "-diag-suppress=20044")  # extern variables, of the host
INSTALL = "pip install cupy-cuda13x nvidia-cuda-nvrtc"

loaded: dict[tuple[str, int], Any] = {}  # by name and device; kept as long as the library, which has them too
refused: dict[tuple[str, int], str] = {}  # what NVRTC said of those that it can't compile


class CompileError(RuntimeError):
    """What NVRTC says."""


def demangle(name: str) -> str:
    """A symbol as C++ has it, with its parameters."""
    function = ctypes.CDLL("libstdc++.so.6")["__cxa_demangle"]  # torch needs that library too
    function.restype = ctypes.c_void_p
    free = ctypes.CDLL(None)["free"]
    free.argtypes = [ctypes.c_void_p]
    text = function(name.encode(), None, None, None)
    if not text:
        raise ValueError(f"effk: {name} is not a mangled name")
    try:
        return ctypes.string_at(text).decode()
    finally:
        free(text)


def expression(name: str) -> str:
    """What C++ code calls a kernel: `effk::lscd::linear_kernel<effk::Half, effk::Half, 32>`."""
    text = demangle(name).replace("(anonymous namespace)::", "")
    found = re.match(r"(?:void )?(effk::.*>|[\w:]+)\(", text)
    if not found:
        raise ValueError(f"effk: {text} is not a kernel")
    return found[1]


def source(kernel: str) -> str:
    """Code that declares all kernels of the family."""
    family = kernel.split("::")[1]
    includes = [f'#include "{family}/{file.name}"' for file in sorted((SOURCES / family).glob("*.cuh"))]
    # Launchers, all of them inline, would bring every kernel along, and need the runtime. Templates are left alone.
    return "\n".join(["#define inline template <class...> inline", *includes, ""])


def compile_kernel(name: str, arch: str) -> bytes:
    """The cubin of one kernel, without a GPU.

    Args:
        name: mangled.
        arch: compute capability, such as "86".

    Raises:
        ImportError: without CuPy.
        CompileError: NVRTC refuses it.
    """
    # Not cupy.RawModule(code=...): it flushes subnormals, which the library doesn't, and it would go on using its
    # cached result when these headers change.
    from cupy.cuda import nvrtc

    kernel = expression(name)
    standard = (SOURCES / "common" / "nvrtc_std.h").read_bytes()
    names = [header.encode() for header in HEADERS]
    program = nvrtc.createProgram(source(kernel), "effk.cu", [standard] * len(names), names)
    try:
        nvrtc.addNameExpression(program, kernel)
        nvrtc.compileProgram(program, (*OPTIONS, f"-arch=sm_{arch}"))
        return nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise CompileError(f"for sm_{arch}: {nvrtc.getProgramLog(program).strip() or error}") from None
    finally:
        nvrtc.destroyProgram(program)


def cached_kernel(name: str, arch: str) -> Path:
    """A file with the kernel's cubin, in CuPy's folder (`CUPY_CACHE_DIR`); compiled if it isn't there.

    It is one of this process alone if it can't be there.
    """
    from cupy.cuda import nvrtc

    kernel = expression(name)
    folders = (SOURCES / kernel.split("::")[1], SOURCES / "common")
    texts = [file.read_text() for folder in folders for file in sorted(folder.glob("*.*h"))]
    key = hashlib.sha256(repr((kernel, arch, nvrtc.getVersion(), OPTIONS[1:], source(kernel), texts)).encode())
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    path = folder / f"effk-{key.hexdigest()}.cubin"
    if not os.access(path, os.R_OK):
        cubin = compile_kernel(name, arch)
        try:
            _write(path, cubin)
        except OSError:
            path = Path(_own_folder().name) / path.name
            _write(path, cubin)
    return path


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def _write(path: Path, data: bytes) -> None:
    """The file is whole, or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def symbols(cubin: bytes) -> dict[str, str]:
    """The mangled names of a cubin's kernels, by the demangled ones: what stands for an anonymous namespace differs."""
    names = {found.decode() for found in re.findall(rb"\.text\.(\w+)", cubin)}
    return {demangle(name): name for name in names}


def load_kernel(name: str, device: int) -> int:
    """The kernel's CUfunction, which may be launched with all the shared memory that a block may have."""
    import cupy

    def load() -> Any:
        path = cached_kernel(name, gpu.compute_capability)
        try:
            return cupy.RawModule(path=str(path)).get_function(symbols(path.read_bytes())[demangle(name)])
        except (cupy.cuda.driver.CUDADriverError, KeyError):  # damaged: it will be compiled again
            path.unlink(missing_ok=True)
            raise

    with cupy.cuda.Device(device) as gpu:
        try:
            kernel = load()
        except (cupy.cuda.driver.CUDADriverError, KeyError):
            kernel = load()
        most = gpu.attributes["MaxSharedMemoryPerBlockOptin"]
        kernel.max_dynamic_shared_size_bytes = most - kernel.shared_size_bytes
        return loaded.setdefault((name, device), kernel).kernel.ptr  # another thread may have been here


@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
def loader(name: bytes, device: int, error: int, size: int) -> int | None:
    """What the library calls: a CUfunction, or None and the reason in `size` bytes at `error`."""
    key = name.decode(), device
    try:  # nothing can be raised through the library
        if key in refused:
            raise CompileError(refused[key])
        return load_kernel(*key)
    except BaseException as reason:
        why = str(reason) or repr(reason)
        if isinstance(reason, CompileError):
            refused[key] = why
        if isinstance(reason, ImportError):
            why += f" ({INSTALL})"
        if isinstance(reason, KeyboardInterrupt):  # once more, when this has come back
            threading.Timer(0.1, _thread.interrupt_main).start()
        text = f"{expression(key[0])} is compiled for GPU {device} at first use, but failed: {why}"
        data = text.encode()[: size - 1] + b"\0"
        ctypes.memmove(error, data, len(data))
        return None


def offer(library: ctypes.CDLL, always: bool | None = None) -> None:
    """Lets a library have its kernels compiled: those that it has no code for, or all (by default if EFFK_NVRTC=1)."""
    library.effk_set_kernel_loader(loader, os.environ.get("EFFK_NVRTC") == "1" if always is None else always)
