"""What a converter of an ONNX operator sees of its node: tensors, values known at import, and attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
# ONNX's numbers of element types (TensorProto.DataType) that PyTorch has.
DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
# Integers that PyTorch lacks: what holds their values, and their limits.
NARROW = {
    "uint16": (torch.int32, 0, 65535),
    "uint4": (torch.uint8, 0, 15),
    "int4": (torch.int8, -8, 7),
    "uint2": (torch.uint8, 0, 3),
    "int2": (torch.int8, -2, 1),
}
NARROW_NUMBERS = {4: "uint16", 21: "uint4", 22: "int4", 25: "uint2", 26: "int2"}


def stored_as(array: Array) -> Array:
    """`array`, or one of a type of NARROW in the type that holds its values."""
    holder = NARROW.get(array.dtype.name)
    return array if holder is None else array.astype(str(holder[0]).removeprefix("torch."))


class Unsupported(NotImplementedError):
    """A node that no converter takes as it is: the reason, in a few words."""


@dataclass
class Inputs:
    """A node's operands. `known[i]` is the value of one that does not depend on the model's inputs, else None.

    `narrow[i]`: of one of a type of NARROW its name, else None.
    """

    tensors: Sequence[Tensor | None]
    known: Sequence[Array | None]
    attributes: Mapping[str, Any]
    opset: int
    outputs: int
    narrow: Sequence[str | None] = ()

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: int) -> Any:
        """Operand `index`, None where it is left out."""
        return self.tensors[index] if index < len(self.tensors) else None

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute: a number, a string, a list, or an array."""
        return self.attributes.get(name, default)

    def value(self, index: int) -> Any:
        """The array of operand `index`, None where it is left out. Raises Unsupported where inputs decide it."""
        if self[index] is None:
            return None
        if self.known[index] is None:
            raise Unsupported(f"operand {index} depends on the model's inputs")
        return self.known[index]

    def ints(self, index: int) -> list[int] | None:
        """Operand `index` as integers."""
        value = self.value(index)
        return None if value is None else [int(v) for v in np.ravel(value)]

    def only(self, name: str, *allowed: Any) -> None:
        """Raise Unsupported unless an attribute is left out or one of `allowed`."""
        if name in self.attributes and self.attributes[name] not in allowed:
            raise Unsupported(f"{name}={self.attributes[name]!r}")

    def dtype(self, name: str, default: torch.dtype | None = None) -> torch.dtype:
        """The element type that an attribute names."""
        if name not in self.attributes and default is not None:
            return default
        number = self.attributes.get(name)
        if number not in DTYPES:
            raise Unsupported(f"element type {number}")
        return DTYPES[number]
