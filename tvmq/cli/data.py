"""DATA on the command line: a .npz, a folder of .npy, package.module:function, or a calibration table."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvmq.errors import CalibrationError

if TYPE_CHECKING:
    from tvmq.quantize.table import CalibrationTable


def read_calibration(text: str) -> Iterable[Any] | CalibrationTable:
    """Batches, or the finished table where `text` names a .json file. Raises CalibrationError."""
    if Path(text).suffix == ".json":
        from tvmq.quantize.table import CalibrationTable

        return CalibrationTable.load(text)
    return read_batches(text)


def read_batches(text: str) -> Iterable[Any]:
    """The batches of a file, a folder, or of what "package.module:function" returns or yields.

    Raises CalibrationError.
    """
    if ":" in text and not Path(text).exists():
        return _called(text)
    from tvmq.quantize.data import open_data

    return open_data(text)


def _called(reference: str) -> Iterable[Any]:
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = pkgutil.resolve_name(reference)
    except (ImportError, AttributeError, ValueError) as error:
        what = f"calibration data {reference!r}"
        raise CalibrationError(what, expected="package.module:function", seen=str(error)) from error
    finally:
        sys.path.pop(0)
    if not callable(function):
        expected = "a function that returns or yields batches"
        raise CalibrationError(f"calibration data {reference!r}", expected=expected, seen=type(function).__name__)
    batches = function()
    if not isinstance(batches, Iterable):
        raise CalibrationError(f"calibration data {reference!r}", expected="batches", seen=type(batches).__name__)
    return batches
