"""Products whose leading axes were merged, and those that are left alone."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from tvmq.graph.batches import keep_batches
from tvmq.oracle import interpret

op = relax.op
SHAPES = ((2, 3, 4, 5), (2, 3, 5, 6))


def merged(out: tuple[int, ...] = (2, 3, 4, 6), *, x: tuple[int, ...] = (6, 4, 5), read_again: bool = False):
    def body(emit, a, b):
        product = emit(op.matmul(emit(op.reshape(a, x), "x"), emit(op.reshape(b, (6, 5, 6)), "y")), "product")
        result = emit(op.reshape(product, out), "result")
        return (result, emit(op.nn.relu(product), "again")) if read_again else result

    return body


def test_leading_axes_stay(graph) -> None:
    before = graph(merged(), *SHAPES)
    after = keep_batches(before)
    tvm.ir.assert_structural_equal(after, graph(lambda emit, a, b: emit(op.matmul(a, b), "result"), *SHAPES))
    inputs = [np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in SHAPES]
    np.testing.assert_allclose(interpret.run(after, inputs)[0], interpret.run(before, inputs)[0], rtol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        merged((2, 3, 6, 4)),  # the result is split otherwise
        merged((3, 2, 4, 6)),
        merged(read_again=True),
        lambda emit, a, b: emit(op.reshape(emit(op.matmul(a, b), "product"), (6, 4, 6)), "result"),  # nothing merged
    ],
)
def test_what_it_leaves_alone(graph, body) -> None:
    before = graph(body, *SHAPES)
    tvm.ir.assert_structural_equal(keep_batches(before), before)
