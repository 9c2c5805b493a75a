"""Products of two activations against the oracle, and which matmuls become one."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from harness import LEVELS, Array, Case, check, floats, integers, module_of, runnable, target_of
from tvm import relax

import tvmq
from tvmq import op_calls, ops
from tvmq.kernels.lower import lower
from tvmq.quantize import numerics
from tvmq.quantize.realize import realize

SIZES = (1, 7, 8, 15, 16, 17, 31, 32, 33)


def product(x: tuple[int, ...], y: tuple[int, ...], *, transposed: bool = False) -> Case:
    batch = np.broadcast_shapes(x[:-2], y[:-2])
    out = (*batch, x[-2], y[-2] if transposed else y[-1])

    def emit(a: Any, b: Any) -> Any:
        return op_calls.batch_matmul(a, b, transposed=transposed, out_shape=out)

    return Case(f"{x}_{y}_{transposed}", emit, (floats(x, 3), floats(y, 4)))


def integer(
    x: tuple[int, ...],
    y: tuple[int, ...],
    dtype: str,
    zero_points: tuple[int, int] = (3, -7),
    *,
    transposed: bool = False,
    scales: tuple[bool, bool] = (False, False),
    out: str = "float32",
    data: tuple[Array, ...] = (),
) -> Case:
    """A product of 8-bit integers; zero points as of int8. scales: of rows of x, and of columns of y."""
    batch = np.broadcast_shapes(x[:-2], y[:-2])
    columns, offset = y[-2 if transposed else -1], 128 if dtype == "uint8" else 0
    zx, zy = (zero_point + offset for zero_point in zero_points)
    steps: list[ops.Step] = [ops.Multiply(0.0123 / x[-1] ** 0.5)]
    extra = []
    both = ((ops.RowScale(), x[:-1]), (ops.ColumnScale(), (*y[:-2], columns)))
    for (step, shape), asked in zip(both, scales, strict=True):
        if asked:
            steps.append(step)
            extra.append(np.abs(floats(shape, 5)) + np.float32(0.5))
    if out != "float32":
        steps.append(ops.Quantize(9 + offset, *numerics.INT_RANGE[out], out))

    def emit(a: Any, b: Any, *more: Any) -> Any:
        common = {"x_zero_point": zx, "y_zero_point": zy, "out_shape": (*batch, x[-2], columns), "out_dtype": out}
        return op_calls.batch_matmul(a, b, more, tuple(steps), transposed=transposed, **common)

    name = f"{x}_{y}_{transposed}_{zero_points}_{scales}_{out}"
    return Case(name, emit, (*(data or (integers(x, dtype, 3), integers(y, dtype, 4))), *extra))


@pytest.mark.parametrize("name", ["avx2", "avx512-vnni"])
def test_integers_are_the_oracle(name: str) -> None:
    cases = [integer((2, 33, 8), (2, 19, 8), "uint8", transposed=True), integer((2, 3, 7), (2, 7, 33), "uint8")]
    cases += [integer((2, 3, 13), (2, 9, 13), "uint8", (0, 127), transposed=True, out="uint8")]
    cases += [integer((2, 3, 2), (2, 2, 16), "uint8", (-128, 0))]
    check(cases, runnable(name), exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEVELS)
def test_integers_of_every_size_are_the_oracle(name: str) -> None:
    target = runnable(name)
    dtype = target.isa.activation_dtype
    cases = []
    for transposed in (False, True):

        def y(k: int, n: int, turned: bool = transposed) -> tuple[int, ...]:
            return (2, n, k) if turned else (2, k, n)

        kind = {"transposed": transposed}
        cases += [integer((2, m, 8), y(8, 19), dtype, **kind) for m in (1, 15, 33)]
        cases += [integer((2, 3, 7), y(7, n), dtype, **kind) for n in SIZES]
        cases += [integer((2, 3, k), y(k, 9), dtype, **kind) for k in (1, 2, 3, 4, 5, 64)]
        cases += [integer((2, 3, 12), y(12, 9), dtype, zeros, **kind) for zeros in ((0, 0), (-128, -128), (0, 127))]
        cases += [integer((2, 3, 12), y(12, 9), dtype, out=dtype, **kind)]
    check(cases, target, exact=True)


def test_scales_of_rows_and_columns() -> None:
    every = list(itertools.product((False, True), repeat=2))
    shapes = [((2, 3, 4, 8), (2, 3, 8, 17)), ((4, 8), (2, 8, 5)), ((2, 3, 4, 8), (8, 33)), ((1, 4, 8), (3, 8, 2))]
    cases = [integer(*shapes[0], "uint8", scales=s) for s in every]
    cases += [integer(x, y, "uint8", scales=(True, True), out="uint8") for x, y in shapes[1:]]
    check(cases, runnable("avx512-vnni"), exact=True)


@pytest.mark.parametrize("name", ["avx512-vnni"])
def test_the_largest_sums_fit(name: str) -> None:
    depth = numerics.MOST_DEPTH
    shapes = ((1, 2, depth), (1, 3, depth))
    cases = []
    for ends in itertools.product((0, 255), repeat=2):
        # The zero points at the other ends: every difference is 255.
        zeros = tuple(127 if end == 0 else -128 for end in ends)
        data = tuple(np.full(shape, end, np.uint8) for shape, end in zip(shapes, ends, strict=True))
        cases.append(integer(*shapes, "uint8", zeros, transposed=True, data=data))
    check(cases, runnable(name), exact=True)


@pytest.mark.parametrize("name", ["sse2", "avx2", "avx512-vnni"])
@pytest.mark.parametrize("transposed", [False, True])
def test_sizes_around_the_tile(name: str, transposed: bool) -> None:
    def y(batch: tuple[int, ...], k: int, n: int) -> tuple[int, ...]:
        return (*batch, n, k) if transposed else (*batch, k, n)

    cases = [product((2, m, 5), y((2,), 5, 19), transposed=transposed) for m in SIZES]
    cases += [product((2, 3, 7), y((2,), 7, n), transposed=transposed) for n in SIZES]
    cases += [product((2, 3, k), y((2,), k, 9), transposed=transposed) for k in (1, 13, 64)]
    check(cases, runnable(name))


def test_leading_axes() -> None:
    shapes = [((4, 5), (5, 6)), ((2, 3, 4, 5), (2, 3, 5, 6)), ((2, 3, 4, 5), (5, 6)), ((1, 4, 5), (3, 5, 6))]
    shapes += [((4, 5), (2, 3, 5, 6)), ((1, 1, 4, 5), (2, 3, 5, 6)), ((2, 4, 5), (1, 5, 40))]
    check([product(x, y) for x, y in shapes], runnable("avx512-vnni"))


class Products(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x @ y, x @ z.transpose(1, 2), torch.matmul(x[:, None], y[None])


def test_matmuls_of_activations_become_it() -> None:
    shapes = ((2, 3, 4), (2, 4, 5), (2, 6, 4))
    model = tvmq.import_model(Products(), tuple(torch.randn(shape) for shape in shapes))
    text = realize(model.module, "uint8").script()
    # PyTorch writes the third one's broadcasts out.
    assert text.count("tvmq.batch_matmul") == 3
    assert "R.matmul" not in text


def test_operands_that_both_broadcast_are_left_to_tvm() -> None:
    builder = relax.BlockBuilder()
    x, y = (
        relax.Var("x", relax.TensorType((2, 1, 3, 4), "float32")),
        relax.Var("y", relax.TensorType((1, 2, 4, 5), "float32")),
    )
    with builder.function("main", [x, y]):
        with builder.dataflow():
            result = builder.emit_output(builder.emit(relax.op.matmul(x, y)))
        builder.emit_func_output(result)
    text = realize(builder.get(), "uint8").script()
    assert "R.matmul" in text
    assert "tvmq.batch_matmul" not in text


def test_a_compiled_model(tmp_path: Any) -> None:
    inputs = tuple(torch.randn(shape) for shape in ((2, 3, 4), (2, 4, 5), (2, 6, 4)))
    model = tvmq.import_model(Products(), inputs)
    compiled = tvmq.compile(model, "host", out=tmp_path / "m.tvmq")
    steps = {row["step"] for row in compiled.operators if "batch_matmul" in row["kernel"]}
    assert len(steps) == 3
    got = tvmq.load(tmp_path / "m.tvmq")(*inputs)
    for have, want in zip(got, Products()(*inputs), strict=True):
        np.testing.assert_allclose(have, want.numpy(), rtol=1e-5, atol=1e-5)


def test_tiles_keep_to_the_registers() -> None:

    for name, m in itertools.product(("sse2", "avx2", "avx512-vnni", "raspberry-pi-4b"), (3, 64, 197)):
        target = target_of(name)
        (title,) = {*lower(module_of([product((1, m, 8), (1, 8, 64))]), target).kernels.values()}
        rows, columns = (int(part) for part in title.split("-")[3].split("x"))
        lanes = max(target.isa.fp32_lanes, 4)
        assert rows * columns // lanes + columns // lanes < max(target.isa.vector_registers, 16)
