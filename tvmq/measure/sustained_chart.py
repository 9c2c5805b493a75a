"""A sustained run as a chart: latency over time, a line a bundle."""

from __future__ import annotations

from pathlib import Path

from tvmq.deploy.condition import EMULATED
from tvmq.measure import canvas
from tvmq.measure.bundle_bench import BundleBench


def draw(bench: BundleBench, path: Path) -> None:
    """Write the chart as PNG. Raises OutputError."""
    drawing = canvas.blank(8, 4.2)
    panel = drawing.subplots()
    for one in bench.sustained:
        panel.plot(one.seconds, one.ms, linewidth=1, label=f"{one.bundle} ({100 * one.drift:+.1f} %)")
    panel.set_ylim(bottom=0)
    panel.set_xlabel("seconds")
    panel.set_ylabel(f"ms an inference{' (emulated)' if bench.emulated else ''}")
    panel.grid(color="#dddddd", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8)
    title = f"Latency over time on {bench.device}; in brackets: the last tenth beside the first"
    drawing.suptitle(f"{title}\n{EMULATED}" if bench.emulated else title, fontsize=9)
    canvas.save(drawing, path)
