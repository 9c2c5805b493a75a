"""The kernel calls of a bundle, one by one: for profiles and for verification, on any device."""

from __future__ import annotations

import math
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
from tvmq.errors import BundleError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Result:
    """A tensor that a step makes."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Step:
    """One call: `symbol` of the kernel in the library ("" for a reshape), `args` by name, the tensors it makes.

    An argument is the name of a tensor, or a constant: "=dtype:[shape]:values".
    """

    symbol: str
    args: tuple[str, ...]
    results: tuple[Result, ...]
    kernel: str
    precision: str

    @property
    def out(self) -> str:
        """The name of the first result, which is the step's own."""
        return self.results[0].name


def extract(module: tvm.IRModule, kernels: Mapping[str, str]) -> list[Step]:
    """The steps of a scheduled module's main; `kernels` names the tvmq kernel of a variable."""
    names = _tensor_names(module)
    steps = []
    for var, value in ir.bindings(module):
        results = tuple(_results(var, names)) if isinstance(value, relax.Call) else ()
        if not results:
            continue
        if ir.is_call(value, "call_tir"):
            symbol = str(value.args[0].name_hint)
            title = kernels.get(results[0].name) or kernels.get(str(var.name)) or _title(symbol)
            args = tuple(_argument(arg, names) for arg in value.args[1].fields)
            steps.append(Step(symbol, args, results, title, _precision(title)))
        elif ir.is_call(value, "reshape"):
            steps.append(Step("", (_argument(value.args[0], names),), results, "reshape", ""))
    return steps


def with_entry_points(module: tvm.IRModule) -> tvm.IRModule:
    """A scheduled module with a function of the virtual machine for each kernel that main calls.

    TVM times such functions on any device; kernels themselves it cannot find in a library that is on a board.
    """
    builder = relax.BlockBuilder(module)
    seen = set()
    for _, value in list(ir.bindings(module)):
        if not ir.is_call(value, "call_tir") or (name := entry_point(str(value.args[0].name_hint))) in seen:
            continue
        seen.add(name)
        params = [relax.Var(f"p{i}", arg.ty) for i, arg in enumerate(value.args[1].fields)]
        with builder.function(name, params):
            call = relax.Call(value.op, [value.args[0], relax.Tuple(params)], value.attrs, value.ty_args)
            builder.emit_func_output(builder.emit(call))
    return builder.get()


def entry_point(symbol: str) -> str:
    """The virtual machine's name for a kernel."""
    return f"step_{symbol}"


def _tensor_names(module: tvm.IRModule) -> dict[Any, str | list[str]]:
    """Variable -> the name of its tensor, or of each tensor of a tuple.

    Parts of a tuple are called as the first variable that takes them out; aliases as what they stand for.
    """
    names: dict[Any, str | list[str]] = {param: str(param.name) for param in ir.main(module).params}
    for var, value in ir.bindings(module):
        if isinstance(value, relax.TupleGetItem) and isinstance(names.get(value.tuple_value), list):
            parts = names[value.tuple_value]
            assert isinstance(parts, list)
            parts[value.index] = parts[value.index] or _tensor_name(var)
            names[var] = parts[value.index]
        elif isinstance(value, relax.Var):
            names[var] = names.get(value, _tensor_name(value))
        elif isinstance(var.ty, relax.TupleType):
            names[var] = [""] * len(var.ty.fields)
        else:
            names[var] = _tensor_name(var)
    return names


def _results(var: Any, names: Mapping[Any, str | list[str]]) -> Iterator[Result]:
    if isinstance(var.ty, relax.TupleType):
        for index, (name, part) in enumerate(zip(names[var], var.ty.fields, strict=True)):
            shape = tuple(int(extent) for extent in part.shape.values)
            yield Result(name or f"{_tensor_name(var)}.{index}", shape, str(part.dtype))
    elif isinstance(var.ty, relax.TensorType):
        yield Result(str(names[var]), ir.shape_of(var), ir.dtype_of(var))


def _tensor_name(var: Any) -> str:
    """The variable's name; names that TVM's fusion made up get a mark, since the graph before it may use them too."""
    name = str(var.name)
    return f"{name}~" if re.fullmatch(r"(lv|gv)\d*", name) else name


def _title(symbol: str) -> str:
    """A kernel's name from its symbol: "tvmq_u8_maxpool2d_2x2_10" -> "u8-maxpool2d-2x2"; TVM's own are marked."""
    ours = re.fullmatch(r"tvmq_(.+)_\d+", symbol)
    return ours[1].replace("_", "-") if ours else f"tvm-{symbol}"


def _argument(expr: Any, names: Mapping[Any, str | list[str]]) -> str:
    if isinstance(expr, relax.Var):
        return str(names[expr])
    value = ir.to_numpy(expr)
    return f"={value.dtype}:{list(value.shape)}:{' '.join(repr(item) for item in value.ravel().tolist())}"


def _constant(text: str) -> Array:
    """The array of an argument that is a constant."""
    dtype, shape, values = text.removeprefix("=").split(":")
    words = values.split()
    numbers = [word == "True" for word in words] if dtype == "bool" else [_number(word) for word in words]
    return np.array(numbers, dtype).reshape([int(extent) for extent in re.findall(r"\d+", shape)])


def _number(word: str) -> float:
    return int(word) if re.fullmatch(r"-?\d+", word) else float(word)


def _precision(kernel: str) -> str:
    """The narrowest of what a kernel reads and writes: the first parts of its name are dtypes, w4 and w8 of weights."""
    dtypes = re.match(r"((f32|bf16|f16|[us]8|s16|w[48])-)*", kernel)
    names = dtypes[0].split("-") if dtypes else []
    if "w4" in names or "w8" in names:
        return "int4-weight" if "w4" in names else "int8-weight"
    if names[1:3] == ["s16", "s8"]:  # of activations and weights
        return "int16"
    if "u8" in names or "s8" in names:
        return "int8"
    wider = (("s16", "int16"), ("bf16", "bf16"), ("f16", "fp16"))
    return next((precision for name, precision in wider if name in names), "fp32")


class StepRunner:
    """Runs a bundle's steps on a device. Raises BundleError for steps that make no sense."""

    def __init__(self, bundle: Bundle, session: Session, library: Any) -> None:
        self.session = session
        try:
            self.steps = [_step(entry) for entry in bundle.manifest["steps"]]
        except (KeyError, TypeError) as error:
            raise BundleError(f"{bundle.where}: steps", expected="kernel calls", seen=repr(error)) from error
        self.library = library
        self.functions: dict[str, Any] = {}

    def run(self, tensors: dict[str, Any]) -> Iterator[tuple[Step, list[Any], list[Any]]]:
        """Each step with its argument tensors and its results; `tensors` holds what is known, and grows."""
        for step in self.steps:
            args = [self._tensor(tensors, name) for name in step.args]
            if step.symbol:
                results = [self.session.tensor(np.zeros(r.shape, r.dtype)) for r in step.results]
                self.session.call(lambda: self._function(step.symbol)(*args, *results))  # noqa: B023 (called at once)
            else:
                results = [self.session.tensor(self.session.fetch(args[0]).reshape(step.results[0].shape))]
            tensors.update({made.name: result for made, result in zip(step.results, results, strict=True)})
            yield step, args, results

    def profile(self, machine: Any, tensors: dict[str, Any], repeat: int) -> list[OpTime]:
        """Milliseconds of each kernel call, in order; `machine` is the library's, `tensors` inputs and parameters."""
        rows = []
        for step, args, results in self.run(tensors):
            if step.symbol:
                seconds = self.session.call(lambda: _time(machine, self.session, step, args, repeat))  # noqa: B023
                moved = sum(_bytes(tensor) for tensor in (*args, *results))
                rows.append(OpTime(step.out, step.kernel, step.precision, seconds * 1e3, moved))
        return rows

    def _tensor(self, tensors: Mapping[str, Any], name: str) -> Any:
        if name.startswith("="):
            return self.session.tensor(_constant(name))
        if name not in tensors:
            raise BundleError(f"steps: tensor {name!r}", expected="an input, a parameter or an earlier result")
        return tensors[name]

    def _function(self, symbol: str) -> Any:
        if symbol not in self.functions:
            self.functions[symbol] = self.library.get_function(symbol, query_imports=True)
        return self.functions[symbol]


def _time(machine: Any, session: Session, step: Step, args: Sequence[Any], repeat: int) -> float:
    """Seconds of a kernel call: the median over `repeat` rounds of at least 2 ms."""
    name = entry_point(step.symbol)
    machine.set_input(name, *args)
    timer = machine.time_evaluator("invoke_stateful", session.device, number=1, repeat=repeat, min_repeat_ms=2)
    return float(np.median(timer(name).results))


def _bytes(tensor: Any) -> int:
    return math.prod(int(extent) for extent in tensor.shape) * np.dtype(str(tensor.dtype)).itemsize


def _step(entry: Mapping[str, Any]) -> Step:
    results = tuple(Result(r["name"], tuple(r["shape"]), r["dtype"]) for r in entry["results"])
    return Step(entry["symbol"], tuple(entry["args"]), results, entry["kernel"], entry["precision"])
