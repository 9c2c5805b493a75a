"""Each step of an epilogue, as kernels run it, against `numerics.epilogue`: integer results bit for bit.

Chains are chosen so that a multiplication is followed by an addition: LLVM would make one fused operation of them.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from harness import Case, check, floats, integers, lowered_titles, runnable

from tvmq import functions, ir, op_calls, ops
from tvmq.quantize import numerics

LEVELS = ("sse2", "avx", "avx2", "avx512-vnni")
# Floats must be equal too.
exact = functools.partial(check, exact=True)
levels = pytest.mark.parametrize("name", LEVELS)


def a_map(
    name: str, x: np.ndarray, steps: ops.Epilogue, constants: tuple = (), extra: tuple = (), out: str = ""
) -> Case:
    """A tvmq.map; `constants` and `extra` (activations) are the operands, constants first."""
    dtype = out or (steps[-1].dtype if isinstance(steps[-1], ops.Quantize) else "float32")

    def emit(x, *more):
        return op_calls.elementwise(
            x, [*(ir.constant(c) for c in constants), *more], steps, out_shape=ir.shape_of(x), out_dtype=dtype
        )

    return Case(name, emit, (x, *extra))


def accumulators(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(5).integers(-(2**27), 2**27, shape).astype(np.int32)


@levels
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_every_integer_step(name: str, dtype: str) -> None:
    low, high = numerics.INT_RANGE[dtype]
    zero = 3 if dtype == "int8" else 131
    acc, q = accumulators((5, 7, 33)), integers((5, 7, 33), dtype)
    bias, scale = accumulators((33,)), np.abs(floats((33,))) * np.float32(1e-6)
    to_integer = ops.Quantize(zero, low, high, dtype)
    rounded = (ops.Round(low - zero, high - zero), ops.Multiply(0.4))
    exact(
        [
            a_map("bias", acc, (ops.Bias(),), (bias,), out="int32"),
            a_map("scale", acc, (ops.Scale(),), (scale,)),
            a_map("bias_scale_quantize", acc, (ops.Bias(), ops.Scale(), to_integer), (bias, scale)),
            a_map("affine", q, (ops.Dequantize(0.3, zero), ops.Scale(), ops.Bias(), to_integer), (scale * 1e6, bias)),
            a_map("dequantize", q, (ops.Dequantize(0.0123, zero),)),
            a_map("multiply", acc, (ops.Multiply(1e-6), to_integer)),
            a_map("narrow", acc, (ops.Multiply(1e-6), ops.Quantize(zero, zero, high - 3, dtype))),
            a_map("clip", q, (ops.Dequantize(0.3, zero), ops.Clip(-7.7, 9.1), to_integer)),
            a_map(
                "leak",
                acc,
                (ops.Multiply(1e-6), ops.Leak(0.0117), ops.Residual(), to_integer),
                (),
                (floats(acc.shape),),
            ),
            a_map("leak_by_channel", acc, (ops.Scale(), ops.ChannelLeak(), to_integer), (scale, floats((33,), 1))),
            a_map("leak_of_integers", acc, (ops.ChannelLeak(),), (floats((33,), 1),)),
            a_map("low", q, (ops.Dequantize(0.3, zero), ops.Clip(0.0, None), to_integer)),
            a_map("high", q, (ops.Dequantize(0.3, zero), ops.Clip(None, 6.0), to_integer)),
            a_map("crossed", q, (ops.Dequantize(0.3, zero), ops.Clip(5.0, 2.0), to_integer)),
            a_map("round", acc, (ops.Multiply(1e-6), ops.Round(-90, 77), ops.Multiply(0.37))),
            a_map(
                "round_residual",
                acc,
                (ops.Scale(), *rounded, ops.Residual(0.77, zero), to_integer),
                (scale,),
                (q,),
            ),
            a_map("residual", acc, (ops.Scale(), ops.Residual(0.77, zero), to_integer), (scale,), (q,)),
            a_map(
                "residuals",
                q,
                (ops.Dequantize(0.1, zero), ops.Residual(0.7, 5), ops.Residual(0.3, -9)),
                (),
                (q[::-1], q[:, ::-1]),
            ),
        ],
        runnable(name),
    )


@levels
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_products_and_differences_of_tensors(name: str, dtype: str) -> None:
    zero = 3 if dtype == "int8" else 131
    q, x, shared = integers((2, 3, 5, 33), dtype), floats((2, 3, 5, 33)), integers((2, 1, 1, 33), dtype, 1)
    to_integer = ops.Quantize(zero, *numerics.INT_RANGE[dtype], dtype)
    dequantize = ops.Dequantize(0.0217, zero)
    exact(
        [
            a_map("times", q, (dequantize, ops.Times(0.013, 7), ops.Multiply(31.0), to_integer), (), (q[::-1],)),
            a_map("times_float", q, (dequantize, ops.Times(), ops.Residual()), (), (x, x[::-1])),
            a_map("minus", q, (dequantize, ops.Residual(-0.017, 9), ops.Multiply(31.0), to_integer), (), (q[::-1],)),
            a_map("minus_float", q, (dequantize, ops.Minus(), ops.Multiply(31.0), to_integer), (), (x,)),
            a_map("shared", q, (dequantize, ops.Times(0.013, 7), ops.Multiply(31.0), to_integer), (), (shared,)),
            a_map("shared_float", x, (ops.Times(), ops.Clip(-1.0, 2.0)), (), (x[:, :1, :1],)),
        ],
        runnable(name),
    )


@pytest.mark.parametrize("name", ["sse2", "avx512-vnni", "host"])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_activations_of_integers_are_looked_up(name: str, dtype: str) -> None:
    target = runnable(name)
    zero = 3 if dtype == "int8" else 131
    to_integer = ops.Quantize(zero, *numerics.INT_RANGE[dtype], dtype)
    every = np.arange(256, dtype=np.uint8).view(dtype)
    sizes = [every, every[:63], np.resize(every, 4096 * 2 + 129)]
    cases = [
        a_map(
            f"{function}{len(x)}",
            x,
            (ops.Dequantize(0.03, zero), ops.Activate(function), ops.Multiply(90.0), to_integer),
        )
        for function in ("sigmoid", "gelu", "hardswish", "elu")
        for x in sizes
    ]
    assert all("lookup" in title for title in lowered_titles(cases, target))
    check(cases, target, exact=True)


@levels
def test_sums_after_products_are_not_contracted(name: str) -> None:
    """Two roundings where the oracle rounds twice, on every machine."""
    q, acc = integers((3, 41, 33), "int8"), accumulators((3, 41, 33))
    scale, bias, added = np.abs(floats((33,))) * np.float32(1e-6), floats((33,), 8), floats((3, 41, 33), 9)
    to_integer = ops.Quantize(3, -128, 127, "int8")
    exact(
        [
            a_map("scale_bias", acc, (ops.Scale(), ops.Bias()), (scale, bias)),
            a_map("dequantize_bias", q, (ops.Dequantize(0.0117, 3), ops.Bias()), (bias,)),
            a_map("scale_residual", acc, (ops.Scale(), ops.Residual()), (scale,), (added,)),
            a_map("multiply_residual", acc, (ops.Multiply(1.1e-6), ops.Residual()), (), (added,)),
            a_map("dequantize_residual", q, (ops.Dequantize(0.0117, 3), ops.Residual()), (), (added,)),
            a_map(
                "bias_twice",
                acc,
                (ops.Bias(), ops.Scale(), ops.Bias(), ops.Multiply(9.9), to_integer),
                (acc[0, 0], scale, bias),
            ),
            a_map(
                "float_then_integer",
                acc,
                (ops.Scale(), ops.Residual(), ops.Residual(0.3, 7), ops.Multiply(31.7), to_integer),
                (scale,),
                (added, q),
            ),
        ],
        runnable(name),
    )


@levels
def test_rounding_is_half_to_even(name: str) -> None:
    halves = (np.arange(-300, 301) / 2).astype(np.float32)
    tiny = np.array(
        [0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, np.inf, -np.inf, 0.49999997, -0.49999997, 126.5, 127.5], np.float32
    )
    steps = (ops.Quantize(3, -128, 127, "int8"),)
    unsigned = (ops.Quantize(131, 0, 255, "uint8"),)
    inputs = (("halves", halves), ("tiny", tiny))
    integers_of = [a_map(f"{n}{s[0].dtype}", x, s) for n, x in inputs for s in (steps, unsigned)]
    exact([*integers_of, *(a_map(f"{n}float", x, (ops.Round(-131, 124),)) for n, x in inputs)], runnable(name))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@levels
@pytest.mark.parametrize("function", sorted(functions.ACTIVATIONS))
def test_activations_are_the_oracle(name: str, function: str) -> None:
    x = np.concatenate([np.linspace(-12, 12, 5001), [-1e30, -200, -88.5, 0.0, 88.5, 200, 1e30]]).astype(np.float32)
    quantized = (
        ops.Dequantize(0.047, 3),
        ops.Activate(function),
        ops.Multiply(77.7),
        ops.Quantize(-9, -128, 127, "int8"),
    )
    exact(
        [a_map(function, x, (ops.Activate(function),)), a_map("q", integers((4, 257), "int8"), quantized)],
        runnable(name),
    )


@pytest.mark.parametrize("name", ["avx2", "avx512-vnni", "sse2"])
def test_shapes_of_maps(name: str) -> None:
    """Scalars, empty-ish and odd shapes, and sizes around the parallel grain."""
    target = runnable(name)
    steps = (ops.Dequantize(0.5, 3), ops.Quantize(-4, -128, 127, "int8"))
    shapes = [(), (1,), (7,), (3, 1), (1, 4095), (4096,), (4097,), (3, 4096 + 17), (2, 3, 5, 7)]
    cases = [a_map(f"s{'x'.join(map(str, s))}", integers(s, "int8"), steps) for s in shapes]
    wide = [
        a_map(
            f"b{'x'.join(map(str, s))}",
            integers(s, "int8").astype(np.int32),
            (ops.Bias(),),
            (accumulators(s[-1:]),),
            out="int32",
        )
        for s in shapes
        if s
    ]
    check([*cases, *wide], target)


def test_operands_are_taken_in_order() -> None:
    """Bias, scale and residual steps in every order read their own operands."""
    target = runnable("host")
    x = floats((4, 9))
    parts = {"b": (ops.Bias(), floats((9,), 1)), "s": (ops.Scale(), floats((9,), 2))}
    cases = [
        a_map("".join(order), x, tuple(parts[p][0] for p in order), tuple(parts[p][1] for p in order))
        for order in itertools.chain(itertools.permutations("bs"), [("b", "b"), ("s", "b", "s")])
    ]
    check(cases, target)
