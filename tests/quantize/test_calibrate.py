import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relax

from tvmq import ir
from tvmq.errors import CalibrationError
from tvmq.model import Signature, TensorSpec
from tvmq.oracle import interpret
from tvmq.quantize.calibrate import calibrate
from tvmq.quantize.numerics import choose_qparams
from tvmq.recipe import Recipe


def _one_line(call, *parts: str) -> None:
    with pytest.raises(CalibrationError) as info:
        call()
    message = str(info.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_min_max_of_every_tensor(model_of):
    case = model_of("residual")
    ranges: dict[str, list[float]] = {}

    def watch(name: str, value: np.ndarray) -> None:
        low, high = ranges.get(name, (np.inf, -np.inf))
        ranges[name] = [min(low, float(value.min())), max(high, float(value.max()))]

    for inputs in case.batches:
        interpret.run(case.module, inputs, watch)
    table = case.table()
    assert table.samples == len(case.batches) and table.observer == "min_max"
    for name, entry in table.tensors.items():
        assert [entry.low, entry.high] == pytest.approx(ranges[name], rel=1e-5)  # convolutions may round otherwise
        assert entry.qparams == choose_qparams(entry.low, entry.high)


def test_tensors_inside_a_chain_are_not_observed(model_of):
    tensors = list(model_of("conv_bn_relu").table().tensors)
    assert tensors == ["x", "x_nhwc", "relu", "relu_2", "relu_2_nchw"]  # the convolutions and biases are inside


def test_the_parts_of_a_tuple_are_observed(graph):
    def body(emit, x):
        parts = emit(relax.op.split(x, 2, 1), "parts")
        left, right = (emit(relax.TupleGetItem(parts, i), name) for i, name in enumerate(("left", "right")))
        return emit(relax.op.subtract(left, right), "difference")

    signature = Signature((TensorSpec("x0", (1, 4), "float32"),), (TensorSpec("difference", (1, 2), "float32"),))
    x = np.array([[-1, 2, 3, 5]], np.float32)
    table = calibrate(graph(body, (1, 4)), signature, [x], Recipe()).tensors
    assert [(table[part].low, table[part].high) for part in ("left", "right")] == [(-1, 2), (3, 5)]


def test_the_recipe_chooses_the_observer_and_symmetry(model_of):
    case = model_of("conv_bn_relu")
    wide = case.table().tensors
    cut = case.table(Recipe(precision="int8", observer="percentile", percentile=95.0)).tensors
    assert all(cut[name].high <= wide[name].high for name in wide)
    assert cut["relu"].high < 0.9 * wide["relu"].high
    symmetric = case.table(Recipe(precision="int8", symmetric=True)).tensors
    assert all(entry.qparams.zero_point == 0 for entry in symmetric.values())


def test_progress_counts_inferences_of_streamed_data(model_of):
    case = model_of("conv_bn_relu")
    seen: list[int] = []
    pulled = 0

    def stream():
        nonlocal pulled
        for batch in case.batches:
            assert len(seen) == pulled  # the batch before was used up before this one was asked for
            pulled += 1
            yield batch

    table = calibrate(case.module, case.signature, stream(), Recipe(), name="net", progress=seen.append)
    assert seen == [1, 2, 3, 4]
    assert (table.model, table.samples) == ("net", 4)


def test_a_large_batch_is_many_inferences(model_of):
    case = model_of("residual")
    stacked = np.concatenate([x for (x,) in case.batches])
    assert calibrate(case.module, case.signature, [stacked], Recipe()).tensors == case.table(Recipe()).tensors


def test_no_data(model_of):
    case = model_of("residual")
    _one_line(lambda: calibrate(case.module, case.signature, [], Recipe()), "at least one batch")


def test_bad_data_is_named(model_of):
    case = model_of("residual")
    bad = np.full(case.inputs[0].shape, np.nan, np.float32)
    _one_line(
        lambda: calibrate(case.module, case.signature, [*case.batches, bad], Recipe()), "batch 4", "'x'", "finite"
    )


def test_a_tensor_that_overflows_is_named(build):
    class Overflows(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x * 1e38, -1)

    case = build(Overflows(), (1, 8), scale=100.0)
    with np.errstate(over="ignore"):
        _one_line(case.table, "tensor 'mul'", "finite numbers", "infinity")


def _empty_slice() -> tvm.IRModule:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            empty = builder.emit(relax.op.strided_slice(x, [1], [1], [1]))
            both = builder.emit(relax.op.concat([x, empty], 1))
            out = builder.emit_output((both,))
        builder.emit_func_output(out)
    return builder.get()


@pytest.mark.parametrize("observer", ["min_max", "moving_average", "percentile"])
def test_empty_tensors_have_no_range(observer: str):
    signature = Signature((TensorSpec("x", (2, 3), "float32"),), ())
    table = calibrate(_empty_slice(), signature, [np.ones((2, 3))], Recipe(observer=observer))
    assert len(table.tensors) == 2
    assert all(np.isfinite([entry.low, entry.high]).all() for entry in table.tensors.values())


def test_integer_tensors_are_not_observed(build):
    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.table(torch.argmax(x, -1)))

    case = build(Embed(), (2, 3, 5))
    table = case.table()
    dtypes = {str(var.name): ir.dtype_of(var) for var, _ in ir.calls(case.module)}
    assert "int64" in dtypes.values()
    assert all(dtypes.get(name, "float32") == "float32" for name in table.tensors)


def test_ctrl_c_passes_through(model_of):
    case = model_of("residual")

    def stream():
        yield case.batches[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(case.module, case.signature, stream(), Recipe())
