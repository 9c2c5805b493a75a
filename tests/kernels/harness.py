"""Builds single tvmq operators for a target, runs them here, on a board or kernel by kernel, and compares them with the NumPy oracle.

Inputs of 16 bits are given as float32, and rounded by the module itself: a program's own inputs are never such.
"""

from __future__ import annotations

import functools
import gc
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from foreign import Machine
from tvm import relax, rpc

from tvmq import ir, op_calls, ops
from tvmq.cpuinfo import host_features
from tvmq.deploy.build import FLOAT_TOLERANCE, runs_here
from tvmq.deploy.crosslink import linker
from tvmq.deploy.emulate import EmulatedBoard
from tvmq.isa import Int8Dot
from tvmq.kernels import tiles
from tvmq.kernels.decision import TUNED, Choice, Decision, Records, decision_of
from tvmq.kernels.lower import lower
from tvmq.kernels.lowering import Lowered
from tvmq.kernels.schedule import build, schedule
from tvmq.kernels.task import Task
from tvmq.oracle import interpret
from tvmq.quantize import numerics
from tvmq.recipe_values import Sparse
from tvmq.target import Target, load_target

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """One operator: `emit(*inputs)` makes its call from expressions; everything but `inputs` is constant."""

    name: str
    emit: Callable[..., Any]
    inputs: tuple[Array, ...]


def _x86(name: str, cpu: str, *features: str) -> Target:
    return Target(f"test-{name}", "one level", "x86_64-linux-gnu", cpu, 2, 32, 1024, features=features)


# The instruction set levels of x86, and the int8 instruction that each should use.
LEVELS: dict[str, tuple[Callable[[], Target], Int8Dot | None]] = {
    "sse2": (lambda: _x86("sse2", "x86-64"), Int8Dot.NONE),
    "avx": (lambda: _x86("avx", "sandybridge"), Int8Dot.AVX2_PAIRS),
    "avx2": (lambda: load_target("x86-64-avx2"), Int8Dot.AVX2_PAIRS),
    "avx512-pairs": (lambda: _x86("avx512-pairs", "x86-64-v4"), Int8Dot.AVX512_PAIRS),
    "avx512-vnni": (lambda: load_target("x86-64-avx512-vnni"), Int8Dot.AVX512_VNNI),
    "avx-vnni": (lambda: load_target("intel-n100"), Int8Dot.AVX_VNNI),
    "amx": (lambda: load_target("x86-64-amx"), Int8Dot.AMX),
    "host": (lambda: load_target("host"), None),
}


@functools.cache
def target_of(name: str) -> Target:
    """The target of a level in `LEVELS`, or a shipped one."""
    return LEVELS[name][0]() if name in LEVELS else load_target(name)


def runnable(name: str) -> Target:
    """The target of a level; skips the test where this machine cannot run its code."""
    target = target_of(name)
    if not runs_here(target):
        pytest.skip(f"this machine lacks {', '.join(target.missing_features(host_features())) or target.triple}")
    return target


def module_of(cases: Sequence[Case]) -> tvm.IRModule:
    """A realized module: every case is an output of its own, reading inputs of its own."""
    builder, params, results = relax.BlockBuilder(), [], []
    for i, case in enumerate(cases):
        params.append([relax.Var(f"x{i}_{j}", _type(numerics.widened(x))) for j, x in enumerate(case.inputs)])
    with builder.function("main", [param for group in params for param in group]):
        with builder.dataflow():
            for case, group in zip(cases, params, strict=True):
                inputs = [_stored(builder, *pair) for pair in zip(group, case.inputs, strict=True)]
                results.append(builder.emit(case.emit(*inputs), case.name))
            outputs = builder.emit_output(relax.Tuple(results))
        builder.emit_func_output(outputs)
    return builder.get()


def _stored(builder: Any, param: Any, x: Array) -> Any:
    if x.dtype not in numerics.HALVES.values():
        return param
    return builder.emit(op_calls.elementwise(param, (), (), out_shape=x.shape, out_dtype=str(x.dtype)))


def _type(array: Array) -> Any:
    return relax.TensorType(list(array.shape), str(array.dtype))


def compiled(
    module: tvm.IRModule, target: Target, sparse: Sparse = Sparse.AUTO, records: Records | None = None
) -> tuple[Lowered, Any]:
    """The lowered module, and the executable."""
    lowered = lower(module, target, sparse=sparse, records=records)
    return lowered, build(schedule(lowered.module, target), target)


def run(
    module: tvm.IRModule,
    inputs: Sequence[Array],
    target: Target,
    board: EmulatedBoard | Machine | None = None,
    sparse: Sparse = Sparse.AUTO,
    records: Records | None = None,
) -> list[Array]:
    """The outputs of a realized module, compiled for `target` with `records` and run here or on `board`."""
    if isinstance(board, Machine):
        return board.run(lower(module, target, sparse=sparse, records=records), inputs, target)
    lowered, executable = compiled(module, target, sparse, records)
    if board is None:
        library, device = executable.jit(), tvm.cpu()
    else:
        library, device = _uploaded(executable, target, board)
    if tiles.FEATURE in target.isa.required_features:
        answer = tvm.runtime.tensor(np.ones(1, np.int32))
        library.get_function(tiles.PERMISSION, query_imports=True)(answer)
        assert answer.numpy()[0] == 0, "the system refuses matrix tiles"
    machine = relax.VirtualMachine(library, device)
    tensors = [tvm.runtime.tensor(np.asarray(x, order="C"), device) for x in [*inputs, *lowered.parameters.values()]]
    machine.set_input("main", *tensors)
    machine.invoke_stateful("main")
    outputs = machine.get_outputs("main")
    return [outputs[i].numpy() for i in range(len(outputs))]


def _uploaded(executable: Any, target: Target, board: EmulatedBoard) -> tuple[Any, Any]:
    # TVM's sessions sit in reference cycles, and the board serves the next when the last run's is gone.
    gc.collect()
    remote = rpc.connect(board.host, board.port)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.so"
        executable.export_library(str(path), fcompile=linker(target.zig_triple))
        remote.upload(str(path))
    return remote.load_module("kernels.so"), remote.cpu()


def check(
    cases: Sequence[Case],
    target: Target,
    board: EmulatedBoard | Machine | None = None,
    *,
    exact: bool = False,
    sparse: Sparse = Sparse.AUTO,
    records: Records | None = None,
    tolerance: float = FLOAT_TOLERANCE * 1e-2,
) -> None:
    """Every case equals the oracle: bit for bit for integers or `exact`; `same` says how closely for floats."""
    module = module_of(cases)
    inputs = [numerics.widened(x) for case in cases for x in case.inputs]
    wanted = interpret.run(module, inputs)
    wrong = []
    for case, want, bits in zip(cases, wanted, run(module, inputs, target, board, sparse, records), strict=True):
        got = bits.view(want.dtype) if want.dtype == numerics.BF16 else bits
        if want.dtype != got.dtype or want.shape != got.shape:
            wrong.append(f"{case.name}: {got.dtype}{got.shape} for {want.dtype}{want.shape}")
        elif not (np.array_equal(want, got) if exact else same(want, got, tolerance)):
            places = np.argwhere(want != got)
            wrong.append(f"{case.name}: {len(places)} of {want.size} differ, first at {places[0].tolist()}")
    assert not wrong, "\n".join(wrong)


def same(want: Array, got: Array, tolerance: float = FLOAT_TOLERANCE * 1e-2) -> bool:
    """Equal bits for integers; for floats, sums in another order, and for 16 bits a last place that they decide."""
    if want.dtype.kind in "iu":
        return bool(np.array_equal(want, got))
    # The last place of a bfloat16 is 2**-7 of its value at most; denormal numbers may be zeros.
    place = {numerics.BF16: 2.0**-7, numerics.FP16: 2.0**-10}.get(want.dtype, 0.0)
    want, got = numerics.widened(want), numerics.widened(got)
    scale = float(np.abs(want[np.isfinite(want)]).max(initial=0.0))
    return bool(np.allclose(want, got, rtol=place, atol=tolerance * scale + 1e-30))


# --- data -----------------------------------------------------------------------------------------------------------


def integers(shape: Sequence[int], dtype: str, seed: int = 0) -> Array:
    """All values of the dtype, evenly."""
    low, high = numerics.INT_RANGE[dtype]
    return np.random.default_rng(seed).integers(low, high + 1, shape).astype(dtype)


def weights(shape: Sequence[int], seed: int = 1) -> Array:
    """int8 weights in [-127, 127], the ends included."""
    return np.random.default_rng(seed).integers(-127, 128, shape).astype(np.int8)


def floats(shape: Sequence[int], seed: int = 2, dtype: str = "float32") -> Array:
    """Normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def is_float(array: Array) -> bool:
    """Whether an array is float32 or of 16 bits."""
    return str(array.dtype) in ("float32", *numerics.HALVES)


def requantize(
    channels: int, products: int, dtype: str, *, bias: bool = True, seed: int = 3
) -> tuple[list[Any], ops.Epilogue]:
    """Operands and steps of an ordinary integer epilogue; sums of `products` products fill its range."""
    rng = np.random.default_rng(seed)
    zero_point = 5 + (128 if dtype == "uint8" else 0)
    low, high = numerics.INT_RANGE[dtype]
    scale = (rng.uniform(0.5, 1.5, channels) * 40 / (75.0 * 75.0 * products**0.5)).astype(np.float32)
    tail = (ops.Scale(), ops.Quantize(zero_point, low, high, dtype))
    if not bias:
        return [ir.constant(scale)], tail
    return [ir.constant(rng.integers(-9999, 9999, channels).astype(np.int32)), ir.constant(scale)], (ops.Bias(), *tail)


# --- operators ------------------------------------------------------------------------------------------------------


def conv(
    name: str,
    x: Array,
    weight: Array,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    zero_point: int = 0,
    epilogue: tuple[list[Any], ops.Epilogue] | None = None,
    out_dtype: str | None = None,
    extra: tuple[Array, ...] = (),
) -> Case:
    """A tvmq.conv2d; its epilogue requantizes (integers) or does nothing (floats) unless it is given.

    `extra`: activations that `epilogue` reads after its constants.
    """
    n, h, w, _ = x.shape
    cout, kh, kw, _ = weight.shape
    top, left, bottom, right = padding
    out = (
        n,
        (h + top + bottom - (kh - 1) * dilation[0] - 1) // strides[0] + 1,
        (w + left + right - (kw - 1) * dilation[1] - 1) // strides[1] + 1,
        cout,
    )
    if epilogue is None:
        epilogue = ([], ()) if is_float(x) else requantize(cout, weight[0].size, str(x.dtype))
    operands, steps = epilogue
    out_dtype = out_dtype or str(x.dtype)

    def emit(x: Any, *more: Any) -> Any:
        geometry = {"strides": strides, "padding": padding, "dilation": dilation, "groups": groups}
        return op_calls.conv2d(
            x,
            ir.constant(weight),
            [*operands, *more],
            steps,
            **geometry,
            x_zero_point=zero_point,
            out_shape=out,
            out_dtype=out_dtype,
        )

    return Case(name, emit, (x, *extra))


def matmul(
    name: str,
    x: Array,
    weight: Array,
    *,
    zero_point: int = 0,
    epilogue: tuple[list[Any], ops.Epilogue] | None = None,
    out_dtype: str | None = None,
    extra: tuple[Array, ...] = (),
) -> Case:
    """A tvmq.matmul; see `conv`."""
    depth, channels = weight.shape
    if epilogue is None:
        epilogue = ([], ()) if is_float(x) else requantize(channels, depth, str(x.dtype))
    operands, steps = epilogue
    out_dtype = out_dtype or str(x.dtype)

    def emit(x: Any, *more: Any) -> Any:
        shape = (*ir.shape_of(x)[:-1], channels)
        return op_calls.matmul(
            x,
            ir.constant(weight),
            [*operands, *more],
            steps,
            x_zero_point=zero_point,
            out_shape=shape,
            out_dtype=out_dtype,
        )

    return Case(name, emit, (x, *extra))


def rows(name: str, x: Array, steps: ops.Epilogue = (), *, keep: bool = False, dtype: str = "uint8") -> list[Case]:
    """A tvmq.map that ends in quantized rows: a case a result."""
    last = ops.QuantizeRows(keep, 128 if dtype == "uint8" else 0, dtype)

    def emit(x: Any) -> Any:
        return op_calls.elementwise(x, (), (*steps, last), out_shape=ir.shape_of(x), out_dtype=dtype)

    return [part(f"{name}_{i}", emit, i, (x,)) for i in range(3 if keep else 2)]


def part(name: str, emit: Callable[..., Any], index: int, inputs: tuple[Array, ...]) -> Case:
    """One result of an operator with several."""
    return Case(name, lambda *args: relax.TupleGetItem(emit(*args), index), inputs)


def dynamic(
    name: str, x: Array, weight: Array, tail: ops.Epilogue = (), *, dtype: str = "uint8", extra: tuple[Array, ...] = ()
) -> Case:
    """A dynamic linear layer: rows of x quantized, a product, the scales of channels and rows, a bias, then `tail`."""
    depth, channels = weight.shape
    scale = (np.random.default_rng(4).uniform(0.5, 1.5, channels) / (127 * depth**0.5)).astype(np.float32)
    zero_point = 128 if dtype == "uint8" else 0

    def emit(x: Any, *more: Any) -> Any:
        both = op_calls.quantize_rows(x, zero_point=zero_point, dtype=dtype)
        q, scales = relax.TupleGetItem(both, 0), relax.TupleGetItem(both, 1)
        operands = [ir.constant(scale), scales, ir.constant(floats((channels,), 6)), *more]
        shape = (*ir.shape_of(x)[:-1], channels)
        steps = (ops.Scale(), ops.RowScale(), ops.Bias(), *tail)
        common = {"x_zero_point": zero_point, "out_shape": shape, "out_dtype": "float32"}
        return op_calls.matmul(q, ir.constant(weight), operands, steps, **common)

    return Case(name, emit, (x, *extra))


def grouped(
    name: str,
    bits: int,
    shape: tuple[int, ...],
    channels: int,
    group: int,
    steps: ops.Epilogue = (),
    *,
    x: Array | None = None,
    q: Array | None = None,
    extra: tuple[Array, ...] = (),
    exactly: bool = False,
    table: Array | None = None,
    asymmetric: bool = False,
) -> Case:
    """A tvmq.grouped_matmul of x of `shape`; its biases are constants. `exactly`: sums in any order are equal.

    table: what 4 bits are the places of, [width, 16], and then it is a tvmq.lookup_matmul. asymmetric: a
    tvmq.asymmetric_matmul, with zero points of all values.
    """
    rng = np.random.default_rng(7)
    depth = shape[-1]
    x = floats(shape) if x is None else x
    if q is None:
        rows = depth if table is None else depth // len(table)
        q = rng.integers(*{4: (-8, 8), 8: (-127, 128)}[bits], (rows, channels)).astype(np.int8)
    scales = rng.uniform(-0.02, 0.02, (depth // group, channels)).astype(numerics.BF16)
    if exactly:
        x, scales = np.rint(x * 4).astype(np.float32), np.full(scales.shape, 2.0**-6, numerics.BF16)
    constants = [ir.constant(floats((channels,), 6)) for step in steps if isinstance(step, ops.Bias)]
    last = steps[-1] if steps else None
    dtype = last.dtype if isinstance(last, ops.Quantize) else "float32"

    def emit(x: Any, *more: Any) -> Any:
        common = {"out_shape": (*shape[:-1], channels), "out_dtype": dtype}
        if table is not None:
            known = (ir.constant(q), ir.constant(scales), ir.constant(table))
            return op_calls.lookup_matmul(x, *known, [*constants, *more], steps, **common)
        known = (ir.constant(q), ir.constant(scales))
        if asymmetric:
            every = np.arange(*{4: (-8, 8), 8: (-128, 128)}[bits]).astype(np.int8)
            known = (*known, ir.constant(np.resize(every, scales.shape)))
            return op_calls.asymmetric_matmul(x, *known, [*constants, *more], steps, bits=bits, **common)
        return op_calls.grouped_matmul(x, *known, [*constants, *more], steps, bits=bits, **common)

    return Case(name, emit, (x, *extra))


@dataclass(frozen=True)
class Told:
    """Records that know a decision for each task."""

    of_task: dict[Task, Decision]

    def decisions(self, task: Task) -> list[tuple[Decision, str]]:
        """See `decision.Records`."""
        return [(self.of_task[task], TUNED)]


def choice_of(case: Case, target: Target) -> Choice:
    """What lowering decides for the one kernel of `case` that has choices."""
    (choice,) = lower(module_of([case]), target).choices.values()
    return choice


def check_choices(cases: Sequence[Case], target: Target, seed: object) -> None:
    """Each case, of a task of its own, computed with a point at random of its spaces in turns, equals the oracle."""
    rng, wanted = random.Random(str(seed)), {}
    for index, case in enumerate(cases):
        choice = choice_of(case, target)
        space = choice.spaces[index % len(choice.spaces)]
        wanted[choice.task] = decision_of(space, rng.choice(space.points()))
    assert len(wanted) == len(cases)
    lowered = lower(module_of(cases), target, records=Told(wanted))
    assert {choice.task: choice.decision for choice in lowered.choices.values()} == wanted
    check(cases, target, records=Told(wanted))


def lowered_titles(cases: Sequence[Case], target: Target, sparse: Sparse = Sparse.AUTO) -> list[str]:
    """The names of the kernels that `cases` become."""
    return list(lower(module_of(cases), target, sparse=sparse).kernels.values())
