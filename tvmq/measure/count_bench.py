"""`tvmq bench --counts`: instructions of an inference, tvmq's and ONNX Runtime's, on an emulated Cortex-A76.

On one thread. Emulated times mean nothing, instructions are exact; they say nothing of caches, nor how many a processor
runs at a time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tvmq import zoo
from tvmq.files import scratch_folder
from tvmq.measure import counts, onnx_counts
from tvmq.measure.peers import Subject, onnx_file, onnx_static_file, samples
from tvmq.measure.report import figure, table
from tvmq.measure.suite import bundle_of, check_names
from tvmq.target import load_target

Progress = Callable[[str], None]
MODELS = ("resnet18", "mobilenetv2")
PRECISIONS = ("fp32", "int8")
TARGET = "raspberry-pi-5"
# Random inputs that calibrate: instructions do not depend on the ranges.
_CALIBRATION = 2
_NEEDS = ("onnx", onnx_counts.PACKAGE)


@dataclass(frozen=True)
class Row:
    """Instructions of an inference. peer: ONNX Runtime's, None where it has none; `note` says why, or what it ran."""

    model: str
    precision: str
    tvmq: int
    peer: int | None = None
    note: str = ""

    @property
    def share(self) -> float | None:
        """tvmq's instructions over the peer's."""
        return None if self.peer is None else self.tvmq / self.peer


@dataclass(frozen=True)
class CountBench:
    """The table. cpu: the emulated processor."""

    cpu: str
    target: str
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        rows = [{**asdict(row), "share": row.share} for row in self.rows]
        return {"cpu": self.cpu, "target": self.target, "emulated": True, "rows": rows}

    def to_markdown(self) -> str:
        """One row a model and precision, in millions of instructions."""
        head = f"millions of instructions an inference, one thread of an emulated {self.cpu}, tvmq for {self.target}\n"
        columns = ("model", "precision", "tvmq", "ONNX Runtime", "tvmq / ONNX Runtime", "note")
        cells = (
            (
                row.model,
                row.precision,
                figure(row.tvmq / 1e6, 1),
                figure(None if row.peer is None else row.peer / 1e6, 1),
                figure(row.share),
                row.note,
            )
            for row in self.rows
        )
        return f"{head}\n{table(columns, cells)}"


def run(
    models: Sequence[str] = MODELS,
    precisions: Sequence[str] = PRECISIONS,
    *,
    with_peers: bool = True,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> CountBench:
    """Compile and count. cache: where boards are kept, None for the user's.

    Raises InputError for an unknown model or precision, DeviceError, OutputError.
    """
    check_names(models, precisions)
    show = progress or (lambda _text: None)
    rows, target = [], load_target(TARGET)
    for name in models:
        module, example = zoo.builder(name)()
        with scratch_folder() as folder:
            subject = Subject(name, module, example, samples(example, _CALIBRATION), 1, folder)
            for precision in precisions:
                show(f"{name}: tvmq {precision}")
                # Records of this machine would make the table its own.
                path = bundle_of(subject, precision, target, untuned=True)
                ours = counts.total(path, onnx_counts.CPU, cache=cache)
                show(f"{name}: ONNX Runtime {precision}")
                theirs, note = _peer(subject, precision, cache) if with_peers else (None, "")
                rows.append(Row(name, precision, ours, theirs, note))
    return CountBench(onnx_counts.CPU, TARGET, rows)


def _peer(subject: Subject, precision: str, cache: Path | None) -> tuple[int | None, str]:
    """ONNX Runtime's count, in int8 with the activations that take it fewer instructions; and a note, in millions."""
    files: dict[str, dict[str, Callable[[Subject], Path]]] = {
        "fp32": {"": onnx_file},
        "int8": {f"{sign} activations": partial(onnx_static_file, activations=sign) for sign in ("u8", "s8")},
    }
    if precision not in files:
        return None, f"ONNX Runtime has no {precision} there"
    for name in _NEEDS:
        if importlib.util.find_spec(name) is None:
            return None, f"not installed: {name} (pip install 'tvmq[peers]')"
    inputs = [value.numpy() for value in subject.example]
    found = {note: onnx_counts.count(make(subject), inputs, cache) for note, make in files[precision].items()}
    best, *others = sorted(found, key=lambda note: found[note])
    return found[best], "; ".join([best, *(f"{figure(found[note] / 1e6, 1)} with {note}" for note in others)])
