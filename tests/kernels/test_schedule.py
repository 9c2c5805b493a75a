"""What TVM legalizes is scheduled without changing what it computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from harness import floats, runnable, target_of
from tvm import relax

from tvmq.kernels.schedule import build, schedule
from tvmq.oracle import interpret


def module_of(emit: Callable, *inputs: np.ndarray) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    params = [relax.Var(f"x{i}", relax.TensorType(list(x.shape), str(x.dtype))) for i, x in enumerate(inputs)]
    with builder.function("main", params):
        with builder.dataflow():
            outputs = builder.emit_output(relax.Tuple([builder.emit(emit(*params))]))
        builder.emit_func_output(outputs)
    return builder.get()


def run(module: tvm.IRModule, inputs: tuple, name: str) -> np.ndarray:
    target = runnable(name)
    machine = relax.VirtualMachine(build(schedule(module, target), target).jit(), tvm.cpu())
    machine.set_input("main", *(tvm.runtime.tensor(np.asarray(x, order="C")) for x in inputs))
    machine.invoke_stateful("main")
    return machine.get_outputs("main")[0].numpy()


INDICES = np.random.default_rng(0).integers(0, 37, (3, 5)).astype(np.int64)
LARGE, SMALL = floats((4, 37, 65)), floats((3, 5, 7))
GRAPHS: dict[str, tuple] = {
    "softmax_of_a_middle_axis": (lambda x: relax.op.nn.softmax(x, axis=1), LARGE),
    "sum_of_the_first_axis": (lambda x: relax.op.sum(x, axis=[0]), LARGE),
    "sum_of_the_last_axis": (lambda x: relax.op.sum(x, axis=[2]), LARGE),
    "sum_of_everything": (lambda x: relax.op.sum(x), LARGE),
    "max_of_two_axes": (lambda x: relax.op.max(x, axis=[0, 2], keepdims=True), LARGE),
    "transpose": (lambda x: relax.op.permute_dims(x, [2, 0, 1]), LARGE),
    "exp_then_product": (lambda x: relax.op.multiply(relax.op.exp(x), x), LARGE),
    "broadcast": (lambda x, y: relax.op.subtract(x, y), LARGE, floats((37, 1), 4)),
    "small": (lambda x: relax.op.sqrt(relax.op.abs(x)), SMALL),
    "small_reduction": (lambda x: relax.op.sum(x, axis=[1]), SMALL),
    "take": (lambda x, i: relax.op.take(x, i, axis=1), LARGE, INDICES),
    "strided_slice": (lambda x: relax.op.strided_slice(x, [1], [1], [37], [2]), LARGE),
    "cumsum": (lambda x: relax.op.cumsum(x, axis=1), LARGE),
    "batched_matmul": (lambda x, y: relax.op.matmul(x, y), LARGE, floats((4, 65, 33), 5)),
    "conv_of_activations": (lambda x, w: relax.op.nn.conv2d(x, w), floats((1, 3, 9, 9)), floats((4, 3, 3, 3), 5)),
    "layer_norm_of_two_axes": (
        lambda x, g, b: relax.op.nn.layer_norm(x, g, b, axes=[1, 2]),
        LARGE,
        floats((37, 65), 6),
        floats((37, 65), 7),
    ),
    "scalar": (lambda x: relax.op.exp(x), np.array(0.5, np.float32)),
    "minus_infinity": (
        lambda x: relax.op.where(relax.op.greater(x, relax.const(0.0)), x, relax.const(float("-inf"))),
        SMALL,
    ),
}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", ["sse2", "host"])
def test_the_schedule_changes_no_result(graph: str, name: str) -> None:
    emit, *inputs = GRAPHS[graph]
    module = module_of(emit, *inputs)
    [want] = interpret.run(module, inputs)
    np.testing.assert_allclose(run(module, tuple(inputs), name), want, rtol=1e-5, atol=1e-5)


def text_of(graph: str) -> str:
    emit, *inputs = GRAPHS[graph]
    return schedule(module_of(emit, *inputs), target_of("avx2")).script()


def test_large_loops_are_parallel_and_vectors() -> None:
    assert "T.parallel(" in text_of("exp_then_product")
    assert "T.vectorized(" in text_of("exp_then_product")
    assert "T.parallel(" in text_of("sum_of_the_last_axis")


def test_small_loops_stay_on_one_thread() -> None:
    assert "T.parallel(" not in text_of("small")
    assert "T.vectorized(" in text_of("small")
    assert "T.parallel(" not in text_of("small_reduction")
