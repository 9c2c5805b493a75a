"""The pack for boards without Python: what the runner computes, what it refuses, and what is in the archive."""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tvmq.cli import main
from tvmq.deploy import bundle as bundles
from tvmq.deploy import pack as packing
from tvmq.deploy.emulate import find_qemu
from tvmq.deploy.executor import load
from tvmq.errors import DeviceError

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def native(native_runner: Path) -> Run:
    """The runner on this machine, called with words."""
    return lambda *words: subprocess.run(
        [str(native_runner), *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where the runner's own files go, empty at the end."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield
    assert not any(folder.iterdir())


def refused(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert done.returncode == 2, done
    assert said in done.stderr, done.stderr
    assert done.stderr.startswith("tvmq-runner: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


# --- Results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("depthwise_separable", "int8"),
        ("transformer", "int8"),
        ("returned_and_consumed", "int8"),
        ("residual", "int4-weight"),
    ],
)
def test_outputs_are_those_of_the_executor(
    native: Run, bundle_of: Callable[..., Path], tmp_path: Path, name: str, precision: str
) -> None:
    path = bundle_of(name, precision)
    assert bool(bundles.read(path).manifest["prepared"]["weights"]) == (precision == "int4-weight")
    executor = load(path)
    (spec,) = executor.signature.inputs
    x = np.random.default_rng(7).standard_normal(spec.shape).astype(spec.dtype)
    np.save(tmp_path / "x.npy", x)
    done = native("run", path, "--input", f"{spec.name}={tmp_path / 'x.npy'}", "--output", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    for output, want in zip(executor.signature.outputs, executor(x), strict=True):
        found = np.load(tmp_path / "out" / f"{output.name}.npy")
        assert found.dtype == want.dtype
        np.testing.assert_array_equal(found, want)


def test_examples_are_compared(native: Run, bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    path = bundle_of("flatten_linear")
    assert native("run", path).stdout.count(" as expected\n") == len(load(path).signature.outputs)
    bundle = bundles.read(path)
    inputs, outputs = bundle.golden()
    golden = bundles.pack_golden(inputs, tuple(output + 1 for output in outputs))
    bundles.write(tmp_path / "other.tvmq", bundle.manifest, {**bundle.members, bundles.GOLDEN: golden})
    done = native("run", tmp_path / "other.tvmq")
    assert (done.returncode, "differs from the example" in done.stdout) == (1, True)


def test_parameters_without_their_zeros(native: Run, bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    """A bundle whose parameters are stored sparse gives what the executor makes of it."""
    bundle = bundles.read(bundle_of("flatten_linear", "fp32"))
    thin = {
        name: np.where(np.arange(a.size).reshape(a.shape) % 3 == 0, a, 0) for name, a in bundle.parameters().items()
    }
    block, index = bundles.pack_parameters(
        {name: a.astype(bundle.parameters()[name].dtype) for name, a in thin.items()}
    )
    assert any("nonzero" in entry for entry in index)
    path = tmp_path / "thin.tvmq"
    bundles.write(path, {**bundle.manifest, "parameters": index}, {**bundle.members, bundles.PARAMETERS: block})
    inputs, _ = bundle.golden()
    native("run", path, "--output", tmp_path)
    executor = load(path)
    np.testing.assert_array_equal(np.load(tmp_path / f"{executor.signature.outputs[0].name}.npy"), executor(*inputs)[0])


def test_a_benchmark_says_what_it_measured(native: Run, bundle_of: Callable[..., Path]) -> None:
    done = native("bench", bundle_of("flatten_linear"), "--repeat", 5, "--threads", 1)
    before, found, after = done.stdout.splitlines()
    assert done.returncode == 0
    assert "ms median" in found
    assert found.endswith("(5 repeats, 1 threads)")
    for line, when in ((before, "before"), (after, "after")):
        assert re.match(
            rf"{when}: governor \S+(, slowest clock \d+ of \d+ MHz)?(, -?\d+ degrees)?, throttled \S+, load [\d.]+, processors \S+$",
            line,
        )


# --- What is refused ------------------------------------------------------------------------------------------------


def test_words_that_are_none(native: Run, bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    path = bundle_of("flatten_linear")
    name = load(path).signature.inputs[0].name
    np.save(tmp_path / "x.npy", np.zeros((1, 2), np.float32))
    np.save(tmp_path / "d.npy", np.zeros((2, 3, 8, 8)))
    refused(native(), "usage: tvmq-runner run|bench BUNDLE")
    refused(native("walk", path), "usage")
    refused(native("run", path, "--threads"), "expected a value after it")
    refused(native("run", path, "--threads", "0"), "expected a number from 1 to 1000000, saw 0")
    refused(native("run", path, "--speed", "9"), "--speed 9: expected --input")
    refused(native("run", path, "--input", f"y={tmp_path / 'x.npy'}"), f"the first is {name}")
    refused(native("run", path, "--input", f"{name}={tmp_path / 'x.npy'}"), "expected 'shape': (2, 3, 8, 8), saw")
    refused(native("run", path, "--input", f"{name}={tmp_path / 'd.npy'}"), "expected 'descr': '<f4', saw")
    refused(native("run", path, "--input", f"{name}={path}"), "no .npy file")
    refused(native("run", tmp_path / "none"), "cannot read")
    refused(native("run", tmp_path), "cannot read")


def test_a_bundle_for_another_machine(native: Run, bundle_of: Callable[..., Path]) -> None:
    refused(
        native("run", bundle_of("flatten_linear", target="raspberry-pi-4b")), "expected one for x86_64, saw aarch64"
    )


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive(path: Path, contents: list[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in contents:
            made.writestr(name, data)
    return path


@pytest.mark.usefixtures("nothing_left")
def test_bundles_that_were_changed(native: Run, bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    parts = members(bundle_of("flatten_linear"))
    for name in ("lib.so", "params.bin", "golden.npz"):
        changed = parts[name][:-1] + bytes([parts[name][-1] ^ 1])
        path = archive(tmp_path / "c.tvmq", list({**parts, name: changed}.items()))
        refused(native("run", path), f"{name}: expected another sha256; it was changed after it was made")
        longer = archive(tmp_path / "l.tvmq", list({**parts, name: parts[name] + b"0"}.items()))
        refused(native("run", longer), f"{name}: expected at most {len(parts[name])} bytes")
    refused(native("run", archive(tmp_path / "e.tvmq", [*parts.items(), ("../evil", b"")])), "an unknown member")
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = archive(tmp_path / "t.tvmq", [*parts.items(), ("lib.so", parts["lib.so"])])
    refused(native("run", twice), "lib.so is there twice")
    manifest = json.loads(parts["manifest.json"])
    for key, value in (("schema", 2), ("schema", "1"), ("parameters", 3), ("signature", {}), ("target", [])):
        other = {**parts, "manifest.json": json.dumps({**manifest, key: value}).encode()}
        assert native("run", archive(tmp_path / "m.tvmq", list(other.items()))).returncode == 2
    sides = manifest["signature"]
    for name in ("../evil", "/evil", ".evil"):
        evil = {**manifest, "signature": {**sides, "outputs": [{**sides["outputs"][0], "name": name}]}}
        other = {**parts, "manifest.json": json.dumps(evil).encode()}
        refused(native("run", archive(tmp_path / "n.tvmq", list(other.items()))), "output 0: its name")
    manifest["parameters"][0]["offset"] = 1 << 40
    other = {**parts, "manifest.json": json.dumps(manifest).encode()}
    refused(native("run", archive(tmp_path / "o.tvmq", list(other.items()))), "expected inside params.bin")


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_damage_anywhere_is_an_error_and_no_crash(
    native: Run, bundle_of: Callable[..., Path], tmp_path: Path, count: int
) -> None:
    whole, noise = bundle_of("flatten_linear").read_bytes(), random.Random(count)
    path = tmp_path / "damaged.tvmq"
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(noise.choice((1, 3, 100))):
            data[noise.randrange(len(data))] = noise.randrange(256)
        path.write_bytes(data[: noise.choice((len(data), noise.randrange(len(data))))])
        done = native("run", path)
        # Bytes that nobody reads (dates in the archive) may change without harm.
        assert done.returncode == 2 or (done.returncode == 0 and "as expected" in done.stdout), done


# --- The archive ----------------------------------------------------------------------------------------------------


@pytest.mark.emulated
def test_a_pack_runs_where_there_is_no_python(
    board_root: Path, bundle_of: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "board.tar.gz"
    assert main(["board", "pack", "--target", "raspberry-pi-4b", "-o", str(out), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert (document["bytes"], document["target"]) == (out.stat().st_size, "raspberry-pi-4b")
    assert out.stat().st_size < 4 << 20
    with tarfile.open(out) as packed:
        assert packed.getnames() == [
            f"tvmq-board/{name}"
            for name in ("libtvm_ffi.so", "libtvm_runtime.so", "libtvm_runtime_extra.so", "tvmq-runner")
        ]
        packed.extractall(tmp_path, filter="data")
    assert not list(board_root.rglob("*python*"))
    words = [find_qemu(), "-cpu", "cortex-a72", "-L", str(board_root), str(tmp_path / "tvmq-board" / "tvmq-runner")]
    path = bundle_of("depthwise_separable", target="raspberry-pi-4b")
    here = load(bundle_of("depthwise_separable"))
    (spec,), (result,) = here.signature.inputs, here.signature.outputs
    x = np.random.default_rng(7).standard_normal(spec.shape).astype(spec.dtype)
    np.save(tmp_path / "x.npy", x)
    given = ["--input", f"{spec.name}={tmp_path / 'x.npy'}", "--output", str(tmp_path / "out")]
    for command in (["run", str(path), *given], ["run", str(path)], ["bench", str(path), "--repeat", "2"]):
        subprocess.run([*words, *command], check=True, timeout=120)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / f"{result.name}.npy"), here(x)[0])
    serve(words, path, x, here(x)[0], tmp_path)
    newer = bundle_of("depthwise_separable", target="raspberry-pi-5")
    done = subprocess.run([*words, "run", str(newer)], capture_output=True, text=True, check=False, timeout=120)
    refused(done, "expected a CPU with dotprod, saw one without")


def serve(runner: list[str], path: Path, x: np.ndarray, want: np.ndarray, folder: Path) -> None:
    """The pack's own runner lets those in who know the secret."""
    secret = folder / "secret"
    secret.write_text("0123456789abcdef" * 2)
    secret.chmod(0o600)
    with subprocess.Popen([*runner, "serve", "--secret", str(secret)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = f"rpc://127.0.0.1:{process.stdout.readline().split()[2]}"
            with pytest.raises(DeviceError, match="asks for a secret"):
                load(path, f"{url}?secret=none")
            executor = load(path, f"{url}?secret={secret}")
            np.testing.assert_array_equal(executor(x)[0], want)
            executor.close()
        finally:
            process.terminate()


def test_an_archive_tells_no_time(tmp_path: Path) -> None:
    folder = tmp_path / "tvmq-board"
    folder.mkdir()
    (folder / "b").write_bytes(b"2")
    (folder / "a").write_bytes(b"1")
    packing._archive(folder, tmp_path / "one")
    (folder / "a").touch()
    packing._archive(folder, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with tarfile.open(fileobj=io.BytesIO((tmp_path / "one").read_bytes())) as packed:
        assert [(entry.name, entry.mtime, entry.mode) for entry in packed] == [
            ("tvmq-board/a", 0, 0o755),
            ("tvmq-board/b", 0, 0o755),
        ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "x86-64-avx2", "-o", "b.tar.gz"], "expected a target of type aarch64-linux-gnu"),
        (["--target", "raspberry-pi-4b"], "board pack: expected --target TARGET and -o FILE"),
        (["--target", "raspberry-pi-4b", "-o", "no/b.tar.gz"], "expected an existing folder"),
        (["--target", "raspberry-pi-4b", "-o", "b", "--port", "1"], "--port: expected another action than pack"),
    ],
)
def test_packs_that_cannot_be(words: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["board", "pack", *words]) == 2
    error = capfd.readouterr().err
    assert said in error
    assert error.count("\n") == 1
