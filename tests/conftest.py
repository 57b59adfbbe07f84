"""Set-up of the whole run. The kit is in kit/, each family's inputs in <family>/strategies.py."""

import importlib.util
import os

import torch

# Without a GPU, Triton kernels run in its interpreter. Triton reads this when it is imported.
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import effk
import pytest
from hypothesis import settings

from . import simt

if simt.missing() is None:
    simt.register()

settings.register_profile("effk", deadline=None, print_blob=True)
# Under CI the same cases each time; elsewhere new ones, and failures are remembered.
settings.register_profile("ci", parent=settings.get_profile("effk"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "effk")


def pytest_report_header() -> list[str]:
    found = effk.status()
    return [
        f"effk: {found['cpu']}, {found['cpu_level']}, devices {found['devices'] or 'none'}, triton {found['triton']}",
        *(f"effk: {op} on {', '.join(names)}" for op, names in found["backends"].items()),
    ]


def pytest_configure(config: pytest.Config) -> None:
    # Of other people's code, and nothing that a test here could change.
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:triton.runtime.interpreter")
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:torch.jit._script")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no GPU")
