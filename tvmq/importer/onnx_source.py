"""An `.onnx` file as an exported PyTorch program with its example inputs, and what an ONNX runtime says of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch.export import ExportedProgram

from tvmq.errors import ModelError
from tvmq.importer import onnx_file, onnx_model, torch_export

Array = npt.NDArray[np.generic]


def read(
    path: Path, args: Sequence[torch.Tensor], kwargs: Mapping[str, torch.Tensor]
) -> tuple[ExportedProgram, tuple[torch.Tensor, ...], Callable[[], tuple[list[Array], str]]]:
    """(program, example inputs in its order, a function that tells what ONNX computes on them and by whom).

    Raises ModelError.
    """
    model = onnx_file.load(path)
    example = _fitting(model, path.name, args, kwargs) if args or kwargs else onnx_file.example(model, path.name)
    feeds = {name: value.numpy() for name, value in example.items()}
    complete = onnx.ModelProto()
    complete.CopyFrom(model)
    module = onnx_model.build(model, example)
    program = torch_export.export(module, (), {_identifier(name, i): v for i, (name, v) in enumerate(example.items())})
    return program, tuple(example.values()), functools.partial(onnx_file.reference, complete, feeds)


def _identifier(name: str, index: int) -> str:
    return name if name.isidentifier() else f"input_{index}_{''.join(c if c.isalnum() else '_' for c in name)}"


def _fitting(
    model: object, name: str, args: Sequence[torch.Tensor], kwargs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Example inputs by name, checked against what the model declares."""
    declared = onnx_file.inputs(model)
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
