"""Builds and runs a family's fuzz.cpp: its torch-free kernels under AddressSanitizer."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "fuzz"

# Found memory must end the process; leaks are none of a fuzzer's business, and ptrace may be forbidden in containers.
SANITIZERS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}


def build(family: str) -> Path:
    """Path of the program. Compiled with the flags of CMakeLists.txt, one process at a time."""
    BUILD.mkdir(parents=True, exist_ok=True)
    options = {
        "EFFK_SANITIZE": "ON",
        "EFFK_OUTPUT_DIR": BUILD / "lib",
        "EFFK_TORCH_DIR": Path(torch.__file__).parent,
        "CMAKE_CXX_FLAGS_RELEASE": "-O1",
    }
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = ["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())]
        for command in (configure, ["cmake", "--build", BUILD, "--target", f"fuzz_{family}"]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert done.returncode == 0, done.stdout
    return BUILD / f"fuzz_{family}"


def run(program: Path, *arguments: object) -> str:
    """What it printed. A non-zero exit fails, with its report."""
    command = [program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **SANITIZERS})
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
