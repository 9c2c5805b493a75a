"""Runs a bundle: set inputs, run, get outputs, benchmark, profile; on this machine or on a board."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax

from tvmq.deploy import bundle as bundles
from tvmq.deploy.bundle import Bundle
from tvmq.deploy.latency import Latency, latency
from tvmq.deploy.permission import allow_tiles
from tvmq.deploy.prepared import on_device, results_of
from tvmq.deploy.session import Session, connect
from tvmq.errors import SignatureError
from tvmq.model import Signature, as_array
from tvmq.quantize.partition import Conversions

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class OpTime:
    """One kernel call of an inference: the operator's variable, the kernel, its precision, milliseconds.

    bytes: of its operands and results.
    """

    name: str
    kernel: str
    precision: str
    ms: float
    bytes: int


def load(path: str | Path | Bundle, device: str = "host", *, threads: int = 0) -> Executor:
    """An executor for the bundle at `path` on `device`: "host", or an address (see tvmq.deploy.address).

    `threads`: 0 means all real cores here, and the target's cores on a board.
    Raises BundleError, IsaError, DeviceError.
    """
    bundle = path if isinstance(path, Bundle) else bundles.read(path)
    session = connect(device)
    try:
        return executor_of(bundle, session, threads=threads)
    except BaseException:  # Ctrl-C too must leave the board to others
        session.close()
        raise


def executor_of(bundle: Bundle, session: Session, *, threads: int = 0) -> Executor:
    """An executor for a bundle of one size or of several. Raises BundleError, IsaError, DeviceError."""
    kind = Executor if bundle.dynamic is None else DynamicExecutor
    return kind(bundle, session, threads=threads)


class Executor:
    """A bundle on a device, with the habits of a graph executor. `threads`: how many it runs on.

    `shared`: parameters that other executors have brought to the device, which learns of more.

    A context manager: a board is free for others when it ends, or when Python has collected the executor.
    """

    def __init__(
        self, bundle: Bundle, session: Session, *, threads: int = 0, shared: dict[Any, Any] | None = None
    ) -> None:
        session.check(bundle)
        self.bundle, self.session = bundle, session
        self.signature: Signature = bundle.signature
        wanted = threads if threads or session.name == "host" else int(bundle.manifest["target"]["cores"])
        self.threads = session.configure_threads(wanted)
        self.library = session.load(bundle)
        allow_tiles(bundle, session, self.library)
        self._machine = session.call(lambda: relax.VirtualMachine(self.library, session.device))
        self._parameters = on_device(bundle, session, self._machine, {} if shared is None else shared)
        self._inputs: dict[str, Any] = {}
        self._outputs: list[Any] | None = None

    def set_input(self, key: str | int | None = None, value: object = None, **inputs: object) -> None:
        """Set one input by name or index, or several by keyword. Raises SignatureError."""
        if key is not None:
            inputs = {self._input_name(key): value, **inputs}
        for name, item in inputs.items():
            spec = self.signature.inputs[self._input_index(name)]
            self._inputs[name] = self.session.tensor(spec.check(as_array(item)))
        self._outputs = None

    def run(self) -> None:
        """One inference on the inputs that were set. Raises SignatureError where one is missing."""
        self._bind()
        self.session.call(lambda: self._machine.invoke_stateful("main"))
        self._outputs = self.session.call(lambda: results_of(self._machine, "main"))

    def get_output(self, index: int = 0) -> Array:
        """Output `index` of the last run. Raises SignatureError where there is none."""
        return self.session.fetch(self._of_last_run(self._outputs, index))

    def __call__(self, *inputs: object, **named: object) -> tuple[Array, ...]:
        """One inference: inputs in order or by name, arrays or torch tensors; all outputs. Raises SignatureError."""
        arrays = self.signature.arrays(_values(inputs, named))
        for spec, array in zip(self.signature.inputs, arrays, strict=True):
            self._inputs[spec.name] = self.session.tensor(array)
        self.run()
        return tuple(self.get_output(i) for i in range(len(self.signature.outputs)))

    def quantize(self, *inputs: object) -> tuple[Array, ...]:
        """The int8 inputs of a bundle compiled with `integer_io`, from the model's float ones; else the inputs."""
        return self._conversions().quantize(tuple(as_array(value) for value in inputs))

    def dequantize(self, *outputs: Array) -> tuple[Array, ...]:
        """The model's float outputs, from the int8 ones of a bundle compiled with `integer_io`; else the outputs."""
        return self._conversions().dequantize(outputs)

    def _conversions(self) -> Conversions:
        return Conversions.from_dict(self.bundle.manifest.get("conversions") or {"inputs": {}, "outputs": {}})

    def benchmark(self, repeat: int = 10, number: int = 1, min_repeat_ms: int = 50, warmup: int = 3) -> Latency:
        """Latency over `repeat` measurements of at least `number` inferences and `min_repeat_ms`, after `warmup` runs.

        Inputs that were not set are the golden ones.
        """
        self._fill()
        self._bind()
        for _ in range(warmup):
            self.session.call(lambda: self._machine.invoke_stateful("main"))
        timer = self._machine.time_evaluator(
            "invoke_stateful", self.session.device, number=number, repeat=repeat, min_repeat_ms=min_repeat_ms
        )
        times = np.array(self.session.call(lambda: timer("main")).results) * 1e3
        return latency(times, number, self.threads)

    def runner(self) -> Callable[[], object]:
        """A function that runs one inference on the inputs that are set (else the golden ones), and nothing else."""
        self._fill()
        self._bind()
        invoke = self._machine.module["invoke_stateful"]
        return lambda: invoke("main")

    def profile(self, *inputs: object, repeat: int = 5) -> list[OpTime]:
        """Milliseconds of each kernel call, median over `repeat` rounds, in order.

        Kernels are timed one after another with the tensors of a real inference.
        """
        from tvmq.deploy.steps import StepRunner

        if inputs:
            for spec, array in zip(self.signature.inputs, self.signature.arrays(inputs), strict=True):
                self._inputs[spec.name] = self.session.tensor(array)
        runner = StepRunner(self.bundle, self.session, self.library)
        return runner.profile(self._machine, self.tensors(), repeat)

    def tensors(self) -> dict[str, Any]:
        """The inputs that are set (else the golden ones), and what main takes after them, by name, on the device."""
        self._fill()
        return {**self._inputs, **self._parameters}

    def close(self) -> None:
        """Let go of the device; only outputs that were fetched are left."""
        self.session.close()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def machine(self) -> Any:
        """The virtual machine that runs the bundle."""
        return self._machine

    def _fill(self) -> None:
        golden, _ = self.bundle.golden()
        for spec, array in zip(self.signature.inputs, golden, strict=True):
            if spec.name not in self._inputs:
                self._inputs[spec.name] = self.session.tensor(array)

    def _bind(self) -> None:
        self._check_inputs(self._inputs)
        values = [self._inputs[spec.name] for spec in self.signature.inputs]
        self.session.call(lambda: self._machine.set_input("main", *values, *self._parameters.values()))

    def _check_inputs(self, given: Mapping[str, object]) -> None:
        missing = [spec.name for spec in self.signature.inputs if spec.name not in given]
        if missing:
            raise SignatureError("run", expected="every input set", seen=f"nothing for {', '.join(missing)}")

    def _of_last_run(self, outputs: Sequence[Any] | None, index: int) -> Any:
        if outputs is None:
            raise SignatureError("get_output", expected="a run before it", seen="none since the inputs were set")
        if not 0 <= index < len(outputs):
            raise SignatureError("get_output", expected=f"an index below {len(outputs)}", seen=index)
        return outputs[index]

    def _input_name(self, key: str | int) -> str:
        if isinstance(key, str):
            return key
        if not 0 <= key < len(self.signature.inputs):
            raise SignatureError("set_input", expected=f"an index below {len(self.signature.inputs)}", seen=key)
        return self.signature.inputs[key].name

    def _input_index(self, name: str) -> int:
        names = [spec.name for spec in self.signature.inputs]
        if name not in names:
            raise SignatureError("set_input", expected=f"one of {', '.join(names)}", seen=repr(name))
        return names.index(name)


class DynamicExecutor(Executor):
    """A bundle of several sizes: an inference runs in the program of the next size, padded and cut (`tvmq/dynamic.py`).

    `signature` is the smallest program's: inputs may be larger along the axes that vary. Without inputs that were set,
    what is timed is the smallest program.
    """

    def __init__(self, bundle: Bundle, session: Session, *, threads: int = 0) -> None:
        assert bundle.dynamic is not None
        self.bundle, self.session, self.dynamic = bundle, session, bundle.dynamic
        self.signature = bundle.signature
        shared: dict[Any, Any] = {}
        executors = [Executor(one, session, threads=threads, shared=shared) for one in bundle.programs()]
        self._executors = dict(zip(self.dynamic.sizes, executors, strict=True))
        self.threads, self.library = executors[0].threads, executors[0].library
        self._given: dict[str, Array] = {}
        self._results: tuple[Array, ...] | None = None

    def set_input(self, key: str | int | None = None, value: object = None, **inputs: object) -> None:
        """Set one input by name or index, or several by keyword. Raises SignatureError."""
        if key is not None:
            inputs = {self._input_name(key): value, **inputs}
        for name, item in inputs.items():
            spec = self.signature.inputs[self._input_index(name)]
            self._given[name] = self.dynamic.checked(spec, as_array(item))
        self._results = None

    def run(self) -> None:
        """One inference on the inputs that were set. Raises SignatureError where one is missing, or no program fits."""
        self._check_inputs(self._given)
        executor = self._fed()
        executor.run()
        outputs = [executor.get_output(i) for i in range(len(self.signature.outputs))]
        size = self.dynamic.size_of(self._given)
        self._results = tuple(outputs) if self.dynamic.exact else self.dynamic.cut(outputs, size)

    def get_output(self, index: int = 0) -> Array:
        """Output `index` of the last run. Raises SignatureError where there is none."""
        found: Array = self._of_last_run(self._results, index)
        return found

    def __call__(self, *inputs: object, **named: object) -> tuple[Array, ...]:
        """One inference: inputs in order or by name, arrays or torch tensors; all outputs. Raises SignatureError."""
        self._take(_values(inputs, named))
        self.run()
        assert self._results is not None
        return self._results

    def benchmark(self, repeat: int = 10, number: int = 1, min_repeat_ms: int = 50, warmup: int = 3) -> Latency:
        """Latency of the program of the inputs that were set, else of the smallest."""
        return self._fed().benchmark(repeat, number, min_repeat_ms, warmup)

    def runner(self) -> Callable[[], object]:
        """A function that runs one inference on the inputs that are set, else on the smallest program's golden ones."""
        return self._fed().runner()

    def profile(self, *inputs: object, repeat: int = 5) -> list[OpTime]:
        """Milliseconds of each kernel call, median over `repeat` rounds, in order."""
        if inputs:
            self._take(inputs)
        return self._fed().profile(repeat=repeat)

    def tensors(self) -> dict[str, Any]:
        """The inputs, padded, and the parameters of the program that runs them."""
        return self._fed().tensors()

    @property
    def machine(self) -> Any:
        """The virtual machine that runs the inputs that are set, else the smallest program's."""
        return self._fed().machine

    def _take(self, values: object) -> None:
        arrays = self.dynamic.arrays(self.signature, values)
        self._given = {spec.name: array for spec, array in zip(self.signature.inputs, arrays, strict=True)}
        self._results = None

    def _fed(self) -> Executor:
        """The executor of the next size, with the inputs that are set, padded; the smallest one where none is set."""
        if not self._given:
            return self._executors[self.dynamic.sizes[0]]
        self._check_inputs(self._given)
        size = self.dynamic.program_for(self.dynamic.size_of(self._given))
        executor = self._executors[size]
        for name, array in self._given.items():
            executor.set_input(name, self.dynamic.padded(name, array, size))
        return executor


def _values(inputs: tuple[object, ...], named: Mapping[str, object]) -> object:
    """What a call passes: inputs by keyword, one mapping, or in order."""
    return named if named else inputs[0] if len(inputs) == 1 and isinstance(inputs[0], Mapping) else inputs
