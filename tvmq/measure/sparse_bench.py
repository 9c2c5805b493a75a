"""Linear layers with sparse weights beside the same layers dense, SciPy's BSR and PyTorch's sparse tensors.

All multiply the same activations with the same blocks of weights; repeats take turns. SciPy computes on one thread.
OpenVINO's sparse weight decompression is for int8 layers on matrix tiles (AMX) alone, so it has no row here.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
import tvm
from tvm import relax

from tvmq import ir, ops
from tvmq.deploy.session import LocalSession
from tvmq.detect import detect_host
from tvmq.kernels.lower import lower
from tvmq.kernels.micro import Micro, float_micro, int8_micro
from tvmq.kernels.schedule import build, schedule
from tvmq.measure.report import figure, table
from tvmq.recipe import Sparse
from tvmq.sparse import masks
from tvmq.sparse.masks import Block
from tvmq.target import Target

Array = npt.NDArray[Any]
Progress = Callable[[str], None]
Run = Callable[[], object]
# (output channels, inputs) of the layers of BERT-base, and tokens.
SIZES = ((768, 768), (3072, 768), (768, 3072))
TOKENS = 128
DENSITIES = (0.2, 0.1, 0.05)
# Seconds between two runtimes: worker threads of the one before spin until they sleep.
_PAUSE = 0.01


@dataclass(frozen=True)
class Row:
    """One layer and density: the median milliseconds of each runtime, by its name."""

    size: tuple[int, int]
    density: float
    block: str
    ms: dict[str, float]


@dataclass(frozen=True)
class SparseBench:
    """All layers, and what they were measured on."""

    processor: str
    threads: int
    repeat: int
    tokens: int
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """One row a layer and density; milliseconds, and how many times as fast ours is as it is dense."""
        names = list(dict.fromkeys(name for row in self.rows for name in row.ms))
        head = (
            f"Linear layers with sparse weights, {self.tokens} tokens, {self.threads} threads of {self.processor}; "
            f"medians of {self.repeat} rounds in turns, ms\n"
        )
        columns = ("outputs x inputs", "density", "blocks", *names, "fp32 gain", "int8 gain")
        cells = (
            (
                "x".join(map(str, row.size)),
                f"{row.density:g}",
                row.block,
                *(figure(row.ms.get(name), 3) for name in names),
                *(f"{row.ms[f'{p} dense'] / row.ms[f'{p} sparse']:.2f}x" for p in ("fp32", "int8")),
            )
            for row in self.rows
        )
        return f"{head}\n{table(columns, cells)}"


def run(
    sizes: Sequence[tuple[int, int]] = SIZES,
    densities: Sequence[float] = DENSITIES,
    *,
    tokens: int = TOKENS,
    threads: int = 0,
    repeat: int = 10,
    progress: Progress | None = None,
) -> SparseBench:
    """Measure on this machine, `repeat` rounds. threads: 0 means all real cores."""
    show = progress or (lambda _text: None)
    host = detect_host()
    used = LocalSession().configure_threads(threads)
    torch.set_num_threads(used)
    micro = float_micro(host.isa)
    rows = []
    for size in sizes:
        for density in densities:
            show(f"{size[0]}x{size[1]} at {density:g}")
            runs = runtimes(size, density, tokens, micro, host)
            rows.append(Row(size, density, str(Block(micro.lanes, 1)), _medians(runs, repeat)))
    return SparseBench(host.description, used, repeat, tokens, rows)


def runtimes(size: tuple[int, int], density: float, tokens: int, micro: Micro, host: Target) -> dict[str, Run]:
    """A call of each runtime on one layer; each returns its product."""
    rng = np.random.default_rng(0)
    block = Block(micro.lanes, 1)
    x = rng.standard_normal((tokens, size[1])).astype(np.float32)
    weight = rng.standard_normal(size).astype(np.float32)
    weight *= masks.by_block(weight, density, block)
    made = {f"fp32 {mode}": _ours(x, weight, host, mode) for mode in ("dense", "sparse")}
    # int8: blocks of as many inputs as one product takes.
    narrow = Block(micro.lanes, int8_micro(host.isa).product.kr)
    integers = rng.integers(1, 128, size).astype(np.int8) * masks.by_block(rng.random(size), density, narrow)
    q = rng.integers(0, 100, (tokens, size[1])).astype(host.isa.activation_dtype)
    made |= {f"int8 {mode}": _ours(q, integers, host, mode) for mode in ("dense", "sparse")}
    bsr = scipy.sparse.bsr_matrix(weight, blocksize=(block.rows, block.columns))
    columns = np.ascontiguousarray(x.T)
    made["SciPy BSR"] = lambda: bsr @ columns
    dense, matrix = torch.from_numpy(columns), torch.from_numpy(weight)
    made["PyTorch dense"] = functools.partial(torch.nn.functional.linear, torch.from_numpy(x), matrix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the layouts are in beta, it says
        made["PyTorch CSR"] = functools.partial(torch.matmul, matrix.to_sparse_csr(), dense)
        square = (block.rows, block.rows)
        made["PyTorch BSR"] = functools.partial(torch.matmul, matrix.to_sparse_bsr(square), dense)
    return made


def _ours(x: Array, weight: Array, host: Target, mode: str) -> Run:
    """A call of tvmq's kernel for x @ weight.T, its sums as they are."""
    out = "float32" if x.dtype == np.float32 else "int32"
    var = relax.Var("x", relax.TensorType(list(x.shape), str(x.dtype)))
    builder = relax.BlockBuilder()
    with builder.function("main", [var]):
        with builder.dataflow():
            constant = ir.constant(np.ascontiguousarray(weight.T))
            call = ops.matmul(var, constant, [], (), out_shape=(len(x), len(weight)), out_dtype=out)
            outputs = builder.emit_output(relax.Tuple([builder.emit(call, "y")]))
        builder.emit_func_output(outputs)
    lowered = lower(builder.get(), host, sparse=Sparse.FORCE if mode == "sparse" else Sparse.OFF)
    machine = relax.VirtualMachine(build(schedule(lowered.module, host), host).jit(), tvm.cpu())
    tensors = [tvm.runtime.tensor(array) for array in (x, *lowered.parameters.values())]
    return lambda: machine["main"](*tensors)[0]


def _medians(runs: dict[str, Run], repeat: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeat):
        for name, call in runs.items():
            time.sleep(_PAUSE)
            call()  # wakes the threads
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: float(np.median(found)) * 1e3 for name, found in times.items()}
