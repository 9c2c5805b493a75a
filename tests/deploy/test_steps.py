"""The list of kernel calls: names, parts of tuples, aliases, constants; and running them one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from tvmq.deploy import steps
from tvmq.deploy.bundle import Bundle, read
from tvmq.deploy.executor import load
from tvmq.deploy.steps import Result, StepRunner, entry_point, extract, with_entry_points
from tvmq.errors import BundleError
from tvmq.kernels.schedule import schedule
from tvmq.target import load_target


def scheduled(body: Callable[[relax.BlockBuilder, relax.Var], list]) -> tvm.IRModule:
    """main(x: float32 [2, 6]), scheduled; `body` returns the outputs."""
    builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType([2, 6], "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            outputs = builder.emit_output(relax.Tuple(body(builder, x)), "outputs")
        builder.emit_func_output(outputs)
    return schedule(builder.get(), load_target("host"))


def test_parts_of_a_tuple_are_called_as_those_who_take_them() -> None:
    def body(builder, x):
        parts = builder.emit(relax.op.topk(x, 3), "best")
        indices = builder.emit(parts[1], "indices")
        return [builder.emit(relax.op.cumsum(indices, axis=1), "sums")]

    found = extract(scheduled(body), {})
    assert [result.name for step in found for result in step.results] == ["best.0", "indices", "sums"]
    assert found[0].results[1] == Result("indices", (2, 3), "int64") or found[0].results[1].dtype in ("int32", "int64")
    assert found[0].out == "best.0"
    assert found[1].args == ("indices",)


def test_names_that_fusion_made_up_are_marked() -> None:
    def body(builder, x):
        y = builder.emit(relax.op.cumsum(x, axis=0), "lv7")
        return [builder.emit(relax.op.cumsum(y, axis=1), "mine")]

    assert [step.out for step in extract(scheduled(body), {})] == ["lv7~", "mine"]


def test_kernels_are_called_as_lowering_says_else_as_their_symbol() -> None:
    def body(builder, x):
        y = builder.emit(relax.op.cumsum(x, axis=0), "first")
        return [builder.emit(relax.op.cumsum(y, axis=1), "second")]

    found = extract(scheduled(body), {"first": "u8-s8-conv2d-6x32-avx2"})
    assert [(step.kernel, step.precision) for step in found] == [
        ("u8-s8-conv2d-6x32-avx2", "int8"),
        ("tvm-cumsum1", "fp32"),
    ]


@pytest.mark.parametrize(
    ("kernel", "precision"),
    [
        ("f32-w4-matvec-1x64-avx512", "int4-weight"),
        ("bf16-w8-matmul-14x32-avx512", "int8-weight"),
        ("u8-f32-layer_norm-rows", "int8"),
        ("u8-s8-conv2d-6x32-avx2", "int8"),
        ("f32-s8-matmul-1x16-neon", "int8"),
        ("f32-u8-map", "int8"),
        ("s16-s8-conv2d-6x32-avx2", "int8"),
        ("u8-s16-s8-conv2d-6x32-avx2", "int16"),
        ("f32-s16-s8-dwconv2d-3x8-neon", "int16"),
        ("f32-s16-map", "int16"),
        ("s8-f32-map", "int8"),
        ("u8-bf16-map", "int8"),
        ("bf16-s8-conv2d-6x32-avx2", "int8"),
        ("bf16-bf16-conv2d-14x32-avx512bf16", "bf16"),
        ("f32-bf16-matmul-14x32-avx512bf16", "bf16"),
        ("bf16-maxpool2d-3x3", "bf16"),
        ("f32-f32-conv2d-6x16-avx2", "fp32"),
        ("f32-f32-map", "fp32"),
        ("tvm-transpose", "fp32"),
        ("reshape", "fp32"),
    ],
)
def test_the_precision_of_a_kernel(kernel: str, precision: str) -> None:
    assert steps._precision(kernel) == precision


@pytest.mark.parametrize(
    "value",
    [
        np.array(1.5, np.float32),
        np.array(-np.inf, np.float32),
        np.array(np.nan, np.float32),
        np.array(True),
        np.array(-(2**62), np.int64),
        np.array([[1, -2], [3, 4]], np.int8),
        np.array([0.1, -np.inf, 1e-45], np.float32),
        np.array([[True], [False]]),
        np.zeros((0, 3), np.float32),
    ],
    ids=str,
)
def test_constants_survive_their_text(value: np.ndarray) -> None:
    text = steps._argument(relax.const(value, str(value.dtype)), {})
    back = steps._constant(text)
    assert (back.dtype, back.shape) == (value.dtype, value.shape)
    np.testing.assert_array_equal(back, value)


def test_every_kernel_is_an_entry_point_once() -> None:
    def body(builder, x):
        y = builder.emit(relax.op.cumsum(x, axis=0))
        return [builder.emit(relax.op.cumsum(y, axis=0)), builder.emit(relax.op.topk(y, 2)[0])]

    module = scheduled(body)
    names = {str(var.name_hint) for var in with_entry_points(module).functions}
    symbols = {step.symbol for step in extract(module, {})}
    assert {name for name in names if name.startswith("step_")} == {entry_point(symbol) for symbol in symbols}


@pytest.mark.parametrize("name", ["residual", "split", "pools", "transformer"])
def test_step_by_step_is_the_whole(bundle_of: Callable[..., Path], name: str) -> None:
    """The steps, one after the other, give what an inference gives."""
    executor = load(bundle_of(name))
    inputs, _ = executor.bundle.golden()
    whole = executor(*inputs)
    tensors = {key: executor.session.tensor(value) for key, value in executor.bundle.parameters().items()}
    tensors |= {
        spec.name: executor.session.tensor(x) for spec, x in zip(executor.signature.inputs, inputs, strict=True)
    }
    last: dict[str, np.ndarray] = {}
    for step, args, results in StepRunner(executor.bundle, executor.session, executor.library).run(tensors):
        assert len(args) == len(step.args)
        last = {made.name: result.numpy() for made, result in zip(step.results, results, strict=True)}
    np.testing.assert_array_equal(next(iter(last.values())), whole[-1])


def test_steps_that_make_no_sense_are_one_line(bundle_of: Callable[..., Path]) -> None:
    executor = load(bundle_of("flatten_linear"))
    bundle = read(bundle_of("flatten_linear"))

    def runner(changed: list) -> StepRunner:
        return StepRunner(
            Bundle({**bundle.manifest, "steps": changed}, bundle.members), executor.session, executor.library
        )

    with pytest.raises(BundleError, match="steps: expected kernel calls"):
        runner([{"symbol": ""}])
    with pytest.raises(BundleError, match="steps: expected kernel calls"):
        runner([3])
    orphan = {**bundle.manifest["steps"][0], "args": ["nobody"]}
    with pytest.raises(BundleError, match="tensor 'nobody': expected an input, a parameter or an earlier result"):
        list(runner([orphan]).run({}))
