"""Linear layers in each precision beside PyTorch's float32, for few rows and for many; what they read of their weights.

Each layer has several copies of its weights, which take turns: together they are more than caches hold, as the layers
of a large model are, so that every call reads its weights from memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import tvm
from tvm import relax

from tvmq.deploy.session import LocalSession
from tvmq.detect import detect_host
from tvmq.kernels.lower import lower
from tvmq.kernels.schedule import build, schedule
from tvmq.measure import peak
from tvmq.measure.report import figure, percent, table
from tvmq.quantize.annotate import annotate
from tvmq.quantize.plan import make_plan
from tvmq.quantize.realize import realize
from tvmq.recipe import Recipe
from tvmq.recipe_values import Precision, WeightLevels
from tvmq.target import Target

Array = npt.NDArray[Any]
Progress = Callable[[str], None]
Run = Callable[[], object]
# Inputs and outputs of the layers: those of the attention of a model with 7e9 parameters.
SIZE = (4096, 4096)
ROWS = (1, 128)
RECIPES = (
    Recipe(),
    Recipe(precision=Precision.INT8_DYNAMIC),
    Recipe(precision=Precision.INT8_WEIGHT),
    Recipe(precision=Precision.INT4_WEIGHT, group_size=32),
    Recipe(precision=Precision.INT4_WEIGHT, group_size=64),
    Recipe(precision=Precision.INT4_WEIGHT, group_size=128),
    Recipe(precision=Precision.INT4_WEIGHT, group_size=32, weight_levels=WeightLevels.CODEBOOK),
)
# All copies of a layer's weights, in bytes: four times the largest last-level cache that cores commonly share.
_COPIES = 128 << 20
# Seconds between two runtimes: worker threads of the one before spin until they sleep.
_PAUSE = 0.05
PEER = "PyTorch fp32"


@dataclass(frozen=True)
class Layer:
    """A layer ready to run: its kernels, the bytes of its weights, and a call for each copy of them."""

    name: str
    kernels: str
    weight_bytes: int
    runs: Sequence[Run]


@dataclass(frozen=True)
class Row:
    """One layer at one number of rows: the median milliseconds of a call.

    gbytes: 10^9 bytes of weights a second, scales included; share: of the measured bandwidth. gmacs: 10^9
    multiply-accumulates a second. ratio: PyTorch's median over this one.
    """

    rows: int
    layer: str
    kernels: str
    weight_bytes: int
    ms: float
    gbytes: float
    share: float
    gmacs: float
    ratio: float


@dataclass(frozen=True)
class Matvec:
    """All layers, and what they were measured on. bandwidth: 10^9 bytes a second read from memory."""

    processor: str
    threads: int
    repeat: int
    size: tuple[int, int]
    bandwidth: float
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """One row a layer and number of rows."""
        inputs, outputs = self.size
        head = (
            f"Linear layers of {inputs} inputs and {outputs} outputs, {self.threads} threads of {self.processor}; "
            f"medians of {self.repeat} rounds in turns, weights from memory, which gives {self.bandwidth:.1f} GB/s\n"
        )
        columns = ("rows", "layer", "kernel", "weights MB", "ms", "GB/s", "of memory", "GMAC/s", f"{PEER} / it")
        cells = (
            (
                row.rows,
                row.layer,
                row.kernels,
                figure(row.weight_bytes / 1e6, 1),
                figure(row.ms, 3),
                figure(row.gbytes, 1),
                percent(row.share),
                figure(row.gmacs, 0),
                figure(row.ratio),
            )
            for row in self.rows
        )
        return f"{head}\n{table(columns, cells)}"


def run(
    rows: Sequence[int] = ROWS,
    size: tuple[int, int] = SIZE,
    *,
    threads: int = 0,
    repeat: int = 10,
    copies: int = _COPIES,
    progress: Progress | None = None,
) -> Matvec:
    """Measure all layers on this machine.

    threads: 0 means all real cores. copies: the bytes of all copies of a layer's weights.
    """
    show = progress or (lambda _text: None)
    host = detect_host()
    used = LocalSession().configure_threads(threads)
    weight = np.random.default_rng(0).standard_normal(size).astype(np.float32) * np.float32(size[0] ** -0.5)
    show("bandwidth of memory")
    bandwidth = peak.bandwidth(host, used) * 1e-9
    found: list[Row] = []
    for count in rows:
        x = np.random.default_rng(1).standard_normal((count, size[0])).astype(np.float32)
        layers = []
        for recipe in RECIPES:
            show(f"{count} rows: {_name(recipe)}")
            layers.append(layer(recipe, x, weight, host, copies))
        layers.append(_peer(x, weight, used, copies))
        show(f"{count} rows: {repeat} rounds")
        ms = dict(zip([made.name for made in layers], _medians(layers, repeat), strict=True))
        found += [_row(made, count, size, ms, bandwidth) for made in layers]
    return Matvec(host.description, used, repeat, size, bandwidth, found)


def layer(recipe: Recipe, x: Array, weight: Array, target: Target, copies: int = _COPIES) -> Layer:
    """The layer x @ weight for a recipe without calibration, on rows like `x`."""
    module = _product(x.shape, weight)
    plan = make_plan(module, None, recipe, {})
    lowered = lower(realize(annotate(module, plan, recipe), target.isa.activation_dtype), target)
    machine = relax.VirtualMachine(build(schedule(lowered.module, target), target).jit(), tvm.cpu())
    weights = list(lowered.parameters.values())
    size = sum(array.nbytes for array in weights)
    first = tvm.runtime.tensor(x)

    def call(tensors: list[Any]) -> Run:
        return lambda: machine["main"](first, *tensors)

    runs = [call([tvm.runtime.tensor(array) for array in weights]) for _ in range(_count(size, copies))]
    return Layer(_name(recipe), ", ".join(dict.fromkeys(lowered.kernels.values())), size, runs)


def _product(shape: tuple[int, ...], weight: Array) -> tvm.IRModule:
    """A canonical module that multiplies rows of `shape` with `weight`."""
    x = relax.Var("x", relax.TensorType(list(shape), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.matmul(x, relax.const(weight, "float32")), "y")
            outputs = builder.emit_output(relax.Tuple([y]))
        builder.emit_func_output(outputs)
    return builder.get()


def _peer(x: Array, weight: Array, threads: int, copies: int) -> Layer:
    torch.set_num_threads(threads)
    first, matrix = torch.from_numpy(x), torch.from_numpy(weight.T.copy())

    def call(matrix: torch.Tensor) -> Run:
        def product() -> object:
            with torch.inference_mode():
                return torch.nn.functional.linear(first, matrix)

        return product

    runs = [call(matrix.clone()) for _ in range(_count(weight.nbytes, copies))]
    return Layer(PEER, "", weight.nbytes, runs)


def _count(size: int, copies: int) -> int:
    return max(2, math.ceil(copies / size))


def _medians(layers: Sequence[Layer], repeat: int) -> Iterable[float]:
    """Milliseconds of a call of each layer; a round takes every copy of every layer once."""
    times = np.zeros((repeat, len(layers)))
    for index in range(repeat):
        for column, made in enumerate(layers):
            time.sleep(_PAUSE)
            made.runs[-1]()  # wakes the threads
            begin = time.perf_counter()
            for call in made.runs:
                call()
            times[index, column] = (time.perf_counter() - begin) / len(made.runs)
    return [float(median) * 1e3 for median in np.median(times, axis=0)]


def _row(made: Layer, rows: int, size: tuple[int, int], ms: dict[str, float], bandwidth: float) -> Row:
    mine = ms[made.name]
    gbytes = made.weight_bytes / mine * 1e-6
    gmacs = rows * size[0] * size[1] / mine * 1e-6
    ratio = ms[PEER] / mine
    return Row(rows, made.name, made.kernels, made.weight_bytes, mine, gbytes, gbytes / bandwidth, gmacs, ratio)


def _name(recipe: Recipe) -> str:
    group = recipe.weight_group(recipe.precision)
    levels = "" if recipe.weight_levels is WeightLevels.NONE else f" {recipe.weight_levels.value}"
    named = f"{recipe.precision.value}{levels}"
    return f"{named}, groups of {group}" if group is not None else named
