"""Bundles that take and return int8: the conversions at a model's ends become the caller's.

    q = map(permute(x: float32); quantize)  ...  y: float32    ->   q = permute(x: int8)  ...  quantize(y)

An input becomes int8 where all that reads it, behind operators that only move elements, quantizes it with one scale
(and limits it to the integers that are used); an output where the calibration table knows its range. The others stay as
they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir, op_calls, ops
from tvmq.model import Model, Signature
from tvmq.quantize import numerics
from tvmq.quantize.narrow import MOVES
from tvmq.quantize.numerics import QParams
from tvmq.quantize.table import CalibrationTable

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Conversions:
    """How float inputs (by position) become a bundle's int8 inputs, and its int8 outputs floats."""

    inputs: Mapping[int, QParams]
    outputs: Mapping[int, QParams]

    def quantize(self, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        """The inputs that the bundle takes, from float ones."""
        return tuple(_integers(a, self.inputs[i]) if i in self.inputs else a for i, a in enumerate(arrays))

    def dequantize(self, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        """Floats, from the outputs that the bundle gives."""
        return tuple(
            numerics.dequantize(a, self.outputs[i].scale, self.outputs[i].zero_point) if i in self.outputs else a
            for i, a in enumerate(arrays)
        )

    def applied_to(self, model: Model) -> Model:
        """`model` with the signature and the example of its int8 form; its graph is left alone."""
        specs = model.signature.inputs, model.signature.outputs
        sides = (
            tuple(dataclasses.replace(spec, dtype="int8") if i in converted else spec for i, spec in enumerate(side))
            for side, converted in zip(specs, (self.inputs, self.outputs), strict=True)
        )
        return dataclasses.replace(model, signature=Signature(*sides), example=self.quantize(model.example))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a manifest."""
        sides = {"inputs": self.inputs, "outputs": self.outputs}
        return {
            side: {str(i): {key: getattr(p, key) for key in _TYPES if _is_said(key, p)} for i, p in found.items()}
            for side, found in sides.items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Conversions:
        """The inverse of `to_dict`."""
        return cls(*({int(i): _params(p) for i, p in data[side].items()} for side in ("inputs", "outputs")))


_TYPES = {"scale": float, "zero_point": int, "qmin": int, "qmax": int}


def _is_said(key: str, params: QParams) -> bool:
    """Whether a manifest holds a parameter: limits only where not all integers are used."""
    return key in ("scale", "zero_point") or params.limits is not None


def _params(data: Mapping[str, Any]) -> QParams:
    return QParams(**{key: _TYPES[key](value) for key, value in data.items()})


def _integers(x: Array, params: QParams) -> Array:
    return numerics.quantize(x, params.scale, params.zero_point, qmin=params.qmin, qmax=params.qmax)


def quantize_outputs(
    qdq: tvm.IRModule, float_module: tvm.IRModule, table: CalibrationTable
) -> tuple[tvm.IRModule, Conversions]:
    """The module with a quantize on each float output that the table knows, and the conversions at both ends."""
    known = [table.tensors.get(str(getattr(out, "name", ""))) for out in ir.outputs(float_module)]
    entries = {i: e.qparams for i, e in enumerate(known) if e is not None and not e.keep_float}
    outputs = ir.outputs(qdq)
    entries = {i: p for i, p in entries.items() if ir.dtype_of(outputs[i]) == "float32"}
    found = [_quantized_by(qdq, param) for param in ir.main(qdq).params]
    inputs = {i: qparams for i, qparams in enumerate(found) if qparams is not None}
    return _with_outputs(qdq, {i: _quantize(p) for i, p in entries.items()}), Conversions(inputs, entries)


def take_integers(realized: tvm.IRModule, conversions: Conversions) -> tvm.IRModule:
    """The realized module with int8 parameters and results in place of the floats that `conversions` names."""
    params = list(ir.main(realized).params)
    wanted = {params[i]: p for i, p in conversions.inputs.items()}
    moved: set[Any] = set(wanted)  # old variables that hold these inputs, moved or not
    stored: dict[Any, Any] = {}  # old parameter -> its integers as the graph stores them
    values = dict(ir.bindings(realized))

    def visit(state: ir.Rewrite, _name: str, value: Any) -> Any:
        old = values[state.current].args[0] if ir.is_call(value) and value.args else None
        if not isinstance(old, relax.Var) or old not in moved:
            return None
        if old in wanted and old not in stored:
            integers = state.parameter(str(old.name), np.zeros(ir.shape_of(old), np.int8))
            storage = _storage(realized, old)
            converted = _converted(integers, storage)
            stored[old] = integers if storage == "int8" else state.emit(converted, f"{old.name}_stored")
        x = stored.get(old, value.args[0])
        if ir.is_call(value, "tvmq.map"):
            return x
        moved.add(state.current)
        return relax.Call(value.op, [x, *value.args[1:]], value.attrs)

    module = ir.rewrite(realized, visit)
    module = _with_outputs(module, {i: lambda out: _converted(out, "int8") for i in conversions.outputs})
    function = ir.main(module)
    by_name = {str(new.name): new for new in list(function.params)[len(params) :]}
    kept = [by_name[str(p.name)] if p in stored else p for p in list(function.params)[: len(params)]]
    replaced = relax.Function(kept, function.body, function.ret_ty, True, function.attrs)
    return tvm.IRModule({"main": replaced})


def _quantized_by(module: tvm.IRModule, param: Any) -> QParams | None:
    """How everything that reads a float parameter quantizes it; None where something does not, or otherwise."""
    values, readers = dict(ir.bindings(module)), ir.users(module)
    pending, found = [param], set[QParams]()
    while pending:
        var = pending.pop()
        for reader in readers.get(var, [None]):
            call: Any = values.get(reader)
            if ir.is_call(call, "quantize") and ir.dtype_of(call) == "int8":
                params = QParams(float(ir.to_numpy(call.args[1])), int(ir.to_numpy(call.args[2])))
                found.add(_limited(params, values.get(var)))
            elif _is_move(call) or _is_quantized(reader, values, readers):
                pending.append(reader)
            else:
                return None
    return found.pop() if len(found) == 1 else None


def _is_move(call: Any) -> bool:
    return bool(ir.is_call(call, *MOVES)) and not ir.is_call(call, "nn.pad")


def _is_quantized(var: Any, values: Mapping[Any, Any], readers: Mapping[Any, list[Any]]) -> bool:
    """Whether `var` is limited to what integers stand for, and then quantized to these."""
    reader = ir.only_reader(readers, var)
    return ir.is_call(values.get(var), "clip") and ir.is_call(values.get(reader), "quantize")


def _limited(params: QParams, call: Any) -> QParams:
    """`params` with the integers that the clip before the quantize leaves."""
    if not ir.is_call(call, "clip"):
        return params
    low, high = (_integers(np.array(limit, np.float32), params).item() for limit in ir.clip_limits(call))
    return dataclasses.replace(params, qmin=low, qmax=high)


def _storage(module: tvm.IRModule, param: Any) -> str:
    """The dtype of the integers that a parameter becomes."""
    readers, values = ir.users(module), dict(ir.bindings(module))
    var = readers[param][0]
    while not ir.is_call(values[var], "tvmq.map"):
        var = readers[var][0]
    return ir.dtype_of(values[var])


def _converted(x: Any, dtype: str) -> Any:
    """`x` of 8-bit integers as the same numbers in another storage: uint8 is int8 plus 128."""
    if ir.dtype_of(x) == dtype:
        return x
    offset = {"int8": 0, "uint8": 128}
    steps = (
        ops.Dequantize(1.0, offset[ir.dtype_of(x)]),
        ops.Quantize(offset[dtype], *numerics.INT_RANGE[dtype], dtype),
    )
    return op_calls.elementwise(x, (), steps, out_shape=ir.shape_of(x), out_dtype=dtype)


def _quantize(params: QParams) -> Any:
    scale, zero_point = relax.const(params.scale, "float32"), relax.const(params.zero_point, "int8")

    def quantize(out: Any) -> Any:
        limited = out if params.limits is None else relax.op.clip(out, *params.limits)
        return relax.op.quantize(limited, scale, zero_point, axis=-1, out_dtype="int8")

    return quantize


def _with_outputs(module: tvm.IRModule, changes: Mapping[int, Any]) -> tvm.IRModule:
    """The module with `changes[i](output)` in place of output i."""
    function = ir.main(module)
    block = relax.BlockBuilder()
    results = ir.outputs(module)
    with block.function("main", list(function.params)):
        with block.dataflow():
            env: dict[Any, Any] = {}
            for var, value in ir.bindings(module):
                if isinstance(value, relax.Tuple | relax.Var):
                    continue
                env[var] = block.emit(ir.substitute(value, env), name_hint=str(var.name))
            finals = [env.get(out, out) for out in results]
            finals = [
                block.emit(changes[i](out), name_hint=f"output{i}_q") if i in changes else out
                for i, out in enumerate(finals)
            ]
            out = block.emit_output(relax.Tuple(finals))
        block.emit_func_output(out)
    return ir.rewrite(block.get(), lambda *_: None)
