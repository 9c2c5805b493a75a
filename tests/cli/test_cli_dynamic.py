"""`--dynamic`: a bundle of several sizes from a file, run, explained and verified."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("dynamic") / "m.pt2"
    shapes = ({0: torch.export.Dim("batch", max=8)},)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU()).eval()
    torch.export.save(torch.export.export(layers, (torch.ones(2, 6),), dynamic_shapes=shapes), path)
    return path


def test_compile_run_explain_verify(model, tvmq, tmp_path):
    bundle = tmp_path / "m.tvmq"
    done = tvmq("compile", model, "--dynamic", "input:0=1,4", "-o", bundle, "--json")
    assert (done.code, done.err) == (0, "")
    axes, cuts = [["input", 0]], [{"axis": 0, "each": 1}]
    assert done.document["dynamic"] == {"axes": axes, "sizes": [1, 4], "exact": False, "cuts": cuts, "fixed": []}
    np.save(tmp_path / "x.npy", np.ones((3, 6), np.float32))
    (output,) = tvmq("run", bundle, "--input", tmp_path / "x.npy", "--json").document["outputs"]
    assert output["shape"] == [3, 16]
    text = tvmq("explain", bundle).out
    assert "a program for each of input:0=1,4: others are padded to the next, and their outputs cut" in text
    assert "size 4: " in text and "operators have other kernels than the smallest" in text
    assert "the operators above are those of size 1" in text
    assert "the operators above are those of size 4" in tvmq("explain", bundle, "--size", 4, "--profile").out
    assert "--size: expected one of input:0=1,4, saw 3" in tvmq("explain", bundle, "--size", 3).line
    assert tvmq("verify", bundle).code == 0


def test_calibrate_tune_and_accuracy(model, tvmq, tmp_path, monkeypatch):
    """One table and one log serve all sizes."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    data, table, logs, bundle = (tmp_path / name for name in ("x.npz", "table.json", "logs", "m.tvmq"))
    np.savez(data, input=np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32))
    sizes = ("--dynamic", "input:0=4,8")
    assert tvmq("calibrate", model, *sizes, "--calibrate", data, "-o", table, "--json").document["samples"] == 2
    words = (model, *sizes, "--precision", "int8", "--calibrate", table)
    tasks = tvmq("tune", *words, "--trials", 2, "-o", logs, "--json").document["tasks"]
    assert sorted(name.rpartition(" ")[2] for task in tasks for name in task["operators"]) == ["4", "8"]
    assert tvmq("compile", *words, "--logs", logs, "-o", bundle).code == 0
    for words, size, samples in (((), 4, 2), (("--size", 8), 8, 1)):
        done = tvmq("explain", bundle, *words, "--accuracy", model, "--data", data, "--json")
        found = done.document["accuracy"]
        assert (found["size"], found["samples"], len(found["ops"])) == (size, samples, 1)
        assert found["output_db"] > 20


def test_a_bundle_has_its_sizes(tvmq, files):
    assert "--dynamic: expected only with a MODEL" in tvmq("tune", files.bundle, "--dynamic", "x:0=1,2").line
    assert "--size: expected a bundle of several sizes, saw 2" in tvmq("explain", files.bundle, "--size", 2).line


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ("input", "dynamic sizes: expected INPUT:AXIS=N,N,..."),
        ("input:0=1,16", "expected 1 to 8, as the model was exported, saw 16"),
        ("input:1=1,2", "dynamic sizes of input:1: expected an axis that the model leaves open, saw input:0"),
    ],
)
def test_sizes_that_do_not_fit(model, tvmq, tmp_path, sizes, said):
    outcome = tvmq("compile", model, "--dynamic", sizes, "-o", tmp_path / "m.tvmq")
    assert outcome.code == 2 and said in outcome.line


def test_a_symbolic_file_says_how(model, tvmq, tmp_path):
    assert "--dynamic INPUT:AXIS=N" in tvmq("compile", model, "-o", tmp_path / "m.tvmq").line
