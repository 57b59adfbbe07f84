"""Kernels compiled by NVRTC for a GPU that the library has no code for; all but their run without a GPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import effk
import pytest
from effk import _library, _nvrtc, _registry
from hypothesis import HealthCheck, given, settings

from ..kit import tensors
from ..kit.backends import Backend
from ..kit.calls import Call, collect, families
from ..kit.needs import need
from .test_resources import cuobjdump, usage

HERE = Path(__file__).parent
ARCHITECTURES = ("86", "120")  # neither is in the wheel


@pytest.fixture(scope="module")
def names() -> list[str]:
    """The mangled names of all kernels, as the library found them when it was loaded."""
    if not _library.cuda.loaded:
        assert not (os.environ.get("CI") and shutil.which("nvcc")), "nvcc is here, but no CUDA library"
        pytest.skip(f"no CUDA library: {_library.cuda.missing}")
    found: list[bytes] = []
    _library.cuda.handle.effk_each_kernel(ctypes.CFUNCTYPE(None, ctypes.c_char_p)(found.append))
    return sorted(name.decode() for name in found)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copied_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources, which kernels are compiled from instead."""
    folder = tmp_path / "kernels"
    shutil.copytree(_nvrtc.SOURCES, folder)
    monkeypatch.setattr(_nvrtc, "SOURCES", folder)
    monkeypatch.setattr(_nvrtc, "OPTIONS", (f"-I{folder}", *_nvrtc.OPTIONS[1:]))
    monkeypatch.setattr(_nvrtc, "refused", {})
    return folder


def of_family(names: list[str], family: str) -> list[str]:
    return [name for name in names if _nvrtc.expression(name).startswith(f"effk::{family}::")]


def failure(name: str, device: int = 0, size: int = 2048) -> str:
    """What the library is told of a kernel that it doesn't get."""
    text = ctypes.create_string_buffer(b"#" * size, size)
    assert _nvrtc.loader(name.encode(), device, ctypes.addressof(text), size) is None
    return text.value.decode()


def test_every_kernel_is_known(names: list[str]) -> None:
    tool = cuobjdump()
    assert tool, "no cuobjdump, neither of the CUDA toolkit nor of Triton"
    assert set(names) == {kernel.name for kernel in usage(_library.cuda.path, tool)}


def test_every_kernel_has_a_name_in_code(names: list[str]) -> None:
    in_code = [_nvrtc.expression(name) for name in names]
    assert len(set(in_code)) == len(names) > 300
    assert {name.split("::")[1] for name in in_code} == set(families())
    assert "effk::lscd::linear_kernel<effk::Half, effk::Half, 32>" in in_code
    assert "effk::vq::score_kernel<(effk::vq::Codes)0, effk::vq::ByteSums, (effk::vq::Load)1, true, true>" in in_code
    assert "effk::vq::list_kernel" in in_code


@pytest.mark.parametrize("family", families())
def test_kernels_compile(names: list[str], family: str) -> None:
    """Two instances of each template, of the hundreds. The cubin has the one that is wanted and no other."""
    need("cupy")
    instances: dict[str, list[str]] = {}
    for name in of_family(names, family):
        instances.setdefault(_nvrtc.expression(name).partition("<")[0], []).append(name)
    for of_template in instances.values():
        for name, arch in dict(zip((of_template[0], of_template[-1]), ARCHITECTURES, strict=True)).items():
            found = _nvrtc.symbols(_nvrtc.compile_kernel(name, arch))
            assert _nvrtc.demangle(name) in found
            assert not [other for other in found if "<" in other and other != _nvrtc.demangle(name)]


def test_a_kernel_is_compiled_once(names: list[str], cache: Path, copied_sources: Path) -> None:
    """For each architecture, and again where a header has changed."""
    need("cupy")
    name = of_family(names, "lscd")[0]
    first = _nvrtc.cached_kernel(name, "86")
    written = first.stat().st_mtime_ns
    assert _nvrtc.cached_kernel(name, "86") == first and first.stat().st_mtime_ns == written
    paths = {first, _nvrtc.cached_kernel(name, "120"), _nvrtc.cached_kernel(of_family(names, "lscd")[1], "86")}
    header = copied_sources / "common" / "float_bits.h"
    header.write_text(header.read_text() + "// changed\n")
    paths.add(_nvrtc.cached_kernel(name, "86"))
    assert len(paths) == 4 and set(cache.iterdir()) == paths


def test_what_is_wrong_with_a_source_is_told(
    names: list[str], cache: Path, copied_sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("cupy")
    name = of_family(names, "lscd")[0]
    with (copied_sources / "lscd" / "linear.cuh").open("a") as file:
        file.write("int missing() { return nowhere; }\n")
    monkeypatch.setattr(_nvrtc, "load_kernel", lambda name, device: _nvrtc.cached_kernel(name, "86"))
    told = failure(name)
    assert told.startswith(_nvrtc.expression(name)) and 'linear.cuh(364): error: identifier "nowhere"' in told
    assert not list(cache.glob("*"))
    assert failure(name, size=20) == told[:19]
    monkeypatch.setattr(_nvrtc, "load_kernel", lambda name, device: pytest.fail("tried again"))
    assert failure(name) == told


def test_a_folder_that_cannot_be_written_to(names: list[str], cache: Path) -> None:
    need("cupy")
    cache.write_text("in the way")
    found = _nvrtc.cached_kernel(names[0], "86")
    assert cache not in found.parents and _nvrtc.symbols(found.read_bytes()) and len(list(found.parent.iterdir())) == 1


def test_an_interrupt_is_one_of_the_program(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str, device: int) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(_nvrtc, "load_kernel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        failure(names[0])
        time.sleep(5)
    assert not _nvrtc.refused


def test_architecture_that_nvrtc_lacks(names: list[str], cache: Path) -> None:
    need("cupy")
    with pytest.raises(RuntimeError, match=r"for sm_70: .*architecture"):
        _nvrtc.cached_kernel(names[0], "70")


def test_missing_cupy_is_told(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    told = failure(names[0], device=3)
    assert _nvrtc.expression(names[0]) in told and "GPU 3" in told and "pip install cupy-cuda13x" in told


def test_launch(tmp_path: Path) -> None:
    """gpu::launch, with the runtime's part played by launch.cpp."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    wrap = "--wrap=__cudaRegisterFunction"
    command = ["nvcc", "-std=c++20", "-arch=sm_80", "-cudart=none", "-Xlinker", wrap, "-o", tmp_path / "launch"]
    sources = [HERE / "launch.cpp", HERE / "launch.cu", HERE.parents[1] / "csrc/common/nvrtc.cu"]
    done = subprocess.run([*command, *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert subprocess.run([tmp_path / "launch"], capture_output=True, text=True).stdout == "all so\n"


@pytest.fixture
def always_compiled() -> Iterator[Any]:
    """A function that says whether kernels are compiled though the library has code for them."""
    yield lambda always: _nvrtc.offer(_library.cuda.handle, always)
    _nvrtc.offer(_library.cuda.handle)


@pytest.mark.cuda
@pytest.mark.parametrize("op", [op for op in _registry.OPS if "cuda" in effk.backends(op)])
def test_same_bits(op: str, always_compiled: Any) -> None:
    need("cupy")

    @settings(max_examples=3, suppress_health_check=list(HealthCheck))
    @given(call=collect("CALLS")[op])
    def check(call: Call) -> None:
        always_compiled(False)
        wanted = Backend("cuda").run(op, *call.args, **call.kwargs)
        always_compiled(True)
        got = Backend("cuda").run(op, *call.args, **call.kwargs)
        for a, b in zip(tensors.tensors_in(wanted), tensors.tensors_in(got), strict=True):
            assert tensors.same_bits(a, b)

    check()
    used = {_nvrtc.expression(name).split("::")[1] for name, _ in _nvrtc.loaded}
    assert _registry.find(op).family in used, "nothing was compiled"
