"""What a user may name as a model: a module, an exported program, a file, or "package.module:function"."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from tvmq.errors import ModelError, nearest
from tvmq.importer import constants, pt2, torch_export, widen
from tvmq.importer import program as programs
from tvmq.importer.program import OpenAxes

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Sizes = Mapping[tuple[str, int], int]
_KINDS = (
    "a torch.nn.Module, a torch.export.ExportedProgram, a path to a .pt2 or .onnx file or to a folder of transformers, "
    "or 'package.module:function'"
)


@dataclass(frozen=True)
class Source:
    """A program with static shapes, the name it goes by, and its inputs, flat and in the program's order.

    `arguments`: the same inputs as what was exported takes them, positional and by name.
    `reference` tells what another runtime computes on the example inputs, and its name; None without one.
    """

    program: ExportedProgram
    name: str
    example: tuple[torch.Tensor, ...]
    arguments: Arguments = ((), {})
    reference: Callable[[], tuple[list[Any], str]] | None = None


@dataclass(frozen=True)
class Found:
    """What a user named, before its inputs have a size.

    `example(sizes)`: example inputs as it takes them, None for the program's own; where it makes them up, axes that it
    leaves open have the sizes given. `at(arguments)`: the program of the shapes of such inputs. `open_axes()`: those
    that it leaves open; None for a module, which does not say.
    """

    example: Callable[[Sizes], Arguments | None]
    at: Callable[[Arguments | None], Source]
    open_axes: Callable[[], list[OpenAxes] | None] = lambda: None


def read(source: object, example_inputs: object = None, name: str | None = None) -> Source:
    """`source` with the shapes of its example inputs (see `load.import_model`). Raises ModelError."""
    found = find(source, example_inputs, name)
    return found.at(found.example({}))


def find(source: object, example_inputs: object = None, name: str | None = None) -> Found:
    """What `source` names (see `load.import_model`). Raises ModelError."""
    if isinstance(source, torch.nn.Module):
        return _of_module(source, example_inputs, name or type(source).__name__)
    if isinstance(source, ExportedProgram):
        return _of_program(source, example_inputs, name or "model")
    if isinstance(source, os.PathLike) or (isinstance(source, str) and _is_path(source)):
        path = Path(source)
        if path.suffix == ".onnx":
            return _of_onnx(path, example_inputs, name or path.stem)
        if path.is_dir() and path.suffix != ".pt2":
            return _of_folder(path, example_inputs, name or path.resolve().name)
        if path.suffix != ".pt2":
            wanted = "a .pt2 or .onnx file, a folder with config.json, or 'package.module:function'"
            raise ModelError(f"{path}", expected=wanted, seen=path.suffix or "no suffix")
        return _of_program(pt2.load(path), example_inputs, name or path.stem)
    if isinstance(source, str):
        model, example, function = _call(source)
        return find(model, example if example_inputs is None else example_inputs, name or function)
    raise ModelError("model", expected=_KINDS, seen=type(source).__name__)


def _is_path(text: str) -> bool:
    return ":" not in text or text.endswith((".pt2", ".onnx")) or Path(text).exists()


def _of_module(module: torch.nn.Module, example_inputs: object, title: str) -> Found:
    if example_inputs is None:
        raise ModelError(f"module {title} without example inputs", hint="pass import_model(module, example_inputs)")
    args, kwargs = _arguments(example_inputs, with_constants=True)
    traced, args, kwargs = constants.bound(module, args, kwargs, title)

    def at(arguments: Arguments | None) -> Source:
        return _with_own_example(torch_export.export(traced, *(arguments or (args, kwargs))), title)

    return Found(lambda _sizes: (args, kwargs), at)


def _of_program(program: ExportedProgram, example_inputs: object, name: str) -> Found:
    given = None if example_inputs is None else _arguments(example_inputs)

    def example(sizes: Sizes) -> Arguments | None:
        return given or (program.example_inputs if sizes else None)

    def at(arguments: Arguments | None) -> Source:
        if arguments is None:
            return _with_own_example(program, name)
        if program.range_constraints:
            called = _as_called(program, arguments, name) if arguments is given else arguments
            return _with_own_example(torch_export.specialized(program, *called), name)
        programs.check_interface(program, name)
        flat = _flat(program, arguments, name)
        return Source(widen.widened(program), name, tuple(map(widen.wide, flat)))

    return Found(example, at, lambda: programs.open_axes(program))


def _with_own_example(program: ExportedProgram, name: str) -> Source:
    programs.check_interface(program, name)
    if not program.example_inputs:
        raise ModelError(f"{name} carries no example inputs", hint="pass import_model(..., example_inputs)")
    wide = widen.widened(program)
    return Source(wide, name, tuple(pytree.tree_leaves(wide.example_inputs)), program.example_inputs)


def _as_called(program: ExportedProgram, arguments: Arguments, name: str) -> Arguments:
    """Example inputs, positional or by name, in the nested form that the program is called with."""
    flat, names = _flat(program, arguments, name), programs.input_names(program)
    if len(flat) != len(names):
        raise ModelError(f"example inputs of {name}", expected=f"{len(names)} ({', '.join(names)})", seen=len(flat))
    args, kwargs = pytree.tree_unflatten(flat, program.call_spec.in_spec)
    return args, kwargs


def _flat(program: ExportedProgram, arguments: Arguments, name: str) -> list[torch.Tensor]:
    """Example inputs, positional or by name, in the order of the program's."""
    args, kwargs = arguments
    if args or not kwargs:
        return pytree.tree_leaves(args)
    names = programs.input_names(program)
    if set(kwargs) != set(names):
        raise ModelError(f"example inputs of {name}", expected=names, seen=sorted(kwargs))
    return [kwargs[key] for key in names]


def _of_onnx(path: Path, example_inputs: object, name: str) -> Found:
    try:
        from tvmq.importer import onnx_source
    except ModuleNotFoundError as error:
        if error.name not in ("onnx", "google", "google.protobuf"):
            raise
        hint = "pip install 'tvmq[onnx]'"
        raise ModelError(f"{path}", expected="the package onnx to read it", seen="none installed", hint=hint) from error
    given = None if example_inputs is None else _arguments(example_inputs)

    def at(arguments: Arguments | None) -> Source:
        program, reference = onnx_source.read(path, *(arguments or ((), {})))
        return dataclasses.replace(_with_own_example(program, name), reference=reference)

    def example(sizes: Sizes) -> Arguments | None:
        return given or (((), onnx_source.example(path, sizes)) if sizes else None)

    return Found(example, at, lambda: onnx_source.open_axes(path))


def _of_folder(path: Path, example_inputs: object, name: str) -> Found:
    try:
        from tvmq.importer import hf
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "safetensors"):
            raise
        what, hint = "the package transformers to read it", "pip install 'tvmq[hf]'"
        raise ModelError(f"{path}", expected=what, seen="none installed", hint=hint) from error
    module, example = hf.read(path)
    return _of_module(module, example if example_inputs is None else example_inputs, name)


def _arguments(example_inputs: object, with_constants: bool = False) -> Arguments:
    """Example inputs as positional and named tensors, or tuples, lists and dicts of them; constants where asked."""

    def read(value: object) -> Any:
        return value if with_constants and isinstance(value, constants.CONSTANT) else _tensors(value)

    if isinstance(example_inputs, Mapping):
        return (), {str(key): read(value) for key, value in example_inputs.items()}
    if isinstance(example_inputs, tuple | list):
        return tuple(map(read, example_inputs)), {}
    return (read(example_inputs),), {}


def _tensors(value: object) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(_tensors, value))
    if isinstance(value, dict):
        return {key: _tensors(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value, order="C"))
    wanted = "a tensor or an array, a tuple of them, or a dict by name (each may be a tuple or a dict in turn)"
    raise ModelError("example inputs", expected=wanted, seen=type(value).__name__)


def _call(reference: str) -> tuple[object, object, str]:
    """What "package.module:function" returns, and the function's name; the working directory is importable."""
    module_name, _, function_name = reference.partition(":")
    with _importable(Path.cwd()):
        module = _import(module_name)
        function = getattr(module, function_name, None)
        if function is None:
            names = [key for key, value in vars(module).items() if callable(value)]
            raise ModelError(f"no function {function_name!r} in {module_name}", hint=nearest(function_name, names))
        wanted = "a function that returns (module, example_inputs)"
        if isinstance(function, torch.nn.Module) or not callable(function):
            raise ModelError(f"{reference}", expected=wanted, seen=type(function).__name__)
        result = function()
    if isinstance(result, ExportedProgram):
        return result, None, function_name
    if not _is_pair(result):
        raise ModelError(f"{reference}", expected=wanted, seen=f"one that returns {_described(result)}")
    return result[0], result[1], function_name


def read_converters(reference: str) -> Mapping[str, torch_export.Converter]:
    """What `table()` of the module "package.module" returns; the working directory is importable. Raises ModelError."""
    wanted = "a module with a function table() that returns operator -> converter"
    with _importable(Path.cwd()):
        module = _import(reference)
        table = getattr(module, "table", None)
        found = table() if callable(table) else None
    if not isinstance(found, Mapping) or not all(map(callable, found.values())):
        seen = "no such function" if not callable(table) else type(found).__name__
        raise ModelError(f"converters {reference}", expected=wanted, seen=seen, hint="docs/operators.md shows one")
    return found


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], torch.nn.Module | ExportedProgram)


def _described(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__


def _import(name: str) -> Any:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ModelError(f"{name!r} is no module name", expected=_KINDS)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise ModelError(f"importing {name} fails", seen=error.msg) from error
        raise ModelError(f"no module {error.name!r}", hint=_nearest_module(error.name)) from error
    except (ImportError, SyntaxError) as error:
        raise ModelError(f"importing {name} fails", seen=f"{type(error).__name__}: {error.msg}") from error


def _nearest_module(name: str) -> str | None:
    parent, _, leaf = name.rpartition(".")
    paths = list(getattr(sys.modules.get(parent), "__path__", [])) if parent else [str(Path.cwd())]
    found = [f"{parent}.{info.name}".lstrip(".") for info in pkgutil.iter_modules(paths)]
    return nearest(name, found) if leaf else None


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """`folder` first on the import path, for the time of the block."""
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
