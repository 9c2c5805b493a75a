"""The bundle file: whole or refused, each damage in one clear line; the same input gives the same file."""

from __future__ import annotations

import errno
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tvmq.deploy import bundle as bundles
from tvmq.deploy.bundle import Bundle, pack_golden, pack_parameters, read, write
from tvmq.errors import BundleError, OutputError, SignatureError


@pytest.fixture
def path(bundle_of: Callable[..., Path]) -> Path:
    return bundle_of("flatten_linear")


def rewritten(
    source: Path, target: Path, edit: Callable[[str, bytes], bytes | None], extra: tuple[tuple[str, bytes], ...] = ()
) -> Path:
    """A copy with each member through `edit`; None leaves it out."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as copy:
        for name in archive.namelist():
            data = edit(name, archive.read(name))
            if data is not None:
                copy.writestr(name, data)
        for name, data in extra:
            copy.writestr(name, data)
    return target


def with_manifest(source: Path, target: Path, **changes: object) -> Path:
    def edit(name: str, data: bytes) -> bytes:
        return json.dumps({**json.loads(data), **changes}).encode() if name == bundles.MANIFEST else data

    return rewritten(source, target, edit)


def test_a_bundle_says_what_it_is(path: Path) -> None:
    bundle = read(path)
    manifest = bundle.manifest
    assert manifest["schema"] == bundles.SCHEMA
    assert manifest["target"]["triple"].endswith("linux-gnu")
    assert manifest["recipe"]["precision"] == "int8"
    assert set(manifest["versions"]) >= {"tvmq", "apache-tvm", "apache-tvm-ffi", "torch", "numpy"}
    assert manifest["exact"] is True
    assert set(bundle.members) == {"lib.so", "params.bin", "golden.npz", "oracle.json", "calibration.json"}
    assert bundle.required_features == tuple(manifest["isa"]["required_features"])
    assert [spec.dtype for spec in bundle.signature.inputs] == ["float32"]
    inputs, outputs = bundle.golden()
    assert [x.shape for x in inputs] == [spec.shape for spec in bundle.signature.inputs]
    assert [y.shape for y in outputs] == [spec.shape for spec in bundle.signature.outputs]


def test_the_same_compilation_gives_the_same_file(path: Path, imported: Callable, tmp_path: Path) -> None:
    from samples import calibration_of

    from tvmq.pipeline import compile_model
    from tvmq.recipe import Recipe

    model = imported("flatten_linear")
    again = compile_model(model, "host", Recipe(precision="int8"), calibration_of(model), tmp_path / "again.tvmq")
    assert again.path.read_bytes() == path.read_bytes()
    assert again.size == path.stat().st_size


def test_it_is_as_readable_as_any_file(path: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    assert path.stat().st_mode & 0o777 == (tmp_path / "plain").stat().st_mode & 0o777


# --- damage ---------------------------------------------------------------------------------------------------------


def refused(path: Path, said: str) -> None:
    with pytest.raises(BundleError, match=said) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kept", [0, 1, 10, 1000, 0.5, 0.99, -1])
def test_a_truncated_file(path: Path, tmp_path: Path, kept: float) -> None:
    data = path.read_bytes()
    size = int(kept * len(data)) if isinstance(kept, float) else kept
    cut = tmp_path / "cut.tvmq"
    cut.write_bytes(data[:size])
    refused(cut, "damaged or truncated")


def test_a_changed_byte_anywhere(path: Path, tmp_path: Path) -> None:
    """Refused in one line, or a byte on which nothing depends: the content is the same."""
    data, whole = path.read_bytes(), read(path)
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    rng = np.random.default_rng(0)
    # Every byte of the directory and of the first header, and some of the rest.
    positions = [*range(directory, len(data)), *range(60), *rng.integers(0, directory, 60)]
    accepted = 0
    for position in positions:
        changed = bytearray(data)
        changed[position] ^= int(rng.integers(1, 256))
        (tmp_path / "changed.tvmq").write_bytes(changed)
        try:
            bundle = read(tmp_path / "changed.tvmq")
        except BundleError as error:
            assert "\n" not in str(error)
            continue
        accepted += 1
        assert dict(bundle.members) == dict(whole.members), position
        assert bundle.manifest == whole.manifest
    assert accepted < len(positions) / 2


def test_a_member_with_other_bytes(path: Path, tmp_path: Path) -> None:
    for name in read(path).members:
        changed = rewritten(
            path, tmp_path / "c.tvmq", lambda n, d, name=name: bytes([d[0] ^ 1]) + d[1:] if n == name else d
        )
        refused(changed, f"{name}: expected sha256 .* copy or compile it again")
        longer = rewritten(path, tmp_path / "l.tvmq", lambda n, d, name=name: d + b"x" if n == name else d)
        refused(longer, f"{name}: expected \\d+ bytes, saw \\d+")
        missing = rewritten(path, tmp_path / "m.tvmq", lambda n, d, name=name: None if n == name else d)
        refused(missing, "expected members")


@pytest.mark.parametrize("name", ["../evil.so", "/etc/evil", "a/../lib.so", "extra.txt", "lib.so/"])
def test_a_member_that_does_not_belong(path: Path, tmp_path: Path, name: str) -> None:
    refused(rewritten(path, tmp_path / "e.tvmq", lambda _n, d: d, ((name, b"x"),)), "do not use this file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.tvmq"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_there_twice(path: Path, tmp_path: Path) -> None:
    refused(rewritten(path, tmp_path / "t.tvmq", lambda _n, d: d, (("lib.so", b"x"),)), "a name twice")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": 99}, "schema 1, saw 99; compile the model"),
        ({"schema": None}, "schema 1"),
        ({"signature": []}, "'signature' of type dict, saw list"),
        ({"steps": {}}, "'steps' of type list"),
        ({"members": {"lib.so": 3}}, "size and sha256 of 'lib.so'"),
        ({"isa": None}, "'isa'"),
    ],
)
def test_a_manifest_that_makes_no_sense(path: Path, tmp_path: Path, changes: dict, said: str) -> None:
    refused(with_manifest(path, tmp_path / "m.tvmq", **changes), said)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'"x"', b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_no_document(path: Path, tmp_path: Path, text: bytes) -> None:
    refused(rewritten(path, tmp_path / "m.tvmq", lambda n, d: text if n == bundles.MANIFEST else d), "manifest.json")


def test_a_manifest_that_is_missing_or_absurd(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(
        rewritten(path, tmp_path / "m.tvmq", lambda n, d: None if n == bundles.MANIFEST else d),
        "expected a manifest.json",
    )
    monkeypatch.setattr(bundles, "_MANIFEST_LIMIT", 10)
    refused(shutil.copy(path, tmp_path / "c.tvmq"), "absurd size")


def test_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    refused(tmp_path / "text", "damaged or truncated")
    refused(tmp_path / "missing", "no such file")
    refused(tmp_path, "a folder")


def test_parameters_outside_the_block(path: Path) -> None:
    bundle = read(path)
    entry = {**bundle.manifest["parameters"][-1], "offset": len(bundle.members["params.bin"])}
    broken = Bundle({**bundle.manifest, "parameters": [entry]}, bundle.members, path)
    with pytest.raises(BundleError, match=r"parameter .*: expected inside params.bin, saw offset"):
        broken.parameters()


def test_a_signature_without_shapes(path: Path) -> None:
    bundle = read(path)
    broken = Bundle({**bundle.manifest, "signature": {"inputs": [{"name": "x"}], "outputs": []}}, bundle.members)
    with pytest.raises((SignatureError, BundleError), match="name, shape and dtype"):
        _ = broken.signature


# --- writing --------------------------------------------------------------------------------------------------------


def test_parameters_are_aligned_and_come_back() -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.integers(-127, 128, 77).astype(np.int8),
        "b": rng.standard_normal((3, 5)).astype(np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(7, np.int64),
        "c": np.arange(12, dtype=np.int32).reshape(3, 4).T,
    }
    block, index = pack_parameters(arrays)
    assert all(entry["offset"] % 64 == 0 for entry in index)
    back = Bundle({"parameters": index}, {"params.bin": block}).parameters()
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


def sparse_parameters() -> dict[str, np.ndarray]:
    """Nine of ten elements are zero, in each dtype that weights have; an odd count; and a negative zero."""
    rng = np.random.default_rng(0)
    kept = rng.random(333) < 0.1
    arrays = {str(np.dtype(d)): (rng.integers(1, 99, 333) * kept).astype(d) for d in ("f4", "i1", "u2", "i4")}
    arrays["float32"][np.flatnonzero(~kept)[0]] = -0.0
    return {"dense": rng.standard_normal(100).astype(np.float32), **arrays, "zeros": np.zeros((3, 50), np.float32)}


def test_parameters_with_many_zeros_are_stored_without_them() -> None:
    arrays = sparse_parameters()
    block, index = pack_parameters(arrays)
    bundle = Bundle({"parameters": index}, {bundles.PARAMETERS: block})
    for name, array in bundle.parameters().items():
        assert array.dtype == arrays[name].dtype and array.tobytes() == arrays[name].tobytes()
    assert [entry["name"] for entry in index if "nonzero" not in entry] == ["dense"]
    assert len(block) < 0.4 * sum(array.nbytes for array in arrays.values())


@pytest.mark.parametrize("nonzero", [-1, 7, 10**9])
def test_a_wrong_count_of_elements_is_refused(nonzero: int) -> None:
    block, index = pack_parameters({"w": np.eye(16, dtype=np.float32)})
    bundle = Bundle({"parameters": [{**index[0], "nonzero": nonzero}]}, {bundles.PARAMETERS: block})
    with pytest.raises(BundleError, match="parameter 'w'"):
        bundle.parameters()


def test_the_golden_pair_comes_back() -> None:
    inputs = (np.zeros((2, 3), np.float32), np.arange(4))
    outputs = (np.array(True), np.array(1.5, np.float32), np.zeros((0,), np.int8))
    golden = Bundle({}, {"golden.npz": pack_golden(inputs, outputs)}).golden()
    for side, want in zip(golden, (inputs, outputs), strict=True):
        assert [(a.shape, a.dtype) for a in side] == [(a.shape, a.dtype) for a in want]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    bundle, out = read(path), tmp_path / "m.tvmq"
    out.write_bytes(b"old")
    original, calls = zipfile.ZipFile.writestr, []

    def full(self, *args, **settings):
        calls.append(args)
        if len(calls) == 3:
            raise error
        return original(self, *args, **settings)

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises((OutputError, KeyboardInterrupt)) as caught:
        write(out, bundle.manifest, bundle.members)
    assert isinstance(caught.value, KeyboardInterrupt) or "cannot write" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.tvmq"]
    assert out.read_bytes() == b"old"
