"""The bench suite as a bar chart: a panel a model, a bar a runtime and precision."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from tvmq.errors import InputError
from tvmq.measure import canvas
from tvmq.measure.suite_report import OURS, Row, Suite

NOT_INSTALLED = "no chart: matplotlib is not installed (pip install 'tvmq[chart]')"
# tvmq stands out; the others keep one colour each, by the first word of their names.
_COLOURS = {OURS: "#d1495b", "PyTorch": "#9aa5b1", "ONNX": "#5f7f9e", "OpenVINO": "#8fb8a8"}
_OTHER = "#c9b79c"
_COLUMNS = 3
# Inches: a panel's width, and what a bar, a gap between precisions and a panel's head and foot take of its height.
_WIDTH, _BAR, _GAP, _FRAME = 5.6, 0.3, 0.5, 1.1
# A whisker is cut beyond so many times the longest bar, lest one disturbed round shrink all others.
_CUT = 1.25


def available() -> bool:
    """Whether charts can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def check(path: str) -> None:
    """Raise InputError where no chart can be drawn: before the work, not after it."""
    if not available():
        raise InputError(f"cannot draw {path}", hint=NOT_INSTALLED)


def draw(suite: Suite, path: Path) -> None:
    """Write the chart as PNG: medians, with whiskers from the smallest to the largest round. Raises OutputError."""
    models = list(dict.fromkeys(row.model for row in suite.rows))
    columns = min(_COLUMNS, len(models))
    lines = -(-len(models) // columns)
    tallest = max(_places(_measured(suite, model))[-1] if _measured(suite, model) else 0 for model in models)
    size = (_WIDTH * columns, (_FRAME + _BAR * (tallest + 1)) * lines + 0.5)
    drawing = canvas.blank(*size)
    panels = drawing.subplots(lines, columns, squeeze=False).ravel()
    for panel, model in zip(panels, models, strict=False):
        _panel(panel, model, _measured(suite, model))
    for panel in panels[len(models) :]:
        panel.set_axis_off()
    drawing.suptitle(
        f"Latency at batch 1, {suite.threads} threads, {suite.processor}; tvmq for {suite.target}.  Bars: median of "
        f"{suite.rounds} interleaved rounds; whiskers: smallest and largest.",
        fontsize=10,
    )
    canvas.save(drawing, path)


def _measured(suite: Suite, model: str) -> list[Row]:
    """The bars of a panel from top to bottom: by precision, the fastest of each first."""
    rows = [row for row in suite.rows if row.model == model and row.median_ms is not None]
    order = list(dict.fromkeys(row.precision for row in suite.rows))
    return sorted(rows, key=lambda row: (order.index(row.precision), row.median_ms or 0.0))


def _places(rows: list[Row]) -> list[float]:
    """Where each bar is, in bars from the top: precisions are set apart."""
    places, at = [], 0.0
    for i, row in enumerate(rows):
        if i:
            at += 1 if row.precision == rows[i - 1].precision else 1 + _GAP / _BAR * 0.4
        places.append(at)
    return places


def _panel(panel: Any, model: str, rows: list[Row]) -> None:
    panel.set_title(model, fontsize=12, fontweight="bold", loc="left")
    if not rows:
        panel.text(0.5, 0.5, "nothing measured", ha="center", transform=panel.transAxes)
        panel.set_axis_off()
        return
    places = _places(rows)
    longest = min(max(row.max_ms or 0.0 for row in rows), _CUT * max(row.median_ms or 0.0 for row in rows))
    for place, row in zip(places, rows, strict=True):
        low, median, high = (value or 0.0 for value in (row.min_ms, row.median_ms, row.max_ms))
        panel.barh(place, median, height=0.8, color=_colour(row))
        whisker = {"ecolor": "#333333", "elinewidth": 1.0, "capsize": 2.5}
        end, text = min(high, longest), f"{median:.3g}" + (f" (to {high:.3g})" if high > longest else "")
        panel.errorbar(median, place, xerr=[[median - low], [end - median]], fmt="none", **whisker)
        bold = "bold" if row.runtime == OURS else "normal"
        panel.text(end + 0.02 * longest, place, text, va="center", fontsize=9, fontweight=bold)
    panel.set_yticks(places, [f"{row.runtime}  {row.precision}" for row in rows], fontsize=9)
    for label, row in zip(panel.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.runtime == OURS else "normal")
    panel.set_ylim(places[-1] + 0.7, -0.7)
    panel.set_xlim(0, 1.2 * longest)
    panel.set_xlabel("ms", fontsize=9)
    panel.tick_params(axis="x", labelsize=9)
    panel.grid(axis="x", color="#dddddd", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)


def _colour(row: Row) -> str:
    return _COLOURS.get(row.runtime.split()[0], _OTHER)
