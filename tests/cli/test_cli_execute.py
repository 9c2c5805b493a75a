"""`tvmq run`."""

from __future__ import annotations

import numpy as np
import pytest

import tvmq as library


@pytest.fixture
def image(files, tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, files.batch()[:1])
    return path


def test_outputs_are_those_of_the_library(files, image, tvmq, tmp_path):
    name = library.load(files.bundle).signature.inputs[0].name
    output = library.load(files.bundle).signature.outputs[0].name
    expected = library.load(files.bundle)(files.batch()[:1])[0]
    np.savez(tmp_path / "inputs.npz", **{name: files.batch()[:1]})
    for given in (image, f"{name}={image}", tmp_path / "inputs.npz"):
        outcome = tvmq("run", files.bundle, "--input", given, "-o", tmp_path / "y.npz", "--json")
        assert outcome.code == 0
        with np.load(tmp_path / "y.npz") as archive:
            assert np.array_equal(archive[output], expected)
    row = outcome.document["outputs"][0]
    assert (row["name"], row["shape"], row["max"]) == (output, [1, 4, 8, 8], pytest.approx(expected.max()))


def test_without_inputs_the_example_is_run(files, tvmq):
    outcome = tvmq("run", files.bundle)
    assert outcome.code == 0
    assert outcome.out.startswith("on the bundle's own example inputs\n")
    assert "[1, 4, 8, 8]" in outcome.out


def test_input_files_that_cannot_be_used(files, image, tvmq, tmp_path):
    (tmp_path / "text.npy").write_text("hello")
    np.savez(tmp_path / "a.npz", x=np.zeros(1))
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    for given, said in [
        (["missing.npy"], "no such file"),
        ([tmp_path / "text.npy"], "expected a .npy or .npz file"),
        ([tmp_path / "object.npy"], "Object arrays cannot be loaded"),
        ([f"x={tmp_path / 'a.npz'}"], "expected one .npy array, saw a .npz archive"),
        ([f"wrong={image}"], "inputs by name"),
        ([image, f"x={image}"], "name=FILE for all of them, or for none"),
        ([image, image], "expected 1"),
    ]:
        options = [word for path in given for word in ("--input", path)]
        outcome = tvmq("run", files.bundle, *options)
        assert outcome.code == 2
        assert said in outcome.line
