"""Exported programs: what tvmq asks of one, what its inputs and outputs are called, and running it in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from tvmq import ir
from tvmq.errors import ModelError
from tvmq.importer.arguments import arguments
from tvmq.model import Array, TensorSpec, as_array

# What dropout and batch norm leave in a decomposed graph when the module was exported in training mode.
_TRAINING = {
    "native_dropout.default": "dropout",
    "bernoulli.p": "dropout",
    "_native_batch_norm_legit.default": "batch norm",
    "_native_batch_norm_legit_functional.default": "batch norm",
}
_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION, OutputKind.USER_INPUT_MUTATION)


@dataclass(frozen=True)
class OpenAxes:
    """(input, axis) pairs that a program leaves open, with one size for all, from `low` to `high` (None: any)."""

    axes: tuple[tuple[str, int], ...]
    low: int = 1
    high: int | None = None

    def __str__(self) -> str:
        return ",".join(f"{name}:{axis}" for name, axis in self.axes)


def dynamic_shapes(what: str, axes: Sequence[OpenAxes]) -> ModelError:
    """The refusal of a program with dynamic shapes."""
    listed = " and ".join(map(str, axes)) or "one that its data decide"
    hint = (
        "tvmq compile --dynamic INPUT:AXIS=N,N,... (dynamic= of import_model) makes a program a size; or export it by "
        "torch.export.export(module, example_inputs), without dynamic_shapes"
    )
    return ModelError(f"{what} has dynamic shapes", expected="static shapes", seen=f"open axes {listed}", hint=hint)


def open_axes(program: ExportedProgram) -> list[OpenAxes]:
    """The axes of inputs that a program leaves open, those of one symbol together. Raises ModelError."""
    groups: dict[Any, list[tuple[str, int]]] = {}
    for name, value in _input_values(program).items():
        for axis, extent in enumerate(value.shape):
            if not isinstance(extent, int):
                symbol = extent.node.expr
                if not symbol.is_Symbol:
                    hint = "export it with an axis of its own there"
                    raise ModelError(
                        f"input {name!r}", expected="a free axis", seen=f"axis {axis} of {symbol}", hint=hint
                    )
                groups.setdefault(symbol, []).append((name, axis))
    return [OpenAxes(tuple(axes), *_limits(program, symbol)) for symbol, axes in groups.items()]


def _limits(program: ExportedProgram, symbol: Any) -> tuple[int, int | None]:
    limits = program.range_constraints.get(symbol)
    if limits is None:
        return 1, None
    return max(1, int(limits.lower)), int(limits.upper) if limits.upper.is_Integer else None


def check_interface(program: ExportedProgram, name: str) -> None:
    """Raise ModelError unless inputs and outputs are tensors of static shape."""
    if program.range_constraints:
        raise dynamic_shapes(name, open_axes(program))
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT and not isinstance(spec.arg, TensorArgument):
            hint = "bind it in a wrapper module"
            raise ModelError(f"input {spec.arg.name!r} of {name}", expected="a tensor", seen="a constant", hint=hint)
    for index, spec in enumerate(user_outputs(program)):
        if not isinstance(spec.arg, TensorArgument):
            hint = "return only tensors, from a wrapper module"
            raise ModelError(f"output {index} of {name}", expected="a tensor", seen="a constant", hint=hint)


def check_inference(program: ExportedProgram) -> None:
    """Raise ModelError where a program trains, or writes to its own state: first as exported, then decomposed."""
    for node in program.graph.nodes:
        layer = _TRAINING.get(node.target.__name__) if node.op == "call_function" else None
        if layer or _drops_attention(node):
            hint = "call module.eval() before torch.export.export"
            raise ModelError(f"the program was exported in training mode ({layer or 'dropout'} is active)", hint=hint)
    for spec in program.graph_signature.output_specs:
        if spec.kind in _MUTATIONS:
            hint = "take the old value as an input and return the new one"
            raise ModelError(f"the model writes to {spec.target!r}", expected="a model without state", hint=hint)


def _drops_attention(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.scaled_dot_product_attention.default and bool(arguments(node)["dropout_p"])


def input_names(program: ExportedProgram) -> list[str]:
    """The names of the tensors that the caller passes, in order."""
    return [s.arg.name for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]


def inputs(program: ExportedProgram) -> tuple[TensorSpec, ...]:
    """What the caller passes, in order."""
    return tuple(
        TensorSpec(name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for name, value in _input_values(program).items()
    )


def _input_values(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Tensors like those that the caller passes, by name, in order."""
    values = {node.name: node.meta["val"] for node in program.graph.find_nodes(op="placeholder")}
    return {name: values[name] for name in input_names(program)}


def outputs(program: ExportedProgram, values: Sequence[Array]) -> tuple[TensorSpec, ...]:
    """What the caller gets, in order, given an example of it."""
    names = output_names(program)
    return tuple(TensorSpec(name, v.shape, str(v.dtype)) for name, v in zip(names, values, strict=True))


def user_outputs(program: ExportedProgram) -> list[Any]:
    """The output specs of what the model returns, in order."""
    return [spec for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]


def output_names(program: ExportedProgram) -> list[str]:
    """The keys of a returned dict, else the names of the returned nodes; unique, also against the inputs."""
    nodes = [str(spec.arg.name) for spec in user_outputs(program)]
    tree = pytree.tree_unflatten(nodes, program.call_spec.out_spec)
    keys = [path for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    named = any(not isinstance(key, pytree.SequenceKey) for path in keys for key in path)
    names = ["_".join(map(_key_name, path)) for path in keys] if named else nodes
    taken = set(input_names(program))
    return [ir.unique(name or f"output{index}", taken) for index, name in enumerate(names)]


def _key_name(key: Any) -> str:
    return str(next(getattr(key, field) for field in ("key", "name", "idx") if hasattr(key, field)))


def run(program: ExportedProgram, example: Sequence[Array]) -> tuple[Array, ...]:
    """What PyTorch computes: the user's outputs, in order. Raises ModelError where it cannot."""
    try:
        values = _interpret(program, example, lambda node, value: None)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ModelError("PyTorch cannot run the model on the example inputs", seen=first[0][:200]) from error
    kinds = [spec.kind for spec in program.graph_signature.output_specs]
    return tuple(np.array(as_array(v)) for v, kind in zip(values, kinds, strict=True) if kind is OutputKind.USER_OUTPUT)


def run_nodes(
    program: ExportedProgram, example: Sequence[Array], wanted: Callable[[fx.Node], bool]
) -> dict[str, Array]:
    """What PyTorch computes at each wanted node that holds a tensor: node name -> array."""
    found: dict[str, Array] = {}

    def keep(node: fx.Node, value: Any) -> None:
        if isinstance(value, torch.Tensor) and wanted(node):
            found[node.name] = as_array(value)

    _interpret(program, example, keep)
    return found


def _interpret(program: ExportedProgram, example: Sequence[Array], see: Callable[[fx.Node, Any], None]) -> Any:
    class Watched(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            see(n, value)
            return value

    with torch.no_grad():
        return Watched(program.graph_module).run(*_graph_inputs(program, example))


def _graph_inputs(program: ExportedProgram, example: Sequence[Array]) -> Iterator[Any]:
    """Parameters, buffers, constants and `example` in the order of the graph's placeholders."""
    # A writable copy: PyTorch warns about tensors over read-only memory.
    given = iter([torch.from_numpy(np.array(array)) for array in example])
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            yield next(given)
        elif spec.target in program.state_dict:
            yield program.state_dict[spec.target]
        else:
            yield program.constants[spec.target]
