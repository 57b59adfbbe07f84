"""Triton kernels compiled ahead of time, without a GPU.

A family's triton.py holds its kernels in a table of `Variant`s, launches through it and through nothing else, and
offers it as `variants()`. So what is compiled here is all that can run. A process started with TRITON_INTERPRET=1 has
no kernels to compile, only interpreted ones.

    python -m effk.kernels.common.triton_aot effk.kernels.lscd.triton
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Compute capabilities to compile for, and the bytes of shared memory that a block can have there.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def kernel(*, aligned: Sequence[str] = ()) -> Callable[[Callable[..., None]], Any]:
    """triton.jit for a function that Triton must not compile anew for some values of its arguments.

    Args:
        aligned: arguments that its callers promise to be multiples of 16 (bytes for a pointer). Integers need a type.
    """

    def decorate(function: Callable[..., None]) -> Any:
        names = [
            p.name
            for p in inspect.signature(function).parameters.values()
            if p.annotation is not tl.constexpr and p.name not in aligned
        ]
        return triton.jit(function, do_not_specialize=names)

    return decorate


@dataclass(frozen=True)
class Variant:
    """A kernel with everything that its machine code depends on.

    Attributes:
        kernel: what `kernel` decorated.
        pointers: dtype behind each pointer argument.
        constants: its constexpr arguments.
        num_warps, num_stages: Triton's options.
        fused: whether a product and a sum may be rounded together, once.
    """

    kernel: Any
    pointers: dict[str, torch.dtype]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    fused: bool = True

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.fused}

    def launch(self, grid: tuple[int, ...], **args: Any) -> None:
        """Runs the kernel on the current stream of the tensors' device."""
        for name, dtype in self.pointers.items():
            assert args[name].dtype == dtype, f"{self}: {name} is {args[name].dtype}"
        with torch.cuda.device_of(args[next(iter(self.pointers))]):
            self.kernel[grid](**args, **self.constants, **self.options)

    def __str__(self) -> str:
        parts = [*(TYPES[t] for t in self.pointers.values()), *(f"{k}={v}" for k, v in self.constants.items())]
        return f"{self.kernel.__name__}[{', '.join(parts)}]"

    def compile(self, capability: int) -> Any:
        """The kernel compiled for one architecture, such as 90."""
        signature, attributes = {}, {}
        for i, p in enumerate(self.kernel.params):
            if p.is_constexpr:
                signature[p.name] = "constexpr"
                continue
            signature[p.name] = f"*{TYPES[self.pointers[p.name]]}" if p.name in self.pointers else p.annotation_type
            if not p.do_not_specialize:
                attributes[i,] = [["tt.divisibility", 16]]
        return triton.compile(
            ASTSource(self.kernel, signature, self.constants, attributes),
            target=GPUTarget("cuda", capability, 32),
            options=self.options,
        )


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers a thread, bytes of shared memory a block, bytes spilled a thread."""

    kernel: str
    capability: int
    registers: int
    shared: int
    spilled: int

    @property
    def good(self) -> bool:
        return self.spilled == 0 and self.shared <= SHARED_MEMORY[self.capability]


def resources(variant: Variant, capability: int) -> Resources:
    """Compiles a kernel and reads what its machine code declares."""
    compiled = variant.compile(capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run(
            [tool, "--dump-resource-usage", cubin.name], check=True, capture_output=True, text=True
        ).stdout
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(str(variant), capability, used["REG"], compiled.metadata.shared, used["STACK"] + used["LOCAL"])


def table(rows: Sequence[Resources]) -> str:
    """Rows as text."""
    width = max(len(row.kernel) for row in rows)
    lines = [f"{'kernel':{width}}   sm  registers  shared  spilled"]
    lines += [f"{r.kernel:{width}}  {r.capability:3}  {r.registers:9}  {r.shared:6}  {r.spilled:7}" for r in rows]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles the kernels of modules and prints what they take; 1 when one spills or doesn't fit."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("modules", nargs="+", help="such as effk.kernels.lscd.triton")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    variants = [v for name in options.modules for v in importlib.import_module(name).variants()]
    rows = [resources(variant, capability) for variant in variants for capability in SHARED_MEMORY]
    print(json.dumps([asdict(row) for row in rows]) if options.json else table(rows))
    return int(not all(row.good for row in rows))


if __name__ == "__main__":
    sys.exit(main())
