"""Bad input: exit code 2, one line on stderr that names the thing, nothing on stdout, no output file."""

from __future__ import annotations

import errno
import json
import pickle
import zipfile

import numpy as np
import pytest

from tvmq.deploy import bundle as bundles


@pytest.fixture
def refused(tvmq, tmp_path):
    """Run a command line that must be refused with `said`, and write nothing to `out`."""

    def run(said, *words, out=None):
        before = sorted(tmp_path.iterdir())
        outcome = tvmq(*words)
        assert outcome.code == 2
        assert outcome.out == ""
        assert said in outcome.line
        assert sorted(tmp_path.iterdir()) == before

    return run


def test_a_model_that_is_missing(refused, tmp_path):
    refused("missing.pt2", "compile", tmp_path / "missing.pt2", "-o", tmp_path / "m.tvmq")


def test_a_model_that_is_no_pt2(refused, tmp_path):
    (tmp_path / "m.pt2").write_text("hello")
    refused("expected a program that torch.export.save wrote", "compile", tmp_path / "m.pt2", "-o", tmp_path / "m.tvmq")


def test_a_pickle_is_never_loaded(refused, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "was-run"), "w"))

    (tmp_path / "m.pt2").write_bytes(pickle.dumps(Bomb()))
    refused("a bare pickle is never loaded", "compile", tmp_path / "m.pt2", "-o", tmp_path / "m.tvmq")
    assert not (tmp_path / "was-run").exists()


def test_an_unknown_target(refused, files, tmp_path):
    words = ("compile", files.model, "-t", "raspberry-pi-4", "-o", tmp_path / "m.tvmq")
    refused("did you mean 'raspberry-pi-4b'?", *words)


def test_a_recipe_with_an_unknown_key(refused, files, tmp_path):
    (tmp_path / "r.toml").write_text('precison = "int8"\n')
    words = ("compile", files.model, "--recipe", tmp_path / "r.toml", "-o", tmp_path / "m.tvmq")
    refused("did you mean 'precision'?", *words)


def test_a_precision_that_is_none(refused, files, tmp_path):
    said = "recipe: precision: expected one of fp32, bf16, fp16, int8, int16, int8-dynamic, int8-weight, int4-weight, auto, saw 'fp8'"
    refused(said, "compile", files.model, "--precision", "fp8", "-o", tmp_path / "m.tvmq")


def test_integers_without_calibration(refused, files, tmp_path):
    refused("--calibrate DATA", "compile", files.model, "--precision", "int8", "-o", tmp_path / "m.tvmq")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (np.full((2, 3, 8, 8), np.nan, np.float32), "expected finite numbers, saw NaN or infinity"),
        (np.full((2, 3, 8, 8), -np.inf, np.float32), "expected finite numbers, saw NaN or infinity"),
        (np.zeros((0, 3, 8, 8), np.float32), "calibration batch 0"),
        (np.zeros((2, 3, 9, 9), np.float32), "expected shape [1, 3, 8, 8]"),
    ],
    ids=["nan", "infinity", "empty", "shape"],
)
def test_calibration_data_that_cannot_be_used(data, said, refused, files, tmp_path):
    np.savez(tmp_path / "data.npz", x=data)
    for command in (("compile", files.model, "--precision", "int8"), ("calibrate", files.model)):
        refused(said, *command, "--calibrate", tmp_path / "data.npz", "-o", tmp_path / "out")


def test_calibration_data_that_is_missing_or_damaged(refused, files, tmp_path):
    command = ("compile", files.model, "--precision", "int8", "-o", tmp_path / "m.tvmq", "--calibrate")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.npz").write_bytes(files.data.read_bytes()[:100])
    (tmp_path / "table.json").write_text("{}")
    refused("no such file", *command, tmp_path / "missing.npz")
    refused("a folder with .npy files", *command, tmp_path / "empty")
    refused("expected a .npz archive", *command, tmp_path / "cut.npz")
    refused("expected a calibration table", *command, tmp_path / "table.json")


@pytest.mark.parametrize("scale", [0, -1.0, 1e-31])
def test_an_edited_table_with_a_scale_that_is_none(scale, refused, files, tmp_path):
    document = json.loads(bundles.read(files.bundle).members["calibration.json"])
    name = next(iter(document["tensors"]))
    document["tensors"][name]["scale"] = scale
    (tmp_path / "table.json").write_text(json.dumps(document))
    said = f"{name!r}: scale"
    refused(
        said,
        "compile",
        files.model,
        "--precision",
        "int8",
        "-o",
        tmp_path / "m",
        "--calibrate",
        tmp_path / "table.json",
    )


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ('weight_levels = "codebook"', "recipe: rule 'x': weight_levels: expected precision fp32 or int4-weight"),
        ("group_size = 48", "recipe: rules.group_size: expected one of 32, 64, 128, saw 48"),
        ('precision = "int4-weight"\nweight_bits = 4', "recipe: rule 'x': weight_bits: expected precision int8"),
    ],
)
def test_a_rule_without_meaning(rule, said, refused, files, tmp_path):
    (tmp_path / "r.toml").write_text(f'precision = "int8"\n[[rules]]\nmatch = "x"\n{rule}\n')
    refused(said, "compile", files.model, "--recipe", tmp_path / "r.toml", "-o", tmp_path / "m")


def test_an_input_of_the_wrong_shape(refused, files, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 9, 9), np.float32))
    refused("expected shape [1, 3, 8, 8], saw [1, 3, 9, 9]", "run", files.bundle, "--input", tmp_path / "x.npy")


def test_an_input_of_the_wrong_dtype(refused, files, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 8, 8)))
    refused("expected dtype float32, saw float64", "run", files.bundle, "--input", tmp_path / "x.npy")


BUNDLE_COMMANDS = ("run", "bench", "verify", "explain")


@pytest.mark.parametrize("command", BUNDLE_COMMANDS)
def test_a_bundle_that_is_missing(command, refused, tmp_path):
    refused("no such file", command, tmp_path / "missing.tvmq")


@pytest.mark.parametrize("command", BUNDLE_COMMANDS)
def test_a_truncated_bundle(command, refused, files, tmp_path):
    data = files.bundle.read_bytes()
    (tmp_path / "cut.tvmq").write_bytes(data[: len(data) // 2])
    refused("a damaged or truncated file", command, tmp_path / "cut.tvmq")


@pytest.mark.parametrize("command", BUNDLE_COMMANDS)
def test_a_bundle_with_a_changed_byte(command, refused, files, tmp_path):
    path = tmp_path / "changed.tvmq"
    with zipfile.ZipFile(files.bundle) as source, zipfile.ZipFile(path, "w") as copy:
        for name in source.namelist():
            data = bytearray(source.read(name))
            if name == "params.bin":
                data[0] ^= 1
            copy.writestr(name, bytes(data))
    refused("params.bin: expected sha256", command, path)


def test_a_flipped_byte_anywhere_in_the_file(tvmq, files, tmp_path):
    data = files.bundle.read_bytes()
    path = tmp_path / "flipped.tvmq"
    for position in np.random.default_rng(0).integers(0, len(data), 20):
        changed = bytearray(data)
        changed[position] ^= 0xFF
        path.write_bytes(changed)
        outcome = tvmq("explain", path)
        # A byte of the zip's own bookkeeping (a date, a comment) may be one that nothing depends on.
        assert outcome.code == 0 or (outcome.code == 2 and outcome.line)


@pytest.mark.parametrize("command", BUNDLE_COMMANDS)
@pytest.mark.parametrize("name", ["../evil.so", "/evil.so", "a/../../evil.so"])
def test_a_bundle_with_a_path_in_a_member_name(command, name, refused, files, tmp_path):
    path = tmp_path / "evil.tvmq"
    path.write_bytes(files.bundle.read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"evil")
    refused(repr(name), command, path)


def test_a_bundle_of_another_machine(refused, files, tvmq, tmp_path):
    path = tmp_path / "pi.tvmq"
    assert tvmq("compile", files.model, "-t", "raspberry-pi-4b", "-o", path).code == 0
    refused("expected a machine of type aarch64", "run", path)


@pytest.mark.parametrize("device", ["rpc://127.0.0.1:1", "rpc://nowhere", "gpu"])
def test_a_device_that_cannot_be_reached(device, refused, files):
    refused(f"device {device!r}" if device != "rpc://127.0.0.1:1" else device, "run", files.bundle, "--device", device)


def test_a_folder_that_is_missing_is_refused_before_the_work(refused, files, tmp_path):
    out = tmp_path / "no" / "m.tvmq"
    refused("expected an existing folder", "compile", files.model, "-o", out)
    refused("expected an existing folder", "calibrate", files.model, "--calibrate", files.data, "-o", out)
    refused("expected an existing folder", "run", files.bundle, "-o", out)


def test_a_disk_that_is_full(refused, files, tmp_path, monkeypatch):
    def full(*_args, **_settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    refused("No space left on device", "compile", files.model, "-o", tmp_path / "m.tvmq")
    monkeypatch.setattr(np, "savez", full)
    refused("No space left on device", "run", files.bundle, "-o", tmp_path / "y.npz")


def test_a_full_disk_leaves_the_old_bundle(files, tvmq, tmp_path, monkeypatch):
    path = tmp_path / "m.tvmq"
    path.write_bytes(files.bundle.read_bytes())

    def full(*_args, **_settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    assert tvmq("compile", files.model, "-o", path).code == 2
    assert path.read_bytes() == files.bundle.read_bytes()
