"""What quantization costs each operator: its error, alone and with all before it, and what it does to the result.

One pass over the samples computes, operator by operator, on the float model and on that with quantize-dequantize pairs:

cumulative   SQNR of its result where all operators are quantized
isolated     SQNR of its result where only it is: it reads the float model's tensors
sensitivity  SQNR of the model's outputs where only it is quantized; a forward pass an operator and sample
range        what its result was seen to hold, what its integers can stand for, and the share of elements beyond
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from tvmq import ir
from tvmq.measure import canvas, report
from tvmq.model import Model
from tvmq.oracle import interpret
from tvmq.pipeline import Quantized
from tvmq.quantize import numerics, wide
from tvmq.quantize.data import inferences
from tvmq.quantize.table import Entry
from tvmq.recipe_values import Precision

Array = npt.NDArray[Any]
# Quantization noise below this is beyond float32: shown as such instead of as infinite.
CEILING_DB = 150.0


@dataclass(frozen=True)
class OpAccuracy:
    """One operator. SQNRs in dB; seen and used: (low, high) of its result, used None where it is stored as float."""

    name: str
    path: str
    kind: str
    precision: str
    cumulative_db: float
    isolated_db: float
    sensitivity_db: float | None
    seen: tuple[float, float]
    used: tuple[float, float] | None
    saturated: float


@dataclass(frozen=True)
class AccuracyReport:
    """The operators, those that cost the outputs most first; `output_db`: the SQNR of the outputs, all quantized."""

    model: str
    samples: int
    output_db: float
    ops: tuple[OpAccuracy, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A table for people."""
        rows = (cells(op) for op in self.ops)
        return f"{self.model}: outputs {self.output_db:.1f} dB over {self.samples} samples\n\n" + report.table(
            COLUMNS, rows
        )


COLUMNS = ("layer", "op", "precision", "outputs dB", "alone dB", "with all dB", "seen", "used", "beyond %")


def cells(op: OpAccuracy) -> tuple[str, ...]:
    """A row of the table."""
    used = "float" if op.used is None else f"{op.used[0]:.3g} .. {op.used[1]:.3g}"
    numbers = (report.figure(x, 1) for x in (op.sensitivity_db, op.isolated_db, op.cumulative_db))
    seen = f"{op.seen[0]:.3g} .. {op.seen[1]:.3g}"
    return (op.path, op.kind, op.precision, *numbers, seen, used, f"{100 * op.saturated:.2f}")


class _Pairs:
    """The model with explicit pairs; an operator's result is what its readers see: after its pair, if it has one."""

    def __init__(self, qdq: tvm.IRModule, chosen: Container[str]) -> None:
        variables = {str(var.name) for var, _ in ir.calls(qdq)}
        names = [name for name in variables if name in chosen]
        self.seen = {_seen(name, variables): name for name in names}
        self.wide = {name for name in names if f"{name}_dq16" in variables}
        self.program = interpret.Program(qdq, self.seen)

    def run(self, inputs: tuple[Array, ...], watch: interpret.Watch) -> tuple[Array, ...]:
        """As `Program.run`; `watch` is given the names of operators."""
        return self.program.run(inputs, lambda name, value: watch(self.seen[name], value))


def _seen(name: str, variables: Container[str]) -> str:
    """The variable that readers of an operator's result see."""
    return next((twin for twin in (f"{name}_dq16", f"{name}_dq") if twin in variables), name)


class _Sums:
    """What is added up over samples for one tensor."""

    def __init__(self) -> None:
        self.signal = self.cumulative = self.isolated = self.beyond = 0.0
        self.count = 0
        self.low, self.high = np.inf, -np.inf


def analyze(
    model: Model, quantized: Quantized, data: Iterable[Any], *, samples: int = 32, ranked_samples: int = 4
) -> AccuracyReport:
    """The report of a quantized model over the first `samples` inferences in `data`.

    Sensitivities come from the first `ranked_samples` of them; 0 leaves them out.
    Raises CalibrationError for data that do not fit the model.
    """
    chosen = {d.name: d for d in quantized.decisions if d.precision is not Precision.FP32}
    floats, pairs = interpret.Program(quantized.module), _Pairs(quantized.qdq, chosen)
    sums = {name: _Sums() for name in chosen}
    outputs, alone = _Sums(), {name: _Sums() for name in chosen}
    entries = quantized.table.tensors if quantized.table is not None else {}
    count = 0
    for inputs in inferences(data, model.signature):
        if count == samples:
            break
        reference: dict[str, Array] = {}
        expected = floats.run(inputs, _keeping(reference))
        _cumulative(pairs, inputs, reference, sums, entries, (expected, outputs))
        made = _isolated(pairs, inputs, reference, sums)
        if count < ranked_samples:
            _sensitivities(floats, inputs, made, expected, alone)
        count += 1
    ops = [
        OpAccuracy(
            name,
            model.paths.get(name, name),
            decision.kind,
            decision.precision.value,
            _db(sums[name].signal, sums[name].cumulative),
            _db(sums[name].signal, sums[name].isolated),
            _db(alone[name].signal, alone[name].cumulative) if alone[name].count else None,
            (sums[name].low, sums[name].high),
            _used(entries.get(name), name in pairs.wide),
            sums[name].beyond / max(sums[name].count, 1),
        )
        for name, decision in chosen.items()
        if sums[name].count
    ]
    ranked = sorted(ops, key=lambda op: op.isolated_db if op.sensitivity_db is None else op.sensitivity_db)
    return AccuracyReport(model.name, count, _db(outputs.signal, outputs.cumulative), tuple(ranked))


def _cumulative(
    pairs: _Pairs,
    inputs: tuple[Array, ...],
    reference: dict[str, Array],
    sums: dict[str, _Sums],
    entries: Any,
    ends: tuple[tuple[Array, ...], _Sums],
) -> None:
    def watch(name: str, value: Array) -> None:
        found, want = sums[name], reference[name]
        found.signal += _energy(want)
        found.cumulative += _energy(want - value)
        found.low, found.high = min(found.low, float(want.min())), max(found.high, float(want.max()))
        found.count += want.size
        limits = _used(entries.get(name), name in pairs.wide)
        if limits is not None:
            found.beyond += float(((want < limits[0]) | (want > limits[1])).sum())

    expected, outputs = ends
    for want, got in zip(expected, pairs.run(inputs, watch), strict=True):
        if want.dtype.kind == "f":
            outputs.signal += _energy(want)
            outputs.cumulative += _energy(want - got)


def _isolated(
    pairs: _Pairs, inputs: tuple[Array, ...], reference: dict[str, Array], sums: dict[str, _Sums]
) -> dict[str, Array]:
    """Each operator's result where it reads floats; the float result goes on to its readers."""
    made: dict[str, Array] = {}

    def watch(name: str, value: Array) -> Array:
        made[name] = value
        sums[name].isolated += _energy(reference[name] - value)
        return reference[name]

    pairs.run(inputs, watch)
    return made


def _sensitivities(
    floats: interpret.Program,
    inputs: tuple[Array, ...],
    made: dict[str, Array],
    expected: tuple[Array, ...],
    alone: dict[str, _Sums],
) -> None:
    for name, value in made.items():
        outputs = floats.run(inputs, _replacing(name, value))
        for want, got in zip(expected, outputs, strict=True):
            if want.dtype.kind == "f":
                alone[name].signal += _energy(want)
                alone[name].cumulative += _energy(want - got)
                alone[name].count += 1


def _keeping(tensors: dict[str, Array]) -> interpret.Watch:
    def watch(name: str, value: Array) -> None:
        tensors[name] = value

    return watch


def _replacing(name: str, value: Array) -> interpret.Watch:
    return lambda seen, _: value if seen == name else None


def _energy(x: Array) -> float:
    return float(np.square(x, dtype=np.float64).sum())


def _db(signal: float, noise: float) -> float:
    if noise <= 0.0:
        return CEILING_DB
    return float(min(10.0 * np.log10(max(signal, 1e-300) / noise), CEILING_DB))


def _used(entry: Entry | None, as_int16: bool) -> tuple[float, float] | None:
    if entry is None or entry.keep_float:
        return None
    p = entry.qparams
    if as_int16:
        reach = wide.scale_of(p) * numerics.INTEGERS[wide.DTYPE][1]
        return -reach, reach
    return (p.qmin - p.zero_point) * p.scale, (p.qmax - p.zero_point) * p.scale


def draw(found: AccuracyReport, path: str) -> None:
    """Write a bar chart of the SQNRs, an operator a row, as PNG. Needs matplotlib. Raises OutputError."""
    rows = list(reversed(found.ops))
    drawing = canvas.blank(9, 1.2 + 0.32 * len(rows))
    panel = drawing.subplots()
    places = np.arange(len(rows))
    bars = (("of the outputs, only this quantized", "sensitivity_db", 0.27), ("alone", "isolated_db", 0.0))
    for label, field, shift in (*bars, ("with all before it", "cumulative_db", -0.27)):
        panel.barh(places + shift, [getattr(op, field) or 0.0 for op in rows], 0.25, label=label)
    panel.set_yticks(places, [op.path for op in rows], fontsize=7)
    panel.set_xlabel("SQNR, dB (longer is better)")
    panel.legend(fontsize=8)
    panel.set_title(f"{found.model}: outputs {found.output_db:.1f} dB over {found.samples} samples", fontsize=10)
    canvas.save(drawing, path)
