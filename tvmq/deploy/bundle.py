"""The bundle: one zip with the library, the parameters, the calibration table, a golden pair and a manifest of hashes.

    manifest.json     schema, target, signature, recipe, versions, steps, sha256 and size of every other member
    lib.so            the compiled module
    params.bin        the parameters, each at a multiple of 64 bytes; one with many zeros as a bit for each element that
                      says whether it is there, and those that are: it becomes dense when it is read. `prepare` of the
                      library makes of the last ones what the manifest has as `prepared`, which `main` takes instead
    golden.npz        example inputs, and the outputs that the model must give
    oracle.json       the realized graph in Relax, its packed weights named, for op by op verification
    calibration.json  the calibration table (integer bundles)

A bundle of several sizes of its inputs is that of the smallest, with the others' library, golden pair and oracle in
folders named after their sizes; equal parameters of all are stored once. The manifest has what is different of theirs.

A bundle is untrusted until it was read: names, sizes and hashes are checked, and nothing in it is unpickled.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.deploy.parameters import ALIGNMENT, stored_size
from tvmq.dynamic import Dynamic
from tvmq.errors import BundleError, SignatureError
from tvmq.files import atomic_path
from tvmq.model import Signature, TensorSpec

Array = npt.NDArray[Any]
SCHEMA = 1
LIBRARY, PARAMETERS, GOLDEN, ORACLE, CALIBRATION = (
    "lib.so",
    "params.bin",
    "golden.npz",
    "oracle.json",
    "calibration.json",
)
MANIFEST = "manifest.json"
_MEMBERS = {LIBRARY, PARAMETERS, GOLDEN, ORACLE, CALIBRATION}
# Members that each size has of its own.
OF_A_SIZE = (LIBRARY, GOLDEN, ORACLE)
# No manifest comes near this; a larger one is an attack or an accident.
_MANIFEST_LIMIT = 64 << 20
# What fraction of a parameter's bytes it must take without its zeros to be stored so: loading it costs a pass.
_WORTH = 0.8
# Deflate shrinks code a lot and weights little: parameters are stored at its fastest level.
_LEVELS = {PARAMETERS: 1}


@dataclass(frozen=True)
class Bundle:
    """A checked bundle in memory: its manifest, and its other members by name."""

    manifest: Mapping[str, Any]
    members: Mapping[str, bytes]
    path: Path | None = None

    @property
    def signature(self) -> Signature:
        """The model's inputs and outputs."""
        return Signature(*(tuple(_spec(s) for s in self.manifest["signature"][side]) for side in ("inputs", "outputs")))

    @property
    def converters(self) -> dict[str, str]:
        """Operator of the source -> who converted it (see `Model`); empty for an older bundle, which does not say."""
        found = self.manifest.get("converters")
        return {str(name): str(who) for name, who in found.items()} if isinstance(found, dict) else {}

    @property
    def required_features(self) -> tuple[str, ...]:
        """LLVM features that a machine must have to run it."""
        return tuple(self.manifest["isa"]["required_features"])

    @functools.cached_property
    def dynamic(self) -> Dynamic | None:
        """The sizes that there are programs for; None where shapes are static."""
        found = self.manifest.get("dynamic")
        return None if found is None else Dynamic.from_dict(found, self.where)

    def programs(self) -> tuple[Bundle, ...]:
        """A bundle a size, ascending; the bundle alone where shapes are static. Parameters are shared."""
        if self.dynamic is None:
            return (self,)
        common = {key: value for key, value in self.manifest.items() if key != "dynamic"}
        own = dict(zip(self.dynamic.sizes, ({}, *self.manifest["dynamic"]["programs"]), strict=True))
        found = []
        for index, (size, changes) in enumerate(own.items()):
            names = {name: f"{size}/{name}" if index and name in OF_A_SIZE else name for name in _MEMBERS}
            there = {name: stored for name, stored in names.items() if stored in self.members}
            listed = {name: self.manifest["members"][stored] for name, stored in there.items()}
            members = {name: self.members[stored] for name, stored in there.items()}
            found.append(Bundle({**common, **changes, "members": listed}, members, self.path))
        return tuple(found)

    def parameters(self) -> dict[str, Array]:
        """The parameters by name, as views of the file's bytes. Raises BundleError."""
        data = self.members[PARAMETERS]
        arrays = {}
        for entry in self.manifest["parameters"]:
            dtype, shape, offset = np.dtype(entry["dtype"]), tuple(entry["shape"]), int(entry["offset"])
            count, kept, size = int(np.prod(shape, dtype=np.int64)), entry.get("nonzero"), stored_size(entry)
            where = f"{self.where}: parameter {entry['name']!r}"
            if offset < 0 or offset + size > len(data) or (kept is not None and int(kept) < 0):
                raise BundleError(where, expected="inside params.bin", seen=f"offset {offset}")
            if kept is None:
                array = np.frombuffer(data, dtype, count, offset)
            else:
                array = _spread(data, dtype, count, offset, int(kept), where)
            arrays[entry["name"]] = array.reshape(shape)
        return arrays

    def golden(self) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """The example inputs and outputs."""
        with np.load(io.BytesIO(self.members[GOLDEN]), allow_pickle=False) as archive:
            sides = [[archive[f"{side}{i}"] for i in range(int(archive[f"{side}s"]))] for side in ("input", "output")]
        return tuple(sides[0]), tuple(sides[1])

    @property
    def where(self) -> str:
        """The bundle in an error's words."""
        return f"bundle {self.path}" if self.path else "bundle"


def pack_parameters(parameters: Mapping[str, Array]) -> tuple[bytes, list[dict[str, Any]]]:
    """All parameters in one block, and where each is; `nonzero` counts the elements of those stored without zeros."""
    block, index = bytearray(), []
    for name, array in parameters.items():
        block.extend(b"\0" * (-len(block) % ALIGNMENT))
        entry = {"name": name, "dtype": str(array.dtype), "shape": list(array.shape), "offset": len(block)}
        flat = np.ascontiguousarray(array).ravel()
        # Bits, so that a negative zero stays one.
        there = flat.view(f"u{flat.itemsize}") != 0 if flat.dtype.kind in "iuf" else np.ones(flat.size, bool)
        kept = int(there.sum())
        if -(-flat.size // 8) + kept * flat.itemsize < _WORTH * flat.nbytes:
            block.extend(np.packbits(there).tobytes() + flat[there].tobytes())
            entry["nonzero"] = kept
        else:
            block.extend(flat.tobytes())
        index.append(entry)
    return bytes(block), index


def _spread(data: bytes, dtype: np.dtype[Any], count: int, offset: int, kept: int, where: str) -> Array:
    """The dense array of one stored without zeros. Raises BundleError."""
    bits = np.frombuffer(data, np.uint8, -(-count // 8), offset)
    there = np.unpackbits(bits, count=count).astype(bool)
    if int(there.sum()) != kept:
        raise BundleError(where, expected=f"{kept} elements", seen=f"bits for {int(there.sum())}")
    array = np.zeros(count, dtype)
    array[there] = np.frombuffer(data, dtype, kept, offset + bits.size)
    return array


def pack_golden(inputs: tuple[Array, ...], outputs: tuple[Array, ...]) -> bytes:
    """The golden pair as a .npz."""
    named: dict[str, Array] = {"inputs": np.array(len(inputs)), "outputs": np.array(len(outputs))}
    named.update({f"input{i}": array for i, array in enumerate(inputs)})
    named.update({f"output{i}": array for i, array in enumerate(outputs)})
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **named)
    return stream.getvalue()


def write(path: str | Path, manifest: Mapping[str, Any], members: Mapping[str, bytes]) -> int:
    """Write a bundle, whole or not at all, and return its size in bytes. Raises OutputError."""
    listed = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in sorted(members.items())
    }
    document = json.dumps({"schema": SCHEMA, **manifest, "members": listed}, indent=1).encode()
    with atomic_path(path) as temporary:
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, data in [(MANIFEST, document), *sorted(members.items())]:
                # A fixed date: the same model and recipe give the same file.
                info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, data, compresslevel=_LEVELS.get(name, 6))
        return temporary.stat().st_size


def read(path: str | Path) -> Bundle:
    """Read and check a bundle. Raises BundleError that says what is wrong with it."""
    file = Path(path)
    try:
        with zipfile.ZipFile(file) as archive:
            return _checked(archive, file)
    except FileNotFoundError as error:
        raise BundleError(f"bundle {file}", seen="no such file") from error
    except IsADirectoryError as error:
        raise BundleError(f"bundle {file}", expected="a file", seen="a folder") from error
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        seen = f"a damaged or truncated file ({error})"
        raise BundleError(
            f"bundle {file}", expected="a .tvmq bundle", seen=seen, hint="copy or compile it again"
        ) from error


def _checked(archive: zipfile.ZipFile, file: Path) -> Bundle:
    names = archive.namelist()
    for name in names:
        if name != MANIFEST and name not in _MEMBERS and not _is_of_a_size(name):
            raise BundleError(
                f"bundle {file}: member {name!r}",
                expected=f"one of {', '.join(sorted(_MEMBERS))}",
                hint="do not use this file",
            )
    if len(names) != len(set(names)):
        raise BundleError(
            f"bundle {file}", expected="each member once", seen="a name twice", hint="do not use this file"
        )
    if MANIFEST not in names or archive.getinfo(MANIFEST).file_size > _MANIFEST_LIMIT:
        raise BundleError(f"bundle {file}", expected=f"a {MANIFEST}", seen="none, or one of absurd size")
    manifest = _manifest(_read(archive, MANIFEST, file), file)
    listed = manifest["members"]
    if set(listed) != set(names) - {MANIFEST}:
        raise BundleError(f"bundle {file}", expected=f"members {sorted(listed)}", seen=sorted(set(names) - {MANIFEST}))
    members = {}
    for name, entry in listed.items():
        if archive.getinfo(name).file_size != entry["size"]:
            raise BundleError(
                f"bundle {file}: {name}", expected=f"{entry['size']} bytes", seen=archive.getinfo(name).file_size
            )
        data = _read(archive, name, file)
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            hint = "it was changed after it was made: copy or compile it again"
            raise BundleError(
                f"bundle {file}: {name}", expected=f"sha256 {entry['sha256'][:12]}...", seen="another", hint=hint
            )
        members[name] = data
    bundle = Bundle(manifest, members, file)
    _check_sizes(bundle)
    return bundle


def _is_of_a_size(name: str) -> bool:
    size, _, member = name.partition("/")
    return member in OF_A_SIZE and re.fullmatch(r"[1-9]\d{0,8}", size) is not None


def _check_sizes(bundle: Bundle) -> None:
    """Raise BundleError where what the manifest says of several sizes is not so."""
    dynamic, where = bundle.dynamic, f"{bundle.where}: dynamic sizes"
    folders = {int(name.partition("/")[0]) for name in bundle.members if "/" in name}
    if folders != (set() if dynamic is None else set(dynamic.sizes[1:])):
        raise BundleError(where, expected="a folder for each but the smallest", seen=sorted(folders))
    if dynamic is None:
        return
    programs = bundle.manifest["dynamic"].get("programs")
    listed = isinstance(programs, list) and all(isinstance(program, dict) for program in programs)
    if not listed or len(programs) != len(folders):
        raise BundleError(where, expected=f"{len(folders)} other programs", seen=type(programs).__name__)
    shapes = {spec.name: spec.shape for spec in bundle.signature.inputs}
    axes = all(name in shapes and axis < len(shapes[name]) for name, axis in dynamic.axes)
    cuts = dynamic.exact or len(dynamic.cuts) == len(bundle.signature.outputs)
    if not axes or not cuts:
        raise BundleError(where, expected="axes of inputs, and a cut an output", seen=str(dynamic))
    for program in bundle.programs():
        _check_keys(program.manifest, where)


def _read(archive: zipfile.ZipFile, name: str, file: Path) -> bytes:
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise BundleError(
            f"bundle {file}: {name}", expected="its bytes", seen=f"damage ({error})", hint="copy or compile it again"
        ) from error


_REQUIRED: dict[str, type] = {
    "name": str,
    "target": dict,
    "isa": dict,
    "signature": dict,
    "recipe": dict,
    "versions": dict,
    "parameters": list,
    "steps": list,
    "exact": bool,
    "tolerance": float,
    "activation_bytes": int,
    "operators": list,
    "members": dict,
}


def _manifest(data: bytes, file: Path) -> dict[str, Any]:
    where = f"bundle {file}: {MANIFEST}"
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(where, expected="JSON", seen=str(error)) from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        seen = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise BundleError(
            where, expected=f"schema {SCHEMA}", seen=seen, hint="compile the model with this version of tvmq"
        )
    _check_keys(manifest, where)
    for name, entry in manifest["members"].items():
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("size"), int)
            or not isinstance(entry.get("sha256"), str)
        ):
            raise BundleError(where, expected=f"size and sha256 of {name!r}", seen=entry)
    return manifest


def _check_keys(manifest: Mapping[str, Any], where: str) -> None:
    for key, kind in _REQUIRED.items():
        if not isinstance(manifest.get(key), kind):
            raise BundleError(where, expected=f"{key!r} of type {kind.__name__}", seen=type(manifest.get(key)).__name__)


def _spec(entry: Any) -> TensorSpec:
    try:
        return TensorSpec(str(entry["name"]), tuple(int(n) for n in entry["shape"]), str(entry["dtype"]))
    except (KeyError, TypeError, ValueError) as error:
        raise SignatureError("bundle signature", expected="name, shape and dtype", seen=entry) from error
