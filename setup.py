"""Builds effk: CMake and ninja make the libraries, setuptools the wheel.

EFFK_CUDA=0|1 forces the CUDA library off or on; by default it is built where nvcc is found.
EFFK_CUDA_ARCHITECTURES is handed to CMake (as CMAKE_CUDA_ARCHITECTURES); MAX_JOBS limits parallel compilation.
EFFK_GLIBC=2.28 makes a wheel for Linux systems with that glibc or later, whatever this one has; it needs ziglang.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_nvcc() -> str | None:
    """Path of nvcc: $CUDACXX, $CUDA_HOME, then PATH and the usual folder."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), *(f"{h}/bin/nvcc" for h in homes if h), "nvcc"]
    return next((path for c in candidates if c and (path := shutil.which(c))), None)


def wants_cuda() -> bool:
    forced = os.environ.get("EFFK_CUDA", "")
    if forced not in ("", "0", "1"):
        raise SystemExit(f"EFFK_CUDA is {forced!r}; wanted 0, 1 or nothing")
    if forced == "1" and not find_nvcc():
        raise SystemExit("EFFK_CUDA=1 but no nvcc was found (set CUDA_HOME)")
    return forced == "1" or (forced == "" and find_nvcc() is not None)


class CMakeBuild(build_ext):
    """Runs CMake once for all libraries; there is no Python extension module."""

    def run(self) -> None:
        import torch

        output = ROOT / "python_api" / "lib" if self.inplace else Path(self.build_lib).resolve() / "effk" / "lib"
        # An editable install's own build folder would be a temporary one; this one makes rebuilds incremental.
        build = ROOT / "build" / "inplace" if self.inplace else Path(self.build_temp).resolve()
        options = {
            "CMAKE_BUILD_TYPE": os.environ.get("CMAKE_BUILD_TYPE", "Release"),
            "EFFK_OUTPUT_DIR": output,
            "EFFK_TORCH_DIR": Path(torch.__file__).parent,
            "EFFK_CUDA": "ON" if wants_cuda() else "OFF",
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",
        }
        if wants_cuda():
            options["CMAKE_CUDA_COMPILER"] = find_nvcc()
        options["EFFK_GLIBC"] = os.environ.get("EFFK_GLIBC", "")  # CMake would remember an earlier one
        if archs := os.environ.get("EFFK_CUDA_ARCHITECTURES"):
            options["EFFK_CUDA_ARCHITECTURES"] = archs
        defines = [f"-D{key}={value}" for key, value in options.items()]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *defines], check=True)
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run(["cmake", "--build", build, *(["-j", jobs] if jobs else [])], check=True)

    def get_outputs(self) -> list[str]:
        return [str(p) for p in (Path(self.build_lib) / "effk" / "lib").glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """The libraries use no Python API, so one wheel serves every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        if glibc := os.environ.get("EFFK_GLIBC"):
            platform = platform.replace("linux", f"manylinux_{glibc.replace('.', '_')}", 1)
        return "py3", "none", platform


setup(
    # Named for setuptools to see a platform wheel; CMakeBuild makes the real libraries.
    ext_modules=[Extension("effk.lib", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
