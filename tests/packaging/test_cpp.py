"""Programs without Python: a C++ one that links libtorch, loads effk's library, and runs what AOTInductor compiled."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import effk
import pytest
import torch
from effk import _library
from torch import nn

HERE, TORCH = Path(__file__).parent, Path(torch.__file__).parent

pytestmark = pytest.mark.slow


class Twice(nn.Module):
    """A pruned layer and something of torch's."""

    def __init__(self) -> None:
        super().__init__()
        dense = nn.Linear(8, 6)
        with torch.no_grad():
            dense.weight.copy_(torch.arange(-24, 24).reshape(6, 8).relu())
            dense.bias.fill_(1.0)
        self.layer = effk.lscd.SparseLinear.from_linear(dense)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(x)


def test_a_program_without_python(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    model, x = Twice().eval(), torch.ones(3, 8)
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        expected = model(x)
        assert torch.equal(torch._inductor.aoti_load_package(package)(x), expected)
    program = tmp_path / "use"
    includes = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    command = [compiler, "-std=c++20", *includes, str(HERE / "use.cpp"), "-o", str(program), *libraries]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program, _library.cpu.path, package], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == float(expected.sum())
