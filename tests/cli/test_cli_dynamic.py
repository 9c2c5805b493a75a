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
    assert done.document["dynamic"] == {"axes": axes, "sizes": [1, 4], "exact": False, "cuts": cuts}
    np.save(tmp_path / "x.npy", np.ones((3, 6), np.float32))
    (output,) = tvmq("run", bundle, "--input", tmp_path / "x.npy", "--json").document["outputs"]
    assert output["shape"] == [3, 16]
    text = tvmq("explain", bundle).out
    assert "a program for each of input:0=1,4: others are padded to the next, and their outputs cut" in text
    assert "size 4: " in text and "operators have other kernels" in text
    assert tvmq("verify", bundle).code == 0


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
