"""Calibration data: arrays, tuples, dicts or files, streamed as inferences that fit a model's signature."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.errors import CalibrationError
from tvmq.model import Signature, as_array

Array = npt.NDArray[Any]


def open_data(source: str | Path) -> Iterable[Any]:
    """Batches from a `.npz` (one array an input, first axis: samples), or a folder of `.npy` (a batch a file, by name).

    Raises CalibrationError where there is nothing to read. Never unpickles.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(path.glob("*.npy"))
        if not files:
            raise CalibrationError(f"calibration data {path}", expected="a folder with .npy files", seen="none")
        return (_load(file) for file in files)
    if path.suffix == ".npz":
        return [_load_npz(path)]
    seen = f"a {path.suffix or 'plain'} file" if path.exists() else "no such file"
    raise CalibrationError(f"calibration data {path}", expected="a .npz file or a folder of .npy files", seen=seen)


def inferences(batches: Iterable[Any], signature: Signature) -> Iterator[tuple[Array, ...]]:
    """Each batch cut into inputs of the signature's shape, checked: float inputs are finite.

    A batch is an array, a tuple, or a mapping by input name; its first axis may be a multiple of the signature's.
    Raises CalibrationError naming the batch, input, what was expected and what was seen.
    """
    if isinstance(batches, np.ndarray) or hasattr(batches, "detach"):
        batches = [batches]
    for index, batch in enumerate(batches):
        arrays = _in_order(batch, signature, index)
        pieces = {_pieces(array, spec.shape, spec.name, index) for array, spec in zip(arrays, signature.inputs, strict=True)}
        if len(pieces) != 1:
            raise CalibrationError(f"calibration batch {index}", expected="the same number of samples in each input")
        for piece in range(pieces.pop()):
            yield tuple(
                _checked(_cut(array, spec.shape, piece), spec.dtype, spec.name, index)
                for array, spec in zip(arrays, signature.inputs, strict=True)
            )


def _in_order(batch: Any, signature: Signature, index: int) -> list[Array]:
    names = [spec.name for spec in signature.inputs]
    if isinstance(batch, Mapping):
        if len(names) == 1 and len(batch) == 1:
            return [as_array(next(iter(batch.values())))]
        if set(batch) != set(names):
            raise CalibrationError(f"calibration batch {index}", expected=f"inputs {names}", seen=sorted(map(str, batch)))
        return [as_array(batch[name]) for name in names]
    values = list(batch) if isinstance(batch, tuple | list) else [batch]
    if len(values) != len(names):
        raise CalibrationError(f"calibration batch {index}", expected=f"{len(names)} inputs {names}", seen=len(values))
    return [as_array(value) for value in values]


def _pieces(array: Array, shape: tuple[int, ...], name: str, index: int) -> int:
    if array.shape == shape:
        return 1
    if array.ndim == len(shape) and shape and array.shape[1:] == shape[1:] and array.shape[0] % shape[0] == 0:
        return array.shape[0] // shape[0]
    expected = f"shape {list(shape)} or a multiple of it along the first axis"
    raise CalibrationError(f"calibration batch {index}, input {name!r}", expected=expected, seen=list(array.shape))


def _cut(array: Array, shape: tuple[int, ...], piece: int) -> Array:
    return array if array.shape == shape else array[piece * shape[0] : (piece + 1) * shape[0]]


def _checked(array: Array, dtype: str, name: str, index: int) -> Array:
    where = f"calibration batch {index}, input {name!r}"
    if not np.can_cast(array.dtype, dtype, casting="same_kind"):
        raise CalibrationError(where, expected=f"dtype {dtype}", seen=array.dtype)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise CalibrationError(where, expected="finite numbers", seen="NaN or infinity", hint="drop that sample")
    return np.ascontiguousarray(array, dtype)


def _load(path: Path) -> Array:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise CalibrationError(f"calibration data {path}", expected="a .npy array", seen=str(error).split("\n")[0]) from error


def _load_npz(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
    except FileNotFoundError as error:
        raise CalibrationError(f"calibration data {path}", seen="no such file") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"calibration data {path}", expected="a .npz archive", seen=str(error).split("\n")[0]) from error
    if not arrays:
        raise CalibrationError(f"calibration data {path}", expected="arrays", seen="an empty archive")
    return arrays
