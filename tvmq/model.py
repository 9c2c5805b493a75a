"""An imported model: canonical Relax with bound parameters, its signature, and where its operators came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tvmq.errors import SignatureError

if TYPE_CHECKING:
    from tvmq.dynamic import Dynamic

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, static shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}{list(self.shape)}"

    def check(self, value: Array) -> Array:
        """`value` as a contiguous array. Raises SignatureError where shape or dtype differ."""
        if value.shape != self.shape:
            raise SignatureError(f"input {self.name!r}", expected=f"shape {list(self.shape)}", seen=list(value.shape))
        if str(value.dtype) != self.dtype:
            hint = f"convert it with .astype({self.dtype!r})"
            raise SignatureError(f"input {self.name!r}", expected=f"dtype {self.dtype}", seen=value.dtype, hint=hint)
        return np.asarray(value, order="C")  # `ascontiguousarray` gives a scalar an axis


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a model, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def arrays(self, values: object) -> tuple[Array, ...]:
        """The inputs in order, checked, from one array, a sequence, or a mapping by name; torch tensors are accepted.

        Raises SignatureError.
        """
        named = zip(self.inputs, self.ordered(values), strict=True)
        return tuple(spec.check(as_array(value)) for spec, value in named)

    def ordered(self, values: object) -> Sequence[object]:
        """What `values` holds for each input, in order, not looked at. Raises SignatureError."""
        names = [spec.name for spec in self.inputs]
        if isinstance(values, Mapping):
            unknown = sorted(set(map(str, values)) - set(names))
            missing = sorted(set(names) - set(map(str, values)))
            if unknown or missing:
                raise SignatureError("inputs by name", expected=names, seen=sorted(map(str, values)))
            values = [values[name] for name in names]
        elif not isinstance(values, list | tuple):
            values = [values]
        assert isinstance(values, Sequence)
        if len(values) != len(names):
            raise SignatureError("inputs", expected=f"{len(names)} ({', '.join(names)})", seen=len(values))
        return values


def as_array(value: object) -> Array:
    """A NumPy array from an array, a torch tensor or a nested sequence of numbers."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value)


@dataclass(frozen=True)
class Model:
    """A canonical Relax module with its signature.

    `module`: one function `main` in inference form, parameters bound as constants, batch norms and constants folded.
    `paths`: variable name -> path of the layer in the source model. `example`: inputs that fit the signature.
    `reference`: what the source model computes on them. `converters`: operator -> "tvm", "tvmq" or "yours", which
    converted it, or "decomposed" into others. `dynamic`: of a model of several sizes, the axes that vary; this is then
    the model of the smallest size, and `larger` holds the others, ascending.
    """

    module: Any
    signature: Signature
    name: str
    example: tuple[Array, ...]
    reference: tuple[Array, ...]
    paths: Mapping[str, str] = field(default_factory=dict)
    converters: Mapping[str, str] = field(default_factory=dict)
    dynamic: Dynamic | None = None
    larger: tuple[Model, ...] = ()
