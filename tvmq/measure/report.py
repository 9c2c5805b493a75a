"""What the benchmarks of `tvmq bench` leave behind: the same figures as JSON and as Markdown, in one folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tvmq.errors import OutputError
from tvmq.files import atomic_write_text


class Report(Protocol):
    """The figures of one benchmark."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""

    def to_markdown(self) -> str:
        """Tables for people."""


def folder_for(path: str | Path) -> Path:
    """The folder `path`, made where it is missing: before the work, not after it. Raises OutputError."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}", seen=error.strerror or str(error)) from error
    return folder


def write(report: Report, folder: Path, name: str) -> list[Path]:
    """Write `name`.json and `name`.md in `folder`; returns their paths. Raises OutputError."""
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    atomic_write_text(paths[0], json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n")
    atomic_write_text(paths[1], report.to_markdown())
    return paths


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None is an empty cell."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join('' if cell is None else str(cell) for cell in line)} |" for line in lines) + "\n"


def figure(value: float | None, digits: int = 2) -> str:
    """A number with so many decimals, or nothing."""
    return "" if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    """A share of 1 as whole percent, or nothing."""
    return "" if share is None else f"{100 * share:.0f} %"
