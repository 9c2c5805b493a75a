"""Does the imported model compute what PyTorch computes? TVM's importer is silently wrong for some operators.

What runs on the Relax side is what TVM would run: `interpret` computes an operator by a NumPy rule only where the rule
and TVM's lowering agree (tests/oracle/test_relax_operators.py), and compiles it with TVM otherwise.
Operators where an importer's mistake shows in the lowering only, such as a negative index that reads out of bounds
(take, strided_slice, gather), have no NumPy rule on purpose: NumPy would forgive it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from tvmq.errors import ImportMismatchError
from tvmq.importer import program as programs
from tvmq.importer import quantized
from tvmq.importer.torch_export import WAYS_OUT, Translation, where_is
from tvmq.model import Array, Signature
from tvmq.oracle import interpret

# A tensor of smaller magnitude counts as this large: the difference of two nearly equal activations near 1 carries
# their float32 rounding noise (1e-7), and must not fail for it: the default tolerance times FLOOR is 1e-7.
FLOOR = 1e-3
# Two correct sums in another order differ by some units in the last place: more than the tolerance, in half precision.
HALF_UNITS = 8
# Rounding noise before a quantize may move a value to the next step, and then whatever is computed from it: 8-bit
# integers may differ by some steps, and the floats of a quantized model by as much.
STEPS = 4
QUANTIZED_TOLERANCE = 0.05


def deviation(value: Array, reference: Array) -> float:
    """How far `value` is from `reference`: max |value - reference| / max(max |reference|, FLOOR).

    For integers and booleans the largest difference itself, so 0 or at least 1. Infinite where shapes or dtypes differ,
    and where one side is NaN or infinite and the other is not the same. Elements that are NaN or infinite on both sides
    do not count towards a maximum.
    """
    if value.shape != reference.shape or value.dtype != reference.dtype:
        return float("inf")
    if not reference.size:
        return 0.0
    wide, exact = value.astype(np.float64), reference.astype(np.float64)
    if reference.dtype.kind in "biu":
        return float(np.abs(wide - exact).max())
    finite = np.isfinite(exact)
    if finite.all():  # as good as always, and taking out elements is slow
        return (
            float(np.abs(wide - exact).max() / max(np.abs(exact).max(), FLOOR)) if np.isfinite(wide).all() else np.inf
        )
    if not np.array_equal(wide[~finite], exact[~finite], equal_nan=True) or not np.isfinite(wide[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    return float(np.abs(wide[finite] - exact[finite]).max() / max(np.abs(exact[finite]).max(), FLOOR))


def compare(translation: Translation, example: Sequence[Array], tolerance: float) -> None:
    """Run a translated program in Relax and in PyTorch, and compare each tensor that both name, in order.

    A tensor passes when `deviation(relax, torch) <= tolerance`; a float16 one also within HALF_UNITS units in the last
    place. Raises ImportMismatchError for the first that does not, with its operator, layer path and variable, and
    ModelError where TVM cannot compile an operator.
    """
    steps = STEPS if quantized.is_quantized(translation.module) else 0
    references = programs.run_nodes(translation.program, example, lambda node: node.name in translation.variables)
    node_of: dict[str, fx.Node] = {}
    for node in translation.program.graph.nodes:
        if node.name in references:
            node_of.setdefault(translation.variables[node.name], node)

    def watch(variable: str, value: Array) -> None:
        if variable in node_of:
            node = node_of[variable]
            found = _Found(value, references.pop(node.name), tolerance, steps)
            if found.differs:
                raise ImportMismatchError(
                    f"{where_is(_origin(node))} (variable {variable}) computes something else than PyTorch",
                    expected=found.expected,
                    seen=found.seen,
                    hint=f"{WAYS_OUT}; tolerance=... accepts more, check=False all",
                )

    interpret.run(translation.module, example, watch)


def compare_outputs(
    module: Any, signature: Signature, example: Sequence[Array], reference: Sequence[Array], tolerance: float
) -> None:
    """Compare the outputs of a module with PyTorch's, as `compare` does. Raises ImportMismatchError.

    After `compare` has passed, what differs here was rewritten wrongly: before the translation, or by constant folding.
    """
    steps = STEPS if quantized.is_quantized(module) else 0
    for spec, value, expected in zip(signature.outputs, interpret.run(module, example), reference, strict=True):
        found = _Found(value, expected, tolerance, steps)
        if found.differs:
            hint = (
                "no operator differs by itself, so this is a fault of tvmq; tolerance=... accepts more, check=False all"
            )
            raise ImportMismatchError(
                f"output {spec.name!r} is not PyTorch's", expected=found.expected, seen=found.seen, hint=hint
            )


def compare_runtimes(
    translation: Translation, values: Sequence[Array], reference: Sequence[Array], runtime: str, tolerance: float
) -> None:
    """Compare what PyTorch makes of a model of another framework with `runtime`. Raises ImportMismatchError."""
    steps = STEPS if quantized.is_quantized(translation.module) else 0
    names = programs.output_names(translation.program)
    for name, value, expected in zip(names, values, reference, strict=True):
        found = _Found(value, np.asarray(expected), tolerance, steps)
        if found.differs:
            seen = found.seen.replace("PyTorch", runtime)
            hint = "tolerance=... accepts more, check=False all"
            raise ImportMismatchError(
                f"output {name!r} is not that of {runtime}", expected=found.expected, seen=seen, hint=hint
            )


@dataclass(frozen=True)
class _Found:
    """A tensor, what it should be, and how to say so. `steps`: by how many steps a quantized tensor may differ."""

    value: Array
    reference: Array
    tolerance: float
    steps: int = 0

    @property
    def allowed(self) -> float:
        if self.steps and self.reference.dtype.kind in "fiu":
            return max(self.tolerance, self.steps if self.reference.dtype.itemsize == 1 else QUANTIZED_TOLERANCE)
        units = HALF_UNITS * float(np.finfo(np.float16).eps) if self.reference.dtype == np.float16 else 0.0
        return max(self.tolerance, units)

    @property
    def differs(self) -> bool:
        return not deviation(self.value, self.reference) <= self.allowed

    @property
    def expected(self) -> str:
        return f"a deviation of at most {self.allowed:g}"

    @property
    def seen(self) -> str:
        value, reference = self.value, self.reference
        if value.shape != reference.shape or value.dtype != reference.dtype:
            return f"{value.dtype}{list(value.shape)} where PyTorch has {reference.dtype}{list(reference.shape)}"
        return f"{deviation(value, reference):.3g}"


def _origin(node: fx.Node) -> fx.Node:
    """The operator whose result `node` takes a part of, else `node`."""
    target = getattr(node.target, "__name__", "")
    return node.args[0] if target == "getitem" and isinstance(node.args[0], fx.Node) else node
