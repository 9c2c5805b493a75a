"""An ONNX graph as a torch.nn.Module, which `torch.export` traces like any other: one import path for both.

What does not depend on the model's inputs (weights, shapes, what is computed from them) is computed once, when the
example inputs run, by the reference implementation of the `onnx` package; the rest are layers named after their nodes.
Weights that are dequantized stay integers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from tvmq import ir
from tvmq.errors import ModelError, UnsupportedOpError
from tvmq.importer import onnx_arithmetic, onnx_layers, onnx_quantized, onnx_resize, onnx_shapes
from tvmq.importer.onnx_inputs import NARROW, NARROW_NUMBERS, Inputs, Unsupported, stored_as

Array = npt.NDArray[Any]
Value = Any  # a tensor that depends on the inputs, or an array that does not
DOMAINS = ("", "ai.onnx", "com.microsoft")
# Operators whose result is known from the shape of a tensor.
_OF_SHAPES: dict[str, Callable[[Tensor], Array]] = {
    "Shape": lambda x: np.array(x.shape, np.int64),
    "Size": lambda x: np.array(x.numel(), np.int64),
}
_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
GUIDE = "docs/onnx.md lists the operators that are known"


def converters() -> dict[str, Callable[[Inputs], Any]]:
    """Our converters, by operator."""
    return {
        **onnx_arithmetic.table(),
        **onnx_shapes.table(),
        **onnx_layers.table(),
        **onnx_resize.table(),
        **onnx_quantized.table(),
    }


class Layer(nn.Module):
    """One node: its converter, with its constants as buffers."""

    def __init__(
        self,
        node: onnx.NodeProto,
        opset: int,
        convert: Callable[[Inputs], Any],
        known: Sequence[Any],
        narrow: Sequence[str | None],
    ) -> None:
        super().__init__()
        self.convert, self.opset, self.outputs = convert, opset, len(node.output)
        self.attributes = {item.name: _attribute(item) for item in node.attribute}
        self.known, self.narrow = list(known), list(narrow)
        self.given = [bool(name) for name in node.input]
        for index, array in enumerate(known):
            if array is not None:
                self.register_buffer(f"constant{index}", _tensor(array))

    def forward(self, *tensors: Tensor) -> Any:
        """The node's results, from the operands that depend on the model's inputs."""
        rest = list(tensors)
        operands: list[Tensor | None] = []
        for index, given in enumerate(self.given):
            if not given:
                operands.append(None)
            else:
                operands.append(rest.pop(0) if self.known[index] is None else getattr(self, f"constant{index}"))
        return self.convert(Inputs(operands, self.known, self.attributes, self.opset, self.outputs, self.narrow))


@dataclass(frozen=True)
class _Step:
    """A layer, the values that it reads, and those it makes."""

    name: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]


class OnnxModule(nn.Module):
    """A graph after its example inputs ran: layers of what depends on inputs, and constants among its outputs."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        super().__init__()
        self.inputs = [item.name for item in graph.input]
        self.outputs = [item.name for item in graph.output]
        self.steps: list[_Step] = []
        self.constants: dict[str, str] = {}

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The outputs by name."""
        values: dict[str, Tensor] = dict(zip(self.inputs, inputs.values(), strict=True))
        for step in self.steps:
            results = getattr(self, step.name)(*(values[name] for name in step.reads))
            results = results if isinstance(results, tuple) else (results,)
            values.update(zip(step.makes, results, strict=False))
        return {
            name: values[name] if name in values else getattr(self, self.constants[name]).clone()
            for name in self.outputs
        }


def build(model: onnx.ModelProto, example: Mapping[str, Tensor]) -> OnnxModule:
    """`model` as a module, given its inputs by name. Raises UnsupportedOpError, ModelError."""
    graph, opset = model.graph, _opset(model)
    weights = {item.name for item in graph.initializer}
    for item in [item for item in graph.input if item.name in weights]:
        graph.input.remove(item)
    table = converters()
    _check_known(graph.node, table)
    module = OnnxModule(graph)
    values: dict[str, Value] = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    values.update(example)
    builder = _Builder(module, table, opset, model)
    with torch.no_grad():
        builder.run(graph.node, values)
    for index, name in enumerate(module.outputs):
        if isinstance(values[name], np.ndarray):
            module.constants[name] = f"output{index}"
            module.register_buffer(f"output{index}", _tensor(values[name]))
    return module


class _Builder:
    def __init__(
        self, module: OnnxModule, table: Mapping[str, Callable[[Inputs], Any]], opset: int, model: onnx.ModelProto
    ) -> None:
        self.module, self.table, self.opset, self.model = module, table, opset, model
        self.taken = set(dir(module))
        # Of values of types that PyTorch lacks, their types.
        self.narrow = {
            item.name: NARROW_NUMBERS[item.type.tensor_type.elem_type]
            for item in model.graph.input
            if item.type.tensor_type.elem_type in NARROW_NUMBERS
        }

    def run(self, nodes: Iterable[onnx.NodeProto], values: dict[str, Value]) -> None:
        """Compute every node's results into `values`, and add a layer for each that depends on inputs."""
        for node in nodes:
            operands = [values[name] if name else None for name in node.input]
            if node.op_type == "If" and isinstance(operands[0], np.ndarray):
                self._branch(node, bool(operands[0].item()), values)
            elif node.op_type in _OF_SHAPES and isinstance(operands[0], Tensor):
                values[node.output[0]] = self._shape(node, operands[0])
            elif _is_known(operands) and not _keeps_integers(node, operands, self.model.graph.node):
                values.update(zip(node.output, self._evaluated(node, operands), strict=False))
            else:
                self._layer(node, operands, values)

    def _shape(self, node: onnx.NodeProto, x: Tensor) -> Array:
        shape = _OF_SHAPES[node.op_type](x)
        ends = {item.name: item.i for item in node.attribute}
        return shape[ends.get("start", 0) : ends.get("end")] if ends else shape

    def _branch(self, node: onnx.NodeProto, condition: bool, values: dict[str, Value]) -> None:
        wanted = "then_branch" if condition else "else_branch"
        (branch,) = (item.g for item in node.attribute if item.name == wanted)
        inner = {item.name: numpy_helper.to_array(item) for item in branch.initializer}
        scope = {**values, **inner}
        self.run(branch.node, scope)
        values.update({name: scope[item.name] for name, item in zip(node.output, branch.output, strict=True)})

    def _evaluated(self, node: onnx.NodeProto, operands: list[Any]) -> Sequence[Array]:
        feeds = dict(zip(node.input, operands, strict=True))
        feeds.pop("", None)
        try:
            if node.op_type == "Constant":
                return [np.asarray(_attribute(node.attribute[0]))]
            return [np.asarray(value) for value in ReferenceEvaluator(node, opsets=self._opsets()).run(None, feeds)]
        except (*_ERRORS, NotImplementedError) as error:
            raise _failed(node, error) from error

    def _opsets(self) -> dict[str, int]:
        return {item.domain: item.version for item in self.model.opset_import}

    def _layer(self, node: onnx.NodeProto, operands: list[Value], values: dict[str, Value]) -> None:
        known = [operand if isinstance(operand, np.ndarray) else None for operand in operands]
        name = ir.unique(
            re.sub(r"\W", "_", node.name or f"{node.op_type}_{node.output[0]}").lstrip("_") or "node", self.taken
        )
        tensors = [operand for operand in operands if isinstance(operand, Tensor)]
        try:
            if node.op_type not in self.table:
                raise Unsupported("its result depends on the model's inputs")
            layer = Layer(node, self.opset, self.table[node.op_type], known, self._narrow(node, operands))
            results = layer(*tensors)
        except (*_ERRORS, NotImplementedError) as error:
            raise _failed(node, error) from error
        reads = tuple(n for n, operand in zip(node.input, operands, strict=True) if isinstance(operand, Tensor))
        makes = tuple(node.output)
        values.update(zip(makes, results if isinstance(results, tuple) else (results,), strict=False))
        self.module.add_module(name, layer)
        self.module.steps.append(_Step(name, reads, makes))

    def _narrow(self, node: onnx.NodeProto, operands: list[Value]) -> list[str | None]:
        """Of each operand the type that PyTorch lacks, else None; remembers that of a quantized result."""
        kinds = [
            operand.dtype.name
            if isinstance(operand, np.ndarray) and operand.dtype.name in NARROW
            else self.narrow.get(name)
            for name, operand in zip(node.input, operands, strict=True)
        ]
        if any(kinds) and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            raise Unsupported(f"element type {next(kind for kind in kinds if kind)}")
        if node.op_type == "QuantizeLinear":
            number = next((item.i for item in node.attribute if item.name == "output_dtype"), 0)
            if kind := (kinds[2] if len(kinds) > 2 else None) or NARROW_NUMBERS.get(number):
                self.narrow[node.output[0]] = kind
        return kinds


def _is_known(operands: list[Value]) -> bool:
    return not any(isinstance(operand, Tensor) for operand in operands)


def _keeps_integers(node: onnx.NodeProto, operands: list[Value], nodes: Iterable[onnx.NodeProto]) -> bool:
    """Whether a dequantize is of 8- or 4-bit weights: it is what says that they are quantized. nodes: of the graph."""
    if node.op_type != "DequantizeLinear" or operands[0].dtype.name not in ("int8", "int4") or operands[0].ndim < 2:
        return False
    if operands[1].dtype != np.float32:
        return False
    plain = len(operands) < 3 or operands[2] is None or not operands[2].astype(np.int32).any()
    attributes = {item.name: item.i for item in node.attribute}
    if block := attributes.get("block_size", 0):
        axis = attributes.get("axis", 1) % operands[0].ndim
        whole = operands[0].ndim == 2 and operands[0].shape[axis] % block == 0
        name = node.output[0]
        multiplied = [_multiplies_along(reader, name, axis) for reader in nodes if name in reader.input]
        return plain and whole and bool(multiplied) and all(multiplied)
    return operands[1].ndim < 2 and (plain or operands[0].dtype == np.int8)


def _multiplies_along(node: onnx.NodeProto, weight: str, axis: int) -> bool:
    """Whether a linear layer sums over `axis` of its weight."""
    if node.op_type not in ("MatMul", "Gemm") or list(node.input).index(weight) != 1:
        return False
    transposed = any(item.name == "transB" and item.i for item in node.attribute)
    return axis == int(transposed)


def _check_known(nodes: Iterable[onnx.NodeProto], table: Mapping[str, Any]) -> None:
    """Raise UnsupportedOpError for the operators that no converter takes."""
    unknown: dict[str, str] = {}
    for node in nodes:
        for item in node.attribute:
            if item.type == onnx.AttributeProto.GRAPH and node.op_type == "If":
                _check_known(item.g.node, table)
        known = node.op_type in table or node.op_type in ("Constant", "If", "Range", *_OF_SHAPES)
        if node.domain not in DOMAINS or not known:
            operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            unknown.setdefault(operator, node.name or str(node.output[0]))
    if unknown:
        listed = ", ".join(f"{name} (node {where})" for name, where in unknown.items())
        raise UnsupportedOpError(f"no converter for {listed}", hint=GUIDE)


def _failed(node: onnx.NodeProto, error: Exception) -> ModelError:
    where = f"{node.op_type} (node {node.name or node.output[0]})"
    if isinstance(error, Unsupported):
        return ModelError(f"{where} is not supported", seen=str(error), hint=GUIDE)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ModelError(
        f"{where} cannot be computed", seen=lines[0][:200], hint="are the example inputs such as it takes?"
    )


def _opset(model: onnx.ModelProto) -> int:
    versions = [item.version for item in model.opset_import if item.domain in ("", "ai.onnx")]
    return max(versions, default=1)


def _attribute(item: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(item)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, list | tuple) or hasattr(value, "append"):
        return [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in value]
    return value


def _tensor(array: Array) -> Tensor:
    try:
        return torch.from_numpy(np.array(stored_as(array), order="C"))
    except TypeError as error:
        raise Unsupported(f"element type {array.dtype}") from error
