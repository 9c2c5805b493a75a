"""ONNX models that ONNX Runtime quantized, its operators, and weights of 4 bits and of blocks: on tvmq's kernels."""

# ruff: noqa: E402

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
quantization = pytest.importorskip("onnxruntime.quantization")

import onnx_sweep
from onnx import TensorProto, helper, numpy_helper

from tvmq import ir
from tvmq.importer.load import import_model
from tvmq.oracle import interpret
from tvmq.pipeline import quantize
from tvmq.quantize.realize import realize
from tvmq.recipe import Recipe

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Each test draws the same numbers, whichever ran before it."""
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


IMAGE = (1, 3, 8, 8)


def _random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def _save(path: Path, nodes: list, weights: list, shape: tuple[int, ...], rank: int = 2) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [f"n{i}" for i in range(rank)])],
        weights,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


# --- what ONNX Runtime's quantizer writes ---


class Images(quantization.CalibrationDataReader):
    def __init__(self) -> None:
        self.left = [{"x": _random(*IMAGE)} for _ in range(3)]

    def get_next(self) -> dict | None:
        return self.left.pop() if self.left else None


def _network(path: Path) -> Path:
    """A residual block, a global average and a linear layer."""
    arrays = {"w": _random(8, 3, 3, 3), "v": _random(8, 8, 3, 3) / 4, "h": _random(5, 8), "b": _random(5)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "v"], ["d"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["d", "r"], ["a"]),
        helper.make_node("GlobalAveragePool", ["a"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "h", "b"], ["y"], transB=1),
    ]
    return _save(path, nodes, [numpy_helper.from_array(array, name) for name, array in arrays.items()], IMAGE)


@pytest.mark.parametrize(
    ("form", "dtype", "per_channel"),
    [
        ("QDQ", "QUInt8", False),
        ("QOperator", "QInt8", True),
        pytest.param("QDQ", "QInt8", True, marks=pytest.mark.slow),
        pytest.param("QOperator", "QUInt8", False, marks=pytest.mark.slow),
    ],
)
def test_static_quantization(form: str, dtype: str, per_channel: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    quantization.quantize_static(
        _network(tmp_path / "float.onnx"),
        path,
        Images(),
        quant_format=quantization.QuantFormat[form],
        per_channel=per_channel,
        activation_type=quantization.QuantType[dtype],
        weight_type=quantization.QuantType.QInt8,
    )
    model = import_model(path, _random(*IMAGE))
    found = quantize(model, Recipe())
    for storage in ("int8", "uint8"):
        realized = realize(found.qdq, storage)
        anchors = [call for _, call in ir.calls(realized) if ir.is_call(call, "tvmq.conv2d", "tvmq.matmul")]
        assert [ir.dtype_of(call.args[0]) for call in anchors] == [storage] * 3
        maps = [call for _, call in ir.calls(realized) if ir.is_call(call, "tvmq.map")]
        assert len(maps) == 1, "the input's; the sum before the residual is rounded in its kernel"
        step = float(np.ptp(model.reference[0])) / 64
        np.testing.assert_allclose(interpret.run(realized, model.example)[0], model.reference[0], atol=step)


# --- QGemm ---


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("stored", [True, False])
def test_qgemm(transposed: int, stored: bool, tmp_path: Path) -> None:
    """With a scale a column and an int32 bias; its result quantized, or float."""
    weight = RNG.integers(-127, 128, (6, 4)).astype(np.int8)
    arrays = {
        "x_s": np.array(0.03, np.float32),
        "x_z": np.array(120, np.uint8),
        "w": weight.T.copy() if transposed else weight,
        "w_s": np.array([0.01, 0.02, 0.005, 0.01], np.float32),
        "w_z": np.zeros(4, np.int8),
        "c": RNG.integers(-2000, 2000, 4).astype(np.int32),
        "y_s": np.array(0.05, np.float32),
        "y_z": np.array(100, np.uint8),
    }
    operands = ["q", "x_s", "x_z", "w", "w_s", "w_z", "c", *(["y_s", "y_z"] if stored else [])]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_s", "x_z"], ["q"]),
        helper.make_node("QGemm", operands, ["g" if stored else "y"], domain="com.microsoft", transB=transposed),
        *([helper.make_node("DequantizeLinear", ["g", "y_s", "y_z"], ["y"])] if stored else []),
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    model = import_model(_save(tmp_path / "m.onnx", nodes, weights, (3, 6)), _random(3, 6))
    realized = realize(quantize(model, Recipe()).qdq)
    (product,) = (call for _, call in ir.calls(realized) if ir.is_call(call, "tvmq.matmul"))
    assert [ir.dtype_of(arg) for arg in product.args[:2]] == ["int8", "int8"]
    step = 0.0501 if stored else 1e-4
    np.testing.assert_allclose(interpret.run(realized, model.example)[0], model.reference[0], atol=step)


# --- weights of 4 bits, and of blocks ---


def _narrow_model(path: Path, kind: str, block: int, zero: int = 0, depth: int = 64) -> Path:
    """A linear layer of a weight of int4 or int8, in blocks of its inputs, by MatMul or Gemm of its transpose."""
    bits, layer = kind.split()
    transposed, columns = layer == "Gemm", 6
    low, high = (-8, 8) if bits == "int4" else (-127, 128)
    weight, count = RNG.integers(low, high, (depth, columns)), depth // block if block else 1
    scales = (RNG.random((count, columns)) * 0.02 + 0.01).astype(np.float32)
    zeros = np.full(scales.shape, zero, np.int8)
    if not block:
        scales, zeros = scales[0], zeros[0]
    arrays = [array.T if transposed else array for array in (weight, scales, zeros)]
    number = TensorProto.INT4 if bits == "int4" else TensorProto.INT8
    tensors = [
        helper.make_tensor("w", number, arrays[0].shape, arrays[0].ravel().tolist()),
        numpy_helper.from_array(np.ascontiguousarray(arrays[1]), "s"),
        helper.make_tensor("z", number, arrays[2].shape, arrays[2].ravel().tolist()),
    ]
    axis = (1 if transposed else 0) if block else int(not transposed)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["f"], axis=axis, block_size=block),
        helper.make_node(layer, ["x", "f"], ["y"], **({"transB": 1} if transposed else {})),
    ]
    return _save(path, nodes, tensors, (3, depth))


@pytest.mark.parametrize("layer", ["MatMul", "Gemm"])
@pytest.mark.parametrize(
    ("bits", "block", "precision"),
    [("int4", 32, "int4-weight"), ("int8", 32, "int8-weight"), ("int4", 0, "int4-weight"), ("int4", 16, "fp32")],
)
def test_weights_of_blocks(bits: str, block: int, precision: str, layer: str, tmp_path: Path) -> None:
    model = import_model(_narrow_model(tmp_path / "m.onnx", f"{bits} {layer}", block), _random(3, 64))
    found = quantize(model, Recipe())
    assert [d.precision.value for d in found.decisions if d.kind == "matmul"] == [precision]
    realized = realize(found.qdq)
    kind = "tvmq.matmul" if precision == "fp32" else "tvmq.grouped_matmul"
    assert sum(ir.is_call(call, kind) for _, call in ir.calls(realized)) == 1
    size = float(np.abs(model.reference[0]).max())
    np.testing.assert_allclose(interpret.run(realized, model.example)[0], model.reference[0], atol=0.01 * size)


def test_blocks_with_zero_points_are_floats(tmp_path: Path) -> None:
    path = _narrow_model(tmp_path / "m.onnx", "int4 MatMul", 32, zero=1)
    # ONNX Runtime multiplies such blocks less exactly.
    model = import_model(path, _random(3, 64), tolerance=0.03)
    assert not [call for _, call in ir.calls(model.module) if ir.is_call(call, "dequantize")]


QUANTIZED = (
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
    *("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"),
)
SLICE = (
    *("test_dynamicquantizelinear", "test_qlinearconv", "test_matmulinteger", "test_dequantizelinear_blocked"),
    *("test_quantizelinear_blocked_asymmetric", "test_dequantizelinear_int4", "test_qlinearmatmul_3D_uint8_float32"),
)
CASES = [case for case in onnx_sweep.cases() if onnx_sweep.group(case) in QUANTIZED]


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c.name in SLICE else pytest.mark.slow, id=c.name) for c in CASES],
)
def test_nodes_of_quantized_operators(case: object) -> None:
    assert onnx_sweep.judge(case) == (onnx_sweep.PASSES, "")


def test_the_slice_is_there() -> None:
    assert set(SLICE) <= {case.name for case in CASES}
