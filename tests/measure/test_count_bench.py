"""Instructions beside ONNX Runtime's: the table, and the program that counts them in a qemu."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
from pathlib import Path

import numpy as np
import pytest

from tvmq.deploy.counting import plugin
from tvmq.errors import DeviceError, InputError
from tvmq.measure import count_bench, counts, onnx_counts
from tvmq.measure.count_bench import CountBench, Row

ROWS = [Row("resnet18", "int8", 154_800_000, 199_600_000, "u8 activations"), Row("tiny", "bf16", 1_000_000)]
QEMU = f"qemu-{platform.machine()}"


def test_the_table_has_millions_and_shares() -> None:
    found = CountBench("cortex-a76", "raspberry-pi-5", ROWS)
    lines = found.to_markdown().splitlines()
    assert "one thread of an emulated cortex-a76" in lines[0]
    assert lines[-2:] == [
        "| resnet18 | int8 | 154.8 | 199.6 | 0.78 | u8 activations |",
        "| tiny | bf16 | 1.0 |  |  |  |",
    ]
    document = json.loads(json.dumps(found.to_dict()))
    assert document["emulated"] is True
    assert [row["share"] for row in document["rows"]] == [pytest.approx(0.7755, abs=1e-4), None]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts without an emulator: what was counted is listed."""
    seen: list[str] = []

    def theirs(model: Path, inputs: list[np.ndarray], cache: object) -> int:
        assert [value.shape for value in inputs] == [(1, 3, 8, 8)]
        seen.append(model)
        return {"u8": 90, "s8": 80}.get(model, 100)

    def ours(path: Path, cpu: str, cache: object) -> int:
        seen.append(path.name)
        return 60

    monkeypatch.setattr(counts, "total", ours)
    monkeypatch.setattr(onnx_counts, "count", theirs)
    monkeypatch.setattr(count_bench, "onnx_file", lambda subject: "float")
    monkeypatch.setattr(count_bench, "onnx_static_file", lambda subject, activations: activations)
    monkeypatch.setattr(
        count_bench, "bundle_of", lambda subject, precision, target, untuned: Path(f"{precision}-{target.name}")
    )
    return seen


def test_int8_is_compared_with_the_better_of_two_formats(counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(count_bench, "_NEEDS", ())
    found = count_bench.run(["tiny_image"], ["fp32", "int8", "bf16"])
    assert found.rows == [
        Row("tiny_image", "fp32", 60, 100),
        Row("tiny_image", "int8", 60, 80, "s8 activations; 0.0 with u8 activations"),
        Row("tiny_image", "bf16", 60, None, "ONNX Runtime has no bf16 there"),
    ]
    assert counted == ["fp32-raspberry-pi-5", "float", "int8-raspberry-pi-5", "u8", "s8", "bf16-raspberry-pi-5"]


def test_without_the_peer_its_column_is_empty(counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_bench.run(["tiny_image"], ["int8"], with_peers=False).rows == [Row("tiny_image", "int8", 60)]
    monkeypatch.setattr(count_bench, "_NEEDS", ("no_such_package",))
    (row,) = count_bench.run(["tiny_image"], ["int8"]).rows
    assert (row.peer, row.note) == (None, "not installed: no_such_package (pip install 'tvmq[peers]')")


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(InputError, match="model 'resnet81'"):
        count_bench.run(["resnet81"])


def test_the_library_of_a_package_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_counts, "PACKAGE", "no_such_package")
    with pytest.raises(DeviceError, match=r"saw no package no_such_package; pip install 'tvmq\[peers\]'"):
        onnx_counts.prepare_library(tmp_path)


# --- the program, for this machine ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("counter") / onnx_counts.PROGRAM
    # Of the oldest processors: qemu does not know all that this one has.
    onnx_counts.build_counter(path, f"{platform.machine()}-linux-gnu.2.28")
    return path


@pytest.fixture(scope="module")
def library() -> Path:
    for name in ("onnx", "onnxruntime"):
        pytest.importorskip(name)
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None
    (found,) = Path(str(spec.origin)).parent.glob("capi/libonnxruntime.so.*")
    return found


def product(path: Path, rows: int) -> Path:
    """x (rows, 64) times a constant (64, 64)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, 64]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


@pytest.mark.emulated
@pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"no {QEMU}")
def test_more_rows_take_more_instructions(counter: Path, library: Path, tmp_path: Path) -> None:
    qemu = str(shutil.which(QEMU))
    program = [qemu, "-cpu", "max", "-plugin", str(plugin(qemu, tmp_path)), str(counter)]
    few, many = (
        onnx_counts.run_counter(program, library, product(tmp_path / f"{n}.onnx", n), [np.ones((n, 64), np.float32)])
        for n in (8, 64)
    )
    # 64 products of eight floats a row and column at the most, and what a call costs.
    assert few + 56 * 64 * 64 / 16 < many < 100 * few


def test_where_nobody_counts_that_is_said(counter: Path, library: Path, tmp_path: Path) -> None:
    model = product(tmp_path / "m.onnx", 8)
    with pytest.raises(DeviceError, match=r"cannot run m.onnx: saw the counter: nobody counts instructions here"):
        onnx_counts.run_counter([str(counter)], library, model, [np.ones((8, 64), np.float32)])


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([], "another number of inputs"),
        ([np.ones((7, 64), np.float32)], "values of another size"),
        ([np.ones((9, 64), np.float32)], "values of another size"),
    ],
)
def test_inputs_of_another_kind_are_refused(
    counter: Path, library: Path, tmp_path: Path, inputs: list[np.ndarray], said: str
) -> None:
    with pytest.raises(DeviceError, match=said):
        onnx_counts.run_counter([str(counter)], library, product(tmp_path / "m.onnx", 8), inputs)


def test_what_is_no_model_and_what_is_no_library(counter: Path, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with pytest.raises(DeviceError, match="cannot run m.onnx: saw the library: "):
        onnx_counts.run_counter([str(counter)], tmp_path / "m.onnx", tmp_path / "m.onnx", [])
