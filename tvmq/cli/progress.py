"""Progress on stderr: one line that says the stage, and is gone afterwards; nothing where stderr is no terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Report = Callable[[str, int], None]


@contextlib.contextmanager
def progress(console: Console, title: str) -> Iterator[Report]:
    """Yield `report(stage, count)`; a count of 0 is not shown."""
    # A file or a pipe gets errors only: scripts rely on one line.
    if not console.is_terminal:
        yield lambda _stage, _count: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda stage, count: bar.update(task, description=f"{title}: {stage}{f' {count}' if count else ''}")
