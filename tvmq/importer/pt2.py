"""Reading a `.pt2` file without running what may be hidden in it.

`torch.export.load` unpickles with all of Python allowed in four places: example inputs (it retries without
`weights_only` when the safe load fails), weights and constants marked `use_pickle`, custom objects, and old weight
files. It evaluates the text of symbolic shapes and of guards, and loads the shared libraries of a compiled package.
PyTorch says never to load an untrusted file. Here each member is checked first, through the same archive reader: a
pickle must load with `weights_only=True`, a symbolic shape must be plain arithmetic, guards are left out, and what
needs more is refused. This closes the doors that are known, no more.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._export.serde.serialize import SerializeError
from torch.export import ExportedProgram
from torch.export.pt2_archive import PT2ArchiveReader
from torch.export.pt2_archive._package import load_pt2

from tvmq.errors import ModelError

# What PyTorch's reader raises for a member that is missing, garbled, or of another version.
_DAMAGED = (
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    SerializeError,
    TypeError,
    ValueError,
)
_ZIP_MAGIC = b"PK\x03\x04"
_MODEL = "models/model.json"
_CONFIGS = {
    "data/weights/": "data/weights/model_weights_config.json",
    "data/constants/": "data/constants/model_constants_config.json",
}
_EXPORT_AGAIN = "write it with torch.export.save(torch.export.export(module, example_inputs), path)"

# What sizes are computed with, as sympy's `srepr` writes them, and how long their text may be.
_FUNCTIONS = {
    *("Integer", "Add", "Mul", "Mod", "Max", "Min", "Equality", "Unequality", "And", "Or", "Not"),
    *("GreaterThan", "LessThan", "StrictGreaterThan", "StrictLessThan"),
    *("FloorDiv", "CleanDiv", "CeilDiv", "PythonMod", "ModularIndexing"),
}
_LONGEST = 4096
# Powers of numbers could be larger than memory.
_EXPONENTS = ("Integer(2)", "Integer(3)", "Integer(4)")


def load(path: Path) -> ExportedProgram:
    """The exported program in `path`. Raises ModelError for anything but a file that torch.export.save wrote."""
    _check_zip(path)
    try:
        reader = PT2ArchiveReader(str(path))
        names = set(reader.get_file_names())
    except (RuntimeError, AssertionError, UnicodeDecodeError) as error:
        raise _refused(path, "a zip archive that is truncated, or that something else wrote") from error
    _check_members(path, names)
    try:
        _check_graph(path, reader)
        _check_pickles(path, reader, names)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_pt2(str(path)).exported_programs["model"]
    except _DAMAGED as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise _refused(path, f"a damaged archive, or one of another PyTorch version ({text[0][:160]})") from error


def _check_zip(path: Path) -> None:
    if path.is_dir():
        raise ModelError(f"{path}", expected="a .pt2 file", seen="a folder")
    if not path.exists():
        raise ModelError(f"{path}", expected="a .pt2 file", seen="nothing there")
    try:
        with path.open("rb") as file:
            magic = file.read(len(_ZIP_MAGIC))
    except OSError as error:
        raise ModelError(f"{path}", expected="a readable file", seen=error.strerror or error) from error
    if magic != _ZIP_MAGIC:
        seen = "an empty file" if not magic else "a file that is no zip archive (a bare pickle is never loaded)"
        raise _refused(path, seen)
    if not zipfile.is_zipfile(path):
        raise _refused(path, "a truncated zip archive")


def _check_members(path: Path, names: set[str]) -> None:
    if any(name.startswith("data/aotinductor/") for name in names):
        raise _refused(path, "a package compiled by AOTInductor, which holds machine code")
    models = sorted(name for name in names if name.startswith("models/"))
    if models != [_MODEL]:
        raise _refused(path, f"models {', '.join(models)}" if models else "no model")
    for folder, config in _CONFIGS.items():
        if config not in names:
            raise _refused(path, f"no {folder} listing (a file of an old PyTorch)")


def _check_graph(path: Path, reader: PT2ArchiveReader) -> None:
    """Symbolic shapes are arithmetic: PyTorch evaluates their text."""
    for text in _values(json.loads(reader.read_string(_MODEL)), "expr_str"):
        if not isinstance(text, str) or not _is_arithmetic(text):
            raise _refused(path, f"a size that is no arithmetic ({str(text)[:80]!r}), which was not evaluated")


def _is_arithmetic(text: str) -> bool:
    """Whether a text is calls of known functions of symbols and small numbers, as in Add(Symbol('s0'), Integer(1))."""
    if len(text) > _LONGEST:
        return False
    try:
        return _is_known(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _is_known(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _is_known(node.operand)
    if isinstance(node, ast.Constant):
        return type(node.value) is int and node.value < 2**63
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return False
    if node.func.id == "Symbol":
        return _is_symbol(node)
    if node.func.id == "Pow":
        return len(node.args) == 2 and _is_symbol(node.args[0]) and ast.unparse(node.args[1]) in _EXPONENTS
    return node.func.id in _FUNCTIONS and not node.keywords and all(map(_is_known, node.args))


def _is_symbol(node: ast.expr) -> bool:
    if not isinstance(node, ast.Call) or ast.unparse(node.func) != "Symbol" or len(node.args) != 1:
        return False
    (name,), assumed = node.args, [word.value for word in node.keywords]
    named = isinstance(name, ast.Constant) and re.fullmatch(r"[a-z]{1,3}\d{1,9}", str(name.value)) is not None
    return named and all(isinstance(value, ast.Constant) and isinstance(value.value, bool) for value in assumed)


def _check_pickles(path: Path, reader: PT2ArchiveReader, names: set[str]) -> None:
    pickles = [name for name in names if name.startswith("data/sample_inputs/")]
    for folder, config in _CONFIGS.items():
        for entry in json.loads(reader.read_string(config))["config"].values():
            member = folder + entry["path_name"]
            if not entry["path_name"].startswith(("weight_", "tensor_")):
                raise _refused(path, f"an object that is no tensor ({member}), which is never unpickled")
            if entry["use_pickle"]:
                pickles.append(member)
    for member in sorted(pickles):
        data = reader.read_bytes(member)
        try:
            if data:
                torch.load(io.BytesIO(data), weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, AttributeError) as error:
            raise _refused(path, f"a pickle of more than tensors ({member}), which was not loaded") from error


def _refused(path: Path, seen: str) -> ModelError:
    return ModelError(f"{path}", expected="a program that torch.export.save wrote", seen=seen, hint=_EXPORT_AGAIN)


def _values(value: Any, key: str) -> Iterator[Any]:
    """What `key` holds, wherever it is in plain data."""
    if isinstance(value, dict):
        if key in value:
            yield value[key]
        for item in value.values():
            yield from _values(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _values(item, key)
