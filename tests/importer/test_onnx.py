"""ONNX models: what comes in, that it is right, and one clear line for what is not sound."""

# ruff: noqa: E402

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

import mutations
import onnx_sweep
from onnx import TensorProto, helper, numpy_helper

from tvmq import ir
from tvmq.errors import ImportMismatchError, InputError, ModelError, UnsupportedOpError
from tvmq.importer import onnx_arithmetic, onnx_file
from tvmq.importer.load import import_model
from tvmq.oracle import interpret

RNG = np.random.default_rng(0)
IMAGE = [1, 3, 8, 8]


def _save(
    path: Path, nodes: list, weights: dict[str, np.ndarray], shape: list = IMAGE, opset: int = 17, rank: int = 4
) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [f"n{i}" for i in range(rank)])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.save(model, str(path))
    return path


def _random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """A convolution, a pool, a flattening whose shape is computed, and a linear layer."""
    return _save(
        tmp_path / "network.onnx",
        [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], name="stem/conv", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"], name="stem/relu"),
            helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
            helper.make_node("Shape", ["p"], ["s"], start=0, end=1),
            helper.make_node("Concat", ["s", "rest"], ["shape"], axis=0),
            helper.make_node("Reshape", ["p", "shape"], ["f"]),
            helper.make_node("Gemm", ["f", "v"], ["y"], transB=1, name="head"),
        ],
        {"w": _random(4, 3, 3, 3), "b": _random(4), "v": _random(5, 64), "rest": np.array([-1])},
        rank=2,
    )


def _qdq(tensor: str, name: str) -> list:
    return [
        helper.make_node("QuantizeLinear", [tensor, f"{name}_s", f"{name}_z"], [f"{name}_q"]),
        helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_s", f"{name}_z"], [name]),
    ]


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """A convolution of uint8 and of int8 weights with scales of channels, in QDQ form."""
    return _save(
        tmp_path / "quantized.onnx",
        [
            *_qdq("x", "a"),
            helper.make_node("DequantizeLinear", ["w", "w_s", "w_z"], ["wf"], axis=0),
            helper.make_node("Conv", ["a", "wf", "b"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"]),
            *_qdq("r", "y"),
        ],
        {
            "w": RNG.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
            "w_s": np.array([0.01, 0.02, 0.005, 0.01], np.float32),
            "w_z": np.zeros(4, np.int8),
            "b": _random(4),
            "a_s": np.array(0.03, np.float32),
            "a_z": np.array(128, np.uint8),
            "y_s": np.array(0.05, np.float32),
            "y_z": np.array(0, np.uint8),
        },
    )


def test_network(network: Path) -> None:
    model = import_model(network)
    assert [str(spec) for spec in model.signature.inputs] == ["x: float32[1, 3, 8, 8]"]
    assert [spec.name for spec in model.signature.outputs] == ["y"]
    assert {"stem_conv", "stem_relu", "head"} <= set(model.paths)
    assert [ir.op_name(call) for _, call in ir.calls(model.module)] == [
        "nn.conv2d", "add", "nn.relu", "nn.max_pool2d", "reshape", "matmul"
    ]  # fmt: skip


def test_example_inputs_by_order_and_by_name(network: Path) -> None:
    x = _random(*IMAGE)
    for example in (x, (x,), {"x": x}):
        np.testing.assert_array_equal(import_model(network, example, check=False).example[0], x)


@pytest.mark.parametrize(
    "example",
    [np.zeros((1, 3, 8, 9), np.float32), np.zeros(IMAGE), {"z": np.zeros(IMAGE)}, (np.zeros(1), np.zeros(1))],
    ids=["extent", "dtype", "name", "count"],
)
def test_example_inputs_that_do_not_fit(network: Path, example: object) -> None:
    with pytest.raises(ModelError, match=r"example input"):
        import_model(network, example)


def test_open_extents_need_example_inputs(tmp_path: Path) -> None:
    path = _save(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], {}, ["batch", 3], rank=2)
    with pytest.raises(ModelError, match=r"input 'x' of m.onnx: expected a static shape, saw \['batch', 3\]"):
        import_model(path)
    assert import_model(path, np.zeros((2, 3), np.float32)).signature.inputs[0].shape == (2, 3)


@pytest.mark.parametrize("extent", [-1, 1 << 40])
def test_extents_that_no_example_has(tmp_path: Path, extent: int) -> None:
    path = _save(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], {}, shape=[1, extent, 8, 8])
    with pytest.raises(ModelError, match=r"input 'x' .*expected a shape of some use, saw \[1, .*pass example inputs"):
        import_model(path)


def test_qdq_becomes_integer_kernels(quantized: Path) -> None:
    from tvmq.pipeline import quantize
    from tvmq.quantize.realize import realize
    from tvmq.recipe import Recipe

    model = import_model(quantized)
    found = quantize(model, Recipe())
    assert [d.precision.value for d in found.decisions if d.kind == "conv2d"] == ["int8"]
    for storage in ("int8", "uint8"):
        realized = realize(found.qdq, storage)
        (conv,) = (call for _, call in ir.calls(realized) if ir.is_call(call, "tvmq.conv2d"))
        assert ir.dtype_of(conv.args[0]) == storage and ir.dtype_of(conv.args[1]) == "int8"
        np.testing.assert_allclose(interpret.run(realized, model.example)[0], model.reference[0], atol=0.0501)


def test_a_wrong_converter_is_seen(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = onnx_arithmetic.table()
    monkeypatch.setattr(onnx_arithmetic, "table", lambda: {**table, "Relu": lambda n: n[0]})
    with pytest.raises(ImportMismatchError, match=r"output 'y' is not that of "):
        import_model(network)


def test_unknown_operators_are_named(tmp_path: Path) -> None:
    path = _save(tmp_path / "m.onnx", [helper.make_node("Det", ["x"], ["y"], name="the one")], {})
    with pytest.raises(UnsupportedOpError, match=r"no converter for Det \(node the one\); docs/onnx.md"):
        import_model(path)


@pytest.mark.parametrize(
    ("mode", "coordinates", "sizes", "how"),
    [
        ("linear", "half_pixel", (8, 10), "linear"),
        ("linear", "pytorch_half_pixel", (3, 7), "linear"),
        ("linear", "align_corners", (7, 2), "linear"),
        ("cubic", "half_pixel", (5, 9), "cubic"),
        ("cubic", "asymmetric", (8, 10), None),
        ("linear", "asymmetric", (8, 10), None),
    ],
)
def test_resizes(tmp_path: Path, mode: str, coordinates: str, sizes: tuple[int, int], how: str | None) -> None:
    """One operator where it is PyTorch's; others are products with matrices."""
    node = helper.make_node(
        "Resize", ["x", "", "", "sizes"], ["y"], mode=mode, coordinate_transformation_mode=coordinates
    )
    weights = {"sizes": np.array([1, 2, *sizes], np.int64)}
    model = import_model(_integer_model(tmp_path / "m.onnx", [node], weights, [1, 2, 4, 5], TensorProto.FLOAT))
    resizes = [call for _, call in ir.calls(model.module) if ir.is_call(call, "image.resize2d")]
    assert [str(call.attrs.method) for call in resizes] == ([] if how is None else [how])


def test_unsupported_attribute(tmp_path: Path) -> None:
    nodes = [helper.make_node("MaxPool", ["x"], ["y", "v"], kernel_shape=[2, 2], storage_order=1)]
    with pytest.raises(ModelError, match=r"MaxPool \(node y\) is not supported: saw the places of maxima"):
        import_model(_save(tmp_path / "m.onnx", nodes, {}))


def test_old_operator_sets_are_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], {}, opset=11)
    with pytest.raises(ModelError, match="expected opset 13 or newer, saw opset 11"):
        import_model(path)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x08\x09\x12", b"text that is no protobuf"])
def test_files_that_are_no_models(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError, match="expected an ONNX model"):
        import_model(path)


def test_truncated(network: Path) -> None:
    network.write_bytes(network.read_bytes()[:-100])
    with pytest.raises(ModelError, match="expected an ONNX model, saw a damaged file"):
        import_model(network)


def _external(path: Path, location: str, length: int = 16) -> Path:
    model = onnx.load(str(path))
    tensor = model.graph.initializer[1]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    path.write_bytes(model.SerializeToString())
    return path


def test_external_weights(network: Path) -> None:
    (network.parent / "weights.bin").write_bytes(np.ones(4, np.float32).tobytes())
    assert import_model(_external(network, "weights.bin")).signature.outputs[0].shape == (1, 5)


@pytest.mark.parametrize(
    ("location", "length", "message"),
    [
        ("missing.bin", 16, "expected the file missing.bin, saw nothing there"),
        ("../outside.bin", 16, "expected a file in the folder of the model"),
        ("/etc/hostname", 1, "expected a file in the folder of the model"),
        ("", 16, "expected a file in the folder of the model"),
        ("short.bin", 16, "expected 16 bytes in short.bin, saw 3"),
    ],
)
def test_external_weights_that_are_not_there(network: Path, location: str, length: int, message: str) -> None:
    (network.parent / "short.bin").write_bytes(b"abc")
    (network.parent.parent / "outside.bin").write_bytes(bytes(16))
    with pytest.raises(ModelError, match=message):
        import_model(_external(network, location, length))


def _try_mutated(path: Path, seeds: range, whole: bool) -> None:
    """Read damaged copies of a file, and import those that can be read where `whole`."""
    data = path.read_bytes()
    for seed in seeds:
        path.write_bytes(mutations.mutated(data, seed))
        try:
            model = onnx_file.load(path)
            onnx_file.example(model, path.name)
            if whole:
                import_model(path)
        except InputError as error:
            assert "\n" not in str(error)


def test_mutated_files_do_not_crash(quantized: Path) -> None:
    _try_mutated(quantized, range(50), whole=False)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 1000, 100))
def test_many_mutated_files_do_not_crash(network: Path, quantized: Path, start: int) -> None:
    _try_mutated(network if start < 500 else quantized, range(start, start + 100), whole=True)


def _integer_model(path: Path, nodes: list, weights: dict[str, np.ndarray], shape: list, dtype: int) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [f"n{i}" for i in range(len(shape))])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
    return path


@pytest.mark.parametrize("groups", [1, 2])
def test_sums_of_integers_are_exact(tmp_path: Path, groups: int) -> None:
    """900 products a sum, all of the largest: more than float32 holds exactly, so channels are summed in parts."""
    weight = np.full((4, 100, 3, 3), 255, np.uint8)
    node = helper.make_node("ConvInteger", ["x", "w", "x_z", "w_z"], ["y"], group=groups)
    weights = {"w": weight, "x_z": np.array(255, np.uint8), "w_z": np.array([0, 1, 0, 255], np.uint8)}
    path = _integer_model(tmp_path / "m.onnx", [node], weights, [1, 100 * groups, 4, 4], TensorProto.UINT8)
    x = RNG.integers(0, 3, (1, 100 * groups, 4, 4)).astype(np.uint8)
    model = import_model(path, x)
    (found,) = interpret.run(model.module, (x,))
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.int64) - 255, (3, 3), (2, 3))
    steps = weight.astype(np.int64) - weights["w_z"].astype(np.int64).reshape(-1, 1, 1, 1)
    each = 4 // groups
    for out in range(4):
        channels = slice(100 * (out // each), 100 * (out // each) + 100)
        wanted = np.einsum("ncijkl,ckl->nij", windows[:, channels], steps[out])
        np.testing.assert_array_equal(found[:, out], wanted)
        assert out == 3 or abs(wanted).max() > 2**24


def test_windows_that_float32_cannot_sum(tmp_path: Path) -> None:
    node = helper.make_node("ConvInteger", ["x", "w"], ["y"])
    weights = {"w": np.full((1, 1, 20, 20), 255, np.uint8)}
    path = _integer_model(tmp_path / "m.onnx", [node], weights, [1, 1, 20, 20], TensorProto.UINT8)
    with pytest.raises(ModelError, match="a window of more products than float32 sums exactly"):
        import_model(path)


def test_four_bits_are_for_quantization_alone(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT32)
    path = _integer_model(tmp_path / "m.onnx", [node], {}, [2, 3], TensorProto.INT4)
    with pytest.raises(ModelError, match=r"Cast \(node y\) is not supported: saw element type int4"):
        import_model(path)


SLICE = (
    "test_quantizelinear",
    "test_quantizelinear_int4",
    "test_quantizelinear_uint16",
    "test_dequantizelinear_axis",
    "test_dequantizelinear_uint2",
    "test_convinteger_with_padding",
    "test_qlinearmatmul_2D_int8_float32",
    "test_gather_0",
)


@pytest.mark.parametrize("case", [c for c in onnx_sweep.cases() if c.name in SLICE], ids=lambda c: c.name)
def test_node(case: object) -> None:
    assert onnx_sweep.judge(case) == (onnx_sweep.PASSES, "")


@pytest.mark.slow
def test_no_node_is_silently_wrong() -> None:
    verdicts = {case.name: onnx_sweep.judge(case) for case in onnx_sweep.cases()}
    wrong = {name: v for name, v in verdicts.items() if v[0] in (onnx_sweep.WRONG, onnx_sweep.CRASHED)}
    assert not wrong


def test_the_page_counts_by_operator() -> None:
    verdicts = {
        "test_a": ("Relu", "passes", ""),
        "test_b": ("Relu", "refused", "no converter; because"),
        "test_c": ("Add", "passes", ""),
    }
    page = onnx_sweep.page(verdicts, Counter({"is of another kind": 3}), "a command")
    for part in (
        "2 passes, 1 refused, 0 wrong, 0 crashed",
        "    a command\n",
        "| `test_b` | refused | no converter |",
        "| Add | 1 | 0 | 0 | 0 |\n| Relu | 1 | 1 | 0 | 0 |",
        "| is of another kind | 3 |",
    ):
        assert part in page
