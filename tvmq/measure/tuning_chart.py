"""Tuning as a chart: the best latency so far over time, a panel a model and precision, a line a tuner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tvmq.measure import canvas
from tvmq.measure.tuning_bench import Contest, Side, TuningBench

_COLOURS = {"tvmq": "#d1495b", "stock MetaSchedule": "#5f7f9e"}
_COLUMNS = 2


def draw(bench: TuningBench, path: Path) -> None:
    """Write the chart as PNG; stars are the whole model, timed at the end. Raises OutputError."""
    columns = min(_COLUMNS, len(bench.rows))
    lines = -(-len(bench.rows) // columns)
    drawing = canvas.blank(5.6 * columns, 3.8 * lines + 0.4)
    panels = drawing.subplots(lines, columns, squeeze=False).ravel()
    for panel, row in zip(panels, bench.rows, strict=False):
        _panel(panel, row)
    for panel in panels[len(bench.rows) :]:
        panel.set_axis_off()
    drawing.suptitle(
        f"Best latency so far, {bench.threads} threads, {bench.processor}.\nStars: whole models at the end, in turns.\n"
        "Stock's line begins when each of its tasks has a trial.",
        fontsize=9,
    )
    canvas.save(drawing, path)


def _panel(panel: Any, row: Contest) -> None:
    for name, side in zip(_COLOURS, (row.tvmq, row.stock), strict=True):
        _line(panel, name, side)
    panel.set_title(f"{row.model} {row.precision}", fontsize=11, fontweight="bold", loc="left")
    panel.set_yscale("log")
    panel.set_xlabel("seconds", fontsize=9)
    panel.set_ylabel("ms an inference", fontsize=9)
    panel.grid(color="#dddddd", linewidth=0.8, which="both")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8)


def _line(panel: Any, name: str, side: Side) -> None:
    points = [*side.curve, (side.seconds, side.curve[-1][1])] if side.curve else []
    panel.step([s for s, _ in points], [ms for _, ms in points], where="post", color=_COLOURS[name], label=name)
    if side.ms is not None:
        panel.plot([side.seconds], [side.ms], marker="*", markersize=11, color=_COLOURS[name])
        panel.annotate(
            f"{side.ms:.3g}", (side.seconds, side.ms), textcoords="offset points", xytext=(-4, 6), fontsize=8
        )
