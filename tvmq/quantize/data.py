"""Calibration data: arrays, tuples, dicts or files, streamed as inferences that fit a model's signature."""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.errors import CalibrationError
from tvmq.model import Model, Signature, TensorSpec, as_array

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
    One array or mapping alone is one batch.
    Raises CalibrationError naming the batch, input, what was expected and what was seen.
    """
    if isinstance(batches, np.ndarray | Mapping) or hasattr(batches, "detach"):
        batches = [batches]
    if isinstance(batches, str | Path) or not isinstance(batches, Iterable):
        expected = "an iterable of arrays, tuples or mappings"
        raise CalibrationError("calibration data", expected=expected, seen=type(batches).__name__)
    for index, batch in enumerate(batches):
        arrays = _in_order(batch, signature, index)
        pieces = [_pieces(array, spec, index) for array, spec in zip(arrays, signature.inputs, strict=True)]
        if len(set(pieces)) != 1:
            expected = "the same number of samples in each input"
            raise CalibrationError(f"calibration batch {index}", expected=expected, seen=pieces)
        for piece in range(pieces[0]):
            yield tuple(
                _checked(_cut(array, spec.shape, piece), spec, index)
                for array, spec in zip(arrays, signature.inputs, strict=True)
            )


def fits(batches: Iterable[Any], signature: Signature) -> bool:
    """Whether the first of some batches has shapes of the signature."""
    try:
        return next(inferences(batches, signature), None) is not None
    except CalibrationError:
        return False


def of_fitting_size(model: Model, batches: Iterable[Any]) -> Model:
    """Of a model of several sizes the smallest that some batches, read again, fit; itself where none does."""
    return next((one for one in (model, *model.larger) if fits(batches, one.signature)), model)


# Elements along the first axis of inputs, which are images mostly, and inferences: as many of both as `first` takes.
# The mean of 64 images is off by an eighth of what images differ by.
IMAGES, INFERENCES = 64, 4


def first(samples: Iterable[tuple[Array, ...]]) -> Iterator[tuple[Array, ...]]:
    """As many of the first inferences as means over them take: however many there are."""
    taken = _Taken()
    for inputs in samples:
        yield inputs
        taken.add(inputs)
        if taken.enough:
            return  # before the next one is taken


class _Taken:
    """What was taken for a mean so far."""

    def __init__(self) -> None:
        self._inferences = self._images = 0

    def add(self, batch: Any) -> None:
        """Count a batch."""
        self._inferences += 1
        self._images += _leading(batch)

    @property
    def enough(self) -> bool:
        return self._inferences >= INFERENCES and self._images >= IMAGES


class Revisited:
    """Batches of an iterator: all of them the first time; later those that `first` takes, which it keeps."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._source, self._kept, self._taken = batches, list[Any](), _Taken()

    def __iter__(self) -> Iterator[Any]:
        yield from tuple(self._kept)
        for batch in self._source:
            if not self._taken.enough:
                self._kept.append(batch)
                self._taken.add(batch)
            yield batch


def _leading(batch: Any) -> int:
    """The extent of the first axis of a batch's first array; 1 where there is none."""
    array = next(iter(batch.values()), None) if isinstance(batch, Mapping) else batch
    if isinstance(array, tuple | list):
        array = array[0] if array else None
    shape: Any = getattr(array, "shape", ())
    return int(shape[0]) if len(shape) else 1


def _where(index: int, name: str) -> str:
    return f"calibration batch {index}, input {name!r}"


def _in_order(batch: Any, signature: Signature, index: int) -> list[Array]:
    names = [spec.name for spec in signature.inputs]
    if isinstance(batch, Mapping):
        if len(names) == 1 and len(batch) == 1:
            values = list(batch.values())
        elif set(batch) == set(names):
            values = [batch[name] for name in names]
        else:
            seen = sorted(map(str, batch))
            raise CalibrationError(f"calibration batch {index}", expected=f"inputs {names}", seen=seen)
    else:
        values = list(batch) if isinstance(batch, tuple | list) else [batch]
    if len(values) != len(names):
        raise CalibrationError(f"calibration batch {index}", expected=f"{len(names)} inputs {names}", seen=len(values))
    return [_array(value, _where(index, name)) for value, name in zip(values, names, strict=True)]


def _array(value: object, where: str) -> Array:
    try:
        return as_array(value)
    except (TypeError, ValueError) as error:  # a ragged list, a dtype that NumPy lacks
        raise CalibrationError(where, expected="an array", seen=str(error).split("\n")[0]) from error


def _pieces(array: Array, spec: TensorSpec, index: int) -> int:
    shape = spec.shape
    if array.shape == shape:
        return 1
    if array.size and array.ndim == len(shape) and array.shape[1:] == shape[1:] and array.shape[0] % shape[0] == 0:
        return int(array.shape[0] // shape[0])
    expected = f"shape {list(shape)} or a multiple of it along the first axis"
    raise CalibrationError(_where(index, spec.name), expected=expected, seen=list(array.shape))


def _cut(array: Array, shape: tuple[int, ...], piece: int) -> Array:
    return array if array.shape == shape else array[piece * shape[0] : (piece + 1) * shape[0]]


def _checked(array: Array, spec: TensorSpec, index: int) -> Array:
    if not np.can_cast(array.dtype, spec.dtype, casting="same_kind"):
        raise CalibrationError(_where(index, spec.name), expected=f"dtype {spec.dtype}", seen=array.dtype)
    with np.errstate(over="ignore"):  # a float64 beyond float32 is an infinity, and refused below
        cast = np.ascontiguousarray(array, spec.dtype)
    if cast.dtype.kind == "f" and not np.isfinite(cast).all():
        seen = "NaN or infinity"
        raise CalibrationError(_where(index, spec.name), expected="finite numbers", seen=seen, hint="drop that sample")
    return cast


# What np.load raises for files that are damaged, or hold pickled objects.
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error)


def _load(path: Path) -> Array:
    with _reading(path, "a .npy array"):
        value = np.load(path, allow_pickle=False)
    if not isinstance(value, np.ndarray):
        value.close()
        raise CalibrationError(f"calibration data {path}", expected="a .npy array", seen="a .npz archive")
    return value


def _load_npz(path: Path) -> dict[str, Array]:
    if not path.exists():
        raise CalibrationError(f"calibration data {path}", seen="no such file")
    with _reading(path, "a .npz archive"):
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise CalibrationError(f"calibration data {path}", expected="a .npz archive", seen="a .npy array")
        with archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
    if not arrays:
        raise CalibrationError(f"calibration data {path}", expected="arrays", seen="an empty archive")
    return arrays


@contextlib.contextmanager
def _reading(path: Path, expected: str) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        seen = str(error).split("\n")[0] or type(error).__name__
        raise CalibrationError(f"calibration data {path}", expected=expected, seen=seen) from error
