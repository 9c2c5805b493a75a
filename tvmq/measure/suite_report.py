"""The figures of the bench suite: a row a runtime, a comparison a cell of the summary, and both as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.measure.per_op import Limits, PerOp
from tvmq.measure.report import figure, table

Array = npt.NDArray[Any]
OURS = "tvmq"
# The fastest and the slowest tenth of the rounds are left out of a ratio's spread.
_SPREAD = (10, 90)


@dataclass(frozen=True)
class Row:
    """One runtime on one model: median, smallest and largest milliseconds over the rounds, or why there are none."""

    model: str
    runtime: str
    precision: str
    median_ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """A column of the summary: tvmq in `precision` against the fastest of the peers in it whose names start so."""

    precision: str
    peers: str = ""

    @property
    def title(self) -> str:
        """As the table's head says it."""
        return f"{self.precision} vs {self.peers or 'the best peer'}"


CELLS = (Cell("fp32"), Cell("int8", "OpenVINO"), Cell("int8", "ONNX Runtime"), Cell("bf16", "OpenVINO"))


@dataclass(frozen=True)
class Comparison:
    """One cell of the summary.

    ratio: the median of `peer`, the fastest there, over tvmq's; low and high: the spread of that ratio over the rounds.
    Where something is missing they are None, and `note` says what.
    """

    model: str
    precision: str
    against: str
    peer: str | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""

    def __str__(self) -> str:
        return self.note if self.ratio is None else f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Suite:
    """All rows of a run, the summary, and what it ran on.

    onednn_isa: the level to which the environment holds oneDNN, so OpenVINO and PyTorch; "" where it does not.
    """

    target: str
    threads: int
    rounds: int
    processor: str
    rows: list[Row] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    per_op: list[PerOp] = field(default_factory=list)
    limits: Limits | None = None
    onednn_isa: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A row a runtime; where the time goes, if that was asked for; and the summary, a row a model."""
        runs = f"{self.threads} threads each, {self.rounds} interleaved rounds"
        held = f"; OpenVINO and PyTorch held to {self.onednn_isa}" if self.onednn_isa else ""
        head = f"tvmq for {self.target}; {runs}; {self.processor}{held}"
        columns = ("model", "runtime", "precision", "median ms", "min", "max", "note")
        rows = (
            (r.model, r.runtime, r.precision, *(figure(v) for v in (r.median_ms, r.min_ms, r.max_ms)), r.note)
            for r in self.rows
        )
        costs = [self.limits.to_markdown(), *(kernels.to_markdown() for kernels in self.per_op)] if self.limits else []
        return "\n".join([head + "\n", table(columns, rows), *costs, _HOW_TO_READ, self._summary()])

    def _summary(self) -> str:
        """One row a model, one column a cell."""
        titles = list(dict.fromkeys(comparison.against for comparison in self.comparisons))
        found = {(c.model, c.against): str(c) for c in self.comparisons}
        models = dict.fromkeys(c.model for c in self.comparisons)
        return table(("model", *titles), ((model, *(found[model, title] for title in titles)) for model in models))


_HOW_TO_READ = (
    "The peer's median over tvmq's (above 1: tvmq is faster), and between which values it was over the rounds:\n"
)


def compare(
    model: str, times: Mapping[tuple[str, str], Array], notes: Iterable[Row], precisions: Sequence[str]
) -> list[Comparison]:
    """The cells of one model. `times`: milliseconds a round by (runtime, precision); `notes`: rows without times."""
    missing = {(row.runtime, row.precision): row.note for row in notes}
    return [_compare(model, cell, times, missing) for cell in CELLS if cell.precision in precisions]


def _compare(
    model: str, cell: Cell, times: Mapping[tuple[str, str], Array], missing: Mapping[tuple[str, str], str]
) -> Comparison:
    ours = times.get((OURS, cell.precision))
    if ours is None:
        note = missing.get((OURS, cell.precision), "tvmq was not measured")
        return Comparison(model, cell.precision, cell.title, note=note)
    rivals = {name: values for (name, precision), values in times.items() if _rivals(cell, name, precision)}
    if not rivals:
        said = {missing[key] for key in missing if _rivals(cell, *key)}
        return Comparison(model, cell.precision, cell.title, note="; ".join(["no peer", *sorted(said)]))
    peer = min(rivals, key=lambda name: float(np.median(rivals[name])))
    low, high = (float(q) for q in np.percentile(rivals[peer] / ours, _SPREAD))
    ratio = float(np.median(rivals[peer]) / np.median(ours))
    return Comparison(model, cell.precision, cell.title, peer, ratio, low, high)


def _rivals(cell: Cell, runtime: str, precision: str) -> bool:
    return runtime != OURS and precision == cell.precision and runtime.startswith(cell.peers)
