"""The calibration table: a JSON file with the range and the parameters of each tensor, for people to read and edit."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvmq.errors import CalibrationError, nearest
from tvmq.files import atomic_write_text
from tvmq.quantize.numerics import QParams

SCHEMA = 1


@dataclass(frozen=True)
class Entry:
    """One tensor: the range that was observed, in the tensor's own unit, and how it is quantized.

    keep_float: the tensor stays float, and so do the operators that read it.
    """

    low: float
    high: float
    qparams: QParams
    keep_float: bool = False


@dataclass(frozen=True)
class CalibrationTable:
    """The entries by tensor name; `samples` counts the inferences behind them. Delete an entry to keep its tensor float."""

    model: str
    observer: str
    samples: int
    tensors: Mapping[str, Entry]

    def to_json(self) -> str:
        """The file's text."""
        tensors = {
            name: {
                "min": entry.low,
                "max": entry.high,
                "scale": entry.qparams.scale,
                "zero_point": entry.qparams.zero_point,
                **({"keep_float": True} if entry.keep_float else {}),
            }
            for name, entry in self.tensors.items()
        }
        document = {
            "schema": SCHEMA,
            "about": "int8 calibration: value = (q - zero_point) * scale. Delete a tensor, or set keep_float, to keep it float.",
            "model": self.model,
            "observer": self.observer,
            "samples": self.samples,
            "tensors": tensors,
        }
        return json.dumps(document, indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises OutputError."""
        atomic_write_text(path, self.to_json())

    def sha256(self) -> str:
        """The hash of the file's text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> CalibrationTable:
        """Read a file. Raises CalibrationError naming the tensor and key that are wrong."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise CalibrationError(f"calibration table {path}", seen=error.strerror) from error
        except UnicodeDecodeError as error:
            raise CalibrationError(f"calibration table {path}", expected="UTF-8 JSON", seen="other bytes") from error
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, name: str = "calibration table") -> CalibrationTable:
        """Parse the file's text. Raises CalibrationError."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise CalibrationError(name, expected="JSON", seen=str(error)) from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA or not isinstance(data.get("tensors"), dict):
            raise CalibrationError(name, expected=f"a calibration table of schema {SCHEMA}", seen="another document")
        tensors = {tensor: _entry(name, tensor, value) for tensor, value in data["tensors"].items()}
        return cls(str(data.get("model", "")), str(data.get("observer", "")), int(data.get("samples", 0)), tensors)


_KEYS = ("min", "max", "scale", "zero_point", "keep_float")


def _entry(table: str, tensor: str, value: Any) -> Entry:
    where = f"{table}: tensor {tensor!r}"
    if not isinstance(value, dict):
        raise CalibrationError(where, expected="an object", seen=type(value).__name__)
    for key in value:
        if key not in _KEYS:
            raise CalibrationError(f"{where}: unknown key {key!r}", expected=", ".join(_KEYS), hint=nearest(key, _KEYS))
    scale, zero_point = value.get("scale"), value.get("zero_point")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale) or not 1e-30 < scale < 1e30:
        raise CalibrationError(f"{where}: scale", expected="a positive number", seen=scale)
    if isinstance(zero_point, bool) or not isinstance(zero_point, int) or not -128 <= zero_point <= 127:
        raise CalibrationError(f"{where}: zero_point", expected="an integer from -128 to 127", seen=zero_point)
    low, high = (_number(where, key, value.get(key, 0.0)) for key in ("min", "max"))
    return Entry(low, high, QParams(float(scale), zero_point), value.get("keep_float") is True)


def _number(where: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CalibrationError(f"{where}: {key}", expected="a finite number", seen=value)
    return float(value)
