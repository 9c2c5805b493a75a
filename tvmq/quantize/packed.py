"""Numbers a channel in a calibration table: little-endian float32 as bytes, and as base64 in its JSON."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.errors import CalibrationError

Array = npt.NDArray[Any]


def pack(values: Array) -> bytes:
    """From float [channels]."""
    return values.astype("<f4").tobytes()


def unpack(data: bytes) -> Array:
    """Float32 [channels]."""
    return np.frombuffer(data, "<f4").astype(np.float32)


def to_text(data: bytes) -> str:
    """What JSON keeps."""
    return base64.b64encode(data).decode("ascii")


def from_text(where: str, text: Any) -> bytes:
    """The inverse of `to_text`. Raises CalibrationError, which begins with `where`, for what is no finite float32."""
    try:
        data = base64.b64decode(text, validate=True)
        if np.isfinite(unpack(data)).all():
            return data
    except (TypeError, ValueError, binascii.Error):
        pass
    expected = "finite float32 numbers in base64"
    raise CalibrationError(where, expected=expected, seen=repr(text)[:40], hint="calibrate anew")
