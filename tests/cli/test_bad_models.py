"""Models that cannot be imported: each kind is one line, and no output file."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

SHAPE = [1, 3, 4, 4]


def _model(*nodes: object) -> object:
    graph = helper.make_graph(
        [*nodes, helper.make_node("Add", ["r", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, SHAPE)],
        [numpy_helper.from_array(np.ones(4, np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


RELU = helper.make_node("Relu", ["x"], ["r"])


def _with_weights_in(location: str) -> bytes:
    model = _model(RELU)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    return model.SerializeToString()


FILES = {
    "truncated": (lambda: _model(RELU).SerializeToString()[:-9], "expected an ONNX model, saw a damaged file"),
    "weights missing": (
        lambda: _with_weights_in("w.bin"),
        "expected the file w.bin, saw nothing there; copy it beside",
    ),
    "weights outside": (
        lambda: _with_weights_in("../w.bin"),
        "expected a file in the folder of the model, saw '../w.bin'",
    ),
    "unknown operator": (
        lambda: _model(helper.make_node("Det", ["x"], ["r"], name="the one")).SerializeToString(),
        "no converter for Det (node the one); docs/onnx.md",
    ),
    "unsupported attribute": (
        lambda: _model(
            helper.make_node("MaxPool", ["x"], ["r", "i"], kernel_shape=[1, 1], storage_order=1)
        ).SerializeToString(),
        "MaxPool (node r) is not supported: saw the places of maxima",
    ),
}


def _refused(tvmq, model: Path, *words: str) -> str:
    before = sorted(model.parent.iterdir())
    outcome = tvmq("compile", model, "-o", model.parent / "m.tvmq", *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert sorted(model.parent.iterdir()) == before
    return outcome.line


@pytest.mark.parametrize("name", FILES)
def test_onnx(name, tvmq, tmp_path):
    data, said = FILES[name]
    (tmp_path / "m.onnx").write_bytes(data())
    assert said in _refused(tvmq, tmp_path / "m.onnx")


def test_of_a_newer_pytorch(tvmq, files, tmp_path):
    with zipfile.ZipFile(files.model) as archive, zipfile.ZipFile(tmp_path / "m.pt2", "w") as later:
        for info in archive.infolist():
            data = archive.read(info)
            if info.filename.endswith("models/model.json"):
                graph = json.loads(data)
                graph["schema_version"]["major"] += 1
                data = json.dumps(graph).encode()
            later.writestr(info.filename, data)
    assert "of another PyTorch version" in _refused(tvmq, tmp_path / "m.pt2")


def test_example_inputs_that_do_not_fit(tvmq, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ("import torch", "def model():", "    return torch.nn.Linear(3, 2), torch.ones(2, 7)")
    (tmp_path / "unfit_model.py").write_text("\n".join(lines))
    outcome = tvmq("compile", "unfit_model:model", "-o", tmp_path / "m.tvmq")
    assert (outcome.code, outcome.out) == (2, "")
    assert "torch.export cannot trace Linear" in outcome.line and "check the example inputs" in outcome.line
