"""An `.onnx` file as an exported PyTorch program with its example inputs, and what an ONNX runtime says of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch.export import ExportedProgram

from tvmq.errors import ModelError
from tvmq.importer import onnx_file, onnx_model, torch_export
from tvmq.importer.program import OpenAxes

Array = npt.NDArray[np.generic]


def read(
    path: Path, args: Sequence[torch.Tensor], kwargs: Mapping[str, torch.Tensor]
) -> tuple[ExportedProgram, Callable[[], tuple[list[Array], str]]]:
    """(program, a function that tells what ONNX computes on its example inputs and by whom). Raises ModelError."""
    model = onnx_file.load(path)
    example = _fitting(model, path.name, args, kwargs) if args or kwargs else onnx_file.example(model, path.name)
    feeds = {name: value.numpy() for name, value in example.items()}
    complete = onnx.ModelProto()
    complete.CopyFrom(model)
    module = onnx_model.build(model, example)
    program = torch_export.export(module, (), dict(zip(_identifiers(example), example.values(), strict=True)))
    return program, functools.partial(onnx_file.reference, complete, feeds)


def example(path: Path, sizes: Mapping[tuple[str, int], int]) -> dict[str, torch.Tensor]:
    """Example inputs by the names that the program has, open axes of the `sizes` given. Raises ModelError."""
    model = onnx_file.load(path)
    declared = onnx_file.inputs(model)
    known = dict(zip(_identifiers(declared), declared, strict=True))
    open_axes = {(known.get(name, name), axis): size for (name, axis), size in sizes.items()}
    made = onnx_file.example(model, path.name, open_axes)
    return dict(zip(known, made.values(), strict=True))


def open_axes(path: Path) -> list[OpenAxes]:
    """The axes that a model leaves open, those of one name together; one without a name is alone."""
    declared = onnx_file.inputs(onnx_file.load(path))
    groups: dict[str, list[tuple[str, int]]] = {}
    for name, (extents, _) in zip(_identifiers(declared), declared.values(), strict=True):
        for axis, extent in enumerate(extents):
            if not isinstance(extent, int):
                groups.setdefault(extent or f"{name}:{axis}", []).append((name, axis))
    return [OpenAxes(tuple(axes)) for axes in groups.values()]


def _identifiers(names: Iterable[str]) -> list[str]:
    """What PyTorch may call inputs of these names."""
    return [
        name if name.isidentifier() else f"input_{index}_{''.join(c if c.isalnum() else '_' for c in name)}"
        for index, name in enumerate(names)
    ]


def _fitting(
    model: onnx.ModelProto, name: str, args: Sequence[torch.Tensor], kwargs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Example inputs by name, checked against what the model declares."""
    declared = onnx_file.inputs(model)
    if list(kwargs) == _identifiers(declared):
        kwargs = dict(zip(declared, kwargs.values(), strict=True))
    if kwargs and set(kwargs) != set(declared):
        raise ModelError(f"example inputs of {name}", expected=list(declared), seen=sorted(kwargs))
    if not kwargs and len(args) != len(declared):
        raise ModelError(f"example inputs of {name}", expected=list(declared), seen=len(args))
    given = kwargs if kwargs else dict(zip(declared, args, strict=True))
    for key, (extents, dtype) in declared.items():
        value = given[key]
        shape = list(value.shape)
        fits = len(shape) == len(extents) and all(
            not isinstance(e, int) or e == n for e, n in zip(extents, shape, strict=True)
        )
        if not fits or value.dtype != dtype:
            wanted = f"{str(dtype).removeprefix('torch.')}{['?' if e is None else e for e in extents]}"
            found = f"{str(value.dtype).removeprefix('torch.')}{shape}"
            raise ModelError(f"example input {key!r} of {name}", expected=wanted, seen=found)
    return {key: given[key] for key in declared}
