"""What every chart begins and ends with; matplotlib is loaded when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tvmq.files import atomic_path


def blank(width: float, height: float) -> Any:
    """A figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: str | Path) -> None:
    """Write a figure as PNG. Raises OutputError."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
