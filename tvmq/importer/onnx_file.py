"""Reading an `.onnx` file, with the files beside it that hold its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_model

from tvmq.errors import ModelError
from tvmq.importer.onnx_inputs import DTYPES, NARROW, NARROW_NUMBERS, stored_as

OLDEST_OPSET = 13
_SEED = 0
# Of a made-up input: a quarter of a gigabyte of floats.
_MOST_ELEMENTS = 1 << 26
_RUNTIME_ERRORS = (
    "EPFail",
    "EngineError",
    "Fail",
    "InvalidArgument",
    "InvalidGraph",
    "InvalidProtobuf",
    "ModelLoaded",
    "ModelLoadCanceled",
    "ModelRequiresCompilation",
    "NoModel",
    "NoSuchFile",
    "NotFound",
    "NotImplemented",
    "RuntimeException",
)


def load(path: Path) -> onnx.ModelProto:
    """The model in `path`, external weights loaded. Raises ModelError for what is not sound."""
    if not path.is_file():
        raise ModelError(f"{path}", expected="an .onnx file", seen="a folder" if path.is_dir() else "nothing there")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, UnicodeDecodeError, ValueError) as error:
        raise ModelError(f"{path}", expected="an ONNX model", seen="a damaged file, or one of another kind") from error
    except OSError as error:
        raise ModelError(f"{path}", expected="a readable file", seen=error.strerror or error) from error
    if not model.graph.node and not model.graph.output:
        raise ModelError(f"{path}", expected="an ONNX model", seen="a file without a graph")
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(path, tensor)
    try:
        load_external_data_for_model(model, str(path.parent))
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, TypeError, OSError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{path}", expected="a valid ONNX model", seen=lines[0][:200]) from error
    return _of_known_opset(path, model)


def _of_known_opset(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    version = max((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), default=OLDEST_OPSET)
    if version < OLDEST_OPSET:
        hint = f"export it again, or see onnx.version_converter.convert_version(model, {OLDEST_OPSET})"
        raise ModelError(f"{path}", expected=f"opset {OLDEST_OPSET} or newer", seen=f"opset {version}", hint=hint)
    if version > onnx.defs.onnx_opset_version():
        raise ModelError(
            f"{path}", expected=f"opset {onnx.defs.onnx_opset_version()} or older", seen=f"opset {version}"
        )
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for item in node.attribute:
            if item.HasField("t"):
                yield item.t
            yield from item.tensors
            if item.HasField("g"):
                yield from _tensors(item.g)


def _check_external(path: Path, tensor: onnx.TensorProto) -> None:
    """Raise ModelError unless a tensor's data lies inside a file in the model's folder."""
    what = f"weights {tensor.name!r} of {path}"
    try:
        info = ExternalDataInfo(tensor)
        start, length = int(info.offset or 0), int(info.length or 0)
    except (ValueError, TypeError) as error:
        raise ModelError(what, expected="a place in a file", seen=str(error)[:200]) from error
    folder = path.parent.resolve()
    file = folder / info.location
    if not info.location or not file.resolve().is_relative_to(folder) or file.resolve() == folder:
        raise ModelError(what, expected="a file in the folder of the model", seen=repr(info.location))
    if not file.is_file():
        raise ModelError(
            what, expected=f"the file {info.location}", seen="nothing there", hint="copy it beside the model"
        )
    if start < 0 or length < 0 or start + length > file.stat().st_size:
        raise ModelError(what, expected=f"{start + length} bytes in {info.location}", seen=file.stat().st_size)


def inputs(model: onnx.ModelProto) -> dict[str, tuple[list[Any], torch.dtype]]:
    """Name -> (extents: numbers, names of dynamic ones, or None; dtype) of what a caller passes. Raises ModelError."""
    weights = {item.name for item in model.graph.initializer}
    found = {}
    for item in model.graph.input:
        if item.name in weights:
            continue
        dtype = _dtype(item) if item.type.HasField("tensor_type") else None
        if dtype is None:
            raise ModelError(f"input {item.name!r}", expected="a tensor of numbers", seen=item.type.WhichOneof("value"))
        dims = item.type.tensor_type.shape.dim
        extents = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in dims]
        found[item.name] = extents, dtype
    return found


def _dtype(item: onnx.ValueInfoProto) -> torch.dtype | None:
    """What holds the elements of an input; None where nothing does."""
    number = item.type.tensor_type.elem_type
    return NARROW[NARROW_NUMBERS[number]][0] if number in NARROW_NUMBERS else DTYPES.get(number)


def example(
    model: onnx.ModelProto, name: str, sizes: Mapping[tuple[str, int], int] | None = None
) -> dict[str, torch.Tensor]:
    """Inputs that fit: seeded normal numbers, and zeros of other types.

    `sizes`: of (input, axis) that the model leaves open. Raises ModelError where an extent stays open.
    """
    generator = np.random.default_rng(_SEED)
    made = {}
    for key, (declared, dtype) in inputs(model).items():
        extents = [
            extent if isinstance(extent, int) else (sizes or {}).get((key, axis), extent)
            for axis, extent in enumerate(declared)
        ]
        if not all(isinstance(extent, int) for extent in extents):
            shape = [extent if extent is not None else "?" for extent in extents]
            hint = "pass example inputs of the shape that you want, or the sizes of open axes (--dynamic)"
            raise ModelError(f"input {key!r} of {name}", expected="a static shape", seen=shape, hint=hint)
        if min(extents, default=0) < 0 or math.prod(extents) > _MOST_ELEMENTS:
            hint = "pass example inputs of the shape that you want"
            raise ModelError(f"input {key!r} of {name}", expected="a shape of some use", seen=extents, hint=hint)
        if dtype.is_floating_point:
            made[key] = torch.from_numpy(generator.standard_normal(extents).astype(np.float32)).to(dtype)
        else:
            made[key] = torch.zeros(extents, dtype=dtype)
    return made


def reference(model: onnx.ModelProto, feeds: dict[str, Any]) -> tuple[list[Any], str]:
    """What ONNX Runtime computes where it is installed, else the reference implementation of ONNX; and which it was.

    Raises ModelError where neither can.
    """
    feeds = _as_declared(model, feeds)
    found, who = _computed(model, feeds)
    return [stored_as(np.asarray(value)) for value in found], who


def _as_declared(model: onnx.ModelProto, feeds: dict[str, Any]) -> dict[str, Any]:
    """Inputs of types that PyTorch lacks, in these."""
    numbers = {item.name: item.type.tensor_type.elem_type for item in model.graph.input}
    return {
        name: value.astype(onnx.helper.tensor_dtype_to_np_dtype(numbers[name]))
        if numbers[name] in NARROW_NUMBERS
        else value
        for name, value in feeds.items()
    }


def _computed(model: onnx.ModelProto, feeds: dict[str, Any]) -> tuple[list[Any], str]:
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as runtime
    except ImportError:
        return _evaluated(model, feeds), "the reference of ONNX"
    # What the runtime raises has no base class of its own; a session's options and inputs fail with Python's.
    own: list[type[Exception]] = [getattr(runtime, name) for name in _RUNTIME_ERRORS if hasattr(runtime, name)]
    errors: tuple[type[Exception], ...] = (RuntimeError, TypeError, ValueError, *own)
    try:
        return _by_runtime(model, feeds), "ONNX Runtime"
    except errors as error:
        why = str(error).splitlines()[:1]
        try:
            return _evaluated(model, feeds), "the reference of ONNX"
        except ModelError:
            raise ModelError("ONNX Runtime cannot run the model", seen=why[0][:200] if why else None) from error


def _by_runtime(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def _evaluated(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    from onnx.reference import ReferenceEvaluator

    try:
        return list(ReferenceEvaluator(model).run(None, feeds))
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ModelError("the reference of ONNX cannot run the model", seen=str(error).splitlines()[:1]) from error
