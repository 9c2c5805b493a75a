"""A candidate: the kernels of one task with one decision, written by lowering itself, compiled, linked, and timed.

A folder holds it: lib.so, and program.json that says which kernels to call in which order on which tensors (an operator
may need its image padded first). Equal kernels have one folder, named by their content, which serves as a cache.

On this machine each call gets another copy of the weights, as far from the processor as they are in the model, whose
other weights pass through the caches between two calls: kernels that win with theirs at hand may lose there.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
import tvm_ffi
from tvm import tirx

from tvmq import ir
from tvmq._version import __version__
from tvmq.deploy.crosslink import linker
from tvmq.deploy.permission import ask
from tvmq.deploy.session import LocalSession, Session
from tvmq.errors import TuningError
from tvmq.files import atomic_write_text
from tvmq.kernels import builder, pipeline, tiles
from tvmq.kernels.builder import stored_dtype
from tvmq.kernels.decision import TUNED, Decision
from tvmq.kernels.lower import lower
from tvmq.kernels.lowering import Lowered
from tvmq.kernels.task import Task, module_of
from tvmq.target import Target

Array = npt.NDArray[Any]
LIBRARY, PROGRAM = "lib.so", "program.json"
# Of program.json: the cache outlives a version.
_FORMAT = 2
# A model's copies of weights take no more memory than this, and are no more than so many.
_MOST_BYTES, _MOST_COPIES = 256 << 20, 256
# The bits of 1.0 in bfloat16, which kernels take as uint16: small integers would be denormal numbers.
_BF16_ONE = 0x3F80


@dataclass(frozen=True)
class Forced:
    """Records that know one decision for everything."""

    decision: Decision

    def decisions(self, task: Task) -> Sequence[tuple[Decision, str]]:
        """See `decision.Records`."""
        del task
        return ((self.decision, TUNED),)


@dataclass(frozen=True)
class Timing:
    """How a candidate is timed: `repeat` measurements of at least `min_repeat_ms`, on `threads` threads.

    Many short ones: the least of them was disturbed by nothing. flush: whether everything but the first operand is
    thrown out of the caches before each measurement, which then is one call. model_bytes: of the model's weights, so
    that two uses of the same are so far apart. timeout_s: seconds for a candidate in all.
    """

    threads: int
    repeat: int = 20
    min_repeat_ms: int = 1
    flush: bool = False
    model_bytes: int = 0
    timeout_s: float = 20.0


def build(task: Task, decision: Decision, target: Target, cache: Path) -> Path:
    """The folder of the candidate below `cache`, built where it is not there. Raises TuningError, OutputError."""
    lowered = lower(module_of(task), target, records=Forced(decision))
    if lowered.choices["y"].decision != decision:
        raise TuningError(f"{task}", expected="a legal decision", seen=str(decision))
    functions = {str(var.name_hint): f for var, f in lowered.module.functions.items() if isinstance(f, tirx.PrimFunc)}
    module = builder.module(functions)
    folder = cache / _key(module, target)
    # The program is written last: where it is, all is.
    if not (folder / PROGRAM).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tvm.transform.PassContext(opt_level=3):
            library = tvm.compile(module, target=target.tvm_target(), tir_pipeline=pipeline.register())
        library.export_library(str(folder / LIBRARY), fcompile=linker(target.zig_triple))
        atomic_write_text(folder / PROGRAM, json.dumps(_program(lowered)))
    return folder


def _key(module: tvm.IRModule, target: Target) -> str:
    options = json.dumps(target.tvm_options(), sort_keys=True) + f"{target.zig_triple} {__version__} {_FORMAT}"
    return f"{_hash(module)}-{_hash(options)}"


def _hash(value: Any) -> str:
    return f"{tvm_ffi.structural_hash(value) & (1 << 64) - 1:016x}"


def _program(lowered: Lowered) -> dict[str, Any]:
    """tensors: name -> (shape, dtype); weights: names of those; calls: (kernel, names of its arguments)."""
    tensors: dict[str, Any] = {}
    calls = []
    for var, value in ir.bindings(lowered.module):
        if not ir.is_call(value, "call_tir"):
            continue
        operands = [*value.args[1].fields, var]
        tensors |= {str(v.name): (list(ir.shape_of(v)), stored_dtype(ir.dtype_of(v))) for v in operands}
        calls.append((str(value.args[0].name_hint), [str(v.name) for v in operands]))
    params = ir.main(lowered.module).params
    weights = [str(param.name) for param in params[len(params) - len(lowered.parameters) :]]
    asks = any(str(var.name_hint) == tiles.PERMISSION for var in lowered.module.get_global_vars())
    return {"tensors": tensors, "weights": weights, "calls": calls, "tiles": asks}


def run(folder: Path, session: Session, library: Any, timing: Timing) -> list[float]:
    """Seconds of each repeat of a loaded candidate, sorted; on a board the sum over its kernels, each timed alone."""
    program = json.loads((folder / PROGRAM).read_text(encoding="utf-8"))
    if program["tiles"]:
        ask(session, library, "a candidate")
    tensors = {name: session.tensor(_values(*like)) for name, like in program["tensors"].items()}
    if isinstance(session, LocalSession) and timing.model_bytes and not timing.flush:
        return sorted(_in_turns(program, library, tensors, timing))
    total = np.zeros(timing.repeat)
    for symbol, names in program["calls"]:
        args = [tensors[name] for name in names]
        total += np.sort(session.call(lambda: _seconds(library, symbol, session.device, args, timing)))  # noqa: B023
    return [float(seconds) for seconds in total]


def _in_turns(program: dict[str, Any], library: Any, tensors: dict[str, Any], timing: Timing) -> Iterator[float]:
    """Seconds of an average call in each repeat, every call with the next copy of the weights."""
    weights = {name: tensors[name].numpy() for name in program["weights"] if name in tensors}
    own = sum(array.nbytes for array in weights.values())
    count = min(_MOST_COPIES, -(-min(timing.model_bytes, _MOST_BYTES) // own)) if own else 1
    copies = [{name: tvm.runtime.tensor(array) for name, array in weights.items()} for _ in range(count - 1)]
    kernels = [(library[symbol], names) for symbol, names in program["calls"]]
    inferences = [
        [(kernel, [(tensors | copy)[name] for name in names]) for kernel, names in kernels] for copy in [{}, *copies]
    ]
    turns = itertools.cycle(inferences)

    def seconds(calls: int) -> float:
        taken = list(itertools.islice(turns, calls))
        start = time.perf_counter()
        for inference in taken:
            for kernel, args in inference:
                kernel(*args)
        return (time.perf_counter() - start) / calls

    seconds(len(inferences))
    calls = max(1, round(timing.min_repeat_ms / 1e3 / seconds(1)))
    return (seconds(calls) for _ in range(timing.repeat))


def _seconds(library: Any, symbol: str, device: Any, args: Sequence[Any], timing: Timing) -> Array:
    timer = library.time_evaluator(
        symbol,
        device,
        number=1,
        repeat=timing.repeat,
        min_repeat_ms=0 if timing.flush else timing.min_repeat_ms,
        f_preproc="cache_flush_cpu_non_first_arg" if timing.flush else "",
    )
    return np.array(timer(*args).results)


def _values(shape: Sequence[int], dtype: str) -> Array:
    """1, 0, 1, 0, ..."""
    ones = np.arange(int(np.prod(shape))) % 2
    return (ones * (_BF16_ONE if dtype == "uint16" else 1)).astype(dtype).reshape(shape)
