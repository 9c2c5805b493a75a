"""The front door of the importer: a PyTorch model in, a checked canonical `Model` out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvmq import ir
from tvmq.dynamic import Dynamic
from tvmq.importer import check as checks
from tvmq.importer import program as programs
from tvmq.importer import sizes, torch_export
from tvmq.importer import source as sources
from tvmq.importer.canonical import canonicalize
from tvmq.model import Model, Signature


def import_model(
    source: object,
    example_inputs: object = None,
    *,
    check: bool = True,
    tolerance: float = 1e-4,
    converters: Mapping[str, torch_export.Converter] | str | None = None,
    name: str | None = None,
    dynamic: Dynamic | str | None = None,
) -> Model:
    """A PyTorch model as canonical Relax, compared with PyTorch on the example inputs.

    `source`: a torch.nn.Module, a torch.export.ExportedProgram, a path to a `.pt2` file that torch.export.save wrote
    or to an `.onnx` file (which also runs in ONNX Runtime, or in ONNX's reference, to compare with),
    or to a folder in the transformers layout (config.json and safetensors; see `hf.py`),
    or "package.module:function" (imported with the working directory on the path), a function that returns
    (module, example_inputs). `example_inputs`: a tensor or array, a tuple of them, or a dict by name; a module needs
    them, an exported program brings its own and a folder's follow from its configuration, unless they are given;
    what of a module's is a number, a flag, a text or None is bound: it is no input of the model.
    `check`: compare every tensor with PyTorch's, within `tolerance` (`check.deviation` is the formula).
    `converters`: operator with overload ("exp2.default") -> function, as in `converters.py`, or the name of a module
    whose `table()` returns them. `name`: default the class, the name of the file or folder, or the function.
    `dynamic`: sizes of axes that vary, "x:0=1,2,4,8" (see `dynamic.py`): a program a size, in one model.

    Raises ModelError for a source that cannot be read, UnsupportedOpError for an operator without a converter,
    ImportMismatchError where the translation computes something else, SignatureError for example inputs that do not
    fit; nothing is imported then.
    """
    own = sources.read_converters(converters) if isinstance(converters, str) else converters
    tolerated = tolerance if check else None
    found = sources.find(source, example_inputs, name)
    if dynamic is None:
        return _translated(found.at(found.example({})), own, tolerated)
    wanted = Dynamic.parse(dynamic) if isinstance(dynamic, str) else dynamic
    return sizes.imported(found, wanted, lambda one: _translated(one, own, tolerated), tolerance)


def _translated(
    found: sources.Source, own: Mapping[str, torch_export.Converter] | None, tolerance: float | None
) -> Model:
    """The model of a program, compared with PyTorch within `tolerance`; None: not compared."""
    inputs = Signature(programs.inputs(found.program), ())
    example = inputs.arrays(found.example)
    reference = programs.run(found.program, example)
    signature = Signature(inputs.inputs, programs.outputs(found.program, reference))
    translation = torch_export.translate(found.program, own)
    if tolerance is not None:
        if found.reference is not None:
            checks.compare_runtimes(translation, reference, *found.reference(), tolerance)
        checks.compare(translation, example, tolerance)
    module = canonicalize(translation.module)
    if tolerance is not None:
        checks.compare_outputs(module, signature, example, reference, tolerance)
    paths = _live(translation.paths, module)
    return Model(module, signature, found.name, example, reference, paths, translation.converters)


def _live(paths: Mapping[str, str], module: Any) -> dict[str, str]:
    names = {str(var.name) for var, _ in ir.bindings(module)}
    return {name: path for name, path in paths.items() if name in names}
