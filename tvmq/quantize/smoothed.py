"""By what the channels of a tensor were divided, and which of them have copies, as a calibration table keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvmq.errors import CalibrationError
from tvmq.quantize import packed
from tvmq.quantize.least_noise import Division

_KEYS = ("copies", "float32")


@dataclass(frozen=True)
class Smoothed:
    """`data`: packed float32 factors [channels]. `copies`: a channel for each time that it is copied."""

    data: bytes
    copies: tuple[int, ...] = ()

    @classmethod
    def of(cls, division: Division) -> Smoothed:
        """The inverse of `division`."""
        return cls(packed.pack(division.factors), division.copies)

    def division(self) -> Division:
        """The numbers themselves."""
        return Division(packed.unpack(self.data), self.copies)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"float32": packed.to_text(self.data), "copies": list(self.copies)}

    @classmethod
    def from_dict(cls, where: str, value: Any) -> Smoothed:
        """The inverse of `to_dict`. Raises CalibrationError, which begins with `where`."""
        if not isinstance(value, Mapping) or tuple(sorted(value)) != _KEYS:
            raise CalibrationError(where, expected="an object with float32 and copies", seen=repr(value)[:40])
        copies = value["copies"]
        if not isinstance(copies, list) or any(isinstance(c, bool) or not isinstance(c, int) for c in copies):
            raise CalibrationError(f"{where}: copies", expected="a list of integers", seen=repr(copies)[:40])
        return cls(packed.from_text(where, value["float32"]), tuple(copies))
