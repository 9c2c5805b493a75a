"""Products of two activations against the oracle, and which matmuls become one."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from harness import Case, check, floats, module_of, runnable, target_of
from tvm import relax

import tvmq
from tvmq import ops
from tvmq.kernels.lower import lower
from tvmq.quantize.realize import realize

SIZES = (1, 7, 8, 15, 16, 17, 31, 32, 33)


def product(x: tuple[int, ...], y: tuple[int, ...], *, transposed: bool = False) -> Case:
    batch = np.broadcast_shapes(x[:-2], y[:-2])
    out = (*batch, x[-2], y[-2] if transposed else y[-1])

    def emit(a: Any, b: Any) -> Any:
        return ops.batch_matmul(a, b, transposed=transposed, out_shape=out)

    return Case(f"{x}_{y}_{transposed}", emit, (floats(x, 3), floats(y, 4)))


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
