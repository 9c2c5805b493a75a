"""The mean errors of a layer's channels as a calibration table keeps them: with a hash of the integers that make them.

So a table gives the biases that its data gave, as long as weights stay what they were (and, where errors were measured,
the scale of what they read); where they are others, or rounded in another way, the errors are left aside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.errors import CalibrationError
from tvmq.quantize import packed
from tvmq.quantize.numerics import QParams

Array = npt.NDArray[Any]
_KEYS = ("float32", "of")


@dataclass(frozen=True)
class MeanErrors:
    """`data`: packed float32 [channels], in units of the layer's results. `of`: what `fingerprint` gave."""

    of: str
    data: bytes

    def values(self) -> Array:
        """Float32 [channels]."""
        return packed.unpack(self.data)

    def fits(self, of: str, channels: int) -> bool:
        """Whether these are the errors of the integers that `of` is the fingerprint of."""
        return self.of == of and len(self.data) == 4 * channels

    def to_dict(self) -> dict[str, str]:
        """Plain data for JSON."""
        return {"of": self.of, "float32": packed.to_text(self.data)}

    @classmethod
    def from_dict(cls, where: str, value: Any) -> MeanErrors:
        """The inverse of `to_dict`. Raises CalibrationError, which begins with `where`."""
        if not isinstance(value, Mapping) or tuple(sorted(value)) != _KEYS:
            raise CalibrationError(where, expected="an object with of and float32", seen=repr(value)[:40])
        return cls(str(value["of"]), packed.from_text(where, value["float32"]))


def fingerprint(q: Array, scales: Array, x: QParams | None) -> str:
    """16 hexadecimal digits of the integers and scales of a weight, and of how what it multiplies is quantized.

    x: None for errors that are of weights alone.
    """
    read = () if x is None else (x.scale, x.zero_point, x.qmin, x.qmax)
    seen = hashlib.sha256(repr((q.shape, *read)).encode())
    seen.update(np.ascontiguousarray(q).tobytes())
    seen.update(np.ascontiguousarray(scales, "<f4").tobytes())
    return seen.hexdigest()[:16]
