"""Every error that tvmq raises on purpose, as one tree.

TvmqError                 a sentence for the user; the command line prints it and exits with `exit_code`
├── InputError            2   a file, value or option that tvmq cannot use
│   ├── TargetError           an unknown or unsound target description
│   ├── RecipeError           an unknown or unsound recipe
│   ├── ModelError            a model that cannot be read or imported
│   │   ├── UnsupportedOpError    an operator without a converter
│   │   └── ImportMismatchError   the imported model computes something else than its source
│   ├── CalibrationError      calibration data or a calibration table that cannot be used
│   ├── BundleError           a bundle that is damaged, unsafe or of another version
│   │   └── IsaError          a bundle that needs instructions this machine lacks
│   ├── SignatureError        an input with the wrong name, shape or dtype
│   ├── DeviceError           a device that cannot be reached, or that failed
│   ├── TuningError           a tuning log, budget or task that cannot be used
│   └── OutputError           a result that cannot be written
└── CheckFailed           1   a check was made and said no (verify, significance)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TvmqError(Exception):
    """A sentence for the user: what, what was expected, what was seen, what to do."""

    exit_code = 2

    def __init__(self, what: str, *, expected: object = None, seen: object = None, hint: str | None = None) -> None:
        self.what = what
        self.expected = expected
        self.seen = seen
        self.hint = hint
        super().__init__(_sentence(what, expected, seen, hint))


class InputError(TvmqError):
    """A file, value or option that tvmq cannot use."""


class TargetError(InputError):
    """An unknown or unsound target description."""


class RecipeError(InputError):
    """An unknown or unsound recipe."""


class ModelError(InputError):
    """A model that cannot be read or imported."""


class UnsupportedOpError(ModelError):
    """An operator without a converter."""


class ImportMismatchError(ModelError):
    """The imported model computes something else than its source."""


class CalibrationError(InputError):
    """Calibration data or a calibration table that cannot be used."""


class BundleError(InputError):
    """A bundle that is damaged, unsafe or of another version."""


class IsaError(BundleError):
    """A bundle that needs instructions this machine lacks."""


class SignatureError(InputError):
    """An input with the wrong name, shape or dtype."""


class DeviceError(InputError):
    """A device that cannot be reached, or that failed."""


class TuningError(InputError):
    """A tuning log, budget or task that cannot be used."""


class OutputError(InputError):
    """A result that cannot be written."""


class CheckFailed(TvmqError):
    """A check was made and said no."""

    exit_code = 1


def nearest(word: str, known: Iterable[str]) -> str | None:
    """A hint that names the known word most like `word`, or None where nothing is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else None


def _sentence(what: str, expected: object, seen: object, hint: str | None) -> str:
    parts = [what]
    if expected is not None:
        parts.append(f"expected {expected}")
    if seen is not None:
        parts.append(f"saw {seen}")
    line = parts[0] + (": " + ", ".join(parts[1:]) if len(parts) > 1 else "")
    return " ".join((line + (f"; {hint}" if hint else "")).split())
