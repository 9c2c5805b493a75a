"""Linear layers with sparse weights beside the same layers dense, SciPy's BSR and PyTorch's sparse tensors.

All multiply the same activations with the same weights, whose zeros come in blocks of a vector of output channels or
anywhere; repeats take turns. SciPy computes on one thread. OpenVINO's sparse weight decompression takes int8 layers.
"""

from __future__ import annotations

import functools
import itertools
import time
import timeit
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
import tvm
from tvm import relax

from tvmq import ir, op_calls
from tvmq.deploy.session import LocalSession
from tvmq.detect import detect_host
from tvmq.files import scratch_folder
from tvmq.isa import Int8Dot
from tvmq.kernels.lower import lower
from tvmq.kernels.micro_floats import float_micro
from tvmq.kernels.micro_integers import int8_micro
from tvmq.kernels.schedule import build, schedule
from tvmq.measure import peers
from tvmq.measure.report import figure, table
from tvmq.recipe_values import Sparse
from tvmq.sparse import masks
from tvmq.sparse.masks import SINGLE, Block
from tvmq.target import Target

Array = npt.NDArray[Any]
Progress = Callable[[str], None]
Run = Callable[[], object]
# (output channels, inputs) of the layers of BERT-base, and tokens.
SIZES = ((768, 768), (3072, 768), (768, 3072))
TOKENS = 128
DENSITIES = (0.2, 0.1, 0.05)
# OpenVINO's option, and how it is told that a weight with half of its elements zero is sparse.
SPARSE_RATE = {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": "0.5"}
NO_TILES = (
    "OpenVINO's sparse weights need matrix tiles (AMX), which this processor lacks: its layer runs as a dense one"
)
# Calls of a round.
_CALLS = 3
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
    notes: list[str] = field(default_factory=list)

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
        return f"{head}\n{table(columns, cells)}" + "".join(f"\n{note}\n" for note in self.notes)


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
    missing = _missing()
    for size, block, density in itertools.product(sizes, (Block(micro.lanes, 1), SINGLE), densities):
        show(f"{size[0]}x{size[1]} at {density:g} in {block}")
        runs = runtimes(size, density, tokens, block, host)
        if not missing and block != SINGLE:
            runs["OpenVINO int8 sparse"] = _openvino(size, density, tokens, block, used)
        rows.append(Row(size, density, str(block), _medians(runs, repeat)))
    notes = [f"OpenVINO: {missing}"] if missing else [] if host.isa.int8_dot is Int8Dot.AMX else [NO_TILES]
    return SparseBench(host.description, used, repeat, tokens, rows, notes)


def runtimes(size: tuple[int, int], density: float, tokens: int, block: Block, host: Target) -> dict[str, Run]:
    """A call of each runtime on one layer; each returns its product."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, size[1])).astype(np.float32)
    weight = rng.standard_normal(size).astype(np.float32)
    weight *= masks.by_block(weight, density, block)
    made = {f"fp32 {mode}": _ours(x, weight, host, mode) for mode in ("dense", "sparse")}
    # int8: blocks of as many inputs as one product takes.
    narrow = Block(block.rows, int8_micro(host.isa).product.kr)
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
        if block != SINGLE:
            square = (block.rows, block.rows)
            made["PyTorch BSR"] = functools.partial(torch.matmul, matrix.to_sparse_bsr(square), dense)
    return made


def _missing() -> str:
    """Why OpenVINO cannot take part, or nothing."""
    return next(peer for peer in peers.peers() if peer.name == "OpenVINO NNCF").missing()


def _openvino(size: tuple[int, int], density: float, tokens: int, block: Block, threads: int) -> Run:
    """OpenVINO's layer of int8 weights with zeros, told to store them without."""
    rng = np.random.default_rng(0)
    layer = torch.nn.Linear(size[1], size[0], bias=False)
    weight = rng.standard_normal(size).astype(np.float32)
    layer.weight.data = torch.from_numpy(weight * masks.by_block(weight, density, block))
    example = (torch.from_numpy(rng.standard_normal((tokens, size[1])).astype(np.float32)),)
    with scratch_folder() as folder:
        subject = peers.Subject("linear", layer.eval(), example, peers.samples(example, 4), threads, folder)
        return peers.openvino_int8(subject, SPARSE_RATE)


def _ours(x: Array, weight: Array, host: Target, mode: str) -> Run:
    """A call of tvmq's kernel for x @ weight.T, its sums as they are."""
    out = "float32" if x.dtype == np.float32 else "int32"
    var = relax.Var("x", relax.TensorType(list(x.shape), str(x.dtype)))
    builder = relax.BlockBuilder()
    with builder.function("main", [var]):
        with builder.dataflow():
            constant = ir.constant(np.ascontiguousarray(weight.T))
            call = op_calls.matmul(var, constant, [], (), out_shape=(len(x), len(weight)), out_dtype=out)
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
            # The best of some calls: threads of the runtime before may still hold a core.
            times[name].append(min(timeit.repeat(call, number=1, repeat=_CALLS)))
    return {name: float(np.median(found)) * 1e3 for name, found in times.items()}
