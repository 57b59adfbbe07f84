"""A progress bar for long work: rich's where it is installed and someone watches, else none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(description: str, total: int, enabled: bool = True) -> Iterator[Callable[[], None]]:
    """Shows a bar on stderr inside a `with` block.

    Args:
        description: what is going on.
        total: number of steps.
        enabled: False shows nothing.

    Yields:
        A function to call after each step.
    """
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        enabled = False
    if not enabled or not sys.stderr.isatty():
        yield lambda: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)
