"""torch.nn.Module or ExportedProgram -> Relax, with variables named after the layers they came from."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tvm
from torch import fx
from torch.export import ExportedProgram
from tvm import relax
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from tvmq import ir
from tvmq.errors import ImportMismatchError, ModelError, UnsupportedOpError, nearest
from tvmq.importer import converters, decompositions, graph_rewrites
from tvmq.importer import program as programs

Converter = Callable[[fx.Node, Any], Any]
# What a model's forward() or one of TVM's converters raises when it cannot take what it was given.
_PYTHON_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
WAYS_OUT = (
    "rewrite that layer, or pass import_model(..., converters={'op.overload': function}); "
    "docs/operators.md shows how a converter looks"
)
# TVM knows these, but a module with branches or run-time checks is no single dataflow block.
_NOT_DATAFLOW = {"cond", "_assert_async.default", "_assert_async.msg"}


@dataclass(frozen=True)
class Translation:
    """The result of translating an exported program, before any folding.

    `module`: Relax as TVM's importer emits it. `variables`: fx node name -> Relax variable name, for tensors.
    `paths`: Relax variable name -> layer path. `converters`: operator -> "tvm", "tvmq" or "yours", which converted it,
    or "decomposed".
    """

    module: tvm.IRModule
    program: ExportedProgram
    variables: Mapping[str, str]
    paths: Mapping[str, str]
    converters: Mapping[str, str]


def export(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> ExportedProgram:
    """`torch.export.export` of `module` in inference mode, which it leaves in the mode it was in.

    Raises ModelError with the first line of what PyTorch says.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        return _traced(module, type(module).__name__, args, kwargs or {})
    finally:
        for part, mode in modes.items():
            part.training = mode


def specialized(program: ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ExportedProgram:
    """A program with dynamic shapes as one of the shapes of its inputs `args` and `kwargs`. Raises ModelError.

    What it guards is text that would be evaluated: PyTorch checks the ranges of its sizes instead.
    """
    return _traced(program.module(check_guards=False), "the program", args, kwargs)


def _traced(module: torch.nn.Module, what: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ExportedProgram:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(module, tuple(args), dict(kwargs))
    except (*_PYTHON_ERRORS, torch._dynamo.exc.TorchDynamoException) as error:
        raise ModelError(
            f"torch.export cannot trace {what}",
            seen=_first_line(error),
            hint="check the example inputs, keep forward() free of data-dependent control flow, or pass a .pt2 file",
        ) from error


def translate(program: ExportedProgram, extra: Mapping[str, Converter] | None = None) -> Translation:
    """An exported program as Relax. `extra`: converters by operator name ("aten op.overload"), before ours and TVM's.

    Raises UnsupportedOpError naming each operator without a converter and the layer it is in; ModelError where TVM's
    importer fails on an operator, where the program was exported in training mode or keeps state, and for a converter
    without an overload in its name.
    """
    programs.check_inference(program)
    exported = _operators(program)
    program = _decomposed(program)
    programs.check_inference(program)
    graph_rewrites.rewrite(program)
    _check_names(program, extra or {})
    own = {**converters.table(), **(extra or {})}
    importer = _Importer()
    _check_known(program, (set(importer.create_convert_map()) - _NOT_DATAFLOW) | set(own))
    importer.path_of = _layer_paths(program)
    try:
        module = importer.from_exported_program(
            program,
            keep_params_as_input=False,
            unwrap_unit_return_tuple=False,
            no_bind_return_tuple=False,
            custom_convert_map=own,
        )
    except _PYTHON_ERRORS as error:
        raise _failed(importer.current, error) from error
    _check_types(importer)
    who = {name: "decomposed" for name in exported - _operators(program)}
    who |= {name: "tvmq" if name in own else "tvm" for name in _operators(program)}
    who |= {name: "yours" for name in extra or {} if name in who}
    return _named(module, importer, program, dict(sorted(who.items())))


def _operators(program: ExportedProgram) -> set[str]:
    return {node.target.__name__ for node in program.graph.nodes if node.op == "call_function"}


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result: ExportedProgram = program.run_decompositions(decompositions.table())
            return result
    except (*_PYTHON_ERRORS, torch._dynamo.exc.TorchDynamoException) as error:
        hint = "keep shapes and indices free of values that only inputs decide"
        raise ModelError("PyTorch cannot take the program apart", seen=_first_line(error), hint=hint) from error


class _Importer(ExportedProgramImporter):  # type: ignore[misc]
    """TVM's importer, which also remembers the operator in hand and the variable of each node."""

    def __init__(self) -> None:
        super().__init__()
        self.current: fx.Node | None = None
        self.path_of: dict[str, str] = {}

    @staticmethod
    def _convert_pytorch_tensor_to_tvm(tensor_value: torch.Tensor) -> Any:
        """A copy: TVM's own takes the module's memory, and training it further would change the imported model."""
        dense = tensor_value.detach().to_dense() if tensor_value.layout != torch.strided else tensor_value.detach()
        return tvm.runtime.from_dlpack(dense.cpu().clone(memory_format=torch.contiguous_format))

    def _translate_fx_graph(self, graph_module: Any, nodes: Any, inputs_vars: Any, custom_ops: Any = None) -> Any:
        return super()._translate_fx_graph(graph_module, self._watched(nodes), inputs_vars, custom_ops)

    def _watched(self, nodes: Any) -> Any:
        for node in nodes:
            self.current = node
            yield node


def _check_names(program: ExportedProgram, extra: Mapping[str, Converter]) -> None:
    """Raise ModelError for a converter whose name lacks the overload: it would never be asked."""
    names = _operators(program)
    for name in extra:
        if name not in names and "." not in name:
            expected = "an operator with its overload, as 'relu.default'"
            raise ModelError(f"converter {name!r}", expected=expected, hint=nearest(name, names))


def _check_known(program: ExportedProgram, known: set[str]) -> None:
    """Raise UnsupportedOpError for the operators that no converter takes."""
    unknown: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target.__name__ not in known:
            unknown.setdefault(node.target.__name__, layer_path(node))
    if unknown:
        listed = ", ".join(f"{name} (in {path or 'the model itself'})" for name, path in unknown.items())
        raise UnsupportedOpError(
            f"no converter for {listed}",
            hint=WAYS_OUT,
        )


def _failed(node: fx.Node | None, error: Exception) -> ModelError:
    where = "the program" if node is None else where_is(node)
    return ModelError(f"the importer fails on {where}", seen=_first_line(error), hint=WAYS_OUT)


def _check_types(importer: _Importer) -> None:
    """Raise ImportMismatchError where a tensor has another shape or dtype than in PyTorch: its converter is wrong."""
    for node, value in importer.env.items():
        expected = node.meta.get("val")
        if not isinstance(expected, torch.Tensor) or not ir.is_static(value):
            continue
        shape, dtype = list(expected.shape), str(expected.dtype).removeprefix("torch.")
        if (list(ir.shape_of(value)), ir.dtype_of(value)) != (shape, dtype):
            raise ImportMismatchError(
                f"{where_is(node)} computes something else than PyTorch",
                seen=f"{ir.dtype_of(value)}{list(ir.shape_of(value))} where PyTorch has {dtype}{shape}",
                hint=WAYS_OUT,
            )


def where_is(node: fx.Node) -> str:
    """The operator of `node` and the layer it was traced in, for a message."""
    return f"{getattr(node.target, '__name__', node.target)} in {layer_path(node) or 'the model itself'}"


def _named(module: tvm.IRModule, importer: _Importer, program: ExportedProgram, who: Mapping[str, str]) -> Translation:
    """Rename each variable after the layer its node came from."""
    names, paths = _names(module, importer)
    final: dict[Any, Any] = {param: param for param in ir.main(module).params}
    new_names: dict[Any, str] = {param: str(param.name) for param in final}

    def visit(state: ir.Rewrite, _name: str, value: Any) -> Any:
        nonlocal final
        final = state.new_of
        renamed = state.emit(value, names[state.current])
        new_names[renamed] = names[state.current]
        return renamed

    renamed = ir.rewrite(module, visit)
    variables = {
        node.name: new_names[final[value]]
        for node, value in importer.env.items()
        if isinstance(value, relax.Var) and isinstance(final.get(value), relax.Var)
    }
    return Translation(renamed, program, variables, paths, who)


def _names(module: tvm.IRModule, importer: _Importer) -> tuple[dict[Any, str], dict[str, str]]:
    """Each variable's new name, and the path of the layer for each name.

    A node's result is named by its path, what its converter computed on the way by the path and the operator: the
    convolution before a bias in layer "stem.conv" is stem_conv_conv2d, and its sum with the bias stem_conv.
    """
    first: dict[Any, str] = {}
    for node, value in importer.env.items():
        if isinstance(value, relax.Var):
            first.setdefault(value, node.name)
    names: dict[Any, str] = {}
    paths: dict[str, str] = {}
    taken: set[str] = {str(param.name) for param in ir.main(module).params}
    pending: list[tuple[Any, Any]] = []
    for var, value in ir.bindings(module):
        pending.append((var, value))
        if var not in first:
            continue
        path = importer.path_of.get(first[var], "")
        names[var] = ir.unique(_identifier(path) or str(var.name), taken)
        paths[names[var]] = path or names[var]
        for inner, call in pending[:-1]:
            suffix = ir.op_name(call).split(".")[-1] if ir.is_call(call) else "part"
            names[inner] = ir.unique(_identifier(f"{path}_{suffix}"), taken)
            paths[names[inner]] = path or names[inner]
        pending.clear()
    for var, _ in pending:
        names[var] = ir.unique(str(var.name), taken)
    return names, paths


def _layer_paths(program: ExportedProgram) -> dict[str, str]:
    """fx node name -> a readable path: the layer's for a layer's one operator, else the layer's and the operator."""
    paths: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        source = node.args[0] if node.target.__name__ == "getitem" else node
        layer, operator = layer_path(source), source.target.__name__.split(".")[0].lstrip("_")
        leaf = _layer_class(source)
        whole = leaf.startswith("torch.nn.modules.") and not leaf.endswith(("Sequential", "ModuleList"))
        whole = whole or leaf.endswith("onnx_model.Layer")
        paths[node.name] = layer if layer and whole else f"{layer}.{operator}".lstrip(".")
    return paths


def layer_path(node: fx.Node) -> str:
    """The path of the innermost layer that `node` was traced in; empty for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _layer_class(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][1]) if stack else ""


def _identifier(path: str) -> str:
    """`path` as a name that TVMScript can print: layer "0.conv" is _0_conv."""
    return re.sub(r"\W", "_", f"_{path}" if path[:1].isdigit() else path)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
