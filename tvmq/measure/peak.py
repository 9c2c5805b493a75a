"""What this machine reaches at best: multiply-accumulates of an instruction on registers, bytes read from memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm

from tvmq.deploy.permission import ask
from tvmq.deploy.session import LocalSession
from tvmq.kernels import builder, pipeline, tiles
from tvmq.kernels.builder import FLOAT, stored_dtype
from tvmq.measure.instructions import TableRow
from tvmq.target import Target

# Turns of a loop of products: a few tenths of a millisecond.
_TURNS = 20_000
# What is read in one pass: more than last-level caches hold of one program's.
_STREAM_BYTES = 512 << 20


def products(row: TableRow, target: Target, threads: int = 1, *, turns: int = _TURNS) -> Callable[[], float]:
    """A function that measures the multiply-accumulates a second of a row's instruction on `threads` threads, once."""
    run = build(row.loop(turns, threads), target, threads)
    operands = [tvm.runtime.tensor(array) for array in row.operands(threads)]
    run(*operands)
    return lambda: turns * threads * row.macs / seconds(run, *operands)


def matmul(row: TableRow, target: Target, size: tuple[int, int, int]) -> tuple[str, Callable[[], float]]:
    """The tile of a row's kernel at a size, and a function that measures its multiply-accumulates a second, once."""
    kernel = row.matmul(size, target)
    a_dtype, w_dtype, acc_dtype = row.dtypes
    run = build(kernel.function, target, 1)
    rng = np.random.default_rng(0)
    # Small whole numbers, which every dtype has.
    x, weight = (rng.integers(0, 5, shape).astype(np.float32) for shape in (kernel.x_shape, kernel.packing.shape))
    packed = kernel.packing.pack(weight.astype(w_dtype))
    arrays = (x.astype(a_dtype), packed, np.zeros(kernel.out_shape, acc_dtype))
    tensors = [tvm.runtime.tensor(array.view(stored_dtype(str(array.dtype)))) for array in arrays]
    run(*tensors)
    macs = size[0] * size[1] * size[2]
    return kernel.tile, lambda: macs / seconds(run, *tensors)


def bandwidth(target: Target, threads: int, *, size: int = _STREAM_BYTES, repeat: int = 5) -> float:
    """Bytes a second that `threads` threads read from memory: the best of `repeat` passes over `size` bytes."""
    lanes, vectors = max(target.isa.fp32_lanes, 4), 8
    part = vectors * lanes
    turns = max(1, size // (4 * threads * part))
    run = build(_stream(lanes, vectors, turns, threads), target, threads)
    tensors = [tvm.runtime.tensor(np.zeros(n, np.float32)) for n in (threads * turns * part, threads * part)]
    run(*tensors)
    return 4 * threads * turns * part / min(seconds(run, *tensors) for _ in range(repeat))


def _stream(lanes: int, vectors: int, turns: int, threads: int) -> Any:
    """The PrimFunc (x, out): each thread sums its part of x into `vectors` vectors."""
    part = vectors * lanes

    def body(f: builder.Function) -> None:
        x, out = f.arguments(((threads * turns * part,), FLOAT), ((threads * part,), FLOAT))
        with builder.parallel(threads) as thread:
            acc = f.registers(part, FLOAT)
            for i in range(0, part, lanes):
                acc.store(builder.number(0, FLOAT, lanes), i, lanes)
            with builder.serial(turns) as turn:
                for i in range(0, part, lanes):
                    acc.store(acc.load(i, lanes) + x.load((thread * turns + turn) * part + i, lanes), i, lanes)
            for i in range(0, part, lanes):
                out.store(acc.load(i, lanes), thread * part + i, lanes)

    return builder.function(body)


def build(function: Any, target: Target, threads: int) -> Callable[..., None]:
    """A PrimFunc compiled for this process as tvmq's kernels are, and the pool sized for it. Raises IsaError."""
    session = LocalSession()
    session.configure_threads(threads)
    named = {"kernel": function}
    wants_tiles = tiles.FEATURE in target.isa.required_features
    if wants_tiles:
        named[tiles.PERMISSION] = tiles.permission()
    with tvm.transform.PassContext(opt_level=3):
        module = tvm.compile(builder.module(named), target=target.tvm_target(), tir_pipeline=pipeline.register())
    library = module.jit()
    if wants_tiles:
        ask(session, library, f"code for {target.name}")
    return library["kernel"]  # type: ignore[no-any-return]


def seconds(run: Callable[..., None], *tensors: Any) -> float:
    """What one call takes."""
    begin = time.perf_counter()
    run(*tensors)
    return time.perf_counter() - begin
