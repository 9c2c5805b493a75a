"""torch.nn.Module or ExportedProgram -> Relax, with variables named after the layers they came from."""

from __future__ import annotations

import logging
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

from tvmq.errors import ModelError, UnsupportedOpError
from tvmq.importer import converters

Converter = Callable[[fx.Node, Any], Any]
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Translation:
    """The result of translating an exported program, before any folding.

    `module`: Relax as TVM's importer emits it. `variables`: fx node name -> Relax variable name, for tensors.
    `paths`: Relax variable name -> layer path. `converters`: operator -> who converted it ("tvm" or "tvmq").
    """

    module: tvm.IRModule
    program: ExportedProgram
    variables: Mapping[str, str]
    paths: Mapping[str, str]
    converters: Mapping[str, str]


def export(module: torch.nn.Module, example_inputs: Sequence[Any]) -> ExportedProgram:
    """`torch.export.export` of `module` in inference mode. Raises ModelError with the first line of what PyTorch says."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(module, tuple(example_inputs))
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, torch._dynamo.exc.TorchDynamoException) as error:
        raise ModelError(
            f"torch.export cannot trace {type(module).__name__}",
            seen=_first_line(error),
            hint="make forward() free of data-dependent control flow, or export it yourself and pass the .pt2 file",
        ) from error
    finally:
        module.train(was_training)


def translate(program: ExportedProgram, extra: Mapping[str, Converter] | None = None) -> Translation:
    """An exported program as Relax. `extra`: converters by operator name ("aten op.overload"), before ours and TVM's.

    Raises UnsupportedOpError naming each operator without a converter and the layer it is in; ModelError where TVM's
    importer fails on an operator.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = program.run_decompositions(converters.decompositions())
    converters.rewrite(program)
    own = {**converters.table(), **(extra or {})}
    importer = _Importer()
    _check_known(program, set(importer.create_convert_map()) | set(own))
    importer.path_of = _layer_paths(program)
    try:
        module = importer.from_exported_program(
            program,
            keep_params_as_input=False,
            unwrap_unit_return_tuple=False,
            no_bind_return_tuple=False,
            custom_convert_map=own,
        )
    except UnsupportedOpError:
        raise
    # TVM's converters raise whatever their Python happens to raise; each means that they cannot take this operator.
    except (AssertionError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise _failed(importer.current, error) from error
    return _named(module, importer, program, own)


class _Importer(ExportedProgramImporter):  # type: ignore[misc]
    """TVM's importer, which also remembers the operator in hand and the variable of each node."""

    def __init__(self) -> None:
        super().__init__()
        self.current: fx.Node | None = None
        self.path_of: dict[str, str] = {}

    def update_convert_map(self, custom_convert_map: dict[str, Converter]) -> None:
        super().update_convert_map(custom_convert_map)

    def _translate_fx_graph(self, graph_module: Any, nodes: Any, inputs_vars: Any, custom_ops: Any = None) -> Any:
        return super()._translate_fx_graph(graph_module, self._watched(nodes), inputs_vars, custom_ops)

    def _watched(self, nodes: Any) -> Any:
        for node in nodes:
            self.current = node
            yield node


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
            hint="rewrite that layer, or pass import_model(..., converters={'<op>': function}); see docs in tvmq/importer/converters.py",
        )


def _failed(node: fx.Node | None, error: Exception) -> ModelError:
    where = "the program" if node is None else f"{getattr(node.target, '__name__', node.target)} in {layer_path(node) or 'the model itself'}"
    return ModelError(
        f"TVM's importer fails on {where}",
        seen=_first_line(error),
        hint="rewrite that layer, or pass import_model(..., converters={'<op>': function})",
    )


def _named(module: tvm.IRModule, importer: _Importer, program: ExportedProgram, own: Mapping[str, Converter]) -> Translation:
    """Rename each variable after the layer its node came from."""
    from tvmq import ir

    node_of: dict[Any, str] = {}
    for node, value in importer.env.items():
        if isinstance(value, relax.Var) and value not in node_of:
            node_of[value] = node.name
    names: dict[Any, str] = {}
    variables: dict[str, str] = {}
    paths: dict[str, str] = {}
    taken: set[str] = {str(param.name) for param in ir.main(module).params}
    for var, value in ir.bindings(module):
        node_name = node_of.get(var)
        path = importer.path_of.get(node_name or "", "")
        name = _unique(_identifier(path) or str(var.name), taken)
        names[var] = name
        if node_name:
            variables[node_name] = name
            paths[name] = path or name
        del value
    for param in ir.main(module).params:
        variables.setdefault(str(param.name), str(param.name))
    renamed = ir.rewrite(module, lambda state, _name, value: state.emit(value, names[state.current]))
    used = {node.target.__name__ for node in program.graph.nodes if node.op == "call_function"}
    who = {name: "tvmq" if name in own else "tvm" for name in sorted(used)}
    return Translation(renamed, program, variables, paths, who)


def _layer_paths(program: ExportedProgram) -> dict[str, str]:
    """fx node name -> a readable path: the layer's for a layer's one operator, else the layer's and the operator."""
    paths: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target.__name__ == "getitem":
            continue
        layer, operator = layer_path(node), node.target.__name__.split(".")[0].lstrip("_")
        leaf = _layer_class(node)
        whole = leaf.startswith("torch.nn.modules.") and not leaf.endswith(("Sequential", "ModuleList"))
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
    return re.sub(r"\W", "_", path)


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
