"""What a test needs beside effk."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence

import pytest


def need(*modules: str, programs: Sequence[str] = (), get: str = "requirements-dev.txt") -> None:
    """Skips the test where one of these is absent; under CI, which has all, that is a failure."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    absent += [name for name in programs if shutil.which(name) is None]
    if absent:
        reason = f"not installed: {', '.join(absent)} ({get})"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
