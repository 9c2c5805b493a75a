"""The kernel calls of a bundle, one by one: for profiles and for verification, on any device."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir
from tvmq.deploy.bundle import Bundle
from tvmq.deploy.executor import OpTime
from tvmq.deploy.session import Session

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Step:
    """One call: `symbol` of the kernel in the library ("" for a reshape), `args` by name, the `out` tensor."""

    symbol: str
    args: tuple[str, ...]
    out: str
    shape: tuple[int, ...]
    dtype: str
    kernel: str
    precision: str


def extract(module: tvm.IRModule, kernels: Mapping[str, str]) -> list[Step]:
    """The steps of a scheduled module's main; `kernels` names the tvmq kernel of a variable."""
    steps = []
    for var, value in ir.bindings(module):
        if not isinstance(value, relax.Call) or not isinstance(var.ty, relax.TensorType):
            continue
        name = _tensor_name(var)
        shape, dtype = ir.shape_of(var), ir.dtype_of(var)
        if ir.is_call(value, "call_tir"):
            args = tuple(_argument(arg) for arg in value.args[1].fields)
            symbol = str(value.args[0].name_hint)
            title = kernels.get(name) or _title(symbol)
            steps.append(Step(symbol, args, name, shape, dtype, title, "int8" if _integer(title) else "fp32"))
        elif ir.is_call(value, "reshape"):
            steps.append(Step("", (_argument(value.args[0]),), name, shape, dtype, "reshape", ""))
    return steps


def _tensor_name(var: Any) -> str:
    """The variable's name; names that TVM's fusion made up get a mark, since the graph before it may use them too."""
    name = str(var.name)
    return f"{name}~" if re.fullmatch(r"(lv|gv)\d*", name) else name


def _title(symbol: str) -> str:
    """A kernel's name from its symbol: "tvmq_u8_maxpool2d_2x2_10" -> "u8-maxpool2d-2x2"; TVM's own are marked."""
    ours = re.fullmatch(r"tvmq_(.+)_\d+", symbol)
    return ours[1].replace("_", "-") if ours else f"tvm-{symbol}"


def _argument(expr: Any) -> str:
    if isinstance(expr, relax.Var):
        return _tensor_name(expr)
    value = ir.to_numpy(expr)
    return f"={value.dtype}:{value.item()!r}" if value.ndim == 0 else f"={value.dtype}:{value.tolist()!r}"


def _integer(kernel: str) -> bool:
    return kernel.startswith(("u8-", "s8-")) or "-s8-" in kernel


class StepRunner:
    """Runs a bundle's steps on a device."""

    def __init__(self, bundle: Bundle, session: Session, library: Any) -> None:
        self.session = session
        self.steps = [
            Step(**{**entry, "args": tuple(entry["args"]), "shape": tuple(entry["shape"])})
            for entry in bundle.manifest["steps"]
        ]
        self.parameter_names = [entry["name"] for entry in bundle.manifest["parameters"]]
        self.library = library
        self.functions: dict[str, Any] = {}

    def run(self, tensors: dict[str, Any]) -> Iterator[tuple[Step, list[Any], Any]]:
        """Each step with its argument tensors and its result; `tensors` holds what is known, and grows."""
        for step in self.steps:
            args = [tensors[name] if name in tensors else self._constant(name) for name in step.args]
            if not step.symbol:
                tensors[step.out] = self.session.tensor(args[0].numpy().reshape(step.shape))
            else:
                out = self.session.tensor(np.zeros(step.shape, step.dtype))
                self._function(step.symbol)(*args, out)
                tensors[step.out] = out
            yield step, args, tensors[step.out]

    def profile(self, inputs: Mapping[str, Any], parameters: Sequence[Any], repeat: int) -> list[OpTime]:
        """Milliseconds of each kernel call, in order."""
        tensors = {**inputs, **dict(zip(self.parameter_names, parameters, strict=True))}
        rows = []
        for step, args, out in self.run(tensors):
            if not step.symbol:
                continue
            timer = self._evaluator(step.symbol, repeat)
            seconds = float(np.median(timer(*args, out).results))
            rows.append(OpTime(step.out, step.kernel, step.precision, seconds * 1e3))
        return rows

    def _function(self, symbol: str) -> Any:
        if symbol not in self.functions:
            self.functions[symbol] = self.library.get_function(symbol, query_imports=True)
        return self.functions[symbol]

    def _evaluator(self, symbol: str, repeat: int) -> Any:
        module = self.library
        return module.imports[0].time_evaluator(symbol, self.session.device, number=1, repeat=repeat, min_repeat_ms=2)

    def _constant(self, text: str) -> Any:
        dtype, _, value = text.removeprefix("=").partition(":")
        return self.session.tensor(np.array(ast.literal_eval(value), dtype))
