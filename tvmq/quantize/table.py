"""The calibration table: a JSON file with the range and the parameters of each tensor, for people to read and edit."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tvmq.errors import CalibrationError, nearest
from tvmq.files import atomic_write_text
from tvmq.quantize.mean_errors import MeanErrors
from tvmq.quantize.numerics import QParams
from tvmq.quantize.smoothed import Smoothed

SCHEMA = 1
ABOUT = (
    "int8 calibration: value = (q - zero_point) * scale. Delete a tensor, or set keep_float, to keep it float; delete "
    "mean_errors to leave biases as they are."
)


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
    """The entries by tensor name; `samples` counts the inferences behind them.

    A tensor without an entry stays float. mean_errors: by the name of a convolution or linear layer, what its biases
    are corrected by. smoothed: by the name of a layer norm or an activation function, what each channel of its result
    was divided by, and which have copies; ranges are of what it makes since.
    """

    model: str
    observer: str
    samples: int
    tensors: Mapping[str, Entry]
    mean_errors: Mapping[str, MeanErrors] = field(default_factory=dict)
    smoothed: Mapping[str, Smoothed] = field(default_factory=dict)

    def to_json(self) -> str:
        """The file's text."""
        tensors = {
            name: {
                "min": entry.low,
                "max": entry.high,
                "scale": entry.qparams.scale,
                "zero_point": entry.qparams.zero_point,
                **({} if entry.qparams.limits is None else {"qmin": entry.qparams.qmin, "qmax": entry.qparams.qmax}),
                **({"keep_float": True} if entry.keep_float else {}),
            }
            for name, entry in self.tensors.items()
        }
        document = {
            "schema": SCHEMA,
            "about": ABOUT,
            "model": self.model,
            "observer": self.observer,
            "samples": self.samples,
            "tensors": tensors,
        }
        if self.mean_errors:
            document["mean_errors"] = {name: errors.to_dict() for name, errors in self.mean_errors.items()}
        if self.smoothed:
            document["smoothed"] = {name: found.to_dict() for name, found in self.smoothed.items()}
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
        except (ValueError, RecursionError) as error:
            raise CalibrationError(name, expected="JSON", seen=str(error)) from error
        if not isinstance(data, dict) or "schema" not in data or not isinstance(data.get("tensors"), dict):
            raise CalibrationError(name, expected=f"a calibration table of schema {SCHEMA}", seen="another document")
        if data["schema"] != SCHEMA:
            raise CalibrationError(name, expected=f"schema {SCHEMA}", seen=data["schema"])
        _known(name, data, _DOCUMENT)
        samples = data.get("samples", 0)
        if isinstance(samples, bool) or not isinstance(samples, int):
            raise CalibrationError(f"{name}: samples", expected="an integer", seen=repr(samples))
        tensors = {tensor: _entry(name, tensor, value) for tensor, value in data["tensors"].items()}
        errors = {
            layer: MeanErrors.from_dict(f"{name}: mean_errors of {layer!r}", value)
            for layer, value in _object(name, data, "mean_errors").items()
        }
        smoothed = {
            tensor: Smoothed.from_dict(f"{name}: smoothed {tensor!r}", value)
            for tensor, value in _object(name, data, "smoothed").items()
        }
        return cls(str(data.get("model", "")), str(data.get("observer", "")), samples, tensors, errors, smoothed)


_DOCUMENT = ("schema", "about", "model", "observer", "samples", "tensors", "mean_errors", "smoothed")
_KEYS = ("min", "max", "scale", "zero_point", "qmin", "qmax", "keep_float")
_FULL = (("qmin", -128), ("qmax", 127))
# Between these a scale and its reciprocal are normal float32 numbers.
_SCALE_MIN, _SCALE_MAX = 1e-30, 1e37


def _object(table: str, data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = data.get(key, {})
    if not isinstance(found, dict):
        raise CalibrationError(f"{table}: {key}", expected="an object", seen=type(found).__name__)
    return found


def _known(where: str, value: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in value:
        if key not in keys:
            hint = nearest(key, keys)
            raise CalibrationError(f"{where}: unknown key {key!r}", expected=f"one of {', '.join(keys)}", hint=hint)


def _entry(table: str, tensor: str, value: Any) -> Entry:
    where = f"{table}: tensor {tensor!r}"
    if not isinstance(value, dict):
        raise CalibrationError(where, expected="an object", seen=type(value).__name__)
    _known(where, value, _KEYS)
    scale = _number(where, "scale", value.get("scale"))
    if not _SCALE_MIN < scale < _SCALE_MAX:
        expected = f"a number between {_SCALE_MIN:g} and {_SCALE_MAX:g}"
        raise CalibrationError(f"{where}: scale", expected=expected, seen=scale)
    qmin, qmax = (_integer(where, key, value.get(key, default), -128, 127) for key, default in _FULL)
    zero_point = _integer(where, "zero_point", value.get("zero_point"), qmin, qmax)
    keep_float = value.get("keep_float", False)
    if not isinstance(keep_float, bool):
        raise CalibrationError(f"{where}: keep_float", expected="true or false", seen=repr(keep_float))
    low, high = (_number(where, key, value.get(key, 0.0)) for key in ("min", "max"))
    return Entry(low, high, QParams(float(np.float32(scale)), zero_point, qmin, qmax), keep_float)


def _integer(where: str, key: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise CalibrationError(f"{where}: {key}", expected=f"an integer from {low} to {high}", seen=_short(value))
    return value


def _number(where: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        raise CalibrationError(f"{where}: {key}", expected="a finite number", seen=_short(value))
    return float(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
